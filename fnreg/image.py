"""Image: data on a grid; Subject: an image with its mask, labels and points.

Methods are written for one image, data (C, [Z,] Y, X).  For a batch, leaves with a leading axis, use
`torch.func.vmap`; `stack` makes a batch of images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg import filters
from fnreg.gather import Interpolation, Padding, precise
from fnreg.grid import Grid, Scalars
from fnreg.pytree import is_concrete, pytree_dataclass, static, tree_flatten, tree_map, tree_unflatten
from fnreg.sampling import interpolate

Unit = Literal["world", "voxel"]


@pytree_dataclass
class Image:
    """Data (C, [Z,] Y, X) on a grid.

    data : tensor with a channel axis, or, beside a grid, with a leading batch axis as well; integers become float32, or
        float64 where float32 would round them (labels that are to stay integers belong in `Subject.labels`)
    grid : its geometry; without one a grid of spacing 1 at origin 0, or what `spacing` and the others say

    Raises ValueError where data and grid differ in shape or device, or where a grid and one of the others are given,
    TypeError for complex data.

    >>> import torch
    >>> from fnreg import Image
    >>> image = Image(torch.zeros(1, 4, 6), spacing=0.5)
    >>> image.grid.size, image.channels
    ((6, 4), 1)
    """

    data: Tensor
    grid: Grid

    def __init__(
        self,
        data: Tensor,
        grid: Grid | None = None,
        *,
        spacing: Scalars | None = None,
        origin: Scalars | None = None,
        center: Scalars | None = None,
        direction: Any = None,
    ) -> None:
        if isinstance(data, Tensor) and data.is_complex():
            raise TypeError("data are complex: give the magnitude, or the real and imaginary part as channels")
        if not isinstance(data, Tensor):
            raise TypeError(f"data is {type(data).__name__}: make it a tensor, or use Image.from_array")
        if not data.is_floating_point():
            exact = data.to(torch.float64) if data.element_size() > 2 and is_concrete(data) else None
            large = exact is not None and exact.numel() > 0 and float(exact.abs().max()) > 2**24
            data = exact if exact is not None and large else data.to(torch.float32)
        place = {"spacing": spacing, "origin": origin, "center": center, "direction": direction}
        options: dict[str, Any] = {name: value for name, value in place.items() if value is not None}
        if grid is None:
            if not 2 <= data.ndim <= 4:
                raise ValueError(f"data has shape {tuple(data.shape)}: expected (C, [Z,] Y, X) with a channel axis")
            grid = Grid(shape=data.shape[1:], device=data.device, **options)
        elif options:
            raise ValueError(f"a grid and {', '.join(options)} are given: the grid has its own, give one of the two")
        if data.ndim not in (grid.ndim + 1, grid.ndim + 2) or tuple(data.shape[-grid.ndim :]) != grid.shape:
            raise ValueError(
                f"data has shape {tuple(data.shape)} but the grid has shape {grid.shape}: "
                f"expected (C, {', '.join(str(n) for n in grid.shape)}), with a leading batch axis or without"
            )
        if data.device != grid.center.device:
            raise ValueError(
                f"data are on {data.device} but the grid on {grid.center.device}: give grid.to(data.device)"
            )
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "grid", grid)

    @staticmethod
    def from_array(
        array: Any,
        *,
        channel_axis: int | None = None,
        spacing: Scalars = 1.0,
        origin: Scalars | None = None,
        center: Scalars | None = None,
        direction: Any = None,
    ) -> Image:
        """An image from NumPy, torch or anything that speaks DLPack, ([Z,] Y, X); no copy where none is needed.

        channel_axis : the axis of channels, moved to the front; None means one channel
        """
        if not isinstance(array, Tensor):
            if hasattr(array, "dtype") and hasattr(array.dtype, "isnative") and not array.dtype.isnative:
                array = array.astype(array.dtype.newbyteorder("="))
            backward = hasattr(array, "strides") and any(step < 0 for step in (array.strides or ()))
            # A tensor knows no read-only memory: to write into it would end the process.
            if backward or not getattr(getattr(array, "flags", None), "writeable", True):
                array = array.copy()
            array = torch.as_tensor(array) if not hasattr(array, "__dlpack__") else _from_dlpack(array)
        data = array.unsqueeze(0) if channel_axis is None else array.movedim(channel_axis, 0)
        return Image(data, spacing=spacing, origin=origin, center=center, direction=direction)

    def numpy(self) -> Any:
        """The data as a NumPy array that shares memory, (C, [Z,] Y, X)."""
        return self.data.detach().cpu().numpy()

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.data.shape[-self.grid.ndim - 1]

    def ranks(self) -> Image:
        """The rank that each leaf has for one pair."""
        return tree_unflatten([self.grid.ndim + 1, 1, 1, 2], tree_flatten(self)[1])

    def to(self, device: torch.device | str) -> Image:
        """The same image with its leaves on another device."""
        return tree_map(lambda leaf: leaf.to(device), self)

    def __repr__(self) -> str:
        data = self.data
        told = f"{tuple(data.shape)}, {data.dtype}" if isinstance(data, Tensor) else repr(data)
        return f"Image({told}, {self.grid})"

    def _single(self) -> Image:
        """This image, if it is one: a batch raises ValueError instead of mixing its items."""
        if self.data.ndim != self.grid.ndim + 1 or self.grid.center.ndim != 1 or self.grid.spacing.ndim != 1:
            raise ValueError(
                f"a batch of images, data {tuple(self.data.shape)}: this method is of one image; use torch.func.vmap"
            )
        return self

    # -- sampling ---------------------------------------------------------------------------------------------

    def sample(self, points: Tensor, *, interpolation: Interpolation = "linear", padding: Padding = "border") -> Tensor:
        """Values (N, C) at world points (N, D)."""
        self._single()
        coords = self.grid.world_to_index(points.to(torch.float64)).mT.to(precise(self.data.dtype))
        return interpolate(self.data, coords, interpolation=interpolation, padding=padding).mT

    def resample(self, grid: Grid, *, interpolation: Interpolation = "linear", padding: Padding = "border") -> Image:
        """The image sampled at the voxels of another grid; smooth it first where that is coarser."""
        self._single()
        coords = self.grid.world_to_index(grid.points()).mT.to(precise(self.data.dtype))
        values = interpolate(self.data, coords, interpolation=interpolation, padding=padding)
        return Image(values.reshape(self.channels, *grid.shape), grid)

    def resize(self, size: int | Sequence[int]) -> Image:
        """As many voxels per axis over the same extent; smoothed to the new voxel's width where it grows."""
        self._single()
        grid = self.grid.resize(size)
        return Image(filters.resize(self.data, grid.size), grid)

    def pyramid(self, levels: int, *, min_size: int = 4) -> tuple[Image, ...]:
        """This image and up to `levels - 1` coarser ones over the same extent, finest first; see `Grid.pyramid`."""
        self._single()
        images: list[Image] = [self]
        for grid in self.grid.pyramid(levels, min_size=min_size)[1:]:
            images.append(Image(filters.resize(images[-1].data, grid.size), grid))
        return tuple(images)

    # -- values -----------------------------------------------------------------------------------------------

    def gaussian(self, sigma: Scalars, *, unit: Unit = "world") -> Image:
        """Smooth with a Gaussian of `sigma` world units, or voxels, per axis; constants are preserved to the border."""
        self._single()
        if unit not in ("world", "voxel"):
            raise ValueError(f"unknown unit {unit!r}: choose world or voxel")
        width = torch.as_tensor(sigma, dtype=torch.float64, device=self.data.device).expand(self.grid.ndim)
        return Image(filters.gaussian(self.data, width / self.grid.spacing if unit == "world" else width), self.grid)

    def normalize(
        self,
        method: Literal["percentile", "range", "zscore"] = "percentile",
        *,
        low: float = 0.01,
        high: float = 0.99,
        mask: Tensor | None = None,
    ) -> Image:
        """Rescale the intensities of each channel of this image.

        method : "percentile" maps the quantiles `low` and `high` to 0 and 1 (not clipped), "range" does so with
            minimum and maximum, "zscore" makes mean 0 and standard deviation 1
        mask : (1, [Z,] Y, X); only where it is positive do voxels count for the statistics

        A channel without variation, or with nothing in the mask, becomes 0; NaN among the voxels that count gives NaN.
        """
        self._single()
        values = self.data.flatten(1)  # (C, N)
        inside = torch.ones_like(values[:1], dtype=torch.bool) if mask is None else (mask > 0).flatten(1)
        if method == "zscore":
            total = inside.sum().clamp(min=1)
            offset = torch.where(inside, values, 0).sum(1, keepdim=True) / total
            variance = torch.where(inside, values - offset, 0).square().sum(1, keepdim=True) / total
            # The mean of a constant differs from it by rounding, so the variance does not tell.
            lowest = torch.where(inside, values, torch.inf).amin(1, keepdim=True)
            constant = torch.where(inside, values, -torch.inf).amax(1, keepdim=True) <= lowest
            scale = torch.where(constant, 0, torch.where(constant, 1, variance).sqrt())
        elif method in ("percentile", "range"):
            bounds = (low, high) if method == "percentile" else (0.0, 1.0)
            if not 0 <= bounds[0] < bounds[1] <= 1:
                raise ValueError(f"percentiles are {bounds}: expected 0 <= low < high <= 1")
            offset, top = (_quantile(values, inside, q) for q in bounds)
            scale = torch.where(inside.any(), top - offset, 0)
        else:
            raise ValueError(f"unknown method {method!r}: choose percentile, range or zscore")
        flat = torch.where(scale == 0, 0, (values - offset) / torch.where(scale == 0, 1, scale))
        return Image(flat.reshape(self.data.shape), self.grid)


