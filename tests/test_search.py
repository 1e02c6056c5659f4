"""start="auto": the start that is chosen among headers, centres, moments and rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import SAME, equal_bits, moving_scene, orientation, scene, stored, take, take_batched, tensor, voxels_apart

import fnreg
from fnreg import (
    FFD,
    Affine,
    Grid,
    Held,
    Image,
    Mapping,
    Registration,
    Rigid,
    Rotation,
    Scaling,
    Similarity,
    Stage,
    Stop,
    Subject,
    Translation,
    mse,
    register,
    search,
    stack,
)
from fnreg.search import search_levels, searched
from fnreg.solvers.base import Status

QUICK: dict[str, Any] = {"levels": 2, "steps": 40}
AWAY = (300.0, -200.0, 100.0)


def displaced(image: Image, turn: tuple[float, ...], away: tuple[float, ...] = AWAY) -> tuple[Image, Any]:
    """The image as its header would lie: turned and moved as a whole; and the rotation."""
    grid = image.grid
    rotation = orientation(grid.ndim, tensor(turn))
    center = rotation @ grid.center + tensor(away)[: grid.ndim]
    return Image(
        image.data, Grid(grid.size, spacing=grid.spacing, center=center, direction=rotation @ grid.direction)
    ), rotation


def error(result: Registration, fixed: Image, rotation: torch.Tensor, away: tuple[float, ...] = AWAY) -> float:
    """Voxels from where the points of the fixed image, which is not moved, lie in the displaced one."""
    points = fixed.grid.points()
    truth = points @ rotation.mT + tensor(away)[: fixed.grid.ndim]
    return float((result.map_points(points) - truth).norm(dim=1).max() / fixed.grid.spacing.min())


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("turn", [(0.6, 0.3, -0.2), (2.9, 0.4, 0.3), (-1.9, 1.2, 0.5)])
def test_any_rotation_and_shift_is_found(dimension: int, turn: tuple[float, ...]) -> None:
    fixed = scene(dimension, grow=6)
    moving, rotation = displaced(moving_scene(dimension, grow=6), turn)
    result = register(fixed, moving, Rigid(), start="auto", **QUICK)
    assert error(result, fixed, rotation) < 0.2
    assert isinstance(result.choice, fnreg.Choice)
    assert result.choice.name() != "header"
    with pytest.raises(fnreg.RegistrationError, match="do not overlap"):
        register(fixed, moving, Rigid(), **QUICK)


@pytest.mark.parametrize("transform", [Rigid(), Similarity(), Affine()], ids=repr)
@pytest.mark.parametrize("objective", [mse, fnreg.ncc, fnreg.mi], ids=repr)
def test_families_and_objectives(transform: Any, objective: Any) -> None:
    fixed = scene(2, grow=6)
    moving, rotation = displaced(moving_scene(2, grow=6), (2.5, 0.0, 0.0))
    result = register(fixed, moving, transform, objective=objective, start="auto", levels=2, steps=80)
    assert error(result, fixed, rotation) < 0.6


def test_a_shift_and_a_rotation_alone() -> None:
    fixed = scene(2, grow=6)
    moving, rotation = displaced(moving_scene(2, grow=6), (0.0, 0.0, 0.0))
    assert error(register(fixed, moving, Translation(), start="auto", **QUICK), fixed, rotation) < 0.2
    truth = Mapping({"rotation": tensor([2.4])}, fixed.grid, Rotation())
    turned = register(scene(2, truth, grow=6), moving_scene(2, grow=8), Rotation(), start="auto", **QUICK)
    assert voxels_apart(turned.mapping, truth, fixed.grid) < 0.2
    assert turned.choice is not None
    assert turned.choice.name() == "rotation"


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_what_is_aligned_stays_as_it_is(dimension: int) -> None:
    fixed, moving = scene(dimension), moving_scene(dimension)
    kind = Affine() if dimension == 1 else Rigid()
    plain = register(fixed, moving, kind, levels=2, steps=5)
    result = register(fixed, moving, kind, start="auto", levels=2, steps=5)
    assert result.choice is not None
    assert result.choice.name() == "header"
    assert equal_bits(result.mapping.params, plain.mapping.params)


def test_the_choice_can_be_fixed() -> None:
    fixed = scene(2, grow=6)
    moving, _ = displaced(moving_scene(2, grow=6), (2.5, 0.0, 0.0))
    result = register(fixed, moving, Rigid(), start="auto", **QUICK)
    assert result.choice is not None
    again = register(fixed, moving, Rigid(), initial=result.choice.mapping, **QUICK)
    assert equal_bits(again.mapping.params, result.mapping.params)
    assert again.choice is None
    assert result.inverse().choice is None


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_pair_of_a_batch_chooses_as_it_does_alone(dimension: int) -> None:
    fixed = [scene(dimension, grow=4, spacing=1 + 0.05 * n) for n in range(3)]
    turns = [(0.0, 0.0, 0.0), (2.8, 0.3, 0.1), (-1.5, 0.7, 0.4)]
    moving = [displaced(moving_scene(dimension, grow=4), turn, (20.0 * n, 5.0, 1.0))[0] for n, turn in enumerate(turns)]
    options: dict[str, Any] = {"start": "auto", "levels": 2, "steps": 10}
    batch = register(stack(fixed), stack(moving), Rigid(), **options)
    assert batch.choice is not None
    for n in range(3):
        alone = register(fixed[n], moving[n], Rigid(), **options)
        assert alone.choice is not None
        assert alone.choice.name() == batch.choice.name(n)
        assert voxels_apart(alone.mapping, take(batch.mapping, n), fixed[n].grid) < SAME
    shared = register(fixed[0], stack(moving), Rigid(), **options)
    assert (
        voxels_apart(
            register(fixed[0], moving[1], Rigid(), **options).mapping,
            fnreg.Mapping({k: v[1] for k, v in shared.mapping.params.items()}, fixed[0].grid, Rigid()),
            fixed[0].grid,
        )
        < SAME
    )


def test_pairs_that_wait_are_not_searched_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all candidates a search takes more memory than a descent: it too is of some pairs at a time."""
    fixed, moving = scene(2, grow=4), moving_scene(2, grow=4)
    turned = stack([displaced(moving, (angle,))[0] for angle in (0.0, 2.8, -1.5, 0.4, 1.1)])
    options: dict[str, Any] = {"start": "auto", "levels": 2, "steps": 10}
    whole = register(stack([fixed] * 5), turned, Rigid(), stop=Stop(), **options)
    widths, run = list[int](), search.run

    def watched(problem: Any, *given: Any, **rest: Any) -> Any:
        widths.append(problem.size)
        return run(problem, *given, **rest)

    monkeypatch.setattr(search, "run", watched)
    parts = register(stack([fixed] * 5), turned, Rigid(), stop=Stop(width=2), **options)
    assert whole.choice is not None and parts.choice is not None
    assert max(widths) == 2 * len(parts.choice.names)
    assert torch.equal(whole.choice.candidate, parts.choice.candidate) and len(whole.choice.candidate.unique()) > 2
    for n in range(5):
        assert voxels_apart(take(whole.mapping, n), take(parts.mapping, n), fixed.grid) < SAME


