"""A folder of results that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fnreg.io.files import WriteError, check_writable

LAST = "run.json"  # written last: where it is, the folder is complete


class OutputError(WriteError):
    """The output folder is in the way or cannot be written."""


def check_file(path: Path, *, overwrite: bool = False) -> None:
    """OutputError where a file is in the way, WriteError where none can be written, see `check_writable`."""
    check_writable(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: give another name, or --overwrite")


class OutputFolder:
    """Results are written into `scratch`; `commit` puts them where they belong.  Without it nothing is left.

    path : the folder; it must not exist or be empty, or `overwrite` must be set
    overwrite : replace files of the same names; files among `known` that are not written anew are removed, all
        others stay

    Raises OutputError on entering where the folder is in the way or nothing can be written there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, known: tuple[str, ...] = ()) -> None:
        self.told, self.path = path, Path(os.path.abspath(path))
        self.overwrite, self.known = overwrite, known
        self.scratch = self.path
        self._made: list[Path] = []

    def check(self) -> None:
        """OutputError where something is in the way."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.told} is a file: give a folder, or another name")
        if self.path.is_dir() and not self.overwrite and any(self.path.iterdir()):
            raise OutputError(f"{self.told} is not empty: give another folder, or --overwrite")
        above = self.path
        while not above.exists() and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise OutputError(f"{self.told} cannot be made: {above} is not a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"{self.told} cannot be made: {above} cannot be written to")

    def __enter__(self) -> OutputFolder:
        try:
            self.check()
            above = self.path.parent
            missing = [folder for folder in (above, *above.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            inside = self.path if self.path.is_dir() else above
            scratch = inside / f".{self.path.name}.{secrets.token_hex(4)}.partial"
            scratch.mkdir()
            self.scratch = scratch
        except OutputError:
            raise
        except OSError as problem:
            self._clean()
            raise OutputError(f"{self.told} cannot be written: {problem.strerror or problem}") from problem
        return self

    def commit(self) -> list[str]:
        """Move everything to the folder, what says that it is complete last; returns the names of the files."""
        found = [path.relative_to(self.scratch) for path in self.scratch.rglob("*") if path.is_file()]
        names = sorted((name.as_posix() for name in found), key=lambda name: (name == LAST, name))
        try:
            if not self.path.exists():
                os.rename(self.scratch, self.path)
            else:
                (self.path / LAST).unlink(missing_ok=True)
                for name in self.known:
                    if name not in names:
                        (self.path / name).unlink(missing_ok=True)
                for name in names:
                    (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self.scratch / name, self.path / name)
                shutil.rmtree(self.scratch)
        except OSError as problem:
            raise OutputError(f"{self.told} cannot be written: {problem.strerror or problem}") from problem
        self._made = []
        return names

    def _clean(self) -> None:
        if self.scratch != self.path:
            shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()
