"""Overlap and landmark errors against counting by sets, against SimpleITK, and under vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import random_mapping, tensor, uniform
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import Affine, Grid, metrics


def labels(seed: int, *shape: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, shape, generator=generator)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_overlap_is_that_of_sets_of_voxels(seed: int, count: int) -> None:
    a, b = labels(seed, 1, 4, 5, count=count), labels(seed + 1, 1, 4, 5, count=count)
    numbers = metrics.classes(a, b)
    assert numbers == tuple(sorted({*a.flatten().tolist(), *b.flatten().tolist()} - {0}))
    places = [[{n for n, v in enumerate(x.flatten().tolist()) if v == k} for k in numbers] for x in (a, b)]
    dice = [2 * len(p & q) / (len(p) + len(q)) for p, q in zip(*places, strict=True)]
    jaccard = [len(p & q) / len(p | q) for p, q in zip(*places, strict=True)]
    assert metrics.dice(a, b).tolist() == pytest.approx(dice)
    assert metrics.jaccard(a, b).tolist() == pytest.approx(jaccard)
    assert metrics.dice(b, a).tolist() == metrics.dice(a, b).tolist()
    d = metrics.dice(a, b)
    assert_close(metrics.jaccard(a, b), d / (2 - d))


def test_overlap_is_that_of_simpleitk() -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    a, b = labels(1, 9, 8, 7), labels(2, 9, 8, 7)
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(sitk.GetImageFromArray(a.numpy()), sitk.GetImageFromArray(b.numpy()))
    assert metrics.dice(a, b).tolist() == pytest.approx([measure.GetDiceCoefficient(k) for k in (1, 2, 3)])
    assert metrics.jaccard(a, b).tolist() == pytest.approx([measure.GetJaccardCoefficient(k) for k in (1, 2, 3)])


def test_classes_that_are_missing() -> None:
    a, b = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 2])
    found = metrics.dice(a, b, numbers=(1, 2, 3))
    assert found[:2].tolist() == [0, 0] and bool(found[2].isnan())
    assert metrics.dice(a * 0, b * 0).tolist() == [] and metrics.jaccard(a * 0, b * 0).dtype == torch.float64
    assert metrics.dice(a, a).tolist() == [1]


def test_a_batch_of_overlaps() -> None:
    a, b = labels(1, 3, 5, 6), labels(2, 3, 5, 6)
    found = torch.func.vmap(lambda x, y: metrics.dice(x, y, numbers=(1, 2, 3)))(a, b)
    for k in range(3):
        assert torch.equal(found[k], metrics.dice(a[k], b[k], numbers=(1, 2, 3)))
    with pytest.raises(ValueError, match="inside vmap: which numbers occur cannot be read there; give numbers"):
        torch.func.vmap(metrics.dice)(a, b)


def test_landmark_errors() -> None:
    grid = Grid((6, 5, 4), spacing=(1.0, 2.0, 3.0))
    mapping = random_mapping(Affine(), grid, 1)
    points = 10 * uniform(7, 3, seed=2)
    away = uniform(7, 3, seed=3)
    mapped = points @ mapping.matrix()[:3, :3].mT + mapping.matrix()[:3, 3]
    found = metrics.target_registration_error(mapping, points, mapped + away)
    assert_close(found, away.norm(dim=1), atol=1e-12, rtol=0)
    before = metrics.target_registration_error(None, points, points + away)
    assert_close(before, away.norm(dim=1), atol=1e-12, rtol=0)
    many = fnreg.stack([mapping, random_mapping(Affine(), grid, 2)])
    both = metrics.target_registration_error(many, points.expand(2, 7, 3), (mapped + away).expand(2, 7, 3))
    assert_close(both[0], found, atol=1e-12, rtol=0)
    gradient = torch.func.grad(lambda p: metrics.target_registration_error(None, p, points).sum())(points + away)
    assert_close(gradient, away / away.norm(dim=1, keepdim=True), atol=1e-9, rtol=0)


def test_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match=r"labels are torch\.float32: expected integers"):
        metrics.dice(torch.zeros(3), torch.zeros(3))
    with pytest.raises(TypeError, match="expected integers"):
        metrics.classes(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(4,\): warp one"):
        metrics.jaccard(torch.zeros(3).long(), torch.zeros(4).long())
    with pytest.raises(ValueError, match="give pairs, row by row"):
        metrics.target_registration_error(None, tensor([[0, 0]]), tensor([[0, 0], [1, 1]]))


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([1, 7, 2**40]))
def test_counting_is_comparing_one_by_one(seed: int, spread: int) -> None:
    """What is counted in one pass is what vmap compares class by class, also for classes that are not there."""
    rng = torch.Generator().manual_seed(seed)
    first, second = (spread * torch.randint(-2, 3, (1, 4, 5), generator=rng) for _ in range(2))
    numbers = (-2 * spread, spread, 3 * spread, 5)
    for measure in (metrics.dice, metrics.jaccard):

        def one(a: Tensor, b: Tensor, measure: Any = measure) -> Tensor:
            return measure(a, b, numbers=numbers)

        found = torch.func.vmap(one)(first[None], second[None])[0]
        assert torch.equal(measure(first, second, numbers=numbers).nan_to_num(-1), found.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64])
@pytest.mark.parametrize("numbers", [None, (1, 2), (1, 2, 3, 4, 5, 6)])
def test_overlap_takes_integers_of_every_kind(dtype: torch.dtype, numbers: tuple[int, ...] | None) -> None:
    values = torch.arange(60) * 7 % 11
    first, second = values.reshape(1, 6, 10), values.roll(3).reshape(1, 6, 10)
    found = metrics.dice(first.to(dtype), second.to(dtype), numbers=numbers)
    assert torch.equal(found, metrics.dice(first, second, numbers=numbers))
