"""Overlap of labels: one channel (K, [Z,] Y, X) for each class, in [0, 1], as one-hot and probability maps have them.

A voxel counts by its weight (1, [Z,] Y, X) or ([Z,] Y, X).  The background is what no class holds, 1 - sum_k; as a
class of its own it counts where `background` is true.  With a the warped and b the fixed labels, all are at their
lowest where a = b, for maps that are soft too: smoothing the labels moves no minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu

from fnreg.losses.functional import check_images, log_above, mean


def dice(
    warped_labels: Tensor, fixed_labels: Tensor, weights: Tensor | None = None, *, background: bool = False
) -> Tensor:
    """One minus the mean Dice over classes, 1 - mean_k 2 sum a b / (sum a^2 + sum b^2), in [0, 1].

    For one-hot labels that is 2 |A and B| / (|A| + |B|).  A class that neither image has does not count; without any
    class the value is 0.  The squares are those of Milletari et al. 2016, doi 10.1109/3DV.2016.79: with plain sums soft
    labels would not have their minimum at equality.  Dice 1945, doi 10.2307/1932409.

    >>> import torch
    >>> from fnreg.losses.overlap import dice
    >>> dice(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    tensor(0.5000)
    """
    a, b, w = _flat(warped_labels, fixed_labels, weights, background)
    size = (w * (a.square() + b.square())).sum(1)
    return _mean_over_classes((w * (a - b).square()).sum(1), size)


def tversky(
    warped_labels: Tensor,
    fixed_labels: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    background: bool = False,
) -> Tensor:
    """One minus the mean Tversky index over classes, 1 - mean_k TP / (TP + alpha FP + beta FN), in [0, 1].

    TP = sum min(a, b) is what both have, FP = sum max(a - b, 0) what only the warped labels have and FN what only the
    fixed ones have; for one-hot labels these are the counts.  alpha = beta = 1/2 is Dice, alpha = beta = 1 Jaccard.
    Tversky 1977, doi 10.1037/0033-295X.84.4.327; as a loss Salehi et al. 2017, doi 10.1007/978-3-319-67389-9_44.

    alpha, beta : not negative and not both 0, else ValueError
    """
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise ValueError(f"alpha is {alpha} and beta {beta}: expected numbers that are not negative, nor both 0")
    a, b, w = _flat(warped_labels, fixed_labels, weights, background)
    missed = (w * (alpha * relu(a - b) + beta * relu(b - a))).sum(1)
    return _mean_over_classes(missed, (w * torch.minimum(a, b)).sum(1) + missed)


def cross_entropy(
    warped_labels: Tensor,
    fixed_labels: Tensor,
    weights: Tensor | None = None,
    *,
    background: bool = True,
    floor: float = 0.01,
) -> Tensor:
    """Cross entropy of the fixed relative to the warped labels, mean over voxels of -sum_k b_k log a_k, in [0, inf).

    At equality it is the entropy of b, which is 0 for one-hot labels.

    floor : below this share the logarithm goes on as its tangent, which is finite at 0 and leads back; in (0, 1), else
        ValueError

    >>> import torch
    >>> from fnreg.losses.overlap import cross_entropy
    >>> cross_entropy(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """
    a, b, w = _flat(warped_labels, fixed_labels, weights, background)
    return mean(-(b * log_above(a, floor)).sum(0, keepdim=True), w)


def _flat(warped: Tensor, fixed: Tensor, weights: Tensor | None, background: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (K, N), with the background before them where it counts, and weights (1, N)."""
    check_images(warped, fixed)
    a, b = warped.flatten(1), fixed.flatten(1)
    if background:
        a, b = (torch.cat([1 - part.sum(0, keepdim=True), part]) for part in (a, b))
    return a, b, torch.ones_like(b[:1]) if weights is None else weights.reshape(1, -1)


def _mean_over_classes(parts: Tensor, sizes: Tensor) -> Tensor:
    """The mean of parts / sizes over the classes with a size."""
    there = sizes > 0
    shares = torch.where(there, parts / torch.where(there, sizes, 1), 0)
    return shares.sum() / there.sum().clamp(min=1)
