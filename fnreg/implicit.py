"""The derivative of an optimum by what it is the optimum of, whatever found it.

At the solution p of a level the gradient by the step vanishes, g(p, x) = d/ds E(perturb(p, s), x) = 0 at s = 0, for
all data x nearby.  So a change of the data moves the solution by the step

    ds = -H^{-1} (dg/dx) dx,    H = d^2/ds^2 E(perturb(p, s), x)    at s = 0,

and the parameters by the derivative of retract(p, s) at s = 0.  H is never formed: conjugate gradients ask for its
products with steps only, which are derivatives of g.  All is in the tangent at the solution, so rotations are as any
other parameter.  Everything has the leading batch axis of the level; pairs have Hessians of their own.

Krantz and Parks 2013, The Implicit Function Theorem, doi 10.1007/978-1-4614-5981-1; Blondel et al. 2022,
arXiv 2105.15183.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from fnreg.lengths import rows
from fnreg.notes import warn
from fnreg.problem import Level
from fnreg.pytree import tree_flatten, tree_known, tree_leaves, tree_map, tree_unflatten
from fnreg.solvers.base import joined, parted
from fnreg.solvers.conjugate import conjugate_gradients, dot
from fnreg.symmetric import BothWays

Leaves = Sequence[Tensor]
Product = Callable[[Any], Any]


class NoOptimumError(ValueError):
    """A registration cannot be differentiated implicitly where it ended, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How products with the inverse of H + ridge are found: up to a relative residual, in at most so many products."""

    ridge: float = 0.0
    tolerance: float = 1e-6
    iterations: int = 500


class Found(NamedTuple):
    """The solution of a linear system, per pair (B,)."""

    step: Any  # (B, ...)
    residual: Tensor  # |(H + ridge) step - b| / |b|
    straight: Tensor  # bool: along all directions that were tried the objective bends up
    curvature: Tensor  # the least s^T (H + ridge) s / s^T s among these
    products: int


def solve(product: Product, right: Any, search: Search) -> Found:
    """x with H x = b for every pair, leaves (B, ...); `product` is H of a tree of steps, positive definite."""
    least: list[Tensor] = []

    def of_rows(rows: Tensor) -> Tensor:
        image = joined(product(parted(rows, right))).double()
        size = dot(rows, rows)
        least.append(torch.where(size > 0, dot(rows, image) / torch.where(size > 0, size, 1), torch.inf))
        return image

    rows = joined(right).double()
    found = conjugate_gradients(of_rows, rows, tolerance=search.tolerance, iterations=search.iterations)
    start, left = dot(rows, rows), dot(found.residual, found.residual)
    residual = (left / torch.where(start > 0, start, 1)).sqrt()
    curvature = torch.stack(least).amin(0) if least else torch.full_like(start, torch.inf)
    return Found(parted(found.x, right), residual, ~found.curved, curvature, len(least))


# -- the condition -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """That the gradient of a level by the step vanishes: g(params, data) = 0.

    shell : the level without its tensors; structure : of these, the data
    """

    shell: Level | BothWays
    structure: Any

    @staticmethod
    def of(problem: Level | BothWays) -> tuple[Condition, list[Tensor]]:
        """The condition of a level, and its data."""
        data, structure = tree_flatten(problem.data)
        return Condition(problem.with_data(tree_unflatten([None] * len(data), structure)), structure), data

    def problem(self, data: Leaves) -> Level | BothWays:
        """The level with these data."""
        return self.shell.with_data(tree_unflatten(list(data), self.structure))

    def gradient(self, params: Any, data: Leaves) -> Any:
        """g: by the step (B, ...)."""
        return self.problem(data).gradient(params)[0]

    def product(self, params: Any, data: Leaves, ridge: float = 0.0) -> Product:
        """The product of H + ridge with steps, from one recording of the gradient."""
        bent = self.problem(data).curvature(params, exact=True)
        return lambda step: tree_map(lambda a, b: a + ridge * b, bent(step), step)


# -- functions with derivatives ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What `optimum` and its derivatives share.

    structure : of the parameters; steps : of a step
    alone : there is one pair, and where its equations have no solution that is an error; in a batch it is NaN
    """

    condition: Condition
    search: Search
    structure: Any
    steps: Any
    alone: bool

    def split(self, tensors: Leaves, *, step: bool = False) -> tuple[Any, Any, list[Tensor]]:
        """The step where there is one, the parameters and the data."""
        first = self.steps.num_leaves if step else 0
        second = first + self.structure.num_leaves
        begin = tree_unflatten(tensors[:first], self.steps) if step else None
        return begin, tree_unflatten(tensors[first:second], self.structure), list(tensors[second:])


