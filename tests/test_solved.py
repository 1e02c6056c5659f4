"""Laplace's approximation of large models, by systems of equations: against matrices, and what it refuses and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scenes import scene, smooth_mapping
from torch import Tensor
from torch.func import jacfwd
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVF,
    SVFFD,
    Displacement,
    Grid,
    Image,
    Mapping,
    Rigid,
    Solves,
    Subject,
    bending,
    diffusion,
    laplace,
    mse,
    ncc,
    register,
    stack,
)
from fnreg.linearised import Linearised, clear
from fnreg.modes import Scaling, modes
from fnreg.pytree import tree_map, tree_vmap
from fnreg.sandwich import pair_noise
from fnreg.solved import SolvedLaplace, linearised, mapped_by_step

TIGHT = Solves(probes=4, tolerance=1e-12, iterations=3000)
LOOSE: dict[str, Any] = {"levels": 1, "steps": 3, "stop": None}
POINTS = torch.tensor([[0.0, 1.0], [3.0, -2.0]], dtype=torch.float64)
BENDS = mse + 0.3 * bending + 0.01 * diffusion


def noisy(image: Image, seed: int, noise: float = 0.03) -> Image:
    draw = torch.Generator().manual_seed(seed)
    return Image(image.data + noise * torch.randn(image.data.shape, generator=draw, dtype=torch.float64), image.grid)


def pair_of(seed: int = 0, noise: float = 0.03, **options: Any) -> tuple[Image, Image]:
    """The scene through a smooth map, and the scene, with noise."""
    grid = scene(2, **options).grid
    truth = smooth_mapping(FFD(6), grid, seed, 0.8)
    return noisy(scene(2, truth, **options), seed, noise), noisy(scene(2, grow=2, **options), seed + 50, noise)


def products(transform: Any, objective: Any = BENDS, **options: Any) -> tuple[SolvedLaplace, Linearised]:
    fixed, moving = pair_of()
    with fnreg.notes.hearing():
        result = register(fixed, moving, transform, objective=objective, **LOOSE)
        found = laplace(fixed, moving, result, objective=objective, dense=False, solves=TIGHT, **options)
    assert isinstance(found, SolvedLaplace)
    return found, linearised(found.options, found.mapping, found.pairs, 1)


def matrix(function: Any, size: int) -> Tensor:
    """The matrix (rows, columns) of a linear function of rows (S, 1, size)."""
    return function(torch.eye(size, dtype=torch.float64).unsqueeze(1)).flatten(1).mT


TRANSFORMS = [FFD(6), SVFFD(6, 3), SVF(3), Displacement()]


# -- against matrices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["independent", "correlated"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_of_the_same_matrices_it_is_the_formed_covariance(transform: Any, kind: Any) -> None:
    """G A^-1 (factor (J^T C J + t K) + p p^T) A^-1 G^T with every matrix formed."""
    found, lin = products(transform, noise=kind)
    size = found.bias.numel()
    roots, held = lin.roots(found.factor.reshape(1), found.positive.reshape(1)), matrix(lin.held, size)
    push = matrix(lambda rows: lin.forth(rows), size)
    noise = matrix(lambda rows: lin.coloured(rows.unflatten(2, (1, -1))), len(push))
    cleaned = matrix(lambda rows: lin.forth(rows, roots), size)
    signed = cleaned * roots.signs.flatten().unsqueeze(1)
    inverse = torch.linalg.inv(cleaned.mT @ signed + held)
    middle = found.factor * (push.mT @ noise @ push + found.typical * held) + torch.outer(found.pull, found.pull)
    covariance = inverse @ middle @ inverse
    points = found.mapping.domain.center + POINTS
    mapped, start = mapped_by_step(found.mapping, points)
    rows = jacfwd(mapped)(start)
    expected = rows @ covariance @ rows.mT
    assert_close(found.point_covariance(points), expected, rtol=1e-6, atol=1e-9 * float(expected.abs().amax()))
    assert_close(found.bias, -inverse @ found.pull, rtol=1e-6, atol=1e-9)
    assert_close(held, held.mT, rtol=0, atol=1e-9 * float(held.abs().amax()))
    # the push is the derivative of the residuals, and the pull its transpose
    pulled = matrix(lambda rows: lin.back(rows.unflatten(2, (1, -1))), len(push))
    assert_close(pulled, push.mT, rtol=0, atol=1e-10 * float(push.abs().amax()))
    # traces, within four of their standard errors
    whole = push @ torch.linalg.inv(push.mT @ push + held) @ push.mT
    prior = torch.linalg.inv(push.mT @ push + held)
    rest = torch.eye(len(push), dtype=torch.float64) - whole
    expected = torch.trace(rest @ noise @ rest) + found.typical * torch.trace(prior @ held @ prior @ push.mT @ push)
    factor = lin.seen.residuals.square().sum() / expected
    assert abs(float((factor / found.factor).sqrt() - 1) * found.deviation) < 4 * float(found.deviation_error) + 1e-12
    freedom = torch.trace(cleaned @ inverse @ signed.mT)
    assert abs(float(freedom - found.freedom)) < 4 * float(found.freedom_error)
    # Newton's step in units of errors
    slope = lin.slope()[0]
    bends = cleaned.mT @ signed + held
    size_of = (slope @ inverse @ slope / torch.trace(bends @ covariance)).sqrt()
    assert float(found.left) == pytest.approx(float(size_of), rel=0.15)


def test_products_are_those_of_the_residuals() -> None:
    """J by forward derivatives of the residuals of `pair_residuals`, slopes included; K by the second of penalties."""
    found, lin = products(SVFFD(6, 3), ncc + 0.3 * bending)
    size = found.bias.numel()
    transform, pair = found.transform, found.pairs
    mapped, start = mapped_by_step(found.mapping, pair.fixed.grid.points())
    found_push = matrix(lambda rows: lin.forth(rows), size)
    moving, fixed, weights = pair.moving, pair.fixed, lin.seen.weights[0]
    points = pair.fixed.grid.points()

    def residuals(flat: Tensor) -> Tensor:
        coords = moving.grid.world_to_index(mapped(flat)).mT
        warped = fnreg.sampling.sample(moving.data, coords, padding="border").value
        given = warped.reshape(fixed.data.shape), fixed.data, weights.reshape(fixed.data.shape)
        return fnreg.losses.functional.ncc_residuals(*given).flatten()

    assert points.shape[1] == 2 and transform == SVFFD(6, 3)
    assert_close(lin.seen.residuals.flatten(), residuals(start), rtol=0, atol=1e-10)
    by_step = jacfwd(residuals)(start)
    assert_close(found_push, by_step, rtol=0, atol=1e-8 * float(by_step.abs().amax()))


def test_the_noise_applied_is_that_of_the_pair() -> None:
    for kind in ("independent", "correlated"):
        found, lin = products(FFD(6), noise=kind)
        seen = tree_map(lambda leaf: leaf[0], lin.seen)
        values = torch.randn(2, 1, 1, seen.scale.shape[1], generator=torch.Generator().manual_seed(0)).double()
        noise = pair_noise(found.options, found.pairs, seen)
        expected = torch.stack([noise.apply(value[0] * seen.scale) * seen.scale for value in values])
        assert_close(lin.coloured(values)[:, 0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("penalty", [bending, diffusion], ids=["bending", "diffusion"])
@pytest.mark.parametrize("transform", [FFD(4), SVF(3)], ids=str)
def test_modes_make_penalties_nearly_diagonal(transform: Any, penalty: Any) -> None:
    _, lin = products(transform, mse + penalty)
    made = modes(lin.level)
    assert made is not None
    shapes = [len(matrix) for matrix in made.matrices]
    size = 2 * shapes[0] * shapes[1]
    plain = Scaling(made.matrices, torch.ones_like(made.penalties))
    basis = plain.forth(torch.eye(size, dtype=torch.float64))  # rows are modes
    held = basis @ matrix(lin.held, size) @ basis.mT
    near = 1e-9 if isinstance(transform, FFD) else 0.3  # means of differences of voxels have weights at the borders
    assert_close(torch.diagonal(held), made.penalties.flatten(), rtol=near, atol=1e-9 * float(held.amax()))
    scale = (made.penalties.flatten() + made.penalties.mean()).rsqrt()
    rest = torch.linalg.eigvalsh(scale * (held - torch.diag(made.penalties.flatten())) * scale.unsqueeze(1))
    assert float(rest.abs().amax()) < (near if penalty is diffusion else 0.7)  # so conjugate gradients take few steps
    there = torch.eye(size, dtype=torch.float64)
    assert_close(plain.back(there), basis.mT, rtol=0, atol=1e-12 * float(basis.abs().amax()))


def test_what_both_images_tell_stays_and_noise_goes() -> None:
    draw, shape = torch.Generator().manual_seed(0), (60, 50)
    # both tell three times as much along x as noise would, and have noise of their own along both axes
    along = torch.tensor([3**0.5, 0.0], dtype=torch.float64)[:, None] * torch.randn(1, 3000, generator=draw).double()
    noise = torch.randn(2, 2, 3000, generator=draw, dtype=torch.float64)
    idle = torch.ones(2, 3000, dtype=torch.float64)
    first, second = ((along + part).unsqueeze(0) for part in noise)
    roots = clear(first, second, idle, shape, torch.tensor(False))
    told = torch.einsum("kin,kn,kjn->nij", roots.rows, roots.signs, roots.rows)
    mean = told.mean(0)
    assert float(mean[0, 0]) == pytest.approx(3, rel=0.1)  # of the slopes' own square it would be 4
    assert abs(float(mean[1, 1])) < 0.1 and abs(float(mean[0, 1])) < 0.1  # and 1
    roots = clear(first, second, idle, shape, torch.tensor(True))
    told = torch.einsum("kin,kn,kjn->nij", roots.rows, roots.signs, roots.rows)
    assert torch.linalg.eigvalsh(told).amin() > -1e-9
    assert float(told[:, 0, 0].mean()) == pytest.approx(3, rel=0.15) and float(told[:, 1, 1].mean()) < 0.2
    # of images that are not finite it is not known, and that ends no batch; in space neither
    lost = torch.full((1, 3, 60), torch.nan, dtype=torch.float64)
    unit = torch.ones(2, 3, 60, dtype=torch.float64)
    both = torch.stack([lost, torch.ones_like(lost)])
    several = torch.func.vmap(lambda g, t: clear(g, g, t, (3, 4, 5), torch.tensor(False)))(both, unit)
    assert bool(several.rows[0].isnan().all()) and bool(several.rows[1].isfinite().all())
    # of images without noise it is the local mean of what they tell, whatever the unit
    smooth = torch.tensor([[[2.0], [1.0]]], dtype=torch.float64).expand(1, 2, 3000)
    for unit in (1e-3, 1e-6):
        roots = clear(smooth, smooth, unit * idle, shape, torch.tensor(unit == 1e-6))
        expected = smooth[0, :, 0].outer(smooth[0, :, 0]).expand(3000, -1, -1)
        assert_close(torch.einsum("kin,kn,kjn->nij", roots.rows, roots.signs, roots.rows), expected, rtol=0, atol=1e-4)


# -- against the formed one ----------------------------------------------------------------------------------------


def test_without_noise_it_is_the_formed_covariance_nearly() -> None:
    """Where the slopes have no noise both take the same matrices: there they agree as traces do."""
    fixed, moving = pair_of(noise=1e-3)
    result = register(fixed, moving, FFD(6), objective=BENDS, levels=2, solver=fnreg.NewtonCG(), steps=20)
    points = fixed.grid.center + POINTS
    for prior in (True, False):
        with fnreg.notes.hearing():
            formed = laplace(fixed, moving, result, objective=BENDS, prior=prior)
            found = laplace(fixed, moving, result, objective=BENDS, prior=prior, dense=False, solves=TIGHT)
        assert isinstance(found, SolvedLaplace)
        ratio = torch.linalg.eigvals(
            torch.linalg.solve(formed.point_covariance(points), found.point_covariance(points))
        ).real
        # what is told is a mean over a window, here a fifth of the image
        assert 0.65 < float(ratio.min()) <= float(ratio.max()) < 1.5
        assert float(found.deviation) == pytest.approx(float(formed.deviation), rel=0.02)
        assert float(found.freedom) == pytest.approx(float(formed.freedom), rel=0.2)


# -- what must not matter ------------------------------------------------------------------------------------------


def test_a_pair_alone_is_as_in_a_batch() -> None:
    pairs = [pair_of(n, turn=(0.1 * n, 0.0, 0.0)) for n in range(3)]
    fixed, moving = (stack([pair[side] for pair in pairs]) for side in (0, 1))
    batch = register(fixed, moving, SVF(3), objective=BENDS, **LOOSE)
    points = fixed.grid.center.unsqueeze(1) + POINTS
    with fnreg.notes.hearing():
        together = laplace(fixed, moving, batch, objective=BENDS, dense=False, solves=TIGHT)
    many = together.point_covariance(points)
    assert isinstance(together, SolvedLaplace)
    for n, pair in enumerate(pairs):
        with fnreg.notes.hearing():
            one = laplace(
                *pair, register(*pair, SVF(3), objective=BENDS, **LOOSE), objective=BENDS, dense=False, solves=TIGHT
            )
        assert isinstance(one, SolvedLaplace)
        assert_close(many[n], one.point_covariance(points[n]), rtol=1e-6, atol=0)
        assert_close(together.pair(n).point_covariance(points[n]), many[n], rtol=1e-7, atol=0)
        for name in ("bias", "deviation", "freedom", "freedom_error", "left"):
            assert_close(getattr(together, name)[n], getattr(one, name), rtol=1e-6, atol=1e-9)


def test_how_many_go_side_by_side_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = products(FFD(6))
    points = found.mapping.domain.center + torch.cat([POINTS, POINTS + 1])
    known = found.point_covariance(points)
    monkeypatch.setattr(fnreg.linearised, "VOXELS", 1)
    assert_close(found.point_covariance(points), known, rtol=1e-8, atol=0)


def test_it_runs_inside_vmap() -> None:
    pairs = [pair_of(n) for n in range(2)]
    fixed, moving = (stack([pair[side] for pair in pairs]) for side in (0, 1))
    result = register(fixed, moving, FFD(8), objective=BENDS, **LOOSE)
    grid, points = fixed.grid, fixed.grid.center[0] + POINTS
    few = Solves(probes=2, tolerance=1e-6, iterations=60)

    def one(params: Any, first: Image, second: Image) -> Tensor:
        mapping = Mapping(params, first.grid, FFD(8))
        alone = dataclasses.replace(result, mapping=mapping, status=torch.zeros((), dtype=torch.int64))
        return laplace(first, second, alone, objective=BENDS, dense=False, solves=few).point_covariance(points)

    inside = tree_vmap(one, (None, None, None), result.mapping.params, fixed, moving)
    assert grid.size == (20, 18)
    with fnreg.notes.hearing():
        outside = laplace(fixed, moving, result, objective=BENDS, dense=False, solves=few).point_covariance(points)
    assert_close(inside, outside, rtol=1e-4, atol=0)


def test_what_a_mask_hides_has_no_influence() -> None:
    fixed, moving = pair_of()
    mask = torch.ones(1, *fixed.grid.shape, dtype=torch.float64)
    mask[:, :6] = 0
    other = Image(torch.where(mask > 0, fixed.data, 7.0), fixed.grid)
    told = []
    for image in (fixed, other):
        given = Subject(image, mask)
        with fnreg.notes.hearing():
            result = register(given, moving, FFD(6), objective=BENDS, **LOOSE)
            told.append(
                laplace(given, moving, result, objective=BENDS, dense=False, solves=TIGHT).point_covariance(
                    fixed.grid.center + POINTS
                )
            )
    assert_close(*told, rtol=0.05, atol=0)  # slopes of the fixed image reach one voxel across the border


def test_a_map_that_acts_after_turns_the_ellipses() -> None:
    fixed, moving = pair_of()
    turned = smooth_mapping(Rigid(), fixed.grid, 1, 0.3)
    with fnreg.notes.hearing():
        result = register(fixed, moving, FFD(6), objective=BENDS, then=turned, **LOOSE)
        found = laplace(fixed, moving, result, objective=BENDS, dense=False, solves=TIGHT)
        formed = laplace(fixed, moving, result, objective=BENDS, dense=True)
    assert found.transform == FFD(6)
    points = fixed.grid.center + POINTS
    ratio = torch.linalg.eigvals(
        torch.linalg.solve(formed.point_covariance(points), found.point_covariance(points))
    ).real
    assert 0.5 < float(ratio.min()) <= float(ratio.max()) < 1.5


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered() -> tuple[Image, Image, fnreg.Registration]:
    fixed, moving = pair_of()
    return fixed, moving, register(fixed, moving, FFD(6), objective=BENDS, **LOOSE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"objective": mse, "dense": False},
            r"the objective .* has no penalty, without which \d+ parameters",
        ),
        ({"interpolation": "cubic"}, "interpolation is 'cubic': laplace knows what linear interpolation does to noise"),
        ({"dense": False, "solves": Solves(iterations=1)}, r"left a relative residual of .* after 1 iterations"),
    ],
)
def test_it_says_what_it_cannot_do(registered: Any, options: dict[str, Any], words: str) -> None:
    fixed, moving, result = registered
    with pytest.raises(ValueError, match=words):
        laplace(fixed, moving, result, **({"objective": BENDS} | options))


def test_solves_are_checked() -> None:
    wrong: list[dict[str, Any]] = [{"probes": 1}, {"probes": 2.5}, {"tolerance": 0.0}, {"tolerance": 1.0}]
    for options in [*wrong, {"iterations": 0}, {"iterations": 10.5}]:
        with pytest.raises(ValueError, match=r"expected probes >= 2 and iterations >= 1, whole numbers, and tolerance"):
            Solves(**options)


def test_what_nothing_tells_about_is_told() -> None:
    """Bending does not see affine maps, and a constant image shows nothing of them."""
    fixed, moving = pair_of()
    flat = Image(torch.full_like(fixed.data, 0.5), fixed.grid)
    result = register(fixed, moving, FFD(6), objective=BENDS, levels=1, steps=0)
    with pytest.raises(ValueError, match=r"neither images nor penalties tell|left a relative residual"):
        laplace(flat, flat, result, objective=mse + bending, dense=False).point_covariance(fixed.grid.center + POINTS)


def test_points_must_fit(registered: Any) -> None:
    fixed, moving, result = registered
    with fnreg.notes.hearing():
        found = laplace(fixed, moving, result, objective=BENDS, dense=False)
    with pytest.raises(ValueError, match=r"points have shape \(4, 3\): expected \(N, 2\) world points"):
        found.point_covariance(torch.zeros(4, 3))


def test_a_failed_pair_of_a_batch_is_nan(registered: Any) -> None:
    fixed, moving, result = registered
    both = stack([fixed, fixed]), stack([moving, moving])
    many = register(*both, FFD(6), objective=BENDS, **LOOSE)
    codes = torch.tensor([0, int(fnreg.Status.DIVERGED)])
    with fnreg.notes.hearing():
        found = laplace(*both, dataclasses.replace(many, status=codes), objective=BENDS, dense=False)
        alone = laplace(fixed, moving, result, objective=BENDS, dense=False)
        with pytest.raises(ValueError, match="the registration failed"):
            laplace(fixed, moving, dataclasses.replace(result, status=codes[1]), objective=BENDS, dense=False)
    points = fixed.grid.center + POINTS
    told = found.point_covariance(points)
    assert bool(torch.isnan(told[1]).all()) and bool(torch.isnan(found.freedom[1]))
    assert_close(told[0], alone.point_covariance(points), rtol=1e-6, atol=0)


def test_a_failed_pair_of_a_batch_in_space_ends_no_other() -> None:
    """Eigenvectors of NaN end a whole batch, where matrices are larger than 2 x 2."""
    pairs = [tuple(noisy(scene(3), seed + n) for n in (0, 50)) for seed in range(2)]
    fixed, moving = (stack([pair[side] for pair in pairs]) for side in (0, 1))
    options: dict[str, Any] = {"objective": BENDS, "dense": False, "solves": Solves(probes=2)}
    many = register(fixed, moving, FFD(6), objective=BENDS, **LOOSE)
    codes = torch.tensor([0, int(fnreg.Status.DIVERGED)])
    points = fixed.grid.center[0] + torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    with fnreg.notes.hearing():
        told = laplace(fixed, moving, dataclasses.replace(many, status=codes), **options).point_covariance(points)
        alone = laplace(*pairs[0], register(*pairs[0], FFD(6), objective=BENDS, **LOOSE), **options)
    assert bool(torch.isnan(told[1]).all())
    assert_close(told[0], alone.point_covariance(points), rtol=1e-4, atol=0)


def test_large_models_take_it_of_themselves() -> None:
    grid = Grid((34, 33))
    draw = torch.Generator().manual_seed(0)
    data = fnreg.filters.gaussian(torch.randn(1, 33, 34, generator=draw, dtype=torch.float64), 2.0)
    image = Image(data / data.std(), grid)
    pair = noisy(image, 1), noisy(image, 2)
    result = register(*pair, Displacement(), objective=BENDS, levels=1, steps=0)
    with fnreg.notes.hearing():
        found = laplace(*pair, result, objective=BENDS)
        with pytest.raises(ValueError, match="has 2244 parameters: a covariance of more than 2048 is not formed"):
            laplace(*pair, result, objective=BENDS, dense=True)
        with pytest.raises(ValueError, match=r"3 samples of Displacement\(\) are not drawn.*2244 parameters"):
            found.samples(3)
    assert isinstance(found, SolvedLaplace)
    variance = found.point_covariance(grid.center + POINTS).diagonal(dim1=1, dim2=2)
    assert float(variance.amin()) > 0 and float(variance.amax()) < 1
