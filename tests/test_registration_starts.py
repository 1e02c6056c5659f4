"""register: many starts, starts at centres, and start parameters or maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import (
    DESCENT,
    SAME,
    both_solvers,
    equal_bits,
    few_steps,
    known_pair,
    moving_scene,
    orientation,
    placement,
    random_params,
    scene,
    several_pairs,
    take,
    tensor,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    Affine,
    Descent,
    Event,
    Grid,
    Image,
    Mapping,
    Rigid,
    Rotation,
    Stop,
    Subject,
    Translation,
    adam,
    linear_mapping,
    register,
    stack,
)

# -- many starts ---------------------------------------------------------------------------------------------------


def test_starts_find_large_rotations_in_the_plane() -> None:
    angles = [0.0, 1.9, 3.1, -2.2]
    moving = moving_scene(2)
    fixed = []
    for angle in angles:
        params = {"rotation": tensor([angle]), "translation": tensor([0.5, -0.4])}
        truth = Mapping(params, scene(2).grid, Rigid())
        fixed.append((scene(2, truth), truth))
    starts = Rigid().spread(moving.grid, 12)
    batch = register(stack([f for f, _ in fixed]), moving, Rigid(), starts=starts, levels=2, steps=40)
    alone = register(fixed[1][0], moving, Rigid(), levels=2, steps=40)
    assert voxels_apart(alone.mapping, fixed[1][1], fixed[1][0].grid) > 5  # without starts it is lost
    for n, (image, truth) in enumerate(fixed):
        assert voxels_apart(take(batch.mapping, n), truth, image.grid) < 0.1
        one = register(image, moving, Rigid(), starts=starts, levels=2, steps=40)
        assert voxels_apart(one.mapping, take(batch.mapping, n), image.grid) < SAME
        assert one.steps.shape == (2,)


def test_starts_find_large_rotations_in_space() -> None:
    truth = Mapping({"rotation": tensor([0.2, 0.7, -0.5, 0.4])}, scene(3).grid, Rotation())
    fixed, moving = scene(3, truth), moving_scene(3)
    result = register(fixed, moving, Rotation(), starts=Rotation().spread(fixed.grid, 40), levels=2, steps=15)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.3


def test_starts_of_a_pair_may_be_its_own() -> None:
    fixed, moving = several_pairs()
    starts = [{"translation": tensor([[0.0, 0.0], [0.5 * n, -1.0], [4.0, 4.0]])} for n in range(4)]
    options = few_steps(DESCENT)
    batch = register(stack(fixed), stack(moving), Translation(), starts=stack(starts), **options)
    for n in range(4):
        alone = register(fixed[n], moving[n], Translation(), starts=starts[n], **options)
        assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME


def test_fewer_starts_go_on_to_each_finer_level() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    told: list[Event] = []
    starts = Rigid().spread(fixed.grid, 12)
    register(fixed, moving, Rigid(), starts=starts, levels=3, steps=2, stop=None, progress=told.append)
    widths = {event.level: event.active for event in told}
    assert widths == {2: 12, 1: 3, 0: 1}


def test_a_solver_of_ones_own_needs_no_more_than_steps_to_search_among_starts() -> None:
    """One with init, step and scales, that says nothing of pairs, is the same for all."""
    plain = Descent(adam(0.3))

    class Own:
        scales = True
        init, step = plain.init, plain.step

    fixed, moving, _ = known_pair(Rigid(), 2)
    starts = Rigid().spread(fixed.grid, 6)
    options: dict[str, Any] = {"starts": starts, "levels": 2, "steps": 8}
    several = stack([fixed, fixed, fixed])
    for stop in (None, Stop(), Stop(width=2)):
        own = register(several, moving, Rigid(), solver=Own(), stop=stop, **options)
        assert equal_bits(own.mapping, register(several, moving, Rigid(), solver=plain, stop=stop, **options).mapping)


def test_one_start_is_no_search() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    params = random_params(Rigid(), fixed.grid, 3, 0.5)
    one = register(fixed, moving, Rigid(), starts=stack([params]), **few_steps(DESCENT))
    other = register(fixed, moving, Rigid(), initial=params, **few_steps(DESCENT))
    assert voxels_apart(one.mapping, other.mapping, fixed.grid) < SAME


def test_the_best_start_wins() -> None:
    """No step is taken: the start with the lowest value is the result, and one outside of the image is none."""
    fixed, moving, truth = known_pair(Translation(), 2)
    wrong = {"translation": tensor([1e4, 0.0])}
    several = [random_params(Translation(), fixed.grid, n, 2.0) for n in range(4)]
    starts = stack([wrong, *several[:2], truth.params, *several[2:]])
    for levels in (1, 2):
        result = register(fixed, moving, Translation(), starts=starts, steps=0, levels=levels)
        assert equal_bits(result.mapping.params, truth.params)


def test_starts_take_a_gradient_and_exclude_other_beginnings() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    starts = Rigid().spread(fixed.grid, 2)
    with pytest.raises(ValueError, match="starts and start='center' both say where to begin"):
        register(fixed, moving, Rigid(), starts=starts, start="center")
    pure: dict[str, Any] = {"levels": 1, "steps": 2, "stop": None, "optimizer": fnreg.adam(0.3, pure=True)}

    def value(shift: Tensor) -> Tensor:
        return register(fixed, moving, Rigid(), starts={**starts, "translation": shift}, **pure).value

    point = torch.full((2, 2), 0.3, dtype=torch.float64)
    assert float(torch.func.grad(value)(point).abs().max()) > 0


# -- centres -------------------------------------------------------------------------------------------------------


def test_starts_at_centres() -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    far = Image(moving.data, Grid(moving.grid.size, **placement(moving.grid) | {"center": moving.grid.center + 500.0}))
    for start in ("center", "moments"):
        result = register(fixed, far, Rigid(), start=start, levels=2, steps=60)  # type: ignore[arg-type]
        points = fixed.grid.points()
        assert_close(result.map_points(points) - 500.0, truth.map_points(points), atol=0.1, rtol=0)
    still = register(fixed, far, Rigid(), start="center", steps=0)
    assert_close(still.map_points(fixed.grid.center[None])[0], far.grid.center, atol=1e-9, rtol=0)


@pytest.mark.parametrize("transform", [Rigid(), fnreg.Held(Rigid(), ("rotation",))], ids=repr)
def test_what_can_shift_can_start_by_centres(transform: Any) -> None:
    fixed, moving, _ = known_pair(Translation(), 2)
    away = Image(
        moving.data, spacing=moving.grid.spacing, center=moving.grid.center + 500, direction=moving.grid.direction
    )
    assert register(fixed, away, transform, start="center", levels=1, steps=5).ok


def test_moments_align_the_centres_of_mass() -> None:
    def ball(center: tuple[float, float], **options: Any) -> Image:
        grid = Grid((16, 14), **options)
        away = (grid.points() - tensor(center)).square().sum(1)
        return Image(5 + torch.exp(-away / 8).reshape(1, 14, 16), grid)

    fixed = ball((6.0, 7.0))
    moving = ball((13.0, 10.0), spacing=(1.5, 1.2), origin=(1.0, 2.0), direction=orientation(2, tensor([0.2])))
    still = register(fixed, moving, Translation(), start="moments", steps=0, levels=1)
    assert_close(still.mapping.params["translation"], tensor([7.0, 3.0]), atol=0.1, rtol=0)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_moments_are_those_of_what_the_mask_shows(offset: float) -> None:
    """A bright artefact under a zero mask weighs nothing, whatever the intensities start from."""
    image, other = scene(2), moving_scene(2)
    mask = torch.ones_like(image.data)
    mask[..., :8] = 0
    shown = Subject(Image(torch.where(mask > 0, image.data + offset, 50.0), image.grid), mask)
    mass = (image.data + offset - (image.data + offset)[mask > 0].min()) * mask
    center = (mass.flatten() / mass.sum()) @ image.grid.points()
    away = register(shown, other, Translation(), start="moments", steps=0, levels=1).mapping.params["translation"]
    plain = register(other, other, Translation(), start="moments", steps=0, levels=1).mapping.params["translation"]
    whole = (other.data - other.data.min()).flatten()
    assert_close(away, (whole / whole.sum()) @ other.grid.points() - center, atol=1e-9, rtol=0)
    assert_close(plain, torch.zeros(2).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_moments_align_what_two_masks_show(offset: float) -> None:
    truth = Mapping({"translation": tensor([1.5, -1.0])}, scene(2).grid, Translation())
    subjects = []
    for image in (scene(2, truth), scene(2)):
        mask = torch.ones_like(image.data)
        mask[..., :4, :] = 0
        subjects.append(Subject(Image(torch.where(mask > 0, image.data.abs() + offset, 50.0), image.grid), mask))
    still = register(*subjects, Translation(), start="moments", steps=0, levels=1)
    plain = register(*(s.image for s in subjects), Translation(), start="moments", steps=0, levels=1)
    assert voxels_apart(still.mapping, truth, scene(2).grid) < 0.75
    assert voxels_apart(plain.mapping, truth, scene(2).grid) > 1.0


# -- initial -------------------------------------------------------------------------------------------------------


@both_solvers
def test_a_registration_starts_from_initial_parameters_or_a_map(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    params = random_params(Rigid(), fixed.grid, 2, 0.5)
    mapping = Mapping(params, fixed.grid, Rigid())
    still = register(fixed, moving, Rigid(), initial=params, steps=0)
    assert equal_bits(still.mapping.params, params)
    by_params = register(fixed, moving, Rigid(), initial=params, **few_steps(options))
    for given in (mapping, linear_mapping(mapping.matrix(), Grid((3, 3), center=(50.0, 1.0)))):
        by_map = register(fixed, moving, Rigid(), initial=given, **few_steps(options))
        assert voxels_apart(by_map.mapping, by_params.mapping, fixed.grid) < SAME
    wider = register(fixed, moving, Affine(), initial=mapping, steps=0)
    assert voxels_apart(wider.mapping, mapping, fixed.grid) < SAME


def test_initial_parameters_of_a_batch_equal_the_loop() -> None:
    fixed, moving = several_pairs()
    params = [random_params(Rigid(), fixed[n].grid, n, 0.3) for n in range(4)]
    for initial, each in ((stack(params), params), (params[0], [params[0]] * 4)):
        batch = register(stack(fixed), stack(moving), Rigid(), initial=initial, **few_steps(DESCENT, 4))
        maps = register(
            stack(fixed),
            stack(moving),
            Rigid(),
            initial=stack([Mapping(p, f.grid, Rigid()) for p, f in zip(each, fixed, strict=True)]),
            **few_steps(DESCENT, 4),
        )
        for n in range(4):
            alone = register(fixed[n], moving[n], Rigid(), initial=each[n], **few_steps(DESCENT, 4))
            assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME
            assert voxels_apart(take(maps.mapping, n), alone.mapping, fixed[n].grid) < SAME
