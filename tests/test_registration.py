"""register: known maps are found, how a scan is stored does not matter, and neither do the neighbours in a batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scenes import (
    close,
    equal_bits,
    known_pair,
    moving_scene,
    orientation,
    random_mapping,
    random_params,
    scene,
    storages,
    stored,
    tensor,
    uniform,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    Affine,
    Descent,
    Event,
    GaussNewton,
    Grid,
    Held,
    Homogeneous,
    Image,
    Mapping,
    Registration,
    Rigid,
    Rotation,
    Scaling,
    Sequential,
    Similarity,
    Stage,
    Status,
    Stop,
    Subject,
    Transform,
    Translation,
    adam,
    evaluate,
    functional,
    linear_mapping,
    register,
    sgd,
    stack,
    warp,
)
from fnreg.pytree import tree_map

SAME = 1e-9  # voxels, float64
DESCENT: dict[str, Any] = {"optimizer": adam(0.3)}
NEWTON: dict[str, Any] = {"solver": GaussNewton()}
both_solvers = pytest.mark.parametrize("options", [DESCENT, NEWTON], ids=["adam", "gauss-newton"])


def few_steps(options: dict[str, Any], steps: int = 6) -> dict[str, Any]:
    """A registration that is on its way: what differs between two of them has not yet healed.

    Gauss-Newton takes few, for once it has arrived rounding decides whether a last tiny step is taken.
    """
    return {"levels": 2, "steps": min(steps, 3) if options is NEWTON else steps, "stop": None, **options}


def probe(grid: Grid) -> Tensor:
    """World points in and around a grid."""
    return grid.center + grid.extent.max() * uniform(12, grid.ndim, seed=3)


def take(tree: Any, number: int) -> Any:
    return tree_map(lambda leaf: leaf[number] if isinstance(leaf, Tensor) else leaf, tree)


# -- known maps ----------------------------------------------------------------------------------------------------

KNOWN = [
    *((t, 1) for t in (Translation(), Scaling(), Affine())),
    *((t, 2) for t in (Translation(), Rotation(), Rigid(), Similarity(), Affine(), Sequential((Rigid(), Scaling())))),
    *((t, 3) for t in (Translation(), Rigid(), Affine())),
]


@both_solvers
@pytest.mark.parametrize(("transform", "dimension"), KNOWN, ids=[f"{d}-{t}" for t, d in KNOWN])
def test_known_maps_are_found(transform: Transform, dimension: int, options: dict[str, Any]) -> None:
    """On grids that differ in spacing, orientation, reflection and size; linear interpolation is not exact."""
    fixed, moving, truth = known_pair(transform, dimension)
    result = register(fixed, moving, transform, levels=2, steps=60 if options is DESCENT else 15, **options)
    identity = Mapping(transform.init(fixed.grid), fixed.grid, transform)
    away = voxels_apart(identity, truth, fixed.grid)
    assert away > 0.5
    error = voxels_apart(result.mapping, truth, fixed.grid)
    assert error < {1: 0.03, 2: 0.06, 3: 0.25}[dimension]
    assert error < 0.05 * away
    assert bool(result.ok)
    assert float(result.value) < 0.05 * float(evaluate(fixed, moving, identity)[0])


@pytest.mark.parametrize(
    "objective", [fnreg.ncc, fnreg.mae, fnreg.huber(delta=0.05), fnreg.mse + 0.1 * fnreg.ncc], ids=str
)
def test_known_maps_are_found_by_every_similarity(objective: Any) -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    result = register(fixed, moving, Rigid(), objective=objective, levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06
    if objective is fnreg.ncc:  # other intensities are the same image
        other = Image(-3 * moving.data + 7, moving.grid)
        inverted = register(fixed, other, Rigid(), objective=-1 * fnreg.ncc, levels=2, steps=60)
        assert voxels_apart(inverted.mapping, truth, fixed.grid) < 0.06


@both_solvers
def test_float32_images_are_registered_nearly_as_well(options: dict[str, Any]) -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    single = [Image(image.data.float(), image.grid) for image in (fixed, moving)]
    result = register(*single, Rigid(), levels=2, steps=60, **options)
    double = register(fixed, moving, Rigid(), levels=2, steps=60, **options)
    assert voxels_apart(result.mapping, double.mapping, fixed.grid) < 0.01
    assert result.value.dtype == torch.float32
    assert result.mapping.params["translation"].dtype == torch.float64
    assert result.warp(single[1]).data.dtype == torch.float32
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06


def test_channels_count_together() -> None:
    truth = random_mapping(Rigid(), scene(2).grid, 5, 1.0)
    fixed, moving = scene(2, truth, channels=3), moving_scene(2, channels=3)
    result = register(fixed, moving, Rigid(), levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06
    # a channel that says nothing changes nothing but the scale of the objective
    still = [Image(torch.cat([i.data[:1], torch.zeros_like(i.data[:1])]), i.grid) for i in (fixed, moving)]
    one = [Image(i.data[:1], i.grid) for i in (fixed, moving)]
    a, b = (register(*pair, Rigid(), **few_steps(NEWTON)) for pair in (still, one))
    assert voxels_apart(a.mapping, b.mapping, fixed.grid) < SAME


# -- how a scan is stored ------------------------------------------------------------------------------------------

PLANE = [(order, flips) for order, flips in storages(2)]
SPACE = list(storages(3))[1::9]


@both_solvers
@pytest.mark.parametrize("transform", [Rigid(), Affine(), Sequential((Rigid(), Scaling()))], ids=str)
def test_axis_order_and_flips_do_not_matter_in_the_plane(transform: Transform, options: dict[str, Any]) -> None:
    """All eight ways to store the fixed image, and another for the moving one: one physical answer."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, transform, **few_steps(options))
    for number, (order, flips) in enumerate(PLANE):
        a, b = stored(fixed, order, flips), stored(moving, *PLANE[(3 * number + 1) % 8])
        result = register(a, b, transform, **few_steps(options))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME
        assert_close(result.value, expected.value, atol=1e-12, rtol=0)


