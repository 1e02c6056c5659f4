"""Borders of labels over the image that they belong to, before and after a registration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.grid import Grid, Scalars
from fnreg.image import Image
from fnreg.plot.canvas import Cut, box_of, cuts, full_range, need, new_figure, proportion, show, single
from fnreg.sampling import interpolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIXED, OTHER = "#00d5ff", "#ff9f1c"  # told apart by eyes that do not tell red from green


def labels(
    fixed: Image,
    fixed_labels: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Borders of the fixed labels and of the moving ones, above before and below after a registration.

    fixed_labels, before, after : (1, [Z,] Y, X) whole numbers on the grid of the fixed image: what is known of it, and
        the moving labels as the world coordinates alone place them and as the registration warps them
    at : world point of the slices of 3-D images, default the middle of what the fixed labels mark

    A border runs between pixels of different labels, so that it is as sharp as they are.  Raises ValueError for labels
    on another grid.
    """
    fixed = single("fixed", fixed)
    sides = {"fixed_labels": fixed_labels, "before": before, "after": after}
    for name, values in sides.items():
        if tuple(values.shape) != (1, *fixed.grid.shape):
            raise ValueError(f"{name} has shape {tuple(values.shape)}: expected {(1, *fixed.grid.shape)} as fixed")
    if at is None and fixed.grid.ndim == 3:
        at = _middle(fixed_labels, fixed.grid)
    looks = cuts(fixed.grid, at)
    flat = [look.of(fixed) for look in looks]
    boxes = [box_of(look.grid) for look in looks]
    widths = [box[1][0] - box[0][0] for box in boxes]
    if len(looks) == 1:
        figure = new_figure(11, 1.2 + 5 * proportion(*boxes))
        axes = figure.subplots(1, 2).reshape(2, 1)
    else:
        highest = max(box[1][1] - box[0][1] for box in boxes)
        figure = new_figure(11.5, 1.2 + 2 * min(9.0, max(1.0, 10.0 * highest / sum(widths)) + 0.6))
        axes = figure.subplots(2, len(looks), gridspec_kw={"width_ratios": widths})
    window = full_range(*flat)
    for row, (name, values) in enumerate((("before", before), ("after", after))):
        for column, (look, part) in enumerate(zip(looks, flat, strict=True)):
            axis = axes[row, column]
            show(axis, look, part, ", ".join(filter(None, [name, look.place])), unit, window)
            _outline(axis, look, fixed_labels, fixed.grid, FIXED)
            _outline(axis, look, values, fixed.grid, OTHER)
    line = need("lines").Line2D
    marks = [line([], [], color=colour) for colour in (FIXED, OTHER)]
    figure.legend(marks, ["fixed labels", "moving labels"], loc="outside lower center", ncols=2)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _middle(values: Tensor, grid: Grid) -> Tensor:
    """The world point in the middle of the box around all labels; that of the grid where there are none."""
    marked = (values[0] != 0).nonzero().to(torch.float64).cpu()
    if not len(marked):
        return grid.center
    return grid.index_to_world(((marked.amin(0) + marked.amax(0)) / 2).flip(0))


def _outline(axes: Axes, look: Cut, values: Tensor, grid: Grid, colour: str) -> None:
    """Lines between the pixels of a cut whose labels differ."""
    coords = grid.world_to_index(look.points).mT
    there = interpolate(values.cpu(), coords, interpolation="nearest", padding="zeros").reshape(look.grid.shape)
    segments: list[Tensor] = []
    for axis in (0, 1):  # rows, columns
        row, column = (there.diff(dim=axis) != 0).nonzero().to(torch.float64).unbind(1)
        if axis == 0:  # the border lies below the pixel
            ends = [(column - 0.5, row + 0.5), (column + 0.5, row + 0.5)]
        else:
            ends = [(column + 0.5, row - 0.5), (column + 0.5, row + 0.5)]
        segments.append(torch.stack([torch.stack(end, 1) for end in ends], 1))  # (N, 2 ends, 2)
    lines = look.grid.index_to_world(torch.cat(segments).reshape(-1, 2)).reshape(-1, 2, 2)
    options: dict[str, Any] = {"colors": colour, "linewidths": 0.9}
    axes.add_collection(need("collections").LineCollection(lines.numpy(), **options), autolim=False)
