"""Derivatives of vector fields in world axes, and how regular the maps of displacements are.

Of fields (D, [Z,] Y, X) of world vectors, as everywhere in `fnreg.fields`, which gives these functions too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fnreg.grid import Grid


class Statistics(NamedTuple):
    """How regular the map p -> p + u(p) is; J is the determinant of its derivative."""

    folds: Tensor  # share of voxels where J is not positive
    min_determinant: Tensor
    max_determinant: Tensor
    sd_log_determinant: Tensor  # standard deviation of log J where J > 0
    max_displacement: Tensor  # largest |u| in world units


def jacobian(field: Tensor, grid: Grid) -> Tensor:
    """The derivative of p -> p + u(p), I + du/dp, as (D, D, [Z,] Y, X): component of the map, world axis.

    Central differences, and one-sided ones of second order at the borders: exact where u is quadratic.  With two voxels
    along an axis the difference is of first order, with one it is 0.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> grid = Grid((3, 3), spacing=2.0)
    >>> fields.jacobian(0.1 * grid.points().mT.reshape(2, 3, 3), grid)[:, :, 1, 1]
    tensor([[1.1000, 0.0000],
            [0.0000, 1.1000]], dtype=torch.float64)
    """
    found = slope(field, grid)
    return found + _eye(found)


def determinant(field: Tensor, grid: Grid) -> Tensor:
    """The determinant of `jacobian`, ([Z,] Y, X): how volumes change, not positive where the map folds."""
    return determinant_of(jacobian(field, grid))


def determinant_of(rows: Tensor) -> Tensor:
    """The determinants (...) of matrices (D, D, ...), D up to 3."""
    if len(rows) == 1:
        return rows[0, 0]
    if len(rows) == 2:
        return rows[0, 0] * rows[1, 1] - rows[0, 1] * rows[1, 0]
    first, second, third = (row.unbind(0) for row in rows.unbind(0))
    return dot(first, cross(second, third))


def divergence(field: Tensor, grid: Grid) -> Tensor:
    """The sum of du_k/dp_k, ([Z,] Y, X)."""
    found = slope(field, grid)
    return torch.stack([found[k, k] for k in range(grid.ndim)]).sum(0)


def curl(field: Tensor, grid: Grid) -> Tensor:
    """In 3-D the vectors (D, Z, Y, X) of rotation, in 2-D du_y/dx - du_x/dy (Y, X), about the world's axes.

    Raises ValueError in 1-D.
    """
    if grid.ndim == 1:
        raise ValueError("a field of one axis has no curl: give one of two or three")
    found = slope(field, grid)
    if grid.ndim == 2:
        return found[1, 0] - found[0, 1]
    return torch.stack([found[k - 1, k - 2] - found[k - 2, k - 1] for k in range(3)])


def folds(field: Tensor, grid: Grid) -> Tensor:
    """The number of voxels where the determinant is not positive; NaN is not."""
    return (~(determinant(field, grid) > 0)).sum()


def folded_cells(field: Tensor, grid: Grid) -> Tensor:
    """The number of cells between voxels that fold: where, at a corner, the determinant of its edges is not positive.

    Stricter than `folds`, whose central differences do not see what alternates from voxel to voxel.  With linear
    interpolation the determinant within a cell is, in 1-D and 2-D, nowhere less than at a corner, so without a folded
    cell the map has an inverse on the grid if it has one on its border; in 3-D it may be less by a little.  An axis
    of one voxel counts as unchanged.  Karacali and Davatzikos 2004, doi 10.1109/TMI.2004.824239.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> zigzag = torch.tensor([[0.0, 0.8, 0.0, 0.8, 0.0, 0.8]])
    >>> fields.folds(zigzag, Grid((6,))), fields.folded_cells(torch.tensor([[0.0, 1.8, 0.0, 1.8]]), Grid((4,)))
    (tensor(0), tensor(1))
    """
    check(field, grid)
    inverse = grid.inverse_affine[..., :-1, :-1].to(field.dtype)
    edges = [field.diff(dim=-1 - k) for k in range(grid.ndim)]
    folded = torch.zeros([max(n - 1, 1) for n in grid.shape], dtype=torch.bool, device=field.device)
    for corner in itertools.product((0, 1), repeat=grid.ndim):
        at: list[Tensor] = []
        for k, edge in enumerate(edges):
            if grid.size[k] == 1:
                edge = torch.zeros_like(field)
            for axis, n in enumerate(grid.size):
                if n > 1 and axis != k:
                    edge = edge.narrow(-1 - axis, corner[axis], n - 1)
            at.append(edge)
        by_index = torch.stack(at, 1)  # (D, D, cells): component, axis
        by_world = (inverse.mT @ by_index.flatten(2)).reshape(by_index.shape)
        folded = folded | ~(determinant_of(by_world + _eye(by_world)) > 0)
    return folded.sum()


def statistics(field: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Statistics:
    """Folds, range and spread of the determinant, and the largest displacement.

    mask : (1, [Z,] Y, X); only where it is positive do voxels count

    With nothing in the mask all are NaN; so are those that depend on a NaN in the field.
    """
    det = determinant(field, grid)
    if mask is not None and tuple(mask.shape) != (1, *grid.shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: expected {(1, *grid.shape)}")
    inside = torch.ones_like(det, dtype=torch.bool) if mask is None else mask[0] > 0
    positive = inside & ~(det <= 0)  # with those that are NaN
    length = field.norm(dim=0)
    logs = torch.where(positive, torch.where(positive, det, 1).log(), 0)
    count = positive.sum()
    spread = torch.where(positive, logs - logs.sum() / count, 0).square().sum() / count

    def known(value: Tensor) -> Tensor:
        return torch.where(inside.any(), value, torch.nan)

    return Statistics(
        (inside & ~(det > 0)).sum().to(det.dtype) / inside.sum(),
        known(torch.where(inside, det, torch.inf).amin()),
        known(torch.where(inside, det, -torch.inf).amax()),
        spread.sqrt(),
        known(torch.where(inside, length, 0).amax()),
    )


def slope(field: Tensor, grid: Grid) -> Tensor:
    """du/dp (D, D, [Z,] Y, X): the derivative by the index, times that of the index by the world."""
    check(field, grid)
    twice = torch.stack([_twice_the_difference(field, -1 - k) for k in range(grid.ndim)], 1)
    matrix = (grid.inverse_affine[..., :-1, :-1] / 2).to(field.dtype)
    return (matrix.mT @ twice.flatten(2)).reshape(twice.shape)


def _twice_the_difference(data: Tensor, axis: int) -> Tensor:
    """Twice the derivative along an axis per voxel, exact for parabolas."""
    n = data.shape[axis]
    if n == 1:
        return torch.zeros_like(data)
    if n == 2:
        step = 2 * (data.narrow(axis, 1, 1) - data.narrow(axis, 0, 1))
        return torch.cat([step, step], axis)
    inner = data.narrow(axis, 2, n - 2) - data.narrow(axis, 0, n - 2)
    a, b, c = data.narrow(axis, 0, 3).split(1, axis)
    z, y, x = data.narrow(axis, n - 3, 3).split(1, axis)
    return torch.cat([4 * b - 3 * a - c, inner, 3 * x - 4 * y + z], axis)


def check(field: Tensor, grid: Grid) -> None:
    """Raise ValueError or TypeError for what is no field of a grid."""
    if tuple(field.shape) != (grid.ndim, *grid.shape):
        raise ValueError(
            f"field has shape {tuple(field.shape)} but the grid has shape {grid.shape}: expected "
            f"{(grid.ndim, *grid.shape)}, one world vector per voxel; use torch.func.vmap for a batch"
        )
    if not field.is_floating_point():
        raise TypeError(f"field is {field.dtype}: convert it to the dtype of the images first")


def dot(a: Sequence[Tensor], b: Sequence[Tensor] | Tensor) -> Tensor:
    """a . b by components."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """By components: `torch.linalg.cross` along the first axis is ten times slower."""
    return [a[k - 2] * b[k - 1] - a[k - 1] * b[k - 2] for k in range(3)]


def _eye(matrices: Tensor) -> Tensor:
    """The identity beside matrices (D, D, ...)."""
    dimension = len(matrices)
    eye = torch.eye(dimension, dtype=matrices.dtype, device=matrices.device)
    return eye.reshape(dimension, dimension, *(1,) * (matrices.ndim - 2))
