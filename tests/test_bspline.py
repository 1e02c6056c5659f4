"""Cubic B-splines against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg import bspline
from fnreg.pytree import is_transformed

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3)


def fractions(count: int = 41) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


# -- weights ---------------------------------------------------------------------------------------------------


def test_weights_equal_scipy() -> None:
    """The knot at k has the weight beta(f - k), beta the cubic B-spline with support (-2, 2)."""
    beta = scipy.interpolate.BSpline.basis_element(np.arange(-2.0, 3.0), extrapolate=False)
    f = fractions()[:-1]
    for knot, weight in zip((-1, 0, 1, 2), bspline.weights(f), strict=True):
        expected = torch.as_tensor(np.nan_to_num(beta(f.numpy() - knot)))
        assert_close(weight, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_sum_to_one_and_reproduce_lines(dtype: torch.dtype) -> None:
    f = fractions().to(dtype)
    w = bspline.weights(f)
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(sum(w), torch.ones_like(f), rtol=0, atol=tolerance)
    assert_close(-w[0] + w[2] + 2 * w[3], f, rtol=0, atol=tolerance)
    assert min(float(x.min()) for x in w) >= 0


def test_weights_join_smoothly() -> None:
    """At a knot, values and the first two derivatives of the cell on the left are those of the cell on the right."""

    def ends(k: int, f: Tensor) -> Tensor:
        """Value, slope and curvature of one weight."""

        def weight(t: Tensor) -> Tensor:
            return bspline.weights(t)[k]

        return torch.stack([weight(f), grad(weight)(f), grad(grad(weight))(f)])

    zero = torch.zeros((), dtype=torch.float64)
    left, right = ([ends(k, f) for k in range(4)] for f in (zero + 1, zero))
    nothing = torch.zeros(3, dtype=torch.float64)
    for a, b in zip([*left, nothing], [nothing, *right], strict=True):
        assert_close(a, b, rtol=0, atol=1e-15)


def test_weights_are_differentiable() -> None:
    f = fractions(7)[1:-1].clone().requires_grad_()
    gradcheck(bspline.weights, (f,), check_forward_ad=True, check_batched_grad=True)


# -- prefilter -------------------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 3), st.sampled_from((torch.float32, torch.float64)))
def test_prefilter_equals_scipy(shape: list[int], channels: int, dtype: torch.dtype) -> None:
    data = uniform(channels, *shape).to(dtype)
    expected = np.stack([scipy.ndimage.spline_filter(c, 3, output=np.float64, mode="mirror") for c in data.numpy()])
    found = bspline.prefilter(data)
    assert found.dtype == dtype and found.shape == data.shape
    assert_close(found, torch.as_tensor(expected).to(dtype), rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@given(st.integers(1, 200))
def test_prefilter_interpolates(n: int) -> None:
    """At a voxel the spline of the mirrored coefficients is (c[-1] + 4 c[0] + c[1]) / 6, which is the datum."""
    data = uniform(2, n)
    c = bspline.prefilter(data).numpy()
    c = np.pad(c, ((0, 0), (1, 1)), mode="reflect" if n > 1 else "edge")
    assert_close(torch.as_tensor((c[:, :-2] + 4 * c[:, 1:-1] + c[:, 2:]) / 6), data, rtol=0, atol=1e-13)


@given(shapes)
def test_a_constant_has_constant_coefficients(shape: list[int]) -> None:
    data = torch.full((1, *shape), 3.7, dtype=torch.float64)
    assert_close(bspline.prefilter(data), data, rtol=0, atol=1e-13)


def test_prefilter_is_linear_in_one_pair_and_a_batch() -> None:
    data = uniform(4, 2, 5, 6).requires_grad_()
    alone = torch.stack([bspline.prefilter(d) for d in data])
    assert_close(vmap(bspline.prefilter)(data), alone, rtol=0, atol=1e-14)
    gradcheck(bspline.prefilter, (data[0].detach().requires_grad_(),), check_forward_ad=True, check_batched_grad=True)


def test_cached_matrices_do_not_outlive_a_transform() -> None:
    grad(lambda x: bspline.prefilter(x).sum())(torch.ones(1, 23))
    assert not is_transformed(bspline._inverse(23, torch.device("cpu")))
