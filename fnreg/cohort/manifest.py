"""The table of pairs: from a file, or made of a set of images; checked before any work.

This module does not import torch: `fnreg validate` is quick.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fnreg.cohort.columns import is_result
from fnreg.cohort.tables import ManifestError as ManifestError
from fnreg.cohort.tables import as_text, read_lines

REQUIRED = ("fixed", "moving")
FILES = (
    *REQUIRED, "fixed_mask", "moving_mask", "fixed_labels", "moving_labels", "fixed_points", "moving_points", "initial",
)  # fmt: skip
COLUMNS = ("pair_id", *FILES, "group")
LONGEST = 128  # characters of an id: file systems allow 255 bytes, and names are made of it
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
_IMAGES = re.compile(r"\.(nii|nii\.gz|mha|mhd|nrrd|nhdr|png|jpe?g|tiff?)\Z", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One pair.

    files : absolute paths by column, those of `FILES` that it has
    group, extra : carried through as they are; `extra` by column
    """

    pair_id: str
    files: Mapping[str, Path]
    group: str = ""
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, str]:
        """The row as text, with the columns of a table."""
        group = {"group": self.group} if self.group else {}
        return {"pair_id": self.pair_id} | {k: str(v) for k, v in self.files.items()} | group | dict(self.extra)


