"""Images against SimpleITK, SciPy and NumPy; what they share with what they are made from; subjects."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grids, known_pair, orientation, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg import SVF, Affine, GaussNewton, Grid, Image, Rigid, Subject, linear_mapping, mi, register, stack, warp
from fnreg.filters import gaussian, resize
from fnreg.image import subject

few = settings(max_examples=max(1, settings.default.max_examples // 2))
dimensions = st.integers(1, 3)


def oblique(dimension: int, size: tuple[int, ...], *, seed: int = 0, mirror: bool = True) -> Grid:
    """An anisotropic grid about a place far from the origin, tilted and reflected."""
    numbers = uniform(3, seed=seed)
    return Grid(
        size,
        spacing=(0.5 * uniform(dimension, seed=seed + 1)).exp(),
        center=20 * numbers[:dimension] + 30,
        direction=orientation(dimension, 2 * numbers, mirror),
    )


def random_image(dimension: int, *, channels: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> Image:
    size = (9, 7, 6)[:dimension]
    return Image(uniform(channels, *size[::-1], seed=seed).to(dtype), oblique(dimension, size, seed=seed))


def to_itk(image: Image) -> sitk.Image:
    """The same image as SimpleITK has it; one channel."""
    made = sitk.GetImageFromArray(image.data[0].numpy())
    made.SetSpacing(image.grid.spacing.tolist())
    made.SetOrigin(image.grid.origin.tolist())
    made.SetDirection(image.grid.direction.flatten().tolist())
    return made


def within(grid: Grid, points: Tensor, margin: float = 1e-6) -> Tensor:
    """Which points lie between the outer voxel centres."""
    index = grid.world_to_index(points)
    return ((index >= margin) & (index <= 2 * grid.index_center - margin)).all(-1)


# -- making one ------------------------------------------------------------------------------------------------


def test_geometry_from_a_grid_or_from_options() -> None:
    data = torch.zeros(2, 3, 4)
    image = Image(data, spacing=(2.0, 1.0), origin=(5.0, 6.0), direction=[[0.0, 1.0], [1.0, 0.0]])
    expected = Grid((4, 3), spacing=(2.0, 1.0), origin=(5.0, 6.0), direction=[[0.0, 1.0], [1.0, 0.0]])
    assert image.grid.same_as(expected) and image.channels == 2
    assert Image(data, center=(0.0, 0.0)).grid.center.tolist() == [0.0, 0.0]
    assert Image(data, expected).grid is expected and Image(data, expected).data is data
    assert Image(torch.zeros(3, 4)).grid.size == (4,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.uint16])
def test_integers_become_float32(dtype: torch.dtype) -> None:
    image = Image(torch.tensor([[0, 1, 1]]).to(dtype))
    assert image.data.dtype == torch.float32 and image.data.tolist() == [[0.0, 1.0, 1.0]]


def test_floating_types_stay() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert Image(torch.zeros(1, 3, dtype=dtype)).data.dtype == dtype


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Image(torch.zeros(1, 3, dtype=torch.complex64)), TypeError, "data are complex: give the magnitude"),
        (lambda: Image(torch.zeros(3)), ValueError, r"data has shape \(3,\): expected \(C, \[Z,\] Y, X\)"),
        (lambda: Image(torch.zeros(1, 1, 2, 2, 2)), ValueError, "with a channel axis"),
        (
            lambda: Image(torch.zeros(1, 3, 4), Grid((3, 4))),
            ValueError,
            r"data has shape \(1, 3, 4\) but the grid has shape \(4, 3\): expected \(C, 4, 3\)",
        ),
        (lambda: Image(torch.zeros(3, 4), Grid((4, 3))), ValueError, r"expected \(C, 3, 4\), with a leading batch"),
        (lambda: Image(torch.zeros(1, 1, 1, 3, 4), Grid((4, 3))), ValueError, "with a leading batch axis or without"),
        (lambda: Image(torch.zeros(1, 3, 4), spacing=-1.0), ValueError, "spacing is"),
    ],
)
def test_errors_of_an_image(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_batch_has_one_axis_more() -> None:
    images = [random_image(2, channels=3, seed=k) for k in range(4)]
    batch = stack(images)
    assert batch.data.shape == (4, 3, 7, 9) and batch.channels == 3 and batch.grid.spacing.shape == (4, 2)
    assert Image(batch.data, images[0].grid).channels == 3
    assert [leaf for leaf in (batch.ranks().data, batch.ranks().grid.direction)] == [3, 2]


def test_an_image_is_frozen_and_can_be_copied() -> None:
    image = random_image(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        image.data = image.data  # type: ignore[misc]
    for other in (copy.deepcopy(image), pickle.loads(pickle.dumps(image)), image.to("cpu")):
        assert torch.equal(other.data, image.data) and torch.equal(other.grid.center, image.grid.center)
    assert image.to("meta").data.is_meta and image.to("meta").grid.center.is_meta


def test_repr() -> None:
    assert repr(Image(torch.zeros(1, 2, 3))) == (
        "Image((1, 2, 3), torch.float32, Grid(size=(3, 2), spacing=[1.0, 1.0], origin=[0.0, 0.0]))"
    )
    assert repr(stack([Image(torch.zeros(1, 3))] * 2)).startswith("Image((2, 1, 3), torch.float32, Grid(size=(3,),")


# -- from arrays -----------------------------------------------------------------------------------------------

NUMPY_TYPES = [
    "u1",
    "i1",
    "<i2",
    ">i2",
    "<u2",
    ">u2",
    "<i4",
    ">i4",
    ">u4",
    "<i8",
    ">i8",
    ">u8",
    "?",
    "f2",
    ">f4",
    "<f8",
]


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("layout", ["C", "F", "negative", "strided", "read-only", "all"])
def test_every_numpy_array(dtype: str, layout: str) -> None:
    array = (np.arange(24).reshape(4, 6) % 100).astype(dtype)
    array = {
        "C": lambda a: a,
        "F": np.asfortranarray,
        "negative": lambda a: a[::-1, ::-1],
        "strided": lambda a: a[::2, 1::3],
        "read-only": np.copy,
        "all": lambda a: a[::-2, ::3].T,
    }[layout](array)
    if layout in ("read-only", "all"):
        array.flags.writeable = False
    before = array.copy()
    image = Image.from_array(array, spacing=0.5)
    expected = {"f2": torch.float16, "<f8": torch.float64}.get(dtype, torch.float32)
    assert image.data.dtype == expected
    assert np.array_equal(image.numpy()[0], array.astype(image.numpy().dtype))
    assert image.grid.shape == array.shape and image.grid.spacing.tolist() == [0.5, 0.5]
    assert np.array_equal(array, before)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_memory_is_shared_where_no_copy_is_needed(dtype: str, layout: str) -> None:
    array = np.zeros((4, 6), dtype)
    view = {"C": array, "F": np.zeros((4, 6), dtype, order="F"), "strided": array[::2, 1::3]}[layout]
    image = Image.from_array(view)
    view[1, 1] = 7.0
    assert float(image.data[0, 1, 1]) == 7.0
    assert np.shares_memory(image.numpy(), view)


def test_what_is_read_only_is_copied() -> None:
    """A tensor cannot be read-only, so sharing would let it change what must not change."""
    array = np.zeros((2, 3))
    array.flags.writeable = False
    image = Image.from_array(array)
    image.data[0, 0, 0] = 7.0
    assert array[0, 0] == 0.0


def test_from_torch() -> None:
    data = torch.zeros(3, 4)
    image = Image.from_array(data)
    assert image.data.shape == (1, 3, 4) and image.data.data_ptr() == data.data_ptr()
    assert Image.from_array(data.flip(0)).data.shape == (1, 3, 4)
    weight = torch.ones(3, 4, requires_grad=True)
    assert Image.from_array(weight).data.requires_grad


def test_from_dlpack() -> None:
    class Foreign:
        """What any other library gives."""

        def __init__(self, data: Tensor) -> None:
            self.data = data

        def __dlpack__(self, **options: Any) -> Any:
            return self.data.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.data.__dlpack_device__()

    data = uniform(3, 4)
    image = Image.from_array(Foreign(data), origin=(1.0, 2.0))
    assert torch.equal(image.data[0], data) and image.data.data_ptr() == data.data_ptr()
    assert image.grid.origin.tolist() == [1.0, 2.0]


def test_from_nested_lists() -> None:
    assert Image.from_array([[1, 2, 3], [4, 5, 6]]).data.tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_channels_come_from_any_axis(axis: int) -> None:
    array = np.random.default_rng(0).random((2, 3, 4))
    image = Image.from_array(array, channel_axis=axis)
    assert np.array_equal(image.numpy(), np.moveaxis(array, axis, 0))
    assert image.channels == array.shape[axis] and image.grid.ndim == 2
    assert np.shares_memory(image.numpy(), array)
    assert Image.from_array(torch.as_tensor(array), channel_axis=axis).data.shape == image.data.shape


def test_no_channel_axis_means_one_channel() -> None:
    image = Image.from_array(np.zeros((2, 3, 4)))
    assert image.channels == 1 and image.grid.size == (4, 3, 2)


def test_numpy_gives_the_data_even_with_a_history() -> None:
    data = torch.ones(1, 3, requires_grad=True)
    assert Image(data).numpy().tolist() == [[1.0, 1.0, 1.0]]


# -- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_resample_equals_simpleitk(dimension: int, mode: Any) -> None:
    """Between two oblique anisotropic grids; SimpleITK's values at and beyond the outer voxels are its own."""

    @few
    @given(st.integers(0, 10**6))
    def check(seed: int) -> None:
        image = random_image(dimension, seed=seed)
        other = oblique(dimension, (8, 9, 5)[:dimension], seed=seed + 7)
        other = Grid(other.size, spacing=0.7 * other.spacing, center=image.grid.center, direction=other.direction)
        reference = to_itk(Image(torch.zeros(1, *other.shape, dtype=torch.float64), other))
        how = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "cubic": sitk.sitkBSpline3}[mode]
        expected = sitk.GetArrayFromImage(
            sitk.Resample(to_itk(image), reference, sitk.Transform(), how, -9.0, sitk.sitkFloat64)
        )
        found = image.resample(other, interpolation=mode)
        assert found.grid is other and found.data.shape == (1, *other.shape)
        compare = within(image.grid, other.points())
        if mode == "nearest":
            index = image.grid.world_to_index(other.points())
            compare &= ((index - index.floor() - 0.5).abs() > 1e-6).all(-1)
        assert int(compare.sum()) > 5
        tolerance = {"linear": 1e-11, "nearest": 0.0, "cubic": 1e-7}[mode]  # its prefilter stops at 1e-10
        assert_close(found.data.flatten()[compare], tensor(expected.ravel().copy())[compare], rtol=0, atol=tolerance)

    check()


