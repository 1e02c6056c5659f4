"""Pictures, 2-D: PNG, JPEG and TIFF through Pillow, of the extra `plot`.

A picture file knows no world: its grid has spacing 1 and origin 0, x to the right and y down.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from typing import Any

import numpy as np
import torch

from fnreg.extras import require
from fnreg.image import Image
from fnreg.io.files import ImageReadError, PathLike, read_bytes, write_bytes

_FORMATS = ("PNG", "JPEG", "TIFF")
_BYTES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_BITS, _SAMPLE_FORMAT, _SIGNED, _UNSIGNED = 258, 339, 2, 1  # tags of TIFF, and values of the second


_QUIET = threading.Lock()  # the filters of warnings are of the process: threads that change them take turns


def read_picture(path: PathLike, *, channels: bool = False) -> Image:
    """A picture as an Image (1, Y, X), or (3, Y, X) with `channels`; see `fnreg.io.read_image`."""
    data = read_bytes(path, ImageReadError)
    pillow = require("PIL.Image", "plot", f"reading {path}")
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on large pictures and odd metadata; what matters raises
            values = _values(data, pillow, channels)
    except _Refused as problem:
        raise ImageReadError(f"{path} {problem}") from None
    except pillow.DecompressionBombError as problem:
        raise ImageReadError(f"{path} claims to be very large, which Pillow refuses: {problem}") from problem
    except pillow.UnidentifiedImageError as problem:
        raise ImageReadError(f"{path} {_unknown(data)}") from problem
    # Pillow tells of damage by many types of errors; here it only decodes bytes, so each of them means the file.
    except Exception as problem:
        raise ImageReadError(f"{path} is damaged or incomplete: {problem}") from problem
    return Image(torch.from_numpy(values))


def _unknown(data: bytes) -> str:
    if data.startswith((b"II*\0", b"MM\0*")):
        return "is damaged or a TIFF of an unsupported kind: save it with integers of 8 or 16 bits or floats of 32"
    if data.startswith((b"\x89PNG", b"\xff\xd8")):
        return "is damaged: its header cannot be read"
    return "is not a PNG, JPEG or TIFF picture: check the file"


class _Refused(Exception):
    """What a picture is that it cannot be read without loss."""


def _values(data: bytes, pillow: Any, channels: bool) -> np.ndarray:
    """Values (C, Y, X) as they are stored: float32, or float64 where float32 would round them."""
    if data.startswith(b"\x89PNG"):
        with pillow.open(io.BytesIO(data), formats=("PNG",)) as opened:
            opened.verify()  # the check sums; loading alone does not look at all of them
    with pillow.open(io.BytesIO(data), formats=_FORMATS) as opened:
        pages = getattr(opened, "n_frames", 1)
        if pages > 1 and opened.format != "MPO":  # MPO: a camera's JPEG whose other pictures are previews
            raise _Refused(f"holds {pages} pictures: expected one, save the one you mean by itself")
        bits, kind = _depth(data, opened)
        if bits > 8 and len(opened.getbands()) > 1:
            raise _Refused(f"has colours of {bits} bits, which Pillow cuts to 8: save it grey, or with 8 bits")
        opened.load()
        picture = require("PIL.ImageOps", "plot", "reading a picture").exif_transpose(opened)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            values = np.asarray(picture)
            if picture.mode == "I" and bits == 32 and kind == _UNSIGNED:
                values = values.astype(np.int64) % 2**32
        elif picture.mode in _BYTES:
            values = np.asarray(picture.convert("RGB" if channels else "L"))
            if picture.mode == "L" and kind == _SIGNED:
                values = values.view(np.int8)
        else:
            raise _Refused(f"is of Pillow's mode {picture.mode}, which is not supported: save it grey or as RGB")
        if values.ndim == 3:
            return _exact(values.transpose(2, 0, 1))
        return _exact(np.stack([values] * (3 if channels else 1)))


def _depth(data: bytes, opened: Any) -> tuple[int, int]:
    """Bits per sample, and TIFF's kind of sample."""
    if opened.format == "TIFF":
        bits, kind = opened.tag_v2.get(_BITS, (1,)), opened.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        return max(np.atleast_1d(bits).tolist()), int(np.atleast_1d(kind)[0])
    return (data[24] if opened.format == "PNG" else 8), _UNSIGNED


def _exact(values: np.ndarray) -> np.ndarray:
    single = np.array(values, dtype=np.float32, order="C")  # a copy of its own, which can be written to
    whole = values.dtype.kind in "iu" and values.dtype.itemsize > 2
    return np.array(values, dtype=np.float64, order="C") if whole and (single != values).any() else single


def write_picture(path: PathLike, image: Image, *, window: tuple[float, float] | None = None) -> None:
    """An Image as PNG of 8 bits or TIFF of 32-bit floats; see `fnreg.io.write_image`."""
    data = image.data.detach().cpu()
    if image.grid.ndim != 2 or data.ndim != 3 or data.shape[0] not in (1, 3):
        raise ValueError(f"data has shape {tuple(data.shape)}: a picture is (1, Y, X), or (3, Y, X) in colour")
    pillow = require("PIL.Image", "plot", f"writing {path}")
    stream = io.BytesIO()
    if str(path).lower().endswith(".png"):
        low, high = _limits(data, window)
        unit = torch.nan_to_num((data.double() - low) / (high - low), nan=0, posinf=1, neginf=0)
        scaled = (unit.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        pillow.fromarray(scaled[0] if len(scaled) == 1 else scaled.transpose(1, 2, 0).copy()).save(stream, "PNG")
    else:
        if window is not None:
            raise ValueError("a TIFF keeps the values as they are: give a window for PNG only")
        if data.shape[0] != 1:
            raise ValueError("a TIFF of floats has one channel: write each channel by itself, or a PNG")
        pillow.fromarray(data[0].to(torch.float32).numpy()).save(stream, "TIFF")
    write_bytes(path, stream.getvalue())


def _limits(data: torch.Tensor, window: tuple[float, float] | None) -> tuple[float, float]:
    """The intensities that become black and white."""
    if window is None:
        finite = data[torch.isfinite(data)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        return (low, high) if low < high else (low, low + 1)
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"window is {window}: expected two finite intensities, the first below the second")
    return low, high
