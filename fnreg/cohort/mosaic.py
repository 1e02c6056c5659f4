"""Pictures side by side in one WebP: how large, where, how they are lettered and packed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fnreg.cohort.planes import BACK, Pixels, Plane
from fnreg.extras import require

LARGEST = (600, 300)  # width and height of a mosaic, in pixels
GAP = 6  # pixels between panels
Cells = Sequence[tuple[int, int]]  # widths and heights of panels, in pixels


def pillow(module: str) -> Any:
    """A module of Pillow.  Raises MissingExtraError."""
    return require(f"PIL.{module}", "plot", "drawing the pictures of a report")


def cells_of(extents: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Widths and heights in pixels of panels beside each other, in one scale."""
    width, height = sum(extent[0] for extent in extents), max(extent[1] for extent in extents)
    scale = min((LARGEST[0] - GAP * (len(extents) - 1)) / width, LARGEST[1] / height)
    return [(max(1, int(scale * a)), max(1, int(scale * b))) for a, b in extents]


def places_of(cells: Cells) -> list[tuple[int, int]]:
    """Left upper corners of panels, their middles at one height."""
    highest = max(height for _, height in cells)
    lefts = accumulate((width + GAP for width, _ in cells), initial=0)
    return [(left, (highest - height) // 2) for left, (_, height) in zip(lefts, cells, strict=False)]


def size_of(cells: Cells) -> tuple[int, int]:
    """Width and height of a mosaic."""
    return sum(width for width, _ in cells) + GAP * (len(cells) - 1), max(height for _, height in cells)


def mosaic(panels: Sequence[Pixels], cells: Cells, planes: Sequence[Plane], *, letters: bool) -> Any:
    """Panels (Y, X) of grey bytes beside each other, each made as large as its cell.

    letters : the sides of a patient at the edges
    """
    images = pillow("Image")
    whole = images.new("L", size_of(cells), BACK)
    for panel, cell, place in zip(panels, cells, places_of(cells), strict=True):
        whole.paste(images.fromarray(panel).resize(cell, images.Resampling.BILINEAR), place)
    if letters:
        _letter(whole, cells, planes)
    return whole


def _letter(whole: Any, cells: Cells, planes: Sequence[Plane]) -> None:
    """The sides of the patient, as `fnreg.plot` has them: the world is LPS, y points down and z up."""
    pen = pillow("ImageDraw").Draw(whole)
    font = pillow("ImageFont").load_default(13)
    sides = {"x": "RL", "y": "AP", "z": "SI"}  # on the left or on top, and opposite
    for plane, (width, height), (left, top) in zip(planes, cells, places_of(cells), strict=True):
        across, down = (sides[name] for name in plane.cut.names)
        edges = (
            (3, height / 2, "lm"),
            (width - 3, height / 2, "rm"),
            (width / 2, 2, "mt"),
            (width / 2, height - 3, "mb"),
        )
        for letter, (x, y, anchor) in zip((*across, *down), edges, strict=True):
            pen.text((left + x, top + y), letter, 255, font=font, anchor=anchor, stroke_width=2, stroke_fill=0)


def photo(image: Any) -> bytes:
    """WebP with loss: grey levels."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=60, method=3)
    return stream.getvalue()


def drawing(image: Any) -> bytes:
    """WebP without loss: lines and plain colours."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=30, method=2)
    return stream.getvalue()
