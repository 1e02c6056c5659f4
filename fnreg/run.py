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

import fnreg
from fnreg import agreement, extras, results
from fnreg.beginning import Begin, before, begin_from_file, starting
from fnreg.image import Subject
from fnreg.io.files import write_bytes
from fnreg.lattice import Lattice, own, own_mapping
from fnreg.levels import Event
from fnreg.loading import Files, device_of, read, settings_stages, try_stage
from fnreg.output import OutputFolder
from fnreg.registration import SpeedWarning, register
from fnreg.settings import Settings
from fnreg.specs import SettingsError
from fnreg.stages import Stage


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
    lattice: Lattice | None
    figures: bool
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """What is about to be done, for run.json and --dry-run."""
        inputs: dict[str, Any] = {}
        start = None if self.begin is None else Path(self.settings.start)
        for name in ("fixed", "moving", "fixed_mask", "moving_mask"):
            if (path := getattr(self.files, name)) is not None:
                inputs[name] = _told(path)
        inputs |= {name: _told(path) for name, path in self.files.known.named().items()}
        if start is not None:
            inputs["start"] = _told(start)
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
    stages, options = settings_stages(settings)
    device = device_of(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    figures = "figures" in settings.saves()
    pair = read(files, settings.start, stages[0].transform)
    notes, subjects = list(pair.notes), pair.subjects(device)
    if figures and not all(extras.present("plot").values()):
        figures = False
        notes.append('no figures were drawn, matplotlib is not installed: pip install "fnreg[plot]"')
    for stage in stages:
        try_stage(stage, subjects[0].image)
    lattice = Lattice.of(settings, [stage.transform for stage in stages], options.get("padding"))
    domain = subjects[0].image.grid
    if lattice is not None:
        try:
            domain, _ = lattice.grids(domain, subjects[1].image.grid)
        except ValueError as problem:
            raise SettingsError(str(problem)) from None
    begun = begin_from_file(settings.start, stages[0].transform, domain)
    return Plan(files, settings, *subjects, pair.known, stages, options, begun, lattice, figures, notes)


def execute(plan: Plan, folder: OutputFolder, progress: Callable[[Event], None] | None = None) -> dict[str, Any]:
    """Register, write into the folder's scratch, commit; returns what run.json holds.

    Raises RegistrationError where the pair could not be registered, OSError where something could not be written.
    """
    settings, clock = plan.settings, time.perf_counter()
    first, last = plan.stages[0].transform, plan.stages[-1]
    grid = plan.fixed.image.grid
    begun = plan.begin or Begin()
    fixed, moving, initial = plan.fixed, plan.moving, None
    if plan.lattice is not None:
        initial = plan.lattice.begin(settings.start, first, fixed, moving)
        fixed, moving = plan.lattice.place(fixed, moving)
    how = starting(begun, settings.start, first, fixed.image.grid)
    how |= {} if initial is None else {"initial": initial, "start": "header"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        looks = {name: plan.options[name] for name in ("padding", "symmetric") if name in plan.options}
        start, value, terms = before(fixed, moving, begun, plan.stages, **looks)
        result = register(fixed, moving, plan.stages, **how, progress=progress, **plan.options)
    if plan.lattice is not None:
        start, result = own_mapping(start, grid), own(result, grid, plan.moving.image.grid)
    seconds = time.perf_counter() - clock
    ours = UserWarning, SpeedWarning  # not those of what torch imports
    notes = [str(warning.message) for warning in caught if warning.category in ours]
    found = results.outcome(result, float(value), terms)
    notes += results.remarks(float(value), float(result.value), found.get("folds"), settings)
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
