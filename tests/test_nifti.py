"""Images as NIfTI: nibabel and ITK see the same voxels at the same places, and no damage passes for an image."""

import gzip
import itertools
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fnreg
from fnreg.io import (
    GeometryWarning,
    ImageReadError,
    Labels,
    WriteError,
    read_image,
    read_labels,
    read_series,
    write_image,
    write_labels,
)

nibabel = pytest.importorskip("nibabel")
RANDOM = np.random.default_rng(0)
VALUES = RANDOM.integers(-500, 500, (5, 4, 3)).astype(np.int16)  # (X, Y, Z)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])


def image_of(values: np.ndarray = VALUES, affine: Any = AFFINE, **fields: Any) -> Any:
    """nibabel's image with header fields as given."""
    made = nibabel.Nifti1Image(values, None)
    if affine is not None:
        made.set_sform(affine, 1)
        made.set_qform(affine, 1)
    for name, value in fields.items():
        made.header[name] = value
    return made


def raw(path: Path, *, values: np.ndarray = VALUES, affine: Any = AFFINE, **fields: Any) -> Path:
    """A file whose header fields are written over, whatever nibabel thinks of them."""
    made = image_of(values, affine)
    data = bytearray(made.to_bytes())
    header = nibabel.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data), mtime=0) if path.name.endswith(".gz") else bytes(data))
    return path


def turned(rng: np.random.Generator) -> np.ndarray:
    """An oblique affine, as a header of single precision holds it."""
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 4, 3)
    affine[:3, 3] = rng.normal(size=3) * 50
    return affine.astype(np.float32).astype(np.float64)


def same_places(image: fnreg.Image, affine: np.ndarray) -> None:
    """Every voxel is where the affine to RAS says, to 1e-12 of what its numbers are."""
    axes = (*range(image.grid.ndim), 3)
    expected = (FLIP @ affine)[np.ix_(axes, axes)]
    np.testing.assert_allclose(image.grid.affine, expected, atol=1e-12 * max(1.0, np.abs(expected).max()), rtol=0)


# -- beside nibabel and ITK ------------------------------------------------------------------------------------------


SMALL = ["anatomical.nii", "example4d.nii.gz", "functional.nii", "someones_anatomy.nii.gz", "someones_epi.nii.gz"]


@pytest.mark.parametrize("name", SMALL)
def test_real_files_are_read_as_nibabel_and_itk_read_them(data_dir: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = data_dir / "nibabel_small" / name
    theirs = nibabel.load(path)
    values = np.asarray(theirs.dataobj)
    volume = 1 if values.ndim == 4 else None
    ours = read_image(path, volume=volume)
    chosen = values if volume is None else values[..., 1]
    np.testing.assert_array_equal(ours.numpy()[0].T, chosen.astype(np.float32))
    same_places(ours, theirs.affine)

    itk = sitk.ReadImage(str(path))
    if volume is not None:
        itk = itk[..., 1]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).astype(np.float32), ours.numpy()[0])
    for index in itertools.product(*((0, n - 1) for n in ours.grid.size)):
        place = itk.TransformIndexToPhysicalPoint(index)
        found = ours.grid.index_to_world(torch.tensor(index))
        np.testing.assert_allclose(found, place, atol=2e-4)  # ITK makes the directions of headers orthogonal


def test_2d_slices_are_read_as_itk_reads_them(data_dir: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = data_dir / "itk_slices" / "r16slice.nii.gz"
    ours, itk = read_image(path), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), ours.numpy()[0])
    np.testing.assert_allclose(ours.grid.origin, itk.GetOrigin(), atol=1e-12)
    np.testing.assert_allclose(ours.grid.direction.flatten(), itk.GetDirection(), atol=1e-12)


ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1.0, -1.0), repeat=3)))


def test_there_are_48_orientations() -> None:
    assert len(ORIENTATIONS) == 48


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_all_48_orientations_are_one_physical_image(tmp_path: Path, form: str) -> None:
    """The same scan stored along other axes: the same value at the same world point."""
    sitk = pytest.importorskip("SimpleITK")
    points = torch.rand(20, 3, dtype=torch.float64) * torch.tensor([4.0, 3.0, 2.0])
    first = None
    for k, (order, signs) in enumerate(ORIENTATIONS):
        ornt = np.column_stack([order, signs])
        stored = nibabel.orientations.apply_orientation(VALUES, ornt)
        affine = AFFINE @ nibabel.orientations.inv_ornt_aff(ornt, VALUES.shape)
        made = nibabel.Nifti1Image(stored, None)
        (made.set_sform if form == "sform" else made.set_qform)(affine, 1)
        path = tmp_path / f"{k}.nii"
        nibabel.save(made, path)
        image = read_image(path)
        same_places(image, affine if form == "sform" else nibabel.load(path).affine)
        torch.testing.assert_close(image.grid.affine, torch.from_numpy(FLIP @ affine), atol=1e-5, rtol=0)
        itk = sitk.ReadImage(str(path))
        np.testing.assert_allclose(itk.GetOrigin(), image.grid.origin, atol=1e-5)
        np.testing.assert_allclose(itk.GetDirection(), image.grid.direction.flatten(), atol=1e-6)
        if first is None:
            first = image
        world = first.grid.index_to_world(points)
        torch.testing.assert_close(image.sample(world), first.sample(world), atol=1e-3, rtol=0)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(["sform", "qform"]))
