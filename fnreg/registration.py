"""register(): stages and levels of solves, for one pair or a batch.

The batch is read off the ranks of the leaves: data (C, [Z,] Y, X) for one pair, (B, C, [Z,] Y, X) for a batch,
and so for every leaf of images, grids, masks, parameters and weights; shared leaves are not copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fnreg import optim
from fnreg.fields import determinant
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Input, Inputs, check_dimension, prepare
from fnreg.losses.terms import OF_IMAGES, OF_LABELS, Objective, mse
from fnreg.losses.terms import objective as as_objective
from fnreg.notes import warn
from fnreg.problem import Level, refine
from fnreg.pytree import (
    batch_axes,
    batch_size,
    first_pair,
    in_parts,
    is_concrete,
    is_tracked,
    is_transformed,
    over_batch,
    pytree_dataclass,
    static,
    tree_detach,
    tree_leaves,
    tree_map,
    tree_take,
)
from fnreg.sampling import MODES, Mode, Padding
from fnreg.search import Choice, search, search_levels
from fnreg.solvers.base import Status, Stop
from fnreg.solvers.descent import Descent
from fnreg.solvers.gauss_newton import GaussNewton
from fnreg.solvers.lbfgs import LBFGS
from fnreg.solvers.loop import run
from fnreg.solvers.newton_cg import NewtonCG
from fnreg.solvers.recorded import Recording, run_recorded
from fnreg.starts import STARTS, Start, begin, expand, initial_ranks, spread
from fnreg.symmetric import BothWays
from fnreg.transforms.base import Mapping, Params, Transform, domain_axes, same_place, warp
from fnreg.transforms.linear import Homogeneous


class RegistrationError(ValueError):
    """A single pair could not be registered, and what to do about it; in a batch this is its `Status`."""


class SpeedWarning(UserWarning):
    """A velocity is too fast for the squarings of its flow."""


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
class Stage:
    """One registration of a sequence; what is None is taken from the call of `register`.

    objective, steps : for all levels, or a sequence from coarse to fine
    """

    transform: Transform
    objective: Any = None
    solver: Any = None
    optimizer: Any = None
    levels: int | None = None
    steps: int | Sequence[int] | None = None
    stop: Stop | Literal["inherit"] | None = "inherit"


@pytree_dataclass
class Registration:
    """The result: a mapping from fixed to moving world points, and how it came about.

    For a batch all leaves but the grids' shared ones have a leading axis.

    mapping : the map
    fixed_grid, moving_grid : the images' grids
    value : the objective on the finest level under the mapping
    terms : each term's unweighted value
    steps : steps taken per level, coarse to fine, stage after stage, (L,) or (B, L)
    status : a `Status` per pair, the cause where it failed; `Status(code).remedy` says what to do
    history : one `Trace` per level, coarse to fine, stage after stage
    choice : where the registration began, if `start="auto"` had something to choose
    """

    mapping: Mapping
    fixed_grid: Grid
    moving_grid: Grid
    value: Tensor
    terms: dict[str, Tensor]
    steps: Tensor
    status: Tensor
    history: tuple[Trace, ...]
    choice: Choice | None = None

    @overload
    def warp(self, image: Image, mode: Mode = "linear", *, padding: Padding = "zeros") -> Image: ...
    @overload
    def warp(self, image: Subject, mode: Mode = "linear", *, padding: Padding = "zeros") -> Subject: ...
    def warp(self, image: Image | Subject, mode: Mode = "linear", *, padding: Padding = "zeros") -> Image | Subject:
        """The moving image or subject, or one in the same place, resampled onto the fixed grid; see `fnreg.warp`."""
        return warp(image, self.mapping, self.fixed_grid, mode=mode, padding=padding)

    def map_points(self, points: Tensor) -> Tensor:
        """Moving world points of fixed world points (N, D), or (B, N, D)."""
        return self.mapping.map_points(points)

    def inverse(self) -> Registration:
        """The registration seen from the other side: inverse mapping, grids swapped, the rest as it is."""
        mapping = self.mapping.inverse()
        if isinstance(mapping.transform, Homogeneous):  # its map does not depend on the domain
            mapping = dataclasses.replace(mapping, domain=self.moving_grid)
        grids = {"fixed_grid": self.moving_grid, "moving_grid": self.fixed_grid}
        return dataclasses.replace(self, mapping=mapping, choice=None, **grids)

    def jacobian(self) -> Image:
        """The determinant of the map's Jacobian matrix at the fixed voxels, (1, [Z,] Y, X): below 1 the map shrinks,
        at 0 or below it folds."""
        field, grid = self.mapping.displacement(self.fixed_grid), self.fixed_grid
        ranks = grid.ndim + 1, grid.ranks()
        found = over_batch(determinant, displacement=(field, ranks[0]), grid=(grid, ranks[1]))
        return Image(found.unsqueeze(-grid.ndim - 1), grid)

    @property
    def ok(self) -> Tensor:
        """Whether each pair ended without failure; where not, `status` says why."""
        return self.status <= int(Status.CONVERGED)

    def __repr__(self) -> str:
        count = "one pair" if self.status.ndim == 0 else f"{self.status.shape[0]} pairs"
        return f"Registration({self.mapping.transform}, {count}, value {self.value.mean():.4g})"


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
    """A registration as it went: what it was given, made ready, and the outcome of each stage, with a batch axis.

    single : whether that axis is of one pair that was given without
    """

    whole: Inputs
    stages: tuple[Stage, ...]
    done: tuple[Solution, ...]
    single: bool
    choice: Choice | None

    def shaped(self, tree: Any) -> Any:
        """Without the batch axis where the pair was given without."""
        return tree_map(lambda leaf: leaf[0], tree) if self.single else tree

    def registration(self) -> Registration:
        """What `register` gives of it."""
        done, last, shaped = self.done, self.done[-1], self.shaped
        mapping = Mapping(shaped(last.params), self.whole.domain, self.stages[-1].transform)
        if last.then is not None:
            mapping = (first_pair(last.then, last.then.ranks()) if self.single else last.then) @ mapping
        choice = self.choice
        if choice is not None:
            begun = dataclasses.replace(choice.mapping, params=shaped(choice.mapping.params))
            choice = Choice(begun, shaped(choice.candidate), choice.names)
        return Registration(
            mapping=mapping,
            fixed_grid=self.whole.domain,
            moving_grid=self.whole.moving[0].grid,
            value=shaped(last.value),
            terms=shaped(last.terms),
            steps=shaped(torch.stack([n for part in done for n in part.steps], 1)),
            status=shaped(last.status),
            history=tuple(shaped(trace) for part in done for trace in part.traces),
            choice=choice,
        )


def register(
    fixed: Input,
    moving: Input,
    transform: Transform | Stage | Sequence[Stage | Transform],
    *,
    objective: Any = mse,
    optimizer: Any = None,
    solver: Any = None,
    levels: int = 3,
    min_size: int = 4,
    steps: int | Sequence[int] = 100,
    then: Mapping | None = None,
    initial: Params | Mapping | None = None,
    starts: Params | None = None,
    start: Start = "header",
    interpolation: Mode = "linear",
    padding: Padding | None = None,
    symmetric: bool = False,
    stop: Stop | None = Stop(),
    progress: Callable[[Event], None] | None = None,
) -> Registration:
    """Find the transform that makes the moving image look like the fixed one: T minimises E(moving o T, fixed).

    fixed, moving : Image or Subject, or a pyramid of images, finest first; leaves with one rank more are a batch
    transform : what is optimised; a sequence of transforms or `Stage`s runs one after another: a linear one starts
        where the last ended if it can hold that map, else the last one's map acts after it
    objective : a term, a sum of terms, or a callable on the names of `losses.terms.NAMES`; or a sequence of these, one
        per level from coarse to fine, of which the last gives the value of the result
    optimizer : for the solver `Descent`, such as `adam(0.3)`
    solver : `Descent(...)` (default), `GaussNewton(...)` for few parameters, `NewtonCG(...)` or `LBFGS(...)`
    levels : images per pyramid, fewer where they become smaller than `min_size` voxels (a warning tells)
    steps : per level, or a sequence from coarse to fine
    then : a mapping that acts after the optimised one
    initial : parameters, or a linear `Mapping`, to start from
    starts : parameters with an axis of starts, (S, ...) or (B, S, ...) per pair; all run on the coarsest level, the
        best part of them goes on to each finer one, the best one is the result
    start : "header" trusts the world coordinates; "center" aligns the grids' centres, "moments" the centres of mass;
        "auto" tries these and rotations on coarse images and begins with the best, which the result tells as `choice`:
        for a first stage that can turn or shift, else it is "header"
    interpolation : of the moving image: "linear", or "cubic", the B-spline through its voxels, several times slower,
        whose derivatives have no jumps
    padding : None gives voxels that map outside of the moving image no weight; otherwise they count and see
        "border", "zeros", "reflection" or a number
    symmetric : the mean of the losses of moving onto fixed and of fixed onto moving, in the stages of SVF and SVFFD
    stop : when a pair is done; None takes all steps, which a run inside vmap or grad needs
    progress : called with an `Event` now and then

    Returns a `Registration`, without the history of its inputs: to differentiate through it by `loss.backward()`, use
    `fnreg.differentiable`.  A single pair that fails raises RegistrationError; in a batch its status names the
    cause, and it changes nothing for the others.  Raises ValueError or TypeError where the arguments do not fit
    together.

    >>> import torch, fnreg
    >>> disc = (fnreg.Grid((16, 16)).points() - 7.5).norm(dim=1).reshape(1, 16, 16) < 5
    >>> fixed = fnreg.Image(disc).gaussian(1.0)
    >>> moving = fnreg.Image(fixed.data, origin=(2.0, 1.0))
    >>> result = fnreg.register(fixed, moving, fnreg.Translation(), levels=1)
    >>> result.mapping.params["translation"].round().tolist()
    [2.0, 1.0]
    """
    made = course(
        fixed,
        moving,
        transform,
        objective=objective,
        optimizer=optimizer,
        solver=solver,
        levels=levels,
        min_size=min_size,
        steps=steps,
        then=then,
        initial=initial,
        starts=starts,
        start=start,
        interpolation=interpolation,
        padding=padding,
        symmetric=symmetric,
        stop=stop,
        progress=progress,
    )
    return made.registration()


def course(
    fixed: Input,
    moving: Input,
    transform: Transform | Stage | Sequence[Stage | Transform],
    *,
    objective: Any,
    optimizer: Any,
    solver: Any,
    levels: int,
    min_size: int,
    steps: int | Sequence[int],
    then: Mapping | None,
    initial: Params | Mapping | None,
    starts: Params | None,
    start: Start,
    interpolation: Mode,
    padding: Padding | None,
    symmetric: bool,
    stop: Stop | None,
    progress: Callable[[Event], None] | None,
    recording: Recording | None = None,
) -> Course:
    """`register` with all that it found, stage after stage.

    recording : how derivatives go through the loops of steps; None records nothing but where torch.func is around
    """
    stages = stages_of(transform, objective, solver, optimizer, levels, steps, stop)
    if symmetric and not any(stage.transform.negates for stage in stages):
        raise ValueError(f"{stages[-1].transform} has no cheap inverse: symmetric registration goes with SVF and SVFFD")
    objectives = [part for stage in stages for part in stage.objective]
    most = max(_levels(stage) for stage in stages)
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}: choose {', '.join(STARTS[:-1])} or {STARTS[-1]}")
    deeper = search_levels if start == "auto" else None
    recorded = recording is not None
    options: dict[str, Any] = {"objectives": objectives, "deeper": deeper, "detach": not recorded}
    whole = prepare(fixed, moving, then, levels=most, min_size=min_size, **options)
    whole = dataclasses.replace(whole, mode=_check_interpolation(interpolation))
    if recorded or is_transformed(objectives, initial, starts):
        whole = dataclasses.replace(whole, wrapped=True)
    if not whole.wrapped:
        _warn_of_gradients(fixed=fixed, moving=moving, objective=objectives, then=then, initial=initial, starts=starts)
        stages = [dataclasses.replace(stage, objective=tree_detach(stage.objective)) for stage in stages]
    sizes = dict(whole.sizes)
    for part in objectives:
        sizes |= batch_axes("objective", part, part.ranks())[1]
    if initial is not None:
        sizes |= batch_axes("initial", initial, initial_ranks(initial, stages[0].transform, whole.domain))[1]
    given_starts = [name for name, value in (("initial", initial), ("starts", starts)) if value is not None]
    given_starts += [f"start={start!r}"] if start != "header" else []
    if len(given_starts) > 1:
        raise ValueError(f"{' and '.join(given_starts)} both say where to begin: give one of them")
    batch = batch_size(sizes)
    single, size = batch is None, batch or 1
    failures = _Failures.at_start(whole, size, single)
    choice: Choice | None = None
    if start == "auto":
        first = stages[0]
        failed = failures.cause > 0
        choice = search(whole, first.transform, first.objective[0], size, padding, failed, width=_width(first))
        start, initial = "header", None if choice is None else choice.mapping
    done: list[Solution] = []
    for number, stage in enumerate(stages):
        earlier = (done[-1].map(whole.domain), done[-1].then) if done else None
        params, after = begin(
            whole, stage.transform, size, earlier, None if done else initial, "header" if done else start
        )
        run_of = _Stage(whole, stage, size, after, padding, symmetric, number, len(stages), progress, recording)
        failures = done[-1].failures if done else failures
        done.append(run_of.solve(params, None if done else starts, failures))
    if whole.visible:
        _warn_of_speed(done[-1], whole.domain)
    return Course(whole, tuple(stages), tuple(done), single, choice)


def evaluate(
    fixed: Image | Subject,
    moving: Image | Subject,
    mapping: Mapping,
    *,
    objective: Any = mse,
    interpolation: Mode = "linear",
    padding: Padding | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value of an objective under a mapping, and each term's: a search is `evaluate` on a batch of mappings.

    Returns scalars, or (B,) where a leaf of images, mapping or weights has a batch axis.
    """
    total = as_objective(objective)
    whole = prepare(fixed, moving, None, levels=1, min_size=1, detach=False, objectives=(total,))
    whole = dataclasses.replace(whole, mode=_check_interpolation(interpolation))
    check_dimension("mapping", mapping, whole.domain)
    ranks = mapping.ranks()
    sizes = batch_axes("mapping", mapping, ranks)[1] | batch_axes("objective", total, total.ranks())[1]
    size = batch_size(whole.sizes | sizes)
    own = isinstance(mapping.domain, Grid) and same_place(mapping.domain, whole.domain)
    domain = None if own else mapping.domain
    level = whole.level(0, mapping.transform, total, size or 1, padding, domain=domain)
    found = level.value(expand(mapping.params, ranks.params, size or 1))
    return tree_map(lambda leaf: leaf[0], found) if size is None else found


