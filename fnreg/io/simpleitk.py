"""MetaImage and NRRD files, and SimpleITK's images in memory, with the extra `itk`; their world is ours, LPS.

SimpleITK takes a damaged compressed stream for the image that it yields, so `fnreg.io.intact` looks at the bytes first.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.io.files import ImageReadError, PathLike, WriteError, write_bytes
from fnreg.io.intact import check_meta, check_nrrd
from fnreg.io.stored import Stored, affine_grid, as_image

CHECKS = {".mha": check_meta, ".mhd": check_meta, ".nrrd": check_nrrd, ".nhdr": check_nrrd}

_lock = threading.Lock()
_hushed: list[bool] = []  # for each who asks for quiet at present, what was shown before; it is one switch for all


@contextmanager
def quiet(sitk: Any) -> Generator[None]:
    """Without the warnings that ITK writes to the terminal beside its errors, until the last who asked is done."""
    with _lock:
        _hushed.append(_hushed[0] if _hushed else sitk.ProcessObject.GetGlobalWarningDisplay())
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        with _lock:
            shown = _hushed.pop()
            if not _hushed:
                sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def stored_itk(path: PathLike) -> Stored:
    """The values of a MetaImage or NRRD file as (T, C, [Z,] Y, X)."""
    CHECKS[Path(path).suffix.lower()](path)
    sitk: Any = require("SimpleITK", "itk", f"reading {path}")
    try:
        with quiet(sitk):
            image = sitk.ReadImage(str(path))
    except RuntimeError as problem:
        if "Bad direction" in str(problem):
            raise ImageReadError(
                f"{path} has a direction matrix whose determinant is 0, two of its axes are one: correct its header"
            ) from problem
        told = " ".join(str(problem).split())[-300:]
        raise ImageReadError(f"{path} is damaged or of an unsupported kind: {told}") from problem
    return stored_sitk(sitk, path, image)


def stored_sitk(sitk: Any, path: PathLike, image: Any) -> Stored:
    """The values of SimpleITK's image, a copy."""
    kind = image.GetPixelIDTypeAsString()
    if "complex" in kind or "label" in kind:
        raise ImageReadError(f"{path} holds {kind}: expected integers or floats, one or a vector for each voxel")
    dimension, size = image.GetDimension(), image.GetSize()
    values = sitk.GetArrayFromImage(image)  # ([T,] [Z,] Y, X[, C])
    values = values[..., None] if image.GetNumberOfComponentsPerPixel() == 1 else values
    values = values if dimension == 4 else values[None]
    space = min(dimension, 3)
    linear = np.reshape(image.GetDirection(), (dimension, dimension)) * np.array(image.GetSpacing())
    if dimension == 4 and (np.abs(linear[3, :3]).max() > 0 or np.abs(linear[:3, 3]).max() > 0):
        raise ImageReadError(f"{path} has an axis of time that leads through space: take its volumes apart first")
    grid = affine_grid(path, size[:space][::-1], linear[:space, :space], image.GetOrigin()[:space])
    return Stored(np.moveaxis(values, -1, 1), grid)


def from_sitk(image: Any) -> Image:
    """An Image (C, [Z,] Y, X) of SimpleITK's, with its place in the world; values as `read_image` makes them.

    Raises ImageReadError for complex values, and for axes that are not at right angles; MissingExtraError.
    """
    sitk: Any = require("SimpleITK", "itk", "an image of SimpleITK")
    return as_image(stored_sitk(sitk, "the image", image), "the image", channels=True, volume=None)


def to_sitk(image: Image) -> Any:
    """SimpleITK's image of an Image: scalars, or of several channels vectors.

    Raises ValueError for a batch and for other than 2 or 3 axes; MissingExtraError.
    """
    sitk: Any = require("SimpleITK", "itk", "an image of SimpleITK")
    return _image(sitk, single(image), image.grid)


def single(image: Image) -> np.ndarray:
    """The values (C, [Z,] Y, X) of one image; ValueError for a batch."""
    if image.data.ndim != image.grid.ndim + 1 or image.grid.center.ndim != 1:
        raise ValueError(f"data has shape {tuple(image.data.shape)}: a batch of images, take one of them")
    data = image.data.detach().cpu()
    return (data if data.dtype in (torch.float32, torch.float64) else data.to(torch.float32)).contiguous().numpy()


def _image(sitk: Any, values: np.ndarray, grid: Grid) -> Any:
    if grid.ndim not in (2, 3):
        raise ValueError(f"the grid has {grid.ndim} axes: ITK's images here have 2 or 3")
    vector = len(values) > 1
    image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1).copy() if vector else values[0], isVector=vector)
    image.SetOrigin(grid.origin.tolist())
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection(grid.direction.flatten().tolist())
    return image


def write_itk_image(path: PathLike, values: np.ndarray, grid: Grid) -> None:
    """Write values (C, [Z,] Y, X) as MetaImage or NRRD, in one file, not compressed; see `fnreg.io.write_image`."""
    kind = Path(path).suffix.lower()
    sitk: Any = require("SimpleITK", "itk", f"writing {path}")
    image = _image(sitk, values, grid)
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / f"image{kind}"
            sitk.WriteImage(image, str(scratch), useCompression=False)
            CHECKS[kind](scratch)  # ITK may return as if all were well where the disk is full
            stored = scratch.read_bytes()
    except (OSError, RuntimeError) as problem:
        raise WriteError(f"{path} cannot be written: {' '.join(str(problem).split())[-300:]}") from problem
    write_bytes(path, stored)
