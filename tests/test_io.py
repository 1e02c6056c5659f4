"""Files: what is read is what was stored, damage is an error, and a write is all or nothing."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fnreg
from fnreg import extras
from fnreg.io import (
    ImageReadError,
    TransformReadError,
    WriteError,
    read_image,
    read_transform,
    write_displacement,
    write_image,
    write_itk,
    write_map,
    write_transform,
)
from fnreg.pytree import tree_leaves

Pillow = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (9, 7)).astype(np.uint8)
WORDS = RANDOM.integers(0, 65536, (9, 7)).astype(np.uint16)
LONGS = RANDOM.integers(-(2**31), 2**31 - 1, (9, 7)).astype(np.int32)
FLOATS = RANDOM.normal(size=(9, 7)).astype(np.float32)
COLOURS = RANDOM.integers(0, 256, (9, 7, 3)).astype(np.uint8)
LUMINANCE = np.asarray(Pillow.fromarray(COLOURS).convert("L"))


# -- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.tif", "a.tiff"])
def test_bytes_are_exact(tmp_path: Path, name: str) -> None:
    Pillow.fromarray(BYTES).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.data.dtype == torch.float32 and np.array_equal(image.numpy()[0], BYTES)
    assert image.grid.same_as(fnreg.Grid((7, 9)))


@pytest.mark.parametrize(
    ("name", "values"),
    [("w.png", WORDS), ("w.tif", WORDS), ("f.tif", FLOATS), ("l.tif", LONGS), ("one.png", BYTES > 99)],
)
def test_other_depths_are_exact(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Pillow.fromarray(values).save(tmp_path / name)
    expected = values * 255 if values.dtype == bool else values
    assert np.array_equal(read_image(tmp_path / name).numpy()[0], expected)


def tiff(values: np.ndarray, kind: int, order: str = "<") -> bytes:
    """A small TIFF of one strip, with any bits and TIFF's kind of sample: 1 unsigned, 2 signed, 3 float."""
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, values.dtype.itemsize * 8), (259, 1), (262, 1), (273, 200)]
    tags += [(277, 1), (278, height), (279, len(pixels)), (339, kind)]
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    body = struct.pack(f"{order}H", len(tags))
    body += b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    return (head + body).ljust(200, b"\0") + pixels


@pytest.mark.parametrize("kind", ["int8", "int16", "uint32"])
def test_signs_of_tiff_are_kept(tmp_path: Path, kind: str) -> None:
    values = LONGS.astype(kind)
    (tmp_path / "a.tif").write_bytes(tiff(values, 1 if kind[0] == "u" else 2))
    assert np.array_equal(read_image(tmp_path / "a.tif").numpy()[0], values)


def test_big_endian_tiff(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(FLOATS, 3, ">"))
    assert np.array_equal(read_image(tmp_path / "a.tif").numpy()[0], FLOATS)


def test_colours_become_luminance_or_channels(tmp_path: Path) -> None:
    alpha = np.dstack([COLOURS, BYTES])
    for name, values in (("rgb.png", COLOURS), ("rgba.png", alpha)):
        Pillow.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name).numpy()[0], LUMINANCE)
        assert np.array_equal(read_image(tmp_path / name, channels=True).numpy(), COLOURS.transpose(2, 0, 1))
    Pillow.fromarray(BYTES).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png", channels=True).numpy(), np.stack([BYTES] * 3))


def test_palettes_give_their_colours(tmp_path: Path) -> None:
    picture = Pillow.fromarray(COLOURS).quantize(16)
    picture.save(tmp_path / "p.png")
    with Pillow.open(tmp_path / "p.png") as stored:
        assert stored.mode == "P"
    assert np.array_equal(read_image(tmp_path / "p.png").numpy()[0], np.asarray(picture.convert("L")))
    colours = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "p.png", channels=True).numpy(), colours)


def test_jpeg(tmp_path: Path) -> None:
    Pillow.fromarray(BYTES).save(tmp_path / "a.jpg")
    with Pillow.open(tmp_path / "a.jpg") as stored:
        assert np.array_equal(read_image(tmp_path / "a.jpg").numpy()[0], np.asarray(stored))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_orientation_is_applied(tmp_path: Path, name: str) -> None:
    picture = Pillow.fromarray(BYTES)
    notes = picture.getexif()
    notes[0x112] = 6
    picture.save(tmp_path / name, exif=notes)
    assert np.array_equal(read_image(tmp_path / name).numpy()[0], np.rot90(BYTES, -1))


