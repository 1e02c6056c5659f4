"""Interpolation in plain differentiable torch: linear with its gradient, nearest and cubic, to any derivative order.

Data are `(C, [Z,] Y, X)`, coordinates voxel indices (D, N), x first.  What `fnreg.sampling` falls back on where its
faster ways do not serve, and where derivatives beyond the first are asked for.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fnreg import bspline

Interpolation = Literal["linear", "nearest", "cubic"]
Padding = Literal["border", "zeros", "reflection"] | float
Place = tuple[Tensor, Tensor | None]  # offsets in memory; with constant padding, whether they are within the image

INTERPOLATIONS = ("linear", "nearest", "cubic")
PADDINGS = ("border", "zeros", "reflection")  # in the order of the kernels' modes
KNOT = {torch.float32: 1e-5, torch.float64: 1e-9}  # how near to a knot counts as on it, in voxels


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type of coordinates beside data: that of the data; float32 for halves, which cannot count many voxels."""
    if dtype in KNOT:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.float64


class Sampled(NamedTuple):
    """Linear interpolation at N points."""

    value: Tensor  # (C, N)
    gradient: Tensor  # (C, D, N) derivative of the value by the coordinates
    inside: Tensor  # (N,) 1 within the outer borders of the grid, [-1/2, n - 1/2], else 0


def within(coords: Tensor, size: Sequence[int]) -> Tensor:
    """Whether coordinates (D, N) lie within the outer borders of a grid of `size`, x first: (N,) bool."""
    near = KNOT.get(coords.dtype, 1e-2)
    reach = [(x - (n - 1) / 2).abs() <= n / 2 + near for x, n in zip(coords, size, strict=True)]
    return torch.stack(reach).all(0)


def inside_index(index: Tensor, n: int, padding: Padding) -> tuple[Tensor, Tensor | None]:
    """An index inside [0, n), and where the padding is constant whether it was inside."""
    if padding == "reflection" and n > 1:
        index = torch.remainder(index, 2 * (n - 1))
        return torch.where(index < n, index, 2 * (n - 1) - index), None
    folded = index.clamp(0, n - 1)
    return folded, None if padding in ("border", "reflection") else index == folded


def _limit(coords: Tensor, n: int, padding: Padding) -> Tensor:
    """Keep what is far outside within the range of integers; NaN becomes a finite index here."""
    reach = 1e6 if padding == "reflection" else 2.0
    return torch.nan_to_num(coords, nan=-reach).clamp(-reach, n + reach)


def fill(padding: Padding) -> float:
    """What stands in for the voxels beyond the image."""
    return 0.0 if isinstance(padding, str) else float(padding)


def check_padding(padding: Padding) -> None:
    """ValueError for a name that is none."""
    if isinstance(padding, str) and padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}: choose from {', '.join(PADDINGS)}, or a number")


def padding_code(padding: Padding) -> tuple[ctypes.c_int, ctypes.c_double]:
    """How the kernels are told what lies outside: a mode, and the constant that stands in for voxels there."""
    check_padding(padding)
    name = padding if isinstance(padding, str) else "zeros"
    return ctypes.c_int(PADDINGS.index(name)), ctypes.c_double(fill(padding))


def _place(index: Tensor, sizes: Sequence[int], k: int, padding: Padding) -> Place:
    """Where the index along axis k leads."""
    folded, known = inside_index(index, sizes[k], padding)
    return folded * math.prod(sizes[:k]), known


def _join(a: Place, b: Place) -> Place:
    """One way, then the other."""
    known = [within for _, within in (a, b) if within is not None]
    return a[0] + b[0], functools.reduce(torch.logical_and, known) if known else None


def _take(data: Tensor, place: Place, padding: Padding) -> Tensor:
    """Voxels (C, N); `padding` beyond the image."""
    offset, known = place
    values = data.reshape(data.shape[0], -1)[:, offset]
    if known is None:
        return values
    # In the dtype of the data: beside integers a Python float would make float32 of them.
    beyond = fill(padding) if values.is_floating_point() else values.new_full((), int(fill(padding)))
    return torch.where(known, values, beyond)


def _lookup(data: Tensor, indices: list[Tensor], padding: Padding) -> Tensor:
    """Voxels (C, N) at integer indices, one (N,) per axis, x first; `padding` beyond the image."""
    places = [_place(i, data.shape[:0:-1], k, padding) for k, i in enumerate(indices)]
    return _take(data, functools.reduce(_join, places), padding)


