"""A thousand free-form and diffeomorphic registrations in one call, against deepali's loop one pair at a time.

The pairs of `rigid_batch`: 28 x 28, three levels of 100 iterations, mean squared error with bending.  deepali runs as
its tutorial does, with Adam at rate 1e-2 anew on each level and its bending of the coefficients.  Final errors are
computed by SciPy from the displacements, and so is the roughness: the mean square of all second differences, in voxels.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks import deepali
from benchmarks.images import SIDE, batch, same_digit_pairs
from benchmarks.measure import Absent, Options, Table, peer
from fnreg import FFD, SVFFD, Stop, bending, mse, register
from fnreg.fields import determinant
from fnreg.grid import Grid

STEPS, LEVELS, STRIDE = 100, 3, 2
WEIGHTS = {"FFD": (1.0, 1e-3), "SVFFD": (1.0, 1e-3)}  # of bending: fnreg's, deepali's in its own units


def deepali_displacement(name: str, fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """The displacement (2, Y, X) in voxels that deepali's loop finds for one pair."""
    spatial, losses = peer("deepali.spatial"), peer("deepali.losses.functional")
    kind = spatial.FreeFormDeformation if name == "FFD" else spatial.SVFFD

    def bent(transform: Any) -> torch.Tensor:
        return WEIGHTS[name][1] * losses.bspline_bending_loss(transform.data(), stride=STRIDE)

    images = (torch.from_numpy(x)[None] for x in (fixed, moving))
    result = deepali.registered(lambda grid: kind(grid, stride=STRIDE), *images, (STEPS,) * LEVELS, bent)
    voxels = deepali.displacement(result.transform)[None]
    # its finest level is not the input's grid: back to the voxels of the input
    return torch.nn.functional.interpolate(voxels, fixed.shape, mode="bilinear", align_corners=True)[0].numpy()


def final_error(fixed: np.ndarray, moving: np.ndarray, shift: np.ndarray) -> float:
    """Mean squared error of a pair under a displacement in voxels, x first."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    warped = peer("scipy.ndimage").map_coordinates(moving, [y + shift[1], x + shift[0]], order=1, mode="nearest")
    return float(((warped - fixed) ** 2).mean())


def roughness(shift: np.ndarray) -> float:
    """Mean of the squared second differences of a displacement, mixed ones twice."""
    parts = [np.diff(shift, 2, axis=1), np.diff(shift, 2, axis=2), np.diff(np.diff(shift, axis=1), axis=2)]
    return float(sum(w * (p**2).sum(0).mean() for w, p in zip((1, 1, 2), parts, strict=True)))


def run(options: Options) -> list[Table]:
    """One table: FFD and SVFFD, fnreg's batch and deepali's loop."""
    count, few, repeats = (64, 1, 1) if options.quick else (1024, 5, 3)
    fixed, moving = same_digit_pairs(count)
    images = batch(fixed), batch(moving)
    label = f"first {few}"
    columns = (
        "method",
        "seconds in all",
        "times deepali",
        f"MSE of {label}",
        f"roughness of {label}",
        "MSE of all",
        "folds",
    )
    table = Table("28 x 28, 3 x 100 iterations", columns)
    every: list[Any] = [final_error(*pair, np.zeros((2, SIDE, SIDE))) for pair in zip(fixed, moving, strict=True)]
    table.rows.append(("none", None, None, float(np.mean(every[:few])), 0.0, float(np.mean(every)), None))
    for name, transform in (("FFD", FFD(STRIDE)), ("SVFFD", SVFFD(STRIDE, squarings=5))):
        objective = mse + WEIGHTS[name][0] * bending
        given: dict[str, Any] = {"objective": objective, "levels": LEVELS}
        register(*images, transform, steps=2, **given)  # warm-up
        times: dict[str, list[float]] = {}
        shifts: dict[str, np.ndarray] = {}
        alone: list[float] = []
        found: list[np.ndarray] = []
        for repeat in range(max(repeats, few)):
            for kind, stop in (("all steps", None), ("default stop", Stop())) if repeat < repeats else ():
                begin = time.perf_counter()
                result = register(*images, transform, steps=STEPS, stop=stop, **given)
                times.setdefault(kind, []).append(time.perf_counter() - begin)
                shifts[kind] = result.mapping.displacement().numpy()  # the grids' spacing is 1
            if repeat < few:
                try:
                    begin = time.perf_counter()
                    found.append(deepali_displacement(name, fixed[repeat], moving[repeat]))
                    alone.append(time.perf_counter() - begin)
                except Absent as reason:
                    table.notes = (f"without deepali: {reason}",)
        slow = statistics.median(alone) if alone else None
        for kind, shift in shifts.items():
            taken = statistics.median(times[kind])
            errors = [final_error(*p) for p in zip(fixed, moving, shift, strict=True)]
            rough = float(np.mean([roughness(s) for s in shift[:few]]))
            grid = Grid((SIDE, SIDE))
            dets = torch.func.vmap(lambda u, grid=grid: determinant(u, grid))(torch.from_numpy(shift))
            folds = float((dets <= 0).double().mean())
            gain = None if slow is None else slow * count / taken
            mean = float(np.mean(errors[:few])), rough, float(np.mean(errors)), folds
            table.rows.append((f"fnreg {transform}, {kind}", taken, gain, *mean))
        if slow is not None:
            errors = [final_error(*p) for p in zip(fixed[:few], moving[:few], found, strict=True)]
            rough = float(np.mean([roughness(s) for s in found]))
            row = (f"deepali {name}, pair by pair", slow * count, 1.0, float(np.mean(errors)), rough, None, None)
            table.rows.append(row)
    return [table]
