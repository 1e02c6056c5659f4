"""The cache of compiled kernels: every fault ends in the plain path, none in a crash."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fnreg
from fnreg import adam, native, notes
from fnreg.sampling import sample

compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
QUICK = tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS)  # builds ten times sooner
needs_compiler = pytest.mark.skipif(compiler is None, reason="needs a C compiler")


def kernels() -> native.Kernels:
    """`native.kernels` without its memory of the first call."""
    return native.kernels.__wrapped__()


def load() -> ctypes.CDLL | None:
    return kernels().library


def works(library: ctypes.CDLL | None) -> bool:
    """Interpolates half way between two voxels of an image (1, 2) with the kernel for float64 in 1-D."""
    if library is None:
        return False
    data, coords = (ctypes.c_double * 2)(1.0, 3.0), (ctypes.c_double * 1)(0.25)
    value, gradient, inside = ((ctypes.c_double * 1)() for _ in range(3))
    counts = [ctypes.c_int64(1)] * 4
    kernel = getattr(library, native.name(torch.float64, 1))
    options = ctypes.c_int(0), ctypes.c_double(0), ctypes.c_double(1e-9)
    bounds = ctypes.c_int64(0), ctypes.c_int64(1)
    kernel(data, coords, value, gradient, inside, (ctypes.c_int64 * 1)(2), *counts, *options, *bounds)
    return (value[0], gradient[0], inside[0]) == (1.5, 2.0, 1.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the kernels."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FNREG_CACHE", str(folder))
        patch.delenv("FNREG_NATIVE", raising=False)
        patch.setattr(native, "FLAGS", QUICK)
        assert works(load())
    yield folder


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, in use."""
    shutil.copytree(built / "fnreg", tmp_path / "fnreg")
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.delenv("FNREG_NATIVE", raising=False)
    monkeypatch.setattr(native, "FLAGS", QUICK)
    return tmp_path / "fnreg"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that have been run."""
    seen: list[list[str]] = []
    run = subprocess.run

    def recorded(command: list[str], **options: Any) -> Any:
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(native.subprocess, "run", recorded)
    return seen


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


# -- the cache -------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_second_process_takes_what_is_built(cache: Path, builds: list[list[str]]) -> None:
    before = only(cache).stat()
    assert works(load())
    assert builds == []
    assert only(cache).stat().st_mtime_ns == before.st_mtime_ns


@needs_compiler
def test_every_kernel_is_there(built: Path) -> None:
    library = ctypes.CDLL(str(only(built / "fnreg")))
    names = [native.name(dtype, d) for dtype in (torch.float32, torch.float64) for d in (1, 2, 3)]
    assert len(set(names)) == 6 and all(hasattr(library, name) for name in names)
    assert not hasattr(library, "linear_float_4")


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    broken = {
        "empty": b"",
        "half": content[:half],
        "text": b"not a library",
        "bit": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "longer": content + b"\0",
    }[kind]
    path.write_bytes(broken)


@needs_compiler
@pytest.mark.parametrize("kind", ["empty", "half", "text", "bit", "longer"])
def test_a_damaged_file_is_built_anew(cache: Path, builds: list[list[str]], kind: str) -> None:
    damage(only(cache), kind)
    assert works(load())
    assert len(builds) == 1
    assert works(load()) and len(builds) == 1  # what was built serves from now on


@needs_compiler
def test_a_damaged_file_is_not_loaded_where_nothing_can_be_built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(native.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(native, "_build", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    damage(only(cache), "half")
    with pytest.warns(UserWarning, match="not in use, plain torch is slower: .* No space left on device"):
        assert load() is None
    assert loaded == []


@needs_compiler
def test_another_source_is_another_file(cache: Path, builds: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    unit = native._unit()
    monkeypatch.setattr(native, "_unit", lambda: unit + "\n/* changed */\n")
    assert works(load())
    assert len(builds) == 1 and len(list(cache.iterdir())) == 2


@needs_compiler
def test_another_processor_is_another_file(
    cache: Path, builds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_machine", lambda: "another")
    assert works(load())
    assert len(builds) == 1


@needs_compiler
def test_a_file_of_another_user_is_not_run(
    cache: Path, builds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = only(cache)
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(native.os, "getuid", lambda: 12345)
        monkeypatch.setattr(native, "_build", lambda *_: (_ for _ in ()).throw(ValueError))
        assert load() is None
        return
    assert works(load())
    assert len(builds) == 1


@needs_compiler
def test_a_link_that_dangles_is_no_crash(cache: Path) -> None:
    path = only(cache)
    path.unlink()
    path.symlink_to(cache / "nowhere")
    assert works(load())


# -- what cannot be had ----------------------------------------------------------------------------------------


def test_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.setenv("FNREG_NATIVE", "0")
    assert kernels() == (None, "switched off by FNREG_NATIVE=0")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.delenv("FNREG_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert kernels() == (None, "there is no C compiler: install gcc or clang")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("no-such-compiler -O2", "the compiler that CC names, no-such-compiler -O2, is not there"),
        ("'unbalanced", "CC is 'unbalanced, which is no command: No closing quotation"),
        ("/", "the compiler that CC names, /, is not there"),
        ("false", "false could not build them: .* returned non-zero exit status 1"),
        ("sh -c 'echo it is broken >&2; exit 3'", r"could not build them: [^\n]*status 3\S*\nit is broken"),
    ],
)
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, told: str) -> None:
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.delenv("FNREG_NATIVE", raising=False)
    monkeypatch.setenv("CC", command)
    with pytest.warns(UserWarning, match=told) if "could not" in told else nullcontext():
        found = kernels()
    assert found.library is None and re.search(told, found.reason)
    assert not (tmp_path / "fnreg").exists() or list((tmp_path / "fnreg").iterdir()) == []  # and nothing is left


def test_the_warning_is_no_note_of_who_is_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is told once in a process, so a pair whose notes had it would differ from all others."""
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.delenv("FNREG_NATIVE", raising=False)
    monkeypatch.setenv("CC", "false")
    with pytest.warns(native.KernelWarning, match="not in use"), notes.hearing() as heard:
        assert load() is None
    assert heard == []


