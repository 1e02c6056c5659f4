"""MetaImage, NRRD and DICOM, and images in memory: the same places as those who made them, and no damage passes."""

import dataclasses
import gzip
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import fnreg
from fnreg import extras, io
from fnreg.io import ImageReadError, WriteError, read_image, read_labels, read_series, write_image
from fnreg.io.simpleitk import quiet
from fnreg.loading import Files
from fnreg.run import prepare
from fnreg.settings import Settings

sitk = pytest.importorskip("SimpleITK")
nibabel = pytest.importorskip("nibabel")
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def some_image(seed: int, *, dimension: int = 3, channels: int = 1, dtype: torch.dtype = torch.float32) -> fnreg.Image:
    rng = torch.Generator().manual_seed(seed)
    direction = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng, dtype=torch.float64)).Q
    spacing = torch.rand(dimension, generator=rng, dtype=torch.float64) + 0.2
    origin = torch.randn(dimension, generator=rng, dtype=torch.float64) * 100
    grid = fnreg.Grid((6, 5, 4)[:dimension], spacing=spacing, origin=origin, direction=direction)
    return fnreg.Image(torch.randn(channels, *grid.shape, generator=rng, dtype=dtype), grid)


def same(found: fnreg.Image, image: fnreg.Image) -> None:
    """The same values, at places that are equal to 1e-12 of what their numbers are."""
    assert torch.equal(found.data, image.data)
    size = float(image.grid.affine.abs().max())
    torch.testing.assert_close(found.grid.affine, image.grid.affine, atol=1e-12 * size, rtol=0)


# -- MetaImage and NRRD ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@hypothesis.given(
    seed=st.integers(0, 2**32), dimension=st.sampled_from([2, 3]), channels=st.integers(1, 3), double=st.booleans()
)
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, dimension: int, channels: int, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    image = some_image(seed, dimension=dimension, channels=channels, dtype=dtype)
    path = tmp_path_factory.getbasetemp() / name
    write_image(path, image)
    found = read_image(path)
    same(found, image)
    itk = sitk.ReadImage(str(path))
    corner = [n - 1 for n in image.grid.size]
    place = image.grid.index_to_world(torch.tensor(corner, dtype=torch.float64))
    np.testing.assert_allclose(itk.TransformIndexToPhysicalPoint(corner), place, atol=1e-10)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"])
def test_what_itk_writes_is_read(tmp_path: Path, name: str, compressed: bool, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(kind)
    itk = sitk.GetImageFromArray(values)
    itk.SetSpacing((0.3, 0.7, 2.0))
    sitk.WriteImage(itk, str(tmp_path / name), compressed)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.numpy()[0], values)
    assert image.grid.spacing.tolist() == pytest.approx([0.3, 0.7, 2.0], abs=1e-15)
    np.testing.assert_array_equal(read_labels(tmp_path / name).data.numpy()[0], values)


def test_real_slices(data_dir: Path) -> None:
    path = data_dir / "ct_head2d" / "CT_2D_head_fixed.mha"
    image = read_image(path)
    assert image.grid.size == (256, 256) and float(image.data.min()) == -2
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), image.numpy()[0])


def test_nrrd_of_another_space_is_turned_to_lps(tmp_path: Path) -> None:
    image = some_image(1)
    write_image(tmp_path / "a.nrrd", image)
    text = (tmp_path / "a.nrrd").read_bytes()
    units = b'\nspace units: "mm" "mm" "mm"'
    for name, flip in ((b"right-anterior-superior", [-1, -1, 1, 1]), (b"RAS", [-1, -1, 1, 1]), (b"las", [1, -1, 1, 1])):
        (tmp_path / "b.nrrd").write_bytes(text.replace(b"left-posterior-superior", name + units))
        found = read_image(tmp_path / "b.nrrd").grid.affine
        expected = torch.diag(torch.tensor(flip, dtype=torch.float64)) @ image.grid.affine
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_series_of_itk(tmp_path: Path) -> None:
    volumes = [some_image(2).data[0].numpy() + k for k in range(3)]
    itk = sitk.JoinSeries([sitk.GetImageFromArray(values) for values in volumes])
    for name in ("a.mha", "a.nrrd"):
        sitk.WriteImage(itk, str(tmp_path / name))
        with pytest.raises(ImageReadError, match=r"a series of 3 volumes: .* volume=0 to volume=2"):
            read_image(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, volume=1).numpy()[0], volumes[1])
        np.testing.assert_array_equal(read_series(tmp_path / name).numpy()[:, 0], np.stack(volumes))


