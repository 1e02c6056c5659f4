"""The work of a run: which pairs are to be done, who died with a process, and what is told to the ledger.

An engine takes pairs from here and gives records back; it decides nothing about either.  A pair is `begun` in the
ledger before it is handed out, and done once its record is there.  Those that a process died with are tried again after
all others, in parts of what died together, so that one that kills processes is soon alone and harms no other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from fnreg.cohort.ledger import BEGUN, RELEASED, Attempts, Ledger, LedgerError, Record
from fnreg.cohort.load import Asked, crashed
from fnreg.cohort.manifest import Row
from fnreg.cohort.save import save, sweep
from fnreg.cohort.study import DONE

PARTS = 8  # of pairs that died together: fewer deaths than halves need, and less that is done in vain
MOST_DEATHS = 2  # of a process that works on a pair alone, before the pair counts as crashed


class Progress(NamedTuple):
    """How far a run is: pairs of the study, of this run, and of it those that are done and those with a result."""

    pairs: int
    todo: int
    done: int
    good: int
    busy: float  # seconds in which devices computed


class Work:
    """The rows of one run, the ledger, and how far it is.

    rows : to be done; attempts : at them before, by id; before : status by id, of those that have one
    pairs : of the whole study; stop, progress : as of `cohort.run`
    """

    def __init__(
        self,
        rows: Sequence[Row],
        asked: Asked,
        ledger: Ledger,
        *,
        attempts: Mapping[str, Attempts],
        before: Mapping[str, str],
        pairs: int,
        stop: threading.Event,
        progress: Callable[[Progress], None],
    ) -> None:
        self.asked, self.ledger, self.stop, self.progress = asked, ledger, stop, progress
        self.busy = 0.0
        self._pairs, self._todo, self._done, self._good = pairs, len(rows), 0, 0
        self._attempts = dict(attempts)
        self._begun: dict[str, Row] = {}  # and not done
        suspects = {row.pair_id for row in rows if self._known(row).among or before.get(row.pair_id) == "crashed"}
        self._company = deque(row for row in rows if row.pair_id not in suspects)
        self._suspects = [row for row in rows if row.pair_id in suspects]

    @property
    def now(self) -> Progress:
        """How far it is."""
        return Progress(self._pairs, self._todo, self._done, self._good, self.busy)

    @property
    def left(self) -> int:
        """Rows that are to be handed out; none once the run is asked to stop."""
        return 0 if self.stop.is_set() else len(self._company) + sum(not self._hopeless(row) for row in self._suspects)

    @property
    def company(self) -> int:
        """Of these, rows that may share a process with any others."""
        return 0 if self.stop.is_set() else len(self._company)

    @property
    def handed(self) -> int:
        """Rows that were handed out and are not done."""
        return len(self._begun)

    # -- rows to engines ----------------------------------------------------------------------------------------------

    def take(self, most: int, held: int) -> list[Row]:
        """Rows that a process is to do next: no more than `most`, or a whole part of what died together.

        held : how many it has and has not done.  Suspects go to one that holds none, so that it is known who was
            there when it dies.
        """
        if self.stop.is_set():
            return []
        if self._company:
            rows = [self._company.popleft() for _ in range(min(most, len(self._company)))]
        elif held == 0:
            rows = self._part()
        else:
            return []
        among = held + len(rows)
        self.ledger.append([{"pair_id": row.pair_id, "status": BEGUN, "among": among} for row in rows])
        for row in rows:
            self._begun[row.pair_id] = row
            self._attempts[row.pair_id] = self._known(row).begun(among)
        return rows

    def _part(self) -> list[Row]:
        """Of the suspects those that died among most others, as many as are to be tried together."""
        suspects = sorted(
            (row for row in self._suspects if not self._hopeless(row)),
            key=lambda row: (-self._together(row), self._known(row).alone),
        )
        if not suspects:
            return []
        size = self._together(suspects[0])
        part = [row for row, _ in zip(suspects, range(size), strict=False) if self._together(row) == size]
        taken = {row.pair_id for row in part}
        self._suspects = [row for row in self._suspects if row.pair_id not in taken]
        return part

    def _together(self, row: Row) -> int:
        """With how many a suspect is tried."""
        return max(1, min(self._known(row).among, default=1) // PARTS)

    def _hopeless(self, row: Row) -> bool:
        return self._known(row).alone >= MOST_DEATHS

    def _known(self, row: Row) -> Attempts:
        return self._attempts.get(row.pair_id, Attempts())

    # -- what became of them ------------------------------------------------------------------------------------------

    def keep(self, records: Sequence[Record]) -> list[Record]:
        """Write to the ledger what became of rows, of whom all files are on the disk; from any thread.

        Raises LedgerError.
        """
        known = {record["pair_id"]: self._attempts[record["pair_id"]].times for record in records}
        kept = [record | {"attempts": known[record["pair_id"]]} for record in records]
        self.ledger.append(kept)
        for name, times in known.items():
            self._attempts[name] = Attempts(times)
            self._begun.pop(name, None)
        self._done += len(kept)
        self._good += sum(record["status"] in DONE for record in kept)
        return kept

    def died(self, names: Iterable[str]) -> None:
        """A process ended while it held these: they are suspects, and what it was writing is removed."""
        rows = [self._begun.pop(name) for name in names]
        sweep(self.asked.folder, {row.pair_id for row in rows}, alone=False)
        self._suspects += rows

    def hopeless(self) -> Iterator[Record]:
        """The records of suspects that are not tried again; none where the run is asked to stop."""
        while not self.stop.is_set() and (row := next(filter(self._hopeless, self._suspects), None)):
            self._suspects.remove(row)
            yield from self.keep(save([crashed(row)], self.asked))
            self.progress(self.now)

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun:  # nothing is wrong with them: their turn has not come
            with suppress(LedgerError):  # else the next run suspects them
                self.ledger.append([{"pair_id": name, "status": RELEASED} for name in self._begun])


Engine = Callable[[Work], Iterator[Record]]  # does all there is to be had from the work, and yields what it has kept
