"""Two template brains and 32 anatomical landmarks that experts set: error after an affine map and a field.

Fixed is the ICBM 152 2009 symmetric brain, moving the head of Colin27; only voxels of the fixed brain count.
Both are halved to 2 mm.  The landmarks take no part in the registration: each fixed one is mapped and its distance to
the moving one is the error.  Experts differ by about 1 mm.
"""

from __future__ import annotations

import csv
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.images import folder, volume
from benchmarks.measure import Options, Table, apart, peak
from fnreg import (
    Affine,
    Diffeomorphism,
    Image,
    Mapping,
    Registration,
    Stage,
    Subject,
    Transform,
    adam,
    lncc,
    mi,
    register,
)
from fnreg.fields import statistics

OF_AFFINE, OF_FIELD = (60, 30, 5), (100, 60, 10)
METHODS: dict[str, tuple[Transform, Any]] = {
    "Diffeomorphism(1, 1), MI + LNCC": (Diffeomorphism(gradient=1.0, smooth=1.0), mi + lncc(radius=3, flat=0.1)),
    "Diffeomorphism(0.75, 0.7), LNCC": (Diffeomorphism(gradient=0.75, smooth=0.7), lncc(radius=2, flat=0.1)),
}
REFERENCE = {"none": "init", "ANTs, affine": "affine_mask", "ANTs, SyN": "SyN_mask"}


def landmarks(name: str) -> Tensor:
    """The 32 landmarks of a template in LPS, (32, 3) mm; the files are RAS."""
    with (folder("templates3d") / f"afids_{name}_RAS_mm.csv").open(encoding="utf-8") as file:
        rows = [[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)]
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)


def reference(column: str) -> Tensor:
    """Errors (32,) mm that were measured with ANTs on these templates at 2 mm."""
    with (folder("templates3d") / "reference_ants_SyN_2mm_TRE.csv").open(encoding="utf-8") as file:
        errors = [float(row[column]) for row in csv.DictReader(file)]
    return torch.tensor(errors, dtype=torch.float64)


def images() -> tuple[Subject, Image]:
    """Fixed brain with its mask, and moving head, of 2 mm."""
    home = folder("templates3d")
    fixed = volume(home / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    moving = volume(home / "Colin27_T1_1mm.nii.gz")
    inside = (fixed.data > 0).to(torch.float32)
    near = volume(home / "Colin27_brainmask_approx.nii.gz").data  # for the scale of intensities alone
    mask = _half(Image(inside, fixed.grid)).data > 0.5
    return Subject(_half(fixed.normalize(mask=inside)), mask), _half(moving.normalize(mask=near))


def _half(image: Image) -> Image:
    return image.resize([n // 2 for n in image.grid.size])


def affine(fixed: Subject, moving: Image, steps: tuple[int, ...]) -> Registration:
    """By mutual information."""
    return register(fixed, moving, Affine(), objective=mi, steps=steps, stop=None)


def deformable(
    fixed: Subject, moving: Image, method: tuple[Transform, Any], then: Mapping, steps: tuple[int, ...]
) -> Registration:
    """A field before the affine map."""
    transform, objective = method
    stage = Stage(transform, objective=objective, optimizer=adam(0.25, decay=1.0), steps=steps)
    return register(fixed, moving, stage, then=then, stop=None)


def memory(name: str) -> float | None:
    """MiB at most beyond what is in use before; it does not depend on the number of steps."""
    fixed, moving = images()
    first = affine(fixed, moving, (1, 1, 1)).mapping
    return peak(lambda: deformable(fixed, moving, METHODS[name], first, (1, 1, 1)))


def run(options: Options) -> list[Table]:
    """One table."""
    fixed, moving = images()
    points, expected = landmarks("ICBM2009_sym"), landmarks("Colin27")
    before = (points - expected).norm(dim=1)
    if not torch.allclose(before, reference("init"), atol=1e-2):
        raise ValueError("the landmarks are not those of the reference: were the files turned?")
    columns = ("method", "seconds", "mean mm", "median mm", "worst mm", "folds", "sd of log det J", "MiB at most")
    table = Table("Colin27 onto ICBM 152 2009 symmetric, 32 landmarks", columns)

    def add(name: str, errors: Tensor, *more: Any) -> None:
        told = (more + (None,) * 4)[:4]
        table.rows.append(
            (name, told[0], float(errors.mean()), float(errors.quantile(0.5)), float(errors.max()), *told[1:])
        )

    for name, column in REFERENCE.items():
        add(name, reference(column))
    few = (5, 2, 0)
    begin = time.perf_counter()
    first = affine(fixed, moving, few if options.quick else OF_AFFINE)
    taken = time.perf_counter() - begin
    add("fnreg, affine, MI", (first.map_points(points) - expected).norm(dim=1), taken)
    for name, method in METHODS.items():
        begin = time.perf_counter()
        result = deformable(fixed, moving, method, first.mapping, few if options.quick else OF_FIELD)
        taken = time.perf_counter() - begin
        grid = result.fixed_grid
        found = statistics(result.mapping.displacement(grid).to(torch.float32), grid, mask=fixed.mask)
        errors = (result.map_points(points) - expected).norm(dim=1)
        add(f"fnreg, {name}", errors, taken, float(found.folds), float(found.sd_log_determinant), apart(memory, name))
    size = " x ".join(map(str, fixed.image.grid.size))
    table.notes = (
        f"{size} voxels, one run; a field's seconds are without those of the affine map before it; folds of the brain",
        "ANTs does not run here: its errors come with the data, measured at 2 mm with the defaults of antspyx 0.6.3",
    )
    return [table]
