"""Time and memory of rigid registration as the batch and the image grow: where the cost per pair no longer falls.

100 iterations of Adam at one level.  Each size runs in a process of its own, after a small warm-up.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.measure import Absent, Options, Table, apart, peak, seconds
from fnreg import Image, Rigid, register


def measured(count: int, shape: tuple[int, ...], device: str, repeats: int) -> tuple[float, float | None]:
    """Seconds, a median, and MiB beyond the images, for a batch of `count` smooth random pairs."""

    def smooth(count: int, shape: tuple[int, ...], seed: int) -> Image:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(count, *shape, generator=generator)
        for axis in range(1, noise.ndim):  # a box three voxels wide, twice
            for _ in range(2):
                noise = (noise + noise.roll(1, axis) + noise.roll(-1, axis)) / 3
        return Image(noise[:, None] if count > 1 else noise).to(device)

    def once(count: int, shape: tuple[int, ...], steps: int = 100) -> None:
        register(smooth(count, shape, 0), smooth(count, shape, 1), Rigid(), levels=1, steps=steps, stop=None)

    once(count, (8,) * len(shape), steps=2)
    pair = smooth(count, shape, 0), smooth(count, shape, 1)

    def work() -> None:
        register(*pair, Rigid(), levels=1, steps=100, stop=None)

    taken = statistics.median(seconds(work) for _ in range(repeats))
    return taken, peak(work)


def table(title: str, cases: list[tuple[int, tuple[int, ...]]], options: Options) -> Table:
    """One row per case, and how its time per voxel compares with the best of them."""
    rows: list[tuple[str, float, float, float, float | None]] = []
    for count, shape in cases:
        taken, used = apart(measured, count, shape, options.device, 1 if options.quick else 3)
        voxels = count * torch.Size(shape).numel()
        size = " x ".join(str(n) for n in shape)
        rows.append((f"{count} of {size}", taken, 1e3 * taken / count, 1e9 * taken / voxels / 100, used))
    best = min(row[3] for row in rows)
    columns = ("pairs", "seconds", "ms per pair", "ns per voxel and iteration", "times the best", "MiB")
    found = Table(title, columns, [(*row[:4], row[3] / best, row[4]) for row in rows])
    settled = next(row[0] for row in rows if row[3] <= 1.25 * best)
    found.notes = (f"within a quarter of the best from {settled} on; on {options.device}; MiB beyond the images",)
    return found


def run(options: Options) -> list[Table]:
    """Three tables: batch, image size in 2-D, image size in 3-D."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise Absent("no CUDA device is available")
    batches = (1, 16, 256) if options.quick else (1, 4, 16, 64, 256, 1024, 4096)
    planes = (16, 64) if options.quick else (16, 32, 64, 128, 256, 512)
    volumes = (16, 32) if options.quick else (16, 32, 64, 96)
    return [
        table("Batches of 28 x 28", [(n, (28, 28)) for n in batches], options),
        table("One pair, 2-D", [(1, (n, n)) for n in planes], options),
        table("One pair, 3-D", [(1, (n, n, n)) for n in volumes], options),
    ]
