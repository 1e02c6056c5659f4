"""Mutual information and the correlation ratio against dense histograms, other packages, closed forms and laws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.interpolate
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import equal_bits, few, known_pair, random_mapping, tensor, uniform, voxels_apart
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, grad_and_value, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import Grid, Image, Mapping, Rigid, native, register
from fnreg.filters import gaussian
from fnreg.histogram import PART, joint_histogram
from fnreg.losses import information
from fnreg.losses.information import correlation_ratio, mi, nmi

# torch's forward mode compiles its own decompositions with torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Measure = Callable[..., Tensor]
MEASURES: dict[str, Measure] = {"mi": mi, "nmi": nmi, "correlation_ratio": correlation_ratio}
WORST = {"mi": 0.0, "nmi": -1.0, "correlation_ratio": 1.0}
every_measure = pytest.mark.parametrize("name", MEASURES)
shapes = st.sampled_from([(1, 7), (3, 5), (1, 4, 5), (2, 3, 4), (2, 3, 2, 4)])
seeds = st.integers(0, 2**16)
some_bins = st.sampled_from([4, 5, 8, 32])


@pytest.fixture(params=["C", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels, and what serves without them."""
    if request.param == "C":
        if native.load() is None:
            pytest.skip("needs a C compiler")
        yield "C"
        return
    with mock.patch.object(native, "serves", lambda *_, **__: False):
        yield "torch"


def images(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Two that have something to do with each other."""
    fixed = uniform(*shape, seed=seed)
    return fixed.square() + 0.2 * uniform(*shape, seed=seed + 1), fixed


def some_weights(shape: tuple[int, ...], seed: int) -> Tensor:
    """In [0, 1], some of them zero, some below a tenth of the greatest; at least three are positive."""
    weights = uniform(1, *shape[1:], seed=seed + 2).clamp(min=-0.5).add(0.5) / 1.5
    return torch.cat([weights.flatten()[:-3], tensor([0.03, 0.7, 0.9])]).reshape(weights.shape)


# -- an independent truth ------------------------------------------------------------------------------------------


def dense(values: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """The windows (N, bins) of values that count, by SciPy's B-spline."""
    seen = weights > 0
    middle = np.average(values, weights=weights)
    share = np.minimum(1, 10 * weights / weights.max())
    drawn = (middle + share * (values - middle))[seen]
    low, high = drawn.min(), drawn.max()
    place = 1 + (np.clip(values, low, high) - low) / (high - low) * (bins - 3)
    spline = scipy.interpolate.BSpline.basis_element(np.arange(-2, 3), extrapolate=False)
    return np.nan_to_num(spline(place[:, None] - np.arange(bins)))


def entropy(p: np.ndarray) -> float:
    return -sum(x * math.log(x) for x in p.ravel() if x > 0)


def expected_values(warped: Tensor, fixed: Tensor, weights: Tensor | None, bins: int) -> dict[str, float]:
    """All three, from dense windows."""
    w = np.ones(fixed[0].numel()) if weights is None else weights.numpy().ravel()
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for a, b in zip(warped.flatten(1).numpy(), fixed.flatten(1).numpy(), strict=True):
        of_a, of_b = dense(a, w, bins), dense(b, w, bins)
        p = np.einsum("n,na,nb->ab", w, of_a, of_b) / w.sum()
        of_warped, of_fixed, joint = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p)
        found["mi"].append(joint - of_warped - of_fixed)
        found["nmi"].append(-(of_warped + of_fixed) / joint)
        # the values as the windows see them, without any window of their own
        x = of_a @ np.arange(bins)
        count = (w[:, None] * of_b).sum(0)
        mean = np.divide((w * x) @ of_b, count, out=np.zeros(bins), where=count > 0)
        within = sum(w[n] * of_b[n, k] * (x[n] - mean[k]) ** 2 for n in range(len(w)) for k in range(bins))
        found["correlation_ratio"].append(within / w.sum() / np.average((x - np.average(x, weights=w)) ** 2, weights=w))
    return {name: float(np.mean(values)) for name, values in found.items()}


@given(shapes, seeds, st.booleans(), some_bins)
def test_values_are_those_of_dense_windows(shape: tuple[int, ...], seed: int, weighted: bool, bins: int) -> None:
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed) if weighted else None
    expected = expected_values(warped, fixed, weights, bins)
    for serves in (native.serves, lambda *_, **__: False):
        with mock.patch.object(native, "serves", serves):
            for name, measure in MEASURES.items():
                found = measure(warped, fixed, weights, bins=bins)
                assert_close(found, tensor(expected[name]), atol=1e-11, rtol=0)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.8])
