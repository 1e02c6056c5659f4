"""NGF and MIND: against loops over voxels, their invariances, masks, borders and derivatives; features of any kind."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import few, orientation, picture, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import Grid, functional
from fnreg.losses.descriptors import mind, ngf, self_similarity

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

MEASURES: dict[str, Callable[..., Tensor]] = {"ngf": ngf, "mind": mind}
every_measure = pytest.mark.parametrize("name", MEASURES)
shapes = st.sampled_from([(1, 9), (2, 7), (1, 6, 5), (2, 5, 7), (1, 4, 5, 6), (2, 4, 4, 5)])
seeds = st.integers(0, 2**16)


def images(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    return uniform(*shape, seed=seed), uniform(*shape, seed=seed + 1)


def block(shape: tuple[int, ...], margin: int = 1) -> Tensor:
    """One within a margin, zero outside."""
    weights = torch.zeros(1, *shape[1:], dtype=torch.float64)
    weights[(slice(None), *(slice(margin, -margin),) * (len(shape) - 1))] = 1
    return weights


def inner(image: Tensor, margin: int = 1) -> Tensor:
    return image[(slice(None), *(slice(margin, -margin),) * (image.ndim - 1))]


# -- against loops over voxels --------------------------------------------------------------------------------------


def ngf_by_loops(warped: Tensor, fixed: Tensor, seen: np.ndarray, spacing: list[float], edge: float) -> float:
    """The equation, voxel by voxel, of one channel."""
    normals: list[np.ndarray] = []
    for image in (warped.numpy()[0], fixed.numpy()[0]):
        normal = np.zeros((image.ndim, *image.shape))
        for voxel in np.ndindex(*image.shape):
            if not seen[voxel]:
                continue
            for axis in range(image.ndim):
                steps: list[float] = []
                for side in (-1, 1):
                    other = tuple(n + side * (k == axis) for k, n in enumerate(voxel))
                    if 0 <= other[axis] < image.shape[axis] and seen[other]:
                        steps.append(side * (image[other] - image[voxel]) / spacing[image.ndim - 1 - axis])
                normal[(axis, *voxel)] = np.mean(steps) if steps else 0.0
        normals.append(normal / np.sqrt((normal**2).sum(0) + edge**2))
    return float((1 - (normals[0] * normals[1]).sum(0) ** 2)[seen].mean())


@few
@given(st.sampled_from([(7,), (5, 6), (3, 4, 5)]), seeds, st.booleans())
def test_ngf_equals_a_loop(size: tuple[int, ...], seed: int, masked: bool) -> None:
    warped, fixed = images((1, *size), seed)
    spacing = [0.7, 1.3, 2.1][: len(size)]
    grid = Grid(size[::-1], spacing=spacing, direction=orientation(len(size), tensor([0.3, 0.2, 0.1])))
    mask = uniform(*size, seed=seed + 2) > -0.6
    seen = mask.numpy() if masked else np.ones(size, dtype=bool)
    weights = mask.double() if masked else None
    expected = ngf_by_loops(warped, fixed, seen, spacing, 0.4)
    assert_close(ngf(warped, fixed, weights, grid=grid, edge=0.4), tensor(expected), atol=1e-13, rtol=0)


def mind_by_loops(image: np.ndarray, seen: np.ndarray, radius: int, dilation: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of patches, sorted per voxel since their order is no one's business, and how many are known."""
    dimension = image.ndim
    steps = [tuple(s * dilation * (k == axis) for k in range(dimension)) for axis in range(dimension) for s in (-1, 1)]
    zero = (0,) * dimension
    pairs = [(zero, s) for s in steps]
    if dimension > 1:
        pairs = [(a, b) for a, b in itertools.combinations(steps, 2) if any(x + y for x, y in zip(a, b, strict=True))]

    def at(voxel: tuple[int, ...], *moves: tuple[int, ...]) -> tuple[int, ...] | None:
        place = tuple(np.sum([voxel, *moves], axis=0).tolist())
        inside = all(0 <= n < size for n, size in zip(place, image.shape, strict=True))
        return place if inside and seen[place] else None

    distance = np.full((len(pairs), *image.shape), np.nan)
    for voxel in np.ndindex(*image.shape):
        for number, (a, b) in enumerate(pairs):
            found = []
            for q in itertools.product(range(-radius, radius + 1), repeat=dimension):
                here, there = at(voxel, q, a), at(voxel, q, b)
                if here is not None and there is not None:
                    found.append((image[here] - image[there]) ** 2)
            if found:
                distance[(number, *voxel)] = np.mean(found)
    return distance, ~np.isnan(distance)


