"""Laws that every transform keeps, in 1-D to 3-D, on grids stored in every way, alone and under vmap."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    BENDING,
    BENDING_ID,
    BENT,
    EVERY,
    EVERY_ID,
    close,
    equal_bits,
    few,
    grids,
    law,
    orientation,
    random_mapping,
    random_params,
    random_step,
    tensor,
    transforms_of,
    uniform,
)
from torch import Tensor
from torch.testing import assert_close

from fnreg import Displacement, Grid, Held, Image, Mapping, Sequential, Subject, Transform, stack, warp
from fnreg.pytree import tree_flatten, tree_map, tree_vmap
from fnreg.transforms import warping
from fnreg.transforms.linear import Affine, Linear, Rigid, Rotation, Scaling, Shearing, Similarity, Translation
from fnreg.transforms.spline import FFD
from fnreg.transforms.warping import moving_coords

Params = Any
WORLD = 1e-10  # world units; the grids reach some hundreds of units from the origin
every = pytest.mark.parametrize(("transform", "dimension"), EVERY + BENDING, ids=EVERY_ID + BENDING_ID)
linear = pytest.mark.parametrize(("transform", "dimension"), EVERY, ids=EVERY_ID)
seeds = st.integers(0, 2**16)


def points_near(grid: Grid, seed: int = 0, count: int = 7) -> Tensor:
    """World points (N, D) in and around a grid."""
    reach = grid.extent.max()
    return grid.center + reach * uniform(count, grid.ndim, seed=seed)


# -- the identity and steps ----------------------------------------------------------------------------------------


@every
def test_init_is_the_identity(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension))
    def check(items: list[Grid]) -> None:
        def identity(grid: Grid) -> Any:
            params, points = transform.init(grid), points_near(grid)
            mapped = transform.points(params, grid, points)
            return (mapped, transform.displacement(params, grid)), (
                points,
                torch.zeros(dimension, *grid.shape).double(),
            )

        law(identity, items, atol=WORLD)

    check()


@every
def test_no_step_changes_nothing(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def still(grid: Grid, before: Params) -> Any:
            zero = transform.zero_step(grid)
            return (transform.retract(before, zero, grid), transform.perturb(before, zero, grid)), (before, before)

        law(still, items, params, atol=1e-14)
        for grid in items:
            assert not any(bool(leaf.any()) for leaf in tree_flatten(transform.zero_step(grid))[0])
            assert all(leaf.dtype == torch.float64 for leaf in tree_flatten(transform.init(grid))[0])

    check()


@linear
def test_perturb_has_the_derivative_of_retract(transform: Transform, dimension: int) -> None:
    grid = Grid((4, 3, 5)[:dimension], spacing=(1.0, 2.0, 0.5)[:dimension])
    params, step = random_params(transform, grid, 1), random_step(transform, grid, 2, 1.0)

    def along(method: Any) -> Tensor:
        def moved(size: Tensor) -> Tensor:
            after = method(params, tree_map(lambda leaf: leaf * size, step), grid)
            return transform.points(after, grid, grid.points())

        return torch.func.jacrev(moved)(tensor(0.0))

    assert_close(along(transform.perturb), along(transform.retract), atol=1e-12, rtol=0)
    assert bool(along(transform.perturb).abs().max() > 0.1)


@linear
def test_preconditioning_keeps_the_structure_of_a_step(transform: Transform, dimension: int) -> None:
    grid = Grid((4, 3, 5)[:dimension])
    gradient = random_step(transform, grid, 3, 1.0)
    close(transform.precondition(gradient, grid), gradient, atol=0)
    params = random_params(transform, grid, 1)
    close(transform.project(params, grid), params, atol=0)


# -- maps ----------------------------------------------------------------------------------------------------------


@linear
def test_inverse_undoes_the_map_and_is_undone_by_it(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def round_trip(grid: Grid, values: Params) -> Any:
            forth = Mapping(values, grid, transform)
            back = forth.inverse()
            points = points_near(grid)
            return (back.map_points(forth.map_points(points)), forth.map_points(back.map_points(points))), (
                points,
                points,
            )

        law(round_trip, items, params, atol=1e-8)
        away = transform.points(params[0], items[0], points_near(items[0])) - points_near(items[0])
        assert float(away.abs().max()) > 1e-6  # far more than what the law allows

    check()


@every
def test_displacement_is_what_the_points_move_by(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), grids(dimension), seeds)
    def check(items: list[Grid], others: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def displaced(grid: Grid, other: Grid, values: Params) -> Any:
            mapping = Mapping(values, grid, transform)
            found, expected = [], []
            for where in (None, grid, other):
                place = grid if where is None else where
                before = place.points()
                found.append(mapping.displacement(where))
                expected.append((mapping.map_points(before) - before).mT.reshape(dimension, *place.shape))
            return found, expected

        law(displaced, items, others, params, atol=1e-9)

    check()


@linear
def test_matrix_maps_the_points(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def by_matrix(grid: Grid, values: Params) -> Any:
            mapping, points = Mapping(values, grid, transform), points_near(grid)
            matrix = mapping.matrix()
            last = torch.eye(dimension + 1, dtype=torch.float64)[-1]
            return (mapping.map_points(points), matrix[-1]), (points @ matrix[:-1, :-1].mT + matrix[:-1, -1], last)

        law(by_matrix, items, params, atol=WORLD)
        assert transform.linear

    check()


@every
def test_a_split_is_the_map_of_the_voxels(transform: Transform, dimension: int) -> None:
    """A shift, by its frame in voxels, from there to world, then a matrix."""

    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def parted(grid: Grid, values: Params) -> Any:
            found = transform.split(values, grid)
            index = grid.world_to_index(grid.points())
            shift = None if found.shift is None else found.shift.flatten(1).mT
            shift = shift if shift is None or found.frame is None else shift @ found.frame.mT
            shifted = index if shift is None else index + shift
            world = grid.index_to_world(shifted)
            whole = world if found.matrix is None else world @ found.matrix[:-1, :-1].mT + found.matrix[:-1, -1]
            return whole, transform.points(values, grid, grid.points())

        law(parted, items, params, atol=1e-9)

    last = transform.transforms[-1] if isinstance(transform, Sequential) else transform
    assert transform.splits == (last.linear or not isinstance(transform, Sequential))
    if transform.splits:
        check()
    assert transform.linear == ((transform, dimension) in EVERY)


def test_a_split_after_a_step_has_its_shift_in_voxels() -> None:
    """Also that of a transform of one's own, whose `split` has a frame and which leaves the rest to the default."""
    grid = Grid((5, 4), spacing=(2.0, 0.5), direction=orientation(2, tensor([0.3]), False))
    step, params = (random_params(Displacement(), grid, seed) for seed in (1, 2))
    plain = Transform.split_after(Displacement(), params, step, grid)
    fast = Displacement().split_after(params, step, grid)
    assert plain.frame is None and fast.frame is None
    assert_close(plain.shift, fast.shift, atol=1e-12, rtol=0)


