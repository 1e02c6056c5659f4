"""Derivatives through a registration by the optimum that it has reached: `Implicit`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
from torch import Tensor

from fnreg import optim
from fnreg.call import asked, check_unseen, course_of, stages_in
from fnreg.concrete import concretely
from fnreg.implicit import Condition, NoOptimumError, Search, optimum, solve
from fnreg.inputs import Inputs, prepare
from fnreg.levels import Solution, level_at
from fnreg.notes import warn
from fnreg.pytree import batch_axes, batch_size, is_transformed, tree_leaves, tree_map
from fnreg.registration import Course, Registration, register
from fnreg.solvers.base import Status, largest
from fnreg.stages import Stage
from fnreg.starts import holds, start_trees
from fnreg.transforms.base import Mapping, Sequential, Transform
from fnreg.transforms.held import Held

LOOSE = 0.1  # relative residual of the Newton step that tells how far the optimum is


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
    tolerance : relative residual of the linear systems, |H x - b| / |b|; that of solvers is of the gradient
    iterations : of conjugate gradients at most
    check : voxels that a Newton step may still move a parameter by where the registration ended, which it is asked if
        a derivative is; None does not ask
    """

    ridge: float = 0.0
    tolerance: float = 1e-6
    iterations: int = 500
    check: float | None = 0.1

    def __post_init__(self) -> None:
        numbers = (self.ridge, self.tolerance, 1.0 if self.check is None else self.check)
        known = all(isinstance(number, (int, float)) for number in numbers) and isinstance(self.iterations, int)
        known = known and 0 <= self.ridge < math.inf and 0 < self.tolerance < 1
        if not known or self.iterations < 1 or not numbers[2] > 0:
            raise ValueError(
                f"{self!r}: expected numbers: ridge >= 0, tolerance in (0, 1), a whole number of iterations >= 1, and "
                "check > 0 or None"
            )

    @property
    def search(self) -> Search:
        """How linear systems are solved."""
        return Search(self.ridge, self.tolerance, self.iterations)

    def solve(self, given: dict[str, Any]) -> Registration:
        """See `Adjoint`."""
        given = {"stop": inspect.signature(register).parameters["stop"].default} | given
        stages = stages_in(given)
        for number in _needed(stages):
            _check_descends(stages[number].transform)
        check_unseen(given, stages, self)
        _check_rates(stages)
        names = ("fixed", "moving", "then", "initial", "starts")
        tree: dict[str, Any] = {name: given[name] for name in names} | {"objectives": [s.objective for s in stages]}
        tree = {n: list(v) if n in ("fixed", "moving") and isinstance(v, tuple) else v for n, v in tree.items()}
        tree = {name: value for name, value in tree.items() if value is not None}
        _check_held(stages, tree, given["start"])
        options: dict[str, Any] = {"levels": 1, "min_size": 1, "detach": False, "interpolation": given["interpolation"]}
        whole = prepare(
            given["fixed"], given["moving"], given["then"], objectives=[s.objective[-1] for s in stages], **options
        )
        whole = dataclasses.replace(whole, wrapped=True)
        ranks, sizes = _ranks(tree, stages, whole)
        batch, told = batch_size(sizes), list[Any]()
        needed = asked(tree)
        found = concretely(lambda t: self._inner(given, stages, t, needed, told), tree, ranks)
        return self._outer(given, stages, whole, batch, found, told)

    def _inner(
        self, given: dict[str, Any], stages: list[Stage], tree: dict[str, Any], asks: bool, told: list[Any]
    ) -> dict[str, Any]:
        """The registration itself, of plain tensors, and which of its pairs have a derivative."""
        several = tree["objectives"]
        ready = [dataclasses.replace(stage, objective=one) for stage, one in zip(stages, several, strict=True)]
        made = course_of(given | {name: value for name, value in tree.items() if name != "objectives"}, ready)
        good = made.done[-1].status <= int(Status.CONVERGED)
        for number in _needed(stages) if asks and self.check is not None else ():
            good = good & self._reached(made, number, given, good)
        told[:] = [made.choice]
        return {
            "good": good,
            "stages": [(stage.params, stage.steps, stage.traces) for stage in made.done],
            "last": (made.done[-1].status, made.done[-1].value, made.done[-1].terms),
            "choice": () if made.choice is None else (made.choice.mapping.params, made.choice.candidate),
        }

    def _reached(self, made: Course, number: int, given: dict[str, Any], good: Tensor) -> Tensor:
        """The pairs (B,) whose stage ended where a Newton step is short; a pair that is alone raises."""
        done, stage = made.done[number], made.stages[number]
        condition, data = Condition.of(
            level_at(made.whole, stage, 0, len(good), done.then, given["padding"], given["symmetric"])
        )
        slope, again = (condition.gradient(done.params, data) for _ in range(2))
        if not _alike(slope, again):
            raise ValueError(
                f"the objective of {stage.transform} differs between two calls at the same parameters, so it has no "
                "optimum: let its random numbers come from a seed"
            )
        search = Search(self.ridge, LOOSE, self.iterations)
        found = solve(condition.product(done.params, data, self.ridge), tree_map(torch.neg, slope), search)
        moved = largest(found.step)
        assert self.check is not None
        straight, reached = found.straight, moved <= self.check
        bad = good & ~(straight & reached)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            size = float(sum(leaf[first].double().square().sum() for leaf in tree_leaves(slope))) ** 0.5
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
        """What was found as a function of the data: where a map acts after that of a later stage, through both.

        Pairs that failed are as they were found, constant, and have nothing of theirs in what a batch shares.
        """
        done: list[Solution] = []
        needed, then = _needed(stages), whole.then
        status, value, terms = found["last"]
        failed = status > int(Status.CONVERGED)
        whole = whole.without(failed if batch is not None else failed[0])
        for number, (stage, (params, steps, traces)) in enumerate(zip(stages, found["stages"], strict=True)):
            if number and not holds(stage.transform, stages[number - 1].transform):
                before = done[-1].map(whole.domain)
                then = before if then is None else then @ before
            level = level_at(whole, stage, 0, batch or 1, then, given["padding"], given["symmetric"])
            if number in needed:
                condition, data = Condition.of(level)
                alone = batch is None
                params = optimum(condition, params, data, found["good"], search=self.search, alone=alone)
            if number == len(stages) - 1:
                seen = level.value(params)
                value, terms = tree_map(lambda now, then: torch.where(failed, then, now), seen, (value, terms))
            done.append(Solution(stage.transform, params, then, value, terms, status, steps, traces))
        choice = told[0]
        if choice is not None:
            params, candidate = found["choice"]
            begun = Mapping(params, whole.domain, choice.mapping.transform)
            choice = dataclasses.replace(choice, mapping=begun, candidate=candidate)
        return Course(whole, tuple(stages), tuple(done), batch is None, choice).registration()


