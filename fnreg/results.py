"""What a run leaves behind: its record as plain data, and its files."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import extras, fields, io
from fnreg.agreement import finite, regularity, way_back
from fnreg.image import Image
from fnreg.io.image import PICTURES, suffix
from fnreg.registration import Registration
from fnreg.settings import Settings
from fnreg.solvers.base import Status
from fnreg.transforms.base import Mapping
from fnreg.transforms.factors import decompose
from fnreg.transforms.rotation import matrix_to_angle

KNOWN = (
    "warped.png",
    "warped.tif",
    "warped.nii",
    "warped.nii.gz",
    "warped.mha",
    "warped.nrrd",
    "warped_labels.nii",
    "warped_labels.nii.gz",
    "warped_labels.mha",
    "warped_labels.nrrd",
    "transform.safetensors",
    "transform.tfm",
    "transform.h5",
    "displacement.nii.gz",
    "jacobian.nii.gz",
    "inverse.safetensors",
    "inverse.tfm",
    "inverse.h5",
    "inverse_displacement.nii.gz",
    "figures/overview.png",
    "figures/checkerboard.png",
    "figures/labels.png",
    "figures/losses.png",
    "figures/warped_grid.png",
    "figures/flow.png",
    "figures/jacobian.png",
)


def outcome(result: Registration, before: float, before_terms: dict[str, Tensor]) -> dict[str, Any]:
    """How a registration of one pair went, as plain data."""
    center = result.fixed_grid.center
    found: dict[str, Any] = {
        "ended": Status(int(result.status)).name.lower(),
        "value_before": finite(before),
        "value_after": finite(result.value),
        # where the images do not overlap no voxel was looked at
        "terms_before": {n: finite(v) if math.isfinite(before) else None for n, v in before_terms.items()},
        "terms_after": {name: finite(value) for name, value in result.terms.items()},
        "steps": result.steps.tolist(),
        "translation_of_center": (result.map_points(center[None])[0] - center).tolist(),
        "history": [
            {"stage": trace.stage, "level": trace.level, "value": _plain(trace.value)}
            | {"terms": {name: _plain(value) for name, value in trace.terms.items()}}
            for trace in result.history
        ],
    }
    if result.choice is not None:
        found["start"] = result.choice.name()
    return found | (_linear(result.mapping) if result.mapping.transform.linear else _dense(result))


def _plain(values: Tensor) -> list[float]:
    return [value for value in values.tolist() if math.isfinite(value)]


def _linear(mapping: Mapping) -> dict[str, Any]:
    matrix = mapping.matrix().cpu()
    shift, factors = decompose(matrix)
    found: dict[str, Any] = {"matrix": matrix.tolist(), "scale": factors.scale.tolist()}
    if len(shift) == 2:
        found["rotation_degrees"] = math.degrees(float(matrix_to_angle(factors.rotation)))
    return found


def _dense(result: Registration) -> dict[str, Any]:
    """How regular the map is at the fixed voxels: the columns that users of registrations know by these names."""
    grid = result.fixed_grid
    told = fields.statistics(result.mapping.displacement(grid), grid)
    return {
        **{name: finite(value) for name, value in regularity(told).items()},
        "max_displacement": finite(told.max_displacement),
        "linear_parts": [part.matrix().tolist() for part in result.mapping.parts() if part.transform.linear],
    }


def remarks(before: float, after: float, folds: float | None, settings: Settings) -> list[str]:
    """What a user should know of a pair that was registered: the objective at the start and at the end, and the share
    of folded voxels."""
    told: list[str] = []
    if after > before:
        told.append(f"the objective rose from {before:.4g} to {after:.4g}: look at the figures")
    if folds:
        told.append(_of_folds(folds, before, settings))
    return told


def _of_folds(share: float, before: float, settings: Settings) -> str:
    told = f"the map folds at {100 * share:.3g} % of the pixels: give "
    if settings.preset:
        return f"{told}a transform, similarity and penalty of its own in place of preset {settings.preset}"
    if settings.penalty:
        return f"{told}a larger weight than {settings.penalty}, or use svffd"
    # Bending is below 1 for smooth maps: so it weighs less than what there is to gain, whatever the intensities.
    gain = abs(before) if before and math.isfinite(before) else 1
    return f"{told}a penalty, such as --penalty bending={gain:.0e}, or use svffd"


class Inverse(NamedTuple):
    """The inverse of a registration as far as it could be found; away : see `way_back`."""

    result: Registration | None
    away: dict[str, float | None]
    note: str | None = None


def invert(result: Registration) -> Inverse:
    """The inverse, or why there is none: where a map folds it has none, and the rest of the run still counts."""
    try:
        inverse = result.inverse()
    except ValueError as problem:
        return Inverse(None, {}, f"no inverse was written: {problem}")
    if result.mapping.transform.linear:  # exact
        return Inverse(inverse, {"inverse_mean": 0.0, "inverse_max": 0.0})
    return Inverse(inverse, way_back(result.mapping, inverse.mapping, result.fixed_grid))


def peak_megabytes(device: torch.device) -> float:
    """Megabytes: of the device where there is one of its own, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(size / (2**20 if sys.platform == "darwin" else 2**10), 1)


