"""Squares in one pass: equal to the composition of sampling and loss that it stands for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scenes import close, equal_bits
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.testing import assert_close

from fnreg import (
    Affine,
    Grid,
    Image,
    Rigid,
    Sequential,
    Subject,
    Transform,
    Translation,
    adam,
    mse,
    native,
    ncc,
    register,
    stack,
)
from fnreg.grid import index_points
from fnreg.inputs import prepare
from fnreg.losses.objective import objective
from fnreg.mapped import ByMap, Maps, Squares, pull, squares, warp
from fnreg.pair import pair_energy, pair_gradient
from fnreg.problem import Level
from fnreg.pytree import tree_map
from fnreg.sampling import sample

pytestmark = pytest.mark.skipif(
    native.load() is None, reason="squares need a C compiler; without one nobody calls them"
)

SHAPES = {1: (37,), 2: (19, 23), 3: (30, 27, 25)}  # the last is more than one chunk


def composed(moving: Tensor, fixed: Tensor, mask: Tensor, matrix: Tensor, shift: Tensor, padding: Any) -> Squares:
    """The same sums for one pair, by sampling and autograd."""
    index = index_points(tuple(fixed.shape[:0:-1]), fixed.dtype, fixed.device)

    def energy(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        coords = a[:, :-1] @ (index[:-1] + u.flatten(1)) + a[:, -1:]
        seen = sample(moving, coords, padding="border" if padding is None else padding)
        weights = mask.flatten() * (seen.inside if padding is None else 1)
        return (weights * (seen.value - fixed.flatten(1)).square()).sum(), weights.sum()

    (by_matrix, by_shift), (value, weight) = grad_and_value(energy, argnums=(0, 1), has_aux=True)(matrix, shift)
    return Squares(weight, value, ByMap(by_matrix, by_shift))


def parts_of(found: Squares) -> tuple[Any, ...]:
    return (found.weight, found.value, *found.by_map)


@pytest.mark.parametrize("dimension", (1, 2, 3))
@pytest.mark.parametrize("padding", (None, "border", "zeros", "reflection", 0.3))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_sums_are_those_of_sampling_and_squaring(dimension: int, padding: Any, masked: bool, dtype: Any) -> None:
    torch.manual_seed(dimension)
    pairs, channels, shape = 4, 2, SHAPES[dimension]
    moving = torch.randn(pairs, channels, *shape, dtype=dtype)
    fixed = torch.randn(1, channels, *shape, dtype=dtype)
    mask = torch.rand(pairs, 1, *shape, dtype=dtype) if masked else None
    same = torch.eye(dimension + 1, dtype=dtype)[:-1]
    matrices = same + 0.2 * torch.randn(pairs, dimension, dimension + 1, dtype=dtype)
    matrices[0] = same  # all on knots
    shift = 0.7 * torch.randn(pairs, dimension, *shape, dtype=dtype)
    size = shape[::-1]
    linear = squares(moving, fixed, mask, Maps(matrices, None, size), padding=padding)
    weights = torch.ones(pairs, 1, *shape, dtype=dtype) if mask is None else mask

    def truth(kind: torch.dtype, shift: Tensor) -> Any:
        given = [x.to(kind) for x in (moving, weights, matrices, shift)]
        return vmap(lambda m, w, a, u: composed(m, fixed[0].to(kind), w, a, u, padding))(*given)

    names = ("weight", "value", "by matrix", "by shift")
    assert linear.by_map.shift is None
    assert [part.dtype for part in parts_of(linear)[:3]] == [torch.float64] * 3
    none = torch.zeros_like(shift)
    exact, apart = (parts_of(truth(kind, none)) for kind in (torch.float64, dtype))
    results = [*zip(names, parts_of(linear), exact, apart, strict=True)][:3]
    bent = squares(moving, fixed, mask, Maps(matrices, shift, size), padding=padding)
    exact, apart = (parts_of(truth(kind, shift)) for kind in (torch.float64, dtype))
    results += zip(names, parts_of(bent), exact, apart, strict=True)
    for name, value, exact, apart in results:
        scale = float(exact.abs().max())
        error, usual = (float((x.double() - exact).abs().max()) / scale for x in (value, apart))
        # float32 may not be further from the truth than the composition, up to chance
        assert error < (1e-12 if dtype == torch.float64 else max(2 * usual, 1e-5)), f"{name}: {error}, {usual}"


@pytest.mark.parametrize("dimension", (1, 2, 3))
@pytest.mark.parametrize("padding", (None, "border", "zeros", "reflection", 0.3))
@pytest.mark.parametrize("bent", (False, True))
def test_a_warped_image_and_its_pull_back_are_those_of_sampling(dimension: int, padding: Any, bent: bool) -> None:
    torch.manual_seed(dimension)
    pairs, channels, shape = 3, 2, SHAPES[dimension]
    moving = torch.randn(1, channels, *shape, dtype=torch.float64)
    by_warped = torch.randn(pairs, channels, *shape, dtype=torch.float64)
    matrices = torch.eye(dimension + 1, dtype=torch.float64)[:-1]
    matrices = matrices + 0.2 * torch.randn(pairs, dimension, dimension + 1, dtype=torch.float64)
    shift = 0.7 * torch.randn(pairs, dimension, *shape, dtype=torch.float64) * bent
    index = index_points(shape[::-1], torch.float64, shift.device)

    def composed(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        coords = a[:, :-1] @ (index[:-1] + u.flatten(1)) + a[:, -1:]
        seen = sample(moving[0], coords, padding="border" if padding is None else padding)
        return seen.value.reshape(channels, *shape), seen.inside.reshape(1, *shape)

    expected, inside = vmap(composed)(matrices, shift)
    maps = Maps(matrices, shift if bent else None, shape[::-1])
    found = warp(moving, maps, padding=padding)
    assert_close(found[0], expected, rtol=0, atol=1e-12)
    assert equal_bits(found[1], inside)
    by_map = pull(moving, by_warped, maps, padding=padding)
    made: Any = torch.func.vjp(lambda a, u: vmap(composed)(a, u)[0], matrices, shift)
    by_matrix, by_shift = made[1](by_warped)
    assert_close(by_map.matrix, by_matrix, rtol=1e-11, atol=1e-9)
    if bent:
        assert_close(by_map.shift, by_shift, rtol=1e-12, atol=1e-12)
    else:
        assert by_map.shift is None


@pytest.mark.parametrize("dimension", (1, 2, 3))
@pytest.mark.parametrize("frames", (1, 3))
def test_a_shift_in_a_frame_is_the_framed_shift(dimension: int, frames: int) -> None:
    torch.manual_seed(dimension)
    shape = SHAPES[dimension]
    moving, fixed = torch.randn(2, 3, 1, *shape, dtype=torch.float64)
    matrices = torch.eye(dimension + 1, dtype=torch.float64)[:-1] + 0.1 * torch.rand(3, dimension, dimension + 1)
    shift = 0.7 * torch.randn(3, dimension, *shape, dtype=torch.float64)
    given = torch.randn(frames, dimension, dimension, dtype=torch.float64)
    voxels = (given @ shift.flatten(2)).reshape(shift.shape)
    plain, framed = Maps(matrices, voxels, shape[::-1]), Maps(matrices, shift, shape[::-1], given)

    def everything(maps: Maps) -> Any:
        return squares(moving, fixed, None, maps), warp(moving, maps), pull(moving, fixed, maps)

    assert_close(everything(framed), everything(plain), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("bent", (False, True))
def test_a_derivative_that_is_not_asked_for_is_left_out(bent: bool) -> None:
    torch.manual_seed(0)
    moving, fixed = torch.randn(2, 2, 1, 9, 8)
    maps = Maps(torch.eye(3)[None, :2] * 1.01, torch.rand(2, 2, 9, 8) if bent else None, (8, 9))
    without, whole = (squares(moving, fixed, None, maps, by_matrix=asked) for asked in (False, True))
    assert without.by_map.matrix is None and whole.by_map.matrix is not None
    assert squares(moving, fixed, None, maps, by_shift=False).by_map.shift is None
    assert equal_bits(squares(moving, fixed, None, maps, by_shift=False)[:2], whole[:2])
    assert equal_bits(
        (without.value, without.weight, without.by_map.shift), (whole.value, whole.weight, whole.by_map.shift)
    )
    by_map = pull(moving, fixed, maps, by_matrix=False)
    assert by_map.matrix is None
    assert equal_bits(by_map.shift, pull(moving, fixed, maps).shift)


def test_neither_batch_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    moving, fixed = torch.randn(2, 5, 1, 30, 40, 20)
    matrices = torch.eye(4)[:3] + 0.1 * torch.randn(5, 3, 4)
    shift = torch.randn(5, 3, 30, 40, 20)

    def everything(pairs: slice) -> Any:
        maps = Maps(matrices[pairs], shift[pairs], (20, 40, 30))
        warped = warp(moving[pairs], maps)
        return squares(moving[pairs], fixed[pairs], None, maps), warped, pull(moving[pairs], fixed[pairs], maps)

    whole = everything(slice(None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert equal_bits(everything(slice(None)), whole)
    for pair in range(5):
        alone = everything(slice(pair, pair + 1))
        assert equal_bits(alone, tree_map(lambda leaf, pair=pair: leaf[pair : pair + 1], whole))


def test_a_matrix_that_is_not_a_number_gives_none() -> None:
    matrices = torch.eye(3)[:2].repeat(2, 1, 1)
    matrices[0, 0, 0] = torch.nan
    found = squares(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), None, Maps(matrices, None, (8, 8)))
    assert bool(found.value[0].isnan())
    assert bool(found.value[1].isfinite())


# -- where a registration uses it ------------------------------------------------------------------------------


def levels(transform: Transform, weight: Any = 1.0, **parts: Any) -> tuple[Level, Any]:
    """A batch of three pairs at one level, and parameters off the knots."""
    torch.manual_seed(1)
    grid = Grid((12, 10), spacing=(1.0, 1.5), direction=[[0.6, -0.8], [0.8, 0.6]])
    fixed, moving = (stack([Image(torch.randn(2, 10, 12, dtype=torch.float64), grid)] * 3) for _ in "ab")
    subjects = [Subject(image, mask=parts.get(name)) for name, image in (("fixed", fixed), ("moving", moving))]
    whole = prepare(*subjects, None, levels=1, min_size=4)
    level = whole.level(0, transform, objective(weight * mse + parts.get("more", 0)), 3, parts.get("padding"))
    params = tree_map(lambda leaf: leaf.expand(3, *leaf.shape), transform.init(grid))
    step = tree_map(lambda leaf: 0.3 * torch.randn_like(leaf), level.zero_step())
    return level, level.retract(params, step)


@pytest.mark.parametrize("transform", (Rigid(), Affine(), Sequential((Translation(), Affine()))))
@pytest.mark.parametrize("padding", (None, "border"))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("weight", (0.5, torch.tensor([1.0, 2.0, 0.25])))
@pytest.mark.parametrize("other", (None, "term", "mask"))
def test_gradients_of_a_level_are_those_of_its_parts(
    transform: Transform, padding: Any, masked: bool, weight: Any, other: str | None
) -> None:
    mask = torch.rand(3, 1, 10, 12, dtype=torch.float64) if masked else None
    parts: dict[str, Any] = {"padding": padding, "fixed": mask}
    if other == "mask":
        parts["moving"] = torch.rand(10, 12, dtype=torch.float64)[None]
    level, params = levels(transform, weight, **parts, more=0.3 * ncc if other == "term" else 0)
    assert level._passes is not None  # pyright: ignore[reportPrivateUsage]
    gradient, value, terms = level.gradient(params)
    expected, same, others = level._over(pair_gradient, params)  # pyright: ignore[reportPrivateUsage]
    tree_map(lambda a, b: assert_close(a, b, rtol=1e-11, atol=1e-12), gradient, expected)
    close((value, terms), (same, others), rtol=1e-12, atol=0)
    assert list(terms) == ["mse", "ncc"][: len(terms)] and len(terms) == (2 if other == "term" else 1)


def test_what_needs_more_takes_the_way_through_its_parts() -> None:
    def both(warped: Tensor, displacement: Tensor) -> Tensor:
        return warped.square().mean() + displacement.square().mean()

    level, params = levels(Rigid())
    masked = levels(Rigid(), moving=torch.ones(1, 10, 12, dtype=torch.float64))[0]
    other = dataclasses.replace(level, pairs=dataclasses.replace(level.pairs, objective=mse + 0.1 * ncc))
    data = level.pairs.fixed.data.clone().requires_grad_()
    image = dataclasses.replace(level.pairs.fixed, data=data)
    recorded = dataclasses.replace(level, pairs=dataclasses.replace(level.pairs, fixed=image))
    mixed = dataclasses.replace(level, pairs=dataclasses.replace(level.pairs, objective=objective(both)))
    passes = [part._passes for part in (level, masked, other, recorded, mixed)]  # pyright: ignore[reportPrivateUsage]
    assert [None if part is None else part.squared is not None for part in passes] == [True, False, False, None, None]
    assert bool(mixed.gradient(params)[1].isfinite().all())


def test_without_overlap_the_value_is_infinite() -> None:
    level, params = levels(Translation())
    away = {"translation": params["translation"] + torch.tensor([1e3, 0.0])}
    assert level.gradient(away)[1].tolist() == [torch.inf] * 3
    found, expected = level.value(away), level._over(pair_energy, away)  # pyright: ignore[reportPrivateUsage]
    assert found[0].tolist() == expected[0].tolist() and found[1]["mse"].tolist() == expected[1]["mse"].tolist()


def test_without_a_compiler_a_registration_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    image = Image(torch.rand(1, 20, 20, dtype=torch.float64)).gaussian(2.0)
    moving = Image(image.data, origin=(1.3, -0.7))
    own = adam(0.3, pure=True)  # torchopt's, which serves where there is no kernel, rounds to float32 on the way
    expected = register(image, moving, Rigid(), levels=2, steps=20, optimizer=own)
    monkeypatch.setattr(native, "load", lambda: None)
    found = register(image, moving, Rigid(), levels=2, steps=20, optimizer=own)
    assert_close(found.mapping.matrix(), expected.mapping.matrix(), rtol=0, atol=1e-9)
