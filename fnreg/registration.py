"""register(): stages and levels of solves, for one pair or a batch.

The batch is read off the ranks of the leaves: data (C, [Z,] Y, X) for one pair, (B, C, [Z,] Y, X) for a batch,
and so for every leaf of images, grids, masks, parameters and weights; shared leaves are not copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fnreg import optim
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Input, Inputs, prepare
from fnreg.losses.terms import mse
from fnreg.losses.terms import objective as as_objective
from fnreg.problem import Level
from fnreg.pytree import (
    batch_axes,
    batch_size,
    is_concrete,
    over_batch,
    pytree_dataclass,
    tree_detach,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_take,
)
from fnreg.sampling import Mode, Padding
from fnreg.solvers.base import Status, Stop, run
from fnreg.solvers.descent import Descent
from fnreg.solvers.gauss_newton import GaussNewton
from fnreg.transforms.base import Mapping, Params, Transform, warp
from fnreg.transforms.linear import Linear, Translation

Start = Literal["header", "center", "moments"]


class RegistrationError(ValueError):
    """A single pair could not be registered; in a batch this is a status."""


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


class Trace(NamedTuple):
    """The course of one level."""

    stage: int
    level: int  # 0 is the finest
    value: Tensor  # (steps,) or (B, steps) objective at every step, NaN after the last


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One registration of a sequence; what is None is taken from the call of `register`."""

    transform: Transform
    objective: Any = None
    solver: Any = None
    optimizer: Any = None
    levels: int | None = None
    steps: int | Sequence[int] | None = None
    stop: Stop | None | Literal["inherit"] = "inherit"


