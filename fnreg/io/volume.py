"""Images from and to NIfTI: the whole stream is checked, the values are those stored, the place is kept.

Everything is read before anything is believed: a gzip stream to its end, with its check sum and length, and as many
bytes as the header says, no more and no less.  What is allocated is never more than the file can hold.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fnreg.grid import Grid
from fnreg.io.files import ImageReadError, PathLike, WriteError, read_array, write_bytes
from fnreg.io.header import RAS, TYPES, Form, Header, header_size, parse
from fnreg.io.stored import Stored

VECTOR = 1007  # NIFTI_INTENT_VECTOR: ITK takes components as they are; of 1006 it would turn them
_DEFLATE = 1032  # no gzip stream holds more than this many times its length
_CHUNK = 2**24


class Nifti(NamedTuple):
    """A file's header and, behind it, whatever else lies before the voxels."""

    header: Header
    extensions: bytes  # with the word of four bytes that says whether there are any
    values: np.ndarray  # as `Header.shape` says, native byte order


def read_nifti(path: PathLike, *, form: Form | None = None, voxels: bool = True) -> Nifti:
    """A NIfTI file, all of it or, without its voxels, as far as these; or ImageReadError."""
    place, pair = Path(path), _pair(Path(path))
    try:
        if pair is not None:
            head = _Bytes(pair[0])
            block = head.take(header_size(pair[0], head.peek()))
            header, extensions = parse(pair[0], block, form=form), head.rest()
            body = _Bytes(pair[1])
            body.take(header.offset)
        else:
            body = _Bytes(place)
            block = body.take(header_size(place, body.peek()))
            header = parse(place, block, form=form)
            extensions = body.take(header.offset - len(block))
        single = bytes(header.fields["magic"]).startswith(b"n+")
        if single == (pair is not None):
            told = "of two files, .hdr and .img, but is one" if single else "of one file, but is the header of another"
            raise ImageReadError(f"{path} has the name {told}: rename it")
        values = body.fill(header) if voxels else np.empty(0)
    except (OSError, EOFError, zlib.error) as problem:
        if isinstance(problem, ImageReadError):
            raise
        raise ImageReadError(f"{path} is damaged: {' '.join(str(problem).split())}") from problem
    return Nifti(header, extensions, values)


def stored_nifti(path: PathLike, *, form: Form | None = None) -> Stored:
    """The values of a NIfTI file as (T, C, [Z,] Y, X)."""
    header, _, values = read_nifti(path, form=form)
    if header.colour:
        values = np.moveaxis(values, -1, 0)[:, 0]  # (C, T, [Z,] Y, X)
    return Stored(values.swapaxes(0, 1), header.grid, header.slope, header.inter, header.colour, header.notes)


def _pair(place: Path) -> tuple[Path, Path] | None:
    """Header and voxels, where they are two files."""
    name = place.name.lower()
    for end, other in ((".hdr", ".img"), (".img", ".hdr")):
        if name.endswith(end):
            partner = place.with_suffix(other)
            return (place, partner) if end == ".hdr" else (partner, place)
    return None


class _Bytes:
    """A file's bytes one after the other, decompressed where they are compressed."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, read_array(path, ImageReadError)
        self.zipped = self.data[:2].tobytes() == b"\x1f\x8b"
        self.limit = len(self.data) * (_DEFLATE if self.zipped else 1)
        self.stream: Any = gzip.GzipFile(fileobj=io.BytesIO(self.data.data)) if self.zipped else _Plain(self.data)
        self.begin = b""

    def peek(self) -> bytes:
        self.begin = self.stream.read(4)
        return self.begin

    def take(self, count: int) -> bytes:
        if count > self.limit:
            raise ImageReadError(f"{self.path} is damaged: its voxels would begin at byte {count}, behind its end")
        found = self.begin + self.stream.read(count - len(self.begin))
        self.begin = b""
        if len(found) < count:
            raise ImageReadError(f"{self.path} is damaged or incomplete: it ends within its header")
        return found

    def rest(self) -> bytes:
        return self.begin + self.stream.read()

    def fill(self, header: Header) -> np.ndarray:
        """The voxels, where there are just as many bytes as the header says; memory is used as bytes come."""
        told = f"its header claims {header.length} bytes of voxels, {' x '.join(map(str, header.shape[::-1]))}"
        if header.length > self.limit:
            raise ImageReadError(f"{self.path} is damaged or incomplete: {told}, more than the file can hold")
        buffer = self._inflated(header.length) if self.zipped else self.stream.view(header.length)
        if len(buffer) < header.length:
            raise ImageReadError(f"{self.path} is damaged or incomplete: {told}, but it ends after {len(buffer)}")
        if more := len(self.stream.read(_CHUNK)):  # also reads the check sum, where the voxels were the last bytes
            raise ImageReadError(f"{self.path} is damaged: {told}, but at least {more} bytes more follow")
        values = np.require(buffer.view(header.dtype), requirements="A")  # voxels may begin at any byte
        if not header.dtype.isnative:
            values = values.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
        return values.reshape(header.shape)

    def _inflated(self, length: int) -> np.ndarray:
        buffer = np.empty(length, np.uint8)  # pages that are not written to take no memory
        view, filled = buffer.data, 0
        while filled < length and (got := self.stream.readinto(view[filled : filled + _CHUNK])):
            filled += got
        return buffer[:filled]


class _Plain:
    """Bytes that are read as a stream is, without a copy of the voxels."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def view(self, count: int) -> np.ndarray:
        found = self.data[self.at : self.at + count]
        self.at += len(found)
        return found

    def read(self, count: int | None = None) -> bytes:
        return self.view(len(self.data) if count is None else count).tobytes()


