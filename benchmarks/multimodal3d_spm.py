"""T1 onto T2 and onto PD averages under known motions: the error over the head, beside SimpleITK's on the same pairs.

The fixed image is the T1 average seen through a known map by cubic interpolation, the moving one the T2 or PD average
of the same heads.  The averages are not exactly aligned themselves, so two errors are told: from the known map, and
from the known map followed by what the same method finds where nothing moved, which is what the motion itself costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import folder, volume
from benchmarks.measure import Absent, Options, Table, peer
from fnreg import (
    SVFFD,
    Affine,
    GaussNewton,
    Image,
    Mapping,
    Rigid,
    Translation,
    bending,
    linear_mapping,
    mi,
    ncc,
    register,
    warp,
)
from fnreg.grid import homogeneous
from fnreg.transforms.rotation import rotation_vector_to_matrix

MODALITIES = ("T2", "PD")
Find = Callable[[Image, Image], Callable[[Tensor], Tensor]]  # the map of points


def average(name: str) -> Image:
    """One of the averages, 2 mm."""
    return volume(folder("multimodal3d_spm") / f"avg152{name}.nii.gz")


def motion(kind: str, image: Image, seed: int) -> Mapping:
    """A known map: rigid up to 15 degrees and 15 mm; affine, with a tenth of stretch; smooth, about 2.6 mm."""
    generator, grid = np.random.default_rng(seed), image.grid
    if kind == "none":
        return linear_mapping(torch.eye(4, dtype=torch.float64), grid)
    if kind == "smooth":
        transform = SVFFD(stride=16)
        params = transform.init(grid)
        made = {name: torch.from_numpy(generator.normal(0, 5.0, leaf.shape)) for name, leaf in params.items()}
        return Mapping(made, grid, transform)
    axis, away = (v / np.linalg.norm(v) for v in generator.normal(size=(2, 3)))
    linear = rotation_vector_to_matrix(math.radians(generator.uniform(0, 15)) * torch.from_numpy(axis))
    if kind == "affine":
        linear = linear @ (torch.eye(3) + 0.1 * torch.from_numpy(generator.uniform(-1, 1, (3, 3))))
    shift = generator.uniform(0, 15) * torch.from_numpy(away)
    return linear_mapping(homogeneous(linear, grid.center - linear @ grid.center + shift), grid)


def ours(transform: Any, objective: Any, **options: Any) -> Find:
    """A method of fnreg."""

    def find(fixed: Image, moving: Image) -> Callable[[Tensor], Tensor]:
        return register(fixed, moving, transform, objective=objective, **options).map_points

    return find


def theirs(transform: str) -> Find:
    """SimpleITK by Mattes' mutual information: rigid or affine by gradient descent, B-spline by L-BFGS-B."""
    sitk = peer("SimpleITK")

    def find(fixed: Image, moving: Image) -> Callable[[Tensor], Tensor]:
        images = [_to_sitk(sitk, image) for image in (fixed, moving)]
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.2, 1)
        method.SetInterpolator(sitk.sitkLinear)
        if transform == "bspline":
            method.SetOptimizerAsLBFGSB(numberOfIterations=20)
            method.SetInitialTransform(sitk.BSplineTransformInitializer(images[0], [6, 7, 6]), inPlace=False)
            shrink, smooth = [4, 2], [2, 1]
        else:
            method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200)
            method.SetOptimizerScalesFromPhysicalShift()
            kind = {"rigid": sitk.Euler3DTransform(), "affine": sitk.AffineTransform(3)}[transform]
            kind.SetCenter(fixed.grid.center.tolist())
            method.SetInitialTransform(kind, inPlace=False)
            shrink, smooth = [4, 2, 1], [2, 1, 0]
        method.SetShrinkFactorsPerLevel(shrink)
        method.SetSmoothingSigmasPerLevel(smooth)
        found = method.Execute(*images)
        return lambda points: torch.tensor([found.TransformPoint(p) for p in points.tolist()], dtype=torch.float64)

    return find


def _to_sitk(sitk: Any, image: Image) -> Any:
    made, grid = sitk.GetImageFromArray(image.data[0].numpy()), image.grid
    made.SetSpacing(grid.spacing.tolist())
    made.SetOrigin(grid.origin.tolist())
    made.SetDirection(grid.direction.flatten().tolist())
    return made


def plane(image: Image) -> float:
    """Where an image's own plane of symmetry lies, x in mm: half of the shift onto its mirror image."""
    mirror = Image(image.data.flip(-1).contiguous(), image.grid)
    found = register(image, mirror, Translation(), objective=ncc, solver=GaussNewton(), steps=(30, 20, 20))
    return float(image.grid.center[0] - found.mapping.params["translation"][0] / 2)


def methods(kind: str) -> dict[str, Find]:
    """By the kind of motion."""
    if kind == "smooth":
        settings = ((8, 1.0), (16, 1e3))
        made = {
            f"fnreg SVFFD({stride}), mi + {weight:g} bending": ours(
                SVFFD(stride=stride), mi + weight * bending, steps=(60, 40, 0)
            )
            for stride, weight in settings
        }
        return made | _peers("SimpleITK B-spline, 6 x 7 x 6 cells, Mattes MI", "bspline")
    family = {"rigid": Rigid(), "affine": Affine()}[kind]
    made = {f"fnreg {family}, {term}": ours(family, term, steps=(60, 40, 20)) for term in (mi,)}
    return made | _peers(f"SimpleITK {kind}, Mattes MI", kind)


def _peers(name: str, transform: str) -> dict[str, Find]:
    try:
        return {name: theirs(transform)}
    except Absent:
        return {}


def run(options: Options) -> list[Table]:
    """One table on the images themselves and one of errors."""
    images = {name: average(name) for name in ("T1", *MODALITIES)}
    planes = Table("The images' own plane of symmetry", ("image", "x in mm"))
    planes.rows = [(name, plane(image)) for name, image in images.items()]
    fixed = images["T1"]
    columns = ("motion", "onto", "method", "before mm", "after mm", "without motion mm", "of the motion mm", "seconds")
    table = Table("Mean error over the head", columns)
    counts = {"rigid": 1, "affine": 1, "smooth": 1} if options.quick else {"rigid": 2, "affine": 2, "smooth": 1}
    for kind, count in counts.items():
        for name in MODALITIES[: 1 if options.quick else 2]:
            for method, find in methods(kind).items():
                table.rows.append((kind, f"T1 <- {name}", method, *_errors(kind, count, find, fixed, images[name])))
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    table.notes = (f"means over {told} motions; one run, {torch.get_num_threads()} threads, 2 mm",)
    return [planes, table]


def _errors(kind: str, count: int, find: Find, fixed: Image, moving: Image) -> tuple[float, ...]:
    """Before, after, without motion, and after from where the method goes without motion; mm, and seconds."""
    still = find(fixed, moving)
    found: list[tuple[float, ...]] = []
    for seed in range(count):
        truth = motion(kind, fixed, seed)
        seen = warp(fixed, truth, interpolation="cubic")
        inside = _head(seen)
        begin = time.perf_counter()
        result = find(seen, moving)(inside)
        taken = time.perf_counter() - begin
        expected = truth.map_points(inside)
        found.append((_mean(inside, expected), _mean(result, expected), _mean(result, still(expected)), taken))
    before, after, own, seconds = np.mean(found, axis=0).tolist()
    return before, after, _mean(still(_head(fixed)), _head(fixed)), own, seconds


def _head(image: Image) -> Tensor:
    """Some points of the head (N, 3)."""
    return image.grid.points()[(image.data > 0.1).flatten()][::97]


def _mean(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm(dim=1).mean())
