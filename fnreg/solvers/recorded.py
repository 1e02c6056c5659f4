"""The loop as derivatives go through it: every step, the last ones only, or piece by piece with recomputation.

What is recorded of k steps grows with k.  Of the pieces only the ends are kept, and a piece is run again when its
derivative is asked for: with pieces of sqrt(k) steps the memory grows with sqrt(k), for one more run of the loop.
Griewank and Walther 2000, doi 10.1145/347837.347846.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from fnreg.pytree import tree_detach, tree_flatten, tree_unflatten
from fnreg.solvers.base import Problem, Solved
from fnreg.solvers.loop import Now, Progress, run


@dataclasses.dataclass(frozen=True)
class Recording:
    """last : so many steps of a loop count, None all of them, 0 none; every : steps of a piece, 0 their root"""

    last: int | None = None
    every: int | None = None


def run_recorded(
    problem: Problem,
    params: Any,
    solver: Any,
    *,
    steps: int,
    recording: Recording,
    frozen: Tensor | None = None,
    progress: Progress | None = None,
) -> Solved:
    """`run` to the last step, as derivatives are to go through it."""
    options: dict[str, Any] = {"steps": steps, "progress": progress}
    if recording.last is not None:
        first = max(0, steps - recording.last)
        still, params = problem.with_data(tree_detach(problem.data)), tree_detach(params)
        begun = solver.init(problem, params)
        loose = tree_detach(begun)
        before = run(still, params, solver, end=first, now=_start(params, loose, frozen), **options)
        if first == steps:
            return before
        now = _loosened(before.now, loose, begun)
        return _joined([before, run(problem, params, solver, begin=first, now=now, **options)])
    if recording.every is None:
        return run(problem, params, solver, frozen=frozen, **options)
    length = recording.every or max(1, math.isqrt(steps))
    bounds = [*range(0, steps, length), steps]
    now = _start(params, solver.init(problem, params), frozen)
    pieces: list[Solved] = [run(problem, params, solver, end=0, now=now, **options)]
    for begin, end in itertools.pairwise(bounds):
        pieces.append(_piece(problem, solver, pieces[-1].now, {"begin": begin, "end": end, **options}))
    return _joined(pieces)


def _start(params: Any, carry: Any, frozen: Tensor | None) -> Now:
    """Where a loop begins."""
    first = tree_flatten(params)[0][0]
    running = torch.ones(len(first), dtype=torch.bool, device=first.device) if frozen is None else ~frozen
    return Now(params, params, carry, running)


def _loosened(now: Now, loose: Any, begun: Any) -> Now:
    """Detached, but for what of the carry no step has changed, such as a learning rate: that is as it was."""
    leaves, spec = tree_flatten(now.carry)
    changed = zip(leaves, tree_flatten(loose)[0], tree_flatten(begun)[0], strict=True)
    carry = [first if leaf is same else tree_detach(leaf) for leaf, same, first in changed]
    return tree_detach(now._replace(carry=None))._replace(carry=tree_unflatten(carry, spec))


def _joined(pieces: list[Solved]) -> Solved:
    """A loop from its parts."""
    last, steps = pieces[-1], torch.stack([piece.steps for piece in pieces]).sum(0)
    told = [piece for piece in pieces if piece.history.shape[1]]
    if not told:
        return last
    history = torch.cat([piece.history for piece in told], 1)
    terms = {name: torch.cat([piece.terms[name] for piece in told], 1) for name in told[0].terms}
    return last._replace(steps=steps, history=history, terms=terms)


def _piece(problem: Problem, solver: Any, now: Now, options: dict[str, Any]) -> Solved:
    """A part of the loop, of which only where it begins is kept."""
    leaves, spec = tree_flatten((problem.data, now))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    found: list[Any] = []

    def part(tensors: tuple[Tensor, ...], again: bool) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        data, then = tree_unflatten(filled, spec)
        told: dict[str, Any] = options | ({"progress": None} if again else {})
        solved = run(problem.with_data(data), then.params, solver, now=then, **told)
        made, structure = tree_flatten(solved)
        found[:] = [structure, [leaf if not isinstance(leaf, Tensor) else _OURS for leaf in made]]
        return tuple(leaf for leaf in made if isinstance(leaf, Tensor))

    tensors = iter(_Again.apply(part, *(leaves[place] for place in places)))  # type: ignore[no-untyped-call]
    structure, made = found
    return tree_unflatten([next(tensors) if leaf is _OURS else leaf for leaf in made], structure)


_OURS: Any = object()  # where a tensor goes


class _Again(torch.autograd.Function):
    """part(tensors), run once more for its derivative: torch's own checkpoints raise inside torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(part: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        found = part(tensors, False)
        return tuple(one.clone() if any(one is given for given in tensors) else one for one in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.part, *tensors = inputs
        ctx.mark_non_differentiable(*(one for one in output if not one.is_floating_point()))
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = list(ctx.saved_tensors)
        wanted = [n for n, tensor in enumerate(given) if ctx.needs_input_grad[n + 1] and tensor.is_floating_point()]

        def weighed(values: tuple[Tensor, ...]) -> Tensor:
            filled = list(given)
            for n, value in zip(wanted, values, strict=True):
                filled[n] = value
            found = zip(ctx.part(tuple(filled), True), cotangents, strict=True)
            return torch.stack([(one * by).sum().double() for one, by in found if one.is_floating_point()]).sum()

        # All within one transform: what `vjp` gives is called after its level has gone, which not all Functions bear.
        by_wanted = grad(weighed)(tuple(given[n] for n in wanted))
        known = dict(zip(wanted, by_wanted, strict=True))
        return (None, *(known.get(n) for n in range(len(given))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("Checkpointed() goes in reverse only: take Unrolled() for forward mode")
