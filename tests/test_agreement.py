"""What judges a registration: overlap of labels and distance of landmarks, told of every run that has them."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fnreg
from fnreg import agreement, cli, io, metrics
from fnreg.agreement import Known, Paths
from fnreg.io import Labels, Landmarks

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
sitk = pytest.importorskip("SimpleITK")

GRID = fnreg.Grid((14, 13, 12), spacing=(1.0, 1.1, 1.2), center=(30.0, -40.0, 5.0))
SHIFT = 2.0  # mm along x, from fixed to moving


def lump(shift: float) -> torch.Tensor:
    away = GRID.points() - GRID.center - torch.tensor([shift, 0.0, 0.0])
    return torch.exp(-away.square().sum(1) / 18).reshape(1, *GRID.shape).float()


def identity(shift: float = 0.0) -> fnreg.Mapping:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 3] = shift
    return fnreg.linear_mapping(matrix, GRID)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two lumps, one shifted, with labels of their shells and named points."""
    monkeypatch.chdir(tmp_path)
    points = GRID.center + torch.tensor([[1.0, 2, 0], [-3, 0, 1], [0, 2, -2]], dtype=torch.float64)
    for name, shift in (("fixed", 0.0), ("moving", SHIFT)):
        data = lump(shift)
        io.write_image(f"{name}.nii.gz", fnreg.Image(100 * data, GRID))
        io.write_labels(f"{name}-labels.nii.gz", Labels((data > 0.4).long() + 299 * (data > 0.7), GRID))
        io.write_points(f"{name}.csv", Landmarks(points + torch.tensor([shift, 0, 0]), ("a", "b", "c")))
    return tmp_path


BASE = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--transform", "translation", "--levels", "1"]
LABELS = ["--fixed-labels", "fixed-labels.nii.gz", "--moving-labels", "moving-labels.nii.gz"]
POINTS = ["--fixed-points", "fixed.csv", "--moving-points", "moving.csv"]


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str) -> None:
    """The command ends with this code and one clear line, and nothing is written."""
    before = sorted(Path().rglob("*"))
    assert cli.main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fnreg: error: ") and err.count("\n") == 1
    assert told in err
    assert sorted(Path().rglob("*")) == before


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_tells_overlap_and_error_before_and_after(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, *LABELS, *POINTS]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "landmarks    2.000 before, 0.0" in out and "Dice         0." in out
    record = json.loads(Path("out/run.json").read_text())
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    assert list(after) == ["dice_mean", "dice_1", "dice_300", "tre_mean", "tre_p95", "tre_max"] == list(before)
    assert before["tre_mean"] == pytest.approx(SHIFT) and before["tre_max"] == pytest.approx(SHIFT)
    assert after["tre_max"] < 0.1 and before["dice_mean"] < 0.6 < 0.85 < after["dice_mean"]
    assert set(record["inputs"]) >= {"fixed_labels", "moving_labels", "fixed_points", "moving_points"}
    assert all(len(told["sha256"]) == 64 for told in record["inputs"].values())
    assert {"warped_labels.nii.gz", "figures/labels.png"} <= set(record["written"])
    # ITK gets the same labels of the files by the transform that was written.
    fixed, moving = (sitk.ReadImage(f"{name}-labels.nii.gz") for name in ("fixed", "moving"))
    theirs = sitk.Resample(moving, fixed, sitk.ReadTransform("out/transform.tfm"), sitk.sitkNearestNeighbor, 0.0)
    ours = sitk.ReadImage("out/warped_labels.nii.gz")
    assert ours.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
    # and the same overlap of them
    measure = sitk.LabelOverlapMeasuresImageFilter()
    for stage, warped in (("before", moving), ("after", ours)):
        measure.Execute(fixed, warped)
        for label in (1, 300):
            assert record["metrics"][stage][f"dice_{label}"] == pytest.approx(measure.GetDiceCoefficient(label))


