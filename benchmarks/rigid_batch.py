"""A thousand rigid registrations in one call, against deepali's own loop one pair at a time.

Pairs of different images of the same MNIST digit, 28 x 28, three levels of 100 iterations, mean squared error.
deepali runs as its tutorial does: `RigidTransform`, `ImageTransformer`, Adam with rate 1e-2 anew on each level, no
progress bar.  Both final errors are computed by SciPy from the final world matrices: linear, borders repeated.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks import deepali
from benchmarks.images import SIDE, batch, same_digit_pairs
from benchmarks.measure import Absent, Options, Table, apart, peer, seconds
from fnreg import Image, Rigid, Stop, register

STEPS, LEVELS = 100, 3


def deepali_matrix(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """The world matrix (3, 3), here from voxel to voxel, that deepali's loop finds for one pair."""
    core, spatial = peer("deepali.core"), peer("deepali.spatial")
    images = (torch.from_numpy(x)[None] for x in (fixed, moving))
    transform = deepali.registered(spatial.RigidTransform, *images, (STEPS,) * LEVELS).transform
    cube, world = core.Axes.CUBE_CORNERS, core.Axes.WORLD
    to_world, found = np.eye(3), np.eye(3)
    to_world[:2] = transform.grid().transform(axes=cube, to_axes=world).numpy()
    found[:2] = transform.tensor()[0].detach().numpy()  # from cube to cube
    return to_world @ found @ np.linalg.inv(to_world)


def final_error(fixed: np.ndarray, moving: np.ndarray, matrix: np.ndarray) -> float:
    """Mean squared error of a pair under a matrix from fixed to moving voxels."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    where = matrix[:2] @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    warped = peer("scipy.ndimage").map_coordinates(moving, where[::-1], order=1, mode="nearest")
    return float(((warped - fixed.ravel()) ** 2).mean())


def first_call() -> float:
    """Seconds of the first, small registration of a process, its kernels compiled where the cache lacks them."""
    image = Image(torch.rand(1, SIDE, SIDE))
    return seconds(lambda: register(image, image, Rigid(), steps=1))


def run(options: Options) -> list[Table]:
    """Two tables: all pairs against deepali, and the first call of a process."""
    count, few, repeats = (64, 1, 1) if options.quick else (1024, 5, 5)
    fixed, moving = same_digit_pairs(count)
    images = batch(fixed), batch(moving)
    settings: dict[str, dict[str, Any]] = {
        "all steps": {"stop": None},
        "all steps, padding border": {"stop": None, "padding": "border"},
        "default stop": {"stop": Stop()},
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    matrices: dict[str, np.ndarray] = {}
    notes = [f"{count} pairs, medians of {repeats} runs after a warm-up"]
    alone: list[float] = []
    found: list[np.ndarray] = []
    register(*images, Rigid(), levels=LEVELS, steps=2)  # warm-up
    try:
        deepali_matrix(fixed[-1], moving[-1])  # warm-up
        notes.append(f"deepali alone: {few} pairs, one after each of these runs, times {count}")
    except Absent as reason:
        notes.append(f"without deepali: {reason}")
        few = 0
    for repeat in range(repeats):
        for name, given in settings.items():
            begin = time.perf_counter()
            result = register(*images, Rigid(), levels=LEVELS, steps=STEPS, **given)
            times[name].append(time.perf_counter() - begin)
            matrices[name] = result.mapping.matrix().numpy()
        if repeat < few:
            begin = time.perf_counter()
            found.append(deepali_matrix(fixed[repeat], moving[repeat]))
            alone.append(time.perf_counter() - begin)
    slow = statistics.median(alone) if alone else None

    def mean_error(found: Any, part: slice) -> float:
        return float(np.mean([final_error(*p) for p in zip(fixed[part], moving[part], found[part], strict=True)]))

    every, first = slice(0, count), slice(0, few or 5)
    label = f"MSE of first {first.stop}"
    columns = ("method", "seconds in all", "pairs per second", "times deepali", label, "MSE of all")
    table = Table("Rigid, 28 x 28, 3 x 100 iterations", columns, notes=("; ".join(notes),))
    start = np.tile(np.eye(3), (count, 1, 1))
    table.rows.append(("none", None, None, None, mean_error(start, first), mean_error(start, every)))
    for name, matrix in matrices.items():
        taken = statistics.median(times[name])
        gain = None if slow is None else slow * count / taken
        row = (f"fnreg, {name}", taken, count / taken, gain, mean_error(matrix, first), mean_error(matrix, every))
        table.rows.append(row)
    if slow is not None:
        row = ("deepali, pair by pair", slow * count, 1 / slow, 1.0, mean_error(np.stack(found), first), None)
        table.rows.append(row)
    with tempfile.TemporaryDirectory() as cache:
        place = {"FNREG_CACHE": cache}
        names = "kernels compiled", "kernels from the cache"
        calls = [(name, apart(first_call, environment=place)) for name in names]
    return [table, Table("The first call of a process, one pair, one step", ("kernels", "seconds"), calls)]
