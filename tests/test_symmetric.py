"""Registration both ways: exchange of the images, consistency of the inverse, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import close, equal_bits
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg import (
    FFD,
    SVF,
    SVFFD,
    Affine,
    GaussNewton,
    Grid,
    Image,
    Rigid,
    Sequential,
    Stage,
    Subject,
    Transform,
    adam,
    bending,
    evaluate,
    linear_mapping,
    mse,
    register,
    stack,
)
from fnreg.inputs import prepare
from fnreg.losses.objective import objective
from fnreg.pytree import batch_axes, first_pair, tree_leaves, tree_map, tree_take
from fnreg.registration import SpeedWarning
from fnreg.symmetric import BothWays

GRID = Grid((20, 18), spacing=(1.0, 1.5), direction=[[0.6, -0.8], [0.8, 0.6]])


def blobs(seed: int, grid: Grid = GRID) -> Image:
    """A smooth random image."""
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.rand(1, *grid.shape, generator=generator, dtype=torch.float64), grid).gaussian(2.5, unit="voxel")


def few(**options: Any) -> dict[str, Any]:
    return {"levels": 2, "steps": 20, "objective": mse + 1e-3 * bending, "symmetric": True} | options


@pytest.mark.parametrize("transform", (SVFFD(stride=4), SVF()))
def test_exchanged_images_give_the_inverse(transform: Transform) -> None:
    fixed, moving = blobs(0), blobs(1)
    there = register(fixed, moving, transform, **few())
    back = register(moving, fixed, transform, **few())
    for a, b in zip(tree_leaves(there.mapping.params), tree_leaves(back.mapping.params), strict=True):
        assert float(a.abs().max()) > 0.1
        assert_close(a, -b, rtol=0, atol=1e-9)
    assert_close(there.value, back.value, rtol=1e-12, atol=0)
    one_way = register(fixed, moving, transform, **few(symmetric=False))
    other = register(moving, fixed, transform, **few(symmetric=False))
    pairs = zip(tree_leaves(one_way.mapping.params), tree_leaves(other.mapping.params), strict=True)
    assert max(float((a + b).abs().max()) for a, b in pairs) > 1e-3  # which is not so of its own


def test_the_gradient_is_that_of_the_value() -> None:
    transform = SVFFD(stride=4)
    whole = prepare(blobs(0), blobs(1), None, levels=1, min_size=4)
    level = BothWays.of(whole.level(0, transform, objective(mse + 0.01 * bending), 1, None))
    params = tree_map(lambda leaf: 0.7 * torch.randn(1, *leaf.shape, dtype=leaf.dtype), transform.init(GRID))
    direction = tree_map(torch.randn_like, level.zero_step())

    def along(size: torch.Tensor) -> torch.Tensor:
        return level.value(level.retract(params, tree_map(lambda leaf: size * leaf, direction)))[0].sum()

    slope, value, terms = level.gradient(params)
    close((value, terms), level.value(params), atol=1e-12)
    found = sum((a * b).sum() for a, b in zip(tree_leaves(slope), tree_leaves(direction), strict=True))
    assert_close(found, grad(along)(torch.zeros((), dtype=torch.float64)), rtol=1e-6, atol=1e-12)
    assert_close(value, level.value(params)[0], rtol=1e-12, atol=0)


def test_masks_and_a_map_after_it_count_on_both_sides() -> None:
    fixed, moving = blobs(0), blobs(1)
    hole = torch.ones(1, *GRID.shape, dtype=torch.float64)
    hole[:, 5:10, 5:10] = 0
    spoiled = Image(torch.where(hole > 0, moving.data, 100.0), GRID)
    clean = register(fixed, Subject(moving, mask=hole), SVFFD(stride=4), **few(steps=5))
    found = register(fixed, Subject(spoiled, mask=hole), SVFFD(stride=4), **few(steps=5))
    assert_close(found.mapping.displacement(), clean.mapping.displacement(), rtol=0, atol=1e-9)
    result = register(fixed, moving, [Stage(Rigid(), objective=mse), SVFFD(stride=4)], **few())
    assert float(result.value) < float(register(fixed, moving, Rigid(), levels=2, steps=20).value)


def test_evaluate_goes_both_ways_as_the_registration() -> None:
    fixeds, movings = stack([blobs(n) for n in range(2)]), stack([blobs(n) for n in (5, 6)])
    for stages in (SVFFD(stride=4), [Stage(Rigid(), objective=mse), SVF()]):
        result = register(fixeds, movings, stages, **few(steps=3))
        found = evaluate(fixeds, movings, result.mapping, objective=mse + 1e-3 * bending, symmetric=True)
        close(found, (result.value, result.terms), atol=1e-12)
        one_way = evaluate(fixeds, movings, result.mapping, objective=mse + 1e-3 * bending)
        assert float((one_way[0] - found[0]).abs().min()) > 1e-6
        one = first_pair(
            tree_take(result.mapping, [1, 0], batch_axes("m", result.mapping, result.mapping.ranks())[0]),
            result.mapping.ranks(),
        )
        alone = evaluate(blobs(1), blobs(6), one, objective=mse, symmetric=True)
        assert_close(alone[0], result.terms["mse"][1], rtol=1e-12, atol=0)
    result = register(blobs(0), blobs(5), FFD(8), levels=1, steps=1)
    with pytest.raises(ValueError, match=r"FFD\(stride=8\) has no cheap inverse: symmetric goes with SVF and SVFFD"):
        evaluate(blobs(0), blobs(5), result.mapping, symmetric=True)


@pytest.mark.parametrize("place", [{"center": (12.5, 10.5)}, {"size": (10, 9), "spacing": 2.0}])
def test_evaluate_goes_both_ways_on_another_grid(place: dict[str, Any]) -> None:
    """The way back is that of the mapping where it was found, seen on the grid that is given."""
    fixed, moving = blobs(0), blobs(5)
    mapping = register(fixed, moving, SVF(), levels=1, steps=8, padding="border").mapping
    grid = Grid(**({"size": fixed.grid.size, "center": fixed.grid.center.tolist()} | place))
    here = fixed.resample(grid)
    there = evaluate(here, moving, mapping, padding="border")[0]
    back = evaluate(moving.resample(grid), here, mapping.inverse(), padding="border")[0]
    found = evaluate(here, moving, mapping, padding="border", symmetric=True)[0]
    assert_close(found, (there + back) / 2, rtol=1e-9, atol=0)


def test_evaluate_goes_both_ways_through_nested_compositions() -> None:
    fixed, moving = blobs(0), blobs(5)
    result = register(fixed, moving, [Stage(Rigid(), objective=mse), SVF()], **few(steps=3))
    shift = linear_mapping(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), fixed.grid)  # nowhere
    options: dict[str, Any] = {"objective": mse, "symmetric": True}
    found, known = (evaluate(fixed, moving, m, **options)[0] for m in (shift @ result.mapping, result.mapping))
    assert_close(found, known, rtol=1e-12, atol=0)


def test_a_pair_alone_equals_the_pair_in_a_batch() -> None:
    fixeds, movings = stack([blobs(n) for n in range(3)]), stack([blobs(n) for n in (5, 6, 7)])
    batch = register(fixeds, movings, SVFFD(stride=4), **few())
    alone = register(blobs(1), blobs(6), SVFFD(stride=4), **few())
    assert_close(batch.mapping.displacement()[1], alone.mapping.displacement(), rtol=0, atol=1e-9)
    assert equal_bits(batch.status[1], alone.status)


def test_gauss_newton_goes_both_ways() -> None:
    options: dict[str, Any] = {"levels": 1, "steps": 5, "symmetric": True, "solver": GaussNewton()}
    there = register(blobs(0), blobs(1), SVFFD(stride=8), **options)
    back = register(blobs(1), blobs(0), SVFFD(stride=8), **options)
    start = register(blobs(0), blobs(1), SVFFD(stride=8), levels=1, steps=0, symmetric=True)
    assert float(there.value) < float(start.value)
    assert_close(
        there.mapping.params["coefficients"], -back.mapping.params["coefficients"], rtol=0, atol=1e-6
    )  # poorly determined splines magnify rounding


def test_transforms_without_a_cheap_inverse_are_refused() -> None:
    for transform in (FFD(), Affine()):
        with pytest.raises(ValueError, match="symmetric registration goes with SVF and SVFFD"):
            register(blobs(0), blobs(1), transform, symmetric=True)


def test_velocities_too_fast_for_their_squarings_are_told() -> None:
    fixed, moving = blobs(0), blobs(1)
    fast = {"coefficients": 8 * torch.ones(2, *SVFFD(stride=4).lattice(GRID).shape, dtype=torch.float64)}
    options: dict[str, Any] = {"levels": 1, "steps": 0, "initial": fast, "padding": "border"}
    with pytest.warns(UserWarning, match=r"too fast for its squarings in 1 of 1 pairs.*use SVFFD\(squarings=4\), or"):
        register(fixed, moving, SVFFD(stride=4, squarings=1), **options)
    register(fixed, moving, SVFFD(stride=4, squarings=4), **options)
    both = Sequential((SVFFD(stride=4, squarings=1), Affine()))
    with pytest.warns(UserWarning, match=r"too fast.*use SVFFD\(squarings=4\), or"):
        result = register(fixed, moving, both, **options | {"initial": (fast, Affine().init(GRID))})
    step = result.mapping.first_step()
    assert step is not None and 4 < float(step) <= 8  # so it takes three squarings more
    assert register(fixed, moving, Affine(), levels=1, steps=0).mapping.first_step() is None


def test_a_velocity_that_is_infinite_is_told_too() -> None:
    """Its pair has failed, and where no other is too fast there is no longest step to tell the squarings from."""
    two = stack([blobs(0)] * 2), stack([blobs(1)] * 2)
    zero = torch.zeros(2, *GRID.shape, dtype=torch.float64)
    lost = {"velocity": torch.stack([zero, zero + 1e300])}
    with pytest.warns(SpeedWarning, match="in 1 of 2 pairs.*use more squarings, or a stronger penalty"):
        register(*two, SVF(squarings=1), initial=lost, levels=1, steps=0)


def test_velocities_under_vmap_are_not_looked_at() -> None:
    fixed, moving = blobs(0), blobs(1)

    def value(weight: torch.Tensor) -> torch.Tensor:
        result = register(
            fixed,
            moving,
            SVF(squarings=3),
            objective=mse + weight * bending,
            optimizer=adam(0.3, pure=True),
            levels=1,
            steps=2,
            stop=None,
        )
        return result.value

    weights = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert_close(vmap(value)(weights), torch.stack([value(w) for w in weights]), rtol=1e-9, atol=0)
