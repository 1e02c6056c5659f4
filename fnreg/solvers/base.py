"""The one loop: steps of a solver on a batch of pairs, with stopping, compaction, history and progress.

Everything here has a leading batch axis; one pair is a batch of one.  A pair that has converged or diverged is
frozen: its parameters no longer change, and its neighbours never notice.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fnreg.pytree import same_structure, tree_leaves, tree_map, tree_take, tree_where


class Status(enum.IntEnum):
    """Why a pair's iterations ended."""

    STEPS = 0  # all steps were taken
    CONVERGED = 1  # value or parameters no longer changed
    DIVERGED = 2  # value or parameters became infinite or not a number


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a pair is done.

    relative : converged after `patience` steps without the value falling by this part of itself
    step : converged when no parameter moves by more than this many voxels in a step; 0 never
    every : how often, in steps, the host looks whether all are done, and drops finished pairs from the batch
    compact : whether finished pairs are dropped from the batch as it runs
    """

    relative: float = 1e-4
    patience: int = 20
    step: float = 1e-4
    every: int = 10
    compact: bool = True

    def __post_init__(self) -> None:
        if self.relative < 0 or self.step < 0 or self.patience < 1 or self.every < 1:
            raise ValueError(f"{self!r}: expected relative and step >= 0, patience and every >= 1")


class Problem(Protocol):
    """One level of a registration of a batch of pairs."""

    size: int

    def zero_step(self) -> Any:
        """The step of no change, batched."""
        ...

    def take(self, index: Tensor) -> Problem:
        """The same for some of the pairs."""
        ...


class Solver(Protocol):
    """How parameters are improved."""

    def init(self, problem: Any, params: Any) -> Any:
        """What the solver carries from step to step: tensors with a leading batch axis, or shared scalars."""
        ...

    def step(self, problem: Any, params: Any, carry: Any, progress: float) -> Taken:
        """One step for every pair."""
        ...


class Taken(NamedTuple):
    """What one step gave, per pair."""

    params: Any
    carry: Any
    value: Tensor  # (B,) of the objective, before the step or after it as the solver says
    moved: Tensor  # (B,) voxels, the largest change of a parameter
    settled: Tensor  # (B,) bool: the solver itself sees no way down


class Solved(NamedTuple):
    """What a run of the loop gave, per pair."""

    params: Any
    steps: Tensor  # (B,) steps taken
    status: Tensor  # (B,) Status
    history: Tensor  # (B, steps) value at every step, NaN after the last


Progress = Callable[[int, int, int, float], None]  # step, steps, active pairs, mean value


def run(
    problem: Any,
    params: Any,
    solver: Solver,
    *,
    steps: int,
    stop: Stop | None = None,
    frozen: Tensor | None = None,
    progress: Progress | None = None,
) -> Solved:
    """Iterate a solver on all pairs of a problem.

    steps : at most so many; stop : None takes all of them, and then nothing depends on values, so the loop may
    itself run inside vmap or grad; frozen : (B,) pairs that stay as they are.
    """
    device = tree_leaves(params)[0].device
    total = problem.size
    dtype: torch.dtype | None = None
    running = torch.ones(total, dtype=torch.bool, device=device) if frozen is None else ~frozen
    status = torch.where(running, Status.STEPS.value, Status.DIVERGED.value)
    taken_steps = torch.zeros(total, dtype=torch.int64, device=device)
    rows: list[Tensor] = []
    if steps == 0:
        return Solved(params, taken_steps, status, torch.empty(total, 0, device=device))

    # All of the following may be of fewer pairs than `total` once some are dropped: `index` says which.
    index: Tensor | None = None
    final = params
    previous = params
    carry = solver.init(problem, params)
    best = stall = None
    for number in range(steps):
        taken = solver.step(problem, params, carry, number / steps)
        dtype = taken.value.dtype
        if best is None:
            best = torch.full_like(taken.value, torch.inf)
            stall = torch.zeros_like(taken.value, dtype=torch.int64)
        finite = torch.isfinite(taken.value)
        for leaf in tree_leaves(taken.params):
            finite = finite & torch.isfinite(leaf).flatten(1).all(1)
        lost = running & ~finite
        after = tree_where(running & finite, taken.params, tree_where(lost, previous, params))
        row = torch.where(running & finite, taken.value, torch.nan)
        rows.append(row if index is None else row.new_full((total,), torch.nan).index_copy(0, index, row))
        count = running.to(torch.int64)
        taken_steps = taken_steps + (
            count if index is None else torch.zeros_like(taken_steps).index_copy(0, index, count)
        )
        ended = torch.where(lost, Status.DIVERGED.value, -1)
        if stop is not None:
            assert best is not None and stall is not None
            better = taken.value < best - stop.relative * best.abs().nan_to_num(posinf=0)
            best = torch.where(better, taken.value, best)
            stall = torch.where(better, 0, stall + 1)
            done = (stall >= stop.patience) | (taken.moved <= stop.step) | taken.settled
            ended = torch.where(running & finite & done, Status.CONVERGED.value, ended)
        changed = torch.where(ended >= 0, ended, status if index is None else status[index])
        status = changed if index is None else status.index_copy(0, index, changed)
        running = running & (ended < 0)
        previous, params, carry = params, after, taken.carry
        look = stop is not None and (number + 1) % stop.every == 0
        if progress is not None and (look or number + 1 == steps or stop is None):
            shown = row[torch.isfinite(row)]
            progress(number + 1, steps, int(running.sum()), float(shown.mean()) if len(shown) else float("nan"))
        if not look:
            continue
        left = int(running.sum())
        if left == 0:
            break
        assert stop is not None
        if stop.compact and left <= problem.size // 2:
            final = params if index is None else _put(final, index, params)
            keep = running.nonzero().squeeze(1)
            index = keep if index is None else index[keep]
            problem = problem.take(keep)
            width = running.shape[0]
            params, previous, best, stall, running = tree_take((params, previous, best, stall, running), keep)
            carry = tree_map(lambda leaf: leaf[keep] if _batched(leaf, width) else leaf, carry)  # noqa: B023
    final = params if index is None else _put(final, index, params)
    history = torch.stack(rows, 1)
    if history.shape[1] < steps:
        history = torch.cat([history, history.new_full((total, steps - history.shape[1]), torch.nan)], 1)
    return Solved(final, taken_steps, status, history.to(dtype))


def _batched(leaf: Any, width: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == width


def _put(whole: Any, index: Tensor, part: Any) -> Any:
    return tree_map(lambda a, b: a.index_copy(0, index, b), whole, part)


def check_step(step: Any, update: Any, where: str) -> None:
    """An optimizer whose state was made for another step gives updates of another shape: refuse them."""
    if not same_structure(step, update):
        raise ValueError(f"{where} gave an update that does not fit the step: its state was made for other parameters")


def largest(step: Any) -> Tensor:
    """The largest absolute entry of a step, per pair (B,)."""
    sizes = [leaf.detach().abs().flatten(1).amax(1) for leaf in tree_leaves(step)]
    return torch.stack([size.to(sizes[0].dtype) for size in sizes]).amax(0)
