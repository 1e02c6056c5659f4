"""The flow of a stationary velocity by scaling and squaring, with its derivative, as one differentiable function.

Written as compositions it is a dozen small nodes for torch to follow, which on small images takes longer than to
compute them.  Here the squarings and their pull-backs run one after another in C.  Second derivatives, forward mode and
machines without a compiler take the compositions; `fields.exp_shift` chooses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnreg import native
from fnreg.grid import index_points
from fnreg.pytree import forward_levels
from fnreg.sampling import KNOT

Plain = Callable[[Tensor], Tensor]  # the same by compositions, for one field


def flow(velocity: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor | None:
    """The shift (D, [Z,] Y, X) at time one, in voxels; None where there is no kernel or another derivative is asked."""
    dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    if velocity.device.type != "cpu" or velocity.dtype not in KNOT or torch.compiler.is_compiling() or dual:
        return None
    if native.load() is None or forward_levels() or not 2 <= velocity.ndim <= 4:
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

    def compose(self, field: Tensor, scale: float, add: bool) -> Tensor:
        """add u(i) + u(i + scale u(i)), (B, D, *shape)."""
        out = torch.empty_like(field)
        tensors = [ctypes.c_void_p(t.data_ptr()) for t in (field, self.index, out)]
        options = (ctypes.c_int64(self.points), ctypes.c_double(scale), ctypes.c_int(add), self.near)

        def call(begin: int, end: int) -> None:
            self.forward(*tensors, self.size, *options, ctypes.c_int64(begin), ctypes.c_int64(end))

        native.parallel(call, self.batch * self.points)
        return out

    def pull(self, field: Tensor, cotangent: Tensor, scale: float, add: bool) -> Tensor:
        """The pull-back of `compose` at a field."""
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
        fields.append(kernels.compose(fields[-1], 0.5, add=False))
    for _ in range(steps):
        fields.append(kernels.compose(fields[-1], 1.0, add=True))
    return fields


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
        found = _Pull.apply(by_flow, velocity, fields, ctx.steps, ctx.midpoint, ctx.plain)  # type: ignore[no-untyped-call]
        return found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
        found = _Flow.apply(folded, *args[1:])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0)


class _Pull(torch.autograd.Function):
    """The pull-back of `_Flow`, linear in the cotangent; its own derivatives are those of the compositions."""

    @staticmethod
    def forward(by_flow: Tensor, velocity: Tensor, fields: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor:
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
        def pulled(cotangent: Tensor, velocity: Tensor) -> Tensor:
            made: Any = torch.func.vjp(torch.func.vmap(ctx.plain), velocity)
            return made[1](cotangent)[0]

        made: Any = torch.func.vjp(pulled, *ctx.saved_tensors)
        return (*made[1](by_found), None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        folded = [
            (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
            for t, dim in zip(args[:3], in_dims[:3], strict=True)
        ]
        return _Pull.apply(*folded, *args[3:]).unflatten(0, (size, -1)), 0  # type: ignore[no-untyped-call]
