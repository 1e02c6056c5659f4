"""Accuracy and speed of affine registration with a known truth: Gauss-Newton and Adam.

Fixed and moving image are sampled by cubic splines from one random source, four times as fine as the fixed image
and smooth (standard deviation 3 fixed voxels), so the truth is exact and no sampling is shared.  What error is left
then is that of linear interpolation in the moving image, which falls with the square of its voxels: hence a row
with a moving image twice as fine, and one whose fixed image is the linearly warped moving image, for the solver
alone.  The error of a pair is the mean distance over the fixed voxels between where map and truth take them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import batch
from benchmarks.measure import Options, Table, peer, race
from fnreg import Affine, GaussNewton, Image, Registration, linear_mapping, register, warp

SIZE, FINE, SIGMA = 64, 4, 3.0
CENTER = (SIZE - 1) / 2


def positions(fineness: int) -> np.ndarray:
    """Voxel positions (2, N) in fixed voxels, x first, of an image so many times as fine over the same extent."""
    axis = (np.arange(SIZE * fineness) - (fineness - 1) / 2) / fineness
    return np.stack([part.ravel() for part in np.meshgrid(axis, axis)])


def pairs(count: int, seed: int = 0) -> tuple[Image, dict[int, Image], Tensor]:
    """Fixed images, moving images by fineness, and the true world matrices (count, 3, 3)."""
    ndimage = peer("scipy.ndimage")
    generator = np.random.default_rng(seed)
    fixed: list[np.ndarray] = []
    moving: dict[int, list[np.ndarray]] = {1: [], 2: []}
    truths = np.tile(np.eye(3), (count, 1, 1))
    for truth in truths:
        noise = generator.standard_normal((2 * SIZE * FINE,) * 2)
        source = ndimage.gaussian_filter(noise, SIGMA * FINE, mode="wrap")
        spline = ndimage.spline_filter(source / source.std(), mode="grid-wrap")

        def sampled(points: np.ndarray, fineness: int, spline: np.ndarray = spline) -> np.ndarray:
            where = ((points + SIZE / 2) * FINE)[::-1]
            values = ndimage.map_coordinates(spline, where, mode="grid-wrap", prefilter=False)
            return values.reshape(SIZE * fineness, -1).astype(np.float32)

        truth[:2, :2] += generator.uniform(-0.15, 0.15, (2, 2))
        truth[:2, 2] = CENTER + generator.uniform(-4, 4, 2) - truth[:2, :2] @ (CENTER, CENTER)
        fixed.append(sampled(truth[:2, :2] @ positions(1) + truth[:2, 2:], 1))
        for fineness, images in moving.items():
            images.append(sampled(positions(fineness), fineness))
    center = (CENTER, CENTER)
    finer = {k: batch(np.stack(images), spacing=1 / k, center=center) for k, images in moving.items()}
    return batch(np.stack(fixed)), finer, torch.from_numpy(truths)


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """Mean distance over the fixed voxels, per pair."""
    points = torch.from_numpy(positions(1).T)
    change = found - truth
    return (points @ change[:, :2, :2].mT + change[:, None, :2, 2]).norm(dim=2).mean(1)


def run(options: Options) -> list[Table]:
    """One table: images times solvers."""
    count, repeats = (16, 1) if options.quick else (128, 3)
    fixed, moving, truth = pairs(count)
    warped = warp(moving[1], linear_mapping(truth, moving[1].grid), moving[1].grid, padding="border")
    images = {
        "sampled alike, for the solver alone": (warped, moving[1]),
        "sampled independently": (fixed, moving[1]),
        "independently, moving twice as fine": (fixed, moving[2]),
    }
    newton = GaussNewton()
    solvers: dict[str, dict[str, Any]] = {
        "Gauss-Newton": {"solver": newton},
        "Gauss-Newton, 10 + 5 + 5 steps": {"solver": newton, "steps": (10, 5, 5), "stop": None},
        "Adam": {},
        "Adam, 3 x 100 steps": {"stop": None},
    }
    columns = ("images", "solver", "median error voxel", "max error voxel", "mean steps per level", "ms per pair")
    table = Table(f"{count} affine pairs, {SIZE} x {SIZE}", columns)
    for kind, (target, source) in images.items():
        results: dict[str, Registration] = {}

        def one(name: str, target: Image = target, source: Image = source, results: Any = results) -> None:
            results[name] = register(target, source, Affine(), **solvers[name])

        times = race({name: partial(one, name) for name in solvers}, repeats=repeats)
        for name, result in results.items():
            error = errors(result.mapping.matrix(), truth)
            steps = " + ".join(f"{n:.0f}" for n in result.steps.double().mean(0))
            taken = 1e3 * times[name] / count
            table.rows.append((kind, name, float(error.median()), float(error.max()), steps, taken))
    table.notes = (
        "matrix entries off by up to 0.15, shifts up to 4 voxels; "
        f"medians of {repeats} runs in turn after a warm-up each; the largest error is that of a pair's mean",
    )
    return [table]