def test_real_slices(data_dir: Path) -> None:
    image = read_image(data_dir / "itk_slices" / "BrainProtonDensitySliceBorder20.png")
    assert image.grid.size == (221, 257) and float(image.data.max()) == 249


def png16_in_colour() -> bytes:
    """What Pillow would cut to 8 bits: only the head matters here."""
    stream = io.BytesIO()
    Pillow.fromarray(COLOURS).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[24] = 16
    rows = zlib.compress(b"".join(b"\0" + bytes(7 * 6) for _ in range(9)))
    chunks = bytes(data[:29]) + struct.pack(">I", zlib.crc32(data[12:29]))
    for name, body in ((b"IDAT", rows), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return chunks


def two_pages() -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(BYTES).save(stream, "TIFF", save_all=True, append_images=[Pillow.fromarray(BYTES)])
    return stream.getvalue()


def cut_png() -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(BYTES).save(stream, "PNG")
    return stream.getvalue()[:90]


BAD: dict[str, tuple[str, Callable[[], bytes] | None, str]] = {
    "missing": ("a.png", None, "does not exist"),
    "empty": ("a.png", lambda: b"", "is empty"),
    "text": ("a.png", lambda: b"no picture at all\n", "not a PNG, JPEG or TIFF picture"),
    "cut": ("a.png", cut_png, "damaged"),
    "colour of 16 bits": ("a.png", png16_in_colour, "colours of 16 bits"),
    "pages": ("a.tif", two_pages, "holds 2 pictures"),
    "64 bits": ("a.tif", lambda: tiff(FLOATS.astype(np.float64), 3), "TIFF of an unsupported kind"),
    "suffix": ("a.bmp", lambda: b"BM", r"readable are .png, .jpg, .jpeg, .tif, .tiff, .nii, .nii.gz"),
    "no suffix": ("a", lambda: b"BM", "has no suffix"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_are_one_error(tmp_path: Path, case: str) -> None:
    name, make, told = BAD[case]
    if make is not None:
        (tmp_path / name).write_bytes(make())
    with pytest.raises(ImageReadError, match=told) as caught:
        read_image(tmp_path / name)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, OSError)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageReadError, match="is a folder"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_cut_anywhere_is_an_error_or_the_same_pixels(tmp_path: Path, name: str) -> None:
    Pillow.fromarray(BYTES).save(tmp_path / name)
    whole, expected = (tmp_path / name).read_bytes(), read_image(tmp_path / name).data
    for length in range(0, len(whole), 1 if name == "a.png" else 7):
        (tmp_path / name).write_bytes(whole[:length])
        try:
            found = read_image(tmp_path / name).data
        except ImageReadError:
            continue
        assert torch.equal(found, expected), length


def test_flipped_bit_anywhere_in_a_png_is_an_error_or_the_same_pixels(tmp_path: Path) -> None:
    Pillow.fromarray(WORDS).save(tmp_path / "a.png")
    whole, expected = (tmp_path / "a.png").read_bytes(), read_image(tmp_path / "a.png").data
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a.png").write_bytes(changed)
        try:
            found = read_image(tmp_path / "a.png").data
        except ImageReadError:
            continue
        assert torch.equal(found, expected), place


def test_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 2**17, 2**17, 8, 0, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (tmp_path / "a.png").write_bytes(chunks)
    with pytest.raises(ImageReadError, match="very large"):
        read_image(tmp_path / "a.png")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pillow.fromarray(BYTES).save(tmp_path / "a.png")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(extras.MissingExtraError, match=r'pip install "fnreg\[plot\]"'):
        read_image(tmp_path / "a.png")


# -- writing pictures -----------------------------------------------------------------------------------------------


def image_of(values: np.ndarray) -> fnreg.Image:
    return fnreg.Image(torch.from_numpy(values.astype(np.float32))[None])


def test_png_with_the_window_of_bytes_keeps_bytes(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", image_of(BYTES), window=(0, 255))
    assert np.array_equal(read_image(tmp_path / "a.png").numpy()[0], BYTES)


def test_png_window_is_the_range_unless_given_and_cuts_what_is_beyond(tmp_path: Path) -> None:
    values = np.array([[1.0, 2.0, np.nan], [3.0, np.inf, -np.inf]])
    write_image(tmp_path / "a.png", image_of(values))
    assert read_image(tmp_path / "a.png").data.tolist() == [[[0, 128, 0], [255, 255, 0]]]
    write_image(tmp_path / "a.png", image_of(np.full((2, 2), 7.0)))
    assert not bool(read_image(tmp_path / "a.png").data.any())


def test_png_in_colour(tmp_path: Path) -> None:
    image = fnreg.Image(torch.from_numpy(COLOURS.transpose(2, 0, 1).copy()))
    write_image(tmp_path / "a.png", image, window=(0, 255))
    assert torch.equal(read_image(tmp_path / "a.png", channels=True).data, image.data)


def test_tiff_keeps_floats(tmp_path: Path) -> None:
    values = FLOATS.copy()
    values[0, :3] = np.nan, np.inf, 1e-40
    write_image(tmp_path / "a.tif", image_of(values))
    assert np.array_equal(read_image(tmp_path / "a.tif").numpy()[0], values, equal_nan=True)


def test_writing_refuses_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a picture is"):
        write_image(tmp_path / "a.png", fnreg.Image(torch.zeros(1, 3, 4, 5)))
    with pytest.raises(ValueError, match="one channel"):
        write_image(tmp_path / "a.tif", fnreg.Image(torch.zeros(3, 4, 5)))
    with pytest.raises(ValueError, match="the first below the second"):
        write_image(tmp_path / "a.png", image_of(BYTES), window=(1, 1))
    with pytest.raises(WriteError, match=r"writable are \.png, \.tif, \.tiff"):
        write_image(tmp_path / "a.jpg", image_of(BYTES))
    assert not list(tmp_path.iterdir())


def test_writing_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    for path, told in (
        (tmp_path / "file" / "a.png", "is not a folder"),
        (tmp_path / "none" / "a.png", "does not exist"),
        (tmp_path / "folder.png", "is a folder"),
    ):
        with pytest.raises(WriteError, match=told):
            write_image(path, image_of(BYTES))


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fault, full)
    with pytest.raises(WriteError, match="No space left"):
        write_image(target, image_of(BYTES))
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


# -- transforms -----------------------------------------------------------------------------------------------------

LINEAR = [
    fnreg.Translation(),
    fnreg.Rotation(),
    fnreg.Rigid(),
    fnreg.Similarity(),
    fnreg.Scaling(),
    fnreg.IsotropicScaling(),
    fnreg.Shearing(),
    fnreg.Affine(),
    fnreg.Homogeneous(),
    fnreg.Held(fnreg.Rigid(), ("rotation",)),
    fnreg.Sequential((fnreg.Rigid(), fnreg.Affine())),
]

DENSE = [
    fnreg.FFD(stride=2),
    fnreg.SVFFD(stride=3, squarings=4),
    fnreg.SVF(squarings=3),
    fnreg.Displacement(),
    fnreg.Diffeomorphism(gradient=0.5),
    fnreg.Held(fnreg.FFD(stride=3), ()),
    fnreg.Sequential((fnreg.SVFFD(stride=2), fnreg.Affine())),
]


def oblique(dimension: int, rng: torch.Generator) -> fnreg.Grid:
    direction = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng, dtype=torch.float64)).Q
    return fnreg.Grid((5, 4, 3)[:dimension], spacing=(0.3, 0.7, 2.0)[:dimension], origin=1 / 3, direction=direction)


