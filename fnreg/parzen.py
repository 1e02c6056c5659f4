"""Joint histograms with cubic B-splines as windows, in plain torch: ranges, windows, sums and their pull-back.

Images are (B, C, N).  A voxel touches 4 x 4 bins, so time and memory grow with the voxels alone: one pass for each of
the 16 bins of a window.  `histogram` chooses between this and the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fnreg import bspline

Weights = Tensor | None

# -- ranges -----------------------------------------------------------------------------------------------------


def enough(weights: Tensor) -> Tensor:
    """The weight (B, 1) from which on a voxel counts in full for the range: a tenth of the greatest one."""
    found = weights.amax(2)
    return torch.where(found > 0, found / 10, 1)


def mean(total: Tensor, moment: Tensor) -> Tensor:
    """moment / total, 0 without any weight."""
    return moment / torch.where(total > 0, total, 1)


def ends(image: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of the voxels that count, (B, C) each.

    A voxel with less than a tenth of the greatest weight is drawn to the mean in proportion, so nothing jumps where
    a voxel gains its first weight.  Infinite without any weight.
    """
    if weights is None:
        return image.amin(2), image.amax(2)
    some = weights > 0
    moment = torch.where(some, weights * image, 0).sum(2, dtype=torch.float64)
    middle = mean(weights.sum(2, dtype=torch.float64), moment).to(image.dtype).unsqueeze(2)
    share = weights / enough(weights).unsqueeze(2)
    drawn = torch.where(share >= 1, image, middle + share * (image - middle))
    return torch.where(some, drawn, torch.inf).amin(2), torch.where(some, drawn, -torch.inf).amax(2)


def scale(low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The least value, and the bins per unit of intensity: 0 for an image without contrast.

    All its voxels then lie at one place and have no derivative there.  A contrast below the rounding of the values
    themselves is none.
    """
    known = torch.finfo(low.dtype)
    spread = high - low
    varies = spread > 16 * known.eps * torch.maximum(low.abs(), high.abs()) + bins * known.tiny
    per_unit = torch.where(varies, (bins - 3) / torch.where(varies, spread, 1), 0)
    return torch.where(low == torch.inf, 0, low), per_unit


# -- windows ----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Where the windows of values lie, (B, C, N) each."""

    start: Tensor  # the first of the four bins
    fraction: Tensor  # from the second of them towards the third
    slope: Tensor  # of the place by the value


def slack(bins: int, dtype: torch.dtype) -> float:
    """How far rounding may lead beyond the ends of a range, in bins."""
    return 16 * torch.finfo(dtype).eps * bins


def _window(image: Tensor, low: Tensor, per_unit: Tensor, weights: Weights, bins: int) -> Window:
    """The fraction of NaN is NaN, unless it has no weight; what is out of range is held at its end."""
    beyond, per_unit = slack(bins, image.dtype), per_unit.unsqueeze(2)
    place = (image - low.unsqueeze(2)) * per_unit
    if weights is not None:
        place = torch.where(torch.isnan(place) & (weights == 0), 0, place)
    kept = place.clamp(-beyond, bins - 3 + beyond)
    start = torch.nan_to_num(kept.detach()).floor().clamp(0, bins - 4)
    outside = (place < -beyond) | (place > bins - 3 + beyond)
    return Window(start.long(), kept - start, torch.where(outside, 0, per_unit))


def _windows(warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, bins: int) -> tuple[Window, Window]:
    a_low, a_scale, b_low, b_scale = scaled.unbind(-1)
    return _window(warped, a_low, a_scale, weights, bins), _window(fixed, b_low, b_scale, weights, bins)


# -- sums -------------------------------------------------------------------------------------------------------


def counted(warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, bins: int) -> Tensor:
    """The histograms (B, C, bins, bins) in float64.

    scaled : (B, C, 4) the least value and the bins per unit, as `scale` gives them, of warped and of fixed
    """
    a, b = _windows(warped, fixed, weights, scaled, bins)
    corner = a.start * bins + b.start
    found = warped.new_zeros(*corner.shape[:2], bins**2, dtype=torch.float64)
    for p, row in enumerate(bspline.weights(a.fraction)):
        row = row if weights is None else row * weights
        for q, column in enumerate(bspline.weights(b.fraction)):
            found = found.scatter_add(2, corner + (p * bins + q), (row * column).to(torch.float64))
    return found.unflatten(2, (bins, bins))


def pulled(by_out: Tensor, warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor) -> tuple[Tensor, ...]:
    """The pull-back of `counted`, by warped, fixed and weights, (B, C, N) each."""
    bins = by_out.shape[-1]
    a, b = _windows(warped, fixed, weights, scaled, bins)
    corner, table = a.start * bins + b.start, by_out.reshape(*by_out.shape[:2], bins**2).to(warped.dtype)
    rows, columns = bspline.weights(a.fraction), bspline.weights(b.fraction)
    steep_rows, steep_columns = bspline.weights(a.fraction, 1), bspline.weights(b.fraction, 1)
    by_warped, by_fixed, by_weights = (torch.zeros_like(corner, dtype=warped.dtype) for _ in range(3))
    for p in range(4):
        for q in range(4):
            entry = table.gather(2, corner + (p * bins + q))
            by_warped = by_warped + entry * steep_rows[p] * columns[q]
            by_fixed = by_fixed + entry * rows[p] * steep_columns[q]
            by_weights = by_weights + entry * rows[p] * columns[q]
    share = 1 if weights is None else weights
    return by_warped * a.slope * share, by_fixed * b.slope * share, by_weights