# -- writing ------------------------------------------------------------------------------------------------------


def write_nifti(
    path: PathLike,
    values: np.ndarray,
    grid: Grid,
    *,
    intent: int = 0,
    like: PathLike | None = None,
    fourth: bool = False,
) -> None:
    """Write values (C, [Z,] Y, X) on a grid; see `fnreg.io.write_image`.

    fourth : the channels are the fourth axis, where NIfTI has time, and not the fifth
    """
    name = str(path).lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise WriteError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if grid.ndim not in (2, 3):
        raise ValueError(f"the grid has {grid.ndim} axes: NIfTI holds 2 or 3")
    head = _new(grid) if like is None else _from(like, grid)
    fields = head[0]
    vectors = intent == VECTOR or len(values) > 1
    space = [*grid.size, *([1] * (3 - grid.ndim))] if vectors else list(grid.size)
    used = [*space, *([] if fourth else [1]), len(values)] if vectors else space
    if max(used) > (most := int(np.iinfo(fields["dim"].dtype).max)):
        raise ValueError(
            f"{path} would have {used} voxels along its axes; its header counts to {most}: name it .mha or .nrrd"
        )
    fields["dim"] = [len(used), *used, *([1] * (7 - len(used)))]
    native = values.dtype.newbyteorder("=")
    code = next((code for code, kind in TYPES.items() if np.dtype(kind) == native), None)
    if code is None:
        raise ValueError(f"{path} would hold values of {native}: expected integers, float32 or float64")
    fields["datatype"], fields["bitpix"] = code, 8 * values.dtype.itemsize
    fields["scl_slope"], fields["scl_inter"] = 1, 0
    fields["cal_max"] = fields["cal_min"] = 0  # a window for the old values
    fields["intent_code"] = intent or (VECTOR if vectors and not fourth else 0)
    block = fields.binaryblock + head[1]
    ordered = np.ascontiguousarray(values).astype(values.dtype.newbyteorder(fields.endianness), copy=False)
    voxels = ordered.reshape(-1).view(np.uint8).data
    if not name.endswith(".gz"):
        write_bytes(path, block, voxels)
        return
    stream = io.BytesIO()
    # No time and no name, so that the same image gives the same bytes.  Level 6 would take two to four times as long
    # for files that are 3 % smaller of whole numbers and 15 % of floats; nibabel takes 1 as well.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=stream, mtime=0) as zipped:
        zipped.write(block)
        zipped.write(voxels)
    write_bytes(path, stream.getbuffer())


def _new(grid: Grid) -> tuple[Any, bytes]:
    import nibabel  # here, for it takes a while

    fields: Any = nibabel.Nifti1Header(endianness="<")
    affine = ras_affine(grid)
    fields["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    fields.set_sform(affine, 1)
    fields.set_qform(affine, 1)
    fields["xyzt_units"] = 2
    fields["magic"], fields["vox_offset"] = b"n+1", 352
    return fields, bytes(4)


def _from(like: PathLike, grid: Grid) -> tuple[Any, bytes]:
    """The header of another file on the same grid, and its extensions."""
    if not str(like).lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"like is {like}: expected a NIfTI file, .nii or .nii.gz, whose header is to be kept")
    header, extensions, _ = read_nifti(like, voxels=False)
    here = grid.to("cpu")
    if header.grid.ndim != grid.ndim or not here.same_as(header.grid):
        raise ValueError(f"like, {like}, has the grid {header.grid} but the image has {here}: expected the same")
    fields = header.fields.copy()  # in its byte order, which is that of its extensions
    fields["vox_offset"] = fields.sizeof_hdr + len(extensions)
    return fields, extensions


def ras_affine(grid: Grid) -> np.ndarray:
    """From voxel index to RAS (4, 4): x and y are turned, a 2-D grid lies in the plane z = 0."""
    affine = np.eye(4)
    axes = (*range(grid.ndim), 3)
    affine[np.ix_(axes, axes)] = grid.affine.detach().cpu().numpy()
    return RAS @ affine
