"""Figures of a registration, of 2-D images, with matplotlib of the extra `plot`.

Every function returns a matplotlib `Figure` of its own, tied to no window: `figure.savefig("overview.png")`, or let a
notebook show it.  Axes are in world coordinates, x to the right and y down, as pictures are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.registration import Registration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Window = tuple[float, float]

_GREY, _DIVERGING = "gray", "RdBu_r"
_NEUTRAL = "#e8e8e8"  # behind images, so that their borders are seen


def _figure(width: float, height: float) -> Figure:
    return require("matplotlib.figure", "plot", "drawing a figure").Figure((width, height), layout="constrained")


def _flat(name: str, image: Image) -> Image:
    """One channel of one 2-D image, in memory."""
    if not isinstance(image, Image):
        raise TypeError(f"{name} is {type(image).__name__}: expected an Image")
    if image.grid.ndim != 2:
        raise ValueError(f"{name} has {image.grid.ndim} spatial axes: figures show 2-D images, take a slice")
    if image.data.ndim != 3:
        raise ValueError(f"{name} is a batch of {len(image.data)}: take one of its images, or see `batch`")
    shown = image.to("cpu")
    return Image(shown.data.detach().to(torch.float64).mean(0, keepdim=True), shown.grid)


def _window(*images: Image) -> Window:
    """Lowest and highest finite intensity of all images."""
    values = torch.cat([image.data[torch.isfinite(image.data)] for image in images])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _proportion(*images: Image) -> float:
    """Height over width of the widest and the highest image together, within what a page can bear."""
    boxes = [_box(image.grid) for image in images]
    height = max(box[1][1] - box[0][1] for box in boxes)
    width = max(box[1][0] - box[0][0] for box in boxes)
    return min(2.5, max(0.25, height / width))


def _box(grid: Grid) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest world x and y of the grid's outer borders."""
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    world = grid.convert(corners, "cube", "world")
    low, high = world.amin(0).tolist(), world.amax(0).tolist()
    return (low[0], low[1]), (high[0], high[1])


def _show(axes: Axes, image: Image, title: str, unit: str, window: Window, colours: str = _GREY) -> Any:
    """An image where its grid puts it, with any spacing and direction."""
    transforms = require("matplotlib.transforms", "plot", "drawing a figure")
    shown = axes.imshow(image.data[0].numpy(), cmap=colours, vmin=window[0], vmax=window[1], interpolation="nearest")
    shown.set_transform(transforms.Affine2D(image.grid.affine.numpy()) + axes.transData)
    (left, top), (right, bottom) = _box(image.grid)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", facecolor=_NEUTRAL)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"x ({unit})")
    axes.set_ylabel(f"y ({unit})")
    axes.locator_params(nbins=5)
    return shown


def overview(
    fixed: Image, moving: Image, warped: Image, *, unit: str = "world units", title: str | None = None
) -> Figure:
    """Fixed, moving and warped image in one intensity window, and the differences to fixed before and after.

    fixed, moving, warped : (C, Y, X), channels are averaged; warped lies on the grid of fixed, as `Registration.warp`
        gives it.  Before is the moving image as the world coordinates alone place it
    unit : of the world coordinates, for the labels; title : above all of it
    """
    fixed, moving, warped = _flat("fixed", fixed), _flat("moving", moving), _flat("warped", warped)
    before = _difference(moving.resample(fixed.grid, padding="zeros"), fixed)
    after = _difference(warped, fixed)
    window = _window(fixed, moving, warped)
    figure = _figure(11, 1.2 + 2 * 3.1 * _proportion(fixed, moving))
    axes = figure.subplot_mosaic([["fixed", "moving", "warped"], ["bars", "before", "after"]])
    grey = _show(axes["fixed"], fixed, "fixed", unit, window)
    _show(axes["moving"], moving, "moving", unit, window)
    _show(axes["warped"], warped, "warped", unit, window)
    reach = max(float(before.data.abs().max()), float(after.data.abs().max())) or 1.0
    told = [f"{name}\nroot mean square {_root_mean_square(image):.3g}" for name, image in _named(before, after)]
    _show(axes["before"], before, told[0], unit, (-reach, reach), _DIVERGING)
    red = _show(axes["after"], after, told[1], unit, (-reach, reach), _DIVERGING)
    axes["bars"].set_axis_off()
    for shown, label, place in ((grey, "intensity", 0.72), (red, "difference to fixed", 0.32)):
        bar = axes["bars"].inset_axes((0.08, place, 0.84, 0.07))
        figure.colorbar(shown, cax=bar, orientation="horizontal", label=label)
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return figure


