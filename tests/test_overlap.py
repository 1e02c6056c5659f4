"""Overlap of labels against counts of NumPy, its minimum, weights and derivatives."""

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
from scenes import tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

from fnreg.losses.overlap import cross_entropy, dice, tversky

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

MEASURES: dict[str, Callable[..., Tensor]] = {"dice": dice, "tversky": tversky, "cross_entropy": cross_entropy}
every_measure = pytest.mark.parametrize("name", MEASURES)
sizes = st.sampled_from([(12,), (4, 5), (3, 4, 5)])
seeds = st.integers(0, 2**16)
CLASSES = 3


def numbers(size: tuple[int, ...], seed: int) -> np.ndarray:
    """Labels 0 to 3; the third is rare."""
    return np.random.default_rng(seed).choice(4, size=size, p=[0.4, 0.3, 0.28, 0.02])


def one_hot(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([labels == k for k in range(1, CLASSES + 1)]).astype(float))


def soft(size: tuple[int, ...], seed: int) -> Tensor:
    """A probability map that leaves something for the background."""
    shares = uniform(CLASSES + 1, *size, seed=seed).mul(2).exp()
    return (shares / shares.sum(0))[1:]


def some_weights(size: tuple[int, ...], seed: int) -> Tensor:
    return uniform(1, *size, seed=seed).clamp(min=-0.3).add(0.3)


# -- values ---------------------------------------------------------------------------------------------------------


@given(sizes, seeds, st.booleans(), st.booleans())
def test_hard_labels_are_counted(size: tuple[int, ...], seed: int, background: bool, weighted: bool) -> None:
    a, b = numbers(size, seed), numbers(size, seed + 1)
    weights = some_weights(size, seed) if weighted else None
    w = np.ones(size) if weights is None else weights[0].numpy()
    expected: dict[str, list[float]] = {"dice": [], "tversky": []}
    for k in range(0 if background else 1, CLASSES + 1):
        tp, fp, fn = (w[where].sum() for where in ((a == k) & (b == k), (a == k) & (b != k), (a != k) & (b == k)))
        if tp + fp + fn > 0:
            expected["dice"].append(2 * tp / (2 * tp + fp + fn))
            expected["tversky"].append(tp / (tp + 0.2 * fp + 0.5 * fn))
    found = dice(one_hot(a), one_hot(b), weights, background=background)
    assert_close(found, tensor(1 - np.mean(expected["dice"])), atol=1e-12, rtol=0)
    found = tversky(one_hot(a), one_hot(b), weights, background=background, alpha=0.2, beta=0.5)
    assert_close(found, tensor(1 - np.mean(expected["tversky"])), atol=1e-12, rtol=0)


@given(sizes, seeds, st.booleans())
def test_cross_entropy_is_that_of_numpy(size: tuple[int, ...], seed: int, weighted: bool) -> None:
    a, b = soft(size, seed), soft(size, seed + 1)
    weights = some_weights(size, seed) if weighted else None
    w = np.ones(size) if weights is None else weights[0].numpy()
    full = [np.concatenate([1 - x.sum(0, keepdim=True).numpy(), x.numpy()]) for x in (a, b)]
    expected = np.average(-(full[1] * np.log(full[0])).sum(0), weights=w)
    assert_close(cross_entropy(a, b, weights, floor=1e-6), tensor(expected), atol=1e-12, rtol=0)
    expected = np.average(-(full[1] * np.log(full[0]))[1:].sum(0), weights=w)
    assert_close(cross_entropy(a, b, weights, floor=1e-6, background=False), tensor(expected), atol=1e-12, rtol=0)


def test_below_the_floor_the_logarithm_is_its_tangent() -> None:
    b = torch.ones(1, 1).double()

    def value(share: float) -> Tensor:
        return cross_entropy(tensor([[share]]), b, floor=0.1)

    assert_close(value(0.0), tensor(1 - np.log(0.1)))
    assert_close(value(0.05), (value(0.0) + value(0.1)) / 2)
    assert_close(value(0.2), tensor(-np.log(0.2)))
    slope = grad(lambda a: cross_entropy(a, b, floor=0.1))
    for share in (0.0, 0.05, 0.1):
        assert_close(slope(tensor([[share]])), tensor([[-10.0]]))


