"""Figures of a pair of images before and after registration: overview, tiles, overlay, difference, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fnreg.grid import Grid, Scalars
from fnreg.image import Image
from fnreg.plot.canvas import (
    DIVERGING,
    GREY,
    Cut,
    box_of,
    check_same_grid,
    cuts,
    frame,
    full_range,
    minus,
    need,
    new_figure,
    panels,
    place,
    proportion,
    reach_of,
    root_mean_square,
    show,
    single,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overview(
    fixed: Image,
    moving: Image,
    warped: Image,
    *,
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Fixed, moving and warped image in one intensity window, and the differences to fixed before and after.

    fixed, moving, warped : (C, [Z,] Y, X), channels are averaged; warped lies on the grid of fixed, as
        `Registration.warp` gives it.  Before is the moving image as the world coordinates alone place it
    at : world point of the slices of 3-D images, default the middle of fixed; the moving image is then shown through
        its own middle
    unit : of the world coordinates, for the labels; title : above all of it
    """
    fixed, moving, warped = single("fixed", fixed), single("moving", moving), single("warped", warped)
    if moving.grid.ndim != fixed.grid.ndim:
        raise ValueError(f"moving has {moving.grid.ndim} spatial axes but fixed has {fixed.grid.ndim}")
    after = minus(warped, fixed)
    before = minus(moving.resample(fixed.grid, padding="zeros"), fixed)
    looks = cuts(fixed.grid, at)
    columns: dict[str, list[tuple[Cut, Image]]] = {
        name: [(look, look.of(image)) for look in own]
        for name, image, own in (
            ("fixed", fixed, looks),
            ("moving", moving, cuts(moving.grid, at)),
            ("warped", warped, looks),
            ("before", before, looks),
            ("after", after, looks),
        )
    }
    told = {
        "before": f"moving − fixed, before\nroot mean square {root_mean_square(before):.3g}",
        "after": f"warped − fixed, after\nroot mean square {root_mean_square(after):.3g}",
    }
    window = full_range(*(image for name in ("fixed", "moving", "warped") for _, image in columns[name]))
    reach = reach_of(*(image for name in told for _, image in columns[name]))
    figure, axes, bars = _overview_axes(looks, columns["moving"][0][0])
    shown: dict[str, Any] = {}
    for name, panel in columns.items():
        limits, colours = ((-reach, reach), DIVERGING) if name in told else (window, GREY)
        for row, (axis, (look, image)) in enumerate(zip(axes[name], panel, strict=True)):
            words = [told.get(name, name)] if row == 0 else []
            shown[name] = show(axis, look, image, "\n".join(filter(None, [*words, look.place])), unit, limits, colours)
            if len(looks) > 1 and name != "fixed":
                axis.set_ylabel("")
    for name, label, options in bars:
        figure.colorbar(shown[name], orientation="horizontal", label=label, **options)
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return figure


def _overview_axes(looks: list[Cut], moving: Cut) -> tuple[Figure, dict[str, list[Any]], list[Any]]:
    """The panels of an overview by name, and the scale bars: whose colours, label, where."""
    labels = (("fixed", "intensity"), ("after", "difference to fixed"))
    if len(looks) == 1:
        figure = new_figure(11, 1.2 + 2 * 3.1 * proportion(box_of(looks[0].grid), box_of(moving.grid)))
        axes = figure.subplot_mosaic([["fixed", "moving", "warped"], ["bars", "before", "after"]])
        room = axes.pop("bars")
        room.set_axis_off()
        insets = [{"cax": room.inset_axes((0.08, height, 0.84, 0.07))} for height in (0.72, 0.32)]
        bars = [(name, label, inset) for (name, label), inset in zip(labels, insets, strict=True)]
        return figure, {name: [axis] for name, axis in axes.items()}, bars
    boxes = [box_of(look.grid) for look in looks]
    widest = max(box[1][0] - box[0][0] for box in boxes)
    heights = [min(2.0, max(0.25, (box[1][1] - box[0][1]) / widest)) for box in boxes]
    figure = new_figure(14, 2.0 + sum(2.2 * height + 0.75 for height in heights))
    grid = figure.subplots(len(looks), 5, gridspec_kw={"height_ratios": heights})
    names = ("fixed", "moving", "warped", "before", "after")
    sides = [grid[:, :3].ravel().tolist(), grid[:, 3:].ravel().tolist()]
    options = [{"ax": side, "shrink": 0.7, "aspect": 40 - 12 * number} for number, side in enumerate(sides)]
    bars = [(name, label, option) for (name, label), option in zip(labels, options, strict=True)]
    return figure, {name: grid[:, column].tolist() for column, name in enumerate(names)}, bars


