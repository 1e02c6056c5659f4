"""How good a registration is by what it did not see: overlap and surfaces of labels, and distance of landmarks.

How regular its map is, folds and the spread of the Jacobian's determinant, tells `fnreg.fields.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fnreg.pytree import is_concrete
from fnreg.surfaces import SurfaceDistances as SurfaceDistances
from fnreg.surfaces import check_integers
from fnreg.surfaces import classes as classes
from fnreg.surfaces import surface_distances as surface_distances
from fnreg.transforms.base import Mapping

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # of which torch finds no least and counts nothing
FEW = 4  # classes: up to so many are compared one by one, which takes the least memory


def dice(first: Tensor, second: Tensor, *, numbers: Sequence[int] | None = None) -> Tensor:
    """Overlap of each class, 2 |A and B| / (|A| + |B|), (K,) float64.

    first, second : labels of one shape, integers
    numbers : the classes; default those that occur, see `classes`.  Inside vmap they must be given

    1 where both agree, 0 where they do not meet, NaN for a class that neither has.  Dice 1945, doi 10.2307/1932409.
    Raises ValueError for shapes that differ, TypeError for what are no integers.

    >>> import torch
    >>> from fnreg import metrics
    >>> metrics.dice(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    tensor([0.6667, 0.6667], dtype=torch.float64)
    """
    both, one, other = _counts(first, second, numbers)
    return 2 * both / (one + other)


def jaccard(first: Tensor, second: Tensor, *, numbers: Sequence[int] | None = None) -> Tensor:
    """Overlap of each class, |A and B| / |A or B|, (K,) float64; the arguments and errors are those of `dice`.

    It is d / (2 - d) of the Dice overlap d.  Jaccard 1912, doi 10.1111/j.1469-8137.1912.tb05611.x.

    >>> import torch
    >>> from fnreg import metrics
    >>> metrics.jaccard(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    both, one, other = _counts(first, second, numbers)
    return both / (one + other - both)


def target_registration_error(mapping: Mapping | None, fixed_points: Tensor, moving_points: Tensor) -> Tensor:
    """|T(p) - q| for landmarks p of the fixed and q of the moving image that belong together, (N,) world units.

    mapping : T, or None for the identity, the error before
    fixed_points, moving_points : (N, D) world, or (B, N, D) for a batch

    Fitzpatrick and West 2001, doi 10.1109/42.952729.  Raises ValueError where the shapes differ.

    >>> import torch
    >>> from fnreg import metrics
    >>> metrics.target_registration_error(None, torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]))
    tensor([5.])
    """
    if fixed_points.shape != moving_points.shape:
        raise ValueError(
            f"fixed_points have shape {tuple(fixed_points.shape)} and moving_points {tuple(moving_points.shape)}: give "
            "pairs, row by row in the same order"
        )
    mapped = fixed_points if mapping is None else mapping.map_points(fixed_points)
    return (mapped - moving_points).norm(dim=-1)


def _counts(first: Tensor, second: Tensor, numbers: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels of each class in both, in the first and in the second, (K,)."""
    if first.shape != second.shape:
        raise ValueError(
            f"labels have shapes {tuple(first.shape)} and {tuple(second.shape)}: warp one to the grid of the other"
        )
    for values in (first, second):
        check_integers(values)
    chosen = classes(first, second) if numbers is None else tuple(numbers)
    if not chosen or not first.numel():
        empty = torch.zeros(len(chosen), dtype=torch.float64, device=first.device)
        return empty, empty, empty
    if len(chosen) > FEW and is_concrete(first) and is_concrete(second):
        return _counted(first, second, chosen)
    found = [[(a & b).sum(), a.sum(), b.sum()] for a, b in ((first == k, second == k) for k in chosen)]
    both, one, other = (torch.stack(column).to(torch.float64) for column in zip(*found, strict=True))
    return both, one, other


def _counted(first: Tensor, second: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass over the voxels, however many classes there are."""
    here, there = (
        values.reshape(-1).to(torch.int64 if values.dtype in UNSIGNED else values.dtype) for values in (first, second)
    )
    low, high = min(int(here.min()), int(there.min())), max(int(here.max()), int(there.max()))
    if low >= 0 and high < 2**20:  # counting needs no sorting then
        known = torch.arange(high + 1, device=here.device)
    else:
        known, at = torch.unique(torch.cat([here, there]), return_inverse=True)
        here, there = at[: len(here)], at[len(here) :]
    wanted = torch.tensor(chosen, dtype=torch.int64, device=here.device)
    place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    there_is = known[place] == wanted
    both, one, other = (
        torch.bincount(values, minlength=len(known))[place] * there_is for values in (here[here == there], here, there)
    )
    return both.to(torch.float64), one.to(torch.float64), other.to(torch.float64)