def test_oblique_places_are_those_of_nibabel(tmp_path_factory: pytest.TempPathFactory, seed: int, form: str) -> None:
    affine = turned(np.random.default_rng(seed))
    made = nibabel.Nifti1Image(VALUES, None)
    (made.set_sform if form == "sform" else made.set_qform)(affine, 1)
    path = tmp_path_factory.mktemp("oblique") / "a.nii"
    nibabel.save(made, path)
    same_places(read_image(path), nibabel.load(path).affine)


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_type_in_both_byte_orders(tmp_path: Path, kind: str, order: str) -> None:
    values = RANDOM.integers(0, 100, (5, 4, 3)).astype(kind)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(kind)
    made = nibabel.Nifti1Image(values, AFFINE, header)
    nibabel.save(made, tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.data.dtype == (torch.float64 if kind == "f8" else torch.float32)
    np.testing.assert_array_equal(image.numpy()[0].T, values)
    image.data.add_(1)  # memory of its own, which can be written to
    labels = read_labels(tmp_path / "a.nii.gz")
    assert not labels.data.is_floating_point()
    np.testing.assert_array_equal(labels.data.numpy()[0].T, values.astype(np.int64))


@pytest.mark.parametrize(("slope", "inter"), [(0.5, 0.0), (2.0, -1024.0), (1.0, 3.0), (1e-7, 0.0), (1e35, 0.0)])
def test_slope_and_intercept(tmp_path: Path, slope: float, inter: float) -> None:
    path = raw(tmp_path / "a.nii", scl_slope=slope, scl_inter=inter)
    expected = np.asarray(nibabel.load(path).dataobj)
    found = read_image(path)
    np.testing.assert_array_equal(found.numpy()[0].T, expected.astype(found.numpy().dtype))
    assert bool(torch.isfinite(found.data).all())


def test_large_integers_stay_exact(tmp_path: Path) -> None:
    values = np.array([0, 16777217, -5, 7], np.int32).reshape(2, 2, 1)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "a.nii.gz")
    assert read_image(tmp_path / "a.nii.gz").data.flatten().tolist() == values.T.flatten().tolist()
    labels = read_labels(tmp_path / "a.nii.gz")
    assert labels.data.dtype == torch.int32 and labels.data.max() == 16777217
    huge = np.array([2**53 + 1, -(2**62), 3, 4], np.int64).reshape(2, 2, 1)
    nibabel.save(nibabel.Nifti1Image(huge, AFFINE, dtype=np.int64), tmp_path / "h.nii.gz")
    assert read_labels(tmp_path / "h.nii.gz").data.flatten().tolist() == huge.T.flatten().tolist()
    with pytest.raises(ImageReadError, match="no float holds: use read_labels"):
        read_image(tmp_path / "h.nii.gz")


@hypothesis.given(
    st.lists(
        st.one_of(
            st.integers(0, 255),
            st.integers(-(2**15), 2**15),
            st.integers(-(2**31), 2**31),
            st.integers(-(2**63), 2**63 - 1),
        ),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from(["a.nii", "a.nii.gz", "a.mha", "a.nrrd"]),
)
def test_labels_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, numbers: list[int], name: str) -> None:
    pytest.importorskip("SimpleITK")
    path = tmp_path_factory.mktemp("labels") / name
    labels = Labels(torch.tensor(numbers).reshape(1, 1, 2, 3), fnreg.Grid((3, 2, 1)))
    write_labels(path, labels)
    found = read_labels(path)
    assert torch.equal(found.data.long(), labels.data) and found.grid.same_as(labels.grid)


