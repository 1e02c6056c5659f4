"""Second-order solvers: products with Hessians, conjugate gradients, NewtonCG and LBFGS on toys and on images."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import equal_bits, few, known_pair, random_params, tensor, uniform
from test_gradients import flat, level_of, stepped
from test_solvers import MATRIX, Toy, answers, bowls, broken, consistent, kink, line
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close

import fnreg
from fnreg import (
    FFD,
    LBFGS,
    SVFFD,
    Affine,
    Descent,
    Diffeomorphism,
    Displacement,
    Image,
    Mapping,
    NewtonCG,
    Rigid,
    Sequential,
    Status,
    Stop,
    adam,
    evaluate,
    register,
)
from fnreg.inputs import prepare
from fnreg.losses.objective import objective as as_objective
from fnreg.problem import Level
from fnreg.pytree import tree_map
from fnreg.solvers.base import joined, parted
from fnreg.solvers.conjugate import conjugate_gradients
from fnreg.solvers.loop import run

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Bent(Toy):
    """A toy with the products that second-order solvers ask for, from the whole Hessian of each row."""

    def value(self, x: Tensor, data: Tensor) -> Tensor:
        return self.residuals(x, data).square().sum()

    def curvature(self, params: Any, *, exact: bool = False) -> Any:
        if exact:
            matrix = vmap(hessian(self.value))(params["x"], self.data)
        else:
            slope = vmap(jacrev(self.residuals))(params["x"], self.data)
            matrix = 2 * slope.mT @ slope
        return lambda step: {"x": (matrix @ step["x"].unsqueeze(-1)).squeeze(-1)}

    def stiffness(self) -> None:
        return None


def bent(toy: Toy) -> Bent:
    return Bent(toy.residuals, toy.data, toy.parameters)


SOLVERS = {
    "gauss-newton": NewtonCG(),
    "hessian": NewtonCG(curvature="hessian"),
    "lbfgs": LBFGS(),
    "short memory": LBFGS(memory=2),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


# -- conjugate gradients -------------------------------------------------------------------------------------------


def systems(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Positive definite matrices with condition numbers from 1 to 1e5, and right sides."""
    basis = torch.linalg.qr(uniform(count, size, size, seed=seed)).Q
    reach = torch.linspace(0, 5, count, dtype=torch.float64).unsqueeze(1)
    values = 10 ** (reach * torch.linspace(-1, 0, size, dtype=torch.float64))
    return basis @ (values.unsqueeze(2) * basis.mT), uniform(count, size, seed=seed + 1)


@few
@given(st.integers(0, 2**16), st.integers(1, 8), st.booleans())
def test_systems_are_solved_as_by_elimination(seed: int, size: int, scaled: bool) -> None:
    matrix, right = systems(seed, 4, size)
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2) if scaled else None
    found = conjugate_gradients(
        lambda x: (matrix @ x[..., None])[..., 0], right, diagonal=diagonal, tolerance=1e-13, iterations=200
    )
    expected = torch.linalg.solve(matrix, right)
    assert_close(found.x, expected, atol=0, rtol=1e-8)
    assert_close(found.residual, right - (matrix @ found.x[..., None])[..., 0], atol=1e-9, rtol=0)
    assert not bool(found.curved.any())
    for number in range(4):
        alone = conjugate_gradients(
            lambda x, n=number: (matrix[n] @ x[..., None])[..., 0],
            right[number : number + 1],
            diagonal=None if diagonal is None else diagonal[number : number + 1],
            tolerance=1e-13,
            iterations=200,
        )
        assert_close(alone.x[0], found.x[number], atol=0, rtol=1e-8)


def test_a_system_ends_where_it_was_told_to() -> None:
    matrix, right = systems(3, 5, 12)
    product = lambda x: (matrix @ x[..., None])[..., 0]  # noqa: E731
    found = conjugate_gradients(product, right, tolerance=tensor([0.5, 0.1, 1e-2, 1e-4, 1e-12]), iterations=200)
    left = found.residual.norm(dim=1) / right.norm(dim=1)
    assert bool((left <= tensor([0.5, 0.1, 1e-2, 1e-4, 1e-12])).all())
    assert int(found.iterations[0]) == 1
    assert found.iterations.tolist() == sorted(found.iterations.tolist())
    few_steps = conjugate_gradients(product, right, tolerance=0.0, iterations=3)
    assert few_steps.iterations.tolist()[1:] == [3] * 4
    nothing = conjugate_gradients(product, torch.zeros_like(right))
    assert equal_bits(nothing.x, torch.zeros_like(right))
    with pytest.raises(ValueError, match="iterations is 0: expected at least 1"):
        conjugate_gradients(product, right, iterations=0)