def test_a_registration_that_takes_labels_and_landmarks_apart_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image says -5 mm, labels and landmarks 2: they are what is judged by."""
    io.write_image("moving.nii.gz", fnreg.Image(100 * lump(-5.0), GRID))
    assert cli.main([*BASE, *LABELS, *POINTS, "--save", "params"]) == 0
    err = capsys.readouterr().err
    assert (
        "the mean overlap of labels fell from 0.353" in err and "the mean distance of landmarks rose from 2 to 7" in err
    )
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "warn" and len(record["warnings"]) == 2
    same = {"dice_mean": 0.5, "tre_mean": 2.0}
    assert not agreement.worse(same, same) and not agreement.worse(same, {"dice_mean": 0.6, "tre_mean": 1.0})
    assert not agreement.worse({}, {}) and not agreement.worse(same, {"dice_mean": 0.5, "tre_mean": None})


def test_labels_of_one_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [*BASE, "-n", "2", "--save", "warped+figures", "--json", "--overwrite"]
    assert cli.main([*base, *LABELS[2:]]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "warped_labels.nii.gz" in record["written"] and "metrics" not in record
    assert "figures/labels.png" not in record["written"]
    assert cli.main([*base, *LABELS[:2]]) == 0  # what the run before wrote of labels is gone
    assert "warped_labels.nii.gz" not in json.loads(capsys.readouterr().out)["written"]
    assert not Path("out/warped_labels.nii.gz").exists()


def test_metrics_change_nothing_of_the_registration(folder: Path) -> None:
    assert cli.main([*BASE, "--save", "params"]) == 0
    plain = Path("out/transform.safetensors").read_bytes()
    assert cli.main([*BASE, "--save", "params", "--overwrite", *LABELS, *POINTS]) == 0
    assert Path("out/transform.safetensors").read_bytes() == plain


def test_points_of_plain_tables_need_their_space(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("fixed", "moving"):
        index = GRID.world_to_index(io.read_points(f"{name}.csv").points)
        rows = "\n".join(",".join(map(repr, row)) for row in index.tolist())
        Path(f"{name}-voxels.csv").write_text(f"x,y,z\n{rows}\n")
    plain = ["--fixed-points", "fixed-voxels.csv", "--moving-points", "moving-voxels.csv"]
    refused(capfd, [*BASE, *plain], 3, "does not say the space of its points: give --space LPS, RAS or voxel")
    assert cli.main([*BASE, *plain, "--space", "voxel", "-n", "2", "--save", "params"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["metrics"]["before"]["tre_mean"] == pytest.approx(SHIFT)
    # Only those that do not say it are in this space.
    mixed = ["--fixed-points", "fixed.csv", "--moving-points", "moving-voxels.csv"]
    options = ["-n", "2", "--save", "params", "--overwrite"]
    assert cli.main([*BASE, *options, *mixed, "--space", "voxel"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["metrics"]["before"]["tre_mean"] == pytest.approx(SHIFT)
    capfd.readouterr()
    refused(capfd, [*BASE, "--overwrite", *POINTS, "--space", "RAS"], 3, "says that its points are LPS, but space is")


def test_landmarks_on_one_side_only_are_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = io.read_points("moving.csv")
    io.write_points("moving.csv", Landmarks(known.points.flip(0), ("c", "d", "a")))
    assert cli.main([*BASE, *POINTS, "-n", "2", "--save", "params"]) == 0
    assert "left out: b, d" in capsys.readouterr().err
    record = json.loads(Path("out/run.json").read_text())
    assert "left out: b, d" in record["warnings"][0]


# -- the numbers ----------------------------------------------------------------------------------------------------


@hypothesis.given(seed=st.integers(0, 2**32), classes=st.integers(1, 5), kind=st.sampled_from(["uint8", "int64"]))
def test_overlap_is_what_counting_gives(seed: int, classes: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([0, 7, 1, 250, 3, 9]) * (1 if kind == "uint8" else 2**40)
    ours, theirs = (numbers[torch.randint(0, classes + 1, (1, 3, 4, 5), generator=rng)] for _ in range(2))
    hypothesis.assume(bool(ours.any()))
    grid = fnreg.Grid((5, 4, 3))
    ours, theirs = (values.to(getattr(torch, kind)) for values in (ours, theirs))
    image = fnreg.Image(torch.zeros(1, 3, 4, 5), grid)
    mapping = fnreg.linear_mapping(torch.eye(4, dtype=torch.float64), grid)
    told, warped = agreement.agreement(Known((ours, theirs)), mapping, grid, image)
    assert warped is not None and torch.equal(warped, theirs)
    expected = {}
    for number in sorted({int(n) for n in ours.flatten()} - {0}):
        a = [int(n) == number for n in ours.flatten()]
        b = [int(n) == number for n in theirs.flatten()]
        expected[f"dice_{number}"] = 2 * sum(map(lambda p, q: p and q, a, b)) / (sum(a) + sum(b))
    assert told == pytest.approx({"dice_mean": sum(expected.values()) / len(expected)} | expected)


def test_classes_are_found_once_for_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    true = metrics.classes
    monkeypatch.setattr(metrics, "classes", lambda *labels: (asked.append(len(labels)), true(*labels))[1])
    labels = torch.randint(0, 4, (1, *GRID.shape))
    known, image = Known((labels, labels.flip(-1))), fnreg.Image(lump(0), GRID)
    before, after = (agreement.agreement(known, identity(shift), GRID, image)[0] for shift in (0, 3 * 1.0))
    assert asked == [1] and before != after
    found = agreement.overlaps(labels, labels.flip(-1), jaccard=True)
    jaccard = metrics.jaccard(labels, labels.flip(-1), numbers=true(labels)).mean()
    assert found == before | {"jaccard_mean": pytest.approx(float(jaccard), abs=1e-12)}


def test_error_is_the_distance_of_mapped_points() -> None:
    here = torch.tensor([[0.0, 0, 0], [1, 1, 1]]).double()
    known = Known(points=(here, here + torch.tensor([3.0, 4.0, 0.0])))
    image = fnreg.Image(torch.zeros(1, *GRID.shape), GRID)
    assert agreement.agreement(known, identity(), GRID, image)[0]["tre_mean"] == pytest.approx(5)
    assert agreement.agreement(known, identity(3.0), GRID, image)[0]["tre_max"] == pytest.approx(4)


def pairs(here: Landmarks, there: Landmarks) -> Any:
    io.write_points("here.csv", here)
    io.write_points("there.csv", there)
    images = (fnreg.Image(torch.zeros(1, *GRID.shape), GRID),) * 2
    return agreement.read(Paths(points=(Path("here.csv"), Path("there.csv"))), (Path("f"), Path("m")), images)


def test_points_are_paired_by_name_where_names_tell(folder: Path) -> None:
    here = Landmarks(torch.arange(9.0).reshape(3, 3).double(), ("a", "b", "c"))
    there = Landmarks(here.points.flip(0) + 100, ("c", "b", "a"))
    first, second = pairs(here, there).points
    assert torch.equal(second, first + 100)
    for names in ((), ("a", "a", "b"), ("x", "y", "z"), ("a", "b", "")):  # then by row
        found = pairs(here, Landmarks(there.points, names))
        assert torch.equal(found.points[1], there.points) and found.notes == ()
    with pytest.raises(io.PointReadError, match=r"has 3 points but there\.csv has 2, and no names tell"):
        pairs(here, Landmarks(there.points[:2]))


# -- what is refused ------------------------------------------------------------------------------------------------


def test_labels_that_do_not_fit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = io.read_labels("fixed-labels.nii.gz")
    io.write_image("soft.nii.gz", fnreg.Image(lump(0.0), GRID))
    io.write_labels("away.nii.gz", Labels(labels.data, fnreg.Grid(GRID.size)))
    io.write_labels("small.nii.gz", Labels(labels.data[..., 1:], fnreg.Grid((13, 13, 12))))
    io.write_labels("none.nii.gz", Labels(torch.zeros_like(labels.data), GRID))
    Path("cut.nii.gz").write_bytes(Path("fixed-labels.nii.gz").read_bytes()[:-30])
    for name, told in {
        "soft.nii.gz": "holds values that are not whole numbers: expected labels",
        "away.nii.gz": "labels away.nii.gz lie elsewhere than",
        "small.nii.gz": "have 13 x 13 x 12 voxels but",
        "none.nii.gz": "are 0 everywhere, which is the background",
        "cut.nii.gz": "damaged",
        "gone.nii.gz": "does not exist",
        "fixed.csv": "readable are",
    }.items():
        for option in ("--fixed-labels", "--moving-labels"):
            refused(capfd, [*BASE, option, name], 3, told)


def test_points_that_do_not_fit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    io.write_points("flat.csv", Landmarks(torch.rand(3, 2)))
    io.write_points("two.csv", Landmarks(torch.rand(2, 3)))
    Path("empty.csv").write_text("")
    Path("words.csv").write_text("# space = LPS\nx,y,z\n1,2,three\n")
    Path("nan.csv").write_text("# space = LPS\nx,y,z\n1,2,nan\n")
    for name, told in {
        "flat.csv": "has points of 2 coordinates but",
        "two.csv": "no names tell which belong together",
        "empty.csv": "is empty",
        "words.csv": "three",
        "nan.csv": "not finite",
        "gone.csv": "does not exist",
        "fixed.nii.gz": "points are read from",
    }.items():
        for option, other in (("--fixed-points", "--moving-points"), ("--moving-points", "--fixed-points")):
            refused(capfd, [*BASE, option, name, other, "fixed.csv"], 3, told)
    refused(capfd, [*BASE, "--space", "RAS"], 2, "--space RAS is that of points, and none are given")
    refused(capfd, [*BASE, *POINTS[:2]], 2, "--fixed-points are given without --moving-points")
    refused(capfd, [*BASE, *POINTS[2:]], 2, "--moving-points are given without --fixed-points")
    refused(capfd, [*BASE, *POINTS, "--space", "RSA"], 2, "unknown space 'RSA': choose from LPS, RAS, voxel")
    refused(capfd, [*BASE, *POINTS, "--space", "RAS"], 3, "says that its points are LPS")