def test_normal_samples_have_the_information_of_their_correlation(rho: float) -> None:
    """-log(1 - rho^2) / 2.  A window adds its variance, of a third of a squared bin, to each image, and few samples for
    each bin add to the value: what is left falls where both become many."""
    generator = np.random.default_rng(3)
    far = []
    for count, bins in ((30_000, 24), (1_000_000, 64)):
        a, b = generator.standard_normal((2, count))
        b = rho * a + math.sqrt(1 - rho**2) * b
        found = -float(mi(tensor(a[None]), tensor(b[None]), bins=bins))
        wide = [1 + ((x.max() - x.min()) / (bins - 3)) ** 2 / 3 for x in (a, b)]
        blurred = -math.log(1 - rho**2 / (wide[0] * wide[1])) / 2
        assert abs(found - blurred) < 0.01
        far.append(abs(found + math.log(1 - rho**2) / 2))
    assert far[1] < 0.025 and far[1] < max(0.3 * far[0], 0.003)
    ratio = float(correlation_ratio(tensor(a[None]), tensor(b[None]), bins=64))
    assert abs(ratio - (1 - rho**2)) < 0.01


def smooth_pair(side: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two smooth images (1, side, side) of different contrast that are not quite aligned, float64."""
    scene = gaussian(uniform(1, side + 2, side + 2, seed=seed), 2.0)
    return scene[:, 1:-1, 2:].square(), scene[:, 1:-1, 1:-1]


def test_mutual_information_is_near_that_of_itk() -> None:
    """ITK's window for the fixed image is a box of one bin, and its range leaves two bins at each end."""
    sitk = pytest.importorskip("SimpleITK")
    for seed in range(3):
        warped, fixed = smooth_pair(200, seed)
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
        method.SetInitialTransform(sitk.TranslationTransform(2))
        expected = method.MetricEvaluate(*(sitk.GetImageFromArray(image[0].numpy()) for image in (fixed, warped)))
        assert_close(mi(warped, fixed), tensor(expected), atol=0.0, rtol=0.08)


def test_normalised_mutual_information_is_near_that_of_skimage() -> None:
    """Whose windows are boxes, which see the contrast between neighbouring bins that splines blur."""
    metrics = pytest.importorskip("skimage.metrics")
    for seed in range(3):
        warped, fixed = smooth_pair(200, seed)
        expected = metrics.normalized_mutual_information(warped[0].numpy(), fixed[0].numpy(), bins=32)
        assert_close(-nmi(warped, fixed, bins=35), tensor(expected), atol=0.0, rtol=0.05)


# -- laws ----------------------------------------------------------------------------------------------------------


@every_measure
@few
@given(seeds)
def test_nothing_is_closer_to_an_image_than_itself(name: str, seed: int) -> None:
    measure, image = MEASURES[name], smooth_pair(24, seed)[1]
    best = float(measure(image, image))
    generator = torch.Generator().manual_seed(seed)
    shuffled = image.flatten()[torch.randperm(image.numel(), generator=generator)].reshape(image.shape)
    before = best
    for shift in (1, 2, 3):
        moved = float(measure(image.roll(shift, 2), image))
        assert moved > before
        before = moved
    assert float(measure(shuffled, image)) > before
    low = {"mi": -math.log(32), "nmi": -2.0, "correlation_ratio": 0.0}[name]
    assert low <= best < before <= WORST[name] + 1e-12


@given(shapes, seeds, st.booleans())
def test_what_is_symmetric(shape: tuple[int, ...], seed: int, weighted: bool) -> None:
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed) if weighted else None
    for measure in (mi, nmi):
        assert_close(measure(warped, fixed, weights), measure(fixed, warped, weights), atol=1e-13, rtol=0)


def test_a_function_that_cannot_be_inverted_foretells_one_way() -> None:
    ramp = torch.linspace(-1, 1, 4000, dtype=torch.float64).reshape(1, -1)
    assert float(correlation_ratio(ramp.square(), ramp)) < 0.03
    assert float(correlation_ratio(ramp, ramp.square())) > 0.97


@every_measure
@given(shapes, seeds, st.floats(1e-4, 1e4), st.floats(-1e3, 1e3), st.booleans())
def test_scale_and_offset_make_no_difference(
    name: str, shape: tuple[int, ...], seed: int, scale: float, offset: float, weighted: bool
) -> None:
    measure = MEASURES[name]
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed) if weighted else None
    expected = measure(warped, fixed, weights)
    for factor in (scale, -scale):
        assert_close(measure(factor * (warped + offset), fixed, weights), expected, atol=1e-8, rtol=0)
        assert_close(measure(warped, factor * (fixed + offset), weights), expected, atol=1e-8, rtol=0)


