"""Thousands of small registrations in one process: whether memory, handles, threads, files or time grow.

Pairs of varying shapes, transforms, similarities and solvers, alone and in small batches; every tenth is broken
in one of six ways.
"""

from __future__ import annotations

import gc
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fnreg
from benchmarks.measure import Absent, Options, Table, apart
from fnreg import FFD, SVFFD, Affine, Diffeomorphism, Grid, Image, Rigid, Subject, Translation, register, stack

LINEAR = (Translation(), Rigid(), Affine())
FIELDS = (FFD(4), SVFFD(4, 4), Diffeomorphism())


def pair(drawn: random.Random) -> tuple[Image, Image]:
    """A few bumps, and the same moved."""
    dimension = drawn.choice((2, 2, 3))
    size = tuple(drawn.randint(12, 28) if dimension == 2 else drawn.randint(8, 12) for _ in range(dimension))
    grid = Grid(size, spacing=tuple(drawn.uniform(0.5, 2.0) for _ in size), center=(0.0,) * dimension)
    extent = torch.tensor(size) * grid.spacing
    generator = torch.Generator().manual_seed(drawn.randrange(2**31))
    middles = (torch.rand(5, dimension, generator=generator) - 0.5) * 0.7 * extent

    def seen(shift: torch.Tensor) -> Image:
        away = ((grid.points()[:, None] - middles - shift) / extent).square().sum(2)
        return Image((-30 * away).exp().sum(1).reshape(1, *grid.shape).float(), grid)

    return seen(torch.zeros(dimension)), seen(0.08 * extent * torch.rand(dimension, generator=generator))


def _constant(fixed: Image, moving: Image) -> tuple[Any, Any]:
    return fixed, Image(torch.ones_like(moving.data), moving.grid)


def _lost(fixed: Image, moving: Image) -> tuple[Any, Any]:
    data = moving.data.clone()
    data.view(-1)[::7] = torch.nan
    return fixed, Image(data, moving.grid)


def _apart(fixed: Image, moving: Image) -> tuple[Any, Any]:
    return fixed, Image(moving.data, spacing=moving.grid.spacing, center=moving.grid.center + 1e4)


def _hidden(fixed: Image, moving: Image) -> tuple[Any, Any]:
    return Subject(fixed, torch.zeros_like(fixed.data)), moving


def _channels(fixed: Image, moving: Image) -> tuple[Any, Any]:
    return fixed, Image(moving.data.expand(2, *moving.grid.shape).contiguous(), moving.grid)


def _flat(fixed: Image, moving: Image) -> tuple[Any, Any]:
    return fixed, Image(moving.data.select(1, 0).contiguous())


BROKEN: tuple[Callable[[Image, Image], tuple[Any, Any]], ...] = (_constant, _lost, _apart, _hidden, _channels, _flat)


def once(drawn: random.Random, number: int) -> int:
    """One registration or a batch of four; how many pairs were refused or failed."""
    fixed, moving = pair(drawn)
    bends = drawn.random() < 0.4
    transform: Any = drawn.choice(FIELDS if bends else LINEAR)
    objective = drawn.choice((fnreg.mse, fnreg.ncc, fnreg.lncc(radius=1), fnreg.mi(bins=16)))
    options: dict[str, Any] = {"levels": 2, "min_size": 4, "steps": 10, "objective": objective}
    if bends and not isinstance(transform, Diffeomorphism):
        options["objective"] = objective + 0.01 * fnreg.bending
    elif not bends and drawn.random() < 0.3:
        options |= {"objective": fnreg.mse, "solver": fnreg.GaussNewton()}
    if number % 10 == 9:
        try:
            result = register(*BROKEN[number // 10 % len(BROKEN)](fixed, moving), transform, **options)
        except ValueError:
            return 1
        return int(not bool(result.ok))
    if drawn.random() < 0.2:
        fixed, moving = stack([fixed] * 4), stack([moving] * 4)
    result = register(fixed, moving, transform, **options)
    result.warp(moving)
    return int((~result.ok).sum())


def _now() -> tuple[float, int, int, int]:
    """MiB in memory, open handles, threads of Python, entries of the folder of temporary files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    handles = len(list(Path("/proc/self/fd").iterdir()))
    return resident, handles, threading.active_count(), len(list(Path(tempfile.gettempdir()).iterdir()))


def soaked(count: int, every: int) -> list[tuple[Any, ...]]:
    """A row after each `every` registrations."""
    drawn, rows, failed, begin = random.Random(0), [], 0, time.perf_counter()
    for number in range(count):
        failed += once(drawn, number)
        if (number + 1) % every == 0:
            taken = (time.perf_counter() - begin) / every
            gc.collect()
            rows.append((number + 1, 1e3 * taken, failed, *_now(), len(gc.get_objects())))
            failed, begin = 0, time.perf_counter()
    return rows


def run(options: Options) -> list[Table]:
    """One table: a row for each tenth of the registrations."""
    if not Path("/proc/self/fd").is_dir():
        raise Absent("this system does not tell what a process holds open")
    count = 60 if options.quick else 5000
    with tempfile.TemporaryDirectory() as folder:
        rows = apart(soaked, count, count // 10, environment={"TMPDIR": folder})
    columns = ("registrations", "ms each", "failed", "MiB", "handles", "threads", "temporary files", "objects")
    found = Table(f"{count} small registrations in one process", columns, rows)
    found.notes = ("every tenth is broken; MiB in memory, with torch itself; objects that Python tracks",)
    return [found]
