"""A disc becomes a C, a large deformation with its inverse: what demo, tutorial, example and benchmark share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fnreg import data, plot
from fnreg.agreement import there_and_back
from fnreg.image import Image
from fnreg.levels import Event
from fnreg.losses.terms import bending, diffusion, mse
from fnreg.optim import adam
from fnreg.registration import Registration, register
from fnreg.transforms.base import Mapping
from fnreg.transforms.spline import SVFFD

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LOSS = "mean squared difference"
STEPS = 7  # squarings of the flow from disc to C


class CircleToC(NamedTuple):
    """The classic test of large deformations, and how it ended.

    forward, backward : mean squared difference of the warped disc to the C, and of the C warped back to the disc
    determinant : lowest and highest of the Jacobian
    consistency : mean and largest |S(T(p)) - p| in voxels, S the inverse of the map T, at the voxels p that T leaves
        in the image
    seconds : of the registration
    """

    c: Image  # fixed
    disc: Image  # moving
    result: Registration
    inverse: Registration
    forward: float
    backward: float
    determinant: tuple[float, float]
    consistency: tuple[float, float]
    seconds: float


def circle_to_c(*, progress: Callable[[Event], None] | None = None) -> CircleToC:
    """Register a disc to a C of 128 x 128 voxels by a velocity of splines, and invert the map.

    The outside of the disc has to pass through the slot and fill the hole, almost half of the image's width.  The
    mapping of the result samples the flow of the same spline at thirds of voxels: what map and inverse lack of each
    other is the error of interpolation, which falls with the square of the spacing.
    """
    c, disc = data.c_shape(128, blur=2.0), data.circle(128, blur=2.0)
    begin = time.perf_counter()
    result = register(
        c,
        disc,
        SVFFD(stride=4, squarings=STEPS),
        objective=mse + 3e-4 * diffusion + 1e-3 * bending,
        optimizer=adam(0.5, decay=0.3),
        levels=4,
        steps=(300, 200, 100, 40),  # it is the coarse levels that have to find the way
        padding="border",
        stop=None,
        progress=progress,
    )
    seconds = time.perf_counter() - begin
    thirds = Mapping(result.mapping.params, c.grid.resize(3 * 128), SVFFD(stride=3 * 4, squarings=STEPS + 2))
    result = dataclasses.replace(result, mapping=thirds)
    inverse = result.inverse()
    away = there_and_back(result.mapping, inverse.mapping, c.grid, world=False)
    return CircleToC(
        c,
        disc,
        result,
        inverse,
        forward=_mean_square(result.warp(disc, padding="border"), c),
        backward=_mean_square(inverse.warp(c, padding="border"), disc),
        determinant=determinants(result),
        consistency=(float(away.mean()), float(away.max())),
        seconds=seconds,
    )


def _mean_square(warped: Image, fixed: Image) -> float:
    return float((warped.data - fixed.data).square().mean())


def circle_figures(found: CircleToC) -> dict[str, Figure]:
    """Images, coordinate lines of both maps, and the Jacobian determinant."""
    c, disc, result, inverse = found.c, found.disc, found.result, found.inverse
    unit: dict[str, Any] = {"unit": "pixels"}
    there, back = result.warp(disc, padding="border"), inverse.warp(c, padding="border")
    return {
        "circle-to-c": plot.overview(c, disc, there, title="A disc becomes a C", **unit),
        "circle-to-c-inverse": plot.overview(disc, c, back, title="The C becomes a disc, by the inverse map", **unit),
        "circle-to-c-grid": plot.warped_grid(result, image=disc, lines=41, title="Lines of the C in the disc", **unit),
        "circle-to-c-inverse-grid": plot.warped_grid(
            inverse, image=c, lines=41, title="Lines of the disc in the C", **unit
        ),
        "circle-to-c-jacobian": plot.jacobian(result.jacobian(), title="Jacobian determinant", **unit),
        "circle-to-c-losses": plot.losses(result, objective=f"{LOSS} and penalties"),
    }


def circle_table(found: CircleToC) -> Table:
    """What came of it, in words and numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False, title="a disc becomes a C", title_justify="left")
    mean, largest = found.consistency
    low, high = found.determinant
    for name, value in (
        (f"{LOSS}, disc to C", f"{found.forward:.2e}"),
        (f"{LOSS}, C to disc by the inverse", f"{found.backward:.2e}"),
        ("Jacobian determinant", f"{low:.3f} to {high:.2f}"),
        ("there and back, mean and largest", f"{mean:.3f} and {largest:.2f} voxels"),
        ("seconds", f"{found.seconds:.1f}"),
    ):
        table.add_row(name, value)
    return table


def determinants(result: Registration) -> tuple[float, float]:
    """The lowest and the highest of the Jacobian matrix."""
    found = result.jacobian().data
    return float(found.min()), float(found.max())
