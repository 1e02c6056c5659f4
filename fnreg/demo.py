"""The story of `fnreg demo`: search, descend and get stuck, do better, bend, and do it a hundred times at once.

The images are those that come with the package.  Everything told is measured as it runs.  `circle_to_c` is a story of
its own, with settings that tutorial, example and benchmark share.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fnreg import data, native, plot
from fnreg.image import Image
from fnreg.io.files import WriteError
from fnreg.levels import Event
from fnreg.losses.terms import bending, diffusion, mse
from fnreg.optim import adam, sgd
from fnreg.progress import Bars
from fnreg.registration import Registration, evaluate, register
from fnreg.results import there_and_back
from fnreg.stages import Stage
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.linear import Rigid, Rotation
from fnreg.transforms.rotation import matrix_to_angle
from fnreg.transforms.spline import FFD, SVFFD
from fnreg.transforms.warping import warp

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

_LOSS = "mean squared difference"
STEPS = 7  # squarings of the flow from disc to C


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; what does not apply is None.

    part, what : the example, and what was done; before, after : the mean squared difference; error : mean distance
    from the true map over the fixed image, in mm; determinant : lowest and highest of the Jacobian
    """

    part: str
    what: str
    before: float
    after: float
    seconds: float
    degrees: float | None = None
    error: float | None = None
    pairs: int = 1
    determinant: tuple[float, float] | None = None


def _degrees(mapping: Mapping) -> float:
    return math.degrees(float(matrix_to_angle(mapping.matrix()[:2, :2])))


def _error(mapping: Mapping, truth: Mapping, image: Image) -> float:
    points = image.grid.points()
    return float((mapping.map_points(points) - truth.map_points(points)).norm(dim=1).mean())


def _range(result: Registration) -> tuple[float, float]:
    found = result.jacobian().data
    return float(found.min()), float(found.max())


def _before(fixed: Image, moving: Image, transform: Transform) -> float:
    identity = Mapping(transform.init(fixed.grid), fixed.grid, transform)
    return float(evaluate(fixed, moving, identity)[0].mean())


