"""Displacements and ITK's transforms read back, and what `fnreg info` tells of them; damaged files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenes import orientation, random_params, tensor, uniform
from torch.testing import assert_close

import fnreg
from fnreg import SVF, Affine, Diffeomorphism, Displacement, Grid, Mapping, Sequential, cli, fields, io
from fnreg.extras import MissingExtraError
from fnreg.io import TransformReadError, read_displacement, read_itk, write_displacement, write_itk

every_dimension = pytest.mark.parametrize("dimension", [2, 3])


def oblique(dimension: int) -> Grid:
    return Grid(
        (6, 5, 4)[:dimension],
        spacing=tensor([1.1, 1.4, 2.7])[:dimension],
        center=tensor([30.0, -20.0, 10.0])[:dimension],
        direction=orientation(dimension, tensor([0.4, -0.3, 0.6])),
    )


def bent(dimension: int, dtype: torch.dtype = torch.float64) -> Mapping:
    grid = oblique(dimension)
    field = (0.6 * uniform(dimension, *grid.shape, seed=dimension)).to(dtype)
    return Mapping({"displacement": field}, grid, Displacement())


def told_by_info(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert cli.main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -- there and back ------------------------------------------------------------------------------------------------


@every_dimension
@pytest.mark.parametrize("name", ["u.nii", "u.nii.gz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nifti_displacement_comes_back(tmp_path: Path, dimension: int, name: str, dtype: torch.dtype) -> None:
    mapping = bent(dimension, dtype)
    write_displacement(tmp_path / name, mapping)
    found = read_displacement(tmp_path / name)
    assert found.transform == Displacement()
    assert torch.equal(found.params["displacement"], mapping.displacement())
    assert found.params["displacement"].dtype == dtype
    for leaf in ("center", "spacing", "direction"):  # the header is in single precision
        assert_close(getattr(found.domain, leaf), getattr(mapping.domain, leaf), atol=1e-5, rtol=1e-6)
    assert found.domain.size == mapping.domain.size


@every_dimension
@pytest.mark.parametrize("name", ["t.h5", "t.tfm"])
def test_transforms_of_itk_come_back(tmp_path: Path, dimension: int, name: str) -> None:
    pytest.importorskip("SimpleITK")
    grid, field = oblique(dimension), bent(dimension)
    affine = Mapping(random_params(Affine(), grid, 3), grid, Affine())
    points = grid.center + 0.3 * grid.extent * uniform(20, dimension, seed=1)
    for number, mapping in enumerate((field, affine, affine @ field, field @ affine, affine @ affine @ field)):
        path = tmp_path / f"{number}{name}"
        if mapping.transform.linear:
            path = path.with_suffix(".tfm")
        write_itk(path, mapping)
        found = read_itk(path)
        assert found.transform.linear == mapping.transform.linear
        assert_close(found.map_points(points), mapping.map_points(points), atol=1e-9, rtol=0)


def test_what_simpleitk_wrote_maps_points_as_it_does(tmp_path: Path) -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    euler = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, -0.2, 0.3, (4.0, 5.0, 6.0))
    several = sitk.CompositeTransform(
        [sitk.TranslationTransform(3, (1.0, 0.0, -2.0)), euler, sitk.ScaleTransform(3, (1.1, 0.9, 1.3))]
    )
    for number, made in enumerate((euler, several)):
        sitk.WriteTransform(made, str(tmp_path / f"{number}.tfm"))
        found = read_itk(tmp_path / f"{number}.tfm")
        points = 10 * uniform(5, 3, seed=2)
        expected = tensor([made.TransformPoint(point.tolist()) for point in points])
        assert_close(found.map_points(points), expected, atol=1e-9, rtol=0)


# -- what info tells -----------------------------------------------------------------------------------------------


@every_dimension
@pytest.mark.parametrize("name", ["u.nii.gz", "u.h5", "u.safetensors"])
def test_info_of_a_displacement(tmp_path: Path, capsys: pytest.CaptureFixture[str], dimension: int, name: str) -> None:
    if name.endswith("h5"):
        pytest.importorskip("SimpleITK")
    mapping = bent(dimension)
    mapping.params["displacement"].mul_(3)  # so that it folds
    {"u.nii.gz": write_displacement, "u.h5": write_itk, "u.safetensors": io.write_transform}[name](
        tmp_path / name, mapping
    )
    found = told_by_info(capsys, tmp_path / name)
    field, grid = mapping.params["displacement"], mapping.domain
    assert found["size"] == " x ".join(map(str, grid.size))
    assert found["spacing"] == pytest.approx(grid.spacing.tolist(), rel=1e-6)
    lengths = np.linalg.norm(field.numpy(), axis=0)
    assert found["largest displacement"] == pytest.approx(lengths.max(), rel=1e-6)
    assert found["mean displacement"] == pytest.approx(lengths.mean(), rel=1e-6)
    told = fields.statistics(field, grid)
    assert found["least Jacobian determinant"] == pytest.approx(float(told.min_determinant), rel=1e-4)
    assert found["largest Jacobian determinant"] == pytest.approx(float(told.max_determinant), rel=1e-4)
    assert found["folds at voxels"] == int(fields.folds(field, grid)) > 0
    assert found["folds in cells between"] == int(fields.folded_cells(field, grid)) > 0


def test_info_of_other_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = oblique(2)
    both = Mapping(
        (random_params(SVF(3), grid, 1), random_params(Affine(), grid, 2)), grid, Sequential((SVF(3), Affine()))
    )
    io.write_transform(tmp_path / "both.safetensors", both)
    found = told_by_info(capsys, tmp_path / "both.safetensors")
    matrix = Mapping(both.params[1], grid, Affine()).matrix()
    assert_close(tensor(found["linear parts"]), matrix[None])
    assert found["largest displacement"] == pytest.approx(float(both.displacement().norm(dim=0).max()))
    many = Mapping({"displacement": torch.zeros(3, 2, *grid.shape)}, grid, Diffeomorphism())
    io.write_transform(tmp_path / "many.safetensors", many)
    assert told_by_info(capsys, tmp_path / "many.safetensors")["pairs"] == 3
    pytest.importorskip("SimpleITK")
    write_itk(tmp_path / "t.tfm", fnreg.data.brain_truth())
    assert told_by_info(capsys, tmp_path / "t.tfm")["rotation in degrees"] == pytest.approx(10)


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(read: Callable[[Path], Any], path: Path, told: str, *, info: int = 3) -> None:
    with pytest.raises(TransformReadError, match=told) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert cli.main(["info", str(path)]) == info


@pytest.mark.parametrize("name", ["u.nii", "u.nii.gz"])
def test_nifti_cut_short_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_displacement(path, bent(2))
    whole = path.read_bytes()
    for count in (1, 2, 10, 100, 347, 348, 351, 352, 360, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        if count >= len(whole):
            continue
        path.write_bytes(whole[:count])
        refused(read_displacement, path, "is not a NIfTI file|is damaged")
    path.write_bytes(b"")
    refused(read_displacement, path, "is empty")
    path.write_bytes(b"nothing of the kind" * 100)
    refused(read_displacement, path, "is not a NIfTI file|is damaged")
    path.unlink()
    refused(read_displacement, path, "does not exist")


def test_nifti_without_vectors_is_refused(tmp_path: Path) -> None:
    nibabel: Any = pytest.importorskip("nibabel")
    path = tmp_path / "j.nii"
    io.write_map(path, fnreg.Image(torch.ones(1, 5, 6), oblique(2)))
    refused(read_displacement, path, "shape 6 x 5 .*expected the vectors of a displacement", info=0)  # an image

    def write(values: Any, affine: Any = None, intent: int = 1007) -> None:
        image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
        image.header.set_intent(intent)
        nibabel.save(image, path)

    vectors = np.zeros((4, 3, 2, 1, 3), np.float32)
    write(vectors)
    assert read_displacement(path).domain.size == (4, 3, 2)
    write(vectors, intent=0)
    refused(read_displacement, path, "intent 0: expected the vectors", info=0)
    write(vectors[..., 0, :])
    refused(read_displacement, path, "shape 4 x 3 x 2 x 3 ", info=0)
    write(vectors[..., :2])
    refused(read_displacement, path, "shape 4 x 3 x 2 x 1 x 2 ", info=0)
    write(vectors + np.nan)
    refused(read_displacement, path, "finite numbers")
    write(vectors.astype(np.int16))
    refused(read_displacement, path, "finite numbers")
    skewed = np.eye(4)
    skewed[0, 1] = 0.1
    write(vectors, skewed)
    refused(read_displacement, path, "from right angles")
    write(vectors)
    stored = bytearray(path.read_bytes())
    stored[280:328] = bytes(48)  # srow_x, srow_y and srow_z of the header
    path.write_bytes(stored)
    refused(read_displacement, path, "expected positive numbers")
    with pytest.raises(TransformReadError, match=r"ends in \.nii or"):
        read_displacement(tmp_path / "j.png")


@pytest.mark.parametrize("name", ["t.tfm", "t.h5", "t.txt"])
def test_damaged_transforms_of_itk_are_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path / name
    write_itk(path, bent(2))
    whole = path.read_bytes()
    lines = whole.rfind(b"\n", 0, -1) + 1  # all but the last
    for count in (1, 10, 100, len(whole) // 2, *((lines, len(whole) - 1) if name != "t.h5" else ())):
        path.write_bytes(whole[:count])
        refused(read_itk, path, "is not a transform of ITK, or it is damaged")
    path.write_bytes(b"")
    refused(read_itk, path, "is empty")
    path.write_bytes(b"nothing of the kind" * 100)
    refused(read_itk, path, "is not a transform of ITK, or it is damaged")
    path.unlink()
    refused(read_itk, path, "does not exist")


def test_other_transforms_of_itk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    spline = sitk.BSplineTransformInitializer(sitk.Image(16, 16, sitk.sitkFloat32), (4, 4), 2)
    sitk.WriteTransform(spline, str(tmp_path / "b.tfm"))
    refused(read_itk, tmp_path / "b.tfm", "BSplineTransform of order 2: readable are cubic ones")
    sitk.WriteTransform(spline, str(tmp_path / "b.h5"))
    refused(read_itk, tmp_path / "b.h5", "BSplineTransform: readable are linear transforms, cubic B-splines and")
    with pytest.raises(TransformReadError, match=r"ends in \.h5, \.tfm, \.txt, \.mat"):
        read_itk(tmp_path / "b.xfm")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError, match="itk"):
        read_itk(tmp_path / "b.h5")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.bfloat16, torch.bool])
def test_types_that_hold_no_displacement(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    grid = fnreg.Grid((4, 3))
    mapping = fnreg.Mapping(fnreg.Displacement().init(grid), grid, fnreg.Displacement())
    with pytest.raises(ValueError, match=r"expected torch\.float32 or torch\.float64"):
        io.write_transform(tmp_path / name, mapping, dtype=dtype)
    half = fnreg.Mapping({"displacement": mapping.params["displacement"].half()}, grid, fnreg.Displacement())
    with pytest.raises(ValueError, match=r"dtype is torch\.float16: expected torch\.float32 or torch\.float64"):
        io.write_transform(tmp_path / name, half)
    io.write_transform(tmp_path / name, half, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_displacements_of_itk_are_written_and_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    grid = fnreg.Grid((5, 4, 3), spacing=(1.0, 1.5, 2.0))
    field = torch.rand(3, *grid.shape, dtype=torch.float64)
    mapping = fnreg.Mapping({"displacement": field}, grid, fnreg.Displacement())
    io.write_displacement(tmp_path / name, mapping)
    again = io.read_displacement(tmp_path / name)
    assert_close(again.params["displacement"], field, atol=1e-12, rtol=0)  # T(p) - p is rounded
    assert again.domain.same_as(grid)
    assert cli.main(["info", str(tmp_path / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest displacement"] == pytest.approx(float(field.norm(dim=0).max()))
