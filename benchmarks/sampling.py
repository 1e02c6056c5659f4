"""Linear interpolation, value and gradient by the coordinates, against `grid_sample` and what memory allows.

A random image is sampled once per voxel, up to one voxel from the voxel itself, in float32.  `grid_sample` gets its
coordinates in its own layout and range, so no conversion is counted; the gradient is that of the sum of the values.
The floor is the time to move the bytes that must move, at the bandwidth of a large copy: coordinates and image in,
gradient (and value, where it is asked for) out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value, vmap

from benchmarks.measure import Options, Table, apart, peak, race
from fnreg.sampling import interpolate, sample

Case = tuple[int, tuple[int, ...]]  # images, 0 for one without a batch axis, and their shape

KERNEL = "fnreg, `sample`: value and gradient"
AUTOGRAD = "fnreg, torch.func.grad_and_value"
PEER = "grid_sample, backward"
PEER_FUNC = "grid_sample, torch.func.grad_and_value"


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 1, *shape), voxel coordinates (B, D, N), and the same for `grid_sample`, (B, *shape, D)."""
    count, shape = max(case[0], 1), case[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, *shape, generator=generator)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")[::-1]
    near = torch.stack([axis.reshape(-1) for axis in axes])
    coords = near + 2 * torch.rand(count, *near.shape, generator=generator) - 1
    size = torch.tensor(shape[::-1], dtype=torch.float32)
    normalised = (2 * coords / (size[:, None] - 1) - 1).mT.reshape(count, *shape, len(shape)).contiguous()
    return images, coords, normalised


def runners(case: Case) -> dict[str, Callable[[], Any]]:
    """What is compared, by name, each a call without arguments."""
    images, coords, normalised = inputs(case)
    leaf = normalised.clone().requires_grad_()

    def peer(image: Tensor, where: Tensor) -> Tensor:
        return F.grid_sample(image[None], where[None], padding_mode="border", align_corners=True).sum()

    def peer_backward() -> Any:
        values = F.grid_sample(images, leaf, padding_mode="border", align_corners=True)
        return torch.autograd.grad(values.sum(), leaf)

    raw: Callable[..., Any] = sample
    ours = grad_and_value(lambda where, image: interpolate(image, where).sum())
    theirs = grad_and_value(lambda where, image: peer(image, where))
    if case[0]:
        raw, ours, theirs = vmap(lambda image, where: sample(image, where)[:2]), vmap(ours), vmap(theirs)
    else:
        images, coords, normalised = images[0], coords[0], normalised[0]
    return {
        KERNEL: lambda: raw(images, coords),
        AUTOGRAD: lambda: ours(coords, images),
        PEER: peer_backward if case[0] else lambda: torch.autograd.grad(peer(images, leaf[0]), leaf),
        PEER_FUNC: lambda: theirs(normalised, images),
    }


def times(case: Case, names: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Nanoseconds per voxel."""
    chosen = {name: function for name, function in runners(case).items() if name in names}
    voxels = max(case[0], 1) * math.prod(case[1])
    return {name: 1e9 * taken / voxels for name, taken in race(chosen, repeats=repeats, warmups=2).items()}


def memory(case: Case, name: str) -> float | None:
    """MiB at the highest, beyond the inputs; after a small warm-up."""
    runners((min(case[0], 1), (8,) * len(case[1])))[name]()
    function = runners(case)[name]
    return peak(function)


def bandwidth(repeats: int) -> float:
    """Bytes per nanosecond of a copy of 256 MiB, read and written."""
    source = torch.rand(2**26)
    target = torch.empty_like(source)
    return 2 * 4 * 2**26 / (1e9 * race({"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"])


def run(options: Options) -> list[Table]:
    """One table per case."""
    repeats = 3 if options.quick else 15
    side, many = (48, 64) if options.quick else (96, 1024)
    cases: dict[str, Case] = {
        f"{side}^3, one image": (0, (side,) * 3),
        f"{many} images of 28 x 28 under vmap": (many, (28, 28)),
        f"8 images of {side * 2 // 3}^3 under vmap": (8, (side * 2 // 3,) * 3),
    }
    speed = bandwidth(repeats)
    tables: list[Table] = []
    for title, case in cases.items():
        names = (KERNEL, AUTOGRAD, PEER, PEER_FUNC)
        found = times(case, names, repeats)
        plain = apart(times, case, names[:2], repeats, environment={"FNREG_NATIVE": "0"})
        dimension = len(case[1])
        floors = {True: 4 * (2 * dimension + 2) / speed, False: 4 * (2 * dimension + 1) / speed}
        table = Table(title, ("method", "ns per voxel", "times the floor", "of grid_sample's time", "MiB"))
        best = min(found[PEER], found[PEER_FUNC])
        for label, part, environment in (("", found, {}), (" without the C kernel", plain, {"FNREG_NATIVE": "0"})):
            for name, taken in part.items():
                used = apart(memory, case, name, environment=environment)
                table.rows.append((name + label, taken, taken / floors[name == KERNEL], taken / best, used))
        table.rows.append(("floor, value and gradient", floors[True], 1.0, floors[True] / best, None))
        inside = 4 * max(case[0], 1) * math.prod(case[1]) / 2**20
        table.notes = (
            f"medians of {repeats} runs in turn after two warm-ups; copies move {speed:.1f} GB/s; "
            f"one float per voxel is {inside:.1f} MiB; the inputs are not in the MiB",
        )
        tables.append(table)
    return tables
