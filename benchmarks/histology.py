"""Ten pairs of lung sections in five stains: how far do the landmarks end from each other, beside published results?

All pairs of five consecutive sections (H&E, CD31, Cc10, Ki67, proSPC) in grey, in one batch: rigid by local
correlation from 24 rotations on pixels of 8, affine on pixels of 4, and a smooth flow after which the affine map acts.
Every section is resampled onto one grid of the common world, its own pixels, so the landmarks stay as they are.

rTRE is |T(fixed landmark) - moving landmark| / diagonal of the fixed image, over 78 landmarks for each pair.  The
landmarks themselves agree under the best affine map, which is fitted to them, only as far as its row says.
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import folder
from benchmarks.measure import Options, Table, peer
from fnreg import SVFFD, Affine, Grid, Image, Mapping, Registration, Rigid, bending, lncc, register
from fnreg.filters import FWHM

SECTIONS = ("CD31-3", "Cc10-5", "He", "Ki67-7", "proSPC-4")
STARTS = 24
LOCAL = lncc(radius=4)
FLOW = SVFFD(stride=32)


def section(name: str) -> tuple[Image, Tensor]:
    """One stain as grey values 0..1, pixels of unit 1, and its landmarks (78, 2)."""
    pillow = peer("PIL.Image")
    path = folder("histology") / "lung-lesion_1" / f"29-041-Izd2-w35-{name}-les1.png"
    with pillow.open(path) as picture:
        image = Image.from_array(np.array(picture.convert("L"), dtype=np.float32) / 255)
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = [(float(row["X"]), float(row["Y"])) for row in csv.DictReader(file)]
    return image, torch.tensor(rows, dtype=torch.float64)


def resampled(images: Sequence[Image], spacing: float) -> Tensor:
    """All images (B, 1, Y, X) as smooth as pixels of this width are wide, on one grid; see `shared_grid`."""
    grid = shared_grid(images, spacing)
    sigma = math.sqrt(spacing**2 - 1) / FWHM
    return torch.stack([image.gaussian(sigma).resample(grid).data for image in images])


def shared_grid(images: Sequence[Image], spacing: float) -> Grid:
    """Pixels of a width over what the smallest of the images covers from the common origin."""
    size = [min(image.grid.size[axis] for image in images) for axis in (0, 1)]
    return Grid([int(n / spacing) for n in size], spacing=spacing, origin=(spacing / 2 - 0.5,) * 2)


def pairs_of(images: Sequence[Image], pairs: Sequence[tuple[int, int]], spacing: float) -> tuple[Image, Image]:
    """Fixed and moving images as batches."""
    data, grid = resampled(images, spacing), shared_grid(images, spacing)
    fixed, moving = torch.tensor(pairs).T
    return Image(data[fixed], grid), Image(data[moving], grid)


def fitted(fixed: Tensor, moving: Tensor) -> Tensor:
    """What the affine map that fits landmarks (B, N, 2) best leaves of their distances (B, N)."""
    known = torch.cat([fixed, torch.ones_like(fixed[..., :1])], -1)
    return (known @ torch.linalg.lstsq(known, moving).solution - moving).norm(dim=-1)


def published(methods: Sequence[str]) -> list[tuple[str, float, float, float, float | None]]:
    """Per method the mean and largest of the pairs' medians, the mean of their means, the seconds of a pair."""
    with (folder("histology") / "peer_results_BIRL_CIMA.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["scope"] == "10k" and row["rTRE_median"]]
    found: list[tuple[str, float, float, float, float | None]] = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        medians, means = ([float(row[f"rTRE_{kind}"]) for row in own] for kind in ("median", "mean"))
        minutes = np.mean([float(row["norm_time_min"]) for row in own])
        told = f"{method}, published, {len(own)} pairs"
        found.append((told, float(np.mean(medians)), max(medians), float(np.mean(means)), 60 * float(minutes)))
    return found


def run(options: Options) -> list[Table]:
    """One table: nothing, the three stages, the best affine map, published results."""
    sections = [section(name) for name in SECTIONS]
    pairs = list(itertools.combinations(range(len(SECTIONS)), 2))[: 3 if options.quick else None]
    images = [image for image, _ in sections]
    points = torch.stack([landmarks for _, landmarks in sections])
    first, second = (points[list(part)] for part in zip(*pairs, strict=True))
    diagonal = torch.tensor([math.hypot(*images[fixed].grid.size) for fixed, _ in pairs]).unsqueeze(1)
    columns = ("method", "mean of median rTRE", "largest median", "mean of mean rTRE", "seconds per pair")
    table = Table(f"{len(pairs)} pairs of sections", columns)

    def add(name: str, away: Tensor, taken: float | None = None) -> None:
        part = away / diagonal
        medians = part.median(1).values
        table.rows.append((name, float(medians.mean()), float(medians.max()), float(part.mean()), taken))

    def judged(name: str, found: Registration, begin: float) -> Mapping:
        add(name, (found.map_points(first) - second).norm(dim=-1), (time.perf_counter() - begin) / len(pairs))
        return found.mapping

    add("none", (first - second).norm(dim=-1))
    given: dict[str, Any] = {"objective": LOCAL, "levels": 3, "steps": (100, 50, 20)}
    begin = time.perf_counter()
    fixed, moving = pairs_of(images, pairs, 8)
    rigid = register(fixed, moving, Rigid(), starts=Rigid().spread(fixed.grid, count=STARTS), **given)
    mapping = judged(f"fnreg Rigid from {STARTS} rotations", rigid, begin)
    fixed, moving = pairs_of(images, pairs, 4)
    affine = register(fixed, moving, Affine(), objective=LOCAL, levels=2, steps=(50, 30), initial=mapping)
    mapping = judged("fnreg and Affine", affine, begin)
    given |= {"objective": LOCAL + bending, "steps": (60, 40, 20)}
    judged(f"fnreg and {FLOW}", register(fixed, moving, FLOW, then=mapping, **given), begin)
    add("the affine map that fits the landmarks best", fitted(first, second))
    table.rows += published(("DROP", "ANTs", "Elastix"))
    threads = torch.get_num_threads()
    table.notes = (
        f"{threads} threads; the batch's seconds from its first image on, over its pairs; published results are of "
        "larger images, their times of other machines",
    )
    return [table]
