"""Mappings as elastix' text files, a chain of `TransformParameters.0.txt` and those that begin with it.

What the names mean is told in elastix' manual, https://elastix.dev; see `fnreg.io.elastix`, which reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fnreg.grid import Grid
from fnreg.io.files import PathLike, write_bytes
from fnreg.io.itk_parts import Part, stored
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
from fnreg.transforms.held import Held
from fnreg.transforms.spline import FFD


def write_elastix(folder: PathLike, mapping: Mapping, *, grid: Grid | None = None) -> list[Path]:
    """Write a mapping as `TransformParameters.N.txt` of elastix into a folder that is there; returns the files.

    grid : of the fixed image, on which transformix resamples; default the mapping's own domain

    Number 0 acts first on fixed points; each of the others names the one before it as its initial transform, so
    transformix takes the last: `transformix -tp TransformParameters.1.txt`.  The names are without a folder, so start
    transformix in the folder of the files; versions since the middle of 2023 look beside the file as well.  The name of
    the initial transform is the one that all versions read, `InitialTransformParametersFileName`.  A linear part
    becomes an AffineTransform, `FFD` a BSplineTransform with its control points and one more on each side, which beyond
    the domain does not move points.  Numbers have 17 digits, so no bit is lost.

    Raises ValueError for maps with another field, which elastix' own transforms cannot hold, for a batch, for other
    than 2 or 3 axes and for what is not finite; WriteError where a file cannot be written.

    >>> import fnreg, tempfile
    >>> mapping = fnreg.Mapping(fnreg.Rigid().init(fnreg.Grid((4, 3))), fnreg.Grid((4, 3)), fnreg.Rigid())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file] = fnreg.io.write_elastix(folder, mapping)
    ...     file.name, fnreg.io.read_transform(file).domain
    ('TransformParameters.0.txt', Grid(size=(4, 3), spacing=[1.0, 1.0], origin=[0.0, 0.0]))
    """
    for part in mapping.parts():
        transform = part.transform
        while isinstance(transform, Held):
            transform = transform.transform
        if not (transform.linear or isinstance(transform, FFD)):
            raise ValueError(
                f"elastix has no {transform}: its files hold affine maps and cubic B-splines, FFD; write a "
                "displacement instead, fnreg convert --to displacement"
            )
    where = (first_domain(mapping.domain) if grid is None else grid).to("cpu")
    made = stored(mapping)
    if where.ndim != made[0].dimension:
        raise ValueError(f"grid has {where.ndim} axes but the mapping has {made[0].dimension}")
    files = names(folder, len(made))
    for number, (file, part) in enumerate(zip(files, made, strict=True)):
        initial = files[number - 1].name if number else "NoInitialTransform"
        write_bytes(file, _text(part, where, initial).encode("ascii"))
    return files


def names(folder: PathLike, count: int) -> list[Path]:
    """The files of a chain, what acts first at the front."""
    return [Path(folder) / f"TransformParameters.{number}.txt" for number in range(count)]


def _text(part: Part, grid: Grid, initial: str) -> str:
    """One file: the transform, the one before it, the fixed image, and how transformix resamples."""
    d, fixed = part.dimension, part.fixed
    lines: list[tuple[str, Any]] = [
        ("Transform", "BSplineTransform" if part.kind == "BSplineTransform" else "AffineTransform"),
        ("NumberOfParameters", [len(part.parameters)]),
        ("TransformParameters", part.parameters.tolist()),
        ("InitialTransformParametersFileName", initial),
        ("HowToCombineTransforms", "Compose"),
        ("FixedImageDimension", [d]),
        ("MovingImageDimension", [d]),
        ("FixedInternalImagePixelType", "float"),
        ("MovingInternalImagePixelType", "float"),
        *_place("", grid.size, grid.spacing.tolist(), grid.origin.tolist(), grid.direction.detach().numpy()),
        ("UseDirectionCosines", "true"),
    ]
    if part.kind == "BSplineTransform":
        size, origin, spacing = fixed[:d].astype(int).tolist(), fixed[d : 2 * d].tolist(), fixed[2 * d : 3 * d].tolist()
        lines += _place("Grid", size, spacing, origin, fixed[3 * d :].reshape(d, d))
        lines += [("BSplineTransformSplineOrder", [3]), ("UseCyclicTransform", "false")]
    else:
        lines.append(("CenterOfRotationPoint", fixed.tolist()))
    lines += [
        ("ResampleInterpolator", "FinalBSplineInterpolator"),
        ("FinalBSplineInterpolationOrder", [1]),  # linear, as `fnreg apply`
        ("Resampler", "DefaultResampler"),
        ("DefaultPixelValue", [0]),
        ("ResultImageFormat", "nii.gz" if d == 3 else "mha"),
        ("ResultImagePixelType", "float"),
        ("CompressResultImage", "false"),
    ]
    return "".join(f"({name} {_told(value)})\n" for name, value in lines)


def _place(
    name: str, size: Iterable[int], spacing: list[float], origin: list[float], direction: np.ndarray
) -> list[tuple[str, Any]]:
    """The geometry of an image or of control points; directions column by column."""
    return [
        (f"{name}Size", list(size)),
        (f"{name}Index", [0] * len(spacing)),
        (f"{name}Spacing", spacing),
        (f"{name}Origin", origin),
        (f"{name}Direction", direction.T.flatten().tolist()),
    ]


def _told(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else " ".join(map(repr, value))
