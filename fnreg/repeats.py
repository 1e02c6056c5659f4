"""Pairs and what belongs to each of them, several times, pair after pair: what sweeps and ensembles register at once.

Beside images a pair may have start parameters, a map that acts after, weights of terms and learning rates of its own.
All of them are repeated here, whether they are options of `register` or lie in a `Stage`; what pairs share is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from fnreg import optim
from fnreg.grid import Grid
from fnreg.inputs import check_dimension
from fnreg.losses.objective import Objective, Term
from fnreg.pytree import Axes, batch_axes, tree_flatten, tree_leaves, tree_paths, tree_unflatten
from fnreg.solvers.base import solver_of
from fnreg.stages import Stage, given
from fnreg.starts import start_trees, starts_ranks
from fnreg.transforms.base import Transform

T = TypeVar("T")


def repeated(tree: T, axes: Axes, count: int) -> T:
    """Leaves of pairs (B, ...) as (B count, ...), each pair `count` times; shared leaves as they are.

    axes : as `batch_axes` gives them

    >>> import torch
    >>> repeated(torch.tensor([3, 4]), (0,), 2)
    tensor([3, 3, 4, 4])
    """
    leaves, spec = tree_flatten(tree)
    made = [leaf if axis is None else leaf.repeat_interleave(count, 0) for leaf, axis in zip(leaves, axes, strict=True)]
    return tree_unflatten(made, spec)


def repeat(name: str, tree: T, ranks: Any, count: int) -> T:
    """`repeated` by the rank rule."""
    return repeated(tree, batch_axes(name, tree, ranks)[0], count)


def option_sizes(options: Mapping[str, Any], first: Transform | None, grid: Grid) -> dict[str, int]:
    """Lengths of the batch axes, by name, of the options of `register` that say how many pairs there are.

    first : the transform that is optimised first; None, where it is not known yet, leaves start parameters out
    """
    sizes: dict[str, int] = {}
    for name, tree, ranks in _trees(options, first, grid):
        sizes |= batch_axes(name, tree, ranks)[1]
    return sizes


def stage_sizes(transform: Any) -> dict[str, int]:
    """Lengths of the batch axes of the weights of stages, by name."""
    sizes: dict[str, int] = {}
    for number, stage in enumerate(given(transform)):
        if isinstance(stage, Stage):
            for name, tree, ranks in _objectives(f"objective of stage {number}", stage.objective):
                sizes |= batch_axes(name, tree, ranks)[1]
    return sizes


def repeat_options(
    options: Mapping[str, Any], first: Transform, grid: Grid, *, pairs: int, count: int
) -> dict[str, Any]:
    """Options of `register` for `pairs` pairs, each `count` times.

    first : the transform that is optimised first, whose parameters `initial` and `starts` are
    grid : of the fixed image

    Raises ValueError where starts or rates are of another number of pairs.
    """
    found = dict(options)
    for name, tree, ranks in _trees({k: v for k, v in options.items() if k != "objective"}, first, grid):
        found[name] = repeat(name, tree, ranks, count)
    if options.get("starts") is not None:
        found["starts"] = _repeat_starts(options["starts"], first, grid, pairs, count)
    return found | _repeat_parts("", options, pairs, count)


def repeat_stages(transform: Any, *, pairs: int, count: int) -> Any:
    """What `register` takes as its transform, for `pairs` pairs, each `count` times."""

    def one(number: int, stage: Any) -> Any:
        if not isinstance(stage, Stage):
            return stage
        given = {name: getattr(stage, name) for name in ("objective", "optimizer", "solver")}
        return dataclasses.replace(stage, **_repeat_parts(f" of stage {number}", given, pairs, count))

    made = [one(number, stage) for number, stage in enumerate(given(transform))]
    return made[0] if len(made) == 1 else made


def _trees(options: Mapping[str, Any], first: Transform | None, grid: Grid) -> Iterator[tuple[str, Any, Any]]:
    """Names, trees and their ranks for one pair of options that may have the axis of the pairs."""
    then = options.get("then")
    if then is not None:
        check_dimension("then", then, grid)
        yield "then", then, then.ranks()
    if first is not None:
        yield from start_trees(options.get("initial"), None, first, grid)
    yield from _objectives("objective", options.get("objective"))


def _objectives(name: str, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Those that have weights, of one objective or of one per level."""
    several = isinstance(given, (list, tuple))
    for number, one in enumerate(given if several else [given]):
        if isinstance(one, (Term, Objective)):
            yield f"{name}[{number}]" if several else name, one, one.ranks()


def _repeat_parts(where: str, given: Mapping[str, Any], pairs: int, count: int) -> dict[str, Any]:
    """Objective, optimizer and solver, as far as they are given."""
    found: dict[str, Any] = {}
    objective = given.get("objective")
    made = [repeat(name, tree, ranks, count) for name, tree, ranks in _objectives(f"objective{where}", objective)]
    if made and isinstance(objective, (list, tuple)):
        rest = iter(made)
        found["objective"] = [next(rest) if isinstance(one, (Term, Objective)) else one for one in objective]
    elif made:
        found["objective"] = made[0]
    index = torch.arange(pairs, device="cpu").repeat_interleave(count)
    if (optimizer := given.get("optimizer")) is not None:
        _check_rates(f"optimizer{where}", optimizer, pairs)
        found["optimizer"] = optim.take(optimizer, index)
    solver: Any = given.get("solver")
    if solver is not None and not isinstance(solver, type):
        _check_rates(f"solver{where}", getattr(solver, "optimizer", None), pairs)  # of Descent, or one's own
        found["solver"] = solver_of(solver, index)
    return found


def _check_rates(name: str, optimizer: Any, pairs: int) -> None:
    """A rate too many would be left out in silence."""
    for rate in optim.rates(optimizer):
        if rate.ndim and tuple(rate.shape) != (pairs,):
            told = "one pair" if pairs == 1 else f"{pairs} pairs"
            raise ValueError(f"{name}: lr has shape {tuple(rate.shape)} for {told}: give one rate, or one per pair")


def _repeat_starts(starts: Any, first: Transform, grid: Grid, pairs: int, count: int) -> Any:
    """Starts (B, S, ...) of each pair; those that all share, (S, ...), as they are."""
    axes, _ = batch_axes("starts", starts, starts_ranks(starts, first, grid))
    for path, leaf, axis in zip(tree_paths(starts), tree_leaves(starts), axes, strict=True):
        if axis == 0 and len(leaf) != pairs:
            told = "one pair" if pairs == 1 else f"{pairs} pairs"
            raise ValueError(
                f"starts: {path} has shape {tuple(leaf.shape)} for {told}: give (S, ...) for all of them or (B, S, ...)"
            )
    return repeated(starts, axes, count)
