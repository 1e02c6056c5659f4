"""Derivatives through a registration: `differentiable(register, adjoint=...)`.

    solve = differentiable(register, adjoint=Implicit())
    result = solve(fixed, moving, FFD(stride=4), objective=mse + weight * bending)

Parameters, value and terms of the result are functions of images, masks, weights of terms, points and grids, and so of
the parameters of any network that made these, for `torch.func` and for `loss.backward()`.  `Implicit` differentiates
the optimum, at the cost of a linear system and in the memory of a single step, however many were taken; `Unrolled` and
`Checkpointed` differentiate the steps themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fnreg.concrete import concretely
from fnreg.implicit import Condition, NoOptimumError, Search, optimum
from fnreg.inputs import Inputs, prepare
from fnreg.levels import Solution
from fnreg.losses.features import Feature
from fnreg.losses.terms import mse
from fnreg.notes import warn
from fnreg.optim import Chain, purely
from fnreg.problem import Level
from fnreg.pytree import (
    batch_axes,
    batch_size,
    forward_asked,
    is_differentiated,
    is_transformed,
    tree_leaves,
    tree_map,
)
from fnreg.registration import Course, Registration, course, register
from fnreg.solvers.base import Status, largest
from fnreg.solvers.recorded import Recording
from fnreg.stages import Stage, stages_of
from fnreg.starts import holds, initial_ranks
from fnreg.symmetric import BothWays
from fnreg.transforms.base import Held, Mapping, Sequential, Transform

LOOSE = 0.1  # relative residual of the Newton step that tells how far the optimum is


@runtime_checkable
class Adjoint(Protocol):
    """How derivatives go through a registration."""

    def solve(self, given: dict[str, Any]) -> Registration:
        """What `register` gives for all of its arguments, with a history; `stop` is there only where it was given."""
        ...


def differentiable(
    register: Callable[..., Registration], *, adjoint: Adjoint | None = None
) -> Callable[..., Registration]:
    """`register` with derivatives: the same function of the same arguments, whose result has a history.

    register : `fnreg.register`, or a `functools.partial` of it
    adjoint : `Implicit()` (default), `Unrolled(...)` or `Checkpointed(...)`

    Works under `torch.func.grad`, `jacrev` and `vmap`, in any order, and with `loss.backward()`; a batch by leading
    axes is differentiated pair by pair.  Raises TypeError for another function or adjoint.

    >>> import torch, fnreg
    >>> from torch.func import grad
    >>> disc = (fnreg.Grid((16, 16)).points() - 7.5).norm(dim=1).reshape(1, 16, 16) < 5
    >>> fixed = fnreg.Image(disc.double()).gaussian(2.0)
    >>> solve = fnreg.differentiable(fnreg.register)
    >>> def found(place):
    ...     moving = fnreg.Image(fixed.data, center=place)
    ...     return solve(fixed, moving, fnreg.Translation(), solver=fnreg.GaussNewton()).mapping.params["translation"]
    >>> torch.func.jacrev(found)(torch.tensor([8.3, 7.2], dtype=torch.float64)).round(decimals=3).abs()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    chosen = Implicit() if adjoint is None else adjoint
    if isinstance(chosen, type) or not isinstance(chosen, Adjoint):
        raise TypeError(f"adjoint is {adjoint!r}: expected Implicit(), Unrolled() or Checkpointed()")
    inner = register
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inner is not _REGISTER:
        raise TypeError(f"differentiable takes fnreg.register, or a functools.partial of it, not {register!r}")
    partial: Any = register if isinstance(register, functools.partial) else functools.partial(register)
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def solve(*arguments: Any, **options: Any) -> Registration:
        bound = signature.bind(*partial.args, *arguments, **(partial.keywords | options))
        given = dict(bound.arguments)
        bound.apply_defaults()
        return chosen.solve(dict(bound.arguments) if "stop" in given else dict(bound.arguments) | {"stop": "default"})

    return solve


_REGISTER = register


# -- the steps ---------------------------------------------------------------------------------------------------------


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
        """See `Adjoint`."""
        return _recorded(self, given, Recording(last=self.last))


