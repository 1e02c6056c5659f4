"""Parts of deformable registration at 96^3: a spline field beside deepali's, a step beside its floor.

Value and gradient of three components of a cubic B-spline; deepali's by its own evaluation and autograd.  The floor of
a step are the passes that it cannot do without: the moving image sampled with its gradient, the gradient smoothed, the
step composed, the field smoothed; one after the other, as in a step, for a pass on what lies in the cache takes half as
long.  Memory is what a step takes beyond images, parameters and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vjp

from benchmarks.measure import Absent, Options, Table, apart, peak, peer, race
from fnreg import Diffeomorphism, Grid, Image, adam, mse
from fnreg.bspline import evaluate, lattice
from fnreg.fields import compose_shift
from fnreg.filters import gaussian
from fnreg.inputs import prepare
from fnreg.losses.objective import objective
from fnreg.sampling import sample
from fnreg.solvers.descent import Descent


def spline_runners(side: int, stride: int) -> dict[str, Callable[[], Any]]:
    """Value and gradient by the coefficients of the sum of squares' half, by name."""
    size = (side,) * 3
    net = lattice(size, stride)
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, *net.shape, generator=generator)
    back = torch.randn(3, *size, generator=generator)

    def fnreg() -> Any:
        _, pull = vjp(lambda c: evaluate(c, net), ours)
        return pull(back)

    found: dict[str, Callable[[], Any]] = {"fnreg": fnreg}
    try:
        spatial, core = peer("deepali.spatial"), peer("deepali.core")
    except Absent:
        return found
    transform = spatial.FreeFormDeformation(core.Grid(size=size), stride=stride)

    def deepali() -> Any:
        transform.update()
        (transform.tensor()[0] * back).sum().backward()

    return found | {"deepali": deepali}


def step_runners(side: int) -> dict[str, Callable[[], Any]]:
    """One step of the solver, and the passes that it needs, by name."""
    grid, transform = Grid((side,) * 3), Diffeomorphism()
    generator = torch.Generator().manual_seed(0)
    images = [Image(gaussian(torch.randn(1, *grid.shape, generator=generator), 2.0), grid) for _ in "ab"]
    level = prepare(*images, None, levels=1, min_size=4).level(0, transform, objective(mse), 1, None)
    solver = Descent(adam(0.5))
    params = transform.cast(transform.init(grid), torch.float32)
    # As smooth as those of a registration: how scattered the samples are decides what they cost.
    field = gaussian(3.0 * torch.randn(3, *grid.shape, generator=generator), 2.0)
    params = {name: field.unsqueeze(0) for name in params}
    carry = solver.init(level, params)
    coords = torch.stack(torch.meshgrid(*(torch.arange(side, dtype=torch.float32),) * 3, indexing="ij")[::-1])
    coords, small = (coords + field).flatten(1), 0.1 * field

    def step() -> Any:
        return solver.step(level, params, carry, 0.5, None)

    def floor() -> Any:
        seen = sample(images[1].data, coords)
        moved = compose_shift(gaussian(seen.gradient.reshape_as(field), transform.gradient), field)
        return gaussian(moved, transform.smooth)

    return {
        "a step": step,
        "its floor: the four below in a row": floor,
        "sampling with gradient": lambda: sample(images[1].data, coords),
        "smoothing the gradient": lambda: gaussian(field, transform.gradient),
        "composing the step": lambda: compose_shift(small, field),
        "smoothing the field": lambda: gaussian(field, transform.smooth),
    }


def step_memory(side: int) -> float | None:
    """float32 per voxel that a step takes at its highest."""
    step = step_runners(side)["a step"]
    step()
    used = peak(step)
    return None if used is None else used * 2**20 / 4 / side**3


def run(options: Options) -> list[Table]:
    """Two tables: the spline field, the step."""
    side, repeats = (48, 3) if options.quick else (96, 9)
    voxels = side**3 / 1e9
    splines = Table(
        f"Cubic B-spline field, 3 x {side}^3, value and gradient", ("stride", "method", "ns per voxel", "part")
    )
    for stride in (2, 4, 8):
        times = race(spline_runners(side, stride), repeats=repeats)
        for name, taken in times.items():
            splines.rows.append(
                (stride, name, taken / voxels, taken / times["deepali"] if "deepali" in times else None)
            )
    steps = Table(f"A step of Diffeomorphism with mse, {side}^3", ("pass", "ns per voxel", "times the floor"))
    times = race(step_runners(side), repeats=repeats)
    floor = next(taken for name, taken in times.items() if "floor" in name)
    for name, taken in times.items():
        steps.rows.append((name, taken / voxels, taken / floor))
    memory = apart(step_memory, side)
    steps.notes = ("memory at most: " + ("not told here" if memory is None else f"{memory:.1f} float32 per voxel"),)
    return [splines, steps]
