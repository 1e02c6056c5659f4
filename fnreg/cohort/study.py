"""The folder of a study: what it was asked, what is left to do, and the table of what came out.

    OUT/ settings.toml  manifest.tsv  run.json  ledger/shard-0000.jsonl  pairs.tsv  pairs.json  pairs/ID/...

What is done is what the ledger says: a pair is done with the same settings, for the same input files.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fnreg.cohort.columns import COLUMNS as COLUMNS
from fnreg.cohort.columns import DONE as DONE
from fnreg.cohort.columns import OF_RECORDS, meaning
from fnreg.cohort.columns import OK as OK
from fnreg.cohort.columns import STATUSES as STATUSES
from fnreg.cohort.columns import WARN as WARN
from fnreg.cohort.ledger import Record, read_ledger
from fnreg.cohort.manifest import FILES, REQUIRED, ManifestError, Row, read_table, write_manifest
from fnreg.cohort.parquet import is_there, parquet_bytes
from fnreg.io.files import Print, WriteError, write_bytes
from fnreg.settings import Settings

POINTS = ("fixed_points", "moving_points")
PAIRS = "pairs"  # the folder of the folders of pairs


class StudyError(ValueError):
    """A folder holds another study, or none."""


def settings_sha(settings: Mapping[str, Any]) -> str:
    """What tells settings apart: of their names and values, in whatever order they were given."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class Study:
    """A folder of results, for a table of pairs and settings.

    folder : made where it is not there
    rows : the pairs
    settings : plain values by name

    Raises StudyError where the folder holds something else, or a study with other settings or none of these pairs;
    WriteError where it cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
        self.folder, self.rows, self.settings = Path(folder), rows, dict(settings)
        self.sha = settings_sha(self.settings)
        if self.folder.exists() and not self.folder.is_dir():
            raise StudyError(f"{self.folder} is a file: give a folder")
        try:
            there = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        except OSError as problem:
            raise WriteError(f"{self.folder} cannot be read: {problem.strerror or problem}") from problem
        there = [name for name in there if not is_scratch(name)]
        if there and "settings.toml" not in there:
            raise StudyError(f"{self.folder} holds {there[0]!r} and no study: give an empty folder, or that of a study")
        if there:
            self._check_settings()
            self._check_pairs()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            told = f"{self.folder} cannot be made: {problem.strerror or problem}"
            raise WriteError(f"{told}; give a folder that can be written to") from problem
        if not there:
            write_bytes(self.folder / "settings.toml", toml(self.settings).encode())
        self.write_manifest()

    def _check_settings(self) -> None:
        before = read_settings(self.folder)
        changed = sorted(k for k in before.keys() | self.settings.keys() if before.get(k) != self.settings.get(k))
        if changed:
            told = ", ".join(f"{k} was {before.get(k)!r} and is {self.settings.get(k)!r}" for k in changed)
            raise StudyError(
                f"{self.folder} was made with other settings: {told}; give another folder, or the same ones"
            )

    def _check_pairs(self) -> None:
        """A table may grow and shrink, but of a wholly other one the results would take the place of these."""
        try:
            before = [row["pair_id"] for row in read_table(self.folder / "manifest.tsv")]
        except ManifestError:  # it will be written anew
            return
        if not set(before) & {row.pair_id for row in self.rows}:
            told = f"{self.folder} is a study of {len(before)} other pairs, such as {before[0]}, and of none of these"
            raise StudyError(f"{told}: give another folder, or a table that goes on with those")

    def write_manifest(self) -> None:
        """manifest.tsv, where it is not there or has other rows."""
        _write(self.folder / "manifest.tsv", write_manifest(self.rows))

    def todo(self, *, retry_failed: bool = False, begun: Container[str] = ()) -> list[Row]:
        """The rows that are not finished: without a record, with inputs that changed, and failed ones if asked.

        begun : ids of pairs that were begun since their last outcome: to try a failed one again was asked before
        """
        known = read_ledger(self.folder, without=("history", "warnings"))
        return [
            row
            for row in self.rows
            if not self._finished(row, known.get(row.pair_id), retry_failed or row.pair_id in begun)
        ]

    def _finished(self, row: Row, record: Record | None, again: bool) -> bool:
        if record is None or record.get("settings_sha") != self.sha:
            return False
        if record.get("status") not in DONE and again:
            return False
        return unchanged(row, record.get("inputs", {}), record.get("beside", {}))

    def table(self) -> list[dict[str, Any]]:
        """One row per pair of the study, in its order, with the columns of `COLUMNS` and all others that there are."""
        return list(self._rows(read_ledger(self.folder, without=OF_RECORDS)))

    def _rows(self, known: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
        """Made one by one: of very many pairs not even the table is small."""
        return ({**row.record(), **known.get(row.pair_id, {"status": "pending"})} for row in self.rows)

    def write_table(self) -> None:
        """pairs.tsv, with the extra `cohort` also pairs.parquet, and pairs.json, what the columns mean; where they say
        so already they stay."""
        known = read_ledger(self.folder, without=OF_RECORDS)
        names = dict.fromkeys(name for row in self._rows(known) for name in row)
        columns = [*COLUMNS, *(name for name in names if name not in COLUMNS)]
        _write(self.folder / "pairs.tsv", _tsv(columns, self._rows(known)))
        if is_there():
            _write(self.folder / "pairs.parquet", parquet_bytes(columns, list(self._rows(known))))
        else:  # it would be that of an earlier run
            (self.folder / "pairs.parquet").unlink(missing_ok=True)
        given = {name for row in self.rows for name in row.record()}
        told = {name: {"Description": meaning(name, given)} for name in columns}
        _write(self.folder / "pairs.json", (json.dumps(told, indent=2) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a study.  Raises StudyError where there are none."""
    import tomllib

    try:
        return tomllib.loads((folder / "settings.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise StudyError(f"{folder} has no settings.toml that can be read: {problem}") from problem


def command(row: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The `fnreg register` that does with a pair what a study does; its columns, and the settings of the study."""
    words = ["fnreg", "register", row["fixed"], row["moving"], "-o", row["pair_id"]]
    if row["pair_id"].startswith("-"):  # no option
        words[-2:] = [f"--output={row['pair_id']}"]
    given = dict(settings) | ({"start": row["initial"]} if "initial" in row else {})
    tables = [row[name] for name in POINTS if name in row]
    if not any(path.lower().endswith(".csv") for path in tables):  # the other kinds say their space themselves
        given.pop("space", None)
    for name, value in given.items():
        if value != getattr(Settings(), name, "") and (not given.get("preset") or name != "transform"):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for name in FILES:
        if name in row and name not in (*REQUIRED, "initial"):
            words += [f"--{name.replace('_', '-')}", row[name]]
    return shlex.join(words)


def toml(settings: Mapping[str, Any]) -> str:
    """Plain values by name as TOML.

    A JSON string is one of TOML but for what lies beyond U+FFFF, which JSON may write as two escapes and TOML not, and
    for U+007F, which TOML wants as an escape.
    """
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
    return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"


def fingerprint(path: Path) -> Print:
    """Size, time of change in ns, and the SHA-256 of the content; of a folder of slices, those of its files."""
    size, changed = _stat(path)
    whole = hashlib.sha256()
    for file in _files(path):
        whole.update(file.read_bytes())
    return size, changed, whole.hexdigest()


@functools.lru_cache(maxsize=2**12)
def _content(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file as it is now: one that was touched may be that of thousands of pairs."""
    return fingerprint(path)[2]


def _stat(path: Path) -> tuple[int, int]:
    each = [file.stat() for file in _files(path)]
    return sum(told.st_size for told in each), max((told.st_mtime_ns for told in each), default=0)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def unchanged(row: Row, inputs: Mapping[str, Sequence[Any]], beside: Mapping[str, Sequence[Any]] | None = None) -> bool:
    """Whether the files of a row are those of a record; the content is read where the time of a file differs.

    beside : files that are read with those, such as the voxels of a header
    """
    if {str(path) for path in row.files.values()} != set(inputs):
        return False
    for name, (size, changed, sha) in (*inputs.items(), *(beside or {}).items()):
        path = Path(name)
        try:
            now, when = _stat(path)
            if now != size or (when != changed and _content(path, now, when) != sha):
                return False
        except OSError:
            return False
    return True


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)


def is_scratch(name: str) -> bool:
    """Whether a file is what a process that died while it wrote has left."""
    return name.startswith(".") and name.endswith((".tmp", ".partial"))


def _tsv(columns: Sequence[str], table: Iterable[Mapping[str, Any]]) -> bytes:
    content = io.BytesIO()
    with io.TextIOWrapper(content, "utf-8", newline="") as text:
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        for row in table:
            writer.writerow(_cell(row.get(name)) for name in columns)
        text.flush()
        return content.getvalue()


def _cell(value: Any) -> str:
    """As BIDS wants it: n/a for what is not there."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value == "":
        return "n/a"
    if isinstance(value, float):
        return f"{value:.8g}"
    return re.sub(r"[\t\r\n]+", " ", str(value))