def test_labels_in_floats_are_taken_where_whole(tmp_path: Path) -> None:
    whole = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    assert read_labels(raw(tmp_path / "a.nii", values=whole)).data.numpy()[0].T.tolist() == whole.tolist()
    doubled = raw(tmp_path / "s.nii", scl_slope=2.0, scl_inter=1.0)
    np.testing.assert_array_equal(read_labels(doubled).data.numpy()[0].T, 2 * VALUES.astype(int) + 1)
    for values in (whole + 0.5, np.full_like(whole, np.nan), np.full_like(whole, 1e30)):
        with pytest.raises(ImageReadError, match="not whole numbers: expected labels; use read_image"):
            read_labels(raw(tmp_path / "b.nii", values=values))


def test_colours_and_vectors(tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 256, (5, 4, 3, 3)).astype(np.uint8)
    packed = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nibabel.save(nibabel.Nifti1Image(packed, AFFINE), tmp_path / "rgb.nii")
    assert np.array_equal(read_image(tmp_path / "rgb.nii", channels=True).numpy(), colours.T)
    grey = read_image(tmp_path / "rgb.nii").numpy()
    np.testing.assert_allclose(grey[0].T, colours @ [0.299, 0.587, 0.114], atol=0.51)
    with pytest.raises(ImageReadError, match="has 3 channels: expected labels"):
        read_labels(tmp_path / "rgb.nii")
    vectors = RANDOM.normal(size=(5, 4, 3, 1, 2)).astype(np.float32)
    made = nibabel.Nifti1Image(vectors, AFFINE)
    nibabel.save(made, tmp_path / "v.nii.gz")
    assert np.array_equal(read_image(tmp_path / "v.nii.gz").numpy(), vectors[:, :, :, 0].T)


@pytest.mark.parametrize("place", [{"spacing": (1.0, 2.0, 5.0)}, {"origin": (0.0, 0.0, 40.0)}])
def test_a_slice_of_a_volume_with_channels_keeps_its_place(tmp_path: Path, place: dict[str, Any]) -> None:
    """ITK would take the file for a 2-D image, and forget where the slice lies."""
    grid = fnreg.Grid((5, 4, 1), **place)
    image = fnreg.Image(torch.rand(3, 1, 4, 5), grid)
    write_image(tmp_path / "a.nii", image)
    found = read_image(tmp_path / "a.nii")
    assert found.grid.same_as(grid) and torch.equal(found.data, image.data)
    mapping = fnreg.Mapping({"displacement": image.data}, grid, fnreg.Displacement())
    fnreg.io.write_displacement(tmp_path / "u.nii.gz", mapping)
    back = fnreg.io.read_displacement(tmp_path / "u.nii.gz")
    torch.testing.assert_close(back.displacement(), image.data)


