"""Linear transforms in world coordinates about the domain's centre.

    T(p) = c + t + R K S A (p - c)

with the centre c of the domain, translation t, rotation R, shear K, scale S and matrix A, of which each
transform has some.  Rotations are an angle in 2-D and a unit quaternion in 3-D; scales are logarithms.  Shear
and scale act along the domain's own axes; A and t are in world coordinates.  Parameters are float64.

One unit of a step moves the voxels of the domain by about one voxel in the root mean square, along the domain's
own axes: the results do not depend on how the same scan is stored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnreg.grid import Grid, apply_matrix, homogeneous, index_points
from fnreg.pytree import constant, is_alone, is_concrete
from fnreg.transforms.base import Mapping, Params, Step, Transform
from fnreg.transforms.domain import Domain, first_domain, single
from fnreg.transforms.factors import factors, nearest_rotation
from fnreg.transforms.rotation import (
    angle_to_matrix,
    matrix_to_angle,
    matrix_to_quaternion,
    normalize_quaternion,
    quaternion_multiply,
    quaternion_to_matrix,
    rotation_vector_to_quaternion,
)


def _spread(domain: Grid) -> Tensor:
    """Root mean square distance of the voxels from the centre along each axis, in voxels (D,)."""
    return _spread_of(domain.size, domain.center.device)


@constant
def _spread_of(size: tuple[int, ...], device: torch.device) -> Tensor:
    squares = torch.tensor([max(n * n - 1, 3) / 12 for n in size], dtype=torch.float64, device=device)
    return squares.sqrt()


def _turning(domain: Grid) -> Tensor:
    """Radians by which a rotation about each axis moves points by one voxel; (1,) in 2-D, (3,) in 3-D."""
    if domain.ndim == 1:
        raise ValueError("a line cannot be rotated: choose Translation, Scaling or Affine in 1-D")
    spacing, spread = domain.spacing, _spread(domain)
    moved = (spacing * spread / spacing[:, None]).square()  # axis i by one radian against axis j, mean square
    moved = moved - torch.diag(torch.diagonal(moved))
    if domain.ndim == 2:
        return 1 / moved.sum().sqrt().unsqueeze(0)
    return 1 / (moved.sum() - moved.sum(0) - moved.sum(1)).sqrt()


def _along(domain: Grid, matrix: Tensor) -> Tensor:
    """A matrix given along the domain's axes in world coordinates, R M R^T."""
    return domain.direction @ matrix @ domain.direction.mT


def _upper(domain: Grid, values: Tensor) -> Tensor:
    """The strictly upper triangular matrix (D, D) of values (D (D - 1) / 2,), row by row."""
    rows, columns = torch.triu_indices(domain.ndim, domain.ndim, 1, device=values.device)
    basis = torch.zeros(len(rows), domain.ndim, domain.ndim, dtype=values.dtype, device=values.device)
    basis[torch.arange(len(rows), device=values.device), rows, columns] = 1
    return (values[:, None, None] * basis).sum(0)


class _Rotation:
    @staticmethod
    def init(domain: Grid) -> Tensor:
        _turning(domain)
        if domain.ndim == 2:
            return torch.zeros(1, dtype=torch.float64, device=domain.center.device)
        return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=domain.center.device)

    @staticmethod
    def zero(domain: Grid) -> Tensor:
        return torch.zeros(1 if domain.ndim == 2 else 3, dtype=torch.float64, device=domain.center.device)

    @staticmethod
    def retract(value: Tensor, step: Tensor, domain: Grid) -> Tensor:
        turn = step * _turning(domain)
        if domain.ndim == 2:
            return value + turn
        quaternion = rotation_vector_to_quaternion(domain.direction @ turn)
        return normalize_quaternion(quaternion_multiply(quaternion, value))

    @staticmethod
    def matrix(value: Tensor, domain: Grid) -> Tensor:
        return angle_to_matrix(value) if domain.ndim == 2 else quaternion_to_matrix(normalize_quaternion(value))


