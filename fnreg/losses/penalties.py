"""Penalties on a displacement or a velocity: equations, and the fields they act on.

A field u is given in the frame of the grid's own axes, with its lengths in world units; derivatives are by world
length along those axes.  Every penalty is unchanged by a rotation or a reflection of that frame, so no direction is
needed, and one physical field has one value, however it is stored and, up to the error of the differences, on any grid.
Means are over the domain between the outer voxels' centres.  An axis of one voxel has no derivative.

A penalty is a scalar function of a `DenseField` or a `SplineField`.  Both offer the same few means, from which the
equations are made; those of a spline are exact.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, relu

from fnreg import bspline, fields
from fnreg.bspline import Lattice
from fnreg.derivatives import determinant_of
from fnreg.filters import along
from fnreg.grid import Grid
from fnreg.losses.functional import log_above
from fnreg.pytree import constant, pytree_dataclass, static

WHOLE = 512  # control points up to which one matrix over the whole lattice is faster than one for each axis
Orders = tuple[int, ...]  # of a derivative per axis, x first


def _orders(dimension: int, total: int) -> list[Orders]:
    """All orders per axis of this total."""
    return [a for a in itertools.product(range(total + 1), repeat=dimension) if sum(a) == total]


def _unit(dimension: int, k: int, order: int = 1) -> Orders:
    """A derivative along axis k alone."""
    return tuple(order * (k == axis) for axis in range(dimension))


@constant
def _multinomial(dimension: int, total: int, device: torch.device) -> Tensor:
    """How often each derivative of `_orders` occurs among all of them, (K, 1), and minus twice its orders (K, D)."""
    orders = _orders(dimension, total)
    counts = [math.factorial(total) / math.prod(math.factorial(n) for n in a) for a in orders]
    rows = [[count, *(-2 * n for n in a)] for count, a in zip(counts, orders, strict=True)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def _scales(spacing: Tensor, total: int) -> Tensor:
    """The weight of each squared derivative per voxel, n! / prod_k a_k! s_k^(2 a_k), (K,) float64."""
    table = _multinomial(spacing.shape[-1], total, spacing.device)
    return table[:, 0] * torch.exp(table[:, 1:] @ torch.log(spacing.to(torch.float64)))


def _checked(name: str, values: Tensor, spacing: Tensor, shape: tuple[int, ...] | None = None) -> None:
    dimension = values.ndim - 1
    if values.shape[0] != dimension or spacing.shape != (dimension,):
        raise ValueError(
            f"{name} have shape {tuple(values.shape)} and spacing {tuple(spacing.shape)}: "
            "expected one channel and one spacing for each spatial axis"
        )
    if shape is not None and tuple(values.shape[1:]) != shape:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}: expected ({dimension}, {', '.join(map(str, shape))})"
        )


# -- fields of voxels -------------------------------------------------------------------------------------------


@pytree_dataclass
class DenseField:
    """A field by its values at voxels; derivatives are differences.

    vectors : (D, [Z,] Y, X) lengths in world units along the grid's own axes, x first
    spacing : (D,) of the voxels

    First differences lie between two voxels and second ones at a voxel between two others: exact for linear and for
    quadratic fields, and 0 for affine ones at the borders too.  Means are by the trapezoidal rule.
    """

    vectors: Tensor
    spacing: Tensor

    def roughness(self, order: int) -> Tensor:
        """mean over x of the sum of all squared derivatives of an order, sum_(k1..kn) |d_k1 ... d_kn u|^2."""
        _checked("vectors", self.vectors, self.spacing)
        means: list[Tensor] = []
        for orders in _orders(len(self.spacing), order):
            if any(n <= a for n, a in zip(self._size, orders, strict=True)):
                means.append(self.vectors.new_zeros(()))
                continue
            square = _differences(self.vectors, orders).square().sum(0)
            for weights in _trapezoid(square.shape, orders, square.dtype, square.device):
                square = square @ weights
            means.append(square)
        return (torch.stack(means) * _scales(self.spacing, order).to(self.vectors.dtype)).sum()

    def products(self) -> Tensor:
        """mean (d_j u_i) (d_m u_k), as (j, m, i, k), each of length D.

        At each corner of a cell of voxels, of the differences along its edges there.
        """
        _checked("vectors", self.vectors, self.spacing)
        vectors, dimension = self.vectors, len(self._size)
        table = [[vectors.new_zeros(dimension, dimension)] * dimension for _ in range(dimension)]
        for j, m in itertools.combinations_with_replacement(range(dimension), 2):
            if min(self._size[j], self._size[m]) == 1:
                continue
            a = _differences(vectors, _unit(dimension, j))
            b = a
            if j != m:  # the edges along j at both ends of those along m, and the other way round
                a, b = _midpoints(a, m), _midpoints(_differences(vectors, _unit(dimension, m)), j)
            differenced = tuple(int(k in (j, m)) for k in range(dimension))
            weights = _trapezoid(a.shape[1:], differenced, a.dtype, a.device)
            share = weights[-1]
            for weight in weights[-2::-1]:  # z first
                share = share.unsqueeze(-1) * weight
            table[j][m] = (a * share).flatten(1) @ b.flatten(1).mT
            table[m][j] = table[j][m].mT
        found = torch.stack([torch.stack(row) for row in table])
        scale = 1 / self.spacing.to(vectors.dtype)
        return found * torch.outer(scale, scale)[:, :, None, None]

    def laplacian(self) -> Tensor:
        """mean |sum_k d_k d_k u|^2 over the voxels that have neighbours on both sides."""
        _checked("vectors", self.vectors, self.spacing)
        long = [k for k, n in enumerate(self._size) if n > 2]
        if not long:
            return self.vectors.new_zeros(())
        total = torch.zeros_like(
            self.vectors[(..., *(slice(1, -1) if n > 2 else slice(None) for n in self.vectors.shape[1:]))]
        )
        for k in long:
            second = _differences(self.vectors, _unit(len(self._size), k, 2))
            for axis in (axis for axis in long if axis != k):
                second = second.narrow(-1 - axis, 1, self._size[axis] - 2)
            total = total + second / self.spacing[k].to(second.dtype) ** 2
        return total.square().sum(0).mean()

    def jacobian(self) -> Tensor:
        """The derivative of x + u at the voxels, (D, D, [Z,] Y, X), central inside and exact for parabolas."""
        _checked("vectors", self.vectors, self.spacing)
        return fields.jacobian(self.vectors, Grid(self._size, spacing=self.spacing))

    @property
    def _size(self) -> tuple[int, ...]:
        return tuple(self.vectors.shape[:0:-1])


def _differences(data: Tensor, orders: Sequence[int]) -> Tensor:
    """Repeated differences along each axis, x first, per voxel."""
    for k, order in enumerate(orders):
        for _ in range(order):
            n = data.shape[-1 - k] - 1
            data = data.narrow(-1 - k, 1, n) - data.narrow(-1 - k, 0, n)
    return data


def _midpoints(data: Tensor, k: int) -> Tensor:
    """Means of neighbours along axis k."""
    n = data.shape[-1 - k] - 1
    return (data.narrow(-1 - k, 1, n) + data.narrow(-1 - k, 0, n)) / 2


def _trapezoid(shape: Sequence[int], orders: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights of a mean along each axis, x first: all equal where differences were taken, else those of a trapezium."""
    return [_rule(n, order > 0, dtype, device) for n, order in zip(shape[::-1], orders, strict=True)]


