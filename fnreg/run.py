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
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fnreg
from fnreg import agreement, extras, results
from fnreg.beginning import Begin, before, begin_from_file, starting
from fnreg.image import Subject
from fnreg.io.files import Print, fingerprints, write_bytes
from fnreg.lattice import Lattice, own, own_mapping
from fnreg.levels import Event
from fnreg.loading import Files, device_of, read, settings_stages, try_stage
from fnreg.notes import hearing
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
    prints: dict[str, Print]  # of the bytes that were read

    def record(self) -> dict[str, Any]:
        """What is about to be done, for run.json and --dry-run."""
        names = ("fixed", "moving", "fixed_mask", "moving_mask")
        paths = {name: path for name in names if (path := getattr(self.files, name)) is not None}
        paths |= self.files.known.named()
        paths |= {} if self.begin is None else {"start": Path(self.settings.start)}
        known = {str(path) for path in paths.values()}
        inputs = {name: self._told(path, known) for name, path in paths.items()}
        beside = [name for name in self.prints if name not in known and str(Path(name).parent) not in known]
        versions = {name: metadata.version(name) for name in ("torch", "torchopt", "numpy", "safetensors")}
        return {
            "fnreg": fnreg.__version__,
            "inputs": inputs,
            "beside": [self._told(Path(name), known) for name in beside],  # such as the voxels of a header
            "output": str(self.files.output),
            "settings": self.settings.given(),
            "stages": [repr(stage if self.settings.preset else stage.transform) for stage in self.stages],
            "objective": repr(self.stages[-1].objective),
            "solver": repr(self.stages[-1].solver or self.stages[-1].optimizer or self.options["solver"]),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
        }

    def _told(self, path: Path, known: set[str]) -> dict[str, Any]:
        """Of a folder the slices: not the other inputs, whose paths are `known`, that lie in it."""
        if str(path) in self.prints:
            size, _, sha = self.prints[str(path)]
            return {"path": str(path), "bytes": size, "sha256": sha}
        slices = sorted(name for name in self.prints if Path(name).parent == path and name not in known)
        if not slices:
            raise RuntimeError(f"{path} was not read, and no file in it: nothing can be told of its content")
        whole = hashlib.sha256(b"".join(bytes.fromhex(self.prints[name][2]) for name in slices))
        return {"path": str(path), "files": len(slices), "sha256": whole.hexdigest()}


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
    with fingerprints() as prints:
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
    with fingerprints() as of_start:
        begun = begin_from_file(settings.start, stages[0].transform, domain)
    prints |= of_start
    return Plan(files, settings, *subjects, pair.known, stages, options, begun, lattice, figures, notes, prints)


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
    with hearing() as heard:
        looks = {name: plan.options[name] for name in ("padding", "symmetric") if name in plan.options}
        start, value, terms = before(fixed, moving, begun, plan.stages, **looks)
        result = register(fixed, moving, plan.stages, **how, progress=progress, **plan.options)
    if plan.lattice is not None:
        start, result = own_mapping(start, grid), own(result, grid, plan.moving.image.grid)
    seconds = time.perf_counter() - clock
    notes = [note.text for note in heard if note.kind in (UserWarning, SpeedWarning)]
    found = results.outcome(result, float(value), terms)
    notes += results.remarks(float(value), float(result.value), found.get("folds"), settings)
    (metrics_before, unmoved), (metrics, labels) = (
        agreement.agreement(plan.known, mapping, grid, plan.moving.image) for mapping in (start, result.mapping)
    )
    if metrics:
        found["metrics"] = {"before": metrics_before, "after": metrics}
        notes += agreement.worse(metrics_before, metrics)
    saves = [name for name in settings.saves() if name != "figures" or plan.figures]
    inverse = results.invert(result) if "inverse" in saves else results.Inverse(None, {})
    found |= inverse.away
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
