"""Transforms from files to other files: what `fnreg invert`, `compose`, `convert` and `jacobian` do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fnreg import fields, io
from fnreg.agreement import regularity, way_back
from fnreg.chains import DISPLACEMENTS, grid_of, read_chain, told, write_chain
from fnreg.chains import compose as join
from fnreg.image import Image
from fnreg.io.elastix_files import names
from fnreg.io.files import check_writable
from fnreg.io.itk import ITK_SUFFIXES
from fnreg.io.nifti import SUFFIXES
from fnreg.io.transform import TRANSFORM_SUFFIXES
from fnreg.output import OutputError, check_file
from fnreg.specs import SettingsError
from fnreg.transforms.base import Mapping
from fnreg.transforms.domain import first_domain

ENDINGS = {"itk": ITK_SUFFIXES, "fnreg": (".safetensors",), "displacement": DISPLACEMENTS, "l2r": SUFFIXES}
LEAST = 1e-6  # determinant, in logarithms


def invert(transform: Path, output: Path, *, like: Path | None = None) -> dict[str, Any]:
    """Write the inverse; the record tells how far there and back ends from the start, see `fnreg.agreement.way_back`.

    Raises ValueError where the map has no inverse, and what reading and writing raise.
    """
    check_writable(output, endings=TRANSFORM_SUFFIXES)
    mapping = read_chain([transform])
    inverse = mapping.inverse()
    write_chain(output, inverse, like=like)
    away = _missed(mapping, inverse)
    return {"transform": str(transform), "map": told(mapping), **away, "output": str(output)}


def _missed(mapping: Mapping, inverse: Mapping) -> dict[str, float | None]:
    """`way_back` at the voxels that a map without a fixed image has.

    Those are of its first part where that has a grid of its own.  Else those of the first field, after the linear parts
    before it: these may take its voxels far away, and what they do is exact.
    """
    if mapping.transform.linear:  # exact, and perhaps without a grid of its own
        return {"inverse_mean": 0.0, "inverse_max": 0.0}
    parts = mapping.parts()
    after = next(k for k, part in enumerate(parts) if not part.transform.linear)
    first, grid = first_domain(parts[0].domain), first_domain(parts[after].domain)
    if after == 0 or (first.numel > 1 and not first.same_as(grid)):  # what was joined has that of the field
        return way_back(mapping, inverse, first)
    return way_back(join(parts[after:]), join([inverse, *parts[:after]]), grid)


def compose(transforms: Sequence[Path], output: Path, *, like: Path | None = None) -> dict[str, Any]:
    """Write transforms one after another as one, in the order of `fnreg.chains.read_chain`."""
    check_writable(output, endings=TRANSFORM_SUFFIXES)
    mapping = read_chain(transforms)
    write_chain(output, mapping, like=like)
    return {"transforms": [str(path) for path in transforms], "map": told(mapping), "output": str(output)}


def convert(
    transform: Path, output: Path, *, to: str, like: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a transform in another form.

    to : "itk", "fnreg", "displacement" or "l2r", whose names end in one of `ENDINGS`; "ants" writes
        `OUTPUT0GenericAffine.mat` and `OUTPUT1Warp.nii.gz`, those of them that are needed; "elastix" writes
        `TransformParameters.N.txt` into the folder OUTPUT, see `fnreg.io.write_elastix`
    like : image on whose grid a displacement is written, for elastix the fixed image; default the grid of the transform

    Raises SettingsError for a name that does not go with `to`, OutputError where a file is in the way.
    """
    if to in ENDINGS and not str(output).lower().endswith(ENDINGS[to]):
        raise SettingsError(f"{output} is no name for --to {to}: it ends in {', '.join(ENDINGS[to])}")
    mapping = read_chain([transform])
    record = {"transform": str(transform), "map": told(mapping)}
    if to == "elastix":
        return record | _elastix(mapping, output, like=like, overwrite=overwrite)
    if to == "l2r":
        io.write_learn2reg(output, mapping, grid=grid_of(mapping, like))
        return record | {"output": str(output)}
    if to != "ants":
        write_chain(output, mapping, like=like)
        return record | {"output": str(output)}
    written = _ants(mapping, output, like=like, overwrite=overwrite)
    arguments = " ".join(f"-t {name}" for name in written)
    return record | {"output": ", ".join(written), "for ANTs": f"antsApplyTransforms {arguments}"}


def _ants(mapping: Mapping, output: Path, *, like: Path | None, overwrite: bool) -> list[str]:
    """The names of a warp and of the affine map after it, in the order in which antsApplyTransforms takes them."""
    warp, affine = (output.with_name(output.name + end) for end in ("1Warp.nii.gz", "0GenericAffine.mat"))
    first, *rest = mapping.parts()
    split = not first.transform.linear and bool(rest) and all(part.transform.linear for part in rest)
    bent = first if split else mapping
    linear = join(rest) if split else mapping if mapping.transform.linear else None
    files = [*([] if bent.transform.linear else [warp]), *([] if linear is None else [affine])]
    if bent.transform.linear and like is not None:
        raise SettingsError(f"--like {like} is the grid of a displacement, and the transform is linear: leave it out")
    grid = None if bent.transform.linear else grid_of(bent, like)
    for file in files:
        check_file(file, overwrite=overwrite)
    if grid is not None:
        io.write_displacement(warp, bent, grid=grid)
    if linear is not None:
        io.write_itk(affine, linear)
    return [str(file) for file in files]


def _elastix(mapping: Mapping, output: Path, *, like: Path | None, overwrite: bool) -> dict[str, Any]:
    """Write the chain into a folder, which is made where it is missing."""
    grid = grid_of(mapping, like)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: for elastix give a folder, or another name")
    missing = not output.exists()
    if missing:
        check_file(output)
        output.mkdir()
    else:
        for file in names(output, len(mapping.parts())):
            check_file(file, overwrite=overwrite)
    try:
        files = io.write_elastix(output, mapping, grid=grid)
    except BaseException:
        if missing:
            with suppress(OSError):  # it is not empty where some of the files were written
                output.rmdir()
        raise
    told = f"transformix -tp {files[-1].name} -in MOVING -out FOLDER, started in {output}"
    return {"output": ", ".join(map(str, files)), "for elastix": told}


def jacobian(
    transforms: Sequence[Path], output: Path, *, log: bool = False, like: Path | None = None
) -> dict[str, Any]:
    """Write the determinant of the map's derivative at the voxels of a grid as NIfTI; the record tells its range.

    log : its natural logarithm instead; where the map folds that of `LEAST`, for readers of NIfTI take NaN for 0
    """
    check_writable(output, endings=SUFFIXES)
    mapping = read_chain(transforms)
    grid = grid_of(mapping, like)
    field = mapping.displacement(grid)
    found = fields.determinant(field, grid)
    values = found.clamp(min=LEAST).log() if log else found
    io.write_map(output, Image(values.unsqueeze(0), grid))
    statistics = fields.statistics(field, grid)
    return {
        "transforms": [str(path) for path in transforms],
        "map": told(mapping),
        "folds at voxels": int(fields.folds(field, grid)),
        "folds in cells between": int(fields.folded_cells(field, grid)),
        **{name: float(value) for name, value in regularity(statistics).items() if name != "folds"},
        "output": str(output),
    }