def test_series(tmp_path: Path) -> None:
    values = RANDOM.normal(size=(5, 4, 3, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "t.nii.gz")
    series = read_series(tmp_path / "t.nii.gz")
    assert series.data.shape == (6, 1, 3, 4, 5) and series.grid.center.ndim == 1
    for k in range(6):
        one = read_image(tmp_path / "t.nii.gz", volume=k)
        assert torch.equal(one.data, series.data[k]) and np.array_equal(one.numpy()[0].T, values[..., k])
    vectors = RANDOM.normal(size=(5, 4, 3, 6, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(vectors, AFFINE), tmp_path / "v.nii.gz")
    assert np.array_equal(read_series(tmp_path / "v.nii.gz").numpy(), vectors.transpose(3, 4, 2, 1, 0))
    assert np.array_equal(read_image(tmp_path / "v.nii.gz", volume=4).numpy(), vectors[:, :, :, 4].T)
    with pytest.raises(ImageReadError, match=r"a series of 6 volumes: .* volume=0 to volume=5, or all by read_series"):
        read_image(tmp_path / "t.nii.gz")
    for volume in (6, -1):
        with pytest.raises(ImageReadError, match=f"has 6 volumes: volume is {volume}, expected 0 to 5"):
            read_image(tmp_path / "t.nii.gz", volume=volume)
    single = read_series(raw(tmp_path / "one.nii"))
    assert single.data.shape == (1, 1, 3, 4, 5)


def test_pairs_of_header_and_voxels(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(VALUES, AFFINE), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        image = read_image(tmp_path / name)
        assert np.array_equal(image.numpy()[0].T, VALUES)
        same_places(image, AFFINE)
    (tmp_path / "b.hdr").write_bytes((tmp_path / "a.hdr").read_bytes())
    with pytest.raises(ImageReadError, match=r"b\.img does not exist"):
        read_image(tmp_path / "b.hdr")
    (tmp_path / "b.img").write_bytes((tmp_path / "a.img").read_bytes()[:-1])
    with pytest.raises(ImageReadError, match=r"120 bytes of voxels, .* more than the file can hold"):
        read_image(tmp_path / "b.hdr")
    (tmp_path / "c.nii").write_bytes((tmp_path / "a.hdr").read_bytes() + bytes(4) + (tmp_path / "a.img").read_bytes())
    with pytest.raises(ImageReadError, match="rename it"):
        read_image(tmp_path / "c.nii")


def test_nifti_2(tmp_path: Path) -> None:
    affine = turned(RANDOM) + 1e-9  # double precision is kept
    affine[3] = 0, 0, 0, 1
    nibabel.save(nibabel.Nifti2Image(VALUES, affine), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    same_places(image, affine)
    assert np.array_equal(image.numpy()[0].T, VALUES)


def test_units_of_length_become_millimetres(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for unit, scale in ((0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001)):
        path = raw(tmp_path / f"{unit}.nii", xyzt_units=unit)
        grid, itk = read_image(path).grid, sitk.ReadImage(str(path))
        np.testing.assert_allclose(grid.spacing, np.array([2, 1.5, 3]) * scale, rtol=1e-12)
        np.testing.assert_allclose(grid.origin, np.array([-30, 20, 7]) * scale, rtol=1e-12)
        np.testing.assert_allclose(grid.spacing, itk.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(grid.origin, itk.GetOrigin(), rtol=1e-6)


# -- two places, or none ---------------------------------------------------------------------------------------------


def test_forms_that_differ_are_told(tmp_path: Path) -> None:
    made = image_of()
    moved = AFFINE.copy()
    moved[0, 3] += 12.5
    made.set_qform(moved, 1)
    nibabel.save(made, tmp_path / "a.nii")
    told = r"a\.nii tells its place twice: sform and qform differ by up to 12\.5 mm .* taken is the sform"
    with pytest.warns(GeometryWarning, match=told):
        same_places(read_image(tmp_path / "a.nii"), AFFINE)
    same_places(read_image(tmp_path / "a.nii", form="qform"), moved)  # without a warning: it was chosen
    same_places(read_image(tmp_path / "a.nii", form="sform"), AFFINE)
    with pytest.raises(ImageReadError, match="has no qform: its qform_code is 0"):
        read_image(raw(tmp_path / "b.nii", qform_code=0), form="qform")
    with pytest.raises(ValueError, match="unknown form 'best': choose sform or qform"):
        read_image(raw(tmp_path / "b.nii"), form="best")  # type: ignore[arg-type]


def test_without_a_form_itks_place_is_taken_and_told(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = raw(tmp_path / "a.nii", qform_code=0, sform_code=0)
    with pytest.warns(GeometryWarning, match="says nothing of its place .* as ITK does; nibabel would flip"):
        grid = read_image(path).grid
    itk = sitk.ReadImage(str(path))
    np.testing.assert_allclose(grid.origin, itk.GetOrigin(), atol=1e-12)
    np.testing.assert_allclose(grid.spacing, itk.GetSpacing(), atol=1e-12)
    np.testing.assert_allclose(grid.direction.flatten(), itk.GetDirection(), atol=1e-12)


# -- what headers may claim ------------------------------------------------------------------------------------------

SHEARED = AFFINE.copy()
SHEARED[0, 1] = 1.5 * np.tan(np.radians(3))
HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "no axes": ({"dim": [0, 5, 4, 3, 1, 1, 1, 1]}, "gives it 0 axes"),
    "nine axes": ({"dim": [9, 5, 4, 3, 1, 1, 1, 1]}, "gives it 9 axes"),
    "one axis": ({"dim": [1, 60, 1, 1, 1, 1, 1, 1]}, "expected 2 or 3 axes"),
    "six axes": ({"dim": [6, 5, 4, 1, 1, 1, 3, 1]}, "expected 2 or 3 axes"),
    "empty axis": ({"dim": [3, 5, 0, 3, 1, 1, 1, 1]}, r"gives its axes \[5, 0, 3\] voxels"),
    "negative axis": ({"dim": [3, 5, -4, 3, 1, 1, 1, 1]}, "voxels"),
    "too few voxels": (
        {"dim": [3, 5, 4, 4, 1, 1, 1, 1]},
        r"160 bytes of voxels, 5 x 4 x 4 x 1 x 1, (but it ends after 120|more than)",
    ),
    "too many voxels": ({"dim": [3, 5, 4, 2, 1, 1, 1, 1]}, "at least 40 bytes more follow"),
    "bomb": ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "more than the file can hold"),
    "worst bomb": ({"dim": [7] + [32767] * 5 + [1, 1]}, "more than the file can hold"),
    "no type": ({"datatype": 0}, "holds unknown, datatype 0"),
    "colours of colours": ({"datatype": 128, "bitpix": 24, "dim": [5, 5, 4, 1, 1, 2, 1, 1]}, "2 colours at each voxel"),
    "complex": ({"datatype": 32, "bitpix": 64}, "holds complex, datatype 32"),
    "bits": ({"datatype": 1, "bitpix": 1}, "holds bits"),
    "long floats": ({"datatype": 1536, "bitpix": 128}, "floats of 128 bits"),
    "another type": ({"datatype": 77}, "an unknown type, datatype 77"),
    "bits of a voxel": ({"bitpix": 8}, "gives 8 bits to each voxel of datatype 4"),
    "offset": ({"vox_offset": 300}, "voxels would begin at byte 300"),
    "offset behind the end": ({"vox_offset": 1e9}, "behind its end|within its header"),
    "offset, half": ({"vox_offset": 352.5}, "would begin at byte 352.5"),
    "offset, not finite": ({"vox_offset": np.nan}, "would begin at byte nan"),
    "offset, negative": ({"vox_offset": -352}, "would begin at byte -352"),
    "zero spacing": ({"pixdim": [1, 2, 0, 3, 1, 1, 1, 1]}, r"pixdim \[2.0, 0.0, 3.0\]: expected positive"),
    "negative spacing": ({"pixdim": [1, 2, -1, 3, 1, 1, 1, 1]}, "pixdim .* expected positive"),
    "spacing, not a number": ({"pixdim": [1, 2, np.nan, 3, 1, 1, 1, 1]}, "pixdim .* expected positive"),
    "spacing, infinite": ({"pixdim": [1, 2, np.inf, 3, 1, 1, 1, 1]}, "pixdim .* expected positive"),
    "sign": ({"pixdim": [0.5, 2, 1, 3, 1, 1, 1, 1], "sform_code": 0}, r"pixdim\[0\].* is 0.5, expected 1 or -1"),
    "sform, not a number": ({"srow_x": [np.nan, 0, 0, 0]}, "not finite"),
    "sform, infinite": ({"srow_x": [-2, 0, 0, np.inf], "qform_code": 0}, "not finite"),
    "sform, singular": ({"srow_y": [0, 0, 0, 0], "qform_code": 0}, "spacing .* expected positive"),
    "sform, sheared": ({"srow_x": SHEARED[0], "qform_code": 0}, r"axes that are 3 degrees from right angles"),
    "quaternion": ({"quatern_b": 0.9, "quatern_c": 0.9, "sform_code": 0}, "is longer than 1"),
    "quaternion, nan": ({"quatern_b": np.nan, "sform_code": 0}, "is longer than 1"),
    "qform's offset": ({"qoffset_x": np.nan, "sform_code": 0}, "not finite"),
    "code": ({"sform_code": 77}, "its sform_code is 77"),
    "unit": ({"xyzt_units": 5}, "its unit of length has the unknown code 5"),
    "slope": ({"scl_slope": np.inf}, "scaled by inf"),
    "intercept": ({"scl_slope": 1, "scl_inter": np.nan}, "shifted by nan"),
    "magic": ({"magic": b"nop"}, "magic bytes"),
    "analyze": ({"magic": b""}, "an ANALYZE file has no place in the world"),
}


@pytest.mark.filterwarnings("ignore::fnreg.io.GeometryWarning")
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_cannot_be(tmp_path: Path, case: str, name: str) -> None:
    fields, told = HEADERS[case]
    path = raw(tmp_path / name, **fields)
    with pytest.raises(ImageReadError, match=told) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_2d_image_in_another_plane(tmp_path: Path) -> None:
    upright = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(ImageReadError, match=r"2-D image in a plane .* store it with three axes, one slice"):
        read_image(raw(tmp_path / "a.nii", values=VALUES[:, :, 0], affine=upright))


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A gigabyte claimed in a kilobyte of gzip, within what deflate could do: what does not come is not touched."""
    head = bytearray(raw(tmp_path / "a.nii", dim=[3, 1024, 1024, 512, 1, 1, 1, 1]).read_bytes()[:352])
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(head) + RANDOM.bytes(2**20)))
    zeros = gzip.compress(bytes(2**28), 9)  # the other way round: more in the stream than the header says
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(raw(tmp_path / "d.nii").read_bytes()) + zeros)
    code = (
        "import sys, resource, fnreg, nibabel\n"
        "fnreg.io.read_image(sys.argv[1])\n"  # what is loaded on first use
        "for path in sys.argv[2:]:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    try:\n        fnreg.io.read_image(path)\n"
        "    except fnreg.io.ImageReadError as problem:\n        print(problem)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    names = [str(tmp_path / name) for name in ("d.nii", "b.nii.gz", "c.nii.gz")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    first, taken, second, more = done.stdout.splitlines()
    assert "claims 1073741824 bytes" in first and "but it ends after 1048576" in first and int(taken) < 100 * 1024
    assert "bytes more follow" in second and int(more) < 100 * 1024


def test_the_file_once_and_the_tensor_once(tmp_path: Path) -> None:
    """Floats are read into the memory that the tensor has; of the rest there is the compressed file."""
    values = RANDOM.normal(size=(128, 128, 32)).astype(np.float32)
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    read_image(raw(tmp_path / "warm.nii"))
    tracemalloc.start()
    image = read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.data.numel() * 4 == 2**21 and peak < 2.1 * 2**21


# -- damage ----------------------------------------------------------------------------------------------------------


def attempt(path: Path, data: bytes, expected: fnreg.Image, affine: bool = True) -> bool:
    """Whether the bytes were taken: then they are the same image at the same place."""
    path.write_bytes(data)
    try:
        found = read_image(path)
    except ImageReadError as problem:
        assert "\n" not in str(problem)
        return False
    assert torch.equal(found.data, expected.data)
    if affine:
        assert torch.equal(found.grid.affine, expected.grid.affine)
    return True


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_cut_anywhere_is_an_error(tmp_path: Path, name: str) -> None:
    path = raw(tmp_path / name)
    whole, expected = path.read_bytes(), read_image(path)
    assert attempt(path, whole, expected)
    for length in range(len(whole)):
        assert not attempt(path, whole[:length], expected), length
    assert not attempt(path, whole + b"\0" * 8 if name == "a.nii" else whole + b"more", expected)


def test_a_flipped_byte_anywhere_in_gzip_is_an_error_or_the_same_image(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.nii.gz")
    whole, expected = path.read_bytes(), read_image(path)
    taken = 0
    for place in range(len(whole)):
        for change in (1 << place % 8, 0xFF):
            changed = bytearray(whole)
            changed[place] ^= change
            taken += attempt(path, bytes(changed), expected)
    assert taken < 20  # the time and the like in the head of gzip


@pytest.mark.filterwarnings("ignore::fnreg.io.GeometryWarning")
@hypothesis.settings(max_examples=300)
@hypothesis.given(
    changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6), order=st.booleans()
)
def test_any_header_is_an_image_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], order: bool
) -> None:
    """Without a check sum some changes make another valid header; none makes another error."""
    made = image_of()
    data = bytearray(
        (nibabel.Nifti1Image(VALUES, AFFINE, made.header.as_byteswapped(">")) if order else made).to_bytes()
    )
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.nii"
    path.write_bytes(data)
    try:
        image = read_image(path)
    except ImageReadError as problem:
        assert "\n" not in str(problem)
    else:
        assert image.data.numel() <= 120 and bool(torch.isfinite(image.grid.affine).all())


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b", "is damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "is not a NIfTI file"),
        (b"Dear reader", "is not a NIfTI file"),
        (gzip.compress(b"Dear reader", mtime=0), "is not a NIfTI file"),
        (b"\\\x01", "is not a NIfTI file"),
        (bytes(10000), "is not a NIfTI file"),
        (zlib.compress(bytes(1000)), "is not a NIfTI file"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr"])
def test_what_is_no_nifti(tmp_path: Path, data: bytes, told: str, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageReadError, match=told):
        read_image(tmp_path / name)


def test_compression_is_seen_by_the_bytes(tmp_path: Path) -> None:
    """A name that says the wrong thing of it leads nobody astray."""
    whole = raw(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole)
    (tmp_path / "c.nii").write_bytes(gzip.compress(whole))
    for name in ("b.nii.gz", "c.nii"):
        assert np.array_equal(read_image(tmp_path / name).numpy()[0].T, VALUES)


# -- writing ---------------------------------------------------------------------------------------------------------


def some_image(dimension: int, channels: int, dtype: torch.dtype, rng: torch.Generator) -> fnreg.Image:
    direction = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng, dtype=torch.float64)).Q
    grid = fnreg.Grid((5, 4, 3)[:dimension], spacing=(0.3, 0.7, 2.0)[:dimension], origin=1 / 3, direction=direction)
    return fnreg.Image(torch.randn(channels, *grid.shape, generator=rng, dtype=dtype), grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_written_comes_back_and_itk_reads_it(
    tmp_path: Path, name: str, dimension: int, channels: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = some_image(dimension, channels, dtype, rng)
    write_image(tmp_path / name, image)
    found = read_image(tmp_path / name)
    assert torch.equal(found.data, image.data) and found.data.dtype == dtype
    torch.testing.assert_close(found.grid.affine, image.grid.affine, atol=1e-6, rtol=0)  # single precision
    # What the header can hold comes back to the last bit.
    write_image(tmp_path / f"again-{name}", found)
    again = read_image(tmp_path / f"again-{name}")
    torch.testing.assert_close(again.grid.affine, found.grid.affine, atol=1e-12, rtol=0)
    itk = sitk.ReadImage(str(tmp_path / name))
    values = sitk.GetArrayFromImage(itk)
    values = np.moveaxis(values, -1, 0) if channels > 1 else values[None]
    np.testing.assert_array_equal(values, image.numpy())
    assert itk.GetSize() == image.grid.size
    np.testing.assert_allclose(itk.GetOrigin(), image.grid.origin, atol=1e-6)
    np.testing.assert_allclose(itk.GetDirection(), image.grid.direction.flatten(), atol=1e-6)
    np.testing.assert_allclose(
        np.squeeze(np.asarray(nibabel.load(tmp_path / name).dataobj)).T, np.squeeze(image.numpy())
    )


def test_the_same_image_gives_the_same_bytes(tmp_path: Path, rng: torch.Generator) -> None:
    image = some_image(3, 1, torch.float32, rng)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_image(tmp_path / name, image)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_the_header_of_another_file_is_kept(tmp_path: Path) -> None:
    made = image_of()
    made.set_sform(AFFINE, 4)
    made.set_qform(AFFINE, 2)
    made.header["descrip"], made.header["aux_file"] = b"scanner of ours", b"aux"
    made.header.set_xyzt_units("mm", "sec")
    made.header["cal_max"] = 400
    made.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"remember me"))
    nibabel.save(made, tmp_path / "like.nii.gz")
    read = read_image(tmp_path / "like.nii.gz")
    warped = fnreg.Image(read.data / 3, read.grid)
    write_image(tmp_path / "a.nii.gz", warped, like=tmp_path / "like.nii.gz")
    old, new = (nibabel.load(tmp_path / name).header for name in ("like.nii.gz", "a.nii.gz"))
    same = [
        "qform_code",
        "sform_code",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
    ]
    for name in [*same, "qoffset_y", "qoffset_z", "pixdim", "xyzt_units", "descrip", "aux_file", "dim"]:
        np.testing.assert_array_equal(old[name], new[name])
    assert new.get_data_dtype() == np.float32 and float(new["cal_max"]) == 0
    assert [extension.get_content() for extension in new.extensions] == [b"remember me"]
    found = read_image(tmp_path / "a.nii.gz")
    assert torch.equal(found.data, warped.data) and torch.equal(found.grid.affine, read.grid.affine)
    other = fnreg.Image(warped.data, fnreg.Grid(read.grid.size))
    with pytest.raises(ValueError, match="expected the same"):
        write_image(tmp_path / "b.nii.gz", other, like=tmp_path / "like.nii.gz")
    with pytest.raises(ValueError, match=r"like is .*a\.png: expected a NIfTI file"):
        write_image(tmp_path / "b.nii.gz", warped, like=tmp_path / "a.png")
    with pytest.raises(ValueError, match="headers are kept from NIfTI to NIfTI"):
        write_image(tmp_path / "b.mha", warped, like=tmp_path / "like.nii.gz")


def test_a_header_in_the_other_byte_order_keeps_its_extensions(tmp_path: Path) -> None:
    header = image_of().header.as_byteswapped(">")
    data = bytearray(nibabel.Nifti1Image(VALUES, AFFINE, header).to_bytes())
    note = b"remember me".ljust(24, b"\0")
    data[348:352] = b"\x01\0\0\0"
    data[352:352] = (32).to_bytes(4, "big") + (6).to_bytes(4, "big") + note
    data[108:112] = np.array(384, ">f4").tobytes()  # where the voxels begin
    (tmp_path / "big.nii").write_bytes(data)
    image = read_image(tmp_path / "big.nii")
    assert np.array_equal(image.numpy()[0].T, VALUES)
    write_image(tmp_path / "a.nii", image, like=tmp_path / "big.nii")
    found = nibabel.load(tmp_path / "a.nii")
    assert found.header.endianness == ">" and np.array_equal(np.asarray(found.dataobj), VALUES)
    assert [extension.get_content().rstrip(b"\0") for extension in found.header.extensions] == [b"remember me"]
    assert torch.equal(read_image(tmp_path / "a.nii").data, image.data)


@pytest.mark.parametrize("name", SMALL)
def test_real_headers_are_kept(tmp_path: Path, data_dir: Path, name: str) -> None:
    path = data_dir / "nibabel_small" / name
    image = read_image(path, volume=0)
    write_image(tmp_path / "a.nii", image, like=path)
    old, new = nibabel.load(path), nibabel.load(tmp_path / "a.nii")
    np.testing.assert_array_equal(old.affine, new.affine)
    for field in ("descrip", "qform_code", "sform_code", "xyzt_units", "quatern_b"):
        np.testing.assert_array_equal(old.header[field], new.header[field])
    assert torch.equal(read_image(tmp_path / "a.nii").data, image.data)


def test_types_on_request(tmp_path: Path, rng: torch.Generator) -> None:
    image = fnreg.Image(torch.randint(-100, 100, (1, 3, 4, 5), generator=rng))
    write_image(tmp_path / "a.nii", image, dtype=torch.int16)
    assert nibabel.load(tmp_path / "a.nii").get_data_dtype() == np.int16
    assert torch.equal(read_image(tmp_path / "a.nii").data, image.data)
    bad = [(image, torch.uint8, "do not fit"), (image, torch.complex64, "expected integers")]
    bad += [(image, torch.bfloat16, "expected integers"), (fnreg.Image(image.data / 3), torch.int16, "not whole")]
    for wrong, dtype, told in bad:
        with pytest.raises(ValueError, match=told):
            write_image(tmp_path / "b.nii", wrong, dtype=dtype)
    half = fnreg.Image(image.data.to(torch.bfloat16))
    write_image(tmp_path / "h.nii", half)
    assert torch.equal(read_image(tmp_path / "h.nii").data, half.data.float())


def test_what_nifti_cannot_hold(tmp_path: Path, rng: torch.Generator) -> None:
    image = some_image(3, 1, torch.float32, rng)
    bad: list[tuple[Callable[[], None], type[Exception], str]] = [
        (lambda: write_image(tmp_path / "a.nii", fnreg.stack([image, image])), ValueError, "a batch of images"),
        (lambda: write_image(tmp_path / "a.nii", fnreg.Image(torch.zeros(1, 5))), ValueError, "holds 2 or 3"),
        (lambda: write_image(tmp_path / "a.nii", image, window=(0, 1)), ValueError, "a window is for PNG"),
        (lambda: write_image(tmp_path / "a.hdr", image), WriteError, "ends in '.hdr': writable are"),
        (lambda: write_image(tmp_path / "none" / "a.nii", image), WriteError, "does not exist"),
        (lambda: write_image(tmp_path / "a.png", image, dtype=torch.int16), ValueError, "for medical formats"),
        (lambda: write_labels(tmp_path / "a.nii", Labels(image.data, image.grid)), TypeError, "expected integers"),
        (lambda: write_labels(tmp_path / "a.nii", Labels(image.data[0].long(), image.grid)), ValueError, "shape"),
        (
            lambda: write_labels(tmp_path / "a.png", Labels(image.data.long(), image.grid)),
            ValueError,
            "would have 8 bits, but labels are from -",
        ),
    ]
    for write, kind, told in bad:
        with pytest.raises(kind, match=told):
            write()
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch, fnreg, resource
image = fnreg.Image(torch.rand(1, 40, 64, 64))
path = sys.argv[1]
"""


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for the disk: writing beyond it fails in the same call."""
    if name.endswith((".mha", ".nrrd")):
        pytest.importorskip("SimpleITK")
    code = WRITER + (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    fnreg.io.write_image(path, image)\n"
        "except fnreg.io.WriteError as problem:\n    print('refused', problem)\n"
        "else:\n    print('written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("refused") and name in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path, rng: torch.Generator) -> None:
    small = tmp_path / "small"
    small.mkdir()
    told = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True, check=False
    )
    if told.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        image = fnreg.Image(torch.rand(1, 30, 40, 50, generator=rng))
        for name in ("a.nii", "a.nii.gz", "a.mha", "a.nrrd"):
            with pytest.raises(WriteError, match="No space left"):
                write_image(small / name, image)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_killed_writer_leaves_all_or_nothing(tmp_path: Path) -> None:
    code = WRITER + (
        "import itertools\n"
        "for k in itertools.count():\n"
        "    fnreg.io.write_image(path, fnreg.Image(torch.full((1, 40, 64, 64), float(k))))\n"
        "    print(k, flush=True)\n"
    )
    path = tmp_path / "a.nii"
    for pause in (0.0, 0.004, 0.009):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = read_image(path).data
        assert bool((found == found.flatten()[0]).all())
