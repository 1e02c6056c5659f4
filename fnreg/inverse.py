"""The inverse of a map of voxels, found voxel by voxel, and its derivatives.

Shifts are as in `fnreg.fields`: voxels along a grid's own axes, linear in between and constant beyond the border.  That
map has a kink between any two cells of voxels: Newton's method, which knows the slope on one side, may look across one
for ever.  So the search begins near the end, from what the voxels themselves map to, and a voxel that is stuck begins
again nearby.  No voxel looks at another, and those that have arrived are left out.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.derivatives import cross, dot
from fnreg.gather import Sampled
from fnreg.grid import index_points
from fnreg.pytree import constant
from fnreg.sampling import sample

BLOCK = 2**18  # voxels whose inverse is found at once
TOGETHER = 8  # iterations after which voxels that have arrived are left out
SHORTEST = 1 / 8  # of a step of Newton's method: a voxel that it brings no nearer is stuck
SHARPNESS = 6  # of the weights by which the nearest of several starts counts


class Inverse(NamedTuple):
    """An inverse w of a field u."""

    field: Tensor  # (D, [Z,] Y, X), of the kind that was given
    residual: Tensor  # largest |w(i) + u(i + w(i))| in voxels


def invert_shift(shift: Tensor, *, iterations: int = 50) -> Inverse:
    """The shift w with w(i) + u(i + w(i)) = 0, and what is left of that.

    The first iteration is a look at the start: near i + u(i) the inverse is -u(i), and gaps are filled from coarser
    grids.  The others are of Newton's method, w <- w - (I + Du(i + w))^-1 (w + u(i + w)), with the derivative that the
    sampler gives along with the value; a step that brings a voxel no nearer is halved, and after three of those the
    voxel begins again one voxel aside, on each diagonal in turn and further each round.  What is returned is the
    nearest seen, so the residual never grows with the iterations.  After eight only those voxels go on that have not
    yet arrived, so many iterations cost little.

    A small residual says that something maps to every voxel, as it does under any continuous map of this kind, and
    nothing about folds: where the map folds there are several such places, and one of them is found.

    Derivatives by the shift are those of the implicit function theorem, to any order and in forward mode.
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}: expected 0 or more")
    field, residual = _Inverted.apply(shift.unsqueeze(0), iterations)  # type: ignore[no-untyped-call]
    return Inverse(field.squeeze(0), residual.squeeze(0))


def index_of(shift: Tensor) -> Tensor:
    """Indices of the voxels, (D, N)."""
    return index_points(tuple(shift.shape[:0:-1]), shift.dtype, shift.device)[:-1]


def after(first: Tensor, second: Tensor) -> Sampled:
    """`second` at i + first(i): value (D, N) and gradient (D, D, N)."""
    return sample(second, index_of(first) + first.flatten(1))


# -- where to begin -----------------------------------------------------------------------------------------------


def _start(shift: Tensor) -> Tensor:
    """Minus the shift of the voxel that maps nearest to each voxel, (D, N); in between, of those around."""
    index, moves = index_of(shift), shift.flatten(1)
    ends = index + moves
    last = index[:, -1:]
    nearest = ends.nan_to_num().round()
    inside = ((nearest >= 0) & (nearest <= last)).all(0)
    strides = itertools.accumulate(shift.shape[:1:-1], lambda a, b: a * b, initial=1)
    place = torch.zeros_like(inside, dtype=torch.int64)
    for at, stride in zip(torch.minimum(nearest, last).clamp(min=0).long(), strides, strict=False):
        place = place + stride * at
    weight = ((ends - nearest).square().sum(0) + 0.01).pow(-SHARPNESS)
    weight = torch.where(inside, weight, 0)
    heap = torch.cat([-moves * weight, weight[None]])
    heap = torch.zeros_like(heap).index_add(1, place, torch.where(inside, heap, 0))
    return _filled(heap.reshape(-1, *shift.shape[1:])).flatten(1)


