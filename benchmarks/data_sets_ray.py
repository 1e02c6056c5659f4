"""Data sets under blows and on a cluster: the local engine against Ray on this machine, and runs that are killed.

All 132 pairs of twelve hippocampi, padded to one size, by the local engine with all cores and by two workers of Ray
that share them, undisturbed and with a worker killed in the middle.  And pairs of MNIST digits by the local engine,
whose process is killed at ten random moments, beside an undisturbed run.
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.data_sets import rows_of, write
from benchmarks.hippocampus import subjects
from benchmarks.measure import Options, Table, apart, peer
from fnreg import cohort, io
from fnreg.cohort.ledger import read_records
from fnreg.cohort.manifest import write_manifest
from fnreg.settings import Settings

WORKERS, KILLS = 2, 10
APART = ("seconds", "peak_mb", "attempts", "device")  # columns that tell of the work
VOLUMES = Settings(
    transform="affine+ffd:stride=4", similarity="ncc", penalty="bending=1e-3", start="center", steps="20x10x5"
)
NAMES = ("fixed", "moving", "fixed_labels", "moving_labels")
DIGITS = ("--start", "header", "--figures", "none")


def study(home: Path, engine: str, kill: bool) -> float:
    """Seconds of all pairs of the volumes in a folder; with `kill` a worker is killed at a third of them."""
    files = sorted(home.glob("volume*.nii"))
    labels = {file: file.with_name(file.name.replace("volume", "labels")) for file in files}
    rows = [
        cohort.Row(
            f"{a.stem}-{b.stem}", {"fixed": a, "moving": b, "fixed_labels": labels[a], "moving_labels": labels[b]}
        )
        for a, b in itertools.permutations(files, 2)
    ]
    folder = home / f"{engine}{'-killed' if kill else ''}"
    if kill:
        threading.Thread(target=_kill_one, args=(folder, len(rows) // 3), daemon=True).start()
    begin = time.perf_counter()
    options = {"workers": WORKERS} if engine == "ray" else {}
    for _ in cohort.run(rows, VOLUMES, output=folder, engine=engine, **options):
        pass
    return time.perf_counter() - begin


def _kill_one(folder: Path, done: int) -> None:
    while not folder.is_dir() or len(cohort.read_ledger(folder)) < done:
        time.sleep(0.05)
    os.kill(next(pid for pid in _descendants(os.getpid()) if "ray::Worker" in _name(pid)), signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference of a number in the tables, relative where it is above 1, and of a mapped point in mm."""
    most, away = 0.0, 0.0
    tables = [list(csv.DictReader((path / "pairs.tsv").open(), delimiter="\t")) for path in (one, other)]
    for a, b in zip(*tables, strict=True):
        for name in a.keys() - set(APART):
            try:
                x, y = float(a[name]), float(b[name])
            except ValueError:
                assert a[name] == b[name], (a["pair_id"], name, a[name], b[name])
                continue
            most = max(most, abs(x - y) / max(1.0, abs(y)))
        maps = [io.read_transform(path / a["transform"]) for path in (one, other)]
        points = io.read_image(a["fixed"]).grid.points()[::7]
        away = max(away, float((maps[0].map_points(points) - maps[1].map_points(points)).norm(dim=-1).max()))
    return most, away


def outcomes(folder: Path) -> tuple[int, int]:
    """Pairs with an outcome, and outcomes of pairs that had one already."""
    each = Counter(one["pair_id"] for one in read_records(folder) if one["status"] not in ("begun", "released"))
    return len(each), sum(each.values()) - len(each)


def engines(options: Options) -> Table:
    """The table of engines."""
    peer("ray")
    columns = ("engine", "seconds", "pairs", "twice", "largest difference of the table", "of a point, mm")
    found = Table("Pairs of hippocampi, affine and free-form", columns)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for number, subject in enumerate(subjects(3 if options.quick else None)):
            assert subject.labels is not None
            io.write_image(home / f"volume{number:02d}.nii", subject.image)
            labels = io.Labels(subject.labels.to(torch.uint8), subject.image.grid)
            io.write_labels(home / f"labels{number:02d}.nii", labels)
        for told, engine, kill in (
            ("local", "local", False),
            (f"ray, {WORKERS} workers", "ray", False),
            ("ray, one of them killed", "ray", True),
        ):
            seconds = apart(study, home, engine, kill, environment={"RAY_ADDRESS": "local"})
            folder = home / f"{engine}{'-killed' if kill else ''}"
            away = (None, None) if engine == "local" else differences(folder, home / "local")
            found.rows.append((told, seconds, *outcomes(folder), *away))
    return found


def kills(options: Options) -> Table:
    """The table of runs that were killed."""
    count, chance = (40 if options.quick else 1500), random.Random(7)
    columns = ("run", "seconds", "pairs", "twice", "largest difference of the table", "of a point, mm")
    found = Table("Pairs of digits, the process killed at random moments", columns)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write(home, count)
        (home / "pairs.tsv").write_bytes(write_manifest(rows_of(home, count)))
        command = [sys.executable, "-m", "fnreg", "run", str(home / "pairs.tsv"), *DIGITS, "-o"]
        begin = time.perf_counter()
        subprocess.run([*command, str(home / "calm")], check=True, stdout=subprocess.DEVNULL)
        calm = time.perf_counter() - begin
        found.rows.append(("undisturbed", calm, *outcomes(home / "calm"), None, None))
        begin, known = time.perf_counter(), dict[str, float]()
        for _ in range(KILLS):
            child = subprocess.Popen([*command, str(home / "killed")], stdout=subprocess.DEVNULL)
            time.sleep(chance.uniform(0.1, 0.5) * calm)
            child.kill()
            child.wait()
            ledger = {one: record["time"] for one, record in cohort.read_ledger(home / "killed").items()}
            assert known.items() <= ledger.items()
            known = ledger
        kept = len(known)
        subprocess.run([*command, str(home / "killed")], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        away = differences(home / "killed", home / "calm")
        found.rows.append((f"killed {KILLS} times", seconds, *outcomes(home / "killed"), *away))
        found.notes = (f"{kept} pairs were done when the last process was killed.",)
    return found


def run(options: Options) -> list[Table]:
    """Two tables, one without Ray."""
    return [kills(options), engines(options)]
