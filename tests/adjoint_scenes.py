"""What the tests of derivatives through registrations share: small smooth pairs, and a solver that ends at rounding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from scenes import intensity, tensor, uniform
from torch import Tensor
from torch.func import vmap

import fnreg
from fnreg import FFD, SVFFD, Affine, Grid, Image, Implicit, Rigid, adam, register
from fnreg.implicit import Condition
from fnreg.pytree import tree_leaves, tree_map
from fnreg.solvers.base import Taken, largest, parted

TIGHT = Implicit(tolerance=1e-13, iterations=2000, check=1e-7)
POINTS = tensor([[1.0, 2.0, -0.5], [-4.0, 0.5, 1.0], [4.0, -3.0, 0.0]])


@dataclasses.dataclass(frozen=True)
class Newton:
    """s = -|H|^{-1} g from the whole Hessian: some lines for small problems, exact to rounding after a few steps."""

    limit: float = 1.0
    scales: ClassVar[bool] = False

    def init(self, problem: Any, params: Any) -> Any:
        return ()

    def step(self, problem: Any, params: Any, carry: Any, progress: float, length: Tensor | None) -> Taken:
        condition, data = Condition.of(problem)
        right, value, terms = problem.gradient(params)
        flat = torch.cat([leaf.flatten(1) for leaf in tree_leaves(right)], 1)  # (B, P)
        product, zero = condition.product(params, data), problem.zero_step()
        units = torch.eye(flat.shape[1], dtype=flat.dtype).unsqueeze(1).expand(-1, len(flat), -1)  # (P, B, P)
        rows = vmap(lambda unit: torch.cat([leaf.flatten(1) for leaf in tree_leaves(product(parted(unit, zero)))], 1))
        values, vectors = torch.linalg.eigh(rows(units).movedim(1, 0))
        step = -(vectors @ (vectors.mT @ flat.unsqueeze(2) / values.abs().unsqueeze(2))).squeeze(2)
        step = parted(step * (self.limit / step.abs().amax(1, keepdim=True).clamp(min=self.limit)), zero)
        moved = largest(step)
        return Taken(problem.retract(params, step), carry, value, params, moved, moved < 0, terms)


NEAR: dict[str, Any] = {"solver": Newton(), "levels": 1, "steps": 4, "stop": None}
SMOOTH: dict[str, Any] = {"interpolation": "cubic", "padding": "border"}


def pair(dimension: int = 2, seed: float = 1.0) -> tuple[Image, Image]:
    """Two views of the scene about the origin that no map of a few parameters makes alike."""
    size, wide = ((14, 12), (20, 18)) if dimension == 2 else ((8, 7, 6), (12, 11, 10))
    grid = Grid(size, spacing=(1.1, 1.3, 1.6)[:dimension], center=(0.1, -0.2, 0.3)[:dimension])
    wider = Grid(wide, spacing=(0.97, 0.99, 1.2)[:dimension], center=(0.0, 0.1, -0.1)[:dimension])
    points = grid.points()
    bent = points + 0.6 * torch.sin(0.35 * points.flip(-1) + seed) + 0.2
    fixed = intensity(bent, 16.0) + 0.05 * intensity(points, 16.0, 1)
    moving = intensity(wider.points(), 16.0)
    return Image(fixed.reshape(1, *grid.shape), grid), Image(moving.reshape(1, *wider.shape), wider)


def small(params: Any) -> Tensor:
    """A penalty that no change of the parameters escapes, so that every Hessian is positive definite."""
    return torch.stack([leaf.square().mean() for leaf in tree_leaves(params)]).sum()


SOME = 1e-2 * fnreg.bending + 1e-3 * fnreg.diffusion + 1e-3 * fnreg.term(small)
MEASURES: dict[str, Any] = {"mse": fnreg.mse, "lncc": fnreg.lncc(radius=3), "mi": fnreg.mi(bins=8, range=(-0.8, 1.6))}
TRANSFORMS: dict[str, Any] = {"rigid": Rigid(), "affine": Affine(), "ffd": FFD(8), "svffd": SVFFD(8, 2)}


def objective_of(measure: str, transform: str) -> Any:
    """A measure, with penalties where there is a field."""
    if transform in ("rigid", "affine"):
        return MEASURES[measure]
    return MEASURES[measure] + (1 if measure == "mse" else 10) * SOME


@functools.cache
def near(measure: str, transform: str, dimension: int = 2) -> Any:
    """Parameters near to the optimum: where the derivative is taken does not depend on where a registration begins."""
    fixed, moving = pair(dimension)
    chosen, options = TRANSFORMS[transform], {"objective": objective_of(measure, transform), **SMOOTH}
    descent: dict[str, Any] = {"optimizer": adam(0.2, decay=0.01), "levels": 1, "steps": 120, "stop": None}
    begun = register(fixed, moving, chosen, **descent, **options).mapping.params
    return register(fixed, moving, chosen, initial=begun, **NEAR, **options).mapping.params


def case(measure: str, transform: str, dimension: int = 2) -> tuple[Image, Image, Any, dict[str, Any]]:
    """Images, transform and options of a registration that ends where the gradient is rounding."""
    start = tree_map(Tensor.clone, near(measure, transform, dimension))
    options = {"objective": objective_of(measure, transform), "initial": start, **NEAR, **SMOOTH}
    return (*pair(dimension), TRANSFORMS[transform], options)


def error(result: Any) -> Tensor:
    """How far points are from where they should be."""
    where = POINTS[:, : result.fixed_grid.ndim]
    return (result.map_points(where) - 0.3 * where.flip(-1) - 0.5).square().mean()


def differences(function: Callable[[Tensor], Tensor], point: Tensor, along: Tensor, width: float = 1e-5) -> Tensor:
    """The central difference of a function of plain tensors along a direction."""
    return (function(point + width * along) - function(point - width * along)) / (2 * width)


def direction(like: Tensor) -> Tensor:
    """Some direction of a tensor's shape."""
    return uniform(*like.shape, seed=5) if like.ndim else tensor(1.0)