@given(seeds, st.permutations(range(5)))
def test_names_of_intensities_make_no_difference(seed: int, order: list[int]) -> None:
    """Windows of values four bins apart share no bin, so which is which cannot matter."""
    levels, table = 5, tensor(order)
    generator = np.random.default_rng(seed)
    fixed = torch.from_numpy(generator.integers(0, levels, (1, 60))).double()
    warped = torch.where(torch.from_numpy(generator.uniform(size=(1, 60)) < 0.7), fixed, fixed.flip(1))
    for image in (warped, fixed):
        image[0, :levels] = torch.arange(levels)  # all are there
    bins = 4 * (levels - 1) + 3
    for name, measure in MEASURES.items():
        expected = measure(warped, fixed, bins=bins)
        assert_close(measure(warped, table[fixed.long()], bins=bins), expected, atol=1e-12, rtol=0)
        if name != "correlation_ratio":  # which asks how far apart values are
            assert_close(measure(table[warped.long()], fixed, bins=bins), expected, atol=1e-12, rtol=0)
        assert float(measure(warped.roll(1, 1), fixed, bins=bins)) > float(expected)


def test_monotone_curves_of_contrast_make_little_difference() -> None:
    """And the less, the finer the bins are beside the noise and the more voxels each has."""
    warped, fixed = smooth_pair(600)
    warped, fixed = ((image - image.mean()) / image.std() for image in (warped, fixed))
    warped = warped + 0.5 * uniform(*warped.shape, seed=9)
    for measure in (mi, nmi):
        for curve in (lambda x: (x / 4).exp(), lambda x: x + 0.02 * x**3, lambda x: -(6 + x).sqrt()):
            far = [
                abs(float(measure(warped, curve(fixed), bins=bins)) / float(measure(warped, fixed, bins=bins)) - 1)
                for bins in (12, 48)
            ]
            assert far[1] < 0.04 and far[1] < far[0]


# -- weights -------------------------------------------------------------------------------------------------------


@every_measure
@given(shape=shapes, seed=seeds)
def test_weights_count_voxels(name: str, shape: tuple[int, ...], seed: int) -> None:
    """Weight one is no weight; weight n is the voxel n times; the scale of weights does not matter."""
    measure = MEASURES[name]
    warped, fixed = images(shape, seed)
    ones = torch.ones(1, *shape[1:], dtype=torch.float64)
    assert_close(measure(warped, fixed, ones), measure(warped, fixed), atol=1e-12, rtol=0)
    weights = some_weights(shape, seed)
    assert_close(measure(warped, fixed, 1e3 * weights), measure(warped, fixed, weights), atol=1e-11, rtol=0)
    assert_close(measure(warped, fixed, weights[0]), measure(warped, fixed, weights), atol=0, rtol=0)
    counts = torch.arange(ones.numel()) % 4
    repeated = [image.flatten(1).repeat_interleave(counts, dim=1) for image in (warped, fixed)]
    counted = measure(warped, fixed, counts.to(torch.float64).reshape(ones.shape))
    assert_close(measure(*repeated), counted, atol=1e-12, rtol=0)


@every_measure
@pytest.mark.parametrize("garbage", [1e6, -1e30, math.inf, math.nan])
def test_what_has_no_weight_is_not_there(name: str, garbage: float, path: str) -> None:
    """Masked equals cropped, in the value and in the derivatives, whatever is behind the mask."""
    measure = MEASURES[name]
    warped, fixed = images((2, 6, 7), 3)
    weights = torch.ones(1, 6, 7, dtype=torch.float64)
    weights[:, 2:5, 3:] = 0
    seen = weights[0] > 0
    hidden = torch.where(seen, warped, garbage), torch.where(seen, fixed, -garbage)
    cropped = warped[:, seen], fixed[:, seen]
    assert_close(measure(*hidden, weights), measure(*cropped), atol=1e-13, rtol=0)
    for number in (0, 1):
        slope = grad(measure, argnums=number)(*hidden, weights)
        assert_close(slope[:, seen], grad(measure, argnums=number)(*cropped), atol=1e-13, rtol=0)
        assert not bool(slope[:, ~seen].any())
    by_weights = grad(measure, argnums=2)(*hidden, weights)
    assert bool(torch.isfinite(by_weights).all())
    cropped_weights = torch.ones(1, int(seen.sum()), dtype=torch.float64)
    expected = grad(measure, argnums=2)(*cropped, cropped_weights)
    assert_close(by_weights[:, seen], expected, atol=1e-13, rtol=0)


