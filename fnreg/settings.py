"""The settings of a registration as plain data: as the command line and a TOML file give them, checked and made values.

Names are those of Python where they mean the same.  This module does not import torch until values are made, so that
`fnreg --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fnreg.losses.terms import Term
    from fnreg.transforms.linear import Linear

TRANSFORMS = {
    "translation": "Translation",
    "rotation": "Rotation",
    "rigid": "Rigid",
    "similarity": "Similarity",
    "scaling": "Scaling",
    "isotropic-scaling": "IsotropicScaling",
    "shearing": "Shearing",
    "affine": "Affine",
}
SIMILARITIES = ("mse", "mae", "huber", "ncc")
OPTIMIZERS = ("adam", "sgd", "gauss-newton")
INITS = ("header", "center", "moments", "search")
PADDINGS = ("none", "zeros", "border", "reflection")
SAVES = ("params", "xfm", "warped", "figures", "inverse")
STARTS = 36  # of init "search"


class SettingsError(ValueError):
    """A setting is unknown, misspelt or out of range."""


def choose(what: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices; else SettingsError that lists them and guesses what was meant."""
    known = list(choices)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1, 0.7)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SettingsError(f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}")


def parse_spec(what: str, text: str) -> tuple[str, dict[str, float | bool]]:
    """A name with options: `adam:lr=0.3,decay=0.1` gives ("adam", {"lr": 0.3, "decay": 0.1})."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, float | bool] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            options[key] = {"true": True, "false": False}[value] if value in ("true", "false") else float(value)
        except ValueError:
            equals = ""
        if not (key and equals):
            raise SettingsError(f"{what} {text!r}: expected NAME or NAME:option=number, such as adam:lr=0.3")
    return name, options


def _make(what: str, text: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """factory(**options), with errors that name the setting."""
    if isinstance(factory, type):
        known = [field.name for field in dataclasses.fields(factory)]
        for name in options:
            if name not in known:
                told = ", ".join(known) if known else "none"
                raise SettingsError(f"{what} {text!r} has no option {name!r}: its options are {told}")
    try:
        return factory(**options)
    except (TypeError, ValueError) as problem:
        raise SettingsError(f"{what} {text!r}: {problem}") from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a pair is registered.

    transform : stages, joined by +, such as "rigid+affine"; see `TRANSFORMS`
    similarity : what is minimised, with options, such as "huber:delta=0.1"; see `SIMILARITIES`
    optimizer : with options, such as "adam:lr=0.3" or "gauss-newton"; see `OPTIMIZERS`
    levels : images of the pyramid
    steps : per level, from coarse to fine, joined by x, such as "100x50x10"; one number serves all levels
    init : "header", "center", "moments", "search" over angles, or a transform file
    padding : what moving is outside of its image: "none" counts nothing there, or a name of `PADDINGS`, or a number
    save : what is written, joined by +; see `SAVES`
    seed : of torch's random numbers; threads : of torch, 0 leaves them; device : of torch
    """

    transform: str = "rigid"
    similarity: str = "mse"
    optimizer: str = "adam:lr=0.3"
    levels: int = 3
    steps: str = "100"
    init: str = "header"
    padding: str = "none"
    save: str = "params+xfm+warped+figures"
    seed: int = 0
    threads: int = 0
    device: str = "cpu"

    @staticmethod
    def gather(given: Mapping[str, Any], file: Path | None = None) -> Settings:
        """Settings from what was given on the command line (None: not given), a TOML file, and the defaults, in this
        order of precedence.  Raises SettingsError, with the known names, for an unknown one."""
        found = {} if file is None else _read(file)
        found |= {key: value for key, value in given.items() if value is not None}
        if "steps" in found and "levels" not in found and len(_steps(str(found["steps"]))) > 1:
            found["levels"] = len(_steps(str(found["steps"])))
        made = Settings(**found)
        made.check()
        return made

    def check(self) -> None:
        """SettingsError for the first thing that is wrong."""
        for name in self.transform.split("+"):
            choose("transform", parse_spec("transform", name)[0], TRANSFORMS)
        choose("similarity", parse_spec("similarity", self.similarity)[0], SIMILARITIES)
        choose("optimizer", parse_spec("optimizer", self.optimizer)[0], OPTIMIZERS)
        for name in self.saves():
            choose("save", name, SAVES)
        if self.levels < 1:
            raise SettingsError(f"levels is {self.levels}: expected at least 1")
        if len(self.counts()) not in (1, self.levels):
            raise SettingsError(f"steps {self.steps!r} has {len(self.counts())} numbers for {self.levels} levels")
        if self.threads < 0 or self.seed < 0:
            raise SettingsError(f"threads is {self.threads} and seed {self.seed}: expected 0 or more")
        self.outside()
        if self.init not in INITS and "." not in self.init and "/" not in self.init:
            choose("init", self.init, (*INITS, "or a file"))

    def counts(self) -> list[int]:
        """Steps per level, coarse to fine, or one number for all."""
        return _steps(self.steps)

    def saves(self) -> list[str]:
        """What is to be written."""
        return [name.strip() for name in self.save.replace(",", "+").split("+")]

    def outside(self) -> Any:
        """The padding as `register` takes it."""
        if self.padding in PADDINGS:
            return None if self.padding == "none" else self.padding
        try:
            return float(self.padding)
        except ValueError:
            return choose("padding", self.padding, (*PADDINGS, "or a number"))

    # -- values, which need torch -----------------------------------------------------------------------------

    def transforms(self) -> list[Linear]:
        """A transform per stage."""
        import fnreg

        made: list[Linear] = []
        for text in self.transform.split("+"):
            name, options = parse_spec("transform", text)
            made.append(_make("transform", text, getattr(fnreg, TRANSFORMS[name]), options))
        first = made[0]
        if self.init == "search" and "rotation" not in first.parts:
            raise SettingsError(f"init search turns the images, but {self.transform!r} does not begin with a rotation")
        if self.init in ("center", "moments") and not first.translates:
            raise SettingsError(
                f"init {self.init} shifts the images, but {self.transform!r} does not begin with a shift"
            )
        return made

    def objective(self) -> Term:
        """The similarity as a term."""
        from fnreg.losses import terms

        name, options = parse_spec("similarity", self.similarity)
        term = terms.SIMILARITIES[name]
        if options:
            term = _make("similarity", self.similarity, term, options)
            if options.get("delta", 1.0) <= 0:
                raise SettingsError(f"similarity {self.similarity!r}: delta must be positive")
        return term

    def solver(self) -> Any:
        """The solver with its optimizer."""
        import fnreg

        name, options = parse_spec("optimizer", self.optimizer)
        if name == "gauss-newton":
            if self.objective().residuals is None:
                raise SettingsError(f"gauss-newton minimises squares, {self.similarity} has none: choose mse or ncc")
            return _make("optimizer", self.optimizer, fnreg.GaussNewton, options)
        factory = {"adam": fnreg.adam, "sgd": fnreg.sgd}[name]
        return fnreg.Descent(_make("optimizer", self.optimizer, factory, options))


def _steps(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise SettingsError(f"steps {text!r}: expected numbers joined by x, from coarse to fine, such as 100x50x10")
    return counts


def _read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file, of the right types."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise SettingsError(f"settings file {file} cannot be read: {problem.strerror or problem}") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SettingsError(f"settings file {file} is not valid TOML: {problem}") from problem
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    made: dict[str, Any] = {}
    for key, value in found.items():
        choose(f"setting in {file}:", key, kinds)
        if key == "steps" and isinstance(value, list):
            value = "x".join(str(part) for part in value)
        if kinds[key] is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if type(value) is not kinds[key]:
            raise SettingsError(f"{key} in {file} is {value!r}: expected {'text' if kinds[key] is str else 'a number'}")
        made[key] = value
    return made
