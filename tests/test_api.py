"""The public names: all there, documented, loaded when they are used, with options by keyword."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scenes import known_pair, random_mapping

import fnreg
from fnreg import Rigid, Transform, register
from fnreg.pytree import tree_flatten, tree_unflatten
from fnreg.settings import PENALTIES, SIMILARITIES, TRANSFORMS, Settings

ROOT = Path(__file__).parents[1]

NAMES = [name for name in fnreg.__all__ if name != "__version__"]
VALUES = [name for name in NAMES if not isinstance(getattr(fnreg, name), ModuleType)]

# How a registration is put together inside; what these modules define is no part of the interface.
INTERNAL = {"annotations", "inputs", "problem", "starts", "native"}


def modules() -> list[ModuleType]:
    """Every module of the package that is not internal."""
    found = [m.name for m in pkgutil.walk_packages(fnreg.__path__, "fnreg.")]
    return [importlib.import_module(name) for name in found if name.split(".")[1] not in INTERNAL]


def members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes that a module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or (inspect.isclass(value) and value.__name__ == name):
            yield name, value


def functions(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function, or the public methods and properties of a class."""
    if inspect.isfunction(value):
        yield name, value
        return
    for key, made in vars(value).items():
        function = made.__func__ if isinstance(made, (staticmethod, classmethod)) else made
        function = function.fget if isinstance(function, property) else function
        if not key.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{key}", function


