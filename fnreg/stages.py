"""What `register` is asked to do, one stage after another, with nothing left open."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from fnreg import optim
from fnreg.losses.objective import Objective
from fnreg.losses.objective import objective as as_objective
from fnreg.solvers.base import Stop
from fnreg.solvers.descent import Descent
from fnreg.solvers.gauss_newton import GaussNewton
from fnreg.transforms.base import Transform


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One registration of a sequence: a transform, and what it has of its own in place of what `register` was given.

    transform : what is optimised
    objective : for all levels, or a sequence from coarse to fine; None is the call's
    optimizer : for the solver `Descent`, with the limit of the call's; None is the call's, unless there is a solver
    solver : None is the call's, unless there is an optimizer
    levels : None is the call's
    steps : per level, or a sequence from coarse to fine; None is the call's
    stop : when a pair is done; None takes all steps, "inherit" is the call's

    >>> import fnreg
    >>> rigid = fnreg.Stage(fnreg.Rigid(), solver=fnreg.GaussNewton(), levels=1, steps=10)
    >>> bent = fnreg.Stage(fnreg.FFD(stride=4), objective=fnreg.mse + 0.1 * fnreg.bending)
    >>> fixed, moving = fnreg.data.digits(9)
    >>> fnreg.register(fixed, moving, [rigid, bent], levels=2, steps=20).steps.shape  # of three levels
    torch.Size([3])
    """

    transform: Transform
    _: dataclasses.KW_ONLY
    objective: Any = None
    optimizer: Any = None
    solver: Any = None
    levels: int | None = None
    steps: int | Sequence[int] | None = None
    stop: Stop | Literal["inherit"] | None = "inherit"

    @property
    def depth(self) -> int:
        """How many levels there are."""
        return 1 if self.levels is None else self.levels

    @property
    def width(self) -> int | None:
        """How many pairs run side by side; None for all."""
        return self.stop.width if isinstance(self.stop, Stop) else None


def stages_of(
    transform: Any, *, objective: Any, optimizer: Any, solver: Any, levels: int, steps: Any, stop: Any
) -> list[Stage]:
    """The stages of a call of `register`, with nothing left open."""
    default = Stage(
        Transform(),
        objective=objective,
        optimizer=optimizer,
        solver=solver,
        levels=levels,
        steps=steps,
        stop=stop,
    )
    return [_resolve(stage, default) for stage in given(transform)]


def given(transform: Any) -> list[Any]:
    """What `register` takes as its transform, one after another."""
    several = list(transform) if isinstance(transform, Sequence) and not isinstance(transform, str) else [transform]
    if not several:
        raise ValueError("no transform: give one, or a sequence of stages")
    return several


def _resolve(asked: Stage | Transform, default: Stage) -> Stage:
    """A stage with everything that it leaves open taken from the call, its objective and solver made ready."""
    stage = Stage(asked) if isinstance(asked, Transform) else asked
    if not isinstance(stage, Stage) or not isinstance(stage.transform, Transform):
        raise TypeError(f"transform is {asked!r}: expected a value such as Rigid(), a Stage, or a sequence of these")
    solver, optimizer = stage.solver, stage.optimizer
    if solver is None and optimizer is None:
        solver, optimizer = default.solver, default.optimizer
    names = ("init", "step", "scales")
    if solver is not None and (isinstance(solver, type) or not all(hasattr(solver, name) for name in names)):
        raise TypeError(
            f"solver is {solver!r}: expected a value such as Descent() or GaussNewton(), or one of your own with "
            f"{', '.join(names)}"
        )
    stop = default.stop if stage.stop == "inherit" else stage.stop
    if stop is not None and not isinstance(stop, Stop):
        raise TypeError(f"stop is {stop!r}: expected Stop(...), or None to take all steps")
    if optimizer is not None:
        if solver is not None and not isinstance(solver, Descent):
            raise ValueError(f"{type(solver).__name__} has no optimizer: give either a solver or an optimizer")
        limited = default.solver if solver is None else solver
        solver = Descent(optim.as_optimizer(optimizer), limited.limit if isinstance(limited, Descent) else None)
    objective = default.objective if stage.objective is None else stage.objective
    given_each: Sequence[Any] = objective if isinstance(objective, (list, tuple)) else [objective]
    several = tuple(as_objective(one) for one in given_each)
    levels = default.levels if stage.levels is None else stage.levels
    if len(several) != 1 and len(several) != levels:
        raise ValueError(
            f"{len(several)} objectives for {levels} levels: give one, or one per level from coarse to fine"
        )
    if isinstance(solver, GaussNewton):
        for one in several:
            one.check_squares()
    if getattr(solver, "descends", False) and not stage.transform.descends:
        raise ValueError(
            f"{stage.transform} composes and smooths its steps, so it descends no stated objective, and "
            f"{type(solver).__name__} needs one: choose SVFFD, SVF or FFD, or solver=Descent()"
        )
    return Stage(
        stage.transform,
        objective=several,
        solver=Descent() if solver is None else solver,
        levels=levels,
        steps=default.steps if stage.steps is None else stage.steps,
        stop=stop,
    )


def first_transform(transform: Any) -> Transform:
    """Of what `register` takes as its transform, that which is optimised first."""
    first = given(transform)[0]
    return first.transform if isinstance(first, Stage) else first


def objectives_of(transform: Any, objective: Any) -> list[list[Objective]]:
    """Of what `register` takes as its transform and objective, each stage's objectives from coarse to fine."""
    found: list[list[Objective]] = []
    for stage in given(transform):
        own = stage.objective if isinstance(stage, Stage) and stage.objective is not None else objective
        found.append([as_objective(one) for one in (own if isinstance(own, (list, tuple)) else [own])])
    return found
