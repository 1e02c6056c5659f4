"""Derivatives through the steps of a registration: unrolled, the last ones, recomputed; and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_scenes import SMOOTH, TIGHT, case, differences, direction, error, objective_of, pair
from scenes import known_pair, tensor, uniform
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    SVFFD,
    Affine,
    Checkpointed,
    Diffeomorphism,
    Displacement,
    GaussNewton,
    Grid,
    Held,
    Image,
    Implicit,
    IsotropicScaling,
    NewtonCG,
    NoOptimumError,
    Rigid,
    Sequential,
    Stage,
    Stop,
    Subject,
    Translation,
    Unrolled,
    adam,
    chain,
    clip,
    differentiable,
    evaluate,
    register,
    sgd,
)
from fnreg.optim import Torchopt
from fnreg.pytree import tree_leaves, tree_map

unrolled = differentiable(register, adjoint=Unrolled())
implicit = differentiable(register, adjoint=TIGHT)
SOME_STEPS: dict[str, Any] = {"levels": 2, "min_size": 6, "steps": 7, **SMOOTH}


# -- all steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "transform", "options"),
    [
        ("mse", "rigid", {"optimizer": sgd(10.0, momentum=0.5), "steps": 60}),
        ("lncc", "affine", {"optimizer": sgd(3.0, momentum=0.7), "steps": 160}),
        ("mi", "ffd", {"optimizer": sgd(20.0, momentum=0.8), "steps": 160}),
        ("mse", "svffd", {"optimizer": sgd(300.0, momentum=0.8), "steps": 160}),
    ],
)
def test_many_steps_have_the_derivative_of_the_optimum(measure: str, transform: str, options: dict[str, Any]) -> None:
    """Of a contraction about the optimum, by other mathematics than that of the implicit function."""
    fixed, moving, chosen, given = case(measure, transform)

    def of(data: Tensor, by: Any, more: dict[str, Any]) -> Tensor:
        given_all = {**given, **({"solver": None} if "optimizer" in more else {}), **more}
        return error(by(Image(data, fixed.grid), moving, chosen, **given_all))

    along = direction(fixed.data)
    found = (grad(lambda x: of(x, unrolled, options))(fixed.data) * along).sum()
    expected = (grad(lambda x: of(x, implicit, {}))(fixed.data) * along).sum()
    assert_close(found, expected, atol=0, rtol=1e-5)


def by(what: str, transform: Any = Rigid(), **options: Any) -> tuple[Callable[[Tensor, Any], Tensor], Tensor]:
    """The error after some steps by some function, as a function of one thing that goes into them, and its value."""
    fixed, moving = pair()
    options = {**SOME_STEPS, "optimizer": adam(0.3), **options}
    start = {"rotation": tensor([0.05]), "translation": tensor([0.3, -0.2])}

    def run(by: Any, f: Any = fixed, **more: Any) -> Tensor:
        return error(by(f, moving, transform, **{**options, **more}))

    choices: dict[str, tuple[Callable[[Tensor, Any], Tensor], Tensor]] = {
        "fixed": (lambda x, by: run(by, Image(x, fixed.grid)), fixed.data),
        "spacing": (lambda x, by: run(by, Image(fixed.data, spacing=x, center=fixed.grid.center)), fixed.grid.spacing),
        "mask": (lambda x, by: run(by, Subject(fixed, x)), 0.5 + uniform(1, *fixed.grid.shape, seed=2).abs()),
        "weight": (lambda x, by: run(by, objective=fnreg.mse + x * fnreg.ncc), tensor(0.1)),
        "initial": (lambda x, by: run(by, initial={**start, "translation": x}), start["translation"]),
        "rate": (lambda x, by: run(by, optimizer=adam(x)), tensor(0.3)),
        "rate of sgd": (lambda x, by: run(by, optimizer=chain(clip(1e3), sgd(x, momentum=0.5))), tensor(3.0)),
    }
    return choices[what]


def plainly(*given: Any, **options: Any) -> Any:
    """The same steps, all of them, without a history."""
    return register(*given, **options, stop=None)


EVERYTHING = ["fixed", "spacing", "mask", "weight", "initial", "rate", "rate of sgd"]


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Checkpointed(every=3)], ids=str)
@pytest.mark.parametrize("what", EVERYTHING)
def test_the_steps_are_differentiated_by_what_goes_into_them(what: str, adjoint: Any) -> None:
    function, point = by(what)
    solve = differentiable(register, adjoint=adjoint)
    found = grad(lambda x: function(x, solve))(point)
    along = direction(point)
    expected = differences(lambda x: function(x, plainly), point, along, 1e-6)
    assert abs(float(expected)) > 1e-6
    assert_close((found * along).sum(), expected, atol=0, rtol=2e-5)
    leaf = point.clone().requires_grad_()
    function(leaf, solve).backward()
    assert_close(leaf.grad, found, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("transform", [Diffeomorphism(), Displacement(), FFD(8), SVFFD(8, 2)], ids=str)
def test_every_transform_is_unrolled_and_recomputed(transform: Any) -> None:
    penalty = [] if isinstance(transform, Diffeomorphism) else [0.1 * fnreg.diffusion]
    options = {"objective": sum(penalty, fnreg.mse + 0.0 * fnreg.ncc), "steps": 5, "optimizer": adam(0.2, eps=1e-3)}
    function, point = by("fixed", transform, **options)
    found = grad(lambda x: function(x, unrolled))(point)
    along = direction(point)
    expected = differences(lambda x: function(x, plainly), point, along, 1e-6)
    assert_close((found * along).sum(), expected, atol=0, rtol=1e-4)
    solve = differentiable(register, adjoint=Checkpointed(every=2))
    assert_close(grad(lambda x: function(x, solve))(point), found, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled(last=3), Checkpointed()], ids=str)
def test_steps_batch(adjoint: Any) -> None:
    function, _ = by("weight")
    solve = differentiable(register, adjoint=adjoint)
    several = tensor([0.05, 0.1, 0.3])
    loop = torch.stack([grad(lambda x: function(x, solve))(w) for w in several])
    assert_close(vmap(grad(lambda x: function(x, solve)))(several), loop, atol=1e-10, rtol=1e-8)
    assert_close(jacrev(vmap(lambda x: function(x, solve)))(several).diagonal(), loop, atol=1e-10, rtol=1e-8)
    fixed, moving = pair()
    data = torch.stack([fixed.data, 1.1 * fixed.data]).requires_grad_()

    def of(values: Tensor) -> Tensor:
        return solve(Image(values, fixed.grid), moving, Rigid(), **SOME_STEPS).map_points(tensor([[1.0, 2.0]])).square()

    of(data).sum().backward()
    assert_close(data.grad, torch.stack([grad(lambda x: of(x).sum())(x.detach()) for x in data]), atol=1e-10, rtol=1e-8)


def test_steps_are_differentiated_twice() -> None:
    function, _ = by("weight", steps=3)
    point = tensor(0.1)
    expected = differences(grad(lambda x: function(x, unrolled)), point, tensor(1.0), 1e-6)
    assert_close(grad(grad(lambda x: function(x, unrolled)))(point), expected, atol=0, rtol=1e-4)
    solve = differentiable(register, adjoint=Checkpointed())
    assert_close(grad(grad(lambda x: function(x, solve)))(point), expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [Torchopt("rmsprop", (("lr", 0.1), ("eps", 1e-6))), Torchopt("adagrad")], ids=str)
def test_backward_goes_through_the_optimizers_of_torchopt(optimizer: Any) -> None:
    function, point = by("fixed", optimizer=optimizer, steps=4)
    leaf = point.clone().requires_grad_()
    function(leaf, unrolled).backward()
    along = direction(point)
    expected = differences(lambda x: function(x, plainly), point, along, 1e-6)
    assert_close((leaf.grad * along).sum(), expected, atol=0, rtol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_backward_goes_through_products_with_hessians(curvature: Any) -> None:
    """Also through those of the first step, whose parameters are constants."""
    solver = NewtonCG(curvature, iterations=3)
    function, point = by("fixed", Affine(), optimizer=None, solver=solver, levels=1, steps=2)
    leaf, along = point.clone().requires_grad_(), direction(point)
    function(leaf, unrolled).backward()
    expected = differences(lambda x: function(x, plainly), point, along, 1e-6)
    assert_close((leaf.grad * along).sum(), expected, atol=0, rtol=1e-4)  # type: ignore[operator]


def test_a_rate_is_learned_by_its_gradient() -> None:
    function, _ = by("rate", steps=4)
    rate, first = tensor(0.05), float(function(tensor(0.05), unrolled))
    for _ in range(5):
        slope = grad(lambda x: function(x, unrolled))(rate)
        rate = rate - 0.05 * slope.sign()
    assert float(function(rate, unrolled)) < first


# -- the last steps ----------------------------------------------------------------------------------------------------


def test_the_last_steps_are_a_registration_from_a_constant() -> None:
    fixed, moving = pair()
    options: dict[str, Any] = {**SOME_STEPS, "levels": 1, "optimizer": sgd(2.0)}

    def last(data: Tensor) -> Tensor:
        solve = differentiable(register, adjoint=Unrolled(last=3))
        return error(solve(Image(data, fixed.grid), moving, Affine(), **{**options, "steps": 10}))

    begun = register(fixed, moving, Affine(), **{**options, "steps": 7}, stop=None).mapping.params

    def again(data: Tensor) -> Tensor:
        return error(unrolled(Image(data, fixed.grid), moving, Affine(), initial=begun, **{**options, "steps": 3}))

    assert_close(grad(last)(fixed.data), grad(again)(fixed.data), atol=1e-12, rtol=1e-8)
    leaf = fixed.data.clone().requires_grad_()
    last(leaf).backward()
    assert_close(leaf.grad, grad(again)(fixed.data), atol=1e-12, rtol=1e-8)


def test_the_last_steps_forget_less_the_more_they_are() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")
    more: dict[str, Any] = {"solver": None, "optimizer": sgd(30.0), "steps": 60}

    def of(data: Tensor, by: Any) -> Tensor:
        given = options if by is implicit else {**options, **more}
        return error(by(Image(data, fixed.grid), moving, chosen, **given))

    expected = grad(lambda x: of(x, implicit))(fixed.data)
    misses = []
    for last in (2, 10, 50):
        solve = differentiable(register, adjoint=Unrolled(last=last))
        misses.append(float((grad(lambda x, s=solve: of(x, s))(fixed.data) - expected).norm() / expected.norm()))
    assert misses[0] > 3 * misses[1] > 9 * misses[2]
    assert misses[2] < 1e-4


def test_the_last_steps_with_all_that_a_registration_can_have() -> None:
    """Stages and levels before them are constants, the rate of the last ones is not."""
    fixed, moving = pair()
    stages = [Rigid(), Stage(FFD(8), objective=fnreg.mse + 0.1 * fnreg.diffusion)]

    def of(rate: Tensor, data: Tensor, by: Any) -> Tensor:
        options = {**SOME_STEPS, "optimizer": adam(rate, eps=1e-3)}
        return error(by(Image(data, fixed.grid), moving, stages, **options))

    solve = differentiable(register, adjoint=Unrolled(last=4))
    value = of(tensor(0.2), fixed.data, solve)
    assert_close(value, of(tensor(0.2), fixed.data, plainly), atol=1e-12, rtol=0)
    by_rate, by_data = grad(lambda r, d: of(r, d, solve), argnums=(0, 1))(tensor(0.2), fixed.data)
    assert float(by_rate.abs()) > 0
    assert float(by_data.abs().max()) > 0
    full = grad(lambda r: of(r, fixed.data, unrolled))(tensor(0.2))
    assert abs(float(by_rate - full)) > 1e-6


# -- memory ------------------------------------------------------------------------------------------------------------


def recorded(adjoint: Any, steps: int) -> int:
    """How many operations autograd has recorded for backward."""
    fixed, moving = pair()
    leaf = fixed.data.clone().requires_grad_()
    options = {**SMOOTH, "levels": 1, "steps": steps, "optimizer": adam(0.1)}
    result = differentiable(register, adjoint=adjoint)(Image(leaf, fixed.grid), moving, Rigid(), **options)
    waiting, seen = [result.mapping.params["rotation"].grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return len(seen)


def test_what_is_recorded_by_the_number_of_steps() -> None:
    """Benchmarks measure the memory that goes with it."""
    loose, last, pieces = Implicit(check=None), Unrolled(last=2), Checkpointed()
    assert recorded(loose, 4) == recorded(loose, 36)
    assert recorded(last, 4) == recorded(last, 36)
    assert recorded(Unrolled(), 36) > 8 * recorded(Unrolled(), 4)
    assert recorded(pieces, 36) - recorded(pieces, 4) == 4  # 6 pieces and 2
    assert recorded(pieces, 36) < 0.1 * recorded(Unrolled(), 36)


# -- register itself ---------------------------------------------------------------------------------------------------


def test_register_says_that_it_detaches() -> None:
    fixed, moving = pair()
    leaf = fixed.data.clone().requires_grad_()
    weight = tensor(0.1).requires_grad_()
    options = {"levels": 1, "steps": 2}
    with pytest.warns(UserWarning, match=r"^fixed and objective of register asks? for a gradient.*differentiable"):
        result = register(Image(leaf, fixed.grid), moving, Rigid(), objective=fnreg.mse + weight * fnreg.ncc, **options)
    assert not any(leaf.requires_grad for leaf in tree_leaves(result.mapping.params))
    with torch.no_grad():
        register(Image(leaf, fixed.grid), moving, Rigid(), **options)  # nobody asks: no warning


@pytest.mark.parametrize("padding", ["border", None, "zeros"])
def test_cubic_interpolation_is_that_of_warp(padding: Any) -> None:
    fixed, moving, truth = known_pair(Affine(), 2)
    value, _ = evaluate(fixed, moving, truth, interpolation="cubic", padding=padding)
    seen = fnreg.warp(moving, truth, interpolation="cubic", padding="border" if padding is None else padding)
    coords = moving.grid.world_to_index(truth.map_points(fixed.grid.points()))
    inside = ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1).reshape(1, *fixed.grid.shape)
    weights = inside.double() if padding is None else torch.ones_like(fixed.data)
    expected = (weights * (seen.data - fixed.data).square()).sum() / weights.sum()
    assert_close(value, expected, atol=1e-14, rtol=1e-12)
    linear, _ = evaluate(fixed, moving, truth, padding=padding)
    assert padding is not None or float(value) < 0.8 * float(linear)  # a smooth scene: nearer to the truth


@pytest.mark.parametrize("options", [{"solver": GaussNewton()}, {"optimizer": adam(0.3)}], ids=["gauss-newton", "adam"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_cubic_interpolation_registers(dimension: int, options: dict[str, Any]) -> None:
    fixed, moving, truth = known_pair(Rigid(), dimension)
    found = register(fixed, moving, Rigid(), interpolation="cubic", levels=2, min_size=6, **options)
    points = fixed.grid.points()
    assert float((found.map_points(points) - truth.map_points(points)).norm(dim=1).max()) < 0.05


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_registration_that_has_not_converged() -> None:
    fixed, moving = pair()
    options: dict[str, Any] = {"levels": 1, "steps": 3, "optimizer": adam(0.01), **SMOOTH}
    solve = differentiable(register)

    def of(data: Tensor) -> Tensor:
        return solve(Image(data, fixed.grid), moving, Rigid(), **options).map_points(tensor([[1.0, 2.0]])).sum()

    told = r"Rigid\(\) has not converged.*norm is [\d.e-]+ and a Newton step would still move a parameter by [\d.]+ "
    with pytest.raises(NoOptimumError, match=told + r"voxels, more than check=0\.1\. Take more steps.*Unrolled"):
        grad(of)(fixed.data)
    leaf = fixed.data.clone().requires_grad_()
    with pytest.raises(NoOptimumError, match="has not converged"):
        of(leaf)
    assert torch.isfinite(of(fixed.data))  # nobody asks for a derivative


def test_a_pair_of_a_batch_that_has_not_converged_is_nan_alone() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")
    start = tree_map(lambda leaf: torch.stack([leaf, leaf + 0.8]), options["initial"])
    data = torch.stack([fixed.data, fixed.data])
    solve = differentiable(register, adjoint=TIGHT)

    def of(values: Tensor, begun: Any, steps: int) -> Tensor:
        given = {**options, "initial": begun, "steps": steps}
        result = solve(Image(values, fixed.grid), moving, chosen, **given)
        return result.map_points(tensor([[1.0, 2.0]])).sum()

    good = grad(of)(fixed.data, options["initial"], 1)
    with pytest.warns(UserWarning, match=r"1 of 2 derivatives are NaN; pair 1: the registration by Rigid"):
        found = grad(lambda x: of(x, start, 1).sum())(data)
    assert_close(found[0], good, atol=1e-10, rtol=1e-8)
    assert bool(found[1].isnan().all())
    with pytest.warns(UserWarning, match="1 of 2 derivatives are NaN"):
        mapped = vmap(grad(lambda x, p: of(x, p, 1)))(data, start)
    assert_close(mapped[0], good, atol=1e-10, rtol=1e-8)
    assert bool(mapped[1].isnan().all())


def test_an_objective_without_a_minimum() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")
    options = {**options, "objective": -1.0 * fnreg.mse, "steps": 1}
    with pytest.raises(NoOptimumError, match=r"curvature along a step is -[\d.e-]+ per squared voxel, not positive"):
        grad(lambda x: error(implicit(Image(x, fixed.grid), moving, chosen, **options)))(fixed.data)
    unchecked = differentiable(register, adjoint=Implicit(check=None))
    with pytest.raises(NoOptimumError, match=r"no minimum where the registration ended.*ridge"):
        grad(lambda x: error(unchecked(Image(x, fixed.grid), moving, chosen, **options)))(fixed.data)


def test_linear_systems_that_are_not_solved() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")
    short = differentiable(register, adjoint=Implicit(tolerance=1e-12, iterations=3, check=None))
    told = r"relative residual of [\d.e-]+ after 3 products with the Hessian, where tolerance is 1e-12: give more"
    with pytest.raises(NoOptimumError, match=told):
        grad(lambda x: error(short(Image(x, fixed.grid), moving, chosen, **options)))(fixed.data)


def test_a_ridge_makes_a_derivative_of_what_has_none() -> None:
    """Coefficients that no voxel sees have no curvature; with a ridge their derivative is nothing."""
    fixed, moving, _, options = case("mse", "ffd")
    options = {**options, "objective": fnreg.mse, "initial": tree_map(torch.zeros_like, options["initial"]), "steps": 0}

    def of(data: Tensor, adjoint: Any) -> Tensor:
        solve = differentiable(register, adjoint=adjoint)
        return error(solve(Image(data, fixed.grid), moving, FFD(8), **options))

    with pytest.raises(NoOptimumError):
        grad(of)(fixed.data, Implicit(check=None))
    found = [grad(of)(fixed.data, Implicit(ridge=ridge, check=None)) for ridge in (0.1, 1.0)]
    assert bool(torch.isfinite(found[0]).all())
    assert float(found[1].norm()) < float(found[0].norm())


@pytest.mark.parametrize("transform", [Diffeomorphism(), fnreg.Sequential((Diffeomorphism(), Affine()))], ids=str)
def test_what_descends_no_objective_has_no_optimum(transform: Any) -> None:
    fixed, moving = pair()
    with pytest.raises(ValueError, match=r"Diffeomorphism\(.*descends no single objective.*use Unrolled\(\)"):
        differentiable(register)(fixed, moving, transform)


def test_options_without_a_derivative_are_named() -> None:
    fixed, moving = pair()
    for by in (register, differentiable(register), unrolled):
        with pytest.raises(
            ValueError, match="interpolation is 'nearest', which has no derivative: choose linear or cub"
        ):
            by(fixed, moving, Rigid(), interpolation="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown interpolation 'cubical': choose linear or cubic"):
        register(fixed, moving, Rigid(), interpolation="cubical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is None: expected a whole number"):
        differentiable(register)(fixed, moving, Rigid(), objective=fnreg.mi(samples=50, seed=None), levels=1)

    def drawn(warped: Tensor, fixed: Tensor) -> Tensor:
        return ((warped - fixed) * torch.rand(fixed.shape, dtype=fixed.dtype)).square().mean()

    options: dict[str, Any] = {"objective": fnreg.term(drawn), "levels": 1, "steps": 2}
    with pytest.raises(ValueError, match=r"differs between two calls at the same parameters.*from a seed"):
        grad(lambda x: implicit(Image(x, fixed.grid), moving, Rigid(), **options).value)(fixed.data)


def test_batch_axes_that_do_not_agree() -> None:
    fixed, moving = pair()
    data, other = fixed.data.expand(3, *fixed.data.shape), moving.data.expand(2, *moving.data.shape)
    for by in (differentiable(register), unrolled):
        with pytest.raises(ValueError, match=r"leading batch axes differ \(image\.data: 3|batch axes differ"):
            by(Image(data, fixed.grid), Image(other, moving.grid), Rigid())
        with pytest.raises(ValueError, match="batch axes differ"):
            by(Image(data, fixed.grid), moving, Rigid(), objective=torch.ones(2) * fnreg.mse)


@pytest.mark.parametrize("adjoint", ["implicit", Implicit, 3, object()], ids=["name", "class", "number", "object"])
def test_an_adjoint_that_is_none(adjoint: Any) -> None:
    with pytest.raises(TypeError, match=r"expected Implicit\(\), Unrolled\(\) or Checkpointed\(\)"):
        differentiable(register, adjoint=adjoint)


def test_a_function_that_is_not_register() -> None:
    with pytest.raises(TypeError, match=r"differentiable takes fnreg\.register"):
        differentiable(evaluate)  # type: ignore[arg-type]
    fixed, moving = pair()
    partial = functools.partial(register, levels=1, solver=GaussNewton())
    solve = differentiable(partial)
    assert_close(solve(fixed, moving, Rigid()).value, partial(fixed, moving, Rigid()).value, atol=1e-12, rtol=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        solve(fixed, moving, Rigid(), step=3)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Implicit(ridge=-1.0), "expected numbers: ridge >= 0"),
        (lambda: Implicit(tolerance=0.0), r"tolerance in \(0, 1\)"),
        (lambda: Implicit(iterations=0), "iterations >= 1"),
        (lambda: Implicit(check=0.0), "check > 0 or None"),
        (lambda: Unrolled(last=0), "last is 0: expected a positive number of steps"),
        (lambda: Checkpointed(every=-1), "every is -1: expected a positive number of steps"),
    ],
)
def test_options_of_adjoints(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_unrolled_takes_all_steps() -> None:
    fixed, moving = pair()
    with pytest.raises(
        ValueError, match=r"Unrolled\(last=None\) differentiates a fixed number of steps: leave stop out"
    ):
        unrolled(fixed, moving, Rigid(), stop=Stop())
    with pytest.raises(ValueError, match="fixed number of steps"):
        unrolled(fixed, moving, [Stage(Rigid(), stop=Stop())])
    result = unrolled(fixed, moving, Rigid(), levels=1, steps=130)
    assert int(result.steps[0]) == 130


def test_what_the_optimum_does_not_depend_on_is_refused() -> None:
    fixed, moving, chosen, _ = case("mse", "rigid")
    given = {"levels": 1, "steps": 2, **SMOOTH}
    with pytest.raises(ValueError, match=r"lr is inside vmap or asks for a gradient.*use Unrolled\(\)"):
        grad(lambda lr: implicit(fixed, moving, chosen, optimizer=adam(lr), **given).value)(tensor(0.1))
    torchopt = Torchopt("rmsprop", (("lr", tensor(0.1).requires_grad_()),))
    with pytest.raises(ValueError, match=r"lr is inside vmap or asks for a gradient"):
        implicit(fixed, moving, chosen, optimizer=torchopt, **given)


HELD = Held(Rigid(), ("rotation",))


@pytest.mark.parametrize("source", ["initial", "starts", "start='center'", "an earlier stage"])
def test_what_is_held_is_no_part_of_the_optimum(source: str) -> None:
    """A derivative by what it comes from would be lost in silence; what comes from nowhere is no hindrance."""
    fixed, moving, _, options = case("mse", "rigid")
    begun, given = options["initial"], {"levels": 1, "steps": 2, "objective": fnreg.mse, **SMOOTH}

    def of(x: Tensor) -> Tensor:
        if source == "an earlier stage":
            return implicit(Image(x + fixed.data, fixed.grid), moving, [Rigid(), HELD], **given).value
        if source == "start='center'":
            held = Held(Rigid(), ("translation",))
            return implicit(Image(x + fixed.data, fixed.grid), moving, held, start="center", **given).value
        angle = {**begun, "rotation": begun["rotation"] + x}
        angle = tree_map(lambda leaf: leaf.unsqueeze(0), angle) if source == "starts" else angle
        return implicit(fixed, moving, HELD, **{source: angle}, **given).value

    with pytest.raises(ValueError, match=rf"Held.* holds parameters from {source}, by which.*use Unrolled\(\)"):
        grad(of)(tensor([0.0]) if source in ("initial", "starts") else tensor(0.0))
    solve = differentiable(register, adjoint=Implicit(check=None))

    def free(data: Tensor, **more: Any) -> Tensor:
        return error(solve(Image(data, fixed.grid), moving, HELD, **more, **given))

    for more in ({}, {"initial": begun}):
        assert bool(torch.isfinite(grad(functools.partial(free, **more))(fixed.data)).all())


def test_gradients_that_are_changed_have_no_optimum() -> None:
    @dataclasses.dataclass(frozen=True)
    class Slow(Translation):
        def precondition(self, gradient: Any, domain: Any) -> Any:
            return tree_map(lambda leaf: leaf / 2, gradient)

    fixed, moving = pair()
    for options in ({"adjoint": implicit}, {"solver": NewtonCG()}):
        solve = options.pop("adjoint", register)
        with pytest.raises(ValueError, match=r"descends no"):
            solve(fixed, moving, Slow(), levels=1, steps=2, **options)


@pytest.mark.parametrize("adjoint", [Implicit(check=None), Unrolled(), Checkpointed()], ids=str)
@pytest.mark.parametrize("lost", ["nan", "constant", "apart"])
def test_a_pair_that_failed_leaves_no_trace_in_what_a_batch_shares(adjoint: Any, lost: str) -> None:
    fixed, moving = pair()
    data, centers = torch.stack([fixed.data, fixed.data]), torch.stack([fixed.grid.center, fixed.grid.center])
    if lost == "apart":
        centers[1] += 1e4
    else:
        data[1, 0, 3 if lost == "nan" else slice(None)] = torch.nan if lost == "nan" else 0.5
    solve = differentiable(register, adjoint=adjoint)
    given: dict[str, Any] = (
        {"levels": 1, "steps": 12, "solver": GaussNewton()}
        if isinstance(adjoint, Implicit)
        else {"levels": 1, "steps": 4}
    )

    def of(weight: Tensor, both: bool) -> Tensor:
        places = Grid(fixed.grid.size, spacing=fixed.grid.spacing, center=centers)
        several = Image(data, places) if both else fixed
        result = solve(several, moving, Affine(), objective=weight * fnreg.mse, **given)
        return torch.where(result.ok, result.value, 0).sum()

    found, alone = (grad(of)(tensor(0.7), both) for both in (True, False))
    assert_close(found, alone, atol=1e-10, rtol=1e-6)
    leaf = tensor(0.7).requires_grad_()
    of(leaf, True).backward()
    assert_close(leaf.grad, found, atol=1e-12, rtol=1e-9)


def test_start_parameters_of_a_sequence_and_wrong_ones() -> None:
    fixed, moving = pair()
    chosen = Sequential((Translation(), IsotropicScaling()))
    begun = chosen.init(fixed.grid)
    solve = differentiable(register, adjoint=Implicit(check=None))
    given: dict[str, Any] = {"levels": 1, "steps": 3}
    for name, value in (("initial", begun), ("starts", tree_map(lambda leaf: leaf.unsqueeze(0), begun))):
        found, plain = (by(fixed, moving, chosen, **{name: value}, **given) for by in (solve, register))
        assert_close(found.value, plain.value)
    for wrong in ({}, {"translation": torch.zeros(3, 5)}, {"translation": [0.0, 0.0]}):
        with pytest.raises(ValueError, match=r"starts"):
            solve(fixed, moving, Translation(), starts=wrong, **given)
    several = uniform(2, 3, 2, seed=1)
    loop = torch.stack([solve(fixed, moving, Translation(), starts={"translation": s}, **given).value for s in several])
    batch = vmap(lambda s: solve(fixed, moving, Translation(), starts={"translation": s}, **given).value)(several)
    assert_close(batch, loop, atol=1e-10, rtol=0)


def test_linear_systems_of_a_batch_that_are_not_solved_are_told() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")
    data = torch.stack([fixed.data, 1.01 * fixed.data]).requires_grad_()
    few = differentiable(register, adjoint=Implicit(check=None, iterations=2, tolerance=1e-12))
    value = error(few(Image(data, fixed.grid), moving, chosen, **options))
    with pytest.warns(UserWarning, match=r"2 of 2 derivatives are NaN: conjugate gradients left a relative residual"):
        value.sum().backward()
    assert bool(torch.isnan(data.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("made", ["bound method", "callable object", "within a function"])
@pytest.mark.parametrize("adjoint", [Implicit(), Checkpointed()], ids=str)
def test_tensors_are_found_wherever_a_term_hides_them(made: str, adjoint: Any) -> None:
    fixed, moving = pair()

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(tensor(2.0))

        def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
            return (self.scale * (warped - fixed)).square().mean()

    class Plain:
        __name__ = "plain"
        scale = tensor(2.0).requires_grad_()

        def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
            return (self.scale * (warped - fixed)).square().mean()

    own = Own()
    function = {
        "bound method": own.forward,
        "callable object": Plain(),
        "within a function": lambda warped, fixed: own(warped, fixed),
    }[made]
    solve = differentiable(register, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"holds a tensor that asks for a gradient or is inside vmap"):
        solve(fixed, moving, Rigid(), objective=fnreg.term(function), levels=1, steps=2)
    with pytest.raises(ValueError, match=r"holds a tensor that asks for a gradient or is inside vmap"):
        vmap(
            lambda w: (
                solve(
                    fixed,
                    moving,
                    Rigid(),
                    levels=1,
                    steps=2,
                    objective=fnreg.term(lambda warped, fixed: (w * (warped - fixed)).square().mean()),
                ).value
            )
        )(tensor([1.0, 2.0]))


def test_register_detaches_whatever_asks() -> None:
    fixed, moving = pair()
    network = torch.nn.Conv2d(1, 2, 3).double()
    starts = {"translation": torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)}
    given: dict[str, Any] = {"levels": 1, "steps": 2}
    with pytest.warns(UserWarning, match="optimizer of register asks for a gradient"):
        one = register(fixed, moving, Translation(), optimizer=adam(tensor(0.1).requires_grad_()), **given)
    with pytest.warns(UserWarning, match="starts of register asks for a gradient"):
        two = register(fixed, moving, Translation(), starts=starts, **given)
    three = register(fixed, moving, Translation(), objective=fnreg.feature(network), **given)
    for found in (one, two, three):
        assert not any(leaf.requires_grad for leaf in tree_leaves(found))


@pytest.mark.parametrize("optimizer", [fnreg.normalized(0.3), fnreg.chain(fnreg.chain(fnreg.clip(1.0), adam(0.3)))])
def test_every_optimizer_of_torch_alone_is_recomputed(optimizer: Any) -> None:
    function, point = by("fixed", FFD(8), steps=4, optimizer=optimizer)
    found, recorded = (
        grad(lambda x, s=solve: function(x, s))(point)
        for solve in (differentiable(register, adjoint=Checkpointed()), unrolled)
    )
    assert float(recorded.abs().max()) > 0
    assert_close(found, recorded, atol=1e-12, rtol=1e-8)


def test_recomputation_goes_in_reverse_and_with_its_own_optimizers() -> None:
    fixed, moving = pair()
    solve = differentiable(register, adjoint=Checkpointed())
    with pytest.raises(NotImplementedError, match=r"Checkpointed\(\) goes in reverse only: take Unrolled\(\)"):
        jacfwd(lambda x: solve(fixed, moving, Rigid(), objective=x * fnreg.mse, levels=1, steps=2).value)(tensor(1.0))
    with pytest.raises(ValueError, match=r"Checkpointed.* takes fnreg's own optimizers.*use Unrolled\(\)"):
        solve(fixed, moving, Rigid(), optimizer=Torchopt("rmsprop", (("lr", 0.1),)), levels=1, steps=2)


@pytest.mark.parametrize("adjoint", [Implicit(), Checkpointed()], ids=str)
def test_tensors_within_a_term_that_ask_for_a_gradient(adjoint: Any) -> None:
    fixed, moving = pair()
    network = torch.nn.Conv2d(1, 2, 3).double()
    solve = differentiable(register, adjoint=adjoint)
    params = dict(network.named_parameters())
    for made in (network, lambda image: functional_call(network, params, image)):
        with pytest.raises(
            ValueError,
            match=r"feature holds a tensor that asks for a gradient or is inside vmap.*Image\(network\(fixed\)\)",
        ):
            solve(fixed, moving, Rigid(), objective=fnreg.feature(made))
    still = {name: value.detach() for name, value in params.items()}
    feature = fnreg.feature(lambda image: functional_call(network, still, image))
    solve(fixed, moving, Rigid(), objective=feature, levels=1, steps=1)

    def loss(weight: Tensor) -> Tensor:
        feature = fnreg.feature(lambda image: functional_call(network, still | {"weight": weight}, image))
        return error(unrolled(fixed, moving, Rigid(), objective=feature, levels=1, steps=3, **SMOOTH))

    along = direction(still["weight"])
    expected = differences(loss, still["weight"], along, 1e-6)
    assert_close((grad(loss)(still["weight"]) * along).sum(), expected, atol=0, rtol=1e-4)


def test_an_objective_of_labels_and_points_is_unrolled() -> None:
    fixed, moving = pair()
    labels = (fixed.data > 0.3).long(), (moving.data > 0.3).long()
    points = tensor([[2.0, 1.0], [-3.0, -2.0], [0.5, -1.0]])

    def of(shift: Tensor, by: Any) -> Tensor:
        sides = (
            Subject(fixed, labels=labels[0], points=points),
            Subject(moving, labels=labels[1], points=points + shift),
        )
        objective = fnreg.dice + 0.01 * fnreg.landmarks
        return error(by(*sides, Translation(), objective=objective, levels=1, steps=6, padding="border"))

    point = tensor([0.4, -0.3])
    expected = differences(lambda x: of(x, plainly), point, direction(point), 1e-6)
    found = grad(lambda x: of(x, unrolled))(point) @ direction(point)
    assert_close(found, expected, atol=0, rtol=1e-4)


def test_penalties_are_weighed_as_they_were_meant() -> None:
    """What the scenes say is minimised is: the gradient by the weight of a term at rest is its share of the value."""
    fixed, moving, chosen, options = case("mse", "ffd")

    def of(weight: Tensor, by: Any) -> Tensor:
        objective = objective_of("mse", "ffd") + weight * fnreg.curvature
        return by(fixed, moving, chosen, **{**options, "objective": objective}).value

    zero = tensor(0.0)
    result = implicit(
        fixed, moving, chosen, **{**options, "objective": objective_of("mse", "ffd") + fnreg.curvature * zero}
    )
    assert_close(grad(lambda x: of(x, implicit))(zero), result.terms["curvature"], atol=0, rtol=1e-8)
