"""register: how a scan is stored, in which unit, and where in the world, does not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scenes import (
    DESCENT,
    SAME,
    WARPS,
    both_solvers,
    few_steps,
    known_pair,
    orientation,
    placement,
    probe,
    storages,
    stored,
    tensor,
    uniform,
    voxels_apart,
)
from torch.testing import assert_close

from fnreg import FFD, SVFFD, Affine, Grid, Image, Rigid, Scaling, Sequential, Similarity, Transform, register

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
    lost = Image(moving.data, Grid(moving.grid.size, **placement(moving.grid) | {"center": moving.grid.center + away}))
    expected = register(fixed, moving, Rigid(), start=start, **few_steps(DESCENT))
    result = register(fixed, lost, Rigid(), start=start, **few_steps(DESCENT))
    points = probe(fixed.grid)
    assert_close(result.map_points(points) - away, expected.map_points(points), atol=SAME, rtol=0)


# -- transforms with a field ---------------------------------------------------------------------------------------


def in_order(transform: Transform, order: tuple[int, ...]) -> Transform:
    """A transform with its strides in the order in which the axes are stored."""
    if isinstance(transform, FFD | SVFFD) and isinstance(transform.stride, tuple):
        return dataclasses.replace(transform, stride=tuple(transform.stride[k] for k in order))
    return transform


@pytest.mark.parametrize("transform", [*WARPS, FFD((4, 3)), Sequential((FFD(4), Affine()))], ids=str)
def test_axis_order_and_flips_do_not_matter_to_fields_in_the_plane(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    expected = register(fixed, moving, transform, **few_steps(DESCENT))
    moved = expected.mapping.displacement().norm(dim=0).max() / fixed.grid.spacing.min()
    assert moved > 0.5  # it has moved at all
    for number, (order, flips) in enumerate(PLANE):
        a, b = stored(fixed, order, flips), stored(moving, *PLANE[(3 * number + 1) % 8])
        result = register(a, b, in_order(transform, order), **few_steps(DESCENT))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME
        assert_close(result.value, expected.value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("transform", [*WARPS, FFD((4, 3, 2))], ids=str)
def test_axis_order_and_flips_do_not_matter_to_fields_in_space(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 3)
    expected = register(fixed, moving, transform, **few_steps(DESCENT, 3))
    for number, (order, flips) in enumerate(SPACE[::2]):
        a, b = stored(fixed, order, flips), stored(moving, *SPACE[number - 2])
        result = register(a, b, in_order(transform, order), **few_steps(DESCENT, 3))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@pytest.mark.parametrize("transform", WARPS, ids=str)
@pytest.mark.parametrize("dimension", [1, 2])
def test_neither_unit_nor_pose_matter_to_fields(dimension: int, transform: Transform) -> None:
    """Both scans in another unit, turned, mirrored and moved far away together: the map goes with them."""
    fixed, moving, _ = known_pair(Affine(), dimension)
    pose, away = orientation(dimension, tensor([0.7, -0.4, 1.1]), True), 300 * uniform(dimension, seed=4)

    def posed(image: Image) -> Image:
        grid = image.grid
        center, direction = 25.4 * pose @ grid.center + away, pose @ grid.direction
        return Image(image.data, spacing=25.4 * grid.spacing, center=center, direction=direction)

    expected = register(fixed, moving, transform, **few_steps(DESCENT))
    result = register(posed(fixed), posed(moving), transform, **few_steps(DESCENT))
    points = probe(fixed.grid)
    found = (result.map_points(25.4 * points @ pose.mT + away) - away) @ pose / 25.4
    assert_close(found, expected.map_points(points), atol=SAME, rtol=0)
