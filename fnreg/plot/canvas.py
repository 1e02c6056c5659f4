"""What the figures share: flat cuts through images, one intensity window, panels in world coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fnreg.extras import require
from fnreg.grid import Grid, Scalars, index_points
from fnreg.image import Image
from fnreg.sampling import interpolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Window = tuple[float, float]
Box = tuple[tuple[float, float], tuple[float, float]]  # lowest x and y, highest x and y

GREY, DIVERGING = "gray", "RdBu_r"
NEUTRAL = "#e8e8e8"  # behind images, so that their borders are seen


def need(module: str) -> Any:
    """A module of matplotlib."""
    return require(f"matplotlib.{module}", "plot", "drawing a figure")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return need("figure").Figure((width, height), layout="constrained")


# -- images ----------------------------------------------------------------------------------------------------------


def single(name: str, image: Image) -> Image:
    """One image of two or three axes in memory, channels averaged; errors call it `name`."""
    if not isinstance(image, Image):
        raise TypeError(f"{name} is {type(image).__name__}: expected an Image")
    if image.grid.ndim not in (2, 3):
        raise ValueError(f"{name} has {image.grid.ndim} spatial axis: figures show images of two or three")
    if image.data.ndim != image.grid.ndim + 1:
        raise ValueError(f"{name} is a batch of {len(image.data)}: take one of its images, or see `batch`")
    if (image.grid.center.ndim, image.grid.spacing.ndim, image.grid.direction.ndim) != (1, 1, 2):
        raise ValueError(f"{name} has a batch of grids: take one of its images, or see `batch`")
    data = image.data.detach().cpu()
    data = data.to(torch.promote_types(data.dtype, torch.float32))
    return Image(data.mean(0, keepdim=True), image.grid.to("cpu"))


def minus(image: Image, fixed: Image) -> Image:
    """The difference of two images on one grid, 0 where it is not a number."""
    check_same_grid(image, fixed)
    return Image(torch.nan_to_num(image.data - fixed.data), fixed.grid)


def check_same_grid(warped: Image, fixed: Image) -> None:
    """ValueError unless both images are on one grid."""
    if warped.grid.ndim != fixed.grid.ndim or not warped.grid.same_as(fixed.grid):
        raise ValueError("warped is not on the grid of fixed: give what `Registration.warp` returns")


def root_mean_square(image: Image) -> float:
    """Over all voxels."""
    return float(image.data.square().mean().sqrt())


def full_range(*images: Image) -> Window:
    """Lowest and highest finite intensity of all images."""
    values = torch.cat([image.data[torch.isfinite(image.data)] for image in images])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def reach_of(*images: Image) -> float:
    """The largest finite absolute intensity of all images, 1 where all are 0."""
    return max(float(image.data.nan_to_num(0, 0, 0).abs().max()) for image in images) or 1.0


def coordinate_lines(grid: Grid, lines: int, samples: int) -> Tensor:
    """World points (L, samples, 2) of lines along both axes of a grid, from border to border."""
    extent = grid.extent
    found: list[Tensor] = []
    along = torch.linspace(-1, 1, samples, dtype=torch.float64)
    for across in (0, 1):
        count = max(2, round((lines - 1) * float(extent[across] / extent.max())) + 1)
        level, run = torch.meshgrid(torch.linspace(-1, 1, count, dtype=torch.float64), along, indexing="ij")
        found.append(torch.stack([level, run] if across == 0 else [run, level], -1))
    cube = torch.cat(found)
    return grid.convert(cube.reshape(-1, 2), "cube", "world").reshape(cube.shape)


# -- cuts ------------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A flat part of the world: what one panel shows.

    grid : 2-D, its pixels in the axes `names`
    place : where it lies, such as "z = 12"; "" where the world is flat
    points : (N, D) the world points of its pixels
    lines : where the other cuts cross it, in the axes `names`
    """

    grid: Grid
    names: tuple[str, str]
    place: str
    points: Tensor
    lines: tuple[float, float] | None = None

    def of(self, image: Image) -> Image:
        """The image on this cut; NaN beyond the borders of its grid."""
        coords = image.grid.world_to_index(self.points).mT  # (D, N)
        near = coords.round()
        whole = (coords - near).abs() < 1e-6
        coords = torch.where(whole, near, coords)
        # At voxel centres the voxels themselves: between them a neighbour that is NaN would spread.
        how = "nearest" if bool(whole.all()) else "linear"
        values = interpolate(image.data, coords.to(image.data.dtype), interpolation=how)  # (1, N)
        count = torch.tensor(image.grid.size, dtype=coords.dtype).unsqueeze(-1)
        inside = ((coords >= -0.5 - 1e-6) & (coords <= count - 0.5 + 1e-6)).all(0)
        return Image(torch.where(inside, values, torch.nan).reshape(1, *self.grid.shape), self.grid)