@every_measure
def test_the_value_does_not_jump_where_a_voxel_comes_in(name: str, path: str) -> None:
    """Even one that is far out of the range of the others; in full it would change the value a thousand times more."""
    measure = MEASURES[name]
    warped, fixed = images((1, 300), 4)
    warped[0, 7], fixed[0, 9] = 5.0, -4.0
    weights = torch.ones(1, 300, dtype=torch.float64)

    def value(weight: float) -> float:
        weights[0, 7] = weights[0, 9] = weight
        return float(measure(warped, fixed, weights))

    away = abs(value(1.0) - value(0.0))
    last = away
    for weight in (1e-2, 1e-4, 1e-6):
        step = abs(value(weight) - value(0.0))
        assert step < last
        last = step
    assert last < 1e-3 * away
    # and none at a tenth, where it begins to count in full
    assert abs(value(0.1 + 1e-7) - value(0.1 - 1e-7)) < 1e-4 * away


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_at_all(name: str, dtype: torch.dtype, path: str) -> None:
    """As bad as can be, without a slope."""
    warped, fixed = (image.to(dtype) for image in images((2, 3, 4), 0))
    weights = torch.zeros(1, 3, 4, dtype=dtype)
    assert MEASURES[name](warped, fixed, weights) == WORST[name]
    for number in (0, 1):
        assert not bool(grad(MEASURES[name], argnums=number)(warped, fixed, weights).any())
    assert bool(torch.isfinite(grad(MEASURES[name], argnums=2)(warped, fixed, weights)).all())


# -- what is wrong with images -------------------------------------------------------------------------------------


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1234, -777.7, 1e6, 1e-6])
def test_an_image_without_contrast_foretells_nothing(name: str, value: float, dtype: torch.dtype, path: str) -> None:
    measure = MEASURES[name]
    _, varied = images((2, 8, 9), 0)
    varied = varied.to(dtype)
    constant = torch.full_like(varied, value)
    nearly = constant * (1 + torch.finfo(dtype).eps * (varied > 0))
    weights = some_weights((2, 8, 9), 0).to(dtype)
    for flat in (constant, nearly):
        for warped, fixed in ((flat, varied), (varied, flat), (flat, flat)):
            for options in ((), (weights,)):
                found = measure(warped, fixed, *options)
                assert_close(found, torch.tensor(WORST[name], dtype=dtype), atol=1e-6, rtol=0)
                slope = grad(measure)(warped, fixed, *options)
                assert bool((slope.abs() < 1e-9).all())
    assert float(measure(varied, varied)) < WORST[name] - 0.3


@every_measure
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_voxel_that_is_no_number_is_not_passed_over(name: str, bad: float, path: str) -> None:
    warped, fixed = images((1, 5, 6), 1)
    broken = warped.clone()
    broken[0, 2, 3] = bad
    weights = some_weights((1, 5, 6), 1) + 0.1
    for options in ((), (weights,)):
        assert bool(torch.isnan(MEASURES[name](broken, fixed, *options)))
        assert bool(torch.isnan(MEASURES[name](warped, torch.where(torch.isfinite(broken), fixed, bad), *options)))
    # and does nothing to the pair beside it
    both = vmap(MEASURES[name])(torch.stack([broken, warped]), torch.stack([fixed, fixed]))
    assert both[1] == MEASURES[name](warped, fixed)


@every_measure
@pytest.mark.parametrize("bins", [3, 1, 0, -5, 8.5, True, math.nan, math.inf, "32"])
def test_bins_are_whole_and_as_many_as_a_window(name: str, bins: Any) -> None:
    image = torch.rand(1, 5)
    with pytest.raises(ValueError, match=r"bins is .*: expected a whole number of at least 4"):
        MEASURES[name](image, image, bins=bins)
    assert MEASURES[name](image, image, bins=8.0) == MEASURES[name](image, image, bins=8)  # as a command line gives it


@every_measure
def test_a_range_that_is_given_is_that_which_is_found(name: str) -> None:
    """Beyond it values are held, and have no slope; within it derivatives are those of differences."""
    measure, images = MEASURES[name], (uniform(2, 40, seed=1), uniform(2, 40, seed=2) - 0.3)
    ends = tuple((float(image[0].min()), float(image[0].max())) for image in images)
    one = [image[:1] for image in images]
    assert_close(measure(*one, bins=9, range=ends), measure(*one, bins=9), atol=1e-14, rtol=0)
    held = [image.clamp(0.1, 0.6) for image in images]
    assert_close(
        measure(*images, bins=9, range=(0.1, 0.6)), measure(*held, bins=9, range=(0.1, 0.6)), atol=1e-14, rtol=0
    )
    slope = grad(lambda x: measure(x, images[1], bins=9, range=(0.1, 0.6)))(images[0])
    outside = (images[0] < 0.1) | (images[0] > 0.6)
    assert bool(outside.any()) and bool((slope[outside] == 0).all()) and bool((slope[~outside] != 0).any())
    given = tuple(
        image.requires_grad_() for image in (0.7 * uniform(1, 12, seed=3) + 0.1, 0.7 * uniform(1, 12, seed=4))
    )
    assert gradcheck(lambda a, b: measure(a, b, bins=5, range=(-0.1, 1.1)), given)
    with mock.patch.object(native, "serves", return_value=False):
        plain = measure(*images, bins=9, range=((0.1, 0.6), (-0.2, 0.5)))
    assert_close(measure(*images, bins=9, range=((0.1, 0.6), (-0.2, 0.5))), plain, atol=1e-13, rtol=0)


