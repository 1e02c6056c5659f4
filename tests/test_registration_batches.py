"""register: a pair in a batch is what it is alone, and its neighbours change no bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import (
    DESCENT,
    SAME,
    WARPS,
    both_solvers,
    equal_bits,
    few_steps,
    known_pair,
    random_params,
    several_pairs,
    take,
    take_batched,
    tensor,
    uniform,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import Affine, Grid, Image, Rigid, Status, Stop, Subject, adam, register, stack
from fnreg.pytree import tree_map

# -- alone and in a batch ------------------------------------------------------------------------------------------

STOPS = [None, Stop(), Stop(compact=False), Stop(every=1, patience=3), Stop(every=2, patience=3, width=2)]


@both_solvers
@pytest.mark.parametrize(
    "stop", STOPS, ids=["all steps", "compacted", "not compacted", "soon compacted", "two at a time"]
)
def test_a_pair_alone_equals_the_pair_in_a_batch(stop: Stop | None, options: dict[str, Any]) -> None:
    fixed, moving = several_pairs()
    options = {"levels": 2, "steps": 25, "stop": stop, **options}
    alone = [register(f, m, Rigid(), **options) for f, m in zip(fixed, moving, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch = register(stack([fixed[n] for n in order]), stack([moving[n] for n in order]), Rigid(), **options)
        for place, n in enumerate(order):
            found, expected = take(batch.mapping, place), alone[n].mapping
            assert voxels_apart(found, expected, fixed[n].grid) < SAME
            assert torch.equal(batch.steps[place], alone[n].steps)
            assert int(batch.status[place]) == int(alone[n].status)
            assert_close(batch.value[place], alone[n].value, atol=1e-13, rtol=0)
            for a, b in zip(batch.history, alone[n].history, strict=True):
                assert_close(a.value[place], b.value, atol=1e-10, rtol=0, equal_nan=True)


def test_pairs_of_a_batch_in_space_equal_the_loop() -> None:
    fixed, moving = several_pairs(3)
    options = few_steps(DESCENT, 5)
    batch = register(stack(fixed), stack(moving), Affine(), **options)
    for n in range(4):
        alone = register(fixed[n], moving[n], Affine(), **options)
        assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME


@both_solvers
def test_one_fixed_image_serves_many_moving_ones(options: dict[str, Any]) -> None:
    fixed, moving = several_pairs()
    data = torch.stack([m.data for m in moving])
    shared_grid = Image(data, moving[0].grid)
    batch = register(fixed[0], shared_grid, Rigid(), **few_steps(options))
    many = register(
        stack([fixed[0]] * 4), stack([Image(d, moving[0].grid) for d in data]), Rigid(), **few_steps(options)
    )
    assert batch.fixed_grid.center.ndim == 1  # shared leaves are not copied
    assert batch.mapping.domain.center.ndim == 1
    for n in range(4):
        alone = register(fixed[0], Image(data[n], moving[0].grid), Rigid(), **few_steps(options))
        assert voxels_apart(take_batched(batch.mapping, n), alone.mapping, fixed[0].grid) < SAME
        assert voxels_apart(take(many.mapping, n), alone.mapping, fixed[0].grid) < SAME
    assert batch.warp(shared_grid).data.shape == (4, *fixed[0].data.shape)


def test_weights_and_rates_may_differ_between_pairs() -> None:
    fixed, moving = several_pairs()

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    weights, rates = tensor([0.0, 1e-2, 0.1, 1e-3]), tensor([0.3, 0.1, 0.2, 0.5])
    for stop in (None, Stop(every=1, patience=3), Stop(width=3)):
        options: dict[str, Any] = {"levels": 2, "steps": 12, "stop": stop}
        objective = fnreg.mse + weights * fnreg.term(length)
        batch = register(stack(fixed), stack(moving), Rigid(), objective=objective, optimizer=adam(rates), **options)
        for n in range(4):
            one = fnreg.mse + float(weights[n]) * fnreg.term(length)
            alone = register(fixed[n], moving[n], Rigid(), objective=one, optimizer=adam(float(rates[n])), **options)
            assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME
            assert_close(batch.terms["length"][n], alone.terms["length"], atol=1e-10, rtol=0)


def test_weights_of_a_sweep_share_the_images() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    data = fixed.data.expand(3, *fixed.data.shape)
    weights = tensor([1.0, 10.0, 100.0])
    batch = register(Image(data, fixed.grid), moving, Rigid(), objective=weights * fnreg.mse, **few_steps(DESCENT))
    assert_close(batch.value, weights * batch.terms["mse"], atol=1e-12, rtol=0)
    for n in range(3):  # Adam does not see the scale of the objective
        assert voxels_apart(take_batched(batch.mapping, n), take_batched(batch.mapping, 0), fixed.grid) < 1e-4


@pytest.mark.parametrize("what", ["objective", "initial"])
def test_one_pair_in_a_batch_of_weights_or_beginnings(what: str) -> None:
    """A leading axis on any leaf is a batch: the images are shared, and every row is what it is alone."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    several = random_params(Rigid(), fixed.grid, 1), random_params(Rigid(), fixed.grid, 2)
    weights = torch.tensor([0.0, 0.5], dtype=torch.float64)
    options: dict[str, Any] = {"levels": 2, "steps": 4, "stop": None}

    def one(number: int) -> dict[str, Any]:
        if what == "initial":
            return {"initial": several[number]}
        return {"objective": fnreg.mse + weights[number] * fnreg.ncc}

    whole = {"initial": stack(several)} if what == "initial" else {"objective": fnreg.mse + weights * fnreg.ncc}
    batch = register(fixed, moving, Rigid(), **whole, **options)
    assert batch.value.shape == (2,)
    for number in range(2):
        alone = register(fixed, moving, Rigid(), **one(number), **options)
        points = fixed.grid.points()
        assert float((batch.map_points(points)[number] - alone.map_points(points)).abs().max()) < SAME