class _Shear:
    @staticmethod
    def init(domain: Grid) -> Tensor:
        count = domain.ndim * (domain.ndim - 1) // 2
        if count == 0:
            raise ValueError("a line cannot be sheared: choose Translation, Scaling or Affine in 1-D")
        return torch.zeros(count, dtype=torch.float64, device=domain.center.device)

    zero = init

    @staticmethod
    def retract(value: Tensor, step: Tensor, domain: Grid) -> Tensor:
        rows, columns = torch.triu_indices(domain.ndim, domain.ndim, 1, device=value.device)
        spacing, spread = domain.spacing, _spread(domain)
        return value + step * spacing[rows] / (spacing[columns] * spread[columns])

    @staticmethod
    def matrix(value: Tensor, domain: Grid) -> Tensor:
        eye = torch.eye(domain.ndim, dtype=value.dtype, device=value.device)
        return _along(domain, eye + _upper(domain, value))


class _Scale:
    @staticmethod
    def init(domain: Grid) -> Tensor:
        return torch.zeros(domain.ndim, dtype=torch.float64, device=domain.center.device)

    zero = init

    @staticmethod
    def retract(value: Tensor, step: Tensor, domain: Grid) -> Tensor:
        return value + step / _spread(domain)

    @staticmethod
    def matrix(value: Tensor, domain: Grid) -> Tensor:
        return _along(domain, torch.diag(torch.exp(value)))


class _Size:
    @staticmethod
    def init(domain: Grid) -> Tensor:
        return torch.zeros(1, dtype=torch.float64, device=domain.center.device)

    zero = init

    @staticmethod
    def retract(value: Tensor, step: Tensor, domain: Grid) -> Tensor:
        return value + step / _spread(domain).square().sum().sqrt()

    @staticmethod
    def matrix(value: Tensor, domain: Grid) -> Tensor:
        return torch.exp(value) * torch.eye(domain.ndim, dtype=value.dtype, device=value.device)


class _Matrix:
    @staticmethod
    def init(domain: Grid) -> Tensor:
        return torch.eye(domain.ndim, dtype=torch.float64, device=domain.center.device)

    @staticmethod
    def zero(domain: Grid) -> Tensor:
        return torch.zeros(domain.ndim, domain.ndim, dtype=torch.float64, device=domain.center.device)

    @staticmethod
    def retract(value: Tensor, step: Tensor, domain: Grid) -> Tensor:
        return value + _along(domain, step * domain.spacing[:, None] / (domain.spacing * _spread(domain)))

    @staticmethod
    def matrix(value: Tensor, domain: Grid) -> Tensor:
        return value


_PARTS: dict[str, Any] = {
    "rotation": _Rotation,
    "shear": _Shear,
    "log_scale": _Scale,
    "log_size": _Size,
    "matrix": _Matrix,
}


