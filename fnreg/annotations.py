"""Labels and points of both sides of a registration, as terms see them.

Integer labels become one channel for each class that either side has, the background 0 left out: channels can be
smoothed and interpolated, which numbers of classes cannot.  They go through the same pyramid as the images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fnreg.gather import Padding
from fnreg.image import Subject
from fnreg.losses.objective import OF_LABELS, OF_POINTS, Objective
from fnreg.pytree import is_concrete, over_batch, pytree_dataclass, tree_flatten, tree_unflatten
from fnreg.sampling import sample


@pytree_dataclass
class Points:
    """Points of one side.

    points : (N, D) world; weights : (N,); normals : (N, D)
    """

    points: Tensor
    weights: Tensor | None = None
    normals: Tensor | None = None

    def ranks(self) -> Points:
        """The rank that each leaf has for one pair."""
        ranks = [2, *([1] if self.weights is not None else []), *([2] if self.normals is not None else [])]
        return tree_unflatten(ranks, tree_flatten(self)[1])

    def through(self, matrix: Tensor) -> Points:
        """Under a linear map (D + 1, D + 1); normals by the transpose of its inverse, which keeps them across."""
        linear = matrix[:-1, :-1]
        points = self.points @ linear.mT + matrix[:-1, -1]
        # As w = A^-T n; its length does not matter.
        normals = None if self.normals is None else self.normals @ torch.linalg.inv_ex(linear).inverse
        return Points(points, self.weights, normals)


@pytree_dataclass
class Annotations:
    """What is known about one pair beside its images; None where an objective does not ask for it.

    fixed_labels, moving_labels : (K, [Z,] Y, X), on the grids of the images
    """

    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None
    fixed_points: Points | None = None
    moving_points: Points | None = None

    def ranks(self, dimension: int) -> Annotations:
        """The rank that each leaf has for one pair."""
        ranks = [dimension + 1 for labels in (self.fixed_labels, self.moving_labels) if labels is not None]
        parts = [side.ranks() for side in (self.fixed_points, self.moving_points) if side is not None]
        return tree_unflatten([*ranks, *tree_flatten(parts)[0]], tree_flatten(self)[1])

    def of_points(self) -> dict[str, Any]:
        """What terms may ask for by `OF_POINTS`, but the mapped points."""
        found: dict[str, Any] = dict.fromkeys(OF_POINTS)
        for side, known in (("fixed", self.fixed_points), ("moving", self.moving_points)):
            if known is not None:
                found[f"{side}_points"] = known.points
                found |= {f"{side}_point_weights": known.weights, f"{side}_normals": known.normals}
        return found

    def of_labels(self, coords: Tensor, padding: Padding | None) -> dict[str, Tensor]:
        """What terms may ask for by `OF_LABELS`: the moving labels at voxel indices (D, N), beside the fixed ones."""
        if self.fixed_labels is None or self.moving_labels is None:
            return {}
        # A number that is seen outside is an intensity: of labels there are none.
        outside = "border" if padding is None else padding if isinstance(padding, str) else "zeros"
        warped = sample(self.moving_labels, coords, padding=outside).value
        return {"warped_labels": warped.reshape(self.fixed_labels.shape), "fixed_labels": self.fixed_labels}


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """The classes of labels of both sides.

    numbers : (K,) in increasing order, without the background
    differ : (B,) or (1,), whether a class is on one side only, or there is none
    """

    numbers: Tensor
    differ: Tensor

    @staticmethod
    def of(fixed: Tensor, moving: Tensor, dimension: int) -> Classes:
        """Those of labels (1, [Z,] Y, X), or with a batch axis.

        ValueError where all pairs share labels whose classes differ; in a batch that is the fault of a pair.
        """
        if not (is_concrete(fixed) and is_concrete(moving)):
            raise ValueError(
                "labels inside vmap: their classes cannot be read there; give the batch to register, which maps itself"
            )
        sides = [labels.to(torch.int64) for labels in (fixed, moving)]
        numbers = torch.unique(torch.cat([labels.reshape(-1) for labels in sides]))
        numbers = numbers[numbers != 0]
        if not len(numbers):  # a class that no pair has, so that there are channels to look at
            numbers = numbers.new_ones(1)
        here, there = (_present(labels, numbers, dimension) for labels in sides)
        differ = (here != there).any(1) | ~here.any(1)
        if fixed.ndim == moving.ndim == dimension + 1 and bool(differ):
            raise ValueError(_told(numbers, here[0], there[0]))
        return Classes(numbers, differ)

    def channels(self, labels: Tensor, dtype: torch.dtype, dimension: int) -> Tensor:
        """One-hot, (K, [Z,] Y, X) of (1, [Z,] Y, X), or with a batch axis; the background is none of them."""
        return (labels == self.numbers.reshape(-1, *(1,) * dimension)).to(dtype)


def _present(labels: Tensor, numbers: Tensor, dimension: int) -> Tensor:
    """Which classes occur, (B or 1, K)."""
    flat = labels.reshape(-1, labels.shape[-dimension:].numel())
    return torch.stack([(flat == number).any(1) for number in numbers.tolist()], 1)


def _told(numbers: Tensor, fixed: Tensor, moving: Tensor) -> str:
    if not bool((fixed | moving).any()):
        return "labels are 0 everywhere, which is the background: there is no class to align"
    only = [
        f"{numbers[mine & ~other].tolist()} only {side}"
        for side, mine, other in (("fixed", fixed, moving), ("moving", moving, fixed))
        if bool((mine & ~other).any())
    ]
    return (
        f"of the classes of labels {' and '.join(only)} has: give both the same classes, and 0 to what the other lacks"
    )


def check(objective: Objective, fixed: Subject, moving: Subject) -> None:
    """ValueError where terms ask for what the subjects lack, or for channels or windows that the images do not have."""
    sides = (("fixed", fixed), ("moving", moving))
    for term in objective.terms:
        term.check_channels(fixed.image.channels)
        term.check_size(fixed.image.grid.size)
        for side, known in sides:
            if known.labels is None and not set(OF_LABELS).isdisjoint(term.needs):
                raise ValueError(f"{term.name} asks for labels but {side} has none: give Subject(image, labels=...)")
            asked = {f"{side}_points", "mapped_points"} if side == "fixed" else {f"{side}_points"}
            if asked.isdisjoint(term.needs):
                continue
            if known.points is None:
                raise ValueError(f"{term.name} asks for points but {side} has none: give Subject(image, points=...)")
            if known.points.shape[-2] == 0:
                raise ValueError(f"{term.name} asks for points but the list of {side} is empty: give at least one")


def points_of(known: Subject) -> Points | None:
    """The points of a subject in float64; those without weight lie in the image's centre, wherever they were."""
    if known.points is None:
        return None
    points, weights = known.points.to(torch.float64), known.point_weights
    if weights is not None:
        center = known.image.grid.center
        points = over_batch(
            lambda p, w, c: torch.where((w == 0).unsqueeze(-1), c, p),
            points=(points, 2),
            weights=(weights, 1),
            center=(center, 1),
        )
        weights = weights.to(torch.float64)
    normals = None if known.normals is None else known.normals.to(torch.float64)
    return Points(points, weights, normals)


def bad_points(side: Points) -> Tensor:
    """The pairs (B,) or (1,) with a point or a normal that is not finite, bad weights, or none that is positive."""

    def one(known: Points) -> Tensor:
        bad = ~torch.isfinite(known.points).all()
        if known.normals is not None:
            bad = bad | ~torch.isfinite(known.normals).all()
        if known.weights is not None:
            good = (known.weights >= 0) & torch.isfinite(known.weights)
            bad = bad | ~good.all() | ~(known.weights > 0).any()
        return bad

    return over_batch(one, points=(side, side.ranks())).reshape(-1)