def checkerboard(
    fixed: Image,
    warped: Image,
    tiles: int = 8,
    *,
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Tiles of the fixed and of the warped image in turn: where they fit, edges run on from tile to tile.

    tiles : along the longest side
    at : world point of the slices of 3-D images, default the middle
    """
    if tiles < 2:
        raise ValueError(f"tiles is {tiles}: expected at least 2")
    fixed, warped = single("fixed", fixed), single("warped", warped)
    check_same_grid(warped, fixed)
    looks = cuts(fixed.grid, at)
    flat = [(look.of(fixed), look.of(warped)) for look in looks]
    window = full_range(*(image for pair in flat for image in pair))
    side = max(float(look.grid.extent.max()) for look in looks) / tiles
    told = title or f"{tiles} tiles of fixed and warped in turn"
    figure, axes = panels(looks, title=None if len(looks) == 1 else told)
    shown: Any = None
    for axis, look, (one, other) in zip(axes, looks, flat, strict=True):
        columns, rows = (_tile(look.grid, k, side) for k in (0, 1))
        odd = (rows[:, None] + columns) % 2 == 1
        mixed = Image(torch.where(odd, other.data, one.data), look.grid)
        shown = show(axis, look, mixed, look.place or told, unit, window)
        width, height = look.grid.size
        lines: dict[str, Any] = {"colors": "C1", "linewidth": 0.6, "alpha": 0.6, "transform": shown.get_transform()}
        axis.vlines(columns.diff().nonzero().flatten() + 0.5, -0.5, height - 0.5, **lines)
        axis.hlines(rows.diff().nonzero().flatten() + 0.5, -0.5, width - 0.5, **lines)
    figure.colorbar(shown, ax=axes, label="intensity", shrink=0.8)
    return figure


def _tile(grid: Grid, axis: int, side: float) -> Tensor:
    """The number of the tile in which each pixel along an axis lies; no tile is smaller than a pixel."""
    pixels = max(1.0, side / float(grid.spacing[axis]))
    return ((torch.arange(grid.size[axis]) + 0.5) / pixels).floor()


def overlay(
    fixed: Image,
    warped: Image,
    *,
    colours: Literal["red-green", "magenta-green"] = "red-green",
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Both images in one picture, one per colour: where they agree, the colours mix to yellow.

    colours : "red-green", or "magenta-green", which mix to grey, for eyes that do not tell red from green
    at : world point of the slices of 3-D images, default the middle
    """
    mixed = {"red-green": ("red", "lime", "yellow"), "magenta-green": ("magenta", "lime", "white")}
    if colours not in mixed:
        raise ValueError(f"unknown colours {colours!r}: choose from {', '.join(mixed)}")
    fixed, warped = single("fixed", fixed), single("warped", warped)
    check_same_grid(warped, fixed)
    looks = cuts(fixed.grid, at)
    flat = [(look.of(fixed), look.of(warped)) for look in looks]
    low, high = full_range(*(image for pair in flat for image in pair))
    figure, axes = panels(looks, bar=False, extra=1.5, title=title)
    for axis, look, pair in zip(axes, looks, flat, strict=True):
        one, other = (torch.nan_to_num((image.data[0] - low) / (high - low)).clamp(0, 1) for image in pair)
        known = (torch.isfinite(pair[0].data[0]) | torch.isfinite(pair[1].data[0])).to(one.dtype)
        blue = torch.zeros_like(one) if colours == "red-green" else one
        place(axis, look, torch.stack([one, other, blue, known], -1).numpy())
        frame(axis, look, look.place, unit)
    patch = need("patches").Patch
    marks = [patch(facecolor=shade, edgecolor="0.4") for shade in mixed[colours]]
    figure.legend(marks, ["fixed", "warped", "both"], loc="outside lower center", ncols=3)
    return figure


def difference(
    fixed: Image,
    warped: Image,
    *,
    reach: float | None = None,
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """warped − fixed, red where warped is brighter and blue where it is darker, and its root mean square.

    reach : the difference with the strongest colour, default the largest one; give it to compare figures
    at : world point of the slices of 3-D images, default the middle
    """
    if reach is not None and not 0 < reach < float("inf"):
        raise ValueError(f"reach is {reach}: expected a positive difference of intensities")
    fixed, warped = single("fixed", fixed), single("warped", warped)
    change = minus(warped, fixed)
    looks = cuts(fixed.grid, at)
    flat = [look.of(change) for look in looks]
    limit = reach_of(*flat) if reach is None else reach
    told = title or f"warped − fixed, root mean square {root_mean_square(change):.3g}"
    figure, axes = panels(looks, title=None if len(looks) == 1 else told)
    shown: Any = None
    for axis, look, part in zip(axes, looks, flat, strict=True):
        shown = show(axis, look, part, look.place or told, unit, (-limit, limit), DIVERGING)
    figure.colorbar(shown, ax=axes, label="difference to fixed", shrink=0.8)
    return figure


def batch(fixeds: Image, movings: Image, warpeds: Image, count: int = 8, *, title: str | None = None) -> Figure:
    """The first pairs of a batch: fixed, moving, warped and their difference from top to bottom, a pair per column.

    fixeds, movings, warpeds : 2-D, data (B, C, Y, X), or (C, Y, X) for one image that all pairs share
    count : of pairs to show, at most
    """
    sides = {"fixed": fixeds, "moving": movings, "warped": warpeds}
    for name, image in sides.items():
        if image.grid.ndim != 2:
            raise ValueError(f"{name} has {image.grid.ndim} spatial axes: a batch is shown of 2-D images, take a slice")
    sizes = {len(image.data) for image in sides.values() if image.data.ndim == image.grid.ndim + 2}
    if len(sizes) != 1:
        raise ValueError(f"batches have lengths {sorted(sizes)}: expected images of one length, data (B, C, Y, X)")
    count = min(count, sizes.pop())
    if count < 1:
        raise ValueError(f"count is {count}: show at least one pair")
    rows = {name: [single(name, _item(image, number)) for number in range(count)] for name, image in sides.items()}
    window = full_range(*(image for row in rows.values() for image in row))
    reach = window[1] - window[0]
    figure = new_figure(
        0.9 + 1.25 * count, 0.6 + 4 * 1.2 * proportion(*(box_of(image.grid) for image in rows["fixed"]))
    )
    axes = figure.subplots(4, count, squeeze=False)
    bar: Any = None
    for column in range(count):
        fixed = rows["fixed"][column]
        for row, name in enumerate(rows):
            image = rows[name][column]
            show(axes[row, column], cuts(image.grid)[0], image, "", "", window)
        change = minus(rows["warped"][column], fixed)
        bar = show(axes[3, column], cuts(fixed.grid)[0], change, "", "", (-reach, reach), DIVERGING)
        axes[0, column].set_title(f"pair {column}", fontsize=9)
        for row, name in enumerate((*rows, "warped − fixed")):
            axes[row, column].set(xlabel="", ylabel=name if column == 0 else "", xticks=[], yticks=[])
    figure.colorbar(bar, ax=axes[3, :].tolist(), shrink=0.85, aspect=8, pad=0.01)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _item(image: Image, number: int) -> Image:
    """One image of a batch; leaves that all share stay."""
    grid, ranks = image.grid, image.grid.ranks()
    leaves = [getattr(grid, name) for name in ("center", "spacing", "direction")]
    expected = [ranks.center, ranks.spacing, ranks.direction]
    center, spacing, direction = (
        leaf[number] if leaf.ndim > rank else leaf for leaf, rank in zip(leaves, expected, strict=True)
    )
    data = image.data[number] if image.data.ndim == grid.ndim + 2 else image.data
    return Image(data, Grid(grid.size, center=center, spacing=spacing, direction=direction))
