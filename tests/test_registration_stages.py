"""register: stages hand over their maps, `then` acts after, and pyramids may be given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from scenes import (
    DESCENT,
    SAME,
    both_solvers,
    equal_bits,
    few_steps,
    known_pair,
    probe,
    random_mapping,
    random_params,
    scene,
    several_pairs,
    take,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    Affine,
    Descent,
    GaussNewton,
    Grid,
    Mapping,
    Rigid,
    Rotation,
    Scaling,
    Sequential,
    Similarity,
    Stage,
    Stop,
    Transform,
    Translation,
    adam,
    evaluate,
    register,
    stack,
)

# -- stages --------------------------------------------------------------------------------------------------------


def test_a_stage_that_holds_the_last_map_goes_on_from_it() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    first = register(fixed, moving, Rigid(), levels=2, steps=20)
    both = register(fixed, moving, [Rigid(), Stage(Affine(), steps=0)], levels=2, steps=20)
    assert isinstance(both.mapping.transform, Affine)
    assert voxels_apart(both.mapping, first.mapping, fixed.grid) < SAME
    whole = register(fixed, moving, [Translation(), Rigid(), Similarity(), Affine()], levels=2, steps=40)
    assert voxels_apart(whole.mapping, truth, fixed.grid) < 0.06
    assert whole.steps.shape == (8,)
    assert [(t.stage, t.level) for t in whole.history] == [(s, level) for s in range(4) for level in (1, 0)]
    # the affine stage starts on its coarsest level with the value that the map before it has there
    affine = register(fixed, moving, Affine(), initial=first.mapping, **few_steps(DESCENT))
    again = register(fixed, moving, [Stage(Rigid(), steps=20, stop=Stop()), Affine()], **few_steps(DESCENT))
    assert voxels_apart(affine.mapping, again.mapping, fixed.grid) < SAME


@pytest.mark.parametrize(
    ("first", "second", "goes_on"),
    [
        (Translation(), Rigid(), True),
        (Rotation(), Rigid(), True),
        (Rigid(), Similarity(), True),
        (Sequential((Rigid(), Scaling())), Affine(), True),
        (Similarity(), Rigid(), False),
        (Rigid(), Rotation(), False),
        (Scaling(), Similarity(), False),
        (Rigid(), Sequential((Rigid(), Scaling())), False),
    ],
    ids=str,
)
def test_a_stage_goes_on_or_goes_before(first: Transform, second: Transform, goes_on: bool) -> None:
    """Either way the second stage begins with the map of the first."""
    fixed, moving, _ = known_pair(Affine(), 2)
    before = register(fixed, moving, first, **few_steps(DESCENT))
    both = register(fixed, moving, [first, Stage(second, steps=0)], **few_steps(DESCENT))
    assert both.mapping.transform == (second if goes_on else Sequential((second, first)))
    assert voxels_apart(both.mapping, before.mapping, fixed.grid) < SAME


def test_a_stage_that_cannot_hold_the_last_map_goes_before_it() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    first = register(fixed, moving, Affine(), levels=2, steps=40)
    both = register(fixed, moving, [Affine(), Stage(Rigid(), steps=0)], levels=2, steps=40)
    assert both.mapping.transform == Sequential((Rigid(), Affine()))
    assert voxels_apart(both.mapping, first.mapping, fixed.grid) < SAME
    three = register(fixed, moving, [Rigid(), Sequential((Scaling(), Translation())), Rotation()], levels=2, steps=40)
    assert len(three.mapping.transform.transforms) == 2  # type: ignore[attr-defined]
    value, _ = evaluate(fixed, moving, three.mapping)
    assert_close(value, three.value, atol=1e-12, rtol=0)
    assert voxels_apart(three.mapping, truth, fixed.grid) < 1.0


def test_stages_of_a_batch_equal_the_loop() -> None:
    fixed, moving = several_pairs()
    for stages in ([Rigid(), Affine()], [Affine(), Rigid()]):
        batch = register(stack(fixed), stack(moving), stages, **few_steps(DESCENT, 5))
        for n in range(4):
            alone = register(fixed[n], moving[n], stages, **few_steps(DESCENT, 5))
            assert voxels_apart(take(batch.mapping, n), alone.mapping, fixed[n].grid) < SAME


def test_a_stage_overrides_the_call() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    stages = [
        Stage(Rigid(), objective=fnreg.mae, optimizer=adam(0.1), levels=2, steps=(4, 3)),
        Stage(Affine(), solver=GaussNewton(), levels=1, steps=2),
        Rigid(),
    ]
    result = register(fixed, moving, stages, levels=3, steps=(1, 2, 0), min_size=4, stop=None)
    assert result.steps.tolist() == [4, 3, 2, 1, 2, 0]
    first = register(
        fixed, moving, Rigid(), objective=fnreg.mae, optimizer=adam(0.1), levels=2, steps=(4, 3), stop=None
    )
    assert equal_bits([t.value for t in result.history[:2]], [t.value for t in first.history])
    assert list(result.terms) == ["mse"]


def test_an_optimizer_of_a_stage_keeps_the_limit_of_the_call() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    call, options = Descent(adam(0.3), limit=0.05), {"levels": 1, "steps": 4, "stop": None}

    def found(stage: Any, solver: Any) -> Mapping:
        return register(fixed, moving, stage, solver=solver, **options).mapping

    limited, free = (found(Rigid(), Descent(adam(0.5), limit=limit)) for limit in (0.05, None))
    assert voxels_apart(limited, free, fixed.grid) > 0.5
    assert equal_bits(found(Stage(Rigid(), optimizer=adam(0.5)), call), limited)
    assert equal_bits(found(Stage(Rigid(), solver=Descent(), optimizer=adam(0.5)), call), free)  # it has its own
    assert equal_bits(found(Stage(Rigid(), optimizer=adam(0.5)), GaussNewton()), free)


def test_stages_are_differentiated_through_their_handover() -> None:
    """Rotations have equal singular values: their parameters pass on by name, and fits go by a smooth iteration."""
    fixed, moving, _ = known_pair(Rigid(), 2)
    pure: dict[str, Any] = {"levels": 1, "steps": 2, "stop": None, "optimizer": fnreg.adam(0.3, pure=True)}

    def value(weight: Tensor) -> Tensor:
        stages = [Rigid(), fnreg.Similarity()]
        return register(fixed, moving, stages, objective=fnreg.mse + weight * fnreg.ncc, **pure).terms["mse"]

    point, width = torch.tensor(0.5, dtype=torch.float64), 1e-5
    expected = (value(point + width) - value(point - width)) / (2 * width)
    assert float(torch.func.grad(value)(point)) == pytest.approx(float(expected), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dimension", [2, 3])
def test_fits_have_derivatives_at_rotations(dimension: int) -> None:
    grid = scene(dimension).grid
    matrix = Rigid().matrix(random_params(Rigid(), grid, 3), grid)

    def again(linear: Tensor) -> Tensor:
        whole = torch.cat([torch.cat([linear, matrix[:-1, -1:]], 1), matrix[-1:]])
        return Rigid().matrix(Rigid().fit(whole, grid), grid)[:-1, :-1]

    assert torch.autograd.gradcheck(again, matrix[:-1, :-1].clone().requires_grad_())


# -- then ----------------------------------------------------------------------------------------------------------


def test_then_acts_after_the_optimised_map() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    domain = Grid((7, 5), center=(3.0, -4.0))
    for after in (
        random_mapping(Similarity(), domain, 3, 0.5),
        random_mapping(Sequential((Rigid(), Affine())), domain, 4, 0.2),
    ):
        inner = random_mapping(Rigid(), fixed.grid, 2, 0.5)
        truth = after @ inner
        image = scene(2, truth)
        result = register(image, moving, Rigid(), then=after, levels=2, steps=60)
        assert voxels_apart(result.mapping, truth, fixed.grid) < 0.1
        parts = result.mapping.transform
        assert parts == Sequential((Rigid(), after.transform))
        found = Mapping(result.mapping.params[0], fixed.grid, Rigid())
        assert voxels_apart(found, inner, fixed.grid) < 0.15
        assert_close(result.value, evaluate(image, moving, result.mapping)[0], atol=1e-12, rtol=0)
        still = register(image, moving, Rigid(), then=after, steps=0)
        assert voxels_apart(still.mapping, after, fixed.grid) < SAME


def test_then_of_a_batch_equals_the_loop() -> None:
    fixed, moving = several_pairs()
    after = [random_mapping(Rigid(), fixed[0].grid, n, 0.3) for n in range(4)]
    shared = register(stack(fixed), stack(moving), Rigid(), then=after[0], **few_steps(DESCENT, 4))
    own = register(stack(fixed), stack(moving), Rigid(), then=stack(after), **few_steps(DESCENT, 4))
    one = register(fixed[0], moving[0], Rigid(), then=stack(after), **few_steps(DESCENT, 4))
    for n in range(4):
        for batch, f, m, mapping in (
            (shared, fixed[n], moving[n], after[0]),
            (own, fixed[n], moving[n], after[n]),
            (one, fixed[0], moving[0], after[n]),
        ):
            alone = register(f, m, Rigid(), then=mapping, **few_steps(DESCENT, 4))
            points = probe(f.grid)
            assert_close(batch.map_points(points)[n], alone.map_points(points), atol=SAME, rtol=0)


# -- pyramids ------------------------------------------------------------------------------------------------------


@both_solvers
def test_a_pyramid_may_be_given(options: dict[str, Any]) -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    expected = register(fixed, moving, Rigid(), **few_steps(options))
    for a, b in ((fixed.pyramid(2), moving.pyramid(2)), (fixed, moving.pyramid(2)), (list(fixed.pyramid(2)), moving)):
        result = register(a, b, Rigid(), **few_steps(options))
        assert equal_bits(result.mapping, expected.mapping)
    fine = register(fixed.pyramid(2), (moving,), Rigid(), **few_steps(options))  # the moving pyramid may be shorter
    assert not equal_bits(fine.mapping, expected.mapping)
    assert fine.steps.tolist() == expected.steps.tolist()


def test_a_pyramid_of_batches_may_be_given() -> None:
    fixed, moving = several_pairs()
    levels = [stack([image.pyramid(2)[k] for image in fixed]) for k in range(2)]
    result = register(levels, stack(moving), Rigid(), **few_steps(DESCENT, 4))
    expected = register(stack(fixed), stack(moving), Rigid(), **few_steps(DESCENT, 4))
    for n in range(4):
        assert voxels_apart(take(result.mapping, n), take(expected.mapping, n), fixed[n].grid) < SAME


def test_what_a_stage_has_of_its_own_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        Stage(Rigid(), fnreg.mse)  # type: ignore[call-arg]
    assert inspect.signature(Stage).parameters["objective"].kind is inspect.Parameter.KEYWORD_ONLY
