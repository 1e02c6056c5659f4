"""Mutual information and its like, value and gradient by the warped image, against deepali and dense Parzen windows.

The images are smooth, of float32, and one is a noisy function of the other; all take 32 bins.  deepali's measures take
the whole batch at once, with one range for all; the dense windows are cubic B-splines as fnreg's, N x bins numbers for
each image, and one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from benchmarks.measure import Absent, Options, Table, apart, peak, peer, race
from fnreg.filters import gaussian
from fnreg.losses.information import correlation_ratio, mi, nmi

Case = tuple[int, tuple[int, ...]]  # images, 0 for one without a batch axis, and their shape

BINS = 32
OURS: dict[str, Callable[..., Tensor]] = {
    "fnreg, mi": mi,
    "fnreg, nmi": nmi,
    "fnreg, correlation_ratio": correlation_ratio,
}
WEIGHTED = "fnreg, mi with weights"
DENSE = "dense windows in torch, mi"
PEERS = {"deepali, mi_loss": "mi_loss", "deepali, nmi_loss": "nmi_loss"}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """warped, fixed and weights, (B, 1, *shape) or (1, *shape)."""
    generator = torch.Generator().manual_seed(0)
    lead = (case[0], 1) if case[0] else (1,)
    fixed = torch.randn(*lead, *case[1], generator=generator)
    smooth = vmap(lambda image: gaussian(image, 1.5)) if case[0] else lambda image: gaussian(image, 1.5)
    fixed = smooth(fixed)
    warped = fixed.square() + 0.02 * torch.randn(fixed.shape, generator=generator)
    return warped, fixed, torch.rand(fixed.shape, generator=generator)


def windows(image: Tensor) -> Tensor:
    """Cubic windows (N, bins) of an image."""
    low, high = image.detach().amin(), image.detach().amax()
    place = 1 + (image.reshape(-1, 1) - low) / (high - low) * (BINS - 3)
    away = (place - torch.arange(BINS)).abs()
    near, far = 2 / 3 - away.square() + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, near, far)


def dense(warped: Tensor, fixed: Tensor) -> Tensor:
    """`mi` by matrices of windows."""
    joint = windows(warped).mT @ windows(fixed) / fixed.numel()

    def information(p: Tensor) -> Tensor:
        return (p * torch.log(torch.where(p > 0, p, 1))).sum()

    return information(joint.sum(0)) + information(joint.sum(1)) - information(joint)


def runners(case: Case) -> dict[str, Callable[[], Any]]:
    """What is compared, by name, each a call without arguments."""
    warped, fixed, weights = inputs(case)
    many: Any = vmap if case[0] else lambda function: function

    def ours(measure: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
        function = many(
            grad_and_value(lambda *images: measure(*images, **({} if measure is dense else {"bins": BINS})))
        )
        return lambda: function(*given)

    found = {name: ours(measure, warped, fixed) for name, measure in OURS.items()}
    found |= {WEIGHTED: ours(mi, warped, fixed, weights), DENSE: ours(dense, warped, fixed)}
    try:
        functional = peer("deepali.losses.functional")
    except Absent:
        return found
    leaf = (warped if case[0] else warped[None]).clone().requires_grad_()
    target = fixed if case[0] else fixed[None]

    def theirs(name: str) -> Callable[[], Any]:
        measure = getattr(functional, name)
        options: dict[str, Any] = {"num_bins": BINS, "vmin": float(fixed.min()), "vmax": float(fixed.max())}
        return lambda: torch.autograd.grad(measure(leaf, target, **options), leaf)

    return found | {name: theirs(function) for name, function in PEERS.items()}


def times(case: Case, names: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Nanoseconds per voxel."""
    chosen = {name: function for name, function in runners(case).items() if name in names}
    voxels = max(case[0], 1) * math.prod(case[1])
    return {name: 1e9 * taken / voxels for name, taken in race(chosen, repeats=repeats).items()}


def bytes_per_voxel(make: Callable[[Case], dict[str, Callable[[], Any]]], case: Case, name: str) -> float | None:
    """At the highest, beyond the inputs; after a small warm-up."""
    make((min(case[0], 1), (8,) * len(case[1])))[name]()
    used = peak(make(case)[name])
    return None if used is None else used * 2**20 / max(case[0], 1) / math.prod(case[1])


def memory(case: Case, name: str) -> float | None:
    """`bytes_per_voxel` of a runner."""
    return bytes_per_voxel(runners, case, name)


def cases(options: Options) -> dict[str, Case]:
    """One volume, and many small images, by title."""
    side, many = (48, 64) if options.quick else (96, 1024)
    return {f"{side}^3, one pair": (0, (side,) * 3), f"{many} pairs of 28 x 28, under vmap": (many, (28, 28))}


def run(options: Options) -> list[Table]:
    """One table per case."""
    repeats = 3 if options.quick else 9
    tables: list[Table] = []
    for title, case in cases(options).items():
        names = (*OURS, WEIGHTED, DENSE, *PEERS)
        found = times(case, names, repeats)
        plain = apart(times, case, (*OURS, WEIGHTED), repeats, environment={"FNREG_NATIVE": "0"})
        theirs = found.get("deepali, mi_loss")
        table = Table(title, ("method", "ns per voxel", "times as fast as deepali's mi_loss", "bytes per voxel"))
        for label, part, environment in (("", found, {}), (" without the C kernel", plain, {"FNREG_NATIVE": "0"})):
            for name, taken in part.items():
                used = apart(memory, case, name, environment=environment)
                table.rows.append((name + label, taken, theirs and theirs / taken, used))
        table.notes = (
            f"medians of {repeats} runs in turn after one warm-up; {BINS} bins; an image is 4 bytes per voxel, and the "
            "gradient, which all of them give, as much again",
        )
        tables.append(table)
    return tables