# -- stages ------------------------------------------------------------------------------------------------------------


def stages_of(
    transform: Any, objective: Any, solver: Any, optimizer: Any, levels: int, steps: Any, stop: Any
) -> list[Stage]:
    """The stages of a call of `register`, with nothing left open."""
    default = Stage(Transform(), objective, solver, optimizer, levels, steps, stop)
    given: list[Any] = [transform]
    if isinstance(transform, Sequence) and not isinstance(transform, str):
        given = list(transform)
    if not given:
        raise ValueError("no transform: give one, or a sequence of stages")
    return [_resolve(stage, default) for stage in given]


def _resolve(given: Stage | Transform, default: Stage) -> Stage:
    """A stage with everything that it leaves open taken from the call, its objective and solver made ready."""
    stage = Stage(given) if isinstance(given, Transform) else given
    if not isinstance(stage, Stage) or not isinstance(stage.transform, Transform):
        raise TypeError(f"transform is {given!r}: expected a value such as Rigid(), a Stage, or a sequence of these")
    solver, optimizer = stage.solver, stage.optimizer
    if solver is None and optimizer is None:
        solver, optimizer = default.solver, default.optimizer
    if solver is not None and (isinstance(solver, type) or not (hasattr(solver, "init") and hasattr(solver, "step"))):
        raise TypeError(f"solver is {solver!r}: expected a value such as Descent() or GaussNewton()")
    stop = default.stop if stage.stop == "inherit" else stage.stop
    if stop is not None and not isinstance(stop, Stop):
        raise TypeError(f"stop is {stop!r}: expected Stop(...), or None to take all steps")
    if optimizer is not None:
        if isinstance(solver, (GaussNewton, NewtonCG, LBFGS)):
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
        several,
        Descent() if solver is None else solver,
        levels=levels,
        steps=default.steps if stage.steps is None else stage.steps,
        stop=stop,
    )


