"""Displacements as vector images of ITK other than NIfTI, MetaImage and NRRD, by SimpleITK."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.io.files import PathLike, WriteError, write_bytes
from fnreg.io.nifti import finite_displacement
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain


def write_vectors(
    path: PathLike, mapping: Mapping, *, grid: Grid | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write T(p) - p as a vector image, .mha or .nrrd; the arguments and errors are those of `write_displacement`.

    These formats keep the grid in double precision, where NIfTI has single.  MissingExtraError without SimpleITK.
    """
    where = (first_domain(mapping.domain) if grid is None else grid).to("cpu")
    field = finite_displacement(mapping, grid, dtype).detach().cpu()
    if where.ndim not in (2, 3):
        raise ValueError(f"the grid has {where.ndim} axes: a vector image has 2 or 3")
    sitk: Any = require("SimpleITK", "itk", f"writing {path}")
    values = field.movedim(0, -1).contiguous().numpy()
    image = sitk.GetImageFromArray(values, isVector=True)
    image.SetOrigin(where.origin.tolist())
    image.SetSpacing(where.spacing.tolist())
    image.SetDirection(where.direction.flatten().tolist())
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / f"field{Path(path).suffix.lower()}"
            sitk.WriteImage(image, str(scratch), useCompression=False)
            stored = scratch.read_bytes()
        if not stored.endswith(values.tobytes()):  # ITK may return as if all were well where the disk is full
            raise WriteError(f"{path} cannot be written: what was written does not read back")
    except (OSError, RuntimeError) as problem:
        raise WriteError(f"{path} cannot be written: {' '.join(str(problem).split())}") from problem
    write_bytes(path, stored)