def test_what_a_mask_hides_has_no_say() -> None:
    """A bright artefact draws the moments away, unless a mask hides it."""
    fixed = scene(2, grow=10)
    moving, rotation = displaced(moving_scene(2, grow=10), (2.5, 0.0, 0.0))
    mask = torch.ones_like(moving.data)
    mask[..., :4] = 0
    spoiled = torch.where(mask > 0, moving.data, 1e3)
    result = register(fixed, Subject(Image(spoiled, moving.grid), mask), Rigid(), start="auto", **QUICK)
    other = register(fixed, Subject(moving, mask), Rigid(), start="auto", **QUICK)
    assert error(result, fixed, rotation) < 0.2
    assert voxels_apart(result.mapping, other.mapping, fixed.grid) < SAME


def test_the_order_of_the_axes_does_not_matter() -> None:
    fixed = scene(2, grow=6)
    moving, _ = displaced(moving_scene(2, grow=6), (2.5, 0.0, 0.0))
    plain = register(fixed, moving, Rigid(), start="auto", levels=2, steps=5)
    other = stored(fixed, (1, 0), (True, False)), stored(moving, (0, 1), (False, True))
    result = register(*other, Rigid(), start="auto", levels=2, steps=5)
    assert voxels_apart(result.mapping, plain.mapping, fixed.grid) < 1e-6


