"""Transforms by a vector at every voxel of the domain: displacements, velocities, compositions of small steps.

Parameters are world vectors (D, [Z,] Y, X) on the domain's grid, in the precision of the images; a map is constant
beyond the outer voxels.  Steps are voxels along the domain's own axes.
"""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnreg.fields import compose_shift, compose_step, exp_shift, folded_cells, folds, in_voxels, in_world, invert_shift
from fnreg.filters import gaussian, resize
from fnreg.grid import Grid
from fnreg.lengths import longest
from fnreg.losses.penalties import DenseField
from fnreg.pytree import is_alone, tree_map
from fnreg.sampling import sample
from fnreg.transforms.base import Mapping, Params, Step, Transform
from fnreg.transforms.domain import Domain, first_domain, same_extent
from fnreg.transforms.split import Split

ITERATIONS = 200  # of the search for an inverse; few voxels need more than ten
SMALLEST = 0.1  # voxels: the residual that an inverse may have


def zeros(grid: Grid, shape: tuple[int, ...] | None = None) -> Tensor:
    """A field of zeros (D, ...)."""
    return torch.zeros(
        grid.ndim, *(grid.shape if shape is None else shape), dtype=torch.float64, device=grid.center.device
    )


def along(grid: Grid, shift: Tensor) -> Tensor:
    """World lengths along the grid's own axes of a shift in voxels."""
    return shift * grid.spacing.to(shift.dtype).reshape(-1, *(1,) * (shift.ndim - 1))


class Dense(Transform, abstract=True):
    """What the transforms with a field share: the shift of the domain's voxels says all about the map."""

    def shift(self, params: Params, domain: Domain) -> Tensor:
        """T(p) - p at the domain's voxels, in voxels along its axes (D, [Z,] Y, X)."""
        raise NotImplementedError

    @property
    def splits(self) -> bool:
        return True

    def split(self, params: Params, domain: Domain) -> Split:
        return Split(self.shift(params, domain), None)

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        grid = first_domain(domain)
        index = grid.world_to_index(points)
        moved = sample(self.shift(params, domain).to(index.dtype), index.mT).value.mT
        return points + grid.convert(moved, "index", "world", vectors=True)

    def displacement(self, params: Params, domain: Domain, grid: Grid | None = None) -> Tensor:
        if grid is None:
            return in_world(self.shift(params, domain), first_domain(domain))
        return super().displacement(params, domain, grid)

    def cast(self, params: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda leaf: leaf.to(dtype), params)

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        """By Newton's method at the domain's voxels; between them it is linear, as every `Displacement`.

        Where the map folds at a voxel, or more than a tenth of a voxel is left, there is none: ValueError for one
        map; among those of a batch it is NaN.  Where the map compresses much its inverse bends between two voxels, so
        that the way there and back, `fnreg.fields.inverse_consistency`, may miss by voxels though none is left here.
        """
        grid, shift = first_domain(domain), self.shift(params, domain)
        found = invert_shift(shift, iterations=ITERATIONS)
        count = folds(in_world(shift, grid), grid)  # where points have several origins, no residual tells
        if is_alone(found.residual):
            advice = (
                "use a stronger penalty, or a diffeomorphism such as SVFFD; fnreg.fields.invert takes what there is"
            )
            if not bool(found.residual <= SMALLEST):
                left = float(found.residual)
                raise ValueError(f"the inverse of {self} did not converge: {left:.3g} voxels are left; {advice}")
            if int(count) > 0:
                cells = int(folded_cells(in_world(shift, grid), grid))
                raise ValueError(
                    f"the map of {self} folds at {int(count)} voxels and in {cells} of the cells between them, so it "
                    f"has no inverse: {advice}"
                )
        found_field = torch.where((found.residual <= SMALLEST) & (count == 0), found.field, torch.nan)
        return Mapping({"displacement": in_world(found_field, grid)}, grid, Displacement())


def refine_vectors(vectors: Tensor, domain: Grid, finer: Grid) -> Tensor:
    """A field (D, ...) on another grid of the same pyramid, else on any grid."""
    if same_extent(domain, finer):
        if finer.size == domain.size:
            return vectors
        if (finer.base or finer.size) == (domain.base or domain.size):
            return resize(vectors, finer.size)
    index = domain.world_to_index(finer.points()).mT.to(vectors.dtype)
    return sample(vectors, index).value.reshape(-1, *finer.shape)


class OneField(Dense, abstract=True):
    """One field of parameters, world vectors, whose step is the same in voxels along the axes."""

    name: ClassVar[str]

    def shift_of(self, vectors: Tensor, domain: Domain) -> Tensor:
        """`shift` of the parameters in voxels along the axes."""
        return vectors

    def shift(self, params: Params, domain: Domain) -> Tensor:
        return self.shift_of(in_voxels(params[self.name], first_domain(domain)), domain)

    def split_after(self, params: Params, step: Step, domain: Domain) -> Split:
        vectors = in_voxels(params[self.name], first_domain(domain)) + step[self.name]
        return Split(self.shift_of(vectors, domain), None)

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        return {self.name: params[self.name] + in_world(step[self.name], first_domain(domain))}


