"""Compositions in C: of two shifts, and of many for the flow of a stationary velocity by scaling and squaring.

Composed of samplings a flow is a dozen small nodes for torch to follow, which on small images takes longer than to
compute them; here the squarings and their pull-backs run one after another.  Forward mode and machines without a
compiler take the samplings; `fields` chooses.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnreg import native
from fnreg.grid import index_points
from fnreg.pytree import forward_levels
from fnreg.sampling import KNOT, is_stored, sample

Plain = Callable[[Tensor], Tensor]  # the same by compositions, for one field


def _serves(shift: Tensor) -> bool:
    """Whether there is a kernel, and no forward derivative is asked."""
    dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    if shift.device.type != "cpu" or shift.dtype not in KNOT or torch.compiler.is_compiling() or dual:
        return False
    fits = 2 <= shift.ndim <= 4 and shift.shape[0] == shift.ndim - 1 and 0 < math.prod(shift.shape[1:]) < 2**31
    return fits and native.load() is not None and not forward_levels()


def compose(first: Tensor, second: Tensor) -> Tensor | None:
    """first(i) + second(i + first(i)) of shifts (D, [Z,] Y, X); None where the kernel does not serve."""
    if (
        not _serves(first)
        or first.device != second.device
        or first.dtype != second.dtype
        or first.shape != second.shape
    ):
        return None
    return _Compose.apply(first.unsqueeze(0), second.unsqueeze(0)).squeeze(0)  # type: ignore[no-untyped-call]


def flow(velocity: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor | None:
    """The shift (D, [Z,] Y, X) at time one, in voxels; None where the kernel does not serve."""
    if not _serves(velocity):
        return None
    return _Flow.apply(velocity.unsqueeze(0), steps, midpoint, plain)[0].squeeze(0)  # type: ignore[no-untyped-call]


class _Kernels:
    """The kernels for fields (B, D, *shape) of one shape."""

    def __init__(self, like: Tensor) -> None:
        dimension, library = like.shape[1], native.load()
        assert library is not None
        name = native.name(like.dtype, dimension)
        self.forward: Any = getattr(library, name + "_compose")
        self.backward: Any = getattr(library, name + "_compose_back")
        self.index = index_points(tuple(like.shape[:1:-1]), like.dtype, like.device)
        self.batch, self.points = like.shape[0], self.index.shape[1]
        self.size = (ctypes.c_int64 * dimension)(*like.shape[:1:-1])
        self.near = ctypes.c_double(KNOT[like.dtype])

    def compose(self, first: Tensor, second: Tensor, scale: float, add: bool) -> Tensor:
        """add u(i) + v(i + scale u(i)) of contiguous fields (B, D, *shape)."""
        out = torch.empty_like(first)
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (first, second, self.index, out)]
        options = (ctypes.c_int64(self.points), ctypes.c_double(scale), ctypes.c_int(add), self.near)

        def call(begin: int, end: int) -> None:
            self.forward(*tensors, self.size, *options, ctypes.c_int64(begin), ctypes.c_int64(end))

        native.parallel(call, self.batch * self.points)
        return out

    def pull(self, field: Tensor, cotangent: Tensor, scale: float, add: bool) -> Tensor:
        """The pull-back of `compose` of a field with itself."""
        parts = field.shape[1] if self.batch < torch.get_num_threads() else 1
        out = field.new_empty(self.batch, parts, *field.shape[1:])
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (field, self.index, cotangent, out)]
        counts = (ctypes.c_int64(self.points), ctypes.c_int64(parts))
        options = (ctypes.c_double(scale), ctypes.c_int(add), self.near)

        def call(begin: int, end: int) -> None:
            self.backward(*tensors, self.size, *counts, *options, ctypes.c_int64(begin), ctypes.c_int64(end))

        native.parallel(call, self.batch * parts, each=self.points)
        return out.squeeze(1) if parts == 1 else out.sum(1)


def _squared(velocity: Tensor, steps: int, midpoint: bool) -> list[Tensor]:
    """All fields on the way, the scaled velocity first and the flow last."""
    kernels = _Kernels(velocity)
    fields = [velocity.contiguous() / 2**steps]
    if midpoint:
        fields.append(kernels.compose(fields[-1], fields[-1], 0.5, add=False))
    for _ in range(steps):
        fields.append(kernels.compose(fields[-1], fields[-1], 1.0, add=True))
    return fields


def _folded(size: int, dim: int | None, tensor: Tensor) -> Tensor:
    """A batch axis of vmap folded into the leading one."""
    return (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)


class _Compose(torch.autograd.Function):
    """`_Kernels.compose` for fields (B, D, *shape); its derivatives go through `sample`'s."""

    @staticmethod
    def forward(first: Tensor, second: Tensor) -> Tensor:
        return _Kernels(first).compose(first.contiguous(), second.contiguous(), 1.0, add=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        def plain(first: Tensor, second: Tensor) -> Tensor:
            index = index_points(tuple(first.shape[:0:-1]), first.dtype, first.device)[:-1]
            return first + sample(second, index + first.flatten(1)).value.reshape(first.shape)

        made: Any = torch.func.vjp(torch.func.vmap(plain), *ctx.saved_tensors)
        return made[1](by_found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = [_folded(info.batch_size, dim, t) for t, dim in zip(args, in_dims, strict=True)]
        return _Compose.apply(*folded).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


class _Flow(torch.autograd.Function):
    """velocity (B, D, *shape) -> its flow, and the fields on the way as a second output that is only for backward."""

    @staticmethod
    def forward(velocity: Tensor, steps: int, midpoint: bool, plain: Plain) -> tuple[Tensor, Tensor]:
        fields = _squared(velocity, steps, midpoint)
        before = torch.stack(fields[:-1]) if len(fields) > 1 else velocity.new_empty(0, *velocity.shape)
        return fields[-1], before.movedim(0, 1)  # (B, D, ...), (B, K, D, ...)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        velocity, ctx.steps, ctx.midpoint, ctx.plain = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(velocity, output[1])

    @staticmethod
    def backward(ctx: Any, by_flow: Tensor, _: Any) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        velocity, fields = ctx.saved_tensors
        if forward_levels():
            return _pulled(ctx.plain, by_flow, velocity), None, None, None
        found = _Pull.apply(by_flow, velocity, fields, ctx.steps, ctx.midpoint, ctx.plain)  # type: ignore[no-untyped-call]
        return found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
        found = _Flow.apply(folded, *args[1:])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0)


def _pulled(plain: Plain, cotangent: Tensor, velocity: Tensor) -> Tensor:
    """What `_Pull` computes, by the samplings."""
    made: Any = torch.func.vjp(torch.func.vmap(plain), velocity)
    return made[1](cotangent)[0]


class _Pull(torch.autograd.Function):
    """The pull-back of `_Flow`, linear in the cotangent; its own derivatives are those of the compositions."""

    @staticmethod
    def forward(by_flow: Tensor, velocity: Tensor, fields: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor:
        if not is_stored(by_flow, velocity, fields):
            return _pulled(plain, by_flow, velocity)
        kernels, found = _Kernels(velocity), by_flow.contiguous()
        before = fields.movedim(1, 0).contiguous().unbind(0)
        for number, field in reversed(list(enumerate(before))):
            first = midpoint and number == 0
            found = kernels.pull(field, found, 0.5 if first else 1.0, add=not first)
        return found / 2**steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        by_flow, velocity, _, ctx.steps, ctx.midpoint, ctx.plain = inputs
        ctx.save_for_backward(by_flow, velocity)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        made: Any = torch.func.vjp(functools.partial(_pulled, ctx.plain), *ctx.saved_tensors)
        return (*made[1](by_found), None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = [_folded(info.batch_size, dim, t) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
        return _Pull.apply(*folded, *args[3:]).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]
