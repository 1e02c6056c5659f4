"""The pictures of the report: they show what is so, in the right place, and are drawn once."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture
from scenes import placement, scene, smooth_mapping, storages, stored, tensor
from study_scenes import make_study

import fnreg
from fnreg import Affine, Displacement, Grid, Image, Mapping
from fnreg.cohort.album import STAMP, draw_pairs, figures_of
from fnreg.cohort.figures import AFTER, BEFORE, CONTOURS, FIXED, GRID, JACOBIAN, NAMES, UNMAPPED, draw, otsu
from fnreg.cohort.ledger import read_ledger
from fnreg.cohort.planes import determinants, map_planes, planes_of
from fnreg.cohort.study import Study
from fnreg.derivatives import determinant

both = pytest.mark.parametrize("dimension", [2, 3])
YELLOW, AMBER = (255, 225, 0), (255, 176, 0)


def pixels(content: bytes, mode: str = "L") -> np.ndarray[Any, Any]:
    return np.asarray(Picture.open(io.BytesIO(content)).convert(mode)).astype(float)


def linear(grid: Grid, matrix: Any, shift: Any) -> Mapping:
    """p -> M (p - c) + c + t."""
    whole = torch.eye(grid.ndim + 1, dtype=torch.float64)
    whole[:-1, :-1] = tensor(matrix)
    whole[:-1, -1] = grid.center + tensor(shift) - tensor(matrix) @ grid.center
    return fnreg.linear_mapping(whole, grid)


def blob(place: Any, size: tuple[int, ...] = (30, 36, 24)) -> Image:
    """A bright ball in a dark image."""
    grid = Grid(size, center=[0.0] * len(size))
    inside = (grid.points() - tensor(place)).norm(dim=-1) < 4
    return Image(inside.reshape(1, *grid.shape).to(torch.float32), grid)


# -- what they show ------------------------------------------------------------------------------------------------


@both
def test_all_there_on_one_canvas_and_small(dimension: int) -> None:
    image = scene(dimension, spacing=0.4, grow=24, dtype=torch.float32)
    mapping = smooth_mapping(Displacement(), image.grid)
    made = draw(image, image, mapping, letters=True)
    assert list(made) == [FIXED, BEFORE, AFTER, CONTOURS, GRID, JACOBIAN]
    assert set(made) == set(NAMES)
    assert set(draw(image, image)) == set(UNMAPPED)
    sizes = {name: Picture.open(io.BytesIO(made[name])).size for name in made}
    assert len({sizes[name] for name in (FIXED, BEFORE, AFTER, CONTOURS)}) == 1
    assert max(sizes[FIXED]) <= 600
    assert all(Picture.open(io.BytesIO(content)).format == "WEBP" for content in made.values())
    assert len(made[BEFORE]) + len(made[AFTER]) < 16_000
    assert sum(map(len, made.values())) < 50_000


@both
def test_after_looks_like_fixed_where_the_map_is_true(dimension: int) -> None:
    image = scene(dimension, spacing=0.4, grow=16, dtype=torch.float32)
    shift = tensor([3.0, -2.0, 1.0])[:dimension] * image.grid.spacing
    moved = Grid(image.grid.size, **placement(image.grid) | {"center": image.grid.center + shift})
    truth = linear(image.grid, np.eye(dimension), shift)
    made = draw(image, Image(image.data, moved), truth)
    fixed, before, after = (pixels(made[name]) for name in (FIXED, BEFORE, AFTER))
    assert np.abs(after - fixed).mean() < 4  # the range of grey is that of before and after together
    assert np.abs(before - fixed).mean() > 10


def test_planes_are_seen_as_radiologists_do() -> None:
    fixed = blob((0.0, 0.0, 0.0))
    for place, panel, across, down in (((9.0, 0, 0), 0, 1, 0), ((0, 12.0, 0), 0, 0, 1), ((0, 0, 7.0), 1, 0, -1)):
        shown = pixels(draw(fixed, blob(place))[BEFORE])
        scale = (600 - 12) / (30 + 30 + 36)
        left = round(panel * (30 * scale + 6))
        part = shown[:, left : left + round(30 * scale)]
        rows, columns = np.nonzero(part > 180)
        middle = (part.shape[1] / 2, part.shape[0] / 2)
        found = (columns.mean() - middle[0], rows.mean() - middle[1])
        expected = (across * abs(sum(place)) * scale, down * abs(sum(place)) * scale)
        assert np.abs(np.subtract(found, expected)).max() < 3, place


@both
def test_a_scan_stored_otherwise_looks_the_same(dimension: int) -> None:
    grid = Grid([24, 20, 15][:dimension], spacing=[1.0, 1.2, 1.7][:dimension], center=[3.0, 4.0, 5.0][:dimension])
    values = torch.exp(-(grid.points() - grid.center - 2).square().sum(-1) / 40)
    image = Image(values.reshape(1, *grid.shape), grid)
    truth = linear(grid, 1.1 * np.eye(dimension), [1.0] * dimension)
    expected = draw(image, image, truth)
    for order, flips in storages(dimension):
        other = stored(image, order, flips)
        found = draw(other, other, truth)
        for name in (FIXED, AFTER, CONTOURS, GRID):
            assert np.abs(pixels(found[name]) - pixels(expected[name])).max() < 3, (name, order, flips)


@both
def test_determinants_are_those_of_the_whole_field(dimension: int) -> None:
    image = scene(dimension)
    grid = Grid(image.grid.size, spacing=image.grid.spacing)
    mapping = smooth_mapping(Displacement(), grid, size=1.5)
    whole = determinant(mapping.displacement(grid), grid)
    planes = map_planes(planes_of(Image(image.data, grid)), mapping)
    found = determinants(planes)
    if dimension == 2:
        np.testing.assert_allclose(found[0], whole.numpy(), atol=1e-9)
        return
    x, y, z = ((n - 1) // 2 for n in grid.size)
    expected = (whole[z], whole[:, y].flip(0), whole[:, :, x].flip(0))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-9)


@both
def test_the_determinant_of_a_linear_map_is_its_own(dimension: int) -> None:
    image = scene(dimension, turn=(0.3, 0.1, -0.2))
    matrix = np.eye(dimension) + 0.2 * np.triu(np.ones((dimension, dimension)))
    planes = map_planes(planes_of(image), linear(image.grid, matrix, [0.0] * dimension))
    for part in determinants(planes):
        np.testing.assert_allclose(part, 1.2**dimension, atol=1e-9)


def test_one_folded_voxel_is_seen_in_a_large_image() -> None:
    grid = Grid((500, 480))
    field = torch.zeros(2, 480, 500)
    field[0, 240, 250:252] = tensor([3.0, -3.0]).float()
    mapping = Mapping(Displacement().init(grid), grid, Displacement())
    mapping = Mapping({name: field for name in mapping.params}, grid, Displacement())
    assert int((determinant(mapping.displacement(grid), grid) <= 0).sum()) in range(1, 5)
    image = Image(torch.rand(1, 480, 500), grid)
    for found, folded in ((mapping, True), (linear(grid, np.eye(2), [0.0, 0.0]), False)):
        shown = pixels(draw(image, image, found)[JACOBIAN], "RGB")[:300]
        assert bool((np.abs(shown - YELLOW).max(-1) < 40).any()) == folded


def test_lines_of_a_grid_lie_where_the_map_takes_them() -> None:
    image = blob((0.0, 0.0), (40, 40))
    shown = pixels(draw(image, image, linear(image.grid, 0.5 * np.eye(2), [5.0, 0.0]))[GRID], "RGB")
    line, frame = (np.nonzero(mask) for mask in (_near(shown, AMBER), _grey(shown)))
    sides = [np.ptp(axis) for axis in frame]
    assert [np.ptp(axis) / side for axis, side in zip(line, sides, strict=True)] == pytest.approx([0.5, 0.5], abs=0.02)
    middles = [(np.max(a) + np.min(a) - np.max(b) - np.min(b)) / 2 for a, b in zip(line, frame, strict=True)]
    assert middles == pytest.approx([0.0, 5 / 40 * sides[1]], abs=2)


def _near(shown: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return np.abs(shown - colour).max(-1) < 90


def _grey(shown: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (np.ptp(shown, axis=-1) < 20) & (shown[..., 0] > 60)


def test_contours_are_the_borders_of_what_is_bright_or_labelled() -> None:
    grid = Grid((50, 50), center=(0.0, 0.0))
    radius = grid.points().norm(dim=-1).reshape(grid.shape)
    image = Image(torch.sigmoid((16.0 - radius) * 3)[None], grid)
    square = (grid.points().abs().amax(-1) < 10).reshape(1, 50, 50).long()
    scale = 300 / 50
    for labels in (None, fnreg.io.Labels(3 * square, grid)):
        shown = pixels(draw(image, image, labels=labels)[CONTOURS], "RGBA")
        where = (np.argwhere(shown[..., 3] > 0) + 0.5 - 150) / scale
        far = np.linalg.norm(where, axis=-1) if labels is None else np.abs(where).max(-1)
        assert len(where) > 200
        assert np.abs(far - (16 if labels is None else 10)).max() < 1.2


@given(st.lists(st.integers(0, 60), min_size=2, max_size=60), st.floats(0.5, 3))
def test_the_threshold_is_the_best_of_all(values: list[int], scale: float) -> None:
    array = scale * np.array(values, float)
    best = max(_between(array, level) for level in array)
    assert _between(array, otsu(array)) == pytest.approx(best, rel=1e-9)


def _between(array: np.ndarray[Any, Any], level: float) -> float:
    low, high = array[array <= level], array[array > level]
    return low.size * high.size * (low.mean() - high.mean()) ** 2 if low.size and high.size else 0.0


def test_odd_images_are_drawn_and_wrong_ones_refused() -> None:
    grid = Grid((12, 9))
    for values in (torch.zeros(1, 9, 12), torch.full((1, 9, 12), torch.nan), torch.rand(3, 9, 12)):
        assert set(draw(Image(values, grid), Image(values, grid), linear(grid, np.eye(2), [0, 0]))) == set(NAMES)
    far = Mapping({name: torch.full((2, 9, 12), torch.nan) for name in Displacement().init(grid)}, grid, Displacement())
    assert set(draw(Image(torch.rand(1, 9, 12), grid), Image(torch.rand(1, 9, 12), grid), far)) == set(NAMES)
    with pytest.raises(ValueError, match="moving has 3 spatial axes but fixed has 2"):
        draw(Image(torch.zeros(1, 9, 12), grid), blob((0.0, 0.0, 0.0)))


# -- many pairs ----------------------------------------------------------------------------------------------------


def pairs_of(study: Study) -> list[Any]:
    known = read_ledger(study.folder)
    return [(row.record(), known.get(row.pair_id, {})) for row in study.rows]


@both
def test_drawn_once_and_again_when_something_changed(dimension: int, tmp_path: Path) -> None:
    study = make_study(tmp_path, dimension=dimension)
    pairs, told = pairs_of(study), list[tuple[int, int]]()
    first = draw_pairs(study.folder, pairs, progress=lambda *done: told.append(done))
    assert told == [(n, 6) for n in range(1, 7)]
    assert [one.pair_id for one in first] == [row.pair_id for row in study.rows]
    assert [one.there for one in first] == [one.new for one in first] == [True, True, False, True, True, True]
    assert "moving-2" in first[2].reason
    assert figures_of(study.folder, *pairs[0]) == list(NAMES)
    assert figures_of(study.folder, *pairs[3]) == list(UNMAPPED)
    assert figures_of(study.folder, *pairs[2]) == []
    assert [one.new for one in draw_pairs(study.folder, pairs)] == [False] * 6
    place = study.folder / "pairs" / "pair-0"
    os.utime(place / "transform.safetensors", ns=(1, 1))
    (study.folder / "pairs" / "pair-1" / "figures" / GRID).unlink()
    (study.folder / "pairs" / "pair-5" / "figures" / STAMP).write_text("torn")
    assert [one.new for one in draw_pairs(study.folder, pairs)] == [True, True, False, False, False, True]
    (place / "transform.safetensors").unlink()
    draw_pairs(study.folder, pairs)
    assert sorted(path.name for path in (place / "figures").iterdir()) == sorted([*UNMAPPED, STAMP])


def test_ids_do_not_leave_the_study(tmp_path: Path) -> None:
    study = make_study(tmp_path / "a", count=1)
    row, record = pairs_of(study)[0]
    for name in ("../../out", "..", "/tmp/out", "a\\b", ""):
        assert "no name of a folder" in draw_pairs(study.folder, [(row | {"pair_id": name}, record)])[0].reason
        assert figures_of(study.folder, {"pair_id": name}, {}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert list((study.folder / "pairs").iterdir()) == [study.folder / "pairs" / "pair-0"]


def test_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    study, before = make_study(tmp_path, count=2), torch.get_num_threads()
    draw_pairs(study.folder, pairs_of(study))
    assert torch.get_num_threads() == before


def test_affine_has_all_pictures() -> None:
    image = scene(3)
    mapping = Mapping(Affine().init(image.grid), image.grid, Affine())
    assert set(draw(image, image, mapping)) == set(NAMES)
