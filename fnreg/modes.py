"""Coordinates in which the regulariser of a field is diagonal: what preconditions second-order solvers.

Along each axis V holds the generalised eigenvectors of the Gram matrices of values and of first derivatives,
V^T G_0 V = I and V^T G_1 V = diag(lambda); over a lattice it is their Kronecker product, applied axis by axis.  In the
coordinates y of a step s = V y the mean square of the field is |y|^2, diffusion is sum_k lambda_k |y|^2, and bending
and curvature are (sum_k lambda_k)^2 |y|^2, up to what the borders add.  A similarity that pulls alike everywhere is
then a multiple of the identity.  Lynch, Rice and Thomas 1964, "Direct solution of partial difference equations by
tensor product methods", doi 10.1007/BF01386067.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fnreg import bspline
from fnreg.filters import along
from fnreg.losses import penalties
from fnreg.losses.penalties import DenseField, SplineField
from fnreg.pair import Pair
from fnreg.pytree import constant, tree_map
from fnreg.sampling import Padding
from fnreg.transforms.base import Domain, Transform, first_domain
from fnreg.transforms.dense import OneField

FLOOR = 1e-3  # of the largest value: control points beyond the border, which move nothing, count as moving so much
ORDERS = {penalties.diffusion: 1, penalties.bending: 2, penalties.curvature: 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Modes:
    """Coordinates y of steps s = V y of a batch, both side by side (B, P).

    matrices : V (m, m) of each axis, x first
    shape : (D, *lattice) of the field
    stiffness : (B, P) the second derivative of the penalties by y
    """

    matrices: tuple[Tensor, ...]
    shape: tuple[int, ...]
    stiffness: Tensor

    def step(self, flat: Tensor) -> Tensor:
        """V y."""
        return self._along(flat, self.matrices)

    def slope(self, flat: Tensor) -> Tensor:
        """V^T g: the gradient by y from that by the step."""
        return self._along(flat, tuple(matrix.mT for matrix in self.matrices))

    def shifts(self, dtype: torch.dtype) -> Tensor:
        """The coordinates (D, P) of a shift of everything along each axis: of the mode without a derivative."""
        count = self.shape[0]
        found = torch.zeros(count, count, math.prod(self.shape[1:]), dtype=dtype, device=self.stiffness.device)
        found[range(count), range(count), 0] = 1
        return found.flatten(1)

    def _along(self, flat: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
        data = flat.reshape(-1, *self.shape[1:])
        return along(data, [matrix.to(flat.dtype) for matrix in matrices]).reshape(flat.shape)


def field_axes(transform: Transform, domain: Domain) -> tuple[tuple[int, int], ...] | None:
    """Size and stride per axis, x first, of the one field whose values are the parameters; None where there is none."""
    if not isinstance(transform, OneField):
        return None
    grid = first_domain(domain)
    field = transform.field(tree_map(lambda leaf: leaf, transform.init(domain)), domain)
    if isinstance(field, SplineField):
        return tuple(zip(field.lattice.size, field.lattice.stride, strict=True))
    return tuple((n, 0) for n in grid.size)


def axis_matrix(n: int, stride: int, device: torch.device) -> Tensor:
    """V (m, m) of splines over n voxels with a control point every `stride` of them; stride 0 is a value per voxel."""
    return _solved(n, stride, device)[:-1]


def stiffness(transform: Transform, padding: Padding | None, step: Any, pair: Pair) -> Tensor:
    """The second derivative (P,) of the penalties of one pair by y, where they are diffusion, bending or curvature."""
    grid, axes = first_domain(pair.domain), field_axes(transform, pair.domain)
    assert axes is not None
    field: DenseField | SplineField = transform.field(transform.init(pair.domain), pair.domain)
    total: Tensor | None = None
    for (n, stride), spacing in zip(axes, field.spacing.to(torch.float64), strict=True):
        found = _solved(n, stride, spacing.device)[-1] / spacing**2
        total = found if total is None else total + found.reshape(-1, *(1,) * total.ndim)
    assert total is not None  # sum_k lambda_k, (*lattice)
    lengths = grid.spacing.to(torch.float64).reshape(-1, *(1,) * total.ndim) ** 2  # of one unit of a step, squared
    made = torch.zeros_like(lengths * total)
    for term in pair.objective.terms:
        if term.function in ORDERS:
            made = made + 2 * term.weight.to(torch.float64).clamp(min=0) * lengths * total ** ORDERS[term.function]
    return made.flatten()


@constant
def _solved(n: int, stride: int, device: torch.device) -> Tensor:
    """V and below it lambda, (m + 1, m) float64, smallest first."""
    if stride:
        values, slopes = (bspline.gram_matrix(n, stride, a, a, device) for a in (0, 1))
        share = FLOOR * torch.diagonal(values).amax()
        values = values + share * torch.eye(len(values), dtype=torch.float64, device=device)
    else:
        values = torch.eye(n, dtype=torch.float64, device=device) / n
        difference = torch.eye(n, dtype=torch.float64, device=device).diff(dim=0)
        slopes = difference.mT @ difference / max(n - 1, 1)
    inverse = torch.linalg.inv(torch.linalg.cholesky(values))
    eigenvalues, vectors = torch.linalg.eigh(inverse @ slopes @ inverse.mT)
    return torch.cat([inverse.mT @ vectors, eigenvalues.clamp(min=0)[None]])
