"""The penalty on there and back: formulas, the number of squarings, gradients, batches, registrations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scenes import law, random_params, tensor, uniform
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from fnreg import (
    FFD,
    SVF,
    SVFFD,
    TPS,
    Affine,
    Diffeomorphism,
    Displacement,
    Grid,
    Held,
    Image,
    Sequential,
    Transform,
    adam,
    fields,
    inverse_consistency,
    mse,
    register,
    stack,
)
from fnreg.losses import consistency

every_dimension = pytest.mark.parametrize("dimension", [1, 2, 3])
SIZES = {1: (21,), 2: (15, 13), 3: (9, 8, 10)}


def placed(dimension: int, spacing: float = 1.5) -> Grid:
    return Grid(SIZES[dimension], spacing=spacing, center=tensor([40.0, -3.0, 7.0])[:dimension])


def penalty(transform: Transform, params: Any, grid: Any) -> Tensor:
    return consistency.inverse_consistency(transform, params, grid)


@every_dimension
@pytest.mark.parametrize("transform", [SVF(4), SVFFD(4, 4)], ids=str)
def test_a_translation_comes_back_exactly(dimension: int, transform: Transform) -> None:
    grid = placed(dimension)
    params = transform.init(grid)
    moved = {name: leaf + 2.3 for name, leaf in params.items()}
    assert penalty(transform, params, grid) == 0
    assert penalty(transform, moved, grid) < 1e-24
    assert penalty(transform, random_params(transform, grid, 1), grid) > 1e-9  # what is not uniform does not


def test_a_linear_velocity_misses_by_the_fourth_order() -> None:
    """v = a x by one step of second order: x (1 + a + a^2 / 2) and back x (1 - a + a^2 / 2) make x (1 + a^4 / 4)."""
    a = -0.4  # a contraction, so that no voxel that counts looks beyond the border
    grid = Grid((21,), spacing=1.5, center=40.0)
    x = grid.points()[:, 0] - 40.0
    expected = (a**4 / 4 * x).square().mean()
    assert_close(penalty(SVF(0), {"velocity": a * x[None]}, grid), expected, rtol=1e-9, atol=0)


@every_dimension
def test_it_is_the_mean_square_of_what_the_metric_measures(dimension: int) -> None:
    grid = placed(dimension)
    for transform in (SVF(3), SVFFD(4, 3)):
        params = random_params(transform, grid, 2, 0.2)
        there = transform.displacement(params, grid)
        back = transform.inverse(params, grid).displacement()
        away = fields.sample_field(back, grid, grid.points() + there.flatten(1).mT) + there.flatten(1).mT
        assert_close(penalty(transform, params, grid), away.square().sum(1).mean(), rtol=1e-9, atol=1e-15)
        found = fields.inverse_consistency(there, back, grid)
        assert float(found.mean) > 0


@every_dimension
def test_more_squarings_come_nearer(dimension: int) -> None:
    size = {1: 240, 2: 96, 3: 40}[dimension]
    grid = Grid((size,) * dimension)
    along = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    axes = torch.meshgrid(*[along] * dimension, indexing="ij")
    window = torch.stack([torch.sin(torch.pi * axis) ** 2 for axis in axes]).prod(0)  # nothing leaves the grid
    velocity = torch.stack([0.25 * size * window * torch.cos(4 * axis + k) for k, axis in enumerate(axes)])
    left = [float(penalty(SVF(steps), {"velocity": velocity}, grid)) for steps in range(3)]
    assert all(after < before / 2 for before, after in itertools.pairwise(left))


@every_dimension
def test_it_is_a_square_of_world_length(dimension: int) -> None:
    one, two = placed(dimension), placed(dimension, 3.0)
    for transform in (SVF(3), SVFFD(4, 3)):
        params = random_params(transform, one, 3, 0.2)
        double = {name: 2 * leaf for name, leaf in params.items()}
        assert_close(penalty(transform, double, two), 4 * penalty(transform, params, one), rtol=1e-9, atol=0)


def test_what_acts_after_it_and_is_linear_does_not_matter() -> None:
    grid, svf = placed(2), SVF(3)
    params = random_params(svf, grid, 4)
    alone = penalty(svf, params, grid)
    affine = random_params(Affine(), grid, 5)
    assert penalty(Sequential((svf, Affine())), (params, affine), grid) == alone > 0
    assert penalty(Sequential((svf, Affine())), (params, affine), (grid, placed(2, 2.0))) == alone
    assert penalty(Held(svf, ("velocity",)), params, grid) == alone
    assert penalty(Affine(), affine, grid) == penalty(Sequential((Affine(), Affine())), (affine, affine), grid) == 0


@every_dimension
@pytest.mark.parametrize("transform", [SVF(2), SVFFD(2, 2)], ids=str)
def test_gradients(dimension: int, transform: Transform) -> None:
    grid = Grid((5, 4, 4)[:dimension], spacing=1.3)
    (name, leaf), *_ = transform.init(grid).items()
    # Off the knots of linear interpolation: all voxels move by a fraction, in one direction.
    start = (0.3 + 0.1 * uniform(*leaf.shape, seed=7)).requires_grad_()
    assert gradcheck(lambda values: penalty(transform, {name: values}, grid), (start,))


def test_a_batch_is_each_of_its_pairs() -> None:
    grids = [placed(2), placed(2, 0.7)]
    many = [random_params(SVF(3), grid, seed, 0.2) for seed, grid in enumerate(grids)]

    def found(params: Any, grid: Grid) -> tuple[Tensor, Tensor]:
        return (value := penalty(SVF(3), params, grid)), value

    law(found, many, grids, atol=0)
    values = [penalty(SVF(3), params, grid) for params, grid in zip(many, grids, strict=True)]
    together = torch.func.vmap(lambda p, g: penalty(SVF(3), p, g))(stack(many), stack(grids))
    assert_close(together, torch.stack(values), rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_registrations_with_it_come_back_nearer(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = Grid((24, 20))
    fixed, moving = (
        Image(torch.rand(1, *grid.shape, generator=generator, dtype=torch.float64), grid).gaussian(1.5, unit="voxel")
        for _ in range(2)
    )
    away: list[float] = []
    for weight in (0.0, 1.0):
        objective = mse + weight * inverse_consistency if weight else mse
        options: dict[str, Any] = {"levels": 1, "steps": 30, "optimizer": adam(0.3), "symmetric": symmetric}
        result = register(fixed, moving, SVF(4), objective=objective, **options)
        away.append(float(penalty(SVF(4), result.mapping.params, grid)))
        assert ("inverse_consistency" in result.terms) == bool(weight)
    assert away[1] < 0.2 * away[0]


@pytest.mark.parametrize(
    "transform", [FFD(4), Displacement(), Diffeomorphism(), TPS(5), Sequential((Affine(), SVF(3)))], ids=str
)
def test_transforms_whose_inverse_is_a_search_are_refused(transform: Transform) -> None:
    grid = placed(2)
    with pytest.raises(ValueError, match=r"the inverse of .* is a search.*use SVFFD or SVF"):
        penalty(transform, transform.init(grid), grid)
    image = Image(uniform(1, *grid.shape).square(), grid)
    with pytest.raises(ValueError, match="is a search"):
        register(image, image, transform, objective=mse + inverse_consistency, levels=1, steps=1)