def test_negative_curvature_and_bad_numbers_end_a_system_alone() -> None:
    matrix = torch.diag_embed(tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [1.0, 2.0, -3.0], [1.0, torch.nan, 1.0]]))
    right = tensor([[1.0, 1.0, 1.0]] * 4)
    product = lambda x: (matrix @ x[..., None])[..., 0]  # noqa: E731
    found = conjugate_gradients(product, right, tolerance=1e-12)
    assert found.curved.tolist() == [False, True, True, False]
    assert torch.equal(found.x[1], right[1])  # the right side, a way down
    assert float(found.x[2] @ right[2]) > 0
    healthy = matrix[:1].expand(4, 3, 3)
    clean = conjugate_gradients(lambda x: (healthy @ x[..., None])[..., 0], right, tolerance=1e-12)
    assert equal_bits(found.x[0], clean.x[0])


def test_systems_are_solved_inside_transforms() -> None:
    matrix, right = systems(1, 3, 4)

    def solved(scale: Tensor, b: Tensor) -> Tensor:
        return conjugate_gradients(lambda x: scale * (matrix @ x[..., None])[..., 0], b, tolerance=0.0, iterations=6).x

    scales = tensor([0.5, 2.0])
    whole = vmap(lambda s: solved(s, right))(scales)
    assert_close(whole, torch.linalg.solve(matrix, right) / scales[:, None, None], atol=1e-6, rtol=1e-6)
    slope = grad(lambda s: solved(s, right)[0].sum())(tensor(2.0))
    assert_close(slope, -torch.linalg.solve(matrix, right)[0].sum() / 4, atol=1e-6, rtol=1e-5)


# -- products with Hessians ----------------------------------------------------------------------------------------


def dense(level: Level, params: Any, exact: bool) -> Tensor:
    """The Hessian (B, P, P) from its products."""
    product, zero = level.curvature(params, exact=exact), level.zero_step()
    count = joined(zero).shape[1]
    columns = [
        joined(product(parted(unit.expand(level.size, -1).contiguous(), zero)))
        for unit in torch.eye(count, dtype=torch.float64)
    ]
    return torch.stack(columns, 2)


def two(transform: Any, grid: Any) -> Any:
    params = random_params(transform, grid, 2, 0.4)
    return tree_map(lambda leaf: torch.stack([leaf, leaf / 2]), params)


