"""Figures of images by themselves: slices of a 3-D image, the levels of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fnreg.grid import Scalars
from fnreg.image import Image
from fnreg.plot.canvas import box_of, cuts, full_range, new_figure, panels, show, single

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def slices(
    image: Image,
    *,
    at: Scalars | None = None,
    cross: bool = True,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Three orthogonal slices of a 3-D image through a world point, in one scale and one intensity window; a 2-D image.

    The slices are planes of the world, x y, x z and y z.  Where the image's axes are those of the world, in any order,
    they show its voxels, of the layer next to the point; otherwise they interpolate linearly.

    at : (x, y, z) in the world, default the middle of the image; cross : draw where the slices cross

    Raises ValueError for a point outside of the image, and for one through which a 2-D image would be cut.
    """
    image = single("image", image)
    looks = cuts(image.grid, at)
    flat = [look.of(image) for look in looks]
    figure, axes = panels(looks, title=None if len(looks) == 1 else title)
    window = full_range(*flat)
    shown: Any = None
    for axis, look, part in zip(axes, looks, flat, strict=True):
        shown = show(axis, look, part, look.place or title or "", unit, window)
        if cross and look.lines is not None:
            axis.axvline(look.lines[0], color="C1", linewidth=0.7, alpha=0.7)
            axis.axhline(look.lines[1], color="C1", linewidth=0.7, alpha=0.7)
    figure.colorbar(shown, ax=axes, label="intensity", shrink=0.8)
    return figure


def pyramid(images: Sequence[Image], *, unit: str = "world units", title: str | None = None) -> Figure:
    """The levels of a pyramid beside each other, as `Image.pyramid` gives them, in one scale and intensity window.

    Of 3-D levels the three slices through the middle of the first one stand below each other.

    Raises ValueError where there is no level, or where levels differ in dimension.
    """
    levels = [single(f"level {number}", image) for number, image in enumerate(images)]
    if not levels:
        raise ValueError("a pyramid has at least one level: give what `Image.pyramid` returns")
    if len({level.grid.ndim for level in levels}) != 1:
        raise ValueError(f"levels have {[level.grid.ndim for level in levels]} spatial axes: expected one dimension")
    at = None if levels[0].grid.ndim == 2 else levels[0].grid.center
    looks = [cuts(level.grid, at) for level in levels]
    flat = [[look.of(level) for look in own] for own, level in zip(looks, levels, strict=True)]
    boxes = [box_of(look.grid) for look in looks[0]]
    widest = max(box[1][0] - box[0][0] for box in boxes)
    heights = [min(2.5, max(0.25, (box[1][1] - box[0][1]) / widest)) for box in boxes]
    each = min(3.0, 14 / len(levels))
    figure = new_figure(1.2 + each * len(levels), 0.9 + sum((each - 0.3) * height + 0.6 for height in heights))
    axes = figure.subplots(len(boxes), len(levels), squeeze=False, gridspec_kw={"height_ratios": heights})
    window = full_range(*(part for parts in flat for part in parts))
    shown: Any = None
    for column, (own, parts, level) in enumerate(zip(looks, flat, levels, strict=True)):
        told = f"level {column}\n{' × '.join(str(n) for n in level.grid.size)}"
        for row, (look, part) in enumerate(zip(own, parts, strict=True)):
            above = [told] if row == 0 else []
            shown = show(
                axes[row, column], look, part, "\n".join([*above, *([look.place] if look.place else [])]), unit, window
            )
            if column > 0:
                axes[row, column].set(ylabel="")
    figure.colorbar(shown, ax=axes.ravel().tolist(), label="intensity", shrink=0.8)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure
