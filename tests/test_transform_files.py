"""Transforms of other programs: SimpleITK maps and resamples as we do, before and after a file, either way."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import intensity, orientation, picture, random_params, smooth_mapping, stored, tensor, uniform
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVF,
    SVFFD,
    TPS,
    Affine,
    Diffeomorphism,
    Displacement,
    Grid,
    Held,
    Image,
    Mapping,
    Rigid,
    Similarity,
    io,
)
from fnreg.extras import MissingExtraError
from fnreg.io import TransformReadError, WriteError, read_transform, write_transform

sitk: Any = pytest.importorskip("SimpleITK")

every_dimension = pytest.mark.parametrize("dimension", [2, 3])
EXTENT = 24.0
LINEAR = (Rigid(), Similarity(), Affine())
BENT = (FFD(4), FFD(3), Held(FFD(2), ()), SVFFD(4), SVF(4), Displacement(), Diffeomorphism(), TPS(6))


def base_grid(dimension: int, turn: tuple[float, ...] = (0.4, -0.3, 0.6)) -> Grid:
    """Anisotropic and oblique, with axes of odd and even size."""
    return Grid(
        (14, 11, 9)[:dimension],
        spacing=tensor([1.1, 1.6, 2.1])[:dimension],
        center=tensor([30.0, -20.0, 10.0])[:dimension],
        direction=orientation(dimension, tensor(turn)),
    )


def grids(dimension: int) -> list[Grid]:
    """As a scanner may store one volume: as it is, with axes in another order, and some of them backwards."""
    plain = base_grid(dimension)
    image = Image(torch.zeros(1, *plain.shape), plain)
    order, flips = ((1, 0), (True, False)) if dimension == 2 else ((2, 0, 1), (False, True, True))
    return [plain, stored(image, order, flips).grid, base_grid(dimension, (0.0, 0.0, 0.0))]


def bent(transform: fnreg.Transform, grid: Grid, seed: int = 1) -> Mapping:
    if isinstance(transform, Held):
        inner = bent(transform.transform, grid, seed)
        return Mapping(inner.params, grid, transform)
    if isinstance(transform, TPS) or transform.linear:
        return Mapping(random_params(transform, grid, seed, 0.8), grid, transform)
    return smooth_mapping(transform, grid, seed, 1.0, 1.0)


def composites(grid: Grid) -> list[Mapping]:
    affine, free, flow = (bent(transform, grid) for transform in (Affine(), FFD(4), SVFFD(4)))
    return [affine @ free, affine @ flow, free @ affine, affine @ (flow @ bent(Rigid(), grid, 3))]


def inner_points(grid: Grid, count: int = 40, margin: float = 2.5) -> Tensor:
    """World points within a grid, some voxels away from its border, where no part of a map leaves its region."""
    high = torch.tensor(grid.size, dtype=torch.float64) - 1 - 2 * margin
    index = margin + (uniform(count, grid.ndim, seed=5) + 1) / 2 * high
    return grid.index_to_world(index)


def mapped(theirs: Any, points: Tensor) -> Tensor:
    return tensor([theirs.TransformPoint(point) for point in points.tolist()])


def voxels(grid: Grid, vectors: Tensor) -> float:
    return float(grid.convert(vectors, "world", "index", vectors=True).norm(dim=-1).max())


def to_sitk(image: Image) -> Any:
    made = sitk.GetImageFromArray(image.numpy()[0])
    made.SetOrigin(image.grid.origin.tolist())
    made.SetSpacing(image.grid.spacing.tolist())
    made.SetDirection(image.grid.direction.flatten().tolist())
    return made


def stays(mapping: Mapping, points: Tensor) -> Tensor:
    """Where no part of a composition gets points from beyond its domain: there ITK's parts do not move any."""
    inside = torch.ones(len(points), dtype=torch.bool)
    for part in mapping.parts():
        if not part.transform.linear:
            index = part.domain.world_to_index(points)
            inside &= ((index > -1e-9) & (index < tensor(part.domain.size) - 1 + 1e-9)).all(-1)
        points = part.map_points(points)
    return inside


def agree(path: Path, mapping: Mapping, grid: Grid, theirs: Any) -> None:
    """SimpleITK's transform and what is read back map points and resample an image as the mapping does."""
    dimension, points = grid.ndim, inner_points(grid)
    expected = mapping.map_points(points)
    assert voxels(grid, mapped(theirs, points) - expected) < 1e-6
    again = read_transform(path)
    assert voxels(grid, again.map_points(points) - expected) < 1e-9
    assert again.transform.linear == mapping.transform.linear

    about = grid.center
    turned = orientation(dimension, 0.3 * tensor([1, 2, 3]))
    moving_grid = Grid([n + 4 for n in grid.size], spacing=0.9 * grid.spacing, center=about, direction=turned)
    values = intensity(moving_grid.points() - about, EXTENT).reshape(1, *moving_grid.shape)
    moving = Image(values, moving_grid)
    ours = fnreg.warp(moving, mapping, grid).data[0]
    like = to_sitk(Image(torch.zeros(1, *grid.shape, dtype=torch.float64), grid))
    found = torch.from_numpy(sitk.GetArrayFromImage(sitk.Resample(to_sitk(moving), like, theirs, sitk.sitkLinear, 0.0)))
    index = moving_grid.world_to_index(mapping.map_points(grid.points()))
    inside = ((index > 0.01) & (index < torch.tensor(moving_grid.size) - 1.01)).all(-1).reshape(grid.shape)
    away = stays(mapping, grid.points()).reshape(grid.shape)
    assert int((inside & away).sum()) > 30
    spread = float(values.max() - values.min())
    assert float((ours - found).abs()[inside & away].max()) < 1e-6 * spread
    assert float((ours - values.mean()).abs().max()) > 0.1 * spread