@both_solvers
@pytest.mark.parametrize("transform", [Rigid(), Affine()], ids=str)
def test_axis_order_and_flips_do_not_matter_in_space(transform: Transform, options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 3)
    expected = register(fixed, moving, transform, **few_steps(options, 4))
    for number, (order, flips) in enumerate(SPACE):
        a, b = stored(fixed, order, flips), stored(moving, *SPACE[number - 2])
        result = register(a, b, transform, **few_steps(options, 4))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@pytest.mark.slow
@both_solvers
def test_all_48_orientations_give_one_answer(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Affine(), 3)
    expected = register(fixed, moving, Similarity(), **few_steps(options))
    for (order, flips), (other, turned) in zip(storages(3), reversed(list(storages(3))), strict=True):
        a, b = stored(fixed, order, flips), stored(moving, other, turned)
        result = register(a, b, Similarity(), **few_steps(options))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@both_solvers
@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("unit", [1e-3, 25.4])
def test_the_unit_of_length_does_not_matter(dimension: int, unit: float, options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Affine(), dimension)

    def rescaled(image: Image) -> Image:
        grid = image.grid
        return Image(image.data, spacing=unit * grid.spacing, center=unit * grid.center, direction=grid.direction)

    expected = register(fixed, moving, Affine(), **few_steps(options))
    result = register(rescaled(fixed), rescaled(moving), Affine(), **few_steps(options))
    points = probe(fixed.grid)
    assert_close(result.map_points(unit * points) / unit, expected.map_points(points), atol=SAME, rtol=0)


@both_solvers
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("mirror", [False, True], ids=["turned", "mirrored"])
def test_the_pose_in_the_world_does_not_matter(dimension: int, mirror: bool, options: dict[str, Any]) -> None:
    """Both scans turned, mirrored and moved far away together: the map goes with them."""
    fixed, moving, _ = known_pair(Rigid(), dimension)
    pose, away = orientation(dimension, tensor([0.7, -0.4, 1.1]), mirror), 300 * uniform(dimension, seed=4)

    def posed(image: Image) -> Image:
        grid = image.grid
        center, direction = pose @ grid.center + away, pose @ grid.direction
        return Image(image.data, spacing=grid.spacing, center=center, direction=direction)

    expected = register(fixed, moving, Rigid(), **few_steps(options))
    result = register(posed(fixed), posed(moving), Rigid(), **few_steps(options))
    points = probe(fixed.grid)
    found = (result.map_points(points @ pose.mT + away) - away) @ pose
    assert_close(found, expected.map_points(points), atol=SAME, rtol=0)


