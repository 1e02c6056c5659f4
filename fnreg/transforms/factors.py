"""A linear map taken apart: its rotation, shear and scale, and the rotation nearest to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A linear map as rotation, shear and scale: A = R (I + U) diag(s), U strictly upper triangular."""

    rotation: Tensor  # (D, D)
    shear: Tensor  # (D (D - 1) / 2,) entries of U row by row
    scale: Tensor  # (D,) positive but for the first, which is negative where A mirrors


def factors(linear: Tensor) -> Factors:
    """The factors of a matrix (D, D), by QR; the rotation is proper."""
    orthogonal, upper = torch.linalg.qr(linear)
    diagonal = torch.diagonal(upper)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(linear.dtype)
    orthogonal, upper = orthogonal * sign, sign[:, None] * upper  # positive diagonal
    mirror = torch.linalg.det(orthogonal) < 0
    flip = torch.ones_like(sign)
    flip = torch.cat([torch.where(mirror, -flip[:1], flip[:1]), flip[1:]])
    orthogonal, upper = orthogonal * flip, flip[:, None] * upper
    scale = torch.diagonal(upper)
    sheared = upper / scale
    rows, columns = torch.triu_indices(linear.shape[-1], linear.shape[-1], 1, device=linear.device)
    return Factors(orthogonal, sheared[rows, columns], scale)


def decompose(matrix: Tensor) -> tuple[Tensor, Factors]:
    """Translation (D,) and factors of a homogeneous matrix (D + 1, D + 1): A = R (I + U) diag(s).

    The product of the factors is the matrix again; the rotation is proper.  By QR.
    """
    dimension = matrix.shape[-1] - 1
    return matrix[:dimension, dimension], factors(matrix[:dimension, :dimension])


def nearest_rotation(linear: Tensor) -> Tensor:
    """The proper rotation nearest to a matrix (D, D) in the Frobenius norm; no derivative where that mirrors.

    Kabsch 1976, doi 10.1107/S0567739476001873.
    """
    left, _, right = torch.linalg.svd(linear.detach())
    last = torch.ones_like(linear[0].detach())
    last = torch.cat([last[:-1], torch.sign(torch.linalg.det(left @ right)).reshape(1)])
    # The derivative of singular vectors does not exist at a rotation, where all singular values are one; Newton's
    # iteration to the polar factor has one.  Higham 1986, doi 10.1137/0907079.
    rotation = linear
    for _ in range(12):
        rotation = (rotation + torch.linalg.inv_ex(rotation).inverse.mT) / 2
    exact = (left * last) @ right
    reached = (rotation.detach() - exact).abs().amax() < 1e-6
    return torch.where(reached, rotation, exact)
