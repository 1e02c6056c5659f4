"""One pair from files to a folder: what `fnreg register` does.

Everything that can be wrong with settings, inputs and output is looked at before the work begins; the folder of results
appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fnreg
from fnreg import agreement, extras, io, presets, results
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.io.files import ImageReadError, TransformReadError, write_bytes
from fnreg.io.itk import parts
from fnreg.losses.terms import objective as as_objective
from fnreg.output import OutputFolder
from fnreg.placement import gap
from fnreg.pytree import tree_leaves, tree_map
from fnreg.registration import Event, Stage, evaluate, register
from fnreg.search import searched
from fnreg.settings import INITS, STARTS, Settings, SettingsError
from fnreg.starts import STARTS as STARTED
from fnreg.transforms.base import Mapping, Transform, first_domain


class DeviceError(RuntimeError):
    """The device is not there."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What a run reads and where it writes."""

    fixed: Path
    moving: Path
    output: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    known: agreement.Paths = agreement.Paths()


class Begin(NamedTuple):
    """Where a run starts."""

    initial: Any = None  # parameters of the first stage, or for a linear one a linear mapping
    then: Mapping | None = None  # what acts after a first stage that is not linear

    def mapping(self, first: Transform, grid: Grid) -> Mapping:
        """The whole map."""
        if isinstance(self.initial, Mapping):
            return self.initial
        begun = Mapping(first.init(grid) if self.initial is None else self.initial, grid, first)
        return begun if self.then is None else self.then @ begun


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A run all of whose inputs have been read and found in order."""

    files: Files
    settings: Settings
    fixed: Subject
    moving: Subject
    known: agreement.Known
    stages: list[Stage]
    options: dict[str, Any]  # of `register`
    begin: Begin | None
    figures: bool
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """What is about to be done, for run.json and --dry-run."""
        inputs: dict[str, Any] = {}
        init = None if self.begin is None else Path(self.settings.init)
        for name in ("fixed", "moving", "fixed_mask", "moving_mask"):
            if (path := getattr(self.files, name)) is not None:
                inputs[name] = _told(path)
        inputs |= {name: _told(path) for name, path in self.files.known.named().items()}
        if init is not None:
            inputs["init"] = _told(init)
        versions = {name: metadata.version(name) for name in ("torch", "torchopt", "numpy", "safetensors")}
        return {
            "fnreg": fnreg.__version__,
            "inputs": inputs,
            "output": str(self.files.output),
            "settings": self.settings.given(),
            "stages": [repr(stage if self.settings.preset else stage.transform) for stage in self.stages],
            "objective": repr(self.stages[-1].objective),
            "solver": repr(self.stages[-1].solver or self.stages[-1].optimizer or self.options["solver"]),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
        }


def _told(path: Path) -> dict[str, Any]:
    if path.is_dir():  # of slices
        files = sorted(file for file in path.iterdir() if file.is_file())
        whole = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
        return {"path": str(path), "files": len(files), "sha256": whole.hexdigest()}
    data = path.read_bytes()
    return {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def prepare(files: Files, settings: Settings) -> Plan:
    """Read and check everything; nothing is written.

    Raises SettingsError, ImageReadError, PointReadError, TransformReadError, DeviceError or MissingExtraError.
    """
    stages, options = _stages(settings)
    device = _device(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    figures, notes = "figures" in settings.saves(), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", io.GeometryWarning)
        fixed, moving = io.read_image(files.fixed), io.read_image(files.moving)
        notes += _fit(files, settings, stages[0].transform, fixed, moving)
        masks = [_mask(files.fixed_mask, files.fixed, fixed), _mask(files.moving_mask, files.moving, moving)]
        known = agreement.read(files.known, (files.fixed, files.moving), (fixed, moving))
    notes += [str(warning.message) for warning in caught if warning.category is io.GeometryWarning]
    if fixed.data.dtype != moving.data.dtype:
        fixed, moving = (Image(image.data.to(torch.float64), image.grid) for image in (fixed, moving))
    notes += known.notes
    subjects = [known.of(side, image.to(device), masks[side]) for side, image in enumerate((fixed, moving))]
    if figures and not all(extras.present("plot").values()):
        figures = False
        notes.append('no figures were drawn, matplotlib is not installed: pip install "fnreg[plot]"')
    for stage in stages:
        _try(stage, subjects[0].image)
    begin = _begin(settings, stages[0].transform, subjects[0].image.grid)
    return Plan(files, settings, subjects[0], subjects[1], known, stages, options, begin, figures, notes)


def _stages(settings: Settings) -> tuple[list[Stage], dict[str, Any]]:
    """The stages, and the options of `register` that hold for all."""
    transforms = settings.transforms()
    if settings.preset:
        chosen = presets.PRESETS[settings.preset]
        options = {name: value for name, value in chosen.items() if name != "transform"}
        return [dataclasses.replace(s, objective=as_objective(s.objective)) for s in chosen["transform"]], options
    counts = settings.counts()
    options = {"solver": settings.solver(), "levels": settings.levels, "padding": settings.outside()}
    options |= {"steps": counts[0] if len(counts) == 1 else counts, "symmetric": settings.symmetric}
    return [Stage(transform, settings.objective(transform)) for transform in transforms], options


def _try(stage: Stage, fixed: Image) -> None:
    """SettingsError for a transform or a penalty with options that do not go with the image, before the work begins."""
    transform, grid = stage.transform, fixed.grid
    if transform.linear:
        return
    try:
        params = transform.cast(transform.init(grid), fixed.data.dtype)
        for term in stage.objective.terms[1:]:
            of_map = {"transform": transform, "params": params, "domain": grid}
            term.value({"field": transform.field(params, grid)} | of_map)
    except (TypeError, ValueError) as problem:
        raise SettingsError(f"{transform}: {problem}") from None


def _device(settings: Settings) -> torch.device:
    try:
        device = torch.device(settings.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise DeviceError(f"device {settings.device!r} cannot be used: {reason}; see fnreg doctor") from problem
    return device


def _fit(files: Files, settings: Settings, first: Transform, fixed: Image, moving: Image) -> list[str]:
    """What is to be told of where the images lie; ImageReadError where they cannot be compared, or do not meet and the
    start is that of their headers."""
    for told, a, b in (("axes", fixed.grid.ndim, moving.grid.ndim), ("channels", fixed.channels, moving.channels)):
        if a != b:
            raise ImageReadError(
                f"{files.moving} has {b} {told} but {files.fixed} has {a}: give images that have as many"
            )
    apart = gap(fixed.grid, moving.grid)
    if apart == 0 or settings.init not in ("header", "auto"):
        return []
    away = float((fixed.grid.center - moving.grid.center).norm())
    told = (
        f"{files.moving} and {files.fixed} do not overlap: their middles are {away:.4g} apart, and a gap of "
        f"{apart:.4g} at least is between them"
    )
    if settings.init == "auto" and searched(first, fixed.grid.ndim) is not None:
        return [f"{told}; so the start is not that of their headers: check these"]
    raise ImageReadError(f"{told}; give --init center, or moments, or check their headers")


def _mask(path: Path | None, of: Path, image: Image) -> Tensor | None:
    if path is None:
        return None
    mask = io.read_image(path)
    if mask.grid.size != image.grid.size:
        sizes = [" x ".join(map(str, grid.size)) for grid in (mask.grid, image.grid)]
        raise ImageReadError(f"mask {path} has {sizes[0]} pixels but {of} has {sizes[1]}: give a mask of its size")
    if not mask.grid.same_as(image.grid, 0.1):
        raise ImageReadError(f"mask {path} lies elsewhere than {of}: {mask.grid} but {image.grid}; resample it")
    if not bool((mask.data > 0).any()):
        raise ImageReadError(f"mask {path} is zero everywhere: pixels above 0 count, and there are none")
    return (mask.data > 0).any(0, keepdim=True)


def _begin(settings: Settings, first: Transform, grid: Grid) -> Begin | None:
    """The start that a file gives: a linear map, or what an earlier run of the same transform has written."""
    if settings.init in INITS:
        return None
    read = io.read_transform(settings.init)
    if first_domain(read.domain).ndim != grid.ndim:
        raise TransformReadError(f"{settings.init} is a map of other axes: expected one map of {grid.ndim} axes")
    if any(leaf.ndim != rank for leaf, rank in zip(tree_leaves(read), tree_leaves(read.ranks()), strict=True)):
        raise TransformReadError(f"{settings.init} holds a batch: expected one map of {grid.ndim} axes")
    found = tree_map(lambda leaf: leaf.to(grid.center.device), read)
    if found.transform.linear:
        matrix = fnreg.linear_mapping(found.matrix(), grid)
        return Begin(initial=matrix) if first.linear else Begin(then=matrix)
    dense, *after = parts(found)
    fits = dense.transform == first and isinstance(dense.domain, Grid) and dense.domain.same_as(grid)
    if not fits or not all(part.transform.linear for part in after):
        raise TransformReadError(
            f"{settings.init} cannot be a start: it holds {found.transform}, and {first} begins with a linear map, or "
            "with parameters of its own kind on the grid of the fixed image"
        )
    then: Mapping | None = None
    for part in after:
        then = part if then is None else part @ then
    return Begin(dense.params, None if then is None else fnreg.linear_mapping(then.matrix(), grid))


def execute(plan: Plan, folder: OutputFolder, progress: Callable[[Event], None] | None = None) -> dict[str, Any]:
    """Register, write into the folder's scratch, commit; returns what run.json holds.

    Raises RegistrationError where the pair could not be registered, OSError where something could not be written.
    """
    settings, clock = plan.settings, time.perf_counter()
    first, last = plan.stages[0].transform, plan.stages[-1]
    grid = plan.fixed.image.grid
    begin = plan.begin or Begin()
    padding = plan.options.get("padding")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # By the last objective: a stage that can be penalised does not move at the start.
        start = begin.mapping(first, grid)
        if first.linear and not last.transform.linear:
            start = start @ Mapping(last.transform.init(grid), grid, last.transform)
        before, before_terms = evaluate(plan.fixed, plan.moving, start, objective=last.objective, padding=padding)
        if not _meet(start, grid, plan.moving.image.grid):  # no voxel counts: a value of them would mislead
            before, before_terms = tree_map(lambda value: value * torch.nan, (before, before_terms))
        result = register(
            plan.fixed,
            plan.moving,
            plan.stages,
            then=begin.then,
            initial=begin.initial,
            starts=_starts(first, grid) if settings.init == "search" else None,
            start=settings.init if settings.init in STARTED else "header",  # type: ignore[arg-type]
            progress=progress,
            **plan.options,
        )
    seconds = time.perf_counter() - clock
    notes = [str(warning.message) for warning in caught if warning.category is UserWarning]  # not of what torch imports
    if float(result.value) > float(before):
        notes.append(f"the objective rose from {float(before):.4g} to {float(result.value):.4g}: look at the figures")
    found = results.outcome(result, float(before), before_terms)
    if found.get("folds"):
        notes.append(_of_folds(found["folds"], float(before), settings))
    (metrics_before, unmoved), (metrics, labels) = (
        agreement.agreement(plan.known, mapping, grid, plan.moving.image) for mapping in (start, result.mapping)
    )
    if metrics:
        found["metrics"] = {"before": metrics_before, "after": metrics}
        notes += agreement.worse(metrics_before, metrics)
    saves = [name for name in settings.saves() if name != "figures" or plan.figures]
    inverse = results.invert(result) if "inverse" in saves else results.Inverse(None, None)
    if inverse.residual is not None:
        found["inverse_residual"] = inverse.residual
    if inverse.note is not None:
        notes.append(inverse.note)
    title = f"{plan.files.moving.name} to {plan.files.fixed.name}: {settings.transform}"
    results.write(
        folder.scratch,
        result,
        plan.fixed.image,
        plan.moving.image,
        saves,
        inverse=inverse.result,
        objective=repr(last.objective),
        title=title,
        like=plan.files.fixed,
        labels=results.LabelSides(plan.known.labels[0], unmoved, labels),
    )
    record = plan.record() | found
    record |= {"status": "warn" if notes else "ok", "warnings": [*plan.notes, *notes], "seconds": round(seconds, 3)}
    record["peak_mb"] = results.peak_megabytes(plan.fixed.image.data.device)
    written = sorted(
        path.relative_to(folder.scratch).as_posix() for path in folder.scratch.rglob("*") if path.is_file()
    )
    record["written"] = [*written, "run.json"]
    write_bytes(folder.scratch / "run.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    folder.commit()
    return record


def _meet(start: Mapping, fixed: Grid, moving: Grid) -> bool:
    """Whether a map takes any of some 30 points along each fixed axis into the moving image."""
    points = fixed.resize([min(n, 32) for n in fixed.size]).points()
    index = moving.world_to_index(start.map_points(points))
    last = torch.tensor(moving.size, device=index.device) - 1
    return bool(((index >= 0) & (index <= last)).all(-1).any())


def _starts(first: Any, grid: Grid) -> Any:
    return first.spread(grid, STARTS)


def _of_folds(share: float, before: float, settings: Settings) -> str:
    told = f"the map folds at {100 * share:.3g} % of the pixels: give "
    if settings.preset:
        return f"{told}a transform, similarity and penalty of its own in place of preset {settings.preset}"
    if settings.penalty:
        return f"{told}a larger weight than {settings.penalty}, or use svffd"
    # Bending is below 1 for smooth maps: so it weighs less than what there is to gain, whatever the intensities.
    gain = abs(before) if before and math.isfinite(before) else 1
    return f"{told}a penalty, such as --penalty bending={gain:.0e}, or use svffd"