@pytest.mark.parametrize("start", ["center", "moments"])
def test_with_aligned_centres_the_headers_do_not_matter(start: Any) -> None:
    """Each scan may lie anywhere."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    away = tensor([1000.0, -500.0])
    lost = Image(moving.data, Grid(moving.grid.size, **_leaves(moving.grid) | {"center": moving.grid.center + away}))
    expected = register(fixed, moving, Rigid(), start=start, **few_steps(DESCENT))
    result = register(fixed, lost, Rigid(), start=start, **few_steps(DESCENT))
    points = probe(fixed.grid)
    assert_close(result.map_points(points) - away, expected.map_points(points), atol=SAME, rtol=0)


def _leaves(grid: Grid) -> dict[str, Tensor]:
    return {name: getattr(grid, name) for name in ("center", "spacing", "direction")}


# -- batches -------------------------------------------------------------------------------------------------------


def several_pairs(dimension: int = 2) -> tuple[list[Image], list[Image]]:
    """Pairs whose grids differ in spacing, orientation and place; the second has nothing left to find."""
    fixed, moving = [], []
    for number in range(4):
        grid = {"turn": (0.2 * number, 0.1, -0.1), "spacing": 1 + 0.05 * number, "mirror": number == 2}
        truth = random_mapping(Rigid(), scene(dimension, **grid).grid, number, 0.0 if number == 1 else 1.0)
        fixed.append(scene(dimension, truth, **grid))
        moving.append(moving_scene(dimension, turn=(0.1, 0.1 * number, 0.0), spacing=0.9 + 0.04 * number))
    return fixed, moving


STOPS = [None, Stop(), Stop(compact=False), Stop(every=1, patience=3)]


@both_solvers
@pytest.mark.parametrize("stop", STOPS, ids=["all steps", "compacted", "not compacted", "soon compacted"])
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


def take_batched(mapping: Mapping, number: int) -> Mapping:
    """One mapping of a batch over a shared domain."""
    return Mapping(take(mapping.params, number), mapping.domain, mapping.transform)


SPOILS = {
    "NaN": lambda image: Image(torch.full_like(image.data, torch.nan), image.grid),
    "one NaN": lambda image: Image(torch.cat([image.data[..., :-1], image.data[..., -1:] * torch.nan], -1), image.grid),
    "infinity": lambda image: Image(torch.full_like(image.data, torch.inf), image.grid),
    "constant": lambda image: Image(torch.ones_like(image.data), image.grid),
    "huge": lambda image: Image(1e30 * image.data, image.grid),
    "elsewhere": lambda image: Image(image.data, Grid(image.grid.size, center=(1e4, 0.0))),
    "noise": lambda image: Image(uniform(*image.data.shape, seed=8), image.grid),
}


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
            assert dirty.status[[1, 3]].tolist() == [Status.DIVERGED] * 2, name
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
    result = register(*tracked, Rigid(), **few_steps(DESCENT))
    assert equal_bits(result.mapping, expected.mapping)
    assert not result.value.requires_grad
    assert not result.mapping.params["translation"].requires_grad


# -- what the parts of a call do -----------------------------------------------------------------------------------


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


def test_starts_at_centres() -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    far = Image(moving.data, Grid(moving.grid.size, **_leaves(moving.grid) | {"center": moving.grid.center + 500.0}))
    for start in ("center", "moments"):
        result = register(fixed, far, Rigid(), start=start, levels=2, steps=60)  # type: ignore[arg-type]
        points = fixed.grid.points()
        assert_close(result.map_points(points) - 500.0, truth.map_points(points), atol=0.1, rtol=0)
    still = register(fixed, far, Rigid(), start="center", steps=0)
    assert_close(still.map_points(fixed.grid.center[None])[0], far.grid.center, atol=1e-9, rtol=0)


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


# -- stages --------------------------------------------------------------------------------------------------------


def test_a_stage_that_holds_the_last_map_goes_on_from_it() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    first = register(fixed, moving, Rigid(), levels=2, steps=20)
    both = register(fixed, moving, [Rigid(), Stage(Affine(), steps=0)], levels=2, steps=20)
    assert isinstance(both.mapping.transform, Affine)
    assert voxels_apart(both.mapping, first.mapping, fixed.grid) < SAME
    whole = register(fixed, moving, [Translation(), Rigid(), Similarity(), Affine()], levels=2, steps=40)
    assert voxels_apart(whole.mapping, truth, fixed.grid) < 0.06
    assert whole.steps.shape == (8,)
    assert [(t.stage, t.level) for t in whole.history] == [(s, level) for s in range(4) for level in (1, 0)]
    # the affine stage starts on its coarsest level with the value that the map before it has there
    affine = register(fixed, moving, Affine(), initial=first.mapping, **few_steps(DESCENT))
    again = register(fixed, moving, [Stage(Rigid(), steps=20, stop=Stop()), Affine()], **few_steps(DESCENT))
    assert voxels_apart(affine.mapping, again.mapping, fixed.grid) < SAME


@pytest.mark.parametrize(
    ("first", "second", "goes_on"),
    [
        (Translation(), Rigid(), True),
        (Rotation(), Rigid(), True),
        (Rigid(), Similarity(), True),
        (Sequential((Rigid(), Scaling())), Affine(), True),
        (Similarity(), Rigid(), False),
        (Rigid(), Rotation(), False),
        (Scaling(), Similarity(), False),
        (Rigid(), Sequential((Rigid(), Scaling())), False),
    ],
    ids=str,
)
def test_a_stage_goes_on_or_goes_before(first: Transform, second: Transform, goes_on: bool) -> None:
    """Either way the second stage begins with the map of the first."""
    fixed, moving, _ = known_pair(Affine(), 2)
    before = register(fixed, moving, first, **few_steps(DESCENT))
    both = register(fixed, moving, [first, Stage(second, steps=0)], **few_steps(DESCENT))
    assert both.mapping.transform == (second if goes_on else Sequential((second, first)))
    assert voxels_apart(both.mapping, before.mapping, fixed.grid) < SAME


def test_a_stage_that_cannot_hold_the_last_map_goes_before_it() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    first = register(fixed, moving, Affine(), levels=2, steps=40)
    both = register(fixed, moving, [Affine(), Stage(Rigid(), steps=0)], levels=2, steps=40)
    assert both.mapping.transform == Sequential((Rigid(), Affine()))
    assert voxels_apart(both.mapping, first.mapping, fixed.grid) < SAME
    three = register(fixed, moving, [Rigid(), Sequential((Scaling(), Translation())), Rotation()], levels=2, steps=40)
    assert len(three.mapping.transform.transforms) == 2  # type: ignore[attr-defined]
    value, _ = evaluate(fixed, moving, three.mapping)
    assert_close(value, three.value, atol=1e-12, rtol=0)
    assert voxels_apart(three.mapping, truth, fixed.grid) < 1.0


def test_stages_of_a_batch_equal_the_loop() -> None:
    fixed, moving = several_pairs()
    for stages in ([Rigid(), Affine()], [Affine(), Rigid()]):
        batch = register(stack(fixed), stack(moving), stages, **few_steps(DESCENT, 5))
        for n in range(4):
            alone = register(fixed[n], moving[n], stages, **few_steps(DESCENT, 5))
            assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME


def test_a_stage_overrides_the_call() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    stages = [
        Stage(Rigid(), objective=fnreg.mae, optimizer=adam(0.1), levels=2, steps=(4, 3)),
        Stage(Affine(), solver=GaussNewton(), levels=1, steps=2),
        Rigid(),
    ]
    result = register(fixed, moving, stages, levels=3, steps=(1, 2, 0), min_size=4, stop=None)
    assert result.steps.tolist() == [4, 3, 2, 1, 2, 0]
    first = register(
        fixed, moving, Rigid(), objective=fnreg.mae, optimizer=adam(0.1), levels=2, steps=(4, 3), stop=None
    )
    assert equal_bits([t.value for t in result.history[:2]], [t.value for t in first.history])
    assert list(result.terms) == ["mse"]


# -- then, initial, pyramids ---------------------------------------------------------------------------------------


def test_then_acts_after_the_optimised_map() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    domain = Grid((7, 5), center=(3.0, -4.0))
    for after in (
        random_mapping(Similarity(), domain, 3, 0.5),
        random_mapping(Sequential((Rigid(), Affine())), domain, 4, 0.2),
    ):
        inner = random_mapping(Rigid(), fixed.grid, 2, 0.5)
        truth = after @ inner
        image = scene(2, truth)
        result = register(image, moving, Rigid(), then=after, levels=2, steps=60)
        assert voxels_apart(result.mapping, truth, fixed.grid) < 0.1
        parts = result.mapping.transform
        assert parts == Sequential((Rigid(), after.transform))
        found = Mapping(result.mapping.params[0], fixed.grid, Rigid())
        assert voxels_apart(found, inner, fixed.grid) < 0.15
        assert_close(result.value, evaluate(image, moving, result.mapping)[0], atol=1e-12, rtol=0)
        still = register(image, moving, Rigid(), then=after, steps=0)
        assert voxels_apart(still.mapping, after, fixed.grid) < SAME


def test_then_of_a_batch_equals_the_loop() -> None:
    fixed, moving = several_pairs()
    after = [random_mapping(Rigid(), fixed[0].grid, n, 0.3) for n in range(4)]
    shared = register(stack(fixed), stack(moving), Rigid(), then=after[0], **few_steps(DESCENT, 4))
    own = register(stack(fixed), stack(moving), Rigid(), then=stack(after), **few_steps(DESCENT, 4))
    one = register(fixed[0], moving[0], Rigid(), then=stack(after), **few_steps(DESCENT, 4))
    for n in range(4):
        for batch, f, m, mapping in (
            (shared, fixed[n], moving[n], after[0]),
            (own, fixed[n], moving[n], after[n]),
            (one, fixed[0], moving[0], after[n]),
        ):
            alone = register(f, m, Rigid(), then=mapping, **few_steps(DESCENT, 4))
            points = probe(f.grid)
            assert_close(batch.map_points(points)[n], alone.map_points(points), atol=SAME, rtol=0)


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


@both_solvers
def test_a_pyramid_may_be_given(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, Rigid(), **few_steps(options))
    for a, b in ((fixed.pyramid(2), moving.pyramid(2)), (fixed, moving.pyramid(2)), (list(fixed.pyramid(2)), moving)):
        result = register(a, b, Rigid(), **few_steps(options))
        assert equal_bits(result.mapping, expected.mapping)
    fine = register(fixed.pyramid(2), (moving,), Rigid(), **few_steps(options))  # the moving pyramid may be shorter
    assert not equal_bits(fine.mapping, expected.mapping)
    assert fine.steps.tolist() == expected.steps.tolist()


def test_a_pyramid_of_batches_may_be_given() -> None:
    fixed, moving = several_pairs()
    levels = [stack([image.pyramid(2)[k] for image in fixed]) for k in range(2)]
    result = register(levels, stack(moving), Rigid(), **few_steps(DESCENT, 4))
    expected = register(stack(fixed), stack(moving), Rigid(), **few_steps(DESCENT, 4))
    for n in range(4):
        assert voxels_apart(take(result.mapping, n), take(expected.mapping, n), fixed[n].grid) < SAME


# -- objectives ----------------------------------------------------------------------------------------------------


def test_a_callable_is_an_objective() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)

    def mine(warped: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
        return functional.mse(warped, fixed, weights)

    expected = register(fixed, moving, Rigid(), **few_steps(DESCENT))
    result = register(fixed, moving, Rigid(), objective=mine, **few_steps(DESCENT))
    assert equal_bits(result.mapping, expected.mapping)
    assert list(result.terms) == ["mine"]


def test_an_objective_sees_what_it_asks_for() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    params = random_params(Rigid(), fixed.grid, 3, 0.5)
    mapping = Mapping(params, fixed.grid, Rigid())
    found: dict[str, Any] = {}

    def everything(
        warped: Any, fixed: Any, weights: Any, displacement: Any, params: Any, transform: Any, domain: Any
    ) -> Tensor:
        found.update(locals())
        return warped.mean()

    register(fixed, moving, Rigid(), objective=everything, initial=params, steps=0, levels=1)
    assert equal_bits(found["fixed"], fixed.data)
    assert_close(found["displacement"], mapping.displacement(), atol=1e-12, rtol=0)
    assert equal_bits(found["params"], params)
    assert found["transform"] == Rigid()
    assert found["domain"].same_as(fixed.grid)
    seen = warp(moving, mapping, padding="border").data
    assert_close(found["warped"], seen, atol=1e-12, rtol=0)
    coords = moving.grid.world_to_index(mapping.map_points(fixed.grid.points()))
    inside = ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1).reshape(1, *fixed.grid.shape)
    assert torch.equal(found["weights"], inside.double())


def test_a_penalty_holds_the_map_back() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    free, held, tight = (
        register(fixed, moving, Rigid(), objective=fnreg.mse + weight * fnreg.term(length), levels=2, steps=40)
        for weight in (0.0, 1e-3, 10.0)
    )
    sizes = [float(length(result.mapping.displacement())) for result in (free, held, tight)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-3 * sizes[0]
    assert_close(held.value, held.terms["mse"] + 1e-3 * held.terms["length"], atol=1e-14, rtol=0)


def test_weights_and_rates_may_differ_between_pairs() -> None:
    fixed, moving = several_pairs()

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    weights, rates = tensor([0.0, 1e-2, 0.1, 1e-3]), tensor([0.3, 0.1, 0.2, 0.5])
    for stop in (None, Stop(every=1, patience=3)):
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


# -- masks and padding ---------------------------------------------------------------------------------------------


def inner_mask(image: Image, margin: int = 4) -> Tensor:
    """One within a margin, zero outside."""
    mask = torch.zeros(1, *image.grid.shape, dtype=image.data.dtype)
    mask[(slice(None), *(slice(margin, -margin),) * image.grid.ndim)] = 1
    return mask


def spoiled(image: Image, mask: Tensor, value: float) -> Image:
    """Something else wherever the mask is zero."""
    noise = value * (2 + uniform(*image.data.shape, seed=6)) if value == value else torch.full_like(image.data, value)
    return Image(torch.where(mask > 0, image.data, noise), image.grid)


@both_solvers
@pytest.mark.parametrize("objective", [fnreg.mse, fnreg.ncc], ids=str)
@pytest.mark.parametrize("value", [100.0, torch.nan, torch.inf])
def test_what_lies_outside_of_the_fixed_mask_does_not_matter(
    value: float, objective: Any, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    options = few_steps(options) | {"objective": objective, "levels": 1}
    expected = register(Subject(fixed, mask), moving, Rigid(), **options)
    result = register(Subject(spoiled(fixed, mask, value), mask), moving, Rigid(), **options)
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME
    assert_close(result.value, expected.value, atol=1e-12, rtol=0)
    plain = register(fixed, moving, Rigid(), **options)
    assert voxels_apart(plain.mapping, expected.mapping, fixed.grid) > 1e-3


@both_solvers
@pytest.mark.parametrize("value", [100.0, torch.nan])
def test_what_lies_outside_of_the_fixed_mask_does_not_matter_on_coarse_levels(
    value: float, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    expected = register(Subject(fixed, mask), moving, Rigid(), **few_steps(options))
    result = register(Subject(spoiled(fixed, mask, value), mask), moving, Rigid(), **few_steps(options))
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@both_solvers
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("value", [100.0, torch.nan])
def test_what_lies_outside_of_the_moving_mask_does_not_matter(
    value: float, levels: int, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(moving)
    options = few_steps(options) | {"levels": levels}
    expected = register(fixed, Subject(moving, mask), Rigid(), **options)
    result = register(fixed, Subject(spoiled(moving, mask, value), mask), Rigid(), **options)
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@both_solvers
def test_a_mask_of_ones_is_none(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, Rigid(), **few_steps(options))
    ones = torch.ones_like(fixed.data)
    for mask in (ones, ones.bool(), ones.int(), 0.25 * ones):
        result = register(Subject(fixed, mask), moving, Rigid(), **few_steps(options))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


def test_known_maps_are_found_within_masks() -> None:
    """Each side has an artefact that would pull the map away, and a mask that hides it."""
    fixed, moving, truth = known_pair(Rigid(), 2)
    sides = []
    for image in (fixed, moving):
        mask = torch.ones_like(image.data)
        mask[:, :6, :6] = 0
        sides.append(Subject(spoiled(image, mask, 3.0), mask))
    result = register(*sides, Rigid(), levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.15
    lost = register(sides[0].image, sides[1].image, Rigid(), levels=2, steps=60)
    assert voxels_apart(lost.mapping, truth, fixed.grid) > 0.5


@pytest.mark.parametrize("side", [0, 1], ids=["fixed", "moving"])
def test_masks_count_on_coarse_levels(side: int) -> None:
    """The coarse level alone finds the map with a third of one image hidden; what fills the gap is no image."""
    fixed, moving, truth = known_pair(Rigid(), 2)
    sides: list[Any] = [fixed, moving]
    mask = torch.ones_like(sides[side].data)
    mask[..., :6] = 0
    sides[side] = Subject(spoiled(sides[side], mask, 3.0), mask)
    result = register(*sides, Rigid(), levels=2, steps=(60, 0))
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.5


@both_solvers
def test_a_weight_of_almost_nothing_is_almost_none(options: dict[str, Any]) -> None:
    """On coarse levels too, where voxels are mixed."""
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    garbage = spoiled(fixed, mask, 100.0)
    expected = register(Subject(garbage, mask), moving, Rigid(), **few_steps(options))
    result = register(Subject(garbage, mask.clamp(min=1e-13)), moving, Rigid(), **few_steps(options))
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < 1e-3


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection", 7.0, None])
def test_padding_says_what_is_seen_outside(padding: Any) -> None:
    fixed, _, _ = known_pair(Rigid(), 2)
    moving = moving_scene(2, grow=-6)
    params = random_params(Rigid(), fixed.grid, 1, 1.0)
    still = register(fixed, moving, Rigid(), initial=params, steps=0, padding=padding)
    mapping = Mapping(params, fixed.grid, Rigid())
    seen = warp(moving, mapping, padding="border" if padding is None else padding).data
    weights = None
    if padding is None:
        coords = moving.grid.world_to_index(mapping.map_points(fixed.grid.points()))
        weights = (
            ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1).reshape(fixed.grid.shape).double()
        )
        assert 0 < float(weights.mean()) < 0.95
    assert_close(still.value, functional.mse(seen, fixed.data, weights), atol=1e-12, rtol=0)
    assert_close(evaluate(fixed, moving, mapping, padding=padding)[0], still.value, atol=1e-14, rtol=0)


def test_held_parameters_stay_to_the_last_bit() -> None:
    fixed, moving, _ = known_pair(Similarity(), 2)
    initial = random_params(Similarity(), fixed.grid, 3, 0.3)
    for options in (DESCENT, NEWTON):
        for names in (("rotation",), ("rotation", "log_size")):
            result = register(fixed, moving, Held(Similarity(), names), initial=initial, **few_steps(options))
            for name, leaf in result.mapping.params.items():
                assert torch.equal(leaf, initial[name]) == (name in names)


def test_a_held_transform_finds_what_is_left() -> None:
    truth_params = {"rotation": tensor([0.2]), "translation": tensor([1.0, -0.7])}
    truth = Mapping(truth_params, scene(2).grid, Rigid())
    fixed, moving = scene(2, truth), moving_scene(2)
    initial = {"rotation": tensor([0.2]), "translation": torch.zeros(2).double()}
    result = register(fixed, moving, Held(Rigid(), ("rotation",)), initial=initial, levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.03


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [fnreg.mse, 0.5 * fnreg.ncc + 2 * fnreg.mae], ids=str)
def test_evaluate_on_a_batch_of_mappings_equals_the_loop(objective: Any) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    mask = inner_mask(fixed)
    several = [random_mapping(Rigid(), fixed.grid, n, 1.0) for n in range(5)]
    shared = Mapping(stack([m.params for m in several]), fixed.grid, Rigid())
    for given in (fixed, Subject(fixed, mask)):
        loop = [evaluate(given, moving, m, objective=objective) for m in several]
        for batch in (shared, stack(several)):
            value, terms = evaluate(given, moving, batch, objective=objective)
            assert_close(value, torch.stack([v for v, _ in loop]), atol=1e-13, rtol=0)
            close(terms, stack([t for _, t in loop]), atol=1e-13)
    value, _ = loop[0]
    assert value.shape == ()


def test_evaluate_uses_the_domain_of_the_mapping() -> None:
    """A turn about another centre is another map."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    elsewhere = Grid((5, 4), center=(4.0, -3.0), direction=orientation(2, tensor([0.3])))
    for transform in (Rigid(), Scaling(), Sequential((Rigid(), Scaling()))):
        mapping = random_mapping(transform, elsewhere, 2, 0.2)
        expected = evaluate(fixed, moving, linear_mapping(mapping.matrix(), fixed.grid))[0]
        assert_close(evaluate(fixed, moving, mapping)[0], expected, atol=1e-13, rtol=0)
        batch = stack([mapping, random_mapping(transform, fixed.grid.resize((5, 4)), 3, 0.2)])
        assert_close(evaluate(fixed, moving, batch)[0][0], expected, atol=1e-13, rtol=0)


