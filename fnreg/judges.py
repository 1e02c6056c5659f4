"""What says how good a registration of a sweep is: labels or landmarks that it has not seen, or its own objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg.fields import statistics
from fnreg.grid import Grid, apply_matrix, index_points
from fnreg.image import Subject
from fnreg.losses.objective import OF_LABELS, OF_POINTS
from fnreg.losses.terms import mse
from fnreg.metrics import classes, dice, target_registration_error
from fnreg.pytree import over_batch
from fnreg.registration import Registration
from fnreg.stages import objectives_of
from fnreg.transforms.warping import warp_data

Judge = Literal["labels", "points", "value"]
JUDGES: dict[str, str] = {"labels": "mean Dice", "points": "mean landmark error", "value": "value of the objective"}
HIGHER = ("labels",)  # judges whose best score is the highest
NEAR = 1e-3  # voxels that grids of labels may differ by


def check_judge(judge: Judge, known: tuple[Any, ...], *, told: tuple[str, str]) -> tuple[int, ...]:
    """That what judges is there, and the classes of labels."""
    if judge == "value":
        return ()
    for name, item in zip(told, known, strict=True):
        if getattr(item, judge) is None:
            raise ValueError(
                f"{name} has no {judge} to judge by: give Subject(image, {judge}=...) or held=(fixed, moving), or "
                'another judge; judge="value" takes the objective itself'
            )
    if judge == "points":
        counts = [item.points.shape[-2] for item in known if item.points is not None]
        if counts[0] != counts[1]:
            raise ValueError(f"{told[0]} has {counts[0]} points and {told[1]} {counts[1]}: give pairs, row by row")
        if not bool((_weights(known) > 0).any()):
            raise ValueError(f"point_weights of {told[0]} and {told[1]} leave no landmark to judge by: give some > 0")
        return ()
    found = classes(*(item.labels for item in known if item.labels is not None))
    if not found:
        raise ValueError(f"labels of {told[0]} and {told[1]} are 0 everywhere, which is the background: nothing judges")
    return found


def check_unseen(judge: Judge, transform: Any, options: Mapping[str, Any]) -> None:
    """ValueError where an objective asks for what judges."""
    names = {"labels": OF_LABELS, "points": OF_POINTS, "value": ()}[judge]
    for several in objectives_of(transform, options.get("objective", mse)):
        for part in several:
            if not part.needs.isdisjoint(names):
                raise ValueError(
                    f"the objective {part!r} sees the {judge} that are to judge it: judge by others, "
                    f"held=(Subject(image, {judge}=...), ...), or by another judge"
                )


def check_place(judge: Judge, held: tuple[Subject, Subject], fixed: Subject) -> None:
    """ValueError where what judges does not lie where the images do."""
    grid, here = fixed.image.grid, held[0].image.grid
    for number, known in enumerate(held):
        if known.image.grid.ndim != grid.ndim:
            raise ValueError(f"held[{number}] has {known.image.grid.ndim} spatial axes but the images have {grid.ndim}")
    if judge != "labels":
        return
    remedy = "give labels of the fixed image's own voxels, or judge by points"
    if here.size != grid.size:
        raise ValueError(f"held[0] has size {here.size} but fixed has {grid.size}: {remedy}")
    corners = index_points((2,) * grid.ndim, torch.float64, grid.center.device)[:-1].mT
    corners = corners * (torch.tensor(grid.size, device=corners.device) - 1)

    def away(mine: Grid, other: Grid) -> Tensor:
        return (apply_matrix(mine.matrix("index", "index", other), corners) - corners).abs().amax()

    found = over_batch(away, held=(here, here.ranks()), fixed=(grid, grid.ranks()))
    if not bool((found <= NEAR).all()):
        raise ValueError(f"held[0] lies up to {float(found.max()):.3g} voxels away from fixed: {remedy}")


def scores_of(judge: Judge, every: Registration, known: tuple[Any, ...], numbers: tuple[int, ...]) -> Tensor:
    """One number for each registration."""
    if judge == "value":
        return every.value
    fixed, moving = known
    if judge == "points":
        weight = _weights(known)
        # A landmark without weight may be anywhere, or nowhere.
        sides = [torch.where(weight.unsqueeze(-1) == 0, 0, item.points) for item in known]
        away = target_registration_error(every.mapping, *_alike(sides[0], sides[1], len(every.status)))
        return (weight * away).sum(-1) / weight.sum(-1)
    grid, rank = every.fixed_grid, every.fixed_grid.ndim + 1
    warped = warp_data(moving.labels, moving.image.grid, every.mapping, grid, interpolation="nearest", padding="zeros")

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return dice(a, b, numbers=numbers).nanmean()

    return over_batch(mean, warped=(warped, rank), fixed=(fixed.labels, rank))


def _weights(known: tuple[Any, ...]) -> Tensor:
    """How much each landmark counts, (N,) or (B, N)."""
    weights = [item.point_weights for item in known if item.point_weights is not None]
    return math.prod(weights, start=torch.ones_like(known[0].points[..., 0]))


def _alike(fixed: Tensor, moving: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Both with the axis of the batch."""
    return fixed.expand(size, *fixed.shape[-2:]), moving.expand(size, *moving.shape[-2:])


def roughness(every: Registration, fixed: Subject) -> Tensor | None:
    """Standard deviation of log det J of each registration at the fixed voxels by the mask; None for linear maps."""
    if every.mapping.transform.linear:
        return None
    grid = every.fixed_grid
    field = every.mapping.displacement(grid)
    given: dict[str, Any] = {"field": (field, grid.ndim + 1), "grid": (grid, grid.ranks())}
    if fixed.mask is not None:
        given["mask"] = (fixed.mask, grid.ndim + 1)

    def spread(field: Tensor, grid: Any, mask: Tensor | None = None) -> Tensor:
        return statistics(field, grid, mask=mask).sd_log_determinant

    return over_batch(spread, **given)


def first_best(table: Tensor, judge: Judge) -> Tensor:
    """Where the last axis is at its best; what is NaN is never."""
    return torch.where(table.isnan(), -torch.inf, table if judge in HIGHER else -table).argmax(-1)
