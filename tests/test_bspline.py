"""Cubic B-splines against SciPy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.interpolate
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scenes import tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg import bspline
from fnreg.bspline import Lattice
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


def test_weights_have_derivatives() -> None:
    f = fractions().requires_grad_()
    for order in (0, 1):
        for k in range(4):
            slope = torch.autograd.grad(bspline.weights(f, order)[k].sum(), f)[0]
            assert_close(bspline.weights(f, order + 1)[k], slope, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="derivative is 3"):
        bspline.weights(f, 3)


# -- lattices --------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
ORDERS = (0, 1, 2)
SIZES = {1: (13,), 2: (12, 9), 3: (8, 5, 6)}
STRIDES = {1: (4,), 2: (4, 2), 3: (4, 2, 3)}


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int]:
    """Voxels and stride of one axis."""
    n = draw(st.integers(1, 40))
    return n, draw(st.integers(1, n))


def net(dimension: int) -> Lattice:
    return bspline.lattice(SIZES[dimension], STRIDES[dimension])


def oracle(coefficients: Tensor, net: Lattice, points: list[np.ndarray], orders: tuple[int, ...]) -> Tensor:
    """SciPy's splines on the knots c + j S, axis by axis, at the product of points per axis, x first."""
    values = coefficients.numpy()
    for k, (n, stride, m, at, order) in enumerate(zip(net.size, net.stride, net.count, points, orders, strict=True)):
        axis = values.ndim - 1 - k
        # One control point more, of coefficient 0: SciPy wants four, and here it changes nothing.
        knots = (n - 1) / 2 + stride * (np.arange(-2, m + 3) - m // 2)
        values = np.concatenate([values, np.zeros_like(values.take([0], axis))], axis)
        spline = scipy.interpolate.BSpline(knots, np.moveaxis(values, axis, 0), 3)
        inside = (at >= 0) & (at <= n - 1) & (n > 1)
        found = (spline.derivative(order) if order else spline)(at.clip(0, n - 1))
        if order:
            found[~inside] = 0
        values = np.moveaxis(found, 0, axis)
    return torch.as_tensor(values)


@given(axes())
def test_the_lattice_covers_the_grid(axis: tuple[int, int]) -> None:
    """Symmetric, three knots or more, all of them within reach of a voxel, and the finer lattice holds the coarser."""
    n, stride = axis
    (m,) = bspline.lattice((n,), stride).count
    assert m % 2 == 1
    c, reach = (n - 1) / 2, stride * (m // 2)
    assert c + 2 * stride > reach >= c + stride  # an outer basis function reaches in, four are everywhere
    basis = bspline.basis_matrix(n, stride, n, 0, CPU)
    assert_close(basis.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(basis, basis.flip(0, 1), rtol=0, atol=1e-14)
    if stride % 2 == 0:
        finer = bspline.lattice((n,), stride).halved()
        assert finer == bspline.lattice((n,), stride // 2) and hash(finer) == hash(bspline.lattice((n,), stride // 2))
        assert finer.count[0] <= 2 * m - 1


@given(axes(), st.integers(1, 50), st.sampled_from(ORDERS))
def test_the_basis_is_that_of_scipy(axis: tuple[int, int], samples: int, order: int) -> None:
    n, stride = axis
    along = bspline.lattice((n,), stride)
    coefficients = uniform(2, *along.shape)
    at = (np.arange(samples) + 0.5) * (n / samples) - 0.5
    expected = oracle(coefficients, along, [at], (order,))
    found = bspline.evaluate(coefficients, along, (samples,), derivative=(order,))
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 999), data=st.data())
def test_fields_are_those_of_scipy(dimension: int, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    """On grids of any level and at scattered points, with derivatives, in the dtype of the coefficients."""
    along = net(dimension)
    orders = tuple(data.draw(st.sampled_from(ORDERS)) for _ in range(dimension))
    size = tuple(data.draw(st.integers(1, n)) for n in along.size)
    coefficients = uniform(2, *along.shape, seed=seed).to(dtype)
    at = [(np.arange(s) + 0.5) * (n / s) - 0.5 for s, n in zip(size, along.size, strict=True)]
    expected = oracle(coefficients.double(), along, at, orders)
    found = bspline.evaluate(coefficients, along, size, derivative=orders)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.dtype == dtype and found.is_contiguous()
    assert_close(found.double(), expected, rtol=0, atol=tolerance)
    index = torch.stack([x.reshape(-1) for x in torch.meshgrid(*map(torch.as_tensor, at[::-1]), indexing="ij")][::-1])
    scattered = bspline.evaluate_at(coefficients, along, index.to(dtype), derivative=orders)
    assert scattered.dtype == dtype
    assert_close(scattered.double(), expected.flatten(1), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_the_field_stays_as_it_is_beyond_the_outer_voxels(dimension: int) -> None:
    along = net(dimension)
    coefficients = uniform(2, *along.shape)
    last = tensor(along.size)[:, None] - 1
    index = (1.5 * uniform(dimension, 50, seed=1) + 0.5) * last
    beyond = (index < 0) | (index > last)
    assert beyond.any() and not beyond.all()
    inside = index.clamp(min=0).minimum(last)
    assert_close(bspline.evaluate_at(coefficients, along, index), bspline.evaluate_at(coefficients, along, inside))
    for k in range(dimension):
        order = tuple(int(a == k) for a in range(dimension))
        found = bspline.evaluate_at(coefficients, along, index, derivative=order)
        assert (found[:, beyond[k]] == 0).all() and (found[:, ~beyond[k]] != 0).all()


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_derivatives_are_those_of_autograd(dimension: int) -> None:
    along = net(dimension)
    coefficients = uniform(1, *along.shape)
    index = (uniform(dimension, 9, seed=1) * 0.9 + 0.5).abs() * (tensor(along.size)[:, None] - 1)
    by_points = grad(lambda x: bspline.evaluate_at(coefficients, along, x).sum())(index)
    for k in range(dimension):
        order = tuple(int(a == k) for a in range(dimension))
        assert_close(bspline.evaluate_at(coefficients, along, index, derivative=order)[0], by_points[k])
    gradcheck(
        lambda c, x: bspline.evaluate_at(c, along, x),
        (coefficients.requires_grad_(), index.requires_grad_()),
        check_forward_ad=True,
    )
    gradcheck(lambda c: bspline.evaluate(c, along), (coefficients,), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_lattices_in_a_batch_are_those_of_each(dimension: int) -> None:
    along = net(dimension)
    coefficients, index = uniform(3, 2, *along.shape), 3 * uniform(3, dimension, 5) + 3
    size = tuple(range(3, 3 + dimension))
    order = (1,) + (0,) * (dimension - 1)
    field = uniform(3, 2, *along.size[::-1])
    for function, inputs in (
        (lambda c: bspline.evaluate(c, along, size, derivative=order), (coefficients,)),
        (lambda c, x: bspline.evaluate_at(c, along, x, derivative=order), (coefficients, index)),
        (lambda c: bspline.subdivide(c, along, axes=(True,) + (False,) * (dimension - 1)), (coefficients,)),
        (lambda f: bspline.fit(f, along), (field,)),
    ):
        alone = torch.stack([function(*parts) for parts in zip(*inputs, strict=True)])
        assert_close(vmap(function)(*inputs), alone, rtol=0, atol=1e-12)

        def total(*parts: Tensor, function: Any = function) -> Tensor:
            return function(*parts).square().sum()

        assert_close(vmap(grad(total))(*inputs), torch.stack([grad(total)(*p) for p in zip(*inputs, strict=True)]))


def polynomial(degrees: tuple[int, ...], size: tuple[int, ...], samples: tuple[int, ...]) -> Tensor:
    """A product of centred powers at the voxels of a grid of `samples`, (1, *shape)."""
    value = torch.ones((1,) * len(size), dtype=torch.float64)
    for k, (degree, n, m) in enumerate(zip(degrees, size, samples, strict=True)):
        x = ((torch.arange(m, dtype=torch.float64) + 0.5) * (n / m) - n / 2) / n
        value = value * (x**degree + 0.3).reshape(-1, *(1,) * k)
    return value[None]


@pytest.mark.parametrize("dimension", [1, 2, 3])
@given(data=st.data())
def test_cubic_polynomials_are_reproduced(dimension: int, data: st.DataObject) -> None:
    """The fit of enough samples is the polynomial at all voxels of the finest grid."""
    size = tuple(data.draw(st.integers(6, 20)) for _ in range(dimension))
    stride = tuple(data.draw(st.integers(1, n // 2)) for n in size)
    samples = tuple(data.draw(st.integers(6, n)) for n in size)
    degrees = tuple(data.draw(st.integers(0, 3)) for _ in size)
    along = bspline.lattice(size, stride)
    coefficients = bspline.fit(polynomial(degrees, size, samples), along)
    assert_close(bspline.evaluate(coefficients, along), polynomial(degrees, size, size), rtol=0, atol=1e-8)


@given(axes(), st.integers(1, 40))
def test_the_fit_is_the_nearest_field(axis: tuple[int, int], samples: int) -> None:
    """Its residual is SciPy's least, but for what a singular value below the cut could add."""
    n, stride = axis
    field = uniform(1, samples)
    found = bspline.fit(field, bspline.lattice((n,), stride))
    basis = bspline.basis_matrix(n, stride, samples, 0, CPU)
    best = basis @ torch.as_tensor(scipy.linalg.lstsq(basis.numpy(), field[0].numpy(), cond=bspline.CUT)[0])
    assert_close(basis @ found[0], best, rtol=0, atol=1e-3)
    assert float((basis @ found[0] - field[0]).norm()) <= float((best - field[0]).norm()) + 1e-3


def test_the_fit_magnifies_noise_by_no_more_than_the_cut_allows() -> None:
    """Some coefficients of this lattice are seen a millionth as well as others, and left to smoothness."""
    n, along = 28, bspline.lattice((28,), 13)
    basis = bspline.basis_matrix(n, 13, n, 0, CPU)
    values = torch.linalg.svdvals(basis)
    assert float(values[-1]) < 1e-5 * float(values[0])  # the premise
    gains = torch.linalg.svdvals(bspline.fit(torch.eye(n, dtype=torch.float64), along))
    assert float(gains[0]) < 1e5 / float(values[0])


@pytest.mark.parametrize("dimension", [1, 2, 3])
@given(data=st.data())
def test_subdivision_keeps_the_field(dimension: int, data: st.DataObject) -> None:
    half = tuple(data.draw(st.booleans()) for _ in range(dimension))
    size = tuple(data.draw(st.integers(4, 21)) for _ in range(dimension))
    stride = tuple(data.draw(st.sampled_from((2, 4) if h else (1, 3, 4))) for h in half)
    along = bspline.lattice(size, stride)
    coefficients = uniform(2, *along.shape)
    finer = along.halved(half)
    assert finer.stride == tuple(s // 2 if h else s for s, h in zip(stride, half, strict=True))
    found = bspline.subdivide(coefficients, along, axes=half)
    assert found.shape[1:] == finer.shape
    assert_close(bspline.evaluate(found, finer), bspline.evaluate(coefficients, along), rtol=0, atol=1e-13)
    index = (uniform(dimension, 20, seed=2) + 0.5) * (tensor(size)[:, None] - 1)
    between = bspline.evaluate_at(coefficients, along, index)
    assert_close(bspline.evaluate_at(found, finer, index), between, rtol=0, atol=1e-13)


@example((9, 2), 0, 0)  # products of degree 6, the highest
@given(axes(), st.sampled_from(ORDERS), st.sampled_from(ORDERS))
def test_gram_matrices_are_mean_products(axis: tuple[int, int], a: int, b: int) -> None:
    """Against SciPy's piecewise polynomials, which are integrated exactly."""
    n, stride = axis
    along = bspline.lattice((n,), stride)
    gram = bspline.gram_matrix(n, stride, a, b, CPU)
    assert_close(gram, bspline.gram_matrix(n, stride, b, a, CPU).mT, rtol=0, atol=1e-14)
    if n == 1:
        w = tensor([1, 4, 1]) / 6
        assert_close(gram, torch.outer(w, w) if a == b == 0 else torch.zeros_like(gram))
        return
    m = along.count[0]
    place = (n - 1) / 2 + stride * (np.arange(m) - m // 2)

    def piece(k: int, order: int) -> scipy.interpolate.BSpline:
        whole = scipy.interpolate.BSpline.basis_element(place[k] + stride * np.arange(-2.0, 3.0), extrapolate=False)
        return whole.derivative(order) if order else whole

    ends = np.unique(np.clip(np.concatenate([place, [0.0, n - 1.0]]), 0, n - 1))
    for k, j in ((0, 0), (m // 2, m // 2 - 1), (m - 1, m - 2)):
        both = [piece(k, a), piece(j, b)]
        total = 0.0
        for low, high in itertools.pairwise(ends):
            nodes, shares = np.polynomial.legendre.leggauss(6)
            x = (low + high) / 2 + (high - low) / 2 * nodes
            total += (high - low) / 2 * float(np.sum(shares * np.nan_to_num(both[0](x)) * np.nan_to_num(both[1](x))))
        assert abs(float(gram[k, j]) - total / (n - 1)) < 1e-12


@given(axes(), st.sampled_from(ORDERS))
def test_gram_roots_are_roots_of_full_rank(axis: tuple[int, int], order: int) -> None:
    """With a row less for every degree of a polynomial whose derivative is 0."""
    n, stride = axis
    gram, root = bspline.gram_matrix(n, stride, order, order, CPU), bspline.gram_root(n, stride, order, CPU)
    assert_close(root.mT @ root, gram, rtol=0, atol=1e-13)
    assert root.is_contiguous() and root.dtype == torch.float64
    if n > 1:
        assert root.shape == (len(gram) - order, len(gram))
        values = torch.linalg.svdvals(root)
        assert float(values[-1]) > 1e-8 * float(values[0])


@pytest.mark.parametrize("where", [-3.0, 0.0, 0.2, 5.0])
def test_along_an_axis_of_one_voxel_nothing_changes(where: float) -> None:
    along = bspline.lattice((1, 4), (1, 2))
    coefficients = uniform(2, *along.shape)
    line = bspline.lattice((4,), 2)
    index = tensor([[where, math.nan], [1.3, 1.3]])
    middle = (coefficients * tensor([1, 4, 1]) / 6).sum(-1)
    for order, expected in (((0, 0), 0), ((0, 1), 1)):
        found = bspline.evaluate_at(coefficients, along, index, derivative=order)
        assert_close(found[:, :1], bspline.evaluate_at(middle, line, tensor([[1.3]]), derivative=(expected,)))
        assert found[:, 1].isnan().all()
    found = bspline.evaluate_at(coefficients, along, index, derivative=(1, 0))
    assert (found[:, 0] == 0).all() and found[:, 1].isnan().all()
    assert (bspline.evaluate(coefficients, along, derivative=(1, 0)) == 0).all()
    assert_close(bspline.evaluate(coefficients, along)[..., 0], bspline.evaluate(middle, line))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_all_stays_on_the_device_and_in_the_dtype_of_the_data(dimension: int, dtype: torch.dtype) -> None:
    """The meta device stands in for any but the CPU, and refuses what mixes the two."""
    along, device = net(dimension), torch.device("meta")
    coefficients = torch.zeros(2, *along.shape, dtype=dtype, device=device)
    index = torch.zeros(dimension, 5, dtype=dtype, device=device)
    for found in (
        *(bspline.evaluate(coefficients, along, derivative=(order,) * dimension) for order in ORDERS),
        *(bspline.evaluate_at(coefficients, along, index, derivative=(order,) * dimension) for order in ORDERS),
        bspline.subdivide(coefficients, along, axes=(True,) + (False,) * (dimension - 1)),
        bspline.prefilter(coefficients),
        bspline.prefilter(coefficients[..., :1]),
    ):
        assert found.is_meta and found.dtype == dtype
    for n in (1, 9):
        for matrix in (bspline.gram_matrix(n, 1, 1, 0, device), bspline.gram_root(n, 1, 1, device)):
            assert matrix.is_meta and matrix.dtype == torch.float64


def test_what_lattices_refuse() -> None:
    along = bspline.lattice((9, 6), (4, 2))
    coefficients = torch.zeros(1, *along.shape)
    for message, call in {
        "stride .* is larger than the grid": lambda: bspline.lattice((9, 6), 8),
        "positive whole numbers": lambda: bspline.lattice((9, 6), (4, 0)),
        "whole numbers": lambda: bspline.lattice((9, 6), (4, 1.5)),
        "at least one voxel": lambda: bspline.lattice((9, 0), 1),
        "stride has 3 values": lambda: bspline.lattice((9, 6), (4, 2, 1)),
        "cannot be halved": lambda: along.halved().halved(),
        "axes has 1 values": lambda: along.halved((True,)),
        "coefficients have shape": lambda: bspline.evaluate(coefficients.mT, along),
        "size has 3 values": lambda: bspline.evaluate(coefficients, along, (3, 3, 3)),
        "derivative has 1 values": lambda: bspline.evaluate(coefficients, along, derivative=(1,)),
        "derivative is 3": lambda: bspline.evaluate(coefficients, along, derivative=(3, 0)),
        "index has shape": lambda: bspline.evaluate_at(coefficients, along, torch.zeros(3, 4)),
        "expected a channel axis": lambda: bspline.fit(torch.zeros(4, 4), along),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_not_a_number_stays_so() -> None:
    along = bspline.lattice((9, 6), (4, 2))
    coefficients = uniform(1, *along.shape)
    index = tensor([[1.0, math.nan, 2.0, math.inf], [1.0, 2.0, math.nan, -math.inf]])
    for derivative in ((0, 0), (1, 0), (0, 1)):
        found = bspline.evaluate_at(coefficients, along, index, derivative=derivative)
        assert torch.equal(torch.isnan(found), tensor([[0, 1, 1, 0]]).bool())
    coefficients[0, 0, 0] = math.nan
    assert bspline.evaluate(coefficients, along).isnan().any()
