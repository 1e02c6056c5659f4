"""Two labelled brains: overlap, smoothness and time of `presets.brain`, greedy and ANTs in one run on the same threads.

NIREP h01 with h02 and h03, both ways, 128 x 150 x 128 voxels of 2 mm; labels are warped by nearest neighbour.  Seconds
are of one process that reads the images, registers and writes the warped image and the displacement, with kernels that
were compiled before; that of the command line and what compiling takes are told below.  Folds and the standard
deviation of log det J are those within the labels.  Greedy runs as its authors suggest for such images, with the
settings of `greedy()`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import ants
from benchmarks.brain_affine import THREADS, dice, overlap
from benchmarks.images import brain, brain_path, volume
from benchmarks.measure import Absent, Options, Table, apart, peak, peer
from fnreg import Affine, Image, Mapping, Registration, presets, register
from fnreg.fields import determinant
from fnreg.io.nifti import write_displacement, write_map


class Outcome(NamedTuple):
    """What a method reached on a pair."""

    seconds: float
    dice: float
    folds: float
    roughness: float


def written(result: Registration, moving: Image, folder: Path) -> None:
    """The warped image and the displacement as files."""
    grid = result.fixed_grid
    write_map(folder / "warped.nii.gz", result.warp(moving))
    write_displacement(folder / "displacement.nii.gz", result.mapping, grid=grid, dtype=torch.float32)


def ours(fixed: str, moving: str, preset: dict[str, Any]) -> tuple[float, Registration]:
    """Seconds from file to file, and the result."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        images = brain(fixed), brain(moving)
        result = register(*images, **preset)
        written(result, images[1], Path(folder))
        return time.perf_counter() - begin, result


def greedy(fixed: str, moving: str) -> Outcome:
    """Greedy's affine and deformable registration, from file to file, and its labels and warp judged."""
    tool = peer("picsl_greedy").Greedy3D()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images, options = f"-i {brain_path(fixed)} {brain_path(moving)}", f"-d 3 -V 0 -threads {THREADS}"
        similarity, steps = "-m NCC 2x2x2", "-n 100x50x10"
        reslice = f"-rf {brain_path(fixed)} -r {folder}/warp.nii.gz {folder}/affine.mat"
        commands = (
            f"{options} -a {similarity} {steps} {images} -o {folder}/affine.mat",
            f"{options} {similarity} {steps} {images} -s 1.5vox 0.5vox -it {folder}/affine.mat -o {folder}/warp.nii.gz",
            f"{options} {reslice} -rm {brain_path(moving)} {folder}/warped.nii.gz",
        )
        begin = time.perf_counter()
        for command in commands:
            tool.execute(command, out=io.StringIO(), err=io.StringIO())
        seconds = time.perf_counter() - begin
        labels = f"{options} {reslice} -ri NN -rm {brain_path(f'{moving}_seg')} {folder}/labels.nii.gz"
        tool.execute(labels, out=io.StringIO(), err=io.StringIO())
        nibabel = peer("nibabel")
        found = volume(folder / "labels.nii.gz")
        vectors = np.asarray(nibabel.load(folder / "warp.nii.gz").dataobj, dtype=np.float32)[..., 0, :]
        displacement = torch.from_numpy(np.ascontiguousarray(vectors.transpose(3, 2, 1, 0)))
    target = brain(f"{fixed}_seg")
    return judged(seconds, displacement, overlap(found, target), target)


def syn(fixed: str, moving: str) -> Outcome:
    """ANTs' SyN with its defaults, judged as the others are."""
    found = ants.register(brain_path(fixed), brain_path(moving), brain_path(f"{moving}_seg"), THREADS, **ants.SYN)
    target = brain(f"{fixed}_seg")
    score = overlap(Image(found.labels[None], target.grid), target)
    return Outcome(found.seconds, score, *regularity(found.determinant, target))


def judged(seconds: float, displacement: torch.Tensor, score: float, labels: Image) -> Outcome:
    """How regular a displacement is within the labels; a linear map after it changes neither number."""
    return Outcome(seconds, score, *regularity(determinant(displacement.to(torch.float32), labels.grid), labels))


def regularity(determinants: torch.Tensor, labels: Image) -> tuple[float, float]:
    """Folds in percent and the standard deviation of log det J, within the labels."""
    found = determinants.flatten()[labels.data.flatten() > 0]
    return float(100 * (found <= 0).double().mean()), float(found.clamp(min=1e-6).log().std())


COMMAND = """
from benchmarks.brain_race import ours
from fnreg import presets
print(ours("h01", "h02", presets.brain)[0])
"""


def first_call(**environment: str) -> float:
    """Seconds of a process that has done nothing before."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(found.stdout)


def memory() -> float | None:
    """MiB at most beyond what is in use before."""
    return peak(lambda: ours("h01", "h02", presets.brain))


def run(options: Options) -> list[Table]:
    """A table of pairs, and one of the first call."""
    torch.set_num_threads(THREADS)
    pairs = [("h01", "h02"), ("h01", "h03"), ("h02", "h01"), ("h03", "h01")][: 1 if options.quick else 4]
    columns = ("pair", "method", "seconds", "Dice", "folds %", "sd of log det J")
    table = Table("NIREP, 32 labels", columns)
    ours("h01", "h02", presets.brain | {"transform": presets.brain["transform"][:1]})  # kernels, caches
    for fixed, moving in pairs:
        told, target = f"{moving} onto {fixed}", brain(f"{fixed}_seg")
        labels = brain(f"{moving}_seg")
        start = Mapping(Affine().init(target.grid), target.grid, Affine())
        table.rows.append((told, "none", None, dice(labels, target, start), None, None))
        for name, preset in presets.PRESETS.items():
            seconds, result = ours(fixed, moving, preset)
            score = dice(labels, target, result.mapping)
            found = judged(seconds, result.mapping.displacement(target.grid), score, target)
            table.rows.append((told, f"presets.{name}", *found))
        for name, method in {"greedy": greedy, "ANTs SyN, its defaults": syn}.items():
            try:
                table.rows.append((told, name, *method(fixed, moving)))
            except Absent as missing:
                table.notes = (*table.notes, f"without {name}: {missing}")
    used = apart(memory)
    table.notes = (
        *table.notes,
        "memory of presets.brain at most: " + ("not told" if used is None else f"{used:.0f} MiB"),
    )
    if options.quick:
        return [table]
    first = Table("The first call of a process, h02 onto h01", ("kernels", "seconds"))
    first.rows.append(("from the cache", first_call()))
    with tempfile.TemporaryDirectory() as empty:
        first.rows.append(("compiled", first_call(FNREG_CACHE=empty)))
    first.rows.append(("none, plain torch", first_call(FNREG_NATIVE="0")))
    return [table, first]