@pytree_dataclass
class Registration:
    """The result: a mapping from fixed to moving world points, and how it came about.

    For a batch all leaves but the grids' shared ones have a leading axis.

    mapping : the map; fixed_grid, moving_grid : the images' grids
    value : the objective on the finest level after the last step; terms : each term's unweighted value
    steps : steps taken per level, coarse to fine, stage after stage, (L,) or (B, L)
    status : a `Status` per pair
    history : one `Trace` per level, coarse to fine, stage after stage
    """

    mapping: Mapping
    fixed_grid: Grid
    moving_grid: Grid
    value: Tensor
    terms: dict[str, Tensor]
    steps: Tensor
    status: Tensor
    history: tuple[Trace, ...]

    def warp(self, image: Image | Subject, mode: Mode = "linear", *, padding: Padding = "zeros") -> Image:
        """The moving image, or one on the same place, resampled onto the fixed grid."""
        source = image.image if isinstance(image, Subject) else image
        return warp(source, self.mapping, self.fixed_grid, mode=mode, padding=padding)

    def map_points(self, points: Tensor) -> Tensor:
        """Moving world points of fixed world points (N, D), or (B, N, D)."""
        return self.mapping.map_points(points)

    def inverse(self) -> Registration:
        """The registration seen from the other side: inverse mapping, grids swapped, the rest as it is."""
        return dataclasses.replace(
            self, mapping=self.mapping.inverse(), fixed_grid=self.moving_grid, moving_grid=self.fixed_grid
        )

    @property
    def ok(self) -> Tensor:
        """Whether each pair ended without failure."""
        return self.status <= int(Status.CONVERGED)

    def __repr__(self) -> str:
        count = "one pair" if self.status.ndim == 0 else f"{self.status.shape[0]} pairs"
        return f"Registration({self.mapping.transform}, {count}, value {self.value.mean():.4g})"


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
    padding: Padding | None = None,
    stop: Stop | None = Stop(),  # noqa: B008  (frozen)
    progress: Callable[[Event], None] | None = None,
) -> Registration:
    """Find the transform that makes the moving image look like the fixed one: T minimises E(moving o T, fixed).

    fixed, moving : Image or Subject, or a pyramid of images, finest first; leaves with one rank more are a batch
    transform : what is optimised; a sequence of transforms or `Stage`s runs one after another: a linear one starts
        where the last ended if it can hold that map, else the last one's map acts after it
    objective : a term, a sum of terms, or a callable on the names of `losses.terms.NAMES`
    optimizer : for the solver `Descent`; solver : `Descent(...)` (default) or `GaussNewton(...)`
    levels : images per pyramid, fewer where they become smaller than `min_size` voxels (a warning tells)
    steps : per level, or a sequence from coarse to fine
    then : a mapping that acts after the optimised one; initial : parameters, or a linear Mapping, to start from
    starts : parameters with an axis of starts, (S, ...) or (B, S, ...) per pair; all run on the coarsest level, the
        best part of them goes on to each finer one, the best one is the result
    start : "header" trusts the world coordinates; "center" aligns the grids' centres, "moments" the centres of mass
    padding : None gives voxels that map outside of the moving image no weight; otherwise they count and see
        "border", "zeros", "reflection" or a number
    stop : when a pair is done; None takes all steps, which a run inside vmap or grad needs
    progress : called with an `Event` now and then

    Returns a `Registration`.  A single pair that fails raises RegistrationError; in a batch it has its status and
    changes nothing for the others.  Raises ValueError or TypeError where the arguments do not fit together.

    >>> import torch, fnreg
    >>> disc = (fnreg.Grid((16, 16)).points() - 7.5).norm(dim=1).reshape(1, 16, 16) < 5
    >>> fixed = fnreg.Image(disc).gaussian(1.0)
    >>> moving = fnreg.Image(fixed.data, origin=(2.0, 0.0))
    >>> result = fnreg.register(fixed, moving, fnreg.Translation(), levels=1)
    >>> result.mapping.params["translation"].round().tolist()
    [2.0, 0.0]
    """
    stages = [transform] if isinstance(transform, (Transform, Stage)) else list(transform)
    if not stages:
        raise ValueError("no transform: give one, or a sequence of stages")
    whole = prepare(fixed, moving, then, levels=levels, min_size=min_size)
    default = Stage(
        Translation(), objective, solver, optimizer, levels=levels, steps=steps, stop=stop
    )
    traces: list[Trace] = []
    taken: list[Tensor] = []
    result: _Solution | None = None
    for number, stage in enumerate(stages):
        resolved = _resolve(stage, default)
        last = number == len(stages) - 1
        result = _run_stage(
            whole,
            resolved,
            previous=result,
            initial=initial if number == 0 else None,
            starts=starts if number == 0 else None,
            start=start if number == 0 else "header",
            padding=padding,
            report=_reporter(progress, number, len(stages)),
            number=number,
        )
        traces += result.traces
        taken += result.steps
        if not last and whole.batch is None:
            _raise_failed(result)
    assert result is not None
    if whole.batch is None:
        _raise_failed(result)
    single = whole.batch is None

    def shaped(leaf: Tensor) -> Tensor:
        return leaf[0] if single else leaf

    return Registration(
        mapping=result.mapping(whole, single),
        fixed_grid=whole.domain,
        moving_grid=whole.moving[0].grid,
        value=shaped(result.value),
        terms={name: shaped(value) for name, value in result.terms.items()},
        steps=shaped(torch.stack(taken, 1)),
        status=shaped(result.status),
        history=tuple(trace._replace(value=shaped(trace.value)) for trace in traces),
    )