def _difference(image: Image, fixed: Image) -> Image:
    if not image.grid.same_as(fixed.grid):
        raise ValueError("warped is not on the grid of fixed: give what `Registration.warp` returns")
    return Image(torch.nan_to_num(image.data - fixed.data), fixed.grid)


def _named(before: Image, after: Image) -> list[tuple[str, Image]]:
    return [("moving − fixed, before", before), ("warped − fixed, after", after)]


def _root_mean_square(image: Image) -> float:
    return float(image.data.square().mean().sqrt())


def checkerboard(
    fixed: Image, warped: Image, tiles: int = 8, *, unit: str = "world units", title: str | None = None
) -> Figure:
    """Tiles of the fixed and of the warped image in turn: where they fit, edges run on from tile to tile.

    tiles : along the longer side
    """
    if tiles < 2:
        raise ValueError(f"tiles is {tiles}: expected at least 2")
    fixed, warped = _flat("fixed", fixed), _flat("warped", warped)
    _difference(warped, fixed)
    side = max(1.0, max(fixed.grid.size) / tiles)
    rows, columns = (torch.arange(n).div(side, rounding_mode="floor") for n in fixed.grid.shape)
    odd = (rows[:, None] + columns) % 2 == 1
    mixed = Image(torch.where(odd, warped.data, fixed.data), fixed.grid)
    figure = _figure(6.2, 0.8 + 4.7 * _proportion(fixed))
    axes = figure.subplots()
    shown = _show(axes, mixed, title or f"{tiles} tiles of fixed and warped in turn", unit, _window(fixed, warped))
    columns, rows = (torch.arange(1, int((n - 1) // side) + 1) * side for n in fixed.grid.size)
    lines: dict[str, Any] = {"colors": "C1", "linewidth": 0.6, "alpha": 0.6, "transform": shown.get_transform()}
    axes.vlines(columns.ceil() - 0.5, -0.5, fixed.grid.size[1] - 0.5, **lines)
    axes.hlines(rows.ceil() - 0.5, -0.5, fixed.grid.size[0] - 0.5, **lines)
    figure.colorbar(shown, ax=axes, label="intensity", shrink=0.8)
    return figure


def losses(result: Registration, *, objective: str = "objective") -> Figure:
    """The course of the objective, one curve per level, coarse to fine, stage after stage.

    For a batch: the median of the pairs and the band that holds the middle 80 % of them; a pair that has ended keeps
    its last value.

    objective : what the vertical axis is called
    """
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    stages = len({trace.stage for trace in result.history})
    begin = 0
    lowest = float("inf")
    for number, trace in enumerate(result.history):
        values = trace.value.detach().cpu().to(torch.float64)
        values = values if values.ndim == 2 else values.unsqueeze(0)  # (B, steps)
        ran = torch.isfinite(values).any(0)
        if not bool(ran.any()):
            continue
        values = _kept(values[:, : int(ran.nonzero().max()) + 1])
        middle, low, high = (torch.nanquantile(values, q, dim=0) for q in (0.5, 0.1, 0.9))
        steps = torch.arange(begin, begin + values.shape[1])
        name = f"level {trace.level}" + {0: ", full resolution"}.get(trace.level, f", 1/{2**trace.level}")
        name = name if stages == 1 else f"stage {trace.stage + 1}, {name}"
        axes.plot(steps, middle, color=f"C{number}", label=name, linewidth=1.8)
        if len(values) > 1:
            axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        begin += values.shape[1]
        lowest = min(lowest, float(low.nan_to_num(torch.inf).min()))
    many = result.status.ndim > 0
    if 0 < lowest < float("inf"):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=objective)
    axes.set_title(
        f"Course of {len(result.status)} pairs: median and middle 80 %" if many else "Course of the registration"
    )
    axes.grid(alpha=0.3, which="both")
    if begin:
        axes.legend()
    return figure


def _kept(values: Tensor) -> Tensor:
    """Values (B, steps) in which NaN is replaced by the last value before it."""
    last = torch.where(torch.isfinite(values), torch.arange(values.shape[1]), 0).cummax(1).values
    return values.gather(1, last)


def search(
    angles_degrees: Sequence[float] | Tensor,
    values: Sequence[float] | Tensor,
    best: float | None = None,
    *,
    objective: str = "objective",
    others: dict[str, tuple[float, float]] | None = None,
) -> Figure:
    """Values of an objective over angles, with the lowest one marked.

    best : the angle to mark, in degrees; default: that of the lowest value
    others : more points to mark, by name: (angle in degrees, value)
    """
    angles = torch.as_tensor(angles_degrees, dtype=torch.float64).detach().cpu()
    found = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if angles.ndim != 1 or angles.shape != found.shape or len(angles) == 0:
        raise ValueError(
            f"angles have shape {tuple(angles.shape)} and values {tuple(found.shape)}: expected one of each"
        )
    nearest = int(found.nan_to_num(torch.inf).argmin() if best is None else (angles - best).abs().argmin())
    at, lowest = float(angles[nearest]) if best is None else best, float(found[nearest])
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    axes.plot(angles, found, linewidth=1.8, label=f"{len(angles)} angles")
    axes.axvline(at, color="C3", linewidth=1, linestyle=":")
    axes.plot([at], [lowest], "o", color="C3", markersize=8, label=f"best: {at:.1f}°")
    for number, (name, (angle, value)) in enumerate((others or {}).items()):
        shape: dict[str, Any] = {
            "marker": "sD^v"[number % 4],
            "markersize": 10 + 4 * number,
            "markeredgewidth": 2,
            "fillstyle": "none",
        }
        axes.plot([angle], [value], color=f"C{number + 1}", linestyle="none", label=name, **shape)
    axes.set(xlabel="angle (degrees)", ylabel=objective, title="Search over the angle of rotation")
    if float(angles.max() - angles.min()) > 180:
        axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot", "drawing a figure").MultipleLocator(45))
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def batch(fixeds: Image, movings: Image, warpeds: Image, count: int = 8, *, title: str | None = None) -> Figure:
    """The first pairs of a batch: fixed, moving, warped and their difference from top to bottom, a pair per column.

    fixeds, movings, warpeds : data (B, C, Y, X), or (C, Y, X) for one image that all pairs share
    count : of pairs to show, at most
    """
    sides = {"fixed": fixeds, "moving": movings, "warped": warpeds}
    sizes = {len(image.data) for image in sides.values() if image.data.ndim == image.grid.ndim + 2}
    if len(sizes) != 1:
        raise ValueError(f"batches have lengths {sorted(sizes)}: expected images of one length, data (B, C, Y, X)")
    count = min(count, sizes.pop())
    if count < 1:
        raise ValueError(f"count is {count}: show at least one pair")
    rows = {name: [_flat(name, _item(image, number)) for number in range(count)] for name, image in sides.items()}
    window = _window(*(image for row in rows.values() for image in row))
    reach = window[1] - window[0]
    figure = _figure(0.9 + 1.25 * count, 0.6 + 4 * 1.2 * _proportion(*rows["fixed"]))
    axes = figure.subplots(4, count, squeeze=False)
    bar: Any = None
    for column in range(count):
        fixed = rows["fixed"][column]
        for row, name in enumerate(rows):
            _show(axes[row, column], rows[name][column], "", "", window)
        change = Image(rows["warped"][column].data - fixed.data, fixed.grid)
        bar = _show(axes[3, column], change, "", "", (-reach, reach), _DIVERGING)
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