# -- transforms with a field ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [*WARPS, fnreg.Sequential((fnreg.FFD(4), Affine()))], ids=str)
def test_a_field_of_a_pair_alone_equals_that_in_a_batch(transform: fnreg.Transform) -> None:
    """Pairs on grids of their own, one of which has nothing left to find; compaction changes nothing."""
    fixed, moving = several_pairs()
    for stop in (None, Stop(every=1, patience=3)):
        options: dict[str, Any] = {
            "levels": 2,
            "steps": 10,
            "stop": stop,
            "objective": fnreg.mse + 1e-3 * fnreg.diffusion,
        }
        batch = register(stack(fixed), stack(moving), transform, **options)
        for n in range(4):
            alone = register(fixed[n], moving[n], transform, **options)
            assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME
            assert torch.equal(batch.steps[n], alone.steps)
            assert_close(batch.value[n], alone.value, atol=1e-12, rtol=0)
            assert_close(batch.jacobian().data[n], alone.jacobian().data, atol=1e-9, rtol=0)


@pytest.mark.parametrize("transform", WARPS, ids=str)
def test_fields_of_pairs_in_space_equal_the_loop(transform: fnreg.Transform) -> None:
    fixed, moving = several_pairs(3)
    batch = register(stack(fixed), stack(moving), transform, **few_steps(DESCENT, 3))
    shared = register(
        fixed[0], Image(torch.stack([m.data for m in moving]), moving[0].grid), transform, **few_steps(DESCENT, 3)
    )
    for n in range(4):
        alone = register(fixed[n], moving[n], transform, **few_steps(DESCENT, 3))
        assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME
        same_place = Image(moving[n].data, moving[0].grid)
        alone = register(fixed[0], same_place, transform, **few_steps(DESCENT, 3))
        assert voxels_apart(take_batched(shared.mapping, n), alone.mapping, fixed[0].grid) < SAME


@pytest.mark.parametrize("transform", WARPS, ids=str)
def test_neighbours_change_no_bit_of_a_field(transform: fnreg.Transform) -> None:
    fixed, moving = several_pairs()
    options: dict[str, Any] = {"levels": 2, "steps": 6, "stop": Stop(compact=False)}
    clean = register(stack(fixed), stack(moving), transform, **options)
    for name in ("NaN", "constant", "elsewhere"):
        spoiled = [fixed[0], SPOILS[name](fixed[1]), fixed[2], SPOILS[name](fixed[3])]
        dirty = register(stack(spoiled), stack(moving), transform, **options)
        assert dirty.ok.tolist() == [True, False, True, False]
        for n in (0, 2):
            assert equal_bits(take(dirty.mapping, n), take(clean.mapping, n)), name
            assert equal_bits((dirty.value[n], dirty.steps[n]), (clean.value[n], clean.steps[n])), name


# -- neighbours ----------------------------------------------------------------------------------------------------

SPOILS = {
    "NaN": lambda image: Image(torch.full_like(image.data, torch.nan), image.grid),
    "one NaN": lambda image: Image(torch.cat([image.data[..., :-1], image.data[..., -1:] * torch.nan], -1), image.grid),
    "infinity": lambda image: Image(torch.full_like(image.data, torch.inf), image.grid),
    "constant": lambda image: Image(torch.ones_like(image.data), image.grid),
    "huge": lambda image: Image(1e30 * image.data, image.grid),
    "elsewhere": lambda image: Image(image.data, Grid(image.grid.size, center=(1e4, 0.0))),
    "noise": lambda image: Image(uniform(*image.data.shape, seed=8), image.grid),
}


def _cause(name: str, side: int) -> Status:
    """The status of a pair one side of which is spoiled."""
    if name == "elsewhere":
        return Status.NO_OVERLAP
    return Status[f"{('FIXED', 'MOVING')[side]}_{'CONSTANT' if name == 'constant' else 'NOT_FINITE'}"]