def nearest(data: Tensor, coords: Tensor, padding: Padding) -> Tensor:
    """The nearest voxels; halves round up, integers stay integers."""
    indices = [torch.floor(_limit(x, n, padding) + 0.5).long() for x, n in zip(coords, data.shape[:0:-1], strict=True)]
    values = _lookup(data, indices, padding)
    if not data.is_floating_point():
        return values
    return torch.where(torch.isnan(coords).any(0), torch.nan, values)


def _corners(data: Tensor, ends: Sequence[Sequence[Place]], padding: Padding) -> list[Tensor]:
    """Voxels (C, N) at the corners of the cells between two places per axis; x changes fastest."""
    places = ends[-1]
    for end in ends[-2::-1]:
        places = [_join(a, b) for a in places for b in end]
    return [_take(data, place, padding) for place in places]


def _mix(corners: list[Tensor], fraction: list[Tensor]) -> Tensor:
    """Linear along x, then y, then z."""
    for f in fraction:
        corners = [torch.lerp(a, b, f) for a, b in zip(corners[0::2], corners[1::2], strict=True)]
    return corners[0]


def _slope(corners: list[Tensor], fraction: list[Tensor], k: int) -> Tensor:
    """From one end of axis k to the other."""
    steps = [corners[i | 1 << k] - corner for i, corner in enumerate(corners) if not i >> k & 1]
    return _mix(steps, fraction[:k] + fraction[k + 1 :])


def gather(data: Tensor, coords: Tensor, padding: Padding = "border", *, item: Tensor | None = None) -> Sampled:
    """`sample` in plain differentiable torch: right to any order, in forward mode too.

    item : (N,) the image of each point, where data are several, (C, I, [Z,] Y, X)
    """
    sizes = data.shape[:0:-1]  # I comes last
    limited = [_limit(x, n, padding) for x, n in zip(coords, sizes, strict=False)]
    start = [torch.floor(x.detach()).long() for x in limited]
    fraction = [x - i for x, i in zip(limited, start, strict=True)]

    def place(index: Tensor, k: int) -> Place:
        return _place(index, sizes, k, padding)

    ends: list[Sequence[Place]] = [(place(i, k), place(i + 1, k)) for k, i in enumerate(start)]
    ends += [] if item is None else [(place(item, len(start)),)]
    corners = _corners(data, ends, padding)
    gradient: list[Tensor] = []
    near = KNOT.get(coords.dtype, 1e-2)
    for k, (i, f) in enumerate(zip(start, fraction, strict=True)):
        low, high = f < near, f > 1 - near
        wide = place(torch.where(low, i - 1, i), k), place(torch.where(high, i + 2, i + 1), k)  # both cells at a knot
        across = _slope(_corners(data, [*ends[:k], wide, *ends[k + 1 :]], padding), fraction, k)
        gradient.append(torch.where(low | high, across / 2, _slope(corners, fraction, k)))
    lost = torch.isnan(coords).any(0)
    value, slope = (torch.where(lost, torch.nan, part) for part in (_mix(corners, fraction), torch.stack(gradient, 1)))
    return Sampled(value, slope, within(coords, sizes[: len(coords)]).to(data.dtype))


def without_fill(padding: Padding) -> Padding:
    """The padding that a change of the data sees: a constant does not change."""
    return padding if isinstance(padding, str) else "zeros"


def cubic(data: Tensor, coords: Tensor, padding: Padding) -> Tensor:
    """The cubic B-spline through the voxels.  Constant padding holds beyond the outer voxel centres."""
    coefficients = bspline.prefilter(data)
    sizes = data.shape[:0:-1]
    coords = coords.to(data.dtype)
    limited = [_limit(x, n, padding) for x, n in zip(coords, sizes, strict=True)]
    if padding == "border":
        limited = [x.clamp(0, n - 1) for x, n in zip(limited, sizes, strict=True)]
    start = [torch.floor(x.detach()).long() for x in limited]
    weights = [bspline.weights(x - i) for x, i in zip(limited, start, strict=True)]
    total: Tensor | None = None
    for number in range(4 ** len(start)):
        taps = [number // 4**k % 4 for k in range(len(start))]
        term = _lookup(coefficients, [i + t - 1 for i, t in zip(start, taps, strict=True)], "reflection")
        term = term * math.prod((w[t] for w, t in zip(weights[1:], taps[1:], strict=True)), start=weights[0][taps[0]])
        total = term if total is None else total + term
    assert total is not None
    if padding not in ("border", "reflection"):
        edge = KNOT.get(coords.dtype, 1e-2)
        within = [(x >= -edge) & (x <= n - 1 + edge) for x, n in zip(coords, sizes, strict=True)]
        total = torch.where(torch.stack(within).all(0), total, fill(padding))
    return torch.where(torch.isnan(coords).any(0), torch.nan, total)
