"""How the boxes of two grids lie to each other in the world."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fnreg.grid import Grid


def gap(a: Grid, b: Grid) -> float:
    """How far two grids are apart, in world units: 0 where their boxes, border to border, touch or overlap.

    The largest distance between the shadows of both boxes on a line across a face of one, or across an edge of each, or
    on that through their middles.
    For boxes it is positive just where they do not meet (separating axes; S. Gottschalk et al. 1996,
    doi:10.1145/237170.237244), and never more than their distance.

    >>> from fnreg import Grid
    >>> gap(Grid((4, 4)), Grid((4, 4), origin=(10.0, 0.0)))
    6.0
    """
    if torch.equal(a.center, b.center):
        return 0.0
    axes = [grid.direction.T.unbind() for grid in (a, b)]
    lines = [*axes[0], *axes[1], b.center - a.center]
    if a.ndim == 3:
        lines += [torch.linalg.cross(one, other) for one, other in itertools.product(*axes)]
    worst = 0.0
    for line in lines:
        length = line.norm()
        if length < 1e-6:  # parallel edges: the faces tell; one middle
            continue
        across = line / length
        away = ((b.center - a.center) @ across).abs() - _half(a, across) - _half(b, across)
        worst = max(worst, float(away))
    return worst


def _half(grid: Grid, line: Tensor) -> Tensor:
    """Half of the length of a box's shadow."""
    return ((grid.direction.T @ line).abs() * grid.extent / 2).sum()
