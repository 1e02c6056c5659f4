"""The command line: what it leaves, what it refuses, in one line, with which code, and that nothing is left."""

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fnreg
from fnreg import cli, extras, io, native
from fnreg.output import OutputError, OutputFolder
from fnreg.progress import Bars, fraction
from fnreg.settings import Settings
from fnreg.specs import SettingsError

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

SHORT = ["--levels", "2", "--steps", "8x4"]
QUICK = [*SHORT, "--save", "params+xfm+warped"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two nines, bytes as a scanner would store them."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("fixed.png", "moving.png"), fnreg.data.digits(9), strict=True):
        io.write_image(name, image, window=(0, 1))
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], code: int, told: str) -> None:
    """The command ends with this code and one clear line, and the folder is as it was."""
    before = listing(folder)
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fnreg: error: ") and err.count("\n") == 1
    assert told in err
    assert listing(folder) == before


# -- what a run leaves ----------------------------------------------------------------------------------------------


def test_register_leaves_all_it_promises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "register",
        "fixed.png",
        "moving.png",
        "-o",
        "made/out",
        "--levels",
        "2",
        "-n",
        "20",
        "--start",
        "search",
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "rigid: ok" in out and "mse" in out and "made/out" in out and err == ""
    files = ["run.json", "transform.safetensors", "transform.tfm", "warped.png", "warped.tif"]
    figures = [f"figures/{name}.png" for name in ("checkerboard", "losses", "overview")]
    assert listing(folder / "made" / "out") == sorted(["figures", *figures, *files])

    record = json.loads((folder / "made" / "out" / "run.json").read_text())
    assert record["status"] == "ok" and record["settings"]["transform"] == "rigid" and record["warnings"] == []
    assert record["value_after"] < record["value_before"] and set(record["terms_after"]) == {"mse"}
    assert record["inputs"]["fixed"]["sha256"] == hashlib.sha256((folder / "fixed.png").read_bytes()).hexdigest()
    assert sorted(record["written"]) == sorted([*figures, *files])
    assert len(record["history"]) == 2 and record["history"][0]["level"] == 1
    for trace in record["history"]:
        assert list(trace["terms"]) == ["mse"] and trace["terms"]["mse"] == pytest.approx(trace["value"])
    assert record["seconds"] > 0 and record["peak_mb"] > 0 and record["versions"]["torch"]

    # What was written is one and the same map, and it makes the picture that lies beside it.
    mapping = io.read_transform("made/out/transform.safetensors")
    assert mapping.matrix().tolist() == record["matrix"]
    warped = fnreg.warp(io.read_image("moving.png"), mapping)
    assert torch.equal(io.read_image("made/out/warped.tif").data, warped.data)
    np.testing.assert_allclose(io.read_image("made/out/warped.png").numpy(), warped.numpy(), atol=0.51)
    tfm = (folder / "made" / "out" / "transform.tfm").read_text()
    assert tfm.startswith("#Insight Transform File V1.0")


def test_json_on_standard_output_is_the_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "out" / "run.json").read_text())


def test_the_same_run_gives_the_same_bytes(folder: Path) -> None:
    for name in ("a", "b"):
        assert cli.main(["register", "fixed.png", "moving.png", "-o", name, *QUICK]) == 0
    for name in ("transform.safetensors", "transform.tfm", "warped.tif", "warped.png"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--transform", "translation+rigid+affine", "--similarity", "ncc"],
        ["--similarity", "huber:delta=20", "--optimizer", "adam:lr=0.1,decay=1"],
        ["--similarity", "nmi:bins=16,samples=500,seed=2"],
        ["--similarity", "lncc:window=gaussian,radius=3,channel=0"],
        ["--optimizer", "normalized:lr=0.4,momentum=0.5"],
        ["--transform", "svffd:stride=8", "--penalty", "bending=1e-2+inverse_consistency=0.1"],
        ["--solver", "gauss-newton", "--padding", "zeros"],
        ["--optimizer", "sgd:lr=1e-3", "--start", "moments", "--padding", "7"],
        ["--transform", "isotropic-scaling", "--seed", "3", "--device", "cpu"],
    ],
)
def test_options(folder: Path, options: list[str]) -> None:
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", *QUICK, *options]) == 0