def some_mapping(transform: fnreg.Transform, grid: fnreg.Grid, rng: torch.Generator) -> fnreg.Mapping:
    zero = transform.zero_step(grid)
    step = torch.utils._pytree.tree_map(lambda leaf: torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype), zero)
    return fnreg.Mapping(transform.retract(transform.init(grid), step, grid), grid, transform)


def dense_mapping(
    transform: fnreg.Transform, grid: fnreg.Grid, rng: torch.Generator, dtype: torch.dtype = torch.float64
) -> fnreg.Mapping:
    """Fields of half a voxel or so, in the precision that images would give them."""
    zero = transform.zero_step(grid)
    step = torch.utils._pytree.tree_map(
        lambda leaf: 0.3 * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype), zero
    )
    params = transform.retract(transform.init(grid), step, grid)
    return fnreg.Mapping(transform.cast(params, dtype), grid, transform)


def same(a: fnreg.Mapping, b: fnreg.Mapping) -> bool:
    leaves = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return a.transform == b.transform and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in leaves)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("transform", LINEAR, ids=repr)
def test_transforms_come_back_bit_for_bit(
    tmp_path: Path, transform: fnreg.Transform, dimension: int, rng: torch.Generator
) -> None:
    mapping = some_mapping(transform, oblique(dimension, rng), rng)
    write_transform(tmp_path / "t.safetensors", mapping)
    first = (tmp_path / "t.safetensors").read_bytes()
    assert same(read_transform(tmp_path / "t.safetensors"), mapping)
    write_transform(tmp_path / "t.safetensors", read_transform(tmp_path / "t.safetensors"))
    assert (tmp_path / "t.safetensors").read_bytes() == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("transform", DENSE, ids=repr)
