"""Data sets with bad input: each is told, nothing is written that should not be, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cohort_scenes import leftovers, pairs, register, results, whole

from fnreg import Grid, Image, cli, cohort, io
from fnreg.cohort.manifest import Row, write_manifest

Captured = pytest.CaptureFixture[str]
SHORT = ["--start", "header", "--levels", "1", "-n", "2", "--figures", "none"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Three pairs, and a table of them in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    made = pairs(tmp_path, 3)
    (tmp_path / "pairs.tsv").write_bytes(write_manifest(made))
    return made


def refused(capsys: Captured, table: str, content: str) -> str:
    """What is told of a table; nothing is written."""
    Path(table).write_text(content, encoding="utf-8")
    before = sorted(Path().rglob("*"))
    for arguments in (["validate", table], ["run", table, "-o", "out", *SHORT]):
        assert cli.main(arguments) == 3
        out, told = capsys.readouterr()
        assert out == "" and told.startswith("fnreg: error: ") and "Traceback" not in told
        assert sorted(Path().rglob("*")) == before
    return told


def test_tables_that_cannot_be_registered(rows: list[Row], capsys: Captured) -> None:
    assert "has no rows: each is a pair, with the columns fixed and moving" in refused(capsys, "a.csv", "")
    told = refused(capsys, "b.csv", "pair_id,fix,mov\na,f0.nii,m0.nii\n")
    assert "has no column fixed and moving: needed are fixed and moving, and it has pair_id, fix, mov" in told
    told = refused(capsys, "c.csv", "pair_id,fixed,moving\na,f0.nii,m0.nii\nb,f1.nii,m1.nii\na,f2.nii,m2.nii\n")
    assert "row 4: id 'a' is that of row 2 too" in told
    lost = "".join(f"f{n}.nii,gone/m{n}.nii\n" for n in range(3))
    told = refused(capsys, "d.csv", f"fixed,moving\n{lost}")
    assert told.splitlines()[1:] == [
        f"  row {n + 2}: moving {Path(f'gone/m{n}.nii').absolute()} does not exist" for n in range(3)
    ]


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "a\\b", "..", "n" * 129, "ünï", "日本", "a b", "a\u202eb"])
def test_ids_that_are_no_names(name: str, rows: list[Row], capsys: Captured) -> None:
    told = refused(capsys, "ids.csv", f"pair_id,fixed,moving\n{name},f0.nii,m0.nii\n")
    assert "is no file name: use up to 128 letters of A-Z" in told and len(told) < 400


def test_the_folder_of_another_study(rows: list[Row], capsys: Captured) -> None:
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    Path("other.csv").write_text("pair_id,fixed,moving\nx,f1.nii,m2.nii\n")
    assert cli.main(["run", "other.csv", "-o", "out", *SHORT]) == 3
    assert "is a study of 3 other pairs, such as p000, and of none of these" in capsys.readouterr().err
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT, "--transform", "affine"]) == 3
    assert "transform was 'rigid' and is 'affine'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_pairs_of_two_and_of_three_axes_go_side_by_side(tmp_path: Path) -> None:
    rows, grid = pairs(tmp_path, 3), Grid((9, 8, 7))
    for side in ("fixed", "moving"):
        io.write_image(tmp_path / f"{side}.nii", Image(torch.rand(1, *grid.shape), grid))
    volume = {side: tmp_path / f"{side}.nii" for side in ("fixed", "moving")}
    flat = rows[0].files["fixed"]
    more = [Row("volume", volume), Row("mixed", volume | {"moving": flat}), Row("dexim", volume | {"fixed": flat})]
    found = register([more[0], rows[0], more[1], rows[1], more[2], rows[2]], tmp_path / "study")
    assert [found[name]["status"] for name in ("p000", "p001", "p002", "volume")] == ["ok"] * 4
    for name in ("mixed", "dexim"):
        assert found[name]["status"] == "invalid_input" and "give images that have as many" in found[name]["reason"]
    register(rows, tmp_path / "flat")
    assert results(tmp_path / "study")["p000"] == results(tmp_path / "flat")["p000"]


def test_a_folder_in_the_place_of_an_image(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")  # which reads folders of slices
    rows = pairs(tmp_path, 2)
    for name in ("empty", "named.nii"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no slice")
    bad = [
        Row(f"bad-{n}", {**rows[0].files, "moving": tmp_path / name}) for n, name in enumerate(("empty", "named.nii"))
    ]
    found = register([bad[0], rows[0], bad[1], rows[1]], tmp_path / "study")
    whole(tmp_path / "study", [*rows, *bad])
    for row in bad:
        record = found[row.pair_id]
        assert record["status"] == "invalid_input" and "is a folder without DICOM files" in record["reason"]


# -- disks ---------------------------------------------------------------------------------------------------------


def mounted(place: Path, options: str) -> bool:
    """Whether a file system in memory is there now, which needs the rights of root."""
    place.mkdir(exist_ok=True)
    try:
        told = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    except OSError:
        return False
    return told.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    if not mounted(place, "size=1m"):
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing(disk: Path, rows: list[Row], capsys: Captured) -> None:
    made = [Row(f"r{n:03d}", rows[n % 3].files) for n in range(60)]
    Path("many.tsv").write_bytes(write_manifest(made))
    run = ["run", "many.tsv", "-o", str(disk / "study"), *SHORT, "--batch-size", "4", "--save", "params+warped"]
    (disk / "filler").write_bytes(bytes(2**19))
    assert cli.main(run) == 3
    told = capsys.readouterr().err
    assert "No space left on device" in told and told.count("\n") == 1 and "internal" not in told
    known, there = cohort.read_ledger(disk / "study"), results(disk / "study")
    assert 0 < len(known) < 60 and set(known) <= set(there)
    assert leftovers(disk / "study") == []
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    assert cli.main(run) == 0
    whole(disk / "study", made)
    after = results(disk / "study")
    assert all(after[name] == there[name] for name in known)


def test_a_folder_that_cannot_be_written_to(rows: list[Row], tmp_path: Path, capsys: Captured) -> None:
    place = tmp_path / "shut"
    if os.geteuid() == 0:  # whom no mode of a folder stops
        if not mounted(place, "ro,size=1m"):
            pytest.skip("needs the right to mount a file system")
    else:
        place.mkdir(mode=0o500)
    try:
        for output in (place, place / "study"):
            assert cli.main(["run", "pairs.tsv", "-o", str(output), *SHORT]) == 3
            out, told = capsys.readouterr()
            assert out == "" and told.count("\n") == 1 and "cannot be " in told and str(output) in told
            assert "Read-only" in told or "Permission denied" in told
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)
