"""Displacements and ITK's transforms from files, as mappings: also what `write_displacement` and `write_itk` wrote.

Their vectors are in LPS and lead from fixed to moving points, as ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fnreg.extras import require
from fnreg.io.files import ImageReadError, PathLike, TransformReadError, read_bytes
from fnreg.io.header import Header
from fnreg.io.itk import ITK_SUFFIXES
from fnreg.io.itk_parts import Part, field_mapping, grid_mapping, joined, known, mapping_of
from fnreg.io.itk_text import parse_mat, parse_text
from fnreg.io.nifti import SUFFIXES, VECTOR_SUFFIXES
from fnreg.io.simpleitk import CHECKS, quiet
from fnreg.io.stored import tell
from fnreg.io.volume import VECTOR, read_nifti
from fnreg.transforms.base import Mapping


def holds_displacement(path: PathLike) -> bool:
    """Whether a file is one for `read_displacement`, by its name and what its header says of its values.

    Raises ImageReadError for headers of NIfTI that cannot be read, MissingExtraError without SimpleITK where it is
    needed; what else is wrong tells who reads the file.
    """
    kind = str(path).lower()
    if kind.endswith(SUFFIXES):
        return _is_field(read_nifti(path, voxels=False).header)
    if not kind.endswith(VECTOR_SUFFIXES):
        return False
    sitk: Any = require("SimpleITK", "itk", f"reading {path}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet(sitk):
            reader.ReadImageInformation()
    except RuntimeError:
        return False
    floats = reader.GetPixelID() in (sitk.sitkVectorFloat32, sitk.sitkVectorFloat64)  # colours are bytes
    return floats and reader.GetNumberOfComponents() == reader.GetDimension()


def _is_field(header: Header) -> bool:
    """One vector for each voxel, with as many components as there are axes."""
    vectors = int(header.fields["intent_code"]) == VECTOR and not header.colour
    return vectors and header.shape[:2] == (header.grid.ndim, 1)


def read_displacement(path: PathLike) -> Mapping:
    """The displacement of a vector image as a mapping.

    path : ends in .nii or .nii.gz, vectors (X, Y, Z, 1, D) of 2 or 3 axes and of intent 1007, as ITK, ANTs
        (`1Warp.nii.gz`) and greedy write them; or, with the extra `itk`, in .mha or .nrrd

    A 2-D field in NIfTI lies in the plane z = 0 and has one voxel along z.  Raises TransformReadError where the file is
    missing, damaged, holds no vectors or vectors that are not finite, or axes that are not at right angles;
    MissingExtraError without SimpleITK where it is needed.
    """
    kind = str(path).lower()
    if kind.endswith(VECTOR_SUFFIXES):
        return _vector_image(path)
    if not kind.endswith(SUFFIXES):
        known_ends = ", ".join((*SUFFIXES, *VECTOR_SUFFIXES))
        raise TransformReadError(f"{path}: expected a name that ends in .nii or .nii.gz, or any of {known_ends}")
    try:
        header, _, values = read_nifti(path)
    except ImageReadError as problem:
        raise TransformReadError(str(problem)) from problem
    grid, intent = header.grid, int(header.fields["intent_code"])
    if not _is_field(header):
        shape = " x ".join(map(str, values.shape[::-1]))
        raise TransformReadError(
            f"{path} holds values of shape {shape} and intent {intent}: expected the vectors of a displacement, "
            f"X x Y x Z x 1 x D with intent {VECTOR}"
        )
    tell(header.notes, path)
    vectors = values[:, 0] if (header.slope, header.inter) == (1, 0) else values[:, 0] * header.slope + header.inter
    return grid_mapping(path, vectors, grid)


def _vector_image(path: PathLike) -> Mapping:
    try:
        CHECKS[Path(path).suffix.lower()](path)
    except ImageReadError as problem:
        raise TransformReadError(str(problem)) from problem
    sitk: Any = require("SimpleITK", "itk", f"reading {path}")
    image = _read(path, "a vector image", sitk.ReadImage, str(path))
    dimension = image.GetDimension()
    count = image.GetNumberOfComponentsPerPixel()
    if count != dimension or dimension not in (2, 3):
        raise TransformReadError(
            f"{path} holds {count} values at each of {image.GetSize()} voxels: expected the vectors of a displacement, "
            "one component for each axis"
        )
    return _of_image(path, image)


def _of_image(path: PathLike, image: Any) -> Mapping:
    import SimpleITK as sitk  # the image is one of its own

    dimension = image.GetDimension()
    vectors = np.moveaxis(sitk.GetArrayFromImage(image), -1, 0)
    direction = np.reshape(image.GetDirection(), (dimension, dimension))
    return field_mapping(path, vectors, direction * image.GetSpacing(), np.array(image.GetOrigin()))


def _read(path: PathLike, what: str, read: Callable[[str], Any], name: str) -> Any:
    try:
        return read(name)
    except RuntimeError as problem:
        told = " ".join(str(problem).replace(name, str(path)).split())[-300:]
        raise TransformReadError(f"{path} is not {what}, or it is damaged: {told}") from problem


def read_itk(path: PathLike) -> Mapping:
    """ITK's transform as a mapping: linear ones, cubic B-splines, displacement fields, and compositions of these.

    path : ends in .tfm or .txt; .mat, as ANTs names affine ones; .h5, which needs the extra `itk`

    A B-spline becomes `FFD` with ITK's control points; of a composition the part that acts first, ITK's last, comes
    first.  A linear one alone has no domain: that of the mapping is one voxel at its centre.  Within their regions the
    maps are those of ITK; beyond them ITK's splines and fields do not move points, while ours go on as at the border.

    Raises TransformReadError where the file is missing, damaged, or of another kind; MissingExtraError without
    SimpleITK for .h5 and for classes that only ITK knows.
    """
    kind = Path(path).suffix.lower()
    if kind not in ITK_SUFFIXES:
        raise TransformReadError(f"{path}: expected a name that ends in {', '.join(ITK_SUFFIXES)}")
    data = read_bytes(path, TransformReadError)
    if kind != ".h5":
        found = (parse_mat if kind == ".mat" else parse_text)(path, data)
        if kind == ".mat" or all(known(part) for part in found):
            return joined([mapping_of(path, part) for part in found][::-1])  # ITK's last acts first
    sitk: Any = require("SimpleITK", "itk", f"reading {path}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / f"transform{kind}"
        scratch.write_bytes(data)
        whole = _read(path, "a transform of ITK", sitk.ReadTransform, str(scratch))
    return joined([_part(sitk, path, part) for part in _flat(sitk, whole)][::-1])


def from_sitk_transform(transform: Any) -> Mapping:
    """The mapping of a transform of SimpleITK in memory: the kinds that `read_itk` reads, with the same meaning.

    It shares no memory with the transform.  Raises TypeError for what is no transform of SimpleITK, TransformReadError
    for other kinds, for compositions without parts and for what is not finite; MissingExtraError.
    """
    sitk: Any = require("SimpleITK", "itk", "a transform of SimpleITK")
    if not isinstance(transform, sitk.Transform):
        raise TypeError(f"expected a transform of SimpleITK, got {type(transform).__name__}: for files read_transform")
    found = _flat(sitk, transform)
    if not found:
        raise TransformReadError("the transform is a composition without parts: expected one at least")
    return joined([_part(sitk, "the transform", part) for part in found][::-1])


def _flat(sitk: Any, transform: Any) -> list[Any]:
    """The transforms of which a composite one consists."""
    transform = transform.Downcast()
    if not isinstance(transform, sitk.CompositeTransform):
        return [transform]
    parts = [transform.GetNthTransform(k) for k in range(transform.GetNumberOfTransforms())]
    return [part for each in parts for part in _flat(sitk, each)]


def _part(sitk: Any, path: PathLike, transform: Any) -> Mapping:
    if isinstance(transform, sitk.DisplacementFieldTransform):
        return _of_image(path, transform.GetDisplacementField())
    dimension, fixed = transform.GetDimension(), np.array(transform.GetFixedParameters())
    if isinstance(transform, sitk.BSplineTransform) and transform.GetOrder() == 3:
        return mapping_of(path, Part("BSplineTransform", dimension, np.array(transform.GetParameters()), fixed))
    if not transform.IsLinear():
        raise TransformReadError(
            f"{path} holds a {transform.GetName()}: readable are linear transforms, cubic B-splines and displacement "
            "fields; sample it to a field first, sitk.TransformToDisplacementField"
        )
    # ITK itself tells what a linear one does to the origin and to the unit vectors.
    origin = np.array(transform.TransformPoint([0.0] * dimension))
    columns = [np.array(transform.TransformPoint(row.tolist())) - origin for row in np.eye(dimension)]
    linear = np.column_stack(columns)
    center = fixed[:dimension] if len(fixed) >= dimension else np.zeros(dimension)
    parameters = np.concatenate([linear.flatten(), origin - center + linear @ center])
    return mapping_of(path, Part("AffineTransform", dimension, parameters, center))
