"""A problem in coordinates in which its Hessian is close to a known diagonal: what second-order solvers work in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.modes import Modes
from fnreg.solvers.base import joined, parted
from fnreg.solvers.conjugate import dot


class Look(NamedTuple):
    """The energy at some parameters, per pair."""

    value: Tensor  # (B,)
    slope: Tensor  # (B, P) gradient by the coordinates
    largest: Tensor  # (B,) the largest entry of the gradient by the step
    terms: dict[str, Tensor]  # (B,) each


class Scaled(NamedTuple):
    """Steps of a problem by coordinates y (B, P): its `modes` where it has some, else the step's own entries."""

    problem: Any
    modes: Modes | None

    @staticmethod
    def of(problem: Any) -> Scaled:
        """A problem by its modes."""
        return Scaled(problem, problem.modes())

    def step(self, y: Tensor) -> Any:
        """The step (B, ...) at coordinates."""
        return parted(y if self.modes is None else self.modes.step(y), self.problem.zero_step())

    def slope(self, gradient: Any) -> Tensor:
        """The gradient by the coordinates (B, P) from that by the step."""
        flat = joined(gradient)
        return flat if self.modes is None else self.modes.slope(flat)

    def look(self, params: Any) -> Look:
        """Value and gradient."""
        gradient, value, terms = self.problem.gradient(params)
        return Look(value, self.slope(gradient), joined(gradient).abs().amax(1), terms)

    def product(self, params: Any, exact: bool) -> Any:
        """The Hessian at the parameters by the coordinates, as a function of (B, P)."""
        product = self.problem.curvature(params, exact=exact)
        return lambda y: self.slope(product(self.step(y)))

    def diagonal(self, bends: Tensor, slope: Tensor, limit: float) -> Tensor:
        """An estimate of the Hessian's diagonal (B, P): the stiffness of the penalties, and what the rest bends.

        bends : (B, D) the curvature of a shift along each axis, or (B, 1) that of the whole step without modes; where
            it is not positive the step is to have at most the length `limit`
        """
        size = dot(slope, slope).sqrt().unsqueeze(1)
        floor = torch.where(size > 0, size / limit, 1)
        known = torch.isfinite(bends) & (bends > 1e-6 * floor)
        bends = torch.where(known, torch.where(known, bends, 1), floor)
        if self.modes is None:
            return bends.expand_as(slope)
        return self.modes.stiffness + bends.repeat_interleave(slope.shape[1] // bends.shape[1], 1)