def attempt(path: Path, data: bytes, expected: fnreg.Image) -> bool:
    """Whether the bytes were taken: then they are the same voxels."""
    path.write_bytes(data)
    try:
        found = read_image(path)
    except ImageReadError as problem:
        assert "\n" not in str(problem)
        return False
    assert torch.equal(found.data, expected.data)
    return True


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_cut_anywhere_is_an_error(tmp_path: Path, name: str, compressed: bool) -> None:
    path = tmp_path / name
    image = some_image(3)
    sitk.WriteImage(io.to_sitk(image), str(path), compressed)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        taken = attempt(path, whole[:length], image)
        assert not taken, length
    assert not attempt(path, whole + bytes(8), image) or compressed


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_flipped_byte_of_compressed_voxels_is_an_error_or_the_same_voxels(tmp_path: Path, name: str) -> None:
    """ITK itself takes nearly all of these for images, with other voxels."""
    path = tmp_path / name
    image = some_image(4)
    sitk.WriteImage(io.to_sitk(image), str(path), True)
    whole = path.read_bytes()
    begin = whole.index(b"LOCAL\n") + 6 if name == "a.mha" else whole.index(b"\n\n") + 2
    taken = 0
    for place in range(begin, len(whole), 2):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        taken += attempt(path, bytes(changed), image)
    assert taken < 10


META = {
    "sizes": (b"DimSize = 6 5 4", b"DimSize = 6 5 5", "claims 600 bytes of voxels, but it has 480"),
    "fewer": (b"DimSize = 6 5 4", b"DimSize = 6 5 3", "claims 360 bytes"),
    "bomb": (b"DimSize = 6 5 4", b"DimSize = 60000 50000 40000", "bytes of voxels, but it has 480"),
    "no size": (b"DimSize = 6 5 4", b"DimSize = ", "DimSize = , expected numbers"),
    "negative size": (b"DimSize = 6 5 4", b"DimSize = 6 -5 -4", "claims .* voxels"),
    "type": (b"MET_FLOAT", b"MET_STRING", "holds the type MET_STRING"),
    "twice": (b"NDims = 3", b"NDims = 3\nDimSize = 6 5 4", "has DimSize twice"),
    "zero spacing": (b"ElementSpacing = ", b"ElementSpacing = 0 1 1\nX = ", "expected positive numbers"),
    "negative spacing": (b"ElementSpacing = ", b"ElementSpacing = 1 -1 1\nX = ", "expected positive numbers"),
    "spacing, nan": (b"ElementSpacing = ", b"ElementSpacing = 1 nan 1\nX = ", "expected 3 finite numbers"),
    "size of voxels": (b"ElementSpacing = ", b"ElementSize = -1 1 1\nX = ", "ElementSize = -1 1 1: expected positive"),
    "position, nan": (b"Offset = ", b"Position = nan 0 0\nX = ", "Position = nan 0 0: expected 3 finite numbers"),
    "axes": (b"NDims = 3", b"NDims = 2", "NDims = 2 and DimSize = \\[6, 5, 4\\]"),
    "unit": (b"NDims = 3", b"NDims = 3\nDistanceUnits = um", "DistanceUnits um, which ITK takes for mm"),
    "slope": (b"NDims = 3", b"NDims = 3\nElementToIntensityFunctionSlope = 2", "Slope = 2, which ITK ignores"),
    "intercept": (b"NDims = 3", b"NDims = 3\nElementToIntensityFunctionOffset = 2", "Offset = 2, which ITK ignores"),
    "offset, inf": (b"Offset = ", b"Offset = inf 0 0\nX = ", "expected 3 finite numbers"),
    "few numbers": (b"Offset = ", b"Offset = 0 0\nX = ", "expected 3 finite numbers"),
    "sheared": (
        b"TransformMatrix = ",
        b"TransformMatrix = 1 0 0 0.1 1 0 0 0 1\nX = ",
        "degrees from right angles|sheared",
    ),
    "text": (b"BinaryData = True", b"BinaryData = False", "as text"),
    "skip": (b"BinaryData = True", b"BinaryData = True\nHeaderSize = 9", "another header"),
    "elsewhere": (b"ElementDataFile = LOCAL", b"ElementDataFile = ../a.raw", "voxels elsewhere, in ../a.raw"),
    "anywhere": (b"ElementDataFile = LOCAL", b"ElementDataFile = /etc/passwd", "voxels elsewhere"),
    "missing": (b"ElementDataFile = LOCAL", b"ElementDataFile = b.raw", "b.raw does not exist"),
    "channels": (b"NDims = 3", b"NDims = 3\nElementNumberOfChannels = 3 10", "expected one number"),
    "many": (b"ElementDataFile = LOCAL", b"ElementDataFile = LIST", "in several files"),
}


