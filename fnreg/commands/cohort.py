"""Commands of data sets: run, status, validate."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts

from fnreg.cohort.columns import DONE, OF_RECORDS, tally
from fnreg.commands import options
from fnreg.commands.base import FAILED, INTERRUPTED, OK, Json, Verbose, app, option, print_table
from fnreg.commands.report import Figures, drawn
from fnreg.settings import DRAWN
from fnreg.specs import SettingsError, choose

if TYPE_CHECKING:
    from fnreg.cohort.manifest import Row

Table = Annotated[Path | None, cyclopts.Parameter(help="Table of pairs: CSV, TSV, JSON Lines or Parquet.")]
AllTo = Annotated[Path | None, option("In place of TABLE: register all images to this one.")]
AllPairs = Annotated[bool, option("In place of TABLE: register each image to each other.")]
Bids = Annotated[Path | None, option("Images for --all-to or --all-pairs: those of a BIDS data set.")]
Suffix = Annotated[str | None, option("Of BIDS images. [default: T1w]")]
Glob = Annotated[str | None, option("Images for --all-to or --all-pairs: a pattern in quotes, as 'scans/**/*.nii.gz'.")]


@app.command
def run(
    table: Table = None,
    /,
    *,
    output: Annotated[Path, option("Folder of the study; one that was begun goes on.", "--output", "-o")],
    all_to: AllTo = None,
    all_pairs: AllPairs = False,
    bids: Bids = None,
    suffix: Suffix = None,
    glob: Glob = None,
    how: options.How = options.How(),
    space: options.Space = None,
    save: Annotated[
        str | None,
        option("Of each pair, joined by +: params, xfm, warped, inverse, displacement, jacobian. [default: params]"),
    ] = None,
    batch_size: Annotated[int | None, option("Pairs at a time. [default: as many as fit in memory]")] = None,
    engine: Annotated[
        str, option("Who computes: local, ray (many machines), or the address of a Ray cluster, as head:6379.")
    ] = "local",
    workers: Annotated[
        int | None, option("Processes of a Ray cluster. [default: one on each machine, or each GPU with --device cuda]")
    ] = None,
    shard: Annotated[str, option("The i-th of N parts of the table, as 1/4, for runs side by side.")] = "1/1",
    retry_failed: Annotated[bool, option("Do pairs without a result again.")] = False,
    figures: Figures = "worst",
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Register all pairs of a table, in batches; the same command again goes on where it was.

    The table has the columns fixed and moving, and where they are known pair_id, fixed_mask, moving_mask,
    fixed_labels, moving_labels, fixed_points, moving_points, initial and group; all others are carried through.  Paths
    are relative to the table.  Whatever is wrong with a pair is its status in pairs.tsv, and the others go on.

    Interrupt once to end after the batch that is being registered, twice to end now.
    """
    chosen = how.chosen(save, {"save": "params"})
    choose("figures", figures, DRAWN)
    part = _shard(shard)
    rows = _rows(table, all_to, all_pairs, bids, suffix, glob, output)
    from fnreg import cohort

    stop, told = threading.Event(), _Told(as_json)
    with _interrupts(stop), told:
        records = cohort.run(
            rows, chosen, output=output, save=chosen.save, batch_size=batch_size, engine=engine, workers=workers,
            retry_failed=retry_failed, shard=part, space=space, stop=stop, progress=told.progress,
        )  # fmt: skip
        try:
            for record in records:
                told.record(record)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what was done is kept: the same command goes on") from None
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    print(json.dumps(record, indent=2) if as_json else told.summary(record, output))
    if stop.is_set():
        print("fnreg: interrupted, what was done is kept: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    if part[1] == 1 and (
        told.done or not (output / "report.html").is_file()
    ):  # parts of a study leave it to `fnreg report`
        _report(output, figures, as_json)
    return _code(record["counts"], part)


