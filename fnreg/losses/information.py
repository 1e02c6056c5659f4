"""Similarities by the joint histogram: mutual information, its normalised form, and the correlation ratio.

All take `warped` and `fixed` (C, ...) of one shape and optional `weights` (1, ...) or (...), and give the mean over
channels, a scalar to be minimised.  They ask how well one image foretells the other, not whether the intensities agree,
so they register images of different kinds.

Both images have cubic B-splines as Parzen windows (Thevenaz and Unser 2000, doi 10.1109/83.887976).  A window of order
zero for the fixed image, as in Mattes et al. 2003, doi 10.1109/TMI.2002.803888, spares work where only the other one
moves; but then the measures are not symmetric, have no derivative by the fixed image, which `symmetric=True` and
derivatives through a registration need, and jump where an intensity crosses the border between two bins.

Intensities are counted in bins over the range of each image, channel by channel and pair by pair, among the voxels that
count; of the moving image, that is the range of what is seen of it.  So scale and offset of either image make no
difference.  See `histogram` for how the range is found, and that it is a constant in differentiation.  An image without
contrast foretells nothing: the value is the worst, the derivative 0, and so it is without any weight.

`range` fixes it, one (least, greatest) for both images or two of these, for the moving and for the fixed one.  What
lies beyond is held at its ends, and derivatives are exact, which those through a registration want.

With `samples` only so many voxels are read, one drawn at random from each of as many runs of equal length in memory.
Which ones depends on `seed` and the number of voxels alone.  So they are the same at every step, for the value and the
gradient, and for every pair, alone or in a batch.  An image of no more voxels is read whole, as on coarse levels.  A
voxel that is not read pulls at nothing: this goes with maps of few parameters.  Voxels are drawn without a look at the
weights: where a mask shows a small part of the image, as small a part of them counts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.histogram import Ranges, check, joint_histogram
from fnreg.native import REALS
from fnreg.pytree import constant

Range = tuple[float, float] | Ranges
VARIANCE = 1e-9  # in bins; less is rounding


def mi(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 32,
    range: Range | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Minus the mutual information, -(H(warped) + H(fixed) - H(warped, fixed)) in nats, in [-log bins, 0].

    H = -sum p log p of the joint histogram and of its sums along rows and columns.  Viola and Wells 1997,
    doi 10.1023/A:1007958904918; Maes et al. 1997, doi 10.1109/42.563664.

    bins : of the histogram, at least 4
    range : of intensities, see above; None looks
    samples : voxels that are read, drawn by `seed`, see above; None reads all

    >>> import torch
    >>> from fnreg.losses.information import mi
    >>> ramp = torch.linspace(0, 1, 1000).reshape(1, -1)
    >>> mi((6 * ramp).sin(), ramp) < mi(torch.zeros(1, 1000), ramp)
    tensor(True)
    """
    found = _entropies(_joint(warped, fixed, weights, bins, range, samples, seed))
    return -(found.warped + found.fixed - found.joint).mean().to(warped.dtype)


