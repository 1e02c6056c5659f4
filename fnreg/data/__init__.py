"""Small images to try things on: handwritten digits and two slices of a brain, which come with the package, and
synthetic ones with a formula.

Authors and licences of the real ones are in the file NOTICE.md beside them.
"""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from fnreg.data.synthetic import c_shape, checkerboard_image, circle, grid_lines, sphere
from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.transforms.base import Mapping
from fnreg.transforms.linear import Homogeneous

__all__ = [
    "brain",
    "brain_truth",
    "digit_pairs",
    "digits",
    "circle",
    "c_shape",
    "sphere",
    "grid_lines",
    "checkerboard_image",
]


def _load(name: str) -> dict[str, np.ndarray]:
    with resources.files("fnreg.data").joinpath(name).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _unit(values: np.ndarray) -> Tensor:
    """Bytes 0..255 as float32 0..1."""
    return torch.from_numpy(values).to(torch.float32) / 255


def _by_digit() -> np.ndarray:
    """All images, (10, count, 28, 28): MNIST's first test images of each digit."""
    stored = _load("digits.npz")
    return np.stack([stored["images"][stored["labels"] == digit] for digit in range(10)])


def digits(digit: int, count: int = 2) -> tuple[Image, ...]:
    """The first `count` of the handwritten images of one digit, 28 x 28, values 0..1, bright on dark.

    Spacing 1 and origin 0, in pixels.  Raises ValueError for what is not a digit, and for more than there are.
    LeCun et al. 1998, doi 10.1109/5.726791.

    >>> import fnreg
    >>> fixed, moving = fnreg.data.digits(9, count=2)
    >>> fixed.grid.size, fixed.channels
    ((28, 28), 1)
    """
    if isinstance(digit, bool) or digit not in range(10):
        raise ValueError(f"digit is {digit!r}: expected one of 0 to 9")
    found = _by_digit()[int(digit)]
    if not 1 <= count <= len(found):
        raise ValueError(
            f"count is {count}: {len(found)} images of each digit come with fnreg, ask for 1 to {len(found)}"
        )
    return tuple(Image(_unit(image).unsqueeze(0)) for image in found[:count])


def digit_pairs(count: int) -> tuple[Image, Image]:
    """A batch of `count` pairs of two images of the same digit, data (count, 1, 28, 28): fixed and moving.

    The digits take turns, 0 to 9 and again from 0.  The first 300 pairs have 300 different fixed images, and no pair
    occurs twice.  Raises ValueError for more pairs than the images give.

    >>> import fnreg
    >>> fixed, moving = fnreg.data.digit_pairs(100)
    >>> tuple(moving.data.shape)
    (100, 1, 28, 28)
    """
    images = _by_digit()
    each = images.shape[1]
    most = 10 * each * (each - 1)
    if not 1 <= count <= most:
        raise ValueError(f"count is {count}: {each} images of each digit give 1 to {most} pairs")
    number = np.arange(count)
    digit, turn = number % 10, number // 10
    first = turn % each
    second = (first + 1 + turn // each) % each
    fixed, moving = (_unit(images[digit, which]).unsqueeze(1) for which in (first, second))
    grid = Grid((28, 28))
    return Image(fixed, grid), Image(moving, grid)


def brain() -> tuple[Image, Image]:
    """Two slices of a brain, 221 x 257 pixels of 1 mm, values 0..1: fixed, and moving, which is rotated and shifted.

    What maps the one to the other is `brain_truth`.

    >>> import fnreg
    >>> fixed, moving = fnreg.data.brain()
    >>> fixed.grid.size
    (221, 257)
    """
    stored = _load("brain.npz")
    fixed, moving = (Image(_unit(stored[name]).unsqueeze(0)) for name in ("fixed", "moving"))
    return fixed, moving


def brain_truth() -> Mapping:
    """The map between the slices of `brain`, T(p) = R (p - c) + c + t.

    R turns by 10 degrees, about c = (110.5, 128.5) mm, and t = (13, 16) mm.

    >>> import fnreg
    >>> fnreg.data.brain_truth().matrix()[:2, 2].round(decimals=2).tolist()
    [36.99, -1.24]
    """
    angle = math.radians(10)
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = 110.5, 128.5
    rows = [
        [cosine, -sine, x - cosine * x + sine * y + 13],
        [sine, cosine, y - sine * x - cosine * y + 16],
        [0.0, 0.0, 1.0],
    ]
    return Mapping({"matrix": torch.tensor(rows, dtype=torch.float64)}, Grid((221, 257)), Homogeneous())
