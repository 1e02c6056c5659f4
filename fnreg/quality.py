"""How good transforms from files are, by labels and landmarks: what `fnreg evaluate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fnreg import agreement, fields, io, metrics
from fnreg.agreement import finite
from fnreg.apply import Interp, warp_labels
from fnreg.chains import grid_of, read_chain
from fnreg.grid import Grid
from fnreg.io.points import Space
from fnreg.notes import warn
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
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
    interpolation: Interp | None = None,
    surfaces: bool = False,
    inverse: Path | None = None,
) -> dict[str, dict[str, float | None]]:
    """What is known before and after, by the names of columns: {"before": {...}, "after": {...}}.

    dice_LABEL, dice_mean, jaccard_mean : overlap of the classes of the fixed labels with the moving ones on their grid
    tre_mean, tre_p95, tre_max : distance of landmarks, world units, paired by `fnreg.agreement.paired`
    surface_mean_LABEL, surface_p95_LABEL, surface_max_LABEL : with `surfaces`, distances of the surfaces of a class,
        world units, see `fnreg.metrics.surface_distances`; surface_mean, surface_p95 the means over classes,
        surface_max the largest; a class that the warped labels do not have leaves them unknown
    jac_min, jac_max, folds, sdlogj : of maps that are not linear; folds is a share of voxels
    inverse_mean, inverse_max : with `inverse`, the file of a map S, |S(T(p)) - p| in world units over the voxels p of
        the grid for which S knows T(p), see `fnreg.agreement.there_and_back`
    interpolation : of labels, "nearest" where it is not given, or "multilabel"

    Without transforms there is only "before"; None stands for what is no finite number.  Raises SettingsError where
    there is nothing to judge by, or an option has nothing to act on, ValueError where sides do not fit.  Warns of
    landmarks that one side lacks.
    """
    for name, (fixed, moving) in {
        "labels": (fixed_labels, moving_labels),
        "points": (fixed_points, moving_points),
    }.items():
        if (fixed is None) != (moving is None):
            raise SettingsError(f"{name} are given of one image: give --fixed-{name} and --moving-{name}")
    if not transforms and fixed_labels is None and fixed_points is None:
        raise SettingsError("there is nothing to evaluate: give labels or points of both images, or a transform")
    if surfaces and fixed_labels is None:
        raise SettingsError("--surfaces are those of labels: give --fixed-labels and --moving-labels")
    if interpolation is not None and fixed_labels is None:
        raise SettingsError(
            f"--interpolation {interpolation} is that of labels: give --fixed-labels and --moving-labels"
        )
    if space is not None and fixed_points is None:
        raise SettingsError(f"--space {space} is that of points, and none are given")
    if like is not None and not transforms:
        raise SettingsError(f"--like {like} is where folds of a transform are counted: give that as well")
    if inverse is not None and not transforms:
        raise SettingsError(f"--inverse {inverse} is the way back of a transform: give that as well")
    mapping = read_chain(transforms) if transforms else None
    if mapping is not None and mapping.transform.linear and fixed_labels is fixed_points is inverse is None:
        raise SettingsError("a linear transform does not fold: give labels or points of both images to judge it by")
    stages: dict[str, Mapping | None] = {"before": None} | ({"after": mapping} if transforms else {})
    found: dict[str, dict[str, float | None]] = {name: {} for name in stages}
    grid: Grid | None = None
    if fixed_labels is not None and moving_labels is not None:
        labels, other = (io.read_labels(path) for path in (fixed_labels, moving_labels))
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
            warped = warp_labels(*other, through, grid, interpolation=interpolation or "nearest")
            found[name] |= agreement.overlaps(labels[0], warped, numbers=numbers, jaccard=True)
            if surfaces:
                found[name] |= _surfaces(labels[0], warped, grid, numbers)
    if fixed_points is not None and moving_points is not None:
        remedy = "expected points of the world, give --space LPS or RAS"
        sides = agreement.landmarks([fixed_points, moving_points], space, remedy)
        _same_axes(mapping, sides[0].points.shape[-1], str(fixed_points))
        (here, there), notes = agreement.paired(fixed_points, moving_points, *sides)
        for note in notes:
            warn(note, stacklevel=2)
        for name, stage in stages.items():
            found[name] |= agreement.errors(metrics.target_registration_error(stage, here, there))
    if mapping is None or (mapping.transform.linear and inverse is None):
        return found
    where = grid if grid is not None and like is None else grid_of(mapping, like)
    if not mapping.transform.linear:
        told = fields.statistics(mapping.displacement(where), where)
        found["after"] |= {name: finite(value) for name, value in agreement.regularity(told).items()}
    if inverse is not None:
        back = read_chain([inverse])
        _same_axes(back, where.ndim, "the grid")
        found["after"] |= agreement.way_back(mapping, back, where)
    return found


def _surfaces(fixed: Tensor, warped: Tensor, grid: Grid, numbers: tuple[int, ...]) -> dict[str, float | None]:
    each = metrics.surface_distances(fixed, warped, grid, numbers=numbers)
    found: dict[str, float | None] = {}
    for name, values in (("mean", each.mean), ("p95", each.p95), ("max", each.hausdorff)):
        found |= {f"surface_{name}_{n}": finite(value) for n, value in zip(numbers, values, strict=True)}
        found[f"surface_{name}"] = finite(values.amax() if name == "max" else values.mean())
    return found


def _same_axes(mapping: Mapping | None, axes: int, name: str) -> None:
    if mapping is None:
        return
    if (ndim := first_domain(mapping.domain).ndim) != axes:
        raise ValueError(f"{name} has {axes} axes but the transform has {ndim}")