def evaluate(
    fixed: Image | Subject,
    moving: Image | Subject,
    mapping: Mapping,
    *,
    objective: Any = mse,
    padding: Padding | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value of an objective under a mapping, and each term's: a search is `evaluate` on a batch of mappings.

    Returns scalars, or (B,) where a leaf of images, mapping or weights has a batch axis.
    """
    whole = prepare(fixed, moving, None, levels=1, min_size=1)
    total = as_objective(objective)
    ranks = mapping.ranks().params
    sizes = batch_axes("mapping", mapping, mapping.ranks())[1] | batch_axes("objective", total, total.ranks())[1]
    size = batch_size(whole.sizes | sizes)
    level = whole.level(0, mapping.transform, total, size or 1, padding, None)
    value, terms = level.value(_expand(mapping.params, ranks, size or 1))
    if size is None:
        return value[0], {name: term[0] for name, term in terms.items()}
    return value, terms


# -- stages -----------------------------------------------------------------------------------------------------


def _resolve(stage: Stage | Transform, default: Stage) -> Stage:
    given = Stage(stage) if isinstance(stage, Transform) else stage
    if not isinstance(given, Stage):
        raise TypeError(f"a stage is a Transform or a Stage, not {type(given).__name__}")
    if not isinstance(given.transform, Transform):
        raise TypeError(f"transform is {given.transform!r}: expected a value such as Rigid()")

    def pick(name: str) -> Any:
        value = getattr(given, name)
        return getattr(default, name) if value is None else value

    solver, optimizer = pick("solver"), pick("optimizer")
    if given.solver is not None and given.optimizer is None:
        optimizer = None
    if optimizer is not None:
        if isinstance(solver, GaussNewton):
            raise ValueError("GaussNewton has no optimizer: give one of solver and optimizer")
        limit = solver.limit if isinstance(solver, Descent) else None
        solver = Descent(optim.as_optimizer(optimizer), limit)
    stop = default.stop if given.stop == "inherit" else given.stop
    return Stage(
        given.transform,
        as_objective(pick("objective")),
        Descent() if solver is None else solver,
        None,
        pick("levels"),
        pick("steps"),
        stop,
    )


def _reporter(progress: Callable[[Event], None] | None, stage: int, stages: int) -> Any:
    if progress is None:
        return None

    def level_reporter(level: int, levels: int, pairs: int) -> Callable[[int, int, int, float], None]:
        def tell(step: int, steps: int, active: int, value: float) -> None:
            progress(Event(stage, stages, level, levels, step, steps, active, pairs, value))

        return tell

    return level_reporter


@dataclasses.dataclass(frozen=True, eq=False)
class _Solution:
    """The outcome of a stage, batched."""

    transform: Transform
    params: Params
    then: Mapping | None
    value: Tensor
    terms: dict[str, Tensor]
    status: Tensor
    steps: list[Tensor]
    traces: list[Trace]
    reasons: list[tuple[Tensor, str]]

    def mapping(self, whole: Inputs, single: bool) -> Mapping:
        params = tree_map(lambda leaf: leaf[0], self.params) if single else self.params
        found = Mapping(params, whole.domain, self.transform)
        return found if self.then is None else self.then @ found


def _raise_failed(result: _Solution) -> None:
    if not is_concrete(result.status) or int(result.status[0]) <= int(Status.CONVERGED):
        return
    for pairs, reason in result.reasons:
        if bool(pairs[0]):
            raise RegistrationError(reason)
    raise RegistrationError(
        "the registration diverged: the objective became infinite or not a number; "
        "use a smaller learning rate, another start ('center', 'moments'), or stop=Stop() with fewer steps"
    )


def _run_stage(
    whole: Inputs,
    stage: Stage,
    *,
    previous: _Solution | None,
    initial: Any,
    starts: Any,
    start: Start,
    padding: Padding | None,
    report: Any,
    number: int,
) -> _Solution:
    transform, total = stage.transform, stage.objective
    levels = min(stage.levels or 1, len(whole.fixed))
    counts = [stage.steps] * levels if isinstance(stage.steps, int) else [int(n) for n in stage.steps or ()]
    if len(counts) == (stage.levels or 1) > levels:
        counts = counts[-levels:]
    if len(counts) != levels or min(counts) < 0:
        raise ValueError(f"steps is {stage.steps} for {levels} levels: give one number, or one per level from coarse to fine")
    if whole.wrapped and (stage.stop is not None or not _is_pure(stage.solver)):
        raise ValueError(
            "register inside vmap or grad needs stop=None and an optimizer of fnreg's own lines, adam(0.3, pure=True)"
        )
    domain = whole.domain
    sizes = dict(whole.sizes) | batch_axes("objective", total, total.ranks())[1]
    if initial is not None and not isinstance(initial, Mapping):
        sizes |= batch_axes("initial", initial, transform.ranks(domain))[1]
    size = batch_size(sizes) or 1
    if size > 1 and whole.batch is None:
        raise ValueError("a batch of initial parameters or weights needs a batch of images: use starts, or expand one image")

    then = whole.then
    params, then = _begin(whole, transform, size, previous, initial, start, then)
    width = 1
    pick: Tensor | None = None
    if starts is not None:
        params, width = _spread(starts, transform, domain, size)
        pick = torch.arange(size, device=domain.center.device).repeat_interleave(width)

    reasons = whole.faults() if previous is None and whole.visible else []
    failed = previous.status > int(Status.CONVERGED) if previous is not None else None
    for pairs, _ in reasons:
        failed = pairs if failed is None else failed | pairs
    frozen = None if failed is None else failed.expand(size)

    steps_taken: list[Tensor] = []
    traces: list[Trace] = []
    status = torch.zeros(size, dtype=torch.int64, device=domain.center.device)
    before: Level | None = None
    for depth in range(levels - 1, -1, -1):
        level = whole.level(depth, transform, total, size, padding, then)
        if before is not None:
            wide = before if pick is None else before.take(pick)
            params = wide.refine(params, level if pick is None else level.take(pick))
        before = level
        work = level if pick is None else level.take(pick)
        held = frozen if frozen is None or pick is None else frozen[pick]
        if depth == levels - 1 and whole.visible:
            lost = work.overlap(params) <= 0
            lost = lost.reshape(size, width).all(1)
            reasons = [*reasons, (lost, _no_overlap(start))]
            frozen = lost if frozen is None else frozen | lost
            held = frozen if pick is None else frozen[pick]
        tell = None if report is None else report(depth, levels, size)
        solved = run(
            work, params, stage.solver, steps=counts[levels - 1 - depth], stop=stage.stop, frozen=held, progress=tell
        )
        params, status, history, taken = solved.params, solved.status, solved.history, solved.steps
        if pick is not None:
            keep = 1 if depth == 0 else max(1, width // 2**domain.ndim)
            value = work.value(params)[0]
            value = torch.where(torch.isfinite(value) & (status != int(Status.DIVERGED)), value, torch.inf)
            value = torch.where(work.overlap(params) > 0, value, torch.inf)
            order = value.reshape(size, width).sort(dim=1, stable=True).indices  # (B, S)
            chosen = order[:, :keep] + width * torch.arange(size, device=order.device)[:, None]
            best = chosen[:, 0]
            params = tree_take(params, chosen.reshape(-1))
            status, history, taken = status[best], history[best], taken[best]
            pick = torch.arange(size, device=order.device).repeat_interleave(keep)
            width = keep
        if stage.stop is not None or whole.visible:
            worse = status == int(Status.DIVERGED)
            frozen = worse if frozen is None else frozen | worse
        steps_taken.append(taken)
        traces.append(Trace(number, depth, history))
    assert before is not None
    value, terms = before.value(params)
    if frozen is not None:
        status = torch.where(frozen, int(Status.DIVERGED), status)
    if whole.visible:
        empty = before.overlap(params) <= 0
        status = torch.where(empty, int(Status.DIVERGED), status)
        reasons = [*reasons, (empty, "the images lost their overlap on the way: use a smaller learning rate, fewer levels, or padding='border'")]
    return _Solution(transform, params, then, value, terms, status, steps_taken, traces, reasons)


def _no_overlap(start: Start) -> str:
    hint = "start='center' or start='moments'" if start == "header" else "an initial transform, and check the headers"
    return f"the images do not overlap in world coordinates at the start: use {hint}"


def _is_pure(solver: Any) -> bool:
    optimizer = getattr(solver, "optimizer", None)
    parts = optimizer.parts if isinstance(optimizer, optim.Chain) else (optimizer,)
    return all(part is None or isinstance(part, optim.Clip) or getattr(part, "pure", False) for part in parts)


def _expand(params: Params, ranks: Any, size: int) -> Params:
    return tree_map(lambda leaf, rank: leaf.expand(size, *leaf.shape) if leaf.ndim == rank else leaf, params, ranks)


def _begin(
    whole: Inputs, transform: Transform, size: int, previous: _Solution | None, initial: Any, start: Start,
    then: Mapping | None,
) -> tuple[Params, Mapping | None]:
    """Start parameters (B, ...) and the map that acts after."""
    domain = whole.domain
    ranks = transform.ranks(domain)
    if previous is not None:
        before = Mapping(previous.params, domain, previous.transform)
        if _holds(transform, previous.transform):
            return _fit(transform, before, domain, size), previous.then
        identity = over_batch(transform.init, domain=(domain, domain.ranks()))
        return _expand(identity, ranks, size), before if previous.then is None else previous.then @ before
    if isinstance(initial, Mapping):
        if not isinstance(transform, Linear):
            raise ValueError(f"initial is a Mapping but {transform} is not linear: pass it as then, or give parameters")
        return _fit(transform, initial, domain, size), then
    if initial is not None:
        if tree_flatten(initial)[1] != tree_flatten(ranks)[1]:
            raise ValueError(f"initial does not fit {transform}: expected the structure of {transform}.init(domain)")
        initial = initial if whole.wrapped else tree_detach(initial)
        return _expand(initial, ranks, size), then
    if start == "header":
        identity = over_batch(transform.init, domain=(domain, domain.ranks()))
        return _expand(identity, ranks, size), then
    if start not in ("center", "moments"):
        raise ValueError(f"unknown start {start!r}: choose header, center or moments")
    if not (isinstance(transform, Linear) and transform.translates):
        raise ValueError(f"start={start!r} needs a transform that can shift; {transform} cannot: run Translation() first")
    shift = over_batch(
        _center_shift if start == "center" else _moment_shift,
        fixed=(whole.fixed[0], whole.fixed[0].ranks()),
        moving=(whole.moving[0], whole.moving[0].ranks()),
    )
    shift = shift.expand(size, domain.ndim)
    moved = Mapping({"translation": shift}, domain, Translation())
    return _fit(transform, moved, domain, size), then


def _center_shift(fixed: Image, moving: Image) -> Tensor:
    return moving.grid.center - fixed.grid.center


def _moment_shift(fixed: Image, moving: Image) -> Tensor:
    return _center_of_mass(moving) - _center_of_mass(fixed)


def _center_of_mass(image: Image) -> Tensor:
    """World centre of the intensities above their minimum; the grid's centre for a constant image."""
    mass = image.data.to(torch.float64).sum(0).reshape(-1)
    mass = torch.nan_to_num(mass)
    mass = mass - mass.min()
    total = mass.sum()
    found = (mass / torch.where(total > 0, total, 1)) @ image.grid.points()
    return torch.where(total > 0, found, image.grid.center)


def _holds(transform: Transform, other: Transform) -> bool:
    """Whether a linear family holds every map of another."""
    if not (isinstance(transform, Linear) and isinstance(other, Linear)):
        return False
    if "matrix" in transform.parts:
        return True
    return set(other.parts) <= set(transform.parts) and (transform.translates or not other.translates)


def _fit(transform: Linear | Transform, mapping: Mapping, domain: Grid, size: int) -> Params:
    assert isinstance(transform, Linear)
    fitted = over_batch(
        lambda m, d: transform.fit(m.transform.matrix(m.params, m.domain), d),
        mapping=(mapping, mapping.ranks()),
        domain=(domain, domain.ranks()),
    )
    return _expand(fitted, transform.ranks(domain), size)


def _spread(starts: Params, transform: Transform, domain: Grid, size: int) -> tuple[Params, int]:
    """Starts (S, ...) or (B, S, ...) as a batch (B S, ...), pair after pair, and S."""
    ranks = transform.ranks(domain)
    if tree_flatten(starts)[1] != tree_flatten(ranks)[1]:
        raise ValueError(f"starts do not fit {transform}: expected the structure of {transform}.init(domain)")
    widths: set[int] = set()
    for leaf, rank in zip(tree_leaves(starts), tree_leaves(ranks), strict=True):
        if leaf.ndim not in (rank + 1, rank + 2) or (leaf.ndim == rank + 2 and leaf.shape[0] != size):
            raise ValueError(f"starts have shape {tuple(leaf.shape)}: expected an axis of starts before {rank} axes")
        widths.add(int(leaf.shape[-rank - 1]))
    if len(widths) != 1:
        raise ValueError(f"starts have different lengths {sorted(widths)}: give every parameter as many")
    width = widths.pop()
    flat = tree_map(
        lambda leaf, rank: leaf.expand(size, *leaf.shape[-rank - 1 :]).reshape(size * width, *leaf.shape[leaf.ndim - rank :]),
        tree_detach(starts),
        ranks,
    )
    return flat, width
