"""Narrow filters in C: equal to SciPy's and to the matrices that they stand for, with every derivative."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import close, equal_bits, few, without_kernels
from scipy import ndimage
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from fnreg import native, windows
from fnreg.filters import along, gaussian, gaussian_matrix, window_sums
from fnreg.pytree import constant
from fnreg.windows import gaussian_taps

needs_compiler = pytest.mark.skipif(native.load() is None, reason="the filters are in C")
shapes = st.lists(st.integers(1, 19), min_size=1, max_size=3).map(tuple)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@few
@given(shape=shapes, seed=st.integers(0, 99), radius=st.integers(0, 9), dtype=st.sampled_from(["float32", "float64"]))
def test_sums_are_those_of_scipy(shape: tuple[int, ...], seed: int, radius: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    data = random(2, *shape, dtype=kind, seed=seed)
    taps = tuple(random(radius + 1, seed=seed + k).tolist() for k in range(len(shape)))
    found = window_sums(data, tuple(tuple(w[:n]) for w, n in zip(taps, shape[::-1], strict=True)))
    expected = data.double().numpy()
    for k, weights in enumerate(taps):
        line = np.array([*weights[:0:-1], *weights])
        expected = ndimage.correlate1d(expected, line, axis=expected.ndim - 1 - k, mode="constant")
    close(found.double(), torch.from_numpy(expected), atol=1e-12 if dtype == "float64" else 1e-5 * 4.0 ** (radius + 1))


@needs_compiler
@few
@given(shape=shapes, sigma=st.floats(0, 3), seed=st.integers(0, 99))
def test_a_gaussian_is_that_of_its_matrices(shape: tuple[int, ...], sigma: float, seed: int) -> None:
    data = random(2, *shape, seed=seed)
    matrices = [gaussian_matrix(n, torch.tensor(sigma, dtype=torch.float64)) for n in shape[::-1]]
    assert windows.serves(data)
    close(gaussian(data, sigma), along(data, matrices), atol=1e-13)
    with without_kernels():
        close(gaussian(data, sigma), along(data, matrices), atol=1e-13)


@few
@given(shape=shapes, sigma=st.floats(0, 3))
def test_a_constant_stays_constant(shape: tuple[int, ...], sigma: float) -> None:
    data = torch.full((1, *shape), 7.0, dtype=torch.float64)
    close(gaussian(data, sigma), data, atol=1e-13)


@needs_compiler
@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 5, 3)])
def test_every_derivative(shape: tuple[int, ...]) -> None:
    data = random(2, *shape).requires_grad_()
    taps = ((1.0, 0.5, 0.2),) * len(shape)
    for function in (lambda x: gaussian(x, 0.8), lambda x: window_sums(x, taps)):
        assert gradcheck(function, (data,), check_batched_grad=True)
        assert gradgradcheck(function, (data,))
    tangent = random(2, *shape, seed=1)
    forward = torch.func.jvp(lambda x: gaussian(x, 0.8), (data.detach(),), (tangent,))[1]
    close(forward, gaussian(tangent, 0.8), atol=1e-13)
    pull = torch.func.vjp(lambda x: gaussian(x, 0.8), data.detach())[1]
    close(torch.func.jvp(lambda c: pull(c)[0], (tangent,), (tangent,))[1], pull(tangent)[0], atol=1e-13)


@needs_compiler
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_has_no_memory_takes_the_matrices(normalised: bool, transposed: bool) -> None:
    """Cotangents that autograd batches by itself; taps may reach beyond the image."""
    data, taps = random(2, 3, 4, 5, 6), ((1.0, 0.5, 0.2), (1.0, 0.3), (1.0,) * 7)
    filtered = windows.filtered(data, taps, normalised, transposed)
    close(windows._multiplied(data, taps, normalised, transposed), filtered, atol=1e-13)


@needs_compiler
def test_neither_batch_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random(5, 2, 30, 40, 20, dtype=torch.float32)
    whole = vmap(lambda x: gaussian(x, 1.5))(data)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert equal_bits(vmap(lambda x: gaussian(x, 1.5))(data), whole)
    for number in range(5):
        assert equal_bits(gaussian(data[number], 1.5), whole[number])


@needs_compiler
def test_any_layout_and_nested_batches() -> None:
    data = random(3, 4, 2, 5, 6)
    close(vmap(vmap(lambda x: gaussian(x.mT, 1.0)))(data), vmap(vmap(lambda x: gaussian(x, 1.0).mT))(data), atol=1e-14)


@needs_compiler
def test_a_constant_made_within_a_batch() -> None:
    @constant
    def sums(n: int) -> Tensor:
        return window_sums(torch.ones(1, n), ((1.0, 1.0),))

    found = vmap(lambda x: x + sums(5))(torch.zeros(3, 1, 5))
    assert found[2].tolist() == [[2.0, 3.0, 3.0, 3.0, 2.0]]


@pytest.mark.parametrize("smooth", [lambda x: gaussian(x, 1.0), lambda x: window_sums(x, ((1.0, 0.5), (1.0, 0.5)))])
def test_a_plain_image_beside_what_is_differentiated(smooth: Any) -> None:
    """It takes no part in the transform, though what is made of it there may have no memory."""
    image, at = random(1, 9, 8), torch.tensor([2.0, 3.0], dtype=torch.float64)
    total = smooth(image).sum()

    def cube(s: Tensor) -> Tensor:
        return (s**3 * smooth(image)).sum()

    close(grad(cube)(at[0]), 12 * total, atol=1e-9)
    close(vmap(grad(cube))(at), 3 * at**2 * total, atol=1e-9)
    close(grad(grad(cube))(at[1]), 18 * total, atol=1e-9)


@needs_compiler
def test_without_memory_it_says_so() -> None:
    def lost(kernel: str, dtype: Any, dimension: Any, arguments: Any, tasks: int, *, each: int = 1) -> None:
        arguments[-1].fill_(1)

    with mock.patch.object(native, "call", lost), pytest.raises(MemoryError, match=r"filter images of size \(4, 3\)"):
        gaussian(random(1, 3, 4), 1.0)


def test_weights_of_a_gaussian_sum_to_one() -> None:
    for sigma in (0.0, 0.1, 1.0, 7.5):
        for dtype in (torch.float32, torch.float64):
            taps = gaussian_taps(sigma, dtype)
            assert abs(2 * sum(taps) - taps[0] - 1) < 1e-14
            assert taps[-1] > torch.finfo(dtype).eps * taps[0] / 4
    assert gaussian_taps(0.0, torch.float32) == (1.0,)


def test_wide_filters_are_matrices() -> None:
    data = random(1, 40)
    wide = [gaussian_matrix(40, torch.tensor(20.0).double())]
    with mock.patch.object(windows, "windowed", side_effect=AssertionError):
        close(gaussian(data, 20.0), along(data, wide), atol=1e-14)