@few
@given(st.sampled_from([(9,), (6, 7), (4, 5, 4)]), seeds, st.booleans(), st.integers(0, 1), st.integers(1, 2))
def test_self_similarity_equals_a_loop(
    size: tuple[int, ...], seed: int, masked: bool, radius: int, dilation: int
) -> None:
    image = uniform(1, *size, seed=seed)
    mask = uniform(*size, seed=seed + 2) > -0.6
    seen = mask.numpy() if masked else np.ones(size, dtype=bool)
    distance, known = mind_by_loops(image.numpy()[0], seen, radius, dilation)
    some = known.any(0)
    filled = np.where(known, distance, 0)
    variance = filled.sum(0) / np.maximum(known.sum(0), 1)
    usual = variance[seen].mean()
    variance = np.clip(variance, usual / 1e3, usual * 1e3)
    least = np.where(some, np.where(known, distance, np.inf).min(0), 0)
    expected = np.where(known, np.exp(-(filled - least) / variance), 0)
    found, counted = self_similarity(image, mask.double() if masked else None, radius=radius, dilation=dilation)
    order = (known.sum(0), counted.sum(0).long().numpy())
    assert np.array_equal(*order)
    assert_close(found[0].sort(0).values, torch.from_numpy(np.sort(expected, 0)), atol=1e-9, rtol=0)


def test_pairs_of_neighbours_are_those_of_the_paper() -> None:
    assert [self_similarity(uniform(1, *(5,) * n))[0].shape[1] for n in (1, 2, 3)] == [2, 4, 12]


def test_entries_are_in_one_order_for_both_images() -> None:
    """A picture and its mirror image have the same entries, but not at the same places."""
    image = uniform(1, 6, 7, seed=3)
    assert float(mind(image.flip(2), image)) > 0.01
    found, other = self_similarity(image)[0], self_similarity(image.flip(2))[0].flip(3)
    assert_close(found.sort(1).values, other.sort(1).values, atol=1e-12, rtol=0)
    assert float((found - other).abs().max()) > 0.1


# -- laws -----------------------------------------------------------------------------------------------------------


@every_measure
@given(
    shape=shapes,
    seed=seeds,
    scale=st.floats(0.01, 100),
    sign=st.sampled_from([-1, 1]),
    offset=st.floats(-100, 100),
    weighted=st.booleans(),
)
def test_contrast_and_its_sign_do_not_count(
    name: str, shape: tuple[int, ...], seed: int, scale: float, sign: int, offset: float, weighted: bool
) -> None:
    warped, fixed = images(shape, seed)
    weights = block(shape) if weighted else None
    expected = MEASURES[name](warped, fixed, weights)
    other = sign * scale * (warped + offset)
    assert_close(MEASURES[name](other, fixed, weights), expected, atol=1e-8, rtol=0)
    assert_close(MEASURES[name](fixed, other, weights), expected, atol=1e-8, rtol=0)
    assert 0 <= float(expected) <= 1


def test_with_an_edge_of_its_own_ngf_sees_contrast_but_not_its_sign() -> None:
    warped, fixed = images((1, 6, 7), 0)
    value = ngf(warped, fixed, edge=0.3)
    assert_close(ngf(-warped, fixed + 5, edge=0.3), value, atol=1e-12, rtol=0)
    assert float(ngf(3 * warped, fixed, edge=0.3) - value) < -0.01


@given(shapes, seeds)
def test_equal_images_have_mind_zero_and_no_slope(shape: tuple[int, ...], seed: int) -> None:
    warped, fixed = images(shape, seed)
    assert mind(fixed, fixed) == 0
    assert not bool(grad(mind)(fixed, fixed, None).any())
    assert float(mind(warped, fixed)) > 1e-4
    assert_close(mind(warped, fixed), mind(fixed, warped), atol=1e-14, rtol=0)


@every_measure
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_the_identity_is_the_best_shift(name: str, dimension: int) -> None:
    """Of an image with the contrast inverted and bent, over shifts of voxels and of parts of them."""
    center = tensor([0.0] * dimension)
    grid = Grid([17, 15, 13][:dimension], spacing=tensor([1.0, 1.2, 0.9])[:dimension], center=center)
    fixed = picture(grid, extent=16.0).data
    steps = list(itertools.product((-1.5, -0.5, 0.0, 0.5, 1.5), repeat=dimension))
    values = []
    for step in steps:
        moved = Grid(grid.size, spacing=grid.spacing, center=list(step))
        warped = picture(moved, extent=16.0).data
        values.append(float(MEASURES[name](2 - 3 * warped, fixed)))
    assert steps[int(np.argmin(values))] == (0.0,) * dimension


