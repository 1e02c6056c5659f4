"""A quasi-Newton solver: limited-memory BFGS with a history and a line search per pair."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fnreg.pytree import tree_choose
from fnreg.solvers.base import PerPair, Problem, Taken, largest, lowers
from fnreg.solvers.conjugate import dot
from fnreg.solvers.scaled import Look, Scaled

FALL = 1e-4  # the part of the slope's promise that a step has to keep, Armijo's
PROBE = 0.25  # voxels of a shift that tells how the energy bends
FIRST = 0.5  # voxels of the first step, before anything is known of the curvature


class _Carry(NamedTuple):
    look: Look
    length: Tensor  # (B,) of the next trial, in parts of the direction
    steps: Tensor  # (B, m, P) s, oldest first, zero where there is none yet
    changes: Tensor  # (B, m, P) of the gradient over s, y
    shares: Tensor  # (B, m) 1 / (s . y), zero where there is none
    diagonal: Tensor  # (B, P)


@dataclasses.dataclass(frozen=True)
class LBFGS(PerPair):
    """s = -a K g, K the inverse Hessian that the last steps and changes of the gradient tell of.

    The two-loop recursion of Nocedal 1980 and Liu and Nocedal 1989, doi 10.1007/BF01589116, which begins with the
    diagonal of `fnreg.stiffness`.  Each trial of the line search is one step of the loop: where the
    value falls by less than 1e-4 of what the slope promises the step is undone, and that pair's next one is shorter.
    A change of the gradient that does not confirm positive curvature is not remembered (Li and Fukushima 2001,
    doi 10.1137/S1052623499354242).

    Needs gradients only, so takes every objective, and any transform but `Diffeomorphism`, whose steps descend no
    stated objective.  Memory: 2 `memory` steps for each pair.

    memory : steps that are remembered
    limit : voxels; a longer step is shortened
    tolerance : a pair has converged once no entry of its gradient by the step exceeds this, in units of the objective
        per voxel
    """

    memory: int = 10
    limit: float = 4.0
    tolerance: float = 0.0

    descends: ClassVar[bool] = True  # a stated objective, which a transform must have

    def __post_init__(self) -> None:
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"{self!r}: expected memory, a whole number from 1 on")
        if not (self.limit > 0 and self.tolerance >= 0):
            raise ValueError(f"{self!r}: expected limit > 0 and tolerance >= 0")

    def init(self, problem: Problem, params: Any) -> _Carry:
        """Value and gradient where the level starts, and what a shift bends there."""
        scaled = Scaled(problem)
        look = scaled.look(params)
        slope = look.slope

        def changed(shift: Tensor) -> Tensor:
            aside = scaled.look(problem.retract(params, scaled.step(PROBE * shift)))
            return (aside.slope - slope).abs() / PROBE

        diagonal = torch.ones_like(slope)
        if problem.stiffness() is not None:
            diagonal = scaled.diagonal(changed, slope, self.limit)
        history = slope.new_zeros(slope.shape[0], self.memory, slope.shape[1])
        length = torch.ones(slope.shape[0], dtype=torch.float64, device=slope.device)
        return _Carry(look, length, history, history, history[:, :, 0], diagonal)

    def step(
        self, problem: Problem, params: Any, carry: _Carry, progress: float | Tensor, length: Tensor | None
    ) -> Taken:
        """One trial step of every pair; the value is that after it."""
        scaled, before = Scaled(problem), carry.look
        steepest = -before.slope / carry.diagonal
        ahead = -_recursion(before.slope, carry)
        known = carry.shares[:, -1] > 0
        downhill = known & (dot(ahead, before.slope) < 0) & torch.isfinite(ahead).all(1)
        ahead = torch.where(downhill.unsqueeze(1), ahead, steepest)
        size = ahead.abs().amax(1).to(carry.length.dtype)
        size = torch.where(size > 0, size, 1)
        unit = torch.where(downhill, 1, FIRST / size)
        tried = torch.minimum(carry.length, self.limit / (size * unit))
        y = (tried * unit).to(ahead.dtype).unsqueeze(1) * ahead
        step = scaled.step(y)
        trial = problem.retract(params, step)
        look = scaled.look(trial)
        slope = dot(before.slope, y)
        change = look.value - before.value
        sizes = [dot(g, g / carry.diagonal).sqrt() for g in (look.slope, before.slope)]
        enough = change <= FALL * slope
        better = lowers(look.value, before.value, *sizes) & torch.isfinite(y).all(1)
        rounding = change.abs() <= 64 * torch.finfo(change.dtype).eps * before.value.abs()
        better = better & (enough | rounding)
        # the lowest point of the parabola through both values and the slope
        below = 2 * (change - slope)
        least = (-slope / torch.where(below > 0, below, 1)).nan_to_num(nan=0.1).clamp(0.1, 0.5)
        shorter = tried * least.to(tried.dtype)
        kept = tree_choose(better, self._remember(carry, look, y), carry._replace(length=shorter))
        moved = torch.where(better, largest(step), torch.inf)
        found = tree_choose(better, trial, params)
        settled = (kept.length < 1e-10) | (kept.look.slope.abs().amax(1) <= self.tolerance)
        return Taken(found, kept, kept.look.value, found, moved, settled, kept.look.terms)

    @staticmethod
    def _remember(carry: _Carry, look: Look, y: Tensor) -> _Carry:
        """With one step more, where the gradient changed along it."""
        change = look.slope - carry.look.slope
        along = dot(y, change)
        sure = along > 1e-10 * dot(y, y).sqrt() * dot(change, change).sqrt()
        share = torch.where(sure, 1 / torch.where(sure, along, 1), 0)
        steps = torch.cat([carry.steps[:, 1:], y.unsqueeze(1)], 1)
        changes = torch.cat([carry.changes[:, 1:], change.unsqueeze(1)], 1)
        shares = torch.cat([carry.shares[:, 1:], share.unsqueeze(1)], 1)
        wide = sure.reshape(-1, 1, 1)
        look = look._replace(value=torch.minimum(look.value, carry.look.value))
        return _Carry(
            look,
            torch.ones_like(carry.length),
            torch.where(wide, steps, carry.steps),
            torch.where(wide, changes, carry.changes),
            torch.where(wide[:, 0], shares, carry.shares),
            carry.diagonal,
        )


def _recursion(slope: Tensor, carry: _Carry) -> Tensor:
    """K g (B, P) by the two loops."""
    parts = list(zip(carry.steps.unbind(1), carry.changes.unbind(1), carry.shares.unbind(1), strict=True))
    found, factors = slope, list[Tensor]()
    for step, change, share in reversed(parts):
        factor = (share * dot(step, found)).unsqueeze(1)
        found = found - factor * change
        factors.append(factor)
    _, change, share = parts[-1]
    size = share * dot(change, change / carry.diagonal)
    found = found / (carry.diagonal * torch.where(size > 0, size, 1).unsqueeze(1))
    for (step, change, share), factor in zip(parts, reversed(factors), strict=True):
        found = found + step * (factor - (share * dot(change, found)).unsqueeze(1))
    return found