def cuts(grid: Grid, at: Scalars | None = None) -> list[Cut]:
    """A 2-D grid itself; of a 3-D grid the planes x y, x z and y z of the world through a point, default its centre.

    Where the axes of a grid are those of the world, in any order and sign, the pixels are its voxels, those of the
    layer next to the point.  Raises ValueError for a point outside.
    """
    if grid.ndim == 2:
        if at is not None:
            raise ValueError("at is the point through which 3-D images are cut: leave it out for 2-D images")
        return [Cut(grid, ("x", "y"), "", grid.points())]
    given = grid.center if at is None else torch.as_tensor(at, dtype=torch.float64).detach().cpu()
    if given.shape != (3,):
        raise ValueError(f"at has shape {tuple(given.shape)}: expected one world point (x, y, z)")
    world = upright(grid)
    index = world.world_to_index(given)
    count = torch.tensor(world.size)
    if not bool(((index >= -0.5 - 1e-6) & (index <= count - 0.5 + 1e-6)).all()):
        low, high = (world.center - world.extent / 2).tolist(), (world.center + world.extent / 2).tolist()
        bounds = ", ".join(f"{n} {a:.4g} to {b:.4g}" for n, a, b in zip("xyz", low, high, strict=True))
        raise ValueError(f"at is {given.tolist()}, which is outside of the image: it covers {bounds}")
    # Halfway between two layers the lower one, which rounding must not decide.
    layer = torch.minimum((index + 0.5 - 1e-6).floor().clamp(min=0), count - 1)
    point = world.index_to_world(layer)
    found: list[Cut] = []
    for across, down, through in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        both = [across, down]
        flat = Grid([world.size[k] for k in both], spacing=world.spacing[both], center=world.center[both])
        points = point.repeat(flat.numel, 1)
        points[:, both] = flat.points()
        lines = (float(point[across]), float(point[down]))
        place = f"{'xyz'[through]} = {float(point[through]):.4g}"
        found.append(Cut(flat, ("xyz"[across], "xyz"[down]), place, points, lines))
    return found


def upright(grid: Grid) -> Grid:
    """A 3-D grid along the axes of the world over all of a grid; with its own voxels where its axes are the world's."""
    turned = grid.direction.abs()
    if float((turned - turned.round()).abs().max()) < 1e-6:
        order = turned.argmax(1)
        return Grid([grid.size[k] for k in order.tolist()], spacing=grid.spacing[order], center=grid.center)
    extent = turned @ grid.extent  # of the box around it
    spacing = grid.spacing.min()
    size = [math.ceil(n) for n in (extent / spacing).tolist()]
    return Grid(size, spacing=spacing, center=grid.center)


def box_of(grid: Grid) -> Box:
    """Lowest and highest world x and y of the outer borders of a 2-D grid."""
    corners = index_points((2, 2), torch.float64, grid.center.device)[:-1].T * 2 - 1
    world = grid.convert(corners, "cube", "world")
    low, high = world.amin(0).tolist(), world.amax(0).tolist()
    return (low[0], low[1]), (high[0], high[1])


