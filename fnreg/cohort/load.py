"""A row of the table as what `register` takes, or why it cannot be registered.

Nothing here ends a run: an image that cannot be read is a result like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import traceback
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fnreg import agreement, optim
from fnreg.beginning import Begin, begin_from_file
from fnreg.cohort.manifest import Row
from fnreg.cohort.shared import SharedImages
from fnreg.cohort.study import PAIRS, fingerprint, settings_sha
from fnreg.extras import MissingExtraError
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import prepare
from fnreg.io.files import Print, fingerprints
from fnreg.lattice import Lattice, own, own_mapping
from fnreg.loading import Files, device_of, read, settings_stages, try_stage
from fnreg.pytree import tree_flatten
from fnreg.registration import Registration
from fnreg.settings import Settings
from fnreg.solvers.descent import Descent
from fnreg.specs import SettingsError
from fnreg.stages import Stage
from fnreg.transforms.base import Mapping

CPU = torch.device("cpu")
NOT_OF_RESULTS = ("threads", "device")  # settings that change results by rounding only


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What all pairs of a study share.

    stages, options : of `register`; space : of points that do not say it; folder : of the study
    lattice : that images of different shapes share, where they do
    images : what reads images, those that several pairs have only once
    """

    settings: Settings
    folder: Path
    stages: list[Stage]
    options: dict[str, Any]
    device: torch.device
    space: str | None = None
    lattice: Lattice | None = None
    tried: dict[Hashable, str] = dataclasses.field(default_factory=dict)
    images: SharedImages = dataclasses.field(default_factory=SharedImages)

    @staticmethod
    def of(settings: Settings, folder: Path, space: str | None = None) -> Asked:
        """Settings as values.  Raises SettingsError, DeviceError or MissingExtraError."""
        stages, options = settings_stages(settings)
        solver = options.get("solver")
        if isinstance(solver, Descent):  # torchopt's counts the steps of all pairs together: they could not take turns
            options["solver"] = dataclasses.replace(solver, optimizer=optim.purely(solver.optimizer))
        lattice = Lattice.of(settings, [stage.transform for stage in stages], options.get("padding"))
        return Asked(settings, folder, stages, options, device_of(settings), space, lattice)

    @property
    def refills(self) -> bool:
        """Whether pairs end each at its own time, so that others can take their places."""
        told = [stage.stop for stage in self.stages if stage.stop != "inherit"]
        return None not in (*told, self.options.get("stop", ""))

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The settings by which the results of a study are told from others."""
        given = self.settings.given().items()
        return {name: value for name, value in given if name not in NOT_OF_RESULTS} | {"space": self.space or ""}

    @functools.cached_property
    def sha(self) -> str:
        """Of these settings."""
        return settings_sha(self.values)

    def check(self, fixed: Subject, moving: Subject) -> None:
        """ValueError for what is wrong with images, SettingsError where a stage does not go with images of their size.

        What the size says is looked at once, what the intensities say only where a first look is not reassuring.
        """
        kind = _structure((fixed, moving))
        new = kind not in self.tried
        if new or not all(_is_plain(side) for side in (fixed, moving)):
            objectives = [stage.objective for stage in self.stages]
            for bad, status in prepare(fixed, moving, None, levels=1, min_size=1, objectives=objectives).faults():
                if bool(bad.any()):
                    raise ValueError(status.remedy)
        if new:
            try:
                for stage in self.stages:
                    try_stage(stage, Image(fixed.image.data, Grid(fixed.image.grid.size)))
                self.tried[kind] = ""
            except SettingsError as problem:
                self.tried[kind] = str(problem)
        if self.tried[kind]:
            raise SettingsError(self.tried[kind])


class Inputs(NamedTuple):
    """Fingerprints by path: `files` of those that the row names, `beside` of others that belong to them."""

    files: dict[str, Print]
    beside: dict[str, Print]


class Ready(NamedTuple):
    """A pair as a batch takes it; initial : its start, where that was found before."""

    fixed: Subject
    moving: Subject
    begun: Begin
    initial: Mapping | None


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A pair in memory, on the CPU.

    start : as of `Settings`, for this pair; begun : what a file of it says
    key : pairs with equal keys can share a batch
    lattice : on which it does, else as it is
    """

    row: Row
    fixed: Subject
    moving: Subject
    known: agreement.Known
    start: str
    begun: Begin
    inputs: Inputs
    notes: tuple[str, ...]
    key: Hashable
    initial: Mapping | None = None
    lattice: Lattice | None = None

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Those of the images as they are."""
        return self.fixed.image.grid, self.moving.image.grid

    @property
    def voxels(self) -> int:
        """Values of both images as a batch takes them."""
        sizes = [grid.size for grid in self.grids]
        sizes = sizes if self.lattice is None else self.lattice.sizes(*sizes)
        return self.fixed.image.channels * sum(map(math.prod, sizes))

    def ready(self) -> Ready:
        """What goes into a batch: the images, on the lattice where there is one."""
        sides = self.fixed, self.moving
        return Ready(*(sides if self.lattice is None else self.lattice.place(*sides)), self.begun, self.initial)

    def own(self, start: Mapping, result: Registration) -> tuple[Mapping, Registration]:
        """What came out of a batch, on the grids of the images as they are."""
        if self.lattice is None:
            return start, result
        return own_mapping(start, self.grids[0]), own(result, *self.grids)


@dataclasses.dataclass(frozen=True, eq=False)
class Refused:
    """A pair that cannot be registered, and why; trace : of an error that fnreg did not expect."""

    row: Row
    reason: str
    inputs: Inputs
    trace: str = ""
    status: str = "invalid_input"


def crashed(row: Row) -> Refused:
    """A pair that is not to be tried again: it may have ended the process that tried it."""
    reason = "the process ended while it worked on this pair alone, twice: see what --retry-failed does with it"
    return Refused(row, reason, _inputs(row, {}), status="crashed")


def files_of(row: Row, asked: Asked) -> Files:
    """The files of a row, as one registration has them."""
    known = row.files.get
    labels, points = (
        (known(f"fixed_{what}"), known(f"moving_{what}")) for what in ("labels", "points")
    )  # of either side
    paths = agreement.Paths(labels, points, asked.space, shared=True)
    output = asked.folder / PAIRS / row.pair_id
    return Files(row.files["fixed"], row.files["moving"], output, known("fixed_mask"), known("moving_mask"), paths)


def load(row: Row, asked: Asked) -> Loaded | Refused:
    """Read a row and check it, or say why not; MissingExtraError where a package is missing, which no row can help."""
    with fingerprints() as seen:
        try:
            found = _load(row, asked)
        except MissingExtraError:
            raise
        except Exception as problem:
            return Refused(row, told(problem), _inputs(row, seen), trace_of(problem))
    return dataclasses.replace(found, inputs=_inputs(row, seen))


def _load(row: Row, asked: Asked) -> Loaded:
    start = str(row.files.get("initial", asked.settings.start))
    first = asked.stages[0].transform
    pair = read(files_of(row, asked), start, first, asked.images.read)
    fixed, moving = Subject(pair.fixed, pair.masks[0]), Subject(pair.moving, pair.masks[1])
    asked.check(fixed, moving)
    lattice, initial, domain = asked.lattice, None, pair.fixed.grid
    kind: Hashable = _structure((fixed, moving))
    if lattice is not None:
        grids = domain, _ = lattice.grids(pair.fixed.grid, pair.moving.grid)
        masked = fixed.mask is not None, moving.mask is not None
        kind = tuple(grid.size for grid in grids), pair.fixed.channels, pair.fixed.data.dtype, masked
        initial = lattice.begin(start, first, fixed, moving)
    found = begin_from_file(start, first, domain)
    begun = Begin() if found is None else found
    key = start if found is None else _structure(begun), kind
    return Loaded(row, fixed, moving, pair.known, start, begun, Inputs({}, {}), pair.notes, key, initial, lattice)


def _is_plain(side: Subject) -> bool:
    """Whether an image has no mask, and finite intensities that vary."""
    low, high = torch.aminmax(side.image.data)  # NaN where one is
    return side.mask is None and bool(torch.isfinite(low) & torch.isfinite(high) & (low < high))


def _structure(tree: Any) -> Hashable:
    """What trees have to share so that they can be stacked."""
    leaves, spec = tree_flatten(tree)
    return spec, tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves)


def told(problem: BaseException) -> str:
    """An error in one line, with its kind where that is not one of those that fnreg words itself."""
    text = " ".join(str(problem).split())
    ours = isinstance(problem, (ValueError, OSError)) and text
    return text if ours else f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def trace_of(problem: BaseException) -> str:
    """Where an error came from, where it is not one of those that fnreg words itself."""
    return "" if isinstance(problem, (ValueError, OSError)) else "".join(traceback.format_exception(problem))


def _inputs(row: Row, seen: dict[str, Print]) -> Inputs:
    """Of what was read the very bytes; a file that was not reached is looked at now."""
    files: dict[str, Print] = {}
    for path in row.files.values():
        if str(path) in seen:
            files[str(path)] = seen[str(path)]
            continue
        try:
            files[str(path)] = fingerprint(path)
        except OSError:  # gone meanwhile: so the row is not finished
            continue
    return Inputs(files, {name: value for name, value in seen.items() if name not in files})