@needs_compiler
def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(command: list[str], **options: Any) -> None:
        assert options["timeout"] <= 300
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.setattr(native.subprocess, "run", hangs)
    with pytest.warns(UserWarning, match="timed out after 120 seconds"):
        assert load() is None


@needs_compiler
def test_the_compiler_may_be_a_command_with_options(
    cache: Path, builds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", f"{shlex.quote(str(compiler))} -Wall")
    assert works(load())
    assert builds[0][:2] == [compiler, "-Wall"]


@needs_compiler
def test_a_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Permissions do not stop root, but no user makes a folder below a file."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(native.tempfile, "tempdir", None)
    monkeypatch.setattr(native, "FLAGS", QUICK)
    found = kernels()
    assert works(found.library)
    assert "built for this process alone" in found.reason and "Not a directory" in found.reason
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", QUICK)
    assert works(load())


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FNREG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert native._folder() == tmp_path / "home" / ".cache" / "fnreg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native._folder() == tmp_path / "xdg" / "fnreg"
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path / "own"))
    assert native._folder() == tmp_path / "own" / "fnreg"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FNREG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native.Path, "home", staticmethod(homeless))
    monkeypatch.setattr(native, "FLAGS", QUICK)
    found = kernels()
    assert (found.library is None) == (compiler is None)
    assert compiler is None or "Could not determine home directory" in found.reason


