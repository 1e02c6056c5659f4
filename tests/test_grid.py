"""Grids against their definition, against SimpleITK, and against their laws."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import flat_function, grids, law, orientation, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close

from fnreg import Grid, stack
from fnreg.grid import AXES, apply_matrix, homogeneous, index_points
from fnreg.pytree import is_transformed, over_batch, tree_flatten, tree_unflatten

dimensions = st.integers(1, 3)
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 1e-12}


def one_of(data: st.DataObject, low: int = 1, high: int = 6) -> Grid:
    return data.draw(grids(data.draw(dimensions), count=1, low=low, high=high))[0]


def three_of(data: st.DataObject, low: int = 1, high: int = 6) -> list[Grid]:
    return data.draw(grids(data.draw(dimensions), low=low, high=high))


def some_points(grid: Grid, count: int = 7, seed: int = 0) -> Tensor:
    """Voxel indices in and around a grid."""
    return uniform(count, grid.ndim, seed=seed) * 8


def itk(grid: Grid) -> sitk.Image:
    """SimpleITK's own idea of the same geometry."""
    image = sitk.Image(list(grid.size), sitk.sitkUInt8)
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin(grid.origin.tolist())
    image.SetDirection(grid.direction.flatten().tolist())
    return image


def same_voxels(a: Grid, b: Grid, tolerance: float = 1e-12) -> None:
    """One size, and world positions within `tolerance` voxels: tighter than `same_as` and apart from it."""
    assert a.size == b.size
    assert float(((a.points() - b.points()) / a.spacing.min()).abs().max()) <= tolerance


# -- the maps between coordinates ------------------------------------------------------------------------------


@given(st.data())
def test_world_is_the_definition(data: st.DataObject) -> None:
    grid = one_of(data)
    index = some_points(grid)
    n, s, c, r = (np.asarray(v) for v in (grid.size, grid.spacing, grid.center, grid.direction))
    expected = [r @ np.diag(s) @ (i - (n - 1) / 2) + c for i in index.numpy()]
    assert_close(grid.index_to_world(index), tensor(np.array(expected)), **EXACT)
    assert_close(grid.origin, grid.index_to_world(torch.zeros(grid.ndim, dtype=torch.float64)), **EXACT)
    assert_close(grid.index_to_world(grid.index_center), grid.center, **EXACT)
    assert_close(grid.extent, tensor(n * s), **EXACT)


@given(st.data(), st.sampled_from(AXES), st.sampled_from(AXES))
def test_there_and_back(data: st.DataObject, axes: Any, to: Any) -> None:
    def there_and_back(grid: Grid, index: Tensor) -> tuple[Tensor, Tensor]:
        points = grid.convert(index, "index", axes)
        return grid.convert(grid.convert(grid.convert(points, axes, to), to, axes), axes, "index"), index

    found = three_of(data)
    law(there_and_back, found, [some_points(grid, seed=k) for k, grid in enumerate(found)], atol=1e-12)


@given(st.data(), st.sampled_from(AXES), st.sampled_from(AXES))
def test_to_another_grid_and_back(data: st.DataObject, axes: Any, to: Any) -> None:
    def there_and_back(grid: Grid, other: Grid, index: Tensor) -> tuple[Any, Any]:
        points = grid.convert(index, "index", axes)
        moved = grid.convert(points, axes, to, other)
        # One matrix between the grids, against the way through the world.
        world = other.convert(grid.convert(points, axes, "world"), "world", to)
        back = grid.convert(other.convert(moved, to, axes, grid), axes, "index")
        return (other.convert(moved, to, "index"), back), (other.convert(world, to, "index"), index)

    found = three_of(data)
    size = data.draw(st.integers(1, 7))
    others = [grid.resize(size) for grid in reversed(found)]
    points = [some_points(grid, seed=k) for k, grid in enumerate(found)]
    # They are up to some hundred voxels apart, so the last digits are that much larger.
    law(there_and_back, found, others, points, atol=3e-11)


@given(st.data())
def test_float32_points_lose_only_their_own_precision(data: st.DataObject) -> None:
    grid = one_of(data)
    index = some_points(grid).to(torch.float32)
    world = grid.index_to_world(index)
    assert world.dtype == torch.float32
    assert torch.equal(world, grid.index_to_world(index.to(torch.float64)).to(torch.float32))
    size = float(world.abs().max() / grid.spacing.min()) + 10
    assert_close(grid.world_to_index(world), index, rtol=0, atol=4 * size * torch.finfo(torch.float32).eps)


def test_integer_indices_give_exact_world_points() -> None:
    grid = Grid((4, 3), spacing=(0.3, 0.5), origin=(0.1, 0.2))
    found = grid.index_to_world(torch.tensor([[1, 2], [3, 0]]))
    assert_close(found, tensor([[0.4, 1.2], [1.0, 0.2]]), **EXACT)


