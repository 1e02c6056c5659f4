"""What became of pairs, on disk: the files of a pair, each whole or not at all, and what the ledger is to say of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path

from fnreg import agreement, results
from fnreg.cohort.ledger import Record
from fnreg.cohort.load import Asked, Loaded, Refused, files_of, told, trace_of
from fnreg.cohort.manifest import Row
from fnreg.cohort.solve import Outcome
from fnreg.cohort.study import DONE, OK, PAIRS, WARN, command, is_scratch
from fnreg.io.files import together, write_bytes
from fnreg.output import OutputFolder

ERRORS = "errors"
TRANSFORMS = ("transform.safetensors", "transform.tfm", "transform.h5", "displacement.nii.gz")  # the first one is told


def save(outcomes: Sequence[Outcome | Refused], asked: Asked) -> list[Record]:
    """Write the files of some pairs, and then give their records, which are not in the ledger yet.

    Raises OSError where something cannot be written: then no record says that it was.
    """
    (asked.folder / PAIRS).mkdir(exist_ok=True)
    with together(asked.folder):
        return [_save(outcome, asked) for outcome in outcomes]


def _save(outcome: Outcome | Refused, asked: Asked) -> Record:
    if isinstance(outcome, Refused):
        found = _record(outcome.row, asked, outcome.status, outcome.reason) | {
            "inputs": outcome.inputs.files,
            "beside": outcome.inputs.beside,
        }
        _told(outcome.row, asked, found, outcome.trace)
        return found
    row = outcome.pair.row
    found = _record(row, asked, outcome.status, outcome.reason) | outcome.values
    found |= {"seconds": round(outcome.seconds, 6), "device": str(asked.device)}
    found |= {"inputs": outcome.pair.inputs.files, "beside": outcome.pair.inputs.beside, "history": outcome.history}
    found["peak_mb"] = results.peak_megabytes(asked.device)
    trace = outcome.trace
    if outcome.result is not None:
        try:
            found |= _results(outcome, outcome.pair, asked)
        except Exception as problem:
            if isinstance(problem, OSError) and not isinstance(problem, ValueError):
                raise  # of the disk; what cannot be read is a ValueError too, and of the pair
            found |= {"status": "failed", "reason": told(problem)}
            trace = trace_of(problem)
    _told(row, asked, found, trace)
    return found


def _record(row: Row, asked: Asked, status: str, reason: str) -> Record:
    return {
        **row.record(),
        "status": status,
        "reason": reason,
        "settings_sha": asked.sha,
        "warnings": [],
        "history": [],
    }


def _results(outcome: Outcome, pair: Loaded, asked: Asked) -> Record:
    """Write what is to be saved of a pair with a result; what its record says beside the values."""
    result, start, settings = outcome.result, outcome.start, asked.settings
    assert result is not None
    assert start is not None
    grid, fixed, moving = result.fixed_grid, pair.fixed.image, pair.moving.image
    notes = list(outcome.notes)
    before, after = outcome.values["value_before"], outcome.values["value_after"]
    if after is not None:
        notes += results.remarks(float("nan") if before is None else before, after, outcome.values["folds"], settings)
    (was, unmoved), (now, labels) = (agreement.agreement(pair.known, m, grid, moving) for m in (start, result.mapping))
    found: Record = now | {f"{name}_before": value for name, value in was.items() if name in ("dice_mean", "tre_mean")}
    notes += agreement.worse(was, now)
    saves = settings.saves()
    inverse = results.invert(result) if "inverse" in saves else results.Inverse(None, {})
    if inverse.note is not None:
        notes.append(inverse.note)
    found |= inverse.away
    files = files_of(pair.row, asked)
    with OutputFolder(files.output, overwrite=True, known=results.KNOWN) as folder:
        results.write(
            folder.scratch,
            result,
            fixed,
            moving,
            saves,
            inverse=inverse.result,
            objective=repr(asked.stages[-1].objective),
            title=pair.row.pair_id,
            like=files.fixed,
            labels=results.LabelSides(pair.known.labels[0], unmoved, labels),
        )
        written = folder.commit()
    for name in TRANSFORMS:
        if name in written:
            found["transform"] = f"{PAIRS}/{pair.row.pair_id}/{name}"
            break
    return found | {"status": WARN if notes else OK, "reason": "; ".join(notes), "warnings": notes}


# -- errors ------------------------------------------------------------------------------------------------------------


def _told(row: Row, asked: Asked, record: Record, trace: str) -> None:
    """errors/ID.txt for a pair without a result; none for one with a result."""
    path = asked.folder / ERRORS / f"{row.pair_id}.txt"
    if record["status"] in DONE:
        path.unlink(missing_ok=True)
        return
    lines = [f"{row.pair_id}: {record['status']}", str(record["reason"]), "", "It can be looked at alone by", ""]
    lines += [f"  {command(row.record(), asked.values)}", *(["", trace] if trace else [])]
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, ("\n".join(lines).rstrip() + "\n").encode())
    old = asked.folder / PAIRS / row.pair_id
    if old.is_dir():  # of an earlier run, with other inputs
        for name in results.KNOWN:
            (old / name).unlink(missing_ok=True)
        with suppress(OSError):
            old.rmdir()


# -- what a dead process has left --------------------------------------------------------------------------------------


def sweep(folder: Path, names: Set[str], *, alone: bool) -> None:
    """Remove files and folders that were being written when a process died.

    names : of the pairs that it was working on; alone : nobody else is at work on another part of the study
    """
    for place, end in ((folder / ERRORS, ".txt"), (folder / PAIRS, "")):
        for path in _scratch(place):
            if path.name[1:].rsplit(".", 2)[0].removesuffix(end) in names:
                _remove(path)
    for place in (folder / PAIRS / name for name in names):
        for path in _scratch(place):
            _remove(path)
    for path in _scratch(folder) if alone else ():
        _remove(path)


def _scratch(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    with os.scandir(place) as entries:
        return [Path(entry.path) for entry in entries if is_scratch(entry.name)]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
