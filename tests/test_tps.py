"""Thin-plate splines: against SciPy's, exact at the landmarks, the same in every unit and place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    DESCENT,
    SAME,
    each,
    few,
    few_steps,
    grids,
    known_pair,
    law,
    orientation,
    probe,
    random_params,
    storages,
    stored,
    tensor,
    uniform,
    voxels_apart,
)
from scipy.interpolate import RBFInterpolator
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    TPS,
    Affine,
    Displacement,
    Grid,
    Image,
    Mapping,
    Sequential,
    Transform,
    evaluate,
    register,
    stack,
    tps_mapping,
)
from fnreg.pytree import tree_map, tree_vmap

KERNEL = {1: "cubic", 2: "thin_plate_spline", 3: "linear"}
every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
seeds = st.integers(0, 2**16)


def oblique(dimension: int) -> Grid:
    return Grid(
        (14, 11, 9)[:dimension],
        spacing=tensor([1.0, 1.4, 0.7])[:dimension],
        center=tensor([300.0, -200.0, 100.0])[:dimension],
        direction=orientation(dimension, tensor([0.4, -0.3, 0.6]), True),
    )


def landmarks(grid: Grid, count: int = 9, seed: int = 0, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pairs of world points in a grid, apart from each other, the second moved by up to `size` voxels."""
    places = TPS(count).init(grid)["fixed"]
    distances = (places - places[:, None]).square().sum(2) + torch.eye(count) * 1e9
    apart = distances.min().sqrt().clamp(max=grid.spacing.min())
    fixed = places + 0.2 * apart * uniform(count, grid.ndim, seed=seed)
    return fixed, fixed + size * grid.spacing.min() * uniform(count, grid.ndim, seed=seed + 1)


def by_scipy(fixed: Tensor, moving: Tensor, points: Tensor, stiffness: float) -> Tensor:
    """In units of the landmarks' root mean square distance from their mean, where the stiffness counts."""
    center = fixed.mean(0)
    size = (fixed - center).square().sum(1).mean().sqrt()
    found = RBFInterpolator(
        ((fixed - center) / size).numpy(),
        (moving - center).numpy(),
        kernel=KERNEL[fixed.shape[1]],
        degree=1,
        smoothing=stiffness,
    )
    return tensor(found(((points - center) / size).numpy())) + center


# -- the map -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stiffness", [0.0, 1e-3, 0.3])
@every_dimension
@few
@given(seed=seeds)
def test_the_spline_is_that_of_scipy(dimension: int, stiffness: float, seed: int) -> None:
    grid = oblique(dimension)
    fixed, moving = landmarks(grid, 12, seed)
    points = probe(grid)
    found = tps_mapping(fixed, moving, grid, stiffness=stiffness).map_points(points)
    assert_close(found, by_scipy(fixed, moving, points, stiffness), atol=1e-8, rtol=0)


@every_dimension
@few
@given(data=st.data())
def test_landmarks_go_where_they_belong(dimension: int, data: Any) -> None:
    items, seed = data.draw(grids(dimension)), data.draw(seeds)
    pairs = [landmarks(grid, 7, seed) for grid in items]

    def exact(grid: Grid, fixed: Tensor, moving: Tensor) -> Any:
        return tps_mapping(fixed, moving, grid).map_points(fixed), moving

    law(exact, items, [a for a, _ in pairs], [b for _, b in pairs], atol=1e-9)


@pytest.mark.parametrize("stiffness", [0.0, 0.5])
@every_dimension
@few
@given(data=st.data())
def test_an_affine_map_is_its_own_spline(dimension: int, stiffness: float, data: Any) -> None:
    """Whatever the landmarks and the stiffness: an affine map does not bend."""
    items, seed = data.draw(grids(dimension)), data.draw(seeds)
    params = [random_params(Affine(), grid, seed) for grid in items]

    def straight(grid: Grid, values: Any) -> Any:
        affine = Mapping(values, grid, Affine())
        fixed = landmarks(grid, 8)[0]
        found = tps_mapping(fixed, affine.map_points(fixed), grid, stiffness=stiffness)
        points = probe(grid)
        return found.map_points(points), affine.map_points(points)

    law(straight, items, params, atol=1e-8)


