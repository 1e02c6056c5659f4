"""Cubic B-splines: weights, the interpolating prefilter, and lattices of control points.

beta(t) is the cubic B-spline with support (-2, 2).  A point at the fraction f of a knot interval sees the
four coefficients around it with the weights below.  Unser, "Splines: a perfect fit for signal and image
processing", 1999, doi 10.1109/79.799930.

A lattice belongs to the finest grid of a domain.  Along an axis of n voxels with a stride of S voxels, the control
points lie at the voxel indices c + j S with c = (n - 1) / 2 and j = -J..J, J = ceil(c / S) + 1.  They are symmetric
about the centre, so a flip of the storage flips the coefficients, and the lattice of S / 2 holds that of S, so
subdivision is exact at every size.  Voxel i of a coarser grid with m voxels over the same extent lies at the finest
index (i + 1/2) n / m - 1/2.  Beyond the outer voxels' centres a field stays as it is there.

Sizes and strides are static, so that all matrices are constants: one small dense matrix per axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fnreg.filters import along
from fnreg.pytree import constant

CUT = 1e-5  # singular values of the basis below this share of the largest count as zero when samples are fitted


def weights(fraction: Tensor, derivative: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the knots at -1, 0, 1 and 2 for a point at `fraction` in [0, 1) of an interval.

    derivative : 0, 1 or 2, of the weights by the fraction
    """
    f, g = fraction, 1 - fraction
    if derivative == 0:
        return g**3 / 6, (4 - 6 * f**2 + 3 * f**3) / 6, (4 - 6 * g**2 + 3 * g**3) / 6, f**3 / 6
    if derivative == 1:
        return -(g**2) / 2, (3 * f - 4) * f / 2, (4 - 3 * g) * g / 2, f**2 / 2
    if derivative == 2:
        return g, 3 * f - 2, 3 * g - 2, f
    raise ValueError(f"derivative is {derivative}: a cubic spline has continuous derivatives of order 0, 1 and 2")


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


