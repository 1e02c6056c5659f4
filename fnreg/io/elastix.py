"""Transforms of elastix from its text files, `TransformParameters.0.txt`, with those that they begin with.

The meaning of the parameters is that of elastix' manual, https://elastix.dev: world LPS, from fixed to moving points,
angles in radians, matrices of rotations and affine maps row by row, directions of grids column by column.  Klein et
al. 2010, doi 10.1109/TMI.2009.2035616.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fnreg.grid import Grid
from fnreg.io.files import PathLike, TransformReadError, read_bytes
from fnreg.io.itk_parts import Part, joined, mapping_of
from fnreg.transforms.base import Mapping

KINDS = ("TranslationTransform", "EulerTransform", "SimilarityTransform", "AffineTransform", "BSplineTransform")
DEEPEST = 32  # files that begin with one another
INITIAL = ("InitialTransformParametersFileName", "InitialTransformParameterFileName")  # until 5.0, and from 5.1 on
_LINE = re.compile(r"\(\s*(\w+)\s+(.*?)\s*\)\s*(?://.*)?")
_VALUE = re.compile(r'"([^"]*)"|([^\s"]+)')
Values = dict[str, list[str]]


def is_elastix(data: bytes) -> bool:
    """Whether bytes are a file of elastix: it names its transform in parentheses."""
    return re.search(rb"^\s*\(Transform\s+\"", data, re.MULTILINE) is not None


def read_elastix(path: PathLike) -> Mapping:
    """A transform of elastix, after the one that it begins with: translation, Euler, similarity, affine, B-spline.

    path : of the last of the text files; the others are looked for under the names that it gives, from the working
        folder and beside it

    T(p) = T_1(T_0(p)) with the initial transform T_0, where `HowToCombineTransforms` is "Compose".  The domain of a
    linear map is the fixed image.  As for `read_itk`, a spline goes on beyond its region, where elastix' does not
    move points.

    Raises TransformReadError where a file is missing, damaged or begins with itself, and for other transforms,
    combination by addition, splines that are not cubic or that are cyclic, and parameters in a file of their own.
    """
    mappings: list[Mapping] = []
    seen: list[Path] = []
    here: Path | None = Path(path)
    while here is not None:
        place = here.resolve()
        if place in seen or len(seen) >= DEEPEST:
            raise TransformReadError(f"{path} begins with itself, by way of {here}: mend its initial transform")
        seen.append(place)
        values = _values(here)
        mappings.append(_mapping(here, values))
        here = _initial(here, values)
    sizes = {mapping.domain.ndim for mapping in mappings}
    if len(sizes) > 1:
        raise TransformReadError(f"{path} and what it begins with have {sorted(sizes)} axes: expected one number")
    return joined(mappings[::-1])


def _values(path: Path) -> Values:
    data = read_bytes(path, TransformReadError)
    try:
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError as problem:
        raise _damaged(path, "it is not text") from problem
    found: Values = {}
    for line in lines:
        if not line or line.startswith("//"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise _damaged(path, f"expected (Name value ...), got {line[:60]!r}")
        if match[1] in found:
            raise _damaged(path, f"{match[1]} is given twice")
        found[match[1]] = [quoted or plain for quoted, plain in _VALUE.findall(match[2])]
    return found


def _damaged(path: PathLike, why: str) -> TransformReadError:
    return TransformReadError(f"{path} is not a transform of elastix, or it is damaged: {why}")


def _word(values: Values, name: str, default: str) -> str:
    return values.get(name, [default])[0] if values.get(name, [default]) else default


def _numbers(path: Path, values: Values, name: str, count: int) -> np.ndarray:
    """`count` finite numbers."""
    given = values.get(name)
    if given is None:
        raise _damaged(path, f"it has no {name}")
    try:
        made = np.array(given, dtype=np.float64)
    except ValueError:
        raise _damaged(path, f"{name} is not made of numbers") from None
    if len(made) != count or not np.isfinite(made).all():
        raise _damaged(path, f"{name} has {len(made)} values: expected {count} finite numbers")
    return made


def _initial(path: Path, values: Values) -> Path | None:
    """The file that this one begins with."""
    name = next((_word(values, key, "") for key in INITIAL if key in values), "NoInitialTransform")
    if name in ("NoInitialTransform", ""):
        return None
    how = _word(values, "HowToCombineTransforms", "")
    if how != "Compose":
        raise TransformReadError(
            f'{path} combines its initial transform by {how!r}: readable is (HowToCombineTransforms "Compose")'
        )
    places = [Path(name), path.parent / name, path.parent / Path(name.replace("\\", "/")).name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise TransformReadError(f"{path} begins with {name}, which is not there: put it beside {path.name}")
    return found


def _mapping(path: Path, values: Values) -> Mapping:
    kind = _word(values, "Transform", "")
    if kind not in KINDS:
        raise TransformReadError(f"{path} holds a {kind or 'file without a transform'!r}: readable are {KINDS}")
    if _word(values, "UseBinaryFormatForTransformationParameters", "false") == "true":
        raise TransformReadError(f"{path} keeps its parameters in a file of their own: write them as text")
    sides = [_word(values, f"{side}ImageDimension", "") for side in ("Fixed", "Moving")]
    if sides[0] not in ("2", "3") or sides[0] != sides[1]:
        raise _damaged(path, f"its images have {sides} axes, expected 2 or 3, and as many on both sides")
    d = int(sides[0])
    parameters = _numbers(path, values, "TransformParameters", len(values.get("TransformParameters", ())))
    if _word(values, "NumberOfParameters", str(len(parameters))) != str(len(parameters)):
        raise _damaged(path, f"it has {len(parameters)} parameters and says {_word(values, 'NumberOfParameters', '')}")
    if kind == "BSplineTransform":
        return mapping_of(path, Part(kind, d, parameters, _lattice(path, values, d)))
    fixed = np.zeros(0)
    if kind != "TranslationTransform":
        fixed = _numbers(path, values, "CenterOfRotationPoint", d)
        kind = {"EulerTransform": f"Euler{d}DTransform", "SimilarityTransform": f"Similarity{d}DTransform"}.get(
            kind, kind
        )
        if kind == "Euler3DTransform":
            fixed = np.append(fixed, float(_word(values, "ComputeZYX", "false") == "true"))
    found = mapping_of(path, Part(kind, d, parameters, fixed))
    return Mapping(found.params, _fixed_image(path, values, d) or found.domain, found.transform)


def _lattice(path: Path, values: Values, d: int) -> np.ndarray:
    """Size, origin, spacing and direction of the control points, as ITK keeps them."""
    order = _word(values, "BSplineTransformSplineOrder", "3")
    if order != "3" or _word(values, "UseCyclicTransform", "false") == "true":
        raise TransformReadError(f"{path} holds a spline of order {order}, or a cyclic one: readable are cubic ones")
    size, spacing, origin = (_numbers(path, values, f"Grid{name}", d) for name in ("Size", "Spacing", "Origin"))
    direction = np.eye(d)
    if "GridDirection" in values:
        direction = _numbers(path, values, "GridDirection", d * d).reshape(d, d).T
    if "GridIndex" in values:
        origin = origin + direction @ (spacing * _numbers(path, values, "GridIndex", d))
    return np.concatenate([size, origin, spacing, direction.flatten()])


def _fixed_image(path: Path, values: Values, d: int) -> Grid | None:
    """The grid of the fixed image, where the file has it."""
    if not {"Size", "Spacing", "Origin"} <= values.keys():
        return None
    size, spacing, origin = (_numbers(path, values, name, d) for name in ("Size", "Spacing", "Origin"))
    direction = np.eye(d)
    if "Direction" in values:
        direction = _numbers(path, values, "Direction", d * d).reshape(d, d).T
    if "Index" in values:
        origin = origin + direction @ (spacing * _numbers(path, values, "Index", d))
    try:
        return Grid(size.tolist(), spacing=spacing.tolist(), origin=origin.tolist(), direction=direction.tolist())
    except ValueError as problem:
        raise _damaged(path, f"its fixed image is no grid, {problem}") from problem
