"""Options that say how to register, of one pair and of data sets alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fnreg.commands.base import option
from fnreg.settings import (
    LATTICES,
    OPTIMIZERS,
    PADDINGS,
    PENALTIES,
    PRESETS,
    SIMILARITIES,
    SPACES,
    SYMMETRIC,
    TRANSFORMS,
    Settings,
    pointing,
)

Preset = Annotated[
    str | None, option(f"Tuned settings in place of --transform to --steps and --padding: {', '.join(PRESETS)}.")
]
Stages = Annotated[
    str | None,
    option(f"Stages joined by +, of: {', '.join(TRANSFORMS)}; options as affine+svffd:stride=4. [default: rigid]"),
]
Similarity = Annotated[
    str | None, option(f"One of {', '.join(SIMILARITIES)}; options as huber:delta=0.1. [default: mse]")
]
Penalty = Annotated[
    list[str] | None,
    option(
        f"What keeps ffd and the like smooth, with its weight, as bending=1e-3; may be given again; one of "
        f"{', '.join(PENALTIES)}; options as elasticity=0.01:mu=2. [default: none]"
    ),
]
Symmetric = Annotated[
    bool | None, option(f"Count the loss of both directions, in the stages of {' and '.join(SYMMETRIC)}.")
]
Optimizer = Annotated[
    str | None,
    option(
        f"One of {', '.join(OPTIMIZERS)}; options as adam:lr=0.3. [default: adam:lr=0.3]", "--optimizer", "--solver"
    ),
]
Levels = Annotated[int | None, option("Images of the pyramid. [default: 3]")]
Steps = Annotated[
    str | None,
    option("Per level, coarse to fine, as 100x50x10; one number serves all. [default: 100]", "--steps", "-n"),
]
Space = Annotated[
    str | None, option(f"Where points that do not say it are: {', '.join(SPACES)}, indices of their image.")
]
Start = Annotated[
    str | None,
    option("Start: auto, header, center, moments, search (36 angles) or a transform file. [default: auto]"),
]
Padding = Annotated[
    str | None,
    option(f"Outside of the moving image: {', '.join(PADDINGS)} or a number; none counts nothing. [default: none]"),
]
Lattice = Annotated[
    str | None,
    option(
        f"Pad images of different shapes to sizes that many share: {', '.join(LATTICES)} or a size, x first, as "
        "64x64x48. [default: none]"
    ),
]
Seed = Annotated[int | None, option("Of random numbers. [default: 0]")]
Threads = Annotated[int | None, option("Of torch. [default: as torch chooses]")]
Device = Annotated[str | None, option("Of torch, as cuda:0. [default: cpu]")]
SettingsFile = Annotated[Path | None, option("TOML file with these options by name; options given here win.")]
Assigned = Annotated[
    list[str] | None, option("A setting by its name in such a file, as levels=2; may be given again.", "--set")
]


@Parameter(name="*", group="How to register")
@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """These options, of whatever registers."""

    preset: Preset = None
    transform: Stages = None
    similarity: Similarity = None
    penalty: Penalty = None
    symmetric: Symmetric = None
    optimizer: Optimizer = None
    levels: Levels = None
    steps: Steps = None
    start: Start = None
    padding: Padding = None
    lattice: Lattice = None
    seed: Seed = None
    threads: Threads = None
    device: Device = None
    settings: SettingsFile = None
    assign: Assigned = None

    def chosen(self, save: str | None, defaults: Mapping[str, Any] | None = None) -> Settings:
        """The settings; save : the option that says what is written; defaults : where commands have their own."""
        with self.pointing(save):
            return Settings.gather(self._given(save), self.settings, assigned=self.assign or (), defaults=defaults)

    def pointing(self, save: str | None) -> AbstractContextManager[None]:
        """Within it an error that is about a line of the settings file says so."""
        here = {name for name, value in self._given(save).items() if value is not None}
        return pointing(self.settings, here | {text.partition("=")[0] for text in self.assign or ()})

    def _given(self, save: str | None) -> dict[str, Any]:
        """By the names of `Settings`, None where an option is not given; penalties are joined."""
        given = {name: value for name, value in vars(self).items() if name not in ("settings", "assign")}
        return given | {"penalty": "+".join(self.penalty) if self.penalty else None, "save": save}