@given(st.data())
def test_index_and_world_equal_simpleitk(data: st.DataObject) -> None:
    grid = data.draw(grids(data.draw(st.integers(2, 3)), count=1, low=1))[0]
    image = itk(grid)
    index = some_points(grid)
    world = tensor([image.TransformContinuousIndexToPhysicalPoint(i) for i in index.tolist()])
    assert_close(grid.index_to_world(index), world, **EXACT)
    back = tensor([image.TransformPhysicalPointToContinuousIndex(p) for p in world.tolist()])
    assert_close(grid.world_to_index(world), back, **EXACT)
    corners = list(itertools.product(*[(0, n - 1) for n in grid.size]))
    world = tensor([image.TransformIndexToPhysicalPoint(corner) for corner in corners])
    assert_close(grid.index_to_world(tensor(corners)), world, **EXACT)


@given(st.data())
def test_matrices_equal_simpleitk(data: st.DataObject) -> None:
    """The homogeneous matrix from columns that SimpleITK computes, and its inverse by NumPy."""
    grid = data.draw(grids(data.draw(st.integers(2, 3)), count=1, low=1))[0]
    image, d = itk(grid), grid.ndim
    origin = np.array(image.TransformIndexToPhysicalPoint([0] * d))
    matrix = np.eye(d + 1)
    matrix[:d, d] = origin
    for k in range(d):
        matrix[:d, k] = np.array(image.TransformContinuousIndexToPhysicalPoint(np.eye(d)[k].tolist())) - origin
    assert_close(grid.affine, tensor(matrix), **EXACT)
    assert_close(grid.inverse_affine @ tensor(matrix), torch.eye(d + 1, dtype=torch.float64), **EXACT)
    assert grid.affine.dtype == torch.float64 and grid.affine.shape == (d + 1, d + 1)


@given(st.data())
def test_cubes_are_those_of_affine_grid(data: st.DataObject) -> None:
    """`cube` is torch's convention with align_corners=False, `corners` the other, where both have a length."""
    grid = data.draw(grids(data.draw(st.integers(2, 3)), count=1))[0]
    eye = torch.eye(grid.ndim + 1, dtype=torch.float64)[None, :-1]
    for axes, align in (("cube", False), ("corners", True)):
        expected = torch.nn.functional.affine_grid(eye, [1, 1, *grid.shape], align_corners=align)
        found = grid.convert(grid.points(), "world", axes)
        assert_close(found, expected.reshape(-1, grid.ndim), **EXACT)


def test_cubes_of_a_single_voxel_are_equal() -> None:
    grid = Grid((1, 5), spacing=(3.0, 1.0))
    points = tensor([[-0.5, 1.0], [0.5, 2.0], [2.0, 4.0]])
    cube, corners = (grid.convert(points, "index", axes) for axes in ("cube", "corners"))
    assert cube[:, 0].tolist() == corners[:, 0].tolist() == [-1.0, 1.0, 4.0]
    assert corners[:, 1].tolist() == [-0.5, 0.0, 1.0]
    assert_close(cube[:, 1], tensor([-0.4, 0.0, 0.8]), **EXACT)