def test_evaluate_is_a_search() -> None:
    fixed, moving, truth = known_pair(Translation(), 2)
    away = torch.cartesian_prod(torch.linspace(-2, 2, 9), torch.linspace(-2, 2, 9)).double()
    grid = Mapping({"translation": truth.params["translation"] + away}, fixed.grid, Translation())
    value, _ = evaluate(fixed, moving, grid)
    assert int(value.argmin()) == 40


def test_evaluate_on_pairs_of_a_batch_equals_the_loop() -> None:
    fixed, moving = several_pairs()
    several = [random_mapping(Rigid(), f.grid, n, 0.5) for n, f in enumerate(fixed)]
    weights = tensor([1.0, 2.0, 3.0, 4.0])
    value, _ = evaluate(stack(fixed), stack(moving), stack(several), objective=weights * fnreg.mse)
    loop = [evaluate(f, m, t)[0] for f, m, t in zip(fixed, moving, several, strict=True)]
    assert_close(value, weights * torch.stack(loop), atol=1e-13, rtol=0)
    with pytest.raises(ValueError, match="leading batch axes differ"):
        evaluate(stack(fixed), stack(moving), stack(several[:3]))


# -- results -------------------------------------------------------------------------------------------------------


def test_a_result_tells_how_it_came_about() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    result = register(fixed, moving, Rigid(), objective=fnreg.mse + 0.1 * fnreg.ncc, levels=2, steps=(30, 20))
    assert isinstance(result, Registration)
    value, terms = evaluate(fixed, moving, result.mapping, objective=fnreg.mse + 0.1 * fnreg.ncc)
    assert_close(result.value, value, atol=1e-14, rtol=0)
    close(result.terms, terms, atol=1e-14)
    assert_close(result.value, result.terms["mse"] + 0.1 * result.terms["ncc"], atol=1e-14, rtol=0)
    assert [(t.stage, t.level, len(t.value)) for t in result.history] == [(0, 1, 30), (0, 0, 20)]
    for trace, steps in zip(result.history, result.steps, strict=True):
        assert int((~torch.isnan(trace.value)).sum()) == int(steps)
    lowest = result.history[-1].value.nan_to_num(nan=torch.inf).min()
    assert float(result.value) <= float(lowest) + 1e-14  # the best parameters seen
    assert result.fixed_grid.same_as(fixed.grid)
    assert result.moving_grid.same_as(moving.grid)
    assert "one pair" in repr(result)
    assert "Rigid()" in repr(result)
    fixed_batch, moving_batch = several_pairs()
    batch = register(stack(fixed_batch), stack(moving_batch), Rigid(), **few_steps(DESCENT, 3))
    assert "4 pairs" in repr(batch)
    assert batch.steps.shape == (4, 2)
    assert batch.value.shape == batch.status.shape == batch.ok.shape == (4,)
    assert batch.history[0].value.shape == (4, 3)


