"""ITK's transforms in text (.tfm, .txt), and affine ones in the binary form of Matlab (.mat) that ANTs writes.

Both are read and written here without SimpleITK.  A text file has for each transform a class name, a line of
parameters and one of fixed parameters; a .mat file two arrays of doubles, the first of which bears the class name.
"""

from __future__ import annotations

import struct

import numpy as np

from fnreg.io.files import PathLike, TransformReadError
from fnreg.io.itk_parts import COMPOSITE, Part, part_of

TITLE = b"#Insight Transform File V1.0"
_HEADER = struct.Struct("<5i")  # of an array: type, rows, columns, imaginary, length of the name with its end


def parse_text(path: PathLike, data: bytes) -> list[Part]:
    """The transforms of a text file in its order, of a composite one those of which it consists.

    Raises TransformReadError where it is damaged, and for several transforms that are not composed.
    """
    if not data.startswith(TITLE) or not data.endswith(b"\n"):
        why = "its text ends too early" if data.startswith(TITLE) else f"it does not begin with {TITLE.decode()}"
        raise _damaged(path, why)
    try:
        lines = [line.strip() for line in data.decode("ascii").splitlines()]
        pairs = [line.partition(":")[::2] for line in lines if line and not line.startswith("#")]
        found = [(key.strip(), value.strip()) for key, value in pairs]
        return _parts(path, found)
    except (UnicodeDecodeError, ValueError) as problem:
        if isinstance(problem, TransformReadError):
            raise
        raise _damaged(path, " ".join(str(problem).split())[:200]) from problem


def _parts(path: PathLike, found: list[tuple[str, str]]) -> list[Part]:
    names = [value for key, value in found if key == "Transform"]
    composite = bool(names) and names[0].startswith(COMPOSITE)
    if composite:
        names, found = names[1:], found[1:]
        if not names:
            raise _damaged(path, "its composite transform has no parts")
    if any(name.startswith(COMPOSITE) for name in names):
        raise TransformReadError(f"{path} holds a composition within another: flatten it, FlattenTransform of ITK")
    if [key for key, _ in found] != ["Transform", "Parameters", "FixedParameters"] * len(names) or not names:
        raise _damaged(path, "a transform lacks its parameters")
    if len(names) > 1 and not composite:
        raise TransformReadError(f"{path} holds {len(names)} transforms that are not composed: write them one by one")
    numbers = [np.array(value.split(), dtype=np.float64) for key, value in found if key != "Transform"]
    made = zip(names, numbers[::2], numbers[1::2], strict=True)
    return [part_of(path, name, parameters, fixed) for name, parameters, fixed in made]


def text_of(parts: list[Part]) -> bytes:
    """Transforms in ITK's order, its last acts first, as text with 17 digits, so that no bit is lost."""
    lines = [TITLE.decode()]
    if len(parts) > 1:
        d = parts[0].dimension
        lines += ["#Transform 0", f"Transform: {COMPOSITE}_double_{d}_{d}"]
    for number, part in enumerate(parts):
        parameters, fixed = (" ".join(map(repr, values.tolist())) for values in (part.parameters, part.fixed))
        lines += [f"#Transform {number + (len(parts) > 1)}", f"Transform: {part.name}"]
        lines += [f"Parameters: {parameters}", f"FixedParameters: {fixed}"]
    return ("\n".join(lines) + "\n").encode("ascii")


def parse_mat(path: PathLike, data: bytes) -> list[Part]:
    """The transform of a .mat file, as ITK and ANTs write it; TransformReadError where it is damaged."""
    arrays: list[tuple[str, np.ndarray]] = []
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise _damaged(path, "it ends within an array")
        kind, rows, columns, imaginary, letters = _HEADER.unpack_from(data, at)
        size = {0: 8, 10: 4}.get(kind)  # doubles, floats: both little-endian, in columns
        if size is None or imaginary or min(rows, columns) < 0 or not 1 <= letters <= 256:
            raise _damaged(path, "it does not hold arrays of Matlab's version 4")
        at += _HEADER.size
        name, at = data[at : at + letters], at + letters
        end = at + size * rows * columns
        if end > len(data) or not name.endswith(b"\0"):
            raise _damaged(path, "it ends within an array")
        arrays.append((name[:-1].decode("ascii", "replace"), np.frombuffer(data[at:end], f"<f{size}").astype(float)))
        at = end
    if len(arrays) != 2 or arrays[1][0] != "fixed":
        told = ", ".join(repr(name[:40]) for name, _ in arrays[:5])
        raise TransformReadError(
            f"{path} holds the arrays {told}: expected one transform of ITK, two arrays, the second named 'fixed'"
        )
    return [part_of(path, arrays[0][0], arrays[0][1], arrays[1][1])]


def mat_of(part: Part) -> bytes:
    """A transform as a .mat file."""
    made = b""
    for name, values in ((part.name, part.parameters), ("fixed", part.fixed)):
        letters = name.encode("ascii") + b"\0"
        made += _HEADER.pack(0, len(values), 1, 0, len(letters)) + letters + values.astype("<f8").tobytes()
    return made


def _damaged(path: PathLike, why: str) -> TransformReadError:
    return TransformReadError(f"{path} is not a transform of ITK, or it is damaged: {why}")
