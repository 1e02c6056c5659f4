"""Distances of surfaces against formulas and against all pairs of points in the world."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import orientation, tensor
from torch import Tensor
from torch.testing import assert_close

from fnreg import Grid, metrics
from fnreg.extras import MissingExtraError

pytest.importorskip("SimpleITK")
ndimage = pytest.importorskip("scipy.ndimage")
distance = pytest.importorskip("scipy.spatial.distance")


def oblique(size: tuple[int, ...], spacing: tuple[float, ...]) -> Grid:
    d = len(size)
    turn = tensor([0.4, -0.3, 0.6])
    return Grid(size, spacing=spacing, center=(30.0, -20.0, 10.0)[:d], direction=orientation(d, turn, True))


def ball(grid: Grid, radius: float, shift: Tensor | float = 0.0) -> Tensor:
    """1 within a radius about the middle of the grid, moved by a shift in the world."""
    return ((grid.points() - grid.center - shift).norm(dim=-1) <= radius).reshape(1, *grid.shape).long()


def box(grid: Grid, low: tuple[int, ...], high: tuple[int, ...], number: int = 1) -> Tensor:
    """A number for voxels low <= index < high, x first."""
    made = torch.zeros(grid.shape, dtype=torch.int64)
    made[tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))] = number
    return made


def by_all_pairs(first: Tensor, second: Tensor, grid: Grid) -> tuple[float, float, float]:
    """By definition: surfaces by erosion across faces, every distance in the world."""
    points = grid.points().numpy()
    found = []
    for labels in (first, second):
        mask = labels.reshape(grid.shape).numpy() > 0
        found.append(points[(mask & ~ndimage.binary_erosion(mask)).flatten()])
    away = distance.cdist(*found)
    each = [away.min(1), away.min(0)]
    return (
        float(np.concatenate(each).mean()),
        max(float(np.percentile(values, 95)) for values in each),
        max(float(values.max()) for values in each),
    )


def test_balls_with_one_middle() -> None:
    grid = oblique((48, 40, 33), (0.5, 0.6, 0.7))
    found = metrics.surface_distances(ball(grid, 10.0), ball(grid, 7.0), grid)
    step = 0.7  # surface voxels lie within a voxel of the sphere
    assert float(found.mean[0]) == pytest.approx(3.0, abs=0.2 * step)
    assert float(found.p95[0]) == pytest.approx(3.0, abs=step) and float(found.p95[0]) >= float(found.mean[0])
    assert float(found.hausdorff[0]) == pytest.approx(3.0, abs=step)
    assert float(found.hausdorff[0]) >= float(found.p95[0])


def test_a_ball_that_moved() -> None:
    grid = oblique((48, 40, 33), (0.5, 0.6, 0.7))
    shift = tensor([1.0, -1.5, 0.8])
    found = metrics.surface_distances(ball(grid, 9.0), ball(grid, 9.0, shift), grid)
    assert float(found.hausdorff[0]) == pytest.approx(float(shift.norm()), abs=0.7)
    # to first order |shift . n| over the sphere, whose mean is half of the length
    assert float(found.mean[0]) == pytest.approx(float(shift.norm()) / 2, rel=0.15)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_plates_and_boxes(axis: int) -> None:
    spacing = (1.1, 1.6, 2.1)
    grid = oblique((14, 13, 12), spacing)
    low, high = [2, 2, 2], [8, 7, 6]
    steps = [0, 0, 0]
    steps[axis] = 3
    moved = [a + s for a, s in zip(low, steps, strict=True)], [b + s for b, s in zip(high, steps, strict=True)]
    found = metrics.surface_distances(box(grid, tuple(low), tuple(high)), box(grid, *map(tuple, moved)), grid)
    assert float(found.hausdorff[0]) == pytest.approx(3 * spacing[axis], rel=1e-6)
    high[axis] = low[axis] + 1  # a plate: every point of it is as far away
    moved = [a + s for a, s in zip(low, steps, strict=True)], [b + s for b, s in zip(high, steps, strict=True)]
    found = metrics.surface_distances(box(grid, tuple(low), tuple(high)), box(grid, *map(tuple, moved)), grid)
    for value in found:
        assert float(value[0]) == pytest.approx(3 * spacing[axis], rel=1e-6)


@given(seed=st.integers(0, 10**6), dimension=st.sampled_from([2, 3]), share=st.sampled_from([0.03, 0.5, 0.97]))
def test_any_shape_by_definition(seed: int, dimension: int, share: float) -> None:
    grid = oblique((9, 8, 7)[:dimension], (1.1, 1.6, 2.1)[:dimension])
    generator = torch.Generator().manual_seed(seed)
    sides = [(torch.rand(grid.shape, generator=generator) < share).long() for _ in range(2)]
    for side in sides:
        side.view(-1)[seed % side.numel()] = 1  # none is empty
    found = metrics.surface_distances(*sides, grid)
    assert_close(torch.stack([*found]).flatten(), tensor(by_all_pairs(*sides, grid)), atol=1e-5, rtol=1e-6)
    turned = metrics.surface_distances(*sides[::-1], grid)
    assert torch.equal(torch.stack([*found]), torch.stack([*turned]))


def test_classes_do_not_touch_each_other() -> None:
    grid = oblique((12, 11, 10), (1.1, 1.6, 2.1))
    one, two = box(grid, (1, 1, 1), (4, 5, 4), 3), box(grid, (6, 5, 5), (11, 9, 9), 300)
    other = box(grid, (2, 1, 1), (5, 5, 4), 3)
    found = metrics.surface_distances(one + two, other + two, grid)
    alone = metrics.surface_distances(one, other, grid)
    assert float(found.mean[0]) == float(alone.mean[0]) and float(found.hausdorff[0]) == pytest.approx(1.1)
    assert [float(value[1]) for value in found] == [0, 0, 0]
    chosen = metrics.surface_distances(one + two, other, grid, numbers=(300, 3, 7))
    assert bool(chosen.mean[[0, 2]].isnan().all()) and float(chosen.mean[1]) == float(alone.mean[0])
    assert len(metrics.surface_distances(one * 0, one * 0, grid).mean) == 0


def test_whole_images_have_a_surface_at_the_border() -> None:
    grid = oblique((6, 5), (1.0, 2.0))
    whole, one = torch.ones(1, 5, 6).long(), box(grid, (2, 2), (3, 3))
    found = metrics.surface_distances(whole, one, grid)
    assert_close(torch.stack([*found]).flatten(), tensor(by_all_pairs(whole, one, grid)), atol=1e-5, rtol=0)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, labels = Grid((6, 5)), torch.ones(5, 6).long()
    with pytest.raises(TypeError, match=r"torch\.float32: expected integers"):
        metrics.surface_distances(labels.float(), labels, grid)
    with pytest.raises(ValueError, match=r"shape \(6, 5\): expected those of one pair, \(5, 6\)"):
        metrics.surface_distances(labels, labels.mT, grid)
    with pytest.raises(ValueError, match="has 1 axes"):
        metrics.surface_distances(labels[0], labels[0], Grid((6,)))
    with pytest.raises(ValueError, match="inside vmap: surfaces cannot be found there"):
        torch.func.vmap(lambda a: metrics.surface_distances(a, a, grid).mean)(labels.expand(2, 5, 6))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError, match=r'distances of surfaces needs SimpleITK.*pip install "fnreg\[itk\]"'):
        metrics.surface_distances(labels, labels, grid)