def test_warping_and_mapping_are_those_of_the_mapping() -> None:
    fixed, moving = several_pairs()
    batch = register(stack(fixed), stack(moving), Rigid(), **few_steps(DESCENT, 3))
    points = probe(fixed[0].grid)
    for mode, padding in itertools.product(("linear", "nearest", "cubic"), ("zeros", "border")):
        seen = batch.warp(stack(moving), mode, padding=padding)  # type: ignore[arg-type]
        for n in range(4):
            single = warp(moving[n], take(batch.mapping, n), fixed[n].grid, mode=mode, padding=padding)  # type: ignore[arg-type]
            assert_close(seen.data[n], single.data, atol=1e-12, rtol=0)
            assert take(seen.grid, n).same_as(fixed[n].grid)
    loop = torch.stack([take(batch.mapping, n).map_points(points) for n in range(4)])
    assert_close(batch.map_points(points), loop, atol=1e-12, rtol=0)
    subject = Subject(stack(moving), torch.ones(4, *moving[0].data.shape))
    assert equal_bits(batch.warp(subject).image, batch.warp(stack(moving)))


def test_the_inverse_maps_back_and_swaps_the_grids() -> None:
    fixed, moving = several_pairs()
    for result, points in (
        (register(fixed[0], moving[0], Rigid(), levels=2, steps=40), probe(fixed[0].grid)),
        (register(stack(fixed), stack(moving), [Affine(), Rigid()], **few_steps(DESCENT, 4)), probe(fixed[0].grid)),
    ):
        back = result.inverse()
        again = back.map_points(result.map_points(points))
        assert_close(again, points.expand(again.shape), atol=1e-9, rtol=0)
        assert equal_bits((back.fixed_grid, back.moving_grid), (result.moving_grid, result.fixed_grid))
        assert equal_bits(back.value, result.value)
    one = register(fixed[0], moving[0], Rigid(), levels=2, steps=40)
    seen = one.inverse().warp(fixed[0])
    assert seen.grid.same_as(moving[0].grid)
    inner = (slice(None), *(slice(5, -5),) * 2)
    assert_close(seen.data[inner], moving[0].data[inner], atol=0.03, rtol=0)