@dataclasses.dataclass(frozen=True)
class Checkpointed:
    """As `Unrolled()`, with steps computed anew for their derivative: memory grows with the root of their number.

    every : steps between two that are kept; None takes the root of the number of steps of a level
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not (isinstance(self.every, int) and self.every > 0):
            raise ValueError(f"every is {self.every!r}: expected a positive number of steps, or None for their root")

    def solve(self, given: dict[str, Any]) -> Registration:
        """See `Adjoint`."""
        return _recorded(self, given, Recording(every=self.every or 0))


def _recorded(adjoint: Any, given: dict[str, Any], recording: Recording) -> Registration:
    stopping = given["stop"] != "default" and given["stop"] is not None
    given = given | {"stop": None}
    stages = [_pure(stage) for stage in _stages(given)]
    if stopping or any(stage.stop is not None for stage in stages):
        raise ValueError(f"{adjoint} differentiates a fixed number of steps: leave stop out, or give stop=None")
    if recording.every is not None:
        _check_captured(stages, adjoint)
    return _course(given, stages, recording=recording).registration()


def _pure(stage: Stage) -> Stage:
    """With optimizers through which derivatives go soundly, of the same formulas."""

    optimizer = getattr(stage.solver, "optimizer", None)
    if optimizer is None:
        return stage
    return dataclasses.replace(stage, solver=dataclasses.replace(stage.solver, optimizer=purely(optimizer)))


def _stages(given: dict[str, Any]) -> list[Stage]:
    names = ("transform", "objective", "solver", "optimizer", "levels", "steps", "stop")
    return stages_of(**{name: given[name] for name in names})


def _course(given: dict[str, Any], stages: list[Stage], **options: Any) -> Course:
    """A registration of stages that leave nothing open."""
    ready = [dataclasses.replace(stage, objective=list(stage.objective)) for stage in stages]
    closed: dict[str, Any] = {"transform": ready, "objective": mse, "solver": None, "optimizer": None}
    return course(**(given | closed | options))


# -- the optimum -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Implicit:
    """Through the optimum that the steps have reached, see `fnreg.implicit`: as good as it was reached.

    The derivative does not depend on how the optimum was found, so any solver, stopping and start will do, and that by
    start parameters is zero.  Each stage has to reach the optimum of its finest level, with a positive definite
    Hessian there, which a penalty or a `ridge` may have to see to.  Linear interpolation has no second derivative at
    voxels and none of its own between them: the Hessian is that of the pieces, and `interpolation="cubic"` is smooth.

    A single pair without a derivative raises `NoOptimumError`, in a batch or under vmap its derivative is NaN, which a
    warning tells.  `Diffeomorphism` descends no single objective and is refused: ValueError.  Memory does not depend on
    the number of steps.  Higher derivatives and forward mode are taken likewise.

    ridge : added to the Hessian, in units of the objective per squared voxel: a shorter derivative that always exists
    tolerance : relative residual of the linear systems
    iterations : of conjugate gradients at most
    check : voxels that a Newton step may still move a parameter by where the registration ended, which it is asked if
        a derivative is; None does not ask
    """

    ridge: float = 0.0
    tolerance: float = 1e-6
    iterations: int = 500
    check: float | None = 0.1

    def __post_init__(self) -> None:
        known = self.ridge >= 0 and 0 < self.tolerance < 1 and self.iterations >= 1
        if not known or (self.check is not None and not self.check > 0):
            raise ValueError(
                f"{self!r}: expected ridge >= 0, tolerance in (0, 1), iterations >= 1, and check > 0 or None"
            )

    @property
    def search(self) -> Search:
        """How linear systems are solved."""
        return Search(self.ridge, self.tolerance, self.iterations)

    def solve(self, given: dict[str, Any]) -> Registration:
        """See `Adjoint`."""
        given = given | (
            {"stop": inspect.signature(_REGISTER).parameters["stop"].default} if given["stop"] == "default" else {}
        )
        stages = _stages(given)
        for number in _needed(stages):
            _check_descends(stages[number].transform)
        _check_captured(stages, self)
        _check_rates(stages)
        names = ("fixed", "moving", "then", "initial", "starts")
        tree: dict[str, Any] = {name: given[name] for name in names} | {"objectives": [s.objective for s in stages]}
        tree = {n: list(v) if isinstance(v, tuple) else v for n, v in tree.items() if v is not None}
        if any(_holds(stage.transform) for stage in stages) and _asked(tree.get("initial")):
            raise ValueError("initial asks for a gradient and a transform holds parameters of it: use Unrolled()")
        options: dict[str, Any] = {"levels": 1, "min_size": 1, "detach": False, "mode": given["interpolation"]}
        whole = prepare(
            given["fixed"], given["moving"], given["then"], objectives=[s.objective[-1] for s in stages], **options
        )
        whole = dataclasses.replace(whole, wrapped=True)
        ranks, sizes = _ranks(tree, stages, whole)
        batch = batch_size(sizes)
        asked, told = _asked(tree), list[Any]()
        found = concretely(lambda t: self._inner(given, stages, t, asked, told), tree, ranks)
        return self._outer(given, stages, whole, batch, found, told)

    def _inner(
        self, given: dict[str, Any], stages: list[Stage], tree: dict[str, Any], asked: bool, told: list[Any]
    ) -> dict[str, Any]:
        """The registration itself, of plain tensors, and which of its pairs have a derivative."""
        several = tree["objectives"]
        ready = [dataclasses.replace(stage, objective=one) for stage, one in zip(stages, several, strict=True)]
        made = _course(given | {name: value for name, value in tree.items() if name != "objectives"}, ready)
        good = made.done[-1].status <= int(Status.CONVERGED)
        for number in _needed(stages) if asked and self.check is not None else ():
            good = good & self._reached(made, number, given, good)
        told[:] = [made.choice]
        return {
            "good": good,
            "stages": [(stage.params, stage.status, stage.steps, stage.traces) for stage in made.done],
            "choice": () if made.choice is None else (made.choice.mapping.params, made.choice.candidate),
        }

    def _reached(self, made: Course, number: int, given: dict[str, Any], good: Tensor) -> Tensor:
        """The pairs (B,) whose stage ended where a Newton step is short; a pair that is alone raises."""
        done, stage = made.done[number], made.stages[number]
        condition, data = Condition.of(_finest(made.whole, stage, len(good), done.then, given))
        once, twice = (tree_leaves(condition.gradient(done.params, data)) for _ in range(2))
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(once, twice, strict=True)):
            raise ValueError(
                f"the objective of {stage.transform} differs between two calls at the same parameters, so it has no "
                "optimum: let its random numbers come from a seed"
            )
        found = condition.newton(done.params, data, Search(self.ridge, LOOSE, self.iterations))
        moved = largest(found.step)
        assert self.check is not None
        straight, reached = found.straight, moved <= self.check
        bad = good & ~(straight & reached)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            size = float(sum(leaf[first].double().square().sum() for leaf in once)) ** 0.5
            lost = (
                f"its curvature along a step is {float(found.curvature[first]):.3g} per squared voxel, not positive"
                if not bool(straight[first])
                else f"a Newton step would still move a parameter by {float(moved[first]):.3g} voxels, more than "
                f"check={self.check:g}"
            )
            reason = (
                f"the registration by {stage.transform} has not converged to an optimum: the gradient's norm is "
                f"{size:.3g} and {lost}. Take more steps, stop later or with a second-order solver, add a penalty or "
                "Implicit(ridge=...), or differentiate the steps with Unrolled()"
            )
            if made.single:
                raise NoOptimumError(reason)
            warn(f"{int(bad.sum())} of {len(bad)} derivatives are NaN; pair {first}: {reason}")
        return straight & reached

    def _outer(
        self,
        given: dict[str, Any],
        stages: list[Stage],
        whole: Inputs,
        batch: int | None,
        found: dict[str, Any],
        told: list[Any],
    ) -> Registration:
        """What was found as a function of the data: where a map acts after that of a later stage, through both."""
        done: list[Solution] = []
        needed, then = _needed(stages), whole.then
        for number, (stage, (params, status, steps, traces)) in enumerate(zip(stages, found["stages"], strict=True)):
            if number and not holds(stage.transform, stages[number - 1].transform):
                before = done[-1].map(whole.domain)
                then = before if then is None else then @ before
            level = _finest(whole, stage, batch or 1, then, given)
            if number in needed:
                condition, data = Condition.of(level)
                alone = batch is None
                params = optimum(condition, params, data, found["good"], search=self.search, alone=alone)
            value, terms = level.value(params)
            done.append(Solution(stage.transform, params, then, value, terms, status, steps, traces))
        choice = told[0]
        if choice is not None:
            params, candidate = found["choice"]
            begun = Mapping(params, whole.domain, choice.mapping.transform)
            choice = dataclasses.replace(choice, mapping=begun, candidate=candidate)
        return Course(whole, tuple(stages), tuple(done), batch is None, choice).registration()


def _finest(whole: Inputs, stage: Stage, size: int, then: Mapping | None, given: dict[str, Any]) -> Level | BothWays:
    """The finest level of a stage."""
    level = whole.level(0, stage.transform, stage.objective[-1], size, given["padding"], then)
    return BothWays.of(level) if given["symmetric"] and stage.transform.negates else level


def _needed(stages: list[Stage]) -> list[int]:
    """The stages whose maps the result has: the last one, and those that no later one goes on from."""
    last = len(stages) - 1
    return [n for n in range(last + 1) if n == last or not holds(stages[n + 1].transform, stages[n].transform)]


def _ranks(tree: dict[str, Any], stages: list[Stage], whole: Inputs) -> tuple[dict[str, Any], dict[str, int]]:
    """The rank of every leaf for one pair, and the lengths of batch axes."""
    first = stages[0].transform
    ranks: dict[str, Any] = {"objectives": [tuple(one.ranks() for one in several) for several in tree["objectives"]]}
    for name in ("fixed", "moving"):
        value = tree[name]
        ranks[name] = [item.ranks() for item in value] if isinstance(value, list) else value.ranks()
    sizes = whole.sizes | batch_axes("objective", tree["objectives"], ranks["objectives"])[1]
    if "then" in tree:
        ranks["then"] = tree["then"].ranks()
    if "initial" in tree:
        ranks["initial"] = initial_ranks(tree["initial"], first, whole.domain)
        sizes |= batch_axes("initial", tree["initial"], ranks["initial"])[1]
    if "starts" in tree:
        ranks["starts"] = tree_map(lambda rank: rank + 1, first.ranks(whole.domain))
    return ranks, sizes


# -- what is refused ---------------------------------------------------------------------------------------------------


def _asked(tree: Any) -> bool:
    """Whether a derivative by a leaf is taken."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if any(is_differentiated(leaf) for leaf in leaves if torch.is_grad_enabled() or is_transformed(leaf)):
        return True
    return forward_asked() and any(is_transformed(leaf) or unpack_dual(leaf).tangent is not None for leaf in leaves)


