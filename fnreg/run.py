"""One pair from files to a folder: what `fnreg register` does.

Everything that can be wrong with settings, inputs and output is looked at before the work begins; the folder of results
appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fnreg
from fnreg import extras, io, results
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.io.files import ImageReadError, TransformReadError, write_bytes
from fnreg.output import OutputFolder
from fnreg.registration import Event, Stage, evaluate, register
from fnreg.settings import STARTS, Settings
from fnreg.transforms.base import Mapping
from fnreg.transforms.linear import Linear


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


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A run all of whose inputs have been read and found in order."""

    files: Files
    settings: Settings
    fixed: Subject
    moving: Subject
    transforms: list[Linear]
    objective: Any
    solver: Any
    initial: Mapping | None
    figures: bool
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """What is about to be done, for run.json and --dry-run."""
        inputs: dict[str, Any] = {}
        init = None if self.initial is None else Path(self.settings.init)
        for name in ("fixed", "moving", "fixed_mask", "moving_mask"):
            if (path := getattr(self.files, name)) is not None:
                inputs[name] = _told(path)
        if init is not None:
            inputs["init"] = _told(init)
        versions = {name: metadata.version(name) for name in ("torch", "torchopt", "numpy", "safetensors")}
        return {
            "fnreg": fnreg.__version__,
            "inputs": inputs,
            "output": str(self.files.output),
            "settings": dataclasses.asdict(self.settings),
            "stages": [repr(transform) for transform in self.transforms],
            "objective": repr(self.objective),
            "solver": repr(self.solver),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
        }


def _told(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def prepare(files: Files, settings: Settings) -> Plan:
    """Read and check everything; nothing is written.

    Raises SettingsError, ImageReadError, TransformReadError, DeviceError or MissingExtraError.
    """
    transforms, objective, solver = settings.transforms(), settings.objective(), settings.solver()
    device = _device(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    fixed, moving = io.read_image(files.fixed), io.read_image(files.moving)
    if fixed.data.dtype != moving.data.dtype:
        fixed, moving = (Image(image.data.to(torch.float64), image.grid) for image in (fixed, moving))
    subjects = [
        Subject(image.to(device), _mask(mask, path, image, device))
        for image, path, mask in ((fixed, files.fixed, files.fixed_mask), (moving, files.moving, files.moving_mask))
    ]
    figures, notes = "figures" in settings.saves(), list[str]()
    if figures and not all(extras.present("plot").values()):
        figures = False
        notes.append('no figures were drawn, matplotlib is not installed: pip install "fnreg[plot]"')
    initial = _initial(settings, fixed.grid, device)
    return Plan(files, settings, subjects[0], subjects[1], transforms, objective, solver, initial, figures, notes)


def _device(settings: Settings) -> torch.device:
    try:
        device = torch.device(settings.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise DeviceError(f"device {settings.device!r} cannot be used: {reason}; see fnreg doctor") from problem
    return device


def _mask(path: Path | None, of: Path, image: Image, device: torch.device) -> Tensor | None:
    if path is None:
        return None
    mask = io.read_image(path)
    if mask.grid.size != image.grid.size:
        sizes = [" x ".join(map(str, grid.size)) for grid in (mask.grid, image.grid)]
        raise ImageReadError(f"mask {path} has {sizes[0]} pixels but {of} has {sizes[1]}: give a mask of its size")
    if not bool((mask.data > 0).any()):
        raise ImageReadError(f"mask {path} is zero everywhere: pixels above 0 count, and there are none")
    return (mask.data > 0).to(device)


def _initial(settings: Settings, grid: Grid, device: torch.device) -> Mapping | None:
    if settings.init in ("header", "center", "moments", "search"):
        return None
    mapping = io.read_transform(settings.init)
    try:
        matrix = mapping.matrix()
    except ValueError as problem:
        raise TransformReadError(f"{settings.init} cannot be a start: {problem}") from None
    if matrix.shape != (grid.ndim + 1, grid.ndim + 1):
        raise TransformReadError(
            f"{settings.init} has a matrix {tuple(matrix.shape)}: expected one map of {grid.ndim} axes"
        )
    return fnreg.linear_mapping(matrix.to(device), grid.to(device))


def execute(plan: Plan, folder: OutputFolder, progress: Callable[[Event], None] | None = None) -> dict[str, Any]:
    """Register, write into the folder's scratch, commit; returns what run.json holds.

    Raises RegistrationError where the pair could not be registered, OSError where something could not be written.
    """
    settings, begin = plan.settings, time.perf_counter()
    first = plan.transforms[0]
    grid = plan.fixed.image.grid
    identity = plan.initial or Mapping(first.init(grid), grid, first)
    shared: dict[str, Any] = {"objective": plan.objective, "padding": settings.outside()}
    counts = settings.counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, before_terms = evaluate(plan.fixed, plan.moving, identity, **shared)
        result = register(
            plan.fixed,
            plan.moving,
            [Stage(transform) for transform in plan.transforms],
            solver=plan.solver,
            levels=settings.levels,
            steps=counts[0] if len(counts) == 1 else counts,
            initial=plan.initial,
            starts=first.spread(grid, STARTS) if settings.init == "search" else None,
            start=settings.init if settings.init in ("center", "moments") else "header",
            progress=progress,
            **shared,
        )
    seconds = time.perf_counter() - begin
    notes = [str(warning.message) for warning in caught]
    if float(result.value) > float(before):
        notes.append(f"the objective rose from {float(before):.4g} to {float(result.value):.4g}: look at the figures")
    saves = [name for name in settings.saves() if name != "figures" or plan.figures]
    title = f"{plan.files.moving.name} to {plan.files.fixed.name}: {settings.transform}"
    results.write(
        folder.scratch, result, plan.fixed.image, plan.moving.image, saves, objective=repr(plan.objective), title=title
    )
    record = plan.record() | results.outcome(result, float(before), before_terms)
    record |= {"status": "warn" if notes else "ok", "warnings": [*plan.notes, *notes], "seconds": round(seconds, 3)}
    record["peak_mb"] = results.peak_megabytes(plan.fixed.image.data.device)
    written = sorted(
        path.relative_to(folder.scratch).as_posix() for path in folder.scratch.rglob("*") if path.is_file()
    )
    record["written"] = [*written, "run.json"]
    write_bytes(folder.scratch / "run.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    folder.commit()
    return record