# -- ours, in their hands ------------------------------------------------------------------------------------------


@every_dimension
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("ending", ["tfm", "h5", "mat"])
@pytest.mark.parametrize("transform", LINEAR, ids=repr)
def test_linear_maps_are_theirs(
    tmp_path: Path, transform: fnreg.Transform, ending: str, number: int, dimension: int
) -> None:
    grid = grids(dimension)[number]
    mapping, path = bent(transform, grid), tmp_path / f"t.{ending}"
    write_transform(path, mapping)
    agree(path, mapping, grid, sitk.ReadTransform(str(path)))
    assert_close(read_transform(path).matrix(), mapping.matrix(), atol=1e-10, rtol=0)


@every_dimension
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("ending", ["tfm", "h5"])
@pytest.mark.parametrize("transform", BENT, ids=repr)
def test_bent_maps_are_theirs(
    tmp_path: Path, transform: fnreg.Transform, ending: str, number: int, dimension: int
) -> None:
    grid = grids(dimension)[number]
    mapping, path = bent(transform, grid), tmp_path / f"t.{ending}"
    assert voxels(grid, mapping.map_points(grid.points()) - grid.points()) > 0.3
    write_transform(path, mapping)
    theirs = sitk.ReadTransform(str(path))
    agree_as_field = mapping if not isinstance(transform, TPS) else sampled(mapping)
    agree(path, agree_as_field, grid, theirs)
    # At the voxels up to the border.
    points = grid.points()
    assert voxels(grid, mapped(theirs, points) - mapping.map_points(points)) < 1e-6
    assert voxels(grid, read_transform(path).map_points(points) - mapping.map_points(points)) < 1e-9


def sampled(mapping: Mapping) -> Mapping:
    """What a field of vectors holds of a map."""
    return Mapping({"displacement": mapping.displacement()}, mapping.domain, Displacement())


@every_dimension
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("ending", ["tfm", "h5"])
def test_compositions_are_theirs(tmp_path: Path, ending: str, number: int, dimension: int) -> None:
    grid = grids(dimension)[number]
    for count, mapping in enumerate(composites(grid)):
        path = tmp_path / f"{count}.{ending}"
        write_transform(path, mapping)
        agree(path, mapping, grid, sitk.ReadTransform(str(path)))


@every_dimension
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("ending", ["nii.gz", "nii", "mha", "nrrd"])
def test_displacements_are_theirs(tmp_path: Path, ending: str, number: int, dimension: int) -> None:
    grid = grids(dimension)[number]
    mapping, path = composites(grid)[1], tmp_path / f"u.{ending}"
    write_transform(path, mapping, dtype=torch.float64)
    image = sitk.ReadImage(str(path))
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    points = grid.points()
    error = 1e-5 if "nii" in ending else 1e-9  # the header of NIfTI has single precision
    assert voxels(grid, mapped(theirs, points) - mapping.map_points(points)) < error
    assert voxels(grid, read_transform(path).map_points(points) - mapping.map_points(points)) < error


@every_dimension
def test_a_spline_keeps_its_control_points(tmp_path: Path, dimension: int) -> None:
    grid = base_grid(dimension)
    mapping = bent(FFD(4), grid)
    write_transform(tmp_path / "t.tfm", mapping)
    theirs = sitk.ReadTransform(str(tmp_path / "t.tfm")).Downcast()
    assert theirs.GetName() == "BSplineTransform" and theirs.GetOrder() == 3
    coefficients = mapping.params["coefficients"]
    size = [n + 2 for n in coefficients.shape[:0:-1]]
    assert list(map(int, theirs.GetFixedParameters()[:dimension])) == size
    found = np.reshape(theirs.GetParameters(), (dimension, *size[::-1]))
    inner = (slice(None), *[slice(1, -1)] * dimension)
    assert np.array_equal(found[inner], coefficients.numpy())


def test_a_spline_over_a_plane_and_of_a_coarse_level(tmp_path: Path) -> None:
    plane = Grid((9, 8, 1), spacing=(1.0, 2.0, 3.0), origin=5.0)
    level = Grid((15, 12), spacing=(0.3, 0.7), origin=1 / 3).level((8, 6))
    for mapping in (bent(FFD((2, 3, 1)), plane), Mapping(random_params(FFD(2), level, 1), level, FFD(2))):
        write_transform(tmp_path / "t.tfm", mapping)
        theirs, points = sitk.ReadTransform(str(tmp_path / "t.tfm")), mapping.domain.points()
        assert_close(mapped(theirs, points), mapping.map_points(points), atol=1e-9, rtol=0)
        found = read_transform(tmp_path / "t.tfm")
        assert_close(found.map_points(points), mapping.map_points(points), atol=1e-9, rtol=0)


# -- theirs, in our hands ------------------------------------------------------------------------------------------

CENTER = (4.0, 5.0, 6.0)