@pytest.mark.parametrize("case", META)
def test_meta_headers_that_cannot_be(tmp_path: Path, case: str) -> None:
    old, new, told = META[case]
    write_image(tmp_path / "a.mha", some_image(5))
    data = (tmp_path / "a.mha").read_bytes()
    assert data.count(old) == 1
    (tmp_path / "a.mha").write_bytes(data.replace(old, new))
    with pytest.raises(ImageReadError, match=told) as caught:
        read_image(tmp_path / "a.mha")
    assert "\n" not in str(caught.value)


NRRD = {
    "sizes": (b"sizes: 6 5 4", b"sizes: 6 5 5", "claims 600 bytes of voxels, but it has 480"),
    "no size": (b"sizes: 6 5 4", b"# sizes", "its header has no sizes"),
    "dimension": (b"dimension: 3", b"dimension: 2", "has dimension 2 and sizes"),
    "type": (b"type: float", b"type: block", "holds the type block"),
    "encoding": (b"encoding: raw", b"encoding: hex", "has the encoding hex: save it raw or with gzip"),
    "skip": (b"encoding: raw", b"encoding: raw\nbyte skip: 4", "bytes to skip"),
    "twice": (b"type: float", b"type: float\ntype: int", "has the line 'type: int'"),
    "nonsense": (b"type: float", b"type: float\nnonsense", "has the line 'nonsense'"),
    "origin": (b"space origin: (", b"space origin: (nan,0,0)\n#(", "expected finite numbers"),
    "elsewhere": (b"encoding: raw", b"encoding: raw\ndata file: ../x", "voxels elsewhere"),
    "space": (b"left-posterior-superior", b"scanner-xyz", "in the space scanner-xyz, which ITK takes for LPS"),
    "time": (b"left-posterior-superior", b"right-anterior-superior-time", "which ITK takes for LPS"),
    "hands": (b"left-posterior-superior", b"3D-right-handed", "which ITK takes for LPS"),
    "unit": (b"encoding: raw", b'encoding: raw\nspace units: "mm" "mm" "um"', "space units um, which ITK takes for mm"),
    "unit of axes": (b"encoding: raw", b'encoding: raw\nunits: "m" "m" "m"', "units m, which ITK takes for mm"),
    "magic": (b"NRRD0004", b"NRXD0004", "is not an NRRD file"),
}


@pytest.mark.parametrize("case", NRRD)
def test_nrrd_headers_that_cannot_be(tmp_path: Path, case: str) -> None:
    old, new, told = NRRD[case]
    write_image(tmp_path / "a.nrrd", some_image(6))
    data = (tmp_path / "a.nrrd").read_bytes()
    assert data.count(old) == 1
    (tmp_path / "a.nrrd").write_bytes(data.replace(old, new))
    with pytest.raises(ImageReadError, match=told):
        read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize(
    "data", [b"", b"Dear reader,\nthis is no image.\n", bytes(400), gzip.compress(bytes(400), mtime=0)]
)
@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_what_is_no_image(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageReadError, match=r"is empty|is not a MetaImage|is not an NRRD"):
        read_image(tmp_path / name)


def test_complex_values_are_refused(tmp_path: Path) -> None:
    itk = sitk.GetImageFromArray(np.ones((3, 4), np.complex64))
    with pytest.raises(ImageReadError, match="holds complex"):
        io.from_sitk(itk)


