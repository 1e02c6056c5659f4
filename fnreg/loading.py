"""Settings and a pair of files made ready for `register`: what one pair and a data set have in common.

Everything that can be wrong with them is looked at here, before the work begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnreg import agreement, io, notes, presets
from fnreg.image import Image, Subject
from fnreg.io.files import ImageReadError
from fnreg.losses.objective import objective as as_objective
from fnreg.placement import gap
from fnreg.search import searched
from fnreg.settings import Settings
from fnreg.specs import SettingsError
from fnreg.stages import Stage
from fnreg.transforms.base import Transform


class DeviceError(RuntimeError):
    """The device is not there."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What a registration reads and where it writes."""

    fixed: Path
    moving: Path
    output: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    known: agreement.Paths = agreement.Paths()


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """What the files of a pair hold, on the CPU; notes : what their headers left open."""

    fixed: Image
    moving: Image
    masks: tuple[Tensor | None, Tensor | None]
    known: agreement.Known
    notes: tuple[str, ...] = ()

    def subjects(self, device: torch.device) -> tuple[Subject, Subject]:
        """Both sides with all that is known about them."""
        fixed = self.known.of(0, self.fixed.to(device), self.masks[0])
        return fixed, self.known.of(1, self.moving.to(device), self.masks[1])


def read(files: Files, start: str, first: Transform, image: Callable[[Path], Image] = io.read_image) -> Read:
    """Read a pair and check that its parts fit together.

    start : as of `Settings`; first : the transform of the first stage
    image : what reads an image

    Raises ImageReadError, PointReadError, SettingsError or MissingExtraError.
    """
    with notes.hearing() as heard:
        fixed, moving = image(files.fixed), image(files.moving)
        told = _fit(files, start, first, fixed, moving)
        sides = (files.fixed_mask, files.fixed, fixed), (files.moving_mask, files.moving, moving)
        masks = _mask(*sides[0], image), _mask(*sides[1], image)
        known = agreement.read(files.known, (files.fixed, files.moving), (fixed, moving))
    told += [note.text for note in heard if note.kind is io.GeometryWarning]
    if fixed.data.dtype != moving.data.dtype:
        fixed, moving = (Image(image.data.to(torch.float64), image.grid) for image in (fixed, moving))
    return Read(fixed, moving, masks, known, (*told, *known.notes))


def _fit(files: Files, start: str, first: Transform, fixed: Image, moving: Image) -> list[str]:
    """What is to be told of where the images lie; ImageReadError where they cannot be compared, or do not meet and the
    start is that of their headers."""
    for told, a, b in (("axes", fixed.grid.ndim, moving.grid.ndim), ("channels", fixed.channels, moving.channels)):
        if a != b:
            raise ImageReadError(
                f"{files.moving} has {b} {told} but {files.fixed} has {a}: give images that have as many"
            )
    apart = gap(fixed.grid, moving.grid)
    if apart == 0 or start not in ("header", "auto"):
        return []
    away = float((fixed.grid.center - moving.grid.center).norm())
    told = (
        f"{files.moving} and {files.fixed} do not overlap: their middles are {away:.4g} apart, and a gap of "
        f"{apart:.4g} at least is between them"
    )
    if start == "auto" and searched(first, fixed.grid.ndim) is not None:
        return [f"{told}; so the start is not that of their headers: check these"]
    raise ImageReadError(f"{told}; give --start center, or moments, or check their headers")


def _mask(path: Path | None, of: Path, image: Image, read: Callable[[Path], Image]) -> Tensor | None:
    if path is None:
        return None
    mask = read(path)
    if mask.grid.size != image.grid.size:
        sizes = [" x ".join(map(str, grid.size)) for grid in (mask.grid, image.grid)]
        raise ImageReadError(f"mask {path} has {sizes[0]} pixels but {of} has {sizes[1]}: give a mask of its size")
    if not mask.grid.same_as(image.grid, 0.1):
        raise ImageReadError(f"mask {path} lies elsewhere than {of}: {mask.grid} but {image.grid}; resample it")
    if not bool((mask.data > 0).any()):
        raise ImageReadError(f"mask {path} is zero everywhere: pixels above 0 count, and there are none")
    return (mask.data > 0).any(0, keepdim=True)


# -- settings ----------------------------------------------------------------------------------------------------------


def settings_stages(settings: Settings) -> tuple[list[Stage], dict[str, Any]]:
    """The stages, and the options of `register` that hold for all.  Raises SettingsError."""
    transforms = settings.transforms()
    if settings.preset:
        chosen = presets.PRESETS[settings.preset]
        options = {name: value for name, value in chosen.items() if name != "transform"}
        return [dataclasses.replace(s, objective=as_objective(s.objective)) for s in chosen["transform"]], options
    counts = settings.counts()
    options = {"solver": settings.solver(), "levels": settings.levels, "padding": settings.outside()}
    options |= {"steps": counts[0] if len(counts) == 1 else counts, "symmetric": settings.symmetric}
    return [Stage(transform, objective=settings.objective(transform)) for transform in transforms], options


def try_stage(stage: Stage, fixed: Image) -> None:
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


def device_of(settings: Settings) -> torch.device:
    """The device; DeviceError where it is not there."""
    try:
        device = torch.device(settings.device)
        torch.zeros(1, device=device).item()  # of a device without memory, meta, there are no values
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise DeviceError(f"device {settings.device!r} cannot be used: {reason}; see fnreg doctor") from problem
    return device