@linear
def test_points_keep_their_dtype_and_parameters_stay_float64(transform: Transform, dimension: int) -> None:
    grid = Grid((4, 3, 5)[:dimension])
    mapping = random_mapping(transform, grid, 4)
    single = mapping.map_points(grid.points().float())
    assert single.dtype == torch.float32
    assert_close(single.double(), mapping.map_points(grid.points()), atol=1e-5, rtol=0)
    assert mapping.displacement().dtype == mapping.matrix().dtype == torch.float64


@linear
def test_a_finer_domain_keeps_the_map(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), seeds)
    def check(items: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]

        def refined(grid: Grid, values: Params) -> Any:
            finer, points = grid.upsample(), points_near(grid)
            after = transform.refine(values, grid, finer)
            return transform.points(after, finer, points), transform.points(values, grid, points)

        law(refined, items, params, atol=WORLD)

    check()


def test_large_world_coordinates_cost_no_precision() -> None:
    """A scan of 1 micrometre voxels, a metre from the origin."""
    near = Grid((6, 5), spacing=1e-3, center=(0.0, 0.0))
    far = Grid((6, 5), spacing=1e-3, center=(1000.0, -1000.0))
    params = random_params(Rigid(), near, 1)
    assert_close(Rigid().displacement(params, far), Rigid().displacement(params, near), atol=1e-12, rtol=0)