def test_stages_and_a_start_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["register", "fixed.png", "moving.png", "--json", "--levels", "2", "--save", "params"]
    assert cli.main([*base, "-o", "a", "--transform", "rigid+affine", "-n", "8x4"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["steps"]) == 4 and first["stages"] == ["Rigid()", "Affine()"]
    start = ["--start", "a/transform.safetensors", "--transform", "affine", "-n", "0"]
    assert cli.main([*base, "-o", "b", *start]) == 0
    second = json.loads(capsys.readouterr().out)
    for after, before in zip(second["matrix"], first["matrix"], strict=True):
        assert after == pytest.approx(before, abs=1e-9)
    assert second["value_before"] == pytest.approx(first["value_after"])
    assert second["inputs"]["start"]["path"] == "a/transform.safetensors"


def test_masks_count(folder: Path) -> None:
    mask = torch.zeros(1, 28, 28)
    mask[..., 4:24, 4:24] = 1
    io.write_image("mask.png", fnreg.Image(mask))
    masks = ["--fixed-mask", "mask.png", "--moving-mask", "mask.png"]
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", *QUICK, *masks]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert {"fixed_mask", "moving_mask"} <= set(record["inputs"])


def test_images_of_different_depth_and_size(folder: Path) -> None:
    io.write_image("moving.tif", fnreg.Image(io.read_image("moving.png").data[..., :20] / 255))
    options = ["--similarity", "ncc", "--save", "inverse"]
    assert cli.main(["register", "fixed.png", "moving.tif", "-o", "out", *SHORT, *options]) == 0
    assert listing(folder / "out") == ["inverse.safetensors", "inverse.tfm", "run.json"]


def test_the_inverse_of_a_linear_map_is_not_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is exact, and to ask all voxels takes time and memory."""
    monkeypatch.delattr("fnreg.results.way_back")
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", *SHORT, "--save", "inverse"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["inverse_mean"] == record["inverse_max"] == 0


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(folder)
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", "--dry-run"]) == 0
    assert "would register moving.png to fixed.png" in capsys.readouterr().out
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["levels"] == 3
    assert listing(folder) == before


def test_overwrite_replaces_results_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["register", "fixed.png", "moving.png", "-o", "out", *SHORT]
    assert cli.main([*base, "--save", "xfm+warped"]) == 0
    (folder / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    refused(capsys, folder, base, 3, "out is not empty: give another folder, or --overwrite")
    assert cli.main([*base, "--overwrite", "--save", "params"]) == 0
    assert listing(folder / "out") == ["notes.txt", "run.json", "transform.safetensors"]


def test_an_empty_folder_is_taken(folder: Path) -> None:
    (folder / "out").mkdir()
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", *QUICK]) == 0
    assert "run.json" in listing(folder / "out") and not [name for name in listing(folder) if "partial" in name]


def test_settings_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text('transform = "affine"\nsteps = [6, 3]\nsimilarity = "ncc"\nsave = "params"\n')
    arguments = ["register", "fixed.png", "moving.png", "-o", "out", "--settings", "s.toml", "--similarity", "mse"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert (found["transform"], found["steps"], found["levels"]) == ("affine", "6x3", 2)
    assert found["similarity"] == "mse"


# -- maps with a field ----------------------------------------------------------------------------------------------

PAIR = ["register", "fixed.png", "moving.png", "--levels", "2", "--json"]


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The record of a run that ends well."""
    assert cli.main([*PAIR, *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_field_leaves_all_it_promises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    saves = "params+xfm+warped+figures+inverse+displacement+jacobian"
    options = [
        "--transform",
        "affine+svffd:stride=4,squarings=5",
        "--penalty",
        "bending=100",
        "-n",
        "8",
        "--save",
        saves,
    ]
    record = run(capsys, "-o", "out", *options)
    figures = ("checkerboard", "flow", "jacobian", "losses", "overview", "warped_grid")
    files = ["run.json", "transform.safetensors", "transform.h5", "inverse.safetensors", "inverse.h5", "warped.png"]
    files += ["warped.tif", "displacement.nii.gz", "inverse_displacement.nii.gz", "jacobian.nii.gz"]
    assert listing(folder / "out") == sorted(["figures", *(f"figures/{name}.png" for name in figures), *files])
    assert record["stages"] == ["Affine()", "SVFFD(stride=4, squarings=5)"] and len(record["steps"]) == 4
    assert record["objective"] == "mse + 100 * bending" and set(record["terms_after"]) == {"mse", "bending"}
    assert record["value_after"] < record["value_before"] and "matrix" not in record

    mapping, inverse = (io.read_transform(f"out/{name}.safetensors") for name in ("transform", "inverse"))
    image = io.read_image("fixed.png")
    moved = mapping.displacement(image.grid)
    told = fnreg.fields.statistics(moved, image.grid)
    assert record["jac_min"] == pytest.approx(float(told.min_determinant), abs=1e-5)
    assert record["jac_max"] == pytest.approx(float(told.max_determinant), abs=1e-5)
    assert record["folds"] == 0 and record["status"] == "ok" and 0 < record["inverse_mean"] <= record["inverse_max"] < 1
    assert record["max_displacement"] == pytest.approx(float(moved.norm(dim=0).max()), abs=1e-4)
    assert len(record["linear_parts"]) == 1
    middle = image.grid.center[None]
    assert float((inverse.map_points(mapping.map_points(middle)) - middle).abs().max()) < 1
    determinant = sitk.GetArrayFromImage(sitk.ReadImage("out/jacobian.nii.gz"))
    assert determinant.min() == pytest.approx(record["jac_min"], abs=1e-5)

    # ITK warps the moving image to the same picture, by either file.
    field = sitk.ReadImage("out/displacement.nii.gz")
    assert field.GetPixelID() == sitk.sitkVectorFloat32
    pictures = [sitk.GetImageFromArray(io.read_image(f"{name}.png").numpy()[0]) for name in ("fixed", "moving")]
    ours = io.read_image("out/warped.tif").numpy()[0]
    for theirs in (
        sitk.ReadTransform("out/transform.h5"),
        sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64)),
    ):
        warped = sitk.GetArrayFromImage(sitk.Resample(pictures[1], pictures[0], theirs, sitk.sitkLinear, 0.0))
        np.testing.assert_allclose(warped, ours, atol=0.01)


def test_a_field_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--transform", "svffd", "--penalty", "bending=1e3", "-n", "5", "--save", "params+inverse"]
    assert cli.main([*PAIR[:-1], "-o", "out", *options]) == 0
    out = capsys.readouterr().out
    assert "determinant" in out and "no folds" in out and "displacement" in out and "bending" in out
    assert "inverse      ends" in out
    assert cli.main(["info", "out/transform.safetensors"]) == 0
    assert "SVFFD(stride=4, squarings=6)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "stage", "objective"),
    [
        (["--transform", "ffd:stride=4x7", "--penalty", "bending=1e+3"], "FFD(stride=(4, 7))", "mse + 1000 * bending"),
        (
            ["--transform", "svf:squarings=4", "--penalty", "diffusion=50", "--penalty", "elasticity=10:mu=2,lam=0.5"],
            "SVF(squarings=4)",
            "mse + 50 * diffusion + 10 * elasticity(lam=0.5, mu=2.0)",
        ),
        (["--transform", "displacement", "--penalty", "total_variation=9", "--similarity", "mae"], "Displacement()",
         "mae + 9 * total_variation"),
        (
            ["--transform", "diffeomorphism:gradient=2,smooth=0.5"],
            "Diffeomorphism(gradient=2.0, smooth=0.5, limit=0.5)",
            "mse",
        ),
    ],
)  # fmt: skip
def test_fields_with_options(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], stage: str, objective: str
) -> None:
    record = run(capsys, "-o", "out", *options, "-n", "4", "--save", "params")
    assert record["stages"] == [stage] and record["objective"] == objective
    assert record["terms_after"][objective.split()[0]] < record["terms_before"][objective.split()[0]]
    assert repr(io.read_transform("out/transform.safetensors").transform) == stage