def _filled(heap: Tensor) -> Tensor:
    """Weighted sums (D, ...) over their weights, the last channel; where that is 0, as of a grid half as fine."""
    known = heap[-1:] > 0
    value = torch.where(known, heap[:-1] / torch.where(known, heap[-1:], 1), 0)
    if value[0].numel() == 1:
        return value
    coarse = torch.cat([value, known.to(value.dtype)])
    for axis in range(1, coarse.ndim):
        if coarse.shape[axis] % 2:
            coarse = torch.cat([coarse, torch.zeros_like(coarse.narrow(axis, 0, 1))], axis)
        coarse = coarse.unflatten(axis, (-1, 2)).sum(axis + 1)
    coarse = _filled(coarse)
    for axis in range(1, coarse.ndim):
        coarse = coarse.repeat_interleave(2, axis).narrow(axis, 0, heap.shape[axis])
    return torch.where(known, value, coarse)


# -- the search ---------------------------------------------------------------------------------------------------


class _Search(NamedTuple):
    """Where the search for some voxels (N,) of one field is."""

    voxels: Tensor  # (D, N) their indices
    now: Tensor  # (D, N) w
    step: Tensor  # (D, N) of Newton's method there
    size: Tensor  # (N,) square of what is left there
    length: Tensor  # (N,) part of the step to take
    best: Tensor  # (D, N) the nearest w seen
    error: Tensor  # (D, N) what is left of it
    least: Tensor  # (N,) its square
    restarts: Tensor  # (N,) how often the voxel was stuck


