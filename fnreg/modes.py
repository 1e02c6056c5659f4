"""The modes of smooth fields: a basis in which penalties are nearly diagonal, and images that tell all alike too.

Along one axis the modes solve G_1 v = k G_0 v, with G_0 and G_1 the mean squares of a field and of its derivative: the
cosines of a discrete transform, on lattices of splines too.  In products of the modes of all axes diffusion is
diagonal, bending nearly so, and J^T J is the identity times m where the images tell equally much of each place.  So
S S^T, S = V (m + k)^-1/2, is close to the inverse of J^T J + K, whatever the distance of control points: it
preconditions conjugate gradients, whose number of steps then depends on how unevenly the images tell, but not on the
lattice.  Lynch, Rice and Thomas 1964, doi 10.1007/BF01386067.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fnreg.filters import along
from fnreg.problem import Level
from fnreg.pytree import constant, tree_vmap
from fnreg.stiffness import axes_of, axis_matrix, serves, stiffness
from fnreg.transforms.domain import first_domain, single


class Modes(NamedTuple):
    """The modes of the fields of a batch of pairs.

    matrices : (m, m) per axis, x first, a mode in each column
    penalties : (B, D, *lattice) of each mode, half their second derivative
    """

    matrices: tuple[Tensor, ...]
    penalties: Tensor

    def scaled(self, known: Tensor) -> Scaling:
        """S for images that tell `known` (B, D) of a shift of everything by a voxel."""
        whole = self.penalties + known.reshape(*known.shape, *(1,) * len(self.matrices))
        return Scaling(self.matrices, whole.rsqrt())


class Scaling(NamedTuple):
    """S = V root, for rows (S B, P) of B pairs one after another."""

    matrices: tuple[Tensor, ...]
    root: Tensor  # (B, D, *lattice)

    def forth(self, rows: Tensor) -> Tensor:
        """S y."""
        fields = (rows.reshape(-1, *self.root.shape) * self.root).flatten(0, 2)
        return along(fields, self.matrices).reshape(rows.shape)

    def back(self, rows: Tensor) -> Tensor:
        """S^T x."""
        fields = along(rows.reshape(-1, *self.root.shape[2:]), [matrix.mT for matrix in self.matrices])
        return (fields.reshape(-1, *self.root.shape) * self.root).reshape(rows.shape)


class Diagonal(NamedTuple):
    """S = root, where the step is not one field."""

    root: Tensor  # (B, P)

    def forth(self, rows: Tensor) -> Tensor:
        """S y."""
        return (rows.unflatten(0, (-1, len(self.root))) * self.root).flatten(0, 1)

    def back(self, rows: Tensor) -> Tensor:
        """S^T x."""
        return self.forth(rows)


def modes(level: Level) -> Modes | None:
    """The modes of a level's fields; None where the step is not one field."""
    if not serves(level.transform):
        return None
    domain = single(level.pairs.domain)
    grid, field = first_domain(domain), level.transform.field(level.transform.init(domain), domain)
    axes, device = axes_of(field, grid), level.pairs.fixed.data.device
    matrices = tuple(_modes(n, stride, device) for n, stride in axes)
    of_pair = functools.partial(stiffness, level.transform, level.padding, along=_in_modes)
    found = tree_vmap(of_pair, (None, level.axes), level.zero_step(), level.pairs) / 2  # (B, P)
    return Modes(matrices, found.reshape(len(found), grid.ndim, *(len(m) for m in reversed(matrices))))


@constant
def _modes(n: int, stride: int, device: torch.device) -> Tensor:
    """The modes (m, m) of one axis."""
    root = torch.linalg.cholesky(axis_matrix(n, stride, 0, device))
    half = torch.linalg.solve_triangular(root, axis_matrix(n, stride, 1, device), upper=False)
    whole = torch.linalg.solve_triangular(root, half.mT, upper=False)
    vectors = torch.linalg.eigh((whole + whole.mT) / 2).eigenvectors
    return torch.linalg.solve_triangular(root.mT, vectors, upper=True)


@constant
def _in_modes(n: int, stride: int, order: int, device: torch.device) -> Tensor:
    """The mean square (m,) of a derivative of each mode."""
    vectors = _modes(n, stride, device)
    return (vectors * (axis_matrix(n, stride, order, device) @ vectors)).sum(0)
