"""ANTs on files, where `antspyx` is installed: affine and deformable registration, and labels carried along."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import peer

SYN: dict[str, Any] = {"type_of_transform": "SyN"}  # Mattes, 40x20x0, its default
CORRELATION: dict[str, Any] = SYN | {"syn_metric": "CC", "syn_sampling": 2, "reg_iterations": (100, 50, 10)}


class Found(NamedTuple):
    """Labels (Z, Y, X) on the fixed grid, and the determinant of the map there."""

    seconds: float
    labels: torch.Tensor
    determinant: torch.Tensor


def register(fixed: Path, moving: Path, labels: Path, threads: int, **settings: Any) -> Found:
    """Seconds from reading the images to the warped image; nothing of the labels is in them."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    tool = peer("ants")
    begin = time.perf_counter()
    images = [tool.image_read(str(path)) for path in (fixed, moving)]
    result = tool.registration(*images, **settings)
    seconds = time.perf_counter() - begin
    known = tool.image_read(str(labels))
    warped = tool.apply_transforms(images[0], known, result["fwdtransforms"], interpolator="nearestNeighbor")
    dense = tool.create_jacobian_determinant_image(images[0], result["fwdtransforms"][0], False, False)
    for path in {*result["fwdtransforms"], *result["invtransforms"]}:
        Path(path).unlink(missing_ok=True)
    turned = (torch.from_numpy(image.numpy().transpose(2, 1, 0).copy()) for image in (warped, dense))
    return Found(seconds, *turned)
