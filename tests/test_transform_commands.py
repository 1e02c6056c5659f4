"""The commands on transforms: what they write is what the library computes and what SimpleITK does with it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import intensity, orientation, random_params, smooth_mapping, tensor, uniform
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import SVFFD, Affine, Displacement, Grid, Image, Mapping, Rigid, cli, fields, io, metrics
from fnreg.agreement import way_back
from fnreg.apply import warp_labels
from fnreg.commands.base import print_table
from fnreg.transforms.linear import linear_mapping

pytest.importorskip("PIL")
sitk: Any = pytest.importorskip("SimpleITK")

EXTENT = 24.0


def volume_grid(**changes: Any) -> Grid:
    options: dict[str, Any] = {
        "spacing": (1.2, 1.5, 2.0),
        "center": (30.0, -20.0, 10.0),
        "direction": orientation(3, tensor([0.4, -0.3, 0.6])),
    }
    return Grid(changes.pop("size", (14, 13, 9)), **(options | changes))


def save(path: Path | str, data: Tensor, grid: Grid) -> None:
    """By SimpleITK, so that reading is another's business too."""
    made = sitk.GetImageFromArray(data[0].numpy())
    made.SetOrigin(grid.origin.tolist())
    made.SetSpacing(grid.spacing.tolist())
    made.SetDirection(grid.direction.flatten().tolist())
    sitk.WriteImage(made, str(path))


def load(path: Path | str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def save_points(path: Path | str, landmarks: Any, **_: Any) -> None:
    rows = [
        ",".join([*map(repr, row), name]) for row, name in zip(landmarks.points.tolist(), landmarks.names, strict=True)
    ]
    axes = ",".join("xyz"[: landmarks.points.shape[1]])
    Path(path).write_text("\n".join(["# space = LPS", f"{axes},name", *rows]) + "\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with volumes, pictures and transforms."""
    monkeypatch.chdir(tmp_path)
    direction = orientation(3, tensor([0.1, 0, 0.2]))
    fixed, moving = volume_grid(), volume_grid(size=(24, 23, 17), spacing=(1.1, 1.3, 1.9), direction=direction)
    for name, grid in (("fixed", fixed), ("moving", moving)):
        values = intensity(grid.points() - grid.center, EXTENT).reshape(1, *grid.shape)
        save(f"{name}.mha", values, grid)
        save(f"{name}_labels.mha", regions(grid).to(torch.int16), grid)
    io.write_transform("affine.mat", Mapping(random_params(Affine(), fixed, 1, 0.4), fixed, Affine()))
    bent = smooth_mapping(SVFFD(4), fixed, 2, 1.0, 2.0)
    io.write_transform("bent.safetensors", bent)
    io.write_transform("bent.nii.gz", bent)
    return tmp_path


def regions(grid: Grid, mapping: Mapping | None = None) -> Tensor:
    """Labels with a formula, (1, Z, Y, X): two balls of 3 and 300 in a background of 0."""
    points = grid.points() if mapping is None else mapping.map_points(grid.points())
    away = points - tensor([30.0, -20.0, 10.0])
    first = (away - tensor([3.0, 0.0, 0.0])).norm(dim=1) < 4
    second = (away + tensor([3.0, 1.0, 0.0])).norm(dim=1) < 3.5
    return torch.where(second, 300, torch.where(first, 3, 0)).reshape(1, *grid.shape)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The record of a command that ends well."""
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def theirs(names: Sequence[str]) -> Any:
    """SimpleITK's composition in the order of antsApplyTransforms: the first acts first on fixed points."""
    made: list[Any] = []
    for name in names:
        if name.endswith("nii.gz"):
            image = sitk.Cast(sitk.ReadImage(name), sitk.sitkVectorFloat64)
            made.append(sitk.DisplacementFieldTransform(image))
        else:
            made.append(sitk.ReadTransform(name))
    return sitk.CompositeTransform(made[::-1])  # ITK's last acts first


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, arguments: Sequence[str], code: int, told: str) -> None:
    """The command ends with this code and one clear line, and the folder is as it was."""
    before = {name: (folder / name).read_bytes() for name in listing(folder) if (folder / name).is_file()}
    assert cli.main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fnreg: error: ") and err.count("\n") == 1
    assert told in err
    assert {name: (folder / name).read_bytes() for name in listing(folder) if (folder / name).is_file()} == before


# -- apply ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["affine.mat"], ["bent.nii.gz"], ["bent.nii.gz", "affine.mat"]], ids=" ".join)
def test_apply_is_what_simpleitk_does(folder: Path, capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    record = run(capsys, "apply", "moving.mha", *names, "--like", "fixed.mha", "-o", "w.mha")
    assert record["transforms"] == names and record["direction"] == "fixed points to moving points"
    fixed, moving = sitk.ReadImage("fixed.mha"), sitk.ReadImage("moving.mha")
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, theirs(names), sitk.sitkLinear, 0.0))
    found, plain = load("w.mha"), load("fixed.mha")
    inner = (slice(2, -2),) * 3
    assert np.abs(found - expected)[inner].max() < 1e-4 * np.ptp(plain)
    assert np.abs(found - plain)[inner].max() > 0.05 * np.ptp(plain)
    assert sitk.ReadImage("w.mha").GetDirection() == pytest.approx(fixed.GetDirection())


