"""What the pictures of a pair show: planes of the fixed image, the points on and beside them, where a map takes these.

Only these points are mapped, so a large volume costs little more than its reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fnreg.derivatives import determinant
from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.plot.canvas import Cut, coordinate_lines, cuts, upright
from fnreg.transforms.base import Mapping

Pixels = np.ndarray[Any, Any]
FINEST = 512  # pixels along an axis of a picture: larger ones are made smaller first
BACK = 24  # grey of what lies beyond the borders of an image
LINES, SAMPLES = 17, 96  # of a plane: coordinate lines along its longer side, points along each


class Plane(NamedTuple):
    """A plane, the thin grid of its voxels and of those beside it, and where its map takes these."""

    cut: Cut
    slab: Grid
    axes: tuple[int, ...]  # of the world, that the panel shows
    lines: Tensor  # (L, SAMPLES, D) world points of coordinate lines
    mapped: Tensor | None = None  # (N, D) of the slab's points
    curves: Tensor | None = None  # (L, SAMPLES, D) of the lines

    @property
    def middle(self) -> slice:
        """Which of the slab's points are those of the plane."""
        count = self.cut.grid.numel
        return slice(0, count) if self.slab.ndim == 2 else slice(count, 2 * count)


def small(image: Image) -> Image:
    """2-D images at a size that can be shown; planes of 3-D images are made smaller when they have been cut."""
    largest = max(image.grid.size)
    if image.grid.ndim != 2 or largest <= FINEST:
        return image
    return image.resize([max(1, round(n * FINEST / largest)) for n in image.grid.size])


def planes_of(fixed: Image) -> list[Plane]:
    """The planes x y, x z and y z of the world through the middle of an image; a 2-D image itself, its axes those of
    the world."""
    world = upright(fixed.grid)
    return [_plane(world, cut) for cut in cuts(world)]


def _plane(world: Grid, cut: Cut) -> Plane:
    axes = tuple("xyz".index(name) for name in cut.names)
    lines = coordinate_lines(cut.grid, LINES, SAMPLES)
    if world.ndim == 2:
        return Plane(cut, cut.grid, axes, lines)
    through = ({0, 1, 2} - set(axes)).pop()
    order = [*axes, through]
    center = world.center.clone()
    center[through] = cut.points[0, through]
    direction = torch.eye(3, dtype=torch.float64)[:, order]
    slab = Grid((*cut.grid.size, 3), spacing=world.spacing[order], center=center, direction=direction)
    inside = cut.points[:1].expand(lines[..., 0].numel(), -1).clone()
    inside[:, axes] = lines.reshape(-1, 2)
    return Plane(cut, slab, axes, inside.reshape(*lines.shape[:-1], 3))


def map_planes(planes: Sequence[Plane], mapping: Mapping) -> list[Plane]:
    """The planes with where a mapping takes their points; all in one go, of a flow that is one exponential."""
    dimension = planes[0].slab.ndim
    parts = [part for plane in planes for part in (plane.slab.points(), plane.lines.reshape(-1, dimension))]
    ends = mapping.map_points(torch.cat(parts)).detach().to(torch.float64).split([len(part) for part in parts])
    return [
        plane._replace(mapped=ends[2 * k], curves=ends[2 * k + 1].reshape(plane.lines.shape))
        for k, plane in enumerate(planes)
    ]


def mapped_plane(plane: Plane) -> Tensor:
    """Where the pixels of a plane are taken to; what is not finite goes far away."""
    assert plane.mapped is not None
    far = float(plane.cut.points.abs().max()) * 1e3 + 1e6
    return plane.mapped[plane.middle].nan_to_num(far, far, -far).clamp(-far, far)


def flat(cut: Cut, image: Image) -> Pixels:
    """(Y, X) float32 with the first row on top; NaN beyond the borders."""
    return displayed(cut, cut.of(image).data[0].to(torch.float32).numpy())


def displayed(cut: Cut, pixels: Pixels) -> Pixels:
    """y points down, z points up."""
    return np.ascontiguousarray(pixels[::-1]) if cut.names[1] == "z" else pixels


def trimmed_range(parts: Sequence[Pixels]) -> tuple[float, float]:
    """The range of grey: all intensities but the darkest and brightest in two hundred, which a few bright voxels would
    else leave dark."""
    values = np.concatenate([part[np.isfinite(part)] for part in parts])
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5)).tolist()
    if not low < high:
        low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def grey(part: Pixels, window: tuple[float, float]) -> Pixels:
    """Bytes (Y, X) of intensities, low black and high white."""
    low, high = window
    scaled = np.clip((part - low) * (255.0 / (high - low)), 0, 255)
    return np.where(np.isfinite(part), scaled, BACK).astype(np.uint8)


def determinants(planes: Sequence[Plane]) -> list[Pixels]:
    """The determinant of the map's Jacobian matrix at the pixels of each plane, (Y, X), as `fields.determinant` has it
    at the voxels inside of the grid."""
    found: list[Pixels] = []
    for plane in planes:
        assert plane.mapped is not None
        field = (plane.mapped - plane.slab.points()).mT.reshape(plane.slab.ndim, *plane.slab.shape)
        values = determinant(field, plane.slab)
        found.append(displayed(plane.cut, (values if plane.slab.ndim == 2 else values[1]).numpy()))
    return found