def optimum(condition: Condition, params: Any, data: Leaves, good: Tensor, *, search: Search, alone: bool) -> Any:
    """The parameters (B, ...), as a function of the data.

    good : (B,) the pairs that have a derivative; that of any other is NaN
    """
    leaves, structure = tree_flatten(tree_map(Tensor.detach, params))
    problem = Problem(condition, search, structure, tree_flatten(condition.problem(data).zero_step())[1], alone)
    return tree_unflatten(list(_Optimum.apply(problem, good, *leaves, *data)), structure)  # type: ignore[no-untyped-call]


def _spread(by_needed: Sequence[Tensor], needed: Sequence[int], count: int) -> list[Tensor | None]:
    """Cotangents of all inputs from those of some."""
    known = dict(zip(needed, by_needed, strict=True))
    return [known.get(n) for n in range(count)]


def _needed(ctx: Any, tensors: Leaves, begin: int) -> list[int]:
    """The places of floating tensors by which a derivative is asked for, of the inputs from `begin` on."""
    return [n for n, t in enumerate(tensors) if ctx.needs_input_grad[begin + n] and t.is_floating_point()]


def _filled(tensors: Leaves, needed: Sequence[int], values: Leaves) -> list[Tensor]:
    filled = list(tensors)
    for n, value in zip(needed, values, strict=True):
        filled[n] = value
    return filled


def _pushed(function: Callable[..., Any], points: Leaves, tangents: Leaves) -> Any:
    """The derivative along tangents as the transpose of the pull-back: forward mode does not nest in itself."""
    made: Any = vjp(function, *points)
    value, pull = made
    again: Any = vjp(pull, tree_map(torch.zeros_like, value))
    return again[1](tuple(tangents))[0]


