"""`fnreg plot` draws what `fnreg.plot` draws of the same images and maps, and refuses what does not go together."""

from __future__ import annotations

import io as stream
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import intensity, random_params, smooth_mapping

import fnreg
from fnreg import SVFFD, Affine, Grid, Image, Mapping, cli, fields, io, plot

pytest.importorskip("matplotlib")
sitk: Any = pytest.importorskip("SimpleITK")

SOLID = Grid((14, 13, 9), spacing=(1.2, 1.5, 2.0), center=(30.0, -20.0, 10.0))
FLAT = Grid((20, 16))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, grid, kind in (("solid", SOLID, "nii.gz"), ("flat", FLAT, "tif")):
        for number, side in enumerate(("fixed", "moving", "warped")):
            values = intensity(grid.points() - grid.center, 20.0, number).reshape(1, *grid.shape).float()
            io.write_image(Path(f"{name}_{side}.{kind}"), Image(values, grid))
        bent = smooth_mapping(SVFFD(4), grid, 2, 1.0, 2.0)
        io.write_transform(f"{name}.safetensors", bent)
        io.write_transform(f"{name}.nii", bent)
        io.write_transform(f"{name}.tfm", Mapping(random_params(Affine(), grid, 1, 0.4), grid, Affine()))
    return tmp_path


def image(name: str) -> Image:
    return io.read_image(Path(name))


def drawn(figure: Any, kind: str = "png") -> bytes:
    shown = stream.BytesIO()
    figure.savefig(shown, format=kind)
    return shown.getvalue()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["plot", *arguments, "-o", "f.png", "--json", "--overwrite"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "ending", "unit"), [("solid", "nii.gz", "mm"), ("flat", "tif", "pixels")])
def test_images(folder: Path, capsys: pytest.CaptureFixture[str], name: str, ending: str, unit: str) -> None:
    names = [f"{name}_{side}.{ending}" for side in ("fixed", "moving", "warped")]
    fixed, moving, warped = (image(each) for each in names)
    assert run(capsys, names[0])["kind"] == "slices"
    assert Path("f.png").read_bytes() == drawn(plot.slices(fixed, unit=unit))
    title = f"{names[0]} and {names[1]}, as they lie in the world"
    assert run(capsys, *names[:2])["kind"] == "checkerboard"
    assert Path("f.png").read_bytes() == drawn(plot.checkerboard(fixed, moving, unit=unit, title=title))
    run(capsys, *names[:2], "--kind", "overlay", "--title", "both")
    assert Path("f.png").read_bytes() == drawn(plot.overlay(fixed, moving, unit=unit, title="both"))
    assert run(capsys, *names)["kind"] == "overview"
    assert Path("f.png").read_bytes() == drawn(plot.overview(fixed, moving, warped, unit=unit))
    run(capsys, *names, "--kind", "difference")
    assert Path("f.png").read_bytes() == drawn(plot.difference(fixed, warped, unit=unit))


def test_a_moving_image_elsewhere_is_shown_where_the_world_places_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = image("solid_fixed.nii.gz")
    other = Grid((16, 15, 11), spacing=1.1, center=(29.0, -21.0, 10.5))
    values = intensity(other.points() - other.center, 20.0).reshape(1, *other.shape).float()
    io.write_image(Path("other.nii"), Image(values, other))
    run(capsys, "solid_fixed.nii.gz", "other.nii", "--kind", "difference", "--at=31,-19,11")
    placed = image("other.nii").resample(fixed.grid, padding="zeros")
    assert Path("f.png").read_bytes() == drawn(plot.difference(fixed, placed, unit="mm", at=(31.0, -19.0, 11.0)))


