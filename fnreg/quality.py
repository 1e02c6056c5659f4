"""How good transforms from files are, by labels and landmarks: what `fnreg evaluate` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnreg import fields, io, metrics
from fnreg.apply import Interp, read_labels, warp_labels
from fnreg.chains import grid_of, read_chain
from fnreg.grid import Grid
from fnreg.io.points import Space
from fnreg.settings import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.linear import linear_mapping


def judge(
    transforms: Sequence[Path] = (),
    *,
    fixed_labels: Path | None = None,
    moving_labels: Path | None = None,
    fixed_points: Path | None = None,
    moving_points: Path | None = None,
    like: Path | None = None,
    space: Space | None = None,
    interp: Interp = "nearest",
) -> dict[str, dict[str, float | None]]:
    """What is known before and after, by the names of columns: {"before": {...}, "after": {...}}.

    dice_LABEL, dice_mean, jaccard_mean : overlap of the classes of the fixed labels with the moving ones on their grid
    tre_mean, tre_p95, tre_max : distance of landmarks, world units
    jac_min, jac_max, folds, sdlogj : of maps that are not linear; folds is a share of voxels

    Without transforms there is only "before"; None stands for what is no finite number.  Raises SettingsError where
    there is nothing to judge by, ValueError where sides do not fit.
    """
    for name, (fixed, moving) in {
        "labels": (fixed_labels, moving_labels),
        "points": (fixed_points, moving_points),
    }.items():
        if (fixed is None) != (moving is None):
            raise SettingsError(f"{name} are given of one image: give --fixed-{name} and --moving-{name}")
    if not transforms and fixed_labels is None and fixed_points is None:
        raise SettingsError("there is nothing to evaluate: give labels or points of both images, or a transform")
    mapping = read_chain(transforms) if transforms else None
    stages: dict[str, Mapping | None] = {"before": None} | ({"after": mapping} if transforms else {})
    found: dict[str, dict[str, float | None]] = {name: {} for name in stages}
    grid: Grid | None = None
    if fixed_labels is not None and moving_labels is not None:
        labels, other = read_labels(fixed_labels), read_labels(moving_labels)
        grid = labels[1]
        _same_axes(mapping, grid.ndim, str(fixed_labels))
        _same_axes(mapping, other[1].ndim, str(moving_labels))
        if other[1].ndim != grid.ndim:
            raise ValueError(f"{fixed_labels} has {grid.ndim} axes but {moving_labels} has {other[1].ndim}")
        numbers = metrics.classes(labels[0])  # the same before and after, so that means compare
        if not numbers:
            raise ValueError(f"{fixed_labels} is 0 everywhere, which is the background: there is no class to compare")
        for name, stage in stages.items():
            through = linear_mapping(torch.eye(grid.ndim + 1, dtype=torch.float64), grid) if stage is None else stage
            warped = warp_labels(other[0], other[1], through, grid, interp=interp)
            found[name] |= _overlaps(labels[0], warped, numbers)
    if fixed_points is not None and moving_points is not None:
        here, there = (_points(path, space) for path in (fixed_points, moving_points))
        _same_axes(mapping, here.shape[-1], str(fixed_points))
        for name, stage in stages.items():
            distance = metrics.target_registration_error(stage, here, there)
            found[name] |= {
                "tre_mean": _number(distance.mean()),
                "tre_p95": _number(torch.quantile(distance, 0.95)),
                "tre_max": _number(distance.max()),
            }
    if mapping is not None and not mapping.transform.linear:
        where = grid if grid is not None and like is None else grid_of(mapping, like)
        told = fields.statistics(mapping.displacement(where), where)
        found["after"] |= {
            "jac_min": _number(told.min_determinant),
            "jac_max": _number(told.max_determinant),
            "folds": _number(told.folds),
            "sdlogj": _number(told.sd_log_determinant),
        }
    return found


def _overlaps(fixed: Tensor, warped: Tensor, numbers: tuple[int, ...]) -> dict[str, float | None]:
    each = metrics.dice(fixed, warped, numbers=numbers)
    mean = metrics.jaccard(fixed, warped, numbers=numbers).mean()
    found = {f"dice_{number}": _number(value) for number, value in zip(numbers, each, strict=True)}
    return found | {"dice_mean": _number(each.mean()), "jaccard_mean": _number(mean)}


def _points(path: Path, space: Space | None) -> Tensor:
    return io.read_points(path, space=space).points


def _same_axes(mapping: Mapping | None, axes: int, name: str) -> None:
    if mapping is None:
        return
    domain: Any = mapping.domain
    while isinstance(domain, tuple):
        domain = domain[0]
    if domain.ndim != axes:
        raise ValueError(f"{name} has {axes} axes but the transform has {domain.ndim}")


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
