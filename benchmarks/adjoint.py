"""Time and memory of the derivative of a registration, beside the registration: by its optimum and by its steps.

A free-form deformation of one pair by mean squares with penalties, Adam at one level in float32.  The derivative is
that of the distance of points by all voxels of the fixed image, by `loss.backward()`.  Each row runs in a process of
its own, after a small warm-up.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

import fnreg
from benchmarks.measure import Options, Table, apart, peak, seconds
from fnreg import FFD, Checkpointed, Grid, Image, Implicit, Unrolled, adam, differentiable, register

# The optimum of the first steps is none: nothing is checked, and a ridge keeps the linear system solvable.
ADJOINTS: dict[str, Any] = {
    "implicit": Implicit(check=None, ridge=1e-3, tolerance=1e-4),
    "last 10 steps": Unrolled(last=10),
    "unrolled": Unrolled(),
    "checkpointed": Checkpointed(),
}


def pair(size: int) -> tuple[Image, Image]:
    """A smooth scene and a bent view of it."""
    grid = Grid((size, size))
    points = grid.points() / size
    bent = points + 0.03 * torch.sin(7 * points.flip(-1) + 1)

    def scene(where: torch.Tensor) -> Image:
        values = torch.sin(9 * where[:, 0]) * torch.cos(11 * where[:, 1]) + torch.sin(5 * where.sum(1))
        return Image(values.reshape(1, size, size).float(), grid)

    return scene(bent), scene(points)


def measured(name: str, steps: int, size: int, repeats: int) -> tuple[float, float, float | None, float | None]:
    """Seconds of `register` and with the derivative, and MiB of both."""
    objective = fnreg.mse + 1e-2 * fnreg.bending + 1e-2 * fnreg.diffusion
    options: dict[str, Any] = {"objective": objective, "levels": 1, "optimizer": adam(0.05), "stop": None}
    solve = differentiable(register, adjoint=ADJOINTS[name])

    def derivative(fixed: Image, moving: Image, count: int) -> None:
        leaf = fixed.data.clone().requires_grad_()
        result = solve(Image(leaf, fixed.grid), moving, FFD(8), steps=count, **options)
        result.map_points(fixed.grid.points()[::7]).square().mean().backward()
        assert leaf.grad is not None
        assert bool(torch.isfinite(leaf.grad).all())

    images = pair(size)
    derivative(*pair(16), 3)
    register(*pair(16), FFD(8), steps=3, **options)

    def plain() -> None:
        register(*images, FFD(8), steps=steps, **options)

    def work() -> None:
        derivative(*images, steps)

    alone, taken = [], []
    for _ in range(repeats):
        alone.append(seconds(plain))
        taken.append(seconds(work))
    return statistics.median(alone), statistics.median(taken), peak(plain), peak(work)


def run(options: Options) -> list[Table]:
    """One table: a row per adjoint and number of steps."""
    size, counts = (16, (4, 16)) if options.quick else (48, (10, 100, 1000))
    found = Table(
        f"The derivative of a registration of {size} x {size} by all its fixed voxels",
        ("adjoint", "steps", "register, s", "with derivative, s", "times", "register, MiB", "with derivative, MiB"),
        notes=("medians; MiB beyond the images; the two times of a row take turns",),
    )
    for name in ADJOINTS:
        for steps in counts:
            repeats = 1 if options.quick or steps > 100 else 3
            alone, taken, before, used = apart(measured, name, steps, size, repeats)
            found.rows.append((name, steps, alone, taken, taken / alone, before, used))
    return [found]
