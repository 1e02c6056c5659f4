"""Which classes labels have, and how far the surfaces of these are apart, with the extra `itk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.pytree import is_concrete


class SurfaceDistances(NamedTuple):
    """Of each class, (K,) float64 in world units; NaN where one side does not have it.

    mean : over the surface voxels of both sides; p95 : the larger of the 95th percentiles of both directions;
    hausdorff : the largest distance
    """

    mean: Tensor
    p95: Tensor
    hausdorff: Tensor


def classes(*labels: Tensor) -> tuple[int, ...]:
    """The numbers that occur in any of the label images, in increasing order, without the background 0.

    Raises TypeError for what are no integers; ValueError inside vmap, where values cannot be read.
    """
    for values in labels:
        check_integers(values)
        if not is_concrete(values):
            raise ValueError("labels inside vmap: which numbers occur cannot be read there; give numbers")
    found = {int(number) for values in labels for number in torch.unique(values).tolist()}
    return tuple(sorted(found - {0}))


def check_integers(labels: Tensor) -> None:
    """TypeError for labels that are no integers."""
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels are {labels.dtype}: expected integers, one number for each class")


def surface_distances(
    first: Tensor, second: Tensor, grid: Grid, *, numbers: Sequence[int] | None = None
) -> SurfaceDistances:
    """Distances between the surfaces of each class in two label images.

    d(a, B) = min over b in B of |a - b| for the surface voxels a in A of one side and B of the other: the centres of
    those voxels of a class with a neighbour, across a face, that is of another class or outside of the image.  With all
    d(a, B) and d(b, A) the mean is (sum d(a, B) + sum d(b, A)) / (|A| + |B|), and the Hausdorff distance the largest.
    Voxels count alike, whatever the area of the surface in them.

    first, second : integers ([1,] [Z,] Y, X) on `grid`, of 2 or 3 axes
    numbers : the classes; default those that occur but for the background 0

    Distances are exact between centres: Maurer et al. 2003, doi 10.1109/TPAMI.2003.1177156.  The mean is that of
    Heimann et al. 2009, doi 10.1109/TMI.2009.2013851; Huttenlocher et al. 1993, doi 10.1109/34.232073.

    Raises TypeError for what are no integers, ValueError for other shapes, for a batch and inside vmap;
    MissingExtraError without SimpleITK.

    >>> import torch, fnreg
    >>> from fnreg import metrics
    >>> first = torch.zeros(6, 6, dtype=torch.int64)
    >>> first[1:3, 1:5] = 7
    >>> found = metrics.surface_distances(first, first.roll(2, 0), fnreg.Grid((6, 6), spacing=(1.0, 1.5)))
    >>> found.mean, found.hausdorff
    (tensor([2.2500], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    sides = [_values(labels, grid) for labels in (first, second)]
    sitk: Any = require("SimpleITK", "itk", "distances of surfaces")
    numbers = classes(first, second) if numbers is None else numbers
    spacing: list[float] = grid.spacing.tolist()
    found = [_of_masks(sitk, [side == number for side in sides], spacing) for number in numbers]
    columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 3).unbind(-1)
    return SurfaceDistances(*columns)


def _values(labels: Tensor, grid: Grid) -> np.ndarray:
    check_integers(labels)
    if not (is_concrete(labels) and is_concrete(grid.spacing)):
        raise ValueError("labels inside vmap: surfaces cannot be found there; go through the pairs in a loop")
    if grid.ndim not in (2, 3) or grid.spacing.ndim != 1:
        raise ValueError(f"the grid has {grid.ndim} axes, or a batch of places: expected one pair of 2 or 3 axes")
    if tuple(labels.shape) not in (tuple(grid.shape), (1, *grid.shape)):
        raise ValueError(f"labels have shape {tuple(labels.shape)}: expected those of one pair, {tuple(grid.shape)}")
    return labels.reshape(grid.shape).cpu().numpy()


def _of_masks(sitk: Any, masks: list[np.ndarray], spacing: list[float]) -> tuple[float, float, float]:
    """Mean, percentile and largest distance of one class."""
    if not all(mask.any() for mask in masks):
        return np.nan, np.nan, np.nan
    either = masks[0] | masks[1]
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(either))
    surfaces, distances = [], []
    for mask in masks:
        # What touches the border of the image ends there.
        made = sitk.GetImageFromArray(np.pad(mask[box], 1).astype(np.uint8))
        made.SetSpacing(spacing)
        contour = sitk.LabelContour(made, fullyConnected=False)
        away = sitk.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
        surfaces.append(sitk.GetArrayFromImage(contour) > 0)
        outside = np.abs(sitk.GetArrayFromImage(away)).astype(np.float64)
        distances.append(np.where(surfaces[-1], 0, outside))  # where ITK leaves a rounding
    each = [distances[1][surfaces[0]], distances[0][surfaces[1]]]
    return (
        float(np.concatenate(each).mean()),
        max(float(np.percentile(away, 95)) for away in each),
        max(float(away.max()) for away in each),
    )
