"""Grid: where the voxels of an image lie in the world.

A voxel index i = (x, y[, z]) lies at the world point p = R diag(s) (i - (n - 1) / 2) + c with size n, centre
c, spacing s and direction R, whose columns are the grid's axes in the world.  Beside index and world there
are two cubes: in `cube` the outer borders of the grid are at -1 and 1, in `corners` the centres of its first
and last voxels.  An axis of one voxel has no length between corner centres; there `corners` equals `cube`.

Points and vectors are `(..., D)` in (x, y[, z]) order.  The size is static, the rest are float64 tensors
which may carry a leading batch axis under `torch.func.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg.pytree import constant, is_concrete, pytree_dataclass, static, tree_flatten, tree_map, tree_unflatten

Axes = Literal["index", "cube", "corners", "world"]
Scalars = float | Sequence[float] | Tensor
Integers = int | Sequence[int]

AXES: tuple[Axes, ...] = ("index", "cube", "corners", "world")


@constant
def index_points(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Voxel indices of a grid and a row of ones, shape (D + 1, N), x fastest: ready for one matrix product."""
    axes = [torch.arange(n, dtype=dtype, device=device) for n in reversed(size)]
    mesh = torch.meshgrid(*axes, indexing="ij")[::-1]
    rows = [axis.reshape(-1) for axis in mesh]
    return torch.stack([*rows, torch.ones_like(rows[0])])


