"""Derivatives: of the energy by the step, as solvers see it, and through whole registrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenes import (
    EVERY,
    EVERY_ID,
    close,
    known_pair,
    moving_scene,
    random_mapping,
    random_params,
    scene,
    tensor,
    uniform,
)
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    Affine,
    GaussNewton,
    Image,
    Mapping,
    Rigid,
    Sequential,
    Similarity,
    Subject,
    Transform,
    Translation,
    adam,
    chain,
    clip,
    evaluate,
    register,
    sgd,
)
from fnreg.inputs import prepare
from fnreg.losses.objective import objective as as_objective
from fnreg.problem import Level
from fnreg.pytree import tree_flatten, tree_map, tree_unflatten

# torch's forward mode compiles its own decompositions with torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

PURE: dict[str, Any] = {"levels": 2, "steps": 3, "stop": None, "optimizer": adam(0.3, pure=True)}
NEWTON: dict[str, Any] = {"levels": 2, "steps": 3, "stop": None, "solver": GaussNewton()}
SGD: dict[str, Any] = {**PURE, "optimizer": chain(clip(1.0), sgd(20.0, momentum=0.5, pure=True))}


def numeric(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, size: float = 1e-6) -> Tensor:
    """The derivative along a direction, by central differences."""
    return (function(point + size * direction) - function(point - size * direction)) / (2 * size)


# -- of the energy by the step -------------------------------------------------------------------------------------


def level_of(fixed: Any, moving: Any, transform: Transform, objective: Any, padding: Any = None) -> Level:
    whole = prepare(fixed, moving, None, levels=1, min_size=4)
    return whole.level(0, transform, as_objective(objective), 1, padding)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_flatten(tree)[0]])


def stepped(transform: Transform, params: Any, entries: Tensor, grid: Any) -> Any:
    leaves, spec = tree_flatten(transform.zero_step(grid))
    parts = entries.split([leaf.numel() for leaf in leaves])
    step = tree_unflatten([p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)], spec)
    return transform.retract(params, step, grid)


@pytest.mark.parametrize(("transform", "dimension"), EVERY, ids=EVERY_ID)
def test_the_gradient_that_solvers_see_is_that_of_the_value(transform: Transform, dimension: int) -> None:
    """Of s -> value(retract(params, s)) at s = 0, by finite differences of evaluate."""
    fixed, moving, _ = known_pair(Affine(), dimension)
    params = random_params(transform, fixed.grid, 2, 0.5)
    objective = fnreg.mse + 0.3 * fnreg.ncc
    level = level_of(fixed, moving, transform, objective, "border")
    gradient, value, _ = level.gradient(tree_map(lambda leaf: leaf.unsqueeze(0), params))

    def energy(entries: Tensor) -> Tensor:
        mapping = Mapping(stepped(transform, params, entries, fixed.grid), fixed.grid, transform)
        return evaluate(fixed, moving, mapping, objective=objective, padding="border")[0]

    found = flat(gradient)
    zero = torch.zeros_like(found)
    assert_close(value[0], energy(zero), atol=1e-14, rtol=0)
    expected = torch.stack([numeric(energy, zero, unit) for unit in torch.eye(len(zero), dtype=torch.float64)])
    assert_close(found, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("objective", [fnreg.mse, fnreg.ncc, 2 * fnreg.mse + 0.3 * fnreg.ncc], ids=str)
@pytest.mark.parametrize("transform", [Rigid(), Affine(), Sequential((Rigid(), Similarity()))], ids=str)
@pytest.mark.parametrize("dimension", [2, 3])
def test_normal_equations_are_those_of_the_residuals(
    dimension: int, transform: Transform, objective: Any, masked: bool
) -> None:
    """|r|^2 is the value, J^T r half its gradient, and J^T J what autograd makes of the residuals."""
    fixed, moving, _ = known_pair(Affine(), dimension)
    given: Any = fixed
    if masked:  # weights of all sizes, zero among them
        given = Subject(fixed, uniform(1, *fixed.grid.shape, seed=4).clamp(min=0))
    params = random_params(transform, fixed.grid, 2, 0.3)
    level = level_of(given, moving, transform, objective)
    batched = tree_map(lambda leaf: leaf.unsqueeze(0), params)
    value, slope, normal, terms = level.normal_equations(batched)
    gradient, energy, others = level.gradient(batched)
    close((value, terms), (energy, others), atol=1e-13)
    assert_close(slope[0], flat(gradient) / 2, atol=1e-12, rtol=1e-10)

    def residuals(entries: Tensor) -> Tensor:
        mapping = Mapping(stepped(transform, params, entries, fixed.grid), fixed.grid, transform)
        seen = fnreg.warp(moving, mapping, padding="border").data
        coords = moving.grid.world_to_index(mapping.map_points(fixed.grid.points()))
        inside = ((coords >= -0.5) & (coords <= tensor(moving.grid.size) - 0.5)).all(1)
        weights = inside.double().reshape(1, *fixed.grid.shape) * (given.mask if masked else 1)
        found = {"warped": seen, "fixed": fixed.data, "weights": weights}
        return as_objective(objective).residuals(found)

    zero = torch.zeros_like(slope[0])
    jacobian = torch.stack([numeric(residuals, zero, unit) for unit in torch.eye(len(zero), dtype=torch.float64)], 1)
    assert_close(normal[0], jacobian.mT @ jacobian, atol=1e-8, rtol=1e-5)
    assert_close(slope[0], jacobian.mT @ residuals(zero), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_at_the_identity_the_derivative_is_the_symmetric_one(dimension: int) -> None:
    """Every sample lies on a knot of linear interpolation.  The mean of both sides telescopes over the image."""
    image = Image(uniform(1, *(7, 6, 5)[:dimension], seed=1))
    start = {"translation": torch.zeros(1, dimension, dtype=torch.float64)}
    gradient, value, _ = level_of(image, image, Translation(), fnreg.mse).gradient(start)
    assert float(value) < 1e-25
    assert float(gradient["translation"].abs().max()) < 1e-12
    brighter = Image(image.data + 1, image.grid)
    gradient, *_ = level_of(brighter, image, Translation(), fnreg.mse, "border").gradient(start)
    ends = [image.data.movedim(-1 - k, -1)[..., [-1, 0]].sum(tuple(range(dimension))) for k in range(dimension)]
    expected = torch.stack([-2 * (last - first) / image.data.numel() for last, first in ends])
    assert float(expected.abs().max()) > 1e-3
    assert_close(gradient["translation"][0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("transform", [Rigid(), Affine()], ids=str)
def test_evaluate_is_differentiable_by_the_parameters(transform: Transform) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    params = random_params(transform, fixed.grid, 2, 0.5)
    leaves, spec = tree_flatten(params)
    sizes = [leaf.numel() for leaf in leaves]

    def energy(entries: Tensor) -> Tensor:
        parts = [p.reshape(leaf.shape) for p, leaf in zip(entries.split(sizes), leaves, strict=True)]
        mapping = Mapping(tree_unflatten(parts, spec), fixed.grid, transform)
        return evaluate(fixed, moving, mapping, objective=fnreg.mse + 0.1 * fnreg.ncc)[0]

    point = flat(params)
    eye = torch.eye(len(point), dtype=torch.float64)
    expected = torch.stack([numeric(energy, point, unit) for unit in eye])
    assert_close(grad(energy)(point), expected, atol=1e-8, rtol=1e-6)
    assert_close(jacfwd(energy)(point), grad(energy)(point), atol=1e-12, rtol=0)
    expected = torch.stack([numeric(grad(energy), point, unit) for unit in eye])
    assert_close(hessian(energy)(point), expected, atol=1e-6, rtol=1e-5)
    assert_close(jacrev(jacrev(energy))(point), expected, atol=1e-6, rtol=1e-5)
    assert_close(jacfwd(jacfwd(energy))(point), expected, atol=1e-6, rtol=1e-5)
    assert_close(jacrev(jacfwd(energy))(point), expected, atol=1e-6, rtol=1e-5)
    several = point + 0.01 * uniform(3, len(point), seed=2)
    assert_close(vmap(grad(energy))(several), torch.stack([grad(energy)(p) for p in several]), atol=1e-13, rtol=0)


# -- through a registration ----------------------------------------------------------------------------------------


def landmarks(result: Any) -> Tensor:
    points = tensor([[1.0, 2.0], [-4.0, 0.5], [6.0, -5.0]])
    return (result.map_points(points) - 0.5).square().mean()


def by(what: str, options: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The error of landmarks after a registration, as a function of one thing that goes into it, and its value."""
    fixed, moving, _ = known_pair(Rigid(), 2)

    def length(displacement: Tensor) -> Tensor:
        return displacement.square().mean()

    objective = fnreg.mse + 1e-3 * fnreg.term(length)
    if "solver" in options:
        objective = fnreg.mse

    def run(f: Any = fixed, m: Any = moving, **more: Any) -> Tensor:
        return landmarks(register(f, m, Rigid(), **{"objective": objective, **options, **more}))

    shift = tensor([0.3, -0.2])
    initial = {"rotation": tensor([0.05]), "translation": shift}
    choices: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "fixed": (lambda x: run(Image(x, fixed.grid)), fixed.data),
        "moving": (lambda x: run(m=Image(x, moving.grid)), moving.data),
        "place": (
            lambda x: run(m=Image(moving.data, spacing=moving.grid.spacing, center=x, direction=moving.grid.direction)),
            moving.grid.center,
        ),
        "spacing": (
            lambda x: run(Image(fixed.data, spacing=x, center=fixed.grid.center, direction=fixed.grid.direction)),
            fixed.grid.spacing,
        ),
        "mask": (lambda x: run(Subject(fixed, x)), 0.5 + uniform(1, *fixed.grid.shape, seed=2).abs()),
        "initial": (lambda x: run(initial={**initial, "translation": x}), shift),
        "map": (lambda x: run(initial=Mapping({**initial, "translation": x}, fixed.grid, Rigid())), shift),
        "then": (lambda x: run(then=Mapping({"translation": x}, fixed.grid, Translation())), shift),
        "weight": (lambda x: run(objective=fnreg.mse + x * fnreg.term(length)), tensor(2e-3)),
        "rate": (lambda x: run(optimizer=adam(x, pure=True)), tensor(0.3)),
    }
    return choices[what]


