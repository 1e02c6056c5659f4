"""Second-order solver for least-squares terms: Levenberg-Marquardt with a damping per pair."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.pytree import tree_choose
from fnreg.solvers.base import PerPair, Problem, Taken, largest, parted


class _Carry(NamedTuple):
    damping: Tensor  # (B,)
    value: Tensor  # (B,) |r|^2
    slope: Tensor  # (B, P) J^T r
    normal: Tensor  # (B, P, P) J^T J
    terms: dict[str, Tensor]  # (B,) each


@dataclasses.dataclass(frozen=True)
class GaussNewton(PerPair):
    """(J^T J + damping diag(J^T J)) s = -J^T r; a step that does not lower |r|^2 is undone and damped more.

    J is the derivative of the residuals by the step.  Marquardt 1963, doi 10.1137/0111030.

    damping : at the start
    factor : by which the damping falls after a step that helped and rises after one that did not
    limit : voxels; a longer step is shortened
    """

    damping: float = 1e-3
    factor: float = 10.0
    limit: float = 4.0

    def __post_init__(self) -> None:
        if not (self.damping > 0 and self.factor > 1 and self.limit > 0):
            raise ValueError(f"{self!r}: expected damping > 0, factor > 1 and limit > 0")

    def init(self, problem: Problem, params: Any) -> _Carry:
        """The normal equations where the level starts."""
        value, slope, normal, terms = problem.normal_equations(params)
        return _Carry(torch.full_like(value, self.damping), value, slope, normal, terms)

    def step(
        self, problem: Problem, params: Any, carry: _Carry, progress: float | Tensor, length: Tensor | None
    ) -> Taken:
        """One trial step of every pair; the value is that after it."""
        diagonal = torch.diagonal(carry.normal, dim1=-2, dim2=-1)
        # A parameter without influence has a zero row: a floor leaves it where it is.
        floor = diagonal.amax(-1, keepdim=True).clamp(min=1e-100) * 1e-12
        damped = carry.normal + torch.diag_embed(carry.damping[:, None] * diagonal + floor)
        flat = -torch.linalg.solve_ex(damped, carry.slope.unsqueeze(-1)).result.squeeze(-1)  # (B, P)
        size = flat.abs().amax(-1, keepdim=True)
        flat = flat * (self.limit / size.clamp(min=self.limit))
        step = parted(flat, problem.zero_step())
        trial = problem.retract(params, step)
        value, slope, normal, terms = problem.normal_equations(trial)
        better = (value <= carry.value) & torch.isfinite(flat).all(-1)
        damping = torch.where(better, carry.damping / self.factor, carry.damping * self.factor).clamp(1e-12, 1e12)
        fresh = _Carry(damping, value, slope, normal, terms)
        kept = tree_choose(better, fresh, carry._replace(damping=damping))
        moved = torch.where(better, largest(step), torch.inf)
        found = tree_choose(better, trial, params)
        return Taken(found, kept, kept.value, found, moved, damping >= 1e8, kept.terms)
