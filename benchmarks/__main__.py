"""`python -m benchmarks [names...] [--quick] [--device cuda] [--json FILE]`: one table or more per benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import fnreg
from benchmarks.measure import Absent, Options, Table

NAMES = (
    "sampling",
    "information",
    "local",
    "rigid_batch",
    "deformable_batch",
    "fields",
    "circle_to_c",
    "capture",
    "affine_gauss_newton",
    "itk_slices",
    "files",
    "growth",
    "adjoint",
    "sweeps",
    "learning",
    "brain_affine",
    "brain_deformable",
    "brain_race",
    "brain_starts",
    "hippocampus",
    "templates3d",
    "multimodal3d_spm",
    "stereo_flow",
    "ants2d",
    "histology",
    "ct_head2d",
    "data_sets",
    "data_sets_ray",
    "early_stopping",
    "ragged",
    "second_order",
    "house",
    "soak",
    "uncertainty",
)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "fnreg": fnreg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Run the benchmarks named on the command line, all where none is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats: to see that all works")
    parser.add_argument("--device", default="cpu", help="where `growth` runs: cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    given = parser.parse_args()
    for name in given.names:
        if name not in NAMES:
            parser.error(f"unknown benchmark {name!r}: choose from {', '.join(NAMES)}")
    options = Options(quick=given.quick, device=given.device)
    told = machine()
    print(", ".join(f"{key} {value}" for key, value in told.items() if value is not None))
    if given.quick:
        print("quick: sizes are small and repeats few, so times say little")
    written: dict[str, Any] = {"machine": told, "options": dataclasses.asdict(options), "benchmarks": {}}
    for name in given.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        begin = time.perf_counter()
        print(f"\n## {name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        try:
            tables: list[Table] = module.run(options)
        except Absent as reason:
            print(f"\nskipped: {reason}")
            written["benchmarks"][name] = {"skipped": str(reason)}
            continue
        for table in tables:
            print(table)
        print(f"\n({time.perf_counter() - begin:.0f} s, load {os.getloadavg()[0]:.1f} at the end)", flush=True)
        written["benchmarks"][name] = {"tables": [dataclasses.asdict(table) for table in tables]}
    if given.json:
        given.json.write_text(json.dumps(written, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