def _check_interpolation(mode: Mode) -> Mode:
    if mode == "nearest":
        raise ValueError("interpolation is 'nearest', which has no derivative: choose linear or cubic")
    if mode not in MODES:
        raise ValueError(f"unknown interpolation {mode!r}: choose linear or cubic")
    return mode


def _warn_of_gradients(**given: Any) -> None:
    """What autograd is to take derivatives by comes to nothing here: say so."""
    leaves = {name: [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for name, tree in given.items()}
    asking = [name for name, found in leaves.items() if any(leaf.requires_grad for leaf in found)]
    if asking and torch.is_grad_enabled():
        warn(
            f"{' and '.join(asking)} of register asks for a gradient, but its result is detached: call "
            "fnreg.differentiable(fnreg.register) instead, or give detached tensors",
            stacklevel=4,
        )


def _warn_of_speed(found: Solution, domain: Grid) -> None:
    """Squaring a flow is inaccurate where its first step is longer than a voxel: say so."""
    mapping = found.map(domain)

    def one(mapping: Mapping) -> Any:
        return mapping.transform.first_step(mapping.params, mapping.domain)

    step = over_batch(one, mapping=(mapping, mapping.ranks()))
    if step is not None and is_concrete(step) and bool((step > 1).any()):
        more = math.ceil(math.log2(float(step[torch.isfinite(step)].max())))
        warn(
            f"velocities of {found.transform} are too fast for its squarings in {int((step > 1).sum())} of {len(step)} "
            f"pairs, so its inverse is inaccurate there: use {more} steps more, or a stronger penalty",
            SpeedWarning,
            stacklevel=4,
        )


def _levels(stage: Stage) -> int:
    return 1 if stage.levels is None else stage.levels


@dataclasses.dataclass(frozen=True, eq=False)
class _Failures:
    """Why pairs have failed: cause (B,) is the first `Status` of each, 0 without; a pair that is alone raises."""

    cause: Tensor
    alone: bool

    @staticmethod
    def at_start(whole: Inputs, size: int, alone: bool) -> _Failures:
        failures = _Failures(torch.zeros(size, dtype=torch.int64, device=whole.domain.center.device), alone)
        for pairs, cause in whole.faults() if whole.visible else ():
            failures = failures.add(pairs, cause)
        return failures

    def add(self, pairs: Tensor, cause: Status) -> _Failures:
        if self.alone and is_concrete(pairs) and bool(pairs.any()):
            raise RegistrationError(cause.remedy)
        return _Failures(torch.where(pairs & (self.cause == 0), int(cause), self.cause), self.alone)


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
class _Stage:
    """One stage of a registration of a batch of pairs."""

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

    def solve(self, params: Params, starts: Params | None, failures: _Failures) -> Solution:
        """All levels, coarse to fine.  With starts, S of them run per pair, fewer on every finer level."""
        whole, transform, stop = self.whole, self.stage.transform, self.stage.stop
        assert stop != "inherit"
        # Beside torch.func, autograd goes through any optimizer that works out of place.
        free = self.recording is not None and self.recording.every is None and not is_tracked()
        if whole.wrapped and (stop is not None or not (free or _is_pure(self.stage.solver))):
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
            finer = self._level(depth)
            each = torch.arange(self.size, device=device).repeat_interleave(width)
            work = finer if starts is None else finer.take(each)
            params = transform.cast(params, whole.fixed[0].data.dtype) if level is None else params
            if not transform.linear:  # parameters are given on the finest level
                before = whole.domain if level is None else level.pairs.domain
                before = tree_take(before, each, domain_axes(before))
                params = refine(transform, params, before, work.pairs.domain)
            if level is None and whole.visible and _looks(self._objective(depth)):
                apart = (self._in_parts(type(work).overlap, work, params) <= 0).reshape(self.size, width).all(1)
                failures = failures.add(apart, Status.NO_OVERLAP)
            level = finer
            solver = self.stage.solver if starts is None else self.stage.solver.take(each)
            options: dict[str, Any] = {"steps": count, "frozen": (failures.cause > 0)[each]}
            options |= {"progress": self._reporter(depth, len(counts))}
            if (recording := self._recording(depth)) is None:
                solved = run(work, params, solver, stop=stop, **options)
            else:
                solved = run_recorded(work, params, solver, recording=recording, **options)
            params, status, taken, history = solved.params, solved.status, solved.steps, solved.history
            terms = solved.terms if count else dict.fromkeys(self._objective(depth).names, history)
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
        if whole.visible and _looks(self._objective(0)):
            failures = failures.add(self._in_parts(type(level).overlap, level, params) <= 0, Status.LOST_OVERLAP)
        status = torch.where(failures.cause > 0, failures.cause, status)
        return Solution(transform, params, self.then, value, terms, status, steps, traces, failures)

    def _level(self, depth: int) -> Level | BothWays:
        stage = self.stage
        objective = self._objective(depth)
        level = self.whole.level(depth, stage.transform, objective, self.size, self.padding, self.then)
        return BothWays.of(level) if self.symmetric and stage.transform.negates else level

    def _recording(self, depth: int) -> Recording | None:
        """Where only the last steps count, these are of the finest level of the last stage."""
        if self.recording is None or self.recording.last is None:
            return self.recording
        return self.recording if depth == 0 and self.number == self.stages - 1 else Recording(last=0)

    def _objective(self, depth: int) -> Objective:
        """That of a level, 0 the finest; a pyramid that ends early drops the coarsest."""
        several: Sequence[Objective] = self.stage.objective
        return several[-1 - depth] if len(several) > 1 else several[0]

    def _counts(self) -> list[int]:
        """Steps per level, coarse to fine; a pyramid that ends early drops the coarsest."""
        asked, steps = _levels(self.stage), self.stage.steps
        levels = min(asked, len(self.whole.fixed))
        several: Any = [steps] * asked if isinstance(steps, Integral) else steps or ()
        counts = [int(n) for n in several]
        if len(counts) not in (asked, levels) or min(counts) < 0:
            raise ValueError(
                f"steps is {steps} for {asked} levels: give one number, or one per level from coarse to fine"
            )
        return counts[-levels:]

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
        width = _width(self.stage)
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


def _width(stage: Stage) -> int | None:
    """How many pairs run side by side; None for all."""
    return stage.stop.width if isinstance(stage.stop, Stop) else None


def _looks(objective: Objective) -> bool:
    """Whether an objective asks for voxels, of which some have to be in sight."""
    return not objective.needs.isdisjoint((*OF_IMAGES, *OF_LABELS))


def _is_pure(solver: Any) -> bool:
    optimizer = getattr(solver, "optimizer", None)
    parts = optimizer.parts if isinstance(optimizer, optim.Chain) else (optimizer,)
    return all(part is None or isinstance(part, optim.Clip) or getattr(part, "pure", False) for part in parts)
