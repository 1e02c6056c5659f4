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

from fnreg import lengths
from fnreg.pytree import same_structure, tree_choose, tree_leaves, tree_map, tree_take

_NOT_FINITE = "{} holds NaN or infinity: exclude these voxels by a mask, Subject(image, mask=isfinite)"
_CONSTANT = "{} is constant where it counts: there is nothing to align; check the file, channel and mask"
_BAD_MASK = "the mask of {} has negative or NaN weights: a voxel counts by a weight from 0 on"
_BAD_POINTS = (
    "points of {} or their normals are not finite, or their weights negative or all zero: give lost points weight 0"
)
_EMPTY_MASK = "the mask of {} is zero everywhere: give a mask with some positive voxels, or none"


class Status(enum.IntEnum):
    """How a pair ended: well up to `CONVERGED`; above that it failed, for the cause that came first.

    remedy : what was wrong and what to do about it, in a sentence, as the error of a single pair says it; empty where
        the pair ended well

    >>> Status(6)
    <Status.FIXED_CONSTANT: 6>
    >>> Status.FIXED_CONSTANT.remedy
    'fixed is constant where it counts: there is nothing to align; check the file, channel and mask'
    """

    _value_: int
    remedy: str

    def __new__(cls, code: int, remedy: str = "") -> Status:
        """A number with a sentence."""
        made = int.__new__(cls, code)
        made._value_, made.remedy = code, remedy
        return made

    STEPS = 0  #: all steps were taken
    CONVERGED = 1  #: value or parameters no longer changed
    DIVERGED = (
        2,
        "the registration diverged: the objective became infinite or not a number, or the images lost their overlap; "
        "use a smaller learning rate, or start='center' or 'moments'",
    )
    LOST_OVERLAP = (
        3,
        "the images lost their overlap on the way: use a smaller learning rate, fewer levels, or padding='border', "
        "with which voxels outside count",
    )
    NO_OVERLAP = (
        4,
        "the images do not overlap in world coordinates at the start: use start='center' or 'moments', or an initial "
        "map, and check headers and masks",
    )
    FIXED_NOT_FINITE = 5, _NOT_FINITE.format("fixed")
    FIXED_CONSTANT = 6, _CONSTANT.format("fixed")
    FIXED_BAD_MASK = 7, _BAD_MASK.format("fixed")
    FIXED_EMPTY_MASK = 8, _EMPTY_MASK.format("fixed")
    MOVING_NOT_FINITE = 9, _NOT_FINITE.format("moving")
    MOVING_CONSTANT = 10, _CONSTANT.format("moving")
    MOVING_BAD_MASK = 11, _BAD_MASK.format("moving")
    MOVING_EMPTY_MASK = 12, _EMPTY_MASK.format("moving")
    BAD_LABELS = (
        13,
        "labels of fixed and moving have different classes, or are 0 everywhere: give both the same classes, and 0 to "
        "what the other lacks",
    )
    FIXED_BAD_POINTS = 14, _BAD_POINTS.format("fixed")
    MOVING_BAD_POINTS = 15, _BAD_POINTS.format("moving")


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a pair is done.

    A pair whose value has not fallen by the part `relative` of itself for `patience` steps goes back to the best
    parameters seen, with steps `shrink` times as long; it has converged once they would be shorter than `shortest` of
    the solver's own.  A solver without a step length (`GaussNewton`) has converged after a third of the patience.
    The best parameters seen are the result.

    step : converged when no parameter moves by more than this many voxels in a step; 0 never
    every : how often, in steps, the host looks whether all are done, and drops finished pairs from the batch
    compact : whether finished pairs are dropped from the batch as it runs
    """

    relative: float = 1e-4
    patience: int = 10
    shrink: float = 0.3
    shortest: float = 0.05
    step: float = 1e-4
    every: int = 10
    compact: bool = True

    def __post_init__(self) -> None:
        if self.relative < 0 or self.step < 0 or self.patience < 1 or self.every < 1:
            raise ValueError(f"{self!r}: expected relative and step >= 0, patience and every >= 1")
        if not (0 < self.shrink < 1 and 0 < self.shortest <= 1):
            raise ValueError(f"{self!r}: expected shrink in (0, 1) and shortest in (0, 1]")


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

    scales: bool  # whether `step` heeds a step length

    def init(self, problem: Any, params: Any) -> Any:
        """What the solver carries from step to step: tensors with a leading batch axis, or shared scalars."""
        ...

    def step(self, problem: Any, params: Any, carry: Any, progress: float, length: Tensor | None) -> Taken:
        """One step for every pair; `length` (B,) multiplies it."""
        ...


class Taken(NamedTuple):
    """What one step gave, per pair."""

    params: Any
    carry: Any
    value: Tensor  # (B,) of the objective
    at: Any  # the parameters with this value
    moved: Tensor  # (B,) voxels, the largest change of a parameter
    settled: Tensor  # (B,) bool: the solver itself sees no way down
    terms: dict[str, Tensor] = {}  # (B,) each, the unweighted terms of the value  # noqa: RUF012


class Solved(NamedTuple):
    """What a run of the loop gave, per pair."""

    params: Any
    steps: Tensor  # (B,) steps taken
    status: Tensor  # (B,) Status
    history: Tensor  # (B, steps) value at every step, NaN after the last
    terms: dict[str, Tensor]  # (B, steps) each, likewise, of the terms that the solver told
    now: Any = None  # where the loop was at its end


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
    begin: int = 0,
    end: int | None = None,
    now: Now | None = None,
) -> Solved:
    """Iterate a solver on all pairs of a problem.

    steps : at most so many
    begin, end : only the steps from the one up to the other, from 0; for a loop in parts, without `stop`
    now : where the part before ended; then `params` and `frozen` do not count
    stop : None takes all of them, and then nothing depends on values: the loop may itself run inside vmap or grad
    frozen : (B,) pairs that stay as they are
    progress : told now and then
    """
    device = tree_leaves(params)[0].device
    total, end = problem.size, steps if end is None else end
    running = torch.ones(total, dtype=torch.bool, device=device) if frozen is None else ~frozen
    if now is not None:
        params, running = now.params, now.running
    status = torch.where(running, Status.STEPS.value, Status.DIVERGED.value)
    taken_steps = torch.zeros(total, dtype=torch.int64, device=device)
    if end == begin:
        return Solved(params, taken_steps, status, torch.empty(total, 0, device=device), {}, now)
    rows: list[Tensor] = []
    rows_of: dict[str, list[Tensor]] = {}
    shown = float("nan")
    # From here on all is of the pairs `index` only, once some are dropped; `final` holds what the dropped ones reached.
    index: Tensor | None = None
    final = params
    now = Now(params, params, solver.init(problem, params), running) if now is None else now
    marks = None if stop is None else _Marks.start(params, running)
    for number in range(begin, end):
        length = marks.length if marks is not None and solver.scales else None
        taken = solver.step(problem, now.params, now.carry, number / steps, length)
        finite = torch.isfinite(taken.value)
        for leaf in tree_leaves(taken.params):
            finite = finite & lengths.is_finite(leaf)
        lost, going = now.running & ~finite, now.running & finite
        after = tree_choose(going, taken.params, tree_choose(lost, now.previous, now.params))
        row = torch.where(going, taken.value, torch.nan)
        rows.append(_row(total, index, row))
        for name, value in taken.terms.items():
            rows_of.setdefault(name, []).append(_row(total, index, value.detach()))
        taken_steps = _add(taken_steps, index, now.running.to(torch.int64))
        ended = torch.where(lost, Status.DIVERGED.value, -1)
        if stop is not None and marks is not None:
            marks, after, done = marks.update(taken, after, going, stop, solver.scales)
            ended = torch.where(done, Status.CONVERGED.value, ended)
        before = status if index is None else status[index]
        changed = torch.where(ended >= 0, ended, before)
        status = changed if index is None else status.index_copy(0, index, changed)
        now = Now(after, now.params, taken.carry, now.running & (ended < 0))
        look = stop is not None and (number + 1) % stop.every == 0
        if progress is not None and (look or stop is None or number + 1 == steps):
            found = row[torch.isfinite(row)]
            shown = float(found.mean()) if len(found) else shown
            progress(number + 1, steps, int(now.running.sum()), shown)
        if not look:
            continue
        left = int(now.running.sum())
        if left == 0:
            break
        if stop is not None and marks is not None and stop.compact and left <= problem.size // 2:
            final = _put(final, index, marks.best_params)
            keep = now.running.nonzero().squeeze(1)
            index = keep if index is None else index[keep]
            width = problem.size
            problem, marks = problem.take(keep), tree_take(marks, keep)
            carry = tree_map(lambda leaf: leaf[keep] if _batched(leaf, width) else leaf, now.carry)  # noqa: B023
            now = Now(*tree_take((now.params, now.previous), keep), carry, now.running[keep])
    if marks is not None and solver.scales and bool(now.running.any()):  # the last step has not been looked at yet
        last = solver.step(problem, now.params, now.carry, 1.0, marks.length)
        marks = marks.lower(last, now.running & torch.isfinite(last.value))
    final = _put(final, index, now.params if marks is None else marks.best_params)
    history = _course(rows, end - begin)
    unknown = torch.isnan(history)
    terms = {name: torch.where(unknown, torch.nan, _course(each, end - begin)) for name, each in rows_of.items()}
    return Solved(final, taken_steps, status, history, terms, now)


class Now(NamedTuple):
    """Where the loop is."""

    params: Any
    previous: Any  # one step before: known to have a finite value
    carry: Any
    running: Tensor


class _Marks(NamedTuple):
    """What stopping remembers, per pair."""

    best: Tensor  # lowest value seen
    best_params: Any
    mark: Tensor  # the value from which a fall counts
    stall: Tensor  # steps since then
    length: Tensor  # part of the solver's own step

    @staticmethod
    def start(params: Any, running: Tensor) -> _Marks:
        one = torch.ones(running.shape, dtype=torch.float64, device=running.device)
        return _Marks(one * torch.inf, params, one * torch.inf, torch.zeros_like(running, dtype=torch.int64), one)

    def lower(self, taken: Taken, going: Tensor) -> _Marks:
        """With the best values and parameters after a look at `taken`, of the pairs in `going`."""
        value = taken.value.detach().to(self.best.dtype)
        lower = going & (value < self.best)
        params = tree_choose(lower, taken.at, self.best_params)
        return self._replace(best=torch.where(lower, value, self.best), best_params=params)

    def update(self, taken: Taken, after: Any, going: Tensor, stop: Stop, scales: bool) -> tuple[_Marks, Any, Tensor]:
        """The next marks, the parameters to go on from, and which pairs are done."""
        value = taken.value.detach().to(self.best.dtype)
        best, best_params = self.lower(taken, going)[:2]
        fallen = going & (value < self.mark - stop.relative * self.mark.abs().nan_to_num(posinf=0))
        mark = torch.where(fallen, value, self.mark)
        stall = torch.where(fallen, 0, self.stall + 1)
        soon = torch.isfinite(taken.moved) & (not scales)  # a step undone is tried again, which may need some attempts
        stuck = stall >= torch.where(soon, (stop.patience + 2) // 3, stop.patience)
        length = torch.where(stuck, self.length * stop.shrink, self.length) if scales else self.length
        short = length < stop.shortest if scales else stuck
        done = going & ((stuck & short) | (taken.moved <= stop.step) | taken.settled)
        if scales:
            after = tree_choose(going & stuck, best_params, after)
        return _Marks(best, best_params, mark, torch.where(stuck, 0, stall), length), after, done


def _row(total: int, index: Tensor | None, part: Tensor) -> Tensor:
    """Values of all pairs, of which only those at `index` are known."""
    return part if index is None else part.new_full((total,), torch.nan).index_copy(0, index, part)


def _course(rows: list[Tensor], steps: int) -> Tensor:
    """Rows (B,) side by side, (B, steps), NaN after the last."""
    found = torch.stack(rows, 1)
    return torch.cat([found, found.new_full((len(found), steps - len(rows)), torch.nan)], 1)


def _add(whole: Tensor, index: Tensor | None, part: Tensor) -> Tensor:
    return whole + (part if index is None else torch.zeros_like(whole).index_copy(0, index, part))


def _batched(leaf: Any, width: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == width


def _put(whole: Any, index: Tensor | None, part: Any) -> Any:
    if index is None:
        return part
    return tree_map(lambda a, b: a.index_copy(0, index, b), whole, part)


def check_step(step: Any, update: Any, where: str) -> None:
    """An optimizer whose state was made for another step gives updates of another shape: refuse them."""
    if not same_structure(step, update):
        raise ValueError(f"{where} gave an update that does not fit the step: its state was made for other parameters")


def largest(step: Any) -> Tensor:
    """The largest absolute entry of a step, per pair (B,)."""
    sizes = [lengths.largest(leaf) for leaf in tree_leaves(step)]
    return torch.stack([size.to(sizes[0].dtype) for size in sizes]).amax(0)