def their_linear() -> dict[str, Any]:
    turned = sitk.Euler3DTransform(CENTER, 0.1, -0.2, 0.3, (1.0, 2.0, 3.0))
    zyx = sitk.Euler3DTransform(turned)
    zyx.SetComputeZYX(True)
    affine = sitk.AffineTransform(turned.GetMatrix(), (1.0, -2.0, 3.0), CENTER)
    affine.Scale((1.1, 0.8, 1.3))
    shear = sitk.AffineTransform(2)
    shear.Shear(0, 1, 0.3)
    shear.SetCenter((3.0, 1.0))
    return {
        "identity": sitk.Transform(3, sitk.sitkIdentity),
        "translation": sitk.TranslationTransform(3, (1.0, -2.0, 3.0)),
        "euler 2-D": sitk.Euler2DTransform((3.0, 1.0), 0.4, (2.0, -1.0)),
        "similarity 2-D": sitk.Similarity2DTransform(1.2, 0.4, (2.0, -1.0), (3.0, 1.0)),
        "affine 2-D": shear,
        "euler": turned,
        "euler, the other order": zyx,
        "versor": sitk.VersorTransform((0.1, 0.2, -0.3, 0.9), CENTER),
        "versor rigid": sitk.VersorRigid3DTransform((0.1, 0.2, -0.3, 0.9), (1.0, 2.0, 3.0), CENTER),
        "similarity": sitk.Similarity3DTransform(1.3, (0.1, 0.2, -0.3, 0.9), (1.0, 2.0, 3.0), CENTER),
        "scale": sitk.ScaleTransform(3, (1.1, 0.8, 1.3)),
        "scale versor": sitk.ScaleVersor3DTransform((1.1, 0.8, 1.3), (0.1, 0.2, -0.3, 0.9), (1.0, 2.0, 3.0), CENTER),
        "affine": affine,
    }


@pytest.mark.parametrize("ending", ["tfm", "txt", "h5", "mat"])
@pytest.mark.parametrize("name", their_linear())
def test_their_linear_maps(tmp_path: Path, name: str, ending: str) -> None:
    theirs, path = their_linear()[name], tmp_path / f"t.{ending}"
    sitk.WriteTransform(theirs, str(path))
    if ending == "mat" and name == "scale versor":
        refused(path, "holds a ScaleVersor3DTransform: readable are AffineTransform, ")
        return
    points = 20 * uniform(10, theirs.GetDimension(), seed=1)
    found = read_transform(path)
    assert found.transform.linear and found.domain.ndim == theirs.GetDimension()
    assert_close(found.map_points(points), mapped(theirs, points), atol=1e-9, rtol=0)


def their_spline(dimension: int, mesh: tuple[int, ...]) -> tuple[Any, Image]:
    grid = base_grid(dimension)
    image = Image(torch.zeros(1, *grid.shape), grid)
    spline = sitk.BSplineTransformInitializer(to_sitk(image), mesh[:dimension], 3)
    spline.SetParameters(uniform(len(spline.GetParameters()), seed=3).tolist())
    return spline, image


@pytest.mark.parametrize("ending", ["tfm", "h5", "mat"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 3, 4), (5, 4, 1)], ids=str)
@every_dimension
def test_their_splines(tmp_path: Path, dimension: int, mesh: tuple[int, ...], ending: str) -> None:
    spline, image = their_spline(dimension, mesh)
    sitk.WriteTransform(spline, str(tmp_path / f"b.{ending}"))
    found = read_transform(tmp_path / f"b.{ending}")
    assert isinstance(found.transform, FFD)
    points = image.grid.points()
    assert_close(found.map_points(points), mapped(spline, points), atol=1e-9, rtol=0)
    assert voxels(image.grid, mapped(spline, points) - points) > 0.1
    write_transform(tmp_path / "again.tfm", found)
    again = sitk.ReadTransform(str(tmp_path / "again.tfm"))
    assert_close(mapped(again, points), mapped(spline, points), atol=1e-9, rtol=0)


@pytest.mark.parametrize("ending", ["tfm", "h5"])
@every_dimension
def test_their_compositions(tmp_path: Path, dimension: int, ending: str) -> None:
    spline, image = their_spline(dimension, (3, 4, 2))
    rigid = sitk.Euler2DTransform((1.0, 2.0), 0.02) if dimension == 2 else sitk.Euler3DTransform(CENTER, 0.01, 0.02, 0)
    field = sitk.DisplacementFieldTransform(
        sitk.Cast(sitk.TransformToDisplacementField(
            spline, sitk.sitkVectorFloat64, image.grid.size, image.grid.origin.tolist(), image.grid.spacing.tolist(),
            image.grid.direction.flatten().tolist(),
        ), sitk.sitkVectorFloat64)
    )  # fmt: skip
    nested = sitk.CompositeTransform([rigid, sitk.CompositeTransform([spline, field])])
    flat = sitk.CompositeTransform(nested)
    flat.FlattenTransform()
    sitk.WriteTransform(flat, str(tmp_path / f"c.{ending}"))
    found = read_transform(tmp_path / f"c.{ending}")
    assert [type(part).__name__ for part in found.transform.transforms] == ["Displacement", "FFD", "Homogeneous"]  # type: ignore[attr-defined]
    points = inner_points(image.grid, margin=3.0)
    assert_close(found.map_points(points), mapped(nested, points), atol=1e-9, rtol=0)


def test_a_composition_within_another_is_refused_in_text(tmp_path: Path) -> None:
    title, move = (
        "#Insight Transform File V1.0\n",
        ("Transform: TranslationTransform_double_2_2\nParameters: 1 2\nFixedParameters: \n"),
    )
    composite = "Transform: CompositeTransform_double_2_2\n"
    (tmp_path / "c.tfm").write_text(title + composite + move + composite + move)
    with pytest.raises(TransformReadError, match="composition within another: flatten it"):
        read_transform(tmp_path / "c.tfm")
    (tmp_path / "two.tfm").write_text(title + move + move)
    with pytest.raises(TransformReadError, match="holds 2 transforms that are not composed"):
        read_transform(tmp_path / "two.tfm")


