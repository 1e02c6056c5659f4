"""Derivatives through a registration: of the optimum against finite differences of the whole and the steps unrolled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from scenes import intensity, random_params, tensor, uniform
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVFFD,
    Affine,
    Checkpointed,
    Grid,
    Image,
    Implicit,
    Rigid,
    Subject,
    Translation,
    Unrolled,
    adam,
    differentiable,
    register,
    sgd,
)
from fnreg.implicit import Condition
from fnreg.pytree import tree_leaves, tree_map
from fnreg.solvers.base import Taken, largest
from fnreg.solvers.gauss_newton import _split

TIGHT = Implicit(tolerance=1e-13, iterations=2000, check=1e-6)


@dataclasses.dataclass(frozen=True)
class Newton:
    """s = -|H|^{-1} g, with eigenvalues made positive: some lines for small problems, exact to rounding."""

    limit: float = 4.0
    scales: ClassVar[bool] = False

    def init(self, problem: Any, params: Any) -> Any:
        return ()

    def step(self, problem: Any, params: Any, carry: Any, progress: float, length: Tensor | None) -> Taken:
        condition, data = Condition.of(problem)
        right, value, terms = problem.gradient(params)
        flat = torch.cat([leaf.flatten(1) for leaf in tree_leaves(right)], 1)  # (B, P)
        product, zero = condition.curvature(params, data), problem.zero_step()
        units = torch.eye(flat.shape[1], dtype=flat.dtype).unsqueeze(1).expand(-1, len(flat), -1)  # (P, B, P)
        rows = vmap(lambda unit: torch.cat([leaf.flatten(1) for leaf in tree_leaves(product(_split(unit, zero)))], 1))
        values, vectors = torch.linalg.eigh(rows(units).movedim(1, 0))
        inverse = 1 / values.abs().clamp(min=1e-9)
        step = -(vectors @ (inverse.unsqueeze(2) * (vectors.mT @ flat.unsqueeze(2)))).squeeze(2)
        step = step * (self.limit / step.abs().amax(1, keepdim=True).clamp(min=self.limit))
        step = _split(step, zero)
        moved = largest(step)
        return Taken(problem.retract(params, step), carry, value, params, moved, moved < 0, terms)


NEWTON: dict[str, Any] = {"solver": Newton(), "levels": 1, "steps": 12, "stop": None, "interpolation": "cubic"}


def pair(size: tuple[int, ...] = (16, 14), seed: int = 1) -> tuple[Image, Image]:
    """Two views of the scene about the origin that no map of a few parameters makes alike."""
    grid = Grid(size, spacing=(1.0, 1.2, 1.1)[: len(size)], center=(0.1, -0.2, 0.3)[: len(size)])
    wider = Grid([n + 6 for n in size], spacing=0.95, center=(0.0, 0.1, -0.1)[: len(size)])
    bent = lambda p: p + 0.6 * torch.sin(0.35 * p.flip(-1) + seed) + 0.2  # noqa: E731
    fixed = intensity(bent(grid.points()), 16.0) + 0.05 * intensity(grid.points(), 16.0, 1)
    return (
        Image(fixed.reshape(1, *grid.shape), grid),
        Image(intensity(wider.points(), 16.0).reshape(1, *wider.shape), wider),
    )
