"""Files and starts: wall time of the command line's help, of imports, of NIfTI read and written, and memory.

nibabel and SimpleITK make the same array of float32 as fnreg does.  Files are in the cache of the system: what is
measured is the work, not the disk.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Options, Table, apart, peak, peer, race
from fnreg import Grid, Image, io, linear_mapping, warp

KINDS = {"int16": torch.int16, "float32": torch.float32}


def scan(side: int) -> Image:
    """Smooth anatomy with noise in whole numbers, as a scanner stores them: about half of it compresses away."""
    generator = torch.Generator().manual_seed(0)
    grid = Grid((side,) * 3, spacing=(1.0, 1.0, 1.2), origin=(-120.0, -130.0, -80.0))
    axis = torch.linspace(-1, 1, side)
    far = axis.square()[:, None, None] + axis.square()[:, None] + axis.square()
    noise = torch.randn(side, side, side, generator=generator)
    values = (far < 0.7) * (600 + 300 * torch.cos(9 * far) + 12 * noise)
    return Image(values.round().clamp(min=0)[None], grid)


def starts(repeats: int) -> Table:
    """Processes from their start to their end."""

    def process(*arguments: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    runners = {
        "python -c pass": process("-c", "pass"),
        "fnreg --help": process("-m", "fnreg", "--help"),
        "import fnreg": process("-c", "import fnreg"),
        "import torch": process("-c", "import torch"),
        "import fnreg; fnreg.register": process("-c", "import fnreg; fnreg.register"),
    }
    times = race(runners, repeats=repeats)
    bare = times["python -c pass"]
    rows = [(name, taken, taken - bare) for name, taken in times.items()]
    return Table("Processes", ("process", "seconds", "beyond Python's own start"), rows)


def speed(folder: Path, side: int, repeats: int) -> list[Table]:
    """Reading and writing, each against SimpleITK alone and nibabel."""
    nibabel, sitk = peer("nibabel"), peer("SimpleITK")
    image = scan(side)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.grid.affine.numpy()
    reading, writing = ([(name, kind) for kind in KINDS for name in (".nii", ".nii.gz")] for _ in range(2))
    columns = ("file", "MiB", "fnreg", "nibabel", "SimpleITK", "times nibabel", "times SimpleITK")
    read, wrote = (Table(f"Seconds to {what} {side}³", columns) for what in ("read", "write"))
    for end, kind in reading:
        path = folder / f"scan-{kind}{end}"
        io.write_image(path, image, dtype=KINDS[kind])
        times = race(
            {
                "fnreg": lambda path=path: io.read_image(path),
                "nibabel": lambda path=path: np.array(nibabel.load(path).dataobj, np.float32),
                "SimpleITK": lambda path=path: sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32)),
            },
            repeats=repeats,
        )
        read.rows.append(_row(path, times))
    for end, kind in writing:
        array = image.data[0].numpy().astype(kind)
        theirs = sitk.GetImageFromArray(array)
        place = str(folder / f"written{end}")
        times = race(
            {
                "fnreg": lambda place=place, kind=kind: io.write_image(place, image, dtype=KINDS[kind]),
                "nibabel": lambda place=place, a=array: nibabel.save(nibabel.Nifti1Image(a.T, affine), place),
                "SimpleITK": lambda p=place, im=theirs: sitk.WriteImage(im, p, p.endswith(".gz")),
            },
            repeats=max(1, repeats // 2),
        )
        io.write_image(place, image, dtype=KINDS[kind])
        wrote.rows.append(_row(Path(place), times, kind))
    read.notes = ("fnreg checks the whole stream and the header against each other; the others do not",)
    wrote.notes = ("fnreg writes to a temporary name, waits for the disk, and then renames; the others do not",)
    return [read, wrote]


def _row(path: Path, times: dict[str, float], kind: str = "") -> tuple[Any, ...]:
    name = f"{path.name} {kind}".strip()
    ratios = (times["fnreg"] / times[other] for other in ("nibabel", "SimpleITK"))
    return (name, path.stat().st_size / 2**20, *times.values(), *ratios)


def reading_memory(path: str) -> float | None:
    """MiB at most beyond what was in use before, while an image is read."""
    small = io.read_image(path)  # what imports take does not count
    del small
    return peak(lambda: io.read_image(path))


def warping_memory(path: str) -> float | None:
    """The same while it is warped by an affine map; the image itself is there before."""
    image = io.read_image(path)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 1], matrix[:3, 3] = 0.02, 3.0
    mapping = linear_mapping(matrix, image.grid)
    warp(image, mapping)
    return peak(lambda: warp(image, mapping))


def applying_memory(path: str, folder: str) -> float | None:
    """MiB at most of a whole process of `fnreg apply`; None where there is no such command."""
    image = io.read_image(path)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 1], matrix[:3, 3] = 0.02, 3.0
    io.write_transform(f"{folder}/t.safetensors", linear_mapping(matrix, image.grid))
    command = [sys.executable, "-m", "fnreg", "apply"]
    if subprocess.run([*command, "--help"], capture_output=True, check=False).returncode:
        return None
    out = [path, f"{folder}/t.safetensors", "--like", path, "-o", f"{folder}/applied.nii"]
    subprocess.run([*command, *out], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10


def memory(folder: Path, side: int) -> Table:
    """Each in a process of its own."""
    inside = side**3 * 4 / 2**20
    rows: list[tuple[Any, ...]] = []
    for end in (".nii", ".nii.gz"):
        for kind in KINDS:
            used = apart(reading_memory, str(folder / f"scan-{kind}{end}"))
            rows.append((f"read {kind}{end}", used, None if used is None else used / inside))
    source = str(folder / "scan-float32.nii")
    used = apart(warping_memory, source)
    rows.append(("warp, the moving image in memory", used, None if used is None else used / inside))
    used = apart(applying_memory, source, str(folder))
    rows.append(("fnreg apply, the whole process", used, None if used is None else used / inside))
    table = Table(f"Memory, {side}³, {inside:.0f} MiB as float32", ("what", "MiB at most", "times the image"), rows)
    table.notes = ("beyond what is in use before, the result included; of a process all that it takes, torch with it",)
    return table


def run(options: Options) -> list[Table]:
    """Four tables."""
    side, repeats = (64, 3) if options.quick else (256, 5)
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # memory, so that no disk is measured
    with tempfile.TemporaryDirectory(dir=room) as scratch:
        tables = [starts(repeats), *speed(Path(scratch), side, repeats), memory(Path(scratch), side)]
    return tables