def test_fields_come_back_bit_for_bit(
    tmp_path: Path, transform: fnreg.Transform, dimension: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    mapping = dense_mapping(transform, oblique(dimension, rng), rng, dtype)
    write_transform(tmp_path / "t.safetensors", mapping)
    found = read_transform(tmp_path / "t.safetensors")
    assert same(found, mapping) and dtype in {leaf.dtype for leaf in tree_leaves(found.params)}
    # Products of matrices may differ in the last bit by where they lie in memory.
    torch.testing.assert_close(found.displacement(), mapping.displacement())


def test_strides_per_axis_and_batches_of_fields_come_back(tmp_path: Path, rng: torch.Generator) -> None:
    transform = fnreg.SVFFD(stride=(2, 3))
    one = dense_mapping(transform, oblique(2, rng), rng)
    many = fnreg.stack([one, dense_mapping(transform, one.domain, rng)])
    for mapping in (one, many, many.inverse()):
        write_transform(tmp_path / "t.safetensors", mapping)
        found = read_transform(tmp_path / "t.safetensors")
        assert same(found, mapping) and found.transform == transform


def test_the_domain_of_a_coarse_level_remembers_its_base(tmp_path: Path, rng: torch.Generator) -> None:
    finest = fnreg.Grid((15, 12), spacing=(0.3, 0.7), origin=1 / 3)
    level = finest.level((8, 6))
    mapping = dense_mapping(fnreg.FFD(stride=2), level, rng)
    write_transform(tmp_path / "t.safetensors", mapping)
    found = read_transform(tmp_path / "t.safetensors")
    assert found.domain.base == (15, 12) and same(found, mapping)
    torch.testing.assert_close(found.displacement(), mapping.displacement())


def test_compositions_and_batches_come_back(tmp_path: Path, rng: torch.Generator) -> None:
    one = some_mapping(fnreg.Rigid(), oblique(2, rng), rng)
    whole = one @ some_mapping(fnreg.Affine(), oblique(2, rng), rng) @ one.inverse()
    write_transform(tmp_path / "t.safetensors", whole)
    assert same(read_transform(tmp_path / "t.safetensors"), whole)
    many = fnreg.stack([some_mapping(fnreg.Rigid(), oblique(2, rng), rng) for _ in range(3)])
    write_transform(tmp_path / "t.safetensors", many)
    assert same(read_transform(tmp_path / "t.safetensors"), many)


def test_registered_mapping_comes_back(tmp_path: Path) -> None:
    fixed, moving = fnreg.data.digit_pairs(3)
    result = fnreg.register(fixed, moving, [fnreg.Rigid(), fnreg.Affine()], levels=1, steps=3)
    write_transform(tmp_path / "t.safetensors", result.mapping)
    assert same(read_transform(tmp_path / "t.safetensors"), result.mapping)


def test_damaged_transforms_are_one_error(tmp_path: Path, rng: torch.Generator) -> None:
    path = tmp_path / "t.safetensors"
    mapping = some_mapping(fnreg.Rigid(), oblique(2, rng), rng)
    write_transform(path, mapping)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 3)]
    for place in range(len(whole)):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            found = read_transform(path)
        except TransformReadError as error:
            assert "\n" not in str(error)
        else:
            assert same(found, mapping)


