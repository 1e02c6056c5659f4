"""Deformable registration of two brains in 3-D by mean squares: seconds, memory and label overlap.

NIREP h01 (fixed) and h02, 128 x 150 x 128 voxels of 2 mm: an affine map by correlation first, then a diffeomorphism and
an affine map together.  Mean squares are no measure for an accuracy race; what is shown is that 3-D runs, and its cost.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.brain_affine import dice
from benchmarks.images import brain
from benchmarks.measure import Options, Table, apart, peak
from fnreg import (
    Affine,
    Diffeomorphism,
    GaussNewton,
    Mapping,
    Registration,
    Sequential,
    Stage,
    adam,
    mse,
    ncc,
    register,
)
from fnreg.fields import statistics


def registered(steps: tuple[int, int, int]) -> tuple[Registration, float, float]:
    """The result, and the seconds of its two parts."""
    fixed, moving = (brain(name).normalize() for name in ("h01", "h02"))
    begin = time.perf_counter()
    affine = register(fixed, moving, Affine(), objective=ncc, solver=GaussNewton(), levels=4, steps=(20, 10, 5, 0))
    middle = time.perf_counter()
    both = Stage(Sequential((Diffeomorphism(), Affine())), objective=mse, optimizer=adam(0.5), levels=3, steps=steps)
    result = register(fixed, moving, [both], then=affine.mapping, stop=None)
    return result, middle - begin, time.perf_counter() - middle


def memory(steps: tuple[int, int, int]) -> float | None:
    """MiB at most beyond what is in use before."""
    return peak(lambda: registered(steps))


def run(options: Options) -> list[Table]:
    """One table."""
    labels = {name: brain(f"{name}_seg") for name in ("h01", "h02")}
    columns = ("steps", "affine s", "deformable s", "Dice", "folds", "sd of log det J", "MiB at most")
    table = Table("h02 onto h01, mean squares", columns)
    identity: Mapping | None = None
    for steps in ((10, 5, 0),) if options.quick else ((100, 50, 0), (100, 50, 10)):
        result, first, second = registered(steps)
        grid = result.fixed_grid
        if identity is None:
            identity = Mapping(Affine().init(grid), grid, Affine())
            table.rows.append(("none", None, None, dice(labels["h02"], labels["h01"], identity), None, None, None))
        found: Any = statistics(result.mapping.displacement(grid).to(torch.float32), grid)
        overlap = dice(labels["h02"], labels["h01"], result.mapping)
        used = apart(memory, steps)
        row = (first, second, overlap, float(found.folds), float(found.sd_log_determinant), used)
        table.rows.append((" + ".join(map(str, steps)), *row))
    return [table]
