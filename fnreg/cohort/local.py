"""The engine "local": one process that reads ahead, registers and writes; those of other engines do the same.

One thread computes.  While it does, others read the pairs that come next, and one writes what is done; both are held
up rather than let memory grow.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from fnreg.cohort.batches import Buckets, Sizes
from fnreg.cohort.ledger import Record
from fnreg.cohort.load import Asked, Loaded, Refused, load
from fnreg.cohort.manifest import Row
from fnreg.cohort.save import save
from fnreg.cohort.solve import Outcome, attempt
from fnreg.cohort.work import Work

LOADERS = 2  # threads that read
CHUNK = 32  # pairs whose records share a write to the ledger


def local(work: Work, sizes: Sizes) -> Iterator[Record]:
    """All the work, in this process."""

    def take(most: int, _: bool) -> list[Row]:
        return work.take(most, line.held)

    with Pipeline(work.asked, sizes, take=take, keep=work.keep, stop=work.stop) as line:
        work.progress(work.now)
        for records in line.results():
            work.busy = line.busy
            work.progress(work.now)
            yield from records
    work.progress(work.now)


class Pipeline:
    """Rows through one process.

    take : gives rows, so many at most, that are begun in the ledger; where it is told to wait none means that there are
        no more for now, and what is held is finished
    keep : is given the records of pairs whose files are written, in a thread of its own; returns them as they are told
    stop : once it is set no further batch is begun
    """

    def __init__(
        self,
        asked: Asked,
        sizes: Sizes,
        *,
        take: Callable[[int, bool], list[Row]],
        keep: Callable[[list[Record]], list[Record]],
        stop: threading.Event,
    ) -> None:
        self.asked, self.sizes, self.stop = asked, sizes, stop
        self.held = 0  # rows that were taken, without those whose records were yielded
        self.busy = 0.0  # seconds in which pairs were registered
        self._take, self._keep = take, keep
        self._buckets = Buckets(sizes)
        self._ahead: deque[Future[Loaded | Refused]] = deque()
        self._saving: deque[Future[list[Record]]] = deque()
        self._loaders = ThreadPoolExecutor(LOADERS, "fnreg-load")
        self._writer = ThreadPoolExecutor(1, "fnreg-save")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._loaders, self._writer):
            threads.shutdown(wait=True, cancel_futures=True)

    def results(self) -> Iterator[list[Record]]:
        """Records as they are kept, until there are no more rows, or it is to stop."""
        while not self.stop.is_set():
            self._fill()
            batch: Sequence[Loaded | Refused] | None
            if self._buckets.full or not (self._ahead or self._fill(wait=True)):
                batch = self._buckets.take()
            else:
                found = self._ahead.popleft().result()
                batch = self._buckets.add(found) if isinstance(found, Loaded) else [found]
            if batch:
                self._fill()
                yield from self._register(batch)
            elif not (self._ahead or self._buckets.held):
                yield from self._saved(0)  # now it holds nothing, and so may be given what nobody is to share
                if not self._fill(wait=True):
                    return
        yield from self._saved(0)

    def _fill(self, *, wait: bool = False) -> bool:
        """Let threads read the next two batches, once less than one is read: each time costs a write to the ledger."""
        window = max(LOADERS, self.sizes.window)
        if self.stop.is_set() or len(self._ahead) > window:
            return False
        rows = self._take(2 * window - len(self._ahead), wait)
        self.held += len(rows)
        self._ahead.extend(self._loaders.submit(load, row, self.asked) for row in rows)
        return bool(rows)

    def _register(self, batch: Sequence[Loaded | Refused]) -> Iterator[list[Record]]:
        clock = time.perf_counter()
        loaded = [pair for pair in batch if isinstance(pair, Loaded)]
        found: list[Outcome | Refused] = [pair for pair in batch if isinstance(pair, Refused)]
        if loaded:
            found += attempt(loaded, self.asked, self.sizes)
            self.busy += time.perf_counter() - clock
        for start in range(0, len(found), CHUNK):
            self._saving.append(self._writer.submit(self._save, found[start : start + CHUNK]))
        yield from self._saved(2 + len(found) // CHUNK)

    def _save(self, chunk: Sequence[Outcome | Refused]) -> list[Record]:
        return self._keep(save(chunk, self.asked))

    def _saved(self, most: int) -> Iterator[list[Record]]:
        """Records that are on disk; with more than `most` chunks on their way there, wait."""
        while self._saving and (len(self._saving) > most or self._saving[0].done()):
            records = self._saving.popleft().result()
            self.held -= len(records)
            yield records