@given(st.data(), st.sampled_from(AXES), st.sampled_from(AXES))
def test_vectors_are_differences_of_points(data: st.DataObject, axes: Any, to: Any) -> None:
    def difference(grid: Grid, other: Grid, points: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        points, vectors = grid.convert(points, "index", axes), grid.convert(vectors, "index", axes, vectors=True)
        moved = [grid.convert(p, axes, to, other) for p in (points, points + vectors)]
        found = grid.convert(vectors, axes, to, other, vectors=True)
        # Measured in voxels: a difference in the cube would hide an error.
        voxels = [other.convert(v, to, "index", vectors=True) for v in (found, moved[1] - moved[0])]
        return voxels[0], voxels[1]

    found = three_of(data)
    points, vectors = ([some_points(grid, seed=s + k) for k, grid in enumerate(found)] for s in (0, 9))
    law(difference, found, found[::-1], points, vectors, atol=3e-11)


@given(st.data())
def test_points_are_all_voxels_x_fastest(data: st.DataObject) -> None:
    grid = one_of(data)
    index = np.stack([axis.ravel() for axis in np.indices(grid.shape)[::-1]], axis=1)
    assert_close(grid.points(), grid.index_to_world(tensor(index)), **EXACT)
    assert grid.points().shape == (grid.numel, grid.ndim)
    assert grid.points(torch.float32).dtype == torch.float32
    assert index_points(grid.size, torch.float32, grid.center.device).shape == (grid.ndim + 1, grid.numel)


@pytest.mark.parametrize("error", [6e-8, 9e-5], ids=["float32", "tolerance"])
def test_a_direction_of_low_precision_has_its_own_inverse(error: float) -> None:
    """Files round directions: a transpose in place of the inverse would be off by many voxels' thousandths."""
    turn = torch.linalg.qr(uniform(3, 3))[0]
    turn = turn + error / 4 * uniform(3, 3, seed=1)
    grid = Grid((500, 500, 300), spacing=(0.5, 0.7, 1.1), direction=turn)
    index = (uniform(50, 3, seed=2) + 1) * 250
    assert_close(grid.world_to_index(grid.index_to_world(index)), index, rtol=0, atol=1e-11 + 2000 * error**2)
    assert float((turn.mT @ turn - torch.eye(3)).abs().max()) > error / 10  # the premise


@given(st.data())
def test_pairs_of_a_batch_equal_pairs_alone(data: st.DataObject) -> None:
    """Every derived grid too, with its leaves per pair."""
    found = three_of(data, low=4, high=9)

    def derive(grid: Grid) -> list[Grid]:
        return [
            grid.resize(3),
            grid.resample(0.5, size=6),
            grid.downsample(),
            grid.upsample(),
            *grid.pyramid(2, min_size=2),
            grid.crop(1),
            grid.pad(1, 2),
            grid.roi(1, 2),
            grid.center_crop(3),
            grid.center_pad(12),
        ]

    def together(grid: Grid) -> Any:
        return derive(grid), grid.points(), grid.origin, grid.matrix("cube", "world", derive(grid)[0])

    batch = vmap(together)(stack(found))
    for k, grid in enumerate(found):
        alone, leaves = tree_flatten(together(grid))[0], tree_flatten(batch)[0]
        assert len(alone) == len(leaves)
        for a, b in zip(alone, leaves, strict=True):
            assert_close(b[k], a, **EXACT)


@given(st.data(), st.sets(st.sampled_from(("center", "spacing", "direction"))))
def test_any_leaf_may_have_the_batch_axis(data: st.DataObject, batched: set[str]) -> None:
    found = three_of(data)
    leaves = [
        torch.stack([getattr(grid, name) for grid in found]) if name in batched else getattr(found[0], name)
        for name in ("center", "spacing", "direction")
    ]
    together = tree_unflatten(leaves, tree_flatten(found[0])[1])
    points = some_points(found[0])
    result = over_batch(Grid.index_to_world, grid=(together, together.ranks()), points=(points, 2))
    for k in range(3) if batched else ():
        parts = {name: getattr(found[k if name in batched else 0], name) for name in ("center", "spacing", "direction")}
        assert_close(result[k], Grid(found[0].size, **parts).index_to_world(points), **EXACT)
    if not batched:
        assert_close(result, found[0].index_to_world(points), **EXACT)


def test_a_batch_from_the_constructor() -> None:
    spacing, origin = tensor([[1.0, 2.0], [0.5, 3.0], [0.7, 0.2]]), tensor([5.0, 6.0])
    turn = orientation(2, tensor([0.4]))
    together = Grid((4, 3), spacing=spacing, origin=origin, direction=turn)
    for k in range(3):
        alone = Grid((4, 3), spacing=spacing[k], origin=origin, direction=turn)
        assert_close(together.center[k], alone.center, **EXACT)
    made = vmap(lambda s: Grid((4, 3), spacing=s, origin=origin, direction=turn))(spacing)
    assert_close(made.center, together.center, **EXACT)
    assert_close(together.origin, origin.expand(3, 2), **EXACT)


@pytest.mark.parametrize("vectors", [False, True], ids=["points", "vectors"])
def test_matrices_and_points_may_have_a_batch_axis(vectors: bool) -> None:
    matrices = homogeneous(uniform(4, 3, 3), uniform(4, 3, seed=1))
    points = uniform(4, 5, 3, seed=2)
    found = apply_matrix(matrices, points, vectors=vectors)
    for k in range(4):
        expected = points[k] @ matrices[k, :3, :3].mT + (0 if vectors else matrices[k, :3, 3])
        assert_close(found[k], expected, **EXACT)
        assert_close(apply_matrix(matrices[k], points[k], vectors=vectors), expected, **EXACT)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_all_stays_on_the_device_of_the_leaves(dimension: int) -> None:
    """And in float64; the meta device stands in for any but the CPU, and refuses what mixes the two."""
    size = (4, 3, 2)[:dimension]
    somewhere = torch.zeros(dimension, device="meta")
    for grid in (
        Grid(size).to("meta"),
        Grid(size, device="meta"),
        Grid(size, origin=somewhere),
        Grid(size, center=somewhere),
        Grid(size, spacing=somewhere),
        Grid(size, direction=torch.eye(dimension, device="meta")),
    ):
        derived = (grid.resize(3), grid.level(2), grid.resample(0.5, size=4), grid.roi(1, 2), grid.center_pad(5))
        matrices = [grid.matrix(a, b, other) for a in AXES for b in AXES for other in (None, grid)]
        made = (grid, derived, matrices, grid.points(), grid.origin, grid.extent, grid.index_center)
        for leaf in tree_flatten(made)[0]:
            assert leaf.is_meta and leaf.dtype == torch.float64
    for leaf in tree_flatten(Grid(size))[0]:
        assert leaf.device.type == "cpu" and leaf.dtype == torch.float64
    for dtype in (torch.float16, torch.float32):
        assert homogeneous(torch.eye(dimension).to(dtype), torch.zeros(dimension).to(dtype)).dtype == dtype


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_maps_are_differentiable_in_points_and_leaves(dimension: int) -> None:
    @settings(max_examples=3)
    @given(grids(dimension, count=2))
    def check(pair: list[Grid]) -> None:
        def together(grid: Grid, other: Grid, points: Tensor) -> Any:
            cube = grid.convert(points, "index", "cube", other)
            return cube, grid.world_to_index(points), other.convert(points, "cube", "world", vectors=True)

        function, inputs = flat_function(lambda tree: together(*tree), (*pair, some_points(pair[0], 2)))
        gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)

    check()