def test_progress_tells_the_course_of_a_batch() -> None:
    fixed, moving = several_pairs()
    told: list[Event] = []
    result = register(
        stack(fixed), stack(moving), [Rigid(), Affine()], levels=2, steps=25, stop=Stop(every=5), progress=told.append
    )
    assert all(isinstance(event, Event) for event in told)
    assert {(e.stages, e.levels, e.steps, e.pairs) for e in told} == {(2, 2, 25, 4)}
    order = [(event.stage, -event.level, event.step) for event in told]
    assert order == sorted(order)
    assert {(e.stage, e.level) for e in told} == {(0, 1), (0, 0), (1, 1), (1, 0)}
    for event in told:
        taken = result.steps[:, 2 * event.stage + 1 - event.level]
        assert event.active == int((taken > event.step).sum()) or event.step == 25
        assert 0 <= event.active <= 4


def test_levels_and_steps_are_those_asked_for() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    for levels, steps, expected in ((1, 4, [4]), (2, (3, 5), [3, 5]), (3, [1, 2, 3], [1, 2, 3]), (2, 0, [0, 0])):
        result = register(fixed, moving, Rigid(), levels=levels, steps=steps, stop=None)
        assert result.steps.tolist() == expected
    with pytest.warns(UserWarning, match=r"5 levels were asked for but a fixed image of size \(20, 18\) gives 3"):
        short = register(fixed, moving, Rigid(), levels=5, steps=(9, 8, 3, 2, 1), stop=None)
    assert short.steps.tolist() == [3, 2, 1]