def read_manifest(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table.

    path : .csv and .tsv with a line of column names, .jsonl with one object per line, .parquet with the extra `cohort`

    Columns are those of `COLUMNS`, of which fixed and moving are needed; others are carried through.  Paths are
    relative to the table.  A row without pair_id gets one of the names of its images.

    Raises ManifestError where the table is missing, damaged or empty, lacks a column, or has rows without an image,
    with ids that are no file names or not unique, or with files that do not exist: all of these at once.
    """
    table = Path(path)
    lines = read_lines(table)
    if not lines:
        raise ManifestError(f"{table} has no rows: each is a pair, with the columns {' and '.join(REQUIRED)}")
    records = [record for _, record in lines]
    columns = list(dict.fromkeys(key for record in records for key in record))
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise ManifestError(
            f"{table} has no column {' and '.join(missing)}: needed are {' and '.join(REQUIRED)}, and it has "
            f"{', '.join(columns)}"
        )
    home = Path(os.path.abspath(table)).parent
    return _checked([_row(record, home) for record in records], str(table), [f"row {number}" for number, _ in lines])


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The lines of a table that `write_manifest` made, by column, whether or not its files are there.

    Raises ManifestError where it is none.
    """
    table = Path(path)
    lines = read_lines(table)
    unnamed = [number for number, record in lines if not record.get("pair_id")]
    if unnamed or not lines:
        what = f"row {unnamed[0]} has no pair_id" if unnamed else "it has no rows"
        raise ManifestError(f"{table} is no table of a study: {what}")
    return [record for _, record in lines]


def checked(rows: Iterable[Row]) -> list[Row]:
    """Rows that were made otherwise, checked as those of a table; ManifestError with all that is wrong."""
    made = [_plain(row) for row in rows]
    if not made:
        raise ManifestError("there are no rows: give a pair or more")
    return _checked(made, "the rows", [f"row {number}" for number in range(1, len(made) + 1)])


def all_to(fixed: str | os.PathLike[str], images: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """A row for each image that is not the fixed one: it is registered to that."""
    target = Path(os.path.abspath(fixed))
    return _of_images([(target, moving) for moving in _distinct(images) if moving != target])


def all_pairs(images: Iterable[str | os.PathLike[str]]) -> list[Row]:
    """A row for each ordered pair of two images."""
    return _of_images(itertools.permutations(_distinct(images), 2))


def find_images(pattern: str) -> list[Path]:
    """The images that a pattern such as "scans/**/*.nii.gz" names, sorted; ManifestError where there are none."""
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if _IMAGES.search(name))
    if not found:
        raise ManifestError(f"no image matches {pattern!r}: quote the pattern, and use ** for folders of any depth")
    return found


def find_bids(folder: str | os.PathLike[str], suffix: str = "T1w") -> list[Path]:
    """The images of a BIDS data set with a suffix, sorted by subject and session.

    Raises ManifestError where the folder is no BIDS data set, or has no such image.
    """
    home = Path(folder)
    if not (home / "dataset_description.json").is_file():
        raise ManifestError(f"{home} is not a BIDS data set: it has no dataset_description.json")
    found = [
        path
        for pattern in ("sub-*/*/*", "sub-*/ses-*/*/*")
        for path in home.glob(pattern)
        if _IMAGES.search(path.name) and path.name.split(".")[0].rpartition("_")[2] == suffix
    ]
    if not found:
        raise ManifestError(f"{home} has no image that ends in _{suffix}: give another suffix")
    return sorted(set(found))


def write_manifest(rows: Iterable[Row]) -> bytes:
    """Rows as a TSV table, which `read_manifest` reads again."""
    records = [row.record() for row in rows]
    found = dict.fromkeys(key for record in records for key in record)
    columns = [name for name in COLUMNS if name in found] + [name for name in found if name not in COLUMNS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(record: Mapping[str, str], home: Path) -> Row:
    files = {name: home / record[name] for name in FILES if record.get(name)}
    extra = {name: value for name, value in record.items() if name not in COLUMNS}
    return Row(record.get("pair_id", ""), files, record.get("group", ""), extra)


def _plain(row: Row) -> Row:
    """A row as a table gives it: absolute paths, and text."""
    files = {name: Path(os.path.abspath(path)) for name, path in row.files.items()}
    extra = {str(name): as_text(value) for name, value in row.extra.items()}
    return Row(as_text(row.pair_id), files, as_text(row.group), extra)


def _of_images(pairs: Iterable[tuple[Path, Path]]) -> list[Row]:
    rows = [Row("", {"fixed": fixed, "moving": moving}) for fixed, moving in pairs]
    if not rows:
        raise ManifestError("there are no pairs: give two images or more")
    return _checked(rows, "the pairs", [f"pair {number}" for number in range(1, len(rows) + 1)])


def _distinct(images: Iterable[str | os.PathLike[str]]) -> list[Path]:
    return list(dict.fromkeys(Path(os.path.abspath(image)) for image in images))


def _checked(rows: list[Row], told: str, places: list[str]) -> list[Row]:
    """The rows with ids, or ManifestError with all that is wrong."""
    problems = [
        f"{place}: {name} is empty, each row needs it"
        for place, row in zip(places, rows, strict=True)
        for name in REQUIRED
        if name not in row.files
    ]
    if problems:
        raise ManifestError(f"{told} has rows without an image", problems)
    extra = dict.fromkeys(name for row in rows for name in row.extra)
    problems = [f"column {name} is one of the results: give it another name" for name in extra if is_result(name)]
    rows = _named(rows)
    owner: dict[str, str] = {}
    for place, row in zip(places, rows, strict=True):
        name = row.pair_id
        if not _ID.match(name) or len(name) > LONGEST:
            problems.append(
                f"{place}: id {name[:60]!r} is no file name: use up to {LONGEST} letters of A-Z, a-z, 0-9, '.', '_' "
                "and '-', not beginning with '.'"
            )
        known = owner.setdefault(name.lower(), place)  # some file systems do not tell capitals from small letters
        if known != place:
            problems.append(f"{place}: id {name!r} is that of {known} too")
    looked: dict[Path, str] = {}
    for place, row in zip(places, rows, strict=True):
        for column, path in row.files.items():
            if column not in FILES:
                problems.append(f"{place}: {column} is no column of files: those are {', '.join(FILES)}")
            if path not in looked:
                looked[path] = _fault(path)
            if looked[path]:
                problems.append(f"{place}: {column} {path} {looked[path]}")
    if problems:
        raise ManifestError(f"{told} cannot be registered as it is", problems)
    return rows


def _fault(path: Path) -> str:
    """Why a file cannot be read, as far as its name tells; "" where it can."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8: rename it"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as problem:
        return f"cannot be read: {getattr(problem, 'strerror', None) or problem}"
    return "" if os.access(path, os.R_OK) else "cannot be read: Permission denied"


def _named(rows: list[Row]) -> list[Row]:
    """Rows without an id get one of their images' names; what tells two of one name apart does not depend on order."""
    made = [row.pair_id or f"{_stem(row.files['moving'])}-to-{_stem(row.files['fixed'])}" for row in rows]
    counts: dict[str, int] = {}
    for name in made:
        counts[name.lower()] = counts.get(name.lower(), 0) + 1
    named: list[Row] = []
    for row, name in zip(rows, made, strict=True):
        if not row.pair_id and (counts[name.lower()] > 1 or len(name) > LONGEST):
            content = "\n".join(f"{key}\t{value}" for key, value in sorted(row.record().items()))
            name = f"{name[: LONGEST - 9]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        named.append(dataclasses.replace(row, pair_id=name))
    return named


def _stem(path: Path) -> str:
    """The name of an image without its suffix, in the letters of an id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", _IMAGES.sub("", path.name)).lstrip(".") or "image"
