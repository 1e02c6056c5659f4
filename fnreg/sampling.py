"""Interpolation at voxel coordinates: linear, nearest and cubic, to any derivative order.

Data are `(C, [Z,] Y, X)`, coordinates are voxel indices in planar layout `(D, ...)` with x first, and values
come back as `(C, ...)`.  (World points are the business of `Image`.)

Linear interpolation computes its spatial gradient in the same pass, so that first derivatives cost no second
one: by the C kernel, or without it by `grid_sample`.  Second derivatives and forward mode go through `gather`,
written in differentiable torch.  At a knot, where the one-sided derivatives differ, the gradient is their mean.
A NaN coordinate gives NaN.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from fnreg import native
from fnreg.gather import (
    INTERPOLATIONS,
    KNOT,
    Interpolation,
    Padding,
    Sampled,
    check_padding,
    cubic,
    fill,
    gather,
    nearest,
    padding_code,
    precise,
    without_fill,
)
from fnreg.pytree import forward_levels, is_stored

# Points that `grid_sample` gets at once for each core, so that what is made on the way stays in its cache.
BLOCK = 2**16


def interpolate(
    data: Tensor, coords: Tensor, *, interpolation: Interpolation = "linear", padding: Padding = "border"
) -> Tensor:
    """Values of an image between its voxels.

    data : (C, [Z,] Y, X), floating, halves by way of float32; integers too with "nearest", which keeps them exactly
    coords : (D, ...) voxel indices, x first
    interpolation : "linear"; "nearest" (halves round up); "cubic", the interpolating cubic B-spline (mirrored at the
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
    _check(data, coords, interpolation, padding)
    kind = precise(data.dtype)
    if data.is_floating_point() and data.dtype != kind:
        return interpolate(data.to(kind), coords, interpolation=interpolation, padding=padding).to(data.dtype)
    flat = coords.reshape(coords.shape[0], -1)  # (D, N)
    if interpolation == "nearest":
        value = nearest(data, flat, padding)
    elif interpolation == "cubic":
        value = cubic(data, flat, padding)
    else:
        value = sample(data, flat, padding=padding).value
    return value.reshape(data.shape[0], *coords.shape[1:])


def sample(data: Tensor, coords: Tensor, *, padding: Padding = "border") -> Sampled:
    """Linear interpolation, its derivative by the coordinates, and what lies inside, in one pass.

    data : (C, [Z,] Y, X) floating, halves by way of float32
    coords : (D, N) voxel indices

    Value and gradient can be differentiated to any order, in reverse and in forward mode.
    """
    _check(data, coords, "linear", padding)
    kind = precise(data.dtype)
    if data.dtype != kind:
        return Sampled(*(part.to(data.dtype) for part in sample(data.to(kind), coords, padding=padding)))
    if forward_levels() > 1:  # the tangents of a Function are not differentiated forward again
        return gather(data, coords.to(data.dtype), padding)
    found = _Linear.apply(data.unsqueeze(0), coords.to(data.dtype).unsqueeze(0), padding, 1)  # type: ignore[no-untyped-call]
    return Sampled(*(part.squeeze(0) for part in found))


def _check(data: Tensor, coords: Tensor, interpolation: str, padding: Padding) -> None:
    dimension = data.ndim - 1
    if coords.ndim < 1 or coords.shape[0] != dimension or not 1 <= dimension <= 3:
        raise ValueError(
            f"data has shape {tuple(data.shape)} and coords {tuple(coords.shape)}: "
            f"expected (C, [Z,] Y, X) and one row of coords for each of its {dimension} axes"
        )
    if data.device != coords.device:
        raise ValueError(f"data are on {data.device} but coords on {coords.device}: move one to the other")
    if 0 in data.shape[1:]:
        raise ValueError(f"data have shape {tuple(data.shape)}: there is no voxel to sample")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}: choose from {', '.join(INTERPOLATIONS)}")
    check_padding(padding)
    if not data.is_floating_point():
        if interpolation != "nearest":
            raise TypeError(f"data are {data.dtype}: only 'nearest' samples integers; convert to float first")
        if not fill(padding).is_integer():
            raise ValueError(f"padding is {padding} but data are {data.dtype}: give a whole number or convert to float")


def _items(data: Tensor, coords: Tensor, div: int) -> Tensor:
    """The data item of each coordinate batch."""
    return torch.arange(coords.shape[0], device=data.device) // div % data.shape[0]