OBJECTIVES = {
    "mse": fnreg.mse,
    "mse + bending": 2 * fnreg.mse + 0.3 * fnreg.bending,
    "lncc + folding": fnreg.lncc(radius=2) + 0.1 * fnreg.folding,
    "mi": fnreg.mi,
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("transform", [FFD(8), SVFFD(8, 2)], ids=str)
def test_the_whole_hessian_is_that_of_autograd(transform: Any, name: str) -> None:
    """Forward over reverse of each pair alone; the products are reverse over reverse of the batch."""
    fixed, moving, _ = known_pair(Affine(), 2)
    params, objective = two(transform, fixed.grid), OBJECTIVES[name]
    whole = prepare(fixed, moving, None, levels=1, min_size=4)
    level = whole.level(0, transform, as_objective(objective), 2, "border")
    zero = level.zero_step()
    direction = uniform(*joined(zero).shape, seed=6)
    found = joined(level.curvature(params, exact=True)(parted(direction, zero)))
    for number in range(2):
        one = tree_map(lambda leaf, n=number: leaf[n], params)

        def energy(entries: Tensor, one: Any = one) -> Tensor:
            mapping = Mapping(stepped(transform, one, entries, fixed.grid), fixed.grid, transform)
            return evaluate(fixed, moving, mapping, objective=objective, padding="border")[0]

        expected = jvp(grad(energy), (torch.zeros_like(direction[number]),), (direction[number],))[1]
        assert_close(found[number], expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("objective", [fnreg.mse, 3 * fnreg.ncc, fnreg.mse + 0.3 * fnreg.ncc], ids=str)
@pytest.mark.parametrize("transform", [Rigid(), FFD(8), SVFFD(8, 2)], ids=str)
def test_gauss_newton_is_that_of_the_normal_equations(transform: Any, objective: Any) -> None:
    """Products by two pull-backs against dense normal equations by forward mode."""
    fixed, moving, _ = known_pair(Affine(), 2)
    params = two(transform, fixed.grid)
    whole = prepare(fixed, moving, None, levels=1, min_size=4)
    level = whole.level(0, transform, as_objective(objective), 2, None)
    found = dense(level, params, exact=False)
    assert_close(found, 2 * level.normal_equations(params)[2], atol=1e-11, rtol=1e-8)


def test_the_sign_of_a_weight_is_that_of_its_pair_alone() -> None:
    """With a negative weight the whole second derivative counts; for a neighbour of it the squares do as ever."""
    fixed, moving, _ = known_pair(Affine(), 2)
    transform, whole = FFD(8), prepare(fixed, moving, None, levels=1, min_size=4)
    params = two(transform, fixed.grid)
    ncc = fnreg.ncc + 0.1 * fnreg.bending  # of which the whole second derivative is another
    for weights in ((1.0, -0.5), (-0.5, 1.0), (2.0, 0.5), (-1.0, -2.0)):
        level = whole.level(0, transform, as_objective(tensor(weights) * ncc), 2, "border")
        found = dense(level, params, exact=False)
        for number, weight in enumerate(weights):
            one = whole.level(0, transform, as_objective(tensor(weight) * ncc), 1, "border")
            alone = dense(one, tree_map(lambda leaf, n=number: leaf[n : n + 1], params), exact=False)[0]
            assert_close(found[number], alone, atol=1e-12, rtol=1e-10)
    one, other = (whole.level(0, transform, as_objective(w * fnreg.ncc), 2, "border") for w in (1.0, -1.0))
    apart = dense(one, params, exact=False) + dense(other, params, exact=False)
    assert float(apart.abs().max()) > 1e-3 * float(dense(one, params, exact=False).abs().max())


def test_penalties_count_with_their_whole_curvature() -> None:
    """The bending of a spline is a quadratic form, and an image that is flat adds nothing."""
    fixed, moving, _ = known_pair(Affine(), 2)
    blank = Image(torch.zeros_like(moving.data), moving.grid)
    level = level_of(fixed, blank, FFD(8), fnreg.mse + 0.3 * fnreg.bending)
    params = tree_map(lambda leaf: leaf.unsqueeze(0), random_params(FFD(8), fixed.grid, 1, 0.4))
    found = dense(level, params, exact=False)
    assert_close(found, dense(level, params, exact=True), atol=1e-13, rtol=1e-9)
    assert float(found.abs().max()) > 1e-5
    step = uniform(1, found.shape[1], seed=5)  # of a quadratic energy the gradient grows by H s
    after = level.retract(params, parted(step, level.zero_step()))
    grown = joined(level.gradient(after)[0]) - joined(level.gradient(params)[0])
    assert_close((found @ step.unsqueeze(2)).squeeze(2), grown, atol=1e-12, rtol=1e-8)


def test_both_ways_bend_as_the_mean_of_both() -> None:
    from fnreg.symmetric import BothWays

    fixed, moving, _ = known_pair(Affine(), 2)
    level = level_of(fixed, moving, SVFFD(8, 2), fnreg.mse, "border")
    params = tree_map(lambda leaf: leaf.unsqueeze(0), random_params(SVFFD(8, 2), fixed.grid, 1, 0.4))
    both = BothWays.of(level)
    found = dense(both, params, exact=True)  # type: ignore[arg-type]

    def slope(entries: Tensor) -> Tensor:
        one = stepped(SVFFD(8, 2), tree_map(lambda leaf: leaf[0], params), entries, fixed.grid)
        return flat(both.gradient(tree_map(lambda leaf: leaf.unsqueeze(0), one))[0])

    zero = torch.zeros(found.shape[1], dtype=torch.float64)
    direction = uniform(found.shape[1], seed=3)
    expected = (slope(zero + 1e-6 * direction) - slope(zero - 1e-6 * direction)) / 2e-6
    assert_close(found[0] @ direction, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("term", [fnreg.diffusion, fnreg.bending], ids=str)
@pytest.mark.parametrize("transform", [FFD(4), SVFFD((3, 5)), Displacement()], ids=str)
def test_the_stiffness_of_penalties_is_their_diagonal(transform: Any, term: Any) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    blank = Image(torch.zeros_like(moving.data), moving.grid)
    level = level_of(fixed, blank, transform, fnreg.mse + 0.7 * term)
    params = tree_map(lambda leaf: leaf.unsqueeze(0), transform.init(fixed.grid))
    known = level.stiffness()
    assert known is not None
    product, zero = level.curvature(params), level.zero_step()
    count = known.penalties.shape[1]
    assert known.penalties.shape == joined(zero).shape
    for place in range(0, count, 7):
        unit = torch.zeros(1, count, dtype=torch.float64).index_fill(1, torch.tensor([place]), 1.0)
        exact = joined(product(parted(unit, zero)))[0, place]
        rough = known.penalties[0, place]
        if isinstance(transform, Displacement):  # the means at the border are by another rule
            assert 0.5 * float(exact) <= float(rough) <= 2 * float(exact)
        else:
            assert_close(rough, exact, atol=1e-14, rtol=1e-9)
    for shift in known.shifts(known.penalties):  # of which the penalties see nothing
        assert float(joined(product(parted(shift, zero))).abs().max()) < 1e-12


def test_shifts_tell_the_diagonal_of_the_images() -> None:
    """Of an image of one slope all but the border's control points have the very diagonal."""
    grid = fnreg.Grid((24, 20))
    ramp = Image((grid.points() @ tensor([1.0, 0.5])).reshape(1, 20, 24), grid)
    level = level_of(ramp, ramp, FFD(2), fnreg.mse, "border")
    params = tree_map(lambda leaf: leaf.unsqueeze(0) + 0.3, FFD(2).init(grid))
    known = level.stiffness()
    assert known is not None
    product, zero = level.curvature(params), level.zero_step()
    rows = [joined(product(parted(shift, zero))) for shift in known.shifts(known.penalties)]
    rough = known.diagonal(rows).reshape(zero["coefficients"].shape)
    exact = torch.diagonal(dense(level, params, exact=False)[0]).reshape(rough.shape)
    inside = (..., slice(4, -4), slice(4, -4))
    assert_close(rough[inside], exact[inside], atol=0, rtol=0.1)
    assert float(exact[inside].min()) > 0
    for other in (Rigid(), Sequential((FFD(4), Affine()))):
        assert level_of(ramp, ramp, other, fnreg.mse).stiffness() is None


# -- toys ----------------------------------------------------------------------------------------------------------


@few
@given(st.integers(0, 2**16))
def test_a_quadratic_problem_is_solved_in_a_few_steps(seed: int) -> None:
    toy = bent(Toy(line, uniform(3, 4, seed=seed), 3))
    for name, solver, steps in (
        ("gauss-newton", NewtonCG(damping=1e-9), 5),
        ("hessian", NewtonCG(curvature="hessian", damping=1e-9), 5),
        ("lbfgs", LBFGS(), 25),
    ):
        solved = run(toy, toy.start(), solver, steps=steps)
        assert_close(solved.params["x"], answers(toy), atol=1e-6, rtol=0, msg=name)


@every_solver
def test_values_never_rise(name: str) -> None:
    toy = bent(Toy(kink, tensor([[5.0], [0.3], [-7.0]]), 1))
    solved = run(toy, toy.start(), SOLVERS[name], steps=80, stop=Stop(patience=60, relative=0))
    consistent(solved, 80)
    for trace, steps in zip(solved.history, solved.steps, strict=True):
        assert bool((trace[1:steps] <= trace[: steps - 1]).all())
    assert_close(solved.params["x"], toy.data, atol=1e-4, rtol=0)


def test_the_whole_hessian_converges_quadratically() -> None:
    """|g| of each step is below a multiple of the square of the last one's."""

    def valley(x: Tensor, data: Tensor) -> Tensor:
        return torch.stack([10 * (x[1] - x[0] ** 2), data[0] - x[0]])

    toy = bent(Toy(valley, tensor([[1.0], [0.5]]), 2))
    for name, steps in (("hessian", 60), ("lbfgs", 120), ("gauss-newton", 60)):
        solved = run(toy, toy.start(-0.5), SOLVERS[name], steps=steps)
        expected = torch.cat([toy.data, toy.data**2], 1)
        assert_close(solved.params["x"], expected, atol=1e-9, rtol=0, msg=name)


@every_solver
def test_a_pair_alone_equals_the_pair_in_a_batch(name: str) -> None:
    toy, solver = bent(bowls()), SOLVERS[name]
    for stop in (None, Stop(), Stop(every=1, width=2)):
        whole = run(toy, toy.start(), solver, steps=30, stop=stop)
        for number in range(6):
            one = toy.take(torch.tensor([number]))
            alone = run(one, one.start(), solver, steps=30, stop=stop)
            assert int(alone.status) == int(whole.status[number])
            assert_close(alone.params["x"][0], whole.params["x"][number], atol=1e-7, rtol=0)


@every_solver
def test_neighbours_change_no_bit(name: str) -> None:
    toy, solver = bent(bowls()), SOLVERS[name]
    spoiled = toy.data.clone()
    spoiled[1::2] = torch.nan
    frozen = torch.arange(6) == 2
    for stop in (None, Stop(compact=False)):
        clean = run(toy, toy.start(), solver, steps=20, stop=stop, frozen=frozen)
        dirty = run(dataclasses.replace(toy, data=spoiled), toy.start(), solver, steps=20, stop=stop, frozen=frozen)
        assert equal_bits(clean.params["x"][::2], dirty.params["x"][::2])
        assert bool((dirty.status[1::2] == Status.DIVERGED).all())
        assert equal_bits(clean.params["x"][2], toy.start()["x"][2])


@every_solver
def test_a_trial_that_is_no_number_is_undone(name: str) -> None:
    toy = bent(Toy(broken, tensor([[1.0, 1.5], [1.0, -1.0]]), 1))
    solved = run(toy, toy.start(), SOLVERS[name], steps=60, stop=Stop())
    assert solved.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    assert_close(solved.params["x"], tensor([[1.0], [0.0]]), atol=1e-3, rtol=0)


def test_what_is_tried_after_an_undone_step_is_shorter_also_where_the_limit_bound_it() -> None:
    """Newton's step is 100 voxels long, 4 are let, and beyond 3 there is no number."""
    tried: list[float] = []

    class Watched(Bent):
        def retract(self, params: Any, step: Any) -> Any:
            tried.append(float(params["x"] + step["x"]))
            return super().retract(params, step)

    toy, solver = Watched(broken, tensor([[100.0, 3.0]]), 1), LBFGS()
    params = toy.start()
    carry = solver.init(toy, params)
    for _ in range(12):
        params, carry = solver.step(toy, params, carry, 0.0, None)[:2]
    assert tried[:2] == [0.5, 4.5]  # half a voxel at first, then as far as is let
    assert all(after < before for before, after in itertools.pairwise(tried) if before > 3)
    assert 2 < float(params["x"]) <= 3


@every_solver
def test_the_gradient_ends_a_run_where_asked(name: str) -> None:
    toy = bent(bowls())
    solver = dataclasses.replace(SOLVERS[name], tolerance=1e-9)
    solved = run(toy, toy.start(), solver, steps=200, stop=Stop(relative=0, step=0, patience=200, every=1))
    assert solved.status.tolist() == [Status.CONVERGED] * 6
    assert int(solved.steps.max()) < 60
    assert float(toy.gradient(solved.params)[0]["x"].abs().max()) <= 1e-9


@pytest.mark.parametrize("name", ["gauss-newton", "lbfgs"])
def test_the_loop_runs_under_vmap_and_grad(name: str) -> None:
    solver = NewtonCG(iterations=3) if name == "gauss-newton" else LBFGS(memory=3)

    def reached(data: Tensor) -> Tensor:
        toy = Bent(line, data, 3)
        return run(toy, toy.start(), solver, steps=6).params["x"]

    several = uniform(3, 2, 4, seed=3)
    loop = torch.stack([reached(data) for data in several])
    assert_close(vmap(reached)(several), loop, atol=1e-8, rtol=0)
    size = lambda data: reached(data).square().sum()  # noqa: E731
    slope, direction = grad(size)(several[0]), uniform(2, 4, seed=8)
    numeric = (size(several[0] + 1e-6 * direction) - size(several[0] - 1e-6 * direction)) / 2e-6
    assert_close((slope * direction).sum(), numeric, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (NewtonCG, {"damping": 0.0}),
        (NewtonCG, {"factor": 1.0}),
        (NewtonCG, {"limit": 0.0}),
        (NewtonCG, {"iterations": 0}),
        (NewtonCG, {"tolerance": -1.0}),
        (LBFGS, {"memory": 0}),
        (LBFGS, {"limit": 0.0}),
        (LBFGS, {"tolerance": -1.0}),
    ],
)
def test_absurd_options_are_refused(solver: Any, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}=.*expected .*{name}"):
        solver(**options)


def test_an_unknown_curvature_is_refused() -> None:
    with pytest.raises(ValueError, match="curvature is 'newton': choose gauss-newton or hessian"):
        NewtonCG(curvature="newton")  # type: ignore[arg-type]


# -- images --------------------------------------------------------------------------------------------------------


class Counted:
    """Counts gradients and products of a registration."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Counted:
        self.real = Level.gradient, Level.curvature
        gradient, curvature = self.real

        def looked(level: Level, params: Any) -> Any:
            self.count += 1
            return gradient(level, params)

        def bending(level: Level, params: Any, **options: Any) -> Any:
            product = curvature(level, params, **options)

            def counted(step: Any) -> Any:
                self.count += 1
                return product(step)

            return counted

        Level.gradient, Level.curvature = looked, bending  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Level.gradient, Level.curvature = self.real  # type: ignore[method-assign]


@pytest.mark.parametrize("transform", [FFD(4), SVFFD(4, 4)], ids=str)
@pytest.mark.parametrize("solver", [NewtonCG(), LBFGS()], ids=["newton", "lbfgs"])
def test_less_work_than_adam_for_a_lower_objective(solver: Any, transform: Any) -> None:
    """Every gradient and every product with a Hessian counts as one look."""
    fixed, moving, _ = known_pair(Affine(), 2)
    objective = fnreg.mse + 1e-3 * fnreg.bending
    given: dict[str, Any] = {"objective": objective, "levels": 1, "stop": None, "padding": "border"}
    with Counted() as looks:
        steps = 12 if isinstance(solver, NewtonCG) else 100
        second = register(fixed, moving, transform, solver=solver, steps=steps, **given)
    first = register(fixed, moving, transform, optimizer=adam(0.3), steps=looks.count, **given)
    assert looks.count > 80
    assert float(second.value) < float(first.value)


@pytest.mark.parametrize("objective", [fnreg.mse, fnreg.lncc(radius=2), fnreg.mi], ids=str)
@pytest.mark.parametrize(
    "solver", [NewtonCG(iterations=8), NewtonCG(curvature="hessian", iterations=8), LBFGS()], ids=str
)
def test_every_objective_is_lowered(solver: Any, objective: Any) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    total = objective + 1e-2 * fnreg.bending
    result = register(fixed, moving, FFD(4), objective=total, solver=solver, levels=2, steps=8)
    before = evaluate(fixed, moving, Mapping(FFD(4).init(fixed.grid), fixed.grid, FFD(4)), objective=total)[0]
    assert float(result.value) < float(before) - 0.1 * abs(float(before))
    trace = result.history[-1].value[: int(result.steps[-1])]
    assert bool((trace[1:] <= trace[:-1]).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("solver", [NewtonCG(iterations=6), LBFGS()], ids=["newton", "lbfgs"])
def test_batches_of_images_equal_pairs_alone(solver: Any, symmetric: bool) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    data = torch.stack([fixed.data, fixed.data.flip(-1), 0.5 * fixed.data])
    given: dict[str, Any] = {
        "objective": fnreg.mse + tensor([1e-2, 1e-3, 1e-2]) * fnreg.bending,
        "solver": solver,
        "levels": 2,
        "steps": 4,
        "stop": None,
        "symmetric": symmetric,
    }
    whole = register(Image(data, fixed.grid), moving, SVFFD(4, 6), **given)
    for number, weight in enumerate((1e-2, 1e-3, 1e-2)):
        given["objective"] = fnreg.mse + weight * fnreg.bending
        alone = register(Image(data[number], fixed.grid), moving, SVFFD(4, 6), **given)
        found, other = (result.mapping.params["coefficients"] for result in (whole, alone))
        assert_close(other, found[number], atol=1e-7, rtol=0)
        assert_close(alone.value, whole.value[number], atol=1e-10, rtol=0)


def test_a_failed_pair_changes_nothing_for_the_others() -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    data = torch.stack([fixed.data, fixed.data.flip(-1)])
    spoiled = data.clone()
    spoiled[1, 0, 3, 3] = torch.nan
    for solver in (NewtonCG(iterations=5), LBFGS()):
        given: dict[str, Any] = {"solver": solver, "levels": 1, "steps": 5, "stop": Stop(compact=False)}
        clean = register(Image(data, fixed.grid), moving, FFD(4), **given)
        dirty = register(Image(spoiled, fixed.grid), moving, FFD(4), **given)
        assert dirty.ok.tolist() == [True, False]
        assert equal_bits(clean.mapping.params["coefficients"][0], dirty.mapping.params["coefficients"][0])


def waves(displacement: Tensor) -> Tensor:
    """Smooth, with a curvature that changes from place to place, and never that of a square alone."""
    away = displacement - 2 * torch.sin(torch.arange(displacement.shape[-1], dtype=displacement.dtype) / 3)
    return (away.square() + 0.3 * torch.cos(2 * away)).mean()


def length(params: Any) -> Tensor:
    """Holds the control points that move nothing."""
    return params["coefficients"].square().mean()


@pytest.mark.parametrize(
    "solver",
    [
        NewtonCG(tolerance=1e-12, iterations=100),
        NewtonCG(curvature="hessian", tolerance=1e-12, iterations=100),
        LBFGS(tolerance=1e-12),
    ],
    ids=["gauss-newton", "hessian", "lbfgs"],
)
def test_the_gradient_falls_to_rounding_on_a_smooth_problem(solver: Any) -> None:
    """With images under linear interpolation it jumps from voxel to voxel; here it does not."""
    fixed, moving, _ = known_pair(Affine(), 2)
    objective = fnreg.term(waves) + 0.1 * fnreg.bending + 0.01 * fnreg.term(length)
    stop = Stop(relative=0, step=0, patience=400, every=1)
    steps = 300 if isinstance(solver, LBFGS) else 40
    result = register(fixed, moving, FFD(4), objective=objective, solver=solver, levels=1, steps=steps, stop=stop)
    level = level_of(fixed, moving, FFD(4), objective)
    slope = level.gradient(tree_map(lambda leaf: leaf.unsqueeze(0), result.mapping.params))[0]
    assert float(joined(slope).norm()) < 1e-10
    assert int(result.status) == Status.CONVERGED


def test_registrations_run_under_vmap_and_are_differentiated() -> None:
    """From a start off the voxels, where the gradient of a sample jumps."""
    fixed, moving, _ = known_pair(Affine(), 2)
    initial = random_params(FFD(8), fixed.grid, 3, 0.3)
    given: dict[str, Any] = {"initial": initial, "levels": 1, "steps": 2, "stop": None}
    for solver in (NewtonCG(iterations=3), LBFGS(memory=2)):

        def reached(weight: Tensor, solver: Any = solver) -> Tensor:
            result = register(
                fixed, moving, FFD(8), objective=fnreg.mse + weight * fnreg.bending, solver=solver, **given
            )
            return result.map_points(tensor([[1.0, 2.0]])).square().sum()

        weights = tensor([5.0, 10.0])
        alone = torch.stack([reached(weight) for weight in weights])
        assert_close(vmap(reached)(weights), alone, atol=1e-8, rtol=0)
        slope = grad(reached)(weights[0])
        numeric = (reached(weights[0] + 1e-5) - reached(weights[0] - 1e-5)) / 2e-5
        assert abs(float(numeric)) > 1e-6
        assert_close(slope, numeric, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize("solver", [NewtonCG(), LBFGS()], ids=["newton", "lbfgs"])
def test_what_second_order_cannot_do_is_refused(solver: Any) -> None:
    fixed, moving, _ = known_pair(Affine(), 2)
    name = type(solver).__name__
    for transform in (Diffeomorphism(), Sequential((Diffeomorphism(), Affine()))):
        with pytest.raises(ValueError, match=f"descends no stated objective, and {name} needs one: choose SVFFD"):
            register(fixed, moving, transform, solver=solver)
    with pytest.raises(ValueError, match=f"{name} has no optimizer: give either"):
        register(fixed, moving, FFD(4), solver=solver, optimizer=Descent().optimizer)


def test_solvers_are_values() -> None:
    assert LBFGS(memory=5) == LBFGS(memory=5) != LBFGS()
    assert eval(repr(NewtonCG(iterations=7))) == NewtonCG(iterations=7)
    assert MATRIX.shape == (4, 3)
