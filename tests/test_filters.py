"""Separable filters: what they keep, and SciPy where borders do not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacfwd, vmap
from torch.testing import assert_close

from fnreg.filters import FWHM, along, gaussian, gaussian_matrix, resize, resize_matrix
from fnreg.pytree import is_transformed

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
sigmas = st.one_of(st.just(0.0), st.floats(1e-3, 100.0))
dtypes = st.sampled_from((torch.float32, torch.float64))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


# -- along -----------------------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 3), st.data())
def test_one_matrix_per_axis_x_first(shape: list[int], channels: int, data: st.DataObject) -> None:
    volume = uniform(channels, *shape)
    matrices = [uniform(data.draw(st.integers(1, 5)), n, seed=k) for k, n in enumerate(reversed(shape))]
    expected = volume.numpy()
    for k, matrix in enumerate(matrices):
        axis = len(shape) - k
        expected = np.moveaxis(np.tensordot(expected, matrix.numpy(), axes=(axis, 1)), -1, axis)
    found = along(volume, matrices)
    assert found.is_contiguous()
    assert_close(found, tensor(expected), rtol=0, atol=1e-12)


def test_none_leaves_an_axis() -> None:
    volume = uniform(2, 3, 4)
    assert torch.equal(along(volume, [None, None]), volume)
    assert_close(along(volume, [None, torch.ones(1, 3, dtype=torch.float64)]), volume.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="1 matrices for data with 2 spatial axes: give one per axis"):
        along(volume, [None])


# -- gaussian --------------------------------------------------------------------------------------------------


@given(shapes, st.data(), dtypes)
def test_a_constant_stays_constant_to_the_border(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    sigma = [data.draw(sigmas) for _ in shape]
    volume = torch.full((2, *shape), 7.3, dtype=dtype)
    assert_close(gaussian(volume, sigma), volume, rtol=TOLERANCE[dtype], atol=0)


@given(st.integers(1, 3), st.floats(0.5, 1.5), dtypes)
def test_gaussian_equals_scipy_away_from_the_borders(dimension: int, sigma: float, dtype: torch.dtype) -> None:
    """There the normalisation is that of all integers, to exp(-reach^2 / 2 sigma^2)."""
    reach = 13
    volume = uniform(1, *[2 * reach + n for n in (1, 2, 3)[:dimension]]).to(dtype)
    sigma_x_first = [sigma * (1 - k / 8) for k in range(dimension)]
    oracle = scipy.ndimage.gaussian_filter(
        volume[0].to(torch.float64).numpy(), sigma_x_first[::-1], truncate=reach / sigma, mode="constant"
    )
    inner = (0, *[slice(reach, -reach)] * dimension)
    found = gaussian(volume, sigma_x_first)[inner]
    assert found.dtype == dtype and found.numel() > 0
    assert_close(found, tensor(oracle[inner[1:]]).to(dtype), rtol=0, atol=max(TOLERANCE[dtype], 1e-12))


def test_rows_are_normalised_where_the_kernel_leaves_the_image() -> None:
    matrix = gaussian_matrix(5, tensor(1.3))
    index = np.arange(5)
    kernel = np.exp(-((index[:, None] - index) ** 2) / (2 * 1.3**2))
    assert_close(matrix, tensor(kernel / kernel.sum(1, keepdims=True)), rtol=0, atol=1e-15)
    assert gaussian_matrix(3, torch.tensor(1.0)).dtype == torch.float32


@given(shapes, dtypes)
def test_no_width_is_the_identity(shape: list[int], dtype: torch.dtype) -> None:
    volume = uniform(2, *shape).to(dtype)
    assert torch.equal(gaussian(volume, 0.0), volume)
    assert torch.equal(gaussian(volume, [0.0] * len(shape)), volume)


def test_a_huge_width_is_the_mean() -> None:
    volume = uniform(2, 5, 6)
    assert_close(gaussian(volume, 1e8), volume.mean((1, 2), keepdim=True).expand_as(volume), rtol=0, atol=1e-12)


def test_each_axis_has_its_own_width() -> None:
    volume = uniform(1, 4, 5, 6)
    along_x = gaussian(volume, (2.0, 0.0, 0.0))
    assert_close(along_x[0, 1, 2], gaussian(volume[:, 1, 2], 2.0)[0], rtol=0, atol=1e-15)
    assert_close(gaussian(gaussian(along_x, (0.0, 1.0, 0.0)), (0.0, 0.0, 0.5)), gaussian(volume, (2.0, 1.0, 0.5)))
    with pytest.raises(ValueError, match="sigma has 2 values for data with 3 spatial axes"):
        gaussian(volume, (1.0, 2.0))


def test_the_width_may_differ_within_a_batch() -> None:
    volumes, widths = uniform(3, 2, 7, 5), tensor([[0.0, 1.0], [2.0, 0.3], [5.0, 0.0]])
    alone = torch.stack([gaussian(v, s) for v, s in zip(volumes, widths, strict=True)])
    assert_close(vmap(gaussian)(volumes, widths), alone, rtol=0, atol=1e-14)
    shared = torch.stack([gaussian(volumes[0], s) for s in widths])
    assert_close(vmap(gaussian, in_dims=(None, 0))(volumes[0], widths), shared, rtol=0, atol=1e-14)
    scalars = torch.stack([gaussian(volumes[0], float(s)) for s in widths[:, 1]])
    assert_close(vmap(lambda s: gaussian(volumes[0], s))(widths[:, 1]), scalars, rtol=0, atol=1e-14)


def test_gaussian_is_differentiable_in_data_and_width() -> None:
    volume, width = uniform(1, 4, 5).requires_grad_(), tensor([0.7, 1.9]).requires_grad_()
    gradcheck(gaussian, (volume, width), check_forward_ad=True, check_batched_grad=True)


def test_the_derivative_by_no_width_is_finite() -> None:
    """exp(-d^2 / 2 sigma^2) is flat at 0: every derivative is 0, and none is infinity times zero."""
    volume = uniform(1, 40)
    zero = torch.zeros((), dtype=torch.float64)
    assert float(grad(lambda s: gaussian(volume, s).square().sum())(zero)) == 0.0
    assert not bool(jacfwd(lambda s: gaussian(volume, s))(zero).any())


# -- resize ----------------------------------------------------------------------------------------------------


@given(shapes, st.data(), dtypes)
def test_a_constant_stays_constant_at_every_size(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    size = [data.draw(st.integers(1, 20)) for _ in shape]
    volume = torch.full((2, *shape), 7.3, dtype=dtype)
    found = resize(volume, size)
    assert found.shape == (2, *size[::-1]) and found.dtype == dtype
    assert_close(found, torch.full_like(found, 7.3), rtol=TOLERANCE[dtype], atol=0)


@given(shapes)
def test_the_same_size_is_the_identity(shape: list[int]) -> None:
    volume = uniform(1, *shape)
    assert torch.equal(resize(volume, shape[::-1]), volume)


@given(st.integers(12, 60), st.integers(3, 80))
def test_a_ramp_stays_a_ramp_away_from_the_borders(n: int, m: int) -> None:
    """World positions over one extent: voxel j of m lies at (j + 1/2) n / m - 1/2 of the old voxels."""
    slope, offset = 0.3, 2.0
    ramp = slope * torch.arange(n, dtype=torch.float64) + offset
    where = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5
    sigma = math.sqrt(max((n / m) ** 2 - 1, 0)) / FWHM
    # One neighbour for the linear part, and eight widths for a tail of 1e-14.
    inner = (where >= 8 * sigma + 1) & (where <= n - 2 - 8 * sigma)
    found = resize(ramp[None], [m])[0]
    assert_close(found[inner], (slope * where + offset)[inner], rtol=0, atol=1e-11)
    assert bool((found.diff() >= -1e-12).all())


@given(shapes, st.data())
def test_the_mean_is_about_kept(shape: list[int], data: st.DataObject) -> None:
    """Smooth data, and sizes that divide: each voxel counts about the same."""
    grown = [4 * n for n in shape]
    volume = gaussian(uniform(1, *grown), 3.0)
    for size in (shape[::-1], [2 * n for n in shape[::-1]], [8 * n for n in shape[::-1]]):
        found = resize(volume, size)
        assert abs(float(found.mean() - volume.mean())) < 0.15 * float(volume.abs().max())


def test_an_impulse_spreads_to_the_width_of_the_new_voxel() -> None:
    """The point spread after resizing by 4 has the variance that the formula asks for."""
    n, m = 400, 100
    position = torch.arange(n, dtype=torch.float64)
    weights = resize_matrix(n, m, torch.device("cpu"))[m // 2]
    mean = float((weights * position).sum())
    variance = float((weights * (position - mean) ** 2).sum())
    assert mean == pytest.approx((m // 2 + 0.5) * 4 - 0.5, abs=1e-9)
    # Linear interpolation halfway between two voxels adds 1/4.
    assert variance - 0.25 == pytest.approx((4**2 - 1) / FWHM**2, rel=1e-6)
    assert pytest.approx(2 * math.sqrt(2 * math.log(2))) == FWHM


def test_fine_structure_does_not_alias() -> None:
    """Stripes of one voxel become grey; taking every fourth voxel would give full contrast."""
    stripes = torch.arange(64, dtype=torch.float64)[None] % 2
    assert float((resize(stripes, [16])[0, 2:-2] - 0.5).abs().max()) < 1e-2


def test_enlarging_is_linear_interpolation() -> None:
    found = resize(tensor([[0.0, 1.0, 3.0]]), [6])
    assert_close(found, tensor([[0.0, 0.25, 0.75, 1.5, 2.5, 3.0]]), rtol=0, atol=1e-14)


def test_resize_of_a_batch_and_its_derivative() -> None:
    volumes = uniform(3, 2, 6, 7)
    alone = torch.stack([resize(v, (3, 9)) for v in volumes])
    assert_close(vmap(lambda v: resize(v, (3, 9)))(volumes), alone, rtol=0, atol=1e-14)
    gradcheck(lambda v: resize(v, (3, 9)), (volumes[0].requires_grad_(),), check_forward_ad=True)


def test_cached_matrices_do_not_outlive_a_transform() -> None:
    grad(lambda x: resize(x, (11,)).sum())(torch.ones(1, 29))
    assert not is_transformed(resize_matrix(29, 11, torch.device("cpu")))


@pytest.mark.parametrize("sigma", [-1.0, math.nan, [1.0, -0.5], torch.tensor(-2.0), torch.tensor([1.0, math.nan])])
def test_a_width_is_not_negative(sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"sigma is .*: expected voxels, at least 0"):
        gaussian(torch.rand(1, 4, 5), sigma)


@pytest.mark.parametrize("size", [(5,), (5, 4, 3), (5, 0), (-1, 4)])
def test_a_size_has_a_voxel_for_each_axis(size: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"size is .* for data \(1, 4, 5\): expected a voxel at least along each of its 2"
    ):
        resize(torch.rand(1, 4, 5), size)