# -- lattices ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Control points over a grid; made by `lattice`, which checks what it is given."""

    size: tuple[int, ...]  # voxels of the finest grid per axis, x first
    stride: tuple[int, ...]  # finest voxels between control points

    @property
    def count(self) -> tuple[int, ...]:
        """Control points per axis, x first."""
        return tuple(2 * _reach(n, s) + 1 for n, s in zip(self.size, self.stride, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Control points per axis in tensor order ([z,] y, x)."""
        return self.count[::-1]

    def halved(self, axes: Sequence[bool] | None = None) -> Lattice:
        """The lattice with half the stride along the `axes` marked True, x first; default all."""
        marked = (True,) * len(self.size) if axes is None else tuple(bool(axis) for axis in axes)
        if len(marked) != len(self.size):
            raise ValueError(f"axes has {len(marked)} values but the lattice has {len(self.size)} axes")
        if any(half and s % 2 for half, s in zip(marked, self.stride, strict=True)):
            raise ValueError(
                f"stride {self.stride} cannot be halved along axes {marked}: make it even, or leave those axes out"
            )
        return Lattice(self.size, tuple(s // 2 if half else s for half, s in zip(marked, self.stride, strict=True)))


def lattice(size: Sequence[int], stride: int | Sequence[int]) -> Lattice:
    """The lattice with a control point every `stride` voxels, symmetric about the centre of a grid.

    size : voxels of the finest grid per axis, x first
    stride : voxels between control points, one for all axes or one per axis, x first

    Raises ValueError for a stride that is no positive whole number, or larger than the grid.

    >>> from fnreg.bspline import lattice
    >>> lattice((9, 6), 4).count
    (5, 5)
    """
    sizes = tuple(size)
    strides = (stride,) * len(sizes) if isinstance(stride, int) else tuple(stride)
    if len(strides) != len(sizes):
        raise ValueError(f"stride has {len(strides)} values but the grid has {len(sizes)} axes")
    if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"size is {sizes}: expected at least one voxel along each axis")
    if any(not isinstance(s, int) or s < 1 for s in strides):
        raise ValueError(f"stride is {strides}: expected positive whole numbers of voxels")
    if any(s > n for s, n in zip(strides, sizes, strict=True)):
        raise ValueError(
            f"stride {strides} is larger than the grid of {sizes} voxels: "
            "take a smaller stride or fewer levels, and 1 along an axis of one voxel"
        )
    return Lattice(sizes, strides)


def _reach(n: int, stride: int) -> int:
    """J = ceil((n - 1) / (2 S)) + 1: the control points on each side of the central one."""
    return -((1 - n) // (2 * stride)) + 1


def _knots(index: Tensor, n: int, stride: int) -> Tensor:
    """Finest voxel indices in units of the control points, the first of which is at 0."""
    return (index - (n - 1) / 2) / stride + _reach(n, stride)


def _basis(index: Tensor, n: int, stride: int, derivative: int) -> Tensor:
    """Values (N, m) of the basis at finest voxel indices (N,) within [0, n - 1], or derivatives by the index."""
    m = 2 * _reach(n, stride) + 1
    t = _knots(index, n, stride)
    start = torch.floor(t).long()
    matrix = t.new_zeros(len(t), m + 1)  # one column more: at the last knot the fourth weight is 0
    columns = start[:, None] + torch.arange(-1, 3, device=t.device)
    matrix.scatter_(1, columns, torch.stack(weights(t - start, derivative), 1))
    return matrix[:, :m] / stride**derivative


def _level_index(n: int, samples: int, device: torch.device) -> Tensor:
    """Finest voxel indices of the voxels of a grid with `samples` voxels over the extent of n."""
    return (torch.arange(samples, dtype=torch.float64, device=device) + 0.5) * (n / samples) - 0.5


@constant
def basis_matrix(n: int, stride: int, samples: int, derivative: int, device: torch.device) -> Tensor:
    """Values (samples, m) float64 of the m basis functions at the voxels of a grid with `samples` voxels.

    n : voxels of the finest grid over the same extent
    derivative : 0, 1 or 2, per finest voxel; beyond the outer voxels, and along an axis of one voxel, they are 0
    """
    index = _level_index(n, samples, device)
    matrix = _basis(index.clamp(0, n - 1), n, stride, derivative)
    moving = (index >= 0) & (index <= n - 1) & (n > 1)
    return torch.where(moving[:, None], matrix, 0) if derivative else matrix


@constant
def _cast(name: str, arguments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of this module in the dtype of the data."""
    return _MATRICES[name](*arguments, device).to(dtype)


def _check(coefficients: Tensor, lattice: Lattice) -> None:
    if coefficients.ndim != len(lattice.size) + 1 or tuple(coefficients.shape[1:]) != lattice.shape:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}: expected (C, {', '.join(map(str, lattice.shape))}) "
            f"for stride {lattice.stride} over {lattice.size} voxels"
        )


def _orders(derivative: Sequence[int] | None, lattice: Lattice) -> tuple[int, ...]:
    orders = (0,) * len(lattice.size) if derivative is None else tuple(derivative)
    if len(orders) != len(lattice.size):
        raise ValueError(f"derivative has {len(orders)} values but the lattice has {len(lattice.size)} axes")
    return orders


def evaluate(
    coefficients: Tensor,
    lattice: Lattice,
    size: Sequence[int] | None = None,
    *,
    derivative: Sequence[int] | None = None,
) -> Tensor:
    """The field u(i) = sum_k c_k prod_a beta((i_a - k_a) / S_a) at the voxels of a grid over the lattice's extent.

    coefficients : (C, *lattice.shape)
    size : voxels per axis, x first; default those of the finest grid
    derivative : orders per axis, x first, each 0, 1 or 2; by the finest voxel index

    Returns (C, [Z,] Y, X).  Raises ValueError for shapes that do not fit.

    >>> import torch
    >>> from fnreg.bspline import evaluate, lattice
    >>> net = lattice((8,), 4)
    >>> evaluate(6 * torch.ones(1, *net.shape), net, (2,)).round(decimals=5)
    tensor([[6., 6.]])
    """
    _check(coefficients, lattice)
    orders, samples = _orders(derivative, lattice), lattice.size if size is None else tuple(size)
    if len(samples) != len(lattice.size):
        raise ValueError(f"size has {len(samples)} values but the lattice has {len(lattice.size)} axes")
    axes = zip(lattice.size, lattice.stride, samples, orders, strict=True)
    return along(coefficients, [_cast("basis", axis, coefficients.dtype, coefficients.device) for axis in axes])