@every_measure
@pytest.mark.parametrize("range", [(1.0, 0.0), (0.0,), (), 3.0, (0.0, math.inf), ((0.0, 1.0),), ("a", "b")], ids=str)
def test_ranges_that_are_none(name: str, range: Any) -> None:
    image = torch.rand(1, 5)
    with pytest.raises(ValueError, match=r"range is .*: expected \(least, greatest\) of both images, or two of these"):
        MEASURES[name](image, image, range=range)


@every_measure
def test_shapes_that_do_not_fit(name: str) -> None:
    image, measure = torch.rand(2, 3, 4), MEASURES[name]
    with pytest.raises(ValueError, match=r"warped has shape \(2, 4, 3\) and fixed \(2, 3, 4\): expected one shape"):
        measure(image.mT, image)
    with pytest.raises(ValueError, match=r"warped has shape \(1, 3, 4\) and fixed \(2, 3, 4\): expected one shape"):
        measure(image[:1], image)
    with pytest.raises(ValueError, match="with a voxel at least"):
        measure(torch.rand(1, 0), torch.rand(1, 0))
    with pytest.raises(ValueError, match=r"weights have shape \(2, 3, 4\) beside images \(2, 3, 4\): expected \(1, 3"):
        measure(image, image, torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"warped is torch.int64 and fixed torch.float32: expected floating"):
        measure(image.long(), image)


# -- derivatives ---------------------------------------------------------------------------------------------------


