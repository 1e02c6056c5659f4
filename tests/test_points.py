"""Distances of points against NumPy and SciPy's trees, weights as repeated or missing points, planes, derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import orientation, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

from fnreg.losses import points as of_points
from fnreg.losses.points import chamfer, closest_points, landmarks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

MEASURES: dict[str, Callable[..., Tensor]] = {
    "landmarks": landmarks,
    "closest_points": closest_points,
    "chamfer": chamfer,
}
every_measure = pytest.mark.parametrize("name", MEASURES)
dimensions = st.integers(1, 3)
seeds = st.integers(0, 2**16)


def sets(dimension: int, seed: int, count: int = 7, other: int = 7) -> tuple[Tensor, Tensor]:
    return 10 * uniform(count, dimension, seed=seed), 10 * uniform(other, dimension, seed=seed + 1)


def closest(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """SciPy's distances and numbers of the closest of b."""
    return scipy.spatial.cKDTree(b.numpy()).query(a.numpy())


@given(dimensions, seeds, st.sampled_from([None, 0.5, 4.0]))
def test_values_are_those_of_numpy_and_scipy(dimension: int, seed: int, delta: float | None) -> None:
    def cost(distance: np.ndarray) -> float:
        return float(np.mean(distance**2 if delta is None else scipy.special.huber(delta, distance)))

    a, b = sets(dimension, seed)
    expected = cost(np.linalg.norm((a - b).numpy(), axis=1))
    assert_close(landmarks(a, b, delta=delta), tensor(expected), atol=1e-12, rtol=0)
    a, b = sets(dimension, seed, 5, 9)
    there, back = cost(closest(a, b)[0]), cost(closest(b, a)[0])
    assert_close(closest_points(a, b, delta=delta), tensor(there), atol=1e-12, rtol=0)
    assert_close(chamfer(a, b, delta=delta), tensor(there + back), atol=1e-12, rtol=0)


@given(st.integers(2, 3), seeds)
def test_distances_to_planes(dimension: int, seed: int) -> None:
    a, b = sets(dimension, seed, 6, 8)
    normals = uniform(8, dimension, seed=seed + 2)
    unit = (normals / normals.norm(dim=1, keepdim=True)).numpy()
    number = closest(a, b)[1]
    there = np.mean((((a - b[number]).numpy() * unit[number]).sum(1)) ** 2)
    back = np.mean((((a[closest(b, a)[1]] - b).numpy() * unit).sum(1)) ** 2)
    options: dict[str, Any] = {"moving_normals": normals, "to_plane": True}
    assert_close(closest_points(a, b, **options), tensor(there), atol=1e-12, rtol=0)
    assert_close(chamfer(a, b, **options), tensor(there + back), atol=1e-12, rtol=0)
    assert_close(closest_points(a, b, moving_normals=normals), closest_points(a, b))  # not asked for, not used


@every_measure
@given(dimension=dimensions, seed=seeds)
def test_weights_are_points_that_are_repeated_or_missing(name: str, dimension: int, seed: int) -> None:
    measure, (a, b) = MEASURES[name], sets(dimension, seed)
    counts, others = torch.tensor([1, 0, 2, 3, 0, 1, 1]), torch.tensor([1, 2, 1, 0, 0, 3, 1])
    found = measure(a, b, fixed_point_weights=counts.double(), moving_point_weights=others.double())
    if name == "landmarks":
        times = counts * others
        expected = measure(a.repeat_interleave(times, dim=0), b.repeat_interleave(times, dim=0))
    else:
        expected = measure(a.repeat_interleave(counts, dim=0), b.repeat_interleave(others, dim=0))
    assert_close(found, expected, atol=1e-12, rtol=0)
    weights = 0.3 * counts.double()
    garbage = torch.where((counts == 0).unsqueeze(1), 1e3, a)
    more = measure(garbage, b, fixed_point_weights=weights, moving_point_weights=7 * others.double())
    assert_close(more, expected, atol=1e-12, rtol=0)
    assert_close(measure(a, b, fixed_point_weights=torch.ones(7)), measure(a, b), atol=1e-12, rtol=0)
    assert_close(measure(a, b, moving_point_weights=torch.ones(7)), measure(a, b), atol=1e-12, rtol=0)


