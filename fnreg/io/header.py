"""NIfTI headers, checked: every number that says what the bytes mean, before any voxel is read.

The world of NIfTI is RAS, ours is LPS.  Affines here are NIfTI's; the grid of a `Header` is ours.
M. Jenkinson et al., the NIfTI-1 data format, https://nifti.nimh.nih.gov/nifti-1
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from fnreg.grid import Grid
from fnreg.io.files import ImageReadError, PathLike
from fnreg.io.stored import affine_grid

Form = Literal["sform", "qform"]

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
COLOURS = {128: 3, 2304: 4}  # bytes of red, green and blue, and of what is behind
UNREADABLE = {0: "unknown", 1: "bits", 32: "complex", 1536: "floats of 128 bits", 1792: "complex", 2048: "complex"}
UNITS = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # of xyzt_units in mm: not told, metre, millimetre, micrometre
SIZES = {348: "Nifti1Header", 540: "Nifti2Header"}
MAGIC = {348: (b"n+1\0", b"ni1\0"), 540: (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS, and back
DIFFER = 0.1  # voxels: quaternions of single precision can be off by half of this
ROUNDING = 3 * float(np.finfo(np.float32).eps)  # of the squares of a unit quaternion


class Header(NamedTuple):
    """What a header says, checked.

    fields : nibabel's header, as it is stored; shape : of the voxels as they follow one another, (C, T, [Z,] Y, X), and
    a colour's components behind these; dtype : with its byte order; offset : of the first voxel in its file
    taken : which of sform, qform and pixdim gave the grid
    """

    fields: Any
    grid: Grid
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    colour: bool
    slope: float
    inter: float
    offset: int
    taken: str
    notes: tuple[str, ...]

    @property
    def length(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_size(path: PathLike, begin: bytes) -> int:
    """348 or 540, by the first bytes; ImageReadError where these are of no NIfTI file."""
    for order in ("little", "big"):
        size = int.from_bytes(begin[:4], order)
        if len(begin) >= 4 and size in SIZES:
            return size
    raise ImageReadError(f"{path} is not a NIfTI file: it does not begin with the size of a header, 348 or 540")


@np.errstate(all="ignore")  # what is not finite is told below
def parse(path: PathLike, block: bytes, *, form: Form | None = None) -> Header:
    """The header in its 348 or 540 bytes.  Raises ImageReadError for whatever it says that cannot be."""
    import nibabel  # here, for it takes a while

    size = header_size(path, block)
    order = "<" if int.from_bytes(block[:4], "little") == size else ">"
    fields = getattr(nibabel, SIZES[size])(block, endianness=order, check=False)
    magic = block[344:348] if size == 348 else block[4:12]
    if magic not in MAGIC[size]:
        hint = "; an ANALYZE file has no place in the world, convert it" if not any(magic) else ""
        raise ImageReadError(f"{path} is not a NIfTI file: its magic bytes are {magic!r}{hint}")
    dims = _dims(path, fields)
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in TYPES and code not in COLOURS:
        told = UNREADABLE.get(code, "an unknown type")
        raise ImageReadError(f"{path} holds {told}, datatype {code}: expected integers, floats or colours, convert it")
    dtype = np.dtype(TYPES.get(code, "u1")).newbyteorder(order)
    if bits != 8 * dtype.itemsize * COLOURS.get(code, 1):
        raise ImageReadError(f"{path} is damaged: its header gives {bits} bits to each voxel of datatype {code}")
    single = magic == MAGIC[size][0]
    slope, inter = _scale(path, fields, code)
    affine, taken, notes = _affine(path, fields, dims, form)
    if code in COLOURS and dims[5] > 1:
        raise ImageReadError(f"{path} has {dims[5]} colours at each voxel: expected one")
    dimension = 2 if dims[0] == 2 or (dims[0] == 5 and dims[3] == 1) else 3
    spatial = tuple(dims[dimension:0:-1])
    if dimension == 2:
        tilt = float(np.abs(affine[2, :2] / np.linalg.norm(affine[:3, :2], axis=0).clip(1e-300)).max())
        if not tilt <= 1e-4:
            raise ImageReadError(
                f"{path} is a 2-D image in a plane of the world that is not that of x and y: store it with three axes, "
                "one slice"
            )
    lps = (RAS @ affine)[:dimension]
    grid = affine_grid(path, spatial, lps[:, :dimension], lps[:, 3])
    shape = (dims[5], dims[4], *spatial, *([COLOURS[code]] if code in COLOURS else []))
    return Header(
        fields, grid, shape, dtype, code in COLOURS, slope, inter, _offset(path, fields, size, single), taken, notes
    )


def _dims(path: PathLike, fields: Any) -> list[int]:
    """The number of axes, and voxels along five axes."""
    dims = [int(n) for n in fields["dim"]]
    if not 1 <= dims[0] <= 7:
        raise ImageReadError(f"{path} is damaged: its header gives it {dims[0]} axes")
    used = dims[1 : dims[0] + 1]
    if min(used) < 1:
        raise ImageReadError(f"{path} is damaged: its header gives its axes {used} voxels")
    if dims[0] == 1 or any(n > 1 for n in used[5:]):
        raise ImageReadError(f"{path} has axes of {used} voxels: expected 2 or 3 axes, with time and channels")
    return [dims[0], *used[:5], *([1] * (5 - len(used)))]


def _scale(path: PathLike, fields: Any, code: int) -> tuple[float, float]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope) or code in COLOURS:  # the format's way to say that there is none
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise ImageReadError(f"{path} is damaged: its values are scaled by {slope} and shifted by {inter}")
    return slope, inter


def _offset(path: PathLike, fields: Any, size: int, single: bool) -> int:
    """Where the voxels begin: in a file of their own, or behind header, a word on extensions, and these."""
    value, least = float(fields["vox_offset"]), size + 4 if single else 0
    if single and value == 0:
        return least
    if not (math.isfinite(value) and value == int(value) and least <= value < 2**40):
        raise ImageReadError(f"{path} is damaged: its voxels would begin at byte {value}, expected {least} or more")
    return int(value)


# -- the place in the world ---------------------------------------------------------------------------------------


def _affine(path: PathLike, fields: Any, dims: list[int], form: Form | None) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """From voxel index to NIfTI's world in mm (4, 4), what it was taken from, and what should be told."""
    unit = int(fields["xyzt_units"]) & 7
    if unit not in UNITS:
        raise ImageReadError(f"{path} is damaged: its unit of length has the unknown code {unit}")
    steps = [float(n) for n in fields["pixdim"][1 : min(dims[0], 3) + 1]]
    if not all(math.isfinite(n) and n > 0 for n in steps):
        raise ImageReadError(f"{path} has pixdim {steps}: expected positive numbers, the spacing; correct its header")
    codes = {name: int(fields[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        if not 0 <= code <= 5:
            raise ImageReadError(f"{path} is damaged: its {name}_code is {code}, expected 0 to 5")
    if form is not None and form not in codes:
        raise ValueError(f"unknown form {form!r}: choose sform or qform")
    if form is not None and not codes[form]:
        raise ImageReadError(f"{path} has no {form}: its {form}_code is 0")
    scale = np.diag([UNITS[unit]] * 3 + [1.0])
    if not any(codes.values()):
        found = RAS @ np.diag([*steps, *([1.0] * (3 - len(steps))), 1.0])
        note = "says nothing of its place in the world (qform_code and sform_code are 0): taken are its spacing, axes "
        note += "along x, y and z of LPS and origin 0, as ITK does; nibabel would flip and centre it"
        return scale @ found, "pixdim", (note,)
    made = {name: getter(path, fields) for name, getter in (("sform", _sform), ("qform", _qform)) if codes[name]}
    taken = form or next(iter(made))
    found = made[taken]
    if len(made) == 1 or form is not None:
        return scale @ found, taken, ()
    corners = np.array([(*at, 1.0) for at in itertools.product(*((0, n - 1) for n in dims[1:4]))])
    away = np.linalg.norm(corners @ (made["sform"] - made["qform"]).T, axis=1).max()
    if not away > DIFFER * min(steps):
        return scale @ found, taken, ()
    note = (
        f"tells its place twice: sform and qform differ by up to {UNITS[unit] * away:.4g} mm at its corners; taken is "
    )
    return scale @ found, taken, (f'{note}the sform, as nibabel does; form="qform" takes the other',)


def _sform(path: PathLike, fields: Any) -> np.ndarray:
    return np.vstack([fields[f"srow_{axis}"] for axis in "xyz"] + [(0, 0, 0, 1)]).astype(np.float64)


def _qform(path: PathLike, fields: Any) -> np.ndarray:
    """p = R(b, c, d) diag(s_x, s_y, f s_z) i + o, with the unit quaternion that has these three parts."""
    parts = np.array([fields[f"quatern_{name}"] for name in "bcd"], dtype=np.float64)
    rest = 1.0 - parts @ parts
    if not (np.isfinite(parts).all() and rest > -ROUNDING):
        raise ImageReadError(f"{path} is damaged: the quaternion of its qform, {parts.tolist()}, is longer than 1")
    # What rounding leaves of half a turn is none: its root would be a turn of its own, by 0.03 degrees.
    a, (b, c, d) = math.sqrt(rest) if rest > ROUNDING else 0.0, parts
    unit = 1 / (a * a + parts @ parts)
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    flip = float(fields["pixdim"][0])
    if flip not in (-1.0, 0.0, 1.0):
        raise ImageReadError(f"{path} is damaged: pixdim[0], the sign of its third axis, is {flip}, expected 1 or -1")
    third = float(fields["pixdim"][3]) or 1.0  # a 2-D file may leave it out
    spacing = np.array([*fields["pixdim"][1:3], -third if flip < 0 else third], dtype=np.float64)
    affine = np.eye(4)
    affine[:3, :3] = unit * turn * spacing
    affine[:3, 3] = [fields[f"qoffset_{axis}"] for axis in "xyz"]
    return affine
