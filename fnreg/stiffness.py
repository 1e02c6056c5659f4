"""The diagonal of the Hessian of a field's energy, nearly: what preconditions second-order solvers.

Diffusion, bending and curvature have it by the Gram matrices of each axis.  The similarity's comes from shifts: the
basis functions of a field sum to one, so the Hessian times a shift of everything along one axis holds the sum of each
of its rows, a lumped mass, to which the penalties, that do not see a shift, add nothing.  Of such a sum the share
(151 / 315)^D lies on the diagonal for cubic B-splines, and all of it for values at voxels.  So one product for each
axis tells where the images hold a control point fast and where only the penalties do.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import bspline
from fnreg.gather import Padding
from fnreg.grid import Grid
from fnreg.losses import penalties
from fnreg.losses.penalties import DenseField, SplineField
from fnreg.pair import Pair
from fnreg.pytree import constant
from fnreg.transforms.base import Transform
from fnreg.transforms.dense import OneField
from fnreg.transforms.domain import first_domain

ORDERS = {penalties.diffusion: 1, penalties.bending: 2, penalties.curvature: 2}
Along = Callable[[int, int, int, torch.device], Tensor]
ON_DIAGONAL = 151 / 315  # integral of beta^2, of that of beta times the sum of all


class Stiffness(NamedTuple):
    """What is known of the Hessian's diagonal by the steps of one field.

    penalties : (B, P) theirs
    components : D, the field's
    share : of the sum of a row that lies on the diagonal, without the penalties
    """

    penalties: Tensor
    components: int
    share: float

    def shifts(self, like: Tensor) -> list[Tensor]:
        """A shift of everything by one voxel along each axis, (B, P) each."""
        eye = torch.eye(self.components, dtype=like.dtype, device=like.device)
        points = like.shape[1] // self.components
        return [row.repeat_interleave(points).expand_as(like).contiguous() for row in eye]

    def diagonal(self, rows: list[Tensor]) -> Tensor:
        """The diagonal (B, P) from what each shift changes of the gradient."""
        own = [row.unflatten(1, (self.components, -1))[:, d] for d, row in enumerate(rows)]
        return self.share * torch.cat(own, 1).clamp(min=0) + self.penalties


def serves(transform: Transform) -> bool:
    """Whether parameters and steps are one field's values."""
    return isinstance(transform, OneField)


def share(transform: Transform, domain: Any) -> float:
    """`Stiffness.share` of a transform."""
    field = transform.field(transform.init(domain), domain)
    return ON_DIAGONAL ** first_domain(domain).ndim if isinstance(field, SplineField) else 1.0


def stiffness(
    transform: Transform, padding: Padding | None, step: Any, pair: Pair, *, along: Along | None = None
) -> Tensor:
    """The diagonal (P,) of the second derivative of one pair's penalties by the step.

    along : the diagonal (m,) of the mean square of a derivative along one axis, in another basis of each axis
    """
    grid = first_domain(pair.domain)
    field: DenseField | SplineField = transform.field(transform.init(pair.domain), pair.domain)
    axes = axes_of(field, grid)
    spacing = field.spacing.to(torch.float64)
    lengths = grid.spacing.to(torch.float64).reshape(-1, *(1,) * grid.ndim) ** 2  # of one unit of a step, squared
    made: Tensor | None = None
    for term in pair.objective.terms:
        if term.function in ORDERS:
            weight = 2 * term.weight.to(torch.float64).clamp(min=0)
            found = weight * lengths * _roughness(axes, spacing, ORDERS[term.function], along or _axis)
            made = found if made is None else made + found
    if made is None:
        count = math.prod(len(_axis(n, stride, 0, spacing.device)) for n, stride in axes)
        return torch.zeros(grid.ndim * count, dtype=torch.float64, device=spacing.device)
    return made.flatten()


def axes_of(field: DenseField | SplineField, grid: Grid) -> list[tuple[int, int]]:
    """Of each axis, x first, the voxels and the stride of the field's values; stride 0 is a value at every voxel."""
    if isinstance(field, SplineField):
        return list(zip(field.lattice.size, field.lattice.stride, strict=True))
    return [(n, 0) for n in grid.size]


def _roughness(axes: list[tuple[int, int]], spacing: Tensor, total: int, along: Along) -> Tensor:
    """The diagonal (*lattice) of the mean of all squared derivatives of an order, by one component."""
    sums: list[Tensor] = []
    for orders in itertools.product(range(total + 1), repeat=len(axes)):
        if sum(orders) != total:
            continue
        often = math.factorial(total) / math.prod(math.factorial(n) for n in orders)
        parts = [
            along(n, stride, order, spacing.device) / scale ** (2 * order)
            for (n, stride), order, scale in zip(axes, orders, spacing, strict=True)
        ]
        sums.append(often * functools.reduce(lambda found, part: part.reshape(-1, *(1,) * found.ndim) * found, parts))
    return torch.stack(sums).sum(0)


@constant
def _axis(n: int, stride: int, order: int, device: torch.device) -> Tensor:
    """The diagonal (m,) of the mean square of a derivative along one axis; stride 0 is a value at every voxel."""
    return torch.diagonal(axis_matrix(n, stride, order, device)).contiguous()


def axis_matrix(n: int, stride: int, order: int, device: torch.device) -> Tensor:
    """The matrix (m, m) of the mean square of a derivative along one axis; stride 0 is a value at every voxel."""
    if stride:
        return bspline.gram_matrix(n, stride, order, order, device)
    difference = torch.eye(n, dtype=torch.float64, device=device)
    for _ in range(min(order, n - 1)):
        difference = difference.diff(dim=0)
    return difference.mT @ difference / len(difference) * (order < n)
