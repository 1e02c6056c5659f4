"""The images that come with the package: what they are, that they are unchanged, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fnreg
from fnreg import Grid, Image, data


def test_digits_are_pictures_in_unit_range() -> None:
    images = data.digits(9, count=30)
    assert len(images) == 30
    for image in images:
        assert image.data.shape == (1, 28, 28) and image.data.dtype == torch.float32
        assert float(image.data.min()) >= 0 and 0.9 < float(image.data.max()) <= 1
        assert image.grid.same_as(fnreg.Grid((28, 28)))


def test_digits_of_one_kind_differ_and_do_not_depend_on_the_count() -> None:
    first, second = data.digits(3)
    assert not torch.equal(first.data, second.data)
    assert torch.equal(data.digits(3, count=1)[0].data, first.data)


@pytest.mark.parametrize("digit", [-1, 10, 2.5, "9", True])
def test_what_is_no_digit_is_refused(digit: int) -> None:
    with pytest.raises(ValueError, match="expected one of 0 to 9"):
        data.digits(digit)


@pytest.mark.parametrize("count", [0, -1, 31])
def test_more_digits_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="30 images of each digit"):
        data.digits(0, count=count)


def test_pairs_are_of_one_digit_and_all_different() -> None:
    fixed, moving = data.digit_pairs(1000)
    assert fixed.data.shape == moving.data.shape == (1000, 1, 28, 28)
    stored = torch.cat([torch.stack([image.data for image in data.digits(digit, count=30)]) for digit in range(10)])
    near = [torch.cdist(batch.data.flatten(1), stored.flatten(1)).argmin(1) for batch in (fixed, moving)]
    assert torch.equal(near[0] // 30, torch.arange(1000) % 10)
    assert torch.equal(near[0] // 30, near[1] // 30)
    assert not bool((near[0] == near[1]).any())
    assert len(set(zip(near[0].tolist(), near[1].tolist(), strict=True))) == 1000
    assert len(set(near[0][:300].tolist())) == 300


def test_fewer_pairs_are_the_first_of_more() -> None:
    assert torch.equal(data.digit_pairs(20)[1].data, data.digit_pairs(50)[1].data[:20])


@pytest.mark.parametrize("count", [0, 8701])
def test_more_pairs_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 8700 pairs"):
        data.digit_pairs(count)


def test_brain_truth_maps_one_slice_onto_the_other() -> None:
    fixed, moving = data.brain()
    assert fixed.grid.size == moving.grid.size == (221, 257)
    warped = fnreg.warp(moving, data.brain_truth(), fixed.grid)
    pair = torch.stack([warped.data.flatten(), fixed.data.flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.997
    angle, shift = torch.tensor(10.0).deg2rad().double(), torch.tensor([13.0, 16.0]).double()
    middle = torch.tensor([[110.5, 128.5]]).double()
    torch.testing.assert_close(data.brain_truth().map_points(middle)[0], middle[0] + shift)
    assert float(data.brain_truth().matrix()[1, 0]) == pytest.approx(float(angle.sin()))


def test_bytes_are_those_of_the_sources(data_dir: Path) -> None:
    with np.load(data_dir / "mnist" / "mnist_t10k.npz") as source:
        images, labels = source["images"], source["labels"]
    for digit in (0, 9):
        shipped = torch.stack([image.data for image in data.digits(digit, count=30)]) * 255
        assert np.array_equal(shipped.squeeze(1).round().numpy(), images[labels == digit][:30])
    names = ("BrainProtonDensitySliceBorder20.png", "BrainProtonDensitySliceR10X13Y17.png")
    for image, name in zip(data.brain(), names, strict=True):
        source = fnreg.io.read_image(data_dir / "itk_slices" / name)
        assert torch.equal((image.data * 255).round(), source.data)


def test_authors_and_licences_are_named() -> None:
    notice = (Path(data.__file__).parent / "NOTICE.md").read_text(encoding="utf-8")
    for told in ("digits.npz", "LeCun", "CC BY-SA 3.0", "brain.npz", "Insight", "Apache License 2.0"):
        assert told in notice


# -- synthetic images ----------------------------------------------------------------------------------------------

OBLIQUE = {
    1: torch.tensor([[-1.0]]),
    2: torch.tensor([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]]),
    3: torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.4], [-0.2, 0.4, 0.0]]).double()),
}


def oblique_grid(dimension: int) -> Grid:
    size, spacing, center = (14, 11, 9)[:dimension], (0.8, 1.1, 1.3)[:dimension], (3.0, -20.0, 100.0)[:dimension]
    return Grid(size, spacing=spacing, center=center, direction=OBLIQUE[dimension])


def counted(grid: Grid, inside: Callable[[Tensor], Tensor]) -> Tensor:
    """Share of each voxel inside, by counting points of a grid of 24 (in 3-D 12) times as many voxels per axis."""
    times = 12 if grid.ndim == 3 else 24
    fine = grid.resize([times * n for n in grid.size])
    hits = inside(fine.points()).double().reshape(*(k for n in grid.shape for k in (n, times)))
    return hits.mean(tuple(range(1, 2 * grid.ndim, 2)))


def in_ball(radius: float, center: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda points: (points - center).norm(dim=-1) < radius


@pytest.mark.parametrize("dimension", [2, 3])
def test_balls_cover_voxels_by_their_share(dimension: int) -> None:
    grid = oblique_grid(dimension)
    draw = data.circle if dimension == 2 else data.sphere
    center = grid.center + torch.tensor([0.3, -0.4, 0.2]).double()[:dimension]
    image = draw(grid, radius=3.7, center=center, dtype=torch.float64)
    assert image.data.dtype == torch.float64 and image.grid is grid
    torch.testing.assert_close(image.data[0], counted(grid, in_ball(3.7, center)), atol=0.02, rtol=0)
    volume = math.pi * 3.7**2 if dimension == 2 else 4 / 3 * math.pi * 3.7**3
    assert float(image.data.sum() * grid.spacing.prod()) == pytest.approx(volume, rel=2e-3)
    centroid = (image.data.flatten() @ grid.points()) / image.data.sum()
    torch.testing.assert_close(centroid, center, atol=4e-3, rtol=0)
    assert float(image.data.min()) == 0 and float(image.data.max()) == 1


@pytest.mark.parametrize("options", [{}, {"inner": 1.0, "opening": 3.0}, {"radius": 4.0, "center": (3.2, -19.5)}])
def test_the_letter_is_a_ring_with_a_slot(options: dict[str, Any]) -> None:
    grid = oblique_grid(2)
    image = data.c_shape(grid, dtype=torch.float64, **options)
    center = torch.tensor(options.get("center", (3.0, -20.0))).double()
    outer = options.get("radius", 0.6 * 14 * 0.8 / 2)
    hole = options.get("inner", outer / 2)
    slot = options.get("opening", outer - hole)

    def inside(points: Tensor) -> Tensor:
        x, y = (points - center).unbind(-1)
        distance = torch.hypot(x, y)
        return (distance < outer) & (distance > hole) & ((y.abs() > slot / 2) | (x < 0))

    torch.testing.assert_close(image.data[0], counted(grid, inside), atol=0.04, rtol=0)


def test_circle_and_letter_are_the_classic_pair() -> None:
    disc, letter = data.circle(), data.c_shape()
    assert disc.data.shape == letter.data.shape == (1, 128, 128) and disc.data.dtype == torch.float32
    assert float(disc.data.sum()) == pytest.approx(math.pi * 38.4**2, rel=1e-4)
    assert bool((letter.data <= disc.data + 1e-6).all())
    left = letter.data[..., :64]
    assert float(left.sum()) == pytest.approx(math.pi * (38.4**2 - 19.2**2) / 2, rel=1e-3)
    assert float(letter.data[0, 64, 64:].max()) == 0 < float(letter.data[0, 64, :64].max())  # open to the right
    torch.testing.assert_close(letter.data, letter.data.flip(1))


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_lines_and_tiles_cover_voxels_by_their_share(dimension: int) -> None:
    grid = oblique_grid(dimension)
    every, width = torch.tensor([2.3, 3.1, 2.9]).double()[:dimension], 0.7

    def from_middle(points: Tensor) -> Tensor:
        return (grid.world_to_index(points) - grid.index_center) * grid.spacing / every

    def on_line(points: Tensor) -> Tensor:
        away = (from_middle(points) - 0.5).remainder(1)
        return (torch.minimum(away, 1 - away) * every < width / 2).any(-1)

    def on_tile(points: Tensor) -> Tensor:
        return from_middle(points).floor().sum(-1).remainder(2) == 0

    lines = data.grid_lines(grid, every=every, width=width, dtype=torch.float64)
    tiles = data.checkerboard_image(grid, every=every, dtype=torch.float64)
    share = 0.05 if dimension == 1 else 0.09  # of a voxel, that counting misses
    torch.testing.assert_close(lines.data[0], counted(grid, on_line), atol=share, rtol=0)
    torch.testing.assert_close(tiles.data[0], counted(grid, on_tile), atol=share, rtol=0)
    for image in (lines, tiles):
        assert 0 <= float(image.data.min()) < float(image.data.max()) <= 1


def test_defaults_of_lines_and_tiles_divide_the_shortest_side() -> None:
    lines, tiles = data.grid_lines((64, 32)), data.checkerboard_image((64, 32))
    assert lines.data[0, 0].nonzero().flatten().tolist() == [k for c in range(2, 64, 4) for k in (c - 1, c)]
    assert torch.equal(lines.data.unique(), torch.tensor([0.0, 0.25, 0.4375]))  # lines of half a voxel
    assert torch.equal(tiles.data[0, 0, :12], torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4))
    assert torch.equal(tiles.data[0, 4:8], 1 - tiles.data[0, :4]) and float(tiles.data.mean()) == 0.5


@pytest.mark.parametrize(
    "draw", [data.circle, data.c_shape, data.sphere, data.grid_lines, data.checkerboard_image], ids=lambda f: f.__name__
)
def test_synthetic_images_are_smoothed_on_request(draw: Callable[..., Image]) -> None:
    size = (18, 16, 14) if draw is data.sphere else (43, 40)
    sharp = draw(size)
    assert sharp.grid.same_as(Grid(size)) and sharp.data.dtype == torch.float32
    assert torch.equal(draw(Grid(size)).data, sharp.data)
    smooth = draw(size, blur=1.5)
    torch.testing.assert_close(smooth.data, sharp.gaussian(1.5, unit="voxel").data)
    assert float(smooth.data.std()) < float(sharp.data.std())
    with pytest.raises(ValueError, match="blur is -1"):
        draw(size, blur=-1.0)
    with pytest.raises(ValueError, match="this is a batch"):
        draw(fnreg.stack([Grid(size), Grid(size)]))


def test_shapes_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="`sphere` draws in 3-D"):
        data.circle((8, 8, 8))
    with pytest.raises(ValueError, match="`circle` draws in 2-D"):
        data.sphere((8, 8))
    with pytest.raises(ValueError, match="the letter is flat"):
        data.c_shape((8, 8, 8))
    for radius in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive length"):
            data.circle(8, radius=radius)
    with pytest.raises(ValueError, match="world point of 2 coordinates"):
        data.circle(8, center=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="inner radius is 3"):
        data.c_shape(8, radius=3.0, inner=3.0)
    with pytest.raises(ValueError, match="opening is 6"):
        data.c_shape(8, radius=3.0, opening=6.0)
    with pytest.raises(ValueError, match="width is 2"):
        data.grid_lines(8, every=2.0, width=2.0)
    with pytest.raises(ValueError, match="every has 3 values"):
        data.checkerboard_image(8, every=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="expected positive lengths"):
        data.checkerboard_image(8, every=0.0)
