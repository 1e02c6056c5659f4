"""Cubic B-splines: weights and the interpolating prefilter.

beta(t) is the cubic B-spline with support (-2, 2).  A point at the fraction f of a knot interval sees the
four coefficients around it with the weights below.  Unser, "Splines: a perfect fit for signal and image
processing", 1999, doi 10.1109/79.799930.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fnreg.filters import along
from fnreg.pytree import constant


def weights(fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the knots at -1, 0, 1 and 2 for a point at `fraction` in [0, 1) of an interval."""
    f, g = fraction, 1 - fraction
    return g**3 / 6, (4 - 6 * f**2 + 3 * f**3) / 6, (4 - 6 * g**2 + 3 * g**3) / 6, f**3 / 6


@constant
def _inverse(n: int, device: torch.device) -> Tensor:
    """The matrix (n, n) from samples to coefficients of the spline mirrored about its end points."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    row = torch.arange(n, device=device)
    matrix = torch.zeros(n, n, dtype=torch.float64, device=device)
    matrix[row, row] = 4 / 6
    matrix[row[1:], row[1:] - 1] = matrix[row[:-1], row[:-1] + 1] = 1 / 6
    matrix[0, 1] = matrix[-1, -2] = 2 / 6
    return torch.linalg.inv(matrix)


def prefilter(data: Tensor) -> Tensor:
    """Coefficients of the cubic B-spline that passes through the voxels, (C, [Z,] Y, X) to the same shape.

    >>> import torch
    >>> from fnreg.bspline import prefilter
    >>> prefilter(torch.ones(1, 5)).round(decimals=6)
    tensor([[1., 1., 1., 1., 1.]])
    """
    return along(data, [_inverse(n, data.device).to(data.dtype) for n in data.shape[:0:-1]])