@every_dimension
def test_stiffness_leads_from_the_landmarks_to_the_affine_map_of_least_squares(dimension: int) -> None:
    grid = oblique(dimension)
    fixed, moving = landmarks(grid, 10)
    design = torch.cat([torch.ones(10, 1).double(), fixed - grid.center], 1)
    affine = design @ torch.linalg.lstsq(design, moving).solution
    left = [
        float((tps_mapping(fixed, moving, grid, stiffness=s).map_points(fixed) - moving).norm())
        for s in (0.0, 1e-3, 1e-1, 10.0)
    ]
    assert left[0] < 1e-9 < left[1] < left[2] < left[3]
    stiff = tps_mapping(fixed, moving, grid, stiffness=1e9).map_points(fixed)
    assert_close(stiff, affine, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_no_map_through_the_landmarks_bends_less(dimension: int) -> None:
    """With one more landmark the energy is least where that goes by itself, and then it is that without it."""
    grid = oblique(dimension)
    fixed, moving = landmarks(grid, 8)
    spline = tps_mapping(fixed, moving, grid)
    extra = grid.center[None] + 0.1 * grid.extent
    here = spline.map_points(extra)

    def energy(at: Tensor) -> Tensor:
        return _bending(torch.cat([fixed, extra]), torch.cat([moving, at]))

    least = energy(here)
    assert_close(least, _bending(fixed, moving), atol=1e-9, rtol=1e-7)
    for n in range(dimension):
        bump = torch.eye(dimension, dtype=torch.float64)[n]
        assert float(energy(here + bump)) > float(least) + 1e-6
        assert float(energy(here - bump)) > float(least) + 1e-6


def _bending(fixed: Tensor, moving: Tensor) -> Tensor:
    """sum_jk w_j . w_k U_jk, up to a factor the integral of the squared second derivatives."""
    count, dimension = fixed.shape
    z = (fixed - fixed[0]) / 5.0
    away = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    log = torch.where(away > 0, away, 1).log()
    kernel = {1: away**3, 2: away**2 * log, 3: -away}[dimension]
    affine = torch.cat([torch.ones(count, 1).double(), z], 1)
    basis = torch.linalg.qr(affine, mode="complete").Q[:, dimension + 1 :]  # what is no affine map
    inner = basis.mT @ kernel @ basis
    right = basis.mT @ moving
    return (right * torch.linalg.solve(inner, right)).sum()


@every_dimension
def test_the_map_does_not_depend_on_unit_place_and_pose(dimension: int) -> None:
    grid = oblique(dimension)
    fixed, moving = landmarks(grid, 9)
    pose, away = orientation(dimension, tensor([0.7, -0.4, 1.1]), True), 1e4 * uniform(dimension, seed=4)
    points = probe(grid)
    for stiffness in (0.0, 0.2):
        expected = tps_mapping(fixed, moving, grid, stiffness=stiffness).map_points(points)
        there = [25.4 * p @ pose.mT + away for p in (fixed, moving, points)]
        found = tps_mapping(there[0], there[1], grid, stiffness=stiffness).map_points(there[2])
        assert_close((found - away) @ pose / 25.4, expected, atol=1e-8, rtol=0)


def test_many_points_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = oblique(2)
    mapping = tps_mapping(*landmarks(grid), grid)
    expected = mapping.displacement()
    monkeypatch.setattr(fnreg.transforms.tps, "BLOCK", 9 * 7)
    assert_close(mapping.displacement(), expected, atol=1e-12, rtol=0)


def test_points_keep_their_dtype_and_landmarks_stay_float64() -> None:
    grid = oblique(3)
    fixed, moving = landmarks(grid)
    mapping = tps_mapping(fixed.float(), moving.float(), grid)
    assert mapping.params["fixed"].dtype == torch.float64
    points = probe(grid)
    assert mapping.map_points(points.float()).dtype == torch.float32
    assert_close(mapping.map_points(points.float()).double(), mapping.map_points(points), atol=1e-3, rtol=0)
    assert mapping.transform.cast(mapping.params, torch.float32)["moving"].dtype == torch.float64


# -- derivatives and batches ---------------------------------------------------------------------------------------


@every_dimension
def test_points_have_the_derivatives_of_differences(dimension: int) -> None:
    grid = Grid((5, 4, 3)[:dimension], spacing=1.3)
    fixed, moving = landmarks(grid, 6)
    where = torch.cat([grid.points()[:3] + 0.1, fixed[:1]]).detach()  # at a landmark too

    def mapped(a: Tensor, b: Tensor) -> Tensor:
        return TPS(6, 0.1).points({"fixed": a, "moving": b}, grid, where)

    assert torch.autograd.gradcheck(lambda b: mapped(fixed, b), (moving.clone().requires_grad_(),))
    off = where[:3]
    for stiffness in (0.0, 0.1):

        def free(a: Tensor, b: Tensor, p: Tensor, stiffness: float = stiffness) -> Tensor:
            return TPS(6, stiffness).points({"fixed": a, "moving": b}, grid, p)

        given = [leaf.clone().requires_grad_() for leaf in (fixed, moving, off)]
        assert torch.autograd.gradcheck(free, given)
        assert torch.autograd.gradgradcheck(free, given)
    at_landmark = torch.func.jacrev(lambda p: mapped(fixed, moving)[3].sum() + 0 * p)(tensor(0.0))
    assert bool(torch.isfinite(at_landmark))
    slope = torch.func.jacrev(lambda p: TPS(6).points({"fixed": fixed, "moving": moving}, grid, p))(fixed)
    assert bool(torch.isfinite(slope).all())


@every_dimension
def test_a_batch_of_landmarks_is_that_of_each(dimension: int) -> None:
    grid = oblique(dimension)
    pairs = [landmarks(grid, 8, 10 * n) for n in range(3)]
    fixed, moving = (torch.stack(side) for side in zip(*pairs, strict=True))
    batch = tps_mapping(fixed, moving, grid)
    points = probe(grid)
    alone = [tps_mapping(a, b, grid) for a, b in pairs]
    assert_close(batch.map_points(points), torch.stack([m.map_points(points) for m in alone]), atol=1e-10, rtol=0)
    assert_close(batch.displacement(), torch.stack([m.displacement() for m in alone]), atol=1e-10, rtol=0)
    inside = torch.func.vmap(lambda a, b: tps_mapping(a, b, grid).map_points(points))(fixed, moving)
    assert_close(inside, batch.map_points(points), atol=1e-12, rtol=0)
    one_side = tps_mapping(fixed[0], moving[0], grid)
    assert_close(one_side.map_points(points), batch.map_points(points)[0], atol=1e-10, rtol=0)


# -- as a transform ------------------------------------------------------------------------------------------------


@every_dimension
def test_init_is_the_identity_with_landmarks_spread_over_the_domain(dimension: int) -> None:
    grid = oblique(dimension)
    for count in (dimension + 1, 30):
        params = TPS(count).init(grid)
        index = grid.world_to_index(params["fixed"])
        assert bool(((index > -0.5) & (index < tensor(grid.size) - 0.5)).all())
        tps_mapping(params["fixed"], params["moving"], grid)  # they determine a map
        points = probe(grid)
        assert_close(TPS(count).points(params, grid, points), points, atol=1e-10, rtol=0)
    for lo in range(2):  # no octant is left empty
        for axis in range(dimension):
            half = index[:, axis] < (grid.size[axis] - 1) / 2
            assert 10 <= int((half if lo else ~half).sum()) <= 20


@every_dimension
def test_a_step_moves_the_moving_landmarks_by_voxels_of_the_domain(dimension: int) -> None:
    grid = oblique(dimension)
    transform = TPS(6)
    params, step = transform.init(grid), {"moving": uniform(6, dimension, seed=2)}
    after = transform.retract(params, step, grid)
    assert torch.equal(after["fixed"], params["fixed"])
    moved = grid.world_to_index(after["moving"]) - grid.world_to_index(params["moving"])
    assert_close(moved, step["moving"], atol=1e-10, rtol=0)
    assert transform.refine(params, grid.pyramid(2)[-1], grid) is params


@every_dimension
@few
@given(seed=seeds)
def test_the_inverse_leads_back(dimension: int, seed: int) -> None:
    grid = oblique(dimension)
    mapping = tps_mapping(*landmarks(grid, 5, seed, 0.5), grid)
    back = mapping.inverse()
    voxels = grid.points()
    sampled = Mapping({"displacement": mapping.displacement()}, grid, Displacement())  # of which it is the inverse
    apart = grid.world_to_index(sampled.map_points(back.map_points(voxels))) - grid.world_to_index(voxels)
    near = ((grid.world_to_index(back.map_points(voxels)) > 0).all(1)) & (
        grid.world_to_index(back.map_points(voxels)) < tensor(grid.size) - 1
    ).all(1)  # beyond, the displacement goes on as it is at the border
    assert float(near.double().mean()) > 0.4
    assert float(apart[near].norm(dim=1).max()) < 1e-6


def test_a_spline_of_landmarks_registers() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    transform = TPS(9)
    before = evaluate(fixed, moving, Mapping(transform.init(fixed.grid), fixed.grid, transform))[0]
    result = register(fixed, moving, transform, levels=2, steps=60)
    assert float(result.value) < 0.05 * float(before)
    assert_close(result.mapping.params["fixed"], transform.init(fixed.grid)["fixed"], atol=0, rtol=0)
    single = [Image(image.data.float(), image.grid) for image in (fixed, moving)]
    assert float(register(*single, transform, levels=2, steps=60).value) < 0.05 * float(before)
    points = fixed.grid.points()
    error = (result.map_points(points) - truth.map_points(points)).norm(dim=1)
    assert float(error.median()) < 0.5 * float((points - truth.map_points(points)).norm(dim=1).median())
    assert result.jacobian().data.shape == (1, *fixed.grid.shape)
    penalised = register(fixed, moving, transform, levels=1, steps=10, objective=fnreg.mse + fnreg.bending)
    assert float(penalised.terms["bending"]) > 0


def test_how_the_images_are_stored_does_not_matter() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    initial = TPS(6).init(fixed.grid)  # their places, which `init` takes from the order of the axes
    expected = register(fixed, moving, TPS(6), initial=initial, **few_steps(DESCENT))
    ways = list(storages(2))
    for number, (order, flips) in enumerate(ways):
        a, b = stored(fixed, order, flips), stored(moving, *ways[(3 * number + 1) % 8])
        result = register(a, b, TPS(6), initial=initial, **few_steps(DESCENT))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


def test_a_sequence_ends_with_a_spline_or_begins_with_one() -> None:
    grid = oblique(2)
    spline = tps_mapping(*landmarks(grid), grid)
    affine = Mapping(random_params(Affine(), grid, 2), grid, Affine())
    points = probe(grid)
    both = spline @ affine
    assert isinstance(both.transform, Sequential)
    assert_close(both.map_points(points), spline.map_points(affine.map_points(points)), atol=1e-10, rtol=0)
    batch = stack([spline, spline])
    found = tree_vmap(lambda m: m.displacement(), [None], batch)
    assert_close(found, torch.stack([spline.displacement()] * 2), atol=1e-10, rtol=0)
    assert Transform.from_dict(spline.transform.to_dict()) == spline.transform == TPS(9)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_landmarks_that_determine_no_map_are_refused() -> None:
    grid = oblique(2)
    fixed, moving = landmarks(grid, 6)
    twice = fixed.clone()
    twice[4] = twice[1]
    with pytest.raises(ValueError, match="fixed landmarks 1 and 4 are in one place"):
        tps_mapping(twice, moving, grid)
    with pytest.raises(ValueError, match="fixed landmarks 1 and 4 are in one place"):
        tps_mapping(torch.stack([fixed, twice]), torch.stack([moving, moving]), grid)
    stiff = tps_mapping(twice, moving, grid, stiffness=0.1).map_points(fixed)
    assert bool(torch.isfinite(stiff).all())
    line = grid.center + torch.arange(6.0).double()[:, None] * tensor([0.3, -0.7])
    for stiffness in (0.0, 1.0):
        with pytest.raises(ValueError, match="the 6 fixed landmarks lie on one line"):
            tps_mapping(line, moving, grid, stiffness=stiffness)
    flat = torch.cat([fixed, torch.full((6, 1), 5.0)], 1)
    with pytest.raises(ValueError, match="lie in one plane: add some beside it"):
        tps_mapping(flat, flat + 1, oblique(3))
    with pytest.raises(ValueError, match="lie in one point"):
        tps_mapping(torch.ones(3, 1), torch.ones(3, 1), Grid((5,)))
    with pytest.raises(ValueError, match="2 landmarks over 2 axes: expected at least 3"):
        tps_mapping(fixed[:2], moving[:2], grid)
    with pytest.raises(ValueError, match="6 fixed but 5 moving landmarks"):
        tps_mapping(fixed, moving[:5], grid)
    with pytest.raises(ValueError, match=r"moving_points have shape \(6, 1\): expected \(N, 2\) world points"):
        tps_mapping(fixed, moving[:, :1], grid)
    with pytest.raises(ValueError, match="fixed_points are not all finite"):
        tps_mapping(fixed * torch.nan, moving, grid)


def test_options_that_make_no_sense_are_refused() -> None:
    for count in (4.5, 4.0, True):
        with pytest.raises(ValueError, match=r"count is .*: expected a whole number of landmarks"):
            TPS(count=count)  # type: ignore[arg-type]
    for options in ({"count": 1}, {"count": 4, "stiffness": -1.0}, {"count": 4, "stiffness": float("nan")}):
        with pytest.raises(ValueError, match="expected count >= 2 and a finite stiffness >= 0"):
            TPS(**options)
    with pytest.raises(ValueError, match=r"TPS\(count=3, stiffness=0.0\) over 3 axes: expected at least 4 landmarks"):
        TPS(3).init(oblique(3))
    with pytest.raises(ValueError, match=r"TPS lacks the option \['count'\]"):
        Transform.from_dict({"type": "TPS"})
    assert dataclasses.replace(TPS(4), stiffness=0.5) == TPS(4, 0.5)


def test_unequal_batches_are_named() -> None:
    grid = oblique(2)
    fixed, moving = landmarks(grid, 6)
    several: list[Any] = each([fixed, fixed])
    batch = tps_mapping(several[-1], moving, grid)  # one side may be shared
    assert batch.map_points(grid.points()).shape == (2, grid.numel, 2)
    wrong = tps_mapping(torch.stack([fixed] * 3), torch.stack([moving] * 2), grid)
    with pytest.raises(ValueError, match=r"leading batch axes differ"):
        wrong.map_points(grid.points())
    assert tree_map(lambda leaf: leaf.shape[0], wrong.params) == {"fixed": 3, "moving": 2}
