"""Networks within registrations: what does not fit is told, and what fits is as the registration of its answer."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

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


# -- what the examples learn is better than where they begin, in a few rounds ----------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of an example, on what comes with the package."""
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("FNREG_DATA", raising=False)
    folder = Path(__file__).resolve().parents[1] / "examples"
    return lambda name: runpy.run_path(str(folder / f"{name}.py"))


def test_an_atlas_is_sharper_and_easier_to_register_than_the_mean(example: Any) -> None:
    made = example("atlas")
    images = made["members"](3, 6)
    template, losses = made["learn"](images, rounds=4, steps=4)
    assert losses[-1] < 0.7 * losses[0]
    assert made["sharpness"](template) > 1.1 * made["sharpness"](images.data.mean(0))


def test_learned_weights_overlap_labels_better(example: Any) -> None:
    made = example("learn_penalty")
    known = made["pairs"](made["people"]()[:5])
    logs, losses = made["learn"](known, rounds=2, steps=20)
    assert losses[1] < losses[0]
    before, after = (float(made["dice"](known, x, 20).mean()) for x in (logs[0], logs[-1]))
    assert after > before


def test_learned_features_end_nearer_to_the_truth(example: Any) -> None:
    made = example("learn_features")
    a, b, _, _, grid = made["slices"]()
    losses = made["learn"](a, b, grid, rounds=5, steps=5)[1]
    assert losses[-1] < 0.5 * losses[0]


def test_an_answer_of_pairs_that_were_not_learned_from_is_nearer_than_the_identity(example: Any) -> None:
    made = example("amortised")
    train, test = made["pairs"](64)
    network, losses = made["learn"](train, rounds=8)
    found = made["compare"](network, test, (0,))
    assert losses[-1] < losses[0]
    assert found["network"][0][1] < 0.95 * found["identity"][0][1]


def test_pairs_of_another_seed_are_others(example: Any) -> None:
    made = example("amortised")
    (first, _), (again, _), (other, _) = (made["pairs"](8, seed=n)[0] for n in (0, 0, 1))
    assert torch.equal(first.data, again.data) and not torch.equal(first.data, other.data)
