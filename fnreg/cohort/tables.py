"""Tables from files: CSV, TSV, JSON Lines or Parquet, all as text by column, with the number of each row.

This module does not import torch: a table is checked, and a study asked how far it is, in no time.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fnreg.cohort.parquet import ParquetError, read_parquet

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
SHOWN = 20  # problems that an error lists


class ManifestError(ValueError):
    """A table of pairs is missing, damaged, or has rows that cannot be registered; `problems` has all of them."""

    def __init__(self, told: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        lines = [f"  {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"  and {len(problems) - SHOWN} more")
        super().__init__("\n".join([told, *lines]))


def read_lines(table: Path) -> list[tuple[int, dict[str, str]]]:
    """What each row of a table holds, as text by column, with its number in the file, as an editor or a spreadsheet
    counts; none of a table without rows.

    Raises ManifestError where the table is missing, of another kind or damaged; MissingExtraError.
    """
    kind = table.suffix.lower()
    if kind not in SUFFIXES:
        raise ManifestError(f"{table} ends in {kind!r}: readable are {', '.join(SUFFIXES)}")
    if not table.is_file():
        raise ManifestError(f"{table} {'is a folder' if table.is_dir() else 'does not exist'}: give a table of pairs")
    try:
        content = table.read_bytes()
        if kind == ".parquet":
            return [(number, _texts(row)) for number, row in enumerate(read_parquet(table, content), 1)]
        text = content.decode("utf-8-sig")
    except OSError as problem:
        raise ManifestError(f"{table} cannot be read: {problem.strerror or problem}") from problem
    except ParquetError as problem:
        raise ManifestError(str(problem)) from problem
    except UnicodeDecodeError as problem:
        raise ManifestError(f"{table} is not text in UTF-8: {problem}") from problem
    if kind in (".jsonl", ".ndjson"):
        return list(_json_lines(table, text))
    return list(_delimited(table, text, "\t" if kind == ".tsv" else ","))


def _delimited(table: Path, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, line) for line in reader if any(line)]
    except csv.Error as problem:
        raise ManifestError(f"{table}, line {reader.line_num} is damaged: {problem}") from problem
    if not lines:
        return
    names = [name.strip() for name in lines[0][1]]
    twice = sorted({name for name in names if names.count(name) > 1 or not name})
    if twice:
        raise ManifestError(f"{table} has columns of the same name, or of none: {', '.join(map(repr, twice))}")
    nothing = ("", "n/a") if delimiter == "\t" else ("",)  # as BIDS has it
    for number, line in lines[1:]:
        if len(line) != len(names):
            raise ManifestError(f"{table}, line {number}: {len(line)} fields for {len(names)} columns")
        values = (value.strip() for value in line)
        yield number, {name: "" if value in nothing else value for name, value in zip(names, values, strict=True)}


def _json_lines(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):  # and at nothing else: text may hold other ends of lines
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ManifestError(f"{table}, line {number} is not JSON: {problem}") from problem
        if not isinstance(found, dict):
            raise ManifestError(f"{table}, line {number}: expected an object, {{...}}")
        yield number, _texts(found)


def _texts(record: Mapping[Any, Any]) -> dict[str, str]:
    return {str(name): as_text(value) for name, value in record.items()}


def as_text(value: Any) -> str:
    """What a CSV file would hold; NaN is how pandas stores that nothing is there."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