@both_solvers
@pytest.mark.parametrize("stop", [None, Stop(compact=False)], ids=["all steps", "stopping"])
@pytest.mark.parametrize("side", [0, 1], ids=["fixed", "moving"])
def test_neighbours_change_no_bit(side: int, stop: Stop | None, options: dict[str, Any]) -> None:
    fixed, moving = several_pairs()
    options = {"levels": 2, "steps": 6, "stop": stop, **options}
    clean = register(stack(fixed), stack(moving), Rigid(), **options)
    for name, spoil in SPOILS.items():
        sides = [list(fixed), list(moving)]
        sides[side][1], sides[side][3] = spoil(sides[side][1]), spoil(sides[side][3])
        dirty = register(stack(sides[0]), stack(sides[1]), Rigid(), **options)
        for n in (0, 2):
            assert equal_bits(take(dirty.mapping, n), take(clean.mapping, n)), name
            assert equal_bits((dirty.value[n], dirty.steps[n]), (clean.value[n], clean.steps[n])), name
            assert equal_bits([t.value[n] for t in dirty.history], [t.value[n] for t in clean.history]), name
        if name not in ("huge", "noise"):
            assert dirty.status[[1, 3]].tolist() == [_cause(name, side)] * 2, name
            assert dirty.ok.tolist() == [True, False, True, False]
            assert dirty.steps[[1, 3]].tolist() == [[0, 0]] * 2


def test_neighbours_change_no_bit_among_starts_and_stages() -> None:
    fixed, moving = several_pairs()
    spoiled = [fixed[0], SPOILS["NaN"](fixed[1]), fixed[2], SPOILS["constant"](fixed[3])]
    starts = Rigid().spread(fixed[0].grid, 5)
    options = {"levels": 2, "steps": 5, "stop": Stop(compact=False), "starts": starts}
    clean, dirty = (register(stack(f), stack(moving), [Rigid(), Affine()], **options) for f in (fixed, spoiled))
    for n in (0, 2):
        assert equal_bits(take(dirty.mapping, n), take(clean.mapping, n))
        assert equal_bits(dirty.value[n], clean.value[n])
    assert dirty.ok.tolist() == [True, False, True, False]


def test_masks_of_neighbours_change_no_bit() -> None:
    fixed, moving = several_pairs()
    ones = [torch.ones_like(f.data) for f in fixed]
    zeros = [ones[0], 0 * ones[1], ones[2], 0 * ones[3]]
    options = {"levels": 2, "steps": 5, "stop": Stop(compact=False)}
    results = []
    for masks, images in ((ones, fixed), (zeros, [fixed[0], SPOILS["one NaN"](fixed[1]), fixed[2], fixed[3]])):
        results.append(register(Subject(stack(images), torch.stack(masks)), stack(moving), Rigid(), **options))
    for n in (0, 2):
        assert equal_bits(take(results[0].mapping, n), take(results[1].mapping, n))
    assert results[1].ok.tolist() == [True, False, True, False]


# -- nothing else has an influence ---------------------------------------------------------------------------------


@both_solvers
def test_the_same_call_gives_the_same_bits(options: dict[str, Any]) -> None:
    fixed, moving = several_pairs()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # nothing is random
        results.append(register(stack(fixed), stack(moving), Rigid(), levels=2, steps=15, **options))
    assert equal_bits((results[0].mapping, results[0].value), (results[1].mapping, results[1].value))
    assert equal_bits([t.value for t in results[0].history], [t.value for t in results[1].history])


def test_arguments_are_left_as_they_are() -> None:
    fixed, moving = several_pairs()
    subject = Subject(stack(fixed), torch.ones(4, *fixed[0].data.shape))
    before = tree_map(torch.clone, (subject, stack(moving)))
    initial = Rigid().init(fixed[0].grid)
    kept = tree_map(torch.clone, initial)
    register(subject, stack(moving), Rigid(), initial=initial, levels=2, steps=5)
    assert equal_bits((subject, stack(moving)), before)
    assert equal_bits(initial, kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_do_not_matter(mode: Any) -> None:
    """Outside of torch.func a registration is not differentiated, and needs no autograd of the caller's."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, Rigid(), **few_steps(DESCENT))
    with mode():
        result = register(fixed, moving, Rigid(), **few_steps(DESCENT))
    assert equal_bits(result.mapping, expected.mapping)
    tracked = [Image(image.data.clone().requires_grad_(), image.grid) for image in (fixed, moving)]
    with pytest.warns(UserWarning, match=r"fixed and moving of register asks for a gradient"):
        result = register(*tracked, Rigid(), **few_steps(DESCENT))
    assert equal_bits(result.mapping, expected.mapping)
    assert not result.value.requires_grad
    assert not result.mapping.params["translation"].requires_grad
