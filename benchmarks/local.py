"""Correlation in windows (LNCC), value and gradient by the warped image, against deepali: one volume, many images.

Windows of 7 voxels a side; the images are smooth and of float32.  deepali's measure takes the whole batch at once; its
windows are convolutions with zeros beyond the image, fnreg's count the voxels that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad_and_value, vmap

from benchmarks.information import Case, bytes_per_voxel, cases, inputs
from benchmarks.measure import Absent, Options, Table, apart, peer, race
from fnreg.losses.local import lncc

RADIUS = 3


def runners(case: Case) -> dict[str, Callable[[], Any]]:
    """What is compared, by name, each a call without arguments."""
    warped, fixed, weights = inputs(case)
    many: Any = vmap if case[0] else lambda function: function
    plain = many(grad_and_value(lambda a, b: lncc(a, b, radius=RADIUS)))
    weighted = many(grad_and_value(lambda a, b, w: lncc(a, b, w, radius=RADIUS)))
    found: dict[str, Callable[[], Any]] = {
        "fnreg, lncc": lambda: plain(warped, fixed),
        "fnreg, lncc with weights": lambda: weighted(warped, fixed, weights),
    }
    try:
        functional = peer("deepali.losses.functional")
    except Absent:
        return found
    leaf = (warped if case[0] else warped[None]).clone().requires_grad_()
    target = fixed if case[0] else fixed[None]
    size = 2 * RADIUS + 1
    return found | {
        "deepali, lcc_loss": lambda: torch.autograd.grad(functional.lcc_loss(leaf, target, kernel_size=size), leaf)
    }


def memory(case: Case, name: str) -> float | None:
    """`bytes_per_voxel` of a runner."""
    return bytes_per_voxel(runners, case, name)


def run(options: Options) -> list[Table]:
    """One table per case."""
    repeats = 3 if options.quick else 9
    tables: list[Table] = []
    for title, case in cases(options).items():
        voxels = max(case[0], 1) * math.prod(case[1])
        found = {name: 1e9 * taken / voxels for name, taken in race(runners(case), repeats=repeats).items()}
        theirs = found.get("deepali, lcc_loss")
        table = Table(title, ("method", "ns per voxel", "times as fast as deepali", "bytes per voxel"))
        for name, taken in found.items():
            table.rows.append((name, taken, theirs and theirs / taken, apart(memory, case, name)))
        tables.append(table)
    return tables
