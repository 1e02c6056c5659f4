"""What is known of a pair beside its images, labels and landmarks, and how well both sides agree by it.

A registration need not see them: they judge it.  What is told has the names of columns: dice_LABEL and dice_mean, the
overlap 2 |A and B| / (|A| + |B|) of the classes of the fixed labels with the moving ones, warped by nearest neighbours
to the fixed grid (Dice 1945, doi 10.2307/1932409); tre_mean, tre_p95 and tre_max, the distance |T(p) - q| of
landmarks p of the fixed and q of the moving image (Fitzpatrick and West 2001, doi 10.1109/42.952729).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnreg import io, metrics
from fnreg.fields import Statistics
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.io.files import ImageReadError, PointReadError, SpaceNeededError
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
from fnreg.transforms.warping import warp


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files of labels and points, (fixed, moving).

    space : "LPS", "RAS" or "voxel", of points that do not say it
    shared : whether it is that of many pairs, of which some have no points that need it; of one alone that is refused
    """

    labels: tuple[Path | None, Path | None] = (None, None)
    points: tuple[Path | None, Path | None] = (None, None)
    space: str | None = None
    shared: bool = False

    def named(self) -> dict[str, Path]:
        """Those that are given, by the names of the options."""
        sides = {"labels": self.labels, "points": self.points}
        each = {f"{side}_{what}": path for what, pair in sides.items() for side, path in zip(SIDES, pair, strict=True)}
        return {name: path for name, path in each.items() if path is not None}


