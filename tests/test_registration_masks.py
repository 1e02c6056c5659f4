"""register: what a mask hides has no influence, and padding says what is seen outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import (
    SAME,
    both_solvers,
    few_steps,
    inner_mask,
    known_pair,
    moving_scene,
    random_params,
    tensor,
    uniform,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import Image, Mapping, Rigid, Subject, evaluate, functional, register, warp


def spoiled(image: Image, mask: Tensor, value: float) -> Image:
    """Something else wherever the mask is zero."""
    noise = value * (2 + uniform(*image.data.shape, seed=6)) if value == value else torch.full_like(image.data, value)
    return Image(torch.where(mask > 0, image.data, noise), image.grid)


@both_solvers
@pytest.mark.parametrize("objective", [fnreg.mse, fnreg.ncc], ids=str)
@pytest.mark.parametrize("value", [100.0, torch.nan, torch.inf])
def test_what_lies_outside_of_the_fixed_mask_does_not_matter(
    value: float, objective: Any, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    options = few_steps(options) | {"objective": objective, "levels": 1}
    expected = register(Subject(fixed, mask), moving, Rigid(), **options)
    result = register(Subject(spoiled(fixed, mask, value), mask), moving, Rigid(), **options)
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME
    assert_close(result.value, expected.value, atol=1e-12, rtol=0)
    plain = register(fixed, moving, Rigid(), **options)
    assert voxels_apart(plain.mapping, expected.mapping, fixed.grid) > 1e-3


@both_solvers
@pytest.mark.parametrize("value", [100.0, torch.nan])
def test_what_lies_outside_of_the_fixed_mask_does_not_matter_on_coarse_levels(
    value: float, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    expected = register(Subject(fixed, mask), moving, Rigid(), **few_steps(options))
    result = register(Subject(spoiled(fixed, mask, value), mask), moving, Rigid(), **few_steps(options))
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@both_solvers
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("value", [100.0, torch.nan])
def test_what_lies_outside_of_the_moving_mask_does_not_matter(
    value: float, levels: int, options: dict[str, Any]
) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(moving)
    options = few_steps(options) | {"levels": levels}
    expected = register(fixed, Subject(moving, mask), Rigid(), **options)
    result = register(fixed, Subject(spoiled(moving, mask, value), mask), Rigid(), **options)
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


@both_solvers
def test_a_mask_of_ones_is_none(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, Rigid(), **few_steps(options))
    ones = torch.ones_like(fixed.data)
    for mask in (ones, ones.bool(), ones.int(), 0.25 * ones):
        result = register(Subject(fixed, mask), moving, Rigid(), **few_steps(options))
        assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < SAME


def test_known_maps_are_found_within_masks() -> None:
    """Each side has an artefact that would pull the map away, and a mask that hides it."""
    fixed, moving, truth = known_pair(Rigid(), 2)
    sides = []
    for image in (fixed, moving):
        mask = torch.ones_like(image.data)
        mask[:, :6, :6] = 0
        sides.append(Subject(spoiled(image, mask, 3.0), mask))
    result = register(*sides, Rigid(), levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.15
    lost = register(sides[0].image, sides[1].image, Rigid(), levels=2, steps=60)
    assert voxels_apart(lost.mapping, truth, fixed.grid) > 0.5


@pytest.mark.parametrize("side", [0, 1], ids=["fixed", "moving"])
def test_masks_count_on_coarse_levels(side: int) -> None:
    """The coarse level alone finds the map with a third of one image hidden; what fills the gap is no image."""
    fixed, moving, truth = known_pair(Rigid(), 2)
    sides: list[Any] = [fixed, moving]
    mask = torch.ones_like(sides[side].data)
    mask[..., :6] = 0
    sides[side] = Subject(spoiled(sides[side], mask, 3.0), mask)
    result = register(*sides, Rigid(), levels=2, steps=(60, 0))
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.5


@both_solvers
def test_a_weight_of_almost_nothing_is_almost_none(options: dict[str, Any]) -> None:
    """On coarse levels too, where voxels are mixed."""
    fixed, moving, _ = known_pair(Rigid(), 2, size=0.4)
    mask = inner_mask(fixed)
    garbage = spoiled(fixed, mask, 100.0)
    expected = register(Subject(garbage, mask), moving, Rigid(), **few_steps(options))
    result = register(Subject(garbage, mask.clamp(min=1e-13)), moving, Rigid(), **few_steps(options))
    assert voxels_apart(result.mapping, expected.mapping, fixed.grid) < 1e-3


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection", 7.0, None])
def test_padding_says_what_is_seen_outside(padding: Any) -> None:
    fixed, _, _ = known_pair(Rigid(), 2)
    moving = moving_scene(2, grow=-6)
    params = random_params(Rigid(), fixed.grid, 1, 1.0)
    still = register(fixed, moving, Rigid(), initial=params, steps=0, padding=padding)
    mapping = Mapping(params, fixed.grid, Rigid())
    seen = warp(moving, mapping, padding="border" if padding is None else padding).data
    weights = None
    if padding is None:
        coords = moving.grid.world_to_index(mapping.map_points(fixed.grid.points()))
        weights = (
            ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1).reshape(fixed.grid.shape).double()
        )
        assert 0 < float(weights.mean()) < 0.95
    assert_close(still.value, functional.mse(seen, fixed.data, weights), atol=1e-12, rtol=0)
    assert_close(evaluate(fixed, moving, mapping, padding=padding)[0], still.value, atol=1e-14, rtol=0)
