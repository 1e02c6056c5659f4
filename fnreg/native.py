"""The C kernels: compiled once with the machine's own compiler, kept in the user's cache, loaded by ctypes.

A cold build takes some six seconds, a warm load none to speak of.  Where there is no compiler, or
`FNREG_NATIVE=0` is set, `load` gives None and the callers take their plain torch path, which computes the same;
`kernels` tells why.  `FNREG_CACHE` names another folder for the cache; where it cannot be used each process builds its
own.  A cached file carries the hash of its content in its name, and one that does not match is built anew: loading a
damaged library can end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMMON = "common.h"
SPATIAL = ("sampling.c",)  # compiled for each scalar type and dimension
# compiled for each scalar type: their loops do not ask how many axes there are
FLAT = ("adam.c", "filter.c", "histogram.c", "lengths.c", "lncc.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
CHUNK = 16384  # points that are summed in one go: fixed, so that sums do not depend on the number of threads
SPLIT = 32768  # samples per thread below which a hand-over costs more than it gains


REALS = {torch.float32: "float", torch.float64: "double"}  # the scalar types that the kernels know


def name(dtype: torch.dtype, dimension: int | None = None) -> str:
    """What the symbols for one scalar type, and dimension where they have one, begin with."""
    return f"linear_{REALS[dtype]}_{dimension}" if dimension else f"flat_{REALS[dtype]}"


def _unit() -> str:
    """One translation unit that holds every kernel for every scalar type, and dimension where it has one."""
    lines = [Path(__file__).with_name(COMMON).read_text(encoding="utf-8")]
    for dtype, real in REALS.items():
        for dimension in (None, 1, 2, 3):
            defines = {"REAL": real, "DIM": dimension, "NAME": name(dtype, dimension)}
            lines += [f"#define {key} {value}" for key, value in defines.items()]
            for source in SPATIAL if dimension else FLAT:
                lines += [Path(__file__).with_name(source).read_text(encoding="utf-8")]
            lines += [f"#undef {key}" for key in defines]
    return "\n".join(lines)


def _machine() -> str:
    """What -march=native depends on: code built for one processor must not run on another."""
    told = [platform.machine(), platform.system(), sys.version.split()[0]]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        told += [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    else:
        told.append(platform.processor())
    return "\n".join(told)


def _folder() -> Path:
    chosen = os.environ.get("FNREG_CACHE") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path.home() / ".cache"
    return folder / "fnreg"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _cached(folder: Path, key: str) -> Path | None:
    """A library for `key` that this user, or root, built and nothing has damaged."""
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        with contextlib.suppress(OSError):  # gone in between, or not to be read
            # somebody else's file in a shared cache is not run
            mine = not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)
            if mine and path.stem.endswith(_digest(path.read_bytes())):
                return path
    return None


def compiler() -> str:
    """The command of the C compiler, which may have options; "" where there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or ""


def _command() -> list[str]:
    """That of the compiler in parts; ValueError where it cannot be run."""
    given = compiler()
    if not given:
        raise ValueError("there is no C compiler: install gcc or clang")
    try:
        parts = shlex.split(given)
    except ValueError as problem:
        raise ValueError(f"CC is {given}, which is no command: {problem}") from problem
    if not parts or shutil.which(parts[0]) is None:
        raise ValueError(f"the compiler that CC names, {given}, is not there")
    return parts


