"""One stage of a registration of a batch of pairs: all its levels, coarse to fine, and how each pair fares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import optim
from fnreg.gather import Padding
from fnreg.grid import Grid
from fnreg.inputs import Inputs
from fnreg.losses.objective import Objective
from fnreg.problem import Level, refine
from fnreg.pytree import in_parts, is_concrete, is_tracked, pytree_dataclass, static, tree_map, tree_take
from fnreg.solvers.base import Status, solver_of
from fnreg.solvers.loop import run
from fnreg.solvers.recorded import Recording, run_recorded
from fnreg.stages import Stage
from fnreg.starts import spread
from fnreg.symmetric import BothWays
from fnreg.transforms.base import Mapping, Params, Transform
from fnreg.transforms.domain import domain_axes


class RegistrationError(ValueError):
    """A single pair could not be registered, and what to do about it; in a batch this is its `Status`."""


class Event(NamedTuple):
    """What a progress callback is told."""

    stage: int  # from 0
    stages: int
    level: int  # 0 is the finest
    levels: int
    step: int
    steps: int
    active: int  # pairs still running
    pairs: int
    value: float  # mean over the running pairs


@pytree_dataclass
class Trace:
    """The course of one level.

    value : (steps,) or (B, steps), the objective at every step, NaN after the last
    terms : each term's unweighted value by name, likewise
    stage : from 0
    level : 0 is the finest
    """

    value: Tensor
    terms: dict[str, Tensor]
    stage: int = static()
    level: int = static()


@dataclasses.dataclass(frozen=True, eq=False)
class Failures:
    """Why pairs have failed: cause (B,) is the first `Status` of each, 0 without; a pair that is alone raises."""

    cause: Tensor
    alone: bool

    @staticmethod
    def at_start(whole: Inputs, size: int, alone: bool) -> Failures:
        """What is wrong with what was given."""
        failures = Failures(torch.zeros(size, dtype=torch.int64, device=whole.domain.center.device), alone)
        for pairs, cause in whole.faults() if whole.visible else ():
            failures = failures.add(pairs, cause)
        return failures

    def add(self, pairs: Tensor, cause: Status) -> Failures:
        """With a cause for those of these pairs (B,) that had none."""
        if self.alone and is_concrete(pairs) and bool(pairs.any()):
            raise RegistrationError(cause.remedy)
        return Failures(torch.where(pairs & (self.cause == 0), int(cause), self.cause), self.alone)


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The outcome of a stage; everything has the batch axis.

    then : what acts after its map; steps, traces : per level, coarse to fine
    """

    transform: Transform
    params: Params
    then: Mapping | None
    value: Tensor
    terms: dict[str, Tensor]
    status: Tensor
    steps: list[Tensor]
    traces: list[Trace]
    failures: Any = None  # what is known of causes

    def map(self, domain: Grid) -> Mapping:
        """The map that was found."""
        return Mapping(self.params, domain, self.transform)


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The levels of a stage."""

    whole: Inputs
    stage: Stage
    size: int
    then: Mapping | None
    padding: Padding | None
    symmetric: bool
    number: int
    stages: int
    progress: Callable[[Event], None] | None
    recording: Recording | None = None

    def solve(self, params: Params, starts: Params | None, failures: Failures) -> Solution:
        """All levels, coarse to fine.  With starts, S of them run per pair, fewer on every finer level."""
        whole, transform, stop = self.whole, self.stage.transform, self.stage.stop
        assert stop != "inherit"
        # Beside torch.func, autograd goes through any optimizer that works out of place.
        free = self.recording is not None and self.recording.every is None and not is_tracked()
        if whole.wrapped and (stop is not None or not (free or is_pure(self.stage.solver))):
            raise ValueError(
                "register inside vmap or grad needs stop=None and fnreg's own optimizer, such as adam(0.3, pure=True); "
                "differentiable(register, adjoint=Implicit()) takes any"
            )
        counts = self._counts()
        width = 1
        if starts is not None:
            params, width = spread(starts, transform, whole.domain, self.size)
        device = whole.domain.center.device
        status = torch.zeros(self.size, dtype=torch.int64, device=device)
        steps: list[Tensor] = []
        traces: list[Trace] = []
        level: Level | BothWays | None = None
        for depth, count in zip(range(len(counts) - 1, -1, -1), counts, strict=True):
            finer = level_at(whole, self.stage, depth, self.size, self.then, self.padding, self.symmetric)
            each = torch.arange(self.size, device=device).repeat_interleave(width)
            work = finer if starts is None else finer.take(each)
            params = transform.cast(params, whole.fixed[0].data.dtype) if level is None else params
            if not transform.linear:  # parameters are given on the finest level
                before = whole.domain if level is None else level.pairs.domain
                before = tree_take(before, each, domain_axes(before))
                params = refine(transform, params, before, work.pairs.domain)
            if level is None and whole.visible and objective_at(self.stage, depth).looks:
                apart = (self._in_parts(type(work).overlap, work, params) <= 0).reshape(self.size, width).all(1)
                failures = failures.add(apart, Status.NO_OVERLAP)
            level = finer
            solver = self.stage.solver if starts is None else solver_of(self.stage.solver, each)
            options: dict[str, Any] = {"steps": count, "frozen": (failures.cause > 0)[each]}
            options |= {"progress": self._reporter(depth, len(counts))}
            if (recording := self._recording(depth)) is None:
                solved = run(work, params, solver, stop=stop, **options)
            else:
                solved = run_recorded(work, params, solver, recording=recording, **options)
            params, status, taken, history = solved.params, solved.status, solved.steps, solved.history
            terms = solved.terms if count else dict.fromkeys(objective_at(self.stage, depth).names, history)
            if starts is not None:
                keep = 1 if depth == 0 else max(1, width // 2**whole.domain.ndim)
                best, chosen = self._best(work, params, status, width, keep)
                status, taken, history, terms = tree_take((status, taken, history, terms), best)
                params, width = tree_take(params, chosen), keep
            if whole.visible:
                failures = failures.add(status == int(Status.DIVERGED), Status.DIVERGED)
            steps.append(taken)
            traces.append(Trace(history, terms, self.number, depth))
        assert level is not None
        value, terms = self._in_parts(type(level).value, level, params)
        if whole.visible and objective_at(self.stage, 0).looks:
            failures = failures.add(self._in_parts(type(level).overlap, level, params) <= 0, Status.LOST_OVERLAP)
        status = torch.where(failures.cause > 0, failures.cause, status)
        if self.recording is not None:  # in place of faulty images there are others, see `Inputs.without`
            value, terms = tree_map(lambda x: torch.where(failures.cause > 0, torch.nan, x), (value, terms))
        return Solution(transform, params, self.then, value, terms, status, steps, traces, failures)

    def _recording(self, depth: int) -> Recording | None:
        """Where only the last steps count, these are of the finest level of the last stage."""
        if self.recording is None or self.recording.last is None:
            return self.recording
        return self.recording if depth == 0 and self.number == self.stages - 1 else Recording(last=0)

    def _counts(self) -> list[int]:
        """Steps per level, coarse to fine; a pyramid that ends early drops the coarsest."""
        asked, steps = self.stage.depth, self.stage.steps
        levels = min(asked, len(self.whole.fixed))
        several: Any = [steps] * asked if isinstance(steps, Integral) else steps
        whole = isinstance(several, Sequence) and all(isinstance(n, Integral) for n in several)
        if not whole or len(several) not in (asked, levels) or min(several) < 0:
            raise ValueError(
                f"steps is {steps!r} for {asked} levels: give one whole number, or one per level from coarse to fine"
            )
        return [int(n) for n in several][-levels:]

    def _best(
        self, work: Level | BothWays, params: Params, status: Tensor, width: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Positions of each pair's best start (B,), and of its `keep` best (B keep,), among B width."""
        value = self._in_parts(type(work).value, work, params)[0]
        useless = ~torch.isfinite(value) | (status == int(Status.DIVERGED))  # without overlap it is infinite
        value = torch.where(useless, torch.inf, value)
        order = value.reshape(self.size, width).sort(dim=1, stable=True).indices[:, :keep]
        chosen = order + width * torch.arange(self.size, device=order.device)[:, None]
        return chosen[:, 0], chosen.reshape(-1)

    def _in_parts(self, look: Callable[..., Any], work: Level | BothWays, params: Params) -> Any:
        """`look(work, params)`, of as many pairs at a time as run side by side."""
        width = self.stage.width
        if width is None or work.size <= width:
            return look(work, params)
        every = torch.arange(work.size, device=self.whole.domain.center.device)
        return in_parts(lambda part: look(work.take(every[part]), tree_take(params, part)), work.size, width)

    def _reporter(self, level: int, levels: int) -> Callable[[int, int, int, float], None] | None:
        progress = self.progress
        if progress is None:
            return None

        def tell(step: int, steps: int, active: int, value: float) -> None:
            progress(Event(self.number, self.stages, level, levels, step, steps, active, self.size, value))

        return tell


def objective_at(stage: Stage, depth: int) -> Objective:
    """That of a level, 0 the finest; a pyramid that ends early drops the coarsest."""
    several: Sequence[Objective] = stage.objective
    return several[-1 - depth] if len(several) > 1 else several[0]


def level_at(
    whole: Inputs,
    stage: Stage,
    depth: int,
    size: int,
    then: Mapping | None,
    padding: Padding | None,
    symmetric: bool,
) -> Level | BothWays:
    """The problem of a level of a stage, 0 the finest: both ways where that is asked for and there are two."""
    level = whole.level(depth, stage.transform, objective_at(stage, depth), size, padding, then)
    return BothWays.of(level) if symmetric and stage.transform.negates else level


def is_pure(solver: Any) -> bool:
    """Whether a solver's steps are operations of torch alone, through which its transforms go."""
    optimizer = getattr(solver, "optimizer", None)
    return optimizer is None or optim.is_pure(optimizer)