def _batched(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled:
    """`gather` over the folded batch: data (I, C, *shape), coords (B, D, N); item b of data is (b // div) % I."""
    every = torch.func.vmap(lambda d, x: gather(d, x, padding), in_dims=(None if data.shape[0] == 1 else 0, 0))
    return every(data[0] if data.shape[0] == 1 else data[_items(data, coords, div)], coords)


def _concrete(data: Tensor, coords: Tensor) -> bool:
    """Whether there are numbers to look at, in a precision that the faster ways know."""
    return data.dtype in KNOT and not torch.compiler.is_compiling() and is_stored(data, coords)


def _compiled(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled | None:
    """The same by the C kernel; None where it cannot serve."""
    if not native.serves(data, coords, voxels=math.prod(data.shape[2:])):
        return None
    data, coords = data.contiguous(), coords.contiguous()
    batch, dimension, points = coords.shape
    channels = data.shape[1]
    value = data.new_empty(batch, channels, points)
    gradient = data.new_empty(batch, channels, dimension, points)
    inside = data.new_empty(batch, points)
    counts = (data.shape[0], channels, points, div)
    options = (*padding_code(padding), KNOT[data.dtype])
    arguments = (data, coords, value, gradient, inside, data.shape[:1:-1], *counts, *options)
    native.call("", data.dtype, dimension, arguments, batch * points)
    return Sampled(value, gradient, inside)


def _by_grid_sample(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled | None:
    """The same by torch's `grid_sample` and its derivative; some points are left to `gather`: near a knot, lost, far
    away, or in constant padding.  None where it cannot serve."""
    if data.device.type not in ("cpu", "cuda"):
        return None
    # There, torch calls the derivative nondeterministic, and a graph in the making cannot ask what is left.
    if data.is_cuda and (torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()):
        return None
    batch, dimension, points = coords.shape
    items = _items(data, coords, div)
    images = data.expand(batch, *data.shape[1:]) if len(data) == 1 else data if len(data) == batch else data[items]
    value = data.new_empty(batch, data.shape[1], points)
    gradient = data.new_empty(batch, data.shape[1], dimension, points)
    inside = data.new_empty(batch, points)
    length = max(1, batch * points if data.is_cuda else BLOCK * torch.get_num_threads())
    rows = max(1, length // max(1, points))
    parts = [items.new_empty(0, 2)]
    for b, p in itertools.product(range(0, batch, rows), range(0, points, length)):
        part, where = slice(b, b + rows), slice(p, p + length)
        out = Sampled(value[part, :, where], gradient[part, ..., where], inside[part, where])
        parts.append(_block(images[part], coords[part, :, where], padding, out) + items.new_tensor([b, p]))
    several = data.transpose(0, 1).flatten(1).unflatten(1, (len(data), *data.shape[2:]))  # (C, I, *shape), copied once
    left = torch.cat(parts)
    for begin in range(0, len(left), length):
        b, p = left[begin : begin + length].unbind(1)
        exact = gather(several, coords[b, :, p].mT.contiguous(), padding, item=items[b])
        value[b, :, p] = exact.value.mT
        gradient[b, :, :, p] = exact.gradient.permute(2, 0, 1)
    return Sampled(value, gradient, inside)


def _block(images: Tensor, coords: Tensor, padding: Padding, out: Sampled) -> Tensor:
    """Fill `out` for images (B, C, *shape) at coords (B, D, N); returns the (b, p) of what is left, (M, 2)."""
    batch, dimension, points = coords.shape
    sizes = images.shape[:1:-1]
    constant = fill(padding) != 0
    mode = "border" if constant else padding if isinstance(padding, str) else "zeros"
    align = mode == "reflection"  # about the centres of the outer voxels; the others agree in both conventions
    near = KNOT[coords.dtype]
    axes = [((n - 1) / 2, n / 2 + near, max(1, n - align) / 2) for n in sizes]
    middle, edge, half = coords.new_tensor(axes).T.unsqueeze(2)  # (D, 1)

    beyond = torch.amax((coords - middle).abs_().sub_(edge), 1, out=out.inside)  # the borders, in voxels
    # Rounding on the way to the cube and back may choose the wrong side of a knot.
    slack = 2 * torch.finfo(coords.dtype).eps * max(sizes) * (5 if align else 1)
    left = ~(coords.round().sub_(coords).abs_().amin(1) > near + slack)
    reach = -0.5 - near if constant else 4.0 * max(sizes) if align else 2.0**20
    cube = (coords + (0.0 if align else 0.5)).div_(half).sub_(1.0)  # loses least in this order
    if not bool(beyond.amax() <= reach):
        left |= ~(beyond <= reach)
        cube.masked_fill_(left.unsqueeze(1), 0.0)  # torch 2.13 crashes at NaN in float64
    beyond.le_(0.0)

    if dimension == 1:  # one row of a 2-D image
        images, cube = images.unsqueeze(2), pad(cube, (0, 0, 0, 1))
    pieces = math.gcd(points, 64) if batch == 1 else 1  # `grid_sample` has one thread for each image
    images = images.expand(batch * pieces, *images.shape[1:])
    where = cube.unflatten(2, (pieces, -1)).transpose(1, 2).mT.flatten(0, 1)  # (B * pieces, N / pieces, D)
    where = where.reshape(len(where), *[1] * (where.shape[2] - 1), *where.shape[1:])
    found = grid_sample(images, where, padding_mode=mode, align_corners=align).flatten(2)
    out.value.unflatten(2, (pieces, -1)).copy_(found.unflatten(0, (batch, pieces)).transpose(1, 2))
    derivative: Any = getattr(torch.ops.aten, f"grid_sampler_{where.shape[-1]}d_backward")
    code = ("zeros", "border", "reflection").index(mode)
    ones = where.new_ones(len(where), 1, *where.shape[1:-1])
    for c in range(images.shape[1]):
        by_cube = derivative(ones, images[:, c : c + 1], where, 0, code, align, [False, True])[1]
        by_cube = by_cube.reshape(batch, pieces, -1, where.shape[-1]).permute(0, 3, 1, 2)[:, :dimension]
        torch.div(by_cube, half.unsqueeze(2), out=out.gradient[:, c].unflatten(2, (pieces, -1)))
    return left.nonzero()


class _Linear(torch.autograd.Function):
    """Value and gradient as outputs of one node: the derivative of the value is the saved second output, whose
    own derivative is taken through `gather` only where somebody asks for it."""

    @staticmethod
    def forward(data: Tensor, coords: Tensor, padding: Padding, div: int) -> Sampled:
        if _concrete(data, coords):
            found = _compiled(data, coords, padding, div) or _by_grid_sample(data, coords, padding, div)
            if found is not None:
                return found
        return _batched(data, coords, padding, div)

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
        if data_wanted and by_gradient is None and by_value is not None and not forward_levels():
            shape = tuple(data.shape[2:])
            to_data = _Spread.apply(by_value, coords, shape, data.shape[0], ctx.padding, ctx.div)  # type: ignore[no-untyped-call]
        elif data_wanted or by_gradient is not None:

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
        by_data = _Linear.apply(d_data, coords, without_fill(ctx.padding), ctx.div)[0]  # type: ignore[no-untyped-call]
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


def _spread_compiled(
    values: Tensor, coords: Tensor, shape: tuple[int, ...], items: int, padding: Padding, div: int
) -> Tensor | None:
    """`_Spread` by the C kernel; None where it cannot serve."""
    if not native.serves(values, coords, voxels=math.prod(shape)) or not is_stored(values, coords):
        return None
    batch, channels, points = values.shape
    values, coords = values.contiguous(), coords.contiguous()
    out = values.new_zeros(items, channels, *shape)
    counts = (items, channels, batch, points, div)
    arguments = (values, coords, out, shape[::-1], *counts, padding_code(padding)[0], KNOT[values.dtype])
    each = max(1, batch // items) * points
    native.call("_spread", values.dtype, len(shape), arguments, items * channels, each=each)
    return out


class _Spread(torch.autograd.Function):
    """The transpose of linear interpolation in the data: values (B, C, N) spread over the voxels (I, C, *shape)."""

    @staticmethod
    def forward(
        values: Tensor, coords: Tensor, shape: tuple[int, ...], items: int, padding: Padding, div: int
    ) -> Tensor:
        out = _spread_compiled(values, coords, shape, items, padding, div)
        if out is not None:
            return out
        zero = values.new_zeros(items, values.shape[1], *shape)
        made: Any = torch.func.vjp(lambda data: _batched(data, coords, padding, div).value, zero)
        return made[1](values)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, coords, ctx.shape, ctx.items, ctx.padding, ctx.div = inputs
        ctx.save_for_backward(values, coords)
        ctx.save_for_forward(values, coords)

    @staticmethod
    def backward(ctx: Any, by_data: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, coords = ctx.saved_tensors
        found = _Linear.apply(by_data, coords, without_fill(ctx.padding), ctx.div)  # type: ignore[no-untyped-call]
        return found[0], (values.unsqueeze(2) * found[1]).sum(1), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, coords = ctx.saved_tensors
        how = (ctx.shape, ctx.items, ctx.padding, ctx.div)
        found = values.new_zeros(ctx.items, values.shape[1], *ctx.shape)
        if tangents[1] is not None:  # the transpose of the slope, of what the coordinates change
            made: Any = torch.func.vjp(lambda data: _batched(data, coords, ctx.padding, ctx.div).gradient, found)
            found = made[1](values.unsqueeze(2) * tangents[1].unsqueeze(1))[0]
        if tangents[0] is not None:
            found = found + _Spread.apply(tangents[0], coords, *how)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        values, coords, shape, items, padding, div = args
        size = info.batch_size
        values, coords = (
            t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((values, coords), in_dims[:2], strict=True)
        )
        batch = values.shape[1]
        flat = values.reshape(-1, *values.shape[2:]), coords.reshape(-1, *coords.shape[2:])
        if items == 1 or batch == div * items:
            out = _Spread.apply(*flat, shape, size * items, padding, batch if items == 1 else div)  # type: ignore[no-untyped-call]
            return out.reshape(size, items, *out.shape[1:]), 0
        each = _Spread.apply(*flat, shape, size * batch, padding, 1).reshape(size, batch, -1, *shape)  # type: ignore[no-untyped-call]
        which = torch.arange(batch, device=values.device) // div % items
        return each.new_zeros(size, items, *each.shape[2:]).index_add(1, which, each), 0