def test_single_precision_names_are_read(tmp_path: Path) -> None:
    text = (
        "#Insight Transform File V1.0\r\n#Transform 0\r\nTransform: MatrixOffsetTransformBase_float_2_2\r\n"
        "Parameters: 1 0.5 0 2 3 4\r\nFixedParameters: 10 20\r\n"
    )
    (tmp_path / "t.txt").write_text(text, newline="")
    points = tensor([[11.0, 22.0]])
    assert read_transform(tmp_path / "t.txt").map_points(points).tolist() == [[10 + 3 + 1 + 1, 20 + 4 + 4]]


def test_without_simpleitk_text_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = base_grid(3)
    write_transform(tmp_path / "t.h5", bent(Rigid(), grid))
    sitk.WriteTransform(their_linear()["scale versor"], str(tmp_path / "scale.tfm"))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for mapping in (*composites(grid), bent(Affine(), grid)):
        write_transform(tmp_path / "t.tfm", mapping)
        points = inner_points(grid)
        assert_close(
            read_transform(tmp_path / "t.tfm").map_points(points), mapping.map_points(points), atol=1e-9, rtol=0
        )
    for name in ("t.h5", "scale.tfm"):
        with pytest.raises(MissingExtraError, match=r'pip install "fnreg\[itk\]"'):
            read_transform(tmp_path / name)
    for name in ("t.h5", "u.mha"):
        with pytest.raises(MissingExtraError, match=r'pip install "fnreg\[itk\]"'):
            write_transform(tmp_path / name, bent(SVFFD(4), grid))


# -- what is refused -----------------------------------------------------------------------------------------------

KINDS = {
    "t.safetensors": Rigid(), "t.tfm": FFD(4), "t.txt": Rigid(), "t.mat": Affine(), "t.h5": Displacement(),
    "u.nii": Displacement(), "u.nii.gz": Displacement(), "u.mha": Displacement(), "u.nrrd": Displacement(),
}  # fmt: skip
FILES = tuple(KINDS)


def written(folder: Path, name: str) -> Path:
    write_transform(folder / name, bent(KINDS[name], base_grid(2)))
    return folder / name


def refused(path: Path, told: str | None = None, read: Callable[[Path], Any] = read_transform) -> None:
    with pytest.raises(TransformReadError, match=told) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_are_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    whole = path.read_bytes()
    cuts = {1, 2, 8, 9, 20, 21, 50, 348, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}
    for count in sorted(cut for cut in cuts if 0 < cut < len(whole)):
        if name == "t.h5" and count > len(whole) // 2:
            continue  # ITK may find all that it needs
        path.write_bytes(whole[:count])
        refused(path)
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"nothing of the kind\n" * 100)
    refused(path)
    path.unlink()
    refused(path, "does not exist")
    path.mkdir()
    refused(path, "is a folder")