def nmi(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 32,
    range: Range | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Minus the normalised mutual information, -(H(warped) + H(fixed)) / H(warped, fixed), in [-2, -1].

    It depends less than `mi` on how much the images overlap.  Studholme, Hill and Hawkes 1999,
    doi 10.1016/S0031-3203(98)00091-0.

    bins : of the histogram, at least 4
    range : of intensities, see above; None looks
    samples : voxels that are read, drawn by `seed`, see above; None reads all
    """
    found = _entropies(_joint(warped, fixed, weights, bins, range, samples, seed))
    ratio = (found.warped + found.fixed) / torch.where(found.joint == 0, 1, found.joint)
    # A window alone has an entropy, so only without any weight there is none.
    return -torch.where(found.joint == 0, 1, ratio).mean().to(warped.dtype)


def correlation_ratio(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 32,
    range: Range | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """One minus the correlation ratio, E[Var(warped | fixed)] / Var(warped), in [0, 1].

    The share of the variance of the warped image that its mean in each bin of the fixed image leaves: small where
    warped is some function of fixed, though fixed need not be one of warped.  Roche, Malandain, Pennec and Ayache
    1998, doi 10.1007/BFb0056301.

    bins : of the histogram, at least 4
    range : of intensities, see above; None looks
    samples : voxels that are read, drawn by `seed`, see above; None reads all
    """
    joint = _joint(warped, fixed, weights, bins, range, samples, seed)  # (C, bins of warped, bins of fixed)
    # Moments in bins: cubic windows keep the mean, and add their own variance of 1/3.
    place = torch.arange(bins, dtype=joint.dtype, device=joint.device).unsqueeze(1) - (bins - 1) / 2
    count = joint.sum(1)  # (C, bins of fixed)
    first, second = (joint * place).sum(1), (joint * (place.square() - 1 / 3)).sum(1)
    total = _or_one(count.sum(1))
    within = (second - first.square() / _or_one(count)).sum(1) / total
    whole = second.sum(1) / total - (first.sum(1) / total).square()
    flat = whole < VARIANCE
    return torch.where(flat, 1, within / torch.where(flat, 1, whole)).mean().to(warped.dtype)


class _Entropies(NamedTuple):
    """In nats, (C,) each; all 0 without any weight."""

    warped: Tensor
    fixed: Tensor
    joint: Tensor


def _entropies(joint: Tensor) -> _Entropies:
    """Of a histogram (C, bins, bins) that is not normalised: H = log(total) - sum h log h / total."""
    total = _or_one(joint.sum((1, 2)))

    def entropy(counts: Tensor) -> Tensor:
        return torch.log(total) - (counts * torch.log(_or_one(counts))).sum(1) / total

    return _Entropies(entropy(joint.sum(2)), entropy(joint.sum(1)), entropy(joint.flatten(1)))


def _or_one(counts: Tensor) -> Tensor:
    """1 for what is 0, or below it by rounding; NaN stays NaN."""
    return torch.where(counts <= 0, 1, counts)


def _joint(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None,
    bins: int,
    range: Range | None,
    samples: int | None,
    seed: int,
) -> Tensor:
    """The checked images' histogram (C, bins, bins)."""
    check(warped, fixed, weights, bins)
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        whole = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
        if not (whole or (name == "samples" and value is None)):
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least {least}, and below 2^63")
    kind = warped.dtype if warped.dtype in REALS else torch.float32  # half precision has no room for a histogram
    share = None if weights is None else weights.reshape(1, -1)
    images = warped.flatten(1), fixed.flatten(1)
    count = images[0].shape[1]
    if samples is not None and samples < count:
        index = drawn(count, samples, seed, warped.device)
        images = tuple(image.gather(1, index.expand(len(image), -1)) for image in images)
        share = None if share is None else share.gather(1, index)
    share = None if share is None else share.to(kind)
    return joint_histogram(images[0].to(kind), images[1].to(kind), share, bins=int(bins), ranges=_ranges(range))


def _ranges(given: Range | None) -> Ranges | None:
    """Of warped and of fixed."""
    if given is None:
        return None
    ends: Any = given if isinstance(given, tuple) and given and isinstance(given[0], tuple) else (given, given)
    for pair in ends:
        known = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(end, (int, float)) for end in pair)
        if len(ends) != 2 or not known or not -math.inf < pair[0] < pair[1] < math.inf:
            raise ValueError(
                f"range is {given!r}: expected (least, greatest) of both images, or two of these, of the moving and of "
                "the fixed one"
            )
    return ends


@constant
def drawn(count: int, samples: int, seed: int, device: torch.device) -> Tensor:
    """Places (1, samples) among so many: one of each of `samples` runs, all places of a run alike.

    By a generator of its own on the CPU, so that no other random number changes and every device draws the same.
    """
    bounds = torch.arange(samples + 1, device="cpu") * count // samples
    generator = torch.Generator(device="cpu").manual_seed(seed)
    share = torch.rand(samples, dtype=torch.float64, device="cpu", generator=generator)
    width = bounds.diff()
    return (bounds[:-1] + (share * width).long().clamp(max=width - 1)).unsqueeze(0).to(device)
