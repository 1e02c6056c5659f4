"""What the loop, a solver and a problem ask of each other, and how a pair ends.

Everything here has a leading batch axis; one pair is a batch of one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from fnreg import lengths
from fnreg.pytree import same_structure, tree_flatten, tree_leaves, tree_unflatten

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
    width : pairs that run side by side; those that wait take the places of those that are done, on each level, so that
        many pairs take the memory of some and no place is idle.  None runs all at once.  A torchopt optimizer that
        counts the steps of all pairs together starts the next ones when all before them are done
    """

    relative: float = 1e-4
    patience: int = 10
    shrink: float = 0.3
    shortest: float = 0.05
    step: float = 1e-4
    every: int = 10
    compact: bool = True
    width: int | None = None

    def __post_init__(self) -> None:
        if self.relative < 0 or self.step < 0 or self.patience < 1 or self.every < 1:
            raise ValueError(f"{self!r}: expected relative and step >= 0, patience and every >= 1")
        if not (0 < self.shrink < 1 and 0 < self.shortest <= 1):
            raise ValueError(f"{self!r}: expected shrink in (0, 1) and shortest in (0, 1]")
        if self.width is not None and (self.width < 1 or not self.compact):
            raise ValueError(f"{self!r}: expected width >= 1, or None, and compact=True with it")


class Problem(Protocol):
    """One level of a registration of a batch of B pairs, as the loop and all solvers together ask for it.

    `Descent` takes gradients alone, `GaussNewton` normal equations alone; `NewtonCG` and `LBFGS` take the stiffness
    beside gradients, `NewtonCG` the curvature too.  The data are for derivatives through the loop.
    """

    @property
    def size(self) -> int:
        """Number of pairs."""
        ...

    @property
    def data(self) -> Any:
        """All its tensors."""
        ...

    def with_data(self, data: Any) -> Problem:
        """The same on other tensors."""
        ...

    def take(self, index: Tensor) -> Problem:
        """The same for some of the pairs."""
        ...

    def zero_step(self) -> Any:
        """The step of no change, (B, ...)."""
        ...

    def retract(self, params: Any, step: Any) -> Any:
        """Parameters after a step."""
        ...

    def gradient(self, params: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Gradient by the step, the value (B,) and each term's."""
        ...

    def normal_equations(self, params: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Value |r|^2 (B,), J^T r (B, P), J^T J (B, P, P) and each term's value."""
        ...

    def curvature(self, params: Any, *, exact: bool = False) -> Callable[[Any], Any]:
        """The Hessian by the step, or without `exact` Gauss-Newton's, as its product with steps (B, ...)."""
        ...

    def stiffness(self) -> Any:
        """What is known of the Hessian's diagonal, a `fnreg.stiffness.Stiffness`; None where nothing is."""
        ...


class Solver(Protocol):
    """How parameters are improved.

    `take` and `joins` are for `Stop.width`; a solver without `joins` begins with others when all before are done.
    """

    scales: bool  # whether `step` heeds a step length

    def init(self, problem: Problem, params: Any) -> Any:
        """What the solver carries from step to step: tensors with a leading batch axis, or shared scalars."""
        ...

    def step(self, problem: Problem, params: Any, carry: Any, progress: float | Tensor, length: Tensor | None) -> Taken:
        """One step for every pair; `progress` in [0, 1] is one number or (B,), `length` (B,) multiplies the step."""
        ...

    def take(self, index: Tensor) -> Solver:
        """The solver of some of the pairs."""
        ...

    def joins(self, carry: Any) -> bool:
        """Whether pairs may begin beside others that are on their way: what is carried is of each pair alone."""
        ...


class PerPair:
    """A solver that carries nothing but what is each pair's own, and finds the length of its steps itself."""

    scales: ClassVar[bool] = False

    def take(self, index: Tensor) -> Self:
        """The same."""
        return self

    def joins(self, carry: Any) -> bool:
        """Pairs may begin beside others at any time."""
        return True


def solver_of(solver: Solver, index: Tensor) -> Solver:
    """The solver of some of the pairs; one that says nothing of that is the same for all."""
    return solver.take(index) if hasattr(solver, "take") else solver


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


def check_step(step: Any, update: Any, where: str) -> None:
    """An optimizer whose state was made for another step gives updates of another shape: refuse them."""
    if not same_structure(step, update):
        raise ValueError(f"{where} gave an update that does not fit the step: its state was made for other parameters")


def largest(step: Any) -> Tensor:
    """The largest absolute entry of a step, per pair (B,)."""
    sizes = [lengths.largest(leaf) for leaf in tree_leaves(step)]
    return torch.stack([size.to(sizes[0].dtype) for size in sizes]).amax(0)


def joined(step: Any) -> Tensor:
    """The entries of a step side by side (B, P), in the highest of its precisions."""
    leaves = tree_leaves(step)
    kind = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
    return torch.cat([lengths.rows(leaf).to(kind) for leaf in leaves], 1)


def parted(flat: Tensor, zero: Any) -> Any:
    """A step from its entries side by side: (B, P) for one of leaves (B, ...), (P,) for one without that axis."""
    leaves, spec = tree_flatten(zero)
    parts = flat.split([leaf.numel() // (len(leaf) if flat.ndim > 1 else 1) for leaf in leaves], dim=-1)
    return tree_unflatten([p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)], spec)


def lowers(value: Tensor, before: Tensor, gradient: Tensor, gradient_before: Tensor) -> Tensor:
    """Whether a step (B,) has lowered the value; where both values agree to rounding the sizes of the gradients tell.

    Without that no gradient falls below the square root of rounding.  Hager and Zhang 2005, doi 10.1137/030601880.
    """
    rounding = 8 * torch.finfo(value.dtype).eps * before.abs()
    return (value < before - rounding) | ((value <= before + rounding) & (gradient <= gradient_before))