def anchored(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The ends of the range of two images (2, 2), which stay, values within it, and weights for all."""
    warped, fixed = (0.9 * image for image in images((2, 9), seed))
    ends = tensor([[-2.0, 3.0], [-1.5, 2.5]])
    return ends, ends.flip(1), warped, fixed, 0.5 + 0.4 * uniform(1, 11, seed=seed + 5)


@every_measure
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_derivatives(name: str, weighted: bool, path: str) -> None:
    """Those of finite differences to second order, where the voxels at the ends of the range stay."""
    a, b, warped, fixed, weights = anchored(2)

    def value(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        given = (w,) if weighted else ()
        return MEASURES[name](torch.cat([a, x], 1), torch.cat([b, y], 1), *given, bins=7)

    inputs = warped.requires_grad_(), fixed.requires_grad_(), weights.requires_grad_(weighted)
    assert gradcheck(value, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(value, inputs)


def dense_torch(warped: Tensor, fixed: Tensor, weights: Tensor, bins: int) -> Tensor:
    """The histogram (bins, bins) by dense windows of N x bins numbers, with the ranges as constants."""

    def windows(image: Tensor) -> Tensor:
        low, high = image.detach().min(), image.detach().max()
        place = 1 + (image - low) / (high - low) * (bins - 3)
        away = (place.unsqueeze(-1) - torch.arange(bins)).abs()
        near, far = 2 / 3 - away**2 + away**3 / 2, (2 - away) ** 3 / 6
        return torch.where(away < 1, near, torch.where(away < 2, far, 0))

    return torch.einsum("n,na,nb->ab", weights, windows(warped), windows(fixed))


@few
@given(seeds, st.sampled_from([4, 9, 32]))
def test_the_derivative_takes_the_range_as_a_constant(seed: int, bins: int) -> None:
    """At the ends of the range too, and however it is computed."""
    warped, fixed = (image.flatten() for image in images((1, 40), seed))
    weights, table = 0.2 + uniform(40, seed=seed + 7).abs(), uniform(bins, bins, seed=seed + 8)

    def ours(*given: Tensor) -> Tensor:
        return (joint_histogram(*(image.unsqueeze(0) for image in given), bins=bins)[0] * table).sum()

    def theirs(*given: Tensor) -> Tensor:
        return (dense_torch(*given, bins) * table).sum()

    for number in range(3):
        expected = grad(theirs, argnums=number)(warped, fixed, weights)
        for derivative in (grad, jacfwd):
            for serves in (native.serves, lambda *_, **__: False):
                with mock.patch.object(native, "serves", serves):
                    found = derivative(ours, argnums=number)(warped, fixed, weights)
                assert_close(found, expected, atol=1e-10, rtol=1e-10)


@every_measure
def test_vmap_equals_the_loop(name: str, path: str) -> None:
    warped, fixed, weights = uniform(5, 2, 3, 4, seed=1), uniform(5, 2, 3, 4, seed=2), uniform(5, 1, 3, 4, seed=3).abs()

    def measure(*given: Any) -> Tensor:
        return MEASURES[name](*given, bins=6)

    for number in (0, 1, 2):
        one_grad: Any = grad(measure, argnums=number)
        functions: list[Any] = [measure, one_grad, jacrev(measure, number), jacfwd(measure, number)]
        for function in (*functions, jacrev(one_grad, number), jacfwd(one_grad, number)):
            loop = torch.stack([function(a, b, w) for a, b, w in zip(warped, fixed, weights, strict=True)])
            assert_close(vmap(function)(warped, fixed, weights), loop, atol=1e-11, rtol=1e-11)
            if number == 2:
                continue
            one = torch.stack([function(a, fixed[0], None) for a in warped])
            assert_close(vmap(function, in_dims=(0, None, None))(warped, fixed[0], None), one, atol=1e-11, rtol=1e-11)
            one = torch.stack([function(warped[0], b, w) for b, w in zip(fixed, weights, strict=True)])
            assert_close(vmap(function, in_dims=(None, 0, 0))(warped[0], fixed, weights), one, atol=1e-11, rtol=1e-11)


def test_derivatives_by_what_a_batch_shares(path: str) -> None:
    """The gradient by one fixed image and one mask of many pairs is the sum of theirs."""
    warped, fixed, weights = uniform(4, 2, 3, 4, seed=1), uniform(2, 3, 4, seed=2), 0.2 + uniform(1, 3, 4, seed=3).abs()

    def total(fixed: Tensor, weights: Tensor) -> Tensor:
        return vmap(lambda image: mi(image, fixed, weights))(warped).sum()

    for number in (0, 1):
        each = [grad(mi, argnums=number + 1)(image, fixed, weights) for image in warped]
        assert_close(grad(total, argnums=number)(fixed, weights), torch.stack(each).sum(0), atol=1e-13, rtol=0)


def test_vmap_within_vmap(path: str) -> None:
    warped, fixed = uniform(2, 3, 1, 20, seed=1), uniform(3, 1, 20, seed=2)
    weights = uniform(2, 1, 20, seed=3).abs()
    function = grad_and_value(lambda image, other, share: nmi(image, other, share))
    found = vmap(vmap(function, in_dims=(0, 0, None)), in_dims=(0, None, 0))(warped, fixed, weights)
    for row in range(2):
        for k in range(3):
            slope, value = function(warped[row, k], fixed[k], weights[row])
            assert_close(found[0][row, k], slope, atol=1e-13, rtol=0)
            assert_close(found[1][row, k], value, atol=1e-13, rtol=0)


# -- how it is computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_threads_nor_the_batch_change_a_bit(dtype: torch.dtype, weighted: bool) -> None:
    if native.load() is None:
        pytest.skip("needs a C compiler")
    count = 5 * PART + 77
    warped, fixed = uniform(3, 2, count, seed=1).to(dtype), uniform(3, 2, count, seed=2).to(dtype)
    weights = uniform(3, 1, count, seed=3).to(dtype).clamp(min=0) if weighted else None

    def both(a: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        return grad(lambda x: (joint_histogram(x, b, w) ** 2).sum())(a), joint_histogram(a, b, w)

    found: list[tuple[Tensor, Tensor]] = []
    for threads in (1, 2, 3):
        with mock.patch.object(native.torch, "get_num_threads", lambda threads=threads: threads):
            found.append(vmap(both, in_dims=(0, 0, 0 if weighted else None))(warped, fixed, weights))
            alone = [both(warped[n], fixed[n], None if weights is None else weights[n]) for n in range(3)]
            found.append((torch.stack([one[0] for one in alone]), torch.stack([one[1] for one in alone])))
    for slope, histogram in found:
        assert torch.equal(slope, found[0][0])
        assert torch.equal(histogram, found[0][1])
    total = tensor(float(count)) if weights is None else weights.double().sum(2)
    assert_close(found[0][1].sum((2, 3)), total.expand(3, 2), atol=0, rtol=1e-6)


def test_what_is_kept_for_the_derivative_is_what_was_given(path: str) -> None:
    """No windows: memory is a few numbers for each voxel, whatever the bins."""
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.numel()
        return saved

    warped, fixed = (image.requires_grad_() for image in images((1, 5000), 0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        value = joint_histogram(warped, fixed, bins=32)
    assert sum(kept.values()) <= 2 * 5000 + 100
    value.square().sum().backward()
    assert bool(warped.grad.any())  # type: ignore[union-attr]


@every_measure
def test_dtypes_are_kept(name: str, path: str) -> None:
    warped, fixed = (image.float() for image in images((1, 25, 26), 1))
    exact = MEASURES[name](warped.double(), fixed.double())
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)):
        found, slope = MEASURES[name](warped.to(dtype), fixed.to(dtype)), grad(MEASURES[name])(warped.to(dtype), fixed)
        assert found.dtype == slope.dtype == dtype
        assert_close(found.double(), exact, atol=near, rtol=0)
    expected = grad(MEASURES[name])(warped.double(), fixed.double())
    assert_close(grad(MEASURES[name])(warped, fixed).double(), expected, atol=1e-6, rtol=1e-2)


# -- registration --------------------------------------------------------------------------------------------------


INVERTED = pytest.param(lambda values: 1 - values, id="inverted")
SQUARED = pytest.param(lambda values: values.square(), id="squared")


def texture(grid: Grid, mapping: Mapping | None = None) -> Image:
    """The image of 30 bright and dark spots, 3 to 8 wide, whose value at p is the texture at T(p)."""
    generator = np.random.default_rng(0)
    points = grid.points() if mapping is None else mapping.map_points(grid.points())
    centers, widths = tensor(generator.uniform(-17, 17, (30, 2))), tensor(generator.uniform(2, 5, 30))
    heights = tensor(generator.uniform(-1, 1, 30))
    values = heights * torch.exp(-(points.unsqueeze(1) - centers).square().sum(-1) / (2 * widths**2))
    return Image(values.sum(1).reshape(1, *grid.shape), grid)


@every_measure
@pytest.mark.parametrize("contrast", [INVERTED, SQUARED])
def test_images_of_another_contrast_are_registered(name: str, contrast: Callable[[Tensor], Tensor]) -> None:
    """Where mean squares lead away; squared, the bright and the dark spots of the moving image look the same."""
    grid = Grid((48, 44))
    truth = random_mapping(Rigid(), grid, 5, 1.5)
    fixed, moving = texture(grid, truth), texture(Grid((56, 52), spacing=0.93, center=(0.3, 0.3)))
    other = Image(contrast(moving.data), moving.grid)
    found = register(fixed, other, Rigid(), objective=getattr(fnreg, name), levels=2)
    assert voxels_apart(found.mapping, truth, grid) < 0.2
    assert voxels_apart(Mapping(Rigid().init(grid), grid, Rigid()), truth, grid) > 3.0
    squares = register(fixed, other, Rigid(), levels=2)
    assert voxels_apart(squares.mapping, truth, grid) > 3.0


@pytest.mark.parametrize("contrast", [INVERTED, SQUARED])
def test_slices_of_a_brain_of_another_contrast_are_registered(contrast: Callable[[Tensor], Tensor]) -> None:
    fixed, moving = fnreg.data.brain()
    moving = Image(contrast(moving.data), moving.grid)
    found = register(fixed, moving, Rigid(), objective=fnreg.nmi, levels=4, steps=(100, 50, 20, 0))
    assert voxels_apart(found.mapping, fnreg.data.brain_truth(), fixed.grid) < 0.5


def test_a_batch_registers_as_pairs_alone() -> None:
    pairs = [known_pair(Rigid(), 2, seed=seed)[:2] for seed in (3, 4)]
    fixed, moving = (fnreg.stack(list(side)) for side in zip(*pairs, strict=True))
    options: dict[str, Any] = {"objective": fnreg.mi, "levels": 1, "steps": 5, "stop": None}
    together = register(fixed, moving, Rigid(), **options)
    for number, pair in enumerate(pairs):
        alone = register(*pair, Rigid(), **options)
        assert_close(together.value[number], alone.value, atol=1e-10, rtol=0)


# -- samples -------------------------------------------------------------------------------------------------------

SAMPLED = [mi, nmi, correlation_ratio]


def alike(count: int = 60_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images (1, 200, count / 200) of which one partly foretells the other."""
    noise = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise[:1].sin() + 0.3 * noise[1:]).reshape(1, 200, -1), noise[:1].reshape(1, 200, -1)