@given(dimensions, st.integers(0, 999), st.sampled_from(["linear", "nearest", "cubic"]))
def test_sample_and_resample_agree(dimension: int, seed: int, mode: Any) -> None:
    image = random_image(dimension, channels=2, seed=seed)
    other = oblique(dimension, (4, 5, 6)[:dimension], seed=seed + 3)
    values = image.sample(other.points(), interpolation=mode, padding="zeros")
    assert values.shape == (other.numel, 2)
    expected = image.resample(other, interpolation=mode, padding="zeros").data.flatten(1).mT
    assert_close(values, expected, rtol=0, atol=0)


@given(dimensions, st.integers(0, 999))
def test_the_own_grid_gives_the_own_values(dimension: int, seed: int) -> None:
    image = random_image(dimension, channels=2, seed=seed)
    for mode in ("linear", "nearest", "cubic"):
        found = image.resample(image.grid, interpolation=mode)  # type: ignore[arg-type]
        assert_close(found.data, image.data, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_the_world_is_found_again(dtype: torch.dtype) -> None:
    """A linear image knows nothing of its grid: sampled anywhere inside, it is the function."""
    slope = uniform(3, seed=9)
    grid = oblique(3, (9, 7, 6))
    values = grid.points() @ slope
    image = Image(values.reshape(1, *grid.shape).to(dtype), grid)
    points = grid.index_to_world((uniform(50, 3) + 1) * grid.index_center)
    found = image.sample(points.to(dtype))
    assert found.dtype == dtype
    expected = points @ slope
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert_close(found[:, 0], expected.to(dtype), rtol=0, atol=tolerance)


def test_padding_is_passed_on() -> None:
    image = Image(torch.ones(1, 3, 4))
    away = torch.tensor([[50.0, 0.0]])
    assert [float(image.sample(away, padding=p)) for p in ("border", "zeros", 7.0)] == [1.0, 0.0, 7.0]  # type: ignore[arg-type]
    assert float(image.resample(Grid((1, 1), origin=(50.0, 0.0)), padding=7.0).data) == 7.0


def test_sampling_is_differentiable_in_data_grid_and_points() -> None:
    image = random_image(2)
    points = image.grid.index_to_world(tensor([[1.3, 2.6], [4.4, 0.7], [6.2, 3.3]]))

    def function(data: Tensor, center: Tensor, spacing: Tensor, where: Tensor) -> Tensor:
        grid = Grid(image.grid.size, center=center, spacing=spacing, direction=image.grid.direction)
        return Image(data, grid).sample(where)

    leaves = (image.data, image.grid.center, image.grid.spacing, points)
    gradcheck(function, [leaf.clone().requires_grad_() for leaf in leaves], check_forward_ad=True)


@given(dimensions, st.integers(0, 999))
def test_a_batch_of_images_equals_a_loop(dimension: int, seed: int) -> None:
    """Every method, with a grid per image."""
    images = [random_image(dimension, channels=2, seed=seed + k) for k in range(3)]
    other = oblique(dimension, (4, 5, 6)[:dimension], seed=seed)

    def everything(image: Image) -> dict[str, Tensor]:
        return {
            "sample": image.sample(other.points()),
            "resample": image.resample(other).data,
            "spacing": image.resize(4).grid.spacing,
            "resize": image.resize(4).data,
            "pyramid": image.pyramid(2, min_size=2)[-1].data,
            "world": image.gaussian(1.5).data,
            "voxel": image.gaussian(1.5, unit="voxel").data,
            "percentile": image.normalize().data,
            "range": image.normalize("range").data,
            "zscore": image.normalize("zscore").data,
            "masked": image.normalize("zscore", mask=image.data[:1] > 0).data,
        }

    batch = vmap(everything)(stack(images))
    for k, image in enumerate(images):
        for name, alone in everything(image).items():
            assert_close(batch[name][k], alone, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


# -- smoothing and size ----------------------------------------------------------------------------------------


def test_gaussian_in_world_units_is_that_in_voxels_over_the_spacing() -> None:
    image = random_image(3)
    sigma = tensor([1.0, 2.0, 0.5])
    world = image.gaussian(sigma)
    assert_close(world.data, gaussian(image.data, sigma / image.grid.spacing), rtol=0, atol=1e-14)
    assert_close(image.gaussian(sigma, unit="voxel").data, gaussian(image.data, sigma), rtol=0, atol=1e-14)
    assert world.grid is image.grid
    assert not torch.allclose(world.data, image.gaussian(sigma, unit="voxel").data, atol=1e-3)


@pytest.mark.parametrize("unit", ["world", "voxel"])
def test_gaussian_equals_scipy_inside(unit: Any) -> None:
    grid = oblique(2, (48, 44))
    image = Image(uniform(1, 44, 48), grid)
    voxels = 1.2 / grid.spacing if unit == "world" else torch.full((2,), 1.2, dtype=torch.float64)
    oracle = scipy.ndimage.gaussian_filter(image.numpy()[0], voxels.flip(0).tolist(), truncate=14)
    inner = slice(16, -16)
    assert_close(image.gaussian(1.2, unit=unit).data[0, inner, inner], tensor(oracle)[inner, inner], rtol=0, atol=1e-12)


def test_the_unit_must_be_known() -> None:
    with pytest.raises(ValueError, match="unknown unit 'mm': choose world or voxel"):
        random_image(1).gaussian(1.0, unit="mm")  # type: ignore[arg-type]


@given(dimensions, st.integers(0, 999), st.integers(1, 12))
def test_resize_covers_the_same_extent(dimension: int, seed: int, size: int) -> None:
    image = random_image(dimension, seed=seed)
    found = image.resize(size)
    assert found.grid.same_as(image.grid.resize(size), 1e-12)
    assert_close(found.data, resize(image.data, [size] * dimension), rtol=0, atol=0)
    constant = Image(torch.full_like(image.data, 3.3), image.grid).resize(size).data
    assert_close(constant, torch.full_like(constant, 3.3), rtol=0, atol=1e-13)


def test_pyramid() -> None:
    image = random_image(3, channels=2)
    found = image.pyramid(4, min_size=2)
    assert found[0] is image
    assert [level.grid.size for level in found] == [grid.size for grid in image.grid.pyramid(4, min_size=2)]
    assert [level.grid.size for level in found] == [(9, 7, 6), (5, 4, 3), (3, 2, 2), (2, 2, 2)]
    for fine, coarse in itertools.pairwise(found):
        assert_close(coarse.data, resize(fine.data, coarse.grid.size), rtol=0, atol=0)
        assert_close(coarse.grid.extent, image.grid.extent, rtol=0, atol=1e-12)
    assert len(image.pyramid(1)) == 1
    constant = Image(torch.ones_like(image.data), image.grid)
    for level in constant.pyramid(4, min_size=1):
        assert_close(level.data, torch.ones_like(level.data), rtol=0, atol=1e-13)


def test_a_pyramid_stays_in_its_place() -> None:
    """A blob keeps its centre of mass in the world on every level."""
    grid = oblique(2, (128, 101))
    place = grid.center + tensor([2.0, -1.5])
    values = torch.exp(-(grid.points() - place).square().sum(1) / 50)
    for level in Image(values.reshape(1, *grid.shape), grid).pyramid(3):
        weight = level.data.flatten()
        found = (weight[:, None] * level.grid.points()).sum(0) / weight.sum()
        assert_close(found, place, rtol=0, atol=1e-2)


# -- normalising -----------------------------------------------------------------------------------------------

METHODS: tuple[Any, ...] = ("percentile", "range", "zscore")


def statistics(values: np.ndarray, method: str, low: float = 0.01, high: float = 0.99) -> tuple[float, float]:
    """What becomes 0, and how much becomes 1, by NumPy."""
    if method == "zscore":
        return values.mean(), values.std()
    bounds = (100 * low, 100 * high) if method == "percentile" else (0, 100)
    bottom, top = np.percentile(values, bounds)
    return bottom, top - bottom


@given(dimensions, st.sampled_from(METHODS), st.booleans(), st.integers(0, 999), st.floats(0, 0.4), st.floats(0.6, 1))
def test_normalize_equals_numpy(dimension: int, method: Any, masked: bool, seed: int, low: float, high: float) -> None:
    """Each channel by itself, statistics of the mask alone, values nowhere clipped."""
    image = random_image(dimension, channels=3, seed=seed)
    image = Image(100 * image.data + tensor([0.0, 1000.0, -5.0]).reshape(3, *[1] * dimension), image.grid)
    mask = uniform(1, *image.grid.shape, seed=seed + 1) if masked else None
    found = image.normalize(method, low=low, high=high, mask=mask)
    assert found.grid is image.grid
    for channel, values in zip(found.data, image.numpy(), strict=True):
        offset, scale = statistics(values if mask is None else values[mask[0].numpy() > 0], method, low, high)
        expected = (values - offset) / scale if scale > 0 else 0 * values
        assert_close(channel, tensor(expected), rtol=1e-11, atol=1e-10)


def test_the_default_is_the_first_and_the_last_percentile() -> None:
    image = Image(torch.arange(101.0)[None])
    assert_close(image.normalize().data[0, [0, 1, 50, 99, 100]], torch.tensor([-1 / 98, 0.0, 0.5, 1.0, 99 / 98]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_channel_without_variation_becomes_zero(method: Any, dtype: torch.dtype) -> None:
    """Whatever rounding makes of its mean."""

    @given(st.floats(-1e6, 1e6, width=32), st.integers(1, 400), st.booleans())
    def check(value: float, count: int, masked: bool) -> None:
        data = torch.full((2, count), value, dtype=dtype)
        data[1] = torch.arange(count)
        mask = torch.ones(1, count, dtype=torch.bool)
        if masked:
            data[0, count // 2 :] = 5.0
            mask[0, count // 2 :] = False
        image = Image(data).normalize(method, mask=mask if masked else None)
        assert not bool(image.data[0].any())
        assert bool(image.data.isfinite().all())

    check()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_mask_gives_zeros(method: Any) -> None:
    image = random_image(2, channels=2)
    assert not bool(image.normalize(method, mask=torch.zeros(1, *image.grid.shape)).data.any())


@pytest.mark.parametrize("method", METHODS)
def test_lost_voxels_show_unless_the_mask_leaves_them_out(method: Any) -> None:
    """NaN in the statistics must not make a black image of the channel."""
    data = uniform(2, 5, 6)
    data[0, 1, 1] = torch.nan
    mask = torch.ones(1, 5, 6)
    mask[0, 4] = 0
    for given_mask in (None, mask):
        found = Image(data).normalize(method, mask=given_mask).data
        assert bool(found[0].isnan().all()) and bool(found[1].isfinite().all())
    mask[0, 1, 1] = 0
    found = Image(data).normalize(method, mask=mask).data
    assert int(found.isnan().sum()) == 1 and bool(found[0, 1, 1].isnan())
    others = data.clone()
    others[0, 1, 1] = 0.0
    expected = Image(others).normalize(method, mask=mask).data
    assert_close(found[0, 2:], expected[0, 2:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_normalize_knows_no_unit(method: Any) -> None:
    image = random_image(2)
    scaled = Image(1e5 * image.data + 77, image.grid).normalize(method)
    assert_close(scaled.data, image.normalize(method).data, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_normalize_is_per_image_of_a_batch(method: Any) -> None:
    data = uniform(2, 1, 5, 6) * tensor([1.0, 1000.0]).reshape(2, 1, 1, 1)
    found = vmap(lambda d: Image(d).normalize(method).data)(data)
    alone = torch.stack([Image(d).normalize(method).data for d in data])
    assert_close(found, alone, rtol=0, atol=1e-13)
    assert_close(found.std((1, 2, 3))[1] / found.std((1, 2, 3))[0], tensor(1.0), rtol=0.5, atol=0)


def test_half_precision_counts_its_voxels() -> None:
    """float16 ends at 65504, and float32 cannot tell odd counts beyond 2^24."""
    data = torch.linspace(0, 1, 70_000)[None].to(torch.float16)
    found = Image(data).normalize().data
    assert found.dtype == torch.float16
    assert_close(found[0, [700, 69_300]].float(), torch.tensor([0.0, 1.0]), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_range_of_a_large_volume() -> None:
    data = torch.zeros(1, 2**24 + 3)
    data[0, -1] = 2.0
    assert Image(data).normalize("range").data[0, [0, -1]].tolist() == [0.0, 1.0]


def test_normalize_is_differentiable() -> None:
    data = uniform(1, 3, 4)
    for method in METHODS:
        gradcheck(lambda d, m=method: Image(d).normalize(m).data, (data.clone().requires_grad_(),))
        constant = grad(lambda d, m=method: Image(d).normalize(m).data.sum())(torch.ones(1, 3, 4))
        assert bool(constant.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "minmax"}, "unknown method 'minmax': choose percentile, range or zscore"),
        ({"low": 0.5, "high": 0.5}, r"percentiles are \(0.5, 0.5\): expected 0 <= low < high <= 1"),
        ({"low": -0.1}, "expected 0 <= low < high <= 1"),
        ({"high": 99.0}, r"percentiles are \(0.01, 99.0\)"),
    ],
)
def test_errors_of_normalize(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_image(2).normalize(**options)


# -- subjects --------------------------------------------------------------------------------------------------


def test_a_subject_keeps_what_is_known() -> None:
    image = random_image(2, dtype=torch.float32)
    mask, labels = torch.ones(1, 7, 9, dtype=torch.bool), torch.full((1, 7, 9), 2**24 + 1)
    points = uniform(5, 2)
    found = Subject(image, mask, labels=labels, points=points)
    assert found.image is image and found.points is points
    assert found.mask is not None and found.mask.dtype == torch.float32 and bool((found.mask == 1).all())
    assert found.labels is labels
    assert [found.ranks().mask, found.ranks().labels, found.ranks().points] == [3, 3, 2]
    assert Subject(image, points=points).ranks().mask is None


def test_a_subject_of_a_batch() -> None:
    batch = stack([random_image(2, seed=k) for k in range(3)])
    found = Subject(
        batch, torch.ones(3, 1, 7, 9), labels=torch.zeros(1, 7, 9, dtype=torch.int64), points=torch.zeros(3, 4, 2)
    )
    together = stack([Subject(random_image(2, seed=k), torch.ones(1, 7, 9)) for k in range(3)])
    assert found.mask is not None and together.mask is not None
    assert found.mask.shape == together.mask.shape == (3, 1, 7, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(7, 9)}, r"mask has shape \(7, 9\): expected \(1, 7, 9\) as the image"),
        ({"mask": torch.ones(1, 9, 7)}, r"mask has shape \(1, 9, 7\)"),
        ({"mask": torch.ones(2, 7, 9)}, r"mask has shape \(2, 7, 9\)"),
        ({"labels": torch.ones(1, 7, 8)}, r"labels has shape \(1, 7, 8\)"),
        ({"points": torch.ones(4, 3)}, "points have 3 coordinates but the image has 2 axes"),
    ],
)
def test_errors_of_a_subject(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subject(random_image(2), **options)


def test_what_an_image_is_given_twice_or_elsewhere_is_refused() -> None:
    data, grid = torch.zeros(1, 4, 6), Grid((6, 4))
    with pytest.raises(ValueError, match="a grid and spacing, center are given: the grid has its own, give one"):
        Image(data, grid, spacing=2.0, center=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"data are on meta but the grid on cpu: give grid.to\(data.device\)"):
        Image(data.to("meta"), grid)
    assert Image(data.to("meta")).grid.center.is_meta
    with pytest.raises(TypeError, match="positional"):
        Subject(Image(data), data, torch.zeros(1, 4, 6, dtype=torch.int64))  # type: ignore[misc]


def test_an_image_is_a_subject_of_its_own() -> None:
    image = random_image(2)
    made = subject(image)
    assert made.image is image and made.mask is None
    assert subject(made) is made
    with pytest.raises(
        TypeError, match=r"expected an Image or a Subject, got ndarray: wrap data in Image\(data, grid\)"
    ):
        subject(np.zeros(3))  # type: ignore[arg-type]


@given(grids(2, count=1))
def test_the_random_grids_are_not_all_alike(found: list[Grid]) -> None:
    """The premise of the comparisons above: oblique, reflected and anisotropic."""
    grid = oblique(3, (4, 5, 6))
    assert float(torch.linalg.det(grid.direction)) == pytest.approx(-1)
    assert float((grid.direction.abs() - torch.eye(3)).abs().max()) > 0.1
    assert float(grid.spacing.max() / grid.spacing.min()) > 1.1
    assert found[0].ndim == 2


# -- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "cubic"])
def test_halves_are_sampled_where_they_are_asked_for(dtype: torch.dtype, interpolation: Any) -> None:
    """Halves count to 256 or 2048 at best: what they hold is a value, not a place."""
    image = Image(uniform(1, 3, 3000, seed=4).to(dtype), Grid((3000, 3)))
    exact = Image(image.data.to(torch.float32), image.grid)
    points = torch.rand(200, 2, dtype=torch.float64) * tensor([2999.0, 2.0])
    found = image.sample(points, interpolation=interpolation)
    assert found.dtype == dtype
    assert torch.equal(found, exact.sample(points, interpolation=interpolation).to(dtype))
    grid = Grid((700, 2), spacing=(3.7, 1.1), origin=(100.3, 0.2))
    resampled = image.resample(grid, interpolation=interpolation)
    assert torch.equal(resampled.data, exact.resample(grid, interpolation=interpolation).data.to(dtype))
    mapping = linear_mapping(tensor([[1.0, 0.1, 7.3], [0.0, 1.0, -0.2]]), grid)
    warped = warp(image, mapping, interpolation=interpolation)
    assert torch.equal(warped.data, warp(exact, mapping, interpolation=interpolation).data.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("transform", "options"),
    [(Affine(), {"solver": GaussNewton()}), (SVF(), {"objective": mi}), (Rigid(), {"start": "auto"})],
    ids=["affine", "flow", "search"],
)
def test_a_registration_of_halves_is_that_of_the_same_values(
    dtype: torch.dtype, transform: Any, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    halves = [Image(image.data.to(dtype), image.grid) for image in (fixed, moving)]
    exact = [Image(image.data.to(torch.float32), image.grid) for image in halves]
    found, expected = (register(*pair, transform, levels=2, steps=6, **options) for pair in (halves, exact))
    assert torch.equal(found.mapping.displacement(), expected.mapping.displacement())
    assert torch.equal(found.value, expected.value)
    assert found.warp(halves[1]).data.dtype == dtype
