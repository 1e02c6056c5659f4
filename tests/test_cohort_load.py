"""A row into memory: whatever is wrong with its files is a reason, with the fingerprints of what was read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fnreg
from fnreg import Grid, Image, io
from fnreg.beginning import Begin
from fnreg.cohort.load import Asked, Loaded, Refused, load
from fnreg.cohort.manifest import FILES, Row
from fnreg.cohort.study import unchanged
from fnreg.extras import MissingExtraError
from fnreg.settings import Settings

GRID = Grid((8, 7, 6), spacing=(1.0, 1.5, 2.0), origin=(3.0, -2.0, 1.0))


@pytest.fixture
def row(tmp_path: Path) -> Row:
    """A pair with everything that a row can have."""
    torch.manual_seed(1)
    for name in ("fixed", "moving"):
        io.write_image(tmp_path / f"{name}.nii.gz", Image(torch.rand(1, *GRID.shape), GRID))
        io.write_image(tmp_path / f"{name}_mask.nii", Image(torch.ones(1, *GRID.shape), GRID))
        labels = torch.randint(1, 3, (1, *GRID.shape))
        io.write_labels(tmp_path / f"{name}_labels.nii", io.Labels(labels, GRID))
        io.write_points(tmp_path / f"{name}_points.csv", io.Landmarks(GRID.points()[:5]))
    io.write_transform(tmp_path / "initial.tfm", fnreg.Mapping(fnreg.Rigid().init(GRID), GRID, fnreg.Rigid()))
    ends = {"": ".nii.gz", "_mask": ".nii", "_labels": ".nii", "_points": ".csv"}
    files = {f"{side}{what}": f"{side}{what}{end}" for side in ("fixed", "moving") for what, end in ends.items()}
    files["initial"] = "initial.tfm"
    return Row("a", {name: tmp_path / file for name, file in files.items()})


def asked(tmp_path: Path, **settings: object) -> Asked:
    return Asked.of(Settings(**settings), tmp_path / "study")  # type: ignore[arg-type]


def test_a_row_with_everything(row: Row, tmp_path: Path) -> None:
    found = load(row, asked(tmp_path))
    assert isinstance(found, Loaded)
    assert set(row.files) == set(FILES)
    image = io.read_image(row.files["fixed"])
    assert torch.equal(found.fixed.image.data, image.data)
    assert found.fixed.mask is not None and found.known.labels[1] is not None and found.known.points is not None
    assert isinstance(found.begun.initial, fnreg.Mapping) and found.start == str(row.files["initial"])
    assert found.voxels == 2 * 8 * 7 * 6
    # What tells files apart is of the bytes that were read.
    assert set(found.inputs.files) == {str(path) for path in row.files.values()} and not found.inputs.beside
    for path in row.files.values():
        content = path.read_bytes()
        told = (len(content), path.stat().st_mtime_ns, hashlib.sha256(content).hexdigest())
        assert found.inputs.files[str(path)] == told
    assert unchanged(row, found.inputs.files)


def test_pairs_of_equal_shapes_share_a_key_wherever_they_lie(row: Row, tmp_path: Path) -> None:
    wanted = asked(tmp_path)
    plain = Row("b", {name: row.files[name] for name in ("fixed", "moving")})
    other = tmp_path / "other.nii"
    io.write_image(other, Image(torch.rand(1, *GRID.shape), Grid(GRID.size, spacing=3.0)))
    large = tmp_path / "large.nii"
    io.write_image(large, Image(torch.rand(1, 6, 7, 9), Grid((9, 7, 6))))
    exact = tmp_path / "exact.nii"
    io.write_image(exact, Image(torch.rand(1, *GRID.shape, dtype=torch.float64), GRID), dtype=torch.float64)

    def key(row: Row) -> object:
        found = load(row, wanted)
        assert isinstance(found, Loaded), found.reason
        return found.key

    same = [key(plain), key(Row("c", {"fixed": other, "moving": row.files["moving"]}))]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    others = [
        key(row),
        key(Row("d", {"fixed": large, "moving": row.files["moving"]})),
        key(Row("e", {"fixed": exact, "moving": row.files["moving"]})),
        key(Row("f", dict(plain.files) | {"fixed_mask": row.files["fixed_mask"]})),
        key(Row("g", dict(plain.files) | {"moving_mask": row.files["moving_mask"]})),
        key(Row("h", dict(plain.files) | {"initial": row.files["initial"]})),
    ]
    assert len({same[0], *others}) == 7
    # What is only looked at afterwards does not keep pairs apart.
    judged = {name: row.files[name] for name in row.files if "labels" in name or "points" in name}
    assert key(Row("i", dict(plain.files) | judged)) == same[0]


def spoil(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def put(path: Path, data: torch.Tensor, grid: Grid = GRID) -> None:
    io.write_image(path, Image(data.reshape(-1, *grid.shape), grid))


NAN = torch.rand(GRID.shape).index_fill(0, torch.tensor([2]), torch.nan)
FAR = Grid(GRID.size, spacing=GRID.spacing.tolist(), origin=(500.0, 0.0, 0.0))
FAULTS: dict[str, tuple[Callable[[dict[str, Path]], None], str]] = {
    "gone": (lambda files: files["moving"].unlink(), "does not exist"),
    "empty": (lambda files: spoil(files["moving"], lambda data: b""), "is empty"),
    "truncated": (lambda files: spoil(files["moving"], lambda data: data[:-100]), "is damaged"),
    "noise": (lambda files: spoil(files["fixed"], lambda data: bytes(range(256)) * 9), "is not a NIfTI file"),
    "two axes": (lambda files: put(files["moving"], torch.rand(7, 8), Grid((8, 7))), "has 2 axes but"),
    "two channels": (lambda files: put(files["moving"], torch.rand(2, *GRID.shape)), "has 2 channels but"),
    "nan": (lambda files: put(files["moving"], NAN), "moving holds NaN or infinity"),
    "infinite": (lambda files: put(files["fixed"], torch.rand(GRID.shape) / 0), "fixed holds NaN or infinity"),
    "constant": (lambda files: put(files["fixed"], torch.full(GRID.shape, 3.0)), "fixed is constant"),
    "small": (lambda files: put(files["fixed"], torch.rand(3, 3, 3), Grid((3, 3, 3))), "mask|at least 4 voxels"),
    "empty mask": (lambda files: put(files["fixed_mask"], torch.zeros(GRID.shape)), "is zero everywhere"),
    "mask of another size": (
        lambda files: put(files["moving_mask"], torch.ones(2, 2, 2), Grid((2, 2, 2))),
        "has 2 x 2 x 2 pixels but",
    ),
    "mask elsewhere": (lambda files: put(files["moving_mask"], torch.ones(GRID.shape), FAR), "lies elsewhere"),
    "labels elsewhere": (
        lambda files: io.write_labels(files["fixed_labels"], io.Labels(torch.ones(1, *GRID.shape).int(), FAR)),
        "lie elsewhere",
    ),
    "points without a space": (lambda files: spoil(files["fixed_points"], lambda data: b"x,y,z\n1,2,3\n"), "space"),
    "other points": (
        lambda files: io.write_points(files["fixed_points"], io.Landmarks(GRID.points()[:4])),
        "has 4 points but",
    ),
    "no transform": (lambda files: spoil(files["initial"], lambda data: data[:40]), "initial.tfm"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_file_is_the_reason(name: str, row: Row, tmp_path: Path) -> None:
    wanted = asked(tmp_path)
    assert isinstance(load(row, wanted), Loaded)
    spoiling, reason = FAULTS[name]
    spoiling(dict(row.files))
    found = load(row, wanted)
    assert isinstance(found, Refused)
    assert re.search(reason, found.reason), found.reason
    assert "\n" not in found.reason and found.trace == ""
    # What is mended is tried again, and what is as it was is not.
    assert unchanged(row, found.inputs.files) == (name != "gone")


def test_images_apart_are_refused_where_the_start_is_that_of_their_headers(row: Row, tmp_path: Path) -> None:
    io.write_image(row.files["moving"], Image(torch.rand(1, *GRID.shape), FAR))
    plain = Row("b", {name: row.files[name] for name in ("fixed", "moving")})
    found = load(plain, asked(tmp_path, start="header"))
    assert isinstance(found, Refused) and "do not overlap" in found.reason
    found = load(plain, asked(tmp_path))
    assert isinstance(found, Loaded) and "check these" in found.notes[0] and found.begun == Begin()


def test_settings_that_do_not_go_with_a_size_are_the_reason(row: Row, tmp_path: Path) -> None:
    plain = Row("b", {name: row.files[name] for name in ("fixed", "moving")})
    found = load(plain, asked(tmp_path, transform="ffd", similarity="lncc:radius=30", start="header"))
    assert isinstance(found, Refused) and "lncc" in found.reason
    wanted = asked(tmp_path, transform="ffd:stride=4x4", start="header")
    for _ in range(2):
        found = load(plain, wanted)
        assert isinstance(found, Refused) and "stride" in found.reason


def test_an_error_of_fnreg_itself_is_told_with_its_place(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("fnreg.cohort.load.read", broken)
    found = load(row, asked(tmp_path))
    assert isinstance(found, Refused)
    assert found.reason == "KeyError: 'oops'" and "in broken" in found.trace
    assert unchanged(row, found.inputs.files)


def test_a_missing_package_is_no_fault_of_a_row(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise MissingExtraError("install it")

    monkeypatch.setattr("fnreg.cohort.load.read", missing)
    with pytest.raises(MissingExtraError):
        load(row, asked(tmp_path))


def test_voxels_beside_a_header_and_folders_of_slices_are_inputs_too(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    import SimpleITK as sitk

    for name in ("fixed", "moving"):
        image = sitk.GetImageFromArray(torch.rand(6, 7, 8).numpy())
        sitk.WriteImage(image, str(tmp_path / f"{name}.mhd"))
    row = Row("a", {name: tmp_path / f"{name}.mhd" for name in ("fixed", "moving")})
    found = load(row, asked(tmp_path))
    assert isinstance(found, Loaded)
    assert set(found.inputs.beside) == {str(tmp_path / f"{name}.raw") for name in ("fixed", "moving")}
    assert unchanged(row, *found.inputs)
    spoil(tmp_path / "moving.raw", lambda data: data[::-1])
    assert not unchanged(row, *found.inputs)


def test_the_space_of_a_study_is_that_of_the_points_that_need_it(row: Row, tmp_path: Path) -> None:
    wanted = Asked.of(Settings(), tmp_path / "study", "RAS")
    plain = Row("b", {name: row.files[name] for name in ("fixed", "moving")})
    assert isinstance(load(plain, wanted), Loaded)
    stated = load(row, wanted)  # its points say LPS themselves
    assert isinstance(stated, Loaded) and stated.known.points is not None
    assert torch.equal(stated.known.points[0], GRID.points()[:5])
    x, y, z = GRID.points()[:1].T.tolist()
    row.files["moving_points"].write_text(f"x,y,z\n{-x[0]},{-y[0]},{z[0]}\n")
    row.files["fixed_points"].write_text(f"# space = LPS\nx,y,z\n{x[0]},{y[0]},{z[0]}\n")
    mixed = load(row, wanted)
    assert isinstance(mixed, Loaded) and mixed.known.points is not None
    assert torch.equal(*mixed.known.points)
