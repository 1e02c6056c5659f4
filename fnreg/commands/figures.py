"""The command that draws: plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fnreg.commands.base import OK, File, Json, Overwrite, Verbose, app, option, print_table
from fnreg.specs import SettingsError, choose

# Images first, then maps; `fnreg.figures` says which fits what.
KINDS = ("slices", "checkerboard", "overlay", "difference", "overview", "grid", "quiver", "flow", "jacobian")
ENDINGS = (".png", ".svg", ".pdf")


@app.command
def plot(
    *files: Path,
    output: File,
    kind: Annotated[str | None, option(f"One of {', '.join(KINDS)}. [default: the first that fits]")] = None,
    at: Annotated[
        str | None, option("World point x,y,z of the slices of 3-D images, as --at=-3,12,40. [default: the middle]")
    ] = None,
    like: Annotated[
        Path | None, option("Image whose grid shows transforms alone. [default: the grid of the transform]")
    ] = None,
    title: Annotated[str | None, option("Above the figure.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Draw images and transforms into a picture, .png, .svg or .pdf.

    One image is shown by itself, a 3-D one in three slices. Two, the fixed and the moving one, are tiles in turn; with
    transforms an overview before and after, which three images (fixed, moving, warped) give too. Transforms alone are a
    deformed grid in 2-D and the Jacobian's determinant in 3-D; beside one 2-D image the grid lies on the moving image,
    and arrows, --kind quiver, begin on the fixed one.

    Parameters
    ----------
    files
        Images as of register, transforms as of apply.
    """
    if not files:
        raise SettingsError("nothing is given to draw: give an image, several, or a transform")
    if kind is not None:
        choose("kind", kind, KINDS)
    if not str(output).lower().endswith(ENDINGS):
        raise SettingsError(f"{output} is no name for a figure: it ends in {', '.join(ENDINGS)}")
    place = None if at is None else _place(at)
    from fnreg.figures import draw
    from fnreg.output import check_file

    check_file(output, overwrite=overwrite)
    print_table(draw(files, output, kind=kind, at=place, like=like, title=title), as_json)
    return OK


def _place(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--at {text} is no point: expected three numbers, as --at=-3,12,40") from None
    return x, y, z
