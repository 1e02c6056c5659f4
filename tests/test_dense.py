"""Transforms with a field: against SciPy, formulas and finite differences; their inverses; whole registrations."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    BENDING,
    BENDING_ID,
    FIELDS,
    SAME,
    WARPS,
    close,
    equal_bits,
    few,
    flat_function,
    grids,
    inner_mask,
    known_pair,
    law,
    least_determinant,
    moving_scene,
    orientation,
    probe,
    random_mapping,
    random_params,
    random_step,
    scene,
    several_pairs,
    smooth_mapping,
    tensor,
    uniform,
    voxels_apart,
)
from scipy import linalg, ndimage
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVF,
    SVFFD,
    TPS,
    Affine,
    Diffeomorphism,
    Displacement,
    Grid,
    Image,
    Mapping,
    Sequential,
    Stop,
    Subject,
    Transform,
    adam,
    bspline,
    evaluate,
    fields,
    native,
    register,
    stack,
    warp,
)
from fnreg.filters import gaussian
from fnreg.inputs import prepare
from fnreg.losses.objective import objective as as_objective
from fnreg.pair import pair_gradient
from fnreg.problem import Level
from fnreg.pytree import tree_leaves, tree_map

SIZES = {1: (24,), 2: (17, 14), 3: (11, 9, 10)}
every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
every_field = pytest.mark.parametrize("transform", FIELDS, ids=str)
bent = pytest.mark.parametrize(("transform", "dimension"), BENDING, ids=BENDING_ID)
seeds = st.integers(0, 2**16)


def oblique(dimension: int, size: tuple[int, ...] | None = None) -> Grid:
    """An anisotropic grid, turned and mirrored, far from the origin."""
    return Grid(
        SIZES[dimension] if size is None else size,
        spacing=tensor([1.0, 1.4, 0.7])[:dimension],
        center=tensor([30.0, -20.0, 10.0])[:dimension],
        direction=orientation(dimension, tensor([0.4, -0.3, 0.6]), True),
    )


def inside(grid: Grid, margin: float, count: int = 60) -> Tensor:
    """World points at least `margin` voxels from the border, between voxels (N, D)."""
    half = (tensor(grid.size) - 1) / 2 - margin
    return grid.index_to_world(grid.index_center + half * uniform(count, grid.ndim, seed=7))


def in_voxels(points: Tensor, others: Tensor, grid: Grid) -> Tensor:
    """Distances (N,) in voxels."""
    return (grid.world_to_index(points) - grid.world_to_index(others)).norm(dim=-1)


# -- maps ----------------------------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_a_displacement_is_linear_between_voxels_and_constant_beyond(dimension: int, data: Any) -> None:
    grid, seed = data.draw(grids(dimension, count=1))[0], data.draw(seeds)
    mapping = random_mapping(Displacement(), grid, seed, 2.0)
    points = grid.center + 2 * grid.extent.max() * uniform(40, dimension, seed=seed)
    index = grid.world_to_index(points).numpy().T[::-1]  # SciPy's axes are z, y, x
    field = mapping.params["displacement"].numpy()
    expected = np.stack([ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in field], 1)
    assert_close(mapping.map_points(points) - points, tensor(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize("transform", [*FIELDS, FFD(5), SVFFD(5, 3)], ids=str)
@every_dimension
@few
@given(data=st.data())
def test_one_unit_of_a_step_is_one_voxel_along_an_axis_of_the_domain(
    transform: Transform, dimension: int, data: Any
) -> None:
    items = data.draw(grids(dimension, low=5, high=7))
    size = 0.4  # less than the limit of a Diffeomorphism
    for axis in range(dimension):

        def moved(grid: Grid, axis: int = axis) -> Any:
            unit = torch.eye(dimension, dtype=torch.float64)[axis]
            zero = transform.zero_step(grid)
            step = tree_map(lambda leaf: size * unit.reshape(-1, *(1,) * dimension).expand(leaf.shape), zero)
            params = transform.retract(transform.init(grid), step, grid)
            points = grid.points()
            return transform.points(params, grid, points) - points, (grid.affine[:-1, axis] * size).expand(points.shape)

        law(moved, items, atol=1e-9)


@bent
def test_single_precision_is_that_of_the_parameters(transform: Transform, dimension: int) -> None:
    """Fields in float32 give displacements in float32, near those in float64; points keep their own type."""
    grid = oblique(dimension)
    mapping = random_mapping(transform, grid, 3)
    small = dataclasses.replace(mapping, params=transform.cast(mapping.params, torch.float32))
    points = grid.points()[:40]
    assert_close(small.map_points(points), mapping.map_points(points), atol=2e-5, rtol=0)
    assert small.map_points(points).dtype == torch.float64
    assert small.map_points(points.float()).dtype == torch.float32
    assert_close(small.map_points(points.float()).double(), mapping.map_points(points), atol=1e-4, rtol=0)
    assert_close(small.displacement().double(), mapping.displacement(), atol=1e-4, rtol=0)
    if transform in FIELDS:
        assert small.displacement().dtype == torch.float32


@pytest.mark.parametrize("transform", [*FIELDS, TPS(6), Sequential((FFD(2), Affine()))], ids=str)
def test_images_and_parameters_may_differ_in_precision(transform: Transform) -> None:
    """A map made by hand is float64, an image mostly float32."""
    grid = oblique(2)
    mapping = random_mapping(transform, grid, 3)
    image = Image(uniform(1, *grid.shape), grid)
    expected = warp(image, mapping)
    single = Image(image.data.float(), grid)
    assert warp(single, mapping).data.dtype == torch.float32
    assert_close(warp(single, mapping).data.double(), expected.data, atol=1e-4, rtol=0)
    assert_close(evaluate(single, single, mapping)[0].double(), evaluate(image, image, mapping)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_flow_of_a_turning_velocity_is_the_matrix_exponential(dimension: int) -> None:
    """On an oblique anisotropic grid; its error and that of its inverse fall with the number of squarings."""
    grid = oblique(dimension, (21, 19, 23)[:dimension])
    spin = np.zeros((dimension, dimension))
    spin[:2, :2] = [[0.05, -0.5], [0.5, -0.05]]
    expected = tensor(linalg.expm(spin))
    points = inside(grid, 7.0)
    away = grid.points() - grid.center
    params = {"velocity": (away @ tensor(spin).mT).mT.reshape(dimension, *grid.shape)}
    errors, apart = [], []
    for steps in range(4):
        mapping = Mapping(params, grid, SVF(steps))
        found = mapping.map_points(points)
        errors.append(float(in_voxels(found, grid.center + (points - grid.center) @ expected.mT, grid).max()))
        apart.append(float(in_voxels(mapping.inverse().map_points(found), points, grid).max()))
    for finer, coarser in itertools.pairwise(errors[::-1]):
        assert finer < coarser / 3
    for finer, coarser in itertools.pairwise(apart[::-1]):
        assert finer < coarser / 3
    assert errors[-1] < 0.01
    assert apart[-1] < 0.01


# -- derivatives ---------------------------------------------------------------------------------------------------


@bent
def test_points_and_displacements_have_the_derivatives_of_differences(transform: Transform, dimension: int) -> None:
    grid = oblique(dimension, (5, 4, 3)[:dimension])
    params = random_params(transform, grid, 2, 0.4)
    where = grid.points()[:4] + 0.3 * uniform(4, dimension, seed=1)
    function, leaves = flat_function(
        lambda p: (transform.points(p, grid, where), transform.displacement(p, grid)), params
    )
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    by_points = where.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: transform.points(params, grid, p), (by_points,))


@bent
def test_derivatives_in_a_batch_are_those_of_each(transform: Transform, dimension: int) -> None:
    domains = [oblique(dimension, (4, 3, 3)[:dimension]), Grid((4, 3, 3)[:dimension], spacing=0.8)]
    params = [random_params(transform, domain, n) for n, domain in enumerate(domains)]

    def slope(values: Any, grid: Grid) -> Any:
        def energy(p: Any) -> Tensor:
            return transform.displacement(p, grid).square().sum() + transform.points(p, grid, grid.points()).sin().sum()

        return torch.func.grad(energy)(values)

    together = fnreg.pytree.tree_vmap(slope, [None, None], stack(params), stack(domains))
    close(together, stack([slope(p, d) for p, d in zip(params, domains, strict=True)]), atol=1e-10, rtol=1e-10)


# -- steps of a diffeomorphism -------------------------------------------------------------------------------------


@every_dimension
def test_a_diffeomorphism_composes_steps_no_longer_than_its_limit(dimension: int) -> None:
    grid, transform = oblique(dimension), Diffeomorphism(limit=0.5)
    params = random_params(transform, grid, 1)
    step = random_step(transform, grid, 2, 0.2)["displacement"]
    small = step / step.norm(dim=0).max()
    for size in (0.3, 0.5, 4.0):
        taken = min(size, 0.5)
        after = transform.retract(params, {"displacement": size * small}, grid)
        expected = fields.compose(fields.from_shift(taken * small, grid), params["displacement"], grid)
        assert_close(after["displacement"], expected, atol=1e-12, rtol=0)
    straight = transform.perturb(params, {"displacement": small}, grid)["displacement"]
    assert_close(straight - params["displacement"], fields.from_shift(small, grid), atol=1e-12, rtol=0)


@every_dimension
def test_a_diffeomorphism_smooths_gradients_and_fields(dimension: int) -> None:
    grid, transform = oblique(dimension), Diffeomorphism(gradient=1.5, smooth=0.5)
    noise = {"displacement": uniform(dimension, *grid.shape)}
    axes = tuple(range(1, dimension + 1))
    for method, sigma in ((transform.precondition, 1.5), (transform.project, 0.5)):
        found = method(noise, grid)["displacement"]
        assert torch.equal(found, gaussian(noise["displacement"], sigma))
        truth = ndimage.gaussian_filter(noise["displacement"].numpy(), (0, *(sigma,) * dimension), mode="nearest")
        middle = tuple(slice(4, -4) for _ in axes) if dimension < 3 else (slice(4, -4), slice(4, -4), slice(4, -4))
        assert_close(found[(slice(None), *middle)], tensor(truth[(slice(None), *middle)]), atol=0.02, rtol=0)
    rough = Diffeomorphism(gradient=0, smooth=0)
    assert rough.precondition(noise, grid) == rough.project(noise, grid) == noise


@pytest.mark.parametrize("dimension", [2, 3])
def test_composed_smooth_steps_do_not_fold_where_their_sum_does(dimension: int) -> None:
    grid, transform = oblique(dimension), Diffeomorphism()
    push = {"displacement": gaussian(uniform(dimension, *grid.shape, seed=1), 1.5)}
    push = tree_map(lambda leaf: 0.3 * leaf / leaf.norm(dim=0).max(), push)
    params = added = transform.init(grid)
    for _ in range(25):
        params = transform.project(transform.retract(params, push, grid), grid)
        added = transform.perturb(added, push, grid)
    assert least_determinant(Mapping(added, grid, Displacement())) < 0
    assert least_determinant(Mapping(params, grid, transform)) > 0.05


# -- inverses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [SVF(), SVFFD(3)], ids=str)
@every_dimension
def test_the_inverse_of_a_flow_is_the_flow_back(transform: Any, dimension: int) -> None:
    """To the error of the interpolation, where going back by the negative displacement is far off."""
    grid = oblique(dimension, (24, 21, 18)[:dimension])
    params = smooth_mapping(transform, grid, 4, 3.0, 3.0 if isinstance(transform, SVF) else 1.2).params
    points = inside(grid, 6.0)
    for steps in (3, 6):
        mapping = Mapping(params, grid, dataclasses.replace(transform, squarings=steps))
        back = mapping.inverse()
        assert back.transform == mapping.transform
        assert transform.negates
        close(back.inverse(), mapping, atol=0)
        there = mapping.map_points(points)
        assert float(in_voxels(back.map_points(there), points, grid).max()) < 0.05
        negative = Mapping({"displacement": -mapping.displacement()}, grid, Displacement())
        assert float(in_voxels(negative.map_points(there), points, grid).max()) > 0.1


@pytest.mark.parametrize("transform", [Displacement(), Diffeomorphism(), FFD(3)], ids=str)
@every_dimension
@few
@given(seed=seeds)
def test_the_inverse_of_a_smooth_field_leaves_a_tenth_of_a_voxel(
    transform: Transform, dimension: int, seed: int
) -> None:
    grid = oblique(dimension)
    mapping = smooth_mapping(transform, grid, seed, 1.0, 0.8 if isinstance(transform, FFD) else 2.0)
    assert least_determinant(mapping) > 0.1
    back = mapping.inverse()
    points = inside(grid, 2.0)
    assert float(in_voxels(mapping.map_points(points), points, grid).max()) > 0.1
    voxels = grid.points()
    there = in_voxels(mapping.map_points(back.map_points(voxels)), voxels, grid)
    assert float(there.max()) < 0.1
    assert float(in_voxels(back.map_points(mapping.map_points(points)), points, grid).max()) < 0.15  # between voxels


def test_the_inverse_of_a_sequence_undoes_its_parts() -> None:
    grid = oblique(2)
    mapping = smooth_mapping(Sequential((SVFFD(3), Affine())), grid, 2, 1.0)
    points = inside(grid, 4.0)
    assert float(in_voxels(mapping.inverse().map_points(mapping.map_points(points)), points, grid).max()) < 0.05


@pytest.mark.parametrize("transform", [Displacement(), Diffeomorphism(), FFD(2)], ids=str)
def test_a_map_that_folds_has_no_inverse_and_says_so(transform: Transform) -> None:
    grid = oblique(2)
    away = (grid.points() - grid.center).mT.reshape(2, *grid.shape)
    field = -2 * away * torch.exp(-away.square().sum(0) / 8) * tensor([1.0, 0.0]).reshape(2, 1, 1)  # x -> -x inside
    params: Any = {"displacement": field}
    if isinstance(transform, FFD):
        params = {"coefficients": bspline.fit(field, transform.lattice(grid))}
    mapping = Mapping(params, grid, transform)
    assert least_determinant(mapping) < -0.2
    with pytest.raises(ValueError, match=r"the map of .* folds at \d+ voxels and in \d+ of the cells .* no inverse"):
        mapping.inverse()
    # In a batch a neighbour that folds raises nothing, and changes nothing.
    good = smooth_mapping(transform, grid, 1, 0.8)
    both = Mapping(stack([good.params, mapping.params]), grid, transform).inverse()
    assert_close(both.displacement()[0], good.inverse().displacement(), atol=1e-10, rtol=0)


def test_an_inverse_that_is_not_found_is_no_inverse() -> None:
    grid = oblique(2)
    lost = {"displacement": torch.full((2, *grid.shape), torch.nan, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"did not converge: nan voxels are left; use a stronger penalty"):
        Mapping(lost, grid, Displacement()).inverse()


# -- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["displacement", "velocity"])
@pytest.mark.parametrize("size", [(16, 20, 24), (17, 19, 13)], ids=["even", "odd"])
@every_dimension
def test_refining_keeps_constant_and_linear_fields(dimension: int, size: tuple[int, ...], name: str) -> None:
    transform = {"displacement": Displacement(), "velocity": SVF()}[name]
    levels = oblique(dimension, size[:dimension]).pyramid(3)
    for kind in ("constant", "linear"):

        def made(grid: Grid, kind: str = kind) -> Tensor:
            points = grid.points() - grid.center
            if kind == "constant":
                points = torch.ones_like(points) * tensor([1.0, -2.0, 0.5])[:dimension]
            return (points @ uniform(dimension, dimension, seed=4)).mT.reshape(dimension, *grid.shape)

        for coarse, fine in ((levels[2], levels[1]), (levels[1], levels[0]), (levels[0], levels[2])):
            found = transform.refine({name: made(coarse)}, coarse, fine)[name]
            keep = slice(None) if kind == "constant" else (slice(None), *(slice(2, -2),) * dimension)
            if kind == "linear" and min(fine.size) <= 4:
                continue
            assert_close(found[keep], made(fine)[keep], atol=1e-10, rtol=0)
        elsewhere = Grid((5, 4, 6)[:dimension], spacing=0.7, center=levels[0].center)  # of no pyramid
        found = transform.refine({name: made(levels[1])}, levels[1], elsewhere)[name]
        assert_close(found, made(elsewhere), atol=1e-10, rtol=0)


# -- options -------------------------------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused() -> None:
    for made in (lambda: SVF(-1), lambda: SVFFD(4, squarings=-2)):
        with pytest.raises(ValueError, match=r"squarings is -\d: expected a whole number, at least 0"):
            made()
    for options in ({"limit": 0.0}, {"limit": -1.0}, {"gradient": -1.0}, {"smooth": -0.5}, {"smooth": float("nan")}):
        with pytest.raises(ValueError, match="expected gradient and smooth >= 0 and limit > 0"):
            Diffeomorphism(**options)
    with pytest.raises(ValueError, match=r"Diffeomorphism has no option \['sigma'\]"):
        Transform.from_dict({"type": "Diffeomorphism", "sigma": 2.0})
    assert repr(Diffeomorphism(smooth=0.5)) == "Diffeomorphism(gradient=1.0, smooth=0.5, limit=0.5)"


# -- the gradient of a level: one pass over the images, or by parts --------------------------------------------------


def level_of(transform: Transform, dimension: int, then: Mapping | None = None, **given: Any) -> tuple[Level, Any]:
    """Three pairs on grids of their own, and parameters off the knots of interpolation."""
    fixed, moving = (stack(images[:3]) for images in several_pairs(dimension))
    mask = given.get("mask")
    known = fixed if mask is None else Subject(fixed, mask)
    whole = prepare(known, moving, then, levels=1, min_size=4)
    level = whole.level(0, transform, as_objective(given.get("objective", fnreg.mse)), 3, given.get("padding"), then)
    zero = level.zero_step()
    params = tree_map(lambda leaf: leaf.expand(3, *leaf.shape), transform.init(scene(dimension).grid))
    return level, level.retract(params, tree_map(lambda leaf: 0.3 * uniform(*leaf.shape, seed=6), zero))


def both_ways(level: Level, params: Any) -> None:
    assert level._passes is not None  # pyright: ignore[reportPrivateUsage]
    gradient, value, terms = level.gradient(params)
    expected, same, others = level._over(pair_gradient, params)  # pyright: ignore[reportPrivateUsage]
    close(gradient, expected, atol=1e-12, rtol=1e-9)
    close((value, terms), (same, others), atol=0, rtol=1e-11)
    assert all(float(leaf.abs().max()) > 1e-6 for leaf in tree_leaves(gradient))


needs_compiler = pytest.mark.skipif(native.load() is None, reason="the one pass is in C")


@needs_compiler
@pytest.mark.parametrize("transform", [*WARPS, TPS(6), Sequential((SVFFD(4, 4), Affine()))], ids=str)
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_one_pass_gives_the_gradient_of_a_field(transform: Transform, dimension: int) -> None:
    both_ways(*level_of(transform, dimension))


@needs_compiler
@pytest.mark.parametrize("transform", [FFD(4), SVF(4), Diffeomorphism()], ids=str)
@pytest.mark.parametrize("padding", [None, "border", 0.3])
def test_one_pass_with_penalties_masks_and_an_affine_map_after(transform: Transform, padding: Any) -> None:
    fixed, _ = several_pairs()
    mask = uniform(3, 1, *fixed[0].grid.shape, seed=2).clamp(min=0)
    after = random_mapping(Affine(), fixed[0].grid, 3, 0.5)
    weights = tensor([1e-3, 0.0, 0.1])
    penalised = fnreg.mse * tensor([1.0, 2.0, 0.25]) + weights * fnreg.bending + 1e-3 * fnreg.diffusion
    for objective in (fnreg.mse, penalised) if not isinstance(transform, Diffeomorphism) else (fnreg.mse,):
        level, params = level_of(transform, 2, mask=mask, padding=padding, then=after, objective=objective)
        both_ways(level, params)
        level, params = level_of(transform, 2, padding=padding, objective=objective)
        both_ways(level, params)


def test_what_does_not_split_takes_the_way_through_points() -> None:
    bend = random_mapping(FFD(4), scene(2).grid, 3, 0.5)
    level, params = level_of(FFD(4), 2, then=bend)
    assert level._passes is None  # pyright: ignore[reportPrivateUsage]
    assert bool(level.gradient(params)[1].isfinite().all())
    level, params = level_of(Sequential((Affine(), FFD(4))), 2)
    assert level._passes is None  # pyright: ignore[reportPrivateUsage]
    assert bool(level.gradient(params)[1].isfinite().all())


# -- derivatives through evaluate and register ---------------------------------------------------------------------

PURE: dict[str, Any] = {"levels": 2, "steps": 3, "stop": None, "optimizer": adam(0.3, pure=True)}


@pytest.mark.parametrize("transform", [FFD(4), SVF(3), Displacement(), TPS(5)], ids=str)
def test_evaluate_has_the_derivative_of_differences(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    params, along = (random_params(transform, fixed.grid, n, 0.4) for n in (1, 2))
    along = tree_map(lambda a, b: a - b, along, transform.init(fixed.grid))

    def energy(size: Tensor) -> Tensor:
        moved = tree_map(lambda p, a: p + size * a, params, along)
        return evaluate(fixed, moving, Mapping(moved, fixed.grid, transform), padding="border")[0]

    zero, small = tensor(0.0), tensor(1e-6)
    expected = (energy(small) - energy(-small)) / 2e-6
    assert abs(float(expected)) > 1e-4
    assert_close(torch.func.grad(energy)(zero), expected, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("transform", [FFD(4), SVFFD(4, 3)], ids=str)
def test_a_whole_registration_has_the_derivative_of_differences(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    pattern = uniform(*moving.data.shape, seed=9)

    def reached(size: Tensor) -> Tensor:
        brighter = Image(moving.data + size * pattern, moving.grid)
        result = register(fixed, brighter, transform, padding="border", **PURE)
        return result.map_points(fixed.grid.points()[::7]).sin().sum()

    zero, small = tensor(0.0), tensor(1e-6)
    expected = (reached(small) - reached(-small)) / 2e-6
    assert abs(float(expected)) > 1e-3
    assert_close(torch.func.grad(reached)(zero), expected, atol=1e-5, rtol=1e-3)


# -- whole registrations -------------------------------------------------------------------------------------------


def texture(grid: Grid, mapping: Mapping | None = None) -> Image:
    """Waves in all directions about the origin, so that there is something to see everywhere; a channel for each axis.

    Seen through a map without any interpolation.
    """
    points = grid.points() if mapping is None else mapping.map_points(grid.points())
    turns = 0.8 * uniform(grid.ndim, 6, grid.ndim, seed=21)
    values = torch.sin(points @ turns.mT + 3 * uniform(grid.ndim, 1, 6, seed=22)).sum(2)  # (D, N)
    return Image(values.reshape(-1, *grid.shape), grid)


@pytest.mark.parametrize("transform", [FFD(4), SVFFD(4, 5), SVF(5), Displacement(), Diffeomorphism()], ids=str)
@pytest.mark.parametrize("dimension", [2, 3])
def test_a_known_deformation_is_found(transform: Transform, dimension: int) -> None:
    size = (36, 32) if dimension == 2 else (20, 18, 16)
    turned = orientation(dimension, tensor([0.2, 0.1, -0.1]))
    fixed_grid = Grid(size, spacing=(1.0, 1.1, 0.9)[:dimension], center=0.1, direction=turned)
    truth = smooth_mapping(FFD(6), fixed_grid, 3, 2.0, 1.0)
    assert least_determinant(truth) > 0.2
    moving_grid = Grid([n + 6 for n in size], spacing=0.97, center=-0.05)
    fixed, moving = texture(fixed_grid, truth), texture(moving_grid)
    weight = 0.1 if dimension == 2 else 0.02
    objective = fnreg.mse + weight * fnreg.bending if isinstance(transform, SVF | Displacement) else fnreg.mse
    result = register(fixed, moving, transform, objective=objective, levels=2, steps=40)
    points = inside(fixed_grid, 3.0, 200)
    error = in_voxels(result.map_points(points), truth.map_points(points), fixed_grid)
    before = in_voxels(points, truth.map_points(points), fixed_grid)
    assert float(before.median()) > 0.4
    assert float(error.median()) < 0.1
    assert bool(result.ok)

    volume = result.jacobian()
    assert volume.grid.same_as(fixed_grid)
    assert_close(volume.data[0], fields.determinant(result.mapping.displacement(), fixed_grid), atol=1e-9, rtol=0)
    assert float(volume.data.min()) > 0
    back = result.inverse()
    assert back.fixed_grid.same_as(moving_grid)
    there = back.map_points(result.map_points(points))
    assert float(in_voxels(there, points, fixed_grid).max()) < 0.2
    assert back.warp(fixed).grid.same_as(moving_grid)


def test_the_volume_change_of_a_known_map_is_its_determinant() -> None:
    """Anisotropic and oblique: u = A (p - c), so the determinant of the map is that of I + A."""
    grid, slope = oblique(3), 0.1 * uniform(3, 3, seed=5)
    field = ((grid.points() - grid.center) @ slope.mT).mT.reshape(3, *grid.shape)
    made = register(scene(3), moving_scene(3), Displacement(), levels=1, steps=1, stop=None)
    known = dataclasses.replace(made, mapping=Mapping({"displacement": field}, grid, Displacement()), fixed_grid=grid)
    expected = torch.linalg.det(torch.eye(3, dtype=torch.float64) + slope)
    assert_close(known.jacobian().data, expected.expand(1, *grid.shape), atol=1e-10, rtol=0)


def test_stages_of_fields_go_on_where_the_last_ended() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    options: dict[str, Any] = {"levels": 2, "steps": 15}
    affine = register(fixed, moving, Affine(), **options)
    both = register(fixed, moving, [Affine(), FFD(4)], **options)
    by_hand = register(fixed, moving, FFD(4), then=affine.mapping, **options)
    assert voxels_apart(both.mapping, by_hand.mapping, fixed.grid) < SAME
    assert float(both.value) <= float(affine.value)
    three = register(fixed, moving, [Affine(), FFD(6), Displacement()], levels=1, steps=10)
    assert isinstance(three.mapping.transform, Sequential)
    assert bool(three.ok)
    points = probe(fixed.grid)
    parts: Any = three.mapping.params
    assert len(parts) == 2
    assert bool(torch.isfinite(three.map_points(points)).all())


@pytest.mark.parametrize("transform", [Displacement(), SVF(4), FFD(4)], ids=str)
def test_parameters_of_an_earlier_run_are_where_the_next_begins(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    first = register(fixed, moving, transform, objective=fnreg.mse + 0.1 * fnreg.bending, levels=2, steps=20)
    none = register(fixed, moving, transform, initial=first.mapping.params, levels=1, steps=0)
    assert equal_bits(none.mapping.params, first.mapping.params)
    # Through a pyramid they come back as what the coarse level can hold.
    coarse = register(fixed, moving, transform, initial=first.mapping.params, levels=2, steps=0)
    assert voxels_apart(coarse.mapping, first.mapping, fixed.grid) < 0.5


@pytest.mark.parametrize("transform", WARPS, ids=str)
def test_float32_images_give_fields_of_float32(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    exact = register(fixed, moving, transform, levels=2, steps=6, stop=None)
    small = [Image(image.data.float(), image.grid) for image in (fixed, moving)]
    found = register(*small, transform, levels=2, steps=6, stop=None)
    assert all(leaf.dtype == torch.float32 for leaf in found.mapping.params.values())
    assert voxels_apart(found.mapping, exact.mapping, fixed.grid) < 0.05


@pytest.mark.parametrize("transform", [FFD(4), Displacement()], ids=str)
def test_what_a_mask_hides_has_no_influence_on_a_field(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    mask = inner_mask(fixed)
    spoiled = Image(torch.where(mask > 0, fixed.data, 100.0), fixed.grid)
    options: dict[str, Any] = {"levels": 1, "steps": 6, "stop": Stop()}
    clean, dirty = (register(Subject(image, mask), moving, transform, **options) for image in (fixed, spoiled))
    assert equal_bits(clean.mapping, dirty.mapping)


# -- batches ----------------------------------------------------------------------------------------------------


def test_a_map_of_a_batch_without_an_inverse_gets_nan() -> None:
    grid = Grid((16, 16))
    field = torch.zeros(2, 2, 16, 16, dtype=torch.float64)
    field[1, 0] = 6 * torch.sin(torch.arange(16.0) * 2)
    batch = Mapping({"displacement": field}, grid, Displacement())
    inverse = batch.inverse().params["displacement"]
    assert bool((inverse[0] == 0).all())
    assert bool(inverse[1].isnan().all())
    with pytest.raises(ValueError, match=r"did not converge|folds"):
        Mapping({"displacement": field[1]}, grid, Displacement()).inverse()


def test_a_batch_warps_as_its_pairs_do_alone() -> None:
    torch.manual_seed(0)
    grid = Grid((12, 10), spacing=(1.0, 1.5))
    transform = FFD(stride=4)
    params = {"coefficients": torch.randn(3, 2, *transform.lattice(grid).shape, dtype=torch.float64)}
    images = Image(torch.randn(3, 1, 10, 12, dtype=torch.float64), grid)
    found = warp(images, Mapping(params, grid, transform))
    for number in range(3):
        mapping = Mapping({"coefficients": params["coefficients"][number]}, grid, transform)
        alone = warp(Image(images.data[number], grid), mapping)
        assert_close(found.data[number], alone.data, rtol=0, atol=1e-12)
        other = Grid((12, 10), spacing=(1.0, 1.5))  # equal, but not known to be the same
        assert_close(warp(Image(images.data[number], grid), mapping, other).data, alone.data, rtol=0, atol=1e-9)


@pytest.mark.parametrize("number", [2.5, 2.0, True, "6"])
def test_squarings_are_counted(number: Any) -> None:
    for make in (SVF, SVFFD):
        with pytest.raises(ValueError, match=r"squarings is .*: expected a whole number, at least 0"):
            make(squarings=number)


@pytest.mark.parametrize("transform", [Displacement(), SVF(), FFD(2), SVFFD(2)])
def test_a_map_keeps_its_place_on_a_grid_of_the_same_size_elsewhere(transform: Transform) -> None:
    """Parameters belong to a place: those of the same numbers elsewhere are another map."""
    domain = Grid((15, 13), spacing=(1.0, 1.2))
    params = smooth_mapping(transform, domain, seed=3, size=1.0).params
    elsewhere = Grid((15, 13), spacing=(0.6, 0.7), center=domain.center + tensor([0.7, -0.4]))
    refined = Mapping(transform.refine(params, domain, elsewhere), elsewhere, transform)
    before = Mapping(params, domain, transform)
    points = elsewhere.center + 3 * uniform(40, 2, seed=1)
    moved = before.map_points(points) - points
    assert float(moved.norm(dim=1).max()) > 0.3
    assert_close(refined.map_points(points) - points, moved, atol=0.06, rtol=0)
    same = Grid((15, 13), spacing=(1.0, 1.2))
    assert equal_bits(transform.refine(params, domain, same), params)
