"""What an image, a transform or a displacement file holds, as a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fnreg import fields, io
from fnreg.image import Image
from fnreg.io.field import holds_displacement
from fnreg.io.image import NIFTI, PICTURES, suffix
from fnreg.io.itk import ITK_SUFFIXES
from fnreg.io.volume import read_nifti
from fnreg.notes import hearing
from fnreg.pytree import batch_axes, tree_leaves
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
from fnreg.transforms.factors import decompose
from fnreg.transforms.rotation import matrix_to_angle

UNIT_NAMES = ("not told, taken for mm", "m", "mm", "µm")  # of NIfTI's codes


def describe(file: Path) -> dict[str, Any]:
    """Names and values in reading order.  Raises ImageReadError or TransformReadError."""
    kind, told = suffix(file), {"file": str(file)}
    if kind == ".safetensors":
        return told | _mapping(io.read_transform(file))
    if kind in NIFTI:
        return told | _nifti(file)
    if kind in ITK_SUFFIXES:
        mapping = io.read_transform(file)
        return told | (_linear(mapping) if mapping.transform.linear else _regularity(mapping))
    return told | (_image(io.read_image(file)) if kind in PICTURES else _voxels(file))


def _voxels(file: Path) -> dict[str, Any]:
    """Of a displacement or of images."""
    if holds_displacement(file):
        return _regularity(io.read_displacement(file))
    return _image(io.read_series(file))


def _nifti(file: Path) -> dict[str, Any]:
    """What the header says, and of displacements or images what they hold."""
    with hearing() as heard:
        header, extensions, _ = read_nifti(file, voxels=False)
        rest = _voxels(file)
    fields = header.fields
    text = bytes(fields["descrip"]).split(b"\0")[0].decode("latin1")
    order = "little" if header.dtype.newbyteorder("=").newbyteorder("<") == header.dtype else "big"
    found: dict[str, Any] = {
        "format": f"NIfTI-{1 if fields.sizeof_hdr == 348 else 2}",
        "stored": f"{'colours of ' if header.colour else ''}{header.dtype.newbyteorder('=')}, {order} endian",
        "place by": header.taken,
        "qform code": int(fields["qform_code"]),
        "sform code": int(fields["sform_code"]),
        "unit of length": UNIT_NAMES[int(fields["xyzt_units"]) & 7],
    }
    found |= {"slope and intercept": [header.slope, header.inter]} if (header.slope, header.inter) != (1, 0) else {}
    found |= {"description": text} if text else {}
    found |= {"bytes of extensions": len(extensions) - 4} if len(extensions) > 4 else {}
    notes = [note.text.removeprefix(f"{file} ") for note in heard if note.kind is io.GeometryWarning]
    return found | ({"warning": notes[0]} if notes else {}) | rest


def _image(image: Image) -> dict[str, Any]:
    """One image, or the volumes of a series."""
    values = image.data[torch.isfinite(image.data)].double()
    found: dict[str, Any] = {"size": " x ".join(map(str, image.grid.size))}
    if image.data.ndim > image.grid.ndim + 1 and len(image.data) > 1:
        found["volumes"] = len(image.data)
    if image.channels > 1:
        found["channels"] = image.channels
    found["spacing"] = image.grid.spacing.tolist()
    found["origin"] = image.grid.origin.tolist()
    if not torch.equal(image.grid.direction, torch.eye(image.grid.ndim, dtype=torch.float64)):
        found["direction"] = image.grid.direction.tolist()
    found["values"] = str(image.data.dtype).removeprefix("torch.")
    if len(values):
        found |= {"lowest": float(values.min()), "highest": float(values.max()), "mean": round(float(values.mean()), 6)}
    if len(values) < image.data.numel():
        found["not finite"] = image.data.numel() - len(values)
    return found


def _mapping(mapping: Mapping) -> dict[str, Any]:
    domain = first_domain(mapping.domain)
    found: dict[str, Any] = {
        "transform": repr(mapping.transform),
        "domain": repr(domain),
        "parameters": sum(leaf.numel() for leaf in tree_leaves(mapping.params)),
    }
    _, sizes = batch_axes("mapping", mapping, mapping.ranks())
    if sizes:
        return found | {"pairs": next(iter(sizes.values()))}
    return found | (_linear(mapping) if mapping.transform.linear else _regularity(mapping))


def _regularity(mapping: Mapping) -> dict[str, Any]:
    """Of a map with a field: its grid, how far it moves and how regular it is; linear parts count."""
    grid = first_domain(next(part for part in mapping.parts() if not part.transform.linear).domain)
    field = mapping.displacement(grid)
    told = fields.statistics(field, grid)
    found: dict[str, Any] = {
        "size": " x ".join(map(str, grid.size)),
        "spacing": grid.spacing.tolist(),
        "origin": grid.origin.tolist(),
        "largest displacement": float(told.max_displacement),
        "mean displacement": float(field.norm(dim=0).mean()),
        "least Jacobian determinant": float(told.min_determinant),
        "largest Jacobian determinant": float(told.max_determinant),
        "folds at voxels": int(fields.folds(field, grid)),
        "folds in cells between": int(fields.folded_cells(field, grid)),
    }
    linear = [part for part in mapping.parts() if part.transform.linear]
    return found | ({"linear parts": [part.matrix().tolist() for part in linear]} if linear else {})


def _linear(mapping: Mapping) -> dict[str, Any]:
    domain, matrix = first_domain(mapping.domain), mapping.matrix()
    found: dict[str, Any] = {"matrix": matrix.tolist()}
    _, factors = decompose(matrix)
    if domain.ndim == 2:
        found["rotation in degrees"] = math.degrees(float(matrix_to_angle(factors.rotation)))
    found["scale"] = factors.scale.tolist()
    found["shift of the middle"] = (mapping.map_points(domain.center[None])[0] - domain.center).tolist()
    return found
