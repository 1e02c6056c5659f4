"""Ensembles: against Laplace's approximation, alone and in batches; starts; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_uncertainty import NEWTON, POINTS, SIZE, errors, rigid_pairs
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    Grid,
    Image,
    Rigid,
    Rotation,
    Stage,
    Subject,
    Translation,
    adam,
    bending,
    ensemble,
    laplace,
    mse,
    register,
)
from fnreg.bootstrap import _noise_of
from fnreg.inputs import prepare
from fnreg.losses.objective import objective


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair() -> tuple[Image, Image]:
    fixed, moving, _ = rigid_pairs(1, 21)
    return Image(fixed.data[0], fixed.grid), Image(moving.data[0], moving.grid)


def test_copies_spread_as_laplace_says(pair: Any) -> None:
    copies = ensemble(*pair, Rigid(), count=300, generator=draw(), **NEWTON)
    told = laplace(*pair, copies.reference, noise="independent").point_covariance(POINTS)
    ratio = torch.linalg.eigvals(torch.linalg.solve(told, copies.point_covariance(POINTS))).real
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.6
    moved = copies.map_points(POINTS)
    assert moved.shape == (300, 3, 2)
    away = moved - copies.reference.map_points(POINTS)
    assert_close(copies.point_covariance(POINTS), torch.einsum("cni,cnj->nij", away, away) / 300)
    assert_close(copies.spread(POINTS), away.square().sum(-1).mean(0).sqrt())
    assert_close(copies.mean(POINTS), moved.mean(0))
    assert_close(copies.shift(POINTS), away.mean(0))


def test_the_noise_is_read_off_the_residuals() -> None:
    fixed, moving, _ = rigid_pairs(4, 22, noise=0.05)
    copies = ensemble(fixed, moving, Rigid(), count=3, generator=draw(), levels=1, steps=0, initial=None)
    assert isinstance(copies, fnreg.Ensemble) and isinstance(copies.registration, fnreg.Registration)
    assert copies.registration.status.shape == (12,)
    result = register(fixed, moving, Rigid(), **NEWTON)
    whole = prepare(fixed, moving, None, levels=1, min_size=1)
    told = _noise_of(result, whole, objective(mse))
    assert_close(told, torch.full((4, 1), 0.05, dtype=torch.float64), rtol=0.08, atol=0)


@pytest.mark.parametrize("sharp", [False, True])
def test_the_noise_is_that_of_voxels_that_both_masks_show(sharp: bool) -> None:
    """Each mask hides a part where its image is something else; whole voxels of shift, so nothing is interpolated."""
    clean = 2 * rigid_pairs(3, 26, noise=0.0)[0].data
    kind: dict[str, Any] = {"generator": draw(5), "dtype": torch.float64}
    masks = torch.ones(2, 1, SIZE, SIZE, dtype=torch.float64)
    masks[0, :, :7], masks[1, :, :, :9] = 0, 0
    sides: list[Subject] = []
    for data, mask in zip((clean.roll((-2, 3), (2, 3)), clean), masks, strict=True):
        noisy = data + 0.05 * torch.randn(data.shape, **kind)
        seen = torch.where(mask > 0, noisy, 5 * torch.randn(data.shape, **kind))
        sides.append(Subject(Image(seen, Grid((SIZE, SIZE))), mask, sharp=sharp))
    shift = {"translation": torch.tensor([-3.0, 2.0], dtype=torch.float64).expand(3, 2)}
    result = register(*sides, Translation(), initial=shift, levels=1, steps=0)
    whole = prepare(*sides, None, levels=1, min_size=1)
    told = _noise_of(result, whole, objective(mse))
    assert_close(told, torch.full((3, 1), 0.05, dtype=torch.float64), rtol=0.12, atol=0)


def test_equal_seeds_are_equal_ensembles(pair: Any) -> None:
    options: dict[str, Any] = {"count": 3, "scatter": 0.3, "levels": 1, "steps": 5}
    first, second, other = (ensemble(*pair, Rigid(), generator=draw(n), **options) for n in (7, 7, 8))
    assert torch.equal(first.map_points(POINTS), second.map_points(POINTS))
    assert not bool((first.map_points(POINTS) == other.map_points(POINTS)).any())


def test_pairs_of_a_batch_are_copied_one_by_one() -> None:
    """With no noise every copy is its pair; with some, copies belong to their pair."""
    fixed, moving, truth = rigid_pairs(3, 23)
    still = ensemble(fixed, moving, Rigid(), count=4, noise=0.0, **NEWTON)
    moved = still.map_points(POINTS)
    assert moved.shape == (3, 4, 3, 2)
    assert_close(moved, still.reference.map_points(POINTS)[:, None].expand(-1, 4, -1, -1), atol=1e-9, rtol=0)
    assert_close(still.point_covariance(POINTS), torch.zeros(3, 3, 2, 2, dtype=torch.float64), atol=1e-15, rtol=0)
    noisy = ensemble(fixed, moving, Rigid(), count=4, noise=(0.05, 0.02), generator=draw(), **NEWTON)
    assert float((noisy.mean(POINTS) - truth.map_points(POINTS)).abs().max()) < 0.2
    assert noisy.spread(POINTS).shape == (3, 3) and float(noisy.spread(POINTS).min()) > 0
    own = POINTS + torch.arange(3.0)[:, None, None]  # points of its own for each pair
    assert_close(noisy.map_points(own)[1], noisy.map_points(POINTS + 1)[1])
    assert float(errors(noisy.reference, truth).abs().max()) < 0.2


def test_a_failed_copy_does_not_count() -> None:
    fixed, moving, _ = rigid_pairs(2, 24)
    images = Image(torch.cat([fixed.data[:1], torch.ones_like(fixed.data[:1])]), fixed.grid), moving
    copies = ensemble(*images, Rigid(), count=3, noise=0.0, **NEWTON)
    assert copies.registration.ok.tolist() == [True] * 3 + [False] * 3
    found = copies.point_covariance(POINTS)
    assert bool(torch.isfinite(found[0]).all()) and bool(torch.isnan(found[1]).all())


def test_a_failed_reference_has_no_covariance() -> None:
    """Noise makes copies of a constant image that can be registered, to nothing."""
    fixed, moving, _ = rigid_pairs(2, 24)
    images = Image(torch.cat([fixed.data[:1], torch.ones_like(fixed.data[:1])]), fixed.grid), moving
    copies = ensemble(*images, Rigid(), count=3, noise=0.05, generator=draw(), **NEWTON)
    assert copies.reference.ok.tolist() == [True, False] and bool(copies.registration.ok.all())
    for found in (copies.point_covariance(POINTS), copies.spread(POINTS), copies.mean(POINTS), copies.shift(POINTS)):
        assert bool(torch.isfinite(found[0]).all()) and bool(torch.isnan(found[1]).all())


def test_scattered_starts_find_one_minimum_or_several() -> None:
    """From near every copy comes back; a rotation from far off does not."""
    grid = Grid((SIZE, SIZE))
    fixed, moving, _ = rigid_pairs(1, 25, noise=0.02)
    fixed, moving = (Image(image.data[0], grid) for image in (fixed, moving))
    options: dict[str, Any] = {"count": 12, "noise": 0.0, **NEWTON}
    near = ensemble(fixed, moving, Rotation(), scatter=0.2, generator=draw(), **options)
    assert float(near.spread(POINTS).max()) < 0.02
    far = ensemble(fixed, moving, Rotation(), scatter=20.0, generator=draw(), **options)
    assert float(far.spread(POINTS).max()) > 1.0


def test_it_takes_what_register_takes(pair: Any) -> None:
    fixed, moving = pair
    mask = torch.ones(1, SIZE, SIZE)
    mask[:, :5] = 0
    options: dict[str, Any] = {"levels": 1, "steps": 10, "optimizer": adam(0.3)}
    stages = [Stage(Rigid()), Stage(FFD(7), objective=mse + bending)]
    for transform in (Rigid(), stages):
        copies = ensemble(Subject(fixed, mask), moving, transform, count=3, generator=draw(), scatter=0.1, **options)
        assert copies.map_points(POINTS).shape == (3, 3, 2)
    batch = Image(fixed.data.expand(2, -1, -1, -1), fixed.grid), moving
    weight = torch.tensor([1.0, 0.5])
    first = register(*batch, Rigid(), **options)
    kept: dict[str, Any] = {"objective": mse * weight, "then": first.mapping, "noise": 0.01}
    copies = ensemble(*batch, FFD(7), count=2, generator=draw(), **kept, **options)
    after = copies.registration.mapping.params[1]["rotation"]
    assert_close(after, first.mapping.params["rotation"].repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 1}, "count is 1: a spread takes at least 2 copies"),
        ({"scatter": -1.0}, "scatter is -1.0: expected a number of voxels"),
        ({"noise": -0.1}, "noise is -0.1: expected a standard deviation"),
        ({"noise": (0.1, math.inf)}, "noise is .0.1, inf.: expected a standard deviation"),
        ({"noise": [0.1, 0.2, 0.3]}, r"noise is \[0.1, 0.2, 0.3\]: expected a standard deviation .*, or two of them"),
        ({"noise": torch.ones(2)}, r"noise is tensor.*: expected a standard deviation"),
        ({"noise": "much"}, "noise is much: expected a standard deviation"),
        ({"scatter": math.nan}, "scatter is nan: expected a number of voxels"),
        ({"scatter": 1.0, "start": "moments"}, "scatter=1.0 and start='moments' both say where copies begin"),
        (
            {"scatter": 1.0, "starts": {"rotation": torch.zeros(2, 1)}},
            "scatter=1.0 and starts both say where copies begin: give one of them; .* or about initial",
        ),
        (
            {"objective": fnreg.lncc},
            r"lncc does not compare intensities as they are: tell the images' noise",
        ),
    ],
)
def test_it_says_what_it_cannot_do(pair: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ensemble(*pair, Rigid(), levels=1, steps=1, **options)


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_pyramid_is_refused(side: str, pair: Any) -> None:
    images: dict[str, Any] = dict(zip(("fixed", "moving"), pair, strict=True))
    images[side] = list(images[side].pyramid(2))
    with pytest.raises(TypeError, match=f"{side} is list: expected an Image or a Subject.*give the finest image"):
        ensemble(images["fixed"], images["moving"], Rigid())


def test_noise_of_both_images_may_be_a_list(pair: Any) -> None:
    options: dict[str, Any] = {"count": 2, "levels": 1, "steps": 3}
    several = [ensemble(*pair, Rigid(), noise=n, generator=draw(), **options) for n in ([0.1, 0.02], (0.1, 0.02))]
    assert torch.equal(several[0].map_points(POINTS), several[1].map_points(POINTS))


def test_a_mapping_cannot_be_scattered(pair: Any) -> None:
    start = register(*pair, Rigid(), levels=1, steps=1).mapping
    with pytest.raises(ValueError, match=r"initial is a Mapping: to scatter starts about it give parameters"):
        ensemble(*pair, Rigid(), count=2, scatter=1.0, initial=start, levels=1, steps=1)


def test_similarities_without_residuals_take_the_noise_as_told(pair: Any) -> None:
    copies = ensemble(*pair, Rigid(), count=4, noise=0.05, generator=draw(), objective=fnreg.lncc, levels=1, steps=20)
    spread: Tensor = copies.spread(POINTS)
    assert 0.003 < float(spread.min()) <= float(spread.max()) < 0.5
