"""Interpolation at voxel coordinates: linear, nearest and cubic, to any derivative order.

Data are `(C, [Z,] Y, X)`, coordinates are voxel indices in planar layout `(D, ...)` with x first, and values
come back as `(C, ...)`.  (World points are the business of `Image`.)

Linear interpolation computes its spatial gradient in the same pass, so that first derivatives cost no second
one.  Second derivatives and forward mode go through `gather`, written in differentiable torch.  At a knot,
where the one-sided derivatives differ, the gradient is their mean.  A NaN coordinate gives NaN.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fnreg import bspline, native
from fnreg.pytree import forward_levels

Mode = Literal["linear", "nearest", "cubic"]
Padding = Literal["border", "zeros", "reflection"] | float

MODES = ("linear", "nearest", "cubic")
PADDINGS = ("border", "zeros", "reflection")
KNOT = {torch.float32: 1e-5, torch.float64: 1e-9}  # how near to a knot counts as on it, in voxels


def interpolate(data: Tensor, coords: Tensor, *, mode: Mode = "linear", padding: Padding = "border") -> Tensor:
    """Values of an image between its voxels.

    data : (C, [Z,] Y, X), floating; integers too with mode "nearest", which keeps them exactly
    coords : (D, ...) voxel indices, x first
    mode : "linear"; "nearest" (halves round up); "cubic", the interpolating cubic B-spline (mirrored at the
        borders; equal to SciPy's order 3 with mode "mirror")
    padding : outside of the voxel centres: "border" repeats the nearest voxel, "reflection" mirrors about the
        border voxels' centres, "zeros" or a number stands in for every voxel beyond the image

    Returns (C, ...).  Raises ValueError for shapes that do not fit and unknown names, TypeError for integer
    data that would have to be mixed.

    >>> import torch
    >>> from fnreg.sampling import interpolate
    >>> interpolate(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.25, 1.0]]))
    tensor([[1.0000, 1.5000, 3.0000]])
    """
    _check(data, coords, mode, padding)
    flat = coords.reshape(coords.shape[0], -1)  # (D, N)
    if mode == "nearest":
        value = _nearest(data, flat, padding)
    elif mode == "cubic":
        value = _cubic(data, flat, padding)
    else:
        value = sample(data, flat, padding=padding).value
    return value.reshape(data.shape[0], *coords.shape[1:])


class Sampled(NamedTuple):
    """Linear interpolation at N points."""

    value: Tensor  # (C, N)
    gradient: Tensor  # (C, D, N) derivative of the value by the coordinates
    inside: Tensor  # (N,) 1 within the outer borders of the grid, [-1/2, n - 1/2], else 0


def sample(data: Tensor, coords: Tensor, *, padding: Padding = "border") -> Sampled:
    """Linear interpolation, its derivative by the coordinates, and what lies inside, in one pass.

    data : (C, [Z,] Y, X) floating
    coords : (D, N) voxel indices

    Value and gradient can be differentiated to any order, in reverse and in forward mode.
    """
    _check(data, coords, "linear", padding)
    if forward_levels() > 1:  # the tangents of a Function are not differentiated forward again
        return gather(data, coords.to(data.dtype), padding)
    found = _Linear.apply(data.unsqueeze(0), coords.to(data.dtype).unsqueeze(0), padding, 1)  # type: ignore[no-untyped-call]
    return Sampled(*(part.squeeze(0) for part in found))


def _check(data: Tensor, coords: Tensor, mode: str, padding: Padding) -> None:
    dimension = data.ndim - 1
    if coords.ndim < 1 or coords.shape[0] != dimension or not 1 <= dimension <= 3:
        raise ValueError(
            f"data has shape {tuple(data.shape)} and coords {tuple(coords.shape)}: "
            f"expected (C, [Z,] Y, X) and one row of coords for each of its {dimension} axes"
        )
    if mode not in MODES:
        raise ValueError(f"unknown interpolation {mode!r}: choose from {', '.join(MODES)}")
    if isinstance(padding, str) and padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}: choose from {', '.join(PADDINGS)}, or a number")
    if not data.is_floating_point():
        if mode != "nearest":
            raise TypeError(f"data are {data.dtype}: only mode 'nearest' samples integers; convert to float first")
        if not _fill(padding).is_integer():
            raise ValueError(f"padding is {padding} but data are {data.dtype}: give a whole number or convert to float")


# -- indices ----------------------------------------------------------------------------------------------------


def _fold(index: Tensor, n: int, padding: Padding) -> tuple[Tensor, Tensor | None]:
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


def _fill(padding: Padding) -> float:
    return 0.0 if isinstance(padding, str) else float(padding)


def _lookup(data: Tensor, indices: list[Tensor], padding: Padding) -> Tensor:
    """Voxels (C, N) at integer indices, one (N,) per axis, x first; `padding` beyond the image."""
    flat, known, step = torch.zeros_like(indices[0]), None, 1
    for index, n in zip(indices, data.shape[:0:-1], strict=True):
        folded, within = _fold(index, n, padding)
        if within is not None:
            known = within if known is None else known & within
        flat = flat + folded * step
        step *= n
    values = data.reshape(data.shape[0], -1)[:, flat]
    if known is None:
        return values
    # In the dtype of the data: beside integers a Python float would make float32 of them.
    fill = _fill(padding) if values.is_floating_point() else values.new_full((), int(_fill(padding)))
    return torch.where(known, values, fill)


def _nearest(data: Tensor, coords: Tensor, padding: Padding) -> Tensor:
    indices = [torch.floor(_limit(x, n, padding) + 0.5).long() for x, n in zip(coords, data.shape[:0:-1], strict=True)]
    values = _lookup(data, indices, padding)
    if not data.is_floating_point():
        return values
    return torch.where(torch.isnan(coords).any(0), torch.nan, values)


# -- linear -----------------------------------------------------------------------------------------------------


def _cell(data: Tensor, start: list[Tensor], fraction: list[Tensor], padding: Padding) -> tuple[Tensor, list[Tensor]]:
    """Value (C, N) and derivatives over the cell that begins at `start`: linear along x, then y, then z."""
    dimension = len(start)
    corners: list[Tensor] = []
    for number in range(2**dimension):
        corners.append(_lookup(data, [i + (number >> k & 1) for k, i in enumerate(start)], padding))
    gradients: list[list[Tensor]] = []
    for f in fraction:
        pairs = list(zip(corners[0::2], corners[1::2], strict=True))
        gradients = [[a + (b - a) * f for a, b in zip(g[0::2], g[1::2], strict=True)] for g in gradients]
        gradients.append([b - a for a, b in pairs])
        corners = [a + (b - a) * f for a, b in pairs]
    return corners[0], [g[0] for g in gradients]


def gather(data: Tensor, coords: Tensor, padding: Padding = "border") -> Sampled:
    """`sample` in plain differentiable torch: right to any order, in forward mode too."""
    limited = [_limit(x, n, padding) for x, n in zip(coords, data.shape[:0:-1], strict=True)]
    start = [torch.floor(x.detach()).long() for x in limited]
    fraction = [x - i for x, i in zip(limited, start, strict=True)]
    value, gradient = _cell(data, start, fraction, padding)
    near = KNOT.get(coords.dtype, 1e-2)
    for k, f in enumerate(fraction):
        low = f < near
        side = [i + torch.where(low, -1, 1) if j == k else i for j, i in enumerate(start)]
        other = _cell(data, side, fraction, padding)[1][k]
        gradient[k] = torch.where(low | (f > 1 - near), (gradient[k] + other) / 2, gradient[k])
    lost = torch.isnan(coords).any(0)
    away = [(x - (n - 1) / 2).abs() <= n / 2 + near for x, n in zip(coords, data.shape[:0:-1], strict=True)]
    slope = torch.where(lost, torch.nan, torch.stack(gradient, 1))
    return Sampled(torch.where(lost, torch.nan, value), slope, torch.stack(away).all(0).to(data.dtype))


def _items(data: Tensor, coords: Tensor, div: int) -> Tensor:
    """The data item of each coordinate batch."""
    return torch.arange(coords.shape[0], device=data.device) // div % data.shape[0]


def _batched(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled:
    """`gather` over the folded batch: data (I, C, *shape), coords (B, D, N); item b of data is (b // div) % I."""
    every = torch.func.vmap(lambda d, x: gather(d, x, padding), in_dims=(None if data.shape[0] == 1 else 0, 0))
    return every(data[0] if data.shape[0] == 1 else data[_items(data, coords, div)], coords)


def _compiled(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled | None:
    """The same by the C kernel; None where it cannot serve."""
    if data.device.type != "cpu" or data.dtype not in KNOT or torch.compiler.is_compiling():
        return None
    if math.prod(data.shape[2:]) >= 2**31:  # offsets within a channel have 32 bits
        return None
    library = native.load()
    if library is None:
        return None
    data, coords = data.contiguous(), coords.contiguous()
    batch, dimension, points = coords.shape
    channels = data.shape[1]
    value = data.new_empty(batch, channels, points)
    gradient = data.new_empty(batch, channels, dimension, points)
    inside = data.new_empty(batch, points)
    kernel: Any = getattr(library, native.name(data.dtype, dimension))
    size = (ctypes.c_int64 * dimension)(*data.shape[:1:-1])
    code = {"border": 0, "reflection": 2}.get(str(padding), 1)
    try:
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (data, coords, value, gradient, inside)]
    except RuntimeError:  # no storage: batched by autograd itself, which asks for no vmap rule
        return None
    counts = [ctypes.c_int64(v) for v in (data.shape[0], channels, points, div)]
    options = (ctypes.c_int(code), ctypes.c_double(_fill(padding)), ctypes.c_double(KNOT[data.dtype]))

    def call(begin: int, end: int) -> None:
        kernel(*tensors, size, *counts, *options, ctypes.c_int64(begin), ctypes.c_int64(end))

    native.parallel(call, batch * points)
    return Sampled(value, gradient, inside)


class _Linear(torch.autograd.Function):
    """Value and gradient as outputs of one node: the derivative of the value is the saved second output, whose
    own derivative is taken through `gather` only where somebody asks for it."""

    @staticmethod
    def forward(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled:
        return _compiled(data, coords, padding, div) or _batched(data, coords, padding, div)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sampled) -> None:
        data, coords, ctx.padding, ctx.div = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(data, coords, output[1])
        ctx.save_for_forward(data, coords, output[1])

    @staticmethod
    def backward(ctx: Any, by_value: Tensor | None, by_gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        data, coords, gradient = ctx.saved_tensors
        data_wanted, coords_wanted = ctx.needs_input_grad[:2]
        to_data: Tensor | None = None
        to_coords: Tensor | None = None
        if by_value is not None and coords_wanted:
            to_coords = (
                (by_value.unsqueeze(2) * gradient).sum(1) if gradient.shape[1] > 1 else by_value * gradient[:, 0]
            )
        if data_wanted or by_gradient is not None:

            def both(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                return _batched(d, x, ctx.padding, ctx.div)[:2]

            made: Any = torch.func.vjp(both, data, coords)
            (value, slope), pull = made
            no_value, no_slope = torch.zeros_like(value), torch.zeros_like(slope)
            if data_wanted:
                to_data = pull(
                    (
                        no_value if by_value is None else by_value,
                        no_slope if by_gradient is None else by_gradient,
                    )
                )[0]
            if by_gradient is not None and coords_wanted:
                more = pull((no_value, by_gradient))[1]
                to_coords = more if to_coords is None else to_coords + more
        return to_data, to_coords, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        data, coords, gradient = ctx.saved_tensors
        d_data = torch.zeros_like(data) if tangents[0] is None else tangents[0]
        d_coords = torch.zeros_like(coords) if tangents[1] is None else tangents[1]
        # Forward mode does not nest in itself, so the slope's tangent is the transpose of its pull-back.
        made: Any = torch.func.vjp(lambda d, x: _batched(d, x, ctx.padding, ctx.div)[1], data, coords)
        slope, pull = made
        d_gradient = torch.func.vjp(pull, torch.zeros_like(slope))[1]((d_data, d_coords))[0]
        by_data = _Linear.apply(d_data, coords, _without_fill(ctx.padding), ctx.div)[0]  # type: ignore[no-untyped-call]
        return by_data + (gradient * d_coords.unsqueeze(1)).sum(2), d_gradient, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        data, coords, padding, div = args
        size = info.batch_size
        data_dim, coords_dim = in_dims[0], in_dims[1]
        coords = coords.expand(size, *coords.shape) if coords_dim is None else coords.movedim(coords_dim, 0)
        batch = coords.shape[1]
        if data_dim is not None:
            data = data.movedim(data_dim, 0)  # (V, I, C, *shape)
            if data.shape[1] == 1:
                div = batch
            elif batch != div * data.shape[1]:
                data, div = data[:, _items(data[0], coords[0], div)], 1
            data = data.reshape(-1, *data.shape[2:])
        found = _Linear.apply(data, coords.reshape(-1, *coords.shape[2:]), padding, div)  # type: ignore[no-untyped-call]
        return tuple(part.reshape(size, batch, *part.shape[1:]) for part in found), (0, 0, 0)


def _without_fill(padding: Padding) -> Padding:
    """The padding that a change of the data sees: a constant does not change."""
    return padding if isinstance(padding, str) else "zeros"


# -- cubic ------------------------------------------------------------------------------------------------------


def _cubic(data: Tensor, coords: Tensor, padding: Padding) -> Tensor:
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
        total = torch.where(torch.stack(within).all(0), total, _fill(padding))
    return torch.where(torch.isnan(coords).any(0), torch.nan, total)
