"""Two brain slices of different people, registered without a fold: correlation, Jacobian determinant, inverse, time.

r64 onto r16, the pair on which ANTs and many others show themselves.  Affine by global correlation, then a dense
transform after which the affine map acts.  There are no labels, so correlation and a regular map are all that is
measured.  The figure is written to benchmarks/results/ants2d.png.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.images import folder
from benchmarks.measure import Options, Table, peer
from fnreg import (
    SVFFD,
    Affine,
    Diffeomorphism,
    Image,
    Registration,
    adam,
    bending,
    diffusion,
    fields,
    mse,
    ncc,
    register,
)
from fnreg.agreement import there_and_back

FIGURE = Path(__file__).parent / "results" / "ants2d.png"
SPLINE = SVFFD(stride=4, squarings=8)
SMOOTH = 0.3 * bending + 0.03 * diffusion  # diffusion keeps the flow from leaving at the corners, where all is black
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SVFFD, NCC, symmetric": (SPLINE, {"objective": ncc + SMOOTH, "symmetric": True}),
    "SVFFD, NCC": (SPLINE, {"objective": ncc + SMOOTH}),
    "SVFFD, MSE": (SPLINE, {"objective": mse + 0.1 * SMOOTH}),
    "Diffeomorphism, MSE": (Diffeomorphism(), {"objective": mse, "optimizer": adam(0.5)}),
}


def slice_of(name: str) -> Image:
    """A slice of `ants2d` with values 0..1, pixels of unit 1."""
    pillow = peer("PIL.Image")
    with pillow.open(folder("ants2d") / f"{name}slice.jpg") as picture:
        return Image.from_array(np.array(picture.convert("L"), dtype=np.float32) / 255)


def correlation(fixed: Image, warped: Image) -> float:
    """Pearson's, over all pixels; what is not seen in the moving image is 0."""
    return float(torch.corrcoef(torch.stack([fixed.data.flatten(), warped.data.flatten()]))[0, 1])


def consistency(result: Registration) -> tuple[float | None, float | None]:
    """Mean and largest distance of fixed pixels from themselves under map and inverse; None without an inverse."""
    try:
        back = result.inverse()
    except ValueError:  # the map folds, or nearly
        return None, None
    away = there_and_back(result.mapping, back.mapping, result.fixed_grid)
    return float(away.mean()), float(away.max())


def draw(fixed: Image, moving: Image, result: Registration) -> None:
    """Write the figure: images, differences and the deformed lines below each other."""
    peer("matplotlib")
    pillow, plot = peer("PIL.Image"), peer("fnreg.plot")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figures = [
        plot.overview(fixed, moving, result.warp(moving), unit="pixels", title="r64 registered to r16"),
        plot.warped_grid(result, image=moving, lines=41, unit="pixels", title="The lines of r16 in r64"),
        plot.jacobian(result.jacobian(), unit="pixels"),
    ]
    parts: list[Any] = []
    for number, figure in enumerate(figures):
        part = FIGURE.with_name(f"ants2d_{number}.png")
        figure.savefig(part, dpi=100)
        with pillow.open(part) as picture:
            parts.append(picture.convert("RGB"))
        part.unlink()
    above, left, right = parts
    right = right.resize((round(right.width * left.height / right.height), left.height))
    width = max(above.width, left.width + right.width)
    sheet = pillow.new("RGB", (width, above.height + left.height), "white")
    sheet.paste(above, ((width - above.width) // 2, 0))
    sheet.paste(left, ((width - left.width - right.width) // 2, above.height))
    sheet.paste(right, ((width - left.width - right.width) // 2 + left.width, above.height))
    sheet.save(FIGURE)


def run(options: Options) -> list[Table]:
    """One table: nothing, affine, and the dense transforms."""
    fixed, moving = slice_of("r16"), slice_of("r64")
    columns = ("method", "NCC", "folds", "J least", "J most", "inverse mean", "inverse worst", "seconds")
    table = Table("r16 <- r64", columns)
    table.rows.append(("none", correlation(fixed, moving.resample(fixed.grid, padding="zeros")), *(None,) * 6))
    begin = time.perf_counter()
    affine = register(fixed, moving, Affine(), objective=ncc, levels=4, padding="border")
    taken = time.perf_counter() - begin
    table.rows.append(("affine, NCC", correlation(fixed, affine.warp(moving)), *(None,) * 5, taken))
    methods = dict(list(METHODS.items())[:1]) if options.quick else METHODS
    best: tuple[float, Registration] | None = None
    for name, (transform, given) in methods.items():
        begin = time.perf_counter()
        result = register(
            fixed, moving, transform, then=affine.mapping, levels=4, steps=(100, 100, 50, 20), padding="border", **given
        )
        taken = time.perf_counter() - begin
        jacobian = result.jacobian().data
        found = correlation(fixed, result.warp(moving))
        folds = int(fields.folds(result.mapping.displacement(fixed.grid), fixed.grid))
        told = (float(jacobian.min()), float(jacobian.max()), *consistency(result))
        table.rows.append((name, found, folds, *told, taken))
        if folds == 0 and told[2] is not None and (best is None or found > best[0]):
            best = found, result
    notes = [f"{torch.get_num_threads()} threads, one run; J of the whole map; inverse: pixels after there and back"]
    if best is not None:
        draw(fixed, moving, best[1])
        notes.append("the figure of the best with an inverse is benchmarks/results/ants2d.png")
    table.notes = tuple(notes)
    return [table]
