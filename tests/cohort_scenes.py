"""What the tests of data sets share: small pairs on disk, studies, and what came out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fnreg import Grid, Image, cohort, io
from fnreg.cohort.ledger import Record
from fnreg.cohort.manifest import Row
from fnreg.settings import Settings

SIZE = (16, 16)
QUICK = Settings(transform="rigid", start="header", levels=2, steps="6")


def picture(seed: int, size: tuple[int, ...] = SIZE) -> Image:
    """A blob that lies elsewhere for each seed, on a grid of its own."""
    numbers = torch.Generator().manual_seed(seed)
    shift, spacing, noise = (torch.rand(n, generator=numbers, dtype=torch.float64) for n in (2, 2, size[0] * size[1]))
    grid = Grid(size, spacing=(0.8 + 0.4 * spacing).tolist(), center=(10 * shift).tolist())
    away = (grid.points() - grid.center - 3 * (shift - 0.5)) / torch.tensor([4.0, 2.5])
    data = (-away.square().sum(1)).exp() + 0.05 * noise
    return Image(data.to(torch.float32).reshape(1, *grid.shape), grid)


def pairs(home: Path, count: int) -> list[Row]:
    """Pairs of files a, b, c and so on."""
    rows: list[Row] = []
    for number in range(count):
        files = {"fixed": home / f"f{number}.nii", "moving": home / f"m{number}.nii"}
        for side, path in enumerate(files.values()):
            if not path.is_file():
                io.write_image(path, picture(2 * number + side))
        rows.append(Row(f"p{number:03d}", files))
    return rows


def register(rows: list[Row], output: Path, settings: Settings = QUICK, **options: Any) -> dict[str, Record]:
    """The records of a run by id."""
    found = list(cohort.run(rows, settings, output=output, **options))
    assert len({record["pair_id"] for record in found}) == len(found)
    return {record["pair_id"]: record for record in found}


def results(study: Path) -> dict[str, bytes]:
    """The bytes of every parameter file by id."""
    return {path.parent.name: path.read_bytes() for path in sorted(study.glob("pairs/*/transform.safetensors"))}


def table(study: Path) -> dict[str, dict[str, str]]:
    """pairs.tsv by id, without what depends on time and on the course of the work."""
    lines = (study / "pairs.tsv").read_text().splitlines()
    names = lines[0].split("\t")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]
    for row in rows:
        for name in ("seconds", "peak_mb", "attempts"):
            del row[name]
    return {row["pair_id"]: row for row in rows}


def leftovers(study: Path) -> list[str]:
    """Files that should not be there."""
    return [path.name for path in study.rglob("*") if path.name.startswith(".")]


def same_tables(a: Path, b: Path, *, close: float = 1e-4) -> None:
    """Both studies have the same rows: texts are equal, numbers so to rounding."""
    first, second = table(a), table(b)
    assert first.keys() == second.keys()
    for name, row in first.items():
        assert row.keys() == second[name].keys()
        for column, value in row.items():
            other = second[name][column]
            try:
                assert abs(float(value) - float(other)) <= close * max(1, abs(float(other))), (name, column)
            except ValueError:
                assert value == other, (name, column)


def whole(study: Path, rows: list[Row]) -> None:
    """Every pair has a record and, where it has a result, its files, and nothing else lies about."""
    known = cohort.read_ledger(study)
    assert set(known) == {row.pair_id for row in rows}
    good = {name for name, record in known.items() if record["status"] in ("ok", "warn")}
    assert set(results(study)) == good
    for name in good:
        io.read_transform(study / "pairs" / name / "transform.safetensors")
    assert leftovers(study) == []
    counts = json.loads((study / "run.json").read_text())["counts"]
    assert sum(counts.values()) == len(rows)
