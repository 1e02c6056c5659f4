"""How large the package is: files, lines, the longest file, public names; and its tests, examples and pages."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

import fnreg
from benchmarks.measure import Options, Table

ROOT = Path(__file__).parents[1]
PARTS = {
    "fnreg, Python": ("fnreg", "*.py"),
    "fnreg, C": ("fnreg", "*.[ch]"),
    "tests": ("tests", "*.py"),
    "examples": ("examples", "*.py"),
    "benchmarks": ("benchmarks", "*.py"),
    "docs": ("docs", "*.md"),
}
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of Python that hold more than blanks, comments and docstrings."""
    found: set[int] = set()
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = begins and token.type == tokenize.STRING
        if token.type not in NOT_CODE and not docstring:
            found.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return len(found)


def run(options: Options) -> list[Table]:
    """Two tables: sizes, and public names."""
    sizes = Table("Sizes", ("part", "files", "lines", "without comments and docstrings", "longest file", "its lines"))
    for name, (folder, pattern) in PARTS.items():
        found = [path for path in sorted((ROOT / folder).rglob(pattern)) if "_build" not in path.parts]
        texts = {path: path.read_text(encoding="utf-8") for path in found}
        lines = {path: text.count("\n") for path, text in texts.items()}
        longest = max(found, key=lines.__getitem__)
        code = sum(map(code_lines, texts.values())) if pattern == "*.py" else None
        row = (name, len(found), sum(lines.values()), code, longest.relative_to(ROOT).as_posix(), lines[longest])
        sizes.rows.append(row)
    names = Table("Public names", ("of", "names"))
    names.rows.append(("fnreg", len(fnreg.__all__)))
    for module in ("cohort", "data", "fields", "io", "plot"):
        names.rows.append((f"fnreg.{module}", len(getattr(fnreg, module).__all__)))
    return [sizes, names]
