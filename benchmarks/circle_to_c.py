"""A disc becomes a C of 128 x 128: quality, inverse consistency and time, beside deepali's loop; one pair and a batch.

deepali runs as its tutorial does: SVFFD with a control point every 5 voxels, 4 levels of 200, 200, 300 and 100
iterations, Adam anew on each level.  All errors are of the final maps on the images as they were given; the inverse
consistency is the distance in voxels from where map and inverse bring a voxel, where the map stays inside the image.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks import deepali
from benchmarks.measure import Absent, Options, Table, peer
from fnreg import SVFFD, Image, Mapping, Registration, adam, bending, diffusion, mse, register, stack
from fnreg.agreement import there_and_back
from fnreg.circle import circle_to_c
from fnreg.data import c_shape, circle

STEPS = (200, 200, 300, 100)
QUICK: dict[str, Any] = {"steps": (70, 60, 50, 28), "optimizer": adam(0.8, decay=0.3)}


def quality(result: Registration, c: Image, disc: Image) -> tuple[float, ...]:
    """Forward and inverse MSE, range of det J, mean and largest inverse consistency in voxels."""
    inverse = result.inverse()
    there = float((result.warp(disc, padding="border").data - c.data).square().mean())
    back = float((inverse.warp(c, padding="border").data - disc.data).square().mean())
    dets = result.jacobian().data
    away = there_and_back(result.mapping, inverse.mapping, c.grid, world=False)
    return there, back, float(dets.min()), float(dets.max()), float(away.mean()), float(away.max())


def peers(c: Image, disc: Image) -> tuple[float, tuple[float, ...]]:
    """Seconds and quality of deepali's loop."""
    spatial = peer("deepali.spatial")
    begin = time.perf_counter()
    result = deepali.registered(lambda grid: spatial.SVFFD(grid, stride=5), c.data, disc.data, STEPS)
    seconds = time.perf_counter() - begin
    there, back = (deepali.displacement(t) for t in (result.transform, result.transform.inverse()))
    return seconds, _of_fields(there, back, result.target, result.source)


def _of_fields(there: torch.Tensor, back: torch.Tensor, c: torch.Tensor, disc: torch.Tensor) -> tuple[float, ...]:
    """The same quality from displacements (2, Y, X) in voxels, x first, by SciPy."""
    scipy: Any = peer("scipy.ndimage")
    y, x = np.mgrid[0 : there.shape[1], 0 : there.shape[2]]

    def at(image: np.ndarray, places: Any) -> np.ndarray:
        return scipy.map_coordinates(image, places, order=1, mode="nearest")

    def moved(field: Any) -> Any:
        return [y + field[1], x + field[0]]

    u, w = there.double().numpy(), back.double().numpy()
    error = float(((at(disc[0].numpy(), moved(u)) - c[0].numpy()) ** 2).mean())
    other = float(((at(c[0].numpy(), moved(w)) - disc[0].numpy()) ** 2).mean())
    ends = moved(u)
    away = np.hypot(*(u[k] + at(w[k], ends) for k in range(2)))
    inside = (ends[0] >= 0) & (ends[0] <= y.max()) & (ends[1] >= 0) & (ends[1] <= x.max())
    (uxy, uxx), (uyy, uyx) = np.gradient(u[0]), np.gradient(u[1])
    dets = (1 + uxx) * (1 + uyy) - uxy * uyx
    return error, other, float(dets.min()), float(dets.max()), float(away[inside].mean()), float(away[inside].max())


def run(options: Options) -> list[Table]:
    """Two tables: one pair, a batch."""
    repeats = 1 if options.quick else 3
    c, disc = c_shape(128, blur=2.0), circle(128, blur=2.0)
    columns = ("method", "seconds", "forward MSE", "inverse MSE", "det J from", "to", "consistency, mean", "largest")
    table = Table("A disc to a C, 128 x 128", columns, notes=(f"seconds are medians of {repeats} runs",))
    objective = mse + 3e-4 * diffusion + 1e-3 * bending
    given: dict[str, Any] = {"objective": objective, "levels": 4, "padding": "border", "stop": None}
    times: dict[str, list[float]] = {}
    rows: dict[str, tuple[float, ...]] = {}

    def note(name: str, seconds: float, found: tuple[float, ...]) -> None:
        times.setdefault(name, []).append(seconds)
        rows[name] = found

    register(c, disc, SVFFD(4), steps=2, **given)  # warm-up
    for _ in range(repeats):
        story = circle_to_c()
        one = dataclasses.replace(story.result)
        note("fnreg demo: SVFFD(4), 300 + 200 + 100 + 40 steps", story.seconds, quality(one, story.c, story.disc))
        weak = mse + 4e-5 * diffusion + 1.2e-4 * bending
        long = {"steps": STEPS, "optimizer": adam(0.5, decay=0.3), "objective": mse + 3e-4 * diffusion}
        for name, transform, settings in (
            ("fnreg SVFFD(4), 70 + 60 + 50 + 28 steps", SVFFD(4, squarings=7), QUICK | {"objective": weak}),
            ("fnreg SVFFD(5), the tutorial's 800 steps", SVFFD(5, squarings=6), long),
        ):
            begin = time.perf_counter()
            result = register(c, disc, transform, **given | settings)
            seconds = time.perf_counter() - begin
            thirds = SVFFD(3 * transform.stride, squarings=9)  # the flow of the same splines, as the demo samples it
            fine = Mapping(result.mapping.params, c.grid.resize(3 * 128), thirds)
            note(name, seconds, quality(dataclasses.replace(result, mapping=fine), c, disc))
        try:
            note("deepali SVFFD(5), the tutorial's 800 steps", *peers(c, disc))
        except Absent as reason:
            table.notes = (*table.notes, f"without deepali: {reason}")
    table.rows = [(name, statistics.median(times[name]), *found) for name, found in rows.items()]
    count = 4 if options.quick else 64
    radii = torch.linspace(36.0, 40.0, count).tolist()
    cs, discs = (stack([shape(128, radius=r, blur=2.0) for r in radii]) for shape in (c_shape, circle))
    begin = time.perf_counter()
    many = register(
        cs, discs, SVFFD(4, squarings=7), steps=(300, 200, 100, 40), optimizer=adam(0.5, decay=0.3), **given
    )
    seconds = time.perf_counter() - begin
    batch = Table(f"{count} such pairs in one call", ("seconds", "per pair", "mean value", "largest"))
    batch.rows.append((seconds, seconds / count, float(many.value.mean()), float(many.value.max())))
    return [table, batch]
