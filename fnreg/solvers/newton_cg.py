"""Second order for many parameters: Newton's and Gauss-Newton steps by conjugate gradients, a damping per pair."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fnreg.pytree import tree_choose
from fnreg.solvers.base import PerPair, Problem, Taken, largest, lowers
from fnreg.solvers.conjugate import conjugate_gradients, dot
from fnreg.solvers.scaled import Look, Scaled

Curvature = Literal["gauss-newton", "hessian"]
CURVATURES = ("gauss-newton", "hessian")


class _Carry(NamedTuple):
    look: Look
    damping: Tensor  # (B,)
    forcing: Tensor  # (B,) to what part the next system is solved
    diagonal: Tensor  # (B, P)


@dataclasses.dataclass(frozen=True)
class NewtonCG(PerPair):
    """(H + damping D) s = -g, solved by conjugate gradients; a step that does not lower the value is undone.

    H is never made: only its products with steps are.  D is close to its diagonal and preconditions: the penalties'
    own, and what shifts of everything tell of the images, see `fnreg.stiffness`.  The damping of each pair falls where
    the value falls as the quadratic model says, and rises where it does not (Marquardt 1963, doi 10.1137/0111030); a
    system is solved as far as pays, by the fall of the gradient (Eisenstat and Walker 1996, choice 2,
    doi 10.1137/0917003), and ends at a direction without positive curvature (Steihaug 1983, doi 10.1137/0720042).

    Takes any objective with second derivatives, and any transform but `Diffeomorphism`, whose steps descend no stated
    objective.  With linear interpolation of the moving image the gradient jumps where a sample crosses a voxel, so the
    last digits of a minimum take small steps.  Memory: that of one gradient, a record of it, and a dozen steps.

    curvature : "gauss-newton" leaves the curvature of the map and of the warped image out: never negative for `mse` and
        `ncc`, and cheap; "hessian" is the whole second derivative, which converges quadratically
    iterations : of conjugate gradients in a step, at most; inside vmap exactly
    damping : at the start, in parts of D
    factor : by which the damping falls and rises
    limit : voxels; a longer step is shortened
    tolerance : a pair has converged once no entry of its gradient by the step exceeds this, in units of the objective
        per voxel
    """

    curvature: Curvature = "gauss-newton"
    iterations: int = 30
    damping: float = 1e-2
    factor: float = 5.0
    limit: float = 4.0
    tolerance: float = 0.0

    descends: ClassVar[bool] = True  # a stated objective, which a transform must have

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature is {self.curvature!r}: choose {' or '.join(CURVATURES)}")
        if not (self.damping > 0 and self.factor > 1 and self.limit > 0 and self.tolerance >= 0):
            raise ValueError(f"{self!r}: expected damping > 0, factor > 1, limit > 0 and tolerance >= 0")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"{self!r}: expected iterations, a whole number from 1 on")

    def init(self, problem: Problem, params: Any) -> _Carry:
        """Value and gradient where the level starts, and what a shift bends there."""
        scaled = Scaled(problem)
        look = scaled.look(params)
        product = scaled.product(params, self.curvature == "hessian")
        diagonal = scaled.diagonal(product, look.slope, self.limit)
        one = torch.ones(look.slope.shape[0], dtype=torch.float64, device=look.slope.device)
        return _Carry(look, self.damping * one, 0.5 * one, diagonal)

    def step(
        self, problem: Problem, params: Any, carry: _Carry, progress: float | Tensor, length: Tensor | None
    ) -> Taken:
        """One trial step of every pair; the value is that after it."""
        scaled, before = Scaled(problem), carry.look
        product = scaled.product(params, self.curvature == "hessian")
        kind = before.slope.dtype
        ridge = carry.damping.to(kind).unsqueeze(1) * carry.diagonal
        solved = conjugate_gradients(
            lambda y: product(y) + ridge * y,
            -before.slope,
            diagonal=carry.diagonal + ridge,
            tolerance=carry.forcing.to(kind),
            iterations=self.iterations,
        )
        size = solved.x.abs().amax(1)
        part = (self.limit / size.clamp(min=self.limit)).to(kind)
        step = scaled.step(part.unsqueeze(1) * solved.x)
        trial = problem.retract(params, step)
        look = scaled.look(trial)
        # what the model says that the step gains, from H s = -g - r - damping D s
        bend = dot(solved.x, -before.slope - solved.residual - ridge * solved.x)
        bend = torch.where(solved.curved, 0, bend)
        gain = -(part * dot(before.slope, solved.x) + part**2 / 2 * bend)
        ratio = (before.value - look.value) / torch.where(gain > 0, gain, torch.inf)
        sizes = [dot(slope, slope / carry.diagonal).sqrt() for slope in (look.slope, before.slope)]
        better = lowers(look.value, before.value, *sizes) & torch.isfinite(solved.x).all(1)
        settling = (before.value - look.value).abs() <= 64 * torch.finfo(look.value.dtype).eps * before.value.abs()
        falls, rises = better & ((ratio > 0.5) | settling), ~better | ((ratio < 0.1) & ~settling)
        damping = torch.where(falls, carry.damping / self.factor, carry.damping)
        damping = torch.where(rises, carry.damping * self.factor, damping).clamp(1e-14, 1e12)
        forcing = self._forcing(carry.forcing, sizes[0] / torch.where(sizes[1] > 0, sizes[1], 1))
        fresh = _Carry(look._replace(value=torch.minimum(look.value, before.value)), damping, forcing, carry.diagonal)
        kept = tree_choose(better, fresh, carry._replace(damping=damping))
        moved = torch.where(better, largest(step), torch.inf)
        found = tree_choose(better, trial, params)
        settled = (damping >= 1e8) | (kept.look.slope.abs().amax(1) <= self.tolerance)
        return Taken(found, kept, kept.look.value, found, moved, settled, kept.look.terms)

    @staticmethod
    def _forcing(before: Tensor, fall: Tensor) -> Tensor:
        """Eisenstat and Walker's choice 2 with its safeguard, between 1e-6 and a half."""
        made, kept = 0.9 * fall.to(before.dtype) ** 2, 0.9 * before**2
        return torch.where(kept > 0.1, torch.maximum(made, kept), made).clamp(1e-6, 0.5)