def test_a_map_that_folds_is_told_and_has_no_inverse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--transform", "ffd:stride=2", "-n", "40", "--save", "params+inverse"]
    record = run(capsys, "-o", "out", *options)
    assert record["status"] == "warn" and record["folds"] > 0 and record["jac_min"] <= 0
    told = " ".join(record["warnings"])
    assert "the map folds at" in told and "--penalty bending=9e+03" in told and "no inverse was written" in told
    assert "inverse_max" not in record and listing(folder / "out") == ["run.json", "transform.safetensors"]
    weak = run(capsys, "-o", "weak", *options, "--penalty", "bending=1e-9")
    assert weak["folds"] > 0 and "a larger weight than bending=1e-9" in weak["warnings"][0]
    penalized = run(capsys, "-o", "smooth", *options, "--penalty", "bending=1e5")
    assert penalized["folds"] == 0 and penalized["status"] == "ok" and "inverse.safetensors" in penalized["written"]


def test_symmetric_counts_both_directions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--transform", "affine+svffd", "--penalty", "bending=100", "-n", "15", "--save", "params"]
    one = run(capsys, "-o", "one", *options)
    both = run(capsys, "-o", "both", *options, "--symmetric")
    assert both["settings"]["symmetric"] and not one["settings"]["symmetric"]
    begun = ["--transform", "svffd", "--penalty", "bending=100", "--start", "one/transform.safetensors", "-n", "0"]
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "still", *begun, "--levels", "1", "--symmetric"]) == 0
    still = json.loads(Path("still", "run.json").read_text())
    assert still["value_before"] == pytest.approx(still["value_after"], rel=1e-5)
    assert still["terms_before"] == pytest.approx(still["terms_after"], rel=1e-4)
    fixed, moving = (io.read_image(f"{name}.png") for name in ("fixed", "moving"))

    def backward(name: str) -> float:
        mapping = io.read_transform(f"{name}/transform.safetensors").inverse()
        return float((fnreg.warp(fixed, mapping, moving.grid).data - moving.data).square().mean())

    assert backward("both") < backward("one")


def test_a_field_starts_where_another_run_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--save", "params", "--padding", "border"]
    options = [*shared, "--transform", "affine+ffd:stride=4", "--penalty", "bending=100"]
    first = run(capsys, "-o", "a", *options, "-n", "8")
    more = [*shared, "--transform", "ffd:stride=4", "--penalty", "bending=100", "--start", "a/transform.safetensors"]
    second = run(capsys, "-o", "b", *more, "-n", "0")
    assert second["value_before"] == pytest.approx(first["value_after"], rel=1e-5)
    assert second["terms_before"]["bending"] == pytest.approx(first["terms_after"]["bending"], rel=1e-4)
    assert run(capsys, "-o", "c", *more, "-n", "8")["value_after"] < first["value_after"]

    # A linear map acts after the field.
    run(capsys, "-o", "linear", *shared, "--transform", "affine", "-n", "8")
    after = [*shared, "--transform", "ffd:stride=4", "--start", "linear/transform.safetensors", "-n", "0"]
    third = run(capsys, "-o", "d", *after)
    assert third["linear_parts"] == [io.read_transform("linear/transform.safetensors").matrix().tolist()]


def test_fields_that_cannot_be_a_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("other", (28, 28)), ("small", (20, 28))):
        grid, transform = fnreg.Grid(size), fnreg.SVFFD(stride=4)
        io.write_transform(f"{name}.safetensors", fnreg.Mapping(transform.init(grid), grid, transform))
    many = fnreg.stack([fnreg.data.brain_truth()] * 2)
    io.write_transform("many.safetensors", many)
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--transform"]
    told = "begins with a linear map, or with parameters of its own kind on the grid of the fixed image"
    for transform, file in (("ffd:stride=4", "other"), ("svffd:stride=2", "other"), ("svffd:stride=4", "small")):
        refused(capsys, folder, [*base, transform, "--start", f"{file}.safetensors"], 3, told)
    refused(capsys, folder, [*base, "rigid", "--start", "other.safetensors"], 3, told)
    refused(capsys, folder, [*base, "ffd", "--start", "many.safetensors"], 3, "holds a batch")


def test_without_simpleitk_the_displacement_takes_its_place(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "present", lambda _: {"SimpleITK": False})
    run(capsys, "-o", "out", "--transform", "svffd", "-n", "2", "--save", "xfm+inverse")
    files = ["displacement.nii.gz", "inverse.safetensors", "inverse_displacement.nii.gz", "run.json"]
    assert listing(folder / "out") == files


def test_displacement_of_a_linear_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nibabel = pytest.importorskip("nibabel")
    record = run(capsys, "-o", "out", "-n", "5", "--save", "params+displacement+jacobian")
    field = np.asarray(nibabel.load("out/displacement.nii.gz").dataobj)
    assert field.shape == (28, 28, 1, 1, 2) and field.dtype == np.float32
    grid = io.read_image("fixed.png").grid
    moved = np.array([field[0, 0, 0, 0], field[27, 0, 0, 0]])
    corners = grid.points()[[0, 27]].numpy()
    matrix = np.array(record["matrix"])
    np.testing.assert_allclose(corners + moved, corners @ matrix[:2, :2].T + matrix[:2, 2], atol=1e-4)
    determinant = np.asarray(nibabel.load("out/jacobian.nii.gz").dataobj)
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), atol=1e-5)