# -- composition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_sequential_is_composition_and_associates(dimension: int) -> None:
    parts = (Affine(), Translation(), Scaling()) if dimension == 1 else (Rigid(), Shearing(), Affine())

    @few
    @given(grids(dimension), grids(dimension), seeds)
    def check(items: list[Grid], others: list[Grid], seed: int) -> None:
        params = [tuple(random_params(t, grid, seed + n) for n, t in enumerate(parts)) for grid in items]

        def composed(grid: Grid, other: Grid, values: Params) -> Any:
            a, b, c = (Mapping(p, d, t) for p, d, t in zip(values, (grid, other, grid), parts, strict=True))
            points = points_near(grid)
            by_hand = c.map_points(b.map_points(a.map_points(points)))
            product = c.matrix() @ b.matrix() @ a.matrix()
            whole = Mapping(values, (grid, other, grid), Sequential(parts))
            left = Mapping(
                ((values[0], values[1]), values[2]),
                ((grid, other), grid),
                Sequential((Sequential(parts[:2]), parts[2])),
            )
            right = Mapping(
                (values[0], (values[1], values[2])),
                (grid, (other, grid)),
                Sequential((parts[0], Sequential(parts[1:]))),
            )
            several = (whole, left, right, c @ b @ a, c @ (b @ a))
            found = [m.map_points(points) for m in several], [m.matrix() for m in several]
            return found, ([by_hand] * len(several), [product] * len(several))

        law(composed, items, others, params, atol=1e-9)

    check()


def test_one_domain_serves_all_parts_of_a_sequence() -> None:
    grid, parts = Grid((4, 5), spacing=(1.0, 2.0)), (Rigid(), Scaling())
    params = random_params(Sequential(parts), grid, 3)
    shared = Mapping(params, grid, Sequential(parts))
    own = Mapping(params, (grid, grid), Sequential(parts))
    assert torch.equal(shared.map_points(grid.points()), own.map_points(grid.points()))
    assert torch.equal(shared.displacement(), own.displacement())


def test_sequential_refuses_what_does_not_fit() -> None:
    grid = Grid((4, 5))
    whole = Sequential((Rigid(), Scaling()))
    with pytest.raises(ValueError, match="2 parts but was given 1"):
        whole.points((Rigid().init(grid),), grid, grid.points())
    with pytest.raises(ValueError, match="2 parts but was given 3"):
        whole.init((grid, grid, grid))
    with pytest.raises(TypeError, match="takes a tuple of transforms"):
        Sequential(())
    with pytest.raises(TypeError, match="takes a tuple of transforms"):
        Sequential(("rigid",))  # type: ignore[arg-type]
    assert Sequential([Rigid(), Scaling()]) == whole  # type: ignore[arg-type]


# -- held parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotation", "log_size", "translation"])
def test_held_parameters_take_no_step(name: str) -> None:
    grid = Grid((4, 5), spacing=(1.0, 2.0))
    held, free = Held(Similarity(), (name,)), Similarity()
    params, step = random_params(free, grid, 1), random_step(held, grid, 2, 1.0)
    assert set(step) == {"rotation", "log_size", "translation"} - {name}
    after = held.retract(params, step, grid)
    assert torch.equal(after[name], params[name])
    whole = free.retract(params, {**free.zero_step(grid), **step}, grid)
    assert equal_bits(after, whole)
    assert equal_bits(held.perturb(params, step, grid), whole)
    assert all(not torch.equal(after[other], params[other]) for other in step)
    for method in ("matrix", "displacement"):
        assert torch.equal(getattr(held, method)(params, grid), getattr(free, method)(params, grid))
    assert Held(Similarity(), name) == held  # type: ignore[arg-type]


