"""The house as the design tells it: every file has its place in the list, and imports only what stands above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fnreg").rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def listed() -> list[str]:
    """The modules and packages of the list, from top to bottom."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    house = text[text.index("```text\nfnreg/") :]
    house = house[: house.index("```", 3)]
    return ["fnreg." + (file or folder) for file, folder in re.findall(r"\b([a-z_]+)\.py\b|^  ([a-z_]+)/", house, re.M)]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are done when a module is loaded."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            yield from statements(node.body)


def imported(module: str) -> set[str]:
    found: set[str] = set()
    for node in statements(ast.parse(NAMES[module].read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {full if (full := f"{node.module}.{a.name}") in NAMES else str(node.module) for a in node.names}
        else:
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in NAMES and name != module}


def test_every_file_has_a_place_in_the_list() -> None:
    assert {room(name) for name in NAMES} - {"fnreg"} == set(listed()) - {"fnreg.__init__"}


@pytest.mark.parametrize("module", sorted(NAMES))
def test_a_file_imports_only_what_stands_above_it(module: str) -> None:
    order = list(dict.fromkeys(listed()))
    for other in imported(module):
        if module != "fnreg" and room(other) not in ("fnreg", room(module)):
            assert order.index(room(other)) < order.index(room(module)), f"{module} imports {other}, which is below it"


def test_no_circle() -> None:
    left = {name: imported(name) for name in NAMES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left
