"""A problem as second-order solvers see it: steps as rows (B, P), and a diagonal close to that of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.solvers.base import Problem, joined, parted
from fnreg.solvers.conjugate import dot

FLOOR = 1e-2  # of the largest entry: where nothing holds a control point, it would move by far more than others


class Look(NamedTuple):
    """The energy at some parameters, per pair."""

    value: Tensor  # (B,)
    slope: Tensor  # (B, P) gradient by the step
    terms: dict[str, Tensor]  # (B,) each


class Scaled(NamedTuple):
    """A problem whose steps are rows."""

    problem: Problem

    def step(self, flat: Tensor) -> Any:
        """The step (B, ...) of rows."""
        return parted(flat, self.problem.zero_step())

    def look(self, params: Any) -> Look:
        """Value and gradient."""
        gradient, value, terms = self.problem.gradient(params)
        return Look(value, joined(gradient), terms)

    def product(self, params: Any, exact: bool) -> Callable[[Tensor], Tensor]:
        """The Hessian at the parameters, as a function of rows."""
        product = self.problem.curvature(params, exact=exact)
        return lambda flat: joined(product(self.step(flat)))

    def diagonal(self, changed: Callable[[Tensor], Tensor], slope: Tensor, limit: float) -> Tensor:
        """An estimate (B, P) of the Hessian's diagonal, positive: see `fnreg.stiffness`.

        changed : what a step (B, P) changes of the gradient
        limit : voxels, the length of the first step of a pair of which nothing is known

        Where the step is not one field, the curvature along the gradient.
        """
        known = self.problem.stiffness()
        if known is None:
            size = dot(slope, slope)
            found = (dot(slope, changed(slope)) / torch.where(size > 0, size, 1)).unsqueeze(1).expand_as(slope)
        else:
            found = known.diagonal([changed(shift) for shift in known.shifts(slope)])
        most = found.amax(1, keepdim=True)
        steep = slope.abs().amax(1, keepdim=True) / limit
        steep = torch.where(steep > 0, steep, 1)
        sure = torch.isfinite(most) & (most > 1e-6 * steep)
        return torch.where(sure, torch.maximum(found, FLOOR * most), steep)