class LabelSides(NamedTuple):
    """Labels on the fixed grid: the fixed ones, and the moving ones before and after, of the sides that have some."""

    fixed: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None


def write(
    folder: Path,
    result: Registration,
    fixed: Image,
    moving: Image,
    saves: Sequence[str],
    *,
    inverse: Registration | None = None,
    objective: str,
    title: str,
    like: Path,
    labels: LabelSides = LabelSides(),
) -> None:
    """Write into a folder what `saves` names; see `fnreg.settings.SAVES`.

    inverse : what "inverse" writes, where there is one
    objective : what the course of it is labelled with; title : of the overview
    like : the file of the fixed image: the warped one is written in its format, NIfTI with its header
    labels : where moving ones are known, "warped" writes them too, and where both are "figures" shows their borders
    """
    fixed, moving = fixed.to("cpu"), moving.to("cpu")
    seen = "warped" in saves or "figures" in saves
    warped = result.warp(moving.to(result.value.device)).to("cpu") if seen else moving
    if "warped" in saves:
        _write_warped(folder, warped, moving, like)
        if labels.after is not None:
            kept, kind = _format(like)
            io.write_labels(folder / f"warped_labels{kind}", io.Labels(labels.after, warped.grid), like=kept)
    if "params" in saves:
        io.write_transform(folder / "transform.safetensors", result.mapping)
    for_itk = "xfm" in saves and _write_for_itk(folder / "transform", result.mapping)
    if "displacement" in saves or ("xfm" in saves and not for_itk):
        io.write_displacement(
            folder / "displacement.nii.gz", result.mapping, grid=result.fixed_grid, dtype=fixed.data.dtype
        )
    if "jacobian" in saves:
        io.write_map(folder / "jacobian.nii.gz", result.jacobian())
    if "inverse" in saves and inverse is not None:
        io.write_transform(folder / "inverse.safetensors", inverse.mapping)
        if not _write_for_itk(folder / "inverse", inverse.mapping) or "displacement" in saves:
            name = folder / "inverse_displacement.nii.gz"
            io.write_displacement(name, inverse.mapping, grid=inverse.fixed_grid, dtype=fixed.data.dtype)
    if "figures" in saves:
        unit = "pixels" if suffix(like) in PICTURES else "mm"
        _draw(folder / "figures", result, fixed, moving, warped, objective, title, unit, labels)


def _write_warped(folder: Path, warped: Image, moving: Image, like: Path) -> None:
    """In the format of the fixed image, or in the one nearest to it that can be written."""
    if suffix(like) in PICTURES and like.is_file():
        io.write_image(folder / "warped.tif", warped)
        io.write_image(folder / "warped.png", warped, window=byte_range(moving))
        return
    kept, kind = _format(like)
    io.write_image(folder / f"warped{kind}", warped, like=kept)


def _format(like: Path) -> tuple[Path | None, str]:
    """The file whose header is kept, and the suffix of what is written beside it."""
    kind = suffix(like) if like.is_file() else ""
    near = {".mhd": ".mha", ".mha": ".mha", ".nhdr": ".nrrd", ".nrrd": ".nrrd", ".nii": ".nii"}.get(kind, ".nii.gz")
    return like if kind in (".nii", ".nii.gz") else None, near


def _write_for_itk(path: Path, mapping: Mapping) -> bool:
    """Whether the mapping could be written as a transform of ITK: one with a field needs SimpleITK."""
    if not mapping.transform.linear and not all(extras.present("itk").values()):
        return False
    io.write_itk(path.with_suffix(".tfm" if mapping.transform.linear else ".h5"), mapping)
    return True


def _draw(
    folder: Path,
    result: Registration,
    fixed: Image,
    moving: Image,
    warped: Image,
    objective: str,
    title: str,
    unit: str,
    labels: LabelSides,
) -> None:
    from fnreg import plot

    folder.mkdir()
    figures = {
        "overview": plot.overview(fixed, moving, warped, unit=unit, title=title),
        "checkerboard": plot.checkerboard(fixed, warped, unit=unit),
        "losses": plot.losses(result, objective=objective),
    }
    if labels.fixed is not None and labels.before is not None and labels.after is not None:
        sides = (labels.fixed, labels.before, labels.after)
        figures["labels"] = plot.labels(fixed, *sides, unit=unit, title=title)
    if not result.mapping.transform.linear:
        field = result.mapping.displacement(result.fixed_grid)
        figures["jacobian"] = plot.jacobian(result.jacobian().to("cpu"), unit=unit)
        if fixed.grid.ndim == 2:
            figures["flow"] = plot.flow(field, fixed.grid, unit=unit)
            figures["warped_grid"] = plot.warped_grid(result, image=moving, unit=unit, title=title)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")


def byte_range(moving: Image) -> tuple[float, float]:
    """The window of the moving image, so that the warped picture looks like it: bytes stay bytes."""
    finite = moving.data[torch.isfinite(moving.data)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low >= 0 and 1 < high <= 255:
        return 0.0, 255.0
    return (low, high) if low < high else (low, low + 1)
