"""Mappings as ITK's files, which ITK, SimpleITK, ANTs, Slicer and elastix read.

Their world is ours: LPS, and from fixed to moving points.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from fnreg.extras import require
from fnreg.grid import Grid
from fnreg.io.files import PathLike, WriteError, write_bytes
from fnreg.transforms.base import Mapping, Sequential, first_domain

DENSE_SUFFIXES = (".h5", ".tfm", ".txt")


def write_itk(path: PathLike, mapping: Mapping) -> None:
    """Write a mapping as a transform of ITK; all of the file or nothing.

    A linear one becomes an affine transform in text, usually `.tfm`: T(p) = A (p - c) + c + t with the middle of the
    domain as centre c; 17 digits, so no bit is lost.  Any other one needs the extra `itk` and becomes a displacement
    field of float64 at the voxels of its domain, `.h5` or, larger, `.tfm`; parts that are linear stay so, in a
    composite transform.  ITK interpolates the field linearly and knows no displacement outside of it.

    Raises ValueError for a batch and for what is not finite, WriteError where the file cannot be written,
    MissingExtraError without SimpleITK.
    """
    if mapping.transform.linear:
        write_bytes(path, _text(mapping).encode("ascii"))
        return
    if not str(path).lower().endswith(DENSE_SUFFIXES):
        raise WriteError(f"{path}: expected a name that ends in .h5 or .tfm")
    sitk: Any = require("SimpleITK", "itk", f"writing {path}")
    made = [_field(sitk, part) if not part.transform.linear else _affine_of(sitk, part) for part in parts(mapping)]
    whole = made[0] if len(made) == 1 else sitk.CompositeTransform(made[::-1])  # ITK's last acts first
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / f"transform{Path(path).suffix.lower()}"
            sitk.WriteTransform(whole, str(scratch))
            stored = scratch.read_bytes()
            point = first_domain(mapping.domain).center.tolist()
            if sitk.ReadTransform(str(scratch)).TransformPoint(point) != whole.TransformPoint(point):
                raise WriteError(f"{path} cannot be written: what was written does not read back")
    except (OSError, RuntimeError) as problem:
        raise WriteError(f"{path} cannot be written: {' '.join(str(problem).split())}") from problem
    write_bytes(path, stored)


def parts(mapping: Mapping) -> list[Mapping]:
    """The mappings of which a composition consists, the one that acts first at the front."""
    if not isinstance(mapping.transform, Sequential):
        return [mapping]
    transforms = mapping.transform.transforms
    domains = (mapping.domain,) * len(transforms) if isinstance(mapping.domain, Grid) else mapping.domain
    each = zip(mapping.params, domains, transforms, strict=True)
    return [part for params, domain, transform in each for part in parts(Mapping(params, domain, transform))]


def _affine_of(sitk: Any, mapping: Mapping) -> Any:
    parameters, center = _affine(mapping)
    made = sitk.AffineTransform(len(center))
    made.SetFixedParameters(center)
    made.SetParameters(parameters)
    return made


def _field(sitk: Any, mapping: Mapping) -> Any:
    """The displacement at the voxels of the domain as ITK's transform."""
    grid = first_domain(mapping.domain)
    field = mapping.displacement().detach().cpu().to(torch.float64)
    if field.ndim != grid.ndim + 1 or grid.ndim not in (2, 3):
        raise ValueError(f"the displacement has shape {tuple(field.shape)}: ITK holds one map of 2 or 3 axes")
    if not bool(torch.isfinite(field).all()):
        raise ValueError("the displacement is not finite: ITK could not use it")
    image = sitk.GetImageFromArray(field.movedim(0, -1).contiguous().numpy(), isVector=True)
    image.SetOrigin(grid.origin.tolist())
    image.SetSpacing(grid.spacing.tolist())
    image.SetDirection(grid.direction.flatten().tolist())
    return sitk.DisplacementFieldTransform(image)


def _affine(mapping: Mapping) -> tuple[list[float], list[float]]:
    """ITK's parameters of a linear mapping, and the centre."""
    matrix = mapping.matrix().detach().cpu()
    dimension = first_domain(mapping.domain).ndim
    if matrix.ndim != 2 or dimension not in (2, 3):
        raise ValueError(
            f"the mapping's matrix has shape {tuple(matrix.shape)}: ITK's text holds one map of 2 or 3 axes"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the mapping's matrix is not finite: ITK could not read it")
    center = first_domain(mapping.domain).center.detach().cpu()
    linear, offset = matrix[:-1, :-1], matrix[:-1, -1]
    translation = offset - center + linear @ center
    return [*linear.flatten().tolist(), *translation.tolist()], center.tolist()


def _text(mapping: Mapping) -> str:
    parameters, center = _affine(mapping)
    lines = [
        "#Insight Transform File V1.0",
        "#Transform 0",
        f"Transform: AffineTransform_double_{len(center)}_{len(center)}",
        "Parameters: " + " ".join(repr(value) for value in parameters),
        "FixedParameters: " + " ".join(repr(value) for value in center),
    ]
    return "\n".join(lines) + "\n"