def test_held_refuses_what_is_not_there() -> None:
    grid = Grid((4, 5))
    with pytest.raises(ValueError, match=r"no parameter \['turn'\]: hold some of \['rotation', 'translation'\]"):
        Held(Rigid(), ("turn",)).zero_step(grid)
    with pytest.raises(ValueError, match="nothing is left to optimise"):
        Held(Rigid(), ("rotation", "translation")).zero_step(grid)
    with pytest.raises(ValueError, match="hold those of its parts"):
        Held(Sequential((Rigid(), Scaling())), ("rotation",)).zero_step(grid)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", transforms_of(3) + BENT, ids=str)
def test_json_gives_the_transform_back(transform: Transform) -> None:
    text = json.dumps(transform.to_dict())
    again = Transform.from_dict(json.loads(text))
    assert again == transform
    assert hash(again) == hash(transform)
    assert type(again) is type(transform)
    assert repr(again) == repr(transform)
    assert json.dumps(again.to_dict()) == text


@pytest.mark.parametrize("name", ["Rigit", "Transform", "Linear", "", None, ["Rigid"]])
def test_unknown_transforms_name_the_choices(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown transform") as error:
        Transform.from_dict({"type": name})
    assert repr(name) in str(error.value)
    for choice in ("Affine", "Held", "Rigid", "Sequential"):
        assert choice in str(error.value)
    assert "Linear" not in str(error.value).split("choose from")[1]


def test_unknown_and_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"Rigid has no option \['angle'\]"):
        Transform.from_dict({"type": "Rigid", "angle": 3})
    with pytest.raises(ValueError, match=r"Held has no option \['name'\].*\['names', 'transform'\]"):
        Transform.from_dict({"type": "Held", "transform": {"type": "Rigid"}, "name": ["rotation"]})
    with pytest.raises(ValueError, match=r"Held lacks the option \['names'\]"):
        Transform.from_dict({"type": "Held", "transform": {"type": "Rigid"}})
    with pytest.raises(ValueError, match="unknown transform 'Rigit'"):
        Transform.from_dict({"type": "Sequential", "transforms": [{"type": "Rigit"}]})


def test_every_listed_transform_can_be_made() -> None:
    needs: dict[str, Any] = {"Held": {"transform": {"type": "Rigid"}, "names": ["rotation"]}}
    needs["Sequential"] = {"transforms": [{"type": "Rigid"}]}
    needs["TPS"] = {"count": 4}
    assert {"Rigid", "Affine", "Held", "Sequential"} <= set(Transform.types)
    for name, cls in Transform.types.items():
        assert dataclasses.is_dataclass(cls)
        made = Transform.from_dict({"type": name, **needs.get(name, {})})
        assert type(made) is cls
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.other = 1  # type: ignore[attr-defined]


# -- batches: the rank rule ----------------------------------------------------------------------------------------


def take(tree: Any, number: int) -> Any:
    return tree_map(lambda leaf: leaf[number], tree)


