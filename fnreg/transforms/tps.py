"""Thin-plate splines: the smoothest map that carries landmarks to landmarks.

    T(p) = p + A (1, z) + sum_k w_k U(|z - z_k|),  z = (p - c) / L,  sum_k w_k (1, z_k) = 0

with the landmarks z_k about their mean c, in units of their root mean square distance L from it.  U(r) is r^3 in 1-D,
r^2 log r in 2-D and -r in 3-D, for which the integral of the squared second derivatives is the least.  Bookstein,
"Principal warps: thin-plate splines and the decomposition of deformations", 1989, doi 10.1109/34.24792.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fnreg.fields import in_voxels
from fnreg.losses.penalties import DenseField
from fnreg.pytree import constant, is_concrete
from fnreg.transforms.base import Mapping, Params, Step
from fnreg.transforms.dense import Dense, along
from fnreg.transforms.domain import Domain, first_domain

BLOCK = 2**22  # distances that are held at once
COINCIDE = 1e-9  # share of L
FLAT = 1e-6  # least over largest extent of the landmarks


@dataclasses.dataclass(frozen=True)
class TPS(Dense):
    """Thin-plate spline through landmarks, params fixed (N, D) and moving (N, D) in world units: T(fixed) = moving.

    A step moves the moving landmarks.  `init` spreads `count` landmarks over the domain, in the order of its axes; for
    landmarks of your own see `tps_mapping`.  The inverse is a displacement of the domain's voxels.  Landmarks that
    coincide or lie on one line, or in 3-D in one plane, give no finite map.

    count : landmarks, at least one more than the axes
    stiffness : 0 passes through the landmarks; more bends less, up to the affine map that is nearest by least squares;
        it adds to the diagonal of U(|z_j - z_k|), so it has no unit

    Bookstein 1989, doi 10.1109/34.24792; the kernels are those of Duchon 1977, doi 10.1007/BFb0086566.
    """

    count: int
    stiffness: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, Integral):
            raise ValueError(f"count is {self.count!r}: expected a whole number of landmarks")
        if self.count < 2 or not 0 <= self.stiffness < math.inf:
            raise ValueError(f"{self!r}: expected count >= 2 and a finite stiffness >= 0")

    def init(self, domain: Domain) -> Params:
        grid = first_domain(domain)
        if self.count <= grid.ndim:
            raise ValueError(f"{self!r} over {grid.ndim} axes: expected at least {grid.ndim + 1} landmarks")
        places = grid.convert(2 * _halton(self.count, grid.ndim, grid.center.device) - 1, "cube", "world")
        return {"fixed": places, "moving": places}

    def zero_step(self, domain: Domain) -> Step:
        grid = first_domain(domain)
        return {"moving": torch.zeros(self.count, grid.ndim, dtype=torch.float64, device=grid.center.device)}

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        moved = first_domain(domain).convert(step["moving"], "index", "world", vectors=True)
        return {"fixed": params["fixed"], "moving": params["moving"] + moved}

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        moved = _displacement(params["fixed"], params["moving"], points.to(torch.float64), self.stiffness)
        return (points + moved).to(points.dtype)

    def shift(self, params: Params, domain: Domain) -> Tensor:
        grid = first_domain(domain)
        moved = _displacement(params["fixed"], params["moving"], grid.points(), self.stiffness)
        return in_voxels(moved.mT.reshape(grid.ndim, *grid.shape), grid)

    def cast(self, params: Any, dtype: torch.dtype) -> Any:
        return params  # world coordinates stay float64

    def field(self, params: Params, domain: Domain) -> Any:
        grid = first_domain(domain)
        return DenseField(along(grid, self.shift(params, domain)), grid.spacing)


def tps_mapping(fixed_points: Tensor, moving_points: Tensor, domain: Domain, *, stiffness: float = 0.0) -> Mapping:
    """The thin-plate spline that carries landmarks of the fixed image to those of the moving one.

    fixed_points, moving_points : (N, D) world points that belong together, or (B, N, D)
    domain : the grid of the fixed image
    stiffness : see `TPS`

    Raises ValueError where shapes do not fit, or values are not finite, where there are fewer than D + 1 landmarks,
    where they coincide (unless the spline is stiff), and where they lie on one line, or in 3-D in one plane.

    >>> import torch, fnreg
    >>> corners = torch.tensor([[0.0, 0.0], [7.0, 0.0], [0.0, 7.0], [7.0, 7.0]])
    >>> moved = corners + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    >>> mapping = fnreg.tps_mapping(corners, moved, fnreg.Grid((8, 8)))
    >>> mapping.map_points(corners[:1]).round(decimals=4).tolist()
    [[1.0, 0.0]]
    """
    dimension = first_domain(domain).ndim
    for name, points in (("fixed_points", fixed_points), ("moving_points", moving_points)):
        if points.ndim not in (2, 3) or points.shape[-1] != dimension:
            raise ValueError(
                f"{name} have shape {tuple(points.shape)}: expected (N, {dimension}) world points, "
                f"or (B, N, {dimension}) for a batch"
            )
        if is_concrete(points) and not bool(torch.isfinite(points).all()):
            raise ValueError(f"{name} are not all finite: leave out the landmarks that are unknown on either side")
    fixed, moving = (points.to(torch.float64) for points in (fixed_points, moving_points))
    count = fixed.shape[-2]
    if moving.shape[-2] != count:
        raise ValueError(
            f"{count} fixed but {moving.shape[-2]} moving landmarks: give pairs, row by row in the same order"
        )
    if count <= dimension:
        raise ValueError(f"{count} landmarks over {dimension} axes: expected at least {dimension + 1}")
    transform = TPS(count, stiffness)
    if is_concrete(fixed):
        for one in fixed.detach().reshape(-1, count, dimension):
            _check_spread(one, stiffness)
    return Mapping({"fixed": fixed, "moving": moving}, domain, transform)


def _check_spread(fixed: Tensor, stiffness: float) -> None:
    """The landmarks determine an affine map, and no two of them are in one place."""
    extents = torch.linalg.svdvals(fixed - fixed.mean(0))
    if not bool(extents[-1] > FLAT * extents[0]):
        flat = ("in one point", "on one line", "in one plane")[fixed.shape[1] - 1]
        raise ValueError(f"the {len(fixed)} fixed landmarks lie {flat}: add some beside it")
    z = _normalized(fixed)[0]
    apart = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart + torch.diag(torch.full_like(apart[0], torch.inf))
    if stiffness == 0 and bool(apart.min() <= COINCIDE):
        first, second = divmod(int(apart.argmin()), len(fixed))
        raise ValueError(
            f"fixed landmarks {first} and {second} are in one place, {fixed[first].tolist()}: leave one of them out, "
            "or give a stiffness"
        )


def _normalized(fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Landmarks (N, D) about their mean in units of their root mean square distance from it; that mean; that unit."""
    center = fixed.mean(0)
    away = fixed - center
    size = away.square().sum(1).mean().sqrt()
    return away / size, center, size


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """U(|a_j - b_k|) (J, K), with derivative 0 where both are in one place."""
    squared = (a.unsqueeze(1) - b).square().sum(-1)
    apart = squared > 0
    safe = torch.where(apart, squared, 1)  # no derivative of a root or logarithm at 0
    value = (lambda: safe * safe.sqrt(), lambda: safe * safe.log() / 2, lambda: -safe.sqrt())[a.shape[1] - 1]()
    return torch.where(apart, value, 0)