def test_a_field_in_nifti_2(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    vectors = np.random.default_rng(0).normal(size=(5, 4, 3, 1, 3))
    made = nibabel.Nifti2Image(vectors, np.eye(4))
    made.header.set_intent("vector")
    nibabel.save(made, tmp_path / "u.nii")
    assert_close(read_transform(tmp_path / "u.nii").displacement(), tensor(vectors[..., 0, :].T))
    (tmp_path / "u.nii").rename(tmp_path / "u.mha")
    refused(tmp_path / "u.mha", "is named .mha but holds what ends in .nii.gz: rename it")


@pytest.mark.parametrize("name", FILES)
def test_files_under_a_wrong_name_are_refused(tmp_path: Path, name: str) -> None:
    data = written(tmp_path, name).read_bytes()
    for other in FILES:
        family = {"t.tfm": 1, "t.txt": 1, "u.nii": 2, "u.nii.gz": 2}
        if other == name or (name in family and family[name] == family.get(other)):
            continue
        (tmp_path / f"x{other}").write_bytes(data)
        told = "rename it" if name != "t.mat" else None  # whose first bytes do not tell
        refused(tmp_path / f"x{other}", told)
    (tmp_path / "t.xyz").write_bytes(data)
    refused(tmp_path / "t.xyz", "expected a name that ends in .safetensors, ")


@pytest.mark.parametrize("name", [*FILES, "TransformParameters.0.txt"])
def test_evil_pickles_never_run(tmp_path: Path, name: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in (0, 2, 5):
        for head in (b"", b"#Insight Transform File V1.0\n", b"\x89HDF\r\n\x1a\n", b'(Transform "EulerTransform")\n'):
            (tmp_path / name).write_bytes(head + pickle.dumps(Evil(), protocol=protocol))
            refused(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_of_mat_is_an_error_or_a_map_of_finite_numbers(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    path = written(tmp_path_factory.mktemp("mat"), "t.mat")
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_transform(path)
    except TransformReadError as problem:
        assert "\n" not in str(problem)
    else:
        assert bool(torch.isfinite(found.matrix()).all())


TEXT = "#Insight Transform File V1.0\n#Transform 0\nTransform: {}\nParameters: {}\nFixedParameters: {}\n"
WRONG = {
    ("AffineTransform_double_2_2", "1 0 0 1 5", "0 0"): "has 6 parameters, not 5",
    ("AffineTransform_double_2_2", "1 0 0 1 5 nan", "0 0"): "does not hold finite numbers",
    ("AffineTransform_double_2_2", "1 0 0 1 5 six", "0 0"): "is not a transform of ITK, or it is damaged",
    ("AffineTransform_double_4_4", "1", "0"): "expected a transform of 2 or 3 axes",
    ("AffineTransform_double_3_2", "1", "0"): "expected a transform of 2 or 3 axes",
    ("Euler3DTransform_double_2_2", "1 2 3", "0 0"): "parameters",
    ("BSplineTransform_double_2_2_2", "1", "3 3 0 0 1 1 1 0 0 1"): "order 2: readable are cubic ones",
    ("BSplineTransform_double_2_2", "1", "3 3 0 0 1 1 1 0 0"): "without size, origin, spacing and direction",
    ("BSplineTransform_double_2_2", "1 2", "1e9 1e9 0 0 1 1 1 0 0 1"): "have 2000000000000000000 parameters",
    ("BSplineTransform_double_2_2", " ".join("1" * 18), "3 3 0 0 1 1 1 0 0 1"): "has at least 4 along each axis",
    ("BSplineTransform_double_2_2", " ".join("1" * 32), "4 4 0 0 1 0 1 0 0 1"): "no valid place in the world",
    ("BSplineTransform_double_2_2", " ".join("1" * 32), "4 4 0 0 1 1 1 0.1 0 1"): "not at right angles",
    ("DisplacementFieldTransform_double_2_2", "1 2 3", "1.5 1 0 0 1 1 1 0 0 1"): "without size, origin",
    ("CompositeTransform_double_2_2", "", ""): "transform lacks its parameters|composite transform has no parts",
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_text_that_does_not_fit(tmp_path: Path, case: tuple[str, str, str]) -> None:
    (tmp_path / "t.tfm").write_text(TEXT.format(*case))
    refused(tmp_path / "t.tfm", WRONG[case])


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    grid = base_grid(2)
    one, line = bent(FFD(4), grid), Grid((5,))
    many = fnreg.stack([one, one])
    broken = Mapping({"coefficients": one.params["coefficients"] * torch.nan}, grid, FFD(4))
    for name in ("t.tfm", "t.h5", "u.nii", "u.mha"):
        for mapping, told in ((many, "one map|take one of the batch"), (broken, "not finite")):
            with pytest.raises(ValueError, match=told):
                write_transform(tmp_path / name, mapping)
        with pytest.raises(ValueError, match="2 or 3"):
            write_transform(tmp_path / name, Mapping(FFD(2).init(line), line, FFD(2)))
    with pytest.raises(WriteError, match=r"\.mat holds linear transforms, not FFD"):
        write_transform(tmp_path / "t.mat", one)
    with pytest.raises(WriteError, match="expected a name that ends in"):
        write_transform(tmp_path / "t.xyz", one)
    with pytest.raises(ValueError, match="takes no grid and no dtype"):
        write_transform(tmp_path / "t.tfm", one, grid=grid)
    with pytest.raises(WriteError, match="does not exist"):
        write_transform(tmp_path / "none" / "t.mat", bent(Rigid(), grid))
    assert not list(tmp_path.iterdir())


def test_vector_images_without_vectors_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(to_sitk(picture(base_grid(2), extent=EXTENT)), str(tmp_path / "a.mha"))
    refused(tmp_path / "a.mha", "holds 1 values at each of")
    values = np.zeros((4, 5, 2))
    values[1, 1] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(tmp_path / "a.nrrd"))
    refused(tmp_path / "a.nrrd", "finite numbers")


# -- elastix -------------------------------------------------------------------------------------------------------

HEAD = """// as elastix writes it
(Transform "{}")
(NumberOfParameters {})
(TransformParameters {})
(InitialTransformParametersFileName "{}")
(HowToCombineTransforms "Compose")

(FixedImageDimension {dimension})
(MovingImageDimension {dimension})
(FixedInternalImagePixelType "float") // no matter here
"""


def elastix(path: Path, kind: str, parameters: Any, dimension: int, more: str = "", initial: str = "") -> Path:
    numbers = " ".join(repr(float(number)) for number in parameters)
    text = HEAD.format(kind, len(parameters), numbers, initial or "NoInitialTransform", dimension=dimension)
    path.write_text(text + more)
    return path


def about(center: tuple[float, ...], *, zyx: str = "false") -> str:
    return f'(CenterOfRotationPoint {" ".join(map(str, center))})\n(ComputeZYX "{zyx}")\n'


def elastix_pairs() -> dict[str, tuple[str, str, Any]]:
    """What elastix calls it, what stands beside the parameters, and SimpleITK's of the same meaning."""
    theirs = their_linear()
    plane, solid = about((3.0, 1.0)), about(CENTER)
    return {
        "translation": ("TranslationTransform", "", theirs["translation"]),
        "euler 2-D": ("EulerTransform", plane, theirs["euler 2-D"]),
        "euler": ("EulerTransform", solid, theirs["euler"]),
        "euler, the other order": ("EulerTransform", about(CENTER, zyx="true"), theirs["euler, the other order"]),
        "similarity 2-D": ("SimilarityTransform", plane, theirs["similarity 2-D"]),
        "similarity": ("SimilarityTransform", solid, theirs["similarity"]),
        "affine 2-D": ("AffineTransform", plane, theirs["affine 2-D"]),
        "affine": ("AffineTransform", solid, theirs["affine"]),
    }


@pytest.mark.parametrize("name", elastix_pairs())
def test_linear_maps_of_elastix(tmp_path: Path, name: str) -> None:
    kind, more, theirs = elastix_pairs()[name]
    dimension = theirs.GetDimension()
    path = elastix(tmp_path / "TransformParameters.0.txt", kind, theirs.GetParameters(), dimension, more)
    points = 20 * uniform(10, dimension, seed=1)
    assert_close(read_transform(path).map_points(points), mapped(theirs, points), atol=1e-9, rtol=0)


def spline_of(grid: Grid, spline: Any) -> str:
    fixed, d = spline.GetFixedParameters(), grid.ndim
    told = {"Size": fixed[:d], "Origin": fixed[d : 2 * d], "Spacing": fixed[2 * d : 3 * d], "Index": (0,) * d}
    told["Size"] = tuple(int(n) for n in told["Size"])
    told["Direction"] = np.reshape(fixed[3 * d :], (d, d)).T.flatten().tolist()  # column by column
    lines = [f"(Grid{name} {' '.join(map(repr, values))})" for name, values in told.items()]
    return "\n".join(lines) + '\n(BSplineTransformSplineOrder 3)\n(UseCyclicTransform "false")\n'


@every_dimension
def test_a_chain_of_elastix(tmp_path: Path, dimension: int) -> None:
    spline, image = their_spline(dimension, (3, 4, 2))
    grid = image.grid
    turn = their_linear()["euler 2-D" if dimension == 2 else "euler"]
    turn.SetCenter(grid.center.tolist())
    turn.SetParameters([0.01 * number for number in turn.GetParameters()])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    size = " ".join(map(str, grid.size))
    direction = " ".join(map(repr, grid.direction.T.flatten().tolist()))
    place = (
        f"(Size {size})\n(Index {'0 ' * dimension})\n(Spacing {' '.join(map(repr, grid.spacing.tolist()))})\n"
        f"(Origin {' '.join(map(repr, grid.origin.tolist()))})\n(Direction {direction})\n"
    )
    center = about(tuple(grid.center.tolist()))
    elastix(tmp_path / "a" / "T.0.txt", "EulerTransform", turn.GetParameters(), dimension, center + place)
    alone = read_transform(tmp_path / "a" / "T.0.txt")
    assert alone.domain.same_as(grid)
    for name in (str(tmp_path / "a" / "T.0.txt"), "T.0.txt", "/nowhere/T.0.txt", "C:\\work\\T.0.txt"):
        more = spline_of(grid, spline)
        last = elastix(tmp_path / "a" / "T.1.txt", "BSplineTransform", spline.GetParameters(), dimension, more, name)
        points = inner_points(grid, margin=3.0)
        expected = mapped(spline, mapped(turn, points))  # the initial one first
        assert_close(read_transform(last).map_points(points), expected, atol=1e-9, rtol=0)
    newer = last.read_text().replace("InitialTransformParametersFileName", "InitialTransformParameterFileName")
    last.write_text(
        newer.replace(f"(GridIndex {' '.join('0' * dimension)})", f"(GridIndex {' '.join('1' * dimension)})")
    )
    moved = io.read_elastix(last).map_points(points)
    fixed = spline.GetFixedParameters()
    shift = tensor(fixed[3 * dimension :]).reshape(dimension, dimension) @ tensor(fixed[2 * dimension : 3 * dimension])
    before = mapped(turn, points) - shift  # the same spline, one control point further
    inside = ((grid.world_to_index(before) > 0) & (grid.world_to_index(before) < tensor(grid.size) - 1)).all(-1)
    assert int(inside.sum()) > 3
    assert_close(moved[inside], (mapped(spline, before) + shift)[inside], atol=1e-9, rtol=0)


ELASTIX_WRONG = {
    "another transform": ('"EulerTransform"', '"AffineLogTransform"', "readable are"),
    "addition": ('"NoInitialTransform"', '"other.txt"', "other.txt, which is not there"),
    "no center": ("(CenterOfRotationPoint 1 2)", "(CenterOfRotation 1 2)", "has no CenterOfRotationPoint"),
    "no number": ("0.1 2.0 3.0", "0.1 2.0 three", "TransformParameters is not made of numbers"),
    "not finite": ("0.1 2.0 3.0", "0.1 2.0 inf", "expected 3 finite numbers"),
    "too few": ("(NumberOfParameters 3)", "(NumberOfParameters 4)", "has 3 parameters and says 4"),
    "too few for it": (
        "(NumberOfParameters 3)\n(TransformParameters 0.1 ",
        "(TransformParameters ",
        "has 3 parameters",
    ),
    "axes": ("(MovingImageDimension 2)", "(MovingImageDimension 3)", "as many on both sides"),
    "twice": ("(MovingImageDimension 2)", "(FixedImageDimension 2)", "FixedImageDimension is given twice"),
    "cut": ("(MovingImageDimension 2)", "(MovingImageDim", r"expected \(Name value ...\)"),
    "directions": ("(CenterOf", '(UseDirectionCosines "false")\n(CenterOf', "without the directions of its images"),
    "binary": ("(CenterOf", '(UseBinaryFormatForTransformationParameters "true")\n(CenterOf', "write them as text"),
}


@pytest.mark.parametrize("case", ELASTIX_WRONG)
def test_elastix_that_does_not_fit(tmp_path: Path, case: str) -> None:
    before, after, told = ELASTIX_WRONG[case]
    path = elastix(tmp_path / "t.txt", "EulerTransform", (0.1, 2.0, 3.0), 2, "(CenterOfRotationPoint 1 2)\n")
    read_transform(path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    refused(path, told)


def test_chains_of_elastix_that_do_not_end(tmp_path: Path) -> None:
    move = ("TranslationTransform", (1.0, 2.0), 2)
    a = elastix(tmp_path / "a.txt", *move, initial="b.txt")
    elastix(tmp_path / "b.txt", *move, initial="a.txt")
    refused(a, "begins with itself")
    elastix(tmp_path / "b.txt", "TranslationTransform", (1.0, 2.0, 3.0), 3)
    refused(a, r"have \[2, 3\] axes")
    elastix(tmp_path / "b.txt", *move)
    a.write_text(a.read_text().replace('"Compose"', '"Add"'))
    refused(a, "combines its initial transform by 'Add'")
    b = elastix(tmp_path / "b.txt", "BSplineTransform", [0.0] * 50, 2, "(BSplineTransformSplineOrder 2)\n")
    refused(b, "order 2, or a cyclic one")
    elastix(tmp_path / "b.txt", "BSplineTransform", [0.0] * 50, 2, "(GridSize 5 5)\n(GridSpacing 1 1)\n")
    refused(b, "has no GridOrigin")
    (tmp_path / "c.txt").write_bytes(b'(Transform "EulerTransform")\n\xff\xfe\n')
    refused(tmp_path / "c.txt", "is not text")


def test_a_chain_of_elastix_that_begins_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder has a file of the same name: old versions of elastix take that one, new ones the other."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    elastix(tmp_path / "a" / "T.0.txt", "TranslationTransform", (1.0, 2.0), 2)
    last = elastix(tmp_path / "a" / "T.1.txt", "TranslationTransform", (10.0, 20.0), 2, initial="T.0.txt")
    elastix(tmp_path / "T.0.txt", "TranslationTransform", (100.0, 200.0), 2)
    refused(last, "a/T.0.txt are two: work in a folder without the one that is not meant")
    (tmp_path / "T.0.txt").write_bytes((tmp_path / "a" / "T.0.txt").read_bytes())
    assert read_transform(last).map_points(torch.zeros(1, 2, dtype=torch.float64)).tolist() == [[11, 22]]


@every_dimension
@pytest.mark.parametrize("number", range(3))
def test_our_chains_for_elastix(tmp_path: Path, dimension: int, number: int) -> None:
    grid = grids(dimension)[number]
    points = inner_points(grid)
    affine, free = bent(Affine(), grid), bent(FFD(3), grid)
    held = bent(Held(FFD(2), ()), grid)
    for mapping, kinds in (
        (affine, ["Affine"]),
        (free, ["BSpline"]),
        (held, ["BSpline"]),
        (affine @ free, ["BSpline", "Affine"]),
        (free @ affine @ free, ["BSpline", "Affine", "BSpline"]),
    ):
        files = io.write_elastix(tmp_path, mapping, grid=grid)
        assert [file.name for file in files] == [f"TransformParameters.{k}.txt" for k in range(len(kinds))]
        texts = [file.read_text() for file in files]
        assert [text.split('"')[1] for text in texts] == [f"{kind}Transform" for kind in kinds]  # the first acts first
        assert [("NoInitialTransform" in text) for text in texts] == [True] + [False] * (len(kinds) - 1)
        for k, text in enumerate(texts[1:]):
            assert f'(InitialTransformParametersFileName "TransformParameters.{k}.txt")' in text
        again, expected = read_transform(files[-1]), mapping.map_points(points)
        assert voxels(grid, again.map_points(points) - expected) < 1e-9
        assert voxels(grid, expected - points) > 0.1
        # what elastix' classes do with these numbers, by ITK's, of which they are made
        moved = points
        for text in texts:
            moved = mapped(itk_of(text, dimension), moved)
        assert voxels(grid, moved - expected) < 1e-6
        if len(kinds) == 1 and mapping.transform.linear:
            assert again.domain.same_as(grid)


def itk_of(text: str, d: int) -> Any:
    """ITK's transform of a file of elastix, by its names, read in a few lines of its own."""
    lines = [line[1:-1].split(" ", 1) for line in text.splitlines()]
    values = {name: [float(v) for v in told.split()] for name, told in lines if '"' not in told}
    spline = "GridSize" in values
    made = sitk.BSplineTransform(d, 3) if spline else sitk.AffineTransform(d)
    fixed = values.get("CenterOfRotationPoint", [])
    if spline:
        columns = np.reshape(values["GridDirection"], (d, d))
        fixed = [*values["GridSize"], *values["GridOrigin"], *values["GridSpacing"], *columns.T.flatten()]
    made.SetFixedParameters(fixed)
    made.SetParameters(values["TransformParameters"])
    return made


def test_what_elastix_cannot_hold(tmp_path: Path) -> None:
    grid = base_grid(3)
    for transform in (SVFFD(4), Displacement(), Held(SVF(4), ())):
        with pytest.raises(ValueError, match=r"elastix has no (SVF|Disp).*fnreg convert --to displacement"):
            io.write_elastix(tmp_path, bent(Affine(), grid) @ bent(transform, grid))
    with pytest.raises(ValueError, match="grid has 2 axes but the mapping has 3"):
        io.write_elastix(tmp_path, bent(Affine(), grid), grid=base_grid(2))
    with pytest.raises(WriteError, match="does not exist"):
        io.write_elastix(tmp_path / "none", bent(Affine(), grid))
    assert not list(tmp_path.iterdir())


# -- Learn2Reg -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_displacements_for_learn2reg(tmp_path: Path, number: int) -> None:
    grid, scipy = grids(3)[number], pytest.importorskip("scipy.ndimage")
    nibabel: Any = pytest.importorskip("nibabel")
    mapping = composites(grid)[1]
    path = tmp_path / "disp.nii.gz"
    io.write_learn2reg(path, mapping)
    file = nibabel.load(path)
    assert file.shape == (*grid.size, 3) and file.get_data_dtype() == np.float32
    like = tmp_path / "like.nii.gz"
    io.write_image(like, Image(torch.zeros(1, *grid.shape), grid))
    np.testing.assert_allclose(file.affine, nibabel.load(like).affine)
    # as the challenge warps: the identity is added, and SciPy samples the moving image on the same grid
    values = intensity(grid.points() - grid.center, EXTENT).reshape(1, *grid.shape)
    found = scipy.map_coordinates(
        values[0].numpy().transpose(2, 1, 0), np.indices(grid.size) + np.moveaxis(file.get_fdata(), -1, 0), order=1
    )
    expected = fnreg.warp(Image(values, grid), mapping, grid).data[0].permute(2, 1, 0)
    index = grid.world_to_index(mapping.map_points(grid.points()))
    inside = ((index > 0.01) & (index < tensor(grid.size) - 1.01)).all(-1).reshape(grid.shape).permute(2, 1, 0)
    assert int(inside.sum()) > 300
    spread = float(values.max() - values.min())
    assert float((torch.from_numpy(found) - expected).abs()[inside].max()) < 1e-5 * spread
    refused(path, "expected the vectors of a displacement")


def test_learn2reg_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 axes: Learn2Reg's displacements have 3"):
        io.write_learn2reg(tmp_path / "d.nii", bent(FFD(4), base_grid(2)))
    with pytest.raises(WriteError, match=r"ends in \.nii or \.nii\.gz"):
        io.write_learn2reg(tmp_path / "d.mha", bent(FFD(4), base_grid(3)))


# -- in memory -----------------------------------------------------------------------------------------------------


@every_dimension
@pytest.mark.parametrize("number", range(3))
def test_in_memory_as_in_files(dimension: int, number: int) -> None:
    grid = grids(dimension)[number]
    points = inner_points(grid)
    for mapping in (*(bent(transform, grid) for transform in (Affine(), FFD(4), Displacement())), *composites(grid)):
        theirs = io.to_sitk_transform(mapping)
        assert isinstance(theirs, sitk.Transform)
        expected = mapping.map_points(points)
        assert voxels(grid, expected - points) > 0.1
        assert voxels(grid, mapped(theirs, points) - expected) < 1e-9
        again = io.from_sitk_transform(theirs)
        assert voxels(grid, again.map_points(points) - expected) < 1e-9
        assert len(again.parts()) == len(mapping.parts()) or mapping.transform.linear
    # nothing is shared
    field = bent(Displacement(), grid)
    theirs = io.to_sitk_transform(field)
    before = mapped(theirs, points)
    field.params["displacement"].zero_()
    assert torch.equal(mapped(theirs, points), before)


@pytest.mark.parametrize("name", their_linear())
def test_their_linear_maps_in_memory(name: str) -> None:
    theirs = their_linear()[name]
    points = 20 * uniform(10, theirs.GetDimension(), seed=1)
    found = io.from_sitk_transform(theirs)
    assert found.transform.linear
    assert_close(found.map_points(points), mapped(theirs, points), atol=1e-9, rtol=0)


def test_their_compositions_in_memory() -> None:
    spline, image = their_spline(3, (3, 4, 2))
    nested = sitk.CompositeTransform([sitk.Euler3DTransform(CENTER, 0.01, 0.02, 0), sitk.CompositeTransform([spline])])
    points = inner_points(image.grid, margin=3.0)
    found = io.from_sitk_transform(nested)
    assert_close(found.map_points(points), mapped(nested, points), atol=1e-9, rtol=0)


def test_in_memory_bad_input() -> None:
    grid = base_grid(2)
    with pytest.raises(TypeError, match="expected a transform of SimpleITK, got str: for files read_transform"):
        io.from_sitk_transform("t.tfm")
    with pytest.raises(TransformReadError, match="composition without parts"):
        io.from_sitk_transform(sitk.CompositeTransform(2))
    with pytest.raises(TransformReadError, match="the transform holds a BSplineTransform: readable are linear"):
        io.from_sitk_transform(sitk.BSplineTransform(2, 2))
    broken = sitk.TranslationTransform(2, (float("nan"), 0.0))
    with pytest.raises(TransformReadError, match="the transform does not hold finite numbers"):
        io.from_sitk_transform(broken)
    with pytest.raises(ValueError, match="not finite"):
        io.to_sitk_transform(Mapping({"displacement": torch.full((2, *grid.shape), torch.nan)}, grid, Displacement()))
    with pytest.raises(ValueError, match=r"has shape \(3, 2, .*one map of 2 or 3 axes"):
        io.to_sitk_transform(Mapping({"displacement": torch.zeros(3, 2, *grid.shape)}, grid, Displacement()))


def test_splines_that_are_not_finite(tmp_path: Path) -> None:
    made = sitk.BSplineTransform(2, 3)
    made.SetTransformDomainMeshSize((3, 3))
    made.SetParameters([float("nan"), *made.GetParameters()[1:]])
    sitk.WriteTransform(made, str(tmp_path / "a.h5"))
    for read in (lambda: io.read_itk(tmp_path / "a.h5"), lambda: io.from_sitk_transform(made)):
        with pytest.raises(io.TransformReadError, match="does not hold finite numbers"):
            read()