@given(st.data())
def test_derivatives_by_leaves_of_a_batch_equal_those_alone(data: st.DataObject) -> None:
    def energy(grid: Grid, points: Tensor) -> Tensor:
        made = Grid(grid.size, spacing=grid.spacing, center=grid.center, direction=grid.direction)
        return (made.world_to_index(points).square().sum() + made.points().square().sum() + made.origin.sum()) / 1e3

    found = three_of(data)
    points = some_points(found[0])
    batch = vmap(grad(energy), in_dims=(0, None))(stack(found), points)
    for k, grid in enumerate(found):
        alone = jacrev(energy)(grid, points)
        for a, b in zip(tree_flatten(alone)[0], tree_flatten(batch)[0], strict=True):
            assert_close(b[k], a, rtol=1e-12, atol=1e-12)


def test_the_map_of_the_derivative_by_centre_is_known() -> None:
    """Where the centre moves by d, indices move by -S^-1 R^T d."""
    grid = Grid((5, 6), spacing=(0.5, 2.0), direction=[[0.0, -1.0], [1.0, 0.0]])

    def index(center: Tensor) -> Tensor:
        return Grid(grid.size, spacing=grid.spacing, direction=grid.direction, center=center).world_to_index(points)

    points = torch.zeros(2, dtype=torch.float64)
    assert_close(jacrev(index)(grid.center), tensor([[0.0, -2.0], [0.5, 0.0]]), **EXACT)


def test_cached_indices_do_not_outlive_a_transform() -> None:
    size = (7, 11)  # of no other test
    grad(lambda c: Grid(size, center=c).points().sum())(torch.zeros(2, dtype=torch.float64))
    assert not is_transformed(index_points(size, torch.float64, torch.device("cpu")))


def test_homogeneous_and_apply_matrix() -> None:
    linear, offset = tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([5.0, 6.0])
    matrix = homogeneous(linear, offset)
    assert matrix.tolist() == [[1.0, 2.0, 5.0], [3.0, 4.0, 6.0], [0.0, 0.0, 1.0]]
    assert apply_matrix(matrix, tensor([[1.0, 1.0]])).tolist() == [[8.0, 13.0]]
    assert apply_matrix(matrix, tensor([[1.0, 1.0]]), vectors=True).tolist() == [[3.0, 7.0]]
    assert homogeneous(linear.expand(4, 2, 2), offset.expand(4, 2)).shape == (4, 3, 3)
    with pytest.raises(ValueError, match="points have 3 coordinates but the map has 2 dimensions"):
        apply_matrix(matrix, torch.zeros(1, 3))


def test_unknown_axes_and_other_dimensions_are_errors() -> None:
    grid = Grid((4, 3))
    with pytest.raises(ValueError, match="unknown axes 'voxel': choose from index, cube, corners, world"):
        grid.matrix("voxel", "world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grids of 2 and 3 axes do not share a world"):
        grid.matrix("index", "world", Grid((4, 3, 2)))
    with pytest.raises(ValueError, match="points have 3 coordinates"):
        grid.world_to_index(torch.zeros(5, 3))


# -- what a grid is --------------------------------------------------------------------------------------------


def test_defaults() -> None:
    grid = Grid((4, 3, 2))
    assert (grid.size, grid.shape, grid.ndim, grid.numel) == ((4, 3, 2), (2, 3, 4), 3, 24)
    assert grid.spacing.tolist() == [1.0, 1.0, 1.0] and grid.origin.tolist() == [0.0, 0.0, 0.0]
    assert grid.center.tolist() == [1.5, 1.0, 0.5] and torch.equal(grid.direction, torch.eye(3, dtype=torch.float64))
    assert {leaf.dtype for leaf in tree_flatten(grid)[0]} == {torch.float64}


@given(st.data())
def test_size_or_shape_and_origin_or_center_say_the_same(data: st.DataObject) -> None:
    grid = one_of(data)
    options: dict[str, Any] = {"spacing": grid.spacing, "direction": grid.direction}
    same_voxels(Grid(shape=grid.shape, origin=grid.origin, **options), grid)
    same_voxels(Grid(grid.size, center=grid.center, **options), grid, 0.0)
    as_arrays = {name: value.numpy() for name, value in options.items()}
    same_voxels(Grid(np.array(grid.size), center=tuple(grid.center.tolist()), **as_arrays), grid, 0.0)


