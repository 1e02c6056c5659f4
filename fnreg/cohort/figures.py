"""Small pictures of one registered pair for the report, WebP from the extra `plot`: no matplotlib, which takes seconds.

Each is a mosaic, on a canvas of its own size: of a 3-D image the planes x y, x z and y z of the world through the
middle of the fixed image, in one scale, of a 2-D image all of it.  They look as the figures of `fnreg.plot` do.  Only
the points of these planes are mapped, so a large volume costs little more than its reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnreg.cohort.mosaic import Cells, cells_of, drawing, mosaic, photo, pillow, places_of, size_of
from fnreg.cohort.planes import (
    BACK,
    LINES,
    SAMPLES,
    Pixels,
    Plane,
    determinants,
    displayed,
    flat,
    grey,
    map_planes,
    mapped_plane,
    planes_of,
    small,
    trimmed_range,
)
from fnreg.filters import gaussian
from fnreg.image import Image
from fnreg.io.image import Labels
from fnreg.plot.canvas import Box, Cut, around, box_of, coordinate_lines, single
from fnreg.transforms.base import Mapping

BAR = 20  # pixels below the determinants, for the key of colours
PAPER = (BACK,) * 3
LINE, FRAME, FOLDED = (255, 176, 0), (150, 150, 150), (255, 225, 0)
SCALE = ((33, 102, 172), (247, 247, 247), (178, 24, 43))  # shrinks, stays, grows
MOST = 3.0  # powers of two that the colours of the determinant tell apart
SHADES = 32  # of the colours on either side: few, so that the file is small
SMOOTH = 0.006  # of contours by intensity, the Gaussian's sigma as a share of the longer side
FIXED, BEFORE, AFTER, CONTOURS, GRID, JACOBIAN = (
    "fixed.webp", "before.webp", "after.webp", "contours.webp", "grid.webp", "jacobian.webp",
)  # fmt: skip
UNMAPPED = (FIXED, BEFORE, CONTOURS)
NAMES = (*UNMAPPED, AFTER, GRID, JACOBIAN)


def draw(
    fixed: Image, moving: Image, mapping: Mapping | None = None, *, labels: Labels | None = None, letters: bool = False
) -> dict[str, bytes]:
    """The pictures by the names of their files: `UNMAPPED`, and with a mapping all of `NAMES`.

    fixed, moving : (C, [Z,] Y, X), channels are averaged; each has its own range of grey
    mapping : from fixed to moving points; the image before is the moving one as the world coordinates alone place it
    labels : of the fixed image, whose borders are the contours; default: borders of its bright and brightest parts
    letters : the sides of a patient in LPS at the edges of 3-D images

    The warped grid is T(lines), what they show is the place in the moving image from which each part comes; the dashed
    frame is the fixed image's.  The colours of the Jacobian map are the determinant's on a logarithmic scale.

    >>> import fnreg
    >>> fixed, moving = fnreg.data.brain()
    >>> sorted(draw(fixed, moving, fnreg.data.brain_truth()))
    ['after.webp', 'before.webp', 'contours.webp', 'fixed.webp', 'grid.webp', 'jacobian.webp']

    Raises MissingExtraError without Pillow, ValueError for images of other than two or three axes.
    """
    fixed, moving = (small(single(name, image)) for name, image in (("fixed", fixed), ("moving", moving)))
    if moving.grid.ndim != fixed.grid.ndim:
        raise ValueError(f"moving has {moving.grid.ndim} spatial axes but fixed has {fixed.grid.ndim}")
    planes = planes_of(fixed)
    if mapping is not None:
        planes = map_planes(planes, mapping)
    marks = letters and fixed.grid.ndim == 3
    cells = cells_of([plane.cut.grid.extent.tolist() for plane in planes])
    flats = [flat(plane.cut, fixed) for plane in planes]
    sides = {BEFORE: [flat(plane.cut, moving) for plane in planes]}
    if mapping is not None:
        sides[AFTER] = [flat(plane.cut._replace(points=mapped_plane(plane)), moving) for plane in planes]
    window = trimmed_range([part for parts in sides.values() for part in parts])
    made: dict[str, bytes] = {}
    for name, parts, limits in [(FIXED, flats, trimmed_range(flats)), *((name, sides[name], window) for name in sides)]:
        panels = [grey(part, limits) for part in parts]
        made[name] = photo(mosaic(panels, cells, planes, letters=marks))
    made[CONTOURS] = drawing(_contours(planes, flats, cells, labels))
    if mapping is not None:
        made[GRID] = drawing(_warped_grid(planes))
        made[JACOBIAN] = drawing(_jacobian(planes, cells))
    return made


def _contours(planes: Sequence[Plane], flats: Sequence[Pixels], cells: Cells, labels: Labels | None) -> Any:
    """Borders on a transparent mosaic, a pixel wide whatever the voxels are."""
    images = pillow("Image")
    size = size_of(cells)
    border = np.zeros((size[1], size[0]), bool)
    shown = [_label_parts(plane.cut, labels) for plane in planes] if labels is not None else _bright_parts(flats)
    for parts, (width, height), (left, top) in zip(shown, cells, places_of(cells), strict=True):
        edge = np.zeros((height, width), bool)
        for part in parts:
            soft = images.fromarray(part).resize((width, height), images.Resampling.BILINEAR)
            inside = np.asarray(soft) > 0
            edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
            edge[1:] |= inside[1:] != inside[:-1]
        border[top : top + height, left : left + width] = edge
    colour = np.zeros((*border.shape, 4), np.uint8)
    colour[border] = (*LINE, 255)
    return images.fromarray(colour)


def _label_parts(cut: Cut, labels: Labels) -> list[Pixels]:
    """Of each class +1 where it is and -1 where it is not."""
    index = labels.grid.world_to_index(cut.points).round().long()
    count = torch.tensor(labels.grid.size)
    inside = ((index >= 0) & (index < count)).all(-1)
    where = torch.where(inside[:, None], index, 0)
    found = labels.data[0][tuple(where.flip(-1).unbind(-1))]
    flat = displayed(cut, torch.where(inside, found, 0).reshape(cut.grid.shape).numpy())
    return [np.where(flat == number, 1, -1).astype(np.float32) for number in np.unique(flat) if number]


def _bright_parts(flats: Sequence[Pixels]) -> list[list[Pixels]]:
    """Intensities above two thresholds, that of Otsu and the same again of what is brighter; a little smoothed, so that
    noise does not cover the image with lines."""
    smooth = [_smoothed(part) for part in flats]
    values = np.concatenate([part.ravel() for part in smooth])
    first = otsu(values)
    above = values[values > first]
    levels = [first, otsu(above)] if above.size else [first]
    return [[part - np.float32(level) for level in levels] for part in smooth]


def _smoothed(part: Pixels) -> Pixels:
    lowest = part[np.isfinite(part)].min(initial=np.inf)
    known = torch.from_numpy(np.nan_to_num(part, nan=lowest if np.isfinite(lowest) else 0.0))
    return gaussian(known[None], SMOOTH * max(part.shape))[0].numpy()


def otsu(values: Pixels) -> float:
    """The threshold that splits values into two classes as far apart as can be, for their spread.

    Of all thresholds t that of the largest w(t) (1 - w(t)) (m1(t) - m0(t))^2, with the share w and the means m of the
    classes, among 256 of equal distance.  Otsu 1979, doi 10.1109/TSMC.1979.4310076.

    >>> import numpy as np
    >>> 1 < otsu(np.array([0.0, 1.0, 1.0, 7.0, 8.0])) < 7
    True
    """
    if not values.size or not float(values.min()) < float(values.max()):
        return float(values.min()) if values.size else 0.0
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    total, mass = float(values.size), np.cumsum(counts * middles)
    above = total - below
    between = below * above * ((mass[-1] - mass[:-1]) / np.maximum(above, 1) - mass[:-1] / np.maximum(below, 1)) ** 2
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:-1][best].mean())  # the middle of those that are as good: far from both classes


def _warped_grid(planes: Sequence[Plane]) -> Any:
    """Lines where the map takes them, in the axes of each plane; the panels are larger where lines leave the image."""
    images = pillow("Image")
    pen_of = pillow("ImageDraw").Draw
    curves: list[Tensor] = []
    for plane in planes:
        assert plane.curves is not None
        curves.append(plane.curves[..., plane.axes])
    boxes = [around(curve.reshape(-1, 2), box_of(plane.cut.grid)) for curve, plane in zip(curves, planes, strict=True)]
    cells = cells_of([(right - left, low - top) for (left, top), (right, low) in boxes])
    fine = 2  # drawn so many times as large: smooth lines
    whole = images.new("RGB", tuple(fine * n for n in size_of(cells)), PAPER)
    for plane, lines, box, cell, place in zip(planes, curves, boxes, cells, places_of(cells), strict=True):
        panel = images.new("RGB", (fine * cell[0], fine * cell[1]), PAPER)
        pen = pen_of(panel)
        flip = plane.cut.names[1] == "z"
        frame = coordinate_lines(plane.cut.grid, LINES, SAMPLES)
        for line in [*frame[:1], *_last(frame)]:
            points = _on_panel(line, box, panel.size, flip=flip)
            for k in range(0, len(points) - 1, 4):
                pen.line(points[k : k + 3], fill=FRAME, width=fine)
        for line in lines:
            if bool(torch.isfinite(line).all()):
                pen.line(_on_panel(line, box, panel.size, flip=flip), fill=LINE, width=fine, joint="curve")
        whole.paste(panel, (fine * place[0], fine * place[1]))
    return whole.resize(size_of(cells), images.Resampling.BOX).quantize(16, dither=images.Dither.NONE)


def _last(frame: Tensor) -> list[Tensor]:
    """The other three sides of the frame among its lines."""
    across = int((frame[:, 0, 0] == frame[:, -1, 0]).sum())
    return [frame[across - 1], frame[across], frame[-1]]


def _on_panel(line: Tensor, box: Box, size: tuple[int, int], *, flip: bool) -> list[tuple[float, float]]:
    (left, top), (right, low) = box
    unit = (line - torch.tensor([left, top], dtype=torch.float64)) / torch.tensor(
        [right - left, low - top], dtype=torch.float64
    )
    x, y = unit[:, 0] * size[0], (1 - unit[:, 1] if flip else unit[:, 1]) * size[1]
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _jacobian(planes: Sequence[Plane], cells: Cells) -> Any:
    images = pillow("Image")
    parts = determinants(planes)
    positive = np.concatenate([part[np.isfinite(part) & (part > 0)] for part in parts])
    powers = np.abs(np.log2(positive))
    limit = min(MOST, max(0.05, float(powers.max()) if powers.size else 0.0))
    width, height = size_of(cells)
    whole = images.new("RGB", (max(width, 120), height + BAR), PAPER)
    for part, cell, place in zip(parts, cells, places_of(cells), strict=True):
        folded = part <= 0
        power = np.log2(np.where(part > 0, part, 1.0))
        colour = _colours(power / limit)
        colour[~np.isfinite(part)] = BACK
        panel = images.fromarray(colour).resize(cell, images.Resampling.BOX)
        # Not one folded voxel is lost where the panel has fewer pixels than the plane has voxels.
        marks = images.fromarray(np.where(folded, 255, 0).astype(np.uint8)).resize(cell, images.Resampling.BOX)
        panel.paste(FOLDED, (0, 0), marks.point([0] + [255] * 255))
        whole.paste(panel, place)
    _key(whole, height, limit)
    return whole


def _colours(value: Pixels) -> Pixels:
    """(..., 3) of values from -1 to 1, in so many shades."""
    value = np.round(value * SHADES) / SHADES
    anchors = np.array(SCALE, float)
    channels = [np.interp(value, (-1, 0, 1), anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _key(whole: Any, top: int, limit: float) -> None:
    """What the colours mean, below the panels."""
    images = pillow("Image")
    pen = pillow("ImageDraw").Draw(whole)
    font = pillow("ImageFont").load_default(11)
    length = min(160, whole.width - 100)
    whole.paste(images.fromarray(_colours(np.linspace(-1, 1, length)[None].repeat(9, 0))), (44, top + 7))
    told = (f"{math.pow(2, -limit):.2g}", f"{math.pow(2, limit):.2g}")
    pen.text((40, top + 11), told[0], (220, 220, 220), font=font, anchor="rm")
    pen.text((length + 48, top + 11), told[1], (220, 220, 220), font=font, anchor="lm")
    if whole.width > length + 170:
        pen.rectangle((length + 84, top + 7, length + 93, top + 15), fill=FOLDED)
        pen.text((length + 98, top + 11), "folded", (220, 220, 220), font=font, anchor="lm")
