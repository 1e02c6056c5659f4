"""First-order solver: gradients of the step, updates by an optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnreg import optim
from fnreg.optim import Adam, Optimizer, as_optimizer
from fnreg.pytree import tree_map, tree_scale
from fnreg.solvers.base import Problem, Taken, check_step, largest


@dataclasses.dataclass(frozen=True)
class Descent:
    """s <- optimizer(gradient of energy(perturb(params, s)) at s = 0), params <- retract(params, s).

    optimizer : of `fnreg.optim`, or a torchopt GradientTransformation; it sees steps only
    limit : no entry of a step exceeds this many voxels; None does not limit
    """

    optimizer: Any = dataclasses.field(default_factory=Adam)
    limit: float | None = None

    scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit}: it must be positive")

    def init(self, problem: Problem, params: Any) -> Any:
        """The optimizer's state."""
        optimizer: Optimizer = self.optimizer
        return optimizer.init(problem.zero_step())

    def take(self, index: Tensor) -> Descent:
        """With the rates of some of the pairs."""
        return dataclasses.replace(self, optimizer=optim.take(self.optimizer, index))

    def joins(self, carry: Any) -> bool:
        """Whether the optimizer counts the steps of each pair."""
        return optim.counts_each(carry)

    def step(self, problem: Problem, params: Any, carry: Any, progress: float | Tensor, length: Tensor | None) -> Taken:
        """One update of every pair; the value is that before it."""
        optimizer: Optimizer = self.optimizer
        gradient, value, terms = problem.gradient(params)
        step, carry = optimizer.update(gradient, carry, progress)
        check_step(gradient, step, type(optimizer).__name__)
        if length is not None:
            step = tree_scale(step, length)
        if self.limit is not None:
            step = tree_map(lambda leaf: leaf.clamp(-self.limit, self.limit), step)  # type: ignore[operator]
        moved = largest(step)
        settled = torch.zeros_like(moved, dtype=torch.bool)
        return Taken(problem.retract(params, step), carry, value, params, moved, settled, terms)
