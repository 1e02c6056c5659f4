"""The images that the benchmarks run on, from the data folder: FNREG_DATA, else beside the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Absent, peer
from fnreg import Grid, Image

SIDE = 28


def folder(name: str) -> Path:
    """A set of the data folder, or `Absent`."""
    named = os.environ.get("FNREG_DATA")
    path = (Path(named) if named else Path(__file__).parents[2] / "shared" / "data") / name
    if not path.is_dir():
        raise Absent(f"no data set {name!r}: let FNREG_DATA name the folder that holds it")
    return path


def digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's test split: images (10000, 28, 28) in [0, 1] and their labels."""
    with np.load(folder("mnist") / "mnist_t10k.npz") as archive:
        return archive["images"].astype(np.float32) / 255, archive["labels"]


def same_digit_pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving images (count, 28, 28): of each pair the labels are equal and the images differ."""
    images, labels = digits()
    generator = np.random.default_rng(seed)
    members = {digit: np.flatnonzero(labels == digit) for digit in range(10)}
    chosen = [generator.choice(members[digit], 2, replace=False) for digit in generator.integers(0, 10, count)]
    first, second = np.array(chosen).T
    return images[first], images[second]


def batch(arrays: np.ndarray, **geometry: Any) -> Image:
    """Images (B, [Z,] Y, X) as one batch on one grid."""
    return Image(torch.from_numpy(np.ascontiguousarray(arrays[:, None])), Grid(shape=arrays.shape[1:], **geometry))


def slice_image(name: str) -> Image:
    """A brain slice of `itk_slices`: 8-bit grey, 1 mm, its origin at the centre of the first pixel."""
    pillow = peer("PIL.Image")
    with pillow.open(folder("itk_slices") / name) as picture:
        return Image.from_array(np.array(picture.convert("L"), dtype=np.float32))


def brain_path(name: str) -> Path:
    """A file of `nirep`."""
    return folder("nirep") / f"{name}.nii.gz"


def volume(path: Path) -> Image:
    """A NIfTI file in LPS world coordinates."""
    read = peer("nibabel").load(path)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ read.affine  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    values = np.ascontiguousarray(np.asarray(read.dataobj, dtype=np.float32).transpose(2, 1, 0))
    return Image.from_array(values, spacing=spacing, origin=affine[:3, 3], direction=affine[:3, :3] / spacing)


def brain(name: str) -> Image:
    """A volume of `nirep` in LPS world coordinates."""
    return volume(brain_path(name))