@every_measure
@given(shape=st.sampled_from([(1, 9), (2, 7, 8), (1, 6, 7, 6)]), seed=seeds)
def test_masked_equals_cropped(name: str, shape: tuple[int, ...], seed: int) -> None:
    warped, fixed = images(shape, seed)
    found = MEASURES[name](warped, fixed, block(shape))
    assert_close(found, MEASURES[name](inner(warped), inner(fixed)), atol=1e-13, rtol=0)
    slope = grad(MEASURES[name])(warped, fixed, block(shape))
    assert_close(inner(slope), grad(MEASURES[name])(inner(warped), inner(fixed), None), atol=1e-12, rtol=0)
    assert not bool(slope[(block(shape) == 0).expand(shape)].any())


@every_measure
@given(shape=shapes, seed=seeds)
def test_what_has_no_weight_is_not_seen(name: str, shape: tuple[int, ...], seed: int) -> None:
    warped, fixed = images(shape, seed)
    weights = uniform(1, *shape[1:], seed=seed + 2).clamp(min=0)
    hidden = (weights == 0).expand(shape)
    expected = MEASURES[name](warped, fixed, weights)
    garbage = torch.where(hidden, 1e6 * uniform(*shape, seed=seed + 3), warped)
    assert_close(MEASURES[name](garbage, torch.where(hidden, -1e5, fixed), weights), expected, atol=1e-9, rtol=0)
    assert not bool(grad(MEASURES[name])(garbage, fixed, weights)[hidden].any())
    assert_close(MEASURES[name](warped, fixed, 1e3 * weights), expected, atol=1e-12, rtol=0)
    assert_close(MEASURES[name](warped, fixed, weights[0]), expected, atol=0, rtol=0)
    ones = torch.ones_like(weights)
    assert_close(MEASURES[name](warped, fixed, ones), MEASURES[name](warped, fixed), atol=1e-13, rtol=0)
    assert MEASURES[name](warped, fixed, 0 * weights) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1234, -777.7, 1e6, 1e-6])
@every_measure
def test_constant_images_have_finite_values_and_derivatives(name: str, value: float, dtype: torch.dtype) -> None:
    varied = uniform(2, 9, 8).to(dtype)
    constant = torch.full_like(varied, value)
    nearly = constant * (1 + torch.finfo(dtype).eps * uniform(2, 9, 8).round().to(dtype))  # as interpolation leaves it
    for warped, fixed in itertools.product((constant, nearly, varied), (constant, nearly, varied)):
        for options in ((), (block((2, 9, 8)).to(dtype),)):
            found = MEASURES[name](warped, fixed, *options)
            assert found.dtype == dtype
            assert bool(torch.isfinite(found))
            assert bool(torch.isfinite(grad(MEASURES[name])(warped, fixed, *options)).all())
    assert_close(MEASURES[name](nearly, varied), MEASURES[name](constant, varied), atol=1e-2, rtol=0)
    if name == "ngf":
        assert ngf(constant, varied) == 1


def test_ngf_is_that_of_the_world_not_of_the_voxels() -> None:
    """Two ramps at right angles in the world stay at right angles, however wide the voxels are."""
    grid = Grid((9, 8), spacing=(0.5, 3.0), direction=orientation(2, tensor([0.4])))
    points = grid.points()
    one, other = ((points @ tensor(slope)).reshape(1, *grid.shape) for slope in ([1.0, 2.0], [2.0, -1.0]))
    assert_close(ngf(one, other, grid=grid), tensor(1.0))
    assert float(ngf(one, other)) < 0.9
    assert_close(ngf(one, 3 * one, grid=grid, noise=1e-6), tensor(0.0), atol=1e-10, rtol=0)


# -- derivatives and batches ----------------------------------------------------------------------------------------


@every_measure
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(2, 6), (1, 5, 4), (1, 3, 4, 3)], ids=str)
def test_derivatives(name: str, weighted: bool, shape: tuple[int, ...]) -> None:
    warped, fixed = (image.requires_grad_() for image in images(shape, 7))
    weights = uniform(1, *shape[1:], seed=3).add(0.7).clamp(min=0) if weighted else None
    function = functools.partial(MEASURES[name], weights=weights)
    assert gradcheck(function, (warped, fixed), check_forward_ad=True, check_batched_grad=True)