class Story:
    """The parts in order; each adds lines to the table and figures."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.rows: list[Row] = []
        self.figures: dict[str, Figure] = {}

    def _register(
        self, part: str, what: str, fixed: Image, moving: Image, transform: Any, *,
        truth: Mapping | None = None, pairs: int = 1, **options: Any,
    ) -> Registration:  # fmt: skip
        report = self.bars.add(f"{part}: {what}")
        begin = time.perf_counter()
        result = register(fixed, moving, transform, progress=report, **options)
        seconds = time.perf_counter() - begin
        linear = result.mapping.transform.linear
        before, after = _before(fixed, moving, Rigid()), float(result.terms["mse"].mean())
        degrees = _degrees(result.mapping) if pairs == 1 and linear else None
        error = None if truth is None else _error(result.mapping, truth, fixed)
        determinant = None if linear else _range(result)
        self.rows.append(Row(part, what, before, after, seconds, degrees, error, pairs, determinant))
        return result

    def nines(self) -> None:
        """Two nines: every angle, then descent that sticks, then two ways that do not."""
        part = "two nines, rotation"
        fixed, moving = data.digits(9, count=2)
        self.bars.add(f"{part}: 360 angles in one call")
        begin = time.perf_counter()
        angles = torch.arange(360, dtype=torch.float64)
        turned = Mapping({"rotation": torch.deg2rad(angles).unsqueeze(1)}, fixed.grid, Rotation())
        values, _ = evaluate(fixed, moving, turned)
        best = int(values.argmin())
        seconds = time.perf_counter() - begin
        self.rows.append(Row(part, "360 angles in one call", float(values[0]), float(values[best]), seconds, best))
        descent: dict[str, Any] = {"optimizer": sgd(10.0)}
        plain = self._register(part, "gradient descent", fixed, moving, Rotation(), levels=1, **descent)
        coarse = self._register(part, "with 3 resolutions", fixed, moving, Rotation(), levels=3, **descent)
        starts = Rotation().spread(fixed.grid, 36)
        many = self._register(part, "36 starts at once", fixed, moving, Rotation(), levels=2, starts=starts)
        found = {"gradient descent": plain, "3 resolutions": coarse, "36 starts": many}
        points = {
            f"{name}: {_degrees(one.mapping) % 360:.1f}°": (_degrees(one.mapping) % 360, float(one.value))
            for name, one in found.items()
        }
        self.figures["nines-search"] = plot.search(angles, values, objective=_LOSS, others=points)
        self.figures["nines"] = plot.overview(
            fixed, moving, many.warp(moving), unit="pixels", title="Two nines, rotated by the best of 36 starts"
        )

    def turned_brain(self) -> None:
        """A slice turned by 40 degrees: full resolution alone sticks, the pyramid does not."""
        part = "brain, turned by 40°"
        fixed, _ = data.brain()
        angle = torch.full((1,), math.radians(40), dtype=torch.float64)
        truth = Mapping({"rotation": angle, "translation": torch.zeros(2, dtype=torch.float64)}, fixed.grid, Rigid())
        moving = warp(fixed, truth.inverse(), fixed.grid)
        shared: dict[str, Any] = {"truth": truth, "steps": 100}
        plain = self._register(part, "full resolution only", fixed, moving, Rigid(), levels=1, **shared)
        coarse = self._register(part, "4 resolutions", fixed, moving, Rigid(), levels=4, **shared)
        for name, one in (("full-resolution", plain), ("pyramid", coarse)):
            title = f"Brain turned by 40°, {name.replace('-', ' ')}: found {_degrees(one.mapping):.2f}°"
            figure = plot.overview(fixed, moving, one.warp(moving), unit="mm", title=title)
            self.figures[f"turned-brain-{name}"] = figure

    def brain(self) -> None:
        """Two slices whose map is known: 10 degrees and (13, 16) mm."""
        part = "brain, 10°, (13, 16) mm"
        fixed, moving = data.brain()
        result = self._register(part, "4 resolutions", fixed, moving, Rigid(), truth=data.brain_truth(), levels=4)
        warped = result.warp(moving)
        self.figures["brain"] = plot.overview(fixed, moving, warped, unit="mm", title="Two slices of a brain, rigid")
        self.figures["brain-checkerboard"] = plot.checkerboard(fixed, warped, unit="mm")
        self.figures["brain-losses"] = plot.losses(result, objective=_LOSS)

    def free_form(self) -> None:
        """Two nines again: after the best rotation, bent freely, with more care, and without a fold."""
        part = "two nines, bent"
        fixed, moving = data.digits(9, count=2)
        starts = Rigid().spread(fixed.grid, 36)
        shared: dict[str, Any] = {"starts": starts, "levels": 2, "padding": "border"}
        for name, what, transform, penalty in (
            ("weak", "FFD, 1e-4 bending", FFD(stride=2), 1e-4),
            ("strong", "FFD, 0.1 bending", FFD(stride=2), 0.1),
            ("svffd", "SVFFD, 0.01 bending", SVFFD(stride=2), 0.01),
        ):
            objective = mse + penalty * bending
            stages = [Rigid(), Stage(transform, objective)]
            result = self._register(part, what, fixed, moving, stages, **shared)
            title = f"Two nines, rigid then {what}"
            self.figures[f"bent-{name}"] = plot.overview(fixed, moving, result.warp(moving), unit="pixels", title=title)
            self.figures[f"bent-{name}-grid"] = plot.warped_grid(result, image=moving, unit="pixels", title=title)

    def hundred(self) -> None:
        """A hundred pairs of digits in one call."""
        fixed, moving = data.digit_pairs(100)
        result = self._register("100 pairs of digits", "one call, rigid", fixed, moving, Rigid(), levels=2, pairs=100)
        title = "The first of a hundred pairs, rigid, registered in one call"
        self.figures["hundred-pairs"] = plot.batch(fixed, moving, result.warp(moving), title=title)
        self.figures["hundred-losses"] = plot.losses(result, objective=_LOSS)


def _table(rows: list[Row]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE,
        padding=0,
        show_edge=False,  # 80 characters hold it
        caption=f"loss: {_LOSS}; error: mean distance from the true map; det J: its lowest",
    )
    table.add_column("", no_wrap=True)
    for name in ("loss", "angle", "error/mm", "det J", "seconds", "pairs/s"):
        table.add_column(name, justify="right", no_wrap=True)
    part = ""
    for row in rows:
        if row.part != part:
            table.add_section()
            table.add_row(f"[bold]{row.part}[/bold]")
            part = row.part
        loss = f"{row.before:.4f} → {row.after:.4f}"
        degrees = "" if row.degrees is None else f"{row.degrees:.2f}°"
        error = "" if row.error is None else f"{row.error:.3f}"
        determinant = "" if row.determinant is None else f"{row.determinant[0]:.2f}"
        speed = f"{row.pairs / row.seconds:.1f}" if row.pairs > 1 else ""
        table.add_row(f"  {row.what}", loss, degrees, error, determinant, f"{row.seconds:.2f}", speed)
    return table


# -- a disc becomes a C -------------------------------------------------------------------------------------------


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
        SVFFD(stride=4, steps=STEPS),
        objective=mse + 3e-4 * diffusion + 1e-3 * bending,
        optimizer=adam(0.5, decay=0.3),
        levels=4,
        steps=(300, 200, 100, 40),  # it is the coarse levels that have to find the way
        padding="border",
        stop=None,
        progress=progress,
    )
    seconds = time.perf_counter() - begin
    thirds = Mapping(result.mapping.params, c.grid.resize(3 * 128), SVFFD(stride=3 * 4, steps=STEPS + 2))
    result = dataclasses.replace(result, mapping=thirds)
    inverse = result.inverse()
    away = there_and_back(result.mapping, inverse.mapping, c.grid)
    return CircleToC(
        c,
        disc,
        result,
        inverse,
        forward=_mean_square(result.warp(disc, padding="border"), c),
        backward=_mean_square(inverse.warp(c, padding="border"), disc),
        determinant=_range(result),
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
        "circle-to-c-losses": plot.losses(result, objective=f"{_LOSS} and penalties"),
    }


def _circle_table(found: CircleToC) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False, title="a disc becomes a C", title_justify="left")
    mean, largest = found.consistency
    low, high = found.determinant
    for name, value in (
        (f"{_LOSS}, disc to C", f"{found.forward:.2e}"),
        (f"{_LOSS}, C to disc by the inverse", f"{found.backward:.2e}"),
        ("Jacobian determinant", f"{low:.3f} to {high:.2f}"),
        ("there and back, mean and largest", f"{mean:.3f} and {largest:.2f} voxels"),
        ("seconds", f"{found.seconds:.1f}"),
    ):
        table.add_row(name, value)
    return table


# -- telling it -----------------------------------------------------------------------------------------------------


def _prepare(output: Path) -> None:
    """The folder; MissingExtraError here, not at the end, where matplotlib is missing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise WriteError(f"{output} cannot be made: {problem.strerror or problem}") from problem
    plot.search([0.0], [0.0])


