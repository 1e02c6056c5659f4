"""register: objectives of any kind; evaluate: their values under given maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import (
    DESCENT,
    close,
    equal_bits,
    few_steps,
    inner_mask,
    known_pair,
    orientation,
    random_mapping,
    random_params,
    several_pairs,
    tensor,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    Grid,
    Mapping,
    Rigid,
    Scaling,
    Sequential,
    Subject,
    Translation,
    evaluate,
    functional,
    linear_mapping,
    register,
    stack,
    warp,
)

# -- objectives ----------------------------------------------------------------------------------------------------


def test_a_callable_is_an_objective() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)

    def mine(warped: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
        return functional.mse(warped, fixed, weights)

    expected = register(fixed, moving, Rigid(), **few_steps(DESCENT))
    result = register(fixed, moving, Rigid(), objective=mine, **few_steps(DESCENT))
    # `mse` itself is computed in one pass, in another order of sums.
    assert_close(result.mapping.matrix(), expected.mapping.matrix(), rtol=0, atol=1e-9)
    assert list(result.terms) == ["mine"]


def test_an_objective_sees_what_it_asks_for() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    params = random_params(Rigid(), fixed.grid, 3, 0.5)
    mapping = Mapping(params, fixed.grid, Rigid())
    found: dict[str, Any] = {}

    def everything(
        warped: Any, fixed: Any, weights: Any, displacement: Any, params: Any, transform: Any, domain: Any
    ) -> Tensor:
        found.update(locals())
        return warped.mean()

    register(fixed, moving, Rigid(), objective=everything, initial=params, steps=0, levels=1)
    assert equal_bits(found["fixed"], fixed.data)
    assert_close(found["displacement"], mapping.displacement(), atol=1e-12, rtol=0)
    assert equal_bits(found["params"], params)
    assert found["transform"] == Rigid()
    assert found["domain"].same_as(fixed.grid)
    seen = warp(moving, mapping, padding="border").data
    assert_close(found["warped"], seen, atol=1e-12, rtol=0)
    coords = moving.grid.world_to_index(mapping.map_points(fixed.grid.points()))
    inside = ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1).reshape(1, *fixed.grid.shape)
    assert torch.equal(found["weights"], inside.double())


def test_a_penalty_holds_the_map_back() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    free, held, tight = (
        register(fixed, moving, Rigid(), objective=fnreg.mse + weight * fnreg.term(length), levels=2, steps=40)
        for weight in (0.0, 1e-3, 10.0)
    )
    sizes = [float(length(result.mapping.displacement())) for result in (free, held, tight)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-3 * sizes[0]
    assert_close(held.value, held.terms["mse"] + 1e-3 * held.terms["length"], atol=1e-14, rtol=0)


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [fnreg.mse, 0.5 * fnreg.ncc + 2 * fnreg.mae], ids=str)
def test_evaluate_on_a_batch_of_mappings_equals_the_loop(objective: Any) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    mask = inner_mask(fixed)
    several = [random_mapping(Rigid(), fixed.grid, n, 1.0) for n in range(5)]
    shared = Mapping(stack([m.params for m in several]), fixed.grid, Rigid())
    for given in (fixed, Subject(fixed, mask)):
        loop = [evaluate(given, moving, m, objective=objective) for m in several]
        for batch in (shared, stack(several)):
            value, terms = evaluate(given, moving, batch, objective=objective)
            assert_close(value, torch.stack([v for v, _ in loop]), atol=1e-13, rtol=0)
            close(terms, stack([t for _, t in loop]), atol=1e-13)
    value, _ = loop[0]
    assert value.shape == ()


def test_evaluate_uses_the_domain_of_the_mapping() -> None:
    """A turn about another centre is another map."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    elsewhere = Grid((5, 4), center=(4.0, -3.0), direction=orientation(2, tensor([0.3])))
    for transform in (Rigid(), Scaling(), Sequential((Rigid(), Scaling()))):
        mapping = random_mapping(transform, elsewhere, 2, 0.2)
        expected = evaluate(fixed, moving, linear_mapping(mapping.matrix(), fixed.grid))[0]
        assert_close(evaluate(fixed, moving, mapping)[0], expected, atol=1e-13, rtol=0)
        batch = stack([mapping, random_mapping(transform, fixed.grid.resize((5, 4)), 3, 0.2)])
        assert_close(evaluate(fixed, moving, batch)[0][0], expected, atol=1e-13, rtol=0)


def test_evaluate_is_a_search() -> None:
    fixed, moving, truth = known_pair(Translation(), 2)
    away = torch.cartesian_prod(torch.linspace(-2, 2, 9), torch.linspace(-2, 2, 9)).double()
    grid = Mapping({"translation": truth.params["translation"] + away}, fixed.grid, Translation())
    value, _ = evaluate(fixed, moving, grid)
    assert int(value.argmin()) == 40


def test_evaluate_on_pairs_of_a_batch_equals_the_loop() -> None:
    fixed, moving = several_pairs()
    several = [random_mapping(Rigid(), f.grid, n, 0.5) for n, f in enumerate(fixed)]
    weights = tensor([1.0, 2.0, 3.0, 4.0])
    value, _ = evaluate(stack(fixed), stack(moving), stack(several), objective=weights * fnreg.mse)
    loop = [evaluate(f, m, t)[0] for f, m, t in zip(fixed, moving, several, strict=True)]
    assert_close(value, weights * torch.stack(loop), atol=1e-13, rtol=0)
    with pytest.raises(ValueError, match="leading batch axes differ"):
        evaluate(stack(fixed), stack(moving), stack(several[:3]))
