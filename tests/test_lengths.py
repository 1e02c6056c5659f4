"""Lengths and sizes in one pass: those of plain torch, for each item alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import equal_bits
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg.lengths import is_finite, largest, longest, mean_square, scale_

SHAPES = ((1, 1), (2, 200), (3, 40, 30), (3, 20, 31, 29))  # the last is more than one chunk


def norm(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.norm(dim=0).amax()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_longest_vector(shape: tuple[int, ...], dtype: Any) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4, *shape, dtype=dtype)
    truth = torch.stack([norm(one) for one in vectors])
    found = vmap(longest)(vectors)
    assert found.dtype == dtype
    assert_close(found, truth)
    assert equal_bits(found, torch.stack([longest(one) for one in vectors]))
    assert_close(vmap(longest, in_dims=-1)(vectors.movedim(0, -1)), truth)
    assert_close(vmap(vmap(longest))(vectors.unflatten(0, (2, 2))).flatten(), truth)


def test_its_derivatives_are_those_of_the_norm() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        longest, vectors[0].detach().requires_grad_(), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(longest, vectors[0].detach().requires_grad_())
    assert_close(vmap(grad(longest))(vectors), vmap(grad(norm))(vectors))


def test_a_field_of_zeros_has_no_derivative() -> None:
    assert equal_bits(grad(longest)(torch.zeros(2, 3, 3)), torch.zeros(2, 3, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_sizes_of_items(shape: tuple[int, ...], dtype: Any) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(4, *shape, dtype=dtype)
    assert equal_bits(largest(leaf), leaf.abs().flatten(1).amax(1))
    assert_close(mean_square(leaf), leaf.double().square().flatten(1).mean(1), rtol=1e-4, atol=0)
    for number in range(4):
        alone = leaf[number : number + 1]
        assert equal_bits(largest(alone)[0], largest(leaf)[number])
        assert_close(mean_square(alone)[0], mean_square(leaf)[number], rtol=1e-4, atol=0)


def test_sizes_under_a_transform_are_the_same() -> None:
    leaf = torch.randn(3, 2, 50, dtype=torch.float64)
    assert_close(vmap(largest)(leaf), leaf.abs().amax(2))
    assert_close(vmap(mean_square)(leaf), leaf.square().mean(2))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_so_and_in_its_item(bad: float) -> None:
    leaf = torch.ones(2, 3, 100)
    leaf[0, 1, 50] = bad
    for found in (largest(leaf), mean_square(leaf), vmap(longest)(leaf)):
        assert_close(found[0].float(), torch.tensor(bad), equal_nan=True)
        assert bool(found[1].isfinite())
    assert is_finite(leaf).tolist() == vmap(is_finite)(leaf.unsqueeze(1)).flatten().tolist() == [False, True]


@pytest.mark.parametrize("size", (1e-23, 3e-39, 2e19, 3e38))
def test_tiny_and_huge_entries_are_told_as_they_are(size: float) -> None:
    leaf = torch.full((2, 5), size)
    assert equal_bits(largest(-leaf), leaf[:, 0]) or size < 1e-38  # denormal numbers count as zero
    assert is_finite(leaf).tolist() == [True, True]


def test_items_are_scaled_by_a_column() -> None:
    factors = torch.rand(3, 4, dtype=torch.float64)
    leaf = torch.ones(3, 5, dtype=torch.float64)
    scale_(leaf, factors[:, 1])
    assert equal_bits(leaf, factors[:, 1:2].expand(3, 5))


def test_items_are_scaled_in_place() -> None:
    leaf = torch.randn(3, 2, 40000)
    truth = leaf * torch.tensor([2.0, 0.0, -0.5]).reshape(3, 1, 1)
    scale_(leaf, torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64))
    assert equal_bits(leaf, truth)
    turned = torch.randn(40, 3).mT
    truth = turned * torch.tensor([[1.5], [1.0], [3.0]])
    scale_(turned, torch.tensor([1.5, 1.0, 3.0], dtype=torch.float64))
    assert equal_bits(turned, truth)