def _save(figures: dict[str, Figure], output: Path) -> None:
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png")


def run_circle_to_c(output: Path) -> CircleToC:
    """Register the disc to the C, print the table, write the figures; raises as `run_demo` does."""
    from rich.console import Console

    _prepare(output)
    console = Console()
    with Bars() as bars:
        found = circle_to_c(progress=bars.add("a disc becomes a C"))
    figures = circle_figures(found)
    _save(figures, output)
    console.print(_circle_table(found))
    _list(console, figures, output)
    return found


def _list(console: Console, figures: dict[str, Figure], output: Path) -> None:
    for name in figures:
        console.print(f"  {output / name}.png", highlight=False, soft_wrap=True)


def run_demo(output: Path) -> list[Row]:
    """Tell the story, print the table, write the figures into a folder, and return the table's lines.

    Raises WriteError where the folder cannot be made, MissingExtraError without matplotlib.
    """
    from rich.console import Console

    _prepare(output)
    begin = time.perf_counter()
    console = Console()
    with Bars() as bars:
        bars.add("preparing")
        importlib.import_module("torchopt")
        fast, told = native.kernels()
        prepared = time.perf_counter() - begin
        story = Story(bars)
        for part in (story.nines, story.turned_brain, story.brain, story.free_form, story.hundred):
            part()
    _save(story.figures, output)
    kernel = "ready" if fast else f"not in use, {told}"
    console.print(f"compiled kernels {kernel}; prepared in {prepared:.1f} s", highlight=False)
    console.print(_table(story.rows))
    console.print(
        f"{len(story.figures)} figures in {output}, {time.perf_counter() - begin:.0f} s in all", highlight=False
    )
    _list(console, story.figures, output)
    return story.rows