@constant
def _count(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(size, dtype=torch.float64, device=device)


def homogeneous(linear: Tensor, offset: Tensor) -> Tensor:
    """The matrix [[linear, offset], [0, 1]], shape (..., D + 1, D + 1), from (..., D, D) and (..., D)."""
    dimension = offset.shape[-1]
    top = torch.cat([linear, offset.unsqueeze(-1)], dim=-1)  # (..., D, D + 1)
    last = _last_row(dimension, offset.dtype, offset.device).expand(*top.shape[:-2], 1, dimension + 1)
    return torch.cat([top, last], dim=-2)


@constant
def _last_row(dimension: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([0.0] * dimension + [1.0], dtype=dtype, device=device)


def apply_matrix(matrix: Tensor, points: Tensor, *, vectors: bool = False) -> Tensor:
    """x -> A x + b for points, x -> A x for vectors (..., D), in float64, returned in the dtype of the points.

    Integer points, such as voxel indices, give float64.
    """
    dimension = points.shape[-1]
    if matrix.shape[-1] != dimension + 1:
        raise ValueError(f"points have {dimension} coordinates but the map has {matrix.shape[-1] - 1} dimensions")
    result = points.to(matrix.dtype) @ matrix[..., :dimension, :dimension].mT
    if not vectors:
        offset = matrix[..., :dimension, dimension]
        result = result + (offset.unsqueeze(-2) if matrix.ndim > 2 else offset)  # (B, D) beside (B, N, D)
    return result.to(points.dtype) if points.is_floating_point() else result


@pytree_dataclass
class Grid:
    """Sampling geometry of an image.

    size : voxels per axis in (x, y[, z]) order; or give `shape`, the same in tensor order ([z,] y, x)
    spacing : distance of voxels per axis, in world units; default 1
    origin, center : world position of the first voxel, or of the middle; at most one; default origin 0
    direction : (D, D) orthonormal, columns are the grid's axes in the world; reflections allowed; default I

    Raises ValueError for a size below 1, spacing that is not positive, a direction that is not orthonormal, or
    anything that is not finite.

    >>> from fnreg import Grid
    >>> grid = Grid((4, 3), spacing=(1.0, 2.0))
    >>> grid.shape, grid.extent.tolist(), grid.index_to_world(grid.index_center).tolist()
    ((3, 4), [4.0, 6.0], [1.5, 2.0])
    """

    size: tuple[int, ...] = static()
    center: Tensor
    spacing: Tensor
    direction: Tensor
    base: tuple[int, ...] | None = static(default=None)  # size of the finest grid, on the coarser levels of a pyramid

    def __init__(
        self,
        size: Sequence[int] | None = None,
        *,
        shape: Sequence[int] | None = None,
        spacing: Scalars = 1.0,
        origin: Scalars | None = None,
        center: Scalars | None = None,
        direction: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        if (size is None) == (shape is None):
            raise ValueError("give either size, in (x, y[, z]) order, or shape, in tensor order ([z,] y, x)")
        if origin is not None and center is not None:
            raise ValueError("give either origin, the first voxel's position, or center, not both")
        count = _whole("size", size) if size is not None else _whole("shape", shape)[::-1]
        dimension = len(count)
        if not 1 <= dimension <= 3 or min(count) < 1:
            raise ValueError(f"size is {count}: expected one to three axes of at least one voxel")
        if device is None:
            device = next((v.device for v in (spacing, origin, center, direction) if isinstance(v, Tensor)), None)

        def vector(name: str, value: Scalars) -> Tensor:
            tensor = _float64(value, device)
            if tensor.ndim == 0:
                tensor = tensor.expand(dimension)
            if tensor.shape[-1] != dimension:
                raise ValueError(f"{name} has {tensor.shape[-1]} values but the grid has {dimension} axes")
            return tensor

        spacings = vector("spacing", spacing)
        if direction is None:
            directions = torch.eye(dimension, dtype=torch.float64, device=device)
        else:
            directions = _float64(direction, device)
        if directions.shape[-2:] != (dimension, dimension):
            raise ValueError(f"direction has shape {tuple(directions.shape)}: expected ({dimension}, {dimension})")
        if center is not None:
            centers = vector("center", center)
        else:
            first = vector("origin", 0.0 if origin is None else origin)
            half = (torch.tensor(count, dtype=torch.float64, device=first.device) - 1) / 2
            centers = first + (directions @ (spacings * half).unsqueeze(-1)).squeeze(-1)
        _validate(spacings, centers, directions)
        for name, value in (
            ("size", count),
            ("center", centers),
            ("spacing", spacings),
            ("direction", directions),
            ("base", None),
        ):
            object.__setattr__(self, name, value)

    # -- what it is -------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Number of axes, D."""
        return len(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size in tensor order ([z,] y, x)."""
        return self.size[::-1]

    @property
    def numel(self) -> int:
        """Number of voxels."""
        return math.prod(self.size)

    @property
    def index_center(self) -> Tensor:
        """The middle of the grid as a voxel index, (n - 1) / 2."""
        return (self._count() - 1) / 2

    @property
    def origin(self) -> Tensor:
        """World position of the first voxel, (D,)."""
        return self.center - (self.direction @ (self.spacing * self.index_center).unsqueeze(-1)).squeeze(-1)

    @property
    def extent(self) -> Tensor:
        """Length of each axis from border to border in world units, n s."""
        return self.spacing * self._count()

    @property
    def affine(self) -> Tensor:
        """The homogeneous matrix from voxel index to world, (D + 1, D + 1) float64."""
        return self.matrix("index", "world")

    @property
    def inverse_affine(self) -> Tensor:
        """The homogeneous matrix from world to voxel index."""
        return self.matrix("world", "index")

    @property
    def vectors_to_world(self) -> Tensor:
        """The matrix from vectors in voxels along the grid's axes to world vectors, R diag(s), (D, D) float64."""
        return self.direction * self.spacing.unsqueeze(-2)

    @property
    def vectors_to_index(self) -> Tensor:
        """Its inverse.

        A direction from a file is orthonormal to the file's precision: one Newton step from the transpose gives its
        inverse to that precision squared.
        """
        transpose = self.direction.mT
        return (2 * transpose - transpose @ self.direction @ transpose) / self.spacing.unsqueeze(-1)

    def ranks(self) -> Grid:
        """The rank that each leaf has for one pair, for the rank rule."""
        return tree_unflatten([1, 1, 2], tree_flatten(self)[1])

    def to(self, device: torch.device | str) -> Grid:
        """The same grid with its leaves on another device."""
        return tree_map(lambda leaf: leaf.to(device), self)

    def same_as(self, other: Grid, tolerance: float = 1e-6) -> bool:
        """Whether both have one size and no voxel differs in position by more than `tolerance` voxels."""
        if self.size != other.size:
            return False
        corners = index_points((2,) * self.ndim, torch.float64, self.center.device)[:-1].T * (self._count() - 1)
        moved = apply_matrix(self.matrix("index", "index", other), corners)
        return bool(((moved - corners).abs() <= tolerance).all())

    def __repr__(self) -> str:
        parts = [f"size={self.size}"]
        for name in ("spacing", "origin", "direction"):
            leaf = getattr(self, "center" if name == "origin" else name)
            if not isinstance(leaf, Tensor) or not is_concrete(leaf) or leaf.ndim > (2 if name == "direction" else 1):
                parts.append(f"{name}=<{tuple(getattr(leaf, 'shape', ()))}>")
                continue
            value = torch.round(self.origin if name == "origin" else leaf, decimals=6)
            if name == "direction" and torch.equal(value, torch.eye(self.ndim, dtype=value.dtype, device=value.device)):
                continue
            parts.append(f"{name}={value.tolist()}")
        return f"Grid({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives the same grid back, to the last bit."""
        leaves = {name: getattr(self, name).tolist() for name in ("center", "spacing", "direction")}
        return {"type": "Grid", "size": list(self.size), **leaves} | (
            {} if self.base is None else {"base": list(self.base)}
        )

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Grid:
        """The grid that `to_dict` wrote.  Raises ValueError where a name is unknown or missing."""
        names = {"type", "size", "center", "spacing", "direction"}
        if set(data) - {"base"} != names or data["type"] != "Grid":
            raise ValueError(f"not a grid: expected the keys {sorted(names)} with type 'Grid', got {sorted(data)}")
        grid = Grid(data["size"], center=data["center"], spacing=data["spacing"], direction=data["direction"])
        if "base" not in data:
            return grid
        base = grid._integers("base", data["base"])
        if any(n < m for n, m in zip(base, grid.size, strict=True)):
            raise ValueError(f"base is {base}, smaller than the size {grid.size}: it is that of the finest level")
        return grid._with(grid.size, grid.spacing, grid.center, base)

    # -- coordinates ------------------------------------------------------------------------------------------

    def _count(self) -> Tensor:
        return _count(self.size, self.center.device)

    def _half(self, axes: Axes) -> Tensor:
        """Half of the cube's width in voxels."""
        count = self._count()
        return count / 2 if axes == "cube" else torch.where(count > 1, count - 1, 1.0) / 2

    def _to_index(self, axes: Axes) -> Tensor:
        middle = self.index_center
        if axes == "index":
            return torch.eye(self.ndim + 1, dtype=torch.float64, device=middle.device)
        if axes == "world":
            linear = self.vectors_to_index
            return homogeneous(linear, middle - (linear @ self.center.unsqueeze(-1)).squeeze(-1))
        return homogeneous(torch.diag(self._half(axes)), middle)

    def _from_index(self, axes: Axes) -> Tensor:
        middle = self.index_center
        if axes == "index":
            return torch.eye(self.ndim + 1, dtype=torch.float64, device=middle.device)
        if axes == "world":
            return homogeneous(self.vectors_to_world, self.origin)
        half = self._half(axes)
        return homogeneous(torch.diag(1 / half), -middle / half)

    def matrix(self, axes: Axes, to: Axes, to_grid: Grid | None = None) -> Tensor:
        """Homogeneous float64 matrix (D + 1, D + 1) from `axes` of this grid to `to` of this or another grid."""
        for name in (axes, to):
            if name not in AXES:
                raise ValueError(f"unknown axes {name!r}: choose from {', '.join(AXES)}")
        if to_grid is None:
            return self._from_index(to) @ self._to_index(axes)
        if to_grid.ndim != self.ndim:
            raise ValueError(f"grids of {self.ndim} and {to_grid.ndim} axes do not share a world")
        world = self._from_index("world") @ self._to_index(axes)
        return to_grid._from_index(to) @ (to_grid._to_index("world") @ world)

    def convert(
        self, points: Tensor, axes: Axes, to: Axes, to_grid: Grid | None = None, *, vectors: bool = False
    ) -> Tensor:
        """Express points (or vectors) (..., D) given in `axes` in the axes `to` of this grid or of `to_grid`.

        Exact to rounding in the dtype of the points, and differentiable in points and grids.
        """
        return apply_matrix(self.matrix(axes, to, to_grid), points, vectors=vectors)

    def index_to_world(self, points: Tensor) -> Tensor:
        """Voxel indices to world points."""
        return self.convert(points, "index", "world")

    def world_to_index(self, points: Tensor) -> Tensor:
        """World points to voxel indices, with fractions."""
        return self.convert(points, "world", "index")

    def points(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """World positions of all voxels, (N, D), x fastest."""
        index = index_points(self.size, torch.float64, self.center.device)
        return (self.affine[..., :-1, :] @ index).mT.to(dtype)

    # -- other grids over the same place ----------------------------------------------------------------------

    def _with(
        self, size: tuple[int, ...], spacing: Tensor, center: Tensor, base: tuple[int, ...] | None = None
    ) -> Grid:
        if min(size) < 1:
            raise ValueError(f"a grid of size {self.size} cannot become {size}: every axis needs a voxel")
        grid: Any = object.__new__(Grid)
        leaves = (("center", center), ("spacing", spacing), ("direction", self.direction))
        for name, value in (("size", size), *leaves, ("base", base)):
            object.__setattr__(grid, name, value)
        return grid

    def _integers(self, name: str, value: Integers) -> tuple[int, ...]:
        values = (int(value),) * self.ndim if isinstance(value, int | Integral) else _whole(name, value)
        if len(values) != self.ndim:
            raise ValueError(f"{name} has {len(values)} values but the grid has {self.ndim} axes")
        return values

    def resize(self, size: Integers) -> Grid:
        """As many voxels per axis as asked over the same extent and centre."""
        sizes = self._integers("size", size)
        count = torch.tensor(sizes, dtype=torch.float64, device=self.center.device)
        return self._with(sizes, self.extent / count, self.center)

    def level(self, size: Integers) -> Grid:
        """`resize` as a coarser level of a pyramid: the new grid remembers this one's size as its `base`."""
        coarse = self.resize(size)
        base = self.size if self.base is None else self.base
        return coarse._with(coarse.size, coarse.spacing, coarse.center, None if coarse.size == base else base)

    def resample(self, spacing: Scalars, *, size: Integers | None = None) -> Grid:
        """The given spacing about the same centre; the size covers the extent unless it is given.

        Under vmap the size cannot depend on values: give it.
        """
        spacings = _float64(spacing, self.center.device)
        spacings = spacings.expand(self.ndim) if spacings.ndim == 0 else spacings
        if spacings.shape[-1] != self.ndim:
            raise ValueError(f"spacing has {spacings.shape[-1]} values but the grid has {self.ndim} axes")
        _validate(spacings, self.center, self.direction)
        if size is None:
            if not (is_concrete(spacings) and is_concrete(self.spacing)):
                raise ValueError("inside vmap give resample(spacing, size=...): a size cannot depend on batched values")
            size = [max(1, math.ceil(round(v, 6))) for v in (self.extent / spacings).tolist()]
        return self._with(self._integers("size", size), spacings, self.center)

    def downsample(self, levels: int = 1, *, min_size: int = 1) -> Grid:
        """Half as many voxels per axis, rounded up, `levels` times; no axis falls below `min_size`."""
        size = self.size
        for _ in range(levels):
            size = tuple(-(-n // 2) if -(-n // 2) >= min_size else n for n in size)
        return self.resize(size)

    def upsample(self, levels: int = 1) -> Grid:
        """Twice as many voxels per axis, `levels` times, over the same extent."""
        return self.resize([n * 2**levels for n in self.size])

    def pyramid(self, levels: int, *, min_size: int = 4) -> tuple[Grid, ...]:
        """This grid and up to `levels - 1` coarser ones over the same extent, finest first.

        Each level halves the size of the one before, rounded up; an axis that would fall below `min_size`
        stays as it is, and the pyramid ends where no axis shrinks.  Sizes depend on the size only.
        """
        if levels < 1:
            raise ValueError(f"levels is {levels}: a pyramid has at least one level")
        grids: list[Grid] = [self]
        while len(grids) < levels and grids[-1].downsample(min_size=min_size).size != grids[-1].size:
            grids.append(self.level(grids[-1].downsample(min_size=min_size).size))
        return tuple(grids)

    def crop(self, low: Integers, high: Integers | None = None) -> Grid:
        """Without `low` voxels at the start of each axis and `high` (default: the same) at its end."""
        lows = self._integers("low", low)
        highs = lows if high is None else self._integers("high", high)
        size = tuple(n - a - b for n, a, b in zip(self.size, lows, highs, strict=True))
        return self.roi(lows, size)

    def pad(self, low: Integers, high: Integers | None = None) -> Grid:
        """With `low` more voxels at the start of each axis and `high` (default: the same) at its end."""
        lows = self._integers("low", low)
        highs = lows if high is None else self._integers("high", high)
        return self.crop([-n for n in lows], [-n for n in highs])

    def roi(self, start: Integers, size: Integers) -> Grid:
        """The voxels from index `start` on, `size` of them per axis; they may reach beyond this grid."""
        starts, sizes = self._integers("start", start), self._integers("size", size)
        middle = [a + (n - 1) / 2 for a, n in zip(starts, sizes, strict=True)]
        index = torch.tensor(middle, dtype=torch.float64, device=self.center.device)
        return self._with(sizes, self.spacing, self.index_to_world(index))

    def slabs(self, voxels: int) -> list[Grid]:
        """The grid cut along its last axis into parts of at most `voxels` voxels, one plane at the least."""
        *plane, planes = self.size
        depth = max(1, voxels // math.prod(plane))
        if depth >= planes:
            return [self]
        start = [0] * len(plane)
        return [self.roi([*start, k], [*plane, min(depth, planes - k)]) for k in range(0, planes, depth)]

    def center_crop(self, size: Integers) -> Grid:
        """The middle `size` voxels of each axis; axes that are smaller stay."""
        sizes = [min(n, m) for n, m in zip(self.size, self._integers("size", size), strict=True)]
        return self.roi([(n - m) // 2 for n, m in zip(self.size, sizes, strict=True)], sizes)

    def center_pad(self, size: Integers) -> Grid:
        """At least `size` voxels on each axis about the middle; axes that are larger stay."""
        sizes = [max(n, m) for n, m in zip(self.size, self._integers("size", size), strict=True)]
        return self.roi([-((m - n) // 2) for n, m in zip(self.size, sizes, strict=True)], sizes)


def _float64(value: Any, device: torch.device | str | None) -> Tensor:
    """Numbers as a float64 tensor: a tensor keeps its history, anything else is copied."""
    make = torch.as_tensor if isinstance(value, Tensor) else torch.tensor
    return make(value, dtype=torch.float64, device=device)


def _whole(name: str, values: Any) -> tuple[int, ...]:
    try:
        given = tuple(values)
    except TypeError:
        raise TypeError(f"{name} is {values!r}: expected a number of voxels for each axis, such as (64, 64)") from None
    whole = tuple(int(n) for n in given)
    if whole != given:
        raise ValueError(f"{name} is {given}: expected whole numbers")
    return whole


def _validate(spacing: Tensor, center: Tensor, direction: Tensor) -> None:
    if not all(is_concrete(leaf) for leaf in (spacing, center, direction)):
        return
    spacing, center, direction = spacing.detach(), center.detach(), direction.detach()
    for name, leaf in (("spacing", spacing), ("direction", direction), ("center or origin", center)):
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{name} is not finite: {leaf.tolist()}")
    if not bool((spacing > 0).all()):
        raise ValueError(f"spacing is {spacing.tolist()}: it must be positive (a flip belongs in direction)")
    gram = direction.mT @ direction
    error = float((gram - torch.eye(direction.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())
    if error > 1e-4:
        raise ValueError(
            f"direction is not orthonormal (off by {error:.2g}): its columns must be perpendicular unit vectors; "
            "scale belongs in spacing, and a sheared image must be resampled first"
        )