EVERYTHING = ["fixed", "moving", "place", "spacing", "mask", "initial", "map", "then", "weight", "rate"]
# Differences over 1e-7 keep clear of the knots but carry rounding of 1e-8; these may be wider: a mask does not move
# samples, and a start is forgotten.
WIDTH = {"mask": 1e-5, "initial": 1e-6}


@pytest.mark.parametrize("what", EVERYTHING)
def test_a_registration_is_differentiated_by_what_goes_into_it(what: str) -> None:
    function, point = by(what, PURE)
    direction = uniform(*point.shape, seed=7) if point.ndim else tensor(1.0)
    slope = grad(function)(point)
    expected = numeric(function, point, direction, WIDTH.get(what, 1e-7))
    assert abs(float(expected)) > 1e-6  # so that there is something to get wrong
    assert_close((slope * direction).sum(), expected, atol=1e-9, rtol=2e-5)


@pytest.mark.parametrize("what", ["fixed", "moving", "initial"])
@pytest.mark.parametrize("options", [SGD, NEWTON], ids=["sgd", "gauss-newton"])
def test_other_solvers_are_differentiated_too(what: str, options: dict[str, Any]) -> None:
    function, point = by(what, options)
    direction = uniform(*point.shape, seed=7)
    expected = numeric(function, point, direction, WIDTH.get(what, 1e-7))
    assert_close((grad(function)(point) * direction).sum(), expected, atol=1e-8, rtol=2e-4)