def constructors(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The constructor of a class that is written out: dataclasses and protocols have one of their own."""
    made = vars(value).get("__init__") if inspect.isclass(value) else None
    if made is not None and made.__code__.co_filename == sys.modules[value.__module__].__file__:
        yield f"{name}.__init__", made


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES, ids=[m.__name__ for m in MODULES])


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(fnreg, name)
    assert name in dir(fnreg)
    documented = inspect.getdoc(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        documented = inspect.getdoc(getattr(value, "function", value))  # a term: its equation
    assert documented
    assert len(documented) > 10
    if isinstance(value, type):  # what a dataclass writes of itself is no documentation
        assert not (value.__doc__ or "").startswith(f"{name}(")


def test_the_names_that_type_checkers_see_are_those_that_are_there() -> None:
    tree = ast.parse(Path(fnreg.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [
        alias for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(alias.asname or alias.name for alias in seen) == sorted(NAMES)
    assert all(alias.asname == alias.name for alias in seen)  # so that they count as exported
    for block in blocks:
        for node in block.body:
            assert isinstance(node, ast.ImportFrom)
            for alias in node.names:
                home = importlib.import_module(node.module or "")
                if not isinstance(getattr(fnreg, alias.name), ModuleType):
                    assert getattr(home, alias.name) is getattr(fnreg, alias.name)


def test_names_are_those_of_things_in_the_package() -> None:
    assert len(set(fnreg.__all__)) == len(fnreg.__all__)
    for name in VALUES:
        value = getattr(fnreg, name)
        assert getattr(value, "__module__", type(value).__module__).startswith("fnreg.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fnreg' has no attribute 'Rigit'"):
        fnreg.Rigit  # noqa: B018


def test_the_package_alone_loads_nothing() -> None:
    code = (
        "import fnreg, sys; print([m for m in ('torch', 'torchopt', 'numpy') if m in sys.modules], fnreg.__version__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["[]", fnreg.__version__]


def test_the_library_needs_no_extra() -> None:
    """What the extras bring is imported where it is used."""
    names = [name for name in VALUES]
    code = (
        "import fnreg, sys\n"
        f"for name in {names!r}: getattr(fnreg, name)\n"
        "names = ('matplotlib', 'SimpleITK', 'nibabel', 'scipy', 'skimage', 'PIL', 'cyclopts')\n"
        "print([m for m in names if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["[]"]


def test_types_come_with_the_package() -> None:
    assert Path(fnreg.__file__).with_name("py.typed").is_file()


# -- documentation -------------------------------------------------------------------------------------------------


@every_module
def test_everything_public_is_documented(module: ModuleType) -> None:
    assert module.__doc__
    for name, value in members(module):
        assert (value.__doc__ or "").strip(), f"{module.__name__}.{name}"
        assert not (inspect.isclass(value) and value.__doc__.startswith(f"{name}(")), f"{module.__name__}.{name}"
        for told, function in functions(name, value):
            documented = inspect.getdoc(function)
            if inspect.isclass(value) and not documented:  # inherited
                documented = inspect.getdoc(getattr(value, told.rpartition(".")[2]))
            assert documented, f"{module.__name__}.{told}"


@pytest.mark.parametrize("name", ["register", "Grid", "Image"])
def test_the_main_entries_have_an_example(name: str) -> None:
    assert ">>>" in inspect.getdoc(getattr(fnreg, name))  # type: ignore[operator]


def test_every_argument_of_register_is_documented() -> None:
    told = inspect.getdoc(register) or ""
    for name in inspect.signature(register).parameters:
        if name != "min_size":
            assert any(name in line.split(" : ")[0].split(", ") for line in told.splitlines() if " : " in line), name
    assert "`min_size`" in told


# -- signatures ----------------------------------------------------------------------------------------------------


@every_module
def test_options_are_given_by_keyword(module: ModuleType) -> None:
    """One argument with a default may be given by position, the main one; any other is an option."""
    for name, value in members(module):
        for told, function in [*functions(name, value), *constructors(name, value)]:
            optional = [
                p.name
                for p in inspect.signature(function).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
            ]
            assert len(optional) <= 1, f"{module.__name__}.{told}: {optional}"
            flags = [
                p.name
                for p in inspect.signature(function).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD and isinstance(p.default, bool)
            ]
            assert not flags, f"{module.__name__}.{told}: {flags}"


@every_module
def test_everything_public_is_annotated(module: ModuleType) -> None:
    for name, value in members(module):
        for told, function in functions(name, value):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name not in ("self", "cls"):
                    assert parameter.annotation is not parameter.empty, f"{module.__name__}.{told}: {parameter.name}"
            assert inspect.signature(function).return_annotation is not inspect.Signature.empty, told


TEXTS = {
    place: "\n".join(path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern))
    for place, patterns in {"tests": ("tests/*.py",), "pages": ("docs/*.md", "docs/how-to/*.md", "README.md")}.items()
}


@pytest.mark.parametrize("place", TEXTS)
def test_no_public_name_is_left_out(place: str) -> None:
    """Of tests, and of pages: neither untested nor told nowhere."""
    found = set(re.findall(r"\w+", TEXTS[place]))
    assert sorted(set(NAMES) - found) == []


def test_settings_have_the_names_of_python() -> None:
    """What is no argument of `register` by its own name is a part of one, or belongs to files and machines."""
    parts = {"preset", "similarity", "penalty", "lattice", "save", "seed", "threads", "device"}
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - parts <= set(inspect.signature(register).parameters)
    assert set(SIMILARITIES + PENALTIES) <= set(fnreg.__all__)
    assert set(TRANSFORMS.values()) <= set(fnreg.__all__)


@pytest.mark.parametrize("name", ["register", "evaluate", "laplace", "ensemble", "sweep"])
def test_images_come_first(name: str) -> None:
    """One order everywhere: the fixed image, the moving one, then what is done with them; options by keyword."""
    parameters = list(inspect.signature(getattr(fnreg, name)).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["fixed", "moving"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters if parameter.name == "objective")


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *(cls() for name, cls in sorted(Transform.types.items()) if cls.__module__ == "fnreg.transforms.linear"),
        fnreg.Held(Rigid(), ("rotation",)),
        fnreg.Sequential((Rigid(), fnreg.Scaling())),
        fnreg.adam(0.2, decay=0.5),
        fnreg.sgd(0.2, momentum=0.3),
        fnreg.normalized(0.4, momentum=0.5),
        fnreg.chain(fnreg.clip(1.0), fnreg.adam(0.3)),
        fnreg.Stop(patience=5),
        fnreg.Descent(limit=2.0),
        fnreg.GaussNewton(damping=0.1),
    ],
    ids=str,
)
def test_settings_are_frozen_values_that_print_what_makes_them(value: Any) -> None:
    names = {**{name: getattr(fnreg, name) for name in VALUES}, **vars(fnreg.optim)}
    again = eval(repr(value), names)
    assert again == value
    assert hash(again) == hash(value)
    assert len({value, again}) == 1
    assert value != object()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.anything = 1


def test_data_are_trees_of_tensors() -> None:
    fixed, moving, mapping = known_pair(Rigid(), 2)
    result = register(fixed, moving, Rigid(), levels=1, steps=1)
    subject = fnreg.Subject(fixed, torch.ones_like(fixed.data))
    for value in (
        fixed.grid,
        fixed,
        subject,
        mapping,
        random_mapping(Rigid(), fixed.grid, 1),
        fnreg.mse,
        fnreg.mse + fnreg.mae,
    ):
        leaves, spec = tree_flatten(value)
        assert leaves
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert type(tree_unflatten(leaves, spec)) is type(value)
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.anything = 1
    leaves, spec = tree_flatten(result)
    assert type(tree_unflatten(leaves, spec)) is fnreg.Registration


def test_statuses_are_numbers_with_names() -> None:
    faults = ["NOT_FINITE", "CONSTANT", "BAD_MASK", "EMPTY_MASK"]
    sides = [f"{side}_{fault}" for side in ("FIXED", "MOVING") for fault in faults]
    names = ["STEPS", "CONVERGED", "DIVERGED", "LOST_OVERLAP", "NO_OVERLAP", *sides]
    names += ["BAD_LABELS", "FIXED_BAD_POINTS", "MOVING_BAD_POINTS"]
    assert [status.name for status in fnreg.Status] == names
    assert [int(status) for status in fnreg.Status] == list(range(len(names)))
    for status in fnreg.Status:
        assert bool(status.remedy) == (status > fnreg.Status.CONVERGED)
        assert fnreg.Status(int(status)) is pickle.loads(pickle.dumps(status)) is status
    assert len({status.remedy for status in fnreg.Status}) == len(names) - 1
    assert issubclass(fnreg.RegistrationError, ValueError)


# -- vmap ----------------------------------------------------------------------------------------------------------


def test_the_suite_runs_without_the_slow_fallback_of_vmap() -> None:
    assert not torch._C._functorch._is_vmap_fallback_enabled()
    with pytest.raises(RuntimeError, match="fallback"):
        torch.func.vmap(lambda x: torch.histc(x, bins=3))(torch.rand(2, 5))
