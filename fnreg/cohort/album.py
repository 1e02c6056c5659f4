"""The pictures of many pairs on disk: drawn where they are asked for, kept in pairs/ID/figures/ until they are old."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from fnreg import notes
from fnreg.cohort.figures import NAMES, draw
from fnreg.cohort.ledger import Record
from fnreg.cohort.study import PAIRS
from fnreg.extras import MissingExtraError
from fnreg.io.files import write_bytes
from fnreg.io.image import PICTURES, read_image, read_labels, suffix
from fnreg.io.transform import read_transform

VERSION = 1  # of the pictures: raised when these change, so that those of before are drawn again
FIGURES, STAMP, TRANSFORM = "figures", "figures.json", "transform.safetensors"
WORKERS = 2  # threads; torch is held to one thread in each, for the planes are small


class Drawn(NamedTuple):
    """What came of drawing a pair: whether there are pictures now, whether they are new, and why there are none."""

    pair_id: str
    there: bool
    new: bool = False
    reason: str = ""


def is_name(pair_id: str) -> bool:
    """Whether an id is the name of one folder, so that nothing outside of the study is touched."""
    return pair_id not in ("", ".", "..") and not set(pair_id) & {"/", "\\", "\0"}


def figures_of(study: Path, row: Mapping[str, str], record: Record) -> list[str]:
    """The pictures that a pair has, of `figures.NAMES`; none where they were not drawn to the end, or where its last
    record is of another map or of other images."""
    if not is_name(row["pair_id"]):
        return []
    pair = study / PAIRS / row["pair_id"]
    try:
        stamp = json.loads((pair / FIGURES / STAMP).read_text(encoding="utf-8"))
        if stamp["of"] != _key(row, record, pair / TRANSFORM):
            return []
        return [name for name in NAMES if name in stamp["names"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def draw_pairs(
    study: str | os.PathLike[str],
    pairs: Sequence[tuple[Mapping[str, str], Record]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drawn]:
    """Draw the pictures of pairs that have none, or older ones; what cannot be drawn is told and nothing else stops.

    pairs : the row of the table, paths by column, and the last record of each
    progress : is told how many pairs are done, and of how many

    Raises MissingExtraError without Pillow.
    """
    home, found = Path(study), list[Drawn]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for count, one in enumerate(_each(pool, home, pairs, 4 * WORKERS), 1):
                found.append(one)
                if progress is not None:
                    progress(count, len(pairs))
    finally:
        torch.set_num_threads(threads)
    return found


def _each(
    pool: ThreadPoolExecutor, home: Path, pairs: Iterable[tuple[Mapping[str, str], Record]], ahead: int
) -> Iterator[Drawn]:
    """Results in order, a few begun ahead, so that memory is flat and an interrupt ends soon."""
    left = iter(pairs)
    running = deque(pool.submit(_draw_pair, home, *pair) for pair in islice(left, ahead))
    try:
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(_draw_pair, home, *pair) for pair in islice(left, 1))
    finally:
        for one in running:
            one.cancel()


def _draw_pair(study: Path, row: Mapping[str, str], record: Record) -> Drawn:
    pair_id = row["pair_id"]
    if not is_name(pair_id):
        return Drawn(pair_id, False, reason=f"id {pair_id[:60]!r} is no name of a folder")
    pair = study / PAIRS / pair_id
    transform = pair / TRANSFORM
    key = _key(row, record, transform)
    if _known(pair / FIGURES, key):
        return Drawn(pair_id, True)
    try:
        with notes.hearing():  # what is odd about a file was told when it was registered
            mapping = read_transform(transform) if transform.is_file() else None
            labels = read_labels(row["fixed_labels"]) if row.get("fixed_labels") else None
            fixed, moving = read_image(row["fixed"]), read_image(row["moving"])
        made = draw(fixed, moving, mapping, labels=labels, letters=suffix(row["fixed"]) not in PICTURES)
        _keep(pair / FIGURES, made, key)
    except MissingExtraError as problem:
        if problem.name == "PIL":
            raise
        return Drawn(pair_id, False, reason=str(problem))
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as problem:
        return Drawn(pair_id, False, reason=" ".join(str(problem).split()) or type(problem).__name__)
    return Drawn(pair_id, True, new=True)


def _key(row: Mapping[str, str], record: Record, transform: Path) -> str:
    """What the pictures are of: the inputs as they were registered, or as they are, and the transform's file."""
    inputs = record.get("inputs") or {
        name: _stat(Path(row[name])) for name in ("fixed", "moving", "fixed_labels") if row.get(name)
    }
    paths = [row.get(name, "") for name in ("fixed", "moving", "fixed_labels")]
    content = [VERSION, paths, inputs, record.get("settings_sha"), _stat(transform)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stat(path: Path) -> list[int] | None:
    try:
        told = path.stat()
    except OSError:
        return None
    return [told.st_size, told.st_mtime_ns]


def _known(folder: Path, key: str) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return stamp["of"] == key and all((folder / name).is_file() for name in stamp["names"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _keep(folder: Path, made: Mapping[str, bytes], key: str) -> None:
    """The stamp goes first and comes last: where it is, the pictures are whole and of one map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)
    for name, content in made.items():
        write_bytes(folder / name, content)
    for name in set(NAMES) - set(made):
        (folder / name).unlink(missing_ok=True)
    names = [name for name in NAMES if name in made]
    write_bytes(folder / STAMP, (json.dumps({"of": key, "names": names}) + "\n").encode())