@pytest.mark.parametrize("what", ["initial", "weight", "rate"])
def test_gradients_of_registrations_batch(what: str) -> None:
    function, point = by(what, PURE)
    several = point * tensor([0.9, 1.0, 1.1]).reshape(3, *(1,) * point.ndim)
    loop = torch.stack([grad(function)(p) for p in several])
    assert_close(vmap(grad(function))(several), loop, atol=1e-10, rtol=1e-8)
    jacobian = torch.stack([jacfwd(function)(p) for p in several])
    assert_close(jacobian, loop, atol=1e-10, rtol=1e-8)


def test_a_batch_of_pairs_is_differentiated_pair_by_pair() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    data = torch.stack([fixed.data, 1.2 * fixed.data.flip(-1), fixed.data.square()])

    def total(values: Tensor) -> Tensor:
        result = register(Image(values, fixed.grid), moving, Rigid(), **PURE)
        return result.map_points(tensor([[1.0, 2.0]])).square().sum()

    loop = torch.stack([grad(total)(values) for values in data])
    assert_close(grad(total)(data), loop, atol=1e-9, rtol=0)


def test_stages_and_starts_are_differentiated() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)
    direction = uniform(*fixed.data.shape, seed=3)
    for options in (
        {"transform": [Rigid(), Affine()]},
        {"transform": [Affine(), Rigid()]},
        {"transform": Rigid(), "starts": Rigid().spread(fixed.grid, 3)},
        {"transform": Rigid(), "start": "moments"},
    ):
        function = lambda x, o=options: landmarks(register(Image(x, fixed.grid), moving, **o, **PURE))  # noqa: E731
        expected = numeric(function, fixed.data, direction, 1e-7)
        assert_close((grad(function)(fixed.data) * direction).sum(), expected, atol=1e-8, rtol=1e-4)


def test_the_value_of_a_result_is_differentiable() -> None:
    fixed, moving, _ = known_pair(Rigid(), 2)

    def value(x: Tensor) -> Tensor:
        return register(Image(x, fixed.grid), moving, Rigid(), **PURE).value

    direction = uniform(*fixed.data.shape, seed=3)
    expected = numeric(value, fixed.data, direction)
    assert_close((grad(value)(fixed.data) * direction).sum(), expected, atol=1e-9, rtol=1e-5)


def test_warping_is_differentiated_by_image_and_map() -> None:
    moving = moving_scene(2)
    mapping = random_mapping(Rigid(), scene(2).grid, 3, 0.5)

    def seen(data: Tensor, shift: Tensor) -> Tensor:
        params = {**mapping.params, "translation": shift}
        through = Mapping(params, mapping.domain, mapping.transform)
        return fnreg.warp(Image(data, moving.grid), through, padding="border").data.square().sum()

    point = moving.data, mapping.params["translation"]
    slopes = grad(seen, argnums=(0, 1))(*point)
    direction = uniform(*moving.data.shape, seed=1)
    assert_close(
        (slopes[0] * direction).sum(), numeric(lambda x: seen(x, point[1]), point[0], direction), atol=1e-7, rtol=1e-6
    )
    for unit in torch.eye(2, dtype=torch.float64):
        expected = numeric(lambda x: seen(point[0], x), point[1], unit)
        assert_close(slopes[1] @ unit, expected, atol=1e-6, rtol=1e-6)
