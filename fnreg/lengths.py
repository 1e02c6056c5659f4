"""Lengths of the vectors of a field and sizes of a batch, each in one pass of C, and by torch where that cannot serve.

Every step of a registration asks how far it goes.  Composed of squares, sums and maxima that takes longer than some of
the filters do, and torch's own threads, which wait busily for more work, then stand in the way of the kernels'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnreg import native
from fnreg.native import CHUNK
from fnreg.pytree import beside, fold, forward_asked, is_stored, is_tracked, leading


def longest(vectors: Tensor) -> Tensor:
    """max_i |v(i)| of vectors (D, ...), a scalar of their type; not a number where an entry is none.

    Its derivative is zero where all vectors are.

    >>> import torch
    >>> from fnreg.lengths import longest
    >>> longest(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    tensor(5.)
    """
    if not native.serves(vectors, voxels=1) or forward_asked() or vectors.numel() == 0:
        return _longest(vectors)
    return _Longest.apply(vectors.flatten(1).unsqueeze(0)).squeeze(0)  # type: ignore[no-untyped-call]


def rows(leaf: Tensor) -> Tensor:
    """The entries of each item (B, ...) in a row, (B, n); of a number each (B, 1)."""
    return leaf.unsqueeze(-1).flatten(1)


def largest(leaf: Tensor) -> Tensor:
    """Largest absolute entry of each item (B, ...), in its type."""
    flat = rows(leaf.detach())
    if _is_plain(flat):
        return _lengths(flat.unsqueeze(1))[:, 2].to(leaf.dtype)
    return torch.maximum(flat.amax(1), -flat.amin(1))


def mean_square(leaf: Tensor) -> Tensor:
    """Mean square of the entries of each item (B, ...), float64."""
    flat = rows(leaf)
    if _is_plain(flat):
        return _lengths(flat.unsqueeze(1))[:, 1] / flat.shape[1]
    return (flat.unsqueeze(1) @ flat.unsqueeze(2)).flatten().to(torch.float64) / flat.shape[1]


def is_finite(leaf: Tensor) -> Tensor:
    """Whether all entries of each item (B, ...) are finite, (B,)."""
    if _is_plain(leaf):
        return largest(leaf).isfinite()
    return rows(torch.isfinite(leaf)).all(1)


def scale_(leaf: Tensor, factor: Tensor) -> None:
    """Multiply each item (B, ...) by a factor (B,), in place: for what nobody else has yet."""
    if _is_plain(leaf) and leaf.is_contiguous():
        native.call(
            "_scale", leaf.dtype, None, (leaf, factor.to(torch.float64).contiguous(), leaf[0].numel()), leaf.numel()
        )
    else:
        leaf.mul_(beside(factor.to(leaf.dtype), leaf))


def _is_plain(leaf: Tensor) -> bool:
    return leaf.numel() > 0 and not is_tracked(leaf) and native.serves(leaf, voxels=1)


def _longest(vectors: Tensor) -> Tensor:
    square = vectors.square().sum(0).amax()
    moves = square != 0  # where nothing does the derivative is zero, not that of the root
    return torch.where(moves, torch.where(moves, square, 1).sqrt(), 0)


def _lengths(vectors: Tensor) -> Tensor:
    """Per item (B, D, n) the largest squared length, the sum of squares and the largest entry, (B, 3) float64."""
    batch, dimension, n = vectors.shape
    chunks = -(-n // CHUNK)
    found = vectors.new_empty(batch, chunks, 3, dtype=torch.float64)
    arguments = (vectors.contiguous(), found, dimension, n, CHUNK)
    native.call("_lengths", vectors.dtype, None, arguments, batch * chunks, each=min(n, CHUNK))
    return torch.stack([found[..., 0].amax(1), found[..., 1].sum(1), found[..., 2].amax(1)], 1)


class _Longest(torch.autograd.Function):
    """vectors (B, D, n) -> lengths of the longest (B,); its derivatives are those of the composition."""

    @staticmethod
    def forward(vectors: Tensor) -> Tensor:
        if not is_stored(vectors):
            return torch.func.vmap(_longest)(vectors)
        return _lengths(vectors)[:, 0].sqrt().to(vectors.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> Tensor:  # type: ignore[override]
        made: Any = torch.func.vjp(torch.func.vmap(_longest), *ctx.saved_tensors)
        return made[1](by_found)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = fold(info.batch_size, in_dims[0], args[0], leading(args[0], in_dims[0]))
        return _Longest.apply(folded).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]
