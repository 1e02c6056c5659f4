"""run(): a table of pairs in batches, on one device or on many, results as they finish, nothing lost.

What is to be done, and what is done, is kept by `Work`; an engine only registers what it takes from there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fnreg.cohort.about import update_run, write_description, write_run
from fnreg.cohort.batches import Sizes
from fnreg.cohort.cluster import cluster
from fnreg.cohort.ledger import Ledger, Record, read_attempts, read_ledger
from fnreg.cohort.load import Asked
from fnreg.cohort.local import local
from fnreg.cohort.manifest import Row, checked, read_manifest
from fnreg.cohort.save import sweep
from fnreg.cohort.shared import SharedImages, shared_images
from fnreg.cohort.study import OF_RECORDS, Study
from fnreg.cohort.work import Engine, Progress, Work
from fnreg.cohort.worker import Order
from fnreg.extras import require
from fnreg.io.files import PathLike, TransformReadError
from fnreg.settings import SAVES as EACH
from fnreg.settings import SPACES, STARTS, Settings
from fnreg.specs import SettingsError, choose

SAVES = tuple(name for name in EACH if name != "figures")  # those are of the report
ENGINES = ("local", "ray")


def run(
    pairs: PathLike | Iterable[Row],
    settings: Settings = Settings(),
    *,
    output: PathLike,
    save: str = "params",
    batch_size: int | None = None,
    engine: str = "local",
    workers: int | None = None,
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
    engine : "local", this process with all its cores or one GPU; "ray", the Ray cluster of this machine, else one that
        is started for this run; or the address of a cluster, "ray://HOST:PORT" or "HOST:PORT"
    workers : processes of a cluster; by default one on each machine, or with the device "cuda" one for each GPU
    retry_failed : whether pairs without a result are done again
    shard : (i, n), the i-th of n parts of the table, counted from 1, for as many runs side by side
    space : of points whose files do not say it, "LPS", "RAS" or "voxel"
    stop : once it is set the run ends after the batch that is being registered; a later run goes on
    progress : told now and then

    A record has the columns of `study.COLUMNS` beside those of the table, `warnings`, and `history`: the objective as
    lists (level, step, value).  Whatever is wrong with a pair is its status; an error is raised only for what concerns
    all: ManifestError, SettingsError, StudyError, LedgerError where another run is at work, WriteError where nothing
    can be written, DeviceError, MissingExtraError, ClusterError where no cluster answers or all its workers are lost.

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
    if space is not None:
        choose("space", space, SPACES)
    part, parts = shard
    if not 1 <= part <= parts:
        raise SettingsError(f"shard is {part}/{parts}: expected i/N with i from 1 to N")
    folder, stop = Path(output).absolute(), threading.Event() if stop is None else stop
    if _is_local(engine, workers, chosen):
        asked = dataclasses.replace(Asked.of(chosen, folder, space), images=SharedImages(shared_images(rows)))
        sizes = Sizes(asked.device, fixed=batch_size, refills=asked.refills)
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        work_by: Engine = partial(local, sizes=sizes)
    else:
        asked = Asked.of(dataclasses.replace(chosen, device="cpu"), folder, space)  # the devices are elsewhere
        Sizes(asked.device, fixed=batch_size)  # raises
        require("ray", "ray", f"the engine {engine}")
        order = Order(chosen, folder, space, batch_size, tuple(rows[0].files.values()), shared_images(rows))
        work_by = partial(cluster, order=order, address=engine, workers=workers)
    if chosen.start not in STARTS:  # the content of the file is an input of every pair
        path = Path(chosen.start).absolute()
        if not path.is_file():
            raise TransformReadError(f"{chosen.start} does not exist: check the path of the start")
        rows = [dataclasses.replace(row, files={"initial": path, **row.files}) for row in rows]
    about = {"device": chosen.device, "engine": engine, "shard": f"{part}/{parts}"}
    return _run(rows, asked, work_by, about, retry_failed, (part, parts), stop, progress or (lambda _: None))


def _is_local(engine: str, workers: int | None, settings: Settings) -> bool:
    """Whether the engine is the local one.  Raises SettingsError."""
    if not re.fullmatch(r"(ray://)?[^/\s:]+:[0-9]+", engine):
        choose("engine", engine, (*ENGINES, "or the address of a Ray cluster, as ray://head:10001 or head:6379"))
    if workers is not None and workers < 1:
        raise SettingsError(f"workers is {workers}: expected at least 1, or none for one on each machine or GPU")
    if engine == "local":
        if workers is not None:
            raise SettingsError(
                "workers are those of a cluster, and the engine is local, one process: add --engine ray"
            )
        return True
    if settings.device not in ("cpu", "cuda"):
        raise SettingsError(f"device is {settings.device!r}: workers of a cluster take cpu or cuda, one GPU each")
    return False


def _run(
    rows: Sequence[Row],
    asked: Asked,
    engine: Engine,
    about: dict[str, Any],
    retry_failed: bool,
    shard: tuple[int, int],
    stop: threading.Event,
    progress: Callable[[Progress], None],
) -> Iterator[Record]:
    begun, ledger = time.time(), Ledger(asked.folder, shard[0] - 1)
    with ExitStack() as held:
        if (asked.folder / "settings.toml").is_file():  # the other run may have another table
            held.enter_context(ledger)
            study = Study(asked.folder, rows, asked.values)
        else:
            study = Study(asked.folder, rows, asked.values)
            held.enter_context(ledger)
        write_description(study)
        mine = {row.pair_id for row in rows[shard[0] - 1 :: shard[1]]}
        attempts = {name: known for name, known in read_attempts(study.folder).items() if name in mine}
        open_ones = {name for name, known in attempts.items() if known.among}
        todo = [row for row in study.todo(retry_failed=retry_failed, begun=open_ones) if row.pair_id in mine]
        sweep(study.folder, open_ones, alone=shard == (1, 1))
        known = read_ledger(study.folder, without=OF_RECORDS)
        work = Work(
            todo, asked, ledger, attempts=attempts, before={name: one["status"] for name, one in known.items()},
            pairs=len(rows), stop=stop, progress=progress,
        )  # fmt: skip
        try:
            with work:
                yield from engine(work)
                yield from work.hopeless()
        finally:
            told = {"seed": asked.settings.seed, "threads": torch.get_num_threads(), **about}
            told |= {"began": begun, "seconds": time.time() - begun, **work.now._asdict()}
            study.write_table()
            if work.now.done:
                write_run(study, told)
            else:
                update_run(study, told)
