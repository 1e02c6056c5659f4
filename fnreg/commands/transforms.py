"""Commands that read transforms from files: apply, points, invert, compose, convert, jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from fnreg.commands.base import OK, File, Json, Like, Overwrite, Verbose, app, option, print_table
from fnreg.settings import PADDINGS, SPACES
from fnreg.specs import SettingsError, choose

INTERPS = ("linear", "nearest", "cubic", "multilabel")
FORMS = ("itk", "ants", "elastix", "fnreg", "displacement", "l2r")

Inverse = Annotated[bool, option("Use the inverse of all of them: it maps moving points to fixed points.")]


def _some(transforms: Sequence[Path]) -> Sequence[Path]:
    if not transforms:
        raise SettingsError("no transform is given: give one file, or several, after the first argument")
    return transforms


def _padding(text: str) -> Any:
    """Of `PADDINGS` without none, or a number."""
    try:
        return float(text)
    except ValueError:
        return choose("padding", text, (*(name for name in PADDINGS if name != "none"), "or a number"))


def _check(output: Path, overwrite: bool) -> None:
    from fnreg.output import check_file

    check_file(output, overwrite=overwrite)


@app.command
def apply(
    image: Path,
    /,
    *transforms: Path,
    output: File,
    like: Like = None,
    inverse: Inverse = False,
    interpolation: Annotated[
        str, option(f"One of {', '.join(INTERPS)}; labels take nearest or multilabel. [default: linear]")
    ] = "linear",
    padding: Annotated[
        str, option("Outside of the image: zeros, border, reflection or a number. [default: zeros]")
    ] = "zeros",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Resample a moving image onto the fixed grid, through transforms.

    The value at a fixed point p is that of the moving image at T(p). Of several transforms the first acts first on
    fixed points, so the last acts first on the image: the order that antsApplyTransforms takes.

    Parameters
    ----------
    image
        The moving image; with --inverse the fixed one.
    transforms
        Files: .safetensors; ITK's .tfm, .txt, .h5, .mat; elastix' .txt; displacements .nii, .nii.gz, .mha, .nrrd.
    """
    chosen: Any = choose("interpolation", interpolation, INTERPS)
    outside = _padding(padding)
    files = _some(transforms)
    _check(output, overwrite)
    from fnreg.apply import apply_image

    record = apply_image(image, files, output, like=like, inverse=inverse, interpolation=chosen, padding=outside)
    print_table(record, as_json)
    return OK


@app.command
def points(
    file: Path,
    /,
    *transforms: Path,
    output: File,
    inverse: Inverse = False,
    space: Annotated[
        str | None, option(f"Where the points of a plain table are: {', '.join(SPACES)}, of the image --like.")
    ] = None,
    like: Annotated[Path | None, option("Image of whose voxels the points are, with --space voxel.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Map points of the fixed image to the moving image; with --inverse points of the moving image to the fixed one.

    That is the way of points, not of images: the transforms that carry the moving image onto the fixed one carry points
    of the fixed image to the moving one. Of several transforms the first acts first, with --inverse the last.

    Parameters
    ----------
    file
        Points, one a row.
    transforms
        Files, as of apply.
    """
    if space is not None:
        choose("space", space, SPACES)
    files = _some(transforms)
    _check(output, overwrite)
    from fnreg.apply import apply_points

    print_table(apply_points(file, files, output, inverse=inverse, space=cast("Any", space), like=like), as_json)
    return OK


@app.command
def invert(
    transform: Path,
    /,
    *,
    output: File,
    like: Like = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Write the inverse of a transform, which maps moving points to fixed points, and tell how good it is.

    Parameters
    ----------
    transform
        A file, as of apply.
    """
    _check(output, overwrite)
    from fnreg import convert

    print_table(convert.invert(transform, output, like=like), as_json)
    return OK


@app.command
def compose(
    *transforms: Path,
    output: File,
    like: Like = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Write several transforms as one: the first acts first on fixed points, as of apply.

    Parameters
    ----------
    transforms
        Files, as of apply.
    """
    files = _some(transforms)
    _check(output, overwrite)
    from fnreg import convert

    print_table(convert.compose(files, output, like=like), as_json)
    return OK


@app.command
def convert(
    transform: Path,
    /,
    *,
    to: Annotated[
        str,
        option(
            "itk (.tfm, .txt, .h5; .mat for linear ones), ants (-o is a prefix of 0GenericAffine.mat and "
            "1Warp.nii.gz), elastix (-o is a folder for TransformParameters.0.txt and so on), fnreg (.safetensors), "
            "displacement (.nii, .nii.gz, .mha, .nrrd) or l2r (.nii, .nii.gz: X x Y x Z x 3 in voxels, as Learn2Reg "
            "takes it)."
        ),
    ],
    output: File,
    like: Like = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Write a transform in the form of another program; it still maps fixed points to moving points.

    Parameters
    ----------
    transform
        A file, as of apply.
    """
    choose("form", to, FORMS)
    if to not in ("ants", "elastix"):
        _check(output, overwrite)
    from fnreg import convert

    print_table(convert.convert(transform, output, to=to, like=like, overwrite=overwrite), as_json)
    return OK


@app.command
def jacobian(
    *transforms: Path,
    output: File,
    log: Annotated[bool, option("Write its natural logarithm.")] = False,
    like: Like = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Write the Jacobian's determinant as NIfTI: how volumes change; tell its range and where the map folds.

    Parameters
    ----------
    transforms
        Files, as of apply.
    """
    files = _some(transforms)
    _check(output, overwrite)
    from fnreg import convert

    print_table(convert.jacobian(files, output, log=log, like=like), as_json)
    return OK