def _look(shift: Tensor, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's step from w, and what is left there with its square."""
    value, gradient, _ = sample(shift, index + w)
    error = w + value
    step = _solve(gradient, error)
    return torch.where(step.isfinite(), step, error), error, error.square().sum(0)


def _begin(index: Tensor, shift: Tensor) -> _Search:
    """At the identity."""
    zero = torch.zeros_like(index)
    step, error, size = _look(shift, index, zero)
    return _Search(index, zero, step, size, torch.ones_like(size), zero, error, size, torch.zeros_like(size))


def _advance(shift: Tensor, search: _Search, start: Tensor | None = None) -> _Search:
    """One iteration of every voxel."""
    index, now, step, size, length, best, error, least, restarts = search
    stuck = length < SHORTEST
    if start is None:
        ways = _diagonals(len(index), index.dtype, index.device)
        turn = torch.remainder(restarts, ways.shape[1] + 1).long()
        far = 1 + torch.div(restarts, ways.shape[1] + 1, rounding_mode="floor")
        aside = torch.where(turn > 0, far * ways.index_select(1, (turn - 1).clamp(min=0)), -error)
        tried = torch.where(stuck, best + aside, now - length * step)
    else:
        tried = start
    tried_step, tried_error, tried_size = _look(shift, index, tried)
    taken = stuck | ~(tried_size >= size)  # NaN comes through
    now, step = torch.where(taken, tried, now), torch.where(taken, tried_step, step)
    size, length = torch.where(taken, tried_size, size), torch.where(taken, 1, length / 2)
    nearer = ~(size >= least)
    best, least = torch.where(nearer, now, best), torch.where(nearer, size, least)
    error = torch.where(nearer, tried_error, error)
    return _Search(index, now, step, size, length, best, error, least, restarts + stuck)


@constant
def _diagonals(dimension: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The directions to the corners of a cube, (D, 2^D)."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dimension)), dtype=dtype, device=device).mT


def _arrived(search: _Search, shift: Tensor) -> Tensor:
    """Whether what is left is rounding of the voxels' indices, or no number."""
    rounding = 4 * torch.finfo(shift.dtype).eps * max(shift.shape[1:])
    return ~(search.least > rounding**2)


def _search(shift: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Inverses (B, D, N) and largest residuals (B,) of shifts (B, D, ...)."""
    vmap = torch.func.vmap
    start = vmap(_start)(shift) if iterations else None
    inverses: list[Tensor] = []
    residuals: list[Tensor] = []
    done = 0
    for index in index_of(shift[0]).split(BLOCK, dim=1):  # a block of voxels at once needs less memory
        search = vmap(functools.partial(_begin, index))(shift)
        for number in range(min(iterations, TOGETHER)):
            given = () if number or start is None else (start.narrow(-1, done, index.shape[1]),)
            search = vmap(_advance)(shift, search, *given)
        best, least = search.best, search.least
        if iterations > TOGETHER:
            found = [
                _alone(*each, iterations - TOGETHER) for each in zip(shift, zip(*search, strict=True), strict=True)
            ]
            best, least = (torch.stack(parts) for parts in zip(*found, strict=True))
        inverses.append(best)
        residuals.append(least.amax(1))
        done += index.shape[1]
    return torch.cat(inverses, 2), torch.stack(residuals).amax(0).sqrt()


def _alone(shift: Tensor, parts: Any, iterations: int) -> tuple[Tensor, Tensor]:
    """The best (D, N) and least (N,) after more iterations of the voxels of one field that have not arrived."""
    search = _Search(*parts)
    best, least = search.best, search.least
    place: Tensor | None = None
    for _ in range(iterations):
        going = (~_arrived(search, shift)).nonzero().squeeze(1)
        if not len(going):
            break
        if len(going) < len(search.size):
            search = _Search(*(part.index_select(-1, going) for part in search))
            place = going if place is None else place[going]
        search = _advance(shift, search)
        if place is None:
            best, least = search.best, search.least
        else:
            best, least = best.index_copy(1, place, search.best), least.index_copy(0, place, search.least)
    return best, least


# -- derivatives --------------------------------------------------------------------------------------------------


class _Inverted(torch.autograd.Function):
    """w with w + u(i + w) = 0 for fields (B, D, ...), so dw = -(I + Du(i + w))^-1 du(i + w)."""

    @staticmethod
    def forward(shift: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        inverse, residual = _search(shift, iterations)
        return inverse.reshape(shift.shape), residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, by_inverse: Tensor, _: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        shift, inverse = ctx.saved_tensors
        return torch.func.vmap(_pulled)(shift, inverse, by_inverse), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        shift, inverse = ctx.saved_tensors
        return torch.func.vmap(_pushed)(shift, inverse, tangents[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
        found = _Inverted.apply(folded, args[1])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0)


def _pulled(shift: Tensor, inverse: Tensor, by_inverse: Tensor) -> Tensor:
    gradient = after(inverse, shift).gradient
    pulled = -_solve(gradient.transpose(0, 1), by_inverse.flatten(1))
    made: Any = torch.func.vjp(lambda u: after(inverse, u).value, shift)
    return made[1](pulled)[0]


def _pushed(shift: Tensor, inverse: Tensor, tangent: Tensor) -> Tensor:
    gradient = after(inverse, shift).gradient
    return -_solve(gradient, after(inverse, tangent).value).reshape(shift.shape)


def _solve(slope: Tensor, right: Tensor) -> Tensor:
    """(I + G)^-1 b for G (D, D, N) and b (D, N), by Cramer's rule."""
    matrix = [list(row.unbind(0)) for row in slope.unbind(0)]  # G[c][k] is the derivative of component c by x_k
    for k, row in enumerate(matrix):
        row[k] = row[k] + 1
    if len(matrix) == 1:
        return right / matrix[0][0]
    if len(matrix) == 2:
        (a, b), (c, d), (x, y) = *matrix, right.unbind(0)
        return torch.stack([d * x - b * y, a * y - c * x]) / (a * d - b * c)
    columns = [cross(matrix[k - 2], matrix[k - 1]) for k in range(3)]
    det = dot(matrix[0], columns[0])
    return torch.stack([dot(row, right) for row in zip(*columns, strict=True)]) / det