def test_coarse_levels_widen_the_reach() -> None:
    """A shift of a third of the image is too far for the finest level alone."""
    truth = Mapping({"translation": tensor([7.0, -4.0])}, scene(2).grid, Translation())
    fixed, moving = scene(2, truth), moving_scene(2, grow=14)
    result = register(fixed, moving, Translation(), levels=3, steps=40)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.05


@pytest.mark.parametrize("solver", [Descent(sgd(20.0, momentum=0.5)), Descent(adam(0.5), limit=0.1)], ids=str)
def test_other_solvers_find_the_map_too(solver: Any) -> None:
    fixed, moving, truth = known_pair(Translation(), 2)
    result = register(fixed, moving, Translation(), solver=solver, levels=2, steps=100)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.05


def test_an_optimizer_of_torchopt_finds_the_map_too() -> None:
    import torchopt

    fixed, moving, truth = known_pair(Rigid(), 2)
    given = torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adam(0.1))
    for optimizer in (given, fnreg.optim.Torchopt("rmsprop", (("lr", 0.05),))):
        result = register(fixed, moving, Rigid(), optimizer=optimizer, levels=2, steps=80)
        assert voxels_apart(result.mapping, truth, fixed.grid) < 0.1


def test_homogeneous_matrices_can_be_optimised() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    a = register(fixed, moving, Homogeneous(), **few_steps(NEWTON))
    b = register(fixed, moving, Affine(), **few_steps(NEWTON))
    assert voxels_apart(a.mapping, b.mapping, fixed.grid) < 1e-7
    assert voxels_apart(a.mapping, truth, fixed.grid) < 0.1


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


