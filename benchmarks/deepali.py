"""deepali's own loop, as its tutorial runs it: what several benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.measure import peer


class Registered(NamedTuple):
    """deepali's transform, fitted, and the finest images of its own pyramid, whose grid differs from the input's."""

    transform: Any
    target: torch.Tensor  # (1, Y, X)
    source: torch.Tensor


def registered(
    make: Callable[[Any], Any],
    fixed: torch.Tensor,
    moving: torch.Tensor,
    steps: Sequence[int],
    penalty: Callable[[Any], torch.Tensor] | None = None,
) -> Registered:
    """One pair (1, Y, X) of spacing 1 by mean squares, with Adam at rate 1e-2 anew on each level.

    make : the transform on a grid of deepali's; steps : per level, coarse to fine; penalty : of the transform
    """
    core, data, spatial = peer("deepali.core"), peer("deepali.data"), peer("deepali.spatial")
    grid = core.Grid(shape=fixed.shape[1:], origin=(0.0, 0.0))
    targets, sources = (data.Image(image, grid).pyramid(len(steps)) for image in (fixed, moving))
    transform = make(targets[len(steps) - 1].grid())
    for level, count in zip(reversed(range(len(steps))), steps, strict=True):
        transform.grid_(targets[level].grid())
        target, source = targets[level].batch().tensor(), sources[level].batch().tensor()
        transformer = spatial.ImageTransformer(transform)
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        for _ in range(count):
            loss = torch.nn.functional.mse_loss(transformer(source), target)
            if penalty is not None:
                loss = loss + penalty(transform)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Registered(transform, targets[0].tensor(), sources[0].tensor())


def displacement(transform: Any) -> torch.Tensor:
    """The displacement (D, [Z,] Y, X) in voxels: deepali's cube reaches from the first voxel to the last."""
    with torch.no_grad():
        found = transform.update().tensor()[0]
    half = (torch.tensor(found.shape[:0:-1]) - 1) / 2
    return found * half.reshape(-1, *(1,) * (found.ndim - 1))
