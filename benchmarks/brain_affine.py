"""Affine registration of two brains in 3-D by correlation, beside greedy's in the same run.

NIREP h01 (fixed) and h02, 128 x 150 x 128 voxels of 2 mm.  Dice is the mean over all labels of the fixed brain, after
the moving labels were warped by nearest neighbour; NCC is the correlation of the whole images where they overlap.
Neither says more than how far an affine map goes: deformable registration is what these labels are for.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.images import brain, brain_path
from benchmarks.measure import Absent, Options, Table, peer, race
from fnreg import Affine, GaussNewton, Image, Mapping, evaluate, linear_mapping, ncc, register, warp

THREADS = 2


def dice(labels: Image, fixed: Image, mapping: Mapping) -> float:
    """Mean over the labels of the fixed image of 2 |A and B| / (|A| + |B|)."""
    return overlap(warp(labels, mapping, fixed.grid, interpolation="nearest"), fixed)


def overlap(labels: Image, fixed: Image) -> float:
    """`dice` of labels that are on the fixed grid."""
    warped = labels.data
    names = [name for name in fixed.data.unique().tolist() if name > 0]
    scores = []
    for name in names:
        a, b = warped == name, fixed.data == name
        scores.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(scores))


def greedy(iterations: str) -> torch.Tensor:
    """The LPS world matrix that greedy finds, read and written as its command line does."""
    tool = peer("picsl_greedy").Greedy3D()
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "affine.mat"
        images = f"-i {brain_path('h01')} {brain_path('h02')}"
        options = f"-d 3 -a -V 0 -m NCC 2x2x2 -n {iterations} -threads {THREADS}"
        tool.execute(f"{options} {images} -o {written}", out=io.StringIO(), err=io.StringIO())
        mirror = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS
        return torch.from_numpy(mirror @ np.loadtxt(written) @ mirror)


def run(options: Options) -> list[Table]:
    """One table: no registration, fnreg's settings, greedy."""
    names = ("h01", "h02")
    reading: list[float] = []
    for _ in range(2):
        begin = time.perf_counter()
        fixed, moving = (brain(name) for name in names)
        reading.append(time.perf_counter() - begin)
    fixed_labels, moving_labels = (brain(f"{name}_seg") for name in names)
    affine = Affine()
    settings: dict[str, dict[str, Any]] = {
        "fnreg, Gauss-Newton, 20 + 10 + 5 steps, to half resolution": {"levels": 4, "steps": (20, 10, 5, 0)},
        "fnreg, Gauss-Newton, 20 + 10 + 5 + 2 steps": {"levels": 4, "steps": (20, 10, 5, 2)},
        "fnreg, Adam, 100 + 50 + 10 steps": {"levels": 3, "steps": (100, 50, 10), "solver": None, "stop": None},
    }
    if options.quick:
        settings = dict(list(settings.items())[:1])
    found: dict[str, Mapping] = {"none": Mapping(affine.init(fixed.grid), fixed.grid, affine)}
    runners: dict[str, Any] = {}
    for name, given in settings.items():

        def ours(name: str = name, given: dict[str, Any] = given) -> None:
            result = register(fixed, moving, affine, objective=ncc, **{"solver": GaussNewton(), **given})
            found[name] = result.mapping

        runners[name] = ours
    iterations = "100x50x0" if options.quick else "100x50x10"
    peers = f"greedy, -m NCC 2x2x2 -n {iterations}"

    def theirs() -> None:
        found[peers] = linear_mapping(greedy(iterations), fixed.grid)

    notes = ["greedy reads its files itself"]
    try:
        peer("picsl_greedy")
        runners[peers] = theirs
    except Absent as reason:
        notes = [f"without greedy: {reason}"]
    register(fixed, moving, affine, objective=ncc, solver=GaussNewton(), levels=4, steps=(2, 0, 0, 0))  # warm-up
    repeats = 1 if options.quick else 3
    times = race(runners, repeats=repeats, warmups=0)
    notes = [f"{torch.get_num_threads()} threads; medians of {repeats} runs in turn; {notes[0]}"]
    notes[0] += f", fnreg got its images read ({min(reading):.1f} s)"
    table = Table(
        "NIREP h01 <- h02, affine", ("method", "seconds", "of greedy's time", "Dice", "NCC"), [], tuple(notes)
    )
    for name, mapping in found.items():
        taken = times.get(name)
        ratio = taken / times[peers] if taken is not None and peers in times else None
        correlation = 1 - float(evaluate(fixed, moving, mapping, objective=ncc)[0])
        table.rows.append((name, taken, ratio, dice(moving_labels, fixed_labels, mapping), correlation))
    return [table]
