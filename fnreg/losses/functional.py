"""Similarity measures as plain equations.

All take `warped` and `fixed` (C, ...) of one shape and optional `weights` (1, ...) or (...), and give a scalar
to be minimised.  With weights w, the mean over voxels is sum(w x) / sum(w); where no weight is left it is 0.
Images of two shapes raise ValueError.  Least-squares measures come with a function of residuals r whose squares sum to
the measure.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over voxels and channels: sum(w x) / sum(w) / C, and 0 without weight."""
    if weights is None:
        return values.mean()
    total = weights.sum() * (values.numel() / max(1, weights.numel()))
    return (values * weights).sum() / torch.where(total > 0, total, 1)


def check_images(warped: Tensor, fixed: Tensor) -> None:
    """ValueError where two images, or the labels of two, differ in shape: they would be spread over each other."""
    if warped.shape != fixed.shape:
        raise ValueError(
            f"warped has shape {tuple(warped.shape)} but fixed has {tuple(fixed.shape)}: expected one shape, the same "
            "channels or classes and the same voxels"
        )


def log_above(values: Tensor, floor: float) -> Tensor:
    """log x, which below `floor` goes on as its tangent: finite at 0 and below it, from where it leads back.

    floor : in (0, 1), else ValueError
    """
    if not 0 < floor < 1:
        raise ValueError(f"floor is {floor}: expected a number between 0 and 1")
    least = values.new_tensor(floor)
    # maximum and minimum share the derivative where both are equal, clamp would count it twice
    return torch.log(torch.maximum(values, least)) + (torch.minimum(values, least) - least) / floor


def mse(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error, mean (warped - fixed)^2, in [0, inf).

    >>> import torch
    >>> from fnreg.losses.functional import mse
    >>> mse(torch.zeros(1, 2), torch.ones(1, 2))
    tensor(1.)
    """
    check_images(warped, fixed)
    return mean((warped - fixed).square(), weights)


def mae(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean absolute error, mean |warped - fixed|, in [0, inf); its gradient at equality is 0."""
    check_images(warped, fixed)
    return mean((warped - fixed).abs(), weights)


def huber(warped: Tensor, fixed: Tensor, weights: Tensor | None = None, *, delta: float = 0.1) -> Tensor:
    """Huber's mean: d^2 / 2 for |d| <= delta, else delta (|d| - delta / 2).  Huber 1964, doi 10.1214/aoms/1177703732.

    delta : where the square turns into a straight line, in units of intensity
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}: it must be positive")
    check_images(warped, fixed)
    away = (warped - fixed).abs()
    return mean(torch.where(away <= delta, away.square() / 2, delta * (away - delta / 2)), weights)


def charbonnier(warped: Tensor, fixed: Tensor, weights: Tensor | None = None, *, eps: float = 1e-3) -> Tensor:
    """Charbonnier's mean, mean sqrt(d^2 + eps^2) - eps with d = warped - fixed, in [0, inf).

    A smooth |d|: a parabola d^2 / (2 eps) near 0, of slope below 1 everywhere, so outliers pull with one force.
    Charbonnier et al. 1994, doi 10.1109/ICIP.1994.413553.

    eps : where the parabola turns into a straight line, in units of intensity; positive, else ValueError

    >>> import torch
    >>> from fnreg.losses.functional import charbonnier
    >>> charbonnier(torch.full((1, 2), 4.0), torch.zeros(1, 2), eps=3.0)
    tensor(2.)
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be positive, for |d| has no derivative at 0")
    check_images(warped, fixed)
    square = (warped - fixed).square()
    # The difference of two large numbers, without their rounding.
    return mean(square / ((square + eps**2).sqrt() + eps), weights)


def ncc(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
    """One minus the normalised cross correlation over the image, 1 - cov / sqrt(var var), in [0, 2].

    The mean over channels.  An image that does not vary correlates with nothing: its value is 1, its gradient 0.
    Lewis 1995, "Fast normalized cross-correlation".
    """
    a, b, share, known = _standardise(warped, fixed, weights)
    return torch.where(known, 1 - (share * a * b).sum(1), 1.0).mean()


def _standardise(warped: Tensor, fixed: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (C, N) with weighted mean 0 and variance 1, the weights as shares of one, and which channels vary."""
    check_images(warped, fixed)
    channels = fixed.shape[0]
    share = torch.ones_like(fixed[:1]) if weights is None else weights
    share = share.reshape(1, -1)
    share = share / torch.where(share.sum() > 0, share.sum(), 1)
    units: list[Tensor] = []
    varies: list[Tensor] = []
    for image in (warped, fixed):
        values = image.reshape(channels, -1)
        away = values - (values * share).sum(1, keepdim=True)
        variance = (away.square() * share).sum(1, keepdim=True)
        # Variance below rounding of the values themselves is no variance.
        rounding = (16 * torch.finfo(values.dtype).eps) ** 2 * (values.square() * share).sum(1, keepdim=True)
        enough = ~(variance <= rounding + torch.finfo(values.dtype).tiny)  # NaN stays NaN
        units.append(away / torch.where(enough, variance, 1).sqrt())
        varies.append(enough)
    known = varies[0] & varies[1]  # (C, 1)
    return torch.where(known, units[0], 0), torch.where(known, units[1], 0), share, known.squeeze(1)


# -- residuals, for Gauss-Newton --------------------------------------------------------------------------------


def mse_residuals(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
    """sqrt(w / (C sum w)) (warped - fixed): squares sum to `mse`."""
    check_images(warped, fixed)
    if weights is None:
        return (warped - fixed) * (1 / fixed.numel()) ** 0.5
    total = weights.sum() * (fixed.numel() / weights.numel())
    return (warped - fixed) * (weights / torch.where(total > 0, total, 1)).sqrt()


def ncc_residuals(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
    """sqrt(w / (2 C sum w)) (a - b) of the standardised images: squares sum to `ncc`, so to 1 without variation."""
    a, b, share, known = _standardise(warped, fixed, weights)
    return torch.where(known.unsqueeze(1), (a - b) / 2**0.5, 1) * (share / fixed.shape[0]).sqrt()
