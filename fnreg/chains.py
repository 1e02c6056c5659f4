"""Several transforms from files as one map, and one map to a file: what the commands on transforms share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fnreg import io
from fnreg.grid import Grid
from fnreg.io.files import TransformReadError
from fnreg.io.image import read_grid
from fnreg.io.itk_parts import joined
from fnreg.io.nifti import SUFFIXES, VECTOR_SUFFIXES
from fnreg.pytree import tree_leaves
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
from fnreg.transforms.linear import linear_mapping

DISPLACEMENTS = (*SUFFIXES, *VECTOR_SUFFIXES)


def read_chain(files: Sequence[Path], *, inverse: bool = False) -> Mapping:
    """The transforms of files one after another: the first acts first on points of the fixed image.

    So the last one acts first on the moving image, which is the order that antsApplyTransforms takes.

    inverse : of the whole chain, from moving to fixed points

    Raises TransformReadError where one cannot be read, holds a batch, or has other axes than the first; ValueError
    where there is no inverse.
    """
    found: list[Mapping] = []
    for file in files:
        mapping = io.read_transform(file)
        if any(
            leaf.ndim != rank for leaf, rank in zip(tree_leaves(mapping), tree_leaves(mapping.ranks()), strict=True)
        ):
            raise TransformReadError(f"{file} holds a batch of maps: expected one")
        if found and _axes(mapping) != _axes(found[0]):
            raise TransformReadError(
                f"{file} is a transform of {_axes(mapping)} axes but {files[0]} has {_axes(found[0])}"
            )
        found.append(mapping)
    whole = compose(found)
    return whole.inverse() if inverse else whole


def _axes(mapping: Mapping) -> int:
    return first_domain(mapping.domain).ndim


def compose(mappings: Sequence[Mapping]) -> Mapping:
    """Mappings one after another, the first acts first; neighbours that are linear become one matrix.

    One mapping alone stays as it is.
    """
    if len(mappings) == 1:
        return mappings[0]
    groups: list[Mapping] = []
    for part in (part for mapping in mappings for part in mapping.parts()):
        if groups and part.transform.linear and groups[-1].transform.linear:
            grid = max(first_domain(groups[-1].domain), first_domain(part.domain), key=lambda grid: grid.numel)
            groups[-1] = linear_mapping(part.matrix() @ groups[-1].matrix(), grid)
        else:
            groups.append(linear_mapping(part.matrix(), first_domain(part.domain)) if part.transform.linear else part)
    return joined(groups)


def grid_of(mapping: Mapping, like: Path | None) -> Grid:
    """The grid of an image, or without one that of the map; ValueError where the map has none or the axes differ."""
    if like is not None:
        grid = read_grid(like)
        if grid.ndim != _axes(mapping):
            raise ValueError(f"{like} has {grid.ndim} axes but the transform has {_axes(mapping)}")
        return grid
    bent = [first_domain(part.domain) for part in mapping.parts() if not part.transform.linear]
    grid = bent[0] if bent else first_domain(mapping.domain)
    if grid.numel == 1:
        raise ValueError("the transform has no grid of its own: give an image with --like")
    return grid


def write_chain(file: Path, mapping: Mapping, *, like: Path | None = None) -> None:
    """Write as `fnreg.io.write_transform`; a displacement on the grid that `grid_of` tells.

    SettingsError for a grid of what is no displacement.
    """
    if str(file).lower().endswith(DISPLACEMENTS):
        io.write_transform(file, mapping, grid=grid_of(mapping, like))
        return
    if like is not None:
        raise SettingsError(f"--like {like} is the grid of a displacement, and {file} is none: leave it out")
    io.write_transform(file, mapping)


def told(mapping: Mapping) -> str:
    """The transforms of a map in words."""
    return " then ".join(str(part.transform) for part in mapping.parts())
