"""Transforms by cubic B-splines on a lattice: free-form deformations, and velocities of diffeomorphisms.

Lattices belong to the finest grid of a pyramid: control points lie `stride` of its voxels apart, twice as far on each
coarser level, symmetric about the centre.  So a level's splines are among those of the next, at every image size.
Parameters are world vectors (D, lattice), in the precision of the images; a map is constant beyond the outer voxels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnreg import bspline
from fnreg.bspline import Lattice
from fnreg.fields import in_voxels
from fnreg.grid import Grid
from fnreg.losses.penalties import SplineField
from fnreg.transforms.base import Params
from fnreg.transforms.dense import OneField, Velocity, along, zeros
from fnreg.transforms.domain import Domain, first_domain, same_extent

BLOCK = 2**15  # points at a time
Stride = int | tuple[int, ...]


@functools.cache
def level_lattice(size: tuple[int, ...], base: tuple[int, ...], stride: Stride) -> Lattice:
    """The lattice of level l of a pyramid, of this size, over `base` voxels: a point every `stride` 2^l of these."""
    finest = bspline.lattice(base, stride)  # checks the stride; on coarse levels it may be longer than the image
    return Lattice(base, tuple(s * _factor(n, m) for s, n, m in zip(finest.stride, base, size, strict=True)))


def _check_stride(stride: Any) -> Stride:
    """One whole number, or a tuple of them."""
    given = tuple(stride) if isinstance(stride, Iterable) else (stride,)
    if not given or not all(isinstance(s, Integral) and int(s) > 0 for s in given):
        raise ValueError(f"stride is {stride!r}: expected positive whole numbers of voxels, one or one per axis")
    whole = tuple(int(s) for s in given)
    return whole if isinstance(stride, Iterable) else whole[0]


def _factor(finest: int, size: int) -> int:
    factor = 1
    while -(-finest // factor) > size:
        factor *= 2
    return factor


def _evaluate_at(coefficients: Tensor, lattice: Lattice, grid: Grid, points: Tensor) -> Tensor:
    """Splines (D, N) at world points (N, D), in blocks: each point looks at 4^D control points."""
    index = grid.world_to_index(points).mT
    ratios = [n / m for n, m in zip(lattice.size, grid.size, strict=True)]
    ratio = torch.tensor(ratios, dtype=index.dtype, device=index.device).unsqueeze(1)
    blocks = ((index + 0.5) * ratio - 0.5).split(BLOCK, 1)
    return torch.cat([bspline.evaluate_at(coefficients.to(index.dtype), lattice, block) for block in blocks], 1)


class _Spline(OneField, abstract=True):
    """One field of coefficients, of the displacement or of the velocity."""

    stride: Stride

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", _check_stride(self.stride))

    def lattice(self, domain: Domain) -> Lattice:
        """Where the control points lie."""
        grid = first_domain(domain)
        return level_lattice(grid.size, grid.size if grid.base is None else grid.base, self.stride)

    def init(self, domain: Domain) -> Params:
        return {self.name: zeros(first_domain(domain), self.lattice(domain).shape)}

    def spline(self, coefficients: Tensor, domain: Domain) -> Tensor:
        """The splines of coefficients at the domain's voxels (D, [Z,] Y, X)."""
        return bspline.evaluate(coefficients, self.lattice(domain), first_domain(domain).size)

    def field(self, params: Params, domain: Domain) -> Any:
        grid, lattice = first_domain(domain), self.lattice(domain)
        # lengths along the axes, and the spacing of the finest grid, whose voxels the lattice counts
        counts = (torch.tensor(n, dtype=torch.float64, device=grid.spacing.device) for n in (grid.size, lattice.size))
        finest = grid.spacing * torch.div(*counts)
        return SplineField(along(grid, in_voxels(params[self.name], grid)), finest, lattice, grid.size)

    def refine(self, params: Params, domain: Domain, finer: Domain) -> Params:
        before, after = self.lattice(domain), self.lattice(finer)
        coefficients, grid, other = params[self.name], first_domain(domain), first_domain(finer)
        alike = same_extent(grid, other)
        while (
            alike and before.size == after.size and any(a > b for a, b in zip(before.stride, after.stride, strict=True))
        ):
            axes = tuple(a > b for a, b in zip(before.stride, after.stride, strict=True))
            coefficients, before = bspline.subdivide(coefficients, before, axes=axes), before.halved(axes)
        if alike and before == after:
            return {self.name: coefficients}
        # No level of the same pyramid: the nearest spline in the least-squares sense.
        values = _evaluate_at(coefficients, before, grid, other.points())
        fitted = bspline.fit(values.reshape(-1, *other.shape), after)
        return {self.name: fitted.to(coefficients.dtype)}


@dataclasses.dataclass(frozen=True)
class FFD(_Spline):
    """T(p) = p + u(p), u a cubic B-spline, params coefficients (D, lattice).

    Free-form deformation; Rueckert et al. 1999, doi 10.1109/42.796284.

    stride : voxels of the finest level between control points, one number or one per axis
    """

    stride: Stride = 4
    name: ClassVar[str] = "coefficients"

    def shift_of(self, vectors: Tensor, domain: Domain) -> Tensor:
        return self.spline(vectors, domain)

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        found = _evaluate_at(params[self.name], self.lattice(domain), first_domain(domain), points)
        return points + found.mT


@dataclasses.dataclass(frozen=True)
class SVFFD(_Spline, Velocity):
    """T = exp(v), v a cubic B-spline, params coefficients (D, lattice); its inverse is exp(-v).

    Stationary velocity free-form deformation; Modat et al. 2012, doi 10.1117/12.910397.

    stride : voxels of the finest level between control points, one number or one per axis
    squarings : of the flow, each of which doubles the time
    """

    stride: Stride = 4
    squarings: int = 6
    name: ClassVar[str] = "coefficients"

    def __post_init__(self) -> None:
        _Spline.__post_init__(self)
        Velocity.__post_init__(self)

    def velocity_of(self, vectors: Tensor, domain: Domain) -> Tensor:
        return self.spline(vectors, domain)
