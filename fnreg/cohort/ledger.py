"""What has been done to each pair: lines of JSON that are only ever appended, one file per shard.

A record is on disk before the next batch begins.  A process that dies while it writes leaves a torn last line, which
the next reader skips and the next writer closes.  Where a pair has several records the last one holds.

Two kinds of records are of the work, not of its outcome: a pair is `BEGUN` before its files are read, `among` so many
that its process then has, and `RELEASED` where a run ended in order before its turn.  What was begun and is neither
finished nor released was in a process that died.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

FOLDER = "ledger"
BEGUN, RELEASED = "begun", "released"
Record = dict[str, Any]


class LedgerError(OSError):
    """A ledger cannot be read or written, or another run writes it."""


class Ledger:
    """The records of one shard of a study, open for appending; with it, nobody else can write them.

    >>> import tempfile
    >>> from fnreg.cohort.ledger import Ledger, read_ledger
    >>> with tempfile.TemporaryDirectory() as study:
    ...     with Ledger(study) as ledger:
    ...         ledger.append([{"pair_id": "a", "status": "failed"}, {"pair_id": "a", "status": "ok"}])
    ...     read_ledger(study)
    {'a': {'pair_id': 'a', 'status': 'ok', 'time': ...}}
    """

    def __init__(self, study: str | os.PathLike[str], shard: int = 0) -> None:
        self.path = Path(study) / FOLDER / f"shard-{shard:04d}.jsonl"
        self._file = -1
        self._turn = threading.Lock()
        self._torn = False  # whether the last line may be cut off

    def __enter__(self) -> Ledger:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            if not _lock(self._file):
                raise LedgerError(f"another run is writing {self.path}: wait for it, or end it")
            self._close_torn_line()
        except OSError as problem:
            self._leave()
            if isinstance(problem, LedgerError):
                raise
            raise LedgerError(f"{self.path} cannot be written: {problem.strerror or problem}") from problem
        return self

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, with the time, and wait until they are on disk; from any thread.

        Raises LedgerError where that fails.
        """
        now = {"time": round(time.time(), 3)}
        lines = "".join(json.dumps({**record, **now}, allow_nan=False) + "\n" for record in records).encode()
        try:
            with self._turn:
                lines = (b"\n" if self._torn else b"") + lines
                self._torn = True  # until all of it is there: the disk may be full in the middle of a line
                while lines:
                    lines = lines[os.write(self._file, lines) :]
                self._torn = False
                os.fsync(self._file)
        except OSError as problem:
            raise LedgerError(f"{self.path} cannot be written: {problem.strerror or problem}") from problem

    def _close_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def _leave(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()


def read_ledger(study: str | os.PathLike[str], *, without: Iterable[str] = ()) -> dict[str, Record]:
    """The last outcome of each pair, by id, over all shards; empty where there is no ledger.

    without : what is left out of the records: those of many pairs are large by their history
    """
    dropped = set(without)
    found: dict[str, Record] = {}
    for record in read_records(study):
        before = found.get(record["pair_id"])
        if record.get("status") in (BEGUN, RELEASED) or (before and _when(record) < _when(before)):
            continue
        # Of many records the names of their columns would take most of the memory.
        found[record["pair_id"]] = {sys.intern(name): value for name, value in record.items() if name not in dropped}
    return found


class Attempts(NamedTuple):
    """How often a pair was begun, and of those attempts since its last outcome among how many pairs each was: where the
    attempt is over, a process died with these."""

    times: int = 0
    among: tuple[int, ...] = ()

    @property
    def alone(self) -> int:
        """Attempts at this pair by itself."""
        return self.among.count(1)

    def begun(self, among: int) -> Attempts:
        """With one more."""
        return Attempts(self.times + 1, (*self.among, among))


def read_attempts(study: str | os.PathLike[str]) -> dict[str, Attempts]:
    """The attempts at each pair, by id, over all shards."""
    found: dict[str, Attempts] = {}
    each: list[Record] = [
        {name: record.get(name) for name in ("pair_id", "status", "among")} | {"time": _when(record)}
        for record in read_records(study)
    ]
    for record in sorted(each, key=_when):
        name, status = record["pair_id"], record["status"]
        known = found.get(name, Attempts())
        if status == BEGUN:
            found[name] = known.begun(record["among"] or 1)
        elif status != RELEASED:
            found[name] = Attempts(known.times)
        elif known.among:
            found[name] = Attempts(known.times - 1, known.among[:-1])
    return found


def _when(record: Mapping[str, Any]) -> float:
    return record.get("time", 0.0)


def read_records(study: str | os.PathLike[str]) -> Iterator[Record]:
    """All records of all shards, in the order in which each was written; lines that were cut off are left out."""
    for path in sorted((Path(study) / FOLDER).glob("shard-*.jsonl")):
        try:
            with open(path, "rb") as lines:
                for line in lines:
                    try:
                        record = json.loads(line)
                    except ValueError:  # torn
                        continue
                    if isinstance(record, dict) and isinstance(record.get("pair_id"), str):
                        yield record
        except OSError as problem:
            raise LedgerError(f"{path} cannot be read: {problem.strerror or problem}") from problem


def _lock(file: int) -> bool:
    """Whether the file is ours alone until it is closed, or the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
