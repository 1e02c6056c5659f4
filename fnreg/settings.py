"""The settings of a registration as plain data: as the command line and a TOML file give them, checked and made values.

Names are those of Python where they mean the same.  This module does not import torch until values are made, so that
`fnreg --help` is quick.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnreg.specs import Option, SettingsError, choose, make, parse_spec, try_term

if TYPE_CHECKING:
    from fnreg.losses.objective import Objective, Term
    from fnreg.transforms.base import Transform

TRANSFORMS = {
    "translation": "Translation",
    "rotation": "Rotation",
    "rigid": "Rigid",
    "similarity": "Similarity",
    "scaling": "Scaling",
    "isotropic-scaling": "IsotropicScaling",
    "shearing": "Shearing",
    "affine": "Affine",
    "ffd": "FFD",
    "svffd": "SVFFD",
    "svf": "SVF",
    "displacement": "Displacement",
    "diffeomorphism": "Diffeomorphism",
}
DENSE = ("ffd", "svffd", "svf", "displacement", "diffeomorphism")
SYMMETRIC = ("svffd", "svf")  # whose negative parameters are those of the inverse map
PENALTIES = (
    "bending", "diffusion", "curvature", "elasticity", "divergence", "total_variation", "folding", "log_jacobian",
    "inverse_consistency",
)  # fmt: skip
SIMILARITIES = ("mse", "mae", "huber", "charbonnier", "ncc", "lncc", "mi", "nmi", "correlation_ratio", "ngf", "mind")
OPTIMIZERS = ("adam", "sgd", "normalized", "gauss-newton", "newton-cg", "lbfgs")
OBJECTIVE_NEEDED = {"newton-cg": "NewtonCG", "lbfgs": "LBFGS"}  # solvers whose transform descends an objective
STARTS = ("auto", "header", "center", "moments", "search")
LATTICES = ("none", "auto")
PADDINGS = ("none", "zeros", "border", "reflection")
SPACES = ("LPS", "RAS", "voxel")  # of points
DRAWN = ("worst", "all", "none")  # pairs of whom a report has pictures
SAVES = ("params", "xfm", "warped", "figures", "inverse", "displacement", "jacobian")
PRESETS = {
    name: "affine+diffeomorphism" for name in ("brain", "brain_fast")
}  # of `fnreg.presets`, with their transforms
OF_PRESETS = ("transform", "similarity", "penalty", "symmetric", "optimizer", "levels", "steps", "padding")
LISTS = {"steps": "x", "penalty": "+", "transform": "+", "save": "+"}  # what may be lists in files, and how they join
SEARCHED = 36  # angles of the start "search"


def parse_penalty(text: str) -> tuple[str, float, dict[str, Option]]:
    """A name with its weight and options: `elasticity=0.01:mu=2` gives ("elasticity", 0.01, {"mu": 2.0})."""
    head, colon, rest = text.strip().partition(":")
    name, equals, weight = (piece.strip() for piece in head.partition("="))
    choose("penalty", name, PENALTIES)
    try:
        value = float(weight) if equals else math.nan
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise SettingsError(f"penalty {text!r}: expected NAME=WEIGHT with a weight of 0 or more, such as bending=1e-3")
    return name, value, parse_spec("penalty", f"{name}:{rest}")[1] if colon else {}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a pair is registered.

    preset : a name of `PRESETS`, which decides what `OF_PRESETS` lists
    transform : stages, joined by +, with options, such as "affine+svffd:stride=4"; see `TRANSFORMS`
    similarity : what is minimised, with options, such as "huber:delta=0.1"; see `SIMILARITIES`
    penalty : on the fields of the stages in `DENSE`, weights by name, joined by +, such as "bending=1e-3", with options
        as "elasticity=0.01:mu=2,lam=1"; see `PENALTIES`
    symmetric : the loss of both directions in the stages in `SYMMETRIC`
    optimizer : with options, such as "adam:lr=0.3" or "gauss-newton"; see `OPTIMIZERS`
    levels : images of the pyramid
    steps : per level, from coarse to fine, joined by x, such as "100x50x10"; one number serves all levels
    start : "auto" chooses among headers, centres, moments and rotations by trying, for a linear first stage; "header",
        "center", "moments", "search" over angles, or a transform file
    padding : what moving is outside of its image: "none" counts nothing there, or a name of `PADDINGS`, or a number
    lattice : images of different shapes are padded, without loss, to sizes that many of them share: "auto", or the size
        of all, x first, such as "64x64x48"; "none" leaves them
    save : what is written, joined by +; see `SAVES`
    seed : of torch's random numbers; threads : of torch, 0 leaves them; device : of torch
    """

    preset: str = ""
    transform: str = "rigid"
    similarity: str = "mse"
    penalty: str = ""
    symmetric: bool = False
    optimizer: str = "adam:lr=0.3"
    levels: int = 3
    steps: str = "100"
    start: str = "auto"
    padding: str = "none"
    lattice: str = "none"
    save: str = "params+xfm+warped+figures"
    seed: int = 0
    threads: int = 0
    device: str = "cpu"

    @staticmethod
    def gather(
        given: Mapping[str, Any],
        file: Path | None = None,
        *,
        assigned: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Settings from what was given on the command line (None: not given), a TOML file, and the defaults, in this
        order of precedence.

        assigned : also of the command line, as NAME=VALUE; defaults : where they are not those of `Settings`
        Raises SettingsError, with the known names, for an unknown one, and for one that is given twice."""
        found = {} if file is None else _read(file)
        named = {key: value for key, value in given.items() if value is not None}
        for text in assigned:
            key, value = _assigned(text)
            if key in named:
                raise SettingsError(f"--set {text} gives {key} a second time: give it once")
            named[key] = value
        found = {**(defaults or {}), **found, **named}
        if found.get("preset"):
            name = choose("preset", str(found["preset"]), PRESETS)
            for key in OF_PRESETS:
                if key in found:
                    raise SettingsError(f"preset {name} decides about {key}: give one of the two")
            found["transform"] = PRESETS[name]
        if "steps" in found and "levels" not in found and len(_steps(str(found["steps"]))) > 1:
            found["levels"] = len(_steps(str(found["steps"])))
        made = Settings(**found)
        made.check()
        return made

    def check(self) -> None:
        """SettingsError for the first thing that is wrong."""
        if self.preset:
            text = PRESETS[choose("preset", self.preset, PRESETS)]
            plain = Settings(preset=self.preset, transform=text)
            for key in OF_PRESETS:
                if getattr(self, key) != getattr(plain, key):
                    raise SettingsError(f"preset {self.preset} decides about {key}: give one of the two")
        names = [choose("transform", parse_spec("transform", text)[0], TRANSFORMS) for text in self.stages()]
        dense = [name for name in names if name in DENSE]
        for text in self.penalty_texts():
            parse_penalty(text)
            if not dense:
                raise SettingsError(f"penalty {text!r} acts on {', '.join(DENSE)}, and {self.transform!r} has none")
        if self.symmetric and not set(names) & set(SYMMETRIC):
            raise SettingsError(f"symmetric goes with {' and '.join(SYMMETRIC)}, and {self.transform!r} has none")
        choose("similarity", parse_spec("similarity", self.similarity)[0], SIMILARITIES)
        optimizer = choose("optimizer", parse_spec("optimizer", self.optimizer)[0], OPTIMIZERS)
        if optimizer == "gauss-newton" and dense:
            raise SettingsError(
                f"optimizer gauss-newton goes with few parameters, not with {dense[0]}: choose adam, sgd, normalized, "
                "newton-cg or lbfgs"
            )
        if optimizer in OBJECTIVE_NEEDED and "diffeomorphism" in names:
            raise SettingsError(
                f"optimizer {optimizer} needs a stated objective, which diffeomorphism does not descend: choose svffd, "
                "or adam, sgd or normalized"
            )
        for name in self.saves():
            choose("save", name, SAVES)
        if self.levels < 1:
            raise SettingsError(f"levels is {self.levels}: expected at least 1")
        if len(self.counts()) not in (1, self.levels):
            raise SettingsError(f"steps {self.steps!r} has {len(self.counts())} numbers for {self.levels} levels")
        for name in ("threads", "seed"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if self.seed >= 2**64:
            raise SettingsError(f"seed is {self.seed}: expected less than 2^64")
        self.outside()
        self.lattice_size()
        try:
            self.start.encode()
        except UnicodeEncodeError:  # a name of other bytes, which no file of settings can hold
            raise SettingsError(f"start is {self.start!a}, which is not UTF-8: give the file another name") from None
        if self.start not in STARTS and "." not in self.start and "/" not in self.start:
            choose("start", self.start, (*STARTS, "or a file"))

    def given(self) -> dict[str, Any]:
        """What was chosen by name: without that which a preset decides."""
        decided = () if not self.preset else OF_PRESETS[1:]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in decided}

    def counts(self) -> list[int]:
        """Steps per level, coarse to fine, or one number for all."""
        return _steps(self.steps)

    def stages(self) -> list[str]:
        """The transforms with their options, one per stage."""
        return [text.strip() for text in self.transform.split("+")]

    def penalty_texts(self) -> list[str]:
        """The penalties with their weights; a + before a number is its sign, as in 1e+3."""
        found = re.split(r"\+(?![0-9.])", self.penalty) if self.penalty.strip() else []
        return [text.strip() for text in found]

    def saves(self) -> list[str]:
        """What is to be written."""
        return [name.strip() for name in self.save.replace(",", "+").split("+")]

    def outside(self) -> Any:
        """The padding as `register` takes it."""
        if self.padding in PADDINGS:
            return None if self.padding == "none" else self.padding
        try:
            value = float(self.padding)
        except ValueError:
            return choose("padding", self.padding, (*PADDINGS, "or a number"))
        if not math.isfinite(value):
            raise SettingsError(f"padding is {self.padding}: expected a finite number, or none to count nothing there")
        return value

    def lattice_size(self) -> tuple[int, ...] | None:
        """The size that images are padded to, x first, () where it is chosen; None where they stay as they are."""
        if self.lattice in LATTICES:
            return () if self.lattice == "auto" else None
        parts = self.lattice.lower().split("x")
        if not all(part.strip().lstrip("-").isdecimal() for part in parts):
            choose("lattice", self.lattice, (*LATTICES, "or a size such as 64x64x48"))
        size = tuple(map(int, parts))
        if not 2 <= len(size) <= 3 or min(size) < 1:
            raise SettingsError(
                f"lattice {self.lattice!r}: expected auto, or a size of at least 1 for each of two or three axes, x "
                "first, such as 64x64x48"
            )
        return size

    # -- values, which need torch -----------------------------------------------------------------------------

    def transforms(self) -> list[Transform]:
        """A transform per stage."""
        import fnreg

        made: list[Transform] = []
        for text in self.stages():
            name, options = parse_spec("transform", text)
            made.append(make("transform", text, getattr(fnreg, TRANSFORMS[name]), options))
        first: Any = made[0]
        if self.start == "search" and "rotation" not in getattr(first, "parts", ()):
            raise SettingsError(f"start search turns the images, but {self.transform!r} does not begin with a rotation")
        if self.start in ("center", "moments") and not getattr(first, "translates", False):
            raise SettingsError(
                f"start {self.start} shifts the images, but {self.transform!r} does not begin with a shift"
            )
        return made

    def measure(self) -> Term:
        """The similarity as a term."""
        from fnreg.losses import terms

        name, options = parse_spec("similarity", self.similarity)
        term = terms.SIMILARITIES[name]
        if options:
            term = make("similarity", self.similarity, term, options)
            try_term(f"similarity {self.similarity!r}", term)
        return term

    def penalties(self) -> list[Term]:
        """The penalties as terms, weighted."""
        from fnreg.losses import terms

        made: list[Term] = []
        for text in self.penalty_texts():
            name, weight, options = parse_penalty(text)
            term = terms.PENALTIES[name]
            made.append(weight * (make("penalty", text, term, options) if options else term))
        return made

    def objective(self, transform: Transform) -> Objective:
        """What a stage minimises: linear maps have no field to penalise."""
        from fnreg.losses.objective import Objective

        return Objective((self.measure(), *(() if transform.linear else self.penalties())))

    def solver(self) -> Any:
        """The solver with its optimizer."""
        import fnreg

        name, options = parse_spec("optimizer", self.optimizer)
        if name == "gauss-newton":
            if self.measure().residuals is None:
                told = f"optimizer gauss-newton minimises squares, {self.similarity} has none: choose mse or ncc"
                raise SettingsError(told)
            return make("optimizer", self.optimizer, fnreg.GaussNewton, options)
        if name in OBJECTIVE_NEEDED:
            return make("optimizer", self.optimizer, getattr(fnreg, OBJECTIVE_NEEDED[name]), options)
        factory = {"adam": fnreg.adam, "sgd": fnreg.sgd, "normalized": fnreg.normalized}[name]
        return fnreg.Descent(make("optimizer", self.optimizer, factory, options))


def _steps(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise SettingsError(f"steps {text!r}: expected numbers joined by x, from coarse to fine, such as 100x50x10")
    return counts


def _assigned(text: str) -> tuple[str, Any]:
    """A setting and its value of NAME=VALUE."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise SettingsError(f"--set {text}: expected NAME=VALUE, such as levels=2")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    choose("setting in --set:", key, kinds)
    kind = kinds[key]
    if kind is bool:
        return key, choose(f"value in --set {key}:", value, ("true", "false")) == "true"
    try:
        return key, kind(value)
    except ValueError:
        raise SettingsError(f"--set {text}: expected a whole number for {key}") from None


def _read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file, of the right types."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise SettingsError(f"settings file {file} cannot be read: {problem.strerror or problem}") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SettingsError(f"settings file {file} is not valid TOML: {problem}") from problem
    lines = lines_of(file)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
    made: dict[str, Any] = {}
    for key, value in found.items():
        place = f"{file}, line {lines[key]}" if key in lines else str(file)
        choose(f"setting in {place}:", key, kinds)
        if isinstance(value, list) and (joint := LISTS.get(key)):
            value = joint.join(str(part) for part in value)
        if kinds[key] is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if type(value) is not kinds[key]:
            expected = "text" if kinds[key] is str else "true or false" if kinds[key] is bool else "a whole number"
            raise SettingsError(f"{place}: {key} is {value!r}, expected {expected}")
        made[key] = value
    return made


def lines_of(file: Path) -> dict[str, int]:
    """The line of every key in a TOML file of settings, counted from 1: its parser does not tell.

    Lines within texts and lists of several lines may look like keys: the first line of a name counts.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if match := re.match(r"""\s*\[?\s*(["']?)([A-Za-z0-9_-]+)\1\s*[]=.]""", line):
            found.setdefault(match[2], number)
    return found


@contextmanager
def pointing(file: Path | None, given: Iterable[str]) -> Generator[None]:
    """Errors of settings within are told with the line of the file that they are about, where it is known.

    given : settings that did not come from the file.  Errors begin with the name of their setting, or with "unknown"
    and this name; what begins otherwise is a transform, which names itself
    """
    try:
        yield
    except SettingsError as problem:
        told = str(problem)
        found = re.match(r"(?:unknown )?([a-z_]+)\b", told)
        name = found[1] if found else "transform"
        known = {field.name for field in dataclasses.fields(Settings)} - set(given)
        if file is None or told.startswith(str(file)) or name not in known:
            raise
        line = lines_of(file).get(name)
        if line is None:
            raise
        raise SettingsError(f"{file}, line {line}: {told}") from None