def evaluate_at(
    coefficients: Tensor, lattice: Lattice, index: Tensor, *, derivative: Sequence[int] | None = None
) -> Tensor:
    """The field of `evaluate` at scattered points.

    coefficients : (C, *lattice.shape)
    index : (D, N) finest voxel indices, x first; clamped to [0, n - 1], so that derivatives are 0 beyond
    derivative : orders per axis, x first, each 0, 1 or 2; by the index

    Returns (C, N); memory is that of 4^D values per point and channel.  Differentiable in coefficients and points;
    a NaN index gives NaN.  Raises ValueError for shapes that do not fit.

    >>> import torch
    >>> from fnreg.bspline import evaluate_at, lattice
    >>> net = lattice((8,), 4)
    >>> evaluate_at(6 * torch.ones(1, *net.shape), net, torch.tensor([[0.5, 99.0]])).round(decimals=5)
    tensor([[6., 6.]])
    """
    _check(coefficients, lattice)
    orders, dimension = _orders(derivative, lattice), len(lattice.size)
    if index.ndim != 2 or index.shape[0] != dimension:
        raise ValueError(f"index has shape {tuple(index.shape)}: expected ({dimension}, N), x first")
    flat: Tensor | None = None  # ([4, 4,] 4, N)
    shares: list[Tensor] = []  # (4, N) per axis
    step = 1
    for x, n, stride, m, order in zip(index, lattice.size, lattice.stride, lattice.count, orders, strict=True):
        t = _knots(x.clamp(0, n - 1), n, stride)
        start = torch.floor(torch.nan_to_num(t.detach()))
        share = torch.stack(weights(t - start, order))
        if order:
            still = (x < 0) | (x > n - 1) if n > 1 else ~torch.isnan(x)
            share = torch.where(still, 0, share / stride**order)
        shares.append(share.to(coefficients.dtype))
        # At the last knot the fourth weight is 0, and there is no fourth knot.
        knots = torch.stack([start.long() + k for k in range(-1, 3)]).clamp(max=m - 1) * step
        flat = knots if flat is None else knots.reshape(4, *(1,) * (flat.ndim - 1), -1) + flat
        step *= m
    assert flat is not None
    values = coefficients.reshape(coefficients.shape[0], -1)[:, flat]  # (C, [4, 4,] 4, N)
    for share in shares:
        values = (values * share).sum(-2)
    return values


# -- refinement and fitting -------------------------------------------------------------------------------------


