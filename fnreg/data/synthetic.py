"""Synthetic images with a formula: shapes, lines and tiles in world coordinates, values 0..1.

An image holds the share of each voxel that the shape covers, so that edges are as smooth as sampling allows and no
position on the voxel grid is preferred.  Every function takes a `Grid`, or a size in voxels for a grid of spacing 1
at origin 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fnreg.grid import Grid, Integers, Scalars
from fnreg.image import Image

# Of world points relative to the centre (N, D), how deep they lie within a shape (N,), negative outside; nowhere
# steeper than distance.
Depth = Callable[[Tensor], Tensor]

_SUBDIVISION = {2: 8, 3: 4}  # of a voxel at an edge, per axis


def circle(
    grid: Grid | Integers = 128,
    *,
    radius: float | None = None,
    center: Scalars | None = None,
    blur: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Image:
    """A bright disc, |p - c| <= r, (1, Y, X).

    grid : 2-D grid, or size in voxels; one number is a square
    radius : r in world units, default 0.6 of half the shorter side; center : c in the world, default the grid's
    blur : standard deviation in voxels of a Gaussian that smooths the image

    Raises ValueError for a grid that is not 2-D, a radius that is not positive and a blur below zero.

    >>> from fnreg.data import circle
    >>> image = circle(128)
    >>> image.grid.size, round(float(image.data.sum()), 1)  # pi r^2
    ((128, 128), 4632.4)
    """
    where = _grid("circle", grid, 2, "`sphere` draws in 3-D")
    return _ball(where, radius, center, blur, dtype)


def sphere(
    grid: Grid | Integers = 64,
    *,
    radius: float | None = None,
    center: Scalars | None = None,
    blur: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Image:
    """A bright ball, |p - c| <= r, (1, Z, Y, X).

    grid : 3-D grid, or size in voxels; one number is a cube
    radius : r in world units, default 0.6 of half the shortest side; center : c in the world, default the grid's
    blur : standard deviation in voxels of a Gaussian that smooths the image

    Raises ValueError for a grid that is not 3-D, a radius that is not positive and a blur below zero.

    >>> from fnreg.data import sphere
    >>> sphere((20, 16, 12)).data.shape
    torch.Size([1, 12, 16, 20])
    """
    where = _grid("sphere", grid, 3, "`circle` draws in 2-D")
    return _ball(where, radius, center, blur, dtype)


def c_shape(
    grid: Grid | Integers = 128,
    *,
    radius: float | None = None,
    inner: float | None = None,
    opening: float | None = None,
    center: Scalars | None = None,
    blur: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Image:
    """A bright C: the ring a <= |p - c| <= r without the slot |y| < w / 2 on the side of positive x, (1, Y, X).

    With `circle` of the same grid it is the classic test of large deformations: a disc that has to become a C.

    grid : 2-D grid, or size in voxels; one number is a square
    radius : r in world units, default 0.6 of half the shorter side, as `circle`
    inner : a, default half the radius; opening : w, default as wide as the stroke, r - a
    center : c in the world, default the grid's
    blur : standard deviation in voxels of a Gaussian that smooths the image

    Raises ValueError for a grid that is not 2-D, unless 0 < a < r and 0 < w < 2 r, and for a blur below zero.

    >>> from fnreg.data import c_shape
    >>> image = c_shape(128)
    >>> [round(float(image.data[0, 64, x]), 2) for x in (20, 40, 64, 90)]  # outside, stroke, hole, slot
    [0.0, 1.0, 0.0, 0.0]
    """
    where = _grid("c_shape", grid, 2, "the letter is flat")
    outer = _radius(where, radius)
    hole = outer / 2 if inner is None else inner
    if not 0 < hole < outer:
        raise ValueError(f"inner radius is {hole}: expected more than 0 and less than the radius, {outer}")
    slot = outer - hole if opening is None else opening
    if not 0 < slot < 2 * outer:
        raise ValueError(f"opening is {slot}: expected more than 0 and less than the diameter, {2 * outer}")

    def depth(points: Tensor) -> Tensor:
        x, y = points.unbind(-1)
        distance = points.norm(dim=-1)
        ring = torch.minimum(outer - distance, distance - hole)
        return torch.minimum(ring, torch.maximum(y.abs() - slot / 2, -x))

    return _blurred(_covered(where, depth, center, dtype), blur)


def grid_lines(
    grid: Grid | Integers = 128,
    *,
    every: Scalars | None = None,
    width: float | None = None,
    blur: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Image:
    """Bright lines along the axes of a grid, in 3-D walls, which show what a map does when the image is warped.

    The middle of the grid is the middle of a cell.

    grid : of any dimension, or size in voxels; one number is a square
    every : distance of the lines in world units, one or one per axis of the grid, default an eighth of the shortest
        side; width : of the lines in world units, default an eighth of the smallest distance
    blur : standard deviation in voxels of a Gaussian that smooths the image

    Raises ValueError unless 0 < width < every and blur >= 0.

    >>> from fnreg.data import grid_lines
    >>> grid_lines((8, 1), every=4.0, width=1.0).data[0, 0]
    tensor([0.0000, 0.5000, 0.5000, 0.0000, 0.0000, 0.5000, 0.5000, 0.0000])
    """
    where = _grid("grid_lines", grid)
    periods = _every(where, every)
    stroke = min(periods) / 8 if width is None else width
    if not 0 < stroke < min(periods):
        raise ValueError(f"width is {stroke}: expected more than 0 and less than the distance of lines, {min(periods)}")

    def free(period: float) -> Callable[[Tensor], Tensor]:
        half = (1 - stroke / period) / 2  # of the gap about the middle of a cell, in periods

        def integral(u: Tensor) -> Tensor:
            return u.round() * 2 * half + (u - u.round()).clamp(-half, half)

        return integral

    gaps = [_mean(where, axis, period, free(period)) for axis, period in enumerate(periods)]
    return _blurred(Image((1 - _product(gaps)).clamp(0, 1).unsqueeze(0).to(dtype), where), blur)


def checkerboard_image(
    grid: Grid | Integers = 128,
    *,
    every: Scalars | None = None,
    blur: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Image:
    """Dark and bright tiles in turn along the axes of a grid; corners of tiles meet in its middle.

    grid : of any dimension, or size in voxels; one number is a square
    every : side of the tiles in world units, one or one per axis of the grid, default an eighth of the shortest side
    blur : standard deviation in voxels of a Gaussian that smooths the image

    Raises ValueError unless every > 0 and blur >= 0.

    >>> from fnreg.data import checkerboard_image
    >>> checkerboard_image((6, 2), every=2.0).data[0]
    tensor([[0., 1., 1., 0., 0., 1.],
            [1., 0., 0., 1., 1., 0.]])
    """
    where = _grid("checkerboard_image", grid)

    def integral(u: Tensor) -> Tensor:  # of the square wave that is 1 on (0, 1) and -1 on (1, 2)
        return 1 - (u.remainder(2) - 1).abs()

    waves = [_mean(where, axis, period, integral) for axis, period in enumerate(_every(where, every))]
    return _blurred(Image(((1 + _product(waves)) / 2).clamp(0, 1).unsqueeze(0).to(dtype), where), blur)


# -- what they share -------------------------------------------------------------------------------------------------


def _grid(name: str, grid: Grid | Integers, dimension: int | None = None, hint: str = "") -> Grid:
    """The grid, or one of this size."""
    if isinstance(grid, int):
        grid = Grid((grid,) * (dimension or 2))
    elif not isinstance(grid, Grid):
        grid = Grid(grid)
    if dimension is not None and grid.ndim != dimension:
        raise ValueError(f"{name} is drawn on a grid of {dimension} axes, this one has {grid.ndim}: {hint}")
    if (grid.center.ndim, grid.spacing.ndim, grid.direction.ndim) != (1, 1, 2):
        raise ValueError(f"{name} is drawn on one grid, this is a batch: use torch.func.vmap, or stack the images")
    return grid


def _radius(grid: Grid, radius: float | None) -> float:
    value = 0.6 * float(grid.extent.min()) / 2 if radius is None else float(radius)
    if not 0 < value < math.inf:
        raise ValueError(f"radius is {value}: expected a positive length in world units")
    return value


def _every(grid: Grid, every: Scalars | None) -> list[float]:
    """The period along each axis."""
    given = float(grid.extent.min()) / 8 if every is None else every
    periods = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    periods = periods * grid.ndim if len(periods) == 1 else periods
    if len(periods) != grid.ndim:
        raise ValueError(f"every has {len(periods)} values but the grid has {grid.ndim} axes")
    if not all(0 < period < math.inf for period in periods):
        raise ValueError(f"every is {periods}: expected positive lengths in world units")
    return periods


def _ball(grid: Grid, radius: float | None, center: Scalars | None, blur: float, dtype: torch.dtype) -> Image:
    size = _radius(grid, radius)
    return _blurred(_covered(grid, lambda points: size - points.norm(dim=-1), center, dtype), blur)


def _covered(grid: Grid, depth: Depth, center: Scalars | None, dtype: torch.dtype) -> Image:
    """The share of each voxel in which depth is positive: a mean over parts of the voxel.

    Within a part the edge counts as straight: it covers 1/2 + depth / width, between none and all of it.
    """
    given = grid.center if center is None else torch.as_tensor(center, dtype=torch.float64, device=grid.center.device)
    middle = given.expand(grid.ndim) if given.ndim == 0 else given
    if middle.shape != (grid.ndim,):
        raise ValueError(f"center has shape {tuple(middle.shape)}: expected a world point of {grid.ndim} coordinates")
    points = grid.points() - middle
    inside = depth(points)
    # No point of a voxel is deeper or less deep than its middle by more than half of its diagonal.
    edge = inside.abs() <= float(grid.spacing.norm())
    near = points[edge]
    count = _SUBDIVISION[grid.ndim]  # parts per axis
    width = float(grid.spacing.log().mean().exp()) / count
    parts = [(k + 0.5) / count - 0.5 for k in range(count)]
    offsets = torch.tensor(list(itertools.product(parts, repeat=grid.ndim)), dtype=torch.float64, device=points.device)
    total = torch.zeros_like(near[:, 0])
    for offset in grid.convert(offsets, "index", "world", vectors=True):
        total = total + (0.5 + depth(near + offset) / width).clamp(0, 1)
    share = (inside > 0).to(torch.float64).masked_scatter(edge, total / len(offsets))
    return Image(share.reshape(1, *grid.shape).to(dtype), grid)


def _mean(grid: Grid, axis: int, period: float, integral: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over each voxel of a function of u = (distance from the middle along an axis) / period, by its integral."""
    n = grid.size[axis]
    spacing = float(grid.spacing[axis])
    borders = (torch.arange(n + 1, dtype=torch.float64, device=grid.center.device) - n / 2) * spacing / period
    return integral(borders).diff() * period / spacing


def _product(along: Sequence[Tensor]) -> Tensor:
    """Product f(x) g(y) ... of one function per axis, ([Z,] Y, X): the mean of a product of such functions."""
    total = along[0]
    for values in along[1:]:
        total = values.reshape(-1, *(1,) * total.ndim) * total
    return total


def _blurred(image: Image, blur: float) -> Image:
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur is {blur}: expected a standard deviation in voxels, 0 for none")
    return image.gaussian(blur, unit="voxel") if blur > 0 else image
