"""Error ellipses at points, over the image that these lie in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.grid import Scalars
from fnreg.image import Image
from fnreg.plot.canvas import Cut, cuts, full_range, need, panels, show, single

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOWN, UNKNOWN = "#ffb000", "#ff3b8d"
SIDES = 64  # of the polygon that stands for an ellipse


def ellipses(
    image: Image,
    points: Tensor,
    covariance: Tensor,
    *,
    level: float = 0.95,
    scale: float = 1.0,
    count: int | None = None,
    at: Scalars | None = None,
    slab: float | None = None,
    unit: str = "world units",
    title: str | None = None,
) -> Figure:
    """The ellipses that hold the truth with a probability, around points: p + a q, q^T S^-1 q = -2 log(1 - level).

    image : where the points lie: the moving one for mapped points, the fixed one for those whose map is meant
    points, covariance : (N, D) and (N, D, D) in world units, as `point_covariance` of `laplace` and `ensemble` gives it
    level : probability, of two coordinates together; those of a 3-D ellipse are those that the panel shows
    scale : a, how many times as large as they are the ellipses are drawn, which the title tells
    count : of copies that the covariance was estimated from, of an `Ensemble`: its ellipses are larger, see `limit`
    at : world point of the slices of 3-D images
    slab : a panel of a 3-D image shows the points that are this near to it, default a tenth of the longest side

    A point with infinite variance is a cross.  Raises ValueError where shapes do not fit together, or `count` is not at
    least 2.

    >>> import torch, fnreg
    >>> points = torch.tensor([[8.0, 8.0]])
    >>> figure = fnreg.plot.ellipses(fnreg.data.digits(3)[0], points, torch.eye(2)[None], unit="pixels")
    >>> figure.axes[0].get_title()
    '95 % ellipses'
    """
    image = single("image", image)
    ndim = image.grid.ndim
    points, covariance = (t.detach().cpu().to(torch.float64) for t in (points, covariance))
    if points.ndim != 2 or points.shape[1] != ndim:
        raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {ndim}) world points of the image")
    if tuple(covariance.shape) != (len(points), ndim, ndim):
        raise ValueError(
            f"covariance has shape {tuple(covariance.shape)}: expected {(len(points), ndim, ndim)}, one for each point"
        )
    if not 0 < level < 1 or not 0 < scale < math.inf:
        raise ValueError(
            f"level is {level} and scale {scale}: expected a probability within (0, 1) and a positive scale"
        )
    near = float(image.grid.extent.max()) / 10 if slab is None else slab
    if not near > 0:
        raise ValueError(f"slab is {slab}: expected a positive length")
    radius = scale * math.sqrt(limit(level, count))
    told = f"{100 * level:.4g} % ellipses" + ("" if count is None else f" of {count} copies")
    told += "" if scale == 1 else f", drawn {scale:g} times as large"
    looks = cuts(image.grid, at)
    heading = title if len(looks) == 1 else title or told
    crosses = not bool(torch.isfinite(covariance).all())
    figure, axes = panels(looks, bar=False, extra=1.9 if crosses else 1.4, title=heading)
    flat = [look.of(image) for look in looks]
    window = full_range(*flat)
    for axis, look, part in zip(axes, looks, flat, strict=True):
        show(axis, look, part, look.place or told, unit, window)
        both = ["xyz".index(name) for name in look.names]
        here = _near(points, look, both, near)
        place, shape = points[here][:, both], covariance[here][:, both][:, :, both]
        known = torch.isfinite(shape).all(-1).all(-1)
        _draw(axis, place[known], radius * _root(shape[known]), place[~known])
    if crosses:
        mark = need("lines").Line2D([], [], color=UNKNOWN, marker="x", linestyle="none")
        figure.legend([mark], ["infinite variance, or no registration"], loc="outside lower center")
    return figure


def limit(level: float, count: int | None = None) -> float:
    """The squared length e^T S^-1 e of normal errors e, of two coordinates together, that a share `level` stays below.

    count : n copies of e that S was estimated from, as sum e_i e_i^T / n; None where S is the covariance itself

    It is -2 log(1 - level) of the covariance itself, and 2 n / (n - 1) F of an estimate, F the quantile of Fisher's
    distribution of 2 and n - 1 degrees of freedom, (n - 1) / 2 ((1 - level)^(-2 / (n - 1)) - 1): Hotelling 1931,
    doi 10.1214/aoms/1177732979.  Raises ValueError for less than 2 copies.

    >>> round(limit(0.95), 2), round(limit(0.95, 32), 2), round(limit(0.95, 8), 2)
    (5.99, 6.82, 10.83)
    """
    beyond = math.log1p(-level)
    if count is None:
        return -2 * beyond
    if not count >= 2:
        raise ValueError(f"count is {count}: a covariance is estimated from at least 2 copies")
    return count * math.expm1(-2 / (count - 1) * beyond)


def _near(points: Tensor, look: Cut, both: list[int], slab: float) -> Tensor:
    """Which points a panel shows, (N,)."""
    if points.shape[1] == 2:
        return torch.ones(len(points), dtype=torch.bool)
    through = next(k for k in range(3) if k not in both)
    return (points[:, through] - look.points[0, through]).abs() <= slab


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = S, (N, 2, 2)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def _draw(axis: Any, place: Tensor, root: Tensor, unknown: Tensor) -> None:
    angle = torch.linspace(0, 2 * math.pi, SIDES + 1, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])  # (2, SIDES + 1)
    lines = place.unsqueeze(1) + (root @ circle).mT  # (N, SIDES + 1, 2)
    made = need("collections").LineCollection(list(lines.numpy()), colors=KNOWN, linewidths=1.1, label="ellipses")
    axis.add_collection(made, autolim=False)
    axis.plot(*place.mT.numpy(), ".", color=KNOWN, markersize=2.5, scalex=False, scaley=False)
    axis.plot(*unknown.mT.numpy(), "x", color=UNKNOWN, markersize=6, scalex=False, scaley=False)
