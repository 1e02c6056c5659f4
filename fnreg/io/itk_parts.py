"""ITK's transforms as it stores them, a class name with parameters and fixed parameters, to and from mappings.

The world is ours: LPS, and from fixed to moving points.  The parameters are those that the classes document:
https://docs.itk.org/projects/doxygen/en/stable/group__Group-Registration.html.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fnreg.grid import Grid
from fnreg.io.files import PathLike, TransformReadError
from fnreg.transforms.base import Mapping, Sequential
from fnreg.transforms.dense import Displacement
from fnreg.transforms.domain import first_domain
from fnreg.transforms.held import Held
from fnreg.transforms.linear import linear_mapping
from fnreg.transforms.spline import FFD

SKEW = 1e-4  # cosines between the axes of a header from which on they are not those of a grid
STRIDE = 4  # voxels between the control points of a spline that is read: ITK's has no voxels of its own
COMPOSITE = "CompositeTransform"
_NAME = re.compile(r"(\w+?)_(?:double|float)_(\d)_(\d)(?:_(\d))?")


class Part(NamedTuple):
    """One transform as ITK stores it."""

    kind: str  # the class, such as "AffineTransform"
    dimension: int
    parameters: np.ndarray
    fixed: np.ndarray

    @property
    def name(self) -> str:
        """What stands in a file."""
        return f"{self.kind}_double_{self.dimension}_{self.dimension}"


def part_of(path: PathLike, name: str, parameters: np.ndarray, fixed: np.ndarray) -> Part:
    """The part that a file names; TransformReadError where the name is none."""
    found = _NAME.fullmatch(name)
    if found is None or found[2] not in "23" or found[2] != found[3]:
        raise TransformReadError(
            f"{path} holds a {name[:80]!r}: expected a transform of 2 or 3 axes, such as AffineTransform_double_3_3"
        )
    if found[4] not in (None, "3"):
        raise TransformReadError(f"{path} holds a {found[1]} of order {found[4]}: readable are cubic ones, order 3")
    return Part(found[1], int(found[2]), parameters, fixed)


# -- from parts ----------------------------------------------------------------------------------------------------


def known(part: Part) -> bool:
    """Whether `mapping_of` can read it."""
    return part.kind in (*_LINEAR, "BSplineTransform", "DisplacementFieldTransform")


def mapping_of(path: PathLike, part: Part) -> Mapping:
    """A part of a known kind as a mapping; TransformReadError, naming the file, for what does not fit and numbers that
    are not finite."""
    if not (np.isfinite(part.parameters).all() and np.isfinite(part.fixed).all()):
        raise TransformReadError(f"{path} does not hold finite numbers")
    if part.kind == "BSplineTransform":
        return _spline(path, part)
    if part.kind == "DisplacementFieldTransform":
        size, origin, spacing, direction = _geometry(path, part)
        vectors = part.parameters.reshape(*size[::-1], part.dimension)
        return field_mapping(path, np.moveaxis(vectors, -1, 0), direction * spacing, origin)
    if part.kind not in _LINEAR:
        raise TransformReadError(f"{path} holds a {part.kind}: readable are {', '.join(_LINEAR)} and fields")
    count, make = _LINEAR[part.kind]
    dimension, given = part.dimension, len(part.parameters)
    if given != count(dimension):
        raise TransformReadError(
            f"{path} is damaged: a {part.kind} of {dimension} axes has {count(dimension)} parameters, not {given}"
        )
    center = part.fixed[:dimension] if len(part.fixed) >= dimension else np.zeros(dimension)
    linear, shift = make(dimension, part.parameters, part.fixed)
    matrix = torch.from_numpy(np.column_stack([linear, shift + center - linear @ center]))
    return linear_mapping(matrix, Grid((1,) * dimension, center=center.tolist()))


def joined(mappings: list[Mapping]) -> Mapping:
    """Mappings one after another, the first acts first; linear ones take the domain of the first with a field."""
    grid = next((first_domain(m.domain) for m in mappings if not m.transform.linear), None)
    if grid is not None:
        mappings = [Mapping(m.params, grid, m.transform) if m.transform.linear else m for m in mappings]
    if len(mappings) == 1:
        return mappings[0]
    params, domains, transforms = zip(*((m.params, m.domain, m.transform) for m in mappings), strict=True)
    return Mapping(params, domains, Sequential(transforms))


def field_mapping(path: PathLike, vectors: Any, axes: Any, origin: Any) -> Mapping:
    """A mapping from vectors (D, [Z,] Y, X) and the world's steps (D, D) from voxel to voxel, in columns."""
    if vectors.size == 0:
        raise TransformReadError(f"{path} holds a field without voxels, or it is damaged")
    spacing, direction = _axes(path, axes, origin)
    shape = vectors.shape[1:]
    grid = Grid(shape=shape, spacing=spacing.tolist(), origin=origin.tolist(), direction=direction.tolist())
    return grid_mapping(path, vectors, grid)


