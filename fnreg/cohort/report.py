"""report.html of a study: one file that any browser opens offline, with what happened to every pair, worst first.

The page is `report.html` beside this file.  Data goes in as JSON in which no `<` is left, and onto the page as text;
of the scripts only the page's own may run, and nothing is fetched.  The pictures of the worst hundred are inside, those
of the others are loaded from the folder of the study when they are looked at.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fnreg import __version__
from fnreg.cohort.columns import COLUMNS, OF_RECORDS, STATUSES, meaning, tally
from fnreg.cohort.ledger import Record, read_ledger
from fnreg.cohort.manifest import ManifestError, read_table
from fnreg.cohort.study import PAIRS, StudyError, command, read_settings
from fnreg.extras import MissingExtraError
from fnreg.io.files import write_bytes
from fnreg.settings import DRAWN

REPORT, TEMPLATE = "report.html", "report.html"
INSIDE = 100  # pairs whose pictures are in the file
COURSE, COURSE_OUTSIDE = 100, 30  # points of the objective's course, of those and of the other pairs
SEVERITY = ("crashed", "failed", "diverged", "invalid_input", "warn", "ok", "pending")
MEASURES = {"dice_mean": 1, "tre_mean": -1, "value_after": -1}  # by which pairs are judged, and the sign of the better
HISTOGRAMS = ("value_after", "dice_mean", "tre_mean", "folds", "seconds")
TABLE = (
    "pair_id", "status", "group", "dice_mean", "tre_mean", "value_before", "value_after", "folds", "jac_min", "jac_max",
    "sdlogj", "inverse_mean", "steps", "seconds", "reason",
)  # fmt: skip
APART = (*OF_RECORDS, "settings_sha")  # shown elsewhere, or the same for all
Pair = tuple[dict[str, str], Record]


def write_report(
    study: str | os.PathLike[str], *, figures: str = "worst", progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write report.html into the folder of a study, and tell what is in it.

    study : the folder; the run may still be going on
    figures : which pictures are drawn where they are not there yet: "worst", of the worst hundred, "all" or "none"
    progress : is told how many pairs' pictures are done, and of how many

    Returns the path of the report, the number of pairs, the statuses with their numbers, how many pairs have pictures
    and for how many they were drawn now, and notes.  Raises StudyError where the folder holds no study, WriteError
    where the report cannot be written.
    """
    if figures not in DRAWN:
        raise ValueError(f"figures is {figures!r}: choose from {', '.join(DRAWN)}")
    folder, begun = Path(study), time.perf_counter()
    pairs, measure = worst_first(read_pairs(folder))
    drawn, why, notes = _draw(folder, pairs, figures, progress)
    content = list(_page(folder, pairs, measure, why))
    write_bytes(folder / REPORT, *content)
    return {
        "report": str(folder / REPORT),
        "pairs": len(pairs),
        "statuses": tally((str(record["status"]) for _, record in pairs), SEVERITY),
        "drawn": drawn,
        "not_drawn": dict(list(why.items())[:20]),
        "notes": notes,
        "bytes": sum(map(len, content)),
        "seconds": round(time.perf_counter() - begun, 3),
    }


def read_pairs(folder: Path) -> list[Pair]:
    """The rows of a study's table with the last record of each, in the order of the table.

    Raises StudyError where the folder holds no study.  The images need not be there any more.
    """
    read_settings(folder)
    try:
        rows = [{k: v for k, v in row.items() if v} for row in read_table(folder / "manifest.tsv")]
    except ManifestError as problem:
        raise StudyError(f"{folder} has no manifest.tsv that can be read: {problem}") from problem
    known = read_ledger(folder)
    return [(row, {"status": "pending"} | known.get(row["pair_id"], {})) for row in rows]


def worst_first(pairs: Sequence[Pair]) -> tuple[list[Pair], str]:
    """Failed pairs, then warnings, then the others, each by the first of `MEASURES` that any pair has; its name."""
    measure = next((name for name in MEASURES if any(_number(record, name) is not None for _, record in pairs)), "")

    def rank(pair: Pair) -> tuple[int, bool, float]:
        _, record = pair
        place = SEVERITY.index(record["status"]) if record["status"] in SEVERITY else 0
        value = _number(record, measure)
        return place, value is None, 0.0 if value is None else MEASURES[measure] * value

    return sorted(pairs, key=rank), measure


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _draw(
    folder: Path, pairs: Sequence[Pair], figures: str, progress: Callable[[int, int], None] | None
) -> tuple[int, dict[str, str], list[str]]:
    """How many were drawn, why others were not, notes."""
    asked = [pair for pair in pairs if pair[1]["status"] != "pending"]
    asked = {"worst": asked[:INSIDE], "all": asked, "none": []}[figures]
    if not asked:
        return 0, {}, []
    from fnreg.cohort.album import draw_pairs

    try:
        found = draw_pairs(folder, asked, progress=progress)
    except MissingExtraError as problem:
        return 0, {}, [f"no pictures were drawn: {problem}"]
    return sum(one.new for one in found), {one.pair_id: one.reason for one in found if not one.there}, []