def test_a_process_without_kernels_samples_the_same(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from fnreg import native; from fnreg.sampling import sample;"
        "data, coords, path = torch.load(sys.argv[1]); assert native.load() is None;"
        "torch.save(tuple(sample(data, coords)), path)"
    )
    data, coords = torch.rand(2, 5, 6, 7, dtype=torch.float64), 12 * torch.rand(3, 500, dtype=torch.float64) - 3
    coords[:, ::5] = coords[:, ::5].round()
    coords[0, 7] = torch.nan
    torch.save((data, coords, str(tmp_path / "result")), tmp_path / "input")
    told = {"FNREG_NATIVE": "0", "PYTHONPATH": os.pathsep.join([str(Path(fnreg.__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "input")],
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for found, expected in zip(torch.load(tmp_path / "result"), sample(data, coords), strict=True):
        assert_close(found, expected, rtol=0, atol=1e-13, equal_nan=True)


KERNELS = """
import torch, fnreg as f
from fnreg import native
from fnreg.pytree import stack

def blob(x):
    grid = f.Grid((13, 12, 11), device="cpu")
    away = grid.points() - torch.tensor([x, 6.0, 5.0], dtype=torch.float64, device="cpu")
    return f.Image(torch.exp(-away.square().sum(1) / 18).reshape(1, *grid.shape), grid)

def masked(image):
    return f.Subject(image, (image.data > 0.1).double())

def found():
    pairs = stack([blob(6.0), blob(6.5)]), stack([blob(7.0), blob(6.1)])
    one, other = blob(6.0), blob(7.0)
    ways = [
        (f.Rigid(), f.mse, {"solver": f.GaussNewton()}),
        (f.SVF(), f.mse + 0.1 * f.inverse_consistency, {"symmetric": True}),
        (f.SVFFD(4), f.mi(samples=900), {"start": "header"}),
        (f.Displacement(), f.mse + 0.1 * f.diffusion, {"solver": f.LBFGS()}),
    ]
    stiff = f.mse + f.bending + f.diffusion
    result = f.register(one, other, f.FFD(4), objective=stiff, levels=1, steps=20)
    f.laplace(one, other, result, objective=stiff, dense=False)
    f.ensemble(one, other, f.Rigid(), count=2, levels=1, steps=1, scatter=0.1, noise=0.01)
    for transform, objective, options in ways:
        yield f.register(one, other, transform, objective=objective, levels=2, steps=2, stop=None, **options)
    yield f.register(*pairs, f.FFD(4), objective=f.lncc + 0.01 * f.bending, levels=2, steps=2)
    yield f.register(masked(one), masked(other), f.Diffeomorphism(), objective=f.lncc, levels=1, steps=2)

assert native.load() is not None
torch.set_default_device("meta")
there = [(result.mapping.displacement(), result.value) for result in found()]
torch.set_default_device("cpu")
for (field, value), result in zip(there, found(), strict=True):
    assert torch.equal(field, result.mapping.displacement()) and torch.equal(value, result.value)
"""


@needs_compiler
def test_the_kernels_never_write_into_tensors_of_another_default_device() -> None:
    """Of a device without memory they would get null pointers, and the process would end."""
    told = {"PYTHONPATH": os.pathsep.join([str(Path(fnreg.__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], env=os.environ | told, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# -- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, ctypes.c_int),
        (7, ctypes.c_int64),
        (np.int32(7), ctypes.c_int64),
        (0.5, ctypes.c_double),
        (np.float64(0.5), ctypes.c_double),
        (np.float32(0.5), ctypes.c_double),
    ],
)
def test_numbers_of_numpy_are_numbers(value: Any, kind: Any) -> None:
    found = native._argument(value)
    assert type(found) is kind and found.value == value


def test_an_optimizer_takes_numbers_of_numpy() -> None:
    step = {"x": torch.linspace(-1, 1, 6).reshape(2, 3)}
    found, expected = (
        made.update(step, made.init(step), 0.0)[0]["x"]
        for made in (adam(np.float64(0.3), b1=np.float64(0.9), eps=np.float32(0.0)), adam(0.3, b1=0.9, eps=0.0))
    )
    assert torch.equal(found, expected)


# -- threads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For the kernel alone: torch's own threads would wait for each other where the cores are busy."""
    with mock.patch.object(native.torch, "get_num_threads", lambda: 2):
        yield


@pytest.mark.parametrize("samples", [0, 1, native.SPLIT, 2 * native.SPLIT - 1, 2 * native.SPLIT, 100_003])
def test_every_sample_is_done_once(two_threads: None, samples: int) -> None:
    done: list[tuple[int, int, int]] = []
    native.parallel(lambda begin, end: done.append((begin, end, threading.get_ident())), samples)
    done.sort()
    assert len(done) == (2 if samples >= 2 * native.SPLIT else 1)
    assert done[0][0] == 0 and done[-1][1] == samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(done))
    assert len({thread for *_, thread in done}) == len(done)
    assert threading.get_ident() in {thread for *_, thread in done}


@pytest.mark.parametrize("part", [0, 1])
def test_an_error_in_a_thread_is_seen(two_threads: None, part: int) -> None:
    def fails(begin: int, end: int) -> None:
        if (begin > 0) == (part == 1):
            raise ArithmeticError(f"{begin} to {end}")

    with pytest.raises(ArithmeticError):
        native.parallel(fails, 4 * native.SPLIT)
