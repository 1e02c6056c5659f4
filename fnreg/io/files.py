"""Files as a whole: reading all bytes, writing all or nothing, and errors that say what to do."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import numpy as np

PathLike = str | os.PathLike[str]
_Bytes = TypeVar("_Bytes", bytes, np.ndarray)
Print = tuple[int, int, str]  # of a file: its size, when it was changed, in ns, and the SHA-256 of its content
_prints: ContextVar[dict[str, Print] | None] = ContextVar("prints", default=None)
_later: ContextVar[bool] = ContextVar("later", default=False)  # whether files reach the disk at the end of `together`


class ImageReadError(OSError, ValueError):
    """An image file is missing, damaged, or not of a supported kind."""


class PointReadError(OSError, ValueError):
    """A file of points is missing, damaged, or not of a supported kind."""


class SpaceNeededError(PointReadError):
    """A file of points does not say where they are; told : that, without what to do about it."""

    def __init__(self, told: str, remedy: str = "") -> None:
        super().__init__(f"{told}: {remedy}" if remedy else told)
        self.told = told


class TransformReadError(OSError, ValueError):
    """A transform file is missing, damaged, or not of a supported kind."""


class WriteError(OSError):
    """A file could not be written; nothing was left under its name."""


def read_bytes(path: PathLike, error: Callable[[str], Exception]) -> bytes:
    """All bytes of a file; `error` of one clear line where it is missing, a folder, unreadable or empty."""
    return _read(path, error, Path.read_bytes)


def read_array(path: PathLike, error: Callable[[str], Exception]) -> np.ndarray:
    """As `read_bytes`, (N,) uint8: memory that may be written to, so that a tensor needs no copy of it."""
    return _read(path, error, lambda place: np.fromfile(place, np.uint8))


def _read(path: PathLike, error: Callable[[str], Exception], how: Callable[[Path], _Bytes]) -> _Bytes:
    place, seen = Path(path), _prints.get()
    try:
        about = place.stat()  # raises too where a folder above is closed
        folder = stat.S_ISDIR(about.st_mode)
        data = None if folder else how(place)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{place} does not exist: check the path") from None
    except OSError as problem:
        raise error(f"{place} cannot be read: {problem.strerror or problem}") from problem
    if data is None:
        raise error(f"{place} is a folder: expected a file")
    if seen is not None:
        seen[str(place)] = (len(data), about.st_mtime_ns, hashlib.sha256(data).hexdigest())  # type: ignore[arg-type]
    if not len(data):
        raise error(f"{place} is empty: it holds no bytes")
    return data


@contextmanager
def fingerprints() -> Generator[dict[str, Print]]:
    """A dictionary to which goes, by path, what tells a file from another of each that this thread reads: of the bytes
    that were read, not of those that may be there later."""
    seen: dict[str, Print] = {}
    before = _prints.set(seen)
    try:
        yield seen
    finally:
        _prints.reset(before)


def add_fingerprints(prints: Mapping[str, Print]) -> None:
    """Fingerprints of what this thread has read elsewhere, for who looks at them now."""
    seen = _prints.get()
    if seen is not None:
        seen.update(prints)


def check_writable(path: PathLike, *, endings: tuple[str, ...] = ()) -> None:
    """WriteError where a name does not end in one of `endings`, is that of a folder, or its folder is not there or
    cannot be written to.

    To be asked before the work begins; whether the disk is full, the writing tells.
    """
    place = Path(path)
    if endings and not place.name.lower().endswith(endings):
        known = " or ".join(part for part in (", ".join(endings[:-1]), endings[-1]) if part)
        raise WriteError(f"{place}: expected a name that ends in {known}")
    _check_place(place)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise WriteError(f"{place} cannot be written: {place.parent} cannot be written to")


def _check_place(place: Path) -> None:
    if place.is_dir():
        raise WriteError(f"{place} is a folder: give the name of a file")
    if not place.parent.is_dir():
        what = "is not a folder" if place.parent.exists() else "does not exist"
        raise WriteError(f"{place} cannot be written: {place.parent} {what}")


def write_bytes(path: PathLike, *parts: bytes | memoryview) -> None:
    """Write a file so that under its name there is all of it or what was there before, even if the process dies.

    The bytes, one part after the other, go to a temporary name in the same folder and to the disk, then take the name.
    Raises WriteError.
    """
    place = Path(path)
    _check_place(place)
    scratch, later = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp"), _later.get()
    try:
        try:
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                if not later:
                    os.fsync(stream.fileno())
            os.replace(scratch, place)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
        if not later:
            _sync_folder(place.parent)
    except OSError as problem:
        raise WriteError(f"{place} cannot be written: {problem.strerror or problem}") from problem


@contextmanager
def together(folder: PathLike) -> Generator[None]:
    """Files that this thread writes within, below a folder, reach the disk at the end: many small ones so in a tenth of
    the time.  Where the system cannot do that, each does by itself.

    A file still takes its name as a whole, for whoever looks; but where the power fails before the end, what is under a
    name may not be all of it.  Raises WriteError.
    """
    sync = _syncfs()
    before = _later.set(sync is not None)
    try:
        yield
    finally:
        _later.reset(before)
    if sync is None:
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if sync(descriptor) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise WriteError(f"{folder} cannot be written: {problem.strerror or problem}") from problem


def _syncfs() -> Callable[[int], int] | None:
    """Linux' call that waits until a whole file system is on its disk."""
    try:
        return ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError, TypeError):
        return None


def _sync_folder(folder: Path) -> None:
    """Make a new name durable; some file systems do not offer this for folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
