"""Images seen through mappings."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fnreg.gather import Interpolation, Padding, precise
from fnreg.grid import Grid, apply_matrix
from fnreg.image import Image, Subject
from fnreg.pytree import over_batch
from fnreg.sampling import interpolate
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain, same_place
from fnreg.transforms.split import split_coords

SLAB = 2**21  # voxels that are warped at once: coordinates of all of a large grid would take far more than its image


def moving_coords(mapping: Mapping, grid: Grid, moving: Grid, dtype: torch.dtype, *, own: bool = False) -> Tensor:
    """Voxel indices (D, N) in the moving grid of what the voxels of `grid` map to.

    own : whether `grid` is the mapping's own, its domain
    """
    transform, to_moving = mapping.transform, moving.matrix("world", "index")
    if transform.linear or (transform.splits and own):
        found = transform.split(mapping.params, mapping.domain)
        return split_coords(found, to_moving, grid.affine, grid.size, dtype)
    points = transform.points(mapping.params, mapping.domain, grid.points())
    return apply_matrix(to_moving, points).mT.to(dtype)


@overload
def warp(
    image: Image,
    mapping: Mapping,
    grid: Grid | None = None,
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
) -> Image: ...
@overload
def warp(
    image: Subject,
    mapping: Mapping,
    grid: Grid | None = None,
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
) -> Subject: ...
def warp(
    image: Image | Subject,
    mapping: Mapping,
    grid: Grid | None = None,
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
) -> Image | Subject:
    """The moving image seen through a mapping: value at p is image(T(p)), on `grid` (default: the domain).

    Batches of images, mappings and grids go through together, by the rank rule.  Of a `Subject` the mask is warped
    along by linear interpolation and the labels by nearest neighbours, both 0 outside; labels stay the integers that
    they are.  Points are left out: they move the other way, by the inverse mapping.
    """
    where = first_domain(mapping.domain) if grid is None else grid
    plain = image.image if isinstance(image, Subject) else image
    if where.ndim != plain.grid.ndim:
        raise ValueError(f"image has {plain.grid.ndim} spatial axes but the mapping has {where.ndim}")

    def through(data: Tensor, how: Interpolation, padding: Padding) -> Tensor:
        return warp_data(data, plain.grid, mapping, where, interpolation=how, padding=padding)

    warped = Image(through(plain.data, interpolation, padding), where)
    if not isinstance(image, Subject):
        return warped
    mask = None if image.mask is None else through(image.mask, "linear", "zeros")
    labels = None if image.labels is None else through(image.labels, "nearest", "zeros")
    return Subject(warped, mask, labels=labels)


def warp_data(
    data: Tensor, source: Grid, mapping: Mapping, grid: Grid, *, interpolation: Interpolation, padding: Padding
) -> Tensor:
    """Data (C, [Z,] Y, X) of a source grid seen through a mapping at the voxels of `grid`; see `warp`.

    Integers stay integers by nearest neighbours.
    """
    own = same_place(grid, first_domain(mapping.domain))

    def one(values: Tensor, source: Grid, by: Mapping, target: Grid) -> Tensor:
        dtype = precise(values.dtype)
        whole = own and by.transform.splits and not by.transform.linear  # its field is read where it lies
        parts = [target] if whole else target.slabs(SLAB)
        warped: list[Tensor] = []
        for part in parts:
            coords = moving_coords(by, part, source, dtype, own=own)
            warped.append(
                interpolate(values, coords, interpolation=interpolation, padding=padding).reshape(-1, *part.shape)
            )
        return warped[0] if len(parts) == 1 else torch.cat(warped, 1)

    return over_batch(
        one,
        data=(data, source.ndim + 1),
        grid=(source, source.ranks()),
        mapping=(mapping, mapping.ranks()),
        target=(grid, grid.ranks()),
    )
