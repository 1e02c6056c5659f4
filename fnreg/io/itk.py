"""Mappings as ITK's files, which ITK, SimpleITK, ANTs, Slicer and elastix read.

Their world is ours: LPS, and from fixed to moving points.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fnreg.extras import require
from fnreg.io.files import PathLike, WriteError, write_bytes
from fnreg.io.itk_parts import Part, stored
from fnreg.io.itk_text import mat_of, text_of
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain

ITK_SUFFIXES = (".h5", ".tfm", ".txt", ".mat")


def write_itk(path: PathLike, mapping: Mapping) -> None:
    """Write a mapping as a transform of ITK; all of the file or nothing.

    path : ends in .tfm or .txt, text; .mat, for linear mappings, as ANTs names them; .h5, which needs the extra `itk`

    A linear mapping becomes an affine transform: T(p) = A (p - c) + c + t with the middle of the domain as centre c.
    `FFD` becomes ITK's cubic B-spline with our control points, and one more on each side.  Any other one becomes a
    displacement field of float64 at the voxels of its domain.  Parts of a composition stay parts, in a composite
    transform.  Text has 17 digits, so no bit is lost.

    ITK interpolates a field linearly, as `Displacement` does; beyond the domain ITK's fields and splines do not move
    points, while ours go on as at the border.

    Raises ValueError for a batch and for what is not finite, WriteError where the file cannot be written,
    MissingExtraError without SimpleITK for .h5.
    """
    kind = Path(path).suffix.lower()
    if kind == ".mat" and not mapping.transform.linear:
        raise WriteError(f"{path}: .mat holds linear transforms, not {mapping.transform}: name it .tfm or .h5")
    if kind not in ITK_SUFFIXES:
        raise WriteError(f"{path}: expected a name that ends in .h5 or .tfm, or .mat for linear transforms")
    made = stored(mapping)[::-1]  # ITK's last acts first
    if kind == ".h5":
        write_bytes(path, _hdf5(path, made, first_domain(mapping.domain).center.tolist()))
    else:
        write_bytes(path, mat_of(made[0]) if kind == ".mat" else text_of(made))


def to_sitk_transform(mapping: Mapping) -> Any:
    """SimpleITK's transform of a mapping: what `write_itk` writes, in memory.

    An `AffineTransform`, `BSplineTransform`, `DisplacementFieldTransform`, or of a composition a `CompositeTransform`,
    in which ITK's last acts first.  It shares no memory with the mapping.  Raises ValueError for a batch, for other
    than 2 or 3 axes and for what is not finite; MissingExtraError.
    """
    sitk: Any = require("SimpleITK", "itk", "a transform of SimpleITK")
    return _whole(sitk, stored(mapping)[::-1])


def _whole(sitk: Any, made: list[Part]) -> Any:
    each = [_transform(sitk, part) for part in made]
    return each[0] if len(each) == 1 else sitk.CompositeTransform(each)


def _hdf5(path: PathLike, made: list[Part], point: list[float]) -> bytes:
    """The bytes that ITK writes, after reading them back."""
    sitk: Any = require("SimpleITK", "itk", f"writing {path}")
    whole = _whole(sitk, made)
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / "transform.h5"
            sitk.WriteTransform(whole, str(scratch))
            if sitk.ReadTransform(str(scratch)).TransformPoint(point) != whole.TransformPoint(point):
                raise WriteError(f"{path} cannot be written: what was written does not read back")
            return scratch.read_bytes()
    except (OSError, RuntimeError) as problem:
        raise WriteError(f"{path} cannot be written: {' '.join(str(problem).split())}") from problem


def _transform(sitk: Any, part: Part) -> Any:
    """SimpleITK's object."""
    d = part.dimension
    if part.kind == "DisplacementFieldTransform":
        size = part.fixed[:d].astype(int).tolist()
        image = sitk.GetImageFromArray(part.parameters.reshape(*size[::-1], d), isVector=True)
        image.SetOrigin(part.fixed[d : 2 * d].tolist())
        image.SetSpacing(part.fixed[2 * d : 3 * d].tolist())
        image.SetDirection(part.fixed[3 * d :].tolist())
        return sitk.DisplacementFieldTransform(image)
    made = sitk.AffineTransform(d) if part.kind == "AffineTransform" else sitk.BSplineTransform(d, 3)
    made.SetFixedParameters(part.fixed.tolist())
    made.SetParameters(np.ascontiguousarray(part.parameters).tolist())
    return made
