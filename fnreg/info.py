"""What an image or a transform file holds, as a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fnreg import io
from fnreg.io.image import suffix
from fnreg.pytree import tree_leaves
from fnreg.transforms.base import Mapping, first_domain
from fnreg.transforms.linear import decompose
from fnreg.transforms.rotation import matrix_to_angle


def describe(file: Path) -> dict[str, Any]:
    """Names and values in reading order.  Raises ImageReadError or TransformReadError."""
    if suffix(file) == ".safetensors":
        return {"file": str(file)} | _mapping(io.read_transform(file))
    image = io.read_image(file)
    values = image.data[torch.isfinite(image.data)].double()
    found: dict[str, Any] = {
        "file": str(file),
        "size": " x ".join(map(str, image.grid.size)),
        "spacing": image.grid.spacing.tolist(),
        "origin": image.grid.origin.tolist(),
        "values": str(image.data.dtype).removeprefix("torch."),
    }
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
    try:
        matrix = mapping.matrix()
    except ValueError:
        return found
    if matrix.ndim > 2:
        return found | {"pairs": len(matrix)}
    found["matrix"] = matrix.tolist()
    _, factors = decompose(matrix)
    if domain.ndim == 2:
        found["rotation in degrees"] = math.degrees(float(matrix_to_angle(factors.rotation)))
    found["scale"] = factors.scale.tolist()
    found["shift of the middle"] = (mapping.map_points(domain.center[None])[0] - domain.center).tolist()
    return found
