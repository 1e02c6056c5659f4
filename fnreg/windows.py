"""Symmetric filters of a few voxels in C: what `filters` and windowed similarities spend their time on.

Composed of one matrix product per axis a filter costs as many multiplications per voxel as an axis is long; here it
costs as many as the filter is wide, and the image is read and written once.  Forward mode, cotangents that autograd
batches by itself, and machines without a compiler take the matrices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fnreg import native
from fnreg.pytree import (
    beside_transforms,
    constant,
    fold,
    forward_asked,
    is_differentiated,
    is_stored,
    is_transformed,
    leading,
)

Taps = tuple[tuple[float, ...], ...]  # weights per axis, x first, from the centre outwards


def serves(data: Tensor) -> bool:
    """Whether there is a kernel for data (C, [Z,] Y, X), and no forward derivative is asked."""
    images = 2 <= data.ndim <= 4 and data.numel() > 0
    return images and native.serves(data, voxels=math.prod(data.shape[1:])) and not forward_asked()


def windowed(data: Tensor, taps: Taps, *, normalised: bool) -> Tensor:
    """sum_t w(|t|) data(i + t) along each axis, which `serves` said can be had, data (C, [Z,] Y, X).

    normalised : weights are divided by the sum of those that lie inside
    """
    if not is_differentiated(data) and not is_transformed(data):  # also what `constant` makes beside any transform
        with beside_transforms():
            return filtered(data, taps, normalised, False)
    return _Windowed.apply(data.unsqueeze(0), taps, normalised, False).squeeze(0)  # type: ignore[no-untyped-call]


@constant
def _weights(taps: Taps, dtype: torch.dtype) -> Tensor:
    """All weights, one axis after the other."""
    return torch.tensor([w for axis in taps for w in axis], dtype=torch.float64, device="cpu").to(dtype)


@constant
def _scale(taps: Taps, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One over the sum of the weights that lie inside, per place, one axis after the other."""
    inside: list[Tensor] = []
    for w, n in zip(taps, size, strict=True):
        line = torch.tensor([*w[:0:-1], *w], dtype=torch.float64, device="cpu")
        inside.append(torch.nn.functional.conv1d(line.new_ones(1, 1, n), line[None, None], padding=len(w) - 1))
    return 1 / torch.cat([part.flatten() for part in inside]).to(dtype)


def filtered(data: Tensor, taps: Taps, normalised: bool, transposed: bool) -> Tensor:
    """Plain data (..., [Z,] Y, X) of any layout filtered along its last axes, one for each part of `taps`."""
    data = data.contiguous()
    found = torch.empty_like(data)
    dimension = len(taps)
    size = (*data.shape[: -dimension - 1 : -1], 1, 1)[:3]
    given = (*taps, *((1.0,),) * (3 - dimension))
    # Taps beyond the image never meet a voxel.
    given = tuple(w[:n] for w, n in zip(given, size, strict=True))
    weights = _weights(given, data.dtype)
    scale = _scale(given, size, data.dtype) if normalised else None
    lost = torch.zeros(1, dtype=torch.int64, device=data.device)
    planes, each = data.numel() // (size[0] * size[1]), size[0] * size[1]
    radius = tuple(len(w) - 1 for w in given)
    arguments = (data, found, size, weights, radius, scale, transposed, lost)
    native.call("_filter", data.dtype, None, arguments, planes, each=each)
    if bool(lost):
        raise MemoryError(f"no memory left to filter images of size {size[:dimension]}")
    return found


@constant
def band(n: int, taps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (n, n) of weights over distances, zero beyond the last."""
    weights = torch.tensor(taps, dtype=dtype, device=device)
    index = torch.arange(n, device=device)
    distance = (index - index[:, None]).abs()
    return torch.where(distance < len(taps), weights[distance.clamp(max=len(taps) - 1)], 0)


def _multiplied(data: Tensor, taps: Taps, normalised: bool, transposed: bool) -> Tensor:
    """What `filtered` computes, by one matrix per axis."""
    for k, weights in enumerate(taps):
        matrix = band(data.shape[-1 - k], weights, data.dtype, data.device)
        matrix = matrix / matrix.sum(1, keepdim=True) if normalised else matrix
        matrix = matrix if transposed else matrix.mT
        data = (data.movedim(-1 - k, -1) @ matrix).movedim(-1, -1 - k)
    return data


class _Windowed(torch.autograd.Function):
    """`filtered` for data (B, C, *shape), whose pull-back is the transposed filter."""

    @staticmethod
    def forward(data: Tensor, taps: Taps, normalised: bool, transposed: bool) -> Tensor:
        return (filtered if is_stored(data) else _multiplied)(data, taps, normalised, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        taps, normalised, transposed = ctx.options
        return _Windowed.apply(by_found, taps, normalised, not transposed), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _Windowed.apply(tangent, *ctx.options)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = fold(info.batch_size, in_dims[0], args[0], leading(args[0], in_dims[0]))
        return _Windowed.apply(folded, *args[1:]).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


@functools.cache
def gaussian_taps(sigma: float, dtype: torch.dtype) -> tuple[float, ...]:
    """exp(-t^2 / 2 sigma^2) down to the rounding of the type, summing to one with its mirror image."""
    radius = math.floor(sigma * math.sqrt(-2 * math.log(torch.finfo(dtype).eps / 2)))
    values = [math.exp(-0.5 * (t / sigma) ** 2) if t else 1.0 for t in range(radius + 1)]
    total = 2 * math.fsum(values) - 1
    return tuple(value / total for value in values)