@pytest.mark.parametrize("own", ["params", "domain", "points", "params domain", "params domain points"])
@every
def test_a_batch_of_mappings_equals_the_loop(transform: Transform, dimension: int, own: str) -> None:
    own_params, own_domain, own_points = (name in own for name in ("params", "domain", "points"))
    count, size = 3, (4, 3, 2)[:dimension]
    domains = [
        Grid(size, spacing=(0.4 + uniform(dimension, seed=n).abs()), center=uniform(dimension, seed=n))
        for n in range(count)
    ]
    others = [Grid((3, 2, 2)[:dimension], spacing=0.5 + n) for n in range(count)]
    domain = domains if own_domain else [domains[0]] * count
    params = [random_params(transform, domains[0], n if own_params else 0) for n in range(count)]
    points = [uniform(5, dimension, seed=n if own_points else 0) for n in range(count)]
    singles = [Mapping(p, d, transform) for p, d in zip(params, domain, strict=True)]
    batch = Mapping(stack(params) if own_params else params[0], stack(domain) if own_domain else domain[0], transform)
    found = batch.map_points(stack(points) if own_points else points[0])
    loop = torch.stack([m.map_points(p) for m, p in zip(singles, points, strict=True)])
    assert_close(found, loop, atol=1e-12, rtol=0)
    if not (own_domain or own_params):
        return
    if transform.linear:
        assert_close(batch.matrix(), torch.stack([m.matrix() for m in singles]), atol=1e-12, rtol=0)
    assert_close(batch.displacement(), torch.stack([m.displacement() for m in singles]), atol=1e-12, rtol=0)
    wheres = {"shared": (others[0], [others[0]] * count), "own": (stack(others), others)}
    for where, each in wheres.values():
        loop = torch.stack([m.displacement(g) for m, g in zip(singles, each, strict=True)])
        assert_close(batch.displacement(where), loop, atol=1e-12, rtol=0)
    if not transform.linear:
        return  # random fields fold
    back = batch.inverse().map_points(found)
    assert_close(
        back, torch.stack([m.inverse().map_points(f) for m, f in zip(singles, found, strict=True)]), atol=1e-9, rtol=0
    )


def test_a_batch_composed_with_one_map_is_a_batch() -> None:
    grid = Grid((4, 3))
    several = [random_mapping(Rigid(), grid, n) for n in range(3)]
    batch = Mapping(stack([m.params for m in several]), grid, Rigid())
    one = random_mapping(Affine(), grid, 9)
    points = grid.points()
    for whole, each in ((batch @ one, [m @ one for m in several]), (one @ batch, [one @ m for m in several])):
        assert_close(whole.map_points(points), torch.stack([m.map_points(points) for m in each]), atol=1e-12, rtol=0)
        assert_close(whole.matrix(), torch.stack([m.matrix() for m in each]), atol=1e-12, rtol=0)


def test_leading_axes_that_differ_are_named() -> None:
    grid = Grid((4, 3))
    batch = Mapping({"translation": torch.zeros(3, 2).double()}, grid, Translation())
    with pytest.raises(ValueError, match=r"leading batch axes differ .*mapping.*3.*points: 4"):
        batch.map_points(torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match=r"mapping.*translation.* has shape \(2, 3, 2\): expected 1 axes"):
        Mapping({"translation": torch.zeros(2, 3, 2).double()}, grid, Translation()).matrix()


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 1)])
def test_points_of_another_dimension_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"points have shape .*: expected \(N, 2\) world points"):
        random_mapping(Rigid(), Grid((4, 3)), 1).map_points(torch.zeros(shape))


def test_a_transform_without_inverse_or_matrix_says_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wave(Transform):
        def init(self, domain: Any) -> Params:
            return {"height": torch.zeros(1, dtype=torch.float64)}

        def points(self, params: Params, domain: Any, points: Tensor) -> Tensor:
            return points + params["height"] * points.sin()

    try:
        grid = Grid((4, 3))
        mapping = Mapping({"height": tensor([0.1])}, grid, Wave())
        with pytest.raises(ValueError, match="is not linear: it has no matrix"):
            mapping.matrix()
        with pytest.raises(NotImplementedError, match="Wave has no inverse"):
            mapping.inverse()
        expected = (mapping.map_points(grid.points()) - grid.points()).mT.reshape(2, 3, 4)
        assert_close(mapping.displacement(), expected, atol=1e-15, rtol=0)
        whole = random_mapping(Rigid(), grid, 1) @ mapping
        assert not whole.transform.linear
        image = Image(uniform(1, 3, 4), grid)
        by_points = image.sample(whole.map_points(grid.points()), padding="zeros").mT.reshape(1, 3, 4)
        assert_close(warp(image, whole).data, by_points, atol=1e-12, rtol=0)
    finally:
        del Transform.types["Wave"]