def test_penalties_in_a_settings_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'transform = ["svffd"]\npenalty = ["bending=1", "diffusion=2"]\nsymmetric = true\nsteps = 2\n'
    Path("s.toml").write_text(text + 'save = ["params", "jacobian"]\n')
    record = run(capsys, "-o", "out", "--settings", "s.toml")
    assert (
        record["objective"] == "mse + 1 * bending + 2 * diffusion" or "bending + 2 * diffusion" in record["objective"]
    )
    assert record["settings"]["symmetric"] is True
    assert Path("out/jacobian.nii.gz").exists()
    other = run(capsys, "-o", "other", "--settings", "s.toml", "--penalty", "curvature=3")
    assert other["objective"] == "mse + 3 * curvature"


def test_settings_know_every_penalty_and_transform() -> None:
    from fnreg import settings
    from fnreg.losses import terms

    assert set(settings.PENALTIES) == set(terms.PENALTIES)
    grid = fnreg.Grid((8, 8))
    for name in settings.TRANSFORMS:
        (made,) = Settings.gather({"transform": name}).transforms()
        assert made.linear == (name not in settings.DENSE) and made.negates == (name in settings.SYMMETRIC)
        if name in settings.DENSE:
            assert made.field(made.init(grid), grid) is not None


# -- what is refused ------------------------------------------------------------------------------------------------


def put(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)


