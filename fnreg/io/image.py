"""Images from and to files, by the suffix of the name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fnreg.image import Image
from fnreg.io.files import ImageReadError, PathLike, WriteError
from fnreg.io.picture import read_picture, write_picture

READERS: dict[str, Callable[..., Image]] = dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), read_picture)
WRITERS: dict[str, Callable[..., None]] = dict.fromkeys((".png", ".tif", ".tiff"), write_picture)


def suffix(path: PathLike) -> str:
    """What the name ends in, in small letters: ".png", and ".nii.gz" with both parts."""
    parts = [part.lower() for part in Path(path).suffixes]
    return "".join(parts[-2:]) if parts[-1:] == [".gz"] else "".join(parts[-1:])


def read_image(path: PathLike, *, channels: bool = False) -> Image:
    """Read an image: PNG, JPEG and TIFF, with the extra `plot`.

    path : its suffix says how it is read
    channels : colours as three channels (3, Y, X), red, green and blue, instead of their luminance (1, Y, X)

    The values are those stored, not rescaled, as float32 (float64 for integers that float32 would round): 0..255 for
    8 bits, 0..65535 for 16, floats as they are.  Palettes give the colours they stand for; transparency is ignored;
    the orientation that a camera noted is applied.  A picture has spacing 1 and origin 0.

    Raises ImageReadError where the file is missing, damaged, of another kind, or would lose something;
    MissingExtraError without Pillow.
    """
    kind = suffix(path)
    if kind not in READERS:
        known = ", ".join(READERS)
        told = f"ends in {kind!r}" if kind else "has no suffix"
        raise ImageReadError(f"{path} {told}: readable are {known}; other formats will follow")
    return READERS[kind](path, channels=channels)


def write_image(path: PathLike, image: Image, *, window: tuple[float, float] | None = None) -> None:
    """Write an image: PNG of 8 bits, or TIFF of 32-bit floats, with the extra `plot`; all of the file or nothing.

    path : its suffix, .png, .tif or .tiff, says which
    image : (1, Y, X), for PNG also (3, Y, X) in colour
    window : the intensities that become black and white in a PNG, what is beyond is cut; default: the lowest and the
        highest of the image.  (0, 255) keeps 8-bit values as they are

    The grid is not kept: a picture file knows no world.  Raises ValueError for what is no picture, WriteError where
    the file cannot be written, MissingExtraError without Pillow.
    """
    kind = suffix(path)
    if kind not in WRITERS:
        told = f"ends in {kind!r}" if kind else "has no suffix"
        raise WriteError(f"{path} {told}: writable are {', '.join(WRITERS)}; other formats will follow")
    options: dict[str, Any] = {"window": window}
    WRITERS[kind](path, image, **options)