# -- warping -------------------------------------------------------------------------------------------------------


@every
def test_warping_samples_the_image_where_the_points_go(transform: Transform, dimension: int) -> None:
    @few
    @given(grids(dimension), grids(dimension, low=3), seeds)
    def check(items: list[Grid], others: list[Grid], seed: int) -> None:
        params = [random_params(transform, grid, seed) for grid in items]
        # The moving images lie where the fixed ones map to, so that there is something to see.
        movings = [
            Grid(o.size, spacing=o.spacing, center=g.center, direction=o.direction)
            for o, g in zip(others, items, strict=True)
        ]
        data = [uniform(2, *grid.shape, seed=seed) for grid in movings]

        def seen(grid: Grid, moving: Grid, values: Params, of: Tensor) -> Any:
            mapping, image = Mapping(values, grid, transform), Image(of, moving)
            direct = image.sample(mapping.map_points(grid.points()), padding="border").mT.reshape(2, *grid.shape)
            return warp(image, mapping, padding="border").data, direct

        law(seen, items, movings, params, data, atol=1e-9)

    check()


@every
def test_large_grids_are_warped_in_parts(transform: Transform, dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid([9, 8, 7][:dimension], direction=orientation(dimension, tensor([0.4, -0.3, 0.6])))
    image, other = Image(uniform(1, *grid.shape), grid), grid.resize([7, 6, 5][:dimension])
    first, second = (random_mapping(transform, grid, seed) for seed in (1, 2))
    ways = [(first, grid), (first, other), (stack([first, second]), other)]

    def results(mapping: Mapping, where: Grid) -> Any:
        def energy(by: Mapping) -> Tensor:
            return warp(image, by, where).data.square().sum()

        return warp(image, mapping, where).data, torch.func.grad(energy)(mapping).params

    wholes = [results(*way) for way in ways]
    monkeypatch.setattr(warping, "SLAB", 12)
    for way, whole in zip(ways, wholes, strict=True):
        close(results(*way), whole, atol=1e-9, rtol=1e-9)


def test_coordinates_of_a_nonlinear_way_equal_those_by_matrix() -> None:
    @dataclasses.dataclass(frozen=True)
    class Bent(Rigid):
        @property
        def linear(self) -> bool:
            return False

    try:
        fixed = Grid((4, 3), spacing=(1.0, 2.0), center=(3.0, 4.0))
        moving = Grid((5, 6), spacing=0.7, center=(2.0, 5.0))
        params = random_params(Rigid(), fixed, 1)
        straight = moving_coords(Mapping(params, fixed, Rigid()), fixed, moving, torch.float64)
        by_points = moving_coords(Mapping(params, fixed, Bent()), fixed, moving, torch.float64)
        assert_close(by_points, straight, atol=1e-12, rtol=0)
    finally:
        del Transform.types["Bent"]


def test_a_batch_of_warps_equals_the_loop() -> None:
    fixed = [Grid((4, 3), center=(n, 0.0)) for n in range(3)]
    movings = [Image(uniform(2, 5, 6, seed=n), spacing=0.8, center=(0.3 * n, 0.1)) for n in range(3)]
    mappings = [random_mapping(Similarity(), grid, n) for n, grid in enumerate(fixed)]
    loop = torch.stack([warp(image, m).data for image, m in zip(movings, mappings, strict=True)])
    found = warp(stack(movings), stack(mappings))
    assert_close(found.data, loop, atol=1e-12, rtol=0)
    assert found.grid.center.shape == (3, 2)
    one_image = warp(movings[0], stack(mappings))
    assert_close(one_image.data, torch.stack([warp(movings[0], m).data for m in mappings]), atol=1e-12, rtol=0)
    one_map = warp(stack(movings), mappings[0])
    assert_close(one_map.data, torch.stack([warp(image, mappings[0]).data for image in movings]), atol=1e-12, rtol=0)
    assert one_map.grid.center.shape == (2,)
    elsewhere = Grid((2, 2), center=(0.5, 0.5))
    there = warp(stack(movings), stack(mappings), elsewhere)
    loop = torch.stack([warp(i, m, elsewhere).data for i, m in zip(movings, mappings, strict=True)])
    assert_close(there.data, loop, atol=1e-12, rtol=0)
    assert there.grid.same_as(elsewhere)
    with pytest.raises(ValueError, match="image has 1 spatial axes but the mapping has 2"):
        warp(Image(torch.zeros(1, 5)), mappings[0])


def test_a_subject_is_warped_with_its_mask_and_labels() -> None:
    grid = Grid((6, 5))
    labels = torch.arange(30).reshape(1, 5, 6) + 2**24 + 1  # float32 could not hold these
    mask = torch.ones(1, 5, 6)
    subject = Subject(Image(uniform(2, 5, 6), grid), mask, labels=labels, points=tensor([[1.0, 2.0]]))
    shifted = Mapping({"translation": tensor([2.0, 0.0])}, grid, Translation())
    found = warp(subject, shifted)
    assert_close(found.image.data, warp(subject.image, shifted).data)
    assert found.labels is not None
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.labels[..., :4], labels[..., 2:])
    assert not bool(found.labels[..., 4:].any())
    assert found.mask is not None
    assert torch.equal(found.mask[..., :4], torch.ones(1, 5, 4).double())
    assert not bool(found.mask[..., 4:].any())
    assert found.points is None
    half = warp(subject, Mapping({"translation": tensor([0.5, 0.0])}, grid, Translation()))
    assert_close(half.mask[..., -1], torch.full((1, 5), 0.5).double())  # type: ignore[index]
    params = stack([{"translation": tensor([float(n), 0.0])} for n in range(3)])
    several = warp(subject, Mapping(params, grid, Translation()))
    assert torch.equal(several.labels[2], found.labels)  # type: ignore[index]
    assert several.image.data.shape == (3, 2, 5, 6)