@every_measure
def test_vmap_equals_the_loop(name: str) -> None:
    warped, fixed, weights = (
        uniform(4, 2, 5, 6, seed=1),
        uniform(4, 2, 5, 6, seed=2),
        uniform(4, 1, 5, 6, seed=3).relu(),
    )
    measure = MEASURES[name]
    for function in (measure, grad(measure), jacrev(measure), jacfwd(measure)):
        loop = torch.stack([function(a, b, w) for a, b, w in zip(warped, fixed, weights, strict=True)])
        assert_close(vmap(function)(warped, fixed, weights), loop, atol=1e-13, rtol=0)
        one = torch.stack([function(a, fixed[0], None) for a in warped])
        assert_close(vmap(function, in_dims=(0, None, None))(warped, fixed[0], None), one, atol=1e-13, rtol=0)


def test_ngf_takes_a_spacing_per_pair() -> None:
    warped, fixed = images((1, 5, 6), 0)
    spacing = tensor([[1.0, 2.0], [0.5, 0.7]])

    def value(spacing: Tensor) -> Tensor:
        return ngf(warped, fixed, grid=Grid((6, 5), spacing=spacing))

    assert_close(vmap(value)(spacing), torch.stack([value(s) for s in spacing]), atol=1e-14, rtol=0)


@pytest.mark.parametrize("size", [(1, 1, 6), (1, 6, 1), (1, 2, 2), (1, 1, 1), (2, 1, 5, 6)], ids=str)
@every_measure
def test_thin_images(name: str, size: tuple[int, ...]) -> None:
    warped, fixed = images(size, 0)
    assert bool(torch.isfinite(MEASURES[name](warped, fixed)))
    assert bool(torch.isfinite(grad(MEASURES[name])(warped, fixed, None)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise is 0.0 and edge None: below it an edge is noise, so it must be positive"),
        ({"edge": -1.0}, "noise is 1.0 and edge -1.0"),
    ],
)
def test_ngf_refuses_edges_that_are_not_positive(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngf(*images((1, 5, 5), 0), **options)


@pytest.mark.parametrize("options", [{"radius": -1}, {"dilation": 0}])
def test_mind_refuses_sizes_that_are_none(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"radius is .* and dilation .*: expected at least 0 and 1"):
        mind(*images((1, 5, 5), 0), **options)


# -- features -------------------------------------------------------------------------------------------------------


def test_features_are_compared_by_mean_squares() -> None:
    warped, fixed = images((1, 6, 8), 0)
    weights = uniform(1, 6, 8, seed=5).relu()
    found: dict[str, Any] = {"warped": warped, "fixed": fixed, "weights": None}
    same = fnreg.feature(lambda image: image)
    assert_close(same.value(found), functional.mse(warped, fixed))
    assert_close(same.value(found | {"weights": weights}), functional.mse(warped, fixed, weights))
    assert repr(0.5 * same) == "0.5 * feature"
    halves = fnreg.feature(lambda image: torch.cat([image, 2 * image])[:, ::2, 1::2])
    expected = functional.mse(warped[:, ::2, 1::2], fixed[:, ::2, 1::2]) * 2.5
    assert_close(halves.value(found), expected)
    assert_close(halves.value(found | {"weights": torch.ones(1, 6, 8).double()}), expected)
    summary = fnreg.feature(lambda image: image.mean((1, 2)))
    assert_close(summary.value(found | {"weights": weights}), (warped.mean() - fixed.mean()).square())
    with pytest.raises(TypeError, match="feature takes a function of an image, not str"):
        fnreg.feature("resnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features have shapes \(1,\) and \(1, 6, 8\): expected one shape"):
        fnreg.feature(lambda image: image if image is fixed else image.sum().reshape(1)).value(found)


def test_a_network_gives_features() -> None:
    """One registration in a batch, through a network, equals the same alone."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 3))
    params = {name: value.detach() for name, value in network.named_parameters()}
    objective = fnreg.feature(lambda image: functional_call(network, params, image))
    fixed, moving = fnreg.data.digit_pairs(3)
    options: dict[str, Any] = {"objective": objective, "levels": 2, "steps": 8, "stop": None, "padding": "border"}
    batch = fnreg.register(fixed, moving, fnreg.Translation(), **options)
    alone = fnreg.register(fnreg.Image(fixed.data[1]), fnreg.Image(moving.data[1]), fnreg.Translation(), **options)
    assert not batch.value.requires_grad
    assert float(batch.history[-1].value[1, -1]) < float(batch.history[-1].value[1, 0])
    assert_close(batch.mapping.params["translation"][1], alone.mapping.params["translation"], atol=1e-4, rtol=0)
