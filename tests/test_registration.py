"""register: known maps are found, whatever finds them, and the result tells how."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from scenes import (
    DESCENT,
    NEWTON,
    SAME,
    both_solvers,
    close,
    equal_bits,
    few_steps,
    known_pair,
    moving_scene,
    probe,
    random_mapping,
    random_params,
    scene,
    several_pairs,
    take,
    tensor,
    voxels_apart,
)
from torch import Tensor
from torch.testing import assert_close

import fnreg
from fnreg import (
    LBFGS,
    Affine,
    Descent,
    Event,
    GaussNewton,
    Held,
    Homogeneous,
    Image,
    Mapping,
    NewtonCG,
    Registration,
    Rigid,
    Rotation,
    Scaling,
    Sequential,
    Similarity,
    Stop,
    Subject,
    Transform,
    Translation,
    adam,
    chain,
    clip,
    evaluate,
    normalized,
    register,
    sgd,
    stack,
    warp,
)
from fnreg.losses.objective import objective as as_objective

# -- known maps ----------------------------------------------------------------------------------------------------

KNOWN = [
    *((t, 1) for t in (Translation(), Scaling(), Affine())),
    *((t, 2) for t in (Translation(), Rotation(), Rigid(), Similarity(), Affine(), Sequential((Rigid(), Scaling())))),
    *((t, 3) for t in (Translation(), Rigid(), Affine())),
]


@both_solvers
@pytest.mark.parametrize(("transform", "dimension"), KNOWN, ids=[f"{d}-{t}" for t, d in KNOWN])
def test_known_maps_are_found(transform: Transform, dimension: int, options: dict[str, Any]) -> None:
    """On grids that differ in spacing, orientation, reflection and size; linear interpolation is not exact."""
    fixed, moving, truth = known_pair(transform, dimension)
    result = register(fixed, moving, transform, levels=2, steps=60 if options is DESCENT else 15, **options)
    identity = Mapping(transform.init(fixed.grid), fixed.grid, transform)
    away = voxels_apart(identity, truth, fixed.grid)
    assert away > 0.5
    error = voxels_apart(result.mapping, truth, fixed.grid)
    assert error < {1: 0.03, 2: 0.06, 3: 0.25}[dimension]
    assert error < 0.05 * away
    assert bool(result.ok)
    assert float(result.value) < 0.05 * float(evaluate(fixed, moving, identity)[0])


@pytest.mark.parametrize(
    "objective", [fnreg.ncc, fnreg.mae, fnreg.huber(delta=0.05), fnreg.mse + 0.1 * fnreg.ncc], ids=str
)
def test_known_maps_are_found_by_every_similarity(objective: Any) -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    result = register(fixed, moving, Rigid(), objective=objective, levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06
    if objective is fnreg.ncc:  # other intensities are the same image
        other = Image(-3 * moving.data + 7, moving.grid)
        inverted = register(fixed, other, Rigid(), objective=-1 * fnreg.ncc, levels=2, steps=60)
        assert voxels_apart(inverted.mapping, truth, fixed.grid) < 0.06


@both_solvers
def test_float32_images_are_registered_nearly_as_well(options: dict[str, Any]) -> None:
    fixed, moving, truth = known_pair(Rigid(), 2)
    single = [Image(image.data.float(), image.grid) for image in (fixed, moving)]
    result = register(*single, Rigid(), levels=2, steps=60, **options)
    double = register(fixed, moving, Rigid(), levels=2, steps=60, **options)
    assert voxels_apart(result.mapping, double.mapping, fixed.grid) < 0.01
    assert result.value.dtype == torch.float32
    assert result.mapping.params["translation"].dtype == torch.float64
    assert result.warp(single[1]).data.dtype == torch.float32
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06


def test_channels_count_together() -> None:
    truth = random_mapping(Rigid(), scene(2).grid, 5, 1.0)
    fixed, moving = scene(2, truth, channels=3), moving_scene(2, channels=3)
    result = register(fixed, moving, Rigid(), levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.06
    # a channel that says nothing changes nothing but the scale of the objective
    still = [Image(torch.cat([i.data[:1], torch.zeros_like(i.data[:1])]), i.grid) for i in (fixed, moving)]
    one = [Image(i.data[:1], i.grid) for i in (fixed, moving)]
    a, b = (register(*pair, Rigid(), **few_steps(NEWTON)) for pair in (still, one))
    assert voxels_apart(a.mapping, b.mapping, fixed.grid) < SAME


def test_held_parameters_stay_to_the_last_bit() -> None:
    fixed, moving, _ = known_pair(Similarity(), 2)
    initial = random_params(Similarity(), fixed.grid, 3, 0.3)
    for options in (DESCENT, NEWTON):
        for names in (("rotation",), ("rotation", "log_size")):
            result = register(fixed, moving, Held(Similarity(), names), initial=initial, **few_steps(options))
            for name, leaf in result.mapping.params.items():
                assert torch.equal(leaf, initial[name]) == (name in names)


def test_a_held_transform_finds_what_is_left() -> None:
    truth_params = {"rotation": tensor([0.2]), "translation": tensor([1.0, -0.7])}
    truth = Mapping(truth_params, scene(2).grid, Rigid())
    fixed, moving = scene(2, truth), moving_scene(2)
    initial = {"rotation": tensor([0.2]), "translation": torch.zeros(2).double()}
    result = register(fixed, moving, Held(Rigid(), ("rotation",)), initial=initial, levels=2, steps=60)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.03


# -- levels, steps and solvers -------------------------------------------------------------------------------------


def test_levels_and_steps_are_those_asked_for() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    for levels, steps, expected in ((1, 4, [4]), (2, (3, 5), [3, 5]), (3, [1, 2, 3], [1, 2, 3]), (2, 0, [0, 0])):
        result = register(fixed, moving, Rigid(), levels=levels, steps=steps, stop=None)
        assert result.steps.tolist() == expected
    with pytest.warns(UserWarning, match=r"5 levels were asked for but a fixed image of size \(20, 18\) gives 3"):
        short = register(fixed, moving, Rigid(), levels=5, steps=(9, 8, 3, 2, 1), stop=None)
    assert short.steps.tolist() == [3, 2, 1]


def test_coarse_levels_widen_the_reach() -> None:
    """A shift of a third of the image is too far for the finest level alone."""
    truth = Mapping({"translation": tensor([7.0, -4.0])}, scene(2).grid, Translation())
    fixed, moving = scene(2, truth), moving_scene(2, grow=14)
    result = register(fixed, moving, Translation(), levels=3, steps=40)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.05


@pytest.mark.parametrize("solver", [Descent(sgd(20.0, momentum=0.5)), Descent(adam(0.5), limit=0.1)], ids=str)
def test_other_solvers_find_the_map_too(solver: Any) -> None:
    fixed, moving, truth = known_pair(Translation(), 2)
    result = register(fixed, moving, Translation(), solver=solver, levels=2, steps=100)
    assert voxels_apart(result.mapping, truth, fixed.grid) < 0.05


def test_an_optimizer_of_torchopt_finds_the_map_too() -> None:
    import torchopt

    fixed, moving, truth = known_pair(Rigid(), 2)
    given = torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adam(0.1))
    for optimizer in (given, fnreg.optim.Torchopt("rmsprop", (("lr", 0.05),))):
        result = register(fixed, moving, Rigid(), optimizer=optimizer, levels=2, steps=80)
        assert voxels_apart(result.mapping, truth, fixed.grid) < 0.1


def test_homogeneous_matrices_can_be_optimised() -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    a = register(fixed, moving, Homogeneous(), **few_steps(NEWTON))
    b = register(fixed, moving, Affine(), **few_steps(NEWTON))
    assert voxels_apart(a.mapping, b.mapping, fixed.grid) < 1e-7
    assert voxels_apart(a.mapping, truth, fixed.grid) < 0.1


def test_a_seen_step_is_kept_under_a_stop() -> None:
    """The step after the last value is looked at too."""
    fixed, moving, _ = known_pair(Translation(), 2)
    result = register(fixed, moving, Translation(), levels=1, steps=1)
    assert float(result.mapping.params["translation"].abs().max()) > 0.1


# -- results -------------------------------------------------------------------------------------------------------


def test_a_result_tells_how_it_came_about() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    result = register(fixed, moving, Rigid(), objective=fnreg.mse + 0.1 * fnreg.ncc, levels=2, steps=(30, 20))
    assert isinstance(result, Registration)
    value, terms = evaluate(fixed, moving, result.mapping, objective=fnreg.mse + 0.1 * fnreg.ncc)
    assert_close(result.value, value, atol=1e-14, rtol=0)
    close(result.terms, terms, atol=1e-14)
    assert_close(result.value, result.terms["mse"] + 0.1 * result.terms["ncc"], atol=1e-14, rtol=0)
    assert [(t.stage, t.level, len(t.value)) for t in result.history] == [(0, 1, 30), (0, 0, 20)]
    for trace, steps in zip(result.history, result.steps, strict=True):
        assert int((~torch.isnan(trace.value)).sum()) == int(steps)
    lowest = result.history[-1].value.nan_to_num(nan=torch.inf).min()
    assert float(result.value) <= float(lowest) + 1e-14  # the best parameters seen
    assert result.fixed_grid.same_as(fixed.grid)
    assert result.moving_grid.same_as(moving.grid)
    assert "one pair" in repr(result)
    assert "Rigid()" in repr(result)
    fixed_batch, moving_batch = several_pairs()
    batch = register(stack(fixed_batch), stack(moving_batch), Rigid(), **few_steps(DESCENT, 3))
    assert "4 pairs" in repr(batch)
    assert batch.steps.shape == (4, 2)
    assert batch.value.shape == batch.status.shape == batch.ok.shape == (4,)
    assert batch.history[0].value.shape == (4, 3)


def both(warped: Tensor, displacement: Tensor) -> Tensor:
    """Of the images and of the map at once: by composition."""
    return warped.square().mean() + 0.01 * displacement.square().mean()


SUM = 0.5 * fnreg.mse + 0.1 * fnreg.ncc


@pytest.mark.parametrize(
    ("transform", "objective", "options"),
    [
        (Rigid(), SUM, {}),
        (Rigid(), SUM, {"solver": fnreg.GaussNewton()}),
        (fnreg.SVFFD(4), 0.2 * fnreg.bending + SUM + 0.01 * fnreg.bending, {}),
        (fnreg.SVFFD(4), 2 * fnreg.mse + 0.2 * fnreg.bending, {"symmetric": True}),
        (fnreg.SVFFD(4), 2 * fnreg.mse, {}),
        (Rigid(), 2 * fnreg.mse + 0.25 * fnreg.mse, {}),
        (Rigid(), fnreg.term(both) + 0.5 * fnreg.mse, {}),
    ],
)
def test_the_course_of_each_term(transform: Any, objective: Any, options: dict[str, Any]) -> None:
    """At every step the weighted terms make the value; also of pairs that end early."""
    fixed, moving = (stack(images) for images in several_pairs())
    given = {"objective": objective, "levels": 2, "steps": (25, 0), "stop": fnreg.Stop(relative=0.05, every=2)}
    result = register(fixed, moving, transform, **given, **options)
    weights = [float(part.weight) for part in as_objective(objective).terms]
    for trace in result.history:
        assert list(trace.terms) == list(result.terms) == list(as_objective(objective).names)
        total = sum(weight * value for weight, value in zip(weights, trace.terms.values(), strict=True))
        assert_close(total.to(trace.value.dtype), trace.value, atol=1e-12, rtol=0, equal_nan=True)
    assert result.history[1].terms["mse"].shape == (4, 0)
    alone = register(several_pairs()[0][1], several_pairs()[1][1], transform, **given, **options)
    for name, value in alone.history[0].terms.items():
        assert_close(value, result.history[0].terms[name][1], atol=1e-9, rtol=0, equal_nan=True)


def test_warping_and_mapping_are_those_of_the_mapping() -> None:
    fixed, moving = several_pairs()
    batch = register(stack(fixed), stack(moving), Rigid(), **few_steps(DESCENT, 3))
    points = probe(fixed[0].grid)
    for mode, padding in itertools.product(("linear", "nearest", "cubic"), ("zeros", "border")):
        seen = batch.warp(stack(moving), interpolation=mode, padding=padding)  # type: ignore[arg-type]
        for n in range(4):
            single = warp(moving[n], take(batch.mapping, n), fixed[n].grid, interpolation=mode, padding=padding)  # type: ignore[arg-type]
            assert_close(seen.data[n], single.data, atol=1e-12, rtol=0)
            assert take(seen.grid, n).same_as(fixed[n].grid)
    loop = torch.stack([take(batch.mapping, n).map_points(points) for n in range(4)])
    assert_close(batch.map_points(points), loop, atol=1e-12, rtol=0)
    subject = Subject(stack(moving), torch.ones(4, *moving[0].data.shape))
    assert equal_bits(batch.warp(subject).image, batch.warp(stack(moving)))


def test_the_inverse_maps_back_and_swaps_the_grids() -> None:
    fixed, moving = several_pairs()
    for result, points in (
        (register(fixed[0], moving[0], Rigid(), levels=2, steps=40), probe(fixed[0].grid)),
        (register(stack(fixed), stack(moving), [Affine(), Rigid()], **few_steps(DESCENT, 4)), probe(fixed[0].grid)),
    ):
        back = result.inverse()
        again = back.map_points(result.map_points(points))
        assert_close(again, points.expand(again.shape), atol=1e-9, rtol=0)
        assert equal_bits((back.fixed_grid, back.moving_grid), (result.moving_grid, result.fixed_grid))
        assert equal_bits(back.value, result.value)
    one = register(fixed[0], moving[0], Rigid(), levels=2, steps=40)
    seen = one.inverse().warp(fixed[0])
    assert seen.grid.same_as(moving[0].grid)
    inner = (slice(None), *(slice(5, -5),) * 2)
    assert_close(seen.data[inner], moving[0].data[inner], atol=0.03, rtol=0)


def test_progress_tells_the_course_of_a_batch() -> None:
    fixed, moving = several_pairs()
    told: list[Event] = []
    result = register(
        stack(fixed), stack(moving), [Rigid(), Affine()], levels=2, steps=25, stop=Stop(every=5), progress=told.append
    )
    assert all(isinstance(event, Event) for event in told)
    assert {(e.stages, e.levels, e.steps, e.pairs) for e in told} == {(2, 2, 25, 4)}
    order = [(event.stage, -event.level, event.step) for event in told]
    assert order == sorted(order)
    assert {(e.stage, e.level) for e in told} == {(0, 1), (0, 0), (1, 1), (1, 0)}
    for event in told:
        taken = result.steps[:, 2 * event.stage + 1 - event.level]
        assert event.active == int((taken > event.step).sum()) or event.step == 25
        assert 0 <= event.active <= 4


# -- a parameter that is a number ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": adam(0.3)},
        {"optimizer": chain(clip(1.0), sgd(0.5))},
        {"optimizer": normalized(0.2)},
        {"solver": GaussNewton()},
        {"solver": NewtonCG()},
        {"solver": LBFGS()},
    ],
    ids=["adam", "clip", "normalized", "gauss-newton", "newton-cg", "lbfgs"],
)
def test_a_parameter_of_rank_zero_is_as_good_as_one_of_a_single_entry(options: dict[str, Any]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Turn(Transform):
        rank: int

        def init(self, domain: Any) -> Any:
            return {"angle": torch.zeros((1,) * self.rank, dtype=torch.float64)}

        def retract(self, params: Any, step: Any, domain: Any) -> Any:
            return {"angle": params["angle"] + step["angle"]}

        @property
        def linear(self) -> bool:
            return True

        def matrix(self, params: Any, domain: Any) -> Tensor:
            turn = {"rotation": 0.1 * params["angle"].reshape(1), "translation": torch.zeros_like(domain.center)}
            return Rigid().matrix(turn, domain)

    try:
        fixed, moving = several_pairs()
        both = [register(stack(fixed), stack(moving), Turn(rank), **few_steps(options, 3)) for rank in (0, 1)]
        alone = [register(fixed[0], moving[0], Turn(rank), **few_steps(options, 3)) for rank in (0, 1)]
        for results in (both, alone):
            angle, expected = (result.mapping.params["angle"] for result in results)
            assert float(expected.abs().max()) > 1e-3
            assert torch.equal(angle.unsqueeze(-1), expected)
        assert_close(both[0].mapping.params["angle"][0], alone[0].mapping.params["angle"], atol=SAME, rtol=0)
    finally:
        del Transform.types["Turn"]