class Linear(Transform, abstract=True):
    """A product of parts in the order of `parts` (the last acts first), then the translation where it has one."""

    parts: ClassVar[tuple[str, ...]] = ()
    translates: ClassVar[bool] = False

    def init(self, domain: Domain) -> Params:
        grid = first_domain(domain)
        params = {name: _PARTS[name].init(grid) for name in self.parts}
        return params | ({"translation": torch.zeros_like(grid.center)} if self.translates else {})

    def zero_step(self, domain: Domain) -> Step:
        grid = first_domain(domain)
        step = {name: _PARTS[name].zero(grid) for name in self.parts}
        return step | ({"translation": torch.zeros_like(grid.center)} if self.translates else {})

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        grid = first_domain(domain)
        moved = {name: _PARTS[name].retract(params[name], step[name], grid) for name in self.parts}
        if not self.translates:
            return moved
        return moved | {"translation": params["translation"] + grid.direction @ (grid.spacing * step["translation"])}

    @property
    def linear(self) -> bool:
        return True

    def matrix(self, params: Params, domain: Domain) -> Tensor:
        grid = first_domain(domain)
        factors = [_PARTS[name].matrix(params[name], grid) for name in self.parts]
        linear = functools.reduce(torch.matmul, factors) if factors else _Matrix.init(grid)
        shift = grid.center - linear @ grid.center
        return homogeneous(linear, shift + params["translation"] if self.translates else shift)

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        return apply_matrix(self.matrix(params, domain), points)

    def displacement(self, params: Params, domain: Domain, grid: Grid | None = None) -> Tensor:
        where = first_domain(domain) if grid is None else grid
        matrix = self.matrix(params, domain)
        change = matrix - torch.eye(where.ndim + 1, dtype=matrix.dtype, device=matrix.device)
        index = index_points(where.size, torch.float64, matrix.device)
        return ((change @ where.affine)[:-1] @ index).reshape(where.ndim, *where.shape)

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        """In closed form.  A singular map has none: ValueError for one map; among those of a batch it is NaN."""
        found = torch.linalg.inv_ex(self.matrix(params, domain))
        singular = found.info != 0
        if is_alone(singular) and bool(singular.any()):
            raise ValueError(f"the map of {self} is singular, so it has no inverse: no determinant may be 0")
        matrix = torch.where(singular, torch.nan, found.inverse)
        return Mapping({"matrix": matrix}, first_domain(domain), Homogeneous())

    def fit(self, matrix: Tensor, domain: Domain) -> Params:
        """The parameters whose map is nearest to a homogeneous world matrix: exact where this family holds it.

        Parts that the family lacks are dropped from the decomposition of the matrix; the centre maps right
        where there is a translation.
        """
        grid = first_domain(domain)
        dimension = grid.ndim
        linear = matrix[:dimension, :dimension]
        params: dict[str, Tensor] = {}
        if "matrix" in self.parts:
            params["matrix"] = linear
        else:
            found = factors(grid.direction.mT @ linear @ grid.direction)
            if "rotation" in self.parts:
                turn = nearest_rotation(linear)
                params["rotation"] = matrix_to_angle(turn) if dimension == 2 else matrix_to_quaternion(turn)
            if "shear" in self.parts:
                params["shear"] = found.shear
            if "log_scale" in self.parts:
                params["log_scale"] = found.scale.abs().log()
            if "log_size" in self.parts:
                params["log_size"] = (torch.linalg.det(linear).abs().log() / dimension).reshape(1)
        if self.translates:
            center = torch.cat([grid.center, grid.center.new_ones(1)])
            params["translation"] = (matrix @ center)[:dimension] - grid.center
        return {name: params[name] for name in self.init(domain)}

    def spread(self, domain: Domain, count: int) -> Params:
        """`count` evenly spread rotations, all else the identity: starts for a search, leaves (count, ...).

        In 2-D equal angles from 0 on; in 3-D the super-Fibonacci spiral on unit quaternions, the first of which
        is replaced by the identity.  Alexa 2022, doi 10.1109/CVPR52688.2022.00811.
        """
        if "rotation" not in self.parts:
            raise ValueError(f"{self} has no rotation to spread: choose Rotation, Rigid or Similarity")
        if count < 1:
            raise ValueError(f"count is {count}: give at least one start")
        grid = single(first_domain(domain))
        params = {name: leaf.expand(count, *leaf.shape) for name, leaf in self.init(grid).items()}
        number = torch.arange(count, dtype=torch.float64, device=grid.center.device)
        if grid.ndim == 2:
            params["rotation"] = (2 * math.pi / count * number).unsqueeze(1)
            return params
        part = (number + 0.5) / count
        inner, outer = part.sqrt(), (1 - part).sqrt()
        first, second = (
            2 * math.pi * (number + 0.5) / math.sqrt(2),
            2 * math.pi * (number + 0.5) / 1.533751168755204,
        )
        columns = (inner * first.sin(), inner * first.cos(), outer * second.sin(), outer * second.cos())
        quaternions = torch.stack(columns, 1)
        params["rotation"] = torch.cat([self.init(grid)["rotation"].unsqueeze(0), quaternions[1:]])
        return params


