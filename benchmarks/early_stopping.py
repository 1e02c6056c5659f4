"""Pairs that stop each at its own time against all of them taking all steps: work, time and what comes out.

Three ways of the same registration in one call: every pair takes every step; pairs stop, and the batch is halved once
half of them are done; pairs stop, a part of them runs side by side, and those that wait take the places of those that
are done.  Work is counted in looks at a pair (value and gradient); the steps that pairs took are the least it could be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.hippocampus import BOTH, dice, pairs, subjects
from benchmarks.images import same_digit_pairs
from benchmarks.measure import Absent, Options, Table
from fnreg import FFD, Affine, Grid, Image, Mapping, Registration, Rigid, Stage, Stop, bending, lncc, mse, register
from fnreg.problem import Level

DIGITS = 1024


class Looks:
    """Counts the pairs that a registration looks at."""

    def __init__(self) -> None:
        self.pairs, self._real = 0, Level.gradient

    def __enter__(self) -> Looks:
        def gradient(level: Level, params: Any) -> Any:
            self.pairs += level.size
            return self._real(level, params)

        Level.gradient = gradient
        return self

    def __exit__(self, *_: object) -> None:
        Level.gradient = self._real


def rows(
    name: str, solve: Callable[[Stop | None], Registration], width: int, judge: Callable[[Mapping], Tensor] | None
) -> list[tuple[Any, ...]]:
    """One row for each way; a first run is not counted."""
    ways = {
        "all steps": None,
        "stopping": Stop(),
        f"stopping, {width} side by side": Stop(width=width),
    }
    solve(Stop(width=width))
    found: list[tuple[Any, ...]] = []
    for way, stop in ways.items():
        with Looks() as looks:
            begin = time.perf_counter()
            result = solve(stop)
            taken = time.perf_counter() - begin
        size = len(result.value)
        score = None if judge is None else float(judge(result.mapping).mean())
        least = float(result.steps.sum()) / size
        found.append((name, way, least, looks.pairs / size, taken, float(result.value.mean()), score))
    return found


def run(options: Options) -> list[Table]:
    """One table."""
    count = 64 if options.quick else DIGITS
    columns = ("pairs", "way", "steps a pair", "looks a pair", "seconds", "mean objective", "Dice")
    table = Table("Early stopping and turns", columns)
    fixed, moving = (Image(torch.from_numpy(values).unsqueeze(1), Grid((28, 28))) for values in same_digit_pairs(count))
    for name, transform in {"digits, rigid": Rigid(), "digits, free-form": FFD(stride=4)}.items():

        def of_digits(stop: Stop | None, transform: Any = transform) -> Registration:
            return register(fixed, moving, transform, objective=mse, stop=stop)

        table.rows += rows(f"{count} {name}", of_digits, count // 2, None)
    try:
        known, other = pairs(subjects(3 if options.quick else 5))
    except Absent as missing:
        table.notes = (f"without hippocampi: {missing}",)
        return [table]
    steps = (5, 3, 1) if options.quick else (60, 60, 20)
    affine = Stage(Affine(), objective=BOTH, steps=steps)
    field = Stage(FFD(stride=6), objective=lncc(radius=3) + bending, steps=steps)
    for name, stages in {"affine, MI + LNCC": [affine], "affine and free-form, LNCC": [affine, field]}.items():

        def of_crops(stop: Stop | None, stages: list[Stage] = stages) -> Registration:
            return register(known, other.image, stages, start="center", stop=stop)

        size = len(known.image.data)
        table.rows += rows(
            f"{size} hippocampi, {name}", of_crops, max(1, size // 4), lambda mapping: dice(known, other, mapping)
        )
    return [table]
