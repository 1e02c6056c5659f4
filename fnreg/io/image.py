"""Images, series and labels from and to files, by the suffix of the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.io.dicom import stored_series
from fnreg.io.files import ImageReadError, PathLike, WriteError, check_writable
from fnreg.io.header import Form
from fnreg.io.picture import read_picture, write_picture
from fnreg.io.simpleitk import CHECKS, single, stored_itk, write_itk_image
from fnreg.io.stored import Labels, Stored, as_image, as_labels, as_series, tell
from fnreg.io.volume import stored_nifti, write_nifti

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
_BLOCK = 2**20  # values that are converted at a time
WRITABLE = (".png", ".tif", ".tiff", ".nii", ".nii.gz", ".mha", ".nrrd")


def suffix(path: PathLike) -> str:
    """What the name ends in, in small letters: ".png", and ".nii.gz" with both parts."""
    parts = [part.lower() for part in Path(path).suffixes]
    return "".join(parts[-2:]) if parts[-1:] == [".gz"] else "".join(parts[-1:])


def read_image(
    path: PathLike,
    *,
    channels: bool = False,
    volume: int | None = None,
    form: Form | None = None,
    series: str | None = None,
) -> Image:
    """Read an image with its place in the world, in millimetres and LPS.

    path : its suffix says how it is read: NIfTI (.nii, .nii.gz, .hdr with .img); with the extra `itk` MetaImage (.mha,
        .mhd), NRRD (.nrrd, .nhdr) and a folder that holds a DICOM series; with the extra `plot` PNG, JPEG and TIFF
    channels : colours as three channels (3, Y, X), red, green and blue, instead of their luminance (1, Y, X); three
        numbers at a voxel of MetaImage and NRRD may be a vector, so there they are channels always
    volume : which one of a series, counted from 0
    form : of NIfTI, which of "sform" and "qform" tells the place; default the sform where there is one
    series : of DICOM, the UID of the one that is meant where a folder holds several

    The values are what the file means, not rescaled, as float32 (float64 for what float32 would round): 0..255 for
    8 bits, 0..65535 for 16, floats as they are; NIfTI's slope and intercept are applied.  A file is read whole and its
    check sums are checked, its header is compared with its bytes before memory is taken, directions stay as they are.
    Of pictures palettes give the colours they stand for, transparency is ignored, the orientation that a camera noted
    is applied, and the world is spacing 1 and origin 0.

    Warns with GeometryWarning where sform and qform differ, and where there is neither; it says what was taken.
    Raises ImageReadError where the file is missing, damaged, of another kind, sheared, a series, or would lose
    something; MissingExtraError without Pillow or SimpleITK where these are needed.

    >>> import tempfile, torch, fnreg
    >>> grid = fnreg.Grid((4, 3, 2), spacing=(1.0, 1.5, 3.0), origin=(-20.0, 10.0, 5.0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fnreg.io.write_image(f"{folder}/a.nii.gz", fnreg.Image(torch.rand(1, 2, 3, 4), grid))
    ...     fnreg.io.read_image(f"{folder}/a.nii.gz").grid
    Grid(size=(4, 3, 2), spacing=[1.0, 1.5, 3.0], origin=[-20.0, 10.0, 5.0])
    """
    kind = _kind(path)
    if kind in PICTURES:
        _plain(path, volume, form, series)
        return read_picture(path, channels=channels)
    return as_image(_stored(path, kind, form, series), path, channels=channels, volume=volume)


def read_series(path: PathLike, *, channels: bool = False, form: Form | None = None) -> Image:
    """All volumes of a file as a batch of images on one grid, data (T, C, [Z,] Y, X); else as `read_image`."""
    kind = _kind(path)
    if kind in PICTURES:
        raise ImageReadError(f"{path} is a picture: a series is of NIfTI, MetaImage or NRRD")
    return as_series(_stored(path, kind, form, None), path, channels=channels)


def read_grid(path: PathLike) -> Grid:
    """Where the voxels of an image lie, one image or a series; all of the file is checked as by `read_image`."""
    kind = _kind(path)
    if kind in PICTURES:
        return read_picture(path).grid
    stored = _stored(path, kind, None, None)
    tell(stored.notes, path)
    return stored.grid


def read_labels(
    path: PathLike, *, volume: int | None = None, form: Form | None = None, series: str | None = None
) -> Labels:
    """Read labels (1, [Z,] Y, X) as the integers they are, with their grid: for `Subject.labels`; else as `read_image`.

    Integers never pass through floats; files of floats are taken where all values are whole, and grey pictures.  Raises
    ImageReadError for other values, for channels, and for colours, also those that the numbers of a palette stand for.
    """
    kind = _kind(path)
    if kind in PICTURES:
        _plain(path, volume, form, series)
        return _labels_of_picture(path)
    return as_labels(_stored(path, kind, form, series), path, volume=volume)


def _plain(path: PathLike, volume: int | None, form: Form | None, series: str | None) -> None:
    """ImageReadError where a picture is asked for what it does not have; it is its own volume 0."""
    if volume or form or series:
        raise ImageReadError(f"{path} is a picture: it has no volumes, forms or series")


def _labels_of_picture(path: PathLike) -> Labels:
    image = read_picture(path, channels=True)
    data = image.data
    if not bool(((data == data[:1]) & (data == data.round()) & data.isfinite()).all()):
        raise ImageReadError(f"{path} holds no labels: expected a grey picture of whole numbers, one for each class")
    if (most := float(data.abs().max())) > 2**53:
        raise ImageReadError(f"{path} holds {most:.17g}: expected labels up to 2^53, beyond which floats are rounded")
    return Labels(data[:1].to(torch.int32 if most < 2**31 else torch.int64), image.grid)


def _kind(path: PathLike) -> str:
    """The suffix, or "" for a folder."""
    if Path(path).is_dir() and suffix(path) not in PICTURES:
        return ""
    kind = suffix(path)
    if kind not in (*PICTURES, *NIFTI, *CHECKS):
        told = f"ends in {kind!r}" if kind else "has no suffix"
        known = ", ".join((*PICTURES, *NIFTI, *CHECKS))
        raise ImageReadError(f"{path} {told}: readable are {known} and folders of DICOM")
    return kind


def _stored(path: PathLike, kind: str, form: Form | None, series: str | None) -> Stored:
    if form is not None and kind not in NIFTI:
        raise ValueError(f"form is {form!r}, but {path} is not NIfTI: only there are two")
    if series is not None and kind:
        raise ValueError(f"series is {series!r}, but {path} is not a folder of DICOM: leave it out")
    if not kind:
        return stored_series(path, series=series)
    return stored_nifti(path, form=form) if kind in NIFTI else stored_itk(path)


def write_image(
    path: PathLike,
    image: Image,
    *,
    window: tuple[float, float] | None = None,
    like: PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an image; all of the file or nothing.

    path : its suffix says how: .nii, .nii.gz; with the extra `itk` .mha, .nrrd; with the extra `plot` .png of 8 bits,
        .tif, .tiff of 32-bit floats
    image : (C, [Z,] Y, X); pictures are (1, Y, X), PNG also (3, Y, X) in colour
    window : the intensities that become black and white in a PNG, what is beyond is cut; default: the lowest and the
        highest of the image.  (0, 255) keeps 8-bit values as they are
    like : a NIfTI file on the same grid whose header is kept: both forms with their codes, units, description and
        extensions to the last bit; what describes the old values is not
    dtype : of the values in the file, for NIfTI, MetaImage and NRRD; integers only where all values are whole

    NIfTI has single precision for its place in the world, MetaImage and NRRD have double.  Pictures know no world.
    Raises ValueError for what the format cannot hold, WriteError where the file cannot be written, MissingExtraError
    without Pillow or SimpleITK.
    """
    kind = suffix(path)
    if kind not in WRITABLE:
        told = f"ends in {kind!r}" if kind else "has no suffix"
        raise WriteError(f"{path} {told}: writable are {', '.join(WRITABLE)}")
    if kind in PICTURES:
        if like is not None or dtype is not None:
            raise ValueError(f"{path} is a picture: like and dtype are for medical formats")
        write_picture(path, image, window=window)
        return
    if window is not None:
        raise ValueError(f"{path} keeps the values as they are: a window is for PNG")
    values = single(image)
    _write(path, values if dtype is None else _cast(values, dtype), image.grid, like)


def write_labels(path: PathLike, labels: Labels, *, like: PathLike | None = None) -> None:
    """Write labels as the smallest of uint8, int16, int32 and int64 that holds them; `like` as in `write_image`.

    Pictures hold few: PNG bytes, TIFF what float32 does not round.  Raises TypeError for labels that are no integers,
    ValueError for shapes that do not fit and for numbers that a picture cannot hold.
    """
    data, grid = labels
    if data.is_floating_point() or data.is_complex():
        raise TypeError(f"labels are {data.dtype}: expected integers; labels.round().long()")
    if tuple(data.shape) != (1, *grid.shape):
        raise ValueError(f"labels have shape {tuple(data.shape)}: expected {(1, *grid.shape)} as their grid")
    check_writable(path, endings=WRITABLE)
    values = data.detach().cpu().numpy()
    low, high = int(values.min()), int(values.max())
    if suffix(path) in PICTURES:
        _write_labels_as_picture(path, labels, low, high, like)
        return
    fits = (kind for kind in ("u1", "i2", "i4", "i8") if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    _write(path, values.astype(next(fits)), grid, like)


def _write_labels_as_picture(path: PathLike, labels: Labels, low: int, high: int, like: PathLike | None) -> None:
    png = suffix(path) == ".png"
    if png and (low < 0 or high > 255):
        raise ValueError(f"{path} would have 8 bits, but labels are from {low} to {high}: name it .tif")
    if max(-low, high) > 2**24:
        raise ValueError(f"{path} would hold floats, which round labels up to {max(-low, high)}: name it .nii.gz")
    write_image(path, Image(labels.data, labels.grid), window=(0.0, 255.0) if png else None, like=like)


def _write(path: PathLike, values: np.ndarray, grid: Grid, like: PathLike | None) -> None:
    if suffix(path) in NIFTI:
        write_nifti(path, values, grid, like=like)
        return
    if like is not None:
        raise ValueError(f"like is {like}, but {path} is not NIfTI: headers are kept from NIfTI to NIfTI")
    write_itk_image(path, values, grid)


def _cast(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """In another type, where no whole number changes."""
    try:
        kind: Any = torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        kind = None
    if kind is None or kind.kind not in "iuf" or (kind.itemsize < 4 and kind.kind == "f"):
        raise ValueError(f"dtype is {dtype}: expected integers, torch.float32 or torch.float64")
    if kind.kind == "f":
        return values.astype(kind)
    flat, made = np.ascontiguousarray(values).reshape(-1), np.empty(values.size, kind)
    with np.errstate(invalid="ignore"):  # what does not fit becomes another number, and is seen
        for start in range(0, flat.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            made[part] = flat[part]
            if not np.array_equal(made[part], flat[part]):
                raise ValueError(f"dtype is {dtype}, but the values are not whole or do not fit: round them first")
    return made.reshape(values.shape)