@dataclasses.dataclass(frozen=True)
class Translation(Linear):
    """T(p) = p + t, params translation (D,) in world units."""

    translates: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Rotation(Linear):
    """T(p) = c + R (p - c), params rotation: an angle (1,) in radians in 2-D, a unit quaternion (4,) in 3-D."""

    parts: ClassVar[tuple[str, ...]] = ("rotation",)


@dataclasses.dataclass(frozen=True)
class Rigid(Linear):
    """T(p) = c + t + R (p - c), params rotation and translation."""

    parts: ClassVar[tuple[str, ...]] = ("rotation",)
    translates: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Similarity(Linear):
    """T(p) = c + t + e^a R (p - c), params rotation, log_size a (1,) and translation."""

    parts: ClassVar[tuple[str, ...]] = ("rotation", "log_size")
    translates: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Scaling(Linear):
    """T(p) = c + diag(e^a) (p - c) along the domain's axes, params log_scale a (D,)."""

    parts: ClassVar[tuple[str, ...]] = ("log_scale",)


@dataclasses.dataclass(frozen=True)
class IsotropicScaling(Linear):
    """T(p) = c + e^a (p - c), params log_size a (1,)."""

    parts: ClassVar[tuple[str, ...]] = ("log_size",)


@dataclasses.dataclass(frozen=True)
class Shearing(Linear):
    """T(p) = c + (I + U) (p - c), U strictly upper triangular along the domain's axes, params shear (D (D - 1) / 2,).

    The only transform that depends on the order in which the axes are stored.
    """

    parts: ClassVar[tuple[str, ...]] = ("shear",)


@dataclasses.dataclass(frozen=True)
class Affine(Linear):
    """T(p) = c + t + A (p - c), params matrix A (D, D) and translation t (D,), in world coordinates."""

    parts: ClassVar[tuple[str, ...]] = ("matrix",)
    translates: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Homogeneous(Linear):
    """T(p) = M p with a given homogeneous world matrix, params matrix (D + 1, D + 1); steps as those of `Affine`."""

    parts: ClassVar[tuple[str, ...]] = ("matrix",)
    translates: ClassVar[bool] = True

    def init(self, domain: Domain) -> Params:
        center = first_domain(domain).center
        return {"matrix": torch.eye(center.shape[-1] + 1, dtype=center.dtype, device=center.device)}

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        grid = first_domain(domain)
        zero = torch.zeros_like(grid.direction)
        linear = _Matrix.retract(zero, step["matrix"], grid)
        shift = grid.direction @ (grid.spacing * step["translation"])
        change = homogeneous(linear, shift - linear @ grid.center)
        bottom = torch.zeros_like(change)
        bottom = torch.cat([bottom[:-1], change[-1:]])  # the last row stays (0, 1)
        return {"matrix": params["matrix"] + change - bottom}

    def matrix(self, params: Params, domain: Domain) -> Tensor:
        return params["matrix"]

    def fit(self, matrix: Tensor, domain: Domain) -> Params:
        return {"matrix": matrix}


def linear_mapping(matrix: Tensor, domain: Grid) -> Mapping:
    """The mapping p -> M p of a homogeneous world matrix (D + 1, D + 1); a 3x4-like matrix gets its last row."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64, device=domain.center.device)
    if matrix.shape[-2:] == (domain.ndim, domain.ndim + 1):
        matrix = homogeneous(matrix[..., :-1], matrix[..., -1])
    if matrix.shape[-2:] != (domain.ndim + 1, domain.ndim + 1):
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}: expected ({domain.ndim + 1}, {domain.ndim + 1})")
    if is_concrete(matrix):
        last = matrix[..., -1, :] - torch.eye(domain.ndim + 1, dtype=matrix.dtype, device=matrix.device)[-1]
        if not bool(torch.isfinite(matrix).all()) or bool(last.abs().max() > 1e-9):
            raise ValueError(f"matrix is {matrix.tolist()}: expected finite numbers and (0, ..., 0, 1) in the last row")
    return Mapping({"matrix": matrix}, domain, Homogeneous())
