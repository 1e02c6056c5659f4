"""The one loop: steps of a solver on a batch of pairs, with stopping, refill, history and progress.

A pair that has converged or diverged is frozen: its parameters no longer change, and its neighbours never notice.
Pairs run side by side in slots; those that are done leave theirs, and others that wait take them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import lengths
from fnreg.pytree import is_concrete, tree_choose, tree_leaves, tree_map, tree_take
from fnreg.solvers.base import Problem, Solved, Solver, Status, Stop, Taken, solver_of

Progress = Callable[[int, int, int, float], None]  # step, steps, active pairs, mean value

ROOM = 8  # waiting pairs come in once this part of the slots is free: to move the others costs about a step


def run(
    problem: Problem,
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
    progress : told now and then; ValueError inside vmap, where values cannot be looked at
    """
    device = tree_leaves(params)[0].device
    total, end = problem.size, steps if end is None else end
    running = torch.ones(total, dtype=torch.bool, device=device) if frozen is None else ~frozen
    if now is not None:
        params, running = now.params, now.running
    status = torch.where(running, Status.STEPS.value, Status.DIVERGED.value)
    counts = torch.zeros(total, dtype=torch.int64, device=device)
    if end == begin:
        return Solved(params, counts, status, torch.empty(total, 0, device=device), {}, now)
    course, final = _Course(total, end - begin), params
    first, waiting, width = None, counts[:0], total  # None: all at once
    if stop is not None and stop.width is not None and stop.width < total:
        places, width = running.nonzero().squeeze(1), stop.width
        first, waiting = places[:width], places[width:]
        if not len(first):  # all are frozen: one is looked at for the names of the terms
            first = counts[:1]

    def start(index: Tensor | None) -> _Slots:
        return _Slots.start(problem, params, solver, index, running, stop)

    slots = start(first) if now is None else _Slots(None, problem, *now, None, begin)
    looked, shown = 0, float("nan")
    while True:
        length = slots.marks.length if slots.marks is not None and solver.scales else None
        taken = solver.step(slots.problem, slots.params, slots.carry, slots.progress(steps), length)
        finite = torch.isfinite(taken.value)
        for leaf in tree_leaves(taken.params):
            finite = finite & lengths.is_finite(leaf)
        lost, going = slots.running & ~finite, slots.running & finite
        after = tree_choose(going, taken.params, tree_choose(lost, slots.previous, slots.params))
        row = torch.where(going, taken.value, torch.nan)
        if progress is not None and not is_concrete(row):
            raise ValueError("progress cannot be told inside vmap: leave it out")
        course.add(slots, row, taken.terms)
        counts = _add(counts, slots.places, slots.running.to(torch.int64))
        ended, marks = torch.where(lost, Status.DIVERGED.value, -1), slots.marks
        if stop is not None and marks is not None:
            marks, after, done = marks.update(taken, after, going, stop, solver.scales)
            ended = torch.where(done, Status.CONVERGED.value, ended)
        before = status if slots.places is None else status[slots.places]
        status = _put(status, slots.places, torch.where(ended >= 0, ended, before))
        slots = slots.after(after, taken.carry, slots.running & (ended < 0), marks)
        looked += 1
        full = slots.oldest == end
        look = full or (stop is not None and looked % stop.every == 0)
        if progress is not None and (look or stop is None):
            found = row[torch.isfinite(row)].detach()
            shown = float(found.mean()) if len(found) else shown
            reached = slots.oldest if first is None else slots.reached(steps, total, len(waiting))
            progress(reached, steps, int(slots.running.sum()), shown)
        if stop is None:
            if full:
                break
            continue
        if not look:
            continue
        if full:
            slots = slots.last_look(solver, steps)
        left = slots.running.nonzero().squeeze(1)
        if not len(left) and not len(waiting):
            break
        # Those that took all steps have to go: they have no place in the course any more.
        free = width - len(left)  # also of slots that were dropped while the others could not be joined
        some = full or free * ROOM >= width
        if len(waiting) and (not len(left) or (some and _joins(solver, slots.carry))):
            final = _put(final, slots.places, slots.found)
            fresh, waiting = waiting[:free], waiting[free:]
            slots = slots.join(left, start(fresh), problem) if len(left) else start(fresh)
        elif stop.compact and (full or len(left) <= slots.problem.size // 2):
            final = _put(final, slots.places, slots.found)
            slots = slots.take(left)
    final = _put(final, slots.places, slots.found)
    now = Now(slots.params, slots.previous, slots.carry, slots.running)
    return Solved(final, counts, status, *course.whole(), now)


class Now(NamedTuple):
    """Where the loop is."""

    params: Any
    previous: Any  # one step before: known to have a finite value
    carry: Any
    running: Tensor


class _Slots(NamedTuple):
    """Pairs that run side by side, those at `places` of all; None for all in their order."""

    places: Tensor | None
    problem: Any  # a `Problem`, or None of `_states`
    params: Any
    previous: Any  # one step before: known to have a finite value
    carry: Any
    running: Tensor
    marks: _Marks | None
    age: int | Tensor  # steps taken, (B,) on the host once they differ

    @staticmethod
    def start(
        problem: Problem, params: Any, solver: Solver, index: Tensor | None, running: Tensor, stop: Stop | None
    ) -> _Slots:
        if index is not None:
            problem, params, running = problem.take(index), tree_take(params, index), running[index]
            solver = solver_of(solver, index)
        marks = None if stop is None else _Marks.start(params, running)
        return _Slots(index, problem, params, params, solver.init(problem, params), running, marks, 0)

    @property
    def oldest(self) -> int:
        return self.age if isinstance(self.age, int) else int(self.age.max())

    @property
    def found(self) -> Any:
        """The result so far."""
        return self.params if self.marks is None else self.marks.best_params

    def progress(self, steps: int) -> float | Tensor:
        """How far each is, in [0, 1)."""
        if isinstance(self.age, int):
            return self.age / steps
        return (self.age.to(torch.float64) / steps).to(self.running.device)

    def reached(self, steps: int, total: int, waiting: int) -> int:
        """How far all are together, in steps."""
        ages = torch.as_tensor(self.age, device=self.running.device) * self.running
        done = total - waiting - int(self.running.sum())
        return (steps * done + int(ages.sum())) // total

    def after(self, params: Any, carry: Any, running: Tensor, marks: _Marks | None) -> _Slots:
        """One step on."""
        return _Slots(self.places, self.problem, params, self.params, carry, running, marks, self.age + 1)

    def take(self, keep: Tensor) -> _Slots:
        """Some of them, by place."""
        if len(keep) == self.problem.size:
            return self
        return self._states(keep)._replace(problem=self.problem.take(keep))

    def _states(self, keep: Tensor) -> _Slots:
        """Of some of them all but the problem, which is large."""
        width = self.problem.size
        carry = tree_map(lambda leaf: leaf[keep] if _batched(leaf, width) else leaf, self.carry)
        rest = tree_take((self.params, self.previous, self.running, self.marks), keep)
        params, previous, running, marks = rest
        index = keep if self.places is None else self.places[keep]
        age = self.age if isinstance(self.age, int) else self.age[keep.cpu()]
        return _Slots(index, None, params, previous, carry, running, marks, age)

    def join(self, keep: Tensor, fresh: _Slots, problem: Problem) -> _Slots:
        """Some of them, and beside them others that begin; problem : that of all pairs."""
        old = self._states(keep)
        counts = len(old.running), len(fresh.running)

        def both(one: Any, other: Any) -> Any:
            return torch.cat([one, other]) if _batched(one, counts[0]) and _batched(other, counts[1]) else one

        ages = [
            torch.full((n,), a) if isinstance(a, int) else a for n, a in zip(counts, (old.age, fresh.age), strict=True)
        ]
        index = torch.cat([old.places, fresh.places])  # type: ignore[list-item]
        params, previous, carry, running, marks = tree_map(
            both,
            (old.params, old.previous, old.carry, old.running, old.marks),
            (fresh.params, fresh.previous, fresh.carry, fresh.running, fresh.marks),
        )
        return _Slots(index, problem.take(index), params, previous, carry, running, marks, torch.cat(ages))

    def last_look(self, solver: Solver, steps: int) -> _Slots:
        """Those that have taken all steps are done, once the last one has been looked at too."""
        over = self.running & (torch.as_tensor(self.age, device=self.running.device) == steps)
        marks, old = self.marks, over.nonzero().squeeze(1)
        if solver.scales and len(old):
            some = self.take(old)
            assert marks is not None
            assert some.marks is not None
            last = solver.step(some.problem, some.params, some.carry, 1.0, some.marks.length)
            marks = _put(marks, None if some is self else old, some.marks.lower(last, torch.isfinite(last.value)))
        return self._replace(marks=marks, running=self.running & ~over)


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
        lower = going & (value <= self.best)
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


class _Course:
    """Values at every step, of all pairs."""

    def __init__(self, pairs: int, steps: int) -> None:
        self.shape = pairs, steps
        self.rows: list[Tensor] = []
        self.rows_of: dict[str, list[Tensor]] = {}
        self.places: list[tuple[Tensor | None, int | Tensor]] = []  # whose row it is, at which steps

    def add(self, slots: _Slots, row: Tensor, terms: dict[str, Tensor]) -> None:
        self.rows.append(row)
        self.places.append((slots.places, slots.age))
        for name, value in terms.items():
            self.rows_of.setdefault(name, []).append(value.detach())

    def whole(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, steps) each, NaN after the last."""
        history = self._laid_out(self.rows)
        unknown = torch.isnan(history)
        terms = {name: torch.where(unknown, torch.nan, self._laid_out(rows)) for name, rows in self.rows_of.items()}
        return history, terms

    def _laid_out(self, rows: list[Tensor]) -> Tensor:
        pairs, steps = self.shape
        if all(index is None for index, _ in self.places):
            found = torch.stack(rows, 1)
            return torch.cat([found, found.new_full((pairs, steps - len(rows)), torch.nan)], 1)
        every = torch.arange(pairs, device=rows[0].device)
        places = [
            (every if index is None else index) * steps + torch.as_tensor(age, device=every.device)
            for index, age in self.places
        ]
        flat = rows[0].new_full((pairs * steps,), torch.nan)
        return flat.index_copy(0, torch.cat(places), torch.cat(rows)).reshape(pairs, steps)


def _joins(solver: Solver, carry: Any) -> bool:
    return hasattr(solver, "joins") and solver.joins(carry)


def _add(whole: Tensor, index: Tensor | None, part: Tensor) -> Tensor:
    return whole + part if index is None else whole.index_add(0, index, part)


def _batched(leaf: Any, width: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == width


def _put(whole: Any, index: Tensor | None, part: Any) -> Any:
    if index is None:
        return part
    return tree_map(lambda a, b: a.index_copy(0, index, b), whole, part)
