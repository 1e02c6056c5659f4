"""An image, labels or points through transforms from files: what `fnreg apply` and `fnreg points` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg import io
from fnreg.agreement import landmarks
from fnreg.chains import grid_of, read_chain, told
from fnreg.gather import Padding
from fnreg.grid import Grid
from fnreg.io.files import check_writable
from fnreg.io.image import WRITABLE, read_grid, suffix
from fnreg.io.nifti import SUFFIXES
from fnreg.io.points import SUFFIXES as ENDINGS
from fnreg.io.points import Space
from fnreg.results import byte_range
from fnreg.sampling import interpolate
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.warping import SLAB, moving_coords, warp

Interp = Literal["linear", "nearest", "cubic", "multilabel"]


def apply_image(
    image: Path,
    transforms: Sequence[Path],
    output: Path,
    *,
    like: Path | None = None,
    inverse: bool = False,
    interpolation: Interp = "linear",
    padding: Padding = "zeros",
) -> dict[str, Any]:
    """Resample an image through transforms and write it; returns a record of what was done.

    image : what is sampled, the moving image; with `inverse` the fixed one
    transforms : see `fnreg.chains.read_chain`
    like : image whose grid the result has; default the grid of the transform.  From NIfTI to NIfTI its header is kept
    interpolation : "nearest" and "multilabel" keep labels the integers that they are

    Raises ImageReadError, TransformReadError, WriteError, and ValueError for axes that differ.
    """
    check_writable(output, endings=WRITABLE)
    mapping = read_chain(transforms, inverse=inverse)
    labels = io.read_labels(image) if interpolation == "multilabel" else None
    source = io.read_image(image) if labels is None else None
    place = labels[1] if labels is not None else source.grid if source is not None else None
    assert place is not None
    grid = grid_of(mapping, like)
    if place.ndim != grid.ndim:
        raise ValueError(f"{image} has {place.ndim} axes but the transform has {grid.ndim}")
    if source is not None and interpolation == "nearest" and _whole(source.data):
        labels = io.Labels(source.data.to(torch.int64), source.grid)
    kept = like if like is not None and {suffix(like), suffix(output)} <= set(SUFFIXES) else None
    if labels is not None and labels[0].shape[0] == 1:
        numbers = labels[0].to(torch.int64)  # so that any padding is one of them
        warped = warp_labels(numbers, labels[1], mapping, grid, interpolation=interpolation, padding=padding)
        io.write_labels(output, io.Labels(warped, grid), like=kept)
    else:
        assert source is not None and interpolation != "multilabel"
        made = warp(source, mapping, grid, interpolation=interpolation, padding=padding)
        window = byte_range(source) if suffix(output) == ".png" else None
        io.write_image(output, made, window=window, like=kept)
    return {
        "image": str(image),
        "transforms": [str(path) for path in transforms],
        "map": told(mapping),
        "direction": direction(inverse),
        "grid": repr(grid),
        "interpolation": interpolation,
        "output": str(output),
    }


def direction(inverse: bool) -> str:
    """What a chain does to points, in words."""
    return "moving points to fixed points" if inverse else "fixed points to moving points"


def _whole(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and bool((values == values.round()).all())


# -- labels --------------------------------------------------------------------------------------------------------


def warp_labels(
    labels: Tensor,
    source: Grid,
    mapping: Mapping,
    grid: Grid,
    *,
    interpolation: Interp = "multilabel",
    padding: Padding = 0.0,
) -> Tensor:
    """Labels seen through a mapping, (1, *grid.shape), the integers that they are.

    labels : (1, [Z,] Y, X) integers on the grid `source`
    interpolation : "nearest" takes the label of the nearest voxel; "multilabel" interpolates each class linearly and
        takes the one with the largest share, the lowest number of several: its borders are smooth
    padding : outside of the labels; 0 and "zeros" are background

    No label appears that was not there, but for the padding.  Raises ValueError for another interpolation, and for a
    padding that is no label.

    >>> import torch, fnreg
    >>> from fnreg.apply import warp_labels
    >>> grid = fnreg.Grid((4, 1))
    >>> move = fnreg.linear_mapping(torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.0]]), grid)
    >>> warp_labels(torch.tensor([[[7, 7, 2, 2]]]), grid, move, grid).tolist()
    [[[7, 2, 2, 0]]]
    """
    if not isinstance(padding, str) and not (float(padding).is_integer() and abs(padding) < 2**63):
        raise ValueError(f"padding is {padding}: outside of labels give a whole number below 2^63")
    slabs = grid.slabs(SLAB)
    if len(slabs) > 1:
        options: dict[str, Any] = {"interpolation": interpolation, "padding": padding}
        return torch.cat([warp_labels(labels, source, mapping, slab, **options) for slab in slabs], 1)
    coords = moving_coords(mapping, grid, source, torch.float64)
    if interpolation == "nearest":
        return interpolate(labels, coords, interpolation="nearest", padding=padding).reshape(-1, *grid.shape)
    if interpolation != "multilabel":
        raise ValueError(f"labels are not mixed: interpolation is {interpolation!r}, choose nearest or multilabel")
    constant = not isinstance(padding, str) or padding == "zeros"
    outside = 0.0 if isinstance(padding, str) else float(padding)
    best = largest = None
    numbers = {*torch.unique(labels).tolist(), *([int(outside)] if constant else [])}
    for number in sorted(numbers):
        beyond: Padding = float(number == outside) if constant else padding
        share = interpolate((labels == number).to(torch.float64), coords, padding=beyond)
        if best is None or largest is None:
            best, largest = torch.full_like(share, number, dtype=labels.dtype), share
            continue
        more = share > largest + 1e-9  # of shares that are equal but for rounding the first counts
        best, largest = torch.where(more, number, best), torch.where(more, share, largest)
    assert best is not None
    return best.reshape(1, *grid.shape)


# -- points --------------------------------------------------------------------------------------------------------


def apply_points(
    file: Path,
    transforms: Sequence[Path],
    output: Path,
    *,
    inverse: bool = False,
    space: Space | None = None,
    like: Path | None = None,
) -> dict[str, Any]:
    """Map points of a file and write them with their names; returns a record of what was done.

    inverse : points of the moving image to the fixed one, instead of the other way
    space, like : of points in a file that does not say where they are, see `fnreg.io.read_points`; voxels are those of
        the image `like`

    Raises PointReadError, TransformReadError, WriteError, SettingsError for `like` without voxels and voxels without
    `like`, and ValueError for axes that differ or points that are not finite.
    """
    if (space == "voxel") != (like is not None):
        raise SettingsError(
            "--space voxel goes with --like, the image of whose voxels the points are: give both or none"
        )
    check_writable(output, endings=ENDINGS)
    mapping = read_chain(transforms, inverse=inverse)
    grid = None if like is None else read_grid(like)
    grids = None if grid is None else [grid]
    (found,) = landmarks([file], space, "give --space LPS or RAS, or voxel with --like", grids=grids)
    points = found.points
    moved = mapping.map_points(points)
    if not bool(torch.isfinite(moved).all()):
        raise ValueError(f"points of {file} are mapped to what is not finite: look at the transform")
    io.write_points(output, found._replace(points=moved), space="RAS" if space == "RAS" else "LPS")
    distance = (moved - points).norm(dim=-1)
    return {
        "file": str(file),
        "transforms": [str(path) for path in transforms],
        "map": told(mapping),
        "direction": direction(inverse),
        "points": len(points),
        "mean distance": float(distance.mean()),
        "largest distance": float(distance.max()),
        "output": str(output),
    }