@constant
def _rule(n: int, midpoint: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    weights = torch.ones(n, dtype=torch.float64, device=device)
    if not midpoint and n > 1:
        weights[0] = weights[-1] = 0.5
    return (weights / weights.sum()).to(dtype)


# -- splines ----------------------------------------------------------------------------------------------------


@pytree_dataclass
class SplineField:
    """A field of cubic B-splines on a lattice; its means are exact.

    coefficients : (D, *lattice.shape) lengths in world units along the grid's own axes, x first
    spacing : (D,) of the voxels of the finest grid, which the lattice counts
    lattice : where the control points lie
    size : voxels per axis, x first, of the grid over the same extent at which `jacobian` is taken; default the finest
    """

    coefficients: Tensor
    spacing: Tensor
    lattice: Lattice = static()
    size: tuple[int, ...] | None = static(default=None)

    def roughness(self, order: int) -> Tensor:
        """mean over x of the sum of all squared derivatives of an order, sum_(k1..kn) |d_k1 ... d_kn u|^2."""
        _checked("coefficients", self.coefficients, self.spacing, self.lattice.shape)
        lattice, found = self.lattice, self.coefficients
        dimension, dtype, device = len(lattice.size), found.dtype, found.device
        scales = _scales(self.spacing, order).to(dtype)  # (K,), one for each derivative
        if math.prod(lattice.count) <= WHOLE:
            root = _whole_root(lattice, order, dtype, device)  # (R, M)
            squares = (found.flatten(1) @ root.mT).square().sum(0)
            return squares @ scales[_whole_rows(lattice, order, device)]
        # From the slowest axis to the fastest, for all derivatives at once, (D, 1, 1, M) to (D, K, N, r)
        orders = list(zip(*_orders(dimension, order), strict=True))
        found = found.reshape(dimension, 1, 1, -1)
        for k in reversed(range(dimension)):
            roots = _roots(lattice.size[k], lattice.stride[k], orders[k], dtype, device)  # (K, r, m)
            if k == 0:
                found = found.unflatten(-1, (-1, roots.shape[2])).flatten(2, 3) @ roots.mT
            else:
                found = roots.unsqueeze(1) @ found.unflatten(-1, (roots.shape[2], -1))
                found = found.flatten(2, 3)
        return found.square().sum((0, 2, 3)) @ scales

    def products(self) -> Tensor:
        """mean (d_j u_i) (d_m u_k), as (j, m, i, k), each of length D."""
        dimension = len(self.lattice.size)
        table = [[self.coefficients] * dimension for _ in range(dimension)]
        for j, m in itertools.combinations_with_replacement(range(dimension), 2):
            table[j][m] = self._mean(_unit(dimension, j), _unit(dimension, m))
            table[m][j] = table[j][m].mT
        scale = 1 / self.spacing.to(torch.float64)
        found = torch.stack([torch.stack(row) for row in table]) * torch.outer(scale, scale)[:, :, None, None]
        return found.to(self.coefficients.dtype)

    def laplacian(self) -> Tensor:
        """mean |sum_k d_k d_k u|^2."""
        dimension = len(self.lattice.size)
        total = self.spacing.new_zeros(())
        for j, m in itertools.product(range(dimension), repeat=2):
            mean = self._mean(_unit(dimension, j, 2), _unit(dimension, m, 2)).diagonal().sum()
            total = total + mean / (self.spacing[j] * self.spacing[m]) ** 2
        return total.to(self.coefficients.dtype)

    def jacobian(self) -> Tensor:
        """The derivative of x + u at the voxels, (D, D, [Z,] Y, X)."""
        _checked("coefficients", self.coefficients, self.spacing, self.lattice.shape)
        dimension = len(self.lattice.size)
        slopes = [
            bspline.evaluate(self.coefficients, self.lattice, self.size, derivative=_unit(dimension, k))
            for k in range(dimension)
        ]
        ones = (1,) * dimension
        found = torch.stack(slopes, 1) / self.spacing.to(self.coefficients.dtype).reshape(1, -1, *ones)
        return found + torch.eye(dimension, dtype=found.dtype, device=found.device).reshape(dimension, dimension, *ones)

    def _mean(self, a: Orders, b: Orders) -> Tensor:
        """mean (d^a u_i) (d^b u_k), (D, D), by the finest voxel index: c^T G c.

        In float64, for here large numbers cancel: a translation has no derivative.
        """
        _checked("coefficients", self.coefficients, self.spacing, self.lattice.shape)
        values = self.coefficients.to(torch.float64)
        axes = zip(self.lattice.size, self.lattice.stride, a, b, strict=True)
        weighed = along(values, [bspline.gram_matrix(*axis, values.device) for axis in axes])
        return values.flatten(1) @ weighed.flatten(1).mT


@constant
def _roots(n: int, stride: int, orders: Orders, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Roots of the Gram matrices of several derivatives, (K, m, m), with rows of zeros where they have fewer."""
    roots = [bspline.gram_root(n, stride, a, device) for a in orders]
    return torch.stack([pad(root, (0, 0, 0, root.shape[1] - root.shape[0])) for root in roots]).to(dtype)


def _kronecker(lattice: Lattice, order: int, device: torch.device) -> list[Tensor]:
    """For each derivative the root (r, M) of its Gram matrix over the whole lattice."""
    found: list[Tensor] = []
    for orders in _orders(len(lattice.size), order):
        axes = zip(lattice.size, lattice.stride, orders, strict=True)
        roots = [bspline.gram_root(*axis, device) for axis in axes]
        found.append(functools.reduce(torch.kron, reversed(roots)))
    return found


@constant
def _whole_root(lattice: Lattice, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat(_kronecker(lattice, order, device)).to(dtype)


@constant
def _whole_rows(lattice: Lattice, order: int, device: torch.device) -> Tensor:
    """The derivative to which each row of `_whole_root` belongs."""
    counts = torch.tensor([len(root) for root in _kronecker(lattice, order, device)], device=device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)


# -- equations --------------------------------------------------------------------------------------------------

Field = DenseField | SplineField


def diffusion(field: Field) -> Tensor:
    """mean |grad u|^2 = mean sum_ij (d_j u_i)^2, without a unit.

    Horn and Schunck 1981, doi 10.1016/0004-3702(81)90024-2.

    >>> import torch
    >>> from fnreg.losses.penalties import DenseField, diffusion
    >>> diffusion(DenseField(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2.0])))
    tensor(0.2500)
    """
    return field.roughness(1)


def bending(field: Field) -> Tensor:
    """mean sum_ab |d_a d_b u|^2, in 1 / length^2; 0 for affine fields.

    Rueckert et al. 1999, doi 10.1109/42.796284.

    >>> import torch
    >>> from fnreg.losses.penalties import DenseField, bending
    >>> bending(DenseField(torch.tensor([[0.0, 1.0, 4.0, 9.0]]), torch.tensor([1.0])))
    tensor(4.)
    """
    return field.roughness(2)


def curvature(field: Field) -> Tensor:
    """mean |Laplace u|^2, in 1 / length^2; 0 for affine and for harmonic fields.

    Fischer and Modersitzki 2003, "Curvature based image registration".
    """
    return field.laplacian()


def elasticity(field: Field, *, mu: float = 1.0, lam: float = 1.0) -> Tensor:
    """mean of mu |eps|^2 + lam / 2 (div u)^2 with the strain eps = (grad u + grad u^T) / 2; no unit, 0 for small turns.

    mu, lam : Lame's constants, not negative.  Broit 1981, "Optimal registration of deformed images".
    """
    if mu < 0 or lam < 0:
        raise ValueError(f"mu is {mu} and lam {lam}: with a negative constant the energy has no minimum")
    products = field.products()
    strain = (torch.einsum("jjii->", products) + torch.einsum("jiij->", products)) / 2
    return mu * strain + lam / 2 * torch.einsum("jmjm->", products)


def divergence(field: Field) -> Tensor:
    """mean (div u)^2, without a unit: the change of volume, to first order."""
    return torch.einsum("jmjm->", field.products())


def total_variation(field: Field, *, eps: float = 1e-3) -> Tensor:
    """mean sqrt(|grad u|^2 + eps^2) over the voxels, without a unit; eps for a constant field.

    Rudin, Osher and Fatemi 1992, doi 10.1016/0167-2789(92)90242-F.

    eps : below this the root is smooth; positive
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be positive, for the root has no derivative at 0")
    slope = field.jacobian()
    identity = torch.eye(slope.shape[0], dtype=slope.dtype, device=slope.device)
    slope = slope - identity.reshape(*identity.shape, *(1,) * (slope.ndim - 2))
    return (slope.square().sum((0, 1)) + eps**2).sqrt().mean()


def folding(field: Field, *, margin: float = 0.1) -> Tensor:
    """mean max(0, margin - J)^2 over the voxels, J the determinant of the derivative of x + u; no unit.

    margin : of determinants that cost nothing, within [0, 1), for the identity has 1
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}: expected a number within [0, 1), for the identity has determinant 1")
    return relu(margin - determinant_of(field.jacobian())).square().mean()


def log_jacobian(field: Field, *, floor: float = 0.05) -> Tensor:
    """mean (log J)^2 over the voxels, J the determinant of the derivative of x + u; no unit.

    floor : below it the logarithm goes on as its tangent, which is finite where the map folds and leads out; in (0, 1)
    """
    return log_above(determinant_of(field.jacobian()), floor).square().mean()