def grid_mapping(path: PathLike, vectors: Any, grid: Grid) -> Mapping:
    """A mapping from vectors (D, [Z,] Y, X) at the voxels of a grid."""
    if not np.issubdtype(vectors.dtype, np.floating) or not np.isfinite(vectors).all():
        raise TransformReadError(f"{path} does not hold vectors of finite numbers")
    native = vectors.astype(vectors.dtype.newbyteorder("="), copy=False)
    if native.dtype not in (np.float32, np.float64):
        native = native.astype(np.float64)
    return Mapping({"displacement": torch.from_numpy(np.ascontiguousarray(native))}, grid, Displacement())


def _axes(path: PathLike, axes: Any, origin: Any) -> tuple[np.ndarray, np.ndarray]:
    """Spacing and direction."""
    spacing = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(axes).all() and np.isfinite(origin).all() and (spacing > 0).all()):
        raise TransformReadError(f"{path} has no valid place in the world: its axes are {axes.tolist()}")
    direction = axes / spacing  # as it is: a header in single precision is not quite orthogonal
    if np.abs(direction.T @ direction - np.eye(len(direction))).max() > SKEW:
        raise TransformReadError(f"{path} has axes that are not at right angles, {axes.tolist()}: resample it")
    return spacing, direction


def _geometry(path: PathLike, part: Part) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Size, origin, spacing and direction of the fixed parameters; there are D numbers for each of its points."""
    d, fixed = part.dimension, part.fixed
    size = tuple(int(n) for n in fixed[:d])
    if len(fixed) != d * (3 + d) or min(size) < 1 or any(n != m for n, m in zip(size, fixed[:d], strict=True)):
        raise TransformReadError(f"{path} is damaged: a {part.kind} without size, origin, spacing and direction")
    expected = d
    for n in size:
        expected *= n
    if len(part.parameters) != expected:
        raise TransformReadError(
            f"{path} is damaged: {size} points have {expected} parameters, but it holds {len(part.parameters)}"
        )
    return size, fixed[d : 2 * d], fixed[2 * d : 3 * d], fixed[3 * d :].reshape(d, d)


def _spline(path: PathLike, part: Part) -> Mapping:
    """Control points of order 3 as an FFD over the region where ITK's spline is not the identity.

    Our lattices have a point in the middle: to an even number of points one more is added at the end, which counts
    only beyond that region.
    """
    size, origin, spacing, direction = _geometry(path, part)
    if min(size) < 4:
        raise TransformReadError(f"{path} holds {size} control points: a cubic spline has at least 4 along each axis")
    lengths, rotation = _axes(path, direction * spacing, origin)
    coefficients = part.parameters.reshape(part.dimension, *size[::-1])
    odd = [n + 1 - n % 2 for n in size]
    grow = [(0, 0), *((0, m - n) for n, m in zip(size[::-1], odd[::-1], strict=True))]
    coefficients = np.pad(coefficients, grow, mode="edge")
    center = origin + rotation @ (lengths * (np.array(odd) - 1) / 2)
    grid = Grid(
        [STRIDE * (n - 3) + 1 for n in odd],
        spacing=(lengths / STRIDE).tolist(),
        center=center.tolist(),
        direction=rotation.tolist(),
    )
    return Mapping({"coefficients": torch.from_numpy(coefficients.copy())}, grid, FFD(STRIDE))


# -- linear kinds: a count of parameters, and what they mean -------------------------------------------------------

Meaning = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # matrix and shift


def _turn(axis: int, angle: float) -> np.ndarray:
    """The rotation (3, 3) about a world axis."""
    made, (j, k) = np.eye(3), ((axis + 1) % 3, (axis + 2) % 3)
    made[[j, k], [j, k]] = np.cos(angle)
    made[k, j] = np.sin(angle)
    made[j, k] = -made[k, j]
    return made


def _euler(_: int, p: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y, z = (_turn(axis, float(p[axis])) for axis in range(3))
    # The order is Z X Y, unless the fourth fixed parameter, ComputeZYX, is set.
    return (z @ y @ x if len(fixed) > 3 and fixed[3] else z @ x @ y), p[3:]


def _versor(v: np.ndarray) -> np.ndarray:
    """The rotation of a unit quaternion, of which a file has the vector part."""
    x, y, z = v
    w = np.sqrt(max(0.0, 1 - float(v @ v)))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _plane(angle: float) -> np.ndarray:
    return _turn(2, angle)[:2, :2]


_LINEAR: dict[str, tuple[Callable[[int], int], Meaning]] = {
    "AffineTransform": (lambda d: d * d + d, lambda d, p, _: (p[: d * d].reshape(d, d), p[d * d :])),
    "MatrixOffsetTransformBase": (lambda d: d * d + d, lambda d, p, _: (p[: d * d].reshape(d, d), p[d * d :])),
    "TranslationTransform": (lambda d: d, lambda d, p, _: (np.eye(d), p)),
    "IdentityTransform": (lambda _: 0, lambda d, *_: (np.eye(d), np.zeros(d))),
    "ScaleTransform": (lambda d: d, lambda d, p, _: (np.diag(p), np.zeros(d))),
    "Euler2DTransform": (lambda d: 3 if d == 2 else -1, lambda _, p, __: (_plane(p[0]), p[1:])),
    "Rigid2DTransform": (lambda d: 3 if d == 2 else -1, lambda _, p, __: (_plane(p[0]), p[1:])),
    "Similarity2DTransform": (lambda d: 4 if d == 2 else -1, lambda _, p, __: (p[0] * _plane(p[1]), p[2:])),
    "Euler3DTransform": (lambda d: 6 if d == 3 else -1, _euler),
    "VersorTransform": (lambda d: 3 if d == 3 else -1, lambda _, p, __: (_versor(p), np.zeros(3))),
    "VersorRigid3DTransform": (lambda d: 6 if d == 3 else -1, lambda _, p, __: (_versor(p[:3]), p[3:])),
    "Similarity3DTransform": (lambda d: 7 if d == 3 else -1, lambda _, p, __: (p[6] * _versor(p[:3]), p[3:6])),
}


# -- to parts ------------------------------------------------------------------------------------------------------


def stored(mapping: Mapping) -> list[Part]:
    """A mapping as ITK stores it, what acts first at the front: affine maps, cubic splines, else displacement fields.

    Raises ValueError for a batch, for other than 2 or 3 axes, and for what is not finite.
    """
    if mapping.transform.linear:
        return [_affine(mapping)]
    return [_affine(part) if part.transform.linear else _bent(part) for part in mapping.parts()]


def _affine(mapping: Mapping) -> Part:
    """T(p) = A (p - c) + c + t with the middle of the domain as centre c."""
    matrix = mapping.matrix().detach().cpu()
    dimension = first_domain(mapping.domain).ndim
    if matrix.ndim != 2 or dimension not in (2, 3):
        raise ValueError(f"the mapping's matrix has shape {tuple(matrix.shape)}: ITK holds one map of 2 or 3 axes")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the mapping's matrix is not finite: ITK could not read it")
    center = first_domain(mapping.domain).center.detach().cpu()
    linear, offset = matrix[:-1, :-1], matrix[:-1, -1]
    translation = offset - center + linear @ center
    parameters = torch.cat([linear.flatten(), translation]).numpy()
    return Part("AffineTransform", dimension, parameters, center.numpy())


def _bent(mapping: Mapping) -> Part:
    grid, transform = first_domain(mapping.domain).to("cpu"), mapping.transform
    while isinstance(transform, Held):
        transform = transform.transform
    spline = isinstance(transform, FFD)
    values = (mapping.params["coefficients"] if spline else mapping.displacement()).detach().cpu().to(torch.float64)
    if values.ndim != grid.ndim + 1 or grid.ndim not in (2, 3):
        raise ValueError(f"the displacement has shape {tuple(values.shape)}: ITK holds one map of 2 or 3 axes")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the displacement is not finite: ITK could not use it")
    if not spline:
        kind, spacing, origin = "DisplacementFieldTransform", grid.spacing, grid.origin
        size, flat = grid.size, values.movedim(0, -1).reshape(-1)
    else:
        # One more control point on each side: the outer voxels often lie on the rim of the region outside of which
        # ITK's spline is the identity, where rounding would decide.
        kind, lattice = "BSplineTransform", transform.lattice(mapping.domain)
        padded = torch.from_numpy(np.pad(values.numpy(), [(0, 0)] + [(1, 1)] * grid.ndim, mode="edge"))
        size, flat = tuple(padded.shape[:0:-1]), padded.reshape(-1)
        steps = [s * n / m for s, n, m in zip(lattice.stride, grid.size, lattice.size, strict=True)]
        spacing = grid.spacing * torch.tensor(steps, dtype=torch.float64)
        half = (torch.tensor(size, dtype=torch.float64) - 1) / 2
        origin = grid.center - grid.direction @ (spacing * half)
    direction = grid.direction.flatten()
    place = torch.cat([torch.tensor(size, dtype=torch.float64), origin, spacing, direction])
    return Part(kind, grid.ndim, flat.numpy(), place.numpy())
