"""register(): stages and levels of solves, for one pair or a batch.

The batch is read off the ranks of the leaves: data (C, [Z,] Y, X) for one pair, (B, C, [Z,] Y, X) for a batch,
and so for every leaf of images, grids, masks, parameters and weights; shared leaves are not copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fnreg import optim
from fnreg.fields import determinant
from fnreg.gather import Interpolation, Padding
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Input, Inputs, check_device, check_dimension, prepare
from fnreg.levels import Event, Failures, Levels, Solution, Trace
from fnreg.losses.objective import objective as as_objective
from fnreg.losses.terms import mse
from fnreg.notes import warn
from fnreg.pytree import (
    batch_axes,
    batch_size,
    first_pair,
    is_concrete,
    is_transformed,
    over_batch,
    pytree_dataclass,
    tree_leaves,
    tree_map,
)
from fnreg.search import Choice, search, search_levels
from fnreg.solvers.base import Status, Stop
from fnreg.solvers.recorded import Recording
from fnreg.stages import Stage, stages_of
from fnreg.starts import STARTS, Start, begin, expand, start_trees
from fnreg.symmetric import BothWays
from fnreg.transforms.base import Mapping, Params, Transform, apart
from fnreg.transforms.dense import Velocity
from fnreg.transforms.domain import same_place
from fnreg.transforms.linear import Homogeneous
from fnreg.transforms.warping import warp


class SpeedWarning(UserWarning):
    """A velocity is too fast for the squarings of its flow."""


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
    def warp(self, image: Image, *, interpolation: Interpolation = "linear", padding: Padding = "zeros") -> Image: ...
    @overload
    def warp(
        self, image: Subject, *, interpolation: Interpolation = "linear", padding: Padding = "zeros"
    ) -> Subject: ...
    def warp(
        self, image: Image | Subject, *, interpolation: Interpolation = "linear", padding: Padding = "zeros"
    ) -> Image | Subject:
        """The moving image or subject, or one in the same place, resampled onto the fixed grid; see `fnreg.warp`."""
        return warp(image, self.mapping, self.fixed_grid, interpolation=interpolation, padding=padding)

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
    interpolation: Interpolation = "linear",
    padding: Padding | None = None,
    symmetric: bool = False,
    stop: Stop | None = Stop(),
    progress: Callable[[Event], None] | None = None,
) -> Registration:
    """Find the transform that makes the moving image look like the fixed one: T minimises E(moving o T, fixed).

    fixed, moving : Image or Subject, or a pyramid of images, finest first; leaves with one rank more are a batch
    transform : what is optimised; a sequence of transforms or `Stage`s runs one after another: a linear one starts
        where the last ended if it can hold that map, else the last one's map acts after it
    objective : a term, a sum of terms, or a callable on the names of `losses.objective.NAMES`; or a sequence of these,
        one per level from coarse to fine, of which the last gives the value of the result
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
    progress : called with an `Event` now and then; not inside vmap

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
    interpolation: Interpolation,
    padding: Padding | None,
    symmetric: bool,
    stop: Stop | None,
    progress: Callable[[Event], None] | None,
    recording: Recording | None = None,
) -> Course:
    """`register` with all that it found, stage after stage.

    recording : how derivatives go through the loops of steps; None records nothing but where torch.func is around
    """
    own = {"objective": objective, "optimizer": optimizer, "solver": solver}
    stages = stages_of(transform, **own, levels=levels, steps=steps, stop=stop)
    if symmetric and not any(stage.transform.negates for stage in stages):
        raise ValueError(f"{stages[-1].transform} has no cheap inverse: symmetric registration goes with SVF and SVFFD")
    objectives = [part for stage in stages for part in stage.objective]
    most = max(stage.depth for stage in stages)
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}: choose {', '.join(STARTS[:-1])} or {STARTS[-1]}")
    deeper = search_levels if start == "auto" else None
    recorded = recording is not None
    options: dict[str, Any] = {"objectives": objectives, "deeper": deeper, "detach": not recorded}
    whole = prepare(fixed, moving, then, levels=most, min_size=min_size, interpolation=interpolation, **options)
    if recorded or is_transformed(objectives, initial, starts):
        whole = dataclasses.replace(whole, wrapped=True)
    rates = [leaf for stage in stages for leaf in optim.rates(getattr(stage.solver, "optimizer", None))]
    plain = not whole.wrapped and not is_transformed(rates)
    if plain:
        told = {"objective": objectives, "optimizer": rates, "then": then, "initial": initial, "starts": starts}
        _warn_of_gradients(fixed=fixed, moving=moving, **told)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not plain):
        sizes = dict(whole.sizes)
        for part in objectives:
            sizes |= batch_axes("objective", part, part.ranks())[1]
        for name, tree, ranks in start_trees(initial, starts, stages[0].transform, whole.domain):
            sizes |= batch_axes(name, tree, ranks)[1]
        given_starts = [name for name, value in (("initial", initial), ("starts", starts)) if value is not None]
        given_starts += [f"start={start!r}"] if start != "header" else []
        if len(given_starts) > 1:
            raise ValueError(f"{' and '.join(given_starts)} both say where to begin: give one of them")
        batch = batch_size(sizes)
        single, size = batch is None, batch or 1
        failures = Failures.at_start(whole, size, single)
        if recorded and whole.visible and batch is not None:
            whole = whole.without(failures.cause > 0)
        choice: Choice | None = None
        if start == "auto":
            first = stages[0]
            failed = failures.cause > 0
            choice = search(whole, first.transform, first.objective[0], size, padding, failed, width=first.width)
            start, initial = "header", None if choice is None else choice.mapping
        done: list[Solution] = []
        for number, stage in enumerate(stages):
            earlier = (done[-1].map(whole.domain), done[-1].then) if done else None
            params, after = begin(
                whole, stage.transform, size, earlier, None if done else initial, "header" if done else start
            )
            run_of = Levels(whole, stage, size, after, padding, symmetric, number, len(stages), progress, recording)
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
    interpolation: Interpolation = "linear",
    padding: Padding | None = None,
    symmetric: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value of an objective under a mapping, and each term's: a search is `evaluate` on a batch of mappings.

    fixed, moving : as they are, on no coarser level; leaves with one rank more are a batch
    mapping : from fixed to moving world points, as `Registration.mapping` or made by hand
    objective, interpolation, padding : as of `register`
    symmetric : the mean of both ways, as of `register`; of a velocity alone or with a linear map after it

    Returns the value and the unweighted value of each term by name: scalars, or (B,) where a leaf of images, mapping
    or weights has a batch axis.  Infinite where no voxel of one image meets one of the other.  Raises ValueError where
    the arguments do not fit together.

    >>> import torch, fnreg
    >>> fixed, moving = fnreg.data.digits(9, count=2)
    >>> shifts = {"translation": torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)}
    >>> value, terms = fnreg.evaluate(fixed, moving, fnreg.Mapping(shifts, fixed.grid, fnreg.Translation()))
    >>> value.shape, list(terms)
    (torch.Size([3]), ['mse'])
    """
    total = as_objective(objective)
    options: dict[str, Any] = {"detach": False, "objectives": (total,), "interpolation": interpolation}
    whole = prepare(fixed, moving, None, levels=1, min_size=1, **options)
    check_dimension("mapping", mapping, whole.domain)
    check_device("mapping", mapping, whole.domain)
    sizes = batch_axes("mapping", mapping, mapping.ranks())[1] | batch_axes("objective", total, total.ranks())[1]
    size = batch_size(whole.sizes | sizes)
    first, then = apart(mapping) if symmetric else (mapping, None)
    if symmetric and not first.transform.negates:
        raise ValueError(f"{first.transform} has no cheap inverse: symmetric goes with SVF and SVFFD")
    own = isinstance(first.domain, Grid) and same_place(first.domain, whole.domain)
    domain = None if own else first.domain
    level = whole.level(0, first.transform, total, size or 1, padding, then, domain)
    params = expand(first.params, first.ranks().params, size or 1)
    found = (BothWays.of(level) if symmetric else level).value(params)
    return tree_map(lambda leaf: leaf[0], found) if size is None else found


# -- stages ------------------------------------------------------------------------------------------------------------


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
    step = found.map(domain).first_step()
    if step is not None and is_concrete(step) and bool((step > 1).any()):
        warn(
            f"velocities of {found.transform} are too fast for its squarings in {int((step > 1).sum())} of {len(step)} "
            f"pairs, so its inverse is inaccurate there: {slower(found.transform, step)}",
            SpeedWarning,
            stacklevel=4,
        )


def slower(transform: Transform, step: Tensor) -> str:
    """What to do about first steps that are longer than a voxel."""
    fast, flow = step[(step > 1) & torch.isfinite(step)], transform.flow
    if not len(fast) or not isinstance(flow, Velocity):
        return "use more squarings, or a stronger penalty"
    enough = flow.squarings + math.ceil(math.log2(float(fast.max())))
    return f"use {type(flow).__name__}(squarings={enough}), or a stronger penalty"
