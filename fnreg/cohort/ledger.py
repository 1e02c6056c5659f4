"""What has been done to each pair: lines of JSON that are only ever appended, one file per shard.

A record is on disk before the next batch begins.  A process that dies while it writes leaves a torn last line, which
the next reader skips and the next writer closes.  Where a pair has several records the last one holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = "ledger"
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
    {'a': {'pair_id': 'a', 'status': 'ok'}}
    """

    def __init__(self, study: str | os.PathLike[str], shard: int = 0) -> None:
        self.path = Path(study) / FOLDER / f"shard-{shard:04d}.jsonl"
        self._file = -1

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
        """Add records and wait until they are on disk.  Raises LedgerError where that fails."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
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


def read_ledger(study: str | os.PathLike[str]) -> dict[str, Record]:
    """The last record of each pair, by id, over all shards; empty where there is no ledger."""
    found: dict[str, Record] = {}
    for record in read_records(study):
        found[record["pair_id"]] = record
    return found


def read_records(study: str | os.PathLike[str]) -> Iterator[Record]:
    """All records of all shards, in the order in which each was written; lines that were cut off are left out."""
    for path in sorted((Path(study) / FOLDER).glob("shard-*.jsonl")):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as problem:
            raise LedgerError(f"{path} cannot be read: {problem.strerror or problem}") from problem
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # torn, or the end of the file
                continue
            if isinstance(record, dict) and isinstance(record.get("pair_id"), str):
                yield record


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
