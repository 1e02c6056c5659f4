"""Accuracy on brain slices with known transforms, beside the answers that ITK publishes.

Truth and ITK's answers are in the data set.  Angle and scale are those of the map's matrix A, the translation is
A c + b - c about c = (110.5, 128.5); TRE is the distance between where a map and the truth take the pixels of the
head.  Two of the four truths are exact (the shift, and 10 degrees with (13, 16)), two were fitted.
"""

from __future__ import annotations

import csv
import json
import math
import re
import time

import torch
from torch import Tensor

from benchmarks.images import folder, slice_image
from benchmarks.measure import Options, Table
from fnreg import GaussNewton, Image, Rigid, Similarity, Translation, register

PREFIX = "BrainProtonDensitySlice"
CASES = {
    "Shifted13x17y": (Translation(), True),
    "Rotated10": (Rigid(), False),
    "R10X13Y17": (Rigid(), True),
    "R10X13Y17S12": (Similarity(), False),
}
CENTER = (110.5, 128.5)
MOMENTS = (111.204, 131.591)  # the fixed image's centre of mass, about which some of ITK's examples turn
SETTINGS = {  # four levels: the shift of 21 mm is out of reach for Gauss-Newton from the third, 4 mm pixels
    "Gauss-Newton": {"solver": GaussNewton(), "levels": 4},
    "Adam": {"levels": 4},
}


def _world(linear: list[list[float]] | Tensor, offset: list[float] | Tensor) -> Tensor:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2], matrix[:2, 2] = torch.as_tensor(linear), torch.as_tensor(offset)
    return matrix


def _about(center: tuple[float, float], angle: float, scale: float, shift: list[float]) -> Tensor:
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    middle = torch.tensor(center, dtype=torch.float64)
    return _world(linear, middle + torch.tensor(shift, dtype=torch.float64) - linear @ middle)


def published(method: str, result: str) -> Tensor:
    """The world matrix of one of ITK's printed results."""
    found: dict[str, list[float]] = {}
    for name, value in re.findall(r"(\w+)=([^;]+)", result):
        found[name] = [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", value)]
    rows = [found["matrix"][:2], found["matrix"][2:]] if "matrix" in found else None
    if rows and "offset" in found:
        return _world(rows, found["offset"])
    angle = found.get("angle", [0.0])[0]
    angle = math.radians(angle) if "deg" in result else angle
    shift = found["t"] if "t" in found else [*found["tx"], *found["ty"]]
    center = CENTER if "110.5" in method or "translation" in method else MOMENTS
    if rows:
        middle, linear = torch.tensor(center, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
        return _world(linear, middle + torch.tensor(shift, dtype=torch.float64) - linear @ middle)
    return _about(center, angle, found.get("scale", [1.0])[0], shift)


def errors(matrix: Tensor, truth: Tensor, points: Tensor) -> tuple[float, float, float, float, float]:
    """Degrees, mm, scale, mean and largest TRE in mm."""
    middle = torch.tensor(CENTER, dtype=torch.float64)

    def told(m: Tensor) -> tuple[float, Tensor, float]:
        return math.atan2(m[1, 0], m[0, 0]), m[:2, :2] @ middle + m[:2, 2] - middle, float(m[:2, :2].det().sqrt())

    (angle, shift, scale), (true_angle, true_shift, true_scale) = told(matrix), told(truth)
    away = (points @ (matrix - truth)[:2, :2].mT + (matrix - truth)[:2, 2]).norm(dim=1)
    degrees = abs(math.degrees(angle - true_angle))
    return degrees, float((shift - true_shift).norm()), abs(scale - true_scale), float(away.mean()), float(away.max())


def head(fixed: Image) -> Tensor:
    """World points of the pixels inside the head: where the smoothed image is above a twelfth of its range."""
    return fixed.grid.points()[(fixed.gaussian(3.0).data > 20).flatten()]


def run(options: Options) -> list[Table]:
    """One table: every case by fnreg, and ITK's answers to it."""
    root = folder("itk_slices")
    truths = json.loads((root / "ground_truth.json").read_text(encoding="utf-8"))
    fixed = slice_image(truths["fixed"])
    points = head(fixed)
    columns = ("moving", "truth", "method", "angle °", "shift mm", "scale", "TRE mean mm", "TRE max mm", "seconds")
    table = Table("Errors on ITK's slices", columns)
    with (root / "peer_results_ITK_software_guide.csv").open(encoding="utf-8") as file:
        peers = list(csv.DictReader(file))
    for name, (transform, exact) in CASES.items():
        truth = truths[f"{PREFIX}{name}.png"]
        truth = _world(truth["matrix"], truth["offset"])
        moving = slice_image(f"{PREFIX}{name}.png")
        kind = "exact" if exact else "fitted"
        for solver, settings in SETTINGS.items():
            begin = time.perf_counter()
            found = register(fixed, moving, transform, **settings).mapping.matrix()
            taken = time.perf_counter() - begin
            table.rows.append((name, kind, f"fnreg {transform} {solver}", *errors(found, truth, points), taken))
        for row in peers:
            if row["moving"] == f"PD {name}" and row["fixed"].startswith("PD"):
                matrix = published(row["method"], row["published_result"])
                label = f"ITK {row['example'].removeprefix('Image')}: {row['method']}"
                table.rows.append((name, kind, label, *errors(matrix, truth, points), None))
    table.notes = (f"{len(points)} points; images of 221 x 257 pixels of 1 mm; seconds of one call, pyramid included",)
    return [table]
