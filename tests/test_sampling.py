"""Interpolation against torch, SciPy and its own plain path; its derivatives to the third; nested batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import uniform
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import grid_sample
from torch.testing import assert_close

from fnreg import native, sampling
from fnreg.gather import KNOT, Padding, Sampled, gather
from fnreg.sampling import interpolate, sample

PADDINGS: tuple[Padding, ...] = ("border", "zeros", "reflection", -3.5)
SHAPES = {1: (7,), 2: (5, 6), 3: (4, 5, 6)}
DTYPES = (torch.float32, torch.float64)

dimensions = st.integers(1, 3)
paddings = st.sampled_from(PADDINGS)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)
every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
every_padding = pytest.mark.parametrize("padding", PADDINGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
both_paths = pytest.mark.parametrize("native_path", [True, False], ids=["kernel", "plain"])


def path(kernel: bool) -> AbstractContextManager[Any]:
    """The compiled kernel where there is one, or the plain torch path."""
    return nullcontext() if kernel else mock.patch.object(native, "load", lambda: None)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def anywhere(size: tuple[int, ...], count: int, seed: int = 1) -> Tensor:
    """Coordinates (D, N) of a grid (x first), in it and up to two of its lengths away."""
    n = tensor(size)[:, None]
    return (n - 1) / 2 + 2.5 * n * uniform(len(size), count, seed=seed)


def off_the_knots(size: tuple[int, ...], count: int, seed: int = 1) -> Tensor:
    """The same at least 1/10 away from every voxel centre, where linear interpolation is smooth."""
    where = anywhere(size, count, seed)
    return where.floor() + 0.1 + 0.8 * (where - where.floor())


def on_knots(size: tuple[int, ...], count: int, seed: int = 1) -> Tensor:
    """The same, most of it on voxel centres or on the border between two."""
    return (2 * anywhere(size, count, seed)).round() / 2


def inner(size: tuple[int, ...], count: int, seed: int = 1) -> Tensor:
    n = tensor(size)[:, None]
    return (n - 1) / 2 * (1 + uniform(len(size), count, seed=seed))


def torch_sample(data: Tensor, coords: Tensor, padding: str) -> Tensor:
    """`grid_sample` at voxel coordinates; 1-D as one row of a 2-D image."""
    if data.ndim == 2:
        row = torch.zeros_like(coords)
        return torch_sample(torch.stack([data, data], 1), torch.cat([coords, row]), padding)
    n = torch.tensor(data.shape[:0:-1], dtype=coords.dtype)[:, None]
    # "reflection" means about the centres of the outer voxels, which is align_corners=True; the others agree in
    # both conventions, and False has no division by zero on an axis of one voxel.
    align = padding == "reflection"
    cube = 2 * coords / (n - 1) - 1 if align else (2 * coords + 1) / n - 1
    where = cube.mT.reshape(1, *[1] * (data.ndim - 2), -1, data.ndim - 1)
    found = grid_sample(data[None], where, padding_mode=padding, align_corners=align)
    return found.reshape(data.shape[0], -1)


# -- linear, against other implementations ---------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
def test_linear_equals_grid_sample(padding: Any, native_path: bool) -> None:
    @given(shapes, st.integers(1, 3))
    def check(shape: list[int], channels: int) -> None:
        if padding == "reflection":
            shape = [n + 1 for n in shape]  # grid_sample cannot reflect about a single voxel
        data = uniform(channels, *shape)
        for coords in (anywhere(data.shape[:0:-1], 60), on_knots(data.shape[:0:-1], 60)):
            with path(native_path):
                found = sample(data, coords, padding=padding).value
            assert_close(found, torch_sample(data, coords, padding), rtol=0, atol=1e-12)

    check()


@given(shapes, st.sampled_from([("border", "nearest"), ("reflection", "mirror"), (-3.5, "grid-constant")]))
def test_linear_equals_scipy(shape: list[int], modes: tuple[Padding, str]) -> None:
    padding, mode = modes
    data = uniform(2, *shape)
    coords = anywhere(data.shape[:0:-1], 60)
    fill = padding if isinstance(padding, float) else 0.0
    expected = [
        scipy.ndimage.map_coordinates(c, coords.flip(0).numpy(), order=1, mode=mode, cval=fill) for c in data.numpy()
    ]
    assert_close(interpolate(data, coords, padding=padding), tensor(np.array(expected)), rtol=0, atol=1e-12)


@both_paths
def test_float32_is_as_near_to_the_truth_as_grid_sample(native_path: bool) -> None:
    data = uniform(1, 96, 96, 96)
    coords = inner((96, 96, 96), 96**3)
    truth = sample(data, coords).value
    with path(native_path):
        ours = interpolate(data.float(), coords.float())
    theirs = torch_sample(data.float(), coords.float(), "border")
    errors = [float((found - truth).abs().max()) for found in (ours, theirs)]
    assert 0 < errors[0] <= errors[1] < 1e-3


@both_paths
@given(dimensions, st.sampled_from(DTYPES))
def test_a_linear_image_is_exact_inside(native_path: bool, dimension: int, dtype: torch.dtype) -> None:
    size = SHAPES[dimension][::-1]
    slope, offset = uniform(dimension), uniform(1)
    index = np.indices(SHAPES[dimension])[::-1].reshape(dimension, -1)
    data = (slope @ tensor(index.copy()) + offset).reshape(1, *SHAPES[dimension]).to(dtype)
    coords = inner(size, 100).to(dtype)
    with path(native_path):
        found = sample(data, coords)
    tolerance = 40 * torch.finfo(dtype).eps
    assert_close(found.value[0], (slope.to(dtype) @ coords + offset.to(dtype)), rtol=0, atol=tolerance)
    expected = slope.to(dtype)[None, :, None].expand_as(found.gradient)
    inside = ((coords > 0.01) & (coords < tensor(size)[:, None] - 1.01)).all(0)
    assert_close(found.gradient[..., inside], expected[..., inside], rtol=0, atol=tolerance)


@every_dimension
@every_dtype
def test_values_at_voxels_are_the_data(dimension: int, dtype: torch.dtype) -> None:
    data = uniform(2, *SHAPES[dimension]).to(dtype)
    index = torch.as_tensor(np.indices(SHAPES[dimension])[::-1].copy()).to(dtype)
    for mode, padding in itertools.product(("linear", "nearest"), PADDINGS):
        assert torch.equal(interpolate(data, index, interpolation=mode, padding=padding), data)  # type: ignore[arg-type]
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert_close(interpolate(data, index, interpolation="cubic", padding="zeros"), data, rtol=0, atol=tolerance)


def test_values_by_hand() -> None:
    data = tensor([[1.0, 3.0, 9.0]])
    coords = tensor([[-1.5, -0.25, 0.5, 1.75, 2.5, 4.0]])
    expected: dict[Any, list[float]] = {
        "border": [1.0, 1.0, 2.0, 7.5, 9.0, 9.0],
        "zeros": [0.0, 0.75, 2.0, 7.5, 4.5, 0.0],
        "reflection": [6.0, 1.5, 2.0, 7.5, 6.0, 1.0],
        5.0: [5.0, 2.0, 2.0, 7.5, 7.0, 5.0],
    }
    slopes: dict[Any, list[float]] = {
        "border": [0.0, 0.0, 2.0, 6.0, 0.0, 0.0],
        "zeros": [0.0, 1.0, 2.0, 6.0, -9.0, 0.0],
        "reflection": [-6.0, -2.0, 2.0, 6.0, -6.0, 0.0],
        5.0: [0.0, -4.0, 2.0, 6.0, -4.0, 0.0],
    }
    for padding, values in expected.items():
        for kernel in (True, False):
            with path(kernel):
                found = sample(data, coords, padding=padding)
            assert_close(found.value, tensor([values]), rtol=0, atol=1e-14)
            assert_close(found.gradient[0], tensor([slopes[padding]]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("fill", [-1024.0, 1e30, math.inf, math.nan])
@both_paths
@every_dtype
def test_what_pads_does_not_reach_inside(fill: float, native_path: bool, dtype: torch.dtype) -> None:
    """A value far from the data's must not cost their precision, one that is not finite not the data."""
    data = (1e-3 * uniform(1, 6, 7)).to(dtype)
    coords = (uniform(2, 300) * 2.4 + tensor([[3.0], [2.5]])).to(dtype)
    with path(native_path):
        found, expected = (sample(data, coords, padding=padding) for padding in (fill, "border"))
    assert torch.equal(found.value, expected.value)
    if not math.isinf(fill):  # infinity minus infinity
        outside = tensor([[-2.5, 3.0], [2.0, 9.0]]).to(dtype)
        with path(native_path):
            found = sample(data, outside, padding=fill)
        assert_close(found.value, torch.full_like(found.value, fill), rtol=0, atol=0, equal_nan=True)