def test_without_simpleitk_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = some_image(7)
    write_image(tmp_path / "a.mha", image)
    (tmp_path / "dicom").mkdir()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    uses: list[Callable[[], Any]] = [
        lambda: read_image(tmp_path / "a.mha"),
        lambda: read_image(tmp_path / "dicom"),
        lambda: write_image(tmp_path / "b.nrrd", image),
        lambda: io.to_sitk(image),
    ]
    for use in uses:
        with pytest.raises(extras.MissingExtraError, match=r'pip install "fnreg\[itk\]"'):
            use()
    assert not (tmp_path / "b.nrrd").exists()


def test_options_of_other_formats(tmp_path: Path) -> None:
    write_image(tmp_path / "a.mha", some_image(8))
    with pytest.raises(ValueError, match="is not NIfTI: only there are two"):
        read_image(tmp_path / "a.mha", form="qform")
    with pytest.raises(ValueError, match="is not a folder of DICOM"):
        read_image(tmp_path / "a.mha", series="1.2")
    with pytest.raises(ImageReadError, match="it has no volumes"):
        read_image(tmp_path / "a.png", volume=1)
    with pytest.raises(WriteError, match="writable are"):
        write_image(tmp_path / "a.mhd", some_image(8))


# -- DICOM -----------------------------------------------------------------------------------------------------------


