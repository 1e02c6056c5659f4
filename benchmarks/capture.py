"""How far apart two digits may be turned: random rotations up to 180 degrees, with many starts and with one.

The moving image is a digit turned about the image's centre by cubic interpolation.  Digits that nearly equal
themselves under a rotation by more than 15 degrees (correlation above 0.9) have no one answer: they are left out
of the first share and kept in the second.  Captured means within one degree of the truth.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from benchmarks.images import batch, digits
from benchmarks.measure import Options, Table, peer
from fnreg import GaussNewton, Rotation, register


def turned(image: np.ndarray, degrees: float, order: int = 3) -> np.ndarray:
    """The image sampled at points turned by so many degrees about its centre."""
    angle, center = math.radians(degrees), (np.array(image.shape) - 1) / 2
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # on (y, x)
    return peer("scipy.ndimage").affine_transform(image, matrix, center - matrix @ center, order=order)


def symmetry(image: np.ndarray) -> float:
    """The image's largest correlation with itself turned by more than 15 degrees."""
    views = np.stack([image, *(turned(image, angle, order=1) for angle in range(16, 345, 2))])
    return float(np.corrcoef(views.reshape(len(views), -1))[0, 1:].max())


def cases(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fixed and moving images, the angle in degrees that maps fixed to moving points, and which have one answer."""
    generator = np.random.default_rng(seed)
    fixed: list[np.ndarray] = []
    unique: list[bool] = []
    for image in generator.permutation(digits()[0]):
        if sum(unique) == count:
            break
        fixed.append(image)
        unique.append(symmetry(image) <= 0.9)
    angles = generator.uniform(-180, 180, len(fixed))
    moving = [turned(image, -angle) for image, angle in zip(fixed, angles, strict=True)]
    return np.stack(fixed), np.stack(moving), angles, np.array(unique)


def run(options: Options) -> list[Table]:
    """One table: solvers and numbers of starts."""
    found = cases(40 if options.quick else 200)
    fixed, moving, angles, unique = batch(found[0]), batch(found[1]), found[2], found[3]
    columns = ("solver", "levels", "starts", "captured %", "with symmetric digits %", "median error °", "ms per pair")
    table = Table("Capture of rotations", columns)
    rotation = Rotation()
    settings = [(None, 3, None), (None, 3, 12), (None, 3, 36), (None, 1, 36)]
    settings += [(GaussNewton(), 3, 12), (GaussNewton(), 3, 36)]
    for solver, levels, count in settings:
        starts = None if count is None else rotation.spread(fixed.grid, count)
        begin = time.perf_counter()
        result = register(fixed, moving, rotation, solver=solver, levels=levels, starts=starts)
        taken = time.perf_counter() - begin
        turn = torch.rad2deg(result.mapping.params["rotation"][:, 0]).numpy()
        error = np.abs((turn - angles + 180) % 360 - 180)
        shares = 100 * float((error[unique] <= 1).mean()), 100 * float((error <= 1).mean())
        name = "Adam" if solver is None else "Gauss-Newton"
        row = (name, levels, count or "none", *shares, float(np.median(error[unique])), 1e3 * taken / len(error))
        table.rows.append(row)
    table.notes = (f"{int(unique.sum())} digits with one answer, {int((~unique).sum())} left out as symmetric",)
    return [table]
