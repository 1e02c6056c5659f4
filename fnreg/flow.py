"""Compositions in C: of two shifts, and of many for the flow of a stationary velocity by scaling and squaring.

Composed of samplings a flow is a dozen small nodes for torch to follow, which on small images takes longer than to
compute them; here the squarings and their pull-backs run one after another.  Forward mode and machines without a
compiler take the samplings; `fields` chooses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnreg import native
from fnreg.gather import KNOT
from fnreg.grid import index_points
from fnreg.pytree import constant, fold, forward_asked, forward_levels, is_differentiated, is_stored, leading
from fnreg.sampling import _Linear, sample  # pyright: ignore[reportPrivateUsage]

Plain = Callable[[Tensor], Tensor]  # the same by compositions, for one field


def _serves(shift: Tensor) -> bool:
    """Whether there is a kernel, and no forward derivative is asked."""
    field = 2 <= shift.ndim <= 4 and shift.shape[0] == shift.ndim - 1
    return field and native.serves(shift, voxels=math.prod(shift.shape[1:])) and not forward_asked()


def compose(
    first: Tensor, second: Tensor, *, matrix: Tensor | None = None, scale: Tensor | None = None
) -> Tensor | None:
    """matrix first(i) + second(i + scale first(i)), first a shift, both (D, [Z,] Y, X); None where the kernel does not
    serve.  The matrix (D, D) and the scale are one where they are not given."""
    alike = first.device == second.device and first.dtype == second.dtype and first.shape == second.shape
    if not alike or not _serves(first):
        return None
    matrix = _one(len(first), first.dtype) if matrix is None else matrix.to(first.dtype)
    scale = _one(0, first.dtype) if scale is None else scale.to(first.dtype)
    given = (t.unsqueeze(0) for t in (first, second, matrix, scale))
    return _Compose.apply(*given).squeeze(0)  # type: ignore[no-untyped-call]


@constant
def _one(dimension: int, dtype: torch.dtype) -> Tensor:
    """One, and the matrix of one."""
    return torch.eye(dimension, dtype=dtype, device="cpu") if dimension else torch.ones((), dtype=dtype, device="cpu")


def flow(velocity: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor | None:
    """The shift (D, [Z,] Y, X) at time one, in voxels; None where the kernel does not serve."""
    if not _serves(velocity):
        return None
    asked = is_differentiated(velocity)
    return _Flow.apply(velocity.unsqueeze(0), steps, midpoint, plain, asked)[0].squeeze(0)  # type: ignore[no-untyped-call]


def _geometry(like: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """Voxel indices, size and number of voxels of fields (B, D, *shape)."""
    size = tuple(like.shape[:1:-1])
    return index_points(size, like.dtype, like.device), size, math.prod(size)


def _composed(first: Tensor, second: Tensor, out: Tensor, matrix: Tensor | None, scale: Tensor) -> None:
    """out = matrix u(i) + v(i + scale u(i)) of contiguous fields (B, D, *shape).

    matrix, scale : (B, D, D) and (B,), or with a batch axis of 1 for all; no matrix is that of zeros
    """
    index, size, points = _geometry(first)
    matrix = None if matrix is None else matrix.contiguous()
    arguments = (first, second, index, out, matrix, scale.contiguous(), size, points, len(scale), KNOT[first.dtype])
    native.call("_compose", first.dtype, first.shape[1], arguments, first.shape[0] * points)


def _pulled_once(field: Tensor, cotangent: Tensor, scale: float, add: bool) -> Tensor:
    """The pull-back of `_composed` of a field with itself."""
    index, size, points = _geometry(field)
    batch, dimension = field.shape[:2]
    parts = dimension if batch < torch.get_num_threads() else 1
    out = field.new_empty(batch, parts, *field.shape[1:])
    arguments = (field, index, cotangent, out, size, points, parts, scale, add, KNOT[field.dtype])
    native.call("_compose_back", field.dtype, dimension, arguments, batch * parts, each=points)
    return out.squeeze(1) if parts == 1 else out.sum(1)


class _Compose(torch.autograd.Function):
    """`_composed` for fields (B, D, *shape); its derivatives go through `sample`'s."""

    @staticmethod
    def forward(first: Tensor, second: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
        first, second = first.contiguous(), second.contiguous()
        found = torch.empty_like(first)
        _composed(first, second, found, matrix, scale)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        def plain(first: Tensor, second: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
            index = index_points(tuple(first.shape[:0:-1]), first.dtype, first.device)[:-1]
            flat = first.flatten(1)
            return (matrix @ flat + sample(second, index + scale * flat).value).reshape(first.shape)

        first, second, *given = ctx.saved_tensors
        if any(ctx.needs_input_grad[2:]):
            made: Any = torch.func.vjp(torch.func.vmap(plain), first, second, *given)
            return made[1](by_found)
        made = torch.func.vjp(lambda u, v: torch.func.vmap(plain)(u, v, *given), first, second)
        return (*made[1](by_found), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        lead = leading(args[0], in_dims[0])
        folded = [fold(info.batch_size, dim, t, lead) for t, dim in zip(args, in_dims, strict=True)]
        return _Compose.apply(*folded).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


class _Flow(torch.autograd.Function):
    """velocity (B, D, *shape) -> its flow, and the fields on the way as a second output that is only for backward.

    Where no derivative can be asked two fields serve in turn: of a large volume that saves most of the memory.
    """

    @staticmethod
    def forward(velocity: Tensor, steps: int, midpoint: bool, plain: Plain, asked: bool) -> tuple[Tensor, Tensor]:
        count = steps + midpoint
        before = velocity.new_empty(count if asked else 0, *velocity.shape)
        ends = torch.empty_like(velocity, memory_format=torch.contiguous_format)
        if asked:
            places = [*before, ends]
        else:
            other = torch.empty_like(ends) if count else ends
            places = [ends if (count - number) % 2 == 0 else other for number in range(count + 1)]
        torch.div(velocity, 2**steps, out=places[0])
        matrix, one = _one(velocity.shape[1], velocity.dtype)[None], _one(0, velocity.dtype)[None]
        for number, (field, composed) in enumerate(itertools.pairwise(places)):
            first = midpoint and number == 0
            _composed(field, field, composed, None if first else matrix, one / 2 if first else one)
        return ends, before.movedim(0, 1)  # (B, D, ...), (B, K, D, ...)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        velocity, ctx.steps, ctx.midpoint, ctx.plain, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(velocity, output[1])

    @staticmethod
    def backward(ctx: Any, by_flow: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        velocity, fields = ctx.saved_tensors
        if forward_levels():
            return _pulled(ctx.plain, by_flow, velocity), None, None, None, None
        found = _Pull.apply(by_flow, velocity, fields, ctx.steps, ctx.midpoint, ctx.plain)  # type: ignore[no-untyped-call]
        return found, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
        found = _Flow.apply(folded, *args[1:])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0)


def _pulled(plain: Plain, cotangent: Tensor, velocity: Tensor) -> Tensor:
    """What `_Pull` computes, by the samplings."""
    made: Any = torch.func.vjp(torch.func.vmap(plain), velocity)
    return made[1](cotangent)[0]


def _pushed(fields: Tensor, tangent: Tensor, steps: int, midpoint: bool) -> Tensor:
    """What a change of the velocity (B, D, *shape) changes of its flow, to first order; fields : those on the way."""
    index = index_points(tuple(tangent.shape[:1:-1]), tangent.dtype, tangent.device)[:-1]
    found = tangent.flatten(2) / 2**steps  # (B, D, N)
    for number, field in enumerate(fields.unbind(1)):
        first = midpoint and number == 0
        coords = index + field.flatten(2) * (0.5 if first else 1.0)
        both = torch.cat([field, found.unflatten(2, field.shape[2:])], 1)
        value, slope, _ = _Linear.apply(both, coords, "border", 1)  # type: ignore[no-untyped-call]
        across = (slope[:, : field.shape[1]] * found.unsqueeze(1)).sum(2)
        ahead = value[:, field.shape[1] :]
        found = ahead + across / 2 if first else found + ahead + across
    return found.unflatten(2, fields.shape[3:])


class _Pull(torch.autograd.Function):
    """The pull-back of `_Flow`, linear in the cotangent; its own derivatives are those of the compositions."""

    @staticmethod
    def forward(by_flow: Tensor, velocity: Tensor, fields: Tensor, steps: int, midpoint: bool, plain: Plain) -> Tensor:
        if not is_stored(by_flow, velocity, fields):
            return _pulled(plain, by_flow, velocity)
        found = by_flow.contiguous()
        before = fields.movedim(1, 0).contiguous().unbind(0)
        for number, field in reversed(list(enumerate(before))):
            first = midpoint and number == 0
            found = _pulled_once(field, found, 0.5 if first else 1.0, add=not first)
        return found / 2**steps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        by_flow, velocity, fields, ctx.steps, ctx.midpoint, ctx.plain = inputs
        ctx.save_for_backward(by_flow, velocity, fields)

    @staticmethod
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_flow, velocity, fields = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:  # linear in the cotangent, and the transpose of a pull-back is the push
            return _pushed(fields, by_found, ctx.steps, ctx.midpoint), None, None, None, None, None
        made: Any = torch.func.vjp(functools.partial(_pulled, ctx.plain), by_flow, velocity)
        return (*made[1](by_found), None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        lead = leading(args[0], in_dims[0])
        folded = [fold(info.batch_size, dim, t, lead) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
        return _Pull.apply(*folded, *args[3:]).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]