@pytest.mark.parametrize("measure", SAMPLED)
def test_samples_tend_to_the_whole(measure: Any) -> None:
    warped, fixed = alike()
    whole = measure(warped, fixed)

    def error(samples: int) -> float:
        found = [measure(warped, fixed, samples=samples, seed=seed) for seed in range(8)]
        return float((torch.stack(found) - whole).square().mean().sqrt())

    errors = [error(samples) for samples in (300, 3_000, 30_000)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[2] < 0.01
    for samples in (60_000, 10**9):
        assert equal_bits(measure(warped, fixed, samples=samples), whole)


def test_places_are_drawn_evenly_and_by_the_seed_alone() -> None:
    state = torch.get_rng_state()
    for count, samples in ((10, 10), (10, 7), (1000, 1), (12345, 100)):
        index = information.drawn(count, samples, 3, torch.device("cpu"))
        run = torch.arange(samples + 1) * count // samples
        assert bool((run[:-1] <= index[0]).all() and (index[0] < run[1:]).all())  # each in its own run: none twice
        with torch.random.fork_rng():
            torch.manual_seed(99)
            assert torch.equal(information.drawn.__wrapped__(count, samples, 3, index.device), index)  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), state)
    seeds = torch.cat([information.drawn(1000, 100, seed, torch.device("cpu")) for seed in range(200)])
    assert len({tuple(row.tolist()) for row in seeds}) == 200
    place = (seeds - torch.arange(0, 1000, 10)).flatten().bincount()  # within a run of ten: 20,000 draws
    assert place.shape == (10,) and float((place / 2000 - 1).abs().max()) < 0.1


