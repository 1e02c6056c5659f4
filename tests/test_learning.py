"""Networks within registrations: what does not fit is told, and what fits is as the registration of its answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import fnreg
from fnreg import FFD, Image, Implicit, Mapping, Rigid, Unrolled, adam, data


def answer(network: nn.Module, fixed: Image, moving: Image) -> Tensor:
    weights = dict(network.named_parameters())
    return functional_call(network, weights, torch.cat([fixed.data, moving.data], -3).flatten(1))


@pytest.fixture
def pairs() -> tuple[Image, Image]:
    return data.digit_pairs(3)


def network(count: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2 * 28 * 28, count))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda out: out,
            r"initial does not fit FFD\(stride=7\): expected the structure .*, shapes .*coefficients.* not",
        ),
        (
            lambda out: {"coefficient": out.unflatten(1, (2, 7, 7))},
            "expected the structure .*, shapes .*coefficients.* not",
        ),
        (lambda out: {"coefficients": out}, r"coefficients.* has shape \(3, 98\), expected \(2, 7, 7\) at its end"),
        (lambda out: {"coefficients": out.unflatten(1, (7, 7, 2))}, r"has shape \(3, 7, 7, 2\), expected \(2, 7, 7\)"),
        (lambda out: {"coefficients": out.unflatten(1, (2, 7, 7))[:2]}, "leading batch axes differ .*initial"),
    ],
)
def test_an_answer_of_the_wrong_structure_is_told(made: object, told: str, pairs: tuple[Image, Image]) -> None:
    assert FFD(stride=7).lattice(pairs[0].grid).shape == (7, 7)
    initial = made(answer(network(98), *pairs).detach())  # type: ignore[operator]
    for register in (fnreg.register, fnreg.differentiable(fnreg.register, adjoint=Unrolled())):
        with pytest.raises(ValueError, match=told):
            register(*pairs, FFD(stride=7), initial=initial, levels=1, steps=1)


def test_features_of_other_channels_are_told(pairs: tuple[Image, Image]) -> None:
    fixed, moving = pairs
    solve = fnreg.differentiable(fnreg.register, adjoint=Implicit(check=None))
    a, b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
    with pytest.raises(ValueError, match="moving has 2 channels but fixed has 3"):
        solve(Image(a(fixed.data), fixed.grid), Image(b(moving.data), moving.grid), Rigid(), steps=1)


def test_refining_an_answer_has_the_slope_of_finite_differences(pairs: tuple[Image, Image]) -> None:
    """The value after two steps from a network's answer, by a weight of the network."""
    fixed, moving = (Image(image.data.double(), image.grid) for image in pairs)
    made = nn.Linear(2 * 28 * 28, 2).double()
    weights = {name: 1e-3 * weight.detach() for name, weight in made.named_parameters()}
    solve = fnreg.differentiable(fnreg.register, adjoint=Unrolled())
    seen = torch.cat([fixed.data, moving.data], -3).flatten(1)

    def value(bias: Tensor) -> Tensor:
        initial = {"translation": 0.31 + functional_call(made, weights | {"bias": bias}, seen)}
        options = {"optimizer": adam(0.01), "levels": 1, "steps": 2, "interpolation": "cubic", "padding": "border"}
        found = solve(fixed, moving, fnreg.Translation(), initial=initial, **options)
        return found.value.sum()

    bias, small = weights["bias"], 1e-5
    slope = grad(value)(bias)
    for axis in range(2):
        away = small * torch.eye(2).double()[axis]
        expected = (value(bias + away) - value(bias - away)) / (2 * small)
        assert float(slope[axis]) == pytest.approx(float(expected), rel=1e-5)


def test_an_answer_alone_is_as_in_the_batch(pairs: tuple[Image, Image]) -> None:
    fixed, moving = pairs
    params = {"coefficients": answer(network(98), *pairs).detach().unflatten(1, (2, 7, 7))}
    batch = fnreg.register(fixed, moving, FFD(stride=7), initial=params, levels=1, steps=0)
    one = Mapping({"coefficients": params["coefficients"][1]}, fixed.grid, FFD(stride=7))
    value, _ = fnreg.evaluate(Image(fixed.data[1], fixed.grid), Image(moving.data[1], moving.grid), one)
    assert float(batch.value[1]) == pytest.approx(float(value), rel=1e-6)
