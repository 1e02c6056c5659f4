"""Derivatives through the steps of a registration, as they were taken, and in less memory by taking them twice."""

from __future__ import annotations

import dataclasses
from typing import Any

from fnreg.call import check_unseen, course_of, stages_in
from fnreg.levels import is_pure
from fnreg.optim import purely
from fnreg.registration import Registration
from fnreg.solvers.descent import Descent
from fnreg.solvers.recorded import Recording
from fnreg.stages import Stage


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Through the steps as they were taken: exact for what was computed, converged or not, for every transform.

    All steps of a level are taken, `stop` is None, and memory grows with their number.  `adam` and `sgd` become
    `pure=True`, whose derivatives are sound.  Also by start parameters (`initial`, `starts`) and by the learning rate.

    last : only so many steps of the finest level of the last stage count, all before them are constants; None counts
        all.  The derivative is then that of a start at the solution, which forgets less the more steps are taken
    """

    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and not (isinstance(self.last, int) and self.last > 0):
            raise ValueError(f"last is {self.last!r}: expected a positive number of steps, or None for all")

    def solve(self, given: dict[str, Any]) -> Registration:
        """See `fnreg.adjoint.Adjoint`."""
        return _recorded(self, given, Recording(last=self.last))


@dataclasses.dataclass(frozen=True)
class Checkpointed:
    """As `Unrolled()`, with steps computed anew for their derivative: memory grows with the root of their number.

    In reverse only, and with optimizers of `fnreg.optim`.

    every : steps between two that are kept; None takes the root of the number of steps of a level
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not (isinstance(self.every, int) and self.every > 0):
            raise ValueError(f"every is {self.every!r}: expected a positive number of steps, or None for their root")

    def solve(self, given: dict[str, Any]) -> Registration:
        """See `fnreg.adjoint.Adjoint`."""
        return _recorded(self, given, Recording(every=self.every or 0))


def _recorded(adjoint: Unrolled | Checkpointed, given: dict[str, Any], recording: Recording) -> Registration:
    stopping = given.get("stop") is not None
    given = given | {"stop": None}
    stages = [_pure(stage) for stage in stages_in(given)]
    if stopping or any(stage.stop is not None for stage in stages):
        raise ValueError(f"{adjoint} differentiates a fixed number of steps: leave stop out, or give stop=None")
    if recording.every is not None:
        check_unseen(given, stages, adjoint)
        for stage in stages:
            if not is_pure(stage.solver):
                raise ValueError(f"{adjoint} takes fnreg's own optimizers, not {stage.solver!r}: use Unrolled()")
    return course_of(given, stages, recording=recording).registration()


def _pure(stage: Stage) -> Stage:
    """With optimizers through which derivatives go soundly, of the same formulas."""
    solver = stage.solver
    if not isinstance(solver, Descent):
        return stage
    return dataclasses.replace(stage, solver=dataclasses.replace(solver, optimizer=purely(solver.optimizer)))