@pytest.mark.parametrize("name", ["solid", "flat"])
def test_a_pair_through_transforms(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    ending, unit = ("nii.gz", "mm") if name == "solid" else ("tif", "pixels")
    fixed, moving = image(f"{name}_fixed.{ending}"), image(f"{name}_moving.{ending}")
    names = [f"{name}_fixed.{ending}", f"{name}_moving.{ending}", f"{name}.safetensors", f"{name}.tfm"]
    record = run(capsys, *names)
    assert record["kind"] == "overview" and record["transforms"] == names[2:] and record["images"] == names[:2]
    chain = io.read_transform(names[3]) @ io.read_transform(names[2])  # the first acts first
    warped = fnreg.warp(moving, chain, fixed.grid)
    assert Path("f.png").read_bytes() == drawn(plot.overview(fixed, moving, warped, unit=unit))
    run(capsys, *names, "--kind", "checkerboard")
    assert Path("f.png").read_bytes() == drawn(plot.checkerboard(fixed, warped, unit=unit))


def test_transforms_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("solid.safetensors", "solid.nii"):
        mapping = io.read_transform(file)
        assert run(capsys, file)["kind"] == "jacobian"
        found = fields.determinant(mapping.displacement(), mapping.domain)
        assert Path("f.png").read_bytes() == drawn(plot.jacobian(found, mapping.domain, unit="mm"))
    mapping = io.read_transform("flat.safetensors")
    assert run(capsys, "flat.safetensors")["kind"] == "grid"
    assert Path("f.png").read_bytes() == drawn(plot.warped_grid(mapping))
    run(capsys, "flat.safetensors", "--kind", "flow")
    assert Path("f.png").read_bytes() == drawn(plot.flow(mapping.displacement(), mapping.domain))
    run(capsys, "flat.safetensors", "flat_moving.tif")
    below = image("flat_moving.tif")
    assert Path("f.png").read_bytes() == drawn(plot.warped_grid(mapping, image=below, unit="pixels"))
    run(capsys, "flat.safetensors", "flat_moving.tif", "--kind", "quiver")
    assert Path("f.png").read_bytes() == drawn(plot.quiver(mapping, image=below, unit="pixels"))
    # a linear map of a file has no grid of its own
    run(capsys, "flat.tfm", "--like", "flat_fixed.tif")
    linear = io.read_transform("flat.tfm")
    assert Path("f.png").read_bytes() == drawn(plot.warped_grid(linear, below.grid, unit="pixels"))


def test_vector_images_are_transforms_and_colours_are_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.write_transform("solid.mha", io.read_transform("solid.safetensors"))
    assert run(capsys, "solid.mha")["kind"] == "jacobian"
    colours = sitk.GetImageFromArray((torch.rand(4, 6, 5, 3) * 255).to(torch.uint8).numpy(), isVector=True)
    sitk.WriteImage(colours, "colours.mha")
    assert run(capsys, "colours.mha")["kind"] == "slices"


def test_other_kinds_of_files(folder: Path) -> None:
    for ending, start in ((".pdf", b"%PDF"), (".svg", b"<?xml")):
        assert cli.main(["plot", "solid_fixed.nii.gz", "-o", f"f{ending}"]) == 0
        assert Path(f"f{ending}").read_bytes().startswith(start)


IMAGES = ["solid_fixed.nii.gz", "solid_moving.nii.gz"]
REFUSED = {
    "nothing": ([], 2, "nothing is given to draw"),
    "four images": ([*IMAGES, *IMAGES], 2, "4 images make no figure"),
    "one 3-D image": (["solid.nii", IMAGES[0]], 2, "1 image beside a 3-D transform make no figure"),
    "kind of a volume": (["solid.nii", "--kind", "grid"], 2, "does not show no image"),
    "kind of one": ([IMAGES[0], "--kind", "overlay"], 2, "--kind overlay does not show 1 image: choose from slices"),
    "no such kind": ([IMAGES[0], "--kind", "slice"], 2, "did you mean slices?"),
    "no such image": (["none.nii"], 3, "none.nii does not exist"),
    "no such transform": (["none.tfm"], 3, "none.tfm does not exist"),
    "axes": ([IMAGES[0], "flat_fixed.tif"], 3, "solid_fixed.nii.gz has 3 axes, flat_fixed.tif has 2 axes"),
    "axes of a map": ([IMAGES[0], "flat.safetensors"], 3, "solid_fixed.nii.gz has 3 axes, the transform has 2 axes"),
    "axes of a pair": ([*IMAGES, "flat.safetensors"], 3, "the transform has 2 axes: expected one number"),
    "at of a picture": (["flat_fixed.tif", "--at=1,2,3"], 2, "leave it out here"),
    "at that is none": ([IMAGES[0], "--at=1,2"], 2, "--at 1,2 is no point: expected three numbers"),
    "at outside": ([IMAGES[0], "--at=100,2,3"], 3, "outside of the image"),
    "like beside images": ([*IMAGES, "--like", IMAGES[0]], 2, "leave it out"),
    "no grid": (["flat.tfm"], 3, "give an image with --like"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, code, told = REFUSED[case]
    assert cli.main(["plot", *arguments, "-o", "f.png"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fnreg: error: ") and err.count("\n") == 1 and told in err
    assert not Path("f.png").exists()


def test_names_of_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", IMAGES[0], "-o", "f.jpg"]) == 2
    assert "f.jpg is no name for a figure: it ends in .png, .svg, .pdf" in capsys.readouterr().err
    Path("f.png").write_bytes(b"before")
    assert cli.main(["plot", IMAGES[0], "-o", "f.png"]) == 3
    assert "f.png exists" in capsys.readouterr().err and Path("f.png").read_bytes() == b"before"


def test_every_kind_is_known_on_both_sides() -> None:
    from fnreg import figures
    from fnreg.commands.figures import KINDS

    assert (*figures.ONE, *figures.TWO, *figures.THREE, *figures.FLAT, *figures.ANY) == KINDS
