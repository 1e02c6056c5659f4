"""What runs on each machine of a cluster: the pipeline of the local engine, fed by calls.

A call brings rows and takes records; paths travel, images never do.  The files of a pair are written here, its record
goes back to the process that keeps the ledger.
"""

from __future__ import annotations

import dataclasses
import platform
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fnreg import __version__
from fnreg.cohort.batches import SHARE, Sizes
from fnreg.cohort.ledger import Record
from fnreg.cohort.load import Asked
from fnreg.cohort.local import Pipeline
from fnreg.cohort.manifest import Row
from fnreg.cohort.shared import SharedImages
from fnreg.settings import Settings


class Order(NamedTuple):
    """What all workers are to do.

    settings : with their device; folder : of the study; space, batch_size : as of `cohort.run`
    needed : files that every worker has to see; shared : images of several pairs
    """

    settings: Settings
    folder: Path
    space: str | None = None
    batch_size: int | None = None
    needed: tuple[Path, ...] = ()
    shared: tuple[Path, ...] = ()


class Answer(NamedTuple):
    """records : of pairs that are done; wanted : rows that are to come next; busy : seconds of registering so far;
    ended : nothing will follow"""

    records: list[Record]
    wanted: int
    busy: float
    ended: bool


class Worker:
    """A pipeline in a thread of its own.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from fnreg.cohort.worker import Order, Worker
    >>> from fnreg.settings import Settings
    >>> worker = Worker()
    >>> with tempfile.TemporaryDirectory() as study:
    ...     _ = (Path(study) / "settings.toml").write_text("")
    ...     version = worker.start(Order(Settings(), Path(study)), threads=1, share=1.0)
    ...     worker.step([], True).wanted
    ...     worker.end()
    4
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inbox: deque[Row] = deque()
        self._outbox: list[Record] = []
        self._more, self._wanted, self._ended = True, 0, False
        self._stop = threading.Event()
        self._error: Exception | None = None

    def start(self, order: Order, *, threads: int, share: float) -> str:
        """Make ready; returns the version of fnreg.

        threads : of torch, where the settings do not say it; share : of the machine that is this worker's

        Raises FileNotFoundError, and what `Asked.of` does.
        """
        for path in (order.folder / "settings.toml", *order.needed):
            if not path.exists():
                raise FileNotFoundError(
                    f"{platform.node()} does not see {path}: data and study need the same path on all machines"
                )
        asked = Asked.of(order.settings, order.folder, order.space)
        asked = dataclasses.replace(asked, images=SharedImages(order.shared))
        sizes = Sizes(asked.device, fixed=order.batch_size, refills=asked.refills, share=SHARE * share)
        self._line = Pipeline(asked, sizes, take=self._take, keep=self._keep, stop=self._stop)
        threading.Thread(target=self._work, args=(order.settings.threads or threads,), daemon=True).start()
        return __version__

    def step(self, rows: Sequence[Row], more: bool) -> Answer:
        """Take rows, and wait until there are records, or with `more` until further rows are wanted.

        more : whether the caller has further rows for this worker; without it nothing waits for others of its shape

        Raises what ended the work.
        """
        with self._changed:
            self._inbox += rows
            self._more = more
            self._wanted = max(0, self._wanted - len(rows))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._outbox or self._ended or (self._more and self._wanted))
            if self._error is not None and not self._outbox:
                raise self._error
            records, self._outbox = self._outbox, []
            return Answer(records, self._wanted, self._line.busy, self._ended and self._error is None)

    def end(self) -> None:
        """Begin no further batch: what is computed is finished, what waits is left."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # by the thread that computes: OpenMP keeps the number for each
        try:
            with self._line as line:
                for _ in line.results():
                    pass
        except Exception as problem:
            self._error = problem
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _take(self, most: int, wait: bool) -> list[Row]:
        """For the pipeline: what has come.  Without rows it waits where else it had nothing to do or would have to
        register less than a batch."""
        with self._changed:
            self._wanted = max(0, most - len(self._inbox))
            self._changed.notify_all()
            if wait:
                idle = self._line.held == 0
                self._changed.wait_for(lambda: self._inbox or self._stop.is_set() or not (idle or self._more))
            return [self._inbox.popleft() for _ in range(min(most, len(self._inbox)))]

    def _keep(self, records: list[Record]) -> list[Record]:
        with self._changed:
            self._outbox += records
            self._changed.notify_all()
        return records