def test_numbers_stand_for_every_axis() -> None:
    grid = Grid((4, 3), spacing=2.0, center=1.0)
    assert grid.spacing.tolist() == [2.0, 2.0] and grid.center.tolist() == [1.0, 1.0]
    assert Grid((4, 3), origin=torch.tensor(3.0)).origin.tolist() == [3.0, 3.0]


def test_arrays_are_copied_even_read_only_ones() -> None:
    spacing, center = np.array([1.0, 2.0]), np.array([5.0, 6.0])
    center.flags.writeable = False
    grid = Grid((4, 3), spacing=spacing, center=center)
    spacing[:] = 7.0
    assert grid.spacing.tolist() == [1.0, 2.0] and grid.center.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_reflections_are_directions(dimension: int) -> None:
    for signs in itertools.product((1.0, -1.0), repeat=dimension):
        for order in itertools.permutations(range(dimension)):
            direction = torch.diag(tensor(signs))[list(order)]
            grid = Grid(range(2, 2 + dimension), direction=direction, origin=5.0)
            axes = torch.eye(dimension, dtype=torch.float64)
            assert_close(grid.index_to_world(axes), 5.0 + direction.mT, **EXACT)
            assert_close(grid.world_to_index(grid.index_to_world(axes)), axes, **EXACT)


NAN, INF = math.nan, math.inf
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({}, r"give either size, in \(x, y\[, z\]\) order, or shape"),
    ({"size": (4, 3), "shape": (3, 4)}, "give either size"),
    ({"size": (4, 3), "origin": 0.0, "center": 0.0}, "give either origin, the first voxel's position, or center"),
    ({"size": (4, 0)}, r"size is \(4, 0\): expected one to three axes of at least one voxel"),
    ({"size": (4, -3)}, "at least one voxel"),
    ({"size": ()}, "expected one to three axes"),
    ({"size": (4, 3, 2, 1)}, r"size is \(4, 3, 2, 1\): expected one to three axes"),
    ({"size": (4.5, 3)}, r"size is \(4.5, 3\): expected whole numbers"),
    ({"size": (4, 3), "spacing": 0.0}, r"spacing is \[0.0, 0.0\]: it must be positive"),
    ({"size": (4, 3), "spacing": (1.0, -1.0)}, r"spacing is \[1.0, -1.0\].*a flip belongs in direction"),
    ({"size": (4, 3), "spacing": (1.0, NAN)}, r"spacing is not finite: \[1.0, nan\]"),
    ({"size": (4, 3), "spacing": INF}, "spacing is not finite"),
    ({"size": (4, 3), "spacing": (1.0, 1.0, 1.0)}, "spacing has 3 values but the grid has 2 axes"),
    ({"size": (4, 3), "origin": (1.0,)}, "origin has 1 values but the grid has 2 axes"),
    ({"size": (4, 3), "center": (1.0, 2.0, 3.0)}, "center has 3 values but the grid has 2 axes"),
    ({"size": (4, 3), "center": (1.0, INF)}, "center or origin is not finite"),
    ({"size": (4, 3), "origin": (1.0, NAN)}, "center or origin is not finite"),
    ({"size": (4, 3), "direction": [[1.0, 0.0], [0.0, NAN]]}, "direction is not finite"),
    ({"size": (4, 3), "direction": torch.eye(3)}, r"direction has shape \(3, 3\): expected \(2, 2\)"),
    ({"size": (4, 3), "direction": (1.0, 0.0, 0.0, 1.0)}, r"direction has shape \(4,\): expected \(2, 2\)"),
    ({"size": (4, 3), "direction": torch.zeros(2, 2)}, r"direction is not orthonormal \(off by 1\)"),
    ({"size": (4, 3), "direction": [[1.0, 1.0], [1.0, 1.0]]}, "direction is not orthonormal"),
    ({"size": (4, 3), "direction": 2 * torch.eye(2)}, "scale belongs in spacing"),
    ({"size": (4, 3), "direction": [[1.0, 2e-4], [0.0, 1.0]]}, r"off by 0.0002.*sheared image must be resampled"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[f"{k}-{m[:24]}" for k, (_, m) in enumerate(ERRORS)])
def test_errors_name_what_was_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)


@pytest.mark.parametrize("name", ["size", "shape"])
def test_one_number_is_no_size(name: str) -> None:
    options: Any = {name: 64}
    with pytest.raises(TypeError, match=rf"{name} is 64: expected a number of voxels for each axis, such"):
        Grid(**options)


def test_one_bad_item_of_a_batch_is_an_error() -> None:
    spacing = tensor([[1.0, 2.0], [0.0, 3.0]])
    with pytest.raises(ValueError, match="it must be positive"):
        Grid((4, 3), spacing=spacing)
    with pytest.raises(ValueError, match="not orthonormal"):
        Grid((4, 3), direction=torch.stack([torch.eye(2), 2 * torch.eye(2)]))


def test_a_grid_is_frozen_and_can_be_copied() -> None:
    grid = Grid((4, 3), spacing=(0.1, 0.7), origin=(1.0, 2.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.spacing = grid.center  # type: ignore[misc]
    for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), grid.to("cpu")):
        same_voxels(grid, other, 0.0)
    assert grid.to("meta").center.is_meta


