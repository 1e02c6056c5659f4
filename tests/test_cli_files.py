"""The command line with medical files: what it writes lies where the fixed image does, and bad files are one line."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fnreg
from fnreg import cli, io
from fnreg.placement import gap

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
sitk = pytest.importorskip("SimpleITK")
nibabel = pytest.importorskip("nibabel")

QUICK = ["--levels", "2", "--steps", "12x6"]
TURN = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q


def blob(grid: fnreg.Grid, *, shift: float = 0.0) -> fnreg.Image:
    """A smooth lump about the middle of a grid, moved along its first world axis."""
    away = grid.points() - grid.center - torch.tensor([shift] + [0.0] * (grid.ndim - 1))
    width = float(grid.extent.min()) / 4
    values = 100 * torch.exp(-(away * torch.linspace(1, 1.5, grid.ndim)).square().sum(1) / (2 * width**2))
    return fnreg.Image(values.reshape(1, *grid.shape).float(), grid)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lumps in 2-D and 3-D, in every format; the moving ones are shifted by 1.5 mm."""
    monkeypatch.chdir(tmp_path)
    direction = TURN * torch.sign(torch.det(TURN))
    solid = fnreg.Grid((14, 13, 12), spacing=(1.0, 1.1, 1.2), center=(30.0, -40.0, 5.0), direction=direction)
    flat = fnreg.Grid((20, 18), spacing=(1.0, 0.9), center=(30.0, -40.0))
    for name, grid in (("solid", solid), ("flat", flat)):
        for kind in ("nii.gz", "nii", "mha", "nrrd"):
            io.write_image(f"{name}.{kind}", blob(grid))
            io.write_image(f"{name}-moving.{kind}", blob(grid, shift=1.5))
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(capfd: pytest.CaptureFixture[str], folder: Path, arguments: list[str], code: int, told: str) -> None:
    """The command ends with this code and one clear line, of C libraries too, and the folder is as it was."""
    before = listing(folder)
    assert cli.main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fnreg: error: ") and err.count("\n") == 1
    assert told in err
    assert listing(folder) == before