def _inside(folder: Path, pair_id: str, names: Sequence[str]) -> dict[str, str]:
    """Pictures as text; none where one of them has gone meanwhile."""
    from fnreg.cohort.album import FIGURES

    try:
        home = folder / PAIRS / pair_id / FIGURES
        return {name: base64.b64encode((home / name).read_bytes()).decode("ascii") for name in names}
    except OSError:
        return {}


# -- the page ----------------------------------------------------------------------------------------------------------


def _page(folder: Path, pairs: Sequence[Pair], measure: str, why: Mapping[str, str]) -> Iterator[bytes]:
    """The template with what belongs into it, in one pass: no text of the data is taken for a place of it."""
    from fnreg.cohort.album import figures_of

    there = {row["pair_id"]: figures_of(folder, row, record) for row, record in pairs}
    inside = (row["pair_id"] for row, record in pairs[:INSIDE] if record["status"] != "pending")
    pictures = {name: _inside(folder, name, there[name]) for name in inside if there[name]}
    name = os.path.basename(os.path.abspath(folder))
    template = resources.files("fnreg.cohort").joinpath(TEMPLATE).read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    parts = {
        "title": html.escape(name),
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        "data": as_script(_data(folder, name, pairs, measure, there, why)),
        "pictures": as_script(pictures),
    }
    for number, part in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
        yield (parts[part] if number % 2 else part).encode("utf-8")


def as_script(value: Any) -> str:
    """JSON that can stand in a script element: what would end it, or begin a comment, is written as escapes.

    >>> as_script({"id": "</script>"})
    '{"id":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(
    folder: Path,
    name: str,
    pairs: Sequence[Pair],
    measure: str,
    there: Mapping[str, Sequence[str]],
    why: Mapping[str, str],
) -> dict[str, Any]:
    settings = read_settings(folder)
    found = [{**row, **{key: v for key, v in record.items() if key not in APART}} for row, record in pairs]
    names = [column for column in dict.fromkeys([*COLUMNS, *(key for row in found for key in row)])]
    names = [column for column in names if any(_told(row.get(column)) is not None for row in found)]
    given = {column for row, _ in pairs for column in row}
    rest = [
        {
            "history": _course(record.get("history"), COURSE if rank < INSIDE else COURSE_OUTSIDE),
            "warnings": [str(note) for note in record.get("warnings") or ()],
            "command": command(row, settings),
            "pictures": list(there[row["pair_id"]]),
            "why": why.get(row["pair_id"], ""),
        }
        for rank, (row, record) in enumerate(pairs)
    ]
    return {
        "name": name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "settings": {key: str(value) for key, value in settings.items()},
        "statuses": STATUSES,
        "severity": SEVERITY,
        "measure": measure,
        "columns": [{"name": column, "meaning": meaning(column, given)} for column in names],
        "table": [column for column in TABLE if column in names],
        "histograms": [column for column in HISTOGRAMS if column in names],
        "rows": [[_told(row.get(column)) for column in names] for row in found],
        "rest": rest,
    }


def _told(value: Any) -> str | float | None:
    """A number with six digits, or text; None for nothing."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _course(history: Any, most: int) -> list[list[Any]]:
    """Steps and values of each level in turn, [level, [step], [value]], of all levels together so many at most."""
    levels: list[list[Any]] = []
    points = [point for point in history or () if isinstance(point, (list, tuple)) and len(point) == 3]
    stride = max(1, math.ceil(len(points) / most))
    for number, (level, step, value) in enumerate(points):
        if not levels or levels[-1][0] != level:
            levels.append([level, [], []])
        last = number + 1 == len(points) or points[number + 1][0] != level
        if last or not levels[-1][1] or number % stride == 0:
            levels[-1][1].append(step)
            levels[-1][2].append(_told(value) if isinstance(value, (int, float)) else None)
    return levels