def _build(folder: Path, key: str, unit: str) -> Path:
    command = _command()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, built = Path(scratch) / "kernels.c", Path(scratch) / "kernels.so"
        source.write_text(unit, encoding="utf-8")
        command = [*command, *FLAGS, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        target = folder / f"kernels-{key}-{_digest(built.read_bytes())}.so"
        return built.replace(target)  # atomic: two processes may build at once


class KernelWarning(UserWarning):
    """The kernels cannot be had although there is a compiler."""


class Kernels(NamedTuple):
    """The compiled kernels, or None; and where they come from, or why there are none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def kernels() -> Kernels:
    """The compiled kernels as they can be had here; a warning where there is a compiler and they cannot."""
    if os.environ.get("FNREG_NATIVE", "1") == "0":
        return Kernels(None, "switched off by FNREG_NATIVE=0")
    try:
        return _loaded()
    except ValueError as problem:
        return Kernels(None, str(problem))
    except (OSError, subprocess.SubprocessError) as problem:
        told = problem.stderr if isinstance(problem, subprocess.CalledProcessError) else None
        reason = f"{compiler()} could not build them: {problem}"
        reason += f"\n{told.decode(errors='replace').strip()[-1000:]}" if told else ""
    # Not by `notes`: it is told once, of the process, and no note of the pair that happens to be the first.
    told = f"the compiled kernels are not in use, plain torch is slower: {reason}"
    warnings.warn(told, KernelWarning, stacklevel=3)
    return Kernels(None, reason)


def _loaded() -> Kernels:
    unit = _unit()
    key = _digest("\n".join((unit, *FLAGS, _machine(), compiler())).encode())
    try:
        folder = _folder()
        path = _cached(folder, key) or _build(folder, key, unit)
        return Kernels(ctypes.CDLL(str(path)), f"loaded from {path}")
    except (OSError, RuntimeError) as problem:  # a folder that cannot be written, or whose files cannot be loaded
        with tempfile.TemporaryDirectory() as scratch:
            library = ctypes.CDLL(str(_build(Path(scratch), key, unit)))
        return Kernels(library, f"built for this process alone, FNREG_CACHE may name a cache that serves: {problem}")


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    return kernels().library


def serves(*tensors: Tensor, voxels: int) -> bool:
    """Whether the kernels compute with these tensors, of images of so many voxels."""
    alike = all(t.device.type == "cpu" and t.dtype == tensors[0].dtype for t in tensors)
    small = 0 < voxels < 2**31  # offsets within a channel have 32 bits
    known = alike and small and tensors[0].dtype in REALS
    return known and not torch.compiler.is_compiling() and load() is not None


def call(
    kernel: str, dtype: torch.dtype, dimension: int | None, arguments: Sequence[Any], tasks: int, *, each: int = 1
) -> None:
    """Run a kernel, "" or "_spread" and the like, over [0, tasks) of `each` samples in threads.

    dimension : None for the kernels that have none
    arguments : tensors (contiguous) or None, tuples of whole numbers, bool, int and float, and what is of ctypes
    """
    function = getattr(load(), name(dtype, dimension) + kernel)
    given = [_argument(value) for value in arguments]
    parallel(lambda begin, end: function(*given, ctypes.c_int64(begin), ctypes.c_int64(end)), tasks, each)


KINDS: dict[type, Any] = {bool: ctypes.c_int, int: ctypes.c_int64, float: ctypes.c_double}


def _argument(value: Any) -> Any:
    """A value as C takes it."""
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, tuple):
        return (ctypes.c_int64 * len(value))(*value)
    if (kind := KINDS.get(type(value))) is not None:
        return kind(value)
    if isinstance(value, Integral):  # of NumPy
        return ctypes.c_int64(int(value))
    return ctypes.c_double(float(value)) if isinstance(value, Real) else value


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fnreg")


def parallel(call: Callable[[int, int], object], tasks: int, each: int = 1) -> None:
    """Run `call(begin, end)` over [0, tasks) of `each` samples in as many threads as torch uses.

    ctypes releases the lock.
    """
    threads = max(1, min(torch.get_num_threads(), tasks, tasks * each // SPLIT))
    bounds = [tasks * t // threads for t in range(threads + 1)]
    if threads == 1:
        call(0, tasks)
        return
    waiting = [
        _pool(torch.get_num_threads(), os.getpid()).submit(call, a, b) for a, b in itertools.pairwise(bounds[1:])
    ]
    call(bounds[0], bounds[1])
    for future in waiting:
        future.result()