def _displacement(fixed: Tensor, moving: Tensor, points: Tensor, stiffness: float) -> Tensor:
    """T(p) - p of world points (N, D) float64.

    What is solved for is the displacement, in units of the landmarks' extent: far from the origin nothing is lost.
    """
    z, center, size = _normalized(fixed)
    count, dimension = z.shape
    diagonal = stiffness * torch.eye(count, dtype=z.dtype, device=z.device)
    affine = torch.cat([torch.ones_like(z[:, :1]), z], 1)  # (N, D + 1)
    corner = z.new_zeros(dimension + 1, dimension + 1)
    system = torch.cat(
        [torch.cat([_kernel(z, z) + diagonal, affine], 1), torch.cat([affine.mT, corner], 1)]
    )  # (N + D + 1, N + D + 1)
    right = torch.cat([moving - fixed, z.new_zeros(dimension + 1, dimension)])
    weights = torch.linalg.solve_ex(system, right).result

    def at(p: Tensor) -> Tensor:
        here = (p - center) / size
        return torch.cat([_kernel(here, z), torch.ones_like(here[:, :1]), here], 1) @ weights

    return torch.cat([at(part) for part in points.split(max(1, BLOCK // count))])


@constant
def _halton(count: int, dimension: int, device: torch.device) -> Tensor:
    """Points (count, D) spread evenly over the unit cube.  Halton 1960, doi 10.1007/BF01386213."""
    rows = [[_van_der_corput(k, base) for base in (2, 3, 5)[:dimension]] for k in range(1, count + 1)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def _van_der_corput(number: int, base: int) -> float:
    """The digits of a number, mirrored at the point."""
    value, share = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        value += digit * share
    return value