BAD_FILES: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: None, "does not exist"),
    "empty": (lambda: put("bad.png", b""), "is empty"),
    "truncated": (lambda: put("bad.png", Path("fixed.png").read_bytes()[:100]), "damaged"),
    "text": (lambda: put("bad.png", b"Dear reader,\nthis is no picture.\n"), "not a PNG, JPEG or TIFF"),
    "folder": (lambda: Path("bad.png").mkdir(), "is a folder"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("place", ["fixed", "moving", "mask"])
def test_bad_inputs(folder: Path, capsys: pytest.CaptureFixture[str], case: str, place: str) -> None:
    make, told = BAD_FILES[case]
    make()
    fixed, moving = ("bad.png" if place == name else f"{name}.png" for name in ("fixed", "moving"))
    mask = ["--fixed-mask", "bad.png"] if place == "mask" else []
    refused(capsys, folder, ["register", fixed, moving, "-o", "a/b/out", *mask], 3, told)


def test_unknown_suffix_is_told_what_is_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("scan.xyz", b"?")
    refused(capsys, folder, ["register", "scan.xyz", "moving.png", "-o", "out"], 3, "readable are .png, .jpg")


USAGE = {
    "transform": (["--transform", "rigit"], "unknown transform 'rigit': did you mean rigid? choose from translation"),
    "second stage": (["--transform", "rigid+warp"], "unknown transform 'warp': choose from translation, rotation"),
    "half a name": (["--transform", "diffeo"], "did you mean diffeomorphism?"),
    "stride": (["--transform", "ffd:stride=0"], "positive whole numbers"),
    "half a stride": (["--transform", "ffd:stride=2.5"], "expected whole numbers"),
    "stride, infinite": (["--transform", "ffd:stride=inf"], "expected whole numbers"),
    "stride, switch": (["--transform", "ffd:stride=true"], "stride is True: expected whole numbers"),
    "stride, long": (["--transform", "ffd:stride=40"], "40"),
    "strides for axes": (["--transform", "ffd:stride=4x4x4"], "FFD(stride=(4, 4, 4))"),
    "steps of a flow": (["--transform", "svffd:squarings=-1"], "squarings is -1: expected a whole number, at least 0"),
    "half a step": (["--transform", "svf:squarings=2.5"], "expected a whole number"),
    "two steps": (["--transform", "svf:squarings=2x3"], "expected a whole number"),
    "smooth": (["--transform", "diffeomorphism:smooth=-1"], "expected gradient and smooth >= 0"),
    "option of a field": (["--transform", "displacement:stride=4"], "no option 'stride': its options are none"),
    "penalty": (["--transform", "ffd", "--penalty", "bendign=1"], "did you mean bending? choose from bending, diff"),
    "penalty without weight": (["--transform", "ffd", "--penalty", "bending"], "expected NAME=WEIGHT"),
    "penalty, no number": (["--transform", "ffd", "--penalty", "bending=much"], "expected NAME=WEIGHT"),
    "penalty below zero": (["--transform", "ffd", "--penalty", "bending=-1"], "a weight of 0 or more"),
    "penalty, not finite": (["--transform", "ffd", "--penalty", "bending=nan"], "a weight of 0 or more"),
    "option of a penalty": (["--transform", "ffd", "--penalty", "bending=1:mu=2"], "no option 'mu'"),
    "range of a penalty": (["--transform", "ffd", "--penalty", "elasticity=1:mu=-2"], "with a negative constant"),
    "second penalty": (["--transform", "ffd", "--penalty", "bending=1", "--penalty", "x=1"], "unknown penalty 'x'"),
    "penalty on nothing": (["--transform", "rigid+affine", "--penalty", "bending=1"], "'rigid+affine' has none"),
    "symmetric": (["--transform", "affine+ffd", "--symmetric"], "symmetric goes with svffd and svf"),
    "squares of a field": (
        ["--transform", "ffd", "--optimizer", "gauss-newton"],
        "not with ffd: choose adam",
    ),
    "no stated objective": (
        ["--transform", "diffeomorphism", "--optimizer", "lbfgs"],
        "optimizer lbfgs needs a stated objective, which diffeomorphism does not descend: choose svffd",
    ),
    "iterations": (["--transform", "ffd", "--optimizer", "newton-cg:iterations=0"], "expected iterations"),
    "curvature": (
        ["--transform", "ffd", "--optimizer", "newton-cg:curvature=exact"],
        "curvature is exact: choose from gauss-newton, hessian",
    ),
    "memory": (["--transform", "ffd", "--optimizer", "lbfgs:memory=0"], "expected memory"),
    "center of a field": (["--transform", "ffd", "--start", "center"], "does not begin with a shift"),
    "search of a field": (["--transform", "svf", "--start", "search"], "does not begin with a rotation"),
    "option of a transform": (["--transform", "rigid:stride=4"], "no option 'stride'"),
    "similarity": (
        ["--similarity", "mutual"],
        "unknown similarity 'mutual': choose from mse, mae, huber, charbonnier, ncc",
    ),
    "option of a similarity": (["--similarity", "huber:gamma=1"], "no option 'gamma': its options are delta"),
    "value of an option": (["--similarity", "huber:delta=-1"], "delta is -1.0: it must be positive"),
    "bins": (["--similarity", "mi:bins=8.5"], "bins is 8.5: expected a whole number"),
    "a word for a number": (["--similarity", "lncc:radius=big"], "radius is big: expected a whole number"),
    "another word": (["--similarity", "lncc:window=round"], "window is round: choose from box, gaussian"),
    "a number for a word": (["--similarity", "lncc:window=2"], "window is 2.0: choose from box, gaussian"),
    "no switch": (["--similarity", "lncc:squared=2"], "squared is 2.0: expected true or false"),
    "samples": (["--similarity", "mi:samples=0"], "samples is 0: expected a whole number of at least 1"),
    "channel": (["--similarity", "mse:channel=0.5"], "channel is 0.5: expected whole numbers"),
    "penalty without a cheap inverse": (
        ["--transform", "ffd", "--penalty", "inverse_consistency=1"],
        "FFD",
    ),
    "too few bins": (["--similarity", "correlation_ratio:bins=3"], "bins is 3: expected a whole number of at least 4"),
    "optimizer": (["--optimizer", "newton"], "choose from adam, sgd, normalized, gauss-newton, newton-cg, lbfgs"),
    "option of an optimizer": (["--optimizer", "adam:rate=1"], "no option 'rate': its options are lr"),
    "rate": (["--optimizer", "adam:lr=-1"], "it must be positive"),
    "specification": (["--optimizer", "adam:lr"], "expected NAME or NAME:option=value,option=value"),
    "squares": (["--optimizer", "gauss-newton", "--similarity", "mae"], "choose mse or ncc"),
    "levels": (["--levels", "0"], "expected at least 1"),
    "levels, no number": (["--levels", "many"], "levels"),
    "steps": (["--steps", "10y5"], "joined by x, from coarse to fine"),
    "steps for levels": (["--steps", "10x5", "--levels", "3"], "has 2 numbers for 3 levels"),
    "start": (["--start", "centre"], "did you mean center?"),
    "search": (["--start", "search", "--transform", "translation"], "does not begin with a rotation"),
    "center": (["--start", "center", "--transform", "rotation"], "does not begin with a shift"),
    "padding": (["--padding", "black"], "choose from none, zeros, border, reflection"),
    "padding, nan": (["--padding", "nan"], "padding is nan: expected a finite number"),
    "seed": (["--seed", str(2**64)], "expected less than 2^64"),
    "save": (["--save", "params+grid"], "unknown save 'grid'"),
    "unknown option": (["--levles", "3"], "--levles"),
    "too many": (["third.png"], "third.png"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, told = USAGE[case]
    refused(capsys, folder, ["register", "fixed.png", "moving.png", "-o", "out", *options], 2, told)


@pytest.mark.parametrize(
    "arguments",
    [["register", "fixed.png", "moving.png"], ["register", "fixed.png", "-o", "out"], ["regster"], ["info"]],
)
def test_incomplete(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    refused(capsys, folder, arguments, 2, "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("transfrom = 'rigid'", "unknown setting in s.toml, line 1: 'transfrom': did you mean transform?"),
        ("levels = 'three'", "s.toml, line 1: levels is 'three', expected a whole number"),
        ("levels = 2.5", "s.toml, line 1: levels is 2.5, expected a whole number"),
        ("seed = 1\nlevels = ", "is not valid TOML: Invalid value (at end of document"),
        ("seed = 1\nlevels = 2\nlevels = 3", "is not valid TOML: Cannot overwrite a value (at end of document"),
        ("# note\n\nsymmetric = 1", "s.toml, line 3: symmetric is 1, expected true or false"),
        ("transform = 'ffd'\npenalty = ['bending']", "s.toml, line 2: penalty 'bending': expected NAME=WEIGHT"),
        ("seed = 1\n\n[register]\nlevels = 2", "unknown setting in s.toml, line 3: 'register'"),
        ("seed = 1\ntransform.stride = 2", "s.toml, line 2: transform is {'stride': 2}, expected text"),
        ("save = 'params'\ntransform = 'rigit'", "s.toml, line 2: unknown transform 'rigit': did you mean rigid?"),
        ("similarity = 'huber:gamma=1'", "s.toml, line 1: similarity 'huber:gamma=1'"),
        ("seed = 3\n'transform' = 'ffd:stride=40'", "s.toml, line 2: FFD(stride=40):"),
        ("transform = 'ffd'\noptimizer = 'gauss-newton'", "s.toml, line 2: optimizer gauss-newton goes with few"),
        ("levels = 2\nsteps = [3, 2, 1]", "s.toml, line 2: steps '3x2x1' has 3 numbers for 2 levels"),
        ("threads = 1\nseed = -1", "s.toml, line 2: seed is -1: expected 0 or more"),
        (None, "cannot be read"),
    ],
)
def test_bad_settings_file(folder: Path, capsys: pytest.CaptureFixture[str], text: str | None, told: str) -> None:
    if text is not None:
        Path("s.toml").write_text(text)
    arguments = ["register", "fixed.png", "moving.png", "-o", "out", "--settings", "s.toml"]
    refused(capsys, folder, arguments, 2, told)


def test_errors_point_at_the_file_only_where_it_is_to_blame(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text("transform = 'rigid'\nlevels = 2\n")
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--settings", "s.toml"]
    refused(capsys, folder, [*base, "--transform", "rigit"], 2, "error: unknown transform 'rigit'")
    refused(capsys, folder, [*base, "--set", "transform=rigit"], 2, "error: unknown transform 'rigit'")
    refused(capsys, folder, [*base, "--padding", "black"], 2, "error: unknown padding 'black'")


def test_settings_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text("transform = 'affine'\nlevels = 1\nsave = 'params'\n")
    more = ["--set", "levels=2", "--set", "steps = 6x3", "--set", "transform=svffd:stride=4", "--set", "symmetric=true"]
    arguments = ["register", "fixed.png", "moving.png", "-o", "out", "--settings", "s.toml", *more]
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["settings"]
    assert (record["levels"], record["steps"], record["symmetric"]) == (2, "6x3", True)
    assert (record["transform"], record["save"]) == ("svffd:stride=4", "params")
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--set"]
    refused(capsys, folder, [*base, "levles=2"], 2, "unknown setting in --set: 'levles': did you mean levels?")
    refused(capsys, folder, [*base, "levels"], 2, "--set levels: expected NAME=VALUE, such as levels=2")
    refused(capsys, folder, [*base, "levels=two"], 2, "--set levels=two: expected a whole number for levels")
    refused(capsys, folder, [*base, "symmetric=1"], 2, "unknown value in --set symmetric: '1': choose from true, false")
    refused(capsys, folder, [*base, "seed=1", "--seed", "2"], 2, "--set seed=1 gives seed a second time")
    refused(capsys, folder, [*base, "seed=1", "--set", "seed=2"], 2, "--set seed=2 gives seed a second time")


def test_output_in_the_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("file", b"in the way")
    base = ["register", "fixed.png", "moving.png", "-o"]
    refused(capsys, folder, [*base, "file"], 3, "file is a file: give a folder")
    refused(capsys, folder, [*base, "file/out"], 3, "file is not a folder")
    refused(capsys, folder, [*base, "file/a/b"], 3, "file is not a folder")
    refused(capsys, folder, [*base, "."], 3, "is not empty")


def test_masks_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.write_image("small.png", fnreg.Image(torch.rand(1, 20, 28)))
    io.write_image("zero.png", fnreg.Image(torch.zeros(1, 28, 28)))
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--moving-mask"]
    refused(capsys, folder, [*base, "small.png"], 3, "28 x 20 pixels but moving.png has 28 x 28")
    refused(capsys, folder, [*base, "zero.png"], 3, "zero everywhere")


def test_starts_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = fnreg.Grid((5, 4, 3))
    io.write_transform("solid.safetensors", fnreg.Mapping(fnreg.Rigid().init(grid), grid, fnreg.Rigid()))
    put("broken.safetensors", b"?")
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--start"]
    refused(capsys, folder, [*base, "solid.safetensors"], 3, "expected one map of 2 axes")
    refused(capsys, folder, [*base, "broken.safetensors"], 3, "not a transform of fnreg")
    refused(capsys, folder, [*base, "none.safetensors"], 3, "does not exist")


def test_tiny_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.write_image("tiny.png", fnreg.Image(torch.rand(1, 2, 2)))
    refused(capsys, folder, ["register", "tiny.png", "moving.png", "-o", "out"], 3, "at least 4 voxels")


def test_a_pair_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.write_image("flat.png", fnreg.Image(torch.full((1, 28, 28), 3.0)))
    refused(capsys, folder, ["register", "fixed.png", "flat.png", "-o", "a/out"], 1, "moving is constant")


def test_devices_that_are_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:99", "abacus", "meta"):
        arguments = ["register", "fixed.png", "moving.png", "-o", "out", "--device", device]
        refused(capsys, folder, arguments, 4, f"device '{device}' cannot be used")


def test_missing_extra(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str, purpose: str) -> Any:
        raise extras.MissingExtraError(f'{purpose} needs {module}: run pip install "fnreg[{extra}]"')

    monkeypatch.setattr("fnreg.io.picture.require", missing)
    refused(capsys, folder, ["register", "fixed.png", "moving.png", "-o", "out"], 4, 'pip install "fnreg[plot]"')


def test_without_matplotlib_the_rest_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "present", lambda _: {"matplotlib": False, "PIL": True})
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", "-n", "4x2"]) == 0
    assert 'pip install "fnreg[plot]"' in capsys.readouterr().err
    assert "figures" not in listing(folder / "out") and "warped.png" in listing(folder / "out")


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (OSError(28, "No space left on device"), 3, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted, nothing was written"),
        (ZeroDivisionError("a bug"), 1, "internal error, ZeroDivisionError: a bug"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_fault_on_the_way_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    fault: BaseException, code: int, told: str, before: bool,
) -> None:  # fmt: skip
    if before:
        (folder / "out").mkdir()
        put("out/run.json", b"{}")
    kept = listing(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr("fnreg.results.io.write_itk", fail)
    arguments = ["register", "fixed.png", "moving.png", "-o", "out" if before else "a/out", "--overwrite", *QUICK]
    assert cli.main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("fnreg: ") and told in err and err.count("\n") == 1
    assert listing(folder) == kept


def test_verbose_shows_where_an_error_came_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["register", "none.png", "moving.png", "-o", "out", "-v"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("fnreg: error: none.png does not exist")


# -- the parts ------------------------------------------------------------------------------------------------------


def test_output_folder_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b") as place:
        (place.scratch / "x").write_text("x")
    assert listing(tmp_path) == []
    with pytest.raises(OutputError, match="not a folder"):
        (tmp_path / "file").write_text("")
        OutputFolder(tmp_path / "file" / "b").check()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(tmp_path / "out").check()
    tmp_path.chmod(0o700)


def test_settings_take_the_defaults_of_register() -> None:
    made = Settings.gather({})
    assert repr(made.transforms()) == "[Rigid()]" and repr(made.objective(fnreg.FFD())) == "mse"
    assert made.solver() == fnreg.Descent() and made.counts() == [100] and made.outside() is None
    with pytest.raises(SettingsError, match="steps"):
        Settings.gather({"steps": "-3"})


def test_progress_rises_to_the_end() -> None:
    seen: list[float] = []
    fixed, moving = fnreg.data.digits(9)
    stages = [fnreg.Translation(), fnreg.Rigid()]
    fnreg.register(fixed, moving, stages, levels=2, steps=10, stop=None, progress=lambda e: seen.append(fraction(e)))
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] == 1


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    fixed, moving = fnreg.data.digits(9)
    for shown in (None, True):
        with Bars(shown) as bars:
            report = bars.add("two nines")
            assert (report is None) == (shown is None)
            fnreg.register(fixed, moving, fnreg.Rotation(), levels=1, steps=3, progress=report)
        assert ("two nines" in capsys.readouterr().err) == bool(shown)


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "fixed.png"]) == 0
    assert "28 x 28" in capsys.readouterr().out
    io.write_transform("t.safetensors", fnreg.data.brain_truth())
    assert cli.main(["info", "t.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["transform"] == "Homogeneous()" and found["rotation in degrees"] == pytest.approx(10)
    refused(capsys, folder, ["info", "none.png"], 3, "does not exist")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert fnreg.__version__ in out and "compiled kernels" in out and "extra plot" in out
    monkeypatch.setattr(native, "kernels", native.kernels.__wrapped__)  # without its memory
    monkeypatch.setenv("FNREG_NATIVE", "0")
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled kernels"] == "not in use: switched off by FNREG_NATIVE=0"
    monkeypatch.delenv("FNREG_NATIVE")
    monkeypatch.setenv("CC", f"{sys.executable} -O2")  # with arguments
    with pytest.warns(UserWarning, match="the compiled kernels are not in use"):
        assert native.kernels().reason.startswith(f"{sys.executable} -O2 could not build them")
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert "the compiler that CC names, no-such-compiler -O2, is not there" in native.kernels().reason


def test_demo_where_it_cannot_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("file", b"in the way")
    refused(capsys, folder, ["demo", "-o", "file"], 3, "file cannot be made")


def test_the_demo_tells_the_truth_about_the_nines() -> None:
    from fnreg.demo import Story

    story = Story(Bars(shown=False))
    story.nines()
    search, plain, coarse, many = story.rows
    assert plain.after > 1.5 * search.after and plain.after < plain.before
    assert coarse.after < 1.01 * search.after and many.after < 1.01 * search.after
    assert {"nines-search", "nines"} == set(story.figures)


def test_the_demo_bends_without_a_fold_where_it_says_so() -> None:
    from fnreg.demo import Story

    story = Story(Bars(shown=False))
    story.free_form()
    weak, strong, flow = story.rows
    assert weak.after < 0.5 * strong.after < 0.5 * strong.before
    assert all(row.determinant is not None and row.degrees is None for row in story.rows)
    assert weak.determinant[0] < 0.2 < strong.determinant[0] and flow.determinant[0] > 0.2  # type: ignore[index]
    assert {f"bent-{name}{end}" for name in ("weak", "strong", "svffd") for end in ("", "-grid")} == set(story.figures)


def test_there_and_back_is_measured_where_the_map_stays() -> None:
    from fnreg.agreement import there_and_back, way_back

    grid = fnreg.Grid((8, 6), spacing=(2.0, 4.0))
    transform = fnreg.Displacement()
    move = torch.zeros(2, 6, 8, dtype=torch.float64)
    move[0] = 4.0  # two voxels: the last two columns leave the grid

    def mapping(field: torch.Tensor) -> fnreg.Mapping:
        return fnreg.Mapping({"displacement": field}, grid, transform)

    away = there_and_back(mapping(move), mapping(-move), grid, world=False)
    assert len(away) == 36 and float(away.max()) == 0
    missed = -move
    missed[:, 3, 5] += torch.tensor([6.0, 16.0])  # by three voxels along x and four along y
    away = there_and_back(mapping(move), mapping(missed), grid, world=False)
    assert float(away.max()) == pytest.approx(5) and int((away > 0).sum()) == 1
    assert way_back(mapping(move), mapping(missed), grid)["inverse_max"] == pytest.approx(math.hypot(6, 16))
    missed[:, :, :2] = 100.0  # where no voxel comes to
    assert way_back(mapping(move), mapping(missed), grid)["inverse_max"] == pytest.approx(math.hypot(6, 16))
    unknown = {"inverse_mean": None, "inverse_max": None}
    assert way_back(mapping(move + 100), mapping(missed), grid) == unknown  # no voxel stays
    # What the inverse does first is undone by a linear map, however far that is.
    far = fnreg.linear_mapping(torch.tensor([[1.0, 0, 500], [0, 1, 0]], dtype=torch.float64), grid)
    chain, back = far @ mapping(move), mapping(-move) @ far.inverse()
    assert len(there_and_back(chain, back, grid)) == 36 and way_back(chain, back, grid)["inverse_max"] < 1e-9


def test_demo_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, folder, ["demo", "circle"], 2, "did you mean circle-to-c? choose from story, circle-to-c")


@pytest.mark.slow
def test_demo_circle_to_c(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fnreg import circle, demo

    kept: list[circle.CircleToC] = []
    once = circle.circle_to_c

    def keep(**options: Any) -> circle.CircleToC:
        kept.append(once(**options))
        return kept[0]

    monkeypatch.setattr(demo, "circle_to_c", keep)
    assert cli.main(["demo", "circle-to-c", "-o", "shown"]) == 0
    assert "there and back" in capsys.readouterr().out
    names = [
        "circle-to-c",
        *(f"circle-to-c-{name}" for name in ("grid", "inverse", "inverse-grid", "jacobian", "losses")),
    ]
    assert listing(folder / "shown") == sorted(f"{name}.png" for name in names)
    (found,) = kept
    assert found.forward < 1e-4 and found.backward < 1e-3 and found.determinant[0] > 0
    assert found.consistency[0] < 0.02 and found.consistency[1] < 0.1


@pytest.mark.slow
def test_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "-o", "shown"]) == 0
    out = capsys.readouterr().out
    assert "100 pairs of digits" in out and "shown/brain.png" in out
    assert len(list((folder / "shown").glob("*.png"))) >= 9


def test_help_and_import_are_quick() -> None:
    code = (
        "import sys, fnreg, fnreg.cli\n"
        "assert fnreg.cli.main(['--help']) == 0 and fnreg.cli.main(['register', '--help']) == 0\n"
        "assert fnreg.cli.main(['--version']) == 0\n"
        "assert fnreg.cli.main(['register', 'a', 'b', '-o', 'c', '--transform', 'd']) == 2\n"
        "loaded = {'torch', 'matplotlib', 'numpy', 'PIL', 'torchopt'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: fnreg COMMAND" in done.stdout and fnreg.__version__ in done.stdout


def test_the_start_is_chosen_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default a picture upside down is turned; the headers alone do not find it."""
    points = fnreg.Grid((40, 32)).points()
    spots = ((12.0, 10.0, 3.0), (26.0, 20.0, 5.0), (28.0, 8.0, 2.0))
    data = sum(torch.exp(-((points[:, 0] - x) ** 2 + (points[:, 1] - y) ** 2) / (2 * s * s)) for x, y, s in spots)
    picture = 200 * torch.as_tensor(data).reshape(1, 32, 40).float()
    io.write_image("up.png", fnreg.Image(picture))
    io.write_image("down.png", fnreg.Image(picture.flip(-1, -2)))
    base = ["register", "up.png", "down.png", "-n", "40", "--save", "params", "-o"]
    assert cli.main([*base, "auto"]) == 0
    assert ", chosen by trying; --start header takes" in capsys.readouterr().out
    found = json.loads((folder / "auto" / "run.json").read_text())
    assert found["settings"]["start"] == "auto"
    assert found["start"] != "header"
    assert abs(abs(found["rotation_degrees"]) - 180) < 1
    assert cli.main([*base, "plain", "--start", "header"]) == 0
    plain = json.loads((folder / "plain" / "run.json").read_text())
    assert "start" not in plain
    assert plain["value_after"] > 10 * found["value_after"]


def test_what_is_told_of_files_is_of_the_bytes_that_were_registered(folder: Path) -> None:
    from fnreg import run
    from fnreg.loading import Files

    content = Path("fixed.png").read_bytes()
    made = run.prepare(Files(Path("fixed.png"), Path("moving.png"), Path("out")), Settings(levels=1, steps="2"))
    Path("fixed.png").write_bytes(b"changed")
    Path("moving.png").unlink()
    with OutputFolder(Path("out")) as output:
        record = run.execute(made, output)
    told = {"path": "fixed.png", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert record["inputs"]["fixed"] == told and len(record["inputs"]["moving"]["sha256"]) == 64
    assert Path("out/run.json").is_file() and record["beside"] == []


def test_voxels_beside_a_header_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for name, end in (("fixed", "mhd"), ("moving", "nhdr")):
        sitk.WriteImage(io.to_sitk(io.read_image(f"{name}.png")), f"{name}.{end}")
    assert cli.main(["register", "fixed.mhd", "moving.nhdr", "-o", "out", *QUICK]) == 0
    beside = json.loads(Path("out/run.json").read_text())["beside"]
    assert [told["path"] for told in beside] == ["fixed.raw", "moving.raw"]
    for told in beside:
        assert told["sha256"] == hashlib.sha256(Path(told["path"]).read_bytes()).hexdigest()


def test_a_word_of_an_optimizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["register", "fixed.png", "moving.png", "-o", "out", "--transform", "ffd", *SHORT, "--save", "params"]
    assert cli.main([*base, "--optimizer", "newton-cg:curvature=hessian", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "curvature='hessian'" in record["solver"]


def test_warnings_of_others_are_not_those_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go where warnings go, and the filters of the process stay."""
    from fnreg import notes, run

    true = run.register

    def register(*arguments: Any, **options: Any) -> Any:
        notes.warn("of fnreg")
        warnings.warn("of another", stacklevel=1)
        return true(*arguments, **options)

    monkeypatch.setattr(run, "register", register)
    shown: list[str] = []
    monkeypatch.setattr(cli, "_warn", lambda message, *_, **__: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # here they are errors otherwise
        assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", "-n", "2", "--save", "params"]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["warnings"] == ["of fnreg"] and shown == ["of another"]


def test_labels_of_pictures_judge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fixed", "moving"):
        image = io.read_image(f"{name}.png")
        io.write_labels(f"{name}-labels.png", io.Labels((image.data > 128).long(), image.grid))
    labels = ["--fixed-labels", "fixed-labels.png", "--moving-labels", "moving-labels.png"]
    assert cli.main(["register", "fixed.png", "moving.png", "-o", "out", *QUICK, *labels]) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["metrics"]["after"]["dice_1"] > record["metrics"]["before"]["dice_1"]
    assert "warped_labels.nii.gz" in record["written"]
