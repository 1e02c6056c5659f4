"""What an image file holds, before it becomes an image, labels or a series: the values as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.io.files import ImageReadError, PathLike
from fnreg.notes import warn

_BLOCK = 2**20  # values that are scaled at a time: the rest of the memory is that of the result


class GeometryWarning(UserWarning):
    """A file tells its place in the world twice or not at all; the warning says what was taken."""


class Labels(NamedTuple):
    """Classes of voxels, integers from end to end: what `Subject.labels` takes, and the grid that they lie on.

    data : (1, [Z,] Y, X) integers; grid : of the image that they belong to
    """

    data: Tensor
    grid: Grid


class Stored(NamedTuple):
    """Values of a file.

    values : (T, C, [Z,] Y, X) in the machine's byte order; slope, inter : what is meant is slope v + inter
    colour : whether the channels are red, green, blue (and more); notes : what a reader should be told
    """

    values: np.ndarray
    grid: Grid
    slope: float = 1.0
    inter: float = 0.0
    colour: bool = False
    notes: tuple[str, ...] = ()

    @property
    def scaled(self) -> bool:
        """Whether the values are not what is meant."""
        return (self.slope, self.inter) != (1.0, 0.0)


def as_image(stored: Stored, path: PathLike, *, channels: bool, volume: int | None) -> Image:
    """One image; of a series the volume asked for."""
    count = len(stored.values)
    if volume is None and count > 1:
        raise ImageReadError(
            f"{path} is a series of {count} volumes: expected one, take it by volume=0 to volume={count - 1}, "
            "or all by read_series"
        )
    chosen = 0 if volume is None else volume
    if not 0 <= chosen < count:
        raise ImageReadError(
            f"{path} has {count} volume{'s' * (count > 1)}: volume is {volume}, expected 0 to {count - 1}"
        )
    tell(stored.notes, path)
    return Image(_floats(stored._replace(values=stored.values[chosen]), path, channels), stored.grid)


def as_series(stored: Stored, path: PathLike, *, channels: bool) -> Image:
    """All volumes as a batch (T, C, [Z,] Y, X) on one grid."""
    tell(stored.notes, path)
    each = [_floats(stored._replace(values=values), path, channels) for values in stored.values]
    kind = max((one.dtype for one in each), key=lambda dtype: dtype.itemsize)
    return Image(torch.stack([one.to(kind) for one in each]), stored.grid)


def as_labels(stored: Stored, path: PathLike, *, volume: int | None) -> Labels:
    """Integers, exact: of float files where all values are whole."""
    if stored.values.shape[1] != 1:
        raise ImageReadError(
            f"{path} has {stored.values.shape[1]} channels: expected labels, one number for each voxel"
        )
    if volume is None and len(stored.values) > 1:
        raise ImageReadError(f"{path} is a series of {len(stored.values)} volumes: take one by volume=0 and so on")
    if not 0 <= (volume or 0) < len(stored.values):
        raise ImageReadError(f"{path} has {len(stored.values)} volumes: volume is {volume}")
    values = stored.values[volume or 0]
    if values.dtype.kind == "f" or stored.scaled:
        exact = values.astype(np.float64) * stored.slope + stored.inter
        if not (np.isfinite(exact).all() and (np.rint(exact) == exact).all() and np.abs(exact).max() <= 2.0**53):
            raise ImageReadError(f"{path} holds values that are not whole numbers: expected labels; use read_image")
        values = exact.astype(np.int64)
        values = values.astype(np.int32) if np.abs(values).max() < 2**31 else values
    if values.dtype == np.uint64 and int(values.max()) >= 2**63:
        raise ImageReadError(f"{path} holds the label {int(values.max())}: expected labels below 2^63")
    kind = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "bool": np.uint8}.get(values.dtype.name)
    tell(stored.notes, path)
    return Labels(_tensor(values if kind is None else values.astype(kind)), stored.grid)


def tell(notes: Sequence[str], path: PathLike) -> None:
    """Warn of what a header left open."""
    for note in notes:
        warn(f"{path} {note}", GeometryWarning, stacklevel=5)


def _tensor(values: np.ndarray) -> Tensor:
    """A tensor that may be written to; a copy only where the memory does not allow one."""
    usable = values if values.flags.writeable else values.copy()
    return torch.from_numpy(np.ascontiguousarray(usable))


def _floats(stored: Stored, path: PathLike, channels: bool) -> Tensor:
    """Values (C, [Z,] Y, X) as float32, or as float64 where float32 would round what is stored."""
    values = stored.values
    if stored.colour:
        if channels:
            values = values[:3]
        else:  # the weights of ITU-R BT.601 in 16 bits, as Pillow makes pictures grey
            red, green, blue = values[:3].astype(np.uint32)
            values = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[None]
    if stored.scaled:
        return _tensor(_scaled(values, stored.slope, stored.inter))
    if values.dtype.kind == "f":
        return _tensor(values if values.dtype.itemsize > 2 else values.astype(np.float32))
    if values.dtype.itemsize > 2 and values.size:
        low, high = int(values.min()), int(values.max())
        if max(-low, high) > 2**53:
            raise ImageReadError(
                f"{path} holds integers up to {max(-low, high)}, which no float holds: use read_labels"
            )
        return _tensor(values.astype(np.float64 if max(-low, high) > 2**24 else np.float32))
    return _tensor(values.astype(np.float32))


def _scaled(values: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """slope v + inter, computed in float64; kept so where float32 might not hold it."""
    small = values.dtype.itemsize <= 2 and 1e-30 < abs(slope) < 1e30 and abs(inter) < 1e30
    flat = np.ascontiguousarray(values).reshape(-1)
    made = np.empty(flat.shape, np.float32 if small else np.float64)
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        made[part] = flat[part].astype(np.float64) * slope + inter
    return made.reshape(values.shape)


@np.errstate(all="ignore")  # what is not finite is told below
def affine_grid(path: PathLike, shape: tuple[int, ...], linear: Any, origin: Any) -> Grid:
    """The grid of voxels ([Z,] Y, X) whose steps in the LPS world are the columns of `linear` (D, D).

    Directions stay as they are, to the last bit, and so do positions: a header in single precision is not quite
    orthonormal.  Raises ImageReadError where a step is zero, not finite, or not at right angles with the others.
    """
    steps, start = np.asarray(linear, dtype=np.float64), np.asarray(origin, dtype=np.float64)
    if not (np.isfinite(steps).all() and np.isfinite(start).all()):
        raise ImageReadError(f"{path} has a place in the world that is not finite: correct its header")
    spacing = np.linalg.norm(steps, axis=0)
    if not (spacing > 0).all() or not np.isfinite(spacing).all():
        raise ImageReadError(f"{path} has spacing {spacing.tolist()}: expected positive numbers, correct its header")
    direction = steps / spacing
    cosines = np.abs(direction.T @ direction - np.eye(len(spacing)))
    if cosines.max() > 1e-4:
        away = np.degrees(np.arcsin(min(1.0, cosines.max())))
        raise ImageReadError(
            f"{path} has axes that are {away:.3g} degrees from right angles: it is sheared, resample it to a grid first"
        )
    return Grid(shape=shape, spacing=spacing.tolist(), origin=start.tolist(), direction=direction.tolist())
