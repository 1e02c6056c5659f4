"""Points as text: CSV, and the .fcsv and .mrk.json of Slicer.  See `fnreg.io.points`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

SPACES = {"LPS": "LPS", "RAS": "RAS", "VOXEL": "voxel", "0": "RAS", "1": "LPS"}  # Slicer once wrote numbers
_AXES = ("x", "y", "z")
_NAMES = ("name", "label", "id")
_FCSV = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"


class Refused(Exception):
    """What is wrong with the text of a file."""


Read = tuple[str | None, tuple[str, ...], list[list[float]]]  # space, names, points


def _space(told: Any) -> str:
    found = SPACES.get(str(told).strip().upper())
    if found is None:
        raise Refused(f"has points in the unknown space {told!r}: expected LPS or RAS")
    return found


def _split(text: str, word: str) -> tuple[str | None, list[tuple[int, str]]]:
    """What the comment of this word says, and the other lines with their numbers."""
    stated, lines = None, list[tuple[int, str]]()
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.startswith("#"):
            name, equals, value = line[1:].partition("=")
            stated = value.strip() if equals and name.strip().lower() == word.lower() else stated
        elif line.strip():
            lines.append((number, line))
    return stated, lines


def _rows(lines: list[tuple[int, str]], header: list[str], names: tuple[str, ...]) -> Read:
    """Points and names from rows of cells, by the columns' names."""
    columns = [cell.strip().lower() for cell in header]
    if len({name for name in columns if name}) != len([name for name in columns if name]):
        raise Refused(f"has two columns of one name: {', '.join(header)}")
    axes = [columns.index(axis) for axis in _AXES if axis in columns]
    if [columns[k] for k in axes] not in (["x", "y"], ["x", "y", "z"]):
        raise Refused(f"has the columns {', '.join(header)}: expected x, y and, for three axes, z")
    named = next((columns.index(name) for name in names if name in columns), None)
    points, found = list[list[float]](), list[str]()
    for number, line in lines:
        (cells,) = csv.reader([line], strict=True)
        try:
            points.append([float(cells[k].replace("_", "?")) for k in axes])  # Python takes 1_0 for 10
            found.append("" if named is None else cells[named])
        except (IndexError, ValueError):
            raise Refused(f"has no point in line {number}: {','.join(cells)[:80]!r}") from None
    return None, tuple(found), points


def _read_csv(text: str) -> Read:
    stated, lines = _split(text, "space")
    if not lines:
        raise Refused("holds no points, not even the names of columns")
    header = next(csv.reader([lines[0][1]], strict=True))
    _, names, points = _rows(lines[1:], header, _NAMES)
    return None if stated is None else _space(stated), names, points


def _read_fcsv(text: str) -> Read:
    stated, lines = _split(text, "CoordinateSystem")
    if stated is None:
        raise Refused("does not say its CoordinateSystem: it is damaged, or no file of Slicer's markups")
    columns, _ = _split(text, "columns")
    _, names, points = _rows(lines, (columns or _FCSV).split(","), ("label", "id"))
    return _space(stated), names, points


def _read_json(text: str) -> Read:
    found = json.loads(text)
    markups = found.get("markups") if isinstance(found, dict) else None
    if not isinstance(markups, list) or len(markups) != 1 or not isinstance(markups[0], dict):
        raise Refused("is not one list of Slicer's markups: expected one entry of points under markups")
    one = markups[0]
    unit = one.get("coordinateUnits", "mm")
    if unit != "mm" and unit != ["mm", "UCUM", "millimeter"]:
        raise Refused(f"has points in {unit}: expected millimetres")
    controls = one.get("controlPoints")
    if "coordinateSystem" not in one or not isinstance(controls, list):
        raise Refused("does not say its coordinateSystem, or has no controlPoints: it is damaged")
    points, names = list[list[float]](), list[str]()
    for number, control in enumerate(controls, 1):
        position = control.get("position") if isinstance(control, dict) else None
        if (
            not isinstance(position, list)
            or len(position) != 3
            or control.get("positionStatus", "defined") != "defined"
        ):
            raise Refused(f"has a point without a place, number {number}")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in position):
            raise Refused(f"has a point that is no three numbers, number {number}: {position}")
        points.append([float(value) for value in position])
        names.append(str(control.get("label", "")))
    return _space(one["coordinateSystem"]), tuple(names), points


def _csv(rows: list[list[float]], names: tuple[str, ...], space: str) -> str:
    stream = io.StringIO()
    stream.write(f"# space = {space}\n")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_AXES[: len(rows[0]) if rows else 3], "name"])
    # Names come last: a line that began with one could look like a comment.
    writer.writerows([[*map(repr, row), name] for name, row in zip(names, rows, strict=True)])
    return stream.getvalue()


def _fcsv(rows: list[list[float]], names: tuple[str, ...], space: str) -> str:
    stream = io.StringIO()
    stream.write(f"# Markups fiducial file version = 4.11\n# CoordinateSystem = {space}\n# columns = {_FCSV}\n")
    writer = csv.writer(stream, lineterminator="\n")
    for number, (row, name) in enumerate(zip(rows, names, strict=True), 1):
        writer.writerow([number, *map(repr, row), 0, 0, 0, 1, 1, 1, 0, name, "", ""])
    return stream.getvalue()


def _json(rows: list[list[float]], names: tuple[str, ...], space: str) -> str:
    points = [
        {"id": str(number), "label": name, "position": row, "positionStatus": "defined"}
        for number, (row, name) in enumerate(zip(rows, names, strict=True), 1)
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    markups = {"type": "Fiducial", "coordinateSystem": space, "coordinateUnits": "mm", "controlPoints": points}
    return json.dumps({"@schema": f"{schema}markups-schema-v1.0.3.json#", "markups": [markups]}, indent=2) + "\n"


READERS: dict[str, Callable[[str], Read]] = {".csv": _read_csv, ".fcsv": _read_fcsv, ".mrk.json": _read_json}
WRITERS: dict[str, Callable[[list[list[float]], tuple[str, ...], str], str]] = {
    ".csv": _csv,
    ".fcsv": _fcsv,
    ".mrk.json": _json,
}
