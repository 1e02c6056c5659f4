"""What the benchmarks share: clocks, memory, separate processes and tables."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import gc
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Absent(Exception):
    """A benchmark lacks its data or a peer: it is skipped, and this says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """quick : smaller sizes and fewer repeats, to see that all works; device : where fnreg runs, for `growth`."""

    quick: bool = False
    device: str = "cpu"


@dataclasses.dataclass
class Table:
    """Rows under named columns; a note tells what a number includes."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [[_shown(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        lines = [f"\n### {self.title}\n"]
        for number, row in enumerate((self.columns, *cells)):
            lines.append("| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |")
            if number == 0:
                lines.append("|" + "|".join("-" * (n + 2) for n in widths) + "|")
        return "\n".join(lines + [f"\n{note}" for note in self.notes])


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 1000 or cell == 0 else f"{cell:.1e}" if abs(cell) < 1e-3 else f"{cell:.4g}"


def peer(module: str) -> Any:
    """The module of another package, or `Absent`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"the package of {module!r} is not installed: pip install fnreg[bench]") from error


def settle() -> None:
    """Wait for the accelerator, so that a clock sees the work and not its launch."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """One call's time."""
    settle()
    begin = time.perf_counter()
    function()
    settle()
    return time.perf_counter() - begin


def race(runners: Mapping[str, Callable[[], Any]], *, repeats: int, warmups: int = 1) -> dict[str, float]:
    """Median seconds of each runner; their repeats take turns, so that all see the same load of the machine."""
    for _ in range(warmups):
        for function in runners.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, function in runners.items():
            times[name].append(seconds(function))
    return {name: statistics.median(found) for name, found in times.items()}


def apart(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """`function(*arguments)` in a process of its own, with these variables set from before its imports."""
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _resident(field: str) -> float:
    """MiB of this process: field VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in the status of the process")


def _release() -> None:
    """Make glibc give freed memory back, or it would be used again unseen; elsewhere nothing is done."""
    gc.collect()
    try:
        library = ctypes.CDLL(None)
        library.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is larger than 64 KiB goes back when it is freed
        library.malloc_trim(0)
    except (AttributeError, OSError):
        return


def peak(function: Callable[[], Any]) -> float | None:
    """MiB by which `function()` raises the memory in use at its highest; None where the system does not tell.

    Call it last in a process of its own (`apart`), after a warm-up: it slows later allocations down.
    """
    _release()
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        settle()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        settle()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark begins at what is in use
        low = _resident("VmRSS")
        function()
        return _resident("VmHWM") - low
    except OSError:
        function()
        return None
