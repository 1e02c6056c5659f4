"""The story of `fnreg demo`: search, descend and get stuck, do better, bend, and do it a hundred times at once.

The images are those that come with the package.  Everything told is measured as it runs.  The disc that becomes a C
is a story of its own, see `fnreg.circle`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fnreg import data, native, plot
from fnreg.circle import LOSS, CircleToC, circle_figures, circle_table, circle_to_c, determinants
from fnreg.image import Image
from fnreg.io.files import WriteError
from fnreg.losses.terms import bending, mse
from fnreg.optim import sgd
from fnreg.progress import Bars
from fnreg.registration import Registration, evaluate, register
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
        determinant = None if linear else determinants(result)
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
        self.figures["nines-search"] = plot.search(angles, values, objective=LOSS, others=points)
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
        self.figures["brain-losses"] = plot.losses(result, objective=LOSS)

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
            stages = [Rigid(), Stage(transform, objective=objective)]
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
        self.figures["hundred-losses"] = plot.losses(result, objective=LOSS)


def _table(rows: list[Row]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE,
        padding=0,
        show_edge=False,  # 80 characters hold it
        caption=f"loss: {LOSS}; error: mean distance from the true map; det J: its lowest",
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
    console.print(circle_table(found))
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
