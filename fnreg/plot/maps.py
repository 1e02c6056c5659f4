"""Figures of maps and of fields: deformed coordinate lines, arrows, colour wheel, Jacobian determinant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.grid import Grid, Scalars
from fnreg.image import Image
from fnreg.plot.canvas import (
    DIVERGING,
    GREY,
    Box,
    around,
    box_of,
    coordinate_lines,
    cuts,
    frame,
    full_range,
    need,
    new_figure,
    panels,
    place,
    proportion,
    single,
)
from fnreg.pytree import batch_axes
from fnreg.registration import Registration
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDED = "#ffe100"
MOST = 8.0  # the largest ratio that the colours of `jacobian` tell apart on their own account


def _of(value: Mapping | Registration, grid: Grid | None = None) -> tuple[Mapping, Grid]:
    """One 2-D mapping, and where it is drawn: the grid, or the fixed image's, or the mapping's domain."""
    mapping = value.mapping if isinstance(value, Registration) else value
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping is {type(value).__name__}: expected a Mapping or a Registration")
    if grid is None:
        grid = value.fixed_grid if isinstance(value, Registration) else first_domain(mapping.domain)
    if grid.ndim != 2 or first_domain(mapping.domain).ndim != 2:
        ndim = first_domain(mapping.domain).ndim
        raise ValueError(f"mapping has {ndim} spatial axes, its grid {grid.ndim}: this figure draws 2-D maps")
    axes = batch_axes("mapping", mapping, mapping.ranks())[0] + batch_axes("grid", grid, grid.ranks())[0]
    if 0 in axes:
        raise ValueError("mapping is a batch of maps: this figure draws one of them")
    return mapping, grid


def _mapped(mapping: Mapping, points: Tensor) -> Tensor:
    """World points (..., 2) mapped, float64 in memory."""
    device = first_domain(mapping.domain).center.device
    moved = mapping.map_points(points.reshape(-1, 2).to(device))
    return moved.detach().cpu().to(torch.float64).reshape(points.shape)


def _below(axes: Any, image: Image | None) -> list[Box]:
    """Draw an image under everything else, and say where it is."""
    if image is None:
        return []
    image = single("image", image)
    if image.grid.ndim != 2:
        raise ValueError("image has 3 spatial axes: this figure draws 2-D images")
    low, high = full_range(image)
    place(axes, cuts(image.grid)[0], image.data[0].numpy(), cmap=GREY, vmin=low, vmax=high)
    return [box_of(image.grid)]


def warped_grid(
    mapping: Mapping | Registration,
    grid: Grid | None = None,
    *,
    lines: int = 29,
    size: int = 512,
    image: Image | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """The coordinate lines of the fixed image where the map takes them, T(lines), as smooth curves.

    Every line is mapped at many points, so a map of 28 x 28 pixels is as fine as one of 512 x 512.  T takes fixed to
    moving points: what the lines show is the place in the moving image from which each part of the warped image comes.
    The dashed frame is the border of the fixed image before.

    mapping : of 2-D points, linear or not
    grid : whose coordinate lines these are, default the fixed grid of a `Registration` or the mapping's domain
    lines : along the longer side, borders included; the other side has lines at the same distance
    size : of the panel's longer side, in pixels of a picture saved with 100 dots per inch
    image : drawn underneath; the moving image fits to the lines

    Raises ValueError for a map that is not 2-D, for a batch, and for one without a finite point.

    >>> import fnreg
    >>> figure = fnreg.plot.warped_grid(fnreg.data.brain_truth(), image=fnreg.data.brain()[1], unit="mm")
    >>> figure.axes[0].get_xlabel()
    'x (mm)'
    """
    if lines < 2 or size < 16:
        raise ValueError(f"lines is {lines} and size {size}: expected at least 2 lines and 16 pixels")
    found, grid = _of(mapping, grid)
    grid = grid.to("cpu")
    curves = _mapped(found, coordinate_lines(grid, lines, size))
    if not bool(torch.isfinite(curves).all(-1).any()):
        raise ValueError("the map takes no point of the grid to a finite point: there is nothing to draw")
    border = coordinate_lines(grid, 2, 2).reshape(-1, 2)
    boxes = [box_of(image.grid)] if isinstance(image, Image) and image.grid.ndim == 2 else []
    box = around(torch.cat([curves.reshape(-1, 2), border]), *boxes)
    figure, axes = _canvas(box, size)
    _below(axes, image)
    collections = need("collections")
    axes.add_collection(
        collections.LineCollection(
            list(coordinate_lines(grid, 2, 2).numpy()), colors="0.6", linewidths=1.0, linestyles=(0, (4, 3))
        )
    )
    colour = "#1f4e8c" if image is None else "#ffb000"
    axes.add_collection(
        collections.LineCollection(list(curves.numpy()), colors=colour, linewidths=0.9, capstyle="round", label="lines")
    )
    frame(axes, cuts(grid)[0], title or f"T(lines), {type(found.transform).__name__}", unit, box=box)
    if image is None:
        axes.set_facecolor("white")
    return figure


def _canvas(box: Box, size: int, *, beside: float = 0.0) -> tuple[Figure, Any]:
    """A figure with one panel whose longer side has about `size` pixels."""
    ratio = proportion(box)
    width, height = (size, size * ratio) if ratio <= 1 else (size / ratio, size)
    figure = new_figure(width / 100 + 0.9 + beside, height / 100 + 1.0)
    return figure, figure.subplots()


def quiver(
    mapping: Mapping | Registration,
    grid: Grid | None = None,
    *,
    arrows: int = 24,
    scale: float = 1.0,
    image: Image | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """Arrows from points p to T(p), in world units, coloured by their length |T(p) - p|.

    grid : the part of the world to show, default the fixed grid of a `Registration` or the mapping's domain
    arrows : along the longer side; the other side has arrows at the same distance
    scale : how many times as long as the displacement the arrows are drawn
    image : drawn underneath; the fixed image fits to where the arrows start

    Raises ValueError for a map that is not 2-D and for a batch.
    """
    if arrows < 1 or not 0 < scale < math.inf:
        raise ValueError(f"arrows is {arrows} and scale {scale}: expected at least one arrow and a positive scale")
    found, where = _of(mapping, grid)
    where = where.to("cpu")
    step = float(where.extent.max()) / arrows
    coarse = where.resize([max(1, round(float(length) / step)) for length in where.extent])
    starts = coarse.points()
    vectors = _mapped(found, starts) - starts
    boxes = [box_of(where)]
    boxes += [box_of(image.grid)] if isinstance(image, Image) and image.grid.ndim == 2 else []
    box = around(starts + scale * vectors, *boxes)
    figure, axes = _canvas(box, 512, beside=0.9)
    _below(axes, image)
    length = vectors.norm(dim=-1)
    shown = axes.quiver(
        *starts.mT.numpy(),
        *vectors.mT.numpy(),
        length.numpy(),
        angles="xy",
        scale_units="xy",
        scale=1 / scale,
        width=0.0035,
        cmap="viridis" if image is None else "plasma",
    )
    shown.set_clim(0, float(length.nan_to_num(0, 0, 0).max()) or 1.0)
    told = "displacement" if scale == 1 else f"displacement, drawn {scale:g} times as long"
    frame(axes, cuts(where)[0], title or told, unit, box=box)
    if image is None:
        axes.set_facecolor("white")
    figure.colorbar(shown, ax=axes, label=f"length ({unit})", shrink=0.8)
    return figure


def flow(
    displacement: Tensor,
    grid: Grid,
    *,
    limit: float | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """A 2-D displacement in colours: the hue is its direction, the saturation its length; white does not move.

    The wheel beside it is the key: a vector from its middle to a point has the colour of that point.

    displacement : (2, Y, X) world vectors at the voxels of a grid, such as `mapping.displacement(grid)`
    limit : the length with the full colour, default the largest; give it to compare figures

    Raises ValueError where the shapes of field and grid differ, or the field is not 2-D.
    """
    if grid.ndim != 2 or tuple(displacement.shape) != (2, *grid.shape):
        raise ValueError(
            f"displacement has shape {tuple(displacement.shape)} and the grid {grid.shape}: expected a 2-D field "
            "(2, Y, X) on its grid"
        )
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"limit is {limit}: expected a positive length in world units")
    field = displacement.detach().cpu().to(torch.float64)
    length = field.norm(dim=0)
    reach = (float(length.nan_to_num(0, 0, 0).max()) or 1.0) if limit is None else limit
    look = cuts(grid.to("cpu"))[0]
    box = box_of(look.grid)
    figure = new_figure(7.2, 0.9 + 4.9 * proportion(box))
    axes, key = figure.subplots(1, 2, gridspec_kw={"width_ratios": [5, 1.3]})
    place(axes, look, _wheel_colours(field / reach))
    frame(axes, look, title or f"displacement, longest {float(length.nan_to_num(0, 0, 0).max()):.3g} {unit}", unit)
    _draw_wheel(key, reach, unit)
    return figure


def _wheel_colours(vectors: Tensor) -> Any:
    """RGBA (Y, X, 4) of vectors (2, Y, X): hue by direction, saturation by length up to 1; NaN is transparent."""
    known = torch.isfinite(vectors).all(0)
    x, y = torch.where(known, vectors, 0)
    hue = (torch.atan2(y, x) / (2 * math.pi)).remainder(1)
    saturation = torch.hypot(x, y).clamp(max=1)
    colours = need("colors").hsv_to_rgb(torch.stack([hue, saturation, torch.ones_like(hue)], -1).numpy())
    return torch.cat([torch.from_numpy(colours), known.unsqueeze(-1).to(torch.float64)], -1).numpy()


def _draw_wheel(axes: Any, reach: float, unit: str) -> None:
    side = torch.linspace(-1, 1, 201, dtype=torch.float64)
    y, x = torch.meshgrid(side, side, indexing="ij")
    disc = torch.stack([x, y])
    disc = torch.where(disc.norm(dim=0) <= 1, disc, torch.nan)
    axes.imshow(_wheel_colours(disc), extent=(-reach, reach, reach, -reach), interpolation="bilinear")
    axes.set(aspect="equal", anchor="C", xlim=(-reach, reach), ylim=(reach, -reach))
    axes.set_xticks([-reach, 0, reach], [f"{-reach:.2g}", "0", f"{reach:.2g}"], fontsize=8)
    axes.set_yticks([-reach, 0, reach], [f"{-reach:.2g}", "0", f"{reach:.2g}"], fontsize=8)
    axes.set_title(f"key ({unit})", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def jacobian(
    determinant: Image | Tensor,
    grid: Grid | None = None,
    *,
    limit: float | None = None,
    at: Scalars | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """The Jacobian determinant J of a map: white at 1, red where J > 1 and blue where J < 1, alike for J and 1 / J.

    Where J <= 0 the map folds, which is shown in yellow.  The title tells the range and the share of folded voxels.

    determinant : an `Image`, or a tensor ([1,] [Z,] Y, X) beside its grid
    limit : the ratio with the strongest colour, default the largest of J and 1 / J, at most 8; give it to compare
    at : world point of the slices of 3-D images, default the middle

    Raises ValueError where tensor and grid do not fit.
    """
    if limit is not None and not 1 < limit < math.inf:
        raise ValueError(f"limit is {limit}: expected a ratio greater than 1")
    image = single("determinant", _determinant(determinant, grid))
    known = image.data[torch.isfinite(image.data)].to(torch.float64)
    positive = known[known > 0]
    if limit is None:
        ratio = torch.maximum(positive, 1 / positive).max() if len(positive) else torch.ones(())
        limit = min(MOST, max(1.01, float(ratio)))
    colours = need("colors")
    norm = colours.LogNorm(1 / limit, limit)
    looks = cuts(image.grid, at)
    told = _told(known)
    heading = "\n".join([title, told] if title else ["Jacobian determinant", told])
    folds = bool((known <= 0).any())
    figure, axes = panels(looks, extra=1.9 if folds else 1.4, title=None if len(looks) == 1 else heading)
    shown: Any = None
    for axis, look in zip(axes, looks, strict=True):
        part = look.of(image).data[0]
        shown = place(axis, look, torch.where(part > 0, part, torch.nan).numpy(), cmap=DIVERGING, norm=norm)
        folded = torch.where(part <= 0, 1.0, torch.nan)
        place(axis, look, folded.numpy(), cmap=colours.ListedColormap([FOLDED]), vmin=0, vmax=1)
        frame(axis, look, look.place or heading, unit)
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    beyond = bool((positive < 1 / limit * (1 - 1e-9)).any()), bool((positive > limit * (1 + 1e-9)).any())
    bar = figure.colorbar(shown, ax=axes, label="volume ratio", shrink=0.8, extend=ends[beyond])
    steps = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(steps, labels=[f"{step:.3g}" for step in steps])
    bar.minorticks_off()
    if folds:
        mark = need("patches").Patch(facecolor=FOLDED, edgecolor="0.4")
        figure.legend([mark], ["folded (≤ 0)"], loc="outside lower center")
    return figure


def _determinant(determinant: Image | Tensor, grid: Grid | None) -> Image:
    if isinstance(determinant, Image):
        if grid is not None:
            raise ValueError("determinant is an Image, which has a grid: leave out the other grid")
        image = determinant
    elif not isinstance(determinant, Tensor):
        raise TypeError(f"determinant is {type(determinant).__name__}: expected an Image, or a tensor beside its grid")
    elif grid is None:
        raise ValueError("determinant is a tensor: give the grid on which it lies as well")
    else:
        image = Image(determinant.unsqueeze(0) if determinant.ndim == grid.ndim else determinant, grid)
    if image.data.ndim == image.grid.ndim + 1 and image.channels != 1:
        raise ValueError(f"determinant has {image.channels} channels: expected one number per voxel")
    return image


def _told(values: Tensor) -> str:
    if len(values) == 0:
        return "no finite value"
    folded = float((values <= 0).double().mean())
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}, folded {100 * folded:.3g} %"
