"""Warnings that a thread hears by itself, and the fingerprints of what it reads."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fnreg
from fnreg import io, notes
from fnreg.io.files import WriteError, fingerprints


def test_without_a_hearer_it_is_a_warning_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="small") as caught:
        notes.warn("small")
    assert caught[0].filename == __file__


def test_each_thread_hears_its_own_and_the_filters_stay() -> None:
    before, ready = list(warnings.filters), threading.Barrier(4)

    def one(number: int) -> list[str]:
        with notes.hearing() as heard:
            ready.wait(10)
            for _ in range(20):
                notes.warn(f"of {number}")
            ready.wait(10)
        return [note.text for note in heard]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(4))) == [[f"of {number}"] * 20 for number in range(4)]
    assert list(warnings.filters) == before
    with notes.hearing() as outer:
        with notes.hearing() as inner:
            notes.warn("within", io.GeometryWarning)
        notes.warn("around")
    assert [note.text for note in inner] == ["within"] and inner[0].kind is io.GeometryWarning
    assert [note.text for note in outer] == ["around"]


def test_register_tells_its_hearer() -> None:
    fixed, moving = fnreg.data.digits(9)
    with notes.hearing() as heard:
        fnreg.register(fixed, moving, fnreg.Translation(), levels=9, steps=1)
    assert [note.text[:26] for note in heard] == ["9 levels were asked for bu"]


def test_pictures_read_by_threads_leave_the_filters(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    io.write_image(tmp_path / "a.png", fnreg.Image(torch.rand(1, 64, 64)))
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(io.read_image, [tmp_path / "a.png"] * 200))
    assert list(warnings.filters) == before


def test_fingerprints_are_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    image = fnreg.Image(torch.rand(1, 3, 4, 5))
    path = tmp_path / "a.nii"
    io.write_image(path, image)
    with fingerprints() as seen:
        io.read_image(path)
        told = path.stat()
        assert seen == {str(path): (told.st_size, told.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())}
        path.write_bytes(b"other")
    assert seen[str(path)][0] == told.st_size
    io.write_image(path, image)
    assert len(seen) == 1
    with fingerprints() as none:
        pass
    assert none == {}


@pytest.mark.parametrize("able", [True, False])
def test_files_that_reach_the_disk_together(able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnreg.io import files

    calls: list[str] = []
    real, whole = os.fsync, files._syncfs()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("one"), real(file))[1])

    def every(file: int) -> int:
        calls.append("all")
        return 0 if whole is None else whole(file)

    monkeypatch.setattr(files, "_syncfs", lambda: every if able else None)
    with files.together(tmp_path):
        for name in "ab":
            files.write_bytes(tmp_path / name, name.encode())
        assert (tmp_path / "a").read_bytes() == b"a"
    assert calls == (["all"] if able else ["one"] * 4)
    files.write_bytes(tmp_path / "c", b"c")
    assert calls[-1] == "one"
    with pytest.raises(RuntimeError), files.together(tmp_path):
        raise RuntimeError
    if able:
        with pytest.raises(WriteError, match="none cannot be written"), files.together(tmp_path / "none"):
            pass