class _Optimum(torch.autograd.Function):
    """The parameters as they are, with the derivative of the optimum by the data."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: Problem, good: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in tensors[: problem.structure.num_leaves])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, good, *tensors = inputs
        # The parameters as they come out, for they depend on the data where derivatives are taken once more.
        saved = (good, *output, *tensors[len(output) :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem: Problem = ctx.problem
        good, *tensors = ctx.saved_tensors
        _, params, data = problem.split(tensors)
        count = len(tensors) - len(data)
        needed = _needed(ctx, data, 2 + count)
        condition, level = problem.condition, problem.condition.problem(data)
        made: Any = vjp(lambda step: level.retract(params, step), level.zero_step())
        right = made[1](tree_unflatten(list(cotangents), problem.structure))[0]
        found = _inverse(problem, _marked(right, good), params, data)

        def slope(*values: Tensor) -> Any:
            return condition.gradient(params, _filled(data, needed, values))

        made = vjp(slope, *(data[n] for n in needed))
        by_data = [-leaf for leaf in made[1](found)]
        return (None, None, *(None for _ in range(count)), *_spread(by_data, needed, len(data)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        problem: Problem = ctx.problem
        good, *tensors = ctx.saved_tensors
        _, params, data = problem.split(tensors)
        along = tangents[2 + len(tensors) - len(data) :]
        needed = [n for n, tangent in enumerate(along) if tangent is not None and data[n].is_floating_point()]
        condition, level = problem.condition, problem.condition.problem(data)

        def slope(*values: Tensor) -> Any:
            return condition.gradient(params, _filled(data, needed, values))

        right = _pushed(slope, [data[n] for n in needed], [along[n] for n in needed])
        step = tree_map(torch.neg, _inverse(problem, _marked(right, good), params, data))
        leaves, structure = tree_flatten(level.zero_step())

        def moved(*values: Tensor) -> Any:
            return level.retract(params, tree_unflatten(list(values), structure))

        return tuple(tree_flatten(_pushed(moved, leaves, tree_leaves(step)))[0])


def _marked(step: Any, good: Tensor) -> Any:
    """NaN for the pairs without a derivative, but where nothing is asked of it: 0 of what is not known is 0."""
    known = good | torch.stack([(rows(leaf) == 0).all(1) for leaf in tree_leaves(step)]).all(0)
    return tree_known(known, step)


def _inverse(problem: Problem, right: Any, params: Any, data: Leaves) -> Any:
    """(H + ridge)^{-1} of steps (B, ...)."""
    given = (*tree_flatten(right)[0], *tree_flatten(params)[0], *data)
    return tree_unflatten(list(_Inverse.apply(problem, *given)), problem.steps)  # type: ignore[no-untyped-call]


class _Inverse(torch.autograd.Function):
    """`_inverse`, by conjugate gradients where values can be looked at: what batches it comes in as more pairs."""

    @staticmethod
    def forward(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        right, params, data = problem.split([t.detach() for t in tensors], step=True)
        search, condition = problem.search, problem.condition
        found = solve(condition.product(params, data, search.ridge), right, search)
        solved = found.straight & (found.residual <= search.tolerance)
        asked = torch.isfinite(joined(right)).all(1)  # NaN marks a pair without a derivative, or comes from the loss
        if bool((asked & ~solved).any()):
            fault = _fault(found, search, asked & ~solved)
            if problem.alone:
                raise NoOptimumError(fault)
            warn(f"{int((asked & ~solved).sum())} of {len(solved)} derivatives are NaN: {fault}")
        return tuple(tree_leaves(tree_known(solved, found.step)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, *tensors = inputs
        saved = (*output, *tensors[len(output) :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem: Problem = ctx.problem
        found, params, data = problem.split(ctx.saved_tensors, step=True)
        more = _inverse(problem, tree_unflatten(list(cotangents), problem.steps), params, data)
        rest = [*tree_flatten(params)[0], *data]
        count = problem.steps.num_leaves
        needed = _needed(ctx, rest, 1 + count)
        made: Any = vjp(
            lambda *values: _image(problem, found, _filled(rest, needed, values)), *(rest[n] for n in needed)
        )
        by_rest = [-leaf for leaf in made[1](more)]
        return (None, *tree_flatten(more)[0], *_spread(by_rest, needed, len(rest)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        problem: Problem = ctx.problem
        found, params, data = problem.split(ctx.saved_tensors, step=True)
        rest = [*tree_flatten(params)[0], *data]
        count = problem.steps.num_leaves
        along = tangents[1 + count :]
        needed = [n for n, tangent in enumerate(along) if tangent is not None and rest[n].is_floating_point()]
        by_right = [
            torch.zeros_like(a) if t is None else t for t, a in zip(tangents[1:], tree_leaves(found), strict=False)
        ]
        right = tree_unflatten(by_right, problem.steps)
        if needed:
            points = [rest[n] for n in needed]
            turned = _pushed(
                lambda *values: _image(problem, found, _filled(rest, needed, values)),
                points,
                [along[n] for n in needed],
            )
            right = tree_map(torch.sub, right, turned)
        return tuple(tree_flatten(_inverse(problem, right, params, data))[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        problem, *tensors = args
        width, condition = info.batch_size, problem.condition
        begin = problem.steps.num_leaves + problem.structure.num_leaves
        axes, size = (*(0 for _ in range(begin)), *condition.shell.axes), condition.shell.size
        folded: list[Tensor] = []
        batched: list[int | None] = []
        for tensor, dim, axis in zip(tensors, in_dims[1:], axes, strict=True):
            if dim is None and axis is None:
                folded.append(tensor)
                batched.append(None)
                continue
            wide = tensor.expand(width, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            wide = wide if axis == 0 else wide.unsqueeze(1).expand(width, size, *wide.shape[1:])
            folded.append(wide.flatten(0, 1))
            batched.append(0)
        same = all(dim is None for dim in in_dims[1 + problem.steps.num_leaves :])  # several right sides of one pair
        wider = Condition(condition.shell.with_axes(tuple(batched[begin:]), width * size), condition.structure)
        found = _Inverse.apply(dataclasses.replace(problem, condition=wider, alone=problem.alone and same), *folded)  # type: ignore[no-untyped-call]
        return tuple(leaf.unflatten(0, (width, size)) for leaf in found), (0,) * len(found)


def _image(problem: Problem, step: Any, rest: Leaves) -> Any:
    """(H + ridge) step, as a function of parameters and data."""
    _, params, data = problem.split(rest)
    return problem.condition.product(params, data, problem.search.ridge)(step)


def _fault(found: Found, search: Search, which: Tensor) -> str:
    """What is wrong with the solutions of some pairs (B,), and what to do about it."""
    if bool((which & ~found.straight).any()):
        return (
            "the objective has no minimum where the registration ended: its curvature along a step is "
            f"{float(found.curvature[which].min()):.3g} per squared voxel, where it must be positive beyond rounding; "
            "add a penalty or a ridge, Implicit(ridge=...), or use Unrolled()"
        )
    return (
        f"conjugate gradients left a relative residual of {float(found.residual[which].max()):.3g} after "
        f"{found.products} products with the Hessian, where tolerance is {search.tolerance:g}: give more iterations, a "
        "larger tolerance, a penalty or a ridge, Implicit(iterations=..., tolerance=..., ridge=...)"
    )
