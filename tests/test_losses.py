"""Losses against closed forms, NumPy and SciPy, their invariances and derivatives; terms and their sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import few, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import fnreg
from fnreg import Grid, Objective, Term, settings, stack, term
from fnreg.losses import descriptors, functional
from fnreg.losses.objective import NAMES, objective
from fnreg.losses.terms import SIMILARITIES
from fnreg.pytree import batch_axes, tree_flatten, tree_vmap

# torch's forward mode compiles its own decompositions with torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

MEASURES: dict[str, Callable[..., Tensor]] = {
    "mse": functional.mse,
    "mae": functional.mae,
    "huber": functional.huber,
    "ncc": functional.ncc,
    "charbonnier": functional.charbonnier,
}
RESIDUALS = {"mse": functional.mse_residuals, "ncc": functional.ncc_residuals}
every_measure = pytest.mark.parametrize("name", MEASURES)
every_residual = pytest.mark.parametrize("name", RESIDUALS)
shapes = st.sampled_from([(1, 7), (3, 5), (1, 4, 5), (2, 3, 4), (1, 2, 3, 4), (2, 3, 2, 4)])
seeds = st.integers(0, 2**16)


def images(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    return uniform(*shape, seed=seed), uniform(*shape, seed=seed + 1)


def some_weights(shape: tuple[int, ...], seed: int) -> Tensor:
    """In [0, 1], about a third of them zero; at least two are positive."""
    weights = uniform(1, *shape[1:], seed=seed + 2).clamp(min=-0.4).add(0.4) / 1.4
    return torch.cat([weights.flatten()[:-2], tensor([0.7, 0.9])]).reshape(weights.shape)


# -- values --------------------------------------------------------------------------------------------------------


def test_closed_forms() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert functional.mse(3 * one, one) == 4
    assert functional.mae(3 * one, one) == 2
    assert functional.mse(tensor([[1.0, 2.0]]), tensor([[0.0, 4.0]])) == 2.5
    assert functional.mae(tensor([[1.0, 2.0]]), tensor([[0.0, 4.0]])) == 1.5
    assert_close(functional.huber(zero + 0.05, zero), torch.tensor(0.05**2 / 2))
    assert_close(functional.huber(zero + 3.0, zero, delta=2.0), torch.tensor(2.0 * (3.0 - 1.0)))
    assert_close(functional.huber(zero + 2.0, zero, delta=2.0), torch.tensor(2.0))
    ramp = tensor([[0.0, 1.0, 2.0, 3.0]])
    assert_close(functional.ncc(ramp, ramp), tensor(0.0), atol=1e-15, rtol=0)
    assert_close(functional.ncc(-ramp, ramp), tensor(2.0))
    assert_close(functional.ncc(tensor([[1.0, -1.0, -1.0, 1.0]]), ramp), tensor(1.0))
    # cov = 1/3, var = 2/9 and 2/3 for (0, 0, 1) and (0, 1, 2)
    found = functional.ncc(tensor([[0.0, 0.0, 1.0]]), tensor([[0.0, 1.0, 2.0]]))
    assert_close(found, tensor(1 - math.sqrt(3) / 2))


@given(shapes, seeds)
def test_values_are_those_of_numpy_and_scipy(shape: tuple[int, ...], seed: int) -> None:
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed)
    a, b = warped.numpy(), fixed.numpy()
    w = np.broadcast_to(weights.numpy(), shape)
    assert_close(functional.mse(warped, fixed), tensor(np.mean((a - b) ** 2)))
    assert_close(functional.mae(warped, fixed), tensor(np.mean(np.abs(a - b))))
    assert_close(functional.huber(warped, fixed, delta=0.3), tensor(np.mean(scipy.special.huber(0.3, a - b))))
    assert_close(functional.mse(warped, fixed, weights), tensor(np.average((a - b) ** 2, weights=w)))
    assert_close(functional.mae(warped, fixed, weights), tensor(np.average(np.abs(a - b), weights=w)))
    expected = np.average(scipy.special.huber(0.3, a - b), weights=w)
    assert_close(functional.huber(warped, fixed, weights, delta=0.3), tensor(expected))
    flat = [(x.reshape(-1), y.reshape(-1), z.reshape(-1)) for x, y, z in zip(a, b, w, strict=True)]
    plain = np.mean([1 - scipy.stats.pearsonr(x, y).statistic for x, y, _ in flat])
    assert_close(functional.ncc(warped, fixed), tensor(plain), atol=1e-12, rtol=0)
    covariances = [np.cov(x, y, aweights=z, ddof=0) for x, y, z in flat]
    weighted = np.mean([1 - c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]) for c in covariances])
    assert_close(functional.ncc(warped, fixed, weights), tensor(weighted), atol=1e-12, rtol=0)


@every_measure
def test_weights_may_have_a_channel_axis_or_none(name: str) -> None:
    warped, fixed = images((2, 3, 4), 0)
    weights = some_weights((2, 3, 4), 0)
    assert torch.equal(MEASURES[name](warped, fixed, weights), MEASURES[name](warped, fixed, weights[0]))


@every_measure
@given(shape=shapes, seed=seeds)
def test_weights_count_voxels(name: str, shape: tuple[int, ...], seed: int) -> None:
    """Weight one is no weight; weight n is the voxel n times; the scale of weights does not matter."""
    measure = MEASURES[name]
    warped, fixed = images(shape, seed)
    ones = torch.ones(1, *shape[1:], dtype=torch.float64)
    assert_close(measure(warped, fixed, ones), measure(warped, fixed), atol=1e-13, rtol=0)
    weights = some_weights(shape, seed)
    assert_close(measure(warped, fixed, 1e3 * weights), measure(warped, fixed, weights), atol=1e-13, rtol=0)
    counts = torch.arange(ones.numel()) % 3
    repeated = [image.flatten(1).repeat_interleave(counts, dim=1) for image in (warped, fixed)]
    counted = measure(warped, fixed, counts.to(torch.float64).reshape(ones.shape))
    assert_close(measure(*repeated), counted, atol=1e-12, rtol=0)


@every_measure
@given(shape=shapes, seed=seeds)
def test_what_has_no_weight_is_not_seen(name: str, shape: tuple[int, ...], seed: int) -> None:
    """However large it is, in the value and in the derivative."""
    measure = MEASURES[name]
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed)
    hidden = (weights == 0).expand(shape)
    garbage = torch.where(hidden, 1e6 * uniform(*shape, seed=seed + 3), warped)
    other = torch.where(hidden, -1e5 * uniform(*shape, seed=seed + 4), fixed)
    assert_close(measure(garbage, other, weights), measure(warped, fixed, weights), atol=1e-12, rtol=0)
    slope = grad(measure)(garbage, other, weights)
    assert_close(slope, grad(measure)(warped, fixed, weights), atol=1e-12, rtol=0)
    assert not bool(slope[hidden].any())
    assert bool(torch.isfinite(slope).all())
    by_weights = grad(measure, argnums=2)(warped, fixed, weights)
    assert bool(torch.isfinite(by_weights).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_measure
def test_no_weight_at_all(name: str, dtype: torch.dtype) -> None:
    """A mean over nothing is 0; correlation with nothing is 1; neither has a slope."""
    warped, fixed = (image.to(dtype) for image in images((2, 3, 4), 0))
    weights = torch.zeros(1, 3, 4, dtype=dtype)
    assert MEASURES[name](warped, fixed, weights) == (1.0 if name == "ncc" else 0.0)
    assert not bool(grad(MEASURES[name])(warped, fixed, weights).any())
    if name in RESIDUALS:
        assert not bool(RESIDUALS[name](warped, fixed, weights).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1234, -777.7, 1e6, 1e-6])
@every_measure
def test_constant_images_have_finite_values_and_derivatives(name: str, value: float, dtype: torch.dtype) -> None:
    measure = MEASURES[name]
    _, varied = images((2, 30, 41), 0)
    varied = varied.to(dtype)
    constant = torch.full_like(varied, value)
    weights = some_weights((2, 30, 41), 0).to(dtype)
    for warped, fixed in ((constant, varied), (varied, constant), (constant, constant)):
        for options in ((), (weights,)):
            found = measure(warped, fixed, *options)
            slope = grad(measure)(warped, fixed, *options)
            assert bool(torch.isfinite(found))
            assert bool(torch.isfinite(slope).all())
            if name == "ncc":  # what does not vary correlates with nothing
                assert found == 1.0
                assert not bool(slope.any())


@every_measure
@given(shape=shapes, seed=seeds)
def test_equal_images_have_value_zero_and_no_slope(name: str, shape: tuple[int, ...], seed: int) -> None:
    image, _ = images(shape, seed)
    assert_close(MEASURES[name](image, image), tensor(0.0), atol=1e-14, rtol=0)
    assert_close(grad(MEASURES[name])(image, image), torch.zeros_like(image), atol=1e-14, rtol=0)
    warped, fixed = images(shape, seed)
    assert float(MEASURES[name](warped, fixed)) > 1e-4
    assert_close(MEASURES[name](warped, fixed), MEASURES[name](fixed, warped), atol=1e-14, rtol=0)


@given(shapes, seeds, st.floats(1e-6, 1e6), st.floats(-1e4, 1e4), st.booleans())
def test_ncc_does_not_see_scale_and_offset(
    shape: tuple[int, ...], seed: int, scale: float, offset: float, weighted: bool
) -> None:
    """An offset of up to ten thousand times the contrast costs digits, not the value."""
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed) if weighted else None
    expected = functional.ncc(warped, fixed, weights)
    assert_close(functional.ncc(scale * (warped + offset), fixed, weights), expected, atol=1e-9, rtol=0)
    assert_close(functional.ncc(warped, scale * (fixed + offset), weights), expected, atol=1e-9, rtol=0)
    assert_close(functional.ncc(-scale * warped, fixed, weights), 2 - expected, atol=1e-9, rtol=0)
    assert 0 <= float(expected) <= 2


def test_ncc_sees_small_contrast_in_float64() -> None:
    """One part in a million is rounding for float32, but not for float64."""
    warped, fixed = images((1, 20), 3)
    small = 1000 + 1e-5 * warped
    assert_close(functional.ncc(small, fixed), functional.ncc(warped, fixed), atol=1e-6, rtol=0)


@given(shapes, seeds, st.floats(0.01, 2.0))
def test_huber_lies_between_its_limits(shape: tuple[int, ...], seed: int, delta: float) -> None:
    warped, fixed = images(shape, seed)
    found = float(functional.huber(warped, fixed, delta=delta))
    assert found <= float(functional.mse(warped, fixed)) / 2 + 1e-15
    assert found <= delta * float(functional.mae(warped, fixed)) + 1e-15
    wide = functional.huber(warped, fixed, delta=1e3)
    assert_close(wide, functional.mse(warped, fixed) / 2, atol=1e-15, rtol=0)


def test_huber_refuses_a_delta_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="delta is 0: it must be positive"):
        functional.huber(torch.zeros(1, 3), torch.ones(1, 3), delta=0)


@given(shapes, seeds, st.floats(0.01, 2.0))
def test_charbonnier_is_the_root_of_numpy_and_lies_between_its_limits(
    shape: tuple[int, ...], seed: int, eps: float
) -> None:
    warped, fixed = images(shape, seed)
    away = (warped - fixed).numpy()
    found = functional.charbonnier(warped, fixed, eps=eps)
    assert_close(found, tensor(np.mean(np.sqrt(away**2 + eps**2) - eps)), atol=1e-13, rtol=0)
    assert float(found) <= float(functional.mse(warped, fixed)) / (2 * eps) + 1e-15
    mae = float(functional.mae(warped, fixed))
    assert mae - eps <= float(found) <= mae
    assert bool((grad(functional.charbonnier)(warped, fixed, None).abs() * warped.numel() < 1).all())


def test_charbonnier_keeps_its_digits_at_small_differences() -> None:
    """In float32 sqrt(d^2 + eps^2) - eps would be 0 here."""
    small = torch.full((1, 3), 1e-5)
    assert_close(functional.charbonnier(small, 0 * small, eps=1.0), torch.tensor(5e-11), rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_charbonnier_refuses_an_eps_that_is_not_positive(eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps is {eps}: it must be positive"):
        functional.charbonnier(torch.zeros(1, 3), torch.ones(1, 3), eps=eps)


def test_mae_has_no_slope_at_equality() -> None:
    image = tensor([[1.0, 2.0, 3.0]])
    moved = image + tensor([[0.0, 0.1, -0.1]])
    assert_close(grad(functional.mae)(moved, image), tensor([[0.0, 1.0, -1.0]]) / 3)


# -- residuals -----------------------------------------------------------------------------------------------------


@every_residual
@given(shape=shapes, seed=seeds, weighted=st.booleans())
def test_squares_of_residuals_sum_to_the_measure(name: str, shape: tuple[int, ...], seed: int, weighted: bool) -> None:
    warped, fixed = images(shape, seed)
    weights = some_weights(shape, seed) if weighted else None
    residuals, measure = RESIDUALS[name], MEASURES[name]
    assert_close(residuals(warped, fixed, weights).square().sum(), measure(warped, fixed, weights), atol=1e-13, rtol=0)
    # and so do their derivatives
    slope = grad(lambda w: residuals(w, fixed, weights).square().sum())(warped)
    assert_close(slope, grad(measure)(warped, fixed, weights), atol=1e-13, rtol=0)
    tangent = uniform(*shape, seed=seed + 5)
    pushed = jvp(lambda w: residuals(w, fixed, weights), (warped,), (tangent,))[1]
    assert bool(torch.isfinite(pushed).all())
    along = 2 * (pushed * residuals(warped, fixed, weights)).sum()
    assert_close(along, (slope * tangent).sum(), atol=1e-12, rtol=0)


# -- derivatives ---------------------------------------------------------------------------------------------------


@every_measure
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_derivatives(name: str, weighted: bool) -> None:
    """Off the corners of |d| the derivatives are those of finite differences, to second order."""
    warped, fixed = images((2, 3, 4), 7)
    warped = torch.where((warped - fixed).abs() < 0.02, fixed + 0.02, warped)
    weights = some_weights((2, 3, 4), 7) if weighted else None
    measure: Any = MEASURES[name]
    if name == "huber":
        measure = functools.partial(functional.huber, delta=0.5)
    inputs = warped.requires_grad_(), fixed.requires_grad_()
    function = functools.partial(measure, weights=weights)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)
    if weights is not None:
        positive = (weights + 0.1).requires_grad_()
        assert gradcheck(lambda w: measure(warped, fixed, w), positive)
    if name in RESIDUALS:
        assert gradcheck(lambda a: RESIDUALS[name](a, fixed, weights), warped, check_forward_ad=True)


@every_measure
def test_vmap_equals_the_loop(name: str) -> None:
    warped, fixed, weights = uniform(5, 2, 3, 4, seed=1), uniform(5, 2, 3, 4, seed=2), uniform(5, 1, 3, 4, seed=3).abs()
    measure = MEASURES[name]
    for function in (measure, grad(measure), jacrev(measure), jacfwd(measure)):
        loop = torch.stack([function(a, b, w) for a, b, w in zip(warped, fixed, weights, strict=True)])
        assert_close(vmap(function)(warped, fixed, weights), loop, atol=1e-14, rtol=0)
        one = torch.stack([function(a, fixed[0], None) for a in warped])
        assert_close(vmap(function, in_dims=(0, None, None))(warped, fixed[0], None), one, atol=1e-14, rtol=0)


@every_measure
def test_dtypes_are_kept(name: str) -> None:
    warped, fixed = (image.float() for image in images((1, 5, 6), 1))
    found = MEASURES[name](warped, fixed)
    assert found.dtype == torch.float32
    assert_close(found.double(), MEASURES[name](warped.double(), fixed.double()), atol=1e-6, rtol=0)


# -- terms ---------------------------------------------------------------------------------------------------------

WARPED, FIXED = images((2, 3, 4), 11)
FOUND: dict[str, Any] = {"warped": WARPED, "fixed": FIXED, "weights": None}


def total(value: Any) -> Tensor:
    return objective(value).value(FOUND)[0]


def test_terms_scale_and_add() -> None:
    mse, mae = functional.mse(WARPED, FIXED), functional.mae(WARPED, FIXED)
    for made in (
        2 * fnreg.mse + 0.5 * fnreg.mae,
        fnreg.mse * 2 + fnreg.mae * 0.5,
        fnreg.mse + fnreg.mse + 0.5 * fnreg.mae,
        0.5 * (4 * fnreg.mse + fnreg.mae),
        sum([2 * fnreg.mse, 0.5 * fnreg.mae]),
        sum([fnreg.mse, fnreg.mse + 0.5 * fnreg.mae]),
        2 * fnreg.mse + (lambda warped, fixed: 0.5 * functional.mae(warped, fixed)),
        (lambda warped, fixed: 0.5 * functional.mae(warped, fixed)) + 2 * fnreg.mse,
    ):
        assert isinstance(made, Objective)
        assert_close(total(made), 2 * mse + 0.5 * mae, atol=1e-15, rtol=0)
    assert total(fnreg.mse) == mse
    assert float(fnreg.mse.weight) == 1  # terms are values: nothing above changed them


def test_terms_subtract_negate_and_divide() -> None:
    mse, mae = functional.mse(WARPED, FIXED), functional.mae(WARPED, FIXED)
    assert_close(total(fnreg.mse - fnreg.mae), mse - mae, atol=1e-15, rtol=0)
    assert_close(total(fnreg.mse - 2 * fnreg.mae), mse - 2 * mae, atol=1e-15, rtol=0)
    assert_close(total(-fnreg.mse), -mse, atol=1e-15, rtol=0)
    assert_close(total(fnreg.mse / 4), mse / 4, atol=1e-15, rtol=0)
    assert_close(total(fnreg.huber(delta=0.2) / 4 - fnreg.mse), functional.huber(WARPED, FIXED, delta=0.2) / 4 - mse)


def test_sums_subtract_negate_and_divide() -> None:
    mse, mae, ncc = (f(WARPED, FIXED) for f in (functional.mse, functional.mae, functional.ncc))
    both = fnreg.mse + fnreg.mae
    assert_close(total(both - fnreg.ncc), mse + mae - ncc, atol=1e-15, rtol=0)
    assert_close(total(fnreg.ncc - both), ncc - mse - mae, atol=1e-15, rtol=0)
    assert_close(total(both - (fnreg.ncc - both)), 2 * (mse + mae) - ncc, atol=1e-15, rtol=0)
    assert_close(total(-both / 4), -(mse + mae) / 4, atol=1e-15, rtol=0)


def test_each_term_reports_its_own_value_by_name() -> None:
    made = 3 * fnreg.mse + fnreg.huber(delta=0.2) + fnreg.huber(delta=0.4)
    _, values = made.value(FOUND)
    assert list(values) == ["mse", "huber", "huber_2"]
    assert_close(values["mse"], functional.mse(WARPED, FIXED))
    assert_close(values["huber"], functional.huber(WARPED, FIXED, delta=0.2))
    assert_close(values["huber_2"], functional.huber(WARPED, FIXED, delta=0.4))


def test_every_term_has_a_name_of_its_own_in_the_report() -> None:
    def mse_2(warped: Tensor) -> Tensor:
        return warped.mean()

    made = fnreg.mse + mse_2 + fnreg.mse + fnreg.mse + mse_2
    assert list(made.value(FOUND)[1]) == ["mse", "mse_2", "mse_3", "mse_4", "mse_2_2"]


def test_terms_print_as_they_are_written() -> None:
    assert repr(fnreg.mse) == "mse"
    assert repr(0.5 * fnreg.huber(delta=0.2) + fnreg.ncc) == "0.5 * huber(delta=0.2) + ncc"
    assert repr(fnreg.mse * torch.ones(3)) == "mse"
    vmap(lambda weight: (repr(fnreg.mse * weight), weight)[1])(torch.ones(3))  # printing inside vmap does not fail


def test_options_are_checked_and_kept() -> None:
    made = fnreg.huber(delta=0.2)
    assert made.options == (("delta", 0.2),)
    assert (0.5 * made).options == made.options
    assert made(delta=0.4).options == (("delta", 0.4),)
    assert_close(total(made), functional.huber(WARPED, FIXED, delta=0.2))
    with pytest.raises(TypeError, match="huber has no option 'detla': its options are delta, channel"):
        fnreg.huber(detla=0.2)
    with pytest.raises(TypeError, match="mse has no option 'delta': its options are channel"):
        fnreg.mse(delta=0.2)
    with pytest.raises(TypeError, match="huber has no option 'weights'"):
        fnreg.huber(weights=None)
    with pytest.raises(TypeError, match="divergence has no option 'channel': its options are none"):
        fnreg.divergence(channel=0)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("channel", [0, 2, (2, 0), (1,)], ids=str)
def test_every_similarity_may_see_some_channels_only(name: str, channel: Any) -> None:
    found = {"warped": uniform(3, 6, 5, seed=1), "fixed": uniform(3, 6, 5, seed=2), "weights": None, "grid": None}
    chosen = [channel] if isinstance(channel, int) else list(channel)
    part = found | {side: found[side][chosen] for side in ("warped", "fixed")}  # type: ignore[index]
    made = SIMILARITIES[name](channel=channel)
    assert_close(made.value(found), SIMILARITIES[name].value(part), atol=1e-15, rtol=0)
    assert repr(0.5 * made) == f"0.5 * {made.name}(channel={channel})"
    if made.residuals is not None:
        squares = objective(2 * made).residuals(found).square().sum()
        assert_close(squares, 2 * made.value(found), atol=1e-14, rtol=0)


def test_a_channel_goes_with_other_options_and_with_any_function() -> None:
    made = fnreg.huber(delta=0.2)(channel=1)
    assert_close(total(made), functional.huber(WARPED[1:], FIXED[1:], delta=0.2))
    assert objective(made).mean_squares() is None
    assert objective(fnreg.mse(channel=0)).mean_squares() is None  # what is fast is the mean over all channels

    def first(warped: Tensor) -> Tensor:
        return tensor(float(len(warped)))

    def own(warped: Tensor, *, channel: int = 5) -> Tensor:
        return tensor(float(len(warped) * channel))

    assert total(term(first)(channel=0)) == 1
    assert total(term(own)(channel=3)) == 6  # an option of the function itself stays its own


@pytest.mark.parametrize("channel", [-1, True, 0.0, "red", (), (0, -2), [0], None])
def test_what_is_no_channel_is_refused(channel: Any) -> None:
    with pytest.raises(ValueError, match=r"mse\(channel=.*\): expected a channel from 0, such as 0, or a tuple"):
        fnreg.mse(channel=channel)


def test_a_channel_that_is_not_there_is_named() -> None:
    for channel in (2, (0, 7)):
        with pytest.raises(ValueError, match=r"mse\(channel=.*\) but the images have 2 channels: choose from 0 to 1"):
            total(fnreg.mse(channel=channel))


def test_a_term_is_given_what_it_asks_for() -> None:
    seen: list[set[str]] = []

    arguments = ", ".join(NAMES)
    made_of: dict[str, Any] = {"seen": seen, "tensor": tensor}
    exec(
        f"def everything({arguments}):\n"
        "    seen.append({name for name, value in locals().items() if value == name})\n"
        "    return tensor(1.0)",
        made_of,
    )
    made = objective(made_of["everything"])
    assert made.needs == set(NAMES)
    made.value({name: name for name in NAMES})
    assert seen == [set(NAMES)]
    assert objective(fnreg.mse).needs == {"warped", "fixed", "weights"}
    assert objective(lambda params, **others: tensor(1.0)).needs == {"params"}

    class Roughness:
        def __call__(self, displacement: Tensor, *, order: int = 1) -> Tensor:
            return displacement.sum() * order

    made = term(Roughness())(order=3)
    assert (made.name, made.needs) == ("Roughness", ("displacement",))
    assert made.value({"displacement": torch.ones(2)}) == 6


@pytest.mark.parametrize("function", [lambda warped, target: warped, lambda image: image, lambda *args: args[0]])
def test_an_unknown_name_is_refused_with_the_known_ones(function: Any) -> None:
    with pytest.raises(TypeError, match=r"an objective asks for '(target|image|args)': it may ask for") as error:
        objective(function)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("value", [3.0, None, "mse", [fnreg.mse]])
def test_what_is_no_objective_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="an objective is a Term, a sum of terms or a callable, not"):
        objective(value)


@pytest.mark.parametrize("value", [1.0, torch.ones(3), torch.ones(1), None])
def test_an_objective_returns_a_scalar(value: Any) -> None:
    def mine(warped: Tensor) -> Any:
        return value

    with pytest.raises(TypeError, match=r"mine returned .*: an objective returns a scalar tensor"):
        objective(mine).value(FOUND)


def test_residuals_of_a_sum() -> None:
    made = 2 * fnreg.mse + 0.3 * fnreg.ncc
    residuals = made.residuals(FOUND)
    assert residuals.shape == (2 * WARPED.numel(),)
    assert_close(residuals.square().sum(), made.value(FOUND)[0], atol=1e-14, rtol=0)
    with pytest.raises(ValueError, match="mae is no least-squares term, so Gauss-Newton cannot use it: choose mse or"):
        (fnreg.mse + fnreg.mae).residuals(FOUND)


def test_a_weight_per_pair_is_a_batch_axis() -> None:
    weights = tensor([0.0, 0.5, 2.0])
    made = weights * fnreg.mse + 0.1 * fnreg.mae
    axes, sizes = batch_axes("objective", made, made.ranks())
    assert axes == (0, None)
    assert list(sizes.values()) == [3]

    def value(one: Objective) -> Tensor:
        return one.value(FOUND)[0]

    mse, mae = functional.mse(WARPED, FIXED), functional.mae(WARPED, FIXED)
    assert_close(tree_vmap(value, [axes], made), weights * mse + 0.1 * mae, atol=1e-15, rtol=0)
    assert_close(value(stack([objective(w * fnreg.mse) for w in weights])), weights * mse, atol=1e-15, rtol=0)


def test_weights_can_be_differentiated() -> None:
    def by_weight(weight: Tensor) -> Tensor:
        return total(weight * fnreg.mse + 0.1 * fnreg.mae)

    assert_close(grad(by_weight)(tensor(0.3)), functional.mse(WARPED, FIXED))


def test_a_term_is_a_tree_of_its_weight() -> None:
    leaves, spec = tree_flatten(fnreg.huber(delta=0.2))
    assert [float(leaf) for leaf in leaves] == [1.0]
    assert spec == tree_flatten(3 * fnreg.huber(delta=0.2))[1]
    assert spec != tree_flatten(fnreg.huber(delta=0.3))[1]
    assert isinstance(fnreg.mse, Term)


def test_similarities_have_their_names() -> None:
    assert all(getattr(fnreg, name) is made for name, made in SIMILARITIES.items())
    assert set(MEASURES) <= set(SIMILARITIES)
    assert set(SIMILARITIES) == set(settings.SIMILARITIES)
    for name, made in SIMILARITIES.items():
        assert made.function is MEASURES.get(name, made.function)
        assert made.residuals is RESIDUALS.get(name)


def test_a_term_keeps_the_dtype_of_the_images() -> None:
    found = {"warped": WARPED.float(), "fixed": FIXED.float(), "weights": None}
    assert (0.3 * fnreg.mse + fnreg.ncc).value(found)[0].dtype == torch.float32
    assert objective(0.3 * fnreg.mse).residuals(found).dtype == torch.float32
    assert Grid((4, 3)).center.dtype == torch.float64


@few
@given(shapes, seeds)
def test_the_mean_is_that_of_numpy(shape: tuple[int, ...], seed: int) -> None:
    values, weights = uniform(*shape, seed=seed), some_weights(shape, seed)
    expected = np.average(values.numpy(), weights=np.broadcast_to(weights.numpy(), shape))
    assert_close(functional.mean(values, weights), tensor(expected), atol=1e-14, rtol=0)
    assert_close(functional.mean(values), values.mean())


# -- images of two shapes ------------------------------------------------------------------------------------------

PLAIN = {
    name: getattr(functional, name)
    for name in ("mse", "mae", "huber", "charbonnier", "ncc", "mse_residuals", "ncc_residuals")
} | {"ngf": descriptors.ngf, "mind": descriptors.mind}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 4, 1), (1, 1, 4)])
def test_images_of_two_shapes_are_not_spread_over_each_other(name: str, shape: tuple[int, ...]) -> None:
    for shapes in (((1, 4, 4), shape), (shape, (1, 4, 4))):
        images = (torch.rand(one) for one in shapes)
        with pytest.raises(ValueError, match=r"warped has shape .* but fixed has .*: expected one shape"):
            PLAIN[name](*images)


def test_the_logarithm_goes_on_as_its_tangent() -> None:
    x = torch.linspace(-0.5, 1.5, 41, dtype=torch.float64)
    expected = torch.where(x > 0.2, x.clamp(min=0.2).log(), math.log(0.2) + (x - 0.2) / 0.2)
    assert_close(functional.log_above(x, 0.2), expected)