@given(sizes, seeds)
def test_tversky_with_halves_is_dice_and_with_ones_jaccard(size: tuple[int, ...], seed: int) -> None:
    a, b = numbers(size, seed), numbers(size, seed + 1)
    assert_close(tversky(one_hot(a), one_hot(b), alpha=0.5, beta=0.5), dice(one_hot(a), one_hot(b)))
    jaccard = [((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in (1, 2, 3) if k in a or k in b]
    assert_close(tversky(one_hot(a), one_hot(b), alpha=1, beta=1), tensor(1 - np.mean(jaccard)))


# -- laws -----------------------------------------------------------------------------------------------------------


@every_measure
@given(size=sizes, seed=seeds, background=st.booleans(), weighted=st.booleans())
def test_equality_is_the_minimum(name: str, size: tuple[int, ...], seed: int, background: bool, weighted: bool) -> None:
    """Of soft labels too; without the background cross entropy has none, for it rewards whatever is called a class."""
    if name == "cross_entropy":
        background = True
    measure = functools.partial(MEASURES[name], background=background)
    b = soft(size, seed)
    weights = some_weights(size, seed) if weighted else None
    least = measure(b, b, weights)
    if name != "cross_entropy":
        assert_close(least, tensor(0.0), atol=1e-15, rtol=0)
        assert_close(grad(measure)(b, b, weights), torch.zeros_like(b), atol=1e-14, rtol=0)
    for share in (1e-3, 0.1, 1.0):
        other = b + share * (soft(size, seed + 1) - b)
        assert float(measure(other, b, weights)) > float(least)
    if name != "cross_entropy":
        assert float(measure(soft(size, seed + 1), b, weights)) <= 1


@every_measure
@given(size=sizes, seed=seeds)
def test_what_has_no_weight_is_not_seen(name: str, size: tuple[int, ...], seed: int) -> None:
    a, b = soft(size, seed), soft(size, seed + 1)
    weights = some_weights(size, seed)
    weights.view(-1)[0] = 0.5
    hidden = (weights == 0).expand(a.shape)
    garbage = torch.where(hidden, uniform(*a.shape, seed=seed + 3).abs() / 3, a)
    assert_close(MEASURES[name](garbage, b, weights), MEASURES[name](a, b, weights), atol=1e-13, rtol=0)
    assert not bool(grad(MEASURES[name])(garbage, b, weights)[hidden].any())
    kept = (weights > 0).flatten()
    cropped = [image.flatten(1)[:, kept] for image in (a, b)]
    expected = MEASURES[name](*cropped, weights.flatten()[kept])
    assert_close(MEASURES[name](a, b, 3 * weights), expected, atol=1e-13, rtol=0)
    assert_close(MEASURES[name](a, b, torch.ones_like(weights)), MEASURES[name](a, b), atol=1e-14, rtol=0)
    assert MEASURES[name](a, b, 0 * weights) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_measure
def test_empty_and_full_classes_are_finite(name: str, dtype: torch.dtype) -> None:
    empty, full = torch.zeros(2, 4, 5, dtype=dtype), torch.ones(2, 4, 5, dtype=dtype) / 2
    for a, b, background in itertools.product((empty, full), (empty, full), (True, False)):
        measure = functools.partial(MEASURES[name], background=background)
        assert measure(a, b).dtype == dtype
        assert bool(torch.isfinite(measure(a, b)))
        assert bool(torch.isfinite(grad(measure)(a, b)).all())
    assert MEASURES[name](empty, empty, background=False) == 0


@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_a_class_that_neither_has_does_not_count(name: str) -> None:
    a, b = soft((4, 5), 0), soft((4, 5), 1)
    nothing = torch.zeros(2, 4, 5).double()
    more = MEASURES[name](torch.cat([a, nothing]), torch.cat([b, nothing]))
    assert_close(more, MEASURES[name](a, b), atol=1e-15, rtol=0)
    once = MEASURES[name](torch.cat([a, nothing + 0.5]), torch.cat([b, nothing]))
    assert_close(once, (3 * MEASURES[name](a, b) + 2) / 5, atol=1e-15, rtol=0)


# -- derivatives and batches ----------------------------------------------------------------------------------------


@every_measure
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("background", [False, True], ids=["classes", "background"])
def test_derivatives(name: str, weighted: bool, background: bool) -> None:
    a, b = soft((3, 4), 1).requires_grad_(), soft((3, 4), 2).requires_grad_()
    weights = some_weights((3, 4), 3) if weighted else None
    function = functools.partial(MEASURES[name], weights=weights, background=background)
    assert gradcheck(function, (a, b), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (a, b))


@every_measure
def test_vmap_equals_the_loop(name: str) -> None:
    a, b = (torch.stack([soft((3, 4), seed + k) for k in range(4)]) for seed in (0, 10))
    weights = torch.stack([some_weights((3, 4), k) for k in range(4)])
    measure = MEASURES[name]
    for function in (measure, grad(measure), jacrev(measure), jacfwd(measure)):
        loop = torch.stack([function(*items) for items in zip(a, b, weights, strict=True)])
        assert_close(vmap(function)(a, b, weights), loop, atol=1e-14, rtol=0)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (tversky, {"alpha": -0.1}, "alpha is -0.1 and beta 0.7: expected numbers that are not negative, nor both 0"),
        (tversky, {"alpha": 0, "beta": 0}, "alpha is 0 and beta 0"),
        (cross_entropy, {"floor": 0.0}, "floor is 0.0: expected a number between 0 and 1"),
        (cross_entropy, {"floor": 1.0}, "floor is 1.0"),
    ],
)
def test_options_out_of_range(function: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(soft((4,), 0), soft((4,), 1), **options)


@every_measure
def test_labels_of_different_classes(name: str) -> None:
    with pytest.raises(ValueError, match=r"warped has shape \(3, 4\) but fixed has \(2, 4\): expected one shape"):
        MEASURES[name](soft((4,), 0), soft((4,), 1)[:2])
