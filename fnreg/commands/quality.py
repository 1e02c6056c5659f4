"""Commands that tell: evaluate, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import cyclopts

from fnreg.commands.base import OK, Json, Verbose, app, option, print_table
from fnreg.settings import PRESETS, SPACES
from fnreg.specs import choose

if TYPE_CHECKING:
    from fnreg.apply import Interp
    from fnreg.io.points import Space

LABELS = ("nearest", "multilabel")


@app.command
def evaluate(
    *transforms: Path,
    fixed_labels: Annotated[Path | None, option("Labels of the fixed image, whole numbers, 0 the background.")] = None,
    moving_labels: Annotated[Path | None, option("The same of the moving image.")] = None,
    fixed_points: Annotated[Path | None, option("Landmarks of the fixed image.")] = None,
    moving_points: Annotated[Path | None, option("Those of the moving image, in the same order.")] = None,
    like: Annotated[
        Path | None, option("Image on whose grid folds are counted. [default: the labels, or the transform]")
    ] = None,
    space: Annotated[str | None, option(f"Where the points of a plain table are: {' or '.join(SPACES[:2])}.")] = None,
    interpolation: Annotated[str | None, option(f"Of labels: {' or '.join(LABELS)}. [default: nearest]")] = None,
    surfaces: Annotated[
        bool, option("Tell also how far the surfaces of labels are apart, in mm; needs the extra itk.")
    ] = False,
    inverse: Annotated[
        Path | None,
        option("Transform of the way back, from moving to fixed points: how far there and back ends from the start."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Tell how good transforms are: overlap and surfaces of labels, distance of landmarks, folds; before and after.

    Parameters
    ----------
    transforms
        Files, as of apply: they map fixed points to moving points. Without any, the state before is told.
    """
    if interpolation is not None:
        choose("interpolation", interpolation, LABELS)
    if space is not None:
        choose("space", space, SPACES[:2])
    from fnreg.quality import judge

    found = judge(
        transforms, fixed_labels=fixed_labels, moving_labels=moving_labels, fixed_points=fixed_points,
        moving_points=moving_points, like=like, space=cast("Space | None", space),
        interpolation=cast("Interp | None", interpolation), surfaces=surfaces, inverse=inverse,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=2))
        return OK
    names = list(dict.fromkeys(name for stage in found.values() for name in stage))
    rows = [["", *found], *([name, *(_cell(stage.get(name, "")) for stage in found.values())] for name in names)]
    width = max(len(name) for name in names) if names else 0
    for name, *cells in rows:
        print(f"{name:<{width}}" + "".join(f"  {cell:>10}" for cell in cells))
    return OK


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else "unknown" if value is None else f"{value:.4g}"


presets = cyclopts.App(name="presets", help="List tuned settings by name, or show one.")
app.command(presets)


@presets.default
def presets_all(*, as_json: Json = False, verbose: Verbose = False) -> int:
    """List the names with their stages."""
    print_table(dict(PRESETS), as_json)
    return OK


@presets.command
def show(name: str, /, *, verbose: Verbose = False) -> int:
    """Print a preset as the Python that makes it: arguments of fnreg.register.

    Parameters
    ----------
    name
        One of those that `fnreg presets` lists.
    """
    choose("preset", name, PRESETS)
    from fnreg.presets import PRESETS as MADE

    for key, value in MADE[name].items():
        each = value if isinstance(value, list) else [value]
        print(f"{key:<10} {each[0]!r}")
        for more in each[1:]:
            print(f"{'':<10} {more!r}")
    return OK
