"""Mappings to and from files of any kind, by the suffix of the name and a look at the content."""

from __future__ import annotations

from pathlib import Path

import torch

from fnreg.grid import Grid
from fnreg.io.elastix import is_elastix, read_elastix
from fnreg.io.field import read_displacement, read_itk
from fnreg.io.files import PathLike, TransformReadError, WriteError, read_bytes
from fnreg.io.image import suffix
from fnreg.io.itk import ITK_SUFFIXES, write_itk
from fnreg.io.itk_text import TITLE
from fnreg.io.lossless import read_lossless, write_lossless
from fnreg.io.nifti import SUFFIXES, VECTOR_SUFFIXES, write_displacement
from fnreg.transforms.base import Mapping

LOSSLESS = ".safetensors"
TRANSFORM_SUFFIXES = (LOSSLESS, *ITK_SUFFIXES, *SUFFIXES, *VECTOR_SUFFIXES)


def read_transform(path: PathLike) -> Mapping:
    """A mapping from fixed to moving points from a file, on the CPU.

    path : its suffix says how it is read
        .safetensors, without loss, what `write_transform` wrote;
        .tfm, .txt, .mat, .h5, a transform of ITK or ANTs: see `read_itk`;
        .txt, parameters of elastix: see `read_elastix`;
        .nii, .nii.gz, .mha, .nrrd, a displacement: see `read_displacement`

    .h5, .mha and .nrrd need the extra `itk`.  No file can run code.  Raises TransformReadError where the file is
    missing, damaged, of another kind than its name says, or holds what is no such map; MissingExtraError without
    SimpleITK where it is needed.

    >>> import fnreg, tempfile
    >>> grid = fnreg.Grid((4, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fnreg.io.write_transform(f"{folder}/a.tfm", fnreg.Mapping(fnreg.Rigid().init(grid), grid, fnreg.Rigid()))
    ...     fnreg.io.read_transform(f"{folder}/a.tfm").matrix().diag().tolist()
    [1.0, 1.0, 1.0]
    """
    kind = suffix(path)
    if kind not in TRANSFORM_SUFFIXES:
        raise TransformReadError(f"{path}: expected a name that ends in {', '.join(TRANSFORM_SUFFIXES)}")
    held = _held(path)
    if held is not None and kind not in held:
        raise TransformReadError(f"{path} is named {kind} but holds what ends in {held[0]}: rename it")
    if kind == LOSSLESS:
        return read_lossless(path)
    if kind in ITK_SUFFIXES:
        return read_elastix(path) if held == (".txt",) else read_itk(path)
    return read_displacement(path)


def _held(path: PathLike) -> tuple[str, ...] | None:
    """The suffixes that go with the content, the usual one first; None where the first bytes do not tell."""
    data = read_bytes(path, TransformReadError)
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return (".h5",)
    if data.startswith(TITLE):
        return (".tfm", ".txt")
    if data.startswith(b"\x1f\x8b") or data[344:347] == b"n+1" or data[4:7] == b"n+2":
        return (".nii.gz", ".nii")
    if data.startswith(b"NRRD000"):
        return (".nrrd",)
    if data.startswith((b"ObjectType", b"NDims")):
        return (".mha",)
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return (LOSSLESS,)
    return (".txt",) if is_elastix(data[: 2**16]) else None


def write_transform(
    path: PathLike, mapping: Mapping, *, grid: Grid | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a mapping; all of the file or nothing.

    path : its suffix says what becomes of it
        .safetensors, transform, parameters and grids without loss, a batch as one; the same bytes for the same mapping;
        .tfm, .txt, .h5, a transform of ITK, and .mat, a linear one, as ANTs has it: see `write_itk`;
        .nii, .nii.gz, .mha, .nrrd, its displacement at the voxels of a grid: see `write_displacement`
    grid : of displacements only; default the mapping's own domain
    dtype : of displacements only; default that of the displacement

    .h5, .mha and .nrrd need the extra `itk`.  Raises WriteError where the file cannot be written, ValueError for what
    the format cannot hold, MissingExtraError without SimpleITK where it is needed.

    >>> import fnreg, tempfile
    >>> mapping = fnreg.Mapping(fnreg.Rigid().init(fnreg.Grid((4, 3))), fnreg.Grid((4, 3)), fnreg.Rigid())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fnreg.io.write_transform(f"{folder}/a.safetensors", mapping)
    ...     fnreg.io.read_transform(f"{folder}/a.safetensors").transform
    Rigid()
    """
    kind = suffix(path)
    if kind in (*SUFFIXES, *VECTOR_SUFFIXES):
        write_displacement(path, mapping, grid=grid, dtype=dtype)
        return
    if kind not in TRANSFORM_SUFFIXES:
        raise WriteError(f"{Path(path)}: expected a name that ends in {', '.join(TRANSFORM_SUFFIXES)}")
    if grid is not None or dtype is not None:
        raise ValueError(f"{path} is no displacement, so it takes no grid and no dtype: name it .nii.gz, or leave both")
    (write_lossless if kind == LOSSLESS else write_itk)(path, mapping)
