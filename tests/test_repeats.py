"""Options of each pair go with all its settings and copies, wherever they lie; what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    Descent,
    Image,
    Mapping,
    Rigid,
    Rotation,
    Stage,
    Translation,
    adam,
    bending,
    chain,
    clip,
    data,
    ensemble,
    mse,
    sweep,
)
from fnreg.pytree import tree_leaves, tree_map
from fnreg.repeats import repeat_options, repeat_stages

PAIRS, SHORT = 3, {"levels": 2, "steps": 4, "stop": None}
WEIGHTS = torch.tensor([0.5, 3.0], dtype=torch.float64)
RATES = torch.tensor([0.05, 0.2, 0.7], dtype=torch.float64)
OWN = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)  # weights of bending
ANGLES = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2, 1)
START = {"translation": torch.tensor([[1.0, 0.0], [0.0, -2.0], [2.0, 1.0]], dtype=torch.float64)}

SHIFTED = Mapping({"translation": 0.5 * START["translation"]}, fnreg.Grid((28, 28)), Translation())


@pytest.fixture(scope="module")
def images() -> tuple[Image, Image]:
    fixed, moving = data.digit_pairs(PAIRS)
    return Image(fixed.data.double(), fixed.grid), Image(moving.data.double(), moving.grid)


def one(images: tuple[Image, Image]) -> tuple[Image, Image]:
    return tuple(Image(image.data[0], image.grid) for image in images)  # type: ignore[return-value]


def by_rate(value: Tensor) -> dict[str, Any]:
    return {"optimizer": adam(value)}


def by_weight(value: Tensor) -> dict[str, Any]:
    return {"objective": mse + value * bending}


# What belongs to each pair: the transform, options of `register`, and what is swept beside it.
OWNED: dict[str, tuple[Any, dict[str, Any], Callable[[Tensor], dict[str, Any]]]] = {
    "initial": (Translation(), {"initial": START}, by_rate),
    "an initial mapping": (Rigid(), {"initial": SHIFTED}, by_rate),
    "then": (Rigid(), {"then": SHIFTED}, by_rate),
    "starts": (Rotation(), {"starts": {"rotation": ANGLES}}, by_rate),
    "shared starts": (Rotation(), {"starts": {"rotation": ANGLES[0]}}, by_rate),
    "a weight": (FFD(7), {"objective": mse + OWN * bending}, by_rate),
    "a weight per level": (FFD(7), {"objective": [mse + OWN * bending, mse + 0.1 * bending]}, by_rate),
    "a weight of a stage": ([Stage(Rigid()), Stage(FFD(7), objective=mse + OWN * bending)], {}, by_rate),
    "weights of a stage per level": (Stage(FFD(7), objective=(mse + bending, mse + OWN * bending)), {}, by_rate),
    "rates": (FFD(7), {"optimizer": adam(RATES)}, by_weight),
    "rates of a chain": (FFD(7), {"optimizer": chain(clip(1.0), adam(RATES))}, by_weight),
    "rates of a solver": (FFD(7), {"solver": Descent(adam(RATES), limit=0.5)}, by_weight),
    "rates of stages": (
        [Stage(Rigid(), objective=mse, optimizer=adam(RATES)), Stage(FFD(7), solver=Descent(adam(RATES)))],
        {},
        by_weight,
    ),
}


@pytest.mark.parametrize("name", OWNED)
def test_without_noise_every_copy_is_its_pair(name: str, images: tuple[Image, Image]) -> None:
    transform, own, using = OWNED[name]
    given = by_weight(torch.tensor(0.1)) if using is by_weight else {}
    copies = ensemble(*images, transform, count=2, noise=0.0, **given, **own, **SHORT)
    expected = tree_map(lambda leaf: leaf.repeat_interleave(2, 0), copies.reference.mapping.params)
    assert_close(copies.registration.mapping.params, expected, atol=1e-9, rtol=0)
    alike = [bool((leaf[0] - leaf[2]).abs().max() < 1e-6) for leaf in tree_leaves(expected)]
    assert not all(alike)  # pairs differ, so an order that is wrong would be seen


@pytest.mark.parametrize("name", OWNED)
def test_every_setting_is_the_batch_with_it(name: str, images: tuple[Image, Image]) -> None:
    transform, own, using = OWNED[name]
    options = SHORT | own
    found = sweep(*images, transform, using, over={"value": WEIGHTS}, judge="value", **options)
    assert found.scores.shape == (PAIRS, 2)
    for k, value in enumerate(WEIGHTS):
        alone = fnreg.register(*images, transform, **using(value), **options)
        mine = tree_map(lambda leaf, k=k: leaf[k::2], found.every.mapping.params)
        assert_close(mine, alone.mapping.params, atol=1e-9, rtol=0)


def test_one_pair_takes_what_is_of_one(images: tuple[Image, Image]) -> None:
    options: dict[str, Any] = {"starts": {"rotation": ANGLES[0]}, "optimizer": adam(RATES[:1])}
    copies = ensemble(*one(images), Rotation(), count=3, noise=0.0, **options, **SHORT)
    assert copies.alone and copies.registration.status.shape == (3,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer": adam(RATES[:2])}, r"optimizer: lr has shape \(2,\) for 3 pairs: give one rate, or one per pair"),
        ({"optimizer": chain(clip(1.0), adam(torch.ones(4)))}, r"optimizer: lr has shape \(4,\) for 3 pairs"),
        ({"solver": Descent(adam(RATES[:2]))}, r"solver: lr has shape \(2,\) for 3 pairs"),
        (
            {"starts": {"rotation": ANGLES[:2]}},
            r"starts: .*rotation.* has shape \(2, 2, 1\) for 3 pairs: give \(S, ...\) for all of them",
        ),
        ({"starts": {"rotation": torch.zeros(())}}, r"starts: .*rotation.* has shape \(\), expected \(1,\) at its end"),
        (
            {"starts": {"rotation": torch.zeros(1)}},
            r"starts have shape \(1,\): expected an axis of starts before 1 axes",
        ),
        ({"starts": ANGLES}, r"starts do not fit Rotation\(\): expected the structure"),
        ({"initial": {"rotation": ANGLES[:2, 0]}}, "leading batch axes differ .*initial"),
        ({"objective": mse * torch.ones(2)}, "leading batch axes differ .*objective"),
        ({"objective": [mse, mse * torch.ones(2)]}, r"leading batch axes differ .*objective\[1\]"),
    ],
)
def test_what_is_of_other_pairs_is_told(options: dict[str, Any], told: str, images: tuple[Image, Image]) -> None:
    swept = "weight" if "objective" not in options else "rate"
    using = {"weight": lambda w: {"objective": w * mse}, "rate": lambda w: {"optimizer": adam(w)}}[swept]
    with pytest.raises(ValueError, match=told):
        sweep(*images, Rotation(), using, over={"w": WEIGHTS}, judge="value", **options)


def test_weights_of_a_stage_of_other_pairs_are_told(images: tuple[Image, Image]) -> None:
    stages = [Rigid(), Stage(FFD(7), objective=mse + torch.ones(2) * bending)]
    with pytest.raises(ValueError, match=r"leading batch axes differ .*objective of stage 1"):
        sweep(*images, stages, lambda w: {"optimizer": adam(w)}, over={"w": WEIGHTS}, judge="value")
    with pytest.raises(ValueError, match=r"optimizer of stage 0: lr has shape \(2,\) for 3 pairs"):
        repeat_stages(Stage(Rigid(), optimizer=adam(torch.ones(2))), pairs=3, count=2)


def test_what_nothing_repeats_is_as_it_was() -> None:
    def plain(warped: Tensor, fixed: Tensor) -> Tensor:
        return (warped - fixed).abs().mean()

    options = {"objective": [plain, mse], "optimizer": adam(0.1), "steps": (3, 4), "then": None}
    kept = repeat_options(options, Rigid(), fnreg.Grid((8, 8)), pairs=2, count=3)
    assert kept["objective"][0] is plain and float(kept["objective"][1].weight) == 1
    assert {n: v for n, v in kept.items() if n != "objective"} == {n: v for n, v in options.items() if n != "objective"}
    for transform in (Rigid(), [Rigid(), FFD(4)], "rigid"):
        assert repeat_stages(transform, pairs=2, count=3) == transform
