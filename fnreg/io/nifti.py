"""Fields and maps of numbers as NIfTI, with their place in the world: `.nii` and `.nii.gz`; fields as `.mha`, `.nrrd`.

NIfTI's world is RAS, ours and ITK's is LPS: the affine is turned.  Vectors are stored as ITK, ANTs and greedy read them
(X, Y, Z, 1, D), intent 1007, with components in LPS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.image import Image
from fnreg.io.files import PathLike
from fnreg.io.simpleitk import write_itk_image
from fnreg.io.volume import VECTOR, write_nifti
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain

SUFFIXES = (".nii", ".nii.gz")
VECTOR_SUFFIXES = (".mha", ".nrrd")  # of vector images that SimpleITK reads and writes


def write_displacement(
    path: PathLike, mapping: Mapping, *, grid: Grid | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write T(p) - p at the voxels of a grid as a vector image of 2 or 3 axes; all of the file or nothing.

    path : ends in .nii or .nii.gz; or, with the extra `itk`, in .mha or .nrrd, which keep the grid in double precision
    grid : default the mapping's own domain
    dtype : of the values, torch.float32 or torch.float64, default that of the displacement

    The values are world vectors.  ITK makes a `DisplacementFieldTransform` of it, ANTs
    and greedy a warp; they know no displacement outside of the grid.  Raises ValueError for a batch and for values
    that are not finite, WriteError where the file cannot be written, MissingExtraError without SimpleITK where it is
    needed.
    """
    where, field = first_domain(mapping.domain) if grid is None else grid, finite_displacement(mapping, grid, dtype)
    if str(path).lower().endswith(VECTOR_SUFFIXES):
        write_itk_image(path, field.detach().cpu().contiguous().numpy(), where.to("cpu"))
        return
    _write(path, field, where, VECTOR)


def finite_displacement(mapping: Mapping, grid: Grid | None, dtype: torch.dtype | None = None) -> Tensor:
    """T(p) - p at the voxels of a grid, (D, [Z,] Y, X); ValueError for a batch, for what is not finite, and for a type
    that files of vectors do not have."""
    where = first_domain(mapping.domain) if grid is None else grid
    field = mapping.displacement(grid)
    if field.ndim != where.ndim + 1:
        raise ValueError(
            f"the displacement has shape {tuple(field.shape)}: a file holds one map, take one of the batch"
        )
    if not bool(torch.isfinite(field).all()):
        raise ValueError("the displacement is not finite: other programs could not use it")
    kind = field.dtype if dtype is None else dtype
    if kind not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {kind}: expected torch.float32 or torch.float64")
    return field.to(kind)


def write_learn2reg(path: PathLike, mapping: Mapping, *, grid: Grid | None = None) -> None:
    """Write a displacement as the Learn2Reg challenges take it, NIfTI of shape (X, Y, Z, 3) in voxels, float32.

    grid : of the fixed image, default the mapping's own domain

    The vector d at the voxel i of the fixed image says that i + d is the voxel of the moving image, which must lie on
    the same grid, as it does in the data of these challenges: d = G^-1 T(G i) - i with G from voxels to the world.
    Components are in the order of the file's axes X, Y, Z.  That is what SciPy's `map_coordinates` takes after
    adding the identity, https://learn2reg.grand-challenge.org/Submission.  The header is that of the grid.  The file
    does not say what it holds: no program can tell it from a series of three images, and `read_transform` refuses it.

    Raises ValueError for a grid that is not 3-D, for a batch and for values that are not finite, WriteError where the
    file cannot be written.
    """
    where, field = first_domain(mapping.domain) if grid is None else grid, finite_displacement(mapping, grid)
    if where.ndim != 3:
        raise ValueError(f"the grid has {where.ndim} axes: Learn2Reg's displacements have 3")
    vectors = where.convert(field.to(torch.float64).movedim(0, -1), "world", "index", vectors=True)
    values = vectors.movedim(-1, 0).to(torch.float32).detach().cpu().contiguous().numpy()
    write_nifti(path, values, where, fourth=True)


def write_map(path: PathLike, image: Image) -> None:
    """Write one number per voxel of 2 or 3 axes, such as `Registration.jacobian()`, as `write_displacement` does."""
    if image.data.ndim != image.grid.ndim + 1 or image.channels != 1:
        raise ValueError(f"data has shape {tuple(image.data.shape)}: expected one image of one channel")
    _write(path, image.data, image.grid, 0)


def _write(path: PathLike, data: Tensor, grid: Grid, intent: int) -> None:
    """Data (C, [Z,] Y, X) with the grid in the header."""
    write_nifti(path, data.detach().cpu().contiguous().numpy(), grid, intent=intent)