def _from_dlpack(array: Any) -> Tensor:
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError):  # a type or strides that DLPack does not carry
        return torch.as_tensor(array.copy())


def _quantile(values: Tensor, inside: Tensor, q: float) -> Tensor:
    """The quantile of each row (C, N) over the entries inside, by linear interpolation, (C, 1)."""
    order = torch.where(inside, values, torch.inf).sort(1).values
    position = q * (inside.sum() - 1).clamp(min=0).to(torch.float64)  # exact where float32 no longer counts
    floor = position.floor()
    lower = order.gather(1, floor.long().expand(order.shape[0], 1))
    upper = order.gather(1, position.ceil().long().expand(order.shape[0], 1))
    lost = (inside & values.isnan()).any(1, keepdim=True)
    return torch.where(lost, torch.nan, lower + (upper - lower) * (position - floor).to(values.dtype))


@pytree_dataclass
class Subject:
    """An image with what is known about it; `register` takes one wherever it takes an image.

    image : the intensities
    mask : (1, [Z,] Y, X) weights of voxels, 0 where they are to be ignored; bool or any number
    labels : (1, [Z,] Y, X) integers, a number for each class and 0 for the background
    points : (N, D) world points
    point_weights : (N,) how much each point counts, 0 where it is to be ignored
    normals : (N, D) directions across a surface at the points, of any length
    sharp : whether the image ends where the mask does: points between voxels count where half of the mask at least is
        there, no derivative is taken of that, and they see what the image holds beyond; else the mask is interpolated
        as an image is, and what it hides is filled from its surroundings

    Raises ValueError where shapes do not fit together, TypeError for labels that are no integers.
    """

    image: Image
    mask: Tensor | None = None
    labels: Tensor | None = None
    points: Tensor | None = None
    point_weights: Tensor | None = None
    normals: Tensor | None = None
    sharp: bool = static(default=False)

    def __init__(
        self,
        image: Image,
        mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        points: Tensor | None = None,
        point_weights: Tensor | None = None,
        normals: Tensor | None = None,
        sharp: bool = False,
    ) -> None:
        grid = image.grid
        for name, value in (("mask", mask), ("labels", labels)):
            if value is not None and tuple(value.shape[-grid.ndim - 1 :]) != (1, *grid.shape):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: expected (1, {str(grid.shape)[1:]} as the image"
                )
        if labels is not None and (labels.is_floating_point() or labels.is_complex()):
            raise TypeError(
                f"labels are {labels.dtype}: expected integers, one number for each class; labels.round().long()"
            )
        if points is not None and points.shape[-1] != grid.ndim:
            raise ValueError(f"points have {points.shape[-1]} coordinates but the image has {grid.ndim} axes")
        for name, value, axes in (("point_weights", point_weights, 1), ("normals", normals, 2)):
            if value is None:
                continue
            if points is None:
                raise ValueError(f"{name} are given without points: give the points that they belong to")
            trailing = tuple(points.shape[-2:])[:axes]
            if tuple(value.shape[-axes:]) != trailing:
                raise ValueError(
                    f"{name} have shape {tuple(value.shape)}: expected {trailing} for points {tuple(points.shape)}"
                )
        if mask is not None and mask.dtype != image.data.dtype:
            mask = mask.to(image.data.dtype)
        given = (image, mask, labels, points, point_weights, normals, sharp)
        for field, value in zip(dataclasses.fields(self), given, strict=True):
            object.__setattr__(self, field.name, value)

    def ranks(self) -> Subject:
        """The rank that each leaf has for one pair."""
        rank = self.image.grid.ndim + 1
        known = (self.mask, self.labels, self.points, self.point_weights, self.normals)
        extra = [r for r, leaf in zip((rank, rank, 2, 1, 2), known, strict=True) if leaf is not None]
        return tree_unflatten([*tree_flatten(self.image.ranks())[0], *extra], tree_flatten(self)[1])


def subject(value: Image | Subject) -> Subject:
    """An image as a subject about which nothing more is known."""
    if isinstance(value, Subject):
        return value
    if isinstance(value, Image):
        return Subject(value)
    raise TypeError(f"expected an Image or a Subject, got {type(value).__name__}: wrap data in Image(data, grid)")