def _subdivision(n: int, stride: int, device: torch.device) -> Tensor:
    """The matrix (m', m) to coefficients of half the stride: beta(t) = sum_k (1, 4, 6, 4, 1)_k / 8 beta(2 t - k)."""
    coarse, fine = _reach(n, stride), _reach(n, stride // 2)
    away = torch.arange(-fine, fine + 1, device=device)[:, None] - 2 * torch.arange(-coarse, coarse + 1, device=device)
    scale = torch.tensor([6, 4, 1, 0], dtype=torch.float64, device=device) / 8
    return scale[away.abs().clamp(max=3)]


def subdivide(coefficients: Tensor, lattice: Lattice, *, axes: Sequence[bool] | None = None) -> Tensor:
    """The coefficients of the same field on `lattice.halved(axes)`.

    coefficients : (C, *lattice.shape)
    axes : where to halve the stride, x first; default everywhere

    Exact within the grid, to rounding.  Raises ValueError where a stride is odd.

    >>> import torch
    >>> from fnreg.bspline import lattice, subdivide
    >>> net = lattice((8,), 4)
    >>> subdivide(torch.ones(1, *net.shape), net).shape, net.halved().shape
    (torch.Size([1, 7]), (7,))
    """
    _check(coefficients, lattice)
    finer = lattice.halved(axes)
    dtype, device = coefficients.dtype, coefficients.device
    pairs = zip(lattice.size, lattice.stride, finer.stride, strict=True)
    return along(coefficients, [None if s == half else _cast("half", (n, s), dtype, device) for n, s, half in pairs])


def _fitting(n: int, stride: int, samples: int, device: torch.device) -> Tensor:
    """The matrix (m, samples) from samples to coefficients: least squares, and of those the smoothest."""
    basis = basis_matrix(n, stride, samples, 0, device)
    u, s, v = torch.linalg.svd(basis)
    rank = int((s > CUT * s[0]).sum())
    inverse = v[:rank].mT @ (u[:, :rank].mT / s[:rank, None])  # (m, samples), the minimum norm
    free = v[rank:].mT  # (m, m - rank), what the samples do not see
    order = min(
        4, rank
    )  # fourth differences of a cubic polynomial are 0; three samples determine a parabola, and so on
    rough = torch.diff(torch.eye(len(v), dtype=basis.dtype, device=device), n=order, dim=0)
    return inverse - free @ torch.linalg.pinv(rough @ free) @ rough @ inverse


def fit(field: Tensor, lattice: Lattice) -> Tensor:
    """Coefficients whose field is nearest to samples, min over c of sum |u(i) - field(i)|^2.

    field : (C, [Z,] Y, X) at the voxels of a grid over the lattice's extent, of any size

    Returns (C, *lattice.shape).  What the samples determine poorly or not at all, such as the outermost control points,
    has the least fourth differences (lower ones of less than four samples).  So a cubic polynomial comes back exactly,
    and noise in the outer voxels is not magnified.

    >>> import torch
    >>> from fnreg.bspline import evaluate, fit, lattice
    >>> net = lattice((8,), 4)
    >>> evaluate(fit(torch.arange(1.0, 9.0)[None], net), net).round(decimals=3)
    tensor([[1., 2., 3., 4., 5., 6., 7., 8.]])
    """
    if field.ndim != len(lattice.size) + 1:
        raise ValueError(
            f"field has shape {tuple(field.shape)}: expected a channel axis and the lattice's {len(lattice.size)} axes"
        )
    axes = zip(lattice.size, lattice.stride, field.shape[:0:-1], strict=True)
    return along(field, [_cast("fit", axis, field.dtype, field.device) for axis in axes])


def _nodes(n: int, stride: int, derivative: int, device: torch.device) -> Tensor:
    """Q (N, m) at the nodes of a quadrature over [0, n - 1], with its root weights: Q^T Q is the mean of products."""
    if n == 1:
        return basis_matrix(n, stride, 1, derivative, device)
    nodes, shares = (torch.as_tensor(x, device=device) for x in np.polynomial.legendre.leggauss(4))
    last = math.ceil((n - 1) / 2 / stride)
    knots = torch.arange(-last, last + 1, dtype=torch.float64, device=device) * stride + (n - 1) / 2
    ends = knots.clamp(0, n - 1)  # the outer intervals are cut
    half, middle = (ends[1:] - ends[:-1]) / 2, (ends[1:] + ends[:-1]) / 2
    index = (middle[:, None] + half[:, None] * nodes).reshape(-1)
    share = (half[:, None] * shares).reshape(-1, 1) / (n - 1)
    return share.sqrt() * _basis(index, n, stride, derivative)


@constant
def gram_matrix(n: int, stride: int, a: int, b: int, device: torch.device) -> Tensor:
    """The matrix (m, m) of mean products, G_kl = 1 / (n - 1) times the integral over [0, n - 1] of B_k^(a) B_l^(b).

    a, b : orders of the derivatives by the finest voxel index, each 0, 1 or 2

    Exact: Gauss-Legendre with four nodes on each knot interval.  Over one voxel it is the product of the values there,
    and 0 for derivatives.
    """
    return _nodes(n, stride, a, device).mT @ _nodes(n, stride, b, device)


@constant
def gram_root(n: int, stride: int, a: int, device: torch.device) -> Tensor:
    """R (r, m) of full rank with R^T R = `gram_matrix(n, stride, a, a)`: the mean square of the a-th derivative is
    |R c|^2, in which no large numbers cancel."""
    upper = torch.linalg.qr(_nodes(n, stride, a, device), mode="r").R
    return upper[: upper.shape[1] - a].contiguous()  # the a-th derivative does not see polynomials of degree a - 1


_MATRICES: dict[str, Callable[..., Tensor]] = {"basis": basis_matrix, "half": _subdivision, "fit": _fitting}