@given(st.data())
def test_json_gives_every_bit_back(data: st.DataObject) -> None:
    grid = one_of(data)
    back = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert back.size == grid.size
    for a, b in zip(tree_flatten(grid)[0], tree_flatten(back)[0], strict=True):
        assert torch.equal(a, b)


def test_json_keeps_what_a_level_is_of() -> None:
    for grid in Grid((9, 7)).pyramid(2, min_size=2):
        back = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
        assert back.base == grid.base and tree_flatten(back)[1] == tree_flatten(grid)[1]
    level = Grid((9, 7)).level((5, 4)).to_dict()
    for base, told in (
        ([9], "base has 1 values"),
        ([9.5, 7], "base is"),
        ([9, 3], r"base is \(9, 3\), smaller than the size"),
    ):
        with pytest.raises(ValueError, match=told):
            Grid.from_dict(level | {"base": base})


@pytest.mark.parametrize(
    "change",
    [{"type": "Image"}, {"spacings": [1.0, 1.0]}, {"center": None}],
    ids=["type", "unknown", "missing"],
)
def test_other_data_are_no_grid(change: dict[str, Any]) -> None:
    data = {k: v for k, v in (Grid((4, 3)).to_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match="not a grid: expected the keys"):
        Grid.from_dict(data)


def test_data_from_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match="spacing is"):
        Grid.from_dict(Grid((4, 3)).to_dict() | {"spacing": [1.0, -1.0]})


@given(st.data(), st.integers(0, 2))
def test_same_as_measures_voxels(data: st.DataObject, axis: int) -> None:
    grid = one_of(data, low=2)
    axis %= grid.ndim

    def moved(voxels: float) -> Grid:
        center = grid.center + voxels * grid.spacing[axis] * grid.direction[:, axis]
        return Grid(grid.size, spacing=grid.spacing, center=center, direction=grid.direction)

    assert grid.same_as(grid) and grid.same_as(moved(5e-7)) and moved(5e-7).same_as(grid)
    assert not grid.same_as(moved(2e-6)) and not grid.same_as(moved(-2e-6))
    assert grid.same_as(moved(0.3), tolerance=0.31) and not grid.same_as(moved(0.3), tolerance=0.29)
    assert not grid.same_as(grid.pad(1)) and not grid.same_as(grid.resize([n + 1 for n in grid.size]))