class Velocity(OneField, abstract=True):
    """A field whose flow is the map: the negative field flows back."""

    squarings: int

    def __post_init__(self) -> None:
        if isinstance(self.squarings, bool) or not isinstance(self.squarings, Integral) or self.squarings < 0:
            raise ValueError(f"squarings is {self.squarings!r}: expected a whole number, at least 0")

    def velocity_of(self, vectors: Tensor, domain: Domain) -> Tensor:
        """The velocity at the domain's voxels of the parameters, both in voxels along the axes."""
        return vectors

    def shift_of(self, vectors: Tensor, domain: Domain) -> Tensor:
        return exp_shift(self.velocity_of(vectors, domain), self.squarings, midpoint=True)

    @property
    def flow(self) -> Velocity:
        return self

    def first_step(self, params: Params, domain: Domain) -> Tensor | None:
        velocity = self.velocity_of(in_voxels(params[self.name], first_domain(domain)), domain)
        return longest(velocity) / 2**self.squarings

    @property
    def negates(self) -> bool:
        return True

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        return Mapping(tree_map(torch.neg, params), domain, self)

    def there_and_back(self, params: Params, domain: Domain) -> Tensor:
        back = self.shift(tree_map(torch.neg, params), domain)
        return in_world(compose_shift(self.shift(params, domain), back), first_domain(domain))


class _Voxels(OneField, abstract=True):
    """A vector at every voxel."""

    def init(self, domain: Domain) -> Params:
        return {self.name: zeros(first_domain(domain))}

    def refine(self, params: Params, domain: Domain, finer: Domain) -> Params:
        return {self.name: refine_vectors(params[self.name], first_domain(domain), first_domain(finer))}

    def field(self, params: Params, domain: Domain) -> Any:
        grid = first_domain(domain)
        return DenseField(along(grid, in_voxels(params[self.name], grid)), grid.spacing)


class _Displacements(_Voxels, abstract=True):
    """Parameters that are the displacement."""

    name: ClassVar[str] = "displacement"

    def split(self, params: Params, domain: Domain) -> Split:
        return Split(params[self.name], None, first_domain(domain).vectors_to_index)

    def step_of_shift(self, by_shift: Tensor) -> Step:
        return {"displacement": by_shift}


@dataclasses.dataclass(frozen=True)
class Displacement(_Displacements):
    """T(p) = p + u(p), params displacement u (D, [Z,] Y, X): a world vector at every voxel, linear in between."""


@dataclasses.dataclass(frozen=True)
class SVF(_Voxels, Velocity):
    """T = exp(v), params velocity v (D, [Z,] Y, X), by so many `squarings`; its inverse is exp(-v).

    Arsigny et al. 2006, doi 10.1007/11866565_113.
    """

    squarings: int = 6
    name: ClassVar[str] = "velocity"


@dataclasses.dataclass(frozen=True)
class Diffeomorphism(_Displacements):
    """Small smooth steps, composed: u <- d + u o (id + d), params displacement u (D, [Z,] Y, X).

    The gradient is taken with respect to the displacement as it stands and smoothed before the optimizer sees it; the
    field is smoothed after each step.  It descends no single stated objective.  Avants et al. 2008,
    doi 10.1016/j.media.2007.06.004; Christensen et al. 1996, doi 10.1109/83.536892.

    gradient, smooth : standard deviations of the Gaussians, in voxels of the level
    limit : no voxel moves by more than this many voxels in a step; the steps of a pair shrink as a whole
    """

    gradient: float = 1.0
    smooth: float = 0.75
    limit: float = 0.5

    def __post_init__(self) -> None:
        if not (self.gradient >= 0 and self.smooth >= 0 and self.limit > 0):
            raise ValueError(f"{self!r}: expected gradient and smooth >= 0 and limit > 0")

    def perturb(self, params: Params, step: Step, domain: Domain) -> Params:
        return super().retract(params, step, domain)

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        grid = first_domain(domain)
        small = self.limit / longest(step["displacement"]).clamp(min=self.limit)
        return {"displacement": compose_step(step["displacement"], params["displacement"], grid, small)}

    def precondition(self, gradient: Step, domain: Domain) -> Step:
        return {"displacement": _smooth(gradient["displacement"], self.gradient)}

    def project(self, params: Params, domain: Domain) -> Params:
        return {"displacement": _smooth(params["displacement"], self.smooth)}


def _smooth(vectors: Tensor, sigma: float) -> Tensor:
    return gaussian(vectors, sigma) if sigma > 0 else vectors