def _report(study: Path, figures: str, quiet: bool) -> None:
    """Write the report; what is wrong with it does not touch the results."""
    from fnreg.cohort.report import write_report

    try:
        found = write_report(study, figures=figures, progress=None if quiet else drawn())
    except (OSError, ValueError) as problem:
        print(f"fnreg: warning: no report was written: {problem}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        raise KeyboardInterrupt("all pairs are done: fnreg report writes the page") from None
    for note in found["notes"]:
        print(f"fnreg: warning: {note}", file=sys.stderr)
    if not quiet:
        print(f"  {'report':<12} {found['report']}")


@app.command
def status(study: Path, /, *, as_json: Json = False, verbose: Verbose = False) -> int:
    """Tell how far a study is: how many of its pairs have which status.

    Parameters
    ----------
    study
        The folder that run writes to; it may be at work.
    """
    from fnreg.cohort.ledger import read_ledger
    from fnreg.cohort.manifest import ManifestError, read_table

    table = study / "manifest.tsv"
    if not table.is_file():
        raise ManifestError(f"{study} holds no study: it has no manifest.tsv")
    known = read_ledger(study, without=OF_RECORDS)
    counts = tally(known.get(row["pair_id"], {}).get("status", "pending") for row in read_table(table))
    print_table({"study": str(study), "pairs": sum(counts.values()), **counts}, as_json)
    return _code(counts, (1, 1))


@app.command
def validate(
    table: Table = None,
    /,
    *,
    all_to: AllTo = None,
    all_pairs: AllPairs = False,
    bids: Bids = None,
    suffix: Suffix = None,
    glob: Glob = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Check a table of pairs: its columns, its ids, and that all files are there."""
    rows = _rows(table, all_to, all_pairs, bids, suffix, glob)
    files = Counter(name for row in rows for name in row.files)
    carried = dict.fromkeys(name for row in rows for name in row.extra)
    told = {"carried through": ", ".join(carried)} if carried else {}
    print_table({"pairs": len(rows), **files, **told}, as_json)
    return OK


def _rows(
    table: Path | None,
    all_to: Path | None,
    all_pairs: bool,
    bids: Path | None,
    suffix: str | None,
    glob: str | None,
    output: Path | None = None,
) -> list[Row]:
    """The pairs that were asked for; what a study has written into its folder is none of its images."""
    from fnreg.cohort import manifest

    made = all_to is not None or all_pairs
    if suffix is not None and bids is None:
        raise SettingsError(f"--suffix {suffix} is that of BIDS images: give --bids as well, or leave it out")
    if table is not None:
        if made or bids is not None or glob is not None:
            raise SettingsError("a table is given beside --all-to, --all-pairs, --bids or --glob: give one of the two")
        return manifest.read_manifest(table)
    if (bids is None) == (glob is None) or (all_to is not None) == all_pairs:
        raise SettingsError(
            "no pairs are given: give a table, or images by --glob or --bids with --all-to IMAGE or --all-pairs"
        )
    images = manifest.find_bids(bids, suffix or "T1w") if bids is not None else manifest.find_images(glob or "")
    if output is not None:
        images = [image for image in images if output.absolute() not in image.absolute().parents]
    return manifest.all_pairs(images) if all_to is None else manifest.all_to(all_to, images)


def _shard(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise SettingsError(f"shard {text!r}: expected i/N with i from 1 to N, such as 1/4")
    return part, parts


def _code(counts: dict[str, int], part: tuple[int, int]) -> int:
    """OK where all pairs have a result; what other parts have still to do is not this one's."""
    left = {*DONE, *(["pending"] if part[1] > 1 else [])}
    return OK if set(counts) <= left else FAILED


@contextmanager
def _interrupts(stop: threading.Event) -> Generator[None]:
    """The first interrupt sets `stop`, the next one is a KeyboardInterrupt; afterwards they do not disturb the end."""

    def interrupt(_: int, __: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nfnreg: ending after this batch; interrupt again to end now", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if stop.is_set() else before)


class _Told:
    """What the user sees of a run: a bar on a terminal, the first failures as lines, a summary at the end."""

    LINES = 10  # failures that are told one by one

    def __init__(self, quiet: bool) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._bar: Any = None
        self._task: Any = None
        self._failed = self.done = 0

    def __enter__(self) -> _Told:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("registering"), BarColumn(bar_width=28), MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=Console(stderr=True), speed_estimate_period=600)
            self._task = self._bar.add_task("", total=None, told="")
            self._bar.start()
        return self

    def progress(self, now: Any) -> None:
        """A `cohort.Progress`."""
        self.done = now.done
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            told = f"{speed:.3g} pairs/s" if speed else ""
            told += f", {now.done - now.good} without a result" if now.done > now.good else ""
            self._bar.update(self._task, completed=now.done, total=now.todo, told=told)

    def record(self, record: dict[str, Any]) -> None:
        """A pair is done."""
        if record["status"] in DONE:
            return
        self._failed += 1
        if self._failed <= self.LINES:
            print(f"fnreg: {record['pair_id']}: {record['status']}: {record['reason']}", file=sys.stderr)
        elif self._failed == self.LINES + 1:
            print("fnreg: and more, see pairs.tsv", file=sys.stderr)

    def summary(self, record: dict[str, Any], output: Path) -> str:
        """The end of a run in words."""
        counts = ", ".join(f"{count} {name}" for name, count in record["counts"].items())
        if not self.done:
            return f"{record['pairs']} pairs: {counts}; nothing was left to do in {output}"
        rate = self.done / record["seconds"] if record["seconds"] > 0 else 0.0
        lines = [f"{record['pairs']} pairs: {counts}"]
        lines += [f"  {'this run':<12} {self.done} pairs in {record['seconds']:.1f} s, {rate:.3g} a second"]
        lines += [f"  {'written':<12} {output / 'pairs.tsv'}"]
        if set(record["counts"]) - {*DONE, "pending"}:
            lines += [f"  {'why':<12} {output / 'errors'}, with the command for each pair; --retry-failed tries again"]
        return "\n".join(lines)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(Exception):
                self._bar.stop()
