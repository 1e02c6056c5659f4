"""Second order against Adam for fields of splines: the objective against seconds, from one start to one problem.

All solvers minimise the same objective on one level after another; `stop` is off, so each takes the steps it is given.
Told are the objective after parts of the time, and the seconds that each needs to come as low as Adam ends.  Steps are
timed one by one: what Adam gains by looking at no value is in it.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.images import brain, same_digit_pairs
from benchmarks.measure import Absent, Options, Table
from fnreg import (
    FFD,
    LBFGS,
    SVFFD,
    Affine,
    Descent,
    GaussNewton,
    Grid,
    Image,
    NewtonCG,
    adam,
    bending,
    diffusion,
    mse,
    ncc,
    register,
)
from fnreg.data import c_shape, circle

PARTS = (0.1, 0.25, 0.5, 1.0)  # of Adam's time


def course(steps: dict[str, int], name: str, **given: Any) -> tuple[list[float], list[float], float]:
    """Seconds and mean objective on the finest level after each step, and the mean objective of the result."""
    solver = {"Adam": Descent(adam(0.3)), "L-BFGS": LBFGS(), "Gauss-Newton-CG": NewtonCG()}[name]
    times: list[float] = []
    begin = time.perf_counter()

    def told(event: Any) -> None:
        if event.level == 0:
            times.append(time.perf_counter() - begin)

    result = register(solver=solver, steps=steps[name], stop=None, padding="border", progress=told, **given)
    values = result.history[-1].value.reshape(-1, steps[name]).mean(0).tolist()
    return times, values, float(result.value.mean())


def rows(problem: str, steps: dict[str, int], **given: Any) -> list[tuple[Any, ...]]:
    """One row for each solver; a first run of two steps is not counted."""
    found: dict[str, tuple[list[float], list[float], float]] = {}
    for name in steps:
        course(dict.fromkeys(steps, 2), name, **given)
        found[name] = course(steps, name, **given)
    times, _, target = found["Adam"]
    made: list[tuple[Any, ...]] = []
    for name, (when, values, last) in found.items():
        at = [
            next((v for t, v in zip(reversed(when), reversed(values), strict=True) if t <= part * times[-1]), None)
            for part in PARTS
        ]
        reached = next((t for t, v in zip(when, values, strict=True) if v <= target), None)
        ratio = None if reached is None else times[-1] / reached
        made.append((problem, name, len(when), when[-1], *at, last, reached, ratio))
    return made


def run(options: Options) -> list[Table]:
    """One table."""
    columns = (
        "problem",
        "solver",
        "steps",
        "seconds",
        *(f"at {part:g}" for part in PARTS),
        "at its end",
        "seconds to Adam's end",
        "times as fast",
    )
    table = Table("Second order and Adam: mean objective after parts of Adam's time", columns)
    few = {"Adam": 4, "L-BFGS": 4, "Gauss-Newton-CG": 2}
    steps = few if options.quick else {"Adam": 200, "L-BFGS": 200, "Gauss-Newton-CG": 20}
    fixed, moving = (
        Image(torch.from_numpy(values).unsqueeze(1), Grid((28, 28)))
        for values in same_digit_pairs(8 if options.quick else 256)
    )
    given: dict[str, Any] = {"fixed": fixed, "moving": moving, "objective": mse + 1e-2 * bending, "levels": 1}
    for transform in (FFD(stride=4), SVFFD(stride=4)):
        table.rows += rows(f"256 digits, {transform}", steps, transform=transform, **given)
    given = {"fixed": c_shape(128, blur=2.0), "moving": circle(128, blur=2.0), "levels": 3}
    given["objective"] = mse + 3e-4 * diffusion + 1e-3 * bending
    for transform in (FFD(stride=4), SVFFD(stride=4)):
        table.rows += rows(f"circle to C, {transform}", steps, transform=transform, **given)
    try:
        images = [brain(name).normalize() for name in ("h01", "h02")]
    except Absent as missing:
        table.notes = (f"without brains: {missing}",)
        return [table]
    affine = register(*images, Affine(), objective=ncc, solver=GaussNewton(), levels=4, steps=(20, 10, 5, 0))
    half = [image.pyramid(2)[1] for image in images]
    steps = few if options.quick else {"Adam": 60, "L-BFGS": 60, "Gauss-Newton-CG": 6}
    given = {"fixed": half[0], "moving": half[1], "levels": 1, "objective": mse + 1.0 * bending, "then": affine.mapping}
    for transform in (FFD(stride=4), SVFFD(stride=4)):
        table.rows += rows(f"brains at half resolution, {transform}", steps, transform=transform, **given)
    return [table]
