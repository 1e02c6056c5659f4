"""Images under a map in C: the moving image as the fixed voxels see it, and derivatives by the map.

What a registration asks for at every step.  A map takes a fixed voxel i to A (i + F u(i)) in voxels of the moving
image.  Composed of coordinates and sampling every step would write them and the gradient of the image to memory; here
only what is asked for is written.  There is no plain torch path: callers compose the same from its parts where the
kernels do not serve.  The tensors are plain: neither batched nor differentiated by torch.func.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import native
from fnreg.gather import KNOT, Padding, padding_code
from fnreg.grid import index_points
from fnreg.native import CHUNK


class Maps(NamedTuple):
    """A batch of maps from voxels of the fixed grid to those of the moving one."""

    matrices: Tensor  # (B or 1, D, D + 1) A
    shift: Tensor | None  # (B, D, [Z,] Y, X) u, in the type of the images; None for none
    size: tuple[int, ...]  # of the fixed grid, x first
    frames: Tensor | None = None  # (B or 1, D, D) F, from u to voxels of the fixed grid; None where u is in these

    @property
    def dimension(self) -> int:
        """D."""
        return self.matrices.shape[1]

    @property
    def points(self) -> int:
        """Number of fixed voxels."""
        return math.prod(self.size)

    def batch(self, *others: Tensor | None) -> int:
        """Number of pairs."""
        return max(t.shape[0] for t in (self.matrices, self.shift, *others) if t is not None)

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What the kernels know of maps: index, shifts, matrices, frames, and how many there are of the last two and of
        points."""
        index = index_points(self.size, dtype, self.matrices.device)
        matrices, frames = (None if t is None else t.to(dtype).contiguous() for t in (self.matrices, self.frames))
        shift = None if self.shift is None else self.shift.contiguous()
        of = len(self.matrices), 1 if frames is None else len(frames), self.points
        return index, shift, matrices, frames, of


class ByMap(NamedTuple):
    """Derivatives of a scalar of each pair by its map."""

    matrix: Tensor | None  # (B, D, D + 1) float64; None where it was not asked for
    shift: Tensor | None  # (B, D, [Z,] Y, X) by F u where the map has one, in the type of the images


class Squares(NamedTuple):
    """Sums over the fixed voxels i and channels of each pair, float64, with r = moving(A (i + u(i))) - fixed(i)."""

    weight: Tensor  # (B,) sum w, of one channel
    value: Tensor  # (B,) sum w r^2
    by_map: ByMap  # of the value, the weights held


def serves(*tensors: Tensor | None) -> bool:
    """Whether there is a kernel for images on this device, in this precision, of this size."""
    given = [t for t in tensors if t is not None]
    return native.serves(*given, voxels=max(math.prod(t.shape[-3:]) for t in given))


def squares(
    moving: Tensor,
    fixed: Tensor,
    mask: Tensor | None,
    maps: Maps,
    *,
    padding: Padding | None = None,
    by_shift: bool = True,
    by_matrix: bool = True,
) -> Squares:
    """Sums of squares for a batch of pairs, which `serves` said can be had.

    moving : (B, C, [Z,] Y, X), or with a batch axis of 1 for all
    fixed, mask : (B or 1, C, [Z,] Y, X), (B or 1, 1, [Z,] Y, X)
    padding : None gives voxels that map outside no weight, see `register`
    by_shift, by_matrix : whether derivatives by the shift, where there is one, and by the matrix are asked for
    """
    images = [None if t is None else t.contiguous() for t in (moving, fixed, mask)]
    batch = maps.batch(*images)
    sums, results = _sums(maps, moving, batch, 2), _results(maps, moving, batch, by_shift, by_matrix)
    items = tuple(1 if t is None else t.shape[0] for t in images)
    given = (*images, *maps.arguments(moving.dtype), sums, *results, moving.shape[:1:-1], items, moving.shape[1])
    _chunked("_squares", moving, maps, batch, (*given, CHUNK, padding is not None), padding)
    total = sums.sum(1)
    return Squares(total[:, 0], total[:, 1], _by_map(maps, *results))


def warp(moving: Tensor, maps: Maps, *, padding: Padding | None = None) -> tuple[Tensor, Tensor]:
    """The moving image at the ends of a map (B, C, [Z,] Y, X), and which voxels lie inside of it (B, 1, [Z,] Y, X).

    moving : (B or 1, C, [Z,] Y, X); padding : as for `squares`
    """
    moving, batch = moving.contiguous(), maps.batch(moving)
    shape, channels = maps.size[::-1], moving.shape[1]
    warped, inside = (moving.new_empty(batch, n, *shape) for n in (channels, 1))
    given = (moving, *maps.arguments(moving.dtype), warped, inside, moving.shape[:1:-1], moving.shape[0], channels)
    options = (*padding_code("border" if padding is None else padding), KNOT[moving.dtype])
    native.call("_warp", moving.dtype, maps.dimension, (*given, *options), batch * maps.points)
    return warped, inside


def pull(
    moving: Tensor, by_warped: Tensor, maps: Maps, *, padding: Padding | None = None, by_matrix: bool = True
) -> ByMap:
    """Derivatives by the map of what has the derivative `by_warped` (B, C, [Z,] Y, X) by the image of `warp`."""
    moving, by_warped = moving.contiguous(), by_warped.contiguous()
    batch = by_warped.shape[0]
    results = _results(maps, moving, batch, True, by_matrix)
    given = (moving, by_warped, *maps.arguments(moving.dtype), *results, moving.shape[:1:-1], *moving.shape[:2])
    _chunked("_pull", moving, maps, batch, (*given, CHUNK), padding)
    return _by_map(maps, *results)


def _sums(maps: Maps, like: Tensor, batch: int, count: int) -> Tensor:
    """Where a kernel puts the sums of each chunk."""
    return torch.empty(batch, -(-maps.points // CHUNK), count, dtype=torch.float64, device=like.device)


def _results(
    maps: Maps, like: Tensor, batch: int, by_shift: bool, by_matrix: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Where the kernels put derivatives by the matrix, of each chunk, and by the shift."""
    sums = _sums(maps, like, batch, maps.dimension * (maps.dimension + 1)) if by_matrix else None
    shift = maps.shift if by_shift else None
    return sums, None if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format)


def _chunked(
    kernel: str, like: Tensor, maps: Maps, batch: int, arguments: Sequence[Any], padding: Padding | None
) -> None:
    options = (*padding_code("border" if padding is None else padding), KNOT[like.dtype])
    chunks, each = -(-maps.points // CHUNK), min(maps.points, CHUNK)
    native.call(kernel, like.dtype, maps.dimension, (*arguments, *options), batch * chunks, each=each)


def _by_map(maps: Maps, sums: Tensor | None, by_shift: Tensor | None) -> ByMap:
    matrix = None if sums is None else sums.sum(1).reshape(-1, maps.dimension, maps.dimension + 1)
    return ByMap(matrix, by_shift)