def tampered(mapping: fnreg.Mapping, **changes: Any) -> bytes:
    """A file with a right check sum over a wrong header."""
    import json

    import safetensors.torch

    from fnreg.io import lossless as module

    header = {"version": 1, "transform": mapping.transform.to_dict(), "domain": mapping.domain.to_dict()} | changes
    tensors = dict(mapping.params)
    header["sha256"] = module._digest(header, tensors)
    return safetensors.torch.save(tensors, {"fnreg": json.dumps(header)})


@pytest.mark.parametrize("kind", ["alone", "held", "composed"])
def test_flows_written_before_squarings_had_this_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    flows = fnreg.SVF(squarings=3), fnreg.SVFFD(stride=2, squarings=4)
    transform = {
        "alone": flows[0],
        "held": fnreg.Held(flows[1], ()),
        "composed": fnreg.Sequential((fnreg.Rigid(), fnreg.Sequential((fnreg.Held(flows[0], ()), flows[1])))),
    }[kind]
    grid, today = fnreg.Grid((6, 5)), fnreg.Transform.to_dict
    mapping = fnreg.Mapping(transform.init(grid), grid, transform)

    def before(one: fnreg.Transform) -> Any:
        return json.loads(json.dumps(today(one)).replace('"squarings"', '"steps"'))

    monkeypatch.setattr(fnreg.Transform, "to_dict", before)
    write_transform(tmp_path / "a.safetensors", mapping)
    assert b"steps" in (tmp_path / "a.safetensors").read_bytes()
    assert read_transform(tmp_path / "a.safetensors").transform == transform


def test_a_bomb_in_a_header_takes_no_memory(tmp_path: Path) -> None:
    """A right check sum over a claim of petabytes: refused by the shape, not by the allocator."""
    grid = fnreg.Grid((4, 3, 2))
    mapping = fnreg.Mapping(fnreg.Displacement().init(grid), grid, fnreg.Displacement())
    for size in (500, 10**5):
        data = tampered(mapping, domain=fnreg.Grid((size,) * 3).to_dict())
        (tmp_path / "t.safetensors").write_bytes(data)
        with pytest.raises(TransformReadError, match=rf"expected \(3, {size}, {size}, {size}\)"):
            read_transform(tmp_path / "t.safetensors")


@pytest.mark.parametrize("depth", [2000, 10**6])
def test_a_header_that_is_too_deep_is_one_error(tmp_path: Path, depth: int) -> None:
    import safetensors.torch

    whole = b'{"__metadata__":' + b"[" * depth
    ours = safetensors.torch.save({"a": torch.zeros(1)}, {"fnreg": "[" * depth})
    for data in (len(whole).to_bytes(8, "little") + whole, ours):
        (tmp_path / "t.safetensors").write_bytes(data)
        with pytest.raises(TransformReadError, match="is not a transform of fnreg, or it is damaged"):
            read_transform(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "has version 2: this fnreg reads version 1"),
        ({"transform": {"type": "Teleport"}}, "unknown transform 'Teleport'"),
        ({"transform": {"type": "Rigid", "speed": 3}}, "has no option"),
        ({"transform": {"type": "Affine"}}, "its parameters are"),
        ({"transform": {"type": "Sequential", "transforms": "all"}}, "valid transform"),
        ({"domain": {"type": "Grid"}}, "not a grid"),
        ({"domain": 3}, "valid transform"),
        ({"transform": {"type": "FFD", "stride": 0}}, "positive whole numbers"),
        ({"transform": {"type": "FFD", "stride": 2}}, "its parameters are"),
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    grid = fnreg.Grid((4, 3))
    mapping = fnreg.Mapping(fnreg.Rigid().init(grid), grid, fnreg.Rigid())
    (tmp_path / "t.safetensors").write_bytes(tampered(mapping, **changes))
    with pytest.raises(TransformReadError, match=told):
        read_transform(tmp_path / "t.safetensors")


