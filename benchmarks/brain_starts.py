"""From how far apart are brains found: random rotations and shifts of a whole scan, with and without `start="auto"`.

The moving brain lies as a scanner with another idea of the world would store it: turned about a random axis and
shifted, evenly up to the limits.  NIREP h01 onto itself has an exact truth; it is resampled by cubic interpolation
before, so that no voxel lies on another one.  For h02 onto h01 the truth is the map that is reached without the motion.
Errors are means over points of the fixed brain; found means less than 1 mm.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import brain
from benchmarks.measure import Options, Table
from fnreg import Grid, Image, Rigid, register
from fnreg.grid import homogeneous
from fnreg.transforms.rotation import rotation_vector_to_matrix

COUNT = 50
LIMITS = {"h01 onto itself": ((45.0, 40.0),), "h02 onto h01": ((45.0, 40.0), (180.0, 40.0))}  # degrees, mm
STEPS = (100, 20, 0)  # to half resolution: what is asked is which valley is found
TOLERANCE = 1.0  # mm


def motions(count: int, limits: tuple[float, float], center: Tensor, seed: int = 0) -> list[Tensor]:
    """World matrices (4, 4): about a random axis through the centre, then along another one."""
    generator = np.random.default_rng(seed)
    made: list[Tensor] = []
    for _ in range(count):
        axis, away = (v / np.linalg.norm(v) for v in generator.normal(size=(2, 3)))
        turn = math.radians(generator.uniform(0, limits[0])) * torch.from_numpy(axis)
        rotation, shift = rotation_vector_to_matrix(turn), generator.uniform(0, limits[1]) * torch.from_numpy(away)
        made.append(homogeneous(rotation, center - rotation @ center + shift))
    return made


def displaced(image: Image, motion: Tensor) -> Image:
    """The image on a grid that has been moved."""
    grid, rotation = image.grid, motion[:3, :3]
    center, direction = rotation @ grid.center + motion[:3, 3], rotation @ grid.direction
    return Image(image.data, Grid(grid.size, spacing=grid.spacing, center=center, direction=direction))


def between(image: Image) -> Image:
    """The image sampled off its own voxels, turned by a little and on voxels of 2.2 mm."""
    grid = image.grid
    turn = rotation_vector_to_matrix(torch.tensor([0.05, -0.07, 0.06], dtype=torch.float64))
    direction = turn @ grid.direction
    other = Grid(grid.size, spacing=1.1 * grid.spacing, center=grid.center + 0.7, direction=direction)
    return image.resample(other, interpolation="cubic")


def run(options: Options) -> list[Table]:
    """One table."""
    count = 4 if options.quick else COUNT
    fixed, other = brain("h01"), brain("h02")
    points = fixed.grid.points()[(fixed.data > 0).flatten()][::50]
    undisturbed = register(fixed, other, Rigid(), steps=STEPS)
    pairs = {
        "h01 onto itself": (between(fixed), points),
        "h02 onto h01": (other, undisturbed.map_points(points)),
    }
    columns = ("pair", "up to", "start", "found %", "median mm", "90 % mm", "worst mm", "seconds per pair")
    table = Table(f"Rigid, {count} motions each", columns)
    chosen: dict[str, int] = {}
    for name, (moving, truth) in pairs.items():
        for limits in LIMITS[name]:
            for start in ("header", "auto"):
                errors: list[float] = []
                begin = time.perf_counter()
                for motion in motions(count, limits, fixed.grid.center):
                    errors.append(_error(fixed, displaced(moving, motion), start, points, truth, motion, chosen))
                taken = (time.perf_counter() - begin) / count
                found = np.array(errors)
                share = 100 * float((found < TOLERANCE).mean())
                row = (float(np.median(found)), float(np.quantile(found, 0.9)), float(found.max()), taken)
                table.rows.append((name, f"{limits[0]:.0f}°, {limits[1]:.0f} mm", start, share, *row))
    told = ", ".join(f"{name} {number}" for name, number in sorted(chosen.items()))
    table.notes = (
        f"default objective and solver, steps {STEPS}; {torch.get_num_threads()} threads",
        f"what auto chose: {told}; search included in its seconds",
        f"h02 onto h01 undisturbed, auto chose {_aligned(fixed, other, points, truth=pairs['h02 onto h01'][1])}",
    )
    return [table]


def _error(
    fixed: Image, moving: Image, start: Any, points: Tensor, truth: Tensor, motion: Tensor, chosen: dict[str, int]
) -> float:
    """Mean distance of the mapped points from the truth, mm."""
    result = register(fixed, moving, Rigid(), start=start, steps=STEPS)
    if result.choice is not None:
        chosen[result.choice.name()] = chosen.get(result.choice.name(), 0) + 1
    expected = truth @ motion[:3, :3].mT + motion[:3, 3]
    return float((result.map_points(points) - expected).norm(dim=1).mean())


def _aligned(fixed: Image, moving: Image, points: Tensor, truth: Tensor) -> str:
    result = register(fixed, moving, Rigid(), start="auto", steps=STEPS)
    assert result.choice is not None
    plain = register(fixed, moving, Rigid(), steps=STEPS)
    apart = float((result.map_points(points) - truth).norm(dim=1).mean())
    values = f"an objective of {float(result.value):.1f} against {float(plain.value):.1f}"
    return f"{result.choice.name()} and ended {apart:.2f} mm from the map by the headers, with {values}"
