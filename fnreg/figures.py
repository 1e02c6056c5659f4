"""A figure of images and transforms from files: what `fnreg plot` draws."""

from __future__ import annotations

import io as stream
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnreg import fields, io
from fnreg.chains import grid_of, read_chain, told
from fnreg.image import Image
from fnreg.io.field import holds_displacement
from fnreg.io.files import write_bytes
from fnreg.io.image import PICTURES, suffix
from fnreg.io.itk import ITK_SUFFIXES
from fnreg.io.transform import LOSSLESS
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain
from fnreg.transforms.warping import warp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE, TWO, THREE = ("slices",), ("checkerboard", "overlay", "difference"), ("overview",)
FLAT, ANY = ("grid", "quiver", "flow"), ("jacobian",)  # of 2-D maps, and of 2-D and 3-D ones
Place = tuple[float, float, float]


def draw(
    files: Sequence[Path],
    output: Path,
    *,
    kind: str | None = None,
    at: Place | None = None,
    like: Path | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Draw a figure of files and write it; returns a record of what it shows.

    files : images and transforms, in any order.  One image is shown by itself; two are fixed and moving, the moving one
        where the world places it, or through the transforms; three are fixed, moving and warped.  Transforms alone
        are a chain, see `fnreg.chains.read_chain`; beside one 2-D image they are drawn over it, which the grid does of
        the moving image and arrows of the fixed one
    kind : one of `fnreg.commands.figures.KINDS`, default the first of those that fit
    at : world point of the slices of 3-D images
    like : image whose grid shows transforms alone

    Raises SettingsError where files and `kind` do not go together, and what reading raises.
    """
    transforms = [file for file in files if is_transform(file)]
    names = [file for file in files if file not in transforms]
    mapping = read_chain(transforms) if transforms else None
    images = [io.read_image(name) for name in names]
    chosen = _choose(images, mapping, kind)
    _check_axes(names, images, mapping)
    if like is not None and images:
        raise SettingsError(f"--like {like} is the grid of transforms alone, and there are images: leave it out")
    axes = images[0].grid.ndim if images else first_domain(mapping.domain).ndim if mapping is not None else 0
    if at is not None and (axes == 2 or chosen in FLAT):
        raise SettingsError("--at is the point through which 3-D images are cut: leave it out here")
    pictures = [suffix(name) in PICTURES for name in (*names, *([] if like is None else [like]))]
    unit = ("pixels" if all(pictures) else "mm") if pictures else "mm" if axes == 3 else "world units"
    if title is None and len(images) == 2 and mapping is None and chosen != "difference":
        title = f"{names[0].name} and {names[1].name}, as they lie in the world"
    options: dict[str, Any] = {"unit": unit, "title": title}
    if mapping is not None and chosen in (*FLAT, *ANY):
        figure = _of_map(mapping, chosen, images[0] if images else None, like, at, options)
    else:
        figure = _of_images(images, mapping, chosen, options | {"at": at})
    shown = stream.BytesIO()
    figure.savefig(shown, format=suffix(output)[1:])
    write_bytes(output, shown.getvalue())
    record = {"kind": chosen, "images": [str(name) for name in names], "transforms": [str(file) for file in transforms]}
    return record | ({} if mapping is None else {"map": told(mapping)}) | {"output": str(output)}


def is_transform(path: Path) -> bool:
    """Whether a file is a transform by its name, or holds the vectors of a displacement."""
    return suffix(path) in (LOSSLESS, *ITK_SUFFIXES) or (path.is_file() and holds_displacement(path))


def _choose(images: list[Image], mapping: Mapping | None, kind: str | None) -> str:
    """The kind of figure; SettingsError where none fits, or the one that is asked for does not."""
    count, flat = len(images), mapping is not None and first_domain(mapping.domain).ndim == 2
    if mapping is None:
        fitting = {1: ONE, 2: TWO, 3: (*THREE, *TWO)}.get(count, ())
        what = f"{count} image{'s' * (count != 1)}"
    else:
        maps = (*FLAT, *ANY) if flat else ANY
        fitting = {0: maps, 1: FLAT[:2] if flat else (), 2: (*THREE, *TWO)}.get(count, ())
        what = f"{count or 'no'} image{'s' * (count != 1)} beside a {2 if flat else 3}-D transform"
    if not fitting:
        raise SettingsError(
            f"{what} make no figure: give one image, two (fixed and moving) or three (fixed, moving, warped), or a "
            "transform alone, or beside two images"
        )
    if kind is None:
        return fitting[0]
    if kind not in fitting:
        raise SettingsError(f"--kind {kind} does not show {what}: choose from {', '.join(fitting)}")
    return kind


def _check_axes(names: Sequence[Path], images: list[Image], mapping: Mapping | None) -> None:
    """ValueError unless all have as many axes."""
    found = {str(name): image.grid.ndim for name, image in zip(names, images, strict=True)}
    found |= {} if mapping is None else {"the transform": first_domain(mapping.domain).ndim}
    if len(set(found.values())) > 1:
        raise ValueError(f"{', '.join(f'{name} has {n} axes' for name, n in found.items())}: expected one number")


def _of_images(images: list[Image], mapping: Mapping | None, kind: str, options: dict[str, Any]) -> Figure:
    from fnreg import plot

    if kind in ONE:
        return plot.slices(images[0], **options)
    fixed, moving = images[:2]
    if len(images) == 3:
        warped = images[2]
    elif mapping is None:
        warped = moving.resample(fixed.grid, padding="zeros")
    else:
        warped = warp(moving, mapping, fixed.grid)
    if kind in THREE:
        return plot.overview(fixed, moving, warped, **options)
    return {"checkerboard": plot.checkerboard, "overlay": plot.overlay, "difference": plot.difference}[kind](
        fixed, warped, **options
    )


def _of_map(
    mapping: Mapping, kind: str, image: Image | None, like: Path | None, at: Place | None, options: dict[str, Any]
) -> Figure:
    from fnreg import plot

    linear = mapping.transform.linear and first_domain(mapping.domain).numel == 1
    grid = image.grid if image is not None and linear else grid_of(mapping, like)
    if kind == "grid":
        return plot.warped_grid(mapping, grid, image=image, **options)
    if kind == "quiver":
        return plot.quiver(mapping, grid, image=image, **options)
    field = mapping.displacement(grid)
    if kind == "flow":
        return plot.flow(field, grid, **options)
    return plot.jacobian(fields.determinant(field, grid), grid, at=at, **options)