def _alike(once: Any, twice: Any) -> bool:
    """Whether two gradients are the same but for the order of sums, which a device may change."""
    pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tree_leaves(once), tree_leaves(twice), strict=True)]
    return all(bool(((a - b).abs() <= 1e-5 * a.abs().amax()).all()) for a, b in pairs)


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
    for name, given, found in start_trees(tree.get("initial"), tree.get("starts"), first, whole.domain):
        ranks[name] = found
        sizes |= batch_axes(name, given, found)[1]
    return ranks, sizes


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_descends(transform: Transform) -> None:
    if not transform.descends:
        raise ValueError(
            f"{transform} descends no single objective, for it changes its gradients or parameters itself, so there is "
            "no optimum to differentiate: use Unrolled() or Checkpointed(), or a transform such as SVFFD"
        )


def _check_held(stages: list[Stage], tree: dict[str, Any], start: str) -> None:
    """Parameters that are held are no part of the optimum: where they depend on something asked for, that is lost."""
    for number, stage in enumerate(stages):
        if not _has_held(stage.transform):
            continue
        if number:
            source = "an earlier stage" if holds(stage.transform, stages[number - 1].transform) else None
            lost = asked(tree)
        else:
            source = next((name for name in ("initial", "starts") if name in tree), None)
            lost = asked(tree[source]) if source else asked(tree)
            source = source or (f"start={start!r}" if start != "header" else None)
        if source and lost:
            raise ValueError(
                f"{stage.transform} holds parameters from {source}, by which a derivative is asked for and which the "
                "optimum does not see: use Unrolled()"
            )


def _has_held(transform: Transform) -> bool:
    if isinstance(transform, Sequential):
        return any(_has_held(part) for part in transform.transforms)
    return isinstance(transform, Held)


def _check_rates(stages: list[Stage]) -> None:
    rates = [rate for stage in stages for rate in optim.rates(getattr(stage.solver, "optimizer", None))]
    if any(is_transformed(rate) or asked(rate) for rate in rates):
        raise ValueError(
            "lr is inside vmap or asks for a gradient, but the optimum does not depend on it: use Unrolled(), or give "
            "a batch one rate per pair, lr of shape (B,)"
        )