def test_stages_are_differentiated_through_their_handover() -> None:
    """Rotations have equal singular values: their parameters pass on by name, and fits go by a smooth iteration."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    pure: dict[str, Any] = {"levels": 1, "steps": 2, "stop": None, "optimizer": fnreg.adam(0.3, pure=True)}

    def value(weight: Tensor) -> Tensor:
        stages = [Rigid(), fnreg.Similarity()]
        return register(fixed, moving, stages, objective=fnreg.mse + weight * fnreg.ncc, **pure).terms["mse"]

    point, width = torch.tensor(0.5, dtype=torch.float64), 1e-5
    expected = (value(point + width) - value(point - width)) / (2 * width)
    assert float(torch.func.grad(value)(point)) == pytest.approx(float(expected), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dimension", [2, 3])
def test_fits_have_derivatives_at_rotations(dimension: int) -> None:
    grid = scene(dimension).grid
    matrix = Rigid().matrix(random_params(Rigid(), grid, 3), grid)

    def again(linear: Tensor) -> Tensor:
        whole = torch.cat([torch.cat([linear, matrix[:-1, -1:]], 1), matrix[-1:]])
        return Rigid().matrix(Rigid().fit(whole, grid), grid)[:-1, :-1]

    assert torch.autograd.gradcheck(again, matrix[:-1, :-1].clone().requires_grad_())


def test_a_seen_step_is_kept_under_a_stop() -> None:
    """The step after the last value is looked at too."""
    fixed, moving, _ = known_pair(Translation(), 2)
    result = register(fixed, moving, Translation(), levels=1, steps=1)
    assert float(result.mapping.params["translation"].abs().max()) > 0.1


@pytest.mark.parametrize("transform", [Rigid(), fnreg.Held(Rigid(), ("rotation",))], ids=repr)
def test_what_can_shift_can_start_by_centres(transform: Any) -> None:
    fixed, moving, _ = known_pair(Translation(), 2)
    away = Image(
        moving.data, spacing=moving.grid.spacing, center=moving.grid.center + 500, direction=moving.grid.direction
    )
    assert register(fixed, away, transform, start="center", levels=1, steps=5).ok
