"""Laplace's approximation: against least squares, fresh noise and known truths; what it refuses and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scenes import orientation, scene, stored
from torch import Tensor
from torch.func import hessian, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVFFD,
    Affine,
    GaussNewton,
    Grid,
    Image,
    Mapping,
    Rigid,
    Subject,
    Translation,
    adam,
    bending,
    laplace,
    mse,
    ncc,
    register,
    stack,
)
from fnreg import noise as noises
from fnreg.data import circle
from fnreg.filters import gaussian
from fnreg.pytree import tree_leaves
from fnreg.solvers.base import parted

SIZE = 28
NEWTON: dict[str, Any] = {"levels": 2, "solver": GaussNewton()}
POINTS = SIZE * torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.9, 0.3]], dtype=torch.float64)
LIMIT = -2 * math.log(0.05)  # of squares of two normal numbers, 95 %


def waves(
    count: int,
    steps: Tensor,
    transform: Any,
    seed: int,
    *,
    noise: float = 0.05,
    wave: float = 5.0,
    blur: float = 0.0,
    grid: Grid = Grid((SIZE, SIZE)),
) -> tuple[Image, Image, Mapping]:
    """Noisy pairs of random waves, and their maps, which are steps (B, P) from the identity."""
    draw = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    vectors, phase = torch.randn(count, 30, grid.ndim, **kind) / wave, 2 * math.pi * torch.rand(count, 30, 1, **kind)
    start, zero = transform.init(grid), transform.zero_step(grid)
    truth = Mapping(vmap(lambda s: transform.retract(start, parted(s, zero), grid))(steps), grid, transform)
    points = grid.points().expand(count, -1, -1)

    def seen(where: Tensor) -> Image:
        clean = torch.cos(vectors @ where.mT + phase).sum(1).reshape(count, 1, *grid.shape) * 15**-0.5
        fresh = torch.randn(count, 1, *(n + 16 for n in grid.shape), **kind)
        if blur:
            fresh = vmap(lambda one: gaussian(one, blur))(fresh)
            fresh = fresh / fresh.std()
        inside = (slice(None), slice(None), *(slice(8, -8) for _ in grid.shape))
        return Image(clean + noise * fresh[inside], grid)

    return seen(truth.map_points(points)), seen(points), truth


def rigid_pairs(count: int, seed: int, **options: Any) -> tuple[Image, Image, Mapping]:
    steps = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return waves(count, steps, Rigid(), seed, **options)


def errors(result: fnreg.Registration, truth: Mapping) -> Tensor:
    many = POINTS.expand(len(result.status), -1, -1)
    return result.map_points(many) - truth.map_points(many)


def distances(errors: Tensor, covariance: Tensor) -> Tensor:
    return torch.einsum("bni,bnij,bnj->bn", errors, torch.linalg.inv(covariance), errors)


SLOPES = torch.tensor([[0.3, 0.1], [-0.1, 0.2]], dtype=torch.float64)  # of channels by world


def ramps(size: tuple[int, int] = (11, 9), noise: float = 1e-5) -> tuple[Subject, Image]:
    """Two channels that rise along two directions, with noise in the fixed image alone; the border does not count.

    Linear interpolation of the moving image is exact, and its own noise is none.
    """
    grid = Grid(size, spacing=(1.0, 2.0))
    data = (SLOPES @ grid.points().mT).reshape(2, *grid.shape)
    fresh = torch.from_numpy(np.random.default_rng(0).normal(size=data.shape))
    mask = torch.zeros(1, *grid.shape, dtype=torch.float64)
    mask[:, 1:-1, 1:-1] = 1
    return Subject(Image(data + noise * fresh, grid), mask, sharp=True), Image(data, grid)


def with_noise(image: Image, noise: float, draw: torch.Generator) -> Image:
    return Image(image.data + noise * torch.randn(image.data.shape, generator=draw, dtype=torch.float64), image.grid)


def flat_zero(transform: Any, grid: Grid) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tree_leaves(transform.zero_step(grid))])


# -- against other computations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [Translation(), Affine(), FFD(4), SVFFD(4)], ids=str)
def test_of_a_linear_model_it_is_the_classical_one(transform: Any) -> None:
    """Voxels on voxels leave C = 2 I: (X^T X + K)^-1 |r|^2 / (R - tr X (X^T X + K)^-1 X^T), as of least squares."""
    fixed, moving = ramps()
    grid, zero, flat = moving.grid, transform.zero_step(moving.grid), flat_zero(transform, moving.grid)
    objective: Any = mse if transform.linear else mse + 1e-3 * bending
    result = register(fixed, moving, transform, objective=objective, levels=1, steps=0)
    start = result.mapping.params

    def moved(flat: Tensor) -> Tensor:
        return transform.points(transform.retract(start, parted(flat, zero), grid), grid, grid.points())

    def penalty(flat: Tensor) -> Tensor:
        return fnreg.penalties.bending(transform.field(transform.retract(start, parted(flat, zero), grid), grid))

    assert fixed.mask is not None
    counts = fixed.mask.flatten() > 0
    design = torch.einsum("cd,ndp->cnp", SLOPES, jacrev(moved)(flat)[counts]).flatten(0, 1)
    residual = (moving.data - fixed.image.data).flatten(1)[:, counts].flatten()
    held = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    held = held if transform.linear else 1e-3 * hessian(penalty)(flat) / 2 * len(residual)
    inverse = torch.linalg.inv(design.mT @ design + held)
    freedom = torch.trace(inverse @ design.mT @ design)
    expected = residual.square().sum() / (len(residual) - freedom) * inverse
    found = laplace(fixed, moving, result, objective=objective, noise="independent")
    assert_close(found.covariance, expected, rtol=1e-5, atol=1e-5 * float(expected.amax()))
    assert_close(found.bias, torch.zeros_like(flat), atol=1e-12, rtol=0)
    assert float(found.freedom) == pytest.approx(float(freedom), rel=1e-5)
    assert not found.free.any()
    # Without the prior the penalty only holds: (X^T X + K)^-1 X^T X (X^T X + K)^-1.
    alone = laplace(fixed, moving, result, objective=objective, noise="independent", prior=False)
    sampled = expected @ design.mT @ design @ inverse
    assert_close(alone.covariance, sampled, rtol=1e-5, atol=1e-5 * float(expected.amax()))
    assert torch.linalg.eigvalsh(found.covariance - alone.covariance).amin() >= -1e-9 * expected.amax()


def test_correlation_that_is_not_there_is_not_found() -> None:
    fixed, moving = ramps((60, 50))
    result = register(fixed, moving, Affine(), levels=1, steps=0)
    known, read = (laplace(fixed, moving, result, noise=kind) for kind in ("independent", "correlated"))
    assert float(read.deviation / known.deviation) == pytest.approx(1, rel=1e-3)
    ratio = torch.linalg.eigvalsh(torch.linalg.solve(known.covariance, read.covariance))
    # 49 products of 2800 residuals each have a standard deviation of 0.02
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.3


def test_it_is_what_fresh_noise_does() -> None:
    """One scene, 300 times with new noise: mean square errors, the draw of interpolation included."""
    count = 300
    step = torch.tensor([[0.7, -0.4, 0.3]], dtype=torch.float64)
    one = waves(1, step, Rigid(), 3, noise=0.0)
    draw = torch.Generator().manual_seed(1)
    noisy = [with_noise(Image(image.data.expand(count, -1, -1, -1), image.grid), 0.05, draw) for image in one[:2]]
    result = register(*noisy, Rigid(), **NEWTON)
    away = result.map_points(POINTS) - one[2].map_points(POINTS[None])
    seen = torch.einsum("bni,bnj->nij", away, away) / count
    for kind in ("independent", "correlated"):
        told = laplace(*noisy, result, noise=kind, prior=False).point_covariance(POINTS).mean(0)
        ratio = torch.linalg.eigvals(torch.linalg.solve(told, seen)).real
        # Of 300 a variance varies by 8 %; what interpolation misfits of the scene is taken for correlated noise.
        low = 0.55 if kind == "independent" else 0.45
        assert low < float(ratio.min()) <= float(ratio.max()) < 1.4, kind


# -- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_the_truth_is_in_its_ellipse_as_often_as_told(kind: Any) -> None:
    fixed, moving, truth = rigid_pairs(200, 0)
    result = register(fixed, moving, Rigid(), **NEWTON)
    square = distances(errors(result, truth), laplace(fixed, moving, result, noise=kind).point_covariance(POINTS))
    share = (square <= LIMIT).double().mean(0)
    assert bool(((share > 0.90) & (share < 0.99)).all()), share  # 0.95 and three standard deviations of 200
    assert float(square.mean()) == pytest.approx(2, abs=0.45)


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_it_is_as_sure_of_volumes_on_oblique_grids(kind: Any) -> None:
    turn = orientation(3, torch.tensor([0.3, -0.5, 0.8]), True)
    grid = Grid((14, 13, 12), spacing=(1.0, 1.2, 1.5), center=(40.0, -70.0, 20.0), direction=turn)
    steps = torch.randn(40, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fixed, moving, truth = waves(40, steps, Rigid(), 6, noise=0.1, wave=6.0, grid=grid)
    result = register(fixed, moving, Rigid(), levels=1, solver=GaussNewton())
    points = (grid.center + torch.tensor([[0.0, 0.0, 0.0], [5.0, -4.0, 3.0]])).expand(40, -1, -1)
    square = distances(
        result.map_points(points) - truth.map_points(points),
        laplace(fixed, moving, result, noise=kind).point_covariance(points),
    )
    assert float(square.mean()) == pytest.approx(3, abs=1.1)  # of three coordinates; 40 pairs vary by 0.4
    assert float((square <= 7.815).double().mean()) > 0.85


def test_correlated_noise_is_told_from_independent_noise() -> None:
    fixed, moving, truth = rigid_pairs(150, 1, wave=6.0, blur=0.8)
    result = register(fixed, moving, Rigid(), **NEWTON)
    share = {}
    for kind in ("independent", "correlated"):
        square = distances(errors(result, truth), laplace(fixed, moving, result, noise=kind).point_covariance(POINTS))
        share[kind] = float((square <= LIMIT).double().mean())
    assert share["independent"] < 0.75  # who counts voxels is too sure
    assert 0.88 < share["correlated"] < 0.99


def test_a_spline_from_its_prior_is_in_its_ellipse_as_often_as_told() -> None:
    transform, grid, count = FFD(7), Grid((SIZE, SIZE)), 60
    start, zero, flat = transform.init(grid), transform.zero_step(grid), flat_zero(transform, grid)

    def penalty(flat: Tensor) -> Tensor:
        return fnreg.penalties.bending(transform.field(transform.retract(start, parted(flat, zero), grid), grid))

    held = hessian(penalty)(flat) / 2
    values, vectors = torch.linalg.eigh(held)
    root = vectors * torch.where(values > 1e-9 * values.amax(), values.clamp(min=1e-30).rsqrt(), 0)
    weight = 0.6
    variance = 0.05**2 * (1 + 4 / 9) / SIZE**2  # of a residual
    draw = torch.randn(count, len(flat), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fixed, moving, truth = waves(count, draw @ root.mT * (variance / weight) ** 0.5, transform, 4, wave=4.0)
    objective = mse + weight * bending
    result = register(
        fixed, moving, transform, objective=objective, levels=2, steps=(60, 250), optimizer=adam(0.1, decay=0.01)
    )
    found = laplace(fixed, moving, result, objective=objective, noise="independent")
    assert float(found.left.mean()) < 0.4
    assert 20 < float(found.freedom.mean()) < len(flat)
    square = distances(errors(result, truth), found.point_covariance(POINTS))
    share = float((square <= LIMIT).double().mean())
    assert 0.89 < share < 0.99  # 180 points, not all of them independent
    assert float(square.mean()) == pytest.approx(2, abs=0.5)


# -- what must not matter ------------------------------------------------------------------------------------------


def test_a_pair_alone_is_as_in_a_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    noisy: list[list[Image]] = []
    for n in range(3):
        shift = Mapping({"translation": torch.tensor([0.3 * n, 0.1])}, scene(2).grid, Translation())
        pair = scene(2, grow=2), scene(2, shift, turn=(0.1 * n, 0.0, 0.0), grow=2)
        noisy.append([with_noise(image, 0.03, draw) for image in pair])
    fixed, moving = (stack([pair[side] for pair in noisy]) for side in (0, 1))
    objective = mse + 0.5 * bending
    options: dict[str, Any] = {"levels": 1, "steps": 12, "stop": None}
    batch = register(fixed, moving, FFD(8), objective=objective, **options)
    together = laplace(fixed, moving, batch, objective=objective)
    points = fixed.grid.center.unsqueeze(1) + torch.tensor([[0.0, 1.0], [3.0, -2.0]], dtype=torch.float64)
    many = together.point_covariance(points)
    for n, pair in enumerate(noisy):
        alone = laplace(*pair, register(*pair, FFD(8), objective=objective, **options), objective=objective)
        size = float(alone.covariance.amax())
        assert_close(together.covariance[n], alone.covariance, atol=1e-7 * size, rtol=1e-7)  # what is hardly known
        assert_close(together.left[n], alone.left, atol=1e-6, rtol=1e-6)
        assert_close(many[n], alone.point_covariance(points[n]), atol=1e-9, rtol=1e-5)
        assert_close(together.pair(n).point_covariance(points[n]), many[n], atol=1e-12, rtol=1e-9)


def test_it_does_not_depend_on_how_scans_are_stored() -> None:
    fixed, moving, _ = rigid_pairs(1, 7)
    pair = [Image(image.data[0], image.grid) for image in (fixed, moving)]
    result = register(*pair, Rigid(), **NEWTON)
    known = laplace(*pair, result).point_covariance(POINTS)
    for order, flips in (((1, 0), (False, True)), ((0, 1), (True, True))):
        other = [stored(pair[0], order, flips), stored(pair[1], (0, 1), (True, False))]
        told = laplace(*other, register(*other, Rigid(), **NEWTON)).point_covariance(POINTS)
        assert_close(told, known, rtol=1e-3, atol=0)  # as near as the solutions are


def test_what_a_mask_hides_has_no_influence() -> None:
    fixed, moving, _ = rigid_pairs(2, 5)
    mask = torch.ones(1, SIZE, SIZE, dtype=torch.float64)
    mask[:, :9, :] = 0
    other = Image(torch.where(mask > 0, fixed.data, 7.0), fixed.grid)
    found = []
    for image in (fixed, other):
        given = Subject(image, mask)
        found.append(laplace(given, moving, register(given, moving, Rigid(), **NEWTON)).point_covariance(POINTS))
    assert_close(*found, rtol=1e-9, atol=0)
    whole = laplace(fixed, moving, register(fixed, moving, Rigid(), **NEWTON)).point_covariance(POINTS)
    assert bool((torch.linalg.det(found[0]) > torch.linalg.det(whole)).all())  # less is known


def test_it_runs_inside_vmap() -> None:
    fixed, moving, _ = rigid_pairs(3, 6)
    result = register(fixed, moving, Rigid(), **NEWTON)

    def one(params: Any, first: Tensor, second: Tensor) -> Tensor:
        images = Image(first, fixed.grid), Image(second, moving.grid)
        mapping = Mapping(params, fixed.grid, Rigid())
        alone = dataclasses.replace(result, mapping=mapping, status=torch.zeros((), dtype=torch.int64))
        return laplace(*images, alone).point_covariance(POINTS)

    found = vmap(one)(result.mapping.params, fixed.data, moving.data)
    assert_close(found, laplace(fixed, moving, result).point_covariance(POINTS), rtol=1e-7, atol=0)


# -- points and samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rigid", "spline after rigid"])
def test_samples_spread_as_the_points_are_told_to(kind: str) -> None:
    fixed, moving, _ = rigid_pairs(1, 8)
    fixed, moving = (Image(image.data[0], image.grid) for image in (fixed, moving))
    result = register(fixed, moving, Rigid(), **NEWTON)
    objective: Any = mse
    if kind != "rigid":
        objective = mse + 0.5 * bending
        options = {"levels": 2, "steps": 150, "optimizer": adam(0.1, decay=0.01)}
        result = register(fixed, moving, FFD(7), objective=objective, then=result.mapping, **options)
    found = laplace(fixed, moving, result, objective=objective)
    assert found.transform == (Rigid() if kind == "rigid" else FFD(7))
    drawn = found.samples(4000, generator=torch.Generator().manual_seed(0)).map_points(POINTS)
    mean = result.map_points(POINTS)
    away = drawn - mean
    seen = torch.einsum("bni,bnj->nij", away, away) / len(away)
    ratio = torch.linalg.eigvals(torch.linalg.solve(found.point_covariance(POINTS), seen)).real
    assert 0.9 < float(ratio.min()) <= float(ratio.max()) < 1.1
    assert_close(drawn.mean(0), mean, atol=4 * float(seen.amax() / 4000) ** 0.5, rtol=0)


def test_ncc_is_as_sure_as_mse_of_images_of_one_contrast() -> None:
    fixed, moving, _ = rigid_pairs(20, 9)
    known = laplace(fixed, moving, register(fixed, moving, Rigid(), **NEWTON)).point_covariance(POINTS)
    brighter = Image(3 * fixed.data + 1, fixed.grid)
    result = register(brighter, moving, Rigid(), objective=ncc, **NEWTON)
    ratio = laplace(brighter, moving, result, objective=ncc).point_covariance(POINTS).det().log() - known.det().log()
    assert float(ratio.mean()) == pytest.approx(0, abs=0.4)  # of two variances


def test_more_noise_makes_it_less_sure() -> None:
    """Twice the noise of the same images is four times the variance, to first order."""
    variance = []
    for noise in (0.03, 0.06):
        fixed, moving, _ = rigid_pairs(10, 10, noise=noise)
        result = register(fixed, moving, Rigid(), **NEWTON)
        variance.append(laplace(fixed, moving, result, noise="independent").covariance.diagonal(dim1=1, dim2=2).mean(0))
    assert 3 < float((variance[1] / variance[0]).mean()) < 5.5


# -- what cannot be known ------------------------------------------------------------------------------------------


def test_the_rotation_of_a_disc_has_infinite_variance() -> None:
    grid = Grid((33, 33))
    draw = torch.Generator().manual_seed(0)
    clean = circle(grid, radius=9.0, blur=1.5, dtype=torch.float64).data
    fixed, moving = (with_noise(Image(clean, grid), 0.03, draw) for _ in "ab")
    result = register(fixed, moving, Rigid(), levels=1, solver=GaussNewton())
    found = laplace(fixed, moving, result)
    assert_close(torch.linalg.eigvalsh(found.free), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    away = found.point_covariance(torch.stack([grid.center, grid.center + torch.tensor([12.0, 0.0])]))
    assert bool(torch.isfinite(away[0]).all()) and float(away[0].amax()) < 0.1  # the centre is known
    assert float(away[1, 1, 1]) == math.inf and math.isfinite(float(away[1, 0, 0]))  # it turns along y alone
    with pytest.raises(ValueError, match="variance is infinite: there is nothing to draw from; add a penalty"):
        found.samples(3)
    known = laplace(fixed, moving, register(fixed, moving, Translation(), **NEWTON))
    assert not known.free.any()


def test_a_spline_over_flat_parts_is_known_where_the_image_is() -> None:
    grid = Grid((40, 40))
    points = grid.points()
    data = torch.where(points[:, 0] < 20, torch.sin(points[:, 0] * 0.7) * torch.cos(points[:, 1] * 0.6), 0.0)
    draw = torch.Generator().manual_seed(1)
    fixed, moving = (with_noise(Image(data.reshape(1, 40, 40), grid), 0.02, draw) for _ in "ab")
    result = register(fixed, moving, FFD(8), levels=1, steps=0)
    with fnreg.notes.hearing():
        found = laplace(fixed, moving, result).point_covariance(
            torch.tensor([[8.0, 20.0], [34.0, 20.0]], dtype=torch.float64)
        )
    assert bool(torch.isfinite(found[0]).all()) and float(found[0].amax()) < 0.5
    assert float(found[1, 0, 0]) == float(found[1, 1, 1]) == math.inf


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered() -> tuple[Image, Image, fnreg.Registration]:
    fixed, moving, _ = rigid_pairs(1, 11)
    fixed, moving = (Image(image.data[0], image.grid) for image in (fixed, moving))
    return fixed, moving, register(fixed, moving, Rigid(), **NEWTON)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": fnreg.lncc}, "lncc has no residuals of voxels.*mse and ncc.*use `ensemble`"),
        ({"objective": fnreg.mi}, "mi has no residuals of voxels"),
        ({"objective": fnreg.landmarks}, "landmarks has no residuals of voxels"),
        ({"objective": mse + ncc}, "2 similarities: laplace takes one"),
        ({"objective": bending}, "0 similarities"),
        ({"objective": ncc, "noise": "independent"}, "noise='independent' goes with mse alone, not ncc"),
        ({"noise": "white"}, "unknown noise 'white': choose independent or correlated"),
        ({"reach": 0}, "reach is 0: expected at least 1 voxel"),
    ],
)
def test_it_says_what_it_cannot_do(registered: Any, options: dict[str, Any], words: str) -> None:
    fixed, moving, result = registered
    with pytest.raises(ValueError, match=words):
        laplace(fixed, moving, result, **options)


def test_it_takes_the_images_that_were_registered(registered: Any) -> None:
    fixed, moving, result = registered
    with pytest.raises(ValueError, match=r"fixed has size \(20, 28\) but \(28, 28\) was registered"):
        laplace(Image(fixed.data[..., :20]), moving, result)
    with pytest.raises(ValueError, match="leading batch axes differ"):
        many = stack([fixed, fixed, fixed])
        two = stack([moving, moving])
        laplace(many, two, result)


def test_transforms_that_it_refuses(registered: Any) -> None:
    fixed, moving, _ = registered
    result = register(fixed, moving, fnreg.Diffeomorphism(), levels=1, steps=1)
    with pytest.raises(ValueError, match=r"descends no single objective.*use SVFFD, or `ensemble`"):
        laplace(fixed, moving, result)


def test_a_failed_registration_is_told(registered: Any) -> None:
    fixed, moving, result = registered
    failed = dataclasses.replace(result, status=torch.tensor(int(fnreg.Status.DIVERGED)))
    with pytest.raises(ValueError, match=r"the registration failed: .*no solution to be unsure of"):
        laplace(fixed, moving, failed)
    constant = Image(torch.ones_like(fixed.data), fixed.grid)
    images = stack([fixed, constant]), stack([moving, moving])
    found = laplace(*images, register(*images, Rigid(), **NEWTON))
    assert bool(torch.isnan(found.covariance[1]).all()) and bool(torch.isnan(found.point_covariance(POINTS)[1]).all())
    alone = laplace(fixed, moving, register(fixed, moving, Rigid(), **NEWTON))
    assert_close(found.covariance[0], alone.covariance, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="this pair failed to register, so there is nothing to draw from"):
        found.pair(1).samples(2)
    with pytest.raises(ValueError, match=r"samples are of one pair: take one of the batch, laplace.pair\(0\)"):
        found.samples(2)


def test_what_is_asked_of_it_must_fit(registered: Any) -> None:
    fixed, moving, result = registered
    found = laplace(fixed, moving, result)
    with pytest.raises(ValueError, match=r"points have shape \(4, 3\): expected \(N, 2\) world points"):
        found.point_covariance(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="count is 0: draw at least one"):
        found.samples(0)


def test_it_warns_far_from_the_minimum() -> None:
    fixed, moving, _ = waves(1, torch.tensor([[0.5, 0.3]], dtype=torch.float64), Translation(), 0, noise=0.02)
    result = register(fixed, moving, Translation(), levels=1, steps=0)
    with pytest.warns(UserWarning, match="1 of 1 registrations ended more than 3 standard deviations from their min"):
        found = laplace(fixed, moving, result, noise="independent")
    assert float(found.left[0]) > 3
    found = laplace(fixed, moving, register(fixed, moving, Translation(), **NEWTON), noise="independent")
    assert float(found.left[0]) < 1


# -- what a pair cannot do to others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["nan", "empty mask", "apart", "identical"])
@pytest.mark.parametrize("dense", [True, False])
def test_a_bad_pair_leaves_its_neighbour_as_it_is(lost: str, dense: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    fixed, moving = (
        fnreg.Image(circle((20, 20), blur=2.0).data + 0.02 * torch.randn(1, 20, 20, generator=generator))
        for _ in range(2)
    )
    data, mask = torch.stack([fixed.data, fixed.data]), torch.ones(2, 1, 20, 20)
    centers = torch.stack([moving.grid.center, moving.grid.center])
    if lost == "nan":
        data[1, 0, 4] = torch.nan
    elif lost == "apart":
        centers[1] += 1e4
    elif lost == "empty mask":
        mask[1] = 0
    else:
        data[1] = moving.data
    both = fnreg.Subject(fnreg.Image(data, fixed.grid), mask)
    other = fnreg.Image(moving.data, fnreg.Grid((20, 20), center=centers))
    chosen = fnreg.Rigid() if dense else fnreg.FFD(5)
    objective = fnreg.mse if dense else fnreg.mse + 0.1 * fnreg.diffusion + 0.01 * fnreg.bending
    options = {"objective": objective, "levels": 1, "steps": 30}
    result = fnreg.register(both, other, chosen, **options)
    points = fixed.grid.center.unsqueeze(0) + 3.0
    found = fnreg.laplace(both, other, result, objective=objective, dense=dense).point_covariance(points)
    subject = fnreg.Subject(fixed, mask[0])
    single = fnreg.register(subject, moving, chosen, **options)
    alone = fnreg.laplace(subject, moving, single, objective=objective, dense=dense).point_covariance(points)
    assert_close(found[0], alone, rtol=1e-4, atol=1e-9)
    assert bool(torch.isfinite(found[1]).all()) == (lost == "identical")


def test_equal_images_are_known_without_error() -> None:
    fixed = circle((20, 20), blur=2.0)
    result = fnreg.register(fixed, fixed, fnreg.Translation(), solver=fnreg.GaussNewton())
    for noise in ("correlated", "independent"):
        found = fnreg.laplace(fixed, fixed, result, noise=noise).point_covariance(fixed.grid.center.unsqueeze(0))  # type: ignore[arg-type]
        assert float(found.abs().max()) < 1e-12


def test_channels_may_be_of_unequal_noise() -> None:
    """One channel tells, five are quiet and nearly empty: errors are those of the one that tells."""
    generator = torch.Generator().manual_seed(0)
    disc, count = circle((24, 24), blur=2.5).data[0], 60
    shares = torch.tensor([1.0, 0.05, 0.05, 0.05, 0.05, 0.05]).reshape(-1, 1, 1)
    noise = torch.tensor([0.2, 0.01, 0.01, 0.01, 0.01, 0.01]).reshape(-1, 1, 1)

    def made() -> fnreg.Image:
        return fnreg.Image(
            shares * disc + noise * torch.randn(count, 6, 24, 24, generator=generator), fnreg.Grid((24, 24))
        )

    fixed, moving = made(), made()
    result = fnreg.register(fixed, moving, fnreg.Translation(), solver=fnreg.GaussNewton(), levels=1)
    points = torch.tensor([[11.5, 11.5]], dtype=torch.float64)
    covariance = fnreg.laplace(fixed, moving, result).point_covariance(points)[:, 0]
    error = result.map_points(points)[:, 0] - points
    away = torch.einsum("ni,nij,nj->n", error, torch.linalg.inv(covariance), error)
    assert float((away < 5.99).double().mean()) > 0.9


@pytest.mark.parametrize("padding", ["border", "zeros", 0.5, "reflection"])
def test_noise_beyond_the_image_is_that_of_its_covariance(padding: Any) -> None:
    """The variance of each voxel is the diagonal of C, inside, on the border and beyond."""
    coords = torch.tensor([[-3.5, -0.3, 0.0, 1.25, 6.0, 6.4, 9.0], [2.0, 2.5, -0.25, 1.5, 3.75, 5.5, -2.0]]).double()
    found = noises.independent(torch.rand(1, 6, 7, dtype=torch.float64), coords, padding)
    formed = torch.stack([found.apply(row.unsqueeze(0))[0] for row in torch.eye(7, dtype=torch.float64)])
    assert_close(found.variance[0], formed.diagonal(), atol=1e-12, rtol=0)


def test_thin_stacks_have_their_correlation_too() -> None:
    generator = torch.Generator().manual_seed(1)
    disc = circle((20, 20), blur=2.5).data
    for slices in (1, 3):
        volumes = [
            fnreg.Image(
                disc.unsqueeze(1).expand(1, slices, 20, 20) + 0.05 * torch.randn(1, slices, 20, 20, generator=generator)
            )
            for _ in range(2)
        ]
        result = fnreg.register(*volumes, fnreg.Translation(), solver=fnreg.GaussNewton(), levels=1)
        plane = fnreg.laplace(*volumes, result).point_covariance(volumes[0].grid.center.unsqueeze(0))[0, :2, :2]
        assert bool((torch.linalg.eigvalsh(plane) > 0).all())


def test_what_is_no_image_or_of_three_maps() -> None:
    fixed, moving = circle((20, 20), blur=2.0), circle((20, 20), radius=6.0, blur=2.0)
    result = fnreg.register(fixed, moving, fnreg.Rigid(), levels=1, steps=5)
    with pytest.raises(TypeError, match="expected an Image or a Subject, got list"):
        fnreg.laplace([fixed], moving, result)  # type: ignore[arg-type]
    three = dataclasses.replace(result, mapping=result.mapping @ result.mapping @ result.mapping)
    if isinstance(three.mapping.transform, fnreg.Sequential) and len(three.mapping.params) == 3:
        with pytest.raises(ValueError, match="made of 3 maps"):
            fnreg.laplace(fixed, moving, three)