@every_measure
def test_without_any_weight_the_value_is_zero(name: str) -> None:
    a, b = sets(2, 0)
    none, all_of_them = torch.zeros(7).double(), torch.ones(7).double()
    options = [
        {"fixed_point_weights": none},
        {"moving_point_weights": none},
        {"fixed_point_weights": none, "moving_point_weights": all_of_them},
        {"fixed_point_weights": all_of_them, "moving_point_weights": none},
    ]
    for given_weights in options:
        measure = functools.partial(MEASURES[name], **given_weights)
        assert measure(a, b) == 0
        assert not bool(grad(measure)(a, b).any())


@every_measure
@given(dimension=dimensions, seed=seeds)
def test_laws_of_distance(name: str, dimension: int, seed: int) -> None:
    """0 at equality with no slope; moved together nothing changes; twice the unit is four times the square."""
    measure, (a, b) = MEASURES[name], sets(dimension, seed)
    assert measure(b, b) == 0
    for delta in (None, 0.3):
        assert not bool(grad(functools.partial(measure, delta=delta))(b, b).any())
    turn = orientation(dimension, tensor([0.5, -0.2, 1.0]), True)
    assert_close(measure(a @ turn.mT + 3, b @ turn.mT + 3), measure(a, b), atol=1e-10, rtol=0)
    assert_close(measure(2 * a, 2 * b), 4 * measure(a, b), atol=1e-10, rtol=0)
    if name != "landmarks":  # sets have no order
        order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
        assert_close(measure(a[order], b), measure(a, b), atol=1e-12, rtol=0)
        assert_close(measure(a, b[order]), measure(a, b), atol=1e-12, rtol=0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sets(3, 0, 101, 37)
    expected = chamfer(a, b), grad(chamfer)(a, b)
    monkeypatch.setattr(of_points, "CHUNK", 37 * 10)
    assert_close((chamfer(a, b), grad(chamfer)(a, b)), expected, atol=1e-13, rtol=0)
    monkeypatch.setattr(of_points, "CHUNK", 1)
    assert_close(chamfer(a, b), expected[0], atol=1e-13, rtol=0)


@every_measure
@pytest.mark.parametrize("delta", [None, 3.0])
@pytest.mark.parametrize("to_plane", [False, True])
def test_derivatives(name: str, delta: float | None, to_plane: bool) -> None:
    if name == "landmarks" and to_plane:
        pytest.skip("landmarks know no planes")
    a, b = (points.requires_grad_() for points in sets(3, 2))
    plane = {"to_plane": True, "moving_normals": uniform(7, 3, seed=8)} if to_plane else {}
    weights = {"fixed_point_weights": tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3, 0.1])}
    function = functools.partial(MEASURES[name], delta=delta, **plane, **weights)
    assert gradcheck(function, (a, b), check_forward_ad=True, check_batched_grad=True)


@every_measure
def test_vmap_equals_the_loop(name: str) -> None:
    a, b, w = uniform(4, 6, 2, seed=1), uniform(4, 6, 2, seed=2), uniform(4, 6, seed=3).relu()

    def measure(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return MEASURES[name](a, b, fixed_point_weights=w, moving_point_weights=w.flip(0))

    for function in (measure, grad(measure), jacrev(measure), jacfwd(measure)):
        loop = torch.stack([function(*items) for items in zip(a, b, w, strict=True)])
        assert_close(vmap(function)(a, b, w), loop, atol=1e-13, rtol=0)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_landmarks_correspond_one_to_one() -> None:
    message = "fixed has 5 points and moving 4: landmarks correspond one to one, in this order; .* use closest_points"
    with pytest.raises(ValueError, match=message):
        landmarks(*sets(2, 0, 5, 4))


@pytest.mark.parametrize("name", ["closest_points", "chamfer"])
def test_planes_need_normals(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"to_plane asks for normals of the moving points: give Subject\(image, points"
    ):
        MEASURES[name](*sets(2, 0), to_plane=True)


@every_measure
@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_delta_is_positive(name: str, delta: float) -> None:
    with pytest.raises(ValueError, match=f"delta is {delta}: it must be positive"):
        MEASURES[name](*sets(2, 0), delta=delta)
