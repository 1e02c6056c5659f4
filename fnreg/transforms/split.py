"""A map at the voxels of its own grid, as a shift with a matrix after it: what registers and warps fast."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fnreg.grid import Grid, index_points


class Split(NamedTuple):
    """A map of a grid's voxels i: to i + frame shift(i) along its axes, from there to world, then by the matrix."""

    shift: Tensor | None  # (D, [Z,] Y, X)
    matrix: Tensor | None  # (D + 1, D + 1) world, float64; None for the identity
    frame: Tensor | None = None  # (D, D) from the shift's units to voxels, float64; None where it is in voxels


def split_coords(
    found: Split, to_moving: Tensor, from_fixed: Tensor, size: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Voxel indices (D, N) in the moving image of what the voxels of a grid of `size` map to.

    from_fixed : (D + 1, D + 1) from voxel index of that grid to world; to_moving : from world to moving voxel index

    Matrices are composed in float64 from index to index and cast at the end, so large world coordinates cost no
    precision.
    """
    world = to_moving if found.matrix is None else to_moving @ found.matrix
    matrix = (world @ from_fixed)[:-1].to(dtype)
    index = index_points(size, dtype, matrix.device)
    if found.shift is None:
        return matrix @ index
    shift = found.shift.flatten(1).to(dtype)
    shift = shift if found.frame is None else found.frame.to(dtype) @ shift
    return matrix[:, :-1] @ (index[:-1] + shift) + matrix[:, -1:]


def split_points(found: Split, grid: Grid) -> Tensor:
    """World points (N, D) that the voxels of a map's own grid map to, float64."""
    world = torch.eye(grid.ndim + 1, dtype=torch.float64, device=grid.center.device)
    return split_coords(found, world, grid.affine, grid.size, torch.float64).mT
