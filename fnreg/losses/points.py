"""Distances of points: of landmarks one by one, and of sets without correspondence to what lies closest.

Points are (N, D) in the world, so distances are in world units, and their squares in squared ones.  `mapped_points`
are fixed points under the map, `moving_points` are where they should be.  A point counts by its weight (N,), None for
all alike; one of weight 0 is not there, which lets sets of different length share a batch.  Without any weight the
value is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fnreg.losses.functional import mean

CHUNK = 2**22  # distances that are in memory at once: 32 MB in float64


def landmarks(
    mapped_points: Tensor,
    moving_points: Tensor,
    *,
    fixed_point_weights: Tensor | None = None,
    moving_point_weights: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """Mean squared distance of corresponding points, sum_i w_i |T(p_i) - q_i|^2 / sum_i w_i, in [0, inf).

    w_i : the product of both weights
    delta : if given, Huber's function of the distance instead of its square, d^2 / 2 for d <= delta, else
        delta (d - delta / 2), in world units: wrong landmarks pull no harder than that

    Raises ValueError for lists of different length, and for a delta that is not positive.

    >>> import torch
    >>> from fnreg.losses.points import landmarks
    >>> landmarks(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]]))
    tensor(12.5000)
    """
    if mapped_points.shape != moving_points.shape:
        raise ValueError(
            f"fixed has {mapped_points.shape[0]} points and moving {moving_points.shape[0]}: landmarks correspond one "
            "to one, in this order; for sets without correspondence use closest_points or chamfer"
        )
    weights = fixed_point_weights
    if moving_point_weights is not None:
        weights = moving_point_weights if weights is None else weights * moving_point_weights
    return mean(_cost((mapped_points - moving_points).square().sum(-1), delta), weights)


def closest_points(
    mapped_points: Tensor,
    moving_points: Tensor,
    *,
    moving_normals: Tensor | None = None,
    fixed_point_weights: Tensor | None = None,
    moving_point_weights: Tensor | None = None,
    to_plane: bool = False,
    delta: float | None = None,
) -> Tensor:
    """Mean squared distance to the closest moving point, mean_i min_j |T(p_i) - q_j|^2, in [0, inf).

    Which point is closest counts as known while the derivative is taken.  It sees one way only: moving points that
    nothing is close to cost nothing, see `chamfer`.  Besl and McKay 1992, doi 10.1109/34.121791.

    to_plane : the distance to the plane through the closest point, ((T(p_i) - q_j) . n_j)^2 / |n_j|^2, along which
        surfaces may slide; needs normals of the moving points (M, D).  Chen and Medioni 1992,
        doi 10.1016/0262-8856(92)90066-C
    delta : Huber's function instead of the square, see `landmarks`

    Takes N M distances, of which `CHUNK` are in memory at once.  Raises ValueError for planes without normals.

    >>> import torch
    >>> from fnreg.losses.points import closest_points
    >>> closest_points(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0], [1.0, 1.0], [9.0, 0.0]]))
    tensor(2.)
    """
    index = _closest(mapped_points, moving_points, moving_point_weights)
    away = mapped_points - moving_points[index]
    square = _along(away, moving_normals, index) if to_plane else away.square().sum(-1)
    return mean(_cost(square, delta), _possible(fixed_point_weights, moving_point_weights))


def chamfer(
    mapped_points: Tensor,
    moving_points: Tensor,
    *,
    moving_normals: Tensor | None = None,
    fixed_point_weights: Tensor | None = None,
    moving_point_weights: Tensor | None = None,
    to_plane: bool = False,
    delta: float | None = None,
) -> Tensor:
    """Both ways to the closest point, mean_i min_j |T(p_i) - q_j|^2 + mean_j min_i |T(p_i) - q_j|^2, in [0, inf).

    Options and memory as of `closest_points`; planes are those of the moving points both ways.  Barrow et al. 1977,
    "Parametric correspondence and chamfer matching"; of point sets Fan et al. 2017, doi 10.1109/CVPR.2017.264.
    """
    there = closest_points(
        mapped_points,
        moving_points,
        moving_normals=moving_normals,
        fixed_point_weights=fixed_point_weights,
        moving_point_weights=moving_point_weights,
        to_plane=to_plane,
        delta=delta,
    )
    away = mapped_points[_closest(moving_points, mapped_points, fixed_point_weights)] - moving_points
    square = _along(away, moving_normals) if to_plane else away.square().sum(-1)
    return there + mean(_cost(square, delta), _possible(moving_point_weights, fixed_point_weights))


def _closest(points: Tensor, others: Tensor, weights: Tensor | None) -> Tensor:
    """For each point the number of the closest of the others that have weight, (N,)."""
    points, others = points.detach(), others.detach()
    rows = max(1, CHUNK // max(1, others.shape[0]))
    found: list[Tensor] = []
    for part in points.split(rows):
        distance = torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")
        if weights is not None:
            distance = torch.where(weights > 0, distance, torch.inf)
        found.append(distance.argmin(1))
    return torch.cat(found)


def _along(away: Tensor, normals: Tensor | None, index: Tensor | None = None) -> Tensor:
    """Squared lengths along normals, (N,)."""
    if normals is None:
        raise ValueError("to_plane asks for normals of the moving points: give Subject(image, points=..., normals=...)")
    n = normals if index is None else normals[index]
    size = n.square().sum(-1)
    return (away * n).sum(-1).square() / torch.where(size > 0, size, 1)


def _possible(weights: Tensor | None, others: Tensor | None) -> Tensor | None:
    """The weights, 0 where the other set is empty."""
    if others is None:
        return weights
    there = (others > 0).any().to(others.dtype)
    return there.reshape(1) if weights is None else weights * there


def _cost(square: Tensor, delta: float | None) -> Tensor:
    """The squared distance, or Huber's function of the distance."""
    if delta is None:
        return square
    if not delta > 0:
        raise ValueError(f"delta is {delta}: it must be positive")
    far = square > delta**2
    return torch.where(far, delta * (torch.where(far, square, 1).sqrt() - delta / 2), square / 2)
