"""Transforms by B-splines: against the tensor product of SciPy's splines; levels; lattices of every kind."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    close,
    few,
    grids,
    known_pair,
    law,
    orientation,
    random_params,
    scene,
    tensor,
    uniform,
)
from scipy.interpolate import BSpline
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVF,
    SVFFD,
    Affine,
    Grid,
    Held,
    Image,
    Mapping,
    Sequential,
    Transform,
    bspline,
    evaluate,
    register,
    stack,
)
from fnreg.pytree import tree_map, tree_vmap

every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
seeds = st.integers(0, 2**16)
SIZES = {"even": (16, 20, 12), "odd": (17, 13, 11), "powers": (16, 32, 8)}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def oblique(size: tuple[int, ...]) -> Grid:
    """An anisotropic grid, turned and mirrored, far from the origin."""
    dimension = len(size)
    return Grid(
        size,
        spacing=tensor([1.0, 1.4, 0.7])[:dimension],
        center=tensor([30.0, -20.0, 10.0])[:dimension],
        direction=orientation(dimension, tensor([0.4, -0.3, 0.6]), True),
    )


def by_scipy(coefficients: Tensor, strides: tuple[int, ...], grid: Grid, points: Tensor) -> Tensor:
    """The field at world points (N, D): control points `stride` voxels apart, symmetric about the grid's centre.

    Each weight is a cubic B-spline of the distance to a control point, taken from SciPy; points are those of the voxel
    box nearest to the given ones.
    """
    kernel = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    index = grid.world_to_index(points)
    index = torch.minimum(index.clamp(min=0), tensor(grid.size) - 1)
    values = coefficients.numpy()  # (D, [Z,] Y, X)
    for axis in reversed(range(grid.ndim)):  # z first
        count = coefficients.shape[-1 - axis]
        knots = (np.arange(count) - (count - 1) / 2) * strides[axis] + (grid.size[axis] - 1) / 2
        weights = np.nan_to_num(kernel((index[:, axis].numpy()[:, None] - knots) / strides[axis]))  # (N, count)
        form = "nk,dk...->dn..." if axis == grid.ndim - 1 else "nk,dnk...->dn..."
        values = np.einsum(form, weights, values)
    return tensor(values).mT


# -- the map -------------------------------------------------------------------------------------------------------


@every_dimension
@few
@given(data=st.data())
def test_a_deformation_is_the_spline_of_scipy(dimension: int, data: Any) -> None:
    strides = tuple(data.draw(st.integers(1, 5)) for _ in range(dimension))
    grid, seed = data.draw(grids(dimension, count=1, low=5, high=9))[0], data.draw(seeds)
    transform = FFD(strides)
    params = random_params(transform, grid, seed, 1.0)
    points = grid.center + 1.5 * grid.extent.max() * uniform(30, dimension, seed=seed)  # and beyond
    found = transform.points(params, grid, points) - points
    assert_close(found, by_scipy(params["coefficients"], strides, grid, points), atol=1e-9, rtol=0)
    at_voxels = transform.displacement(params, grid).flatten(1).mT
    assert_close(at_voxels, by_scipy(params["coefficients"], strides, grid, grid.points()), atol=1e-9, rtol=0)


@every_dimension
def test_the_velocity_of_a_flow_is_the_spline_of_scipy(dimension: int) -> None:
    """The flow of a spline is the flow of its values at the voxels."""
    grid = oblique((9, 8, 7)[:dimension])
    transform = SVFFD(3, squarings=5)
    params = random_params(transform, grid, 3, 1.0)
    velocity = by_scipy(params["coefficients"], (3,) * dimension, grid, grid.points())
    field = {"velocity": velocity.mT.reshape(dimension, *grid.shape)}
    assert_close(transform.displacement(params, grid), SVF(5).displacement(field, grid), atol=1e-10, rtol=0)


@every_dimension
def test_on_a_coarse_level_the_map_is_that_over_the_finest_voxels(dimension: int) -> None:
    """Parameters on level 2 sample the same lattice, at world points and at voxels alike."""
    for grid in oblique((17, 13, 11)[:dimension]).pyramid(3)[1:]:
        params = random_params(FFD(2), grid, 1)
        points = grid.points()
        by_points = FFD(2).points(params, grid, points) - points
        assert_close(FFD(2).displacement(params, grid).flatten(1).mT, by_points, atol=1e-10, rtol=0)


@every_dimension
def test_a_constant_step_moves_everything(dimension: int) -> None:
    """Cubic B-splines sum to one, up to the border and beyond."""
    grid = oblique((10, 7, 9)[:dimension])
    for transform in (FFD(3), SVFFD(4, squarings=3)):
        shift = tensor([0.3, -0.7, 1.1])[:dimension]
        step = tree_map(lambda leaf: shift.reshape(-1, *(1,) * dimension).expand_as(leaf), transform.zero_step(grid))  # noqa: B023
        params = transform.retract(transform.init(grid), step, grid)
        points = grid.center + 2 * grid.extent.max() * uniform(20, dimension)
        moved = grid.convert(shift, "index", "world", vectors=True)
        assert_close(transform.points(params, grid, points) - points, moved.expand(20, -1), atol=1e-10, rtol=0)


# -- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 3, (4, 2, 3)], ids=str)
@every_size
@every_dimension
def test_refining_changes_nothing(dimension: int, size: tuple[int, ...], stride: Any, dtype: torch.dtype) -> None:
    """Three levels down to the finest, each lattice among those of the next; strides per axis, axes that stay."""
    strides = stride if isinstance(stride, int) else stride[:dimension]
    levels = oblique(size[:dimension]).pyramid(4, min_size=5)  # some axes stop sooner than others
    assert len(levels) > 1
    for transform in (FFD(strides), SVFFD(strides, squarings=2)):
        coarse = levels[-1]
        params = tree_map(lambda leaf: leaf.to(dtype), random_params(transform, coarse, 5))
        where = coarse.points()
        lattice = transform.lattice(coarse)
        before = FFD(strides).points(params, coarse, where) - where
        for grid in reversed(levels[:-1]):
            params = transform.refine(params, coarse, grid)
            coarse = grid
            after = FFD(strides).points(params, grid, where) - where
            assert params["coefficients"].dtype == dtype
            assert_close(after, before, atol=3e-6 if dtype == torch.float32 else 1e-12, rtol=0)
        assert transform.lattice(levels[0]).stride == ((stride,) * dimension if isinstance(stride, int) else strides)
        assert lattice.size == levels[0].size
        assert params["coefficients"].shape[1:] == transform.lattice(levels[0]).shape


@every_dimension
def test_refining_a_batch_is_refining_each(dimension: int) -> None:
    fine = [oblique((17, 12, 9)[:dimension]), Grid((17, 12, 9)[:dimension], spacing=0.5)]
    levels = [grid.pyramid(3) for grid in fine]
    transform = FFD(3)
    for before, after in ((2, 1), (1, 0), (0, 2)):
        params = [random_params(transform, level[before], n) for n, level in enumerate(levels)]
        domains, finer = ([level[number] for level in levels] for number in (before, after))
        together = tree_vmap(transform.refine, [None, None, None], stack(params), stack(domains), stack(finer))
        each = [transform.refine(p, d, f) for p, d, f in zip(params, domains, finer, strict=True)]
        close(together, stack(each), atol=1e-11, rtol=1e-11)


@every_dimension
def test_what_a_coarse_level_can_hold_it_gets(dimension: int) -> None:
    """Down and up again: coefficients of a coarse spline come back; so does any cubic polynomial."""
    levels = oblique((16, 18, 20)[:dimension]).pyramid(2)
    transform = FFD(2)
    coarse = random_params(transform, levels[1], 2)
    fine = transform.refine(coarse, levels[1], levels[0])
    down = transform.refine(fine, levels[0], levels[1])
    points = levels[1].points()
    found, expected = (transform.points(p, levels[1], points) for p in (down, coarse))
    assert_close(found, expected, atol=1e-8, rtol=0)


def test_onto_a_grid_of_no_pyramid_the_nearest_spline_is_taken() -> None:
    one, other = oblique((20, 18)), Grid((12, 11), spacing=1.1, center=(30.0, -20.0))
    shift = {"coefficients": torch.ones(2, *FFD(3).lattice(one).shape).double() * tensor([1.0, 2.0]).reshape(2, 1, 1)}
    params = FFD(3).refine(shift, one, other)
    assert_close(FFD(3).displacement(params, other), FFD(3).displacement(shift, one)[:, :11, :12], atol=1e-8, rtol=0)
    # A linear field, from a coarse level of a pyramid: every spline holds it.
    linear = ((one.points() - one.center) @ uniform(2, 2, seed=4)).mT.reshape(2, *one.shape)
    fine = {"coefficients": bspline.fit(linear, FFD(3).lattice(one))}
    coarse = one.pyramid(2)[1]
    found = FFD(3).refine(FFD(3).refine(fine, one, coarse), coarse, other)
    expected = ((other.points() - one.center) @ uniform(2, 2, seed=4)).mT.reshape(2, *other.shape)
    assert_close(FFD(3).displacement(found, other), expected, atol=1e-6, rtol=0)
    bent = random_params(FFD(8), one, 2)
    found = FFD(8).refine(bent, one, other)
    points = other.points()
    apart = FFD(8).points(found, other, points) - FFD(8).points(bent, one, points)
    assert float(apart.abs().mean()) < 0.25 * float((FFD(8).points(bent, one, points) - points).abs().mean())


@pytest.mark.parametrize("size", [(13, 13), (16, 7), (40, 9), (31, 5)], ids=str)
def test_coarse_levels_may_have_fewer_voxels_than_a_stride(size: tuple[int, int]) -> None:
    """Three levels of a thin image, with strides that are right on the finest."""
    image = Image(torch.cos(Grid(size).points().sum(1) / 3).reshape(1, *size[::-1]), Grid(size))
    moving = Image(image.data, origin=(0.4, -0.3))
    result = register(image, moving, FFD(4), levels=3, steps=5, min_size=4)
    assert bool(result.ok)
    assert float(result.value) < float(evaluate(image, moving, Mapping(FFD(4).init(image.grid), image.grid, FFD(4)))[0])


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FFD, SVFFD])
def test_strides_that_make_no_sense_are_refused(kind: Any) -> None:
    for stride in (0, -2, (4, 0), 2.5, (1, 2.5), (), "4"):
        with pytest.raises(ValueError, match=r"stride is .*: expected positive whole numbers of voxels"):
            kind(stride)
    with pytest.raises(ValueError, match=r"stride \(9, 9\) is larger than the grid of \(8, 12\) voxels"):
        kind(9).init(Grid((8, 12)))
    with pytest.raises(ValueError, match="stride has 3 values but the grid has 2 axes"):
        kind((4, 4, 4)).init(Grid((8, 12)))
    assert kind([4, 2]) == kind((4, 2)) == kind((np.int64(4), np.int64(2)))
    assert hash(kind([4, 2])) == hash(kind((4, 2)))
    assert kind(1).init(Grid((1, 6)))["coefficients"].shape == (2, 9, 3)


@pytest.mark.parametrize(
    "transform", [FFD((4, 2)), SVFFD(3, squarings=2), Sequential((SVFFD((2, 3)), Affine()))], ids=str
)
def test_json_gives_the_options_back(transform: Transform) -> None:
    again = Transform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform
    assert FFD((4, 2)).to_dict() == {"type": "FFD", "stride": [4, 2]}
    with pytest.raises(ValueError, match=r"FFD has no option \['steps'\]"):
        Transform.from_dict({"type": "FFD", "steps": 3})


# -- parts of something larger -------------------------------------------------------------------------------------


def test_a_spline_registers_beside_linear_parts_of_which_some_are_held() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    transform = Sequential((FFD(4), Held(Affine(), ("matrix",))))
    result = register(fixed, moving, transform, levels=2, steps=30)
    before = evaluate(fixed, moving, Mapping(transform.init(fixed.grid), fixed.grid, transform))[0]
    assert float(result.value) < 0.2 * float(before)
    parts: Any = result.mapping.params
    assert torch.equal(parts[1]["matrix"], Affine().init(fixed.grid)["matrix"])
    assert float(parts[1]["translation"].abs().max()) > 0.1
    assert float(parts[0]["coefficients"].abs().max()) > 0.1


def test_a_penalty_keeps_a_spline_smooth_and_a_large_one_keeps_it_still() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    options: dict[str, Any] = {"levels": 1, "steps": 40}
    roughness = []
    for weight in (0.0, 1e-1, 1e3):
        result = register(fixed, moving, FFD(4), objective=fnreg.mse + weight * fnreg.bending, **options)
        roughness.append(float(result.terms["bending"]))
    assert roughness[0] > 2 * roughness[1] > 2 * roughness[2]
    # One batch of weights gives the same.
    batch = register(fixed, moving, FFD(4), objective=fnreg.mse + tensor([0.0, 1e-1, 1e3]) * fnreg.bending, **options)
    assert_close(batch.terms["bending"], tensor(roughness), atol=1e-9, rtol=1e-5)


@every_dimension
@few
@given(data=st.data())
def test_the_first_step_of_a_flow_is_that_of_a_deformation(dimension: int, data: Any) -> None:
    """d exp(v) = dv at v = 0."""
    items = data.draw(grids(dimension, low=4))
    steps = [random_params(FFD(3), grid, 1) for grid in items]

    def slope(grid: Grid, along: Any) -> Any:
        def moved(size: Tensor) -> tuple[Tensor, Tensor]:
            params = tree_map(lambda leaf: size * leaf, along)
            return SVFFD(3, 4).displacement(params, grid), FFD(3).displacement(params, grid)

        return torch.func.jacrev(moved)(tensor(0.0))

    law(slope, items, steps, atol=1e-10)


def test_transforms_of_one_stride_share_a_lattice() -> None:
    grid = scene(3).grid
    assert FFD(4).lattice(grid) == SVFFD(4).lattice(grid)
    assert dataclasses.replace(SVFFD(4), squarings=2).lattice(grid) == SVFFD(4).lattice(grid)
    assert FFD(4).lattice(grid).stride == (4, 4, 4)
