"""Data sets of small pairs through `cohort.run`, from files to files, beside loops over `register` and deepali's own.

Pairs of different images of the same MNIST digit, 28 x 28, as NIfTI; default settings, parameters saved. Each row of
the table is a process of its own, so that its memory is its own; the loop registers a part of the pairs one by one,
reading and writing included.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import deepali
from benchmarks.images import same_digit_pairs
from benchmarks.measure import Absent, Options, Table, apart, peer
from fnreg import Image, Transform, cohort, io, register
from fnreg.settings import Settings

SIDES = ("fixed", "moving")
KINDS = {"rigid": "rigid", "free-form": "ffd:stride=4"}
DISTINCT = 1000  # pairs of images; more are these under other names, for what pairs share is read once


def study(home: Path, kind: str, count: int) -> tuple[float, float, float]:
    """Seconds, the share of them in which pairs were registered, and the process' highest memory in MiB."""
    begin = time.perf_counter()
    for _ in cohort.run(rows_of(home, count), settings_of(kind), output=home / f"{kind}-{count}"):
        pass
    taken = time.perf_counter() - begin
    run = json.loads((home / f"{kind}-{count}" / "run.json").read_text(encoding="utf-8"))
    return taken, run["busy"] / run["seconds"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loop(home: Path, kind: str, count: int) -> float:
    """Seconds of a loop."""
    transform: Transform = settings_of(kind).transforms()[0]
    begin = time.perf_counter()
    for row in rows_of(home, count):
        fixed, moving = (io.read_image(row.files[side]) for side in ("fixed", "moving"))
        result = register(fixed, moving, transform)
        io.write_transform(home / "one.safetensors", result.mapping)
    return time.perf_counter() - begin


def peer_loop(home: Path, kind: str, count: int) -> float:
    """Seconds of deepali's loop, files read and written too."""
    spatial = peer("deepali.spatial")

    def free_form(grid: Any) -> Any:
        return spatial.FreeFormDeformation(grid, stride=4)

    make = {"rigid": spatial.RigidTransform, "free-form": free_form}[kind]
    begin = time.perf_counter()
    for row in rows_of(home, count):
        fixed, moving = (io.read_image(row.files[side]).data for side in SIDES)
        found = deepali.registered(make, fixed, moving, (100, 100, 100))
        torch.save(found.transform.state_dict(), home / "one.pt")
    return time.perf_counter() - begin


def settings_of(kind: str) -> Settings:
    """Those of `register`."""
    return Settings(transform=KINDS[kind], start="header")


def rows_of(home: Path, count: int) -> list[cohort.Row]:
    """Pairs with ids and files of their own."""
    return [cohort.Row(f"pair{n:06d}", {side: home / f"{side}{n}.nii" for side in SIDES}) for n in range(count)]


def write(home: Path, count: int) -> None:
    """Their files."""
    for side, images in zip(SIDES, same_digit_pairs(min(count, DISTINCT)), strict=True):
        for number, values in enumerate(images):
            io.write_image(home / f"{side}{number}.nii", Image(torch.from_numpy(values)[None]))
        for number in range(len(images), count):
            os.link(home / f"{side}{number % len(images)}.nii", home / f"{side}{number}.nii")


def run(options: Options) -> list[Table]:
    """One table."""
    counts, few = ((8, 16), 2) if options.quick else ((200, 1000, 2000, 10000), 20)
    loops = "times a loop over `register`", "times deepali's loop"
    found = Table(
        "Data sets of pairs of 28 x 28, from files to files",
        ("transform", "pairs", "seconds", "pairs a second", "share registering", "peak MiB", *loops),
        notes=(f"The loops are over {few} pairs; {torch.get_num_threads()} threads.",),
    )
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write(home, max(counts))
        for kind in KINDS:
            alone = apart(loop, home, kind, few) / few
            try:
                other = apart(peer_loop, home, kind, few) / few
            except Absent as missing:
                other, found.notes = None, (*found.notes, f"without deepali: {missing}")
            for count in counts:
                row: Any = apart(study, home, kind, count)
                rate = count / row[0]
                found.rows.append((kind, count, row[0], rate, row[1], row[2], rate * alone, other and rate * other))
    return [found]