def _check_descends(transform: Transform) -> None:
    if not transform.descends:
        raise ValueError(
            f"{transform} descends no single objective, for it is changed after each step, so there is no optimum to "
            "differentiate: use Unrolled() or Checkpointed(), or a transform such as SVFFD"
        )


def _check_rates(stages: list[Stage]) -> None:
    for stage in stages:
        optimizer = getattr(stage.solver, "optimizer", None)
        for part in optimizer.parts if isinstance(optimizer, Chain) else (optimizer,):
            rate = getattr(part, "lr", None)
            if isinstance(rate, Tensor) and (is_transformed(rate) or _asked(rate)):
                raise ValueError(
                    "lr is inside vmap or asks for a gradient, but the optimum does not depend on it: use Unrolled(), "
                    "or give a batch one rate per pair, lr of shape (B,)"
                )


def _check_captured(stages: list[Stage], adjoint: Any) -> None:
    """Tensors within the function of a term are out of sight: derivatives by them would be lost in silence."""
    for term in (term for stage in stages for one in stage.objective for term in one.terms):
        function = term.function.function if isinstance(term.function, Feature) else term.function
        within = [_captured(value, 3) for value in (function, *(value for _, value in term.options))]
        if isinstance(function, torch.nn.Module):  # one that `functional_call` uses within a function is not asked
            within.append(list(function.parameters()))
        if any(_asked(tensors) for tensors in within):
            raise ValueError(
                f"{term.name} holds a tensor that asks for a gradient, which {type(adjoint).__name__}() does not see: "
                "make it a weight, images or points, such as Image(network(fixed)), or detach it, or use Unrolled()"
            )


def _captured(value: Any, depth: int) -> list[Tensor]:
    """Tensors that a function has in its closure, its arguments or its fields."""
    if isinstance(value, Tensor):
        return [value]
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif inspect.isfunction(value):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
    return [tensor for item in inner if depth for tensor in _captured(item, depth - 1)]


def _holds(transform: Transform) -> bool:
    if isinstance(transform, Sequential):
        return any(_holds(part) for part in transform.transforms)
    return isinstance(transform, Held)
