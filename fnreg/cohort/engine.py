"""run(): a table of pairs in batches on one device, results as they finish, nothing lost.

One thread computes.  While it does, others read the pairs that come next, and one writes what is done; both are held
up rather than let memory grow.  A pair is `begun` in the ledger before its files are read, and done once its record is
there; what a process that died was working on is tried alone by the next one, so that a pair that kills processes harms
no other.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from fnreg.cohort.about import write_description, write_run
from fnreg.cohort.batches import Buckets, Sizes
from fnreg.cohort.ledger import BEGUN, RELEASED, Attempts, Ledger, LedgerError, Record, read_attempts, read_ledger
from fnreg.cohort.load import Asked, Loaded, Refused, crashed, load
from fnreg.cohort.manifest import Row, checked, read_manifest
from fnreg.cohort.save import save, sweep
from fnreg.cohort.shared import SharedImages
from fnreg.cohort.solve import Outcome, attempt
from fnreg.cohort.study import DONE, OF_RECORDS, Study
from fnreg.io.files import PathLike, TransformReadError
from fnreg.settings import INITS, Settings, SettingsError, choose
from fnreg.settings import SAVES as EACH

SAVES = tuple(name for name in EACH if name != "figures")  # those are of the report
NOT_OF_RESULTS = ("threads", "device")  # settings that change results by rounding only
LOADERS = 2  # threads that read
CHUNK = 32  # pairs whose records share a write to the ledger
MOST_DEATHS = 2  # of a process that works on a pair alone, before the pair counts as crashed


class Progress(NamedTuple):
    """How far a run is: pairs of the study, of this run, and of it those that are done and those with a result."""

    pairs: int
    todo: int
    done: int
    good: int
    busy: float  # seconds in which the device computed


def run(
    pairs: PathLike | Iterable[Row],
    settings: Settings = Settings(),
    *,
    output: PathLike,
    save: str = "params",
    batch_size: int | None = None,
    retry_failed: bool = False,
    shard: tuple[int, int] = (1, 1),
    space: str | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Record]:
    """Register all pairs of a table; yields the record of each as it is done, in no order that can be relied upon.

    pairs : a table, see `read_manifest`, or its rows
    settings : as of `fnreg register`; `save` here says what is written of each pair, joined by +, of `SAVES`
    output : the folder of the study; where it is that of an earlier run with the same settings, pairs that this has
        finished are not done again
    batch_size : pairs that share a batch; by default as many as fit in memory
    retry_failed : whether pairs without a result are done again
    shard : (i, n), the i-th of n parts of the table, counted from 1, for as many runs side by side
    space : of points whose files do not say it, "LPS", "RAS" or "voxel"
    stop : once it is set the run ends after the batch that is being registered; a later run goes on
    progress : told now and then

    A record has the columns of `study.COLUMNS` beside those of the table, `warnings`, and `history`: the objective as
    lists (level, step, value).  Whatever is wrong with a pair is its status; an error is raised only for what concerns
    all: ManifestError, SettingsError, StudyError, LedgerError where another run is at work, WriteError where nothing
    can be written, DeviceError, MissingExtraError.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import fnreg
    >>> from fnreg import cohort
    >>> from fnreg.settings import Settings
    >>> with tempfile.TemporaryDirectory() as name:
    ...     home = Path(name)
    ...     for digit, image in zip("abc", fnreg.data.digits(9, count=3)):
    ...         fnreg.io.write_image(home / f"{digit}.nii", image)
    ...     rows = cohort.all_to(home / "a.nii", [home / "b.nii", home / "c.nii"])
    ...     records = list(cohort.run(rows, Settings(levels=1, steps="5"), output=home / "study"))
    >>> sorted(record["pair_id"] for record in records)
    ['b-to-a', 'c-to-a']
    """
    rows = read_manifest(pairs) if isinstance(pairs, (str, os.PathLike)) else checked(pairs)
    chosen = dataclasses.replace(settings, save=save)
    chosen.check()
    for name in chosen.saves():
        choose("save of a study", name, SAVES)
    part, parts = shard
    if not 1 <= part <= parts:
        raise SettingsError(f"shard is {part}/{parts}: expected i/N with i from 1 to N")
    folder, stop = Path(output).absolute(), threading.Event() if stop is None else stop
    asked, sizes = Asked.of(chosen, folder, space), Sizes(torch.device(chosen.device), fixed=batch_size)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.init not in INITS:  # the content of the file is an input of every pair
        path = Path(chosen.init).absolute()
        if not path.is_file():
            raise TransformReadError(f"{chosen.init} does not exist: check the path of the start")
        rows = [dataclasses.replace(row, files={"initial": path, **row.files}) for row in rows]
    asked = dataclasses.replace(asked, images=SharedImages.of(rows))
    return _run(rows, asked, sizes, retry_failed, (part, parts), stop, progress or (lambda _: None))


def _run(
    rows: Sequence[Row],
    asked: Asked,
    sizes: Sizes,
    retry_failed: bool,
    shard: tuple[int, int],
    stop: threading.Event,
    progress: Callable[[Progress], None],
) -> Iterator[Record]:
    values = {k: v for k, v in asked.settings.given().items() if k not in NOT_OF_RESULTS} | {"space": asked.space or ""}
    begun, ledger = time.time(), Ledger(asked.folder, shard[0] - 1)
    with ExitStack() as held:
        if (asked.folder / "settings.toml").is_file():  # the other run may have another table
            held.enter_context(ledger)
            study = Study(asked.folder, rows, values)
        else:
            study = Study(asked.folder, rows, values)
            held.enter_context(ledger)
        write_description(study)
        mine = {row.pair_id for row in rows[shard[0] - 1 :: shard[1]]}
        todo = [row for row in study.todo(retry_failed=retry_failed) if row.pair_id in mine]
        attempts = {name: known for name, known in read_attempts(study.folder).items() if name in mine}
        died = {name for name, known in attempts.items() if known.together or known.alone}
        sweep(study.folder, died, alone=shard == (1, 1))
        work = _Work(study, asked, ledger, sizes, attempts, len(todo), stop, progress)
        try:
            with work:
                yield from work.results(todo)
        finally:
            seconds = time.time() - begun
            told = {"seed": asked.settings.seed, "device": str(asked.device), "threads": torch.get_num_threads()}
            told |= {"shard": f"{shard[0]}/{shard[1]}", "began": begun, "seconds": seconds, **work.now._asdict()}
            study.write_table()
            if work.now.done or not (study.folder / "run.json").is_file():  # else it is of the run that did the work
                write_run(study, told)


class _Work:
    """The work on the rows of one run."""

    def __init__(
        self,
        study: Study,
        asked: Asked,
        ledger: Ledger,
        sizes: Sizes,
        attempts: dict[str, Attempts],
        todo: int,
        stop: threading.Event,
        progress: Callable[[Progress], None],
    ) -> None:
        self.study, self.asked, self.ledger, self.sizes = study, asked, ledger, sizes
        self.attempts, self.stop, self.progress = attempts, stop, progress
        self.now = Progress(len(study.rows), todo, 0, 0, 0.0)
        self._buckets = Buckets(sizes)
        self._begun: dict[str, int] = {}  # attempts, of pairs that are begun and not done
        self._ahead: deque[Future[Loaded | Refused]] = deque()
        self._saving: deque[Future[list[Record]]] = deque()
        self._loaders = ThreadPoolExecutor(LOADERS, "fnreg-load")
        self._writer = ThreadPoolExecutor(1, "fnreg-save")

    def __enter__(self) -> _Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._loaders, self._writer):
            threads.shutdown(wait=True, cancel_futures=True)
        for saving in self._saving:
            with suppress(BaseException):
                self._finish(saving.result(timeout=0))
        if self._begun:  # nothing is wrong with them: their turn has not come
            with suppress(LedgerError):  # else the next run tries them alone
                self.ledger.append([{"pair_id": name, "status": RELEASED} for name in self._begun])

    def results(self, rows: Sequence[Row]) -> Iterator[Record]:
        """The records of all rows; those that died with a process come last, those that did so alone at the end."""
        deaths: dict[str, Attempts] = {}
        before = read_ledger(self.study.folder, without=OF_RECORDS)
        for row in rows:
            known = self.attempts.get(row.pair_id, Attempts())
            if known.together or known.alone or before.get(row.pair_id, {}).get("status") == "crashed":
                deaths[row.pair_id] = known
        self.progress(self.now)
        yield from self._together([row for row in rows if row.pair_id not in deaths])
        suspects = [row for row in rows if row.pair_id in deaths]
        for row in sorted(suspects, key=lambda row: deaths[row.pair_id].alone):
            if self.stop.is_set():
                break
            known = deaths[row.pair_id]
            if known.alone >= MOST_DEATHS:
                self._begun[row.pair_id] = known.times
                yield from self._register([crashed(row)])
            else:
                self._begin([row], alone=True)
                yield from self._register([load(row, self.asked)])
            yield from self._saved(0)  # before the next one, which may end the process
        yield from self._saved(0)

    def _together(self, rows: Sequence[Row]) -> Iterator[Record]:
        waiting = deque(rows)
        while waiting or self._ahead or self._buckets.held:
            if self.stop.is_set():
                return
            self._fill(waiting)
            batch: Sequence[Loaded | Refused] | None
            if self._ahead and not self._buckets.full:
                found = self._ahead.popleft().result()
                batch = self._buckets.add(found) if isinstance(found, Loaded) else [found]
            else:
                batch = self._buckets.take()
            if batch:
                self._fill(waiting)
                yield from self._register(batch)

    def _fill(self, waiting: deque[Row]) -> None:
        """Let threads read the next two batches, once less than one is read: each time costs a write to the ledger."""
        window = max(LOADERS, self.sizes.window)
        count = min(2 * window - len(self._ahead), len(waiting))
        if count > 0 and len(self._ahead) <= window:
            rows = [waiting.popleft() for _ in range(count)]
            self._begin(rows, alone=False)
            self._ahead.extend(self._loaders.submit(load, row, self.asked) for row in rows)

    def _begin(self, rows: Sequence[Row], *, alone: bool) -> None:
        self.ledger.append([{"pair_id": row.pair_id, "status": BEGUN, "alone": alone} for row in rows])
        for row in rows:
            self._begun[row.pair_id] = self.attempts.get(row.pair_id, Attempts()).times + 1

    def _register(self, batch: Sequence[Loaded | Refused]) -> Iterator[Record]:
        clock = time.perf_counter()
        loaded = [pair for pair in batch if isinstance(pair, Loaded)]
        found: list[Outcome | Refused] = [pair for pair in batch if isinstance(pair, Refused)]
        if loaded:
            found += attempt(loaded, self.asked, self.sizes)
            self.now = self.now._replace(busy=self.now.busy + time.perf_counter() - clock)
        for start in range(0, len(found), CHUNK):
            chunk = found[start : start + CHUNK]
            self._saving.append(self._writer.submit(self._save, chunk))
        yield from self._saved(2 + len(found) // CHUNK)

    def _save(self, chunk: Sequence[Outcome | Refused]) -> list[Record]:
        names = [(one.row if isinstance(one, Refused) else one.pair.row).pair_id for one in chunk]
        return save(chunk, self.study, self.asked, self.ledger, [self._begun[name] for name in names])

    def _saved(self, most: int) -> Iterator[Record]:
        """Records that are on disk; with more than `most` chunks on their way there, wait."""
        while self._saving and (len(self._saving) > most or self._saving[0].done()):
            records = self._saving[0].result()
            self._saving.popleft()
            yield from self._finish(records)

    def _finish(self, records: list[Record]) -> list[Record]:
        for record in records:
            self._begun.pop(record["pair_id"], None)
        good = sum(record["status"] in DONE for record in records)
        self.now = self.now._replace(done=self.now.done + len(records), good=self.now.good + good)
        self.progress(self.now)
        return records