@pytest.mark.parametrize("measure", SAMPLED)
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_are_the_measure_of_what_they_read(measure: Any, weighted: bool) -> None:
    """With its derivatives, 0 where nothing is read; two channels share the places."""
    generator = torch.Generator().manual_seed(2)
    warped, fixed = torch.rand(2, 2, 9, 11, dtype=torch.float64, generator=generator).unbind(0)
    weights = torch.rand(1, 9, 11, dtype=torch.float64, generator=generator) if weighted else None
    index = information.drawn(99, 40, 5, torch.device("cpu"))[0]

    def parts(*images: Tensor | None) -> list[Tensor | None]:
        return [None if image is None else image.flatten(1)[:, index] for image in images]

    def sampled(warped: Tensor) -> Tensor:
        return measure(warped, fixed, weights, bins=6, samples=40, seed=5)

    assert equal_bits(sampled(warped), measure(*parts(warped, fixed, weights), bins=6))
    slope = grad(sampled)(warped)
    few = grad(lambda x: measure(x, *parts(fixed, weights), bins=6))(parts(warped)[0])
    assert_close(slope.flatten(1)[:, index], few, atol=1e-15, rtol=0.0)
    assert int((slope != 0).sum()) <= 80
    assert float(slope.abs().max()) > 1e-4
    tangent = torch.rand(2, 9, 11, dtype=torch.float64, generator=generator)
    assert_close(torch.func.jvp(sampled, (warped,), (tangent,))[1], (slope * tangent).sum(), atol=1e-13, rtol=0.0)


@pytest.mark.parametrize("measure", SAMPLED)
def test_pairs_of_a_batch_have_the_samples_that_they_have_alone(measure: Any) -> None:
    warped, fixed = (torch.stack(images) for images in zip(*(alike(2000, seed) for seed in range(3)), strict=True))
    function = functools.partial(measure, bins=8, samples=150, seed=1)
    found = vmap(grad_and_value(function))(warped, fixed)
    for k in range(3):
        alone = grad_and_value(function)(warped[k], fixed[k])
        assert_close((found[0][k], found[1][k]), alone, atol=1e-14, rtol=0.0)
    shared = vmap(function, (0, None))(warped, fixed[0])
    assert_close(shared[2], function(warped[2], fixed[0]), atol=1e-14, rtol=0.0)


@pytest.mark.parametrize("measure", SAMPLED)
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 0}, "samples is 0: expected a whole number of at least 1"),
        ({"samples": 0.5}, "samples is 0.5: expected a whole number of at least 1"),
        ({"samples": True}, "samples is True: expected a whole number of at least 1"),
        ({"samples": 10, "seed": -1}, "seed is -1: expected a whole number of at least 0"),
        ({"samples": 10, "seed": None}, "seed is None: expected a whole number of at least 0"),
    ],
)
def test_bad_samples(measure: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        measure(*alike(1000), **options)


def test_a_registration_by_samples_finds_the_shift() -> None:
    grid = fnreg.Grid((64, 60))
    smooth = fnreg.Image(torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(4)), grid).gaussian(4.0)
    fixed, moving = smooth, fnreg.Image(smooth.data.mul(8).exp(), origin=(1.5, -2.0))
    result = fnreg.register(fixed, moving, fnreg.Translation(), objective=fnreg.mi(samples=800, seed=2), levels=2)
    assert_close(result.mapping.params["translation"], tensor([1.5, -2.0]), atol=0.2, rtol=0.0)


@pytest.mark.parametrize(
    ("shapes", "bins", "told"),
    [
        (((1, 9), (1, 5)), 8, r"warped has shape \(1, 9\) and fixed \(1, 5\): expected one shape"),
        (((2, 9), (1, 9)), 8, "expected one shape"),
        (((1, 9), (1, 9), (1, 5)), 8, r"weights have shape \(1, 5\) beside images \(1, 9\)"),
        (((1, 9), (1, 9)), 3, "bins is 3: expected a whole number of at least 4"),
        (((1, 0), (1, 0)), 8, "with a voxel at least"),
    ],
)
def test_a_histogram_of_what_does_not_fit_is_refused(shapes: Any, bins: int, told: str) -> None:
    """The kernels read as far as the warped image says."""
    with pytest.raises(ValueError, match=told):
        joint_histogram(*(torch.rand(shape) for shape in shapes), bins=bins)


def test_a_histogram_of_volumes_is_that_of_their_voxels() -> None:
    warped, fixed, weights = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.rand(1, 3, 4, 5)
    whole: Any = 8.0
    flat = joint_histogram(warped.flatten(1), fixed.flatten(1), weights.flatten(1), bins=8)
    assert torch.equal(joint_histogram(warped, fixed, weights, bins=whole), flat)
    assert torch.equal(joint_histogram(warped, fixed, weights[0], bins=8), flat)
