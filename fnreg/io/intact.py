"""Whether MetaImage and NRRD files are whole: as many bytes as they say, and compressed streams as they were written.

ITK reads what a damaged stream yields, or more than is there; here the bytes are counted, and check sums checked.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fnreg.io.files import ImageReadError, PathLike, read_bytes

Number = TypeVar("Number", int, float)

_META = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
         "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}  # fmt: skip
_NRRD = {
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, ushort, unsigned short, unsigned short int, "
       "uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, ulonglong, "
       "unsigned long long, unsigned long long int, uint64, uint64_t, double",
}  # fmt: skip
_SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior")  # that ITK turns to LPS
_UNITS = ("", "?", "mm", "s", "sec", "ms")  # none, millimetres, and those of an axis of time
_SIZES = {name: size for size, names in _NRRD.items() for name in names.split(", ")}


def check_meta(path: PathLike) -> None:
    """A MetaImage: .mha, or .mhd with one file of voxels.  Raises ImageReadError."""
    data = read_bytes(path, ImageReadError)
    fields, begin = dict[str, str](), 0
    while "ElementDataFile" not in fields:
        end = data.find(b"\n", begin)
        line = data[begin:end].decode("latin1")
        name, equals, value = (part.strip() for part in line.partition("="))
        if end < 0 or not equals or len(line) > 4096:
            raise ImageReadError(f"{path} is not a MetaImage, or it is damaged: its header has no ElementDataFile")
        if name in fields:
            raise ImageReadError(f"{path} is damaged: its header has {name} twice")
        fields[name], begin = value, end + 1
    if fields.get("BinaryData", "True").lower() not in ("true", "1"):
        raise ImageReadError(f"{path} holds its voxels as text: save it with BinaryData = True")
    if fields.get("HeaderSize", "0") != "0":
        raise ImageReadError(f"{path} has another header before its voxels: save it without HeaderSize")
    kind = fields.get("ElementType", "").removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in _META:
        raise ImageReadError(
            f"{path} holds the type {fields.get('ElementType')}: expected one of MET_{', MET_'.join(_META)}"
        )
    sizes = _numbers(path, fields, "DimSize", int)
    if fields.get("NDims", str(len(sizes))) != str(len(sizes)):
        raise ImageReadError(f"{path} is damaged: its header has NDims = {fields['NDims']} and DimSize = {sizes}")
    _geometry(path, fields, len(sizes))
    for name, plain in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if name in fields and _numbers(path, fields, name, float) != [plain]:
            raise ImageReadError(
                f"{path} has {name} = {fields[name]}, which ITK ignores: save the values that it means"
            )
    many = _numbers(path, {"ElementNumberOfChannels": "1"} | fields, "ElementNumberOfChannels", int)
    if len(many) != 1:
        raise ImageReadError(f"{path} is damaged: its header has ElementNumberOfChannels = {many}, expected one number")
    channels = many[0]
    expected = math.prod(sizes) * channels * _META[kind]
    if min(*sizes, channels) < 1:
        raise ImageReadError(f"{path} is damaged: its header claims {sizes} voxels")
    voxels = data[begin:] if fields["ElementDataFile"] == "LOCAL" else _beside(path, fields["ElementDataFile"])
    if fields.get("CompressedData", "False").lower() in ("true", "1"):
        _unzip(path, voxels, expected)
    else:
        _same(path, len(voxels), expected)


def _geometry(path: PathLike, fields: dict[str, str], dimension: int) -> None:
    """What ITK would silently repair or take for something else."""
    _millimetres(path, "DistanceUnits", fields.get("DistanceUnits", "mm").split())
    counts = dict.fromkeys(("ElementSpacing", "ElementSize", "Offset", "Position", "Origin"), dimension)
    counts |= dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), dimension**2)
    for name, count in counts.items():
        if name not in fields:
            continue
        values = _numbers(path, fields, name, float)
        if len(values) != count or not all(map(math.isfinite, values)):
            raise ImageReadError(f"{path} has {name} = {fields[name]}: expected {count} finite numbers")
        if name in ("ElementSpacing", "ElementSize") and min(values) <= 0:
            raise ImageReadError(f"{path} has {name} = {fields[name]}: expected positive numbers")


def _millimetres(path: PathLike, name: str, units: list[str]) -> None:
    """ImageReadError for units of length that ITK would take for millimetres."""
    for unit in units:
        if unit.strip().lower() not in _UNITS:
            raise ImageReadError(f"{path} has {name} {unit}, which ITK takes for mm: save it in millimetres")


def check_nrrd(path: PathLike) -> None:
    """An NRRD: .nrrd, or .nhdr with one file of voxels.  Raises ImageReadError."""
    data = read_bytes(path, ImageReadError)
    fields, begin = dict[str, str](), data.find(b"\n") + 1
    if not data.startswith(b"NRRD000") or not begin:
        raise ImageReadError(f"{path} is not an NRRD file: it does not begin with NRRD and a version")
    while begin < len(data):
        end = data.find(b"\n", begin)
        line = data[begin : len(data) if end < 0 else end].decode("latin1").strip()
        begin = len(data) if end < 0 else end + 1
        if not line:
            break
        if line.startswith("#") or ":=" in line:
            continue
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or name.lower() in fields:
            raise ImageReadError(f"{path} is damaged: its header has the line {line[:60]!r}")
        fields[name.lower()] = value
    missing = [name for name in ("dimension", "type", "sizes", "encoding") if name not in fields]
    if missing:
        raise ImageReadError(f"{path} is damaged or incomplete: its header has no {', '.join(missing)}")
    encoding, kind = fields["encoding"].lower(), fields["type"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ImageReadError(f"{path} has the encoding {encoding}: save it raw or with gzip")
    if kind not in _SIZES:
        raise ImageReadError(f"{path} holds the type {kind}: expected integers or floats")
    if any(fields.get(name, "0") != "0" for name in ("line skip", "byte skip", "lineskip", "byteskip")):
        raise ImageReadError(f"{path} has bytes to skip before its voxels: save it without")
    sizes = _numbers(path, fields, "sizes", int)
    if min(sizes) < 1 or fields["dimension"] != str(len(sizes)):
        raise ImageReadError(f"{path} is damaged: its header has dimension {fields['dimension']} and sizes {sizes}")
    for name in ("space directions", "space origin", "spacings"):
        if "inf" in fields.get(name, "").lower() or "nan" in fields.get(name, "").lower():
            raise ImageReadError(f"{path} has {name} {fields[name]}: expected finite numbers")
    space = fields.get("space", _SPACES[0]).lower()
    if space not in (*_SPACES, *("".join(part[0] for part in one.split("-")) for one in _SPACES)):
        raise ImageReadError(
            f"{path} is in the space {space}, which ITK takes for LPS: expected one of {', '.join(_SPACES)}"
        )
    for name in ("space units", "units"):
        _millimetres(path, name, re.findall(r'"([^"]*)"', fields.get(name, "")))
    detached = fields.get("data file", fields.get("datafile"))
    voxels = data[begin:] if detached is None else _beside(path, detached)
    if encoding == "raw":
        _same(path, len(voxels), math.prod(sizes) * _SIZES[kind])
        return
    try:
        whole = gzip.decompress(voxels)
    except (OSError, EOFError, zlib.error) as problem:
        raise ImageReadError(f"{path} is damaged or incomplete: {problem}") from problem
    _same(path, len(whole), math.prod(sizes) * _SIZES[kind])


def _numbers(path: PathLike, fields: dict[str, str], name: str, make: Callable[[str], Number]) -> list[Number]:
    try:
        values = [make(part) for part in fields[name].split()]
    except (KeyError, ValueError):
        values = []
    if not values:
        raise ImageReadError(f"{path} is damaged: its header has {name} = {fields.get(name)}, expected numbers")
    return values


def _beside(path: PathLike, name: str) -> bytes:
    """The bytes of the one file of voxels, in the folder of the header or below it."""
    place = Path(name)
    if name.upper().startswith("LIST") or "%" in name or len(name.split()) > 1:
        raise ImageReadError(f"{path} has its voxels in several files, {name}: save it as one file")
    if place.is_absolute() or ".." in place.parts:
        raise ImageReadError(f"{path} has its voxels elsewhere, in {name}: expected a file beside it")
    return read_bytes(Path(path).parent / place, ImageReadError)


def _same(path: PathLike, found: int, expected: int) -> None:
    if found != expected:
        raise ImageReadError(
            f"{path} is damaged or incomplete: its header claims {expected} bytes of voxels, but it has {found}"
        )


def _unzip(path: PathLike, voxels: bytes, expected: int) -> None:
    """Through the whole stream, with its check sum, and no more of it than was claimed."""
    stream = zlib.decompressobj()
    try:
        found = len(stream.decompress(voxels, expected + 1))
    except zlib.error as problem:
        raise ImageReadError(f"{path} is damaged: {problem}") from problem
    if found == expected and not stream.eof:
        raise ImageReadError(f"{path} is damaged or incomplete: its compressed voxels have no end")
    _same(path, found, expected)
