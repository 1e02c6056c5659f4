"""Images that pairs have in common: read once, the same results, and never an old one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort_scenes import pairs, picture, register, results, same_tables

from fnreg import Image, io, notes
from fnreg.cohort import engine
from fnreg.cohort.manifest import Row, all_to
from fnreg.cohort.shared import SharedImages
from fnreg.io.files import ImageReadError, fingerprints

REAL = io.read_image


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are read."""
    seen: list[str] = []

    def counted(path: Path, **options: Any) -> Image:
        seen.append(Path(path).name)
        return REAL(path, **options)

    monkeypatch.setattr(io, "read_image", counted)
    return seen


def test_a_study_reads_what_its_pairs_share_once_and_gives_the_same(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pairs(tmp_path, 6)
    grid = io.read_image(made[0].files["fixed"]).grid
    io.write_image(tmp_path / "mask.nii", Image(torch.ones(1, *grid.shape), grid))
    rows = all_to(made[0].files["fixed"], [row.files["moving"] for row in made])
    rows = [Row(row.pair_id, {**row.files, "fixed_mask": tmp_path / "mask.nii"}) for row in rows]
    reads.clear()
    shared = register(rows, tmp_path / "shared", batch_size=2)
    assert sorted(reads) == sorted(["f0.nii", "mask.nii", *(f"m{n}.nii" for n in range(6))])
    monkeypatch.setattr(engine, "shared_images", lambda _: ())
    reads.clear()
    each = register(rows, tmp_path / "each", batch_size=2)
    assert len(reads) == 18
    assert results(tmp_path / "shared") == results(tmp_path / "each")
    same_tables(tmp_path / "shared", tmp_path / "each", close=0)
    for name, record in shared.items():  # so a later run knows what is done
        assert record["inputs"] == each[name]["inputs"] and len(record["inputs"]) == 3
    assert register(rows, tmp_path / "shared") == {}


def test_a_file_that_changes_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    place = tmp_path / "a.nii"
    io.write_image(place, picture(0))
    images = SharedImages([place])
    assert images.read(place) is images.read(place) and len(reads) == 1
    io.write_image(place, picture(1))
    os.utime(place, ns=(7, 7))
    with fingerprints() as prints:
        assert torch.equal(images.read(place).data, picture(1).data)
    assert prints[str(place)][1] == 7 and len(reads) == 2
    with fingerprints() as again:
        images.read(place)
    assert again == prints and len(reads) == 2  # of what was read then
    place.unlink()
    with pytest.raises(ImageReadError, match="does not exist"):
        images.read(place)


def test_what_was_warned_of_is_heard_by_each(tmp_path: Path, reads: list[str]) -> None:
    nibabel = pytest.importorskip("nibabel")
    place = tmp_path / "bare.nii"
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((4, 5, 6), np.float32), None)
    image.header["qform_code"] = image.header["sform_code"] = 0
    nibabel.save(image, place)
    images = SharedImages([place])
    told: list[list[str]] = []
    for _ in range(2):
        with notes.hearing() as heard:
            images.read(place)
        told.append([note.text for note in heard])
    assert len(reads) == 1 and told[0] == told[1] and "bare.nii" in told[0][0]


def test_there_is_no_more_in_memory_than_there_is_room_for(tmp_path: Path, reads: list[str]) -> None:
    places = [tmp_path / f"{name}.nii" for name in "abc"]
    for number, place in enumerate(places):
        io.write_image(place, picture(number))
    images = SharedImages(places, room=2 * picture(0).data.nbytes)
    for name in "ababcab":  # c takes the room of what was wanted longest ago
        images.read(tmp_path / f"{name}.nii")
    assert reads == ["a.nii", "b.nii", "c.nii", "a.nii", "b.nii"]
    small = SharedImages(places, room=10)
    for _ in range(2):
        small.read(places[0])
    assert reads[5:] == ["a.nii"] * 2
    other = SharedImages([places[0]])
    for _ in range(2):
        other.read(places[1])  # of one pair only
    assert reads[7:] == ["b.nii"] * 2


def test_threads_that_want_one_image_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a.nii"
    io.write_image(place, picture(0))
    started, count = threading.Barrier(4), list[int]()

    def slow(path: Path, **options: Any) -> Image:
        count.append(1)
        threading.Event().wait(0.05)
        return REAL(path, **options)

    monkeypatch.setattr(io, "read_image", slow)
    images = SharedImages([place])

    def read() -> Image:
        started.wait()
        return images.read(place)

    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(read) for _ in range(4)]]
    assert len(count) == 1 and all(one is found[0] for one in found)
