"""The squared difference of two images under a map, with its derivative by the map, in one pass.

What a registration by mean squares asks for at every step.  Composed of sampling and a loss it reads and writes every
intermediate image; here nothing but sums, and the derivative by the field where there is one, is written.  There is no
plain torch path: callers compose the same from its parts where the kernel does not serve.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fnreg import native
from fnreg.grid import index_points
from fnreg.sampling import KNOT, Padding

CHUNK = 16384  # points that are summed in one go: fixed, so that sums do not depend on the number of threads


class Squares(NamedTuple):
    """Sums over the fixed voxels i and channels of each pair, float64, with r = moving(A (i + u(i))) - fixed(i)."""

    weight: Tensor  # (B,) sum w, of one channel
    value: Tensor  # (B,) sum w r^2
    by_matrix: Tensor  # (B, D, D + 1) derivative of the value by the matrix A, the weights held
    by_shift: Tensor | None  # (B, D, [Z,] Y, X) derivative by the shift u, in the type of the images


def serves(*tensors: Tensor | None) -> bool:
    """Whether there is a kernel for images on this device, in this precision, of this size."""
    given = [t for t in tensors if t is not None]
    return native.serves(*given, voxels=max(math.prod(t.shape[-3:]) for t in given))


def squares(
    moving: Tensor,
    fixed: Tensor,
    mask: Tensor | None,
    matrices: Tensor,
    shift: Tensor | None = None,
    *,
    padding: Padding | None = None,
) -> Squares:
    """Sums of squares for a batch of pairs, which `serves` said can be had.

    moving : (B, C, [Z,] Y, X), or with a batch axis of 1 for all
    fixed, mask : (B or 1, C, [Z,] Y, X), (B or 1, 1, [Z,] Y, X)
    matrices : (B or 1, D, D + 1) from voxel index of the fixed grid to voxel index of the moving image
    shift : (B, D, [Z,] Y, X) voxels of the fixed grid, before the matrix; None for none
    padding : None gives voxels that map outside no weight, see `register`

    The tensors are plain: neither batched nor differentiated by torch.func.
    """
    dimension = matrices.shape[1]
    batch = max(t.shape[0] for t in (moving, fixed, matrices, mask, shift) if t is not None)
    points = math.prod(fixed.shape[2:])
    index = index_points(tuple(fixed.shape[:1:-1]), moving.dtype, moving.device)
    images = [None if t is None else t.contiguous() for t in (moving, fixed, mask, matrices.to(moving.dtype))]
    shift = None if shift is None else shift.contiguous()
    by_shift = None if shift is None else torch.empty_like(shift)
    chunks = -(-points // CHUNK)
    sums = torch.empty(batch, chunks, 2 + dimension * (dimension + 1), dtype=torch.float64, device=moving.device)
    items = tuple(1 if t is None else t.shape[0] for t in images)
    counts = (moving.shape[1], points, CHUNK)
    code = native.padding_code("border" if padding is None else padding)
    options = (padding is not None, *code, KNOT[moving.dtype])
    arguments = (*images, index, shift, sums, by_shift, moving.shape[:1:-1], items, *counts, *options)
    native.call("_squares", moving.dtype, dimension, arguments, batch * chunks, each=min(points, CHUNK))
    total = sums.sum(1)
    by_matrix = 2 * total[:, 2:].reshape(batch, dimension, dimension + 1)
    return Squares(total[:, 0], total[:, 1], by_matrix, by_shift)
