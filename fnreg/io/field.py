"""Displacements and ITK's transforms from files, as mappings: also what `write_displacement` and `write_itk` wrote.

Their vectors are in LPS and lead from fixed to moving points, as ours.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.io.files import PathLike, TransformReadError, read_bytes
from fnreg.io.itk import DENSE_SUFFIXES
from fnreg.io.nifti import SUFFIXES, VECTOR
from fnreg.transforms.base import Mapping, Sequential
from fnreg.transforms.dense import Displacement
from fnreg.transforms.linear import linear_mapping

SKEW = 1e-4  # axes of a header that are less at right angles than this are not of a grid


def read_displacement(path: PathLike) -> Mapping:
    """The displacement of a NIfTI file as a mapping: vectors (X, Y, Z, 1, D) of 2 or 3 axes, of intent 1007.

    path : ends in .nii or .nii.gz
    A 2-D field lies in the plane z = 0 and has one voxel along z.  Raises TransformReadError where the file is missing,
    damaged, holds no vectors or vectors that are not finite, or axes that are not at right angles.
    """
    if not str(path).lower().endswith(SUFFIXES):
        raise TransformReadError(f"{path}: expected a name that ends in .nii or .nii.gz")
    data = read_bytes(path, TransformReadError)
    import nibabel  # here, for it takes a while
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    faults = (OSError, EOFError, ValueError, TypeError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
    try:
        stored = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        image = nibabel.Nifti1Image.from_bytes(stored)
        values, affine = np.asarray(image.dataobj), np.asarray(image.affine, dtype=float)
        intent = int(image.header["intent_code"])
    except faults as problem:
        told = " ".join(str(problem).split())
        raise TransformReadError(f"{path} is not a NIfTI file, or it is damaged: {told}") from problem
    dimension = values.shape[-1]
    if intent != VECTOR or values.ndim != 5 or values.shape[3] != 1 or dimension not in (2, 3):
        raise TransformReadError(
            f"{path} holds values of shape {values.shape} and intent {intent}: expected the vectors of a displacement, "
            f"(X, Y, Z, 1, D) with intent {VECTOR}"
        )
    if dimension == 2 and values.shape[2] != 1:
        raise TransformReadError(
            f"{path} holds vectors of 2 components at {values.shape[:3]} voxels: expected one slice"
        )
    vectors = values[:, :, 0, 0] if dimension == 2 else values[:, :, :, 0]
    axes = (*range(dimension), 3)
    lps = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)[np.ix_(axes, axes)]
    vectors = vectors.transpose(range(dimension, -1, -1))  # x first, components last: all the other way round
    return _mapping(path, vectors, lps[:-1, :-1], lps[:-1, -1])


def read_itk(path: PathLike) -> Mapping:
    """ITK's transform as a mapping, with the extra `itk`: linear ones, displacement fields, and compositions of these.

    path : ends in .tfm, .txt or .h5
    A linear one alone has no domain: that of the mapping is one voxel at its centre.  Raises TransformReadError where
    the file is missing, damaged, or of another kind; MissingExtraError without SimpleITK.
    """
    kind = Path(path).suffix.lower()
    if kind not in DENSE_SUFFIXES:
        raise TransformReadError(f"{path}: expected a name that ends in {', '.join(DENSE_SUFFIXES)}")
    data = read_bytes(path, TransformReadError)
    if kind != ".h5" and _cut_short(data):
        raise TransformReadError(f"{path} is not a transform of ITK, or it is damaged: its text ends too early")
    sitk: Any = require("SimpleITK", "itk", f"reading {path}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / f"transform{kind}"
        scratch.write_bytes(data)
        try:
            found = sitk.ReadTransform(str(scratch))
        except RuntimeError as problem:
            told = " ".join(str(problem).replace(str(scratch), str(path)).split())[-300:]
            raise TransformReadError(f"{path} is not a transform of ITK, or it is damaged: {told}") from problem
    parts = [_part(sitk, path, part) for part in _flat(sitk, found)][::-1]  # ITK's last acts first
    grid = next((part.domain for part in parts if not part.transform.linear), parts[0].domain)
    mappings = [Mapping(part.params, grid, part.transform) if part.transform.linear else part for part in parts]
    if len(mappings) == 1:
        return mappings[0]
    params, domains, transforms = zip(*((m.params, m.domain, m.transform) for m in mappings), strict=True)
    return Mapping(params, domains, Sequential(transforms))


def _cut_short(text: bytes) -> bool:
    """Whether a line, or the last one of a transform, is missing: ITK would take zeros in its place."""
    names = [line.split(b":")[0] for line in text.splitlines() if b"Transform: Composite" not in line]
    return not text.endswith(b"\n") or names.count(b"Transform") != names.count(b"FixedParameters")


def _flat(sitk: Any, transform: Any) -> list[Any]:
    """The transforms of which a composite one consists."""
    transform = transform.Downcast()
    if not isinstance(transform, sitk.CompositeTransform):
        return [transform]
    parts = [transform.GetNthTransform(k) for k in range(transform.GetNumberOfTransforms())]
    return [part for each in parts for part in _flat(sitk, each)]


def _part(sitk: Any, path: PathLike, transform: Any) -> Mapping:
    dimension = transform.GetDimension()
    if isinstance(transform, sitk.DisplacementFieldTransform):
        image = transform.GetDisplacementField()
        vectors = np.moveaxis(sitk.GetArrayFromImage(image), -1, 0)
        direction = np.reshape(image.GetDirection(), (dimension, dimension))
        return _mapping(path, vectors, direction * image.GetSpacing(), np.array(image.GetOrigin()))
    if not transform.IsLinear():
        raise TransformReadError(
            f"{path} holds a {transform.GetName()}: readable are linear transforms and displacement fields; sample it "
            "to a field first, sitk.TransformToDisplacementField"
        )
    origin = np.array(transform.TransformPoint([0.0] * dimension))
    columns = [np.array(transform.TransformPoint(row.tolist())) - origin for row in np.eye(dimension)]
    center = transform.GetFixedParameters()[:dimension] or (0.0,) * dimension
    matrix = torch.from_numpy(np.column_stack([*columns, origin]))
    if not bool(torch.isfinite(matrix).all()):
        raise TransformReadError(f"{path} does not hold finite numbers")
    return linear_mapping(matrix, Grid((1,) * dimension, center=list(center)))


def _mapping(path: PathLike, vectors: Any, axes: Any, origin: Any) -> Mapping:
    """A mapping from vectors (D, [Z,] Y, X) and the world's steps (D, D) from voxel to voxel, in columns."""
    spacing = np.linalg.norm(axes, axis=0)
    if vectors.size == 0:
        raise TransformReadError(f"{path} holds a field without voxels, or it is damaged")
    if not (np.isfinite(axes).all() and np.isfinite(origin).all() and (spacing > 0).all()):
        raise TransformReadError(f"{path} has no valid place in the world: its axes are {axes.tolist()}")
    left, _, right = np.linalg.svd(axes / spacing)
    direction = left @ right  # a header in single precision is not quite orthogonal
    if np.abs(direction - axes / spacing).max() > SKEW:
        raise TransformReadError(f"{path} has axes that are not at right angles, {axes.tolist()}: resample it")
    if not np.issubdtype(vectors.dtype, np.floating) or not np.isfinite(vectors).all():
        raise TransformReadError(f"{path} does not hold vectors of finite numbers")
    native = vectors.astype(vectors.dtype.newbyteorder("="), copy=False)
    if native.dtype not in (np.float32, np.float64):
        native = native.astype(np.float64)
    shape = vectors.shape[1:]
    grid = Grid(shape=shape, spacing=spacing.tolist(), origin=origin.tolist(), direction=direction.tolist())
    return Mapping({"displacement": torch.from_numpy(np.ascontiguousarray(native))}, grid, Displacement())
