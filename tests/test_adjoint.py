"""Derivatives of the optimum that a registration finds, against finite differences of the whole registration."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adjoint_scenes import (
    MEASURES,
    NEAR,
    SMOOTH,
    SOME,
    TIGHT,
    TRANSFORMS,
    case,
    differences,
    direction,
    error,
    pair,
)
from scenes import tensor, uniform
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fnreg
from fnreg import FFD, SVFFD, Affine, Image, Mapping, Rigid, Stage, Subject, Translation, differentiable, register
from fnreg.pytree import stack, tree_leaves, tree_map

solve = differentiable(register, adjoint=TIGHT)


def agrees(function: Callable[..., Tensor], point: Tensor, *, width: float = 1e-5, rtol: float = 1e-5) -> None:
    """grad of function(point, solve) is the difference of function(point, register)."""
    along = direction(point)
    expected = differences(lambda x: function(x, register), point, along, width)
    assert abs(float(expected)) > 1e-6  # so that there is something to get wrong
    found = (grad(lambda x: function(x, solve))(point) * along).sum()
    assert_close(found, expected, atol=0, rtol=rtol)


# -- what is differentiated, by what -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "transform"),
    [
        pytest.param(m, t, marks=pytest.mark.slow if t == "svffd" and m != "mse" else ())
        for m in MEASURES
        for t in TRANSFORMS
    ],
)
def test_the_derivative_is_that_of_finite_differences(measure: str, transform: str) -> None:
    fixed, moving, chosen, options = case(measure, transform)

    def of(data: Tensor, by: Any) -> Tensor:
        return error(by(Image(data, fixed.grid), moving, chosen, **options))

    agrees(of, fixed.data)


def test_rotations_in_space_are_differentiated_in_their_tangent() -> None:
    fixed, moving, chosen, options = case("mse", "rigid", 3)

    def of(data: Tensor, by: Any) -> Tensor:
        return error(by(fixed, Image(data, moving.grid), chosen, **options))

    agrees(of, moving.data)


def landmark(fixed_points: Tensor, moving_points: Tensor, mapped_points: Tensor) -> Tensor:
    return (mapped_points - moving_points).square().mean()


def by(what: str, transform: str) -> tuple[Callable[[Tensor, Any], Tensor], Tensor]:
    """The error after a registration by some solver, as a function of one thing that goes into it, and its value."""
    fixed, moving, chosen, options = case("mse", transform)
    points = tensor([[2.0, 1.0], [-3.0, -2.0], [0.5, -1.0]])
    place = {name: getattr(fixed.grid, name) for name in ("spacing", "center", "direction")}
    other = {name: getattr(moving.grid, name) for name in ("spacing", "center", "direction")}
    mask = 0.5 + uniform(1, *fixed.grid.shape, seed=2).abs()
    hidden = 0.5 + uniform(1, *moving.grid.shape, seed=4).abs()
    objective = options["objective"]
    after = {"translation": tensor([0.2, -0.1])}

    def run(by: Any, f: Any = fixed, m: Any = moving, **more: Any) -> Tensor:
        return error(by(f, m, chosen, **{**options, **more}))

    def with_points(x: Tensor, y: Tensor, by: Any) -> Tensor:
        sides = Subject(fixed, points=x), Subject(moving, points=y)
        return run(by, *sides, objective=objective + 0.02 * fnreg.term(landmark))

    weighted = fnreg.term(penalty)
    choices: dict[str, tuple[Callable[[Tensor, Any], Tensor], Tensor]] = {
        "moving": (lambda x, by: run(by, m=Image(x, moving.grid)), moving.data),
        "spacing": (lambda x, by: run(by, Image(fixed.data, **{**place, "spacing": x})), place["spacing"]),
        "center": (lambda x, by: run(by, Image(fixed.data, **{**place, "center": x})), place["center"]),
        "origin": (
            lambda x, by: run(by, Image(fixed.data, spacing=place["spacing"], origin=x)),
            fixed.grid.index_to_world(torch.zeros(1, 2, dtype=torch.float64))[0],
        ),
        "direction": (lambda x, by: run(by, Image(fixed.data, **{**place, "direction": x})), place["direction"]),
        "moving spacing": (lambda x, by: run(by, m=Image(moving.data, **{**other, "spacing": x})), other["spacing"]),
        "moving center": (lambda x, by: run(by, m=Image(moving.data, **{**other, "center": x})), other["center"]),
        "mask": (lambda x, by: run(by, Subject(fixed, x)), mask),
        "moving mask": (lambda x, by: run(by, m=Subject(moving, x)), hidden),
        "weight": (lambda x, by: run(by, objective=objective + x * weighted), tensor(1e-3)),
        "fixed points": (lambda x, by: with_points(x, points + 0.3, by), points),
        "moving points": (lambda x, by: with_points(points, x, by), points + 0.3),
        "then": (
            lambda x, by: run(
                by,
                then=Mapping({"translation": x}, fixed.grid, Translation()),
                objective=objective + 1e-2 * weighted,  # or the whole map would not depend on it
            ),
            after["translation"],
        ),
    }
    return choices[what]


def penalty(displacement: Tensor) -> Tensor:
    return displacement.square().mean()


WHAT = [
    "moving",
    "spacing",
    "center",
    "origin",
    "direction",
    "moving spacing",
    "moving center",
    "mask",
    "moving mask",
    "weight",
    "fixed points",
    "moving points",
    "then",
]


@pytest.mark.parametrize("what", WHAT)
def test_by_whatever_goes_into_a_registration(what: str) -> None:
    function, point = by(what, "rigid")
    agrees(function, point)


@pytest.mark.parametrize("what", ["spacing", "origin", "direction", "mask", "weight", "moving points"])
def test_by_whatever_goes_into_a_registration_by_splines(what: str) -> None:
    function, point = by(what, "ffd")
    agrees(function, point)


def test_the_optimum_does_not_depend_on_where_the_search_began() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")

    def of(shift: Tensor) -> Tensor:
        start = {**options["initial"], "translation": shift}
        return error(solve(fixed, moving, chosen, **{**options, "initial": start}))

    assert torch.equal(grad(of)(options["initial"]["translation"]), torch.zeros(2, dtype=torch.float64))


def test_value_and_terms_are_differentiated_too() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")

    for pick in (lambda r: r.value, lambda r: r.terms["bending"]):

        def of(data: Tensor, by: Any, pick: Any = pick) -> Tensor:
            return 1e3 * pick(by(Image(data, fixed.grid), moving, chosen, **options))

        agrees(of, fixed.data)


def test_linear_interpolation_has_the_derivative_of_its_piece() -> None:
    """Where no sample crosses a voxel the optimum is smooth, and the differences are taken there."""
    fixed, moving, chosen, options = case("mse", "rigid")
    options = {**options, "interpolation": "linear", "steps": 12}

    def of(data: Tensor, by: Any) -> Tensor:
        return error(by(Image(data, fixed.grid), moving, chosen, **options))

    agrees(of, fixed.data, width=1e-6)


# -- several stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages",
    [[Rigid(), Affine()], [Stage(Rigid(), objective=fnreg.mse), Stage(FFD(8), objective=fnreg.mse + SOME)]],
    ids=["absorbed", "composed"],
)
def test_through_the_maps_of_earlier_stages(stages: Any) -> None:
    fixed, moving = pair()
    options = {**NEAR, **SMOOTH, "steps": 9}

    def of(data: Tensor, by: Any) -> Tensor:
        return error(by(Image(data, fixed.grid), moving, stages, **options))

    agrees(of, fixed.data)


@pytest.mark.slow
def test_both_ways() -> None:
    fixed, moving, _, options = case("mse", "svffd")
    options = {**options, "symmetric": True, "steps": 7}

    def of(data: Tensor, by: Any) -> Tensor:
        return error(by(Image(data, fixed.grid), moving, SVFFD(8, 2), **options))

    agrees(of, fixed.data, width=1e-6)


# -- transforms of torch.func, batches ---------------------------------------------------------------------------------


def several() -> tuple[Tensor, Callable[..., Tensor]]:
    """Data of three fixed images, and the error as a function of one and of the weight of a penalty."""
    fixed, moving, _, options = case("mse", "rigid")
    data = torch.stack([fixed.data, 1.1 * fixed.data, fixed.data + 0.05 * uniform(*fixed.data.shape, seed=8)])

    def of(values: Tensor, weight: Tensor) -> Tensor:
        objective = fnreg.mse + weight * fnreg.term(penalty)
        return error(solve(Image(values, fixed.grid), moving, Rigid(), **{**options, "objective": objective}))

    return data, of


def test_alone_and_in_a_batch() -> None:
    data, of = several()
    weights = tensor([1e-3, 2e-3, 0.0])
    loop = [grad(of, argnums=(0, 1))(*given) for given in zip(data, weights, strict=True)]
    found = vmap(grad(of, argnums=(0, 1)))(data, weights)
    for number in range(2):
        assert_close(found[number], torch.stack([each[number] for each in loop]), atol=1e-9, rtol=1e-9)
    shared = vmap(grad(of, argnums=1), in_dims=(None, 0))(data[0], weights)  # one pair, several weights
    assert_close(shared, torch.stack([grad(of, argnums=1)(data[0], w) for w in weights]), atol=1e-9, rtol=1e-9)
    nested = vmap(vmap(grad(of, argnums=1), in_dims=(None, 0)), in_dims=(0, None))(data, weights)
    assert_close(nested[0], shared, atol=1e-9, rtol=1e-9)
    assert_close(nested.diagonal(), found[1], atol=1e-9, rtol=1e-9)


def test_a_leading_axis_is_differentiated_pair_by_pair() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")
    data = torch.stack([fixed.data, 1.05 * fixed.data])
    options.pop("initial")
    options["steps"] = 10

    def of(values: Tensor) -> Tensor:
        return solve(Image(values, fixed.grid), moving, chosen, **options).map_points(tensor([[1.0, 2.0]])).square()

    loop = torch.stack([grad(lambda x: of(x).sum())(values) for values in data])
    assert_close(grad(lambda x: of(x).sum())(data), loop, atol=1e-10, rtol=1e-7)
    leaf = data.clone().requires_grad_()
    of(leaf).sum().backward()
    assert_close(leaf.grad, loop, atol=1e-10, rtol=1e-7)


def test_backward_and_jacobians() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")

    def of(place: Tensor) -> Tensor:
        grid = Image(moving.data, center=place, spacing=moving.grid.spacing)
        return solve(fixed, grid, chosen, **options).map_points(tensor([[1.0, 2.0], [3.0, -1.0]]))

    point = moving.grid.center
    jacobian = jacrev(of)(point)
    rows = [grad(lambda x, n=n: of(x).flatten()[n])(point) for n in range(4)]  # type: ignore[misc]
    assert_close(jacobian.reshape(4, 2), torch.stack(rows), atol=1e-10, rtol=1e-9)
    assert_close(jacfwd(of)(point), jacobian, atol=1e-10, rtol=1e-9)
    leaf = point.clone().requires_grad_()
    (of(leaf) * jacobian[..., 0]).sum().backward()
    assert_close(leaf.grad, torch.einsum("nd,nde->e", jacobian[..., 0], jacobian), atol=1e-10, rtol=1e-9)


def test_a_spline_registration_forward() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")

    def of(factor: Tensor) -> Tensor:
        return error(solve(Image(factor * fixed.data, fixed.grid), moving, chosen, **options))

    assert_close(jacfwd(of)(tensor(1.0)), grad(of)(tensor(1.0)), atol=0, rtol=1e-8)


@pytest.mark.parametrize("transform", ["rigid", "ffd"])
def test_second_derivatives(transform: str) -> None:
    fixed, moving, chosen, options = case("mse", transform)

    def of(factor: Tensor) -> Tensor:
        return error(solve(Image(factor * fixed.data, fixed.grid), moving, chosen, **options))

    one = tensor(1.0)
    expected = differences(grad(of), one, one)
    assert_close(grad(grad(of))(one), expected, atol=0, rtol=1e-5)
    leaf = one.clone().requires_grad_()
    (first,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    assert_close(torch.autograd.grad(first, leaf)[0], expected, atol=0, rtol=1e-5)
    if transform == "rigid":
        assert_close(jacfwd(grad(of))(one), expected, atol=0, rtol=1e-5)
        assert_close(grad(jacfwd(of))(one), expected, atol=0, rtol=1e-5)
        assert_close(vmap(grad(grad(of)))(one.expand(2)), expected.expand(2), atol=0, rtol=1e-5)


def test_by_the_parameters_of_a_network_that_makes_the_images() -> None:
    fixed, moving, chosen, options = case("mse", "rigid")
    torch.manual_seed(3)
    network = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate").double()
    with torch.no_grad():
        network.weight.mul_(0.2)[0, 0, 1, 1] += 1
    params = {name: value.detach() for name, value in network.named_parameters()}

    def of(weight: Tensor, by: Any) -> Tensor:
        made = functional_call(network, params | {"weight": weight}, fixed.data)
        return error(by(Image(made, fixed.grid), moving, chosen, **options))

    agrees(of, params["weight"])
    loss = error(solve(Image(network(fixed.data), fixed.grid), moving, chosen, **options))
    loss.backward()
    assert_close(network.weight.grad, grad(lambda x: of(x, solve))(params["weight"]), atol=0, rtol=1e-8)


def test_one_computation_is_repeated_to_the_bit() -> None:
    data, of = several()
    once, twice = (grad(of)(data[0], tensor(1e-3)) for _ in range(2))
    assert torch.equal(once, twice)


def test_without_a_derivative_it_is_register() -> None:
    fixed, moving, chosen, options = case("mse", "ffd")
    found, expected = (by(fixed, moving, chosen, **options) for by in (solve, register))
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-10, equal_nan=True)
    both = solve(stack([fixed, fixed]), moving, chosen, **{**options, "start": "header"})
    assert both.value.shape == (2,)
    assert tree_map(lambda leaf: leaf.shape[0], both.mapping.params) == {"coefficients": 2}


def test_the_page_runs() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "differentiable.md"
    blocks = re.findall(
        r"^```\{code-cell\} ipython3\n(?::tags:[^\n]*\n)?(.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert len(blocks) == 5
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert float(namespace["rate"]) > 0.1
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(jacrev(namespace["found"])(namespace["moving"].grid.center), eye, atol=1e-4, rtol=0)
    assert float(namespace["data"].grad.abs().max()) > 0
