"""The page of promises names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


def test_every_promise_names_its_tests() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What does not hold")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and line != "| | tests |"]
    named = [re.findall(r"`(test_\w+)::(test_\w+)`", row) for row in rows]
    assert len(rows) > 30
    assert all(named), [row for row, found in zip(rows, named, strict=True) if not found]
    known = {
        (path.stem, node.name)
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    missing = {pair for found in named for pair in found} - known
    assert not missing