# -- the kernel and the plain path -----------------------------------------------------------------------------


def scattered(size: tuple[int, ...], count: int, seed: int = 1) -> Tensor:
    """Everything that may come: smooth places, knots, borders, lost and infinite points."""
    coords = torch.where(uniform(1, count, seed=seed) < 0, anywhere(size, count, seed), on_knots(size, count, seed))
    odd = [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e7, -0.0]
    for k, value in enumerate(odd[:count]):
        coords[k % len(size), (k * 17) % count] = value
    return coords


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For the kernel alone: torch's own threads would wait for each other where the cores are busy."""
    with mock.patch.object(native.torch, "get_num_threads", lambda: 2):
        yield


def agree(data: Tensor, coords: Tensor, padding: Padding) -> None:
    found, expected = sample(data, coords, padding=padding), gather(data, coords, padding)
    # Both round, and only the compiler may fuse a multiplication with an addition.  The largest part of an index
    # that is reflected is 1e6 voxels, where float32 is no finer than 1/16.
    tolerance = 32 * torch.finfo(data.dtype).eps
    assert [part.shape for part in found] == [part.shape for part in expected]
    assert [part.dtype for part in found] == [data.dtype] * 3
    for name, a, b in zip(("value", "gradient", "inside"), found, expected, strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance * 4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@every_dimension
@every_dtype
@every_padding
def test_the_kernel_equals_the_plain_path(
    two_threads: None, dimension: int, dtype: torch.dtype, padding: Padding
) -> None:
    """Counts about the kernel's blocks of 128, and for one padding of each dimension enough for a second thread."""
    many = 40_000 if padding == PADDINGS[dimension] else 300
    for channels, count in ((1, 0), (2, 1), (1, 127), (3, 128), (2, 129), (1, many)):
        data = uniform(channels, *SHAPES[dimension]).to(dtype)
        agree(data, scattered(SHAPES[dimension][::-1], count).to(dtype), padding)


@given(shapes, paddings, st.sampled_from(DTYPES), st.integers(1, 3), st.integers(0, 300), st.integers(0, 99))
def test_the_kernel_equals_the_plain_path_on_axes_of_any_length(
    shape: list[int], padding: Padding, dtype: torch.dtype, channels: int, count: int, seed: int
) -> None:
    data = uniform(channels, *shape, seed=seed).to(dtype)
    agree(data, scattered(data.shape[:0:-1], count, seed + 1).to(dtype), padding)


# -- without the kernel ----------------------------------------------------------------------------------------


def folded(
    shape: list[int], images: int, div: int, count: int, dtype: torch.dtype, channels: int = 1
) -> tuple[Tensor, Tensor]:
    """Images (I, C, *shape) and coordinates (B, D, N) as `_Linear` folds them: each image at `div` sets, and again."""
    sets = [scattered(tuple(shape[::-1]), count, seed) for seed in range(images * div * 2)]
    return uniform(images, channels, *shape).to(dtype), torch.stack(sets).to(dtype)


@given(
    shapes,
    st.sampled_from((*PADDINGS, 0.0, math.nan)),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 200),
    st.sampled_from((1, 40, 2**16)),
)
def test_grid_sample_equals_gather(
    shape: list[int], padding: Padding, dtype: torch.dtype, counts: tuple[int, int, int], count: int, block: int
) -> None:
    """Everywhere, in any batch, whatever the blocks into which it is cut."""
    images, div, channels = counts
    data, coords = folded(shape, images, div, count, dtype, channels)
    with mock.patch.object(sampling, "BLOCK", block):
        found = sampling._by_grid_sample(data, coords, padding, div)
    expected = sampling._batched(data, coords, padding, div)
    assert found is not None
    # `grid_sample` keeps what it reflects to a rounding error of as many voxels as it is away.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if padding == "reflection" else 4e-6
    for name, a, b in zip(Sampled._fields, found, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("size", [28, 333, 1000])
@every_dtype
def test_rounding_of_grid_sample_does_not_choose_a_side(padding: Any, size: int, dtype: torch.dtype) -> None:
    """Its coordinates lose up to half of a millionth of the size, which is more than what counts as on the knot."""
    data = uniform(1, 2, size).to(dtype)
    knots = torch.arange(-3.0 * size, 4.0 * size, dtype=torch.float64)
    away = torch.cat([sign * KNOT[dtype] * tensor([0.5, 1.5, 3.0, 10.0, 30.0]) for sign in (-1, 1)])
    x = (knots[:, None] + away).reshape(-1).to(dtype)
    coords = torch.stack([x, torch.full_like(x, 0.25)])
    with path(False):
        found = sample(data, coords, padding=padding).gradient[:, 0]
    expected = gather(data, coords, padding).gradient[:, 0]
    assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@every_dimension
def test_reflections_from_far_away_are_exact(dimension: int) -> None:
    data, coords = uniform(1, *SHAPES[dimension]), anywhere(SHAPES[dimension][::-1], 40)
    coords = coords + tensor([-5e5, -3e4, 4e4, 5e5]).repeat(10)
    with path(False):
        found = sample(data, coords, padding="reflection")
    for a, b in zip(found, gather(data, coords, "reflection"), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_only_some_points_are_left_to_gather() -> None:
    """By `grid_sample` where all is smooth; near knots, lost and far away, and in constant padding, by `gather`."""
    data, coords = uniform(2, 4, 5, 6), off_the_knots((6, 5, 4), 50)
    outside = int(((coords < 0) | (coords > tensor([[5.0], [4.0], [3.0]]))).any(0).sum())
    odd = coords.clone()
    odd[0, 3], odd[1, 7], odd[2, 11], odd[2, 40] = 2.0, math.nan, -math.inf, 1e7
    with path(False), mock.patch.object(sampling, "gather", wraps=gather) as spy:
        for where, padding, expected in (
            (coords, "border", []),
            (coords, "zeros", []),
            (coords, "reflection", []),
            (odd, "border", [4]),
            (coords, -3.5, [outside]),
        ):
            sample(data, where, padding=padding)  # type: ignore[arg-type]
            assert [call.args[1].shape[1] for call in spy.call_args_list] == expected, padding
            spy.reset_mock()


def test_without_numbers_to_look_at_the_plain_path_is_taken() -> None:
    data, coords = (x.to("meta") for x in (uniform(2, 4, 5), inner((5, 4), 7)))
    with path(False), mock.patch.object(sampling, "_by_grid_sample", side_effect=AssertionError("looks at numbers")):
        assert [part.shape for part in sample(data, coords)] == [(2, 7), (2, 2, 7), (7,)]


@every_dimension
@every_padding
@every_dtype
def test_all_stays_on_the_device_and_in_the_dtype_of_the_data(
    dimension: int, padding: Padding, dtype: torch.dtype
) -> None:
    """The meta device stands in for any but the CPU, and refuses what mixes the two."""
    data = torch.zeros(2, *SHAPES[dimension], dtype=dtype, device="meta")
    coords = torch.zeros(dimension, 7, dtype=torch.float64, device="meta")

    def total(data: Tensor, coords: Tensor) -> Tensor:
        found = sample(data, coords, padding=padding)
        return found.value.square().sum() + found.gradient.square().sum()

    made = [interpolate(data, coords, interpolation=mode, padding=padding) for mode in ("linear", "nearest", "cubic")]
    several = vmap(lambda d, x: sample(d, x, padding=padding), (0, None))(data.expand(3, *data.shape), coords)
    made += [*several, *grad(total, argnums=(0, 1))(data, coords.to(dtype))]
    for found in made:
        assert found.is_meta and found.dtype == dtype


@pytest.mark.cuda
@every_dimension
@every_padding
@every_dtype
def test_a_gpu_equals_the_plain_path(dimension: int, padding: Padding, dtype: torch.dtype) -> None:
    data = uniform(2, *SHAPES[dimension]).to("cuda", dtype)
    agree(data, scattered(SHAPES[dimension][::-1], 300).to("cuda", dtype), padding)


# -- single voxels, layouts, sizes and dtypes ------------------------------------------------------------------


@every_dimension
def test_single_voxels(dimension: int) -> None:
    data = torch.full((1, *[1] * dimension), 2.0, dtype=torch.float64)
    coords = tensor([[-3.0, -0.5, 0.0, 0.25, 7.0]]).expand(dimension, -1)
    for padding in ("border", "reflection"):
        agree(data, coords, padding)
        found = sample(data, coords, padding=padding)
        assert bool((found.value == 2).all()) and not bool(found.gradient.any())
    for mode in ("nearest", "cubic"):
        found = interpolate(data, coords, interpolation=mode)  # type: ignore[arg-type]
        assert_close(found, torch.full_like(found, 2.0), rtol=0, atol=1e-14)
    zeros = sample(data, coords, padding="zeros").value[0]
    assert_close(zeros, 2 * (1 - coords[0].abs()).clamp(min=0) ** dimension, rtol=0, atol=1e-15)


def test_layouts_do_not_matter() -> None:
    data, coords = uniform(6, 5, 4).permute(2, 1, 0), uniform(50, 2).mT * 4 + 2
    assert not data.is_contiguous() and not coords.is_contiguous()
    for a, b in zip(sample(data, coords), sample(data.contiguous(), coords.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_an_image_beyond_32_bits_takes_the_plain_path() -> None:
    """One value stands for all 2^32 voxels here, and is not copied."""
    data = torch.tensor(3.0).expand(1, 2**16, 2**16)
    coords = torch.tensor([[60_000.5, -5.0], [65_534.25, 7.0]])
    assert sample(data, coords, padding="zeros").value.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_plain_path(dtype: torch.dtype) -> None:
    data = torch.arange(6.0).reshape(1, 2, 3).to(dtype)
    found = sample(data, torch.tensor([[0.5, 1.0], [0.5, 1.0]], dtype=dtype))
    assert found.value.dtype == dtype and found.value.tolist() == [[2.0, 4.0]]


def test_coordinates_take_the_dtype_of_the_data() -> None:
    assert sample(uniform(1, 5).float(), tensor([[1.5]])).value.dtype == torch.float32
    assert interpolate(uniform(1, 5), torch.tensor([[2]])).dtype == torch.float64


# -- nearest and cubic -----------------------------------------------------------------------------------------


@given(shapes, st.sampled_from(("border", "reflection")))
def test_nearest_equals_scipy(shape: list[int], padding: Any) -> None:
    """Away from halves, where conventions differ."""
    data = uniform(2, *shape)
    coords = anywhere(data.shape[:0:-1], 60)
    coords = coords[:, ((coords - coords.floor() - 0.5).abs() > 1e-3).all(0)]
    mode = {"border": "nearest", "reflection": "mirror"}[padding]
    expected = [scipy.ndimage.map_coordinates(c, coords.flip(0).numpy(), order=0, mode=mode) for c in data.numpy()]
    assert torch.equal(interpolate(data, coords, interpolation="nearest", padding=padding), tensor(np.array(expected)))


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection", 7.0, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_nearest_keeps_labels_exactly(dtype: torch.dtype, padding: Any) -> None:
    labels = torch.tensor([[2**24 + 1, -(2**24) - 3, 2**31 - 1]], dtype=dtype)
    if dtype == torch.int64:
        labels = labels + 2**53
    coords = torch.tensor([[-0.49, 0.2, 0.5, 1.4, 1.5, 2.0]])
    a, b, c = labels[0].tolist()
    found = interpolate(labels, coords, interpolation="nearest", padding=padding)
    assert found.dtype == dtype
    assert found.tolist() == [[a, a, b, b, c, c]]  # halves round up
    outside = interpolate(labels, torch.tensor([[-3.0, 4.0]]), interpolation="nearest", padding=padding)
    fill = 0 if padding == "zeros" else padding
    expected = {"border": [a, c], "reflection": [b, a]}.get(padding, [fill, fill])
    assert outside.dtype == dtype and outside.tolist() == [expected]


def test_nearest_of_masks_and_bytes() -> None:
    coords = torch.tensor([[0.0, 1.0, 5.0]])
    mask = interpolate(torch.tensor([[False, True]]), coords, interpolation="nearest", padding="zeros")
    assert mask.dtype == torch.bool and mask.tolist() == [[False, True, False]]
    small = interpolate(torch.tensor([[7, 255]], dtype=torch.uint8), coords, interpolation="nearest", padding=9.0)
    assert small.dtype == torch.uint8 and small.tolist() == [[7, 255, 9]]


@given(shapes, st.integers(0, 99))
def test_cubic_equals_scipy(shape: list[int], seed: int) -> None:
    data = uniform(2, *shape, seed=seed)
    coords = torch.cat([anywhere(data.shape[:0:-1], 40), on_knots(data.shape[:0:-1], 20)], 1)
    expected = [scipy.ndimage.map_coordinates(c, coords.flip(0).numpy(), order=3, mode="mirror") for c in data.numpy()]
    found = interpolate(data, coords, interpolation="cubic", padding="reflection")
    assert_close(found, tensor(np.array(expected)), rtol=0, atol=1e-11)
    # The other paddings differ outside only: the border's value, or a constant.
    limits = tensor(data.shape[:0:-1])[:, None] - 1
    held = coords.clamp(min=0).minimum(limits)
    found, border = (interpolate(data, x, interpolation="cubic", padding="border") for x in (coords, held))
    assert_close(found, border, rtol=0, atol=0)
    within = (coords == held).all(0)
    assert_close(found[:, within], tensor(np.array(expected))[:, within], rtol=0, atol=1e-11)
    padded = interpolate(data, coords, interpolation="cubic", padding=-3.5)
    assert_close(padded, torch.where(within, found, -3.5), rtol=0, atol=1e-11)


@every_dimension
def test_cubic_is_differentiable_and_runs_in_a_batch(dimension: int) -> None:
    data, coords = uniform(3, 1, *SHAPES[dimension]), uniform(3, dimension, 4) * 2.3 + 1.6
    small = (3, 4, 5)[:dimension] if dimension < 3 else (2, 1, 3)

    def function(d: Tensor, x: Tensor) -> Tensor:
        return interpolate(d, x, interpolation="cubic", padding="reflection")

    alone = torch.stack([function(d, x) for d, x in zip(data, coords, strict=True)])
    assert_close(vmap(function)(data, coords), alone, rtol=0, atol=1e-13)
    inputs = (uniform(1, *small).requires_grad_(), coords[0, :, :2].clone().requires_grad_())
    gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(function, inputs)


# -- what lies inside, what is lost ----------------------------------------------------------------------------


@both_paths
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_inside_is_within_the_outer_borders(native_path: bool, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    data = uniform(2, *shape).to(dtype)
    coords = torch.cat([anywhere(data.shape[:0:-1], 80, seed), on_knots(data.shape[:0:-1], 80, seed)], 1).to(dtype)
    n = torch.tensor(data.shape[:0:-1], dtype=dtype)[:, None]
    with path(native_path):
        found = sample(data, coords).inside
    assert found.dtype == dtype
    assert torch.equal(found, ((coords >= -0.5) & (coords <= n - 0.5)).all(0).to(dtype))


@both_paths
@every_dtype
def test_rounding_does_not_put_the_border_outside(native_path: bool, dtype: torch.dtype) -> None:
    near = KNOT[dtype]
    coords = torch.tensor([[-0.5 - near / 2, -0.5 - 3 * near, 4.5 + near / 2, 4.5 + 3 * near]], dtype=dtype)
    with path(native_path):
        assert sample(torch.zeros(1, 5, dtype=dtype), coords).inside.tolist() == [1.0, 0.0, 1.0, 0.0]


@both_paths
@every_dimension
@every_padding
def test_a_lost_point_is_lost_alone(native_path: bool, dimension: int, padding: Padding) -> None:
    data, coords = uniform(2, *SHAPES[dimension]), inner(SHAPES[dimension][::-1], 9)
    lost = coords.clone()
    lost[-1, 4] = torch.nan
    others = torch.arange(9) != 4
    with path(native_path):
        whole, found = sample(data, coords, padding=padding), sample(data, lost, padding=padding)
        slope = grad(lambda x: sample(data, x, padding=padding).value.sum())(lost)
    assert bool(found.value[:, 4].isnan().all()) and bool(found.gradient[..., 4].isnan().all())
    assert float(found.inside[4]) == 0
    assert bool(slope[:, 4].isnan().all())
    for part, complete in zip(found, whole, strict=True):
        assert torch.equal(part[..., others], complete[..., others])
    assert bool(slope[:, others].isfinite().all())
    for mode in ("nearest", "cubic"):
        value = interpolate(data, lost, interpolation=mode, padding=padding)  # type: ignore[arg-type]
        assert bool(value[:, 4].isnan().all()) and bool(value[:, others].isfinite().all())


@both_paths
@every_padding
@every_dtype
@pytest.mark.parametrize("far", [1e7, 1e30, math.inf])
def test_far_away_is_padding(native_path: bool, padding: Padding, dtype: torch.dtype, far: float) -> None:
    data = uniform(1, 4, 5).to(dtype)
    coords = torch.tensor([[far, -far, 2.0, far], [1.0, 1.0, -far, -far]], dtype=dtype)
    modes: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: sample(data, coords, padding=padding).value,
        "nearest": lambda: interpolate(data, coords, interpolation="nearest", padding=padding),
        "cubic": lambda: interpolate(data, coords, interpolation="cubic", padding=padding),
    }
    with path(native_path):
        for name, function in modes.items():
            value = function()[0]
            assert bool(value.isfinite().all()), name
            if padding == "border":
                expected = torch.stack([data[0, 1, 4], data[0, 1, 0], data[0, 0, 2], data[0, 0, 4]])
                assert_close(value, expected, rtol=0, atol=1e-5)
            elif padding != "reflection":
                assert value.tolist() == [0.0 if padding == "zeros" else padding] * 4
        found = sample(data, coords, padding=padding)
    assert not bool(found.inside.any())
    if padding != "reflection":
        assert not bool(found.gradient[0, 0, [0, 1, 3]].any()) and not bool(found.gradient[0, 1, 2:].any())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_far_away_labels(dtype: torch.dtype) -> None:
    labels = torch.tensor([[5, 6, 7]], dtype=dtype)
    found = interpolate(labels, torch.tensor([[1e30, -math.inf, math.inf]]), interpolation="nearest")
    assert found.tolist() == [[7, 5, 7]]


# -- on the knots ----------------------------------------------------------------------------------------------


@both_paths
@every_dimension
@every_padding
def test_the_gradient_on_a_knot_is_the_mean_of_both_sides(native_path: bool, dimension: int, padding: Padding) -> None:
    """One-sided differences are exact over a cell; along each axis alone, at every voxel and around the image."""
    data = uniform(2, *SHAPES[dimension])
    ranges = [torch.arange(-2.0, n + 2, dtype=torch.float64) for n in SHAPES[dimension][::-1]]
    coords = torch.stack(torch.meshgrid(*ranges, indexing="ij")).reshape(dimension, -1)
    coords = coords + tensor([0.0, 0.3, 0.6])[:dimension, None]  # knots along x only, in 2-D and 3-D
    h = 0.25
    with path(native_path):
        gradient = sample(data, coords, padding=padding).gradient
        value = [sample(data, coords + shift, padding=padding).value for shift in shifts(dimension, h)]
        everywhere = sample(data, coords.floor(), padding=padding).gradient
        around = [sample(data, coords.floor() + shift, padding=padding).value for shift in shifts(dimension, h)]
    centre, left, right = value
    assert_close(gradient[:, 0], ((right - centre) / h + (centre - left) / h) / 2, rtol=0, atol=1e-12)
    assert_close(everywhere[:, 0], (around[2] - around[1]) / (2 * h), rtol=0, atol=1e-12)


def shifts(dimension: int, h: float) -> list[Tensor]:
    along_x = torch.zeros(dimension, 1, dtype=torch.float64)
    along_x[0] = h
    return [0 * along_x, -along_x, along_x]


@both_paths
def test_every_axis_has_its_own_knots(native_path: bool) -> None:
    """At voxel centres all three axes are at a knot: each derivative is the central difference along its axis."""
    data = uniform(1, 5, 6, 7)
    index = torch.as_tensor(np.indices((3, 4, 5))[::-1].copy()).reshape(3, -1) + 1.0
    with path(native_path):
        gradient = sample(data, index.to(torch.float64)).gradient[0]
    expected = np.gradient(data[0].numpy())[::-1]
    for k in range(3):
        assert_close(gradient[k], tensor(expected[k][1:-1, 1:-1, 1:-1].copy()).reshape(-1), rtol=0, atol=1e-13)


@both_paths
@every_dtype
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_rounding_does_not_choose_a_side(native_path: bool, dtype: torch.dtype, side: float) -> None:
    """Within a rounding error of a knot the gradient is that of the knot, further away the cell's."""
    data = torch.tensor([[0.0, 1.0, 5.0, 6.0]], dtype=dtype)
    coords = torch.tensor([[2 + side * KNOT[dtype] / 4, 2 + side * KNOT[dtype] * 4]], dtype=dtype)
    with path(native_path):
        found = sample(data, coords).gradient[0, 0]
    assert_close(found, torch.tensor([2.5, 1.0 if side > 0 else 4.0], dtype=dtype), rtol=0, atol=1e-6)


# -- derivatives -----------------------------------------------------------------------------------------------


def inputs_of(dimension: int, channels: int = 2) -> tuple[Tensor, Tensor]:
    """A small image, and points off the knots: inside, in the padding, and in between."""
    shape = {1: (4,), 2: (3, 4), 3: (2, 2, 3)}[dimension]
    x, y, z = [0.6, -0.3, 3.8, 2.4], [1.3, 0.4, 1.2, -1.7], [0.7, 0.2, 0.9, 0.4]
    coords = tensor([x, y, z])[:dimension, : 5 - dimension].clone()
    return uniform(channels, *shape).requires_grad_(), coords.requires_grad_()


# All paddings in the first derivative by the kernel, in few dimensions beyond it: that is what takes time.
GRADIENT_CASES = [(1, "border"), (1, "zeros"), (2, "reflection"), (2, -3.5), (3, "zeros")]


@every_dimension
@every_padding
def test_first_derivatives_of_the_kernel(dimension: int, padding: Padding) -> None:
    """Of value and gradient, by data and coordinates, in reverse and forward mode, one and many at once."""
    check_first_derivatives(dimension, padding)


@pytest.mark.parametrize(("dimension", "padding"), GRADIENT_CASES)
def test_first_derivatives_of_the_plain_path(dimension: int, padding: Padding) -> None:
    with path(False):
        check_first_derivatives(dimension, padding)


def check_first_derivatives(dimension: int, padding: Padding) -> None:
    def function(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return sample(d, x, padding=padding)[:2]

    gradcheck(function, inputs_of(dimension), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize(("dimension", "padding"), GRADIENT_CASES)
def test_second_derivatives(dimension: int, padding: Padding) -> None:
    def function(d: Tensor, x: Tensor) -> Tensor:
        return sample(d, x, padding=padding).value

    gradgradcheck(function, inputs_of(dimension, channels=1), check_fwd_over_rev=True)


@every_dimension
def test_the_gradient_is_the_derivative_of_the_value(dimension: int) -> None:
    data, coords = uniform(2, *SHAPES[dimension]), off_the_knots(SHAPES[dimension][::-1], 20)
    for padding in PADDINGS:
        found = sample(data, coords, padding=padding)
        jacobian = jacrev(lambda x, p=padding: sample(data, x, padding=p).value.sum(1))(coords)  # (C, D, N)
        assert torch.equal(jacobian, found.gradient)


def test_inside_has_no_derivative() -> None:
    data, coords = inputs_of(2)
    assert not sample(data, coords).inside.requires_grad


@every_dimension
def test_third_derivatives_equal_the_plain_path(dimension: int) -> None:
    """Of a nonlinear function, so that none of them vanishes."""
    data, coords = (x.detach() for x in inputs_of(dimension, channels=1))

    def energy(how: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        def of(d: Tensor, x: Tensor) -> Tensor:
            found = how(d, x)
            return torch.sin(found.value).sum() + found.gradient.pow(3).sum()

        return of

    def third(how: Callable[..., Any], *ways: Any) -> Tensor:
        function: Any = energy(how)
        for way in ways:
            function = way(function, 1)
        return function(data, coords)

    expected = third(gather, jacrev, jacrev, jacrev)
    assert float(expected.abs().max()) > 1e-2
    for ways in itertools.product((jacrev, jacfwd), repeat=3):
        if ways.count(jacfwd) <= 1:
            assert_close(third(sample, *ways), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("argument", [0, 1], ids=["data", "coords"])
@every_dimension
def test_jacobians_and_hessians_agree_in_every_mode(dimension: int, argument: int) -> None:
    inputs = [x.detach() for x in inputs_of(dimension, channels=1)]

    def function(how: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            found = how(*[x if k == argument else other for k, other in enumerate(inputs)])
            return torch.cat([found.value.flatten() ** 3, torch.tanh(found.gradient).flatten()])

        return of

    x = inputs[argument]
    first = jacrev(function(gather))(x)
    second = jacrev(jacrev(function(gather)))(x)
    assert float(first.abs().max()) > 1e-2 and float(second.abs().max()) > 1e-2
    for way in (jacrev, jacfwd):
        assert_close(way(function(sample))(x), first, rtol=0, atol=1e-12)
    for way in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacrev(f))):
        assert_close(way(function(sample))(x), second, rtol=0, atol=1e-11)


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_the_derivative_by_data_equals_that_of_grid_sample(dimension: int, padding: str) -> None:
    data, coords = uniform(2, *SHAPES[dimension]), anywhere(SHAPES[dimension][::-1], 40)
    weight = uniform(2, 40, seed=5)
    ours = grad(lambda d: (weight * sample(d, coords, padding=padding).value).sum())(data)  # type: ignore[arg-type]
    theirs = grad(lambda d: (weight * torch_sample(d, coords, padding)).sum())(data)
    assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_derivative_by_coordinates_equals_that_of_grid_sample(dimension: int) -> None:
    data, coords = uniform(2, *SHAPES[dimension]), off_the_knots(SHAPES[dimension][::-1], 40)
    ours = grad(lambda x: sample(data, x).value.square().sum())(coords)
    theirs = grad(lambda x: torch_sample(data, x, "border").square().sum())(coords)
    assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_nearest_has_derivatives_by_data_only() -> None:
    data, coords = uniform(1, 4, 5), uniform(2, 6) * 2 + 2
    by_data, by_coords = jacrev(lambda d, x: interpolate(d, x, interpolation="nearest"), (0, 1))(data, coords)
    assert torch.equal(by_data.sum((0, 2, 3, 4)), torch.ones(6, dtype=torch.float64))
    assert not bool(by_coords.any())


def test_unused_outputs_cost_no_derivative() -> None:
    """A loss of the value alone does not ask for the derivative by data, and so never takes the plain path."""
    data, coords = uniform(1, 4, 5), off_the_knots((5, 4), 6).requires_grad_()
    if native.load() is None:
        pytest.skip("needs a C compiler")
    with mock.patch.object(sampling, "gather", side_effect=AssertionError("the plain path")):
        sample(data, coords).value.sum().backward()
        assert coords.grad is not None and bool(coords.grad.any())
        vmap(grad(lambda x: sample(data, x).value.sum()))(coords.detach()[None])


def test_two_tangents_at_once() -> None:
    data, coords = (x.detach() for x in inputs_of(2))
    tangents = (uniform(*data.shape, seed=3), uniform(*coords.shape, seed=4))
    for padding in PADDINGS:
        found, expected = (
            jvp(lambda d, x, h=how, p=padding: tuple(h(d, x, padding=p)[:2]), (data, coords), tangents)
            for how in (sample, gather)
        )
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert_close(a, b, rtol=0, atol=1e-12)


# -- batches ---------------------------------------------------------------------------------------------------

KINDS = ((0, 0), (0, None), (None, 0))  # each item its own data and coordinates, its own data, its own coordinates


def nested(function: Any, kinds: tuple[tuple[int | None, int | None], ...]) -> Any:
    for kind in reversed(kinds):
        function = vmap(function, in_dims=kind)
    return function


def loop(function: Any, kinds: tuple[tuple[int | None, int | None], ...]) -> Any:
    """The same one by one."""
    if not kinds:
        return function
    deeper = loop(function, kinds[1:])

    def of(data: Tensor, coords: Tensor) -> Any:
        size = data.shape[0] if kinds[0][0] == 0 else coords.shape[0]
        items = [
            deeper(*[v if k is None else v[i] for v, k in zip((data, coords), kinds[0], strict=True)])
            for i in range(size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*items, strict=True))

    return of


def batched_inputs(kinds: tuple[tuple[int | None, int | None], ...], dimension: int) -> tuple[Tensor, Tensor]:
    sizes = (2, 3, 2)
    leading = [[n for n, kind in zip(sizes, kinds, strict=False) if kind[which] == 0] for which in (0, 1)]
    shape = SHAPES[dimension]
    coords = off_the_knots(shape[::-1], 5 * math.prod(leading[1]))
    return uniform(*leading[0], 2, *shape), coords.reshape(dimension, *leading[1], 5).movedim(0, -2)


COMBINATIONS = [kinds for depth in (1, 2, 3) for kinds in itertools.product(KINDS, repeat=depth)]
NAMES = {(0, 0): "both", (0, None): "data", (None, 0): "coords"}


NESTED = [(kinds, kernel) for kinds in COMBINATIONS for kernel in (True, False) if kernel or len(kinds) < 3]


@pytest.mark.parametrize(
    ("kinds", "native_path"),
    NESTED,
    ids=["-".join([*(NAMES[k] for k in kinds), "kernel" if kernel else "plain"]) for kinds, kernel in NESTED],
)
def test_nested_batches_equal_loops(kinds: tuple[tuple[int | None, int | None], ...], native_path: bool) -> None:
    """Values, what the kernel gives beside them, and derivatives taken within the batch and through it."""

    def energy(d: Tensor, x: Tensor) -> Tensor:
        found = sample(d, x, padding="zeros")
        return found.value.square().sum() + found.gradient.sin().sum()

    def everything(d: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (*sample(d, x, padding="zeros"), *grad(energy, argnums=(0, 1))(d, x))

    inputs = batched_inputs(kinds, 2)
    with path(native_path):
        found = nested(everything, kinds)(*inputs)
        through = vjp(lambda d, x: nested(energy, kinds)(d, x).sum(), *inputs)[1](torch.ones((), dtype=torch.float64))
    expected = loop(everything, kinds)(*inputs)
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)
    # Shared inputs collect the derivatives of all items.
    alone = vjp(lambda d, x: loop(lambda *a: (energy(*a),), kinds)(d, x)[0].sum(), *inputs)[1](
        torch.ones((), dtype=torch.float64)
    )
    for a, b in zip(through, alone, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kinds", [kinds for kinds in COMBINATIONS if len(kinds) == 2])
def test_nested_batches_stay_on_their_device(kinds: tuple[tuple[int | None, int | None], ...]) -> None:
    def slopes(d: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda d, x: sample(d, x).value.square().sum(), argnums=(0, 1))(d, x)

    inputs = [x.to("meta") for x in batched_inputs(kinds, 2)]
    found, pull = vjp(nested(slopes, kinds), *inputs)
    for made in (*found, *pull(found)):
        assert made.is_meta


@both_paths
def test_layouts_do_not_matter_to_the_transpose(native_path: bool) -> None:
    data, coords, weights = uniform(2, 5, 6), off_the_knots((6, 5), 7), uniform(2, 7)

    def pulled(coords: Tensor, weights: Tensor) -> Tensor:
        return vjp(lambda d: sample(d, coords).value, data)[1](weights)[0]

    with path(native_path):
        expected = pulled(coords, weights)
        for x in (coords, coords.mT.contiguous().mT, coords.repeat_interleave(2, 1)[:, ::2]):
            for w in (weights, weights.mT.contiguous().mT, weights.repeat_interleave(3, 1)[:, ::3]):
                assert_close(pulled(x, w), expected, rtol=0, atol=1e-14)


def spread(values: Tensor, coords: Tensor, items: int, div: int) -> Tensor:
    """The transpose of linear interpolation, item (b // div) % items of the data for batch b."""
    return sampling._Spread.apply(values, coords, (5, 6), items, "zeros", div)  # type: ignore[no-untyped-call]


@both_paths
@pytest.mark.parametrize(("items", "div", "batch"), [(1, 1, 3), (3, 1, 3), (2, 3, 6), (2, 1, 6), (3, 2, 4)])
def test_batches_of_the_transpose_equal_loops(items: int, div: int, batch: int, native_path: bool) -> None:
    values, coords = uniform(4, batch, 2, 7), off_the_knots((6, 5), 7 * 4 * batch).reshape(2, 4, batch, 7)
    coords = coords.permute(1, 2, 0, 3)
    with path(native_path):
        found = vmap(lambda v, x: spread(v, x, items, div))(values, coords)
        shared = vmap(lambda v: spread(v, coords[0], items, div))(values)
    for k in range(4):
        for x, several in ((coords[k], found), (coords[0], shared)):
            expected = torch.zeros(items, 2, 5, 6, dtype=torch.float64)
            for b in range(batch):
                zero = torch.zeros(2, 5, 6, dtype=torch.float64)
                pull = vjp(lambda d, x=x, b=b: gather(d, x[b], "zeros").value, zero)[1]
                expected[b // div % items] += pull(values[k, b])[0]
            assert_close(several[k], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", [(True, True), (True, False), (False, True)], ids=["both", "values", "coords"])
def test_tangents_of_the_transpose_are_those_of_its_pull_back(by: tuple[bool, bool]) -> None:
    """<w, J t> = <J^T w, t>."""
    given = uniform(3, 2, 7), off_the_knots((6, 5), 21).reshape(2, 3, 7).movedim(0, 1)
    moved = tuple(x for x, wanted in zip(given, by, strict=True) if wanted)

    def function(*some: Tensor) -> Tensor:
        rest = iter(some)
        return spread(*(next(rest) if wanted else x for x, wanted in zip(given, by, strict=True)), 3, 1)

    tangents = tuple(uniform(*x.shape, seed=5 + k) for k, x in enumerate(moved))
    out, tangent = jvp(function, moved, tangents)
    weights = uniform(*out.shape, seed=9)
    pulled = vjp(function, *moved)[1](weights)
    expected = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    assert_close((weights * tangent).sum(), expected, rtol=0, atol=1e-12)


@every_dimension
@every_dtype
def test_batches_of_every_dimension(dimension: int, dtype: torch.dtype) -> None:
    for kinds in ((KINDS[0],), (KINDS[2], KINDS[1])):
        inputs = [x.to(dtype) for x in batched_inputs(kinds, dimension)]
        for padding in PADDINGS:

            def function(d: Tensor, x: Tensor, p: Padding = padding) -> Any:
                return tuple(sample(d, x, padding=p))

            tolerance = 1e-12 if dtype == torch.float64 else 3e-5
            for a, b in zip(nested(function, kinds)(*inputs), loop(function, kinds)(*inputs), strict=True):
                assert_close(a, b, rtol=0, atol=tolerance)


def test_the_batch_axis_may_be_any() -> None:
    data, coords = uniform(4, 2, 5, 6), uniform(4, 2, 7) * 3 + 2
    expected = torch.stack([sample(d, x).value for d, x in zip(data, coords, strict=True)])
    found = vmap(lambda d, x: sample(d, x).value, in_dims=(1, 2))(data.movedim(0, 1), coords.movedim(0, 2))
    assert_close(found, expected, rtol=0, atol=1e-14)
    found = vmap(lambda d, x: sample(d, x).value, in_dims=(-1, -1), out_dims=1)(
        data.movedim(0, -1), coords.movedim(0, -1)
    )
    assert_close(found, expected.movedim(0, 1), rtol=0, atol=1e-14)


def test_shared_data_are_not_copied() -> None:
    """One image, a batch of places: the kernel sees one item of data."""
    data, coords = uniform(1, 4, 5), uniform(6, 2, 7) * 2 + 2
    seen: list[tuple[int, ...]] = []
    kernel = sampling._compiled

    def spy(data: Tensor, *rest: Any) -> Any:
        seen.append(tuple(data.shape))
        return kernel(data, *rest)

    with mock.patch.object(sampling, "_compiled", spy):
        vmap(lambda x: sample(data, x).value)(coords)
        vmap(grad(lambda x: sample(data, x).value.sum()))(coords)
        # Three images, each at all of the places: three items, not eighteen.
        vmap(lambda d: vmap(lambda x: sample(d, x).value)(coords))(data + torch.zeros(3, 1, 1, 1))
    assert seen == [(1, 1, 4, 5)] * 2 + [(3, 1, 4, 5)]


def test_hessians_in_a_batch() -> None:
    data, coords = uniform(3, 1, 5, 6), off_the_knots((6, 5), 6).reshape(2, 3, 2).movedim(1, 0)

    def energy(d: Tensor, x: Tensor) -> Tensor:
        return sample(d, x).value.square().sum()

    alone = torch.stack([hessian(energy, 1)(d, x) for d, x in zip(data, coords, strict=True)])
    assert_close(vmap(hessian(energy, 1))(data, coords), alone, rtol=0, atol=1e-12)
    mixed = torch.stack([jacfwd(grad(energy, 1), 0)(d, x) for d, x in zip(data, coords, strict=True)])
    assert_close(vmap(jacfwd(grad(energy, 1), 0))(data, coords), mixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_every_mode_in_a_batch(mode: Any) -> None:
    data, coords = uniform(3, 2, 5, 6), anywhere((6, 5), 12).reshape(2, 3, 2, 2).movedim(1, 0)

    def function(d: Tensor, x: Tensor) -> Tensor:
        return interpolate(d, x, interpolation=mode, padding="zeros")

    alone = torch.stack([function(d, x) for d, x in zip(data, coords, strict=True)])
    assert alone.shape == (3, 2, 2, 2)  # items, channels, and the shape of the coordinates
    assert_close(vmap(function)(data, coords), alone, rtol=0, atol=1e-12)


# -- errors ----------------------------------------------------------------------------------------------------

F32 = torch.float32
ERRORS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (torch.zeros(1, 4, 5), torch.zeros(3, 2), {}, ValueError, r"data has shape \(1, 4, 5\) and coords \(3, 2\)"),
    (torch.zeros(1, 4, 5), torch.zeros(()), {}, ValueError, "one row of coords for each of its 2 axes"),
    (torch.zeros(5), torch.zeros(0, 2), {}, ValueError, r"expected \(C, \[Z,\] Y, X\)"),
    (torch.zeros(1, 2, 2, 2, 2), torch.zeros(4, 2), {}, ValueError, r"expected \(C, \[Z,\] Y, X\)"),
    (torch.zeros(1, 0, 5), torch.zeros(2, 2), {}, ValueError, r"\(1, 0, 5\): there is no voxel to sample"),
    (torch.zeros(1, 4), torch.zeros(1, 2), {"interpolation": "bilinear"}, ValueError, "'bilinear': choose from linear"),
    (torch.zeros(1, 4), torch.zeros(1, 2), {"padding": "zero"}, ValueError, "'zero': choose from border, zeros"),
    (
        torch.zeros(1, 4, dtype=torch.int32),
        torch.zeros(1, 2),
        {},
        TypeError,
        "data are torch.int32: only 'nearest'",
    ),
    (torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 2), {"interpolation": "cubic"}, TypeError, "only 'nearest'"),
    (
        torch.zeros(1, 4, dtype=torch.int32),
        torch.zeros(1, 2),
        {"interpolation": "nearest", "padding": 0.5},
        ValueError,
        "padding is 0.5 but data are torch.int32: give a whole number",
    ),
]


@pytest.mark.parametrize(("data", "coords", "options", "kind", "message"), ERRORS)
def test_errors(data: Tensor, coords: Tensor, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        interpolate(data, coords, **options)


def test_values_keep_the_shape_of_the_coordinates() -> None:
    data = uniform(3, 5, 6)
    assert interpolate(data, torch.zeros(2)).shape == (3,)
    assert interpolate(data, torch.zeros(2, 4, 7, 2)).shape == (3, 4, 7, 2)
    assert interpolate(data, torch.zeros(2, 0)).shape == (3, 0)


# -- the derivative by the data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ("border", "zeros", "reflection", 0.3))
@pytest.mark.parametrize("shape", ((9,), (7, 9), (5, 6, 7)))
@pytest.mark.parametrize("kernel", (True, False))
def test_the_derivative_by_the_data_is_the_transpose(shape: tuple[int, ...], padding: Any, kernel: bool) -> None:
    torch.manual_seed(len(shape))
    count, dimension = 3, len(shape)
    coords = torch.rand(count, dimension, 40, dtype=torch.float64) * 12 - 2
    coords[1, 0, 5] = torch.nan
    values = torch.randn(count, 2, 40, dtype=torch.float64)
    shared = torch.randn(2, *shape, dtype=torch.float64)
    own = torch.randn(count, 2, *shape, dtype=torch.float64)

    def total(data: Tensor, where: Tensor, value: Tensor) -> Tensor:
        return (sample(data, where, padding=padding).value.nan_to_num() * value).sum()

    def exact(data: Tensor, where: Tensor, value: Tensor) -> Tensor:
        return (gather(data, where, padding).value.nan_to_num() * value).sum()

    with path(kernel):
        for data, axis in ((shared, None), (own, 0)):
            dims = (axis, 0, 0)
            found = vmap(grad(total), in_dims=dims)(data, coords, values)
            assert_close(found, vmap(grad(exact), in_dims=dims)(data, coords, values), rtol=0, atol=1e-12)
            # nested batches: values of one more axis, coordinates shared
            more = values.expand(4, *values.shape) * torch.arange(1.0, 5.0, dtype=torch.float64).reshape(4, 1, 1, 1)
            nested = vmap(lambda v, data=data, dims=dims: vmap(grad(total), in_dims=dims)(data, coords, v))(more)
            assert_close(nested[3], 4 * found, rtol=0, atol=1e-12)