def test_faults_are_told_as_ever() -> None:
    good = scene(2)
    flat = Image(torch.full_like(good.data, 2.0), good.grid)
    lost = Image(torch.full_like(good.data, torch.nan), good.grid)
    for moving, told in (
        (flat, "moving is constant"),
        (lost, "moving holds NaN"),
        (Subject(good, torch.zeros_like(good.data)), "mask of moving is zero"),
    ):
        with pytest.raises(fnreg.RegistrationError, match=told):
            register(good, moving, Rigid(), start="auto", **QUICK)
    turned = displaced(good, (2.5, 0.0, 0.0), (0.0, 0.0, 0.0))[0]
    several = stack([turned, *(Image(image.data, turned.grid) for image in (flat, lost))])
    batch = register(good, several, Rigid(), start="auto", **QUICK)
    assert batch.status.tolist()[1:] == [Status.MOVING_CONSTANT, Status.MOVING_NOT_FINITE]
    alone = register(good, turned, Rigid(), start="auto", **QUICK)
    first = Mapping({k: v[0] for k, v in batch.mapping.params.items()}, good.grid, Rigid())
    assert voxels_apart(alone.mapping, first, good.grid) < SAME


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
def test_a_pair_that_holds_infinity_ends_no_batch(bad: float) -> None:
    """Two infinite voxels have moments without eigenvectors, of which LAPACK, in 3-D, would tell the whole batch."""
    fixed, moving = scene(3, grow=2), moving_scene(3, grow=2)
    turned = [displaced(moving, turn, (20.0, 5.0, 1.0))[0] for turn in ((2.8, 0.3, 0.1), (0.0, 0.0, 0.0))]
    spoiled = moving.data.clone()
    spoiled[0, 3, 4, 5:7] = bad
    options: dict[str, Any] = {"start": "auto", "levels": 1, "steps": 3}
    batch = register(fixed, stack([turned[0], Image(spoiled, moving.grid), turned[1]]), Rigid(), **options)
    assert batch.status.tolist() == [Status.STEPS, Status.MOVING_NOT_FINITE, Status.STEPS]
    assert batch.choice is not None
    for n, image in ((0, turned[0]), (2, turned[1])):
        alone = register(fixed, image, Rigid(), **options)
        assert alone.choice is not None
        assert alone.choice.name() == batch.choice.name(n)
        assert voxels_apart(alone.mapping, take_batched(batch.mapping, n), fixed.grid) < SAME


def test_where_there_is_nothing_to_choose_the_headers_count() -> None:
    fixed, moving = scene(2), moving_scene(2)
    then = Mapping({"translation": tensor([0.5, 0.0])}, fixed.grid, Translation())
    points = tensor([[0.0, 1.0], [2.0, 3.0], [-3.0, 1.0]])
    known = Subject(fixed, points=points), Subject(moving, points=points)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ((fixed, moving), {"transform": FFD(4)}),
        ((fixed, moving), {"transform": Held(Rigid(), ("rotation",))}),
        ((fixed, moving), {"transform": Scaling()}),
        ((fixed, moving), {"transform": Rigid(), "then": then}),
        (known, {"transform": Rigid(), "objective": fnreg.landmarks}),
    ]
    for pair, options in cases:
        result = register(*pair, start="auto", levels=1, steps=2, **options)
        plain = register(*pair, levels=1, steps=2, **options)
        assert result.choice is None
        assert voxels_apart(result.mapping, plain.mapping, fixed.grid) == 0


def test_only_the_first_stage_is_searched() -> None:
    fixed = scene(2, grow=6)
    moving, rotation = displaced(moving_scene(2, grow=6), (2.5, 0.0, 0.0))
    result = register(fixed, moving, [Stage(Rigid(), levels=1), Affine()], start="auto", steps=60, levels=2)
    assert error(result, fixed, rotation) < 0.3


def test_other_beginnings_are_refused_beside_it() -> None:
    fixed, moving = scene(2), moving_scene(2)
    with pytest.raises(ValueError, match="starts and start='auto' both say where to begin: give one of them"):
        register(fixed, moving, Rigid(), start="auto", starts=Rigid().spread(fixed.grid, 3))


def test_it_is_a_constant_in_differentiation() -> None:
    fixed, moving = scene(2), moving_scene(2)
    pure: dict[str, Any] = {"levels": 1, "steps": 2, "stop": None, "optimizer": fnreg.adam(0.3, pure=True)}

    def value(data: torch.Tensor, start: Any) -> torch.Tensor:
        return register(fixed, Image(data, moving.grid), Rigid(), start=start, **pure).value

    found, plain = (torch.func.grad(value)(moving.data, start) for start in ("auto", "header"))
    assert float(plain.abs().max()) > 0
    assert torch.allclose(found, plain, atol=1e-12, rtol=0)  # these are aligned, so both begin at the headers


def test_what_is_searched() -> None:
    assert searched(Affine(), 3) == Rigid()
    assert searched(Affine(), 1) == Translation()
    assert searched(Rotation(), 2) == Rotation()
    assert searched(Scaling(), 2) is None
    assert [search_levels(size) for size in ((20, 3), (21,), (128, 150, 128))] == [1, 2, 4]
