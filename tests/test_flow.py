"""Compositions in C against the samplings that they stand for, with every derivative, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vjp, vmap
from torch.testing import assert_close

from fnreg import flow as native_flow
from fnreg import native
from fnreg.fields import compose_shift, exp_shift
from fnreg.filters import gaussian

SHAPES = ((17,), (12, 15), (7, 8, 9))


def smooth(shape: tuple[int, ...], seed: int = 0, size: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * gaussian(torch.randn(len(shape), *shape, generator=generator, dtype=torch.float64), 1.5)


def plainly(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same without a compiler."""

    def call(*given: Tensor) -> Tensor:
        with mock.patch.object(native, "load", return_value=None):
            return function(*given)

    return call


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("midpoint", (False, True))
def test_a_flow_and_its_gradient_are_those_of_the_samplings(shape: tuple[int, ...], midpoint: bool) -> None:
    velocity, weights = smooth(shape), torch.randn(len(shape), *shape, dtype=torch.float64)

    def flow(v: Tensor) -> Tensor:
        return exp_shift(v, 4, midpoint=midpoint)

    def total(v: Tensor) -> Tensor:
        return (flow(v) * weights).sum()

    assert_close(flow(velocity), plainly(flow)(velocity), rtol=0, atol=1e-12)
    assert_close(grad(total)(velocity), plainly(grad(total))(velocity), rtol=0, atol=1e-12)
    several = torch.stack([velocity, 0.5 * velocity, -velocity])
    expected = torch.stack([plainly(grad(total))(v) for v in several])
    assert_close(vmap(grad(total))(several), expected, rtol=0, atol=1e-12)
    outside = vjp(vmap(flow), several)[1](weights.expand_as(several))[0]
    assert_close(outside, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("midpoint", (False, True))
@pytest.mark.parametrize("steps", (0, 1, 2, 5))
def test_fields_on_the_way_are_kept_only_where_a_derivative_may_be_asked(
    steps: int, midpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever way it may be asked; what comes out is the same to the last bit."""
    velocity, places = smooth((12, 15)), set[int]()

    def traced(*given: Tensor) -> None:
        places.add(given[2].data_ptr())
        composed(*given)

    def kept(function: Callable[..., Tensor], given: Tensor) -> tuple[Tensor, int]:
        places.clear()
        found = function(given)
        return found, len(places)

    composed = native_flow._composed  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(native_flow, "_composed", traced)

    def flow(v: Tensor) -> Tensor:
        return exp_shift(v, steps, midpoint=midpoint)

    plain, few = kept(flow, velocity)
    many, several = kept(vmap(flow), torch.stack([velocity, -velocity]))
    assert few == several == min(2, steps + midpoint)
    tracked, all_of_them = kept(flow, velocity.clone().requires_grad_())
    assert all_of_them == steps + midpoint
    both = torch.stack([velocity, -velocity])
    asking = grad(lambda v: flow(v).sum())
    for function, given in ((asking, velocity), (vmap(asking), both), (lambda v: vjp(vmap(flow), v)[0], both)):
        assert kept(function, given)[1] == steps + midpoint
    assert torch.equal(plain, tracked.detach()) and torch.equal(plain, many[0])


@pytest.mark.parametrize("shape", ((5,), (4, 5), (3, 4, 3)))
def test_every_derivative(shape: tuple[int, ...]) -> None:
    velocity, other = smooth(shape, size=2.0), smooth(shape, 1, size=2.0)
    for midpoint in (False, True):
        leaf = velocity.clone().requires_grad_()
        assert gradcheck(lambda v, midpoint=midpoint: exp_shift(v, 2, midpoint=midpoint), (leaf,))
        assert gradgradcheck(lambda v, midpoint=midpoint: exp_shift(v, 2, midpoint=midpoint), (leaf,))
    both = velocity.clone().requires_grad_(), other.clone().requires_grad_()
    assert gradcheck(compose_shift, both)
    assert gradgradcheck(compose_shift, both)
    # the pull-back in forward mode, and batches of cotangents by autograd itself
    out, pull = vjp(lambda v: exp_shift(v, 2), velocity)
    expected = plainly(lambda g, d: jvp(vjp(lambda v: exp_shift(v, 2), velocity)[1], (g,), (d,))[1][0])(out, other)
    assert_close(jvp(pull, (out,), (other,))[1][0], expected, rtol=0, atol=1e-12)
    leaf = velocity.clone().requires_grad_()
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    (batch,) = torch.autograd.grad(exp_shift(leaf, 2), leaf, cotangents, is_grads_batched=True)
    assert_close(batch, torch.stack([pull(g)[0] for g in cotangents]), rtol=0, atol=1e-12)


def test_a_lost_voxel_stays_lost_and_spoils_no_other_field() -> None:
    velocity = torch.stack([smooth((9, 9)), smooth((9, 9), 1)])
    spoiled = velocity.clone()
    spoiled[0, 0, 4, 4] = torch.nan
    found = vmap(lambda v: exp_shift(v, 3))(spoiled)
    assert bool(found[0, 0, 4, 4].isnan())
    assert torch.equal(found[1], vmap(lambda v: exp_shift(v, 3))(velocity)[1])


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        compose_shift(torch.zeros(1, 4), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="data are on meta but coords on cpu"):
        compose_shift(torch.zeros(1, 4), torch.zeros(1, 4, device="meta"))
