"""A DICOM series, a folder of slices, as one volume, with SimpleITK of the extra `itk`.

ITK stacks what it finds in the order of the slices; here it is first asked whether they make a volume: one series,
one size and orientation, slices one step apart, straight above one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fnreg.extras import require
from fnreg.io.files import ImageReadError, PathLike, read_bytes
from fnreg.io.simpleitk import quiet
from fnreg.io.stored import Stored, affine_grid

_POSITION, _ORIENTATION, _SPACING, _THICKNESS = "0020|0032", "0020|0037", "0028|0030", "0018|0050"
_PHOTOMETRIC = "0028|0004"
# What ITK hands out as red, green and blue: a palette is looked up, luminance with two differences is turned.
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
EVEN = 0.01  # steps between slices may differ by this share of a step: positions are texts with few digits
STRAIGHT = 1e-3  # of a step along the normal: what slices may lie aside


class _Slice(NamedTuple):
    path: str
    size: tuple[int, ...]
    position: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 2) steps along rows and columns, in mm
    thickness: float | None  # mm, where the file says it
    colour: bool  # whether its values are red, green and blue


def stored_series(folder: PathLike, *, series: str | None = None) -> Stored:
    """The values of a series as (1, C, Z, Y, X); see `fnreg.io.read_image`."""
    sitk: Any = require("SimpleITK", "itk", f"reading the DICOM series {folder}")
    with quiet(sitk):
        return _stored(sitk, Path(folder), series)


def _stored(sitk: Any, folder: Path, series: str | None) -> Stored:
    found = list(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
    _skipped(sitk, folder, found)
    if not found:
        raise ImageReadError(f"{folder} is a folder without DICOM files: expected an image, or a folder of one series")
    if series is None and len(found) > 1:
        raise ImageReadError(f"{folder} holds {len(found)} DICOM series: choose one by series=, of {', '.join(found)}")
    if series is not None and series not in found:
        raise ImageReadError(f"{folder} has no DICOM series {series!r}: it has {', '.join(found)}")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series or found[0])
    slices = [_slice(sitk, name) for name in names]
    first = slices[0]
    for one in slices[1:]:
        if one.size != first.size or np.abs(one.axes - first.axes).max() > 1e-4 * np.abs(first.axes).max():
            raise ImageReadError(
                f"{folder} is no volume: {Path(one.path).name} has another size, spacing or orientation than "
                f"{Path(first.path).name}"
            )
    slices, step = _ordered(folder, slices)
    try:
        each = [sitk.GetArrayFromImage(sitk.ReadImage(one.path)) for one in slices]  # (1, Y, X[, C])
    except RuntimeError as problem:
        raise ImageReadError(f"{folder} is damaged: {' '.join(str(problem).split())[-300:]}") from problem
    values = np.concatenate(each)
    values = (values[..., None] if values.ndim == 3 else values)[None]  # (1, Z, Y, X, C)
    linear = np.column_stack([slices[0].axes, step])
    grid = affine_grid(folder, values.shape[1:4], linear, slices[0].position)
    alone = len(slices) == 1 and slices[0].thickness is None
    notes = ("has one slice, which does not say how thick it is: taken is 1 mm",) if alone else ()
    colour = slices[0].colour and values.dtype == np.uint8
    return Stored(np.moveaxis(values, -1, 1), grid, colour=colour, notes=notes)


def _skipped(sitk: Any, folder: Path, found: list[str]) -> None:
    """ImageReadError for a file that is named as DICOM but is none: ITK leaves it out, and a slice with it."""
    known = {
        Path(name).name for one in found for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), one)
    }
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (".dcm", ".ima") and file.name not in known:
            raise ImageReadError(f"{file} is damaged, or not a DICOM image: mend it, or take it out of the folder")


def _slice(sitk: Any, name: str) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
        position = np.array([float(v) for v in reader.GetMetaData(_POSITION).split("\\")])
        turn = np.array([float(v) for v in reader.GetMetaData(_ORIENTATION).split("\\")]).reshape(2, 3).T
        apart = [float(v) for v in reader.GetMetaData(_SPACING).split("\\")][::-1]  # of rows first, so y before x
        turn = turn / np.linalg.norm(turn, axis=0)  # texts of six digits are not quite unit vectors
        axes = turn * np.array(apart)
    except (RuntimeError, ValueError) as problem:
        told = "it cannot be read, or has no ImagePositionPatient, ImageOrientationPatient and PixelSpacing"
        raise ImageReadError(f"{name} is no slice of a volume: {told}") from problem
    _whole(name, reader)
    size = tuple(reader.GetSize())
    if len(size) > 2 and size[2] != 1:
        raise ImageReadError(f"{name} holds {size[2]} frames: expected a series of one slice in each file")
    if position.shape != (3,) or not (np.isfinite(position).all() and np.isfinite(axes).all()):
        raise ImageReadError(f"{name} is damaged: its position or orientation is not of finite numbers")
    colour = reader.GetNumberOfComponents() == 3 and reader.GetMetaData(_PHOTOMETRIC).strip() in COLOURS
    return _Slice(name, size, position, axes, _thickness(reader), colour)


def _thickness(reader: Any) -> float | None:
    try:
        value = float(reader.GetMetaData(_THICKNESS)) if reader.HasMetaDataKey(_THICKNESS) else 0.0
    except ValueError:
        return None
    return value if 0 < value < np.inf else None


def _whole(name: str, reader: Any) -> None:
    """ImageReadError where the pixels are not all there: ITK would take zeros in their place."""
    data, tag, undefined = read_bytes(name, ImageReadError), b"\xe0\x7f\x10\x00", 2**32 - 1
    rows, columns, bits = (int(reader.GetMetaData(key)) for key in ("0028|0010", "0028|0011", "0028|0100"))
    samples = int(reader.GetMetaData("0028|0002")) if reader.HasMetaDataKey("0028|0002") else 1
    expected = rows * columns * samples * bits // 8
    place = data.find(tag)
    while place >= 0:
        explicit = data[place + 4 : place + 6] in (b"OW", b"OB")
        begin = place + (12 if explicit else 8)
        length = int.from_bytes(data[begin - 4 : begin], "little")
        if length == undefined and b"\xfe\xff\xdd\xe0" in data[begin:]:  # compressed frames, up to their end
            return
        if expected <= length <= expected + 1 and begin + length <= len(data):
            return
        place = data.find(tag, place + 1)
    raise ImageReadError(f"{name} is damaged or incomplete: it does not hold the {expected} bytes of its pixels")


def _ordered(folder: PathLike, slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices along their normal, and the step from one to the next, of one alone its thickness."""
    across = np.cross(*slices[0].axes.T)
    normal = across / np.linalg.norm(across)
    if len(slices) == 1:
        return slices, normal * (slices[0].thickness or 1.0)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    positions = np.stack([one.position for one in slices])
    steps = np.diff(positions @ normal)
    usual = float(np.median(steps))
    if steps.min() <= 0 or usual <= 0:
        k = int(steps.argmin())
        names = [Path(one.path).name for one in slices[k : k + 2]]
        raise ImageReadError(f"{folder} is no volume: {' and '.join(names)} are slices at one place")
    worst = int(np.abs(steps - usual).argmax())
    if abs(steps[worst] - usual) > EVEN * usual:
        names = [Path(one.path).name for one in slices[worst : worst + 2]]
        raise ImageReadError(
            f"{folder} is no volume: from {names[0]} to {names[1]} it is {steps[worst]:.4g} mm, elsewhere "
            f"{usual:.4g} mm: slices are missing, or there are too many"
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    aside = np.linalg.norm(step - (step @ normal) * normal) / usual
    if aside > STRAIGHT:
        away = np.degrees(np.arctan(aside))
        raise ImageReadError(
            f"{folder} is sheared: its slices rise {away:.3g} degrees aside of their normal; resample it first"
        )
    return slices, (step @ normal) * normal