def test_what_is_no_transform(tmp_path: Path) -> None:
    import pickle

    import safetensors.torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "t.safetensors"
    with pytest.raises(TransformReadError, match="does not exist"):
        read_transform(path)
    for data in (b"", b"hello", pickle.dumps(Evil()), safetensors.torch.save({"a": torch.zeros(1)}), bytes(100)):
        path.write_bytes(data)
        with pytest.raises(TransformReadError):
            read_transform(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("transform", LINEAR, ids=repr)
def test_itk_reads_the_same_map(
    tmp_path: Path, transform: fnreg.Transform, dimension: int, rng: torch.Generator
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    mapping = some_mapping(transform, oblique(dimension, rng), rng)
    write_itk(tmp_path / "t.tfm", mapping)
    theirs = sitk.ReadTransform(str(tmp_path / "t.tfm"))
    points = 100 * torch.randn(20, dimension, generator=rng, dtype=torch.float64)
    expected = [theirs.TransformPoint(point) for point in points.tolist()]
    found = mapping.map_points(points)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("suffix", ["h5", "tfm"])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("transform", DENSE, ids=repr)
def test_itk_reads_the_same_field(
    tmp_path: Path, transform: fnreg.Transform, dimension: int, suffix: str, rng: torch.Generator
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    grid = oblique(dimension, rng)
    mapping = dense_mapping(transform, grid, rng)
    write_itk(tmp_path / f"t.{suffix}", mapping)
    theirs = sitk.ReadTransform(str(tmp_path / f"t.{suffix}"))
    points = grid.points()
    expected = torch.tensor([theirs.TransformPoint(point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mapping.map_points(points), expected, atol=1e-9, rtol=0)
    assert (expected - points).norm(dim=1).max() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == [f"t.{suffix}"]


def test_itk_applies_the_parts_in_our_order(tmp_path: Path, rng: torch.Generator) -> None:
    sitk = pytest.importorskip("SimpleITK")
    grid = oblique(2, rng)
    whole = some_mapping(fnreg.Affine(), grid, rng) @ dense_mapping(fnreg.Displacement(), grid, rng)
    write_itk(tmp_path / "t.h5", whole)
    theirs = sitk.CompositeTransform(sitk.ReadTransform(str(tmp_path / "t.h5")))
    assert theirs.GetNumberOfTransforms() == 2
    inner = grid.index_to_world(torch.rand(20, 2, generator=rng, dtype=torch.float64) * 2 * grid.index_center)
    expected = torch.tensor([theirs.TransformPoint(point) for point in inner.tolist()], dtype=torch.float64)
    torch.testing.assert_close(whole.map_points(inner), expected, atol=1e-9, rtol=0)  # between the voxels too


def test_itk_refuses_what_it_cannot_hold(tmp_path: Path, rng: torch.Generator) -> None:
    pytest.importorskip("SimpleITK")
    one = dense_mapping(fnreg.FFD(stride=2), oblique(2, rng), rng)
    many = fnreg.stack([one, one])
    broken = fnreg.Mapping({"coefficients": one.params["coefficients"] * torch.nan}, one.domain, one.transform)
    line = dense_mapping(fnreg.FFD(stride=2), oblique(1, rng), rng)
    for mapping, told in ((many, "one map of 2 or 3"), (broken, "is not finite"), (line, "one map of 2 or 3 axes")):
        with pytest.raises(ValueError, match=told):
            write_itk(tmp_path / "t.h5", mapping)
    with pytest.raises(WriteError, match=r"ends in \.h5 or \.tfm"):
        write_itk(tmp_path / "t.xyz", one)
    with pytest.raises(WriteError, match="does not exist"):
        write_itk(tmp_path / "none" / "t.h5", one)
    assert not list(tmp_path.iterdir())


def test_without_simpleitk_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    mapping = dense_mapping(fnreg.FFD(stride=2), oblique(2, rng), rng)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(extras.MissingExtraError, match=r'pip install "fnreg\[itk\]"'):
        write_itk(tmp_path / "t.h5", mapping)


# -- displacements as NIfTI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["u.nii", "u.nii.gz"])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_itk_maps_points_by_a_displacement_in_nifti(
    tmp_path: Path, dimension: int, name: str, dtype: torch.dtype, mirrored: bool, rng: torch.Generator
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    grid = oblique(dimension, rng)
    if bool(torch.det(grid.direction) < 0) != mirrored:
        turned = torch.cat([grid.direction[:, :-1], -grid.direction[:, -1:]], 1)
        grid = fnreg.Grid(grid.size, spacing=grid.spacing, origin=grid.origin, direction=turned)
    mapping = dense_mapping(fnreg.Sequential((fnreg.FFD(stride=2), fnreg.Affine())), grid, rng, dtype)
    write_displacement(tmp_path / name, mapping, dtype=dtype)
    image = sitk.ReadImage(str(tmp_path / name))
    kinds = {torch.float32: sitk.sitkVectorFloat32, torch.float64: sitk.sitkVectorFloat64}
    assert image.GetPixelID() == kinds[dtype] and image.GetSize() == grid.size
    assert image.GetNumberOfComponentsPerPixel() == dimension
    points = grid.points()
    theirs = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    expected = torch.tensor([theirs.TransformPoint(point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mapping.map_points(points), expected, atol=1e-5, rtol=0)


def test_the_header_of_a_displacement(tmp_path: Path, rng: torch.Generator) -> None:
    nibabel = pytest.importorskip("nibabel")
    grid = oblique(3, rng)
    mapping = dense_mapping(fnreg.Displacement(), grid, rng)
    write_displacement(tmp_path / "u.nii.gz", mapping)
    first = (tmp_path / "u.nii.gz").read_bytes()
    found = nibabel.load(tmp_path / "u.nii.gz")
    assert found.shape == (5, 4, 3, 1, 3) and int(found.header["intent_code"]) == 1007
    assert int(found.header["qform_code"]) == int(found.header["sform_code"]) == 1
    flip = np.diag([-1.0, -1, 1, 1])
    np.testing.assert_allclose(found.affine, flip @ grid.affine.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.get_qform(), found.get_sform(), atol=1e-5)
    stored = np.asarray(found.dataobj)[:, :, :, 0]  # (X, Y, Z, D), LPS as it is
    np.testing.assert_array_equal(stored.transpose(3, 2, 1, 0), mapping.displacement().numpy())
    write_displacement(tmp_path / "u.nii.gz", mapping)
    assert (tmp_path / "u.nii.gz").read_bytes() == first


def test_a_displacement_on_another_grid(tmp_path: Path, rng: torch.Generator) -> None:
    sitk = pytest.importorskip("SimpleITK")
    mapping = dense_mapping(fnreg.FFD(stride=2), oblique(2, rng), rng)
    grid = fnreg.Grid((7, 6), spacing=0.5, origin=(0.1, -0.2))
    write_displacement(tmp_path / "u.nii", mapping, grid=grid)
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "u.nii")))
    np.testing.assert_allclose(np.moveaxis(stored, -1, 0), mapping.displacement(grid).numpy(), atol=1e-12)


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_map_of_determinants(tmp_path: Path, dimension: int, rng: torch.Generator) -> None:
    sitk = pytest.importorskip("SimpleITK")
    grid = oblique(dimension, rng)
    data = torch.rand(1, *grid.shape, generator=rng)
    write_map(tmp_path / "j.nii.gz", fnreg.Image(data, grid))
    found = sitk.ReadImage(str(tmp_path / "j.nii.gz"))
    assert found.GetNumberOfComponentsPerPixel() == 1
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), data[0].numpy())
    np.testing.assert_allclose(found.GetOrigin(), grid.origin, atol=1e-6)
    np.testing.assert_allclose(found.GetDirection(), grid.direction.flatten(), atol=1e-6)


def test_nifti_refuses_what_it_cannot_hold(tmp_path: Path, rng: torch.Generator) -> None:
    one = dense_mapping(fnreg.FFD(stride=2), oblique(2, rng), rng)
    broken = fnreg.Mapping({"coefficients": one.params["coefficients"] * torch.nan}, one.domain, one.transform)
    line = dense_mapping(fnreg.FFD(stride=2), oblique(1, rng), rng)
    many = fnreg.stack([one, one])
    bad = ((many, "one map, take one of the batch"), (broken, "is not finite"), (line, "NIfTI holds 2 or 3"))
    for mapping, told in bad:
        with pytest.raises(ValueError, match=told):
            write_displacement(tmp_path / "u.nii", mapping)
    with pytest.raises(ValueError, match="one channel"):
        write_map(tmp_path / "j.nii", fnreg.Image(torch.zeros(2, 4, 5)))
    with pytest.raises(WriteError, match=r"ends in \.nii or \.nii\.gz"):
        write_displacement(tmp_path / "u.png", one)
    with pytest.raises(WriteError, match="does not exist"):
        write_displacement(tmp_path / "none" / "u.nii", one)
    assert not list(tmp_path.iterdir())


def test_itk_resamples_to_our_image(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    fixed, moving = fnreg.data.brain()
    write_itk(tmp_path / "t.tfm", fnreg.data.brain_truth())
    images = [sitk.GetImageFromArray(image.numpy()[0]) for image in (fixed, moving)]
    theirs = sitk.Resample(images[1], images[0], sitk.ReadTransform(str(tmp_path / "t.tfm")), sitk.sitkLinear, 0.0)
    ours = fnreg.warp(moving, fnreg.data.brain_truth(), fixed.grid).numpy()[0]
    inside = (slice(40, -40), slice(40, -40))
    np.testing.assert_allclose(sitk.GetArrayFromImage(theirs)[inside], ours[inside], atol=2e-5)


def test_itk_text_holds_one_linear_map(tmp_path: Path, rng: torch.Generator) -> None:
    many = fnreg.stack([some_mapping(fnreg.Rigid(), fnreg.Grid((5, 4)), rng) for _ in range(2)])
    with pytest.raises(ValueError, match="one map of 2 or 3 axes"):
        write_itk(tmp_path / "t.tfm", many)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "most"), [("a.png", 255), ("a.tif", 2**24)])
def test_labels_in_pictures(tmp_path: Path, name: str, most: int) -> None:
    grid = fnreg.Grid((4, 3))
    labels = torch.arange(12).reshape(1, 3, 4)
    labels[0, 0, 0] = most
    fnreg.io.write_labels(tmp_path / name, fnreg.io.Labels(labels, grid))
    found = fnreg.io.read_labels(tmp_path / name)
    assert not found.data.is_floating_point() and torch.equal(found.data.long(), labels)
    labels[0, 0, 0] = most + 1
    with pytest.raises(ValueError, match="labels"):
        fnreg.io.write_labels(tmp_path / name, fnreg.io.Labels(labels, grid))
    labels[0, 0, 0] = -most - 1
    with pytest.raises(ValueError, match="labels"):
        fnreg.io.write_labels(tmp_path / name, fnreg.io.Labels(labels, grid))


@pytest.mark.parametrize("label", [2**31 - 128, 2**31, -(2**31), 2**40, 2**53])
def test_large_labels_in_pictures(tmp_path: Path, label: int) -> None:
    """float32 holds these, so the picture is read as that; int32 holds only the first."""
    Pillow.fromarray(np.array([[0, label]], np.float32)).save(tmp_path / "a.tif")
    found = fnreg.io.read_labels(tmp_path / "a.tif").data
    assert found.tolist() == [[[0, label]]]
    assert found.dtype == (torch.int32 if label < 2**31 and label > 0 else torch.int64)


def test_labels_that_floats_round(tmp_path: Path) -> None:
    Pillow.fromarray(np.array([[0, 2.0**54]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(fnreg.io.ImageReadError, match=r"holds 18014398509481984: expected labels up to 2\^53"):
        fnreg.io.read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize("option", [{"volume": 1}, {"form": "sform"}, {"series": "1.2"}])
def test_a_picture_has_no_volumes(tmp_path: Path, option: dict[str, Any]) -> None:
    Pillow.fromarray(np.ones((3, 4), np.uint8)).save(tmp_path / "a.png")
    for read in (fnreg.io.read_image, fnreg.io.read_labels):
        read(tmp_path / "a.png")
        with pytest.raises(fnreg.io.ImageReadError, match="is a picture: it has no volumes, forms or series"):
            read(tmp_path / "a.png", **option)


def test_pictures_that_hold_no_labels(tmp_path: Path) -> None:
    """A palette's numbers stand for colours; their luminance is no label."""
    palette = Pillow.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4), "L").convert("P")
    palette.putpalette([7 * k % 256 for k in range(768)])
    palette.save(tmp_path / "palette.png")
    Pillow.fromarray(np.full((3, 4), 1.5, np.float32)).save(tmp_path / "half.tif")
    Pillow.fromarray(np.full((3, 4), np.inf, np.float32)).save(tmp_path / "infinite.tif")
    for name in ("palette.png", "half.tif", "infinite.tif"):
        with pytest.raises(fnreg.io.ImageReadError, match="holds no labels: expected a grey picture of whole numbers"):
            fnreg.io.read_labels(tmp_path / name)