SIDES = ("fixed", "moving")


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Of one pair: labels (1, [Z,] Y, X) of each side that has some, and landmarks (N, D) of both, row by row."""

    labels: tuple[Tensor | None, Tensor | None] = (None, None)
    points: tuple[Tensor, Tensor] | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """The classes of the fixed labels, found once: each is judged before and after."""
        return () if self.labels[0] is None else metrics.classes(self.labels[0])

    def of(self, side: int, image: Image, mask: Tensor | None) -> Subject:
        """The image of a side, 0 or 1, with all that is known about it, on its device."""
        device = image.data.device
        points = None if self.points is None else self.points[side]
        mask, labels, points = (None if t is None else t.to(device) for t in (mask, self.labels[side], points))
        return Subject(image, mask, labels=labels, points=points)


def read(paths: Paths, files: tuple[Path, Path], images: tuple[Image, Image]) -> Known:
    """Labels and points, checked against the images of these files.

    Raises ImageReadError and PointReadError for what cannot be read or does not fit, SettingsError where points of one
    side alone are given, or their space without points.
    """
    if paths.space is not None and paths.points == (None, None) and not paths.shared:
        raise SettingsError(f"--space {paths.space} is that of points, and none are given")
    labels = [_labels(*each) for each in zip(paths.labels, files, images, strict=True)]
    if (paths.points[0] is None) != (paths.points[1] is None):
        given, other = ("fixed", "moving") if paths.points[1] is None else ("moving", "fixed")
        raise SettingsError(f"--{given}-points are given without --{other}-points: landmarks are compared in pairs")
    if paths.points[0] is None or paths.points[1] is None:
        return Known((labels[0], labels[1]))
    tables = paths.points[0], paths.points[1]
    remedy, grids = "give --space LPS, RAS or voxel", [image.grid for image in images]
    sides = landmarks(tables, paths.space, remedy, grids=grids, shared=paths.shared)
    for table, found, of, grid in zip(tables, sides, files, grids, strict=True):
        if (count := found.points.shape[1]) != grid.ndim:
            raise PointReadError(f"{table} has points of {count} coordinates but {of} has {grid.ndim} axes")
    points, notes = paired(*tables, *sides)
    return Known((labels[0], labels[1]), points, notes)


def _labels(path: Path | None, of: Path, image: Image) -> Tensor | None:
    if path is None:
        return None
    data, grid = io.read_labels(path)
    if grid.size != image.grid.size:
        sizes = [" x ".join(map(str, each.size)) for each in (grid, image.grid)]
        raise ImageReadError(f"labels {path} have {sizes[0]} voxels but {of} has {sizes[1]}: give labels of its size")
    if not grid.same_as(image.grid, 0.1):
        raise ImageReadError(f"labels {path} lie elsewhere than {of}: {grid} but {image.grid}; resample them")
    if not bool(data.any()):
        raise ImageReadError(f"labels {path} are 0 everywhere, which is the background: there is no class to compare")
    return data


def landmarks(
    files: Sequence[Path], space: str | None, remedy: str, *, grids: Sequence[Grid] | None = None, shared: bool = False
) -> list[io.Landmarks]:
    """As `fnreg.io.read_points`, of several files.

    space : of those that do not say theirs.  Where all do and it is `shared` it counts for none, else it has to be that
        of all
    remedy : what to do about a file that needs it, in words of the command line
    grids : whose indices "voxel" are, one for each file

    Raises PointReadError.
    """
    found: list[io.Landmarks] = []
    each = grids or [None] * len(files)
    where: list[dict[str, Any]] = [{"space": space, "grid": grid if space == "voxel" else None} for grid in each]
    needed = shared or space is None
    for path, told in zip(files, where, strict=True):
        try:
            found.append(io.read_points(path))
        except SpaceNeededError as problem:
            if space is None:
                raise PointReadError(f"{problem.told}: {remedy}") from None
            found.append(io.read_points(path, **told))
            needed = True
    if not needed:
        for path, told in zip(files, where, strict=True):  # raises where it is another one
            io.read_points(path, **told)
    return found


def paired(
    fixed: Path, moving: Path, here: io.Landmarks, there: io.Landmarks
) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """Points that belong together: those of one name, or of one row where the names do not tell.

    Names tell where each side has its own for every point, and at least one of them is on both.
    """
    common = [name for name in here.names if name in set(there.names)]
    distinct = all(
        side.names and "" not in side.names and len(set(side.names)) == len(side.names) for side in (here, there)
    )
    if common and distinct:
        rows = [torch.tensor([side.names.index(name) for name in common]) for side in (here, there)]
        pairs = here.points[rows[0]], there.points[rows[1]]
        alone = sorted((set(here.names) | set(there.names)) - set(common))
        if not alone:
            return pairs, ()
        told = f"{', '.join(alone[:4])}{' and others' if len(alone) > 4 else ''}"
        return pairs, (f"landmarks in one of {fixed} and {moving} only were left out: {told}",)
    if len(here.points) != len(there.points):
        raise PointReadError(
            f"{fixed} has {len(here.points)} points but {moving} has {len(there.points)}, and no names tell which "
            "belong together: give as many, in one order"
        )
    return (here.points, there.points), ()


def agreement(
    known: Known, mapping: Mapping, fixed: Grid, moving: Image
) -> tuple[dict[str, float | None], Tensor | None]:
    """How well both sides agree under a mapping, by names; and the moving labels on the fixed grid, where there are
    some.  None stands for what is no number: a point that was not mapped."""
    told: dict[str, float | None] = {}
    warped: Tensor | None = None
    ours, theirs = known.labels
    if theirs is not None:
        device = moving.data.device
        warped = warp(Subject(moving, labels=theirs.to(device)), mapping, fixed).labels
        assert warped is not None
        warped = warped.cpu()
        if ours is not None:
            told |= overlaps(ours, warped, numbers=known.numbers)
    if known.points is not None:
        here, there = (points.to(fixed.center.device) for points in known.points)
        told |= errors(metrics.target_registration_error(mapping, here, there))
    return told, warped


def worse(before: dict[str, float | None], after: dict[str, float | None]) -> list[str]:
    """What a user should know: where a registration took both sides further apart, beyond what nearest voxels do."""
    notes: list[str] = []
    for name, sign, what in (
        ("dice_mean", -1, "the mean overlap of labels fell"),
        ("tre_mean", 1, "the mean distance of landmarks rose"),
    ):
        was, is_now = before.get(name), after.get(name)
        if was is not None and is_now is not None and sign * (is_now - was) > 0.02 * was:
            notes.append(f"{what} from {was:.3g} to {is_now:.3g}: look at the figures")
    return notes


# -- by the names of columns ---------------------------------------------------------------------------------------


def overlaps(
    fixed: Tensor, warped: Tensor, *, numbers: Sequence[int] | None = None, jaccard: bool = False
) -> dict[str, float | None]:
    """Dice of every class of the fixed labels, and the mean over these: the same ones before and after.

    numbers : these classes, where they are known; jaccard : the mean of that as well, each d / (2 - d) of a Dice d
    """
    numbers = metrics.classes(fixed) if numbers is None else numbers
    each = metrics.dice(fixed, warped, numbers=numbers)
    found = {f"dice_{number}": finite(value) for number, value in zip(numbers, each, strict=True)}
    found = {"dice_mean": finite(each.mean()), **found}
    return found | ({"jaccard_mean": finite((each / (2 - each)).mean())} if jaccard else {})


def errors(away: Tensor) -> dict[str, float | None]:
    """Of distances of landmarks (N,) the mean, the 95th percentile and the largest."""
    return {
        "tre_mean": finite(away.mean()),
        "tre_p95": finite(torch.quantile(away, 0.95)),
        "tre_max": finite(away.max()),
    }


def regularity(told: Statistics) -> dict[str, Tensor]:
    """What users of registrations know by these names, of one pair or of a batch; folds is a share of voxels."""
    return {
        "jac_min": told.min_determinant,
        "jac_max": told.max_determinant,
        "folds": told.folds,
        "sdlogj": told.sd_log_determinant,
    }


def way_back(mapping: Mapping, inverse: Mapping, grid: Grid) -> dict[str, float | None]:
    """The mean and the largest of `there_and_back`, world units; None where S knows T(p) of no voxel."""
    away = there_and_back(mapping, inverse, grid)
    known = len(away) > 0
    return {
        "inverse_mean": finite(away.mean()) if known else None,
        "inverse_max": finite(away.max()) if known else None,
    }


def there_and_back(mapping: Mapping, inverse: Mapping, grid: Grid, *, world: bool = True) -> Tensor:
    """|S(T(p)) - p| in world units, or in voxels, (N,) at the voxels p of a grid for which S knows T(p).

    That is where the first part of S with a field is asked between the voxels of its domain, and everywhere where S is
    linear; where T(p) is NaN the distance is as well.
    """
    points = grid.points()
    there = points + mapping.displacement(grid).to(points).flatten(1).mT
    asked = there
    for part in inverse.parts():
        if not part.transform.linear:
            domain = first_domain(part.domain)
            index = domain.world_to_index(asked)
            inside = (index >= -1e-6) & (index <= 2 * domain.index_center + 1e-6)
            known = inside.all(-1) | index.isnan().any(-1)
            points, there = points[known], there[known]
            break
        asked = part.map_points(asked)
    away = inverse.map_points(there) - points
    return (away if world else grid.convert(away, "world", "index", vectors=True)).norm(dim=-1)


def finite(value: Tensor | float) -> float | None:
    """The number, or None where it is none: JSON has no such numbers."""
    number = float(value)
    return number if math.isfinite(number) else None