def test_same_as_sees_what_changes_far_from_the_centre_only() -> None:
    grid = Grid((101, 101))
    scaled = Grid((101, 101), spacing=(1 + 4e-8, 1.0), center=grid.center)
    assert not grid.same_as(scaled) and grid.same_as(scaled, tolerance=3e-6)
    stretched = Grid((101, 101), spacing=(1 + 4e-8, 1.0))
    assert not grid.same_as(stretched) and grid.same_as(stretched, tolerance=5e-6)  # apart at the far end only
    angle = tensor(4e-8)
    tilted = Grid((101, 101), center=grid.center, direction=[[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    assert not grid.same_as(tilted) and grid.same_as(tilted, tolerance=3e-6)
    assert not Grid((5,)).same_as(Grid((5, 1)))
    assert Grid((5, 4)).same_as(Grid((5, 4)), tolerance=0.0)


def test_repr_says_what_differs_from_the_default() -> None:
    assert repr(Grid((4, 3))) == "Grid(size=(4, 3), spacing=[1.0, 1.0], origin=[0.0, 0.0])"
    turned = Grid((4, 3), spacing=0.5, origin=(1.0, -2.0), direction=[[0.0, -1.0], [1.0, 0.0]])
    expected = "Grid(size=(4, 3), spacing=[0.5, 0.5], origin=[1.0, -2.0], direction=[[0.0, -1.0], [1.0, 0.0]])"
    assert repr(turned) == expected
    rebuilt = eval(repr(turned), {"Grid": Grid})
    same_voxels(rebuilt, turned)
    assert repr(Grid((2,), spacing=0.12345678)) == "Grid(size=(2,), spacing=[0.123457], origin=[0.0])"


def test_repr_of_a_batch_says_shapes_and_never_fails() -> None:
    batch = stack([Grid((4, 3)), Grid((4, 3))])
    assert repr(batch) == "Grid(size=(4, 3), spacing=<(2, 2)>, origin=<(2, 2)>, direction=<(2, 2, 2)>)"
    seen: list[str] = []

    def look(grid: Grid) -> Tensor:
        seen.append(repr(grid))
        return grid.origin

    vmap(look)(batch)
    grad(lambda grid: look(grid).sum())(Grid((4, 3)))
    assert seen[0] == "Grid(size=(4, 3), spacing=<(2,)>, origin=<(2,)>, direction=<(2, 2)>)"
    assert seen[1] == repr(Grid((4, 3)))
    assert "spacing=<()>" in repr(tree_unflatten([0, 0, 0], tree_flatten(Grid((4, 3)))[1]))


# -- other grids over the same place ---------------------------------------------------------------------------


@given(st.data())
def test_resize_keeps_extent_and_centre(data: st.DataObject) -> None:
    grid = one_of(data)
    size = [data.draw(st.integers(1, 9)) for _ in range(grid.ndim)]
    other = grid.resize(size)
    assert other.size == tuple(size)
    assert_close(other.extent, grid.extent, **EXACT)
    # Of the borders, which `extent` and centre say in other words: the cubes are one.
    assert_close(grid.matrix("cube", "cube", other), torch.eye(grid.ndim + 1, dtype=torch.float64), rtol=0, atol=1e-11)
    same_voxels(other.resize(grid.size), grid)


@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_pyramids_keep_the_extent_and_depend_on_the_size_only(data: st.DataObject, levels: int, min_size: int) -> None:
    grid = one_of(data, high=40)
    found = grid.pyramid(levels, min_size=min_size)
    assert found[0] is grid and grid.base is None
    assert 1 <= len(found) <= levels
    for fine, coarse in itertools.pairwise(found):
        assert_close(coarse.extent, grid.extent, **EXACT)
        assert torch.equal(coarse.center, grid.center) and torch.equal(coarse.direction, grid.direction)
        halves = [-(-n // 2) for n in fine.size]
        assert coarse.size == tuple(h if h >= min_size else n for n, h in zip(fine.size, halves, strict=True))
        assert coarse.size != fine.size
        assert coarse.base == grid.size and coarse.level(1).base == (grid.size if max(grid.size) > 1 else None)
        assert coarse.level(grid.size).base is None
    if len(found) < levels:
        # An axis of one voxel cannot shrink; otherwise each has reached its floor.
        assert all(n == 1 or -(-n // 2) < min_size for n in found[-1].size)
    assert [g.size for g in found] == [g.size for g in Grid(grid.size).pyramid(levels, min_size=min_size)]


def test_pyramid_sizes_by_hand() -> None:
    sizes = [grid.size for grid in Grid((100, 37, 5)).pyramid(9)]
    assert sizes == [(100, 37, 5), (50, 19, 5), (25, 10, 5), (13, 5, 5), (7, 5, 5), (4, 5, 5)]
    assert [grid.size for grid in Grid((5, 3)).pyramid(3)] == [(5, 3)]
    assert [grid.size for grid in Grid((5, 1)).pyramid(9, min_size=1)] == [(5, 1), (3, 1), (2, 1), (1, 1)]
    with pytest.raises(ValueError, match="levels is 0: a pyramid has at least one level"):
        Grid((8, 8)).pyramid(0)


@given(st.data(), st.integers(0, 3))
def test_downsample_and_upsample(data: st.DataObject, levels: int) -> None:
    grid = one_of(data)
    up = grid.upsample(levels)
    assert up.size == tuple(n * 2**levels for n in grid.size)
    same_voxels(up.downsample(levels), grid)
    assert up.downsample(levels, min_size=10**6).size == up.size
    assert_close(grid.downsample(levels).extent, grid.extent, **EXACT)
    assert grid.downsample(levels).size == tuple(math.ceil(n / 2**levels) for n in grid.size)


@given(st.data())
def test_resample_covers_the_extent(data: st.DataObject) -> None:
    grid = one_of(data)
    spacing = [data.draw(st.floats(0.3, 3)) for _ in range(grid.ndim)]
    other = grid.resample(spacing)
    assert other.spacing.tolist() == spacing
    assert_close(other.center, grid.center, **EXACT)
    count = grid.extent / tensor(spacing)
    assert all(n >= c - 1e-5 and n < c + 1 for n, c in zip(other.size, count.tolist(), strict=True))
    same_voxels(grid.resample(grid.spacing), grid)
    assert grid.resample(spacing, size=2).size == (2,) * grid.ndim


def test_resample_with_one_number_and_a_coarse_spacing() -> None:
    grid = Grid((10, 10), spacing=(0.1, 0.3))
    assert grid.resample(0.1).size == (10, 30)
    assert Grid((3,), spacing=0.1).resample(0.1).size == (3,)  # an extent of 0.30000000000000004 is no fourth voxel
    assert grid.resample(100.0).size == (1, 1)


@pytest.mark.parametrize("size", [None, 4])
def test_resample_errors(size: int | None) -> None:
    grid = Grid((4, 4))
    for spacing, message in (
        (-1.0, "must be positive"),
        ((1.0, 0.0), "must be positive"),
        (math.inf, "spacing is not finite"),
        ((1.0, math.nan), "spacing is not finite"),
        ((1.0, 1.0, 1.0), "spacing has 3 values but the grid has 2 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            grid.resample(spacing, size=size)


def test_resample_under_vmap_takes_the_size_as_an_argument() -> None:
    spacing = tensor([0.5, 2.0])
    grid = Grid((4, 4))
    found = vmap(lambda s: grid.resample(s, size=8))(spacing)
    assert found.size == (8, 8) and found.spacing.tolist() == [[0.5, 0.5], [2.0, 2.0]]
    with pytest.raises(ValueError, match=r"inside vmap give resample\(spacing, size=...\)"):
        vmap(lambda s: grid.resample(s))(spacing)
    with pytest.raises(ValueError, match="inside vmap give"):
        vmap(lambda g: g.resample(1.0))(stack([grid, grid]))


def ranges(data: st.DataObject, grid: Grid, low: int, high: int) -> list[int]:
    return [data.draw(st.integers(low, high)) for _ in range(grid.ndim)]


@given(st.data())
def test_crop_then_pad_gives_the_grid_back(data: st.DataObject) -> None:
    grid = one_of(data, low=5, high=9)
    low, high = ranges(data, grid, 0, 2), ranges(data, grid, 0, 2)
    cropped = grid.crop(low, high)
    assert cropped.size == tuple(n - a - b for n, a, b in zip(grid.size, low, high, strict=True))
    same_voxels(cropped.pad(low, high), grid)
    same_voxels(grid.pad(low, high).crop(low, high), grid)
    same_voxels(grid.crop(low), grid.crop(low, low), 0.0)
    same_voxels(grid.pad(2), grid.pad([2] * grid.ndim, [2] * grid.ndim), 0.0)
    # The voxels that stay are those of the slice of the data.
    window = tuple(slice(a, n - b) for n, a, b in zip(grid.size, low, high, strict=True))[::-1]
    kept = grid.points().reshape(*grid.shape, grid.ndim)[window].reshape(-1, grid.ndim)
    assert_close(cropped.points(), kept, **EXACT)


@given(st.data())
def test_roi_starts_at_its_index(data: st.DataObject) -> None:
    grid = one_of(data)
    start, size = ranges(data, grid, -5, 9), ranges(data, grid, 1, 4)
    found = grid.roi(start, size)
    assert found.size == tuple(size) and torch.equal(found.spacing, grid.spacing)
    assert_close(found.origin, grid.index_to_world(tensor(start)), **EXACT)


@given(st.data(), st.integers(1, 300))
def test_slabs_are_the_grid_in_order(data: st.DataObject, voxels: int) -> None:
    grid = one_of(data)
    slabs = grid.slabs(voxels)
    plane = grid.numel // grid.size[-1]
    assert all(slab.numel <= max(voxels, plane) for slab in slabs)
    assert len(slabs) <= -(-grid.numel // max(1, voxels - plane)) or voxels <= plane
    assert_close(torch.cat([slab.points() for slab in slabs]), grid.points(), **EXACT)


def test_slabs_by_hand() -> None:
    """As many planes as fit, one at the least; what is left comes last."""
    grid = Grid((3, 2, 7), origin=(1.0, 2.0, 3.0))
    for voxels, depths in (
        (1, [1] * 7), (11, [1] * 7), (12, [2, 2, 2, 1]), (23, [3, 3, 1]), (41, [6, 1]), (42, [7]), (99, [7])
    ):  # fmt: skip
        slabs = grid.slabs(voxels)
        assert [slab.size for slab in slabs] == [(3, 2, depth) for depth in depths]
        assert_close(torch.cat([slab.points() for slab in slabs]), grid.points(), **EXACT)
    assert [slab.size for slab in Grid((5,)).slabs(2)] == [(2,), (2,), (1,)]


@given(st.data())
def test_center_crop_and_pad_stay_on_the_voxels(data: st.DataObject) -> None:
    grid = one_of(data, low=3, high=8)
    size = ranges(data, grid, 1, 10)
    for found, choose in ((grid.center_crop(size), min), (grid.center_pad(size), max)):
        assert found.size == tuple(choose(n, m) for n, m in zip(grid.size, size, strict=True))
        first = grid.world_to_index(found.origin)
        assert_close(first, first.round(), **EXACT)
        middle = grid.world_to_index(found.center) - grid.index_center
        assert bool((middle.abs() <= 0.5 + 1e-12).all())
    same_voxels(grid.center_pad(12).center_crop(grid.size), grid)
    same_voxels(grid.center_crop(grid.size), grid, 1e-12)


def test_numpy_integers_are_integers() -> None:
    grid = Grid((8, 6))
    assert grid.crop(np.int64(1)).size == (6, 4)
    assert grid.resize(np.array([3, 2])).size == (3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.crop(2), r"a grid of size \(4, 3\) cannot become \(0, -1\): every axis needs a voxel"),
        (lambda g: g.resize((0, 3)), "cannot become"),
        (lambda g: g.roi(0, 0), "cannot become"),
        (lambda g: g.pad(-2), "cannot become"),
        (lambda g: g.resize((1, 2, 3)), "size has 3 values but the grid has 2 axes"),
        (lambda g: g.crop((1, 1, 1)), "low has 3 values"),
        (lambda g: g.crop(1, (1,)), "high has 1 values"),
        (lambda g: g.roi((1,), 2), "start has 1 values"),
        (lambda g: g.resize((2.5, 3)), r"size is \(2.5, 3\): expected whole numbers"),
    ],
)
def test_errors_of_derived_grids(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Grid((4, 3)))