def test_the_order_of_transforms_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["bent.safetensors", "affine.mat"]
    pictures: list[np.ndarray] = []
    for count, order in enumerate((names, names[::-1])):
        run(capsys, "apply", "moving.mha", *order, "--like", "fixed.mha", "-o", f"{count}.mha")
        pictures.append(load(f"{count}.mha"))
        bent, affine = (io.read_transform(name) for name in names)
        mapping = affine @ bent if count == 0 else bent @ affine
        image = io.read_image(Path("moving.mha"))
        expected = fnreg.warp(image, mapping, volume_grid()).data[0]
        np.testing.assert_allclose(pictures[count], expected, atol=1e-6)
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


def test_apply_the_inverse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["bent.safetensors", "affine.mat"]
    record = run(capsys, "apply", "fixed.mha", *names, "--inverse", "--like", "moving.mha", "-o", "w.mha")
    assert record["direction"] == "moving points to fixed points"
    whole = io.read_transform("affine.mat") @ io.read_transform("bent.safetensors")
    image, like = io.read_image(Path("fixed.mha")), io.read_image(Path("moving.mha"))
    np.testing.assert_allclose(load("w.mha"), fnreg.warp(image, whole.inverse(), like.grid).data[0], atol=1e-6)


@pytest.mark.parametrize(
    "options", [["--interpolation", "cubic"], ["--padding", "border"], ["--padding", "-5"]], ids=" ".join
)
def test_interpolation_and_padding(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    run(capsys, "apply", "moving.mha", "bent.safetensors", "-o", "w.mha", *options)  # on the grid of the transform
    mode, padding = "linear", "zeros"
    if options[0] == "--interpolation":
        mode = options[1]
    else:
        padding = -5.0 if options[1] == "-5" else options[1]
    made: dict[str, Any] = {"interpolation": mode, "padding": padding}
    mapping = io.read_transform("bent.safetensors")
    expected = fnreg.warp(io.read_image(Path("moving.mha")), mapping, mapping.domain, **made).data[0]
    np.testing.assert_allclose(load("w.mha"), expected, atol=1e-6)


def test_pictures_look_as_they_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, image in zip(("fixed.png", "moving.png"), fnreg.data.digits(9), strict=True):
        io.write_image(Path(name), image, window=(0, 1))
    grid = Grid((28, 28))
    io.write_transform("t.tfm", Mapping(Rigid().init(grid), grid, Rigid()))
    for options in ([], ["--interpolation", "nearest"]):
        run(capsys, "apply", "moving.png", "t.tfm", "--like", "fixed.png", "-o", "w.png", "--overwrite", *options)
        assert torch.equal(io.read_image(Path("w.png")).data, io.read_image(Path("moving.png")).data)


@pytest.mark.parametrize("interp", ["nearest", "multilabel"])
def test_labels_stay_what_they_are(folder: Path, capsys: pytest.CaptureFixture[str], interp: str) -> None:
    names = ["bent.nii.gz", "affine.mat"]
    run(capsys, "apply", "moving_labels.mha", *names, "--like", "fixed.mha", "-o", "w.mha", "--interpolation", interp)
    found = load("w.mha")
    assert set(np.unique(found).tolist()) == {0, 3, 300}
    assert np.issubdtype(found.dtype, np.integer)
    if interp == "nearest":
        image, like = sitk.ReadImage("moving_labels.mha"), sitk.ReadImage("fixed.mha")
        expected = sitk.GetArrayFromImage(sitk.Resample(image, like, theirs(names), sitk.sitkNearestNeighbor, 0))
        inner = (slice(2, -2),) * 3
        assert (found != expected)[inner].mean() < 1e-3  # halves may round the other way


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_share_is_nearer_the_truth_than_the_nearest_voxel(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, moving = volume_grid(), volume_grid(spacing=(1.1, 1.3, 1.9))
    mapping = smooth_mapping(SVFFD(4), fixed, seed, 1.0, 2.0)
    labels, truth = regions(moving), regions(fixed, mapping)
    near, shared = (
        warp_labels(labels, moving, mapping, fixed, interpolation=name) for name in ("nearest", "multilabel")
    )
    assert near.dtype == shared.dtype == labels.dtype
    for made in (near, shared):
        assert set(made.unique().tolist()) <= set(labels.unique().tolist())
    assert float(metrics.dice(shared, truth).mean()) >= float(metrics.dice(near, truth).mean()) > 0.7
    monkeypatch.setattr("fnreg.apply.SLAB", 400)  # large grids go in parts
    for name, made in (("nearest", near), ("multilabel", shared)):
        assert torch.equal(warp_labels(labels, moving, mapping, fixed, interpolation=name), made)


def test_shares_of_labels_at_a_border_and_in_ties() -> None:
    grid = Grid((4, 1))
    labels = torch.tensor([[[9, 9, 4, 4]]])

    def moved(by: float, **options: Any) -> list[int]:
        move = fnreg.linear_mapping(tensor([[1, 0, by], [0, 1, 0]]), grid)
        return warp_labels(labels, grid, move, grid, **options)[0, 0].tolist()

    assert moved(0.4) == [9, 9, 4, 4] and moved(0.6) == [9, 4, 4, 0]
    assert moved(0.5) == [9, 4, 4, 0]  # the lower number of a tie, the background before all
    assert moved(0.6, padding="border") == [9, 4, 4, 4] and moved(0.6, padding=7.0) == [9, 4, 4, 7]
    assert moved(-2.0, padding="reflection") == [4, 9, 9, 9]
    with pytest.raises(ValueError, match="choose nearest or multilabel"):
        moved(0.0, interpolation="linear")
    with pytest.raises(ValueError, match=r"padding is 0\.5: outside of labels give a whole number"):
        moved(0.0, padding=0.5)


def test_the_header_of_like_is_kept(folder: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    values = torch.rand(1, 9, 13, 14)
    io.write_image("plain.nii.gz", Image(values, volume_grid()))
    made = nibabel.load("plain.nii.gz")
    made.header["sform_code"], made.header["qform_code"], made.header["descrip"] = 4, 2, b"of a scanner"
    nibabel.save(made, "fixed.nii.gz")
    series = nibabel.Nifti1Image(np.stack([made.get_fdata()] * 3, -1), None, made.header)
    nibabel.save(series, "series.nii.gz")
    for source, interp in (("moving.mha", "linear"), ("moving_labels.mha", "nearest")):
        for like in ("fixed.nii.gz", "series.nii.gz"):
            told = ["apply", source, "affine.mat", "--like", like, "--interpolation", interp, "--overwrite"]
            assert cli.main([*told, "-o", "w.nii.gz"]) == 0
            header = nibabel.load("w.nii.gz").header
            assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 2)
            assert header["descrip"].item() == b"of a scanner" and header["dim"][0] == 3
            assert cli.main([*told, "-o", "w.mha"]) == 0  # another format has no such header
            np.testing.assert_array_equal(load("w.nii.gz"), load("w.mha"))


# -- points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_points_go_with_the_map(folder: Path, capsys: pytest.CaptureFixture[str], inverse: bool) -> None:
    names, grid = ["bent.nii.gz", "affine.mat"], volume_grid()
    there = grid.center + 3 * uniform(6, 3, seed=1)
    beyond = tensor([theirs(names).TransformPoint(point) for point in there.tolist()])
    save_points("a.csv", io.Landmarks(beyond if inverse else there, tuple("abcdef")))
    record = run(capsys, "points", "a.csv", *names, "-o", "b.csv", *(["--inverse"] if inverse else []))
    assert record["direction"] == ("moving points to fixed points" if inverse else "fixed points to moving points")
    found = io.read_points(Path("b.csv"))  # type: ignore[attr-defined]
    assert tuple(found.names) == tuple("abcdef")
    assert_close(found.points, there if inverse else beyond, atol=0.02 if inverse else 1e-5, rtol=0)
    assert record["points"] == 6 and record["mean distance"] == pytest.approx(
        float((beyond - there).norm(dim=1).mean()), abs=0.02
    )
    assert cli.main(["points", "a.csv", *names, "-o", "c.csv"]) == 0
    assert "direction         fixed points to moving points" in capsys.readouterr().out


# -- from transforms to transforms ---------------------------------------------------------------------------------


def inner_points(count: int = 30) -> Tensor:
    grid = volume_grid()
    return grid.index_to_world(grid.index_center + 0.3 * tensor(grid.size) * uniform(count, 3, seed=4))


def test_invert_tells_how_far_there_and_back_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = inner_points()
    for name, out in (("bent.safetensors", "i.safetensors"), ("bent.nii.gz", "i.nii.gz"), ("affine.mat", "i.mat")):
        record = run(capsys, "invert", name, "-o", out)
        there, back = io.read_transform(name), io.read_transform(out)
        missed = (back.map_points(there.map_points(points)) - points).norm(dim=1)
        left = record["inverse_max"]
        assert float(missed.max()) <= 2 * left + 1e-5
        assert left == 0 if name == "affine.mat" else 0 < record["inverse_mean"] < left < 0.3


def test_the_way_back_of_a_linear_part_that_acts_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes the voxels of the field far from it: those are asked that it takes onto them."""
    bent, expected = io.read_transform("bent.safetensors"), run(capsys, "invert", "bent.safetensors", "-o", "b.h5")
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = tensor([200.0, -150.0, 100.0])
    own = volume_grid(size=(5, 6, 4), center=(30.0 - 200, -20.0 + 150, 10.0 - 100))
    io.write_transform("shift.mat", linear_mapping(shift, volume_grid()))
    run(capsys, "compose", "shift.mat", "bent.safetensors", "-o", "joined.safetensors")
    io.write_transform("own.safetensors", bent @ linear_mapping(shift, own))
    for name in ("inverse_mean", "inverse_max"):
        found = run(capsys, "invert", "joined.safetensors", "-o", "i.safetensors", "--overwrite")[name]
        assert 0 < found == pytest.approx(expected[name], rel=1e-6)
    mapping = io.read_transform("own.safetensors")
    found = run(capsys, "invert", "own.safetensors", "-o", "i.safetensors", "--overwrite")
    assert way_back(mapping, mapping.inverse(), own).items() <= found.items()
    assert 0 < found["inverse_max"] <= expected["inverse_max"]


def test_what_is_not_known_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"inverse_max": None, "output": "a"}, False)
    print_table({"inverse_max": None}, True)
    table, told = capsys.readouterr().out.split("{")
    assert table.splitlines() == ["inverse_max  unknown", "output       a"] and json.loads("{" + told) == {
        "inverse_max": None
    }


def test_compose_is_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = inner_points()
    affine, bent = io.read_transform("affine.mat"), io.read_transform("bent.safetensors")
    for names, expected in (
        (["bent.safetensors", "affine.mat"], affine.map_points(bent.map_points(points))),
        (["affine.mat", "bent.safetensors"], bent.map_points(affine.map_points(points))),
        (["affine.mat", "affine.mat"], affine.map_points(affine.map_points(points))),
        (["affine.mat", "bent.safetensors", "affine.mat", "affine.mat"],
         affine.map_points(affine.map_points(bent.map_points(affine.map_points(points))))),
    ):  # fmt: skip
        for out in ("c.safetensors", "c.tfm"):
            run(capsys, "compose", *names, "-o", out, "--overwrite")
            assert_close(io.read_transform(out).map_points(points), expected, atol=1e-8, rtol=0)
    run(capsys, "compose", "affine.mat", "affine.mat", "-o", "c.mat")
    assert_close(io.read_transform("c.mat").matrix(), affine.matrix() @ affine.matrix(), atol=1e-10, rtol=0)


def test_convert_to_every_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = inner_points()
    for name in ("bent.safetensors", "affine.mat"):
        expected = io.read_transform(name).map_points(points)
        forms = [("itk", "t.tfm"), ("itk", "t.h5"), ("fnreg", "t.safetensors")]
        forms += [("displacement", f"u.{end}") for end in ("nii", "nii.gz", "mha", "nrrd")]
        for form, out in forms:
            like = ["--like", "fixed.mha"] if form == "displacement" else []
            record = run(capsys, "convert", name, "--to", form, "-o", out, "--overwrite", *like)
            assert record["output"] == out
            assert_close(io.read_transform(out).map_points(points), expected, atol=1e-4, rtol=0)


def test_convert_for_ants(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = inner_points()
    bent, affine = io.read_transform("bent.safetensors"), io.read_transform("affine.mat")
    cases = {
        "both": (affine @ bent, ["both1Warp.nii.gz", "both0GenericAffine.mat"]),
        "linear": (affine, ["linear0GenericAffine.mat"]),
        "bent": (bent, ["bent1Warp.nii.gz"]),
        "other": (bent @ fnreg.linear_mapping(affine.matrix(), bent.domain), ["other1Warp.nii.gz"]),
    }
    for name, (mapping, files) in cases.items():
        io.write_transform(f"{name}.safetensors", mapping)
        record = run(capsys, "convert", f"{name}.safetensors", "--to", "ants", "-o", name)
        assert record["output"] == ", ".join(files)
        assert record["for ANTs"] == "antsApplyTransforms " + " ".join(f"-t {file}" for file in files)
        found = tensor([theirs(files).TransformPoint(point) for point in points.tolist()])
        expected = mapping.map_points(points)
        if name == "other":  # one field of the whole, linear between its voxels
            field = {"displacement": mapping.displacement(bent.domain)}
            expected = Mapping(field, bent.domain, Displacement()).map_points(points)
        assert_close(found, expected, atol=1e-4, rtol=0)
    refused(
        capsys, folder, ["convert", "both.safetensors", "--to", "ants", "-o", "both"], 3, "exists: give another name"
    )


def test_convert_for_elastix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, grid = inner_points(), volume_grid()
    affine, free = io.read_transform("affine.mat"), smooth_mapping(fnreg.FFD(4), grid, 2, 1.0, 2.0)
    io.write_transform("both.safetensors", affine @ free)
    record = run(capsys, "convert", "both.safetensors", "--to", "elastix", "-o", "e")
    last = "e/TransformParameters.1.txt"
    assert record["output"] == f"e/TransformParameters.0.txt, {last}"
    assert record["for elastix"].startswith("transformix -tp TransformParameters.1.txt ")
    assert_close(
        io.read_transform(last).map_points(points), affine.map_points(free.map_points(points)), atol=1e-9, rtol=0
    )
    convert = ["convert", "both.safetensors", "--to", "elastix", "-o"]
    refused(capsys, folder, [*convert, "e"], 3, "TransformParameters.0.txt exists: give another name")
    refused(capsys, folder, [*convert, "fixed.mha"], 3, "fixed.mha is a file: for elastix give a folder")
    refused(capsys, folder, [*convert, "no/where"], 3, "no does not exist")
    run(capsys, *convert, "e", "--overwrite")
    bad = ["convert", "bent.safetensors", "--to", "elastix", "-o", "f"]
    refused(capsys, folder, bad, 3, "fnreg convert --to displacement")
    assert not Path("f").exists()
    refused(capsys, folder, ["convert", "affine.mat", "--to", "elastix", "-o", "f"], 3, "give an image with --like")
    run(capsys, "convert", "affine.mat", "--to", "elastix", "-o", "f", "--like", "fixed.mha")
    assert io.read_transform("f/TransformParameters.0.txt").domain.same_as(grid)
    told = [run(capsys, "info", name)["matrix"] for name in ("affine.mat", "f/TransformParameters.0.txt")]
    np.testing.assert_allclose(told[0], told[1], atol=1e-9)


def test_convert_for_learn2reg(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "convert", "affine.mat", "--to", "l2r", "-o", "d.nii.gz", "--like", "fixed.mha")
    image, grid = sitk.ReadImage("d.nii.gz"), io.read_image(Path("fixed.mha")).grid
    found = torch.from_numpy(sitk.GetArrayFromImage(image)).to(torch.float64)  # (3, Z, Y, X)
    index = grid.world_to_index(grid.points())
    expected = grid.world_to_index(io.read_transform("affine.mat").map_points(grid.points())) - index
    assert_close(found.reshape(3, -1).mT, expected, atol=1e-4, rtol=0)
    assert float(expected.abs().max()) > 0.5
    convert = ["convert", "bent.safetensors", "--to", "l2r", "-o"]
    refused(capsys, folder, [*convert, "d.nii.gz"], 3, "d.nii.gz exists")
    refused(capsys, folder, [*convert, "d.mha"], 2, "no name for --to l2r: it ends in .nii, .nii.gz")


def test_jacobian(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = io.read_transform("bent.safetensors")
    expected = fields.determinant(mapping.displacement(), mapping.domain)
    record = run(capsys, "jacobian", "bent.safetensors", "-o", "j.nii.gz")
    np.testing.assert_allclose(load("j.nii.gz"), expected, atol=1e-6)
    assert record["jac_min"] == pytest.approx(float(expected.min())) and record["folds at voxels"] == 0
    assert record["jac_max"] == pytest.approx(float(expected.max()))
    assert record["sdlogj"] == pytest.approx(float(expected.log().std(correction=0)))
    run(capsys, "jacobian", "bent.safetensors", "-o", "l.nii.gz", "--log")
    np.testing.assert_allclose(load("l.nii.gz"), expected.log(), atol=1e-6)
    run(capsys, "jacobian", "affine.mat", "-o", "a.nii.gz", "--like", "moving.mha")
    scale = float(torch.linalg.det(io.read_transform("affine.mat").matrix()))
    np.testing.assert_allclose(load("a.nii.gz"), scale, atol=1e-6)
    fold = Mapping({"displacement": 60 * mapping.displacement()}, mapping.domain, Displacement())
    io.write_transform("fold.safetensors", fold)
    told = run(capsys, "jacobian", "fold.safetensors", "-o", "f.nii.gz", "--log")
    assert told["folds at voxels"] == int((load("f.nii.gz") < np.log(1.01e-6)).sum()) > 0 > told["jac_min"]


def test_json_has_no_numbers_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = volume_grid()
    turned = 2 * (grid.center - grid.points()).mT.reshape(3, *grid.shape)  # p -> 2 c - p folds everywhere
    io.write_transform("turned.safetensors", Mapping({"displacement": turned}, grid, Displacement()))
    assert cli.main(["jacobian", "turned.safetensors", "-o", "j.nii.gz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["sdlogj"] is None and found["jac_max"] == pytest.approx(-1)


# -- evaluate and presets ------------------------------------------------------------------------------------------


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed, moving = volume_grid(), io.read_image(Path("moving.mha")).grid
    mapping = io.read_transform("affine.mat") @ io.read_transform("bent.safetensors")
    save("fixed_labels.mha", regions(fixed, mapping).to(torch.int16), fixed)  # the truth
    points = inner_points()
    away = 0.1 * uniform(30, 3, seed=7)
    save_points("f.csv", io.Landmarks(points, ("p",) * 30))
    save_points("m.csv", io.Landmarks(mapping.map_points(points) + away, ("p",) * 30))
    transforms = ["bent.safetensors", "affine.mat"]
    sides = ["--fixed-labels", "fixed_labels.mha", "--moving-labels", "moving_labels.mha"]
    sides += ["--fixed-points", "f.csv", "--moving-points", "m.csv"]
    found = run(capsys, "evaluate", *transforms, *sides)
    before, after = found["before"], found["after"]

    warped = load_nearest(moving, fixed, mapping)
    truth = regions(fixed, mapping)
    expected = metrics.dice(truth, warped, numbers=(3, 300))
    assert [after["dice_3"], after["dice_300"]] == pytest.approx(expected.tolist())
    assert (
        after["dice_mean"] == pytest.approx(float(expected.mean())) and after["dice_mean"] > before["dice_mean"] + 0.02
    )
    assert after["jaccard_mean"] == pytest.approx(float((expected / (2 - expected)).mean()))
    lengths = away.norm(dim=1)
    assert after["tre_mean"] == pytest.approx(float(lengths.mean()), abs=1e-6)
    assert after["tre_max"] == pytest.approx(float(lengths.max()), abs=1e-6)
    assert after["tre_p95"] == pytest.approx(float(np.percentile(lengths, 95)), abs=1e-6)
    assert before["tre_mean"] > 5 * after["tre_mean"]
    determinant = fields.determinant(mapping.displacement(fixed), fixed)
    assert after["jac_min"] == pytest.approx(float(determinant.min()), abs=1e-6) and after["folds"] == 0
    assert after["sdlogj"] == pytest.approx(float(determinant.log().std(correction=0)), abs=1e-6)
    assert "jac_min" not in before
    assert set(run(capsys, "evaluate", *sides)) == {"before"}
    shared = run(capsys, "evaluate", *transforms, *sides, "--interpolation", "multilabel")["after"]
    assert shared["dice_mean"] >= after["dice_mean"]
    assert cli.main(["evaluate", *transforms, *sides]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["before", "after"]
    assert table[2].split() == ["dice_3", f"{before['dice_3']:.4g}", f"{after['dice_3']:.4g}"]
    assert "jac_min" not in run(capsys, "evaluate", "affine.mat", *sides)["after"]


def test_evaluate_pairs_landmarks_as_register_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = inner_points(3)
    save_points("f.csv", io.Landmarks(points, ("a", "b", "c")))
    save_points("m.csv", io.Landmarks(points.flip(0), ("c", "b", "a")))
    assert run(capsys, "evaluate", "--fixed-points", "f.csv", "--moving-points", "m.csv")["before"]["tre_max"] == 0
    save_points("m.csv", io.Landmarks(points.flip(0)[:2], ("c", "b")))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["evaluate", "--fixed-points", "f.csv", "--moving-points", "m.csv", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["before"]["tre_max"] == 0
    assert err == "fnreg: warning: landmarks in one of f.csv and m.csv only were left out: a\n"


def test_evaluate_surfaces_and_the_way_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed, moving = volume_grid(), io.read_image(Path("moving.mha")).grid
    bent = io.read_transform("bent.safetensors")
    io.write_transform("back.safetensors", bent.inverse())
    sides = ["--fixed-labels", "fixed_labels.mha", "--moving-labels", "moving_labels.mha", "--surfaces"]
    found = run(capsys, "evaluate", "bent.safetensors", *sides, "--inverse", "back.safetensors")
    identity = linear_mapping(torch.eye(4, dtype=torch.float64), fixed)
    for name, mapping in (("before", identity), ("after", bent)):
        each = metrics.surface_distances(regions(fixed), load_nearest(moving, fixed, mapping), fixed, numbers=(3, 300))
        told = found[name]
        for value, word in zip(each, ("mean", "p95", "max"), strict=True):
            assert [told[f"surface_{word}_3"], told[f"surface_{word}_300"]] == pytest.approx(value.tolist())
        assert told["surface_mean"] == pytest.approx(float(each.mean.mean()))
        assert told["surface_p95"] == pytest.approx(float(each.p95.mean()))
        assert told["surface_max"] == pytest.approx(float(each.hausdorff.max())) and told["surface_max"] > 0
    assert found["after"]["surface_mean"] != found["before"]["surface_mean"]
    assert 0 < found["after"]["inverse_mean"] <= found["after"]["inverse_max"] < 0.1
    assert "inverse_mean" not in found["before"]
    wrong = run(capsys, "evaluate", "bent.safetensors", "--inverse", "bent.safetensors")["after"]
    assert wrong["inverse_mean"] > 5 * found["after"]["inverse_mean"]
    assert "surface_mean" not in run(capsys, "evaluate", "bent.safetensors", *sides[:-1])["after"]


def test_the_way_back_of_known_maps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = volume_grid()
    run(capsys, "invert", "affine.mat", "-o", "back.mat")
    told = ["evaluate", "affine.mat", "--like", "fixed.mha", "--inverse"]
    exact = run(capsys, *told, "back.mat")["after"]
    assert exact["inverse_max"] < 1e-9
    # a shift: S(T(p)) - p is what S misses, wherever T ends
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = tensor([3.0, 0.0, -4.0])
    io.write_transform("shift.tfm", linear_mapping(shift, grid))
    io.write_transform("none.tfm", linear_mapping(torch.eye(4, dtype=torch.float64), grid))
    told = ["evaluate", "shift.tfm", "--like", "fixed.mha", "--inverse"]
    assert run(capsys, *told, "none.tfm")["after"] == pytest.approx({"inverse_mean": 5.0, "inverse_max": 5.0})
    # a field counts where it is known
    constant = Mapping({"displacement": -shift[:3, 3].reshape(3, 1, 1, 1).expand(3, *grid.shape)}, grid, Displacement())
    io.write_transform("field.safetensors", constant)
    assert run(capsys, *told, "field.safetensors")["after"]["inverse_max"] < 1e-9
    away = Mapping(constant.params, volume_grid(center=(500.0, 0.0, 0.0)), Displacement())
    io.write_transform("away.safetensors", away)
    assert run(capsys, *told, "away.safetensors")["after"] == {"inverse_mean": None, "inverse_max": None}


def load_nearest(moving: Grid, fixed: Grid, mapping: Mapping) -> Tensor:
    """The moving labels by rounding voxel indices, halves up."""
    index = (moving.world_to_index(mapping.map_points(fixed.points())) + 0.5).floor().long()
    inside = ((index >= 0) & (index < torch.tensor(moving.size))).all(-1)
    x, y, z = torch.where(inside[:, None], index, 0).unbind(-1)
    return torch.where(inside, regions(moving)[0, z, y, x], 0).reshape(1, *fixed.shape)


def test_presets(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(capsys, "presets") == {"brain": "affine+diffeomorphism", "brain_fast": "affine+diffeomorphism"}
    assert cli.main(["presets", "show", "brain"]) == 0
    out = capsys.readouterr().out
    assert "Diffeomorphism(gradient=0.75" in out and "padding    'zeros'" in out
    refused(capsys, folder, ["presets", "show", "brian"], 2, "did you mean brain?")


# -- what is refused -----------------------------------------------------------------------------------------------

APPLY = ["apply", "moving.mha", "bent.safetensors", "-o", "w.mha"]
REFUSED = {
    "interp": ([*APPLY, "--interpolation", "nearset"], 2, "unknown interpolation 'nearset': did you mean nearest?"),
    "padding": ([*APPLY, "--padding", "zeroes"], 2, "did you mean zeros?"),
    "no transform": (["apply", "moving.mha", "-o", "w.mha"], 2, "no transform is given"),
    "no output": (["apply", "moving.mha", "affine.mat"], 2, "--output"),
    "no such transform": (["apply", "moving.mha", "none.h5", "-o", "w.mha"], 3, "none.h5 does not exist"),
    "no such image": (["apply", "none.mha", "affine.mat", "-o", "w.mha", "--like", "fixed.mha"], 3, "none.mha"),
    "no grid": (["apply", "moving.mha", "affine.mat", "-o", "w.mha"], 3, "give an image with --like"),
    "axes of the image": ([*APPLY[:1], "flat.png", *APPLY[2:]], 3, "flat.png has 2 axes but the transform has 3"),
    "axes of the grid": ([*APPLY, "--like", "flat.png"], 3, "flat.png has 2 axes but the transform has 3"),
    "axes of transforms": (
        ["compose", "affine.mat", "flat.tfm", "-o", "c.tfm"], 3,
        "flat.tfm is a transform of 2 axes but affine.mat has 3",
    ),
    "a batch": (["compose", "batch.safetensors", "-o", "c.tfm"], 3, "holds a batch of maps"),
    "no labels": (
        ["apply", "moving.mha", "bent.nii.gz", "-o", "w.mha", "--interpolation", "multilabel"], 3, "moving.mha",
    ),
    "outside of labels": (
        ["apply", "moving_labels.mha", "bent.nii.gz", "-o", "w.mha", "--interpolation", "nearest", "--padding", "1e30"],
        3,
        "outside of labels give a whole number below 2^63",
    ),
    "half outside of labels": (
        [
            "apply", "moving_labels.mha", "bent.nii.gz", "-o", "w.mha", "--interpolation", "multilabel",
            "--padding", "0.5",
        ],
        3,
        "outside of labels give a whole number below 2^63",
    ),
    "labels of a PNG": (
        ["apply", "flat.tif", "flat.tfm", "--like", "flat.png", "-o", "w.png", "--interpolation", "nearest"], 3,
        "name it .tif",
    ),
    "output is there": (["apply", "moving.mha", "bent.nii.gz", "-o", "fixed.mha"], 3, "exists: give another name"),
    "output is a folder": (["invert", "affine.mat", "-o", "."], 3, "is a folder"),
    "no folder": (["invert", "affine.mat", "-o", "none/i.mat"], 3, "none/i.mat cannot be written: none does not exist"),
    "a file as folder": (["compose", "affine.mat", "-o", "affine.mat/i.mat"], 3, "affine.mat is not a folder"),
    "no such form": (["convert", "affine.mat", "--to", "antz", "-o", "c"], 2, "did you mean ants?"),
    "name and form": (["convert", "affine.mat", "--to", "itk", "-o", "c.nii"], 2, "c.nii is no name for --to itk"),
    "bent as .mat": (["convert", "bent.safetensors", "--to", "itk", "-o", "c.mat"], 3, ".mat holds linear transforms"),
    "ending": (["compose", "affine.mat", "-o", "c.xfm"], 3, "expected a name that ends in .safetensors"),
    "like without need": (["compose", "affine.mat", "-o", "c.tfm", "--like", "fixed.mha"], 2, "leave it out"),
    "no inverse": (["invert", "fold.safetensors", "-o", "i.h5"], 3, "use a stronger penalty, or a diffeomorphism"),
    "no grid of a field": (["convert", "affine.mat", "--to", "displacement", "-o", "u.nii"], 3, "with --like"),
    "jacobian as picture": (["jacobian", "bent.nii.gz", "-o", "j.png"], 3, "ends in .nii or .nii.gz"),
    "nothing to evaluate": (["evaluate"], 2, "nothing to evaluate"),
    "folds of a linear map": (["evaluate", "affine.mat", "--like", "fixed.mha"], 2, "a linear transform does not fold"),
    "space of nothing": (["evaluate", "bent.nii.gz", "--space", "RAS"], 2, "--space RAS is that of points"),
    "grid of nothing": (
        ["evaluate", "--fixed-points", "p.csv", "--moving-points", "p.csv", "--like", "fixed.mha"], 2,
        "--like fixed.mha is where folds of a transform are counted",
    ),
    "space of a table": (["evaluate", "--fixed-points", "t.csv", "--moving-points", "t.csv"], 3, "give --space LPS or"),
    "space of points": (["points", "t.csv", "affine.mat", "-o", "q.csv"], 3, "give --space LPS or RAS, or voxel with"),
    "voxels of nothing": (
        ["points", "t.csv", "affine.mat", "-o", "q.csv", "--space", "voxel"], 2, "--space voxel goes with --like",
    ),
    "grid of points": (
        ["points", "p.csv", "affine.mat", "-o", "q.csv", "--like", "fixed.mha"], 2, "--space voxel goes with --like",
    ),
    "surfaces of nothing": (["evaluate", "affine.mat", "--surfaces"], 2, "give --fixed-labels and --moving-labels"),
    "the way back alone": (
        ["evaluate", "--inverse", "affine.mat", "--fixed-labels", "l.mha", "--moving-labels", "l.mha"], 2,
        "is the way back of a transform",
    ),
    "axes of the way back": (["evaluate", "bent.nii.gz", "--inverse", "flat.tfm"], 3, "has 3 axes but the transform"),
    "the way back of no grid": (["evaluate", "affine.mat", "--inverse", "affine.mat"], 3, "give an image with --like"),
    "one side": (["evaluate", "--fixed-points", "p.csv"], 2, "give --fixed-points and --moving-points"),
    "labels of other axes": (
        ["evaluate", "affine.mat", "--fixed-labels", "flat.png", "--moving-labels", "flat.png"], 3,
        "flat.png has 2 axes but the transform has 3",
    ),
    "no class": (
        ["evaluate", "--fixed-labels", "zero.png", "--moving-labels", "zero.png"], 3, "there is no class to compare",
    ),
    "spaces": (["points", "p.csv", "affine.mat", "-o", "q.csv", "--space", "LSP"], 2, "choose from LPS, RAS, voxel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, code, told = REFUSED[case]
    flat = Grid((8, 6))
    io.write_image(Path("flat.png"), Image(torch.arange(48.0).reshape(1, 6, 8), flat))
    io.write_image(Path("flat.tif"), Image(300 + torch.arange(48.0).reshape(1, 6, 8), flat))
    Path("t.csv").write_text("x,y,z\n1,2,3\n")
    io.write_image(Path("zero.png"), Image(torch.zeros(1, 6, 8), flat))
    io.write_transform("flat.tfm", Mapping(Rigid().init(flat), flat, Rigid()))
    one = io.read_transform("bent.safetensors")
    io.write_transform("batch.safetensors", fnreg.stack([one, one]))
    fold = Mapping({"displacement": 60 * one.displacement()}, one.domain, Displacement())
    io.write_transform("fold.safetensors", fold)
    refused(capsys, folder, arguments, code, told)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o500)
    refused(capsys, folder, ["invert", "affine.mat", "-o", "locked/i.mat"], 3, "locked cannot be written to")


def test_a_fault_while_writing_leaves_what_was_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    Path("i.mat").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, folder, ["invert", "affine.mat", "-o", "i.mat", "--overwrite"], 3, "No space left")
    assert Path("i.mat").read_bytes() == b"before"


@pytest.mark.parametrize("name", ["bent.safetensors", "bent.nii.gz", "affine.mat"])
def test_damaged_transforms_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data = Path(name).read_bytes()
    Path(f"cut_{name}").write_bytes(data[: len(data) // 2])
    arguments = ["apply", "moving.mha", f"cut_{name}", "--like", "fixed.mha", "-o", "w.mha"]
    refused(capsys, folder, arguments, 3, f"cut_{name}")


def test_labels_that_a_float_would_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid((6, 5))
    labels = torch.full((1, *grid.shape), 2**24 + 1)
    io.write_labels("large.nii", io.Labels(labels, grid))
    io.write_transform("still.tfm", Mapping(Rigid().init(grid), grid, Rigid()))
    for interpolation in ("nearest", "multilabel"):
        arguments = ["apply", "large.nii", "still.tfm", "--like", "large.nii", "--interpolation", interpolation]
        refused(capsys, folder, [*arguments, "-o", "new.tif"], 3, "name it .nii.gz")
        assert cli.main([*arguments, "-o", "new.nii.gz", "--overwrite"]) == 0
        assert torch.equal(io.read_labels("new.nii.gz").data, labels.to(torch.int32))
        capsys.readouterr()
    io.write_labels("large.nii", io.Labels(labels - 1, grid))
    assert cli.main([*arguments, "-o", "new.tif"]) == 0
    assert bool((io.read_image("new.tif").data == 2**24).all())


def test_a_picture_of_what_is_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid((6, 5))
    values = torch.arange(30.0).reshape(1, *grid.shape) * 20
    values[0, 0, 0] = torch.nan
    io.write_image("holes.nii", Image(values, grid))
    io.write_transform("still.tfm", Mapping(Rigid().init(grid), grid, Rigid()))
    assert cli.main(["apply", "holes.nii", "still.tfm", "--like", "holes.nii", "-o", "new.png"]) == 0
    assert int(io.read_image("new.png").data.max()) == 255


@pytest.mark.parametrize(
    "command",
    [
        ["apply", "fixed.mha", "bent.safetensors", "-o", "new.jpg"],
        ["points", "points.csv", "bent.safetensors", "-o", "new.txt"],
        ["invert", "bent.safetensors", "-o", "new.nii.zip"],
        ["compose", "bent.safetensors", "-o", "new"],
        ["jacobian", "bent.safetensors", "-o", "new.mha"],
    ],
    ids=lambda command: command[0],
)
def test_names_are_looked_at_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work began")

    save_points("points.csv", io.Landmarks(tensor([[30.0, -20.0, 10.0]]), ("a",)))
    for where in ("apply", "convert"):
        monkeypatch.setattr(f"fnreg.{where}.read_chain", work)
    refused(capsys, folder, command, 3, f"{command[-1]}: expected a name that ends in .")


def test_options_that_nothing_uses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "affine.mat", "--to", "ants", "-o", "new", "--like", "fixed.mha"]
    refused(capsys, folder, arguments, 2, "--like fixed.mha is the grid of a displacement")
    arguments = ["evaluate", "bent.safetensors", "--interpolation", "nearest"]
    refused(capsys, folder, arguments, 2, "--interpolation nearest is that of labels")