def around(points: Tensor, *boxes: Box) -> Box:
    """The box around finite points (N, 2) and other boxes, with a little room."""
    known = points[torch.isfinite(points).all(-1)]
    corners = torch.tensor([corner for box in boxes for corner in box], dtype=torch.float64).reshape(-1, 2)
    every = torch.cat([known.to(torch.float64), corners])
    low, high = every.amin(0), every.amax(0)
    room = 0.02 * float((high - low).max())
    left, top, right, bottom = (*(low - room).tolist(), *(high + room).tolist())
    return (left, top), (right, bottom)


def proportion(*boxes: Box) -> float:
    """Height over width of the widest and the highest box together, within what a page can bear."""
    height = max(box[1][1] - box[0][1] for box in boxes)
    width = max(box[1][0] - box[0][0] for box in boxes)
    return min(2.5, max(0.25, height / width))


# -- panels ----------------------------------------------------------------------------------------------------------


def place(axes: Axes, cut: Cut, pixels: Any, **options: Any) -> Any:
    """An array of pixels, (Y, X) or (Y, X, colour), where the cut's grid puts it, with any spacing and direction."""
    shown = axes.imshow(pixels, interpolation="nearest", **options)
    shown.set_transform(need("transforms").Affine2D(cut.grid.affine.cpu().numpy()) + axes.transData)
    return shown


def frame(axes: Axes, cut: Cut, title: str, unit: str, *, box: Box | None = None) -> None:
    """Limits (default: the borders of the cut), equal aspect, names and unit of the world's axes."""
    (left, low), (right, high) = box or box_of(cut.grid)
    down = cut.names[1] == "y"
    axes.set(xlim=(left, right), ylim=(high, low) if down else (low, high), aspect="equal", facecolor=NEUTRAL)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{cut.names[0]} ({unit})")
    axes.set_ylabel(f"{cut.names[1]} ({unit})")
    axes.locator_params(nbins=5)
    if cut.place and unit == "mm":
        _letters(axes, cut)


def _letters(axes: Axes, cut: Cut) -> None:
    """The sides of the patient at the edges of a panel: the world is LPS, x leads to the left and y to the back."""
    sides = {"x": "RL", "y": "AP", "z": "IS"}  # lowest, highest
    across, upright = sides[cut.names[0]], sides[cut.names[1]]
    below, above = upright[::-1] if cut.names[1] == "y" else upright
    edges = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
             (0.5, 0.02, "center", "bottom"), (0.5, 0.98, "center", "top"))  # fmt: skip
    halo = need("patheffects").withStroke(linewidth=2.2, foreground="black")
    for letter, (x, y, horizontal, vertical) in zip((*across, below, above), edges, strict=True):
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=10,
            fontweight="bold", path_effects=[halo],
        )  # fmt: skip


def show(axes: Axes, cut: Cut, image: Image, title: str, unit: str, window: Window, colours: str = GREY) -> Any:
    """An image of the cut in a panel of its own."""
    shown = place(axes, cut, image.data[0].numpy(), cmap=colours, vmin=window[0], vmax=window[1])
    frame(axes, cut, title, unit)
    return shown


def panels(
    looks: Sequence[Cut], *, bar: bool = True, extra: float = 1.2, title: str | None = None
) -> tuple[Figure, list[Any]]:
    """A figure with one panel, or with three beside each other in one scale.

    bar : whether a scale bar will stand beside them; extra : inches for what stands above and below
    """
    boxes = [box_of(look.grid) for look in looks]
    if len(looks) == 1:
        figure = new_figure(6.2, extra + 4.7 * proportion(*boxes))
    else:
        # So high that the widths decide about the scale, which is then one for all.
        highest, total = max(box[1][1] - box[0][1] for box in boxes), sum(box[1][0] - box[0][0] for box in boxes)
        room = 8.6 if bar else 9.6
        figure = new_figure(11.5, extra + (0 if title is None else 0.4) + min(9.0, max(1.0, room * highest / total)))
    widths = [box[1][0] - box[0][0] for box in boxes]
    axes = figure.subplots(1, len(looks), squeeze=False, gridspec_kw={"width_ratios": widths})
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure, axes[0].tolist()