def write_dicom(
    folder: Path,
    image: fnreg.Image,
    *,
    uid: str = "1.2.3",
    skip: tuple[int, ...] = (),
    shear: float = 0.0,
    slope: float = 1.0,
    thickness: str | None = None,
) -> None:
    """A series as a scanner writes it, named so that the order of names is not that of the slices."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    values = image.data[0].numpy().astype(np.int16)
    turn = image.grid.direction
    for k, plane in enumerate(values):
        if k in skip:
            continue
        one = sitk.GetImageFromArray(plane[None])
        one.SetSpacing(image.grid.spacing.tolist())
        place = image.grid.index_to_world(torch.tensor([shear * k, 0, k], dtype=torch.float64))
        digits = {"0020|0032": place, "0020|0037": turn[:, :2].T.flatten()}
        tags = {name: "\\".join(f"{v:.9g}" for v in found.tolist()) for name, found in digits.items()}
        tags |= {
            "0008|0060": "CT",
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0008|0018": f"{uid}.{k}",
            "0020|0013": str(k),
        }
        tags |= {} if thickness is None else {"0018|0050": thickness}
        tags |= {"0028|1052": "-3", "0028|1053": str(slope)}
        for name, text in tags.items():
            one.SetMetaData(name, text)
        writer.SetFileName(str(folder / f"{uid}-{(7 * k) % 5}{k}.dcm"))
        writer.Execute(one)


def scan(seed: int = 0, *, axial: bool = False) -> fnreg.Image:
    image = some_image(seed)
    direction = torch.eye(3) if axial else image.grid.direction
    if float(torch.det(direction.double())) < 0:
        direction = torch.cat([direction[:, :2], -direction[:, 2:]], 1)
    grid = fnreg.Grid((6, 5, 4), spacing=(0.8, 0.9, 2.5), origin=(-10.0, 20.0, -70.0), direction=direction)
    return fnreg.Image(torch.randint(-1000, 1000, (1, 4, 5, 6)), grid)


@pytest.mark.parametrize("axial", [True, False])
def test_a_series_of_slices_is_a_volume(tmp_path: Path, axial: bool) -> None:
    image = scan(axial=axial)
    write_dicom(tmp_path / "ct", image)
    found = read_image(tmp_path / "ct")
    torch.testing.assert_close(found.grid.affine, image.grid.affine, atol=1e-7, rtol=0)
    itk = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), found.numpy()[0])
    np.testing.assert_allclose(itk.GetOrigin(), found.grid.origin, atol=1e-6)
    np.testing.assert_allclose(itk.GetSpacing(), found.grid.spacing, atol=1e-6)
    np.testing.assert_allclose(itk.GetDirection(), found.grid.direction.flatten(), atol=1e-6)
    assert torch.equal(read_labels(tmp_path / "ct").data[0], torch.from_numpy(sitk.GetArrayFromImage(itk)).int())


def test_one_slice_is_as_thick_as_it_says(tmp_path: Path) -> None:
    image, others = scan(), (0, 2, 3)
    write_dicom(tmp_path / "thick", image, skip=others, thickness="2.5")
    found = read_image(tmp_path / "thick").grid
    assert found.size == (6, 5, 1)
    torch.testing.assert_close(found.affine[:, :3], image.grid.affine[:, :3], atol=1e-7, rtol=0)
    place = image.grid.index_to_world(torch.tensor([0.0, 0, 1], dtype=torch.float64))
    torch.testing.assert_close(found.origin, place, atol=1e-6, rtol=0)
    for name, told in (("untold", None), ("zero", "0")):
        write_dicom(tmp_path / name, image, skip=others, thickness=told)
        with pytest.warns(io.GeometryWarning, match="one slice, which does not say how thick it is: taken is 1 mm"):
            assert read_image(tmp_path / name).grid.spacing.tolist() == pytest.approx([0.8, 0.9, 1.0])


def test_a_mask_in_the_folder_of_a_series_is_no_slice_of_it(tmp_path: Path) -> None:
    """What run.json tells of a folder is of its slices, and a path that nobody read is an error."""
    image, folder, out = scan(), tmp_path / "ct", tmp_path / "out"
    write_dicom(folder, image)
    settings = Settings(transform="translation", save="params")
    plain = prepare(Files(folder, folder, out), settings).record()
    mask = folder / "mask.nii.gz"
    io.write_labels(mask, io.Labels(torch.ones(1, 4, 5, 6, dtype=torch.int64), read_image(folder).grid))
    plan = prepare(Files(folder, folder, out, fixed_mask=mask), settings)
    masked = plan.record()
    assert masked["inputs"]["fixed"] == plain["inputs"]["fixed"] and plain["inputs"]["fixed"]["files"] == 4
    assert masked["inputs"]["fixed_mask"]["bytes"] == mask.stat().st_size and masked["beside"] == []
    with pytest.raises(RuntimeError, match="none was not read, and no file in it"):
        dataclasses.replace(plan, files=Files(tmp_path / "none", folder, out)).record()


def test_series_that_are_no_volume(tmp_path: Path) -> None:
    image = scan(1)
    other = fnreg.Image(image.data, fnreg.Grid(image.grid.size, spacing=(0.8, 0.9, 2.5), origin=image.grid.origin))
    write_dicom(tmp_path / "gap", image, skip=(2,))
    with pytest.raises(ImageReadError, match=r"is no volume: from .* it is 5 mm, elsewhere 2.5 mm|slices are missing"):
        read_image(tmp_path / "gap")
    write_dicom(tmp_path / "mixed", image)
    write_dicom(tmp_path / "mixed", image, uid="1.9")
    with pytest.raises(ImageReadError, match=r"holds 2 DICOM series: choose one by series=, of "):
        read_image(tmp_path / "mixed")
    known = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(tmp_path / "mixed"))
    same(read_image(tmp_path / "mixed", series=known[0]), read_image(tmp_path / "mixed", series=known[1]))
    with pytest.raises(ImageReadError, match=r"has no DICOM series '9\.9'"):
        read_image(tmp_path / "mixed", series="9.9")
    write_dicom(tmp_path / "turned", image, skip=(2, 3))
    write_dicom(tmp_path / "turned", other, skip=(0, 1))
    with pytest.raises(ImageReadError, match=r"(has another size, spacing or orientation than|holds 2 DICOM series)"):
        read_image(tmp_path / "turned")
    write_dicom(tmp_path / "tilted", image, shear=0.5)
    with pytest.raises(ImageReadError, match=r"is sheared: its slices rise 9\.09 degrees aside"):
        read_image(tmp_path / "tilted")
    write_dicom(tmp_path / "twice", image)
    first = sorted((tmp_path / "twice").iterdir())[0]
    (tmp_path / "twice" / "copy.dcm").write_bytes(first.read_bytes())
    with pytest.raises(ImageReadError, match="are slices at one place"):
        read_image(tmp_path / "twice")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("no slice")
    with pytest.raises(ImageReadError, match="a folder without DICOM files"):
        read_image(tmp_path / "none")


def test_a_slice_that_is_cut_is_an_error(tmp_path: Path) -> None:
    image = scan(2)
    write_dicom(tmp_path / "ct", image)
    first = sorted((tmp_path / "ct").iterdir())[0]
    whole = first.read_bytes()
    for length in (len(whole) - 1, len(whole) - 20, len(whole) // 2, 200, 0):
        first.write_bytes(whole[:length])
        with pytest.raises(ImageReadError, match=r"incomplete|cannot be read|slices are missing|is empty|damaged"):
            read_image(tmp_path / "ct")


# -- in memory -------------------------------------------------------------------------------------------------------


@hypothesis.given(seed=st.integers(0, 2**32), dimension=st.sampled_from([2, 3]), channels=st.integers(1, 3))
def test_from_and_to_sitk_and_nibabel(seed: int, dimension: int, channels: int) -> None:
    image = some_image(seed, dimension=dimension, channels=channels)
    same(io.from_sitk(io.to_sitk(image)), image)
    there = io.to_nibabel(image)
    same(io.from_nibabel(there), image)
    corner = [n - 1 for n in image.grid.size]
    place = image.grid.index_to_world(torch.tensor(corner, dtype=torch.float64)).tolist()
    np.testing.assert_allclose(io.to_sitk(image).TransformIndexToPhysicalPoint(corner), place, atol=1e-10)
    ras = there.affine @ [*corner, *([0] * (3 - dimension)), 1]
    np.testing.assert_allclose((FLIP @ ras)[:dimension], place, atol=1e-10)
    values = np.asarray(there.dataobj)
    last = values[tuple(corner)]
    np.testing.assert_array_equal(np.ravel(last), image.numpy()[(slice(None), *([-1] * dimension))])


def test_nibabels_images_as_they_come(data_dir: Path) -> None:
    for name in ("anatomical.nii", "someones_epi.nii.gz"):
        path = data_dir / "nibabel_small" / name
        same(io.from_nibabel(nibabel.load(path)), io.from_nibabel(nibabel.load(path)))
        read, taken = read_image(path), io.from_nibabel(nibabel.load(path))
        torch.testing.assert_close(taken.data.float(), read.data)
        torch.testing.assert_close(taken.grid.affine, read.grid.affine, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"a series, take one volume by image\.slicer"):
        io.from_nibabel(nibabel.load(data_dir / "nibabel_small" / "functional.nii"))
    for most, kind in ((2**53, np.uint64), (-(2**53), np.int64)):
        wide = nibabel.Nifti1Image(np.full((2, 2, 2), most, kind), np.eye(4), dtype=kind)
        assert int(io.from_nibabel(wide).data[0, 0, 0, 0]) == most
        wide = nibabel.Nifti1Image(np.full((2, 2, 2), most + (1 if most > 0 else -1), kind), np.eye(4), dtype=kind)
        with pytest.raises(ValueError, match=f"holds integers up to {2**53 + 1}, which no float holds"):
            io.from_nibabel(wide)
    small = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.float32), np.diag([20.0, 30.0, 40.0, 1.0]))
    small.header.set_xyzt_units("micron")
    assert io.from_nibabel(small).grid.spacing.tolist() == pytest.approx([0.02, 0.03, 0.04])
    flipped = nibabel.Nifti1Image(np.arange(60, dtype=">i2").reshape(5, 4, 3)[::-1, :, ::-1], np.eye(4))
    assert io.from_nibabel(flipped).numpy()[0].T.tolist() == np.asarray(flipped.dataobj).tolist()
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    with pytest.raises(ImageReadError, match="from right angles"):
        io.from_nibabel(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.float32), sheared))


class MetaTensor:
    """As MONAI documents it: a tensor (C, X, Y, Z) with an affine, RAS unless `meta` says another space."""

    def __init__(self, data: torch.Tensor, affine: torch.Tensor, meta: dict[str, Any] | None = None) -> None:
        self.data, self.affine, self.meta = data, affine, meta or {}

    def as_tensor(self) -> torch.Tensor:
        return self.data


class ScalarImage:
    """As TorchIO documents it: `data` (C, W, H, D) and a NumPy affine to RAS."""

    def __init__(self, tensor: torch.Tensor, affine: np.ndarray) -> None:
        assert tensor.ndim == 4 and affine.shape == (4, 4)
        self.data, self.affine = tensor, affine


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dimension", [2, 3])
def test_monai_and_torchio(monkeypatch: pytest.MonkeyPatch, dimension: int, channels: int) -> None:
    image = some_image(9, dimension=dimension, channels=channels)
    with pytest.raises(ImportError, match="run pip install monai"):
        io.to_monai(image)
    with pytest.raises(ImportError, match="run pip install torchio"):
        io.to_torchio(image)
    stands = {"monai": {}, "monai.data": {"MetaTensor": MetaTensor}, "torchio": {"ScalarImage": ScalarImage}}
    for name, content in stands.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(__import__("sys").modules, name, module)
    monai, torchio = io.to_monai(image), io.to_torchio(image)
    assert monai.data.shape == (channels, *image.grid.size)
    corner = [n - 1 for n in image.grid.size]
    place = image.grid.index_to_world(torch.tensor(corner, dtype=torch.float64)).numpy()
    full = [*corner, *([0] * (3 - dimension)), 1]
    for affine, data in ((monai.affine.numpy(), monai.data), (torchio.affine, torchio.data)):
        np.testing.assert_allclose((FLIP @ affine @ full)[:dimension], place, atol=1e-10)
        assert torch.equal(data[(slice(None), *full[: data.ndim - 1])], image.data[(slice(None), *([-1] * dimension))])
    same(io.from_monai(monai), image)
    same(io.from_torchio(torchio), image)
    lps = MetaTensor(monai.data, torch.from_numpy(FLIP) @ monai.affine, {"space": "LPS"})
    same(io.from_monai(lps), image)
    if dimension == 2:  # MONAI's readers of pictures give (3, 3)
        axes = np.ix_([0, 1, 3], [0, 1, 3])
        same(io.from_monai(MetaTensor(monai.data, torch.from_numpy(monai.affine.numpy()[axes]))), image)


def test_what_cannot_be_taken() -> None:
    data = torch.zeros(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"expected \(C, X, Y\) or \(C, X, Y, Z\), no batch"):
        io.from_monai(MetaTensor(data[None], torch.eye(4)))
    with pytest.raises(ValueError, match="in the space 'SCREEN'"):
        io.from_monai(MetaTensor(data, torch.eye(4), {"space": "screen"}))
    with pytest.raises(ValueError, match=r"affine of shape \(5, 5\): expected \(4, 4\)"):
        io.from_monai(MetaTensor(data, torch.eye(5)))
    upright = torch.eye(4)[[0, 2, 1, 3]]
    with pytest.raises(ValueError, match="give it a third axis"):
        io.from_monai(MetaTensor(data[..., 0], upright))
    batch = fnreg.stack([some_image(0), some_image(1)])
    for convert in (io.to_sitk, io.to_nibabel):
        with pytest.raises(ValueError, match="a batch of images"):
            convert(batch)
    with pytest.raises(ValueError, match="2 or 3"):
        io.to_sitk(fnreg.Image(torch.zeros(1, 5)))


def test_gradients_go_through_monais_tensors() -> None:
    data = torch.rand(1, 3, 4, 5, requires_grad=True)
    image = io.from_monai(MetaTensor(data, torch.eye(4)))
    image.data.square().sum().backward()
    assert data.grad is not None and torch.allclose(data.grad, 2 * data)


@pytest.mark.parametrize("place", [35.0, 0.0])
def test_one_slice_of_torchio_keeps_its_place(monkeypatch: pytest.MonkeyPatch, place: float) -> None:
    module = types.ModuleType("torchio")
    vars(module)["ScalarImage"] = ScalarImage
    monkeypatch.setitem(__import__("sys").modules, "torchio", module)
    grid = fnreg.Grid((6, 5, 1), spacing=(1.0, 1.5, 3.0), origin=(1.0, 2.0, place))
    image = fnreg.Image(torch.rand(1, *grid.shape), grid)
    same(io.from_torchio(io.to_torchio(image)), image)


def test_colours_of_nibabel() -> None:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    numbers = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), np.uint8)

    def image(values: np.ndarray) -> Any:
        return nibabel.Nifti1Image(np.ascontiguousarray(values).view(kind)[..., 0], np.eye(4))

    plane, volume = io.from_nibabel(image(numbers[:, :, 0])), io.from_nibabel(image(numbers))
    assert plane.grid.size == (6, 5) and volume.grid.size == (6, 5, 4)
    assert torch.equal(plane.data, torch.from_numpy(numbers[:, :, 0].T.copy()))
    assert torch.equal(volume.data, torch.from_numpy(numbers.T.copy()))
    same(io.from_nibabel(image(numbers[:, :, :, None])), volume)
    with pytest.raises(ValueError, match=r"\(6, 5, 4, 2.*a series"):
        io.from_nibabel(image(np.stack([numbers, numbers], 3)))


def colour_slice(folder: Path, numbers: np.ndarray, photometric: str = "RGB") -> None:
    """A folder of one slice (1, Y, X, 3), whose numbers mean what is told."""
    one = sitk.GetImageFromArray(numbers, isVector=True)
    tags = {"0008|0060": "MR", "0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0018": "1.2.3.4", "0018|0050": "2"}
    tags |= {"0020|0032": "1\\2\\3", "0020|0037": "1\\0\\0\\0\\1\\0"}
    for name, text in tags.items():
        one.SetMetaData(name, text)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    folder.mkdir()
    writer.SetFileName(str(folder / "a.dcm"))
    writer.Execute(one)
    told, tag = photometric.encode() + b" " * (len(photometric) % 2), b"\x28\x00\x04\x00"
    data, plain = (folder / "a.dcm").read_bytes(), tag + b"\x04\x00\x00\x00RGB "
    assert data.count(plain) == 1
    (folder / "a.dcm").write_bytes(data.replace(plain, tag + len(told).to_bytes(4, "little") + told))


def test_colours_of_dicom_become_luminance_or_channels(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 255, (1, 5, 6, 3), np.uint8)
    colour_slice(tmp_path / "colour", numbers)
    colour = read_image(tmp_path / "colour", channels=True)
    np.testing.assert_array_equal(colour.numpy(), np.moveaxis(numbers, -1, 0))
    grey = read_image(tmp_path / "colour")
    picture = tmp_path / "a.png"
    io.write_image(picture, fnreg.Image(colour.data[:, 0], fnreg.Grid((6, 5))), window=(0, 255))
    assert torch.equal(grey.data[:, 0], read_image(picture).data)


def test_colours_of_dicom_by_other_numbers(tmp_path: Path) -> None:
    """Luminance and two differences (DICOM PS3.3, C.7.6.3.1.2) are the same colours; other numbers stay channels."""
    colours = np.random.default_rng(1).integers(0, 256, (1, 5, 6, 3)).astype(np.uint8)
    turn = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    turned = (colours @ turn.T + [0, 128, 128]).round().clip(0, 255).astype(np.uint8)
    for name, numbers in (("RGB", colours), ("YBR_FULL", turned), ("HSV", colours)):
        colour_slice(tmp_path / name, numbers, name)
    found = read_image(tmp_path / "YBR_FULL", channels=True).numpy()
    np.testing.assert_allclose(found, np.moveaxis(colours, -1, 0), atol=2)
    grey = read_image(tmp_path / "YBR_FULL")
    assert grey.channels == 1
    np.testing.assert_allclose(grey.numpy(), read_image(tmp_path / "RGB").numpy(), atol=2)
    np.testing.assert_array_equal(read_image(tmp_path / "HSV").numpy(), np.moveaxis(colours, -1, 0))


def test_an_axis_that_nifti_1_cannot_count(tmp_path: Path) -> None:
    grid = fnreg.Grid((32768, 4))
    with pytest.raises(ValueError, match=r"\[32768, 4\] voxels.*counts to 32767: name it .mha or .nrrd"):
        write_image(tmp_path / "a.nii", fnreg.Image(torch.zeros(1, *grid.shape), grid))
    write_image(tmp_path / "a.mha", fnreg.Image(torch.zeros(1, *grid.shape), grid))


def test_a_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "exists", closed)
    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(ImageReadError, match="cannot be read: Permission denied"):
        io.files.read_bytes(tmp_path / "a.nii", ImageReadError)


def test_quiet_ends_with_the_last_who_asked_for_it() -> None:
    switch = sitk.ProcessObject
    before = switch.GetGlobalWarningDisplay()
    switch.SetGlobalWarningDisplay(True)
    try:
        first, second = quiet(sitk), quiet(sitk)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not switch.GetGlobalWarningDisplay()  # the second still reads
        second.__exit__(None, None, None)
        assert switch.GetGlobalWarningDisplay()
    finally:
        switch.SetGlobalWarningDisplay(before)