@pytest.mark.parametrize("kind", ["nii.gz", "nii", "mha", "nrrd"])
@pytest.mark.parametrize("name", ["solid", "flat"])
def test_register_in_every_format(folder: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    arguments = ["register", f"{name}.{kind}", f"{name}-moving.{kind}", "-o", "out", "--transform", "translation"]
    assert cli.main([*arguments, *QUICK, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (
        record["status"] == "ok"
        and f"warped.{kind}" in record["written"]
        and "figures/overview.png" in record["written"]
    )
    shift = record["translation_of_center"]
    assert shift[0] == pytest.approx(1.5, abs=0.1) and max(map(abs, shift[1:])) < 0.1  # world millimetres
    fixed, warped = io.read_image(f"{name}.{kind}"), io.read_image(f"out/warped.{kind}")
    torch.testing.assert_close(warped.grid.affine, fixed.grid.affine, atol=1e-12 * 100, rtol=0)
    before = (io.read_image(f"{name}-moving.{kind}").data - fixed.data).abs().mean()
    assert float((warped.data - fixed.data).abs().mean()) < 0.3 * float(before)
    # ITK gets the same picture of the files by the transform that was written.
    images = [sitk.ReadImage(f"{name}{part}.{kind}") for part in ("", "-moving")]
    theirs = sitk.Resample(images[1], images[0], sitk.ReadTransform("out/transform.tfm"), sitk.sitkLinear, 0.0)
    inner = (0, *[slice(4, -4)] * fixed.grid.ndim)
    np.testing.assert_allclose(sitk.GetArrayFromImage(theirs)[inner[1:]], warped.numpy()[inner], atol=0.05)


def test_formats_may_differ_and_headers_are_kept(folder: Path) -> None:
    made = nibabel.load("solid.nii.gz")
    made.header["descrip"] = b"scan of ours"
    nibabel.save(made, "named.nii.gz")
    assert cli.main(["register", "named.nii.gz", "solid-moving.mha", "-o", "out", *QUICK, "--save", "warped"]) == 0
    assert listing(folder / "out") == ["run.json", "warped.nii.gz"]
    assert bytes(nibabel.load("out/warped.nii.gz").header["descrip"]).startswith(b"scan of ours")


def test_masks_lie_where_their_image_does(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fixed = io.read_image("solid.nii.gz")
    io.write_labels("mask.nii.gz", io.Labels((fixed.data > 20).long(), fixed.grid))
    io.write_labels("away.nii.gz", io.Labels((fixed.data > 20).long(), fnreg.Grid(fixed.grid.size)))
    base = ["register", "solid.nii.gz", "solid-moving.nii.gz", "-o", "out", *QUICK, "--save", "params", "--fixed-mask"]
    refused(capfd, folder, [*base, "away.nii.gz"], 3, "mask away.nii.gz lies elsewhere than solid.nii.gz")
    assert cli.main([*base, "mask.nii.gz"]) == 0


def test_a_folder_of_slices(folder: Path) -> None:
    Path("ct").mkdir()
    values = io.read_image("solid.nii").data[0].numpy()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, plane in enumerate(values):
        one = sitk.GetImageFromArray(plane[None].astype(np.int16))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|000d": "1.2", "0020|0013": str(k),
                "0020|0032": f"0\\0\\{1.2 * k}", "0020|0037": "1\\0\\0\\0\\1\\0"}  # fmt: skip
        for name, text in tags.items():
            one.SetMetaData(name, text)
        writer.SetFileName(f"ct/{k}.dcm")
        writer.Execute(one)
    assert cli.main(["register", "ct", "ct", "-o", "out", "-n", "2", "--save", "warped"]) == 0
    assert listing(folder / "out") == ["run.json", "warped.nii.gz"]
    assert io.read_image("out/warped.nii.gz").grid.same_as(io.read_image("ct").grid, 1e-5)
    assert json.loads(Path("out/run.json").read_text())["inputs"]["fixed"]["files"] == 12


def test_forms_that_differ_are_a_warning_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = nibabel.load("solid.nii.gz")
    made.set_qform(np.diag([1.0, 1, 1, 1]), 1)
    nibabel.save(made, "two.nii.gz")
    assert cli.main(["register", "two.nii.gz", "solid-moving.nii.gz", "-o", "out", "-n", "2", "--save", "warped"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: two.nii.gz tells its place twice" in err
    assert "taken is the sform" in json.loads(Path("out/run.json").read_text())["warnings"][0]
    assert cli.main(["info", "two.nii.gz"]) == 0
    assert "sform and qform differ" in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """With one bit of the compressed voxels changed."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 16
    return bytes(changed)


BAD: dict[str, tuple[str, Callable[[], bytes | None], str]] = {
    "missing": ("bad.nii.gz", lambda: None, "bad.nii.gz does not exist"),
    "empty": ("bad.nii.gz", lambda: b"", "is empty"),
    "truncated": ("bad.nii.gz", lambda: Path("solid.nii.gz").read_bytes()[:-900], "damaged"),
    "truncated, plain": ("bad.nii", lambda: Path("solid.nii").read_bytes()[:-9], "damaged or incomplete"),
    "truncated, meta": ("bad.mha", lambda: Path("solid.mha").read_bytes()[:-9], "damaged or incomplete"),
    "truncated, nrrd": ("bad.nrrd", lambda: Path("solid.nrrd").read_bytes()[:-9], "damaged or incomplete"),
    "corrupted": ("bad.nii.gz", lambda: flipped(Path("solid.nii.gz").read_bytes()), "damaged"),
    "picture as NIfTI": ("bad.nii.gz", lambda: b"\x89PNG\r\n\x1a\n" + bytes(400), "is not a NIfTI file"),
    "NIfTI as MetaImage": ("bad.mha", lambda: Path("solid.nii").read_bytes(), "is not a MetaImage"),
    "MetaImage as NRRD": ("bad.nrrd", lambda: Path("solid.mha").read_bytes(), "is not an NRRD file"),
    "NIfTI as picture": ("bad.png", lambda: Path("solid.nii").read_bytes(), "not a PNG, JPEG or TIFF"),
    "bomb": ("bad.nii.gz", lambda: gzip.compress(bomb()), "more than the file can hold"),
}


def bomb() -> bytes:
    data = bytearray(Path("solid.nii").read_bytes())
    data[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], "<i2").tobytes()
    return bytes(data)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("place", ["fixed", "moving", "mask", "info"])
def test_bad_files(folder: Path, capfd: pytest.CaptureFixture[str], case: str, place: str) -> None:
    name, make, told = BAD[case]
    if (data := make()) is not None:
        Path(name).write_bytes(data)
    fixed, moving = (
        name if place == side else f"{file}.nii.gz" for side, file in (("fixed", "solid"), ("moving", "solid"))
    )
    mask = ["--fixed-mask", name] if place == "mask" else []
    arguments = ["info", name] if place == "info" else ["register", fixed, moving, "-o", "a/out", *mask]
    refused(capfd, folder, arguments, 3, told)


def test_pairs_that_do_not_go_together(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 6, 7, 3), np.float32), np.eye(4)), "time.nii.gz")
    base = ["register", "solid.nii.gz"]
    refused(capfd, folder, [*base, "time.nii.gz", "-o", "out"], 3, "is a series of 3 volumes: expected one")
    told = "flat-moving.nii.gz has 2 axes but solid.nii.gz has 3"
    refused(capfd, folder, [*base, "flat-moving.nii.gz", "-o", "out"], 3, told)
    io.write_image("colours.nii.gz", fnreg.Image(torch.rand(3, 5, 6, 7)))
    told = "colours.nii.gz has 3 channels but solid.nii.gz has 1"
    refused(capfd, folder, [*base, "colours.nii.gz", "-o", "out"], 3, told)
    Path("slices").mkdir()
    refused(capfd, folder, [*base, "slices", "-o", "out"], 3, "slices is a folder without DICOM files")


def header(**fields: Any) -> bytes:
    """The solid as plain NIfTI whose header has these values in place of its own."""
    data = bytearray(Path("solid.nii").read_bytes())
    known = nibabel.Nifti1Header(bytes(data[:348]))
    for name, value in fields.items():
        known[name] = value
    data[:348] = known.binaryblock
    return bytes(data)


def text(name: str, key: bytes, value: bytes) -> bytes:
    """The solid in a format with a header of lines, one of them with another value."""
    lines = Path(name).read_bytes().split(b"\n")
    at = next(number for number, line in enumerate(lines) if line.startswith(key))
    lines[at] = key + value
    return b"\n".join(lines)


STEPS = [1.0, 1.0, 1.1, 1.2, 1, 1, 1, 1]
PLACES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "spacing 0": ("bad.nii", lambda: header(pixdim=[1, 0, *STEPS[2:]]), "expected positive numbers, the spacing"),
    "spacing NaN": ("bad.nii", lambda: header(pixdim=[1, np.nan, *STEPS[2:]]), "expected positive numbers"),
    "spacing below 0": ("bad.nii", lambda: header(pixdim=[1, 1, -1.1, *STEPS[3:]]), "expected positive numbers"),
    "sform 0": (
        "bad.nii",
        lambda: header(srow_x=0, srow_y=0, srow_z=0),
        "expected positive numbers, correct its header",
    ),
    "sform NaN": ("bad.nii", lambda: header(srow_x=[np.nan, 0, 0, 0]), "not finite"),
    "sform singular": ("bad.nii", lambda: header(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), "from right angles"),
    "sform sheared": ("bad.nii", lambda: header(srow_x=[1, 0.1, 0, 0], srow_y=[0, 1, 0, 0]), "from right angles"),
    "quaternion": ("bad.nii", lambda: header(sform_code=0, quatern_b=2.0), "is longer than 1"),
    "voxels behind the end": ("bad.nii", lambda: header(vox_offset=1e6), "behind its end"),
    "voxels at half a byte": ("bad.nii", lambda: header(vox_offset=352.5), "its voxels would begin at byte 352.5"),
    "meta, spacing 0": (
        "bad.mha",
        lambda: text("solid.mha", b"ElementSpacing", b" = 0 1 1"),
        "expected positive numbers",
    ),
    "meta, spacing NaN": (
        "bad.mha",
        lambda: text("solid.mha", b"ElementSpacing", b" = nan 1 1"),
        "expected 3 finite numbers",
    ),
    "meta, singular": (
        "bad.mha",
        lambda: text("solid.mha", b"TransformMatrix", b" = 1 0 0 1 0 0 0 0 1"),
        "determinant is 0",
    ),
    "meta, fewer voxels": (
        "bad.mha",
        lambda: text("solid.mha", b"DimSize", b" = 14 13 9"),
        "claims 6552 bytes of voxels",
    ),
    "nrrd, singular": (
        "bad.nrrd",
        lambda: text("solid.nrrd", b"space directions", b": (1,0,0) (1,0,0) (0,0,1)"),
        "determinant is 0",
    ),
    "nrrd, NaN": ("bad.nrrd", lambda: text("solid.nrrd", b"space origin", b": (nan,0,0)"), "expected finite numbers"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("place", ["fixed", "moving", "mask", "labels"])
def test_places_that_cannot_be(folder: Path, capfd: pytest.CaptureFixture[str], case: str, place: str) -> None:
    name, make, told = PLACES[case]
    Path(name).write_bytes(make())
    fixed, moving = (name if place == side else "solid.nii.gz" for side in ("fixed", "moving"))
    more = {"mask": ["--moving-mask", name], "labels": ["--moving-labels", name]}.get(place, [])
    refused(capfd, folder, ["register", fixed, moving, "-o", "a/out", *more], 3, told)


def test_voxels_that_begin_at_any_byte(folder: Path) -> None:
    data = header(vox_offset=357)
    Path("odd.nii").write_bytes(data[:352] + b"12345" + data[352:])
    odd, plain = io.read_image("odd.nii"), io.read_image("solid.nii")
    assert torch.equal(odd.data, plain.data) and odd.data.data_ptr() % 4 == 0


def test_a_damaged_slice(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("ct").mkdir()
    for k in range(4):
        one = sitk.GetImageFromArray(np.full((1, 9, 8), k, np.int16))
        for tag, value in {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|0013": str(k), "0020|0032": f"0\\0\\{k}",
                           "0020|0037": "1\\0\\0\\0\\1\\0"}.items():  # fmt: skip
            one.SetMetaData(tag, value)
        sitk.WriteImage(one, f"ct/{k}.dcm")
    whole = Path("ct/2.dcm").read_bytes()
    base = ["register", "solid.nii.gz", "ct", "-o", "out"]
    for data in (whole[:-20], b"", whole[:100], b"text"):
        Path("ct/2.dcm").write_bytes(data)
        refused(capfd, folder, base, 3, "ct/2.dcm is damaged")


def test_an_option_that_is_nearly_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["register", "solid.nii.gz", "solid.nii.gz", "-o", "out"]
    refused(capfd, folder, [*base, "--fixed-lables", "x.nii"], 2, "--fixed-labels")
    refused(capfd, folder, [*base, "--moving-point", "x.csv"], 2, "--moving-points")
    refused(capfd, folder, ["regster", "solid.nii.gz", "solid.nii.gz", "-o", "out"], 2, "register")


def test_outputs_that_cannot_be_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["register", "solid.nii.gz", "solid.nii.gz", *QUICK, "-o"]
    refused(capfd, folder, [*base, "/proc/fnreg"], 3, "/proc/fnreg cannot be")
    refused(capfd, folder, [*base, "solid.nii.gz/out"], 3, "solid.nii.gz is not a folder")
    Path("kept").mkdir()
    Path("kept/run.json").write_text("{}")
    refused(capfd, folder, [*base, "kept"], 3, "kept is not empty: give another folder, or --overwrite")
    assert Path("kept/run.json").read_text() == "{}"


def test_a_full_disk_leaves_what_was_there(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system call fails, at each of the files in turn, as it does on a disk that is full."""
    base = ["register", "solid.nii.gz", "solid-moving.nii.gz", "-o", "out", "-n", "1", "--levels", "1"]
    base += ["--save", "params+xfm+warped", "--overwrite", "--moving-labels", "labels.nii.gz"]
    data = io.read_image("solid-moving.nii.gz")
    io.write_labels("labels.nii.gz", io.Labels((data.data > 20).long(), data.grid))
    assert cli.main(base) == 0
    capfd.readouterr()
    kept = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    calls, fsync = 0, os.fsync
    for number in range(20):
        calls = 0

        def full(descriptor: int, last: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls > last:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        code = cli.main(base)
        monkeypatch.setattr(os, "fsync", fsync)
        out, err = capfd.readouterr()
        if code == 0:
            break
        assert code == 3 and out == "" and "No space left on device" in err and err.count("\n") == 1
        assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == kept
        assert not [name for name in listing(folder) if "partial" in name or "tmp" in name]
    assert number >= 4  # every file that is written came to be the one that failed


def test_no_overlap_says_how_far_and_what_helps(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = io.read_image("solid-moving.nii.gz")
    grid = image.grid
    away = fnreg.Grid(
        grid.size, spacing=grid.spacing, direction=grid.direction, center=grid.center + torch.tensor([0, 300.0, 0])
    )
    io.write_image("away.nii.gz", fnreg.Image(image.data, away))
    base = ["register", "solid.nii.gz", "away.nii.gz", "-o", "out", *QUICK]
    told = "away.nii.gz and solid.nii.gz do not overlap: their middles are 300 apart, and a gap of 27"
    for options in (["--start", "header"], ["--transform", "ffd:stride=4"]):
        refused(capfd, folder, [*base, *options], 3, told)
        refused(capfd, folder, [*base, *options], 3, "give --start center, or moments")
    assert cli.main([*base[:3], "-o", "tried", *QUICK, "--transform", "translation"]) == 0
    record = json.loads(Path("tried/run.json").read_text())
    assert record["translation_of_center"] == pytest.approx([1.5, 300.0, 0.0], abs=0.2)
    assert (record["value_before"], record["terms_before"]) == (None, {"mse": None})
    assert told in record["warnings"][0]
    assert cli.main([*base, "--start", "center", "--save", "warped", "--transform", "translation"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["translation_of_center"] == pytest.approx([1.5, 300.0, 0.0], abs=0.2)
    # Where no voxel meets another there is no value, and nothing has risen from it.
    assert record["value_before"] is None and record["terms_before"] == {"mse": None} and not record["warnings"]


@hypothesis.given(
    seed=st.integers(0, 2**32), dimension=st.sampled_from([2, 3]), away=st.floats(0, 12, allow_subnormal=False)
)
def test_gap_is_of_boxes_that_do_not_meet(seed: int, dimension: int, away: float) -> None:
    rng = torch.Generator().manual_seed(seed)

    def some(center: torch.Tensor) -> fnreg.Grid:
        turn = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng, dtype=torch.float64)).Q
        spacing = torch.rand(dimension, generator=rng, dtype=torch.float64) + 0.1
        return fnreg.Grid((6, 7, 8)[:dimension], spacing=spacing, center=center, direction=turn)

    line = torch.nn.functional.normalize(torch.randn(dimension, generator=rng, dtype=torch.float64), dim=0)
    a, b = some(torch.zeros(dimension)), some(line * away)
    found = gap(a, b)
    assert found == pytest.approx(gap(b, a), abs=1e-9)
    # Points of both boxes, borders included: none of one lies in the other where there is a gap.
    cube = torch.rand(4000, dimension, generator=rng, dtype=torch.float64) * 2 - 1
    inside = [
        (one.convert(other.convert(cube, "cube", "world"), "world", "cube").abs() <= 1).all(1).any()
        for one, other in ((a, b), (b, a))
    ]
    if any(inside):
        assert found == 0
    near = torch.cdist(a.convert(cube, "cube", "world"), b.convert(cube, "cube", "world")).min()
    assert found <= float(near) + 1e-9
    if found == 0:  # then they meet: random points come near, if not within
        assert float(near) < 1.5


# -- info ------------------------------------------------------------------------------------------------------------


def test_info_tells_what_headers_say(folder: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(name: Any) -> dict[str, Any]:
        assert cli.main(["info", str(name), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = told(data_dir / "nibabel_small" / "anatomical.nii")
    assert found["format"] == "NIfTI-1" and found["stored"] == "int16, big endian" and found["place by"] == "sform"
    assert (found["qform code"], found["sform code"], found["unit of length"]) == (2, 2, "mm")
    assert found["size"] == "33 x 41 x 25" and found["spacing"] == [2, 2, 2] and found["highest"] == 30393
    assert found["direction"][1] == [0, -1, 0]
    found = told(data_dir / "nibabel_small" / "functional.nii")
    assert found["volumes"] == 20 and found["description"] == "spm - 3D normalized"
    assert found["slope and intercept"] == pytest.approx([0.075406968, 3100.76171875])
    assert told("solid.mha")["size"] == "14 x 13 x 12"
    assert told("flat.nii")["spacing"] == pytest.approx([1.0, 0.9])
    io.write_image("v.nii", fnreg.Image(torch.rand(2, 3, 4, 5)))
    assert told("v.nii")["channels"] == 2  # vectors, but not as many as a displacement has
    grid = fnreg.Grid((5, 4, 3))
    move = fnreg.Mapping({"displacement": torch.ones(3, *grid.shape)}, grid, fnreg.Displacement())
    io.write_displacement("u.nii.gz", move)
    assert told("u.nii.gz")["largest displacement"] == pytest.approx(3**0.5)