def test_under_an_outer_vmap_methods_equal_the_loop() -> None:
    """The rank rule and torch.func.vmap are two ways to the same batch."""
    grid = Grid((4, 3), spacing=(1.0, 2.0))
    several = [random_mapping(Rotation(), grid, n) for n in range(4)]
    batch = stack(several)
    for method in (lambda m: m.map_points(grid.points()), lambda m: m.displacement(), lambda m: m.matrix()):
        assert_close(tree_vmap(method, [None], batch), method(batch), atol=1e-13, rtol=0)


def test_linear_transforms_are_a_family_of_their_own() -> None:
    assert issubclass(Rigid, Linear)
    assert not issubclass(Sequential, Linear)
    assert "Linear" not in Transform.types


def test_a_penalty_of_two_fields_is_refused() -> None:
    """One of them would be left out of it."""
    grid = Grid((12, 10))
    both = Sequential((FFD(4), Affine(), FFD(2)))
    with pytest.raises(ValueError, match="has 2 fields, of which a penalty would see one: register them as stages"):
        both.field(both.init(grid), grid)
    parts = [Mapping(t.init(grid), grid, t) for t in (FFD(4), FFD(2))]
    composed = parts[1] @ parts[0]  # as stages are: the first was sought last
    field = composed.transform.field(composed.params, composed.domain)
    assert torch.equal(field.coefficients, parts[0].params["coefficients"])
    one = Sequential((FFD(4), Affine()))
    assert torch.equal(one.field(one.init(grid), grid).coefficients, FFD(4).init(grid)["coefficients"])


@pytest.mark.parametrize("transform", [Affine(), Held(Affine(), ("matrix",)), Sequential((Rigid(), Affine()))], ids=str)
def test_linear_maps_have_no_field_to_smooth(transform: Transform) -> None:
    grid = Grid((4, 3))
    with pytest.raises(ValueError, match=r"yields no field: penalties such as bending go with FFD, SVFFD"):
        transform.field(transform.init(grid), grid)
    assert transform.descends
