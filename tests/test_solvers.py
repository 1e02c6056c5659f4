"""The loop and its solvers on small problems whose answers are known: stopping, compaction, failure, history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import equal_bits, few, tensor, uniform
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vmap
from torch.testing import assert_close

from fnreg import Descent, GaussNewton, Status, Stop, adam, chain, clip, sgd
from fnreg.solvers.base import Solved
from fnreg.solvers.loop import run

Params = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Toy:
    """min |r(x, data)|^2 for each row of data; x (P,) is the parameter, and a step adds to it."""

    residuals: Callable[[Tensor, Tensor], Tensor]
    data: Tensor  # (B, K)
    parameters: int

    @property
    def size(self) -> int:
        return self.data.shape[0]

    def start(self, value: float = 0.0) -> Params:
        return {"x": torch.full((self.size, self.parameters), value, dtype=torch.float64)}

    def zero_step(self) -> Params:
        return self.start()

    def take(self, index: Tensor) -> Toy:
        return dataclasses.replace(self, data=self.data[index])

    def gradient(self, params: Params) -> tuple[Params, Tensor, dict[str, Tensor]]:
        found = vmap(grad_and_value(lambda x, d: self.residuals(x, d).square().sum()))(params["x"], self.data)
        return {"x": found[0]}, found[1], {"toy": found[1] / 2}

    def normal_equations(self, params: Params) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        r = vmap(self.residuals)(params["x"], self.data)
        j = vmap(jacrev(self.residuals))(params["x"], self.data)
        value = r.square().sum(1)
        return value, (j.mT @ r.unsqueeze(2)).squeeze(2), j.mT @ j, {"toy": value / 2}

    def retract(self, params: Params, step: Params) -> Params:
        return {"x": params["x"] + step["x"]}


MATRIX = tensor([[1.0, 0.3, -0.2], [0.1, 2.0, 0.4], [0.0, -0.5, 0.7], [0.6, 0.2, 0.1]])


def line(x: Tensor, data: Tensor) -> Tensor:
    """A x - b, with a remainder."""
    return MATRIX @ x - data


def bowls(count: int = 6, reach: float = 3.0) -> Toy:
    """Pairs whose answers lie at different distances: some are done sooner."""
    far = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
    return Toy(line, reach * far * uniform(1, 4, seed=1), 3)


def answers(toy: Toy) -> Tensor:
    return torch.linalg.lstsq(MATRIX, toy.data.mT).solution.mT


def broken(x: Tensor, data: Tensor) -> Tensor:
    """A bowl about data[0] that is not a number beyond data[1]."""
    return torch.where(x > data[1], torch.nan, x - data[0])


def kink(x: Tensor, data: Tensor) -> Tensor:
    """Gauss-Newton overshoots far from the answer, data."""
    return torch.atan(x - data)


def consistent(solved: Solved, steps: int) -> None:
    """History, step counts and statuses tell one story."""
    assert solved.history.shape == (len(solved.steps), steps)
    known = ~torch.isnan(solved.history)
    counted = torch.where(solved.status == Status.DIVERGED, solved.steps - 1, solved.steps).clamp(min=0)
    assert torch.equal(known.sum(1), counted)
    # NaN only after the last value
    order = torch.arange(steps).expand_as(known)
    assert torch.equal(known, order < counted.unsqueeze(1))


# -- statuses ------------------------------------------------------------------------------------------------------


def test_all_steps_are_taken_where_nothing_stops() -> None:
    toy = bowls()
    solved = run(toy, toy.start(), Descent(sgd(0.01)), steps=7)
    consistent(solved, 7)
    assert solved.steps.tolist() == [7] * 6
    assert solved.status.tolist() == [Status.STEPS] * 6
    by_hand = toy.start()["x"]
    for number in range(7):
        values = vmap(line)(by_hand, toy.data).square().sum(1)
        assert_close(solved.history[:, number], values, atol=1e-13, rtol=0)
        by_hand = by_hand - 0.01 * 2 * (vmap(line)(by_hand, toy.data) @ MATRIX)
    assert_close(solved.params["x"], by_hand, atol=1e-13, rtol=0)


@pytest.mark.parametrize("solver", [Descent(adam(0.3)), Descent(sgd(0.05)), GaussNewton()], ids=str)
def test_pairs_converge_each_at_its_own_time(solver: Any) -> None:
    toy = bowls()
    solved = run(toy, toy.start(), solver, steps=300, stop=Stop(relative=1e-6))
    consistent(solved, 300)
    assert solved.status.tolist() == [Status.CONVERGED] * 6
    assert int(solved.steps.max()) < 300
    assert_close(solved.params["x"], answers(toy), atol=0.02, rtol=0)
    if not isinstance(solver, GaussNewton):
        assert len(set(solved.steps.tolist())) > 1


def test_too_few_steps_leave_some_pairs_on_their_way() -> None:
    toy = bowls()
    solved = run(toy, toy.start(), Descent(sgd(0.05)), steps=60, stop=Stop())
    consistent(solved, 60)
    assert solved.status.tolist() == [Status.CONVERGED] + [Status.STEPS] * 5
    assert solved.steps.tolist()[1:] == [60] * 5


@pytest.mark.parametrize("stop", [None, Stop(), Stop(compact=False), Stop(every=1)], ids=str)
@pytest.mark.parametrize("solver", [Descent(sgd(0.1, decay=1.0)), Descent(adam(0.3))], ids=str)
def test_a_pair_that_diverges_goes_back_and_stops(solver: Any, stop: Stop | None) -> None:
    """It keeps parameters with a finite value, and the others go on."""
    toy = Toy(broken, tensor([[1.0, 9.0], [1.0, 0.5], [-1.0, 9.0], [1.0, -1.0]]), 1)
    solved = run(toy, toy.start(), solver, steps=80, stop=stop)
    consistent(solved, 80)
    diverged = solved.status == Status.DIVERGED
    assert diverged.tolist() == [False, True, False, True]
    assert_close(solved.params["x"][~diverged], tensor([[1.0], [-1.0]]), atol=0.05, rtol=0)
    assert 0 < float(solved.params["x"][1]) <= 0.5
    assert float(solved.params["x"][3]) == 0  # from the start
    assert int(solved.steps[1]) < 80
    assert int(solved.steps[3]) == 1
    assert bool(torch.isfinite(solved.params["x"]).all())


def test_parameters_that_become_infinite_are_a_divergence() -> None:
    """Though the value was finite when the step was taken."""
    toy = Toy(lambda x, d: x - d, tensor([[1.0], [1e300]]), 1)
    solved = run(toy, {"x": torch.zeros(2, 1).double()}, Descent(sgd(1e10, decay=1.0)), steps=3)
    assert int(solved.status[1]) == Status.DIVERGED
    assert bool(torch.isfinite(solved.params["x"]).all())


def test_no_steps_change_nothing() -> None:
    toy = bowls()
    solved = run(toy, toy.start(0.5), Descent(), steps=0, frozen=torch.arange(6) == 2)
    assert equal_bits(solved.params, toy.start(0.5))
    assert solved.steps.tolist() == [0] * 6
    assert solved.history.shape == (6, 0)
    assert [Status(s) for s in solved.status.tolist()].count(Status.DIVERGED) == 1


# -- stopping ------------------------------------------------------------------------------------------------------


def test_the_best_parameters_seen_are_the_result() -> None:
    """Adam with a long step swings about the answer: what it ends on is not the best it saw."""
    toy = bowls()
    solved = run(toy, toy.start(), Descent(adam(1.0, decay=1.0)), steps=40, stop=Stop(patience=40, relative=0.0))
    assert solved.steps.tolist()[1:] == [40] * 5
    values = vmap(line)(solved.params["x"], toy.data).square().sum(1)
    assert_close(values, solved.history.nan_to_num(nan=torch.inf).amin(1), atol=1e-14, rtol=0)
    assert bool((values[1:] < solved.history[1:, -1]).any())


def test_a_solver_with_a_step_length_shortens_it_before_it_ends() -> None:
    """Constant long steps of Adam cannot settle; shorter ones can."""
    toy, solver = bowls(), Descent(adam(1.0, decay=1.0))
    stop = Stop(relative=1e-3, patience=5, shrink=0.3, shortest=1e-3)
    early = run(toy, toy.start(), solver, steps=400, stop=dataclasses.replace(stop, shortest=1.0))
    fine = run(toy, toy.start(), solver, steps=400, stop=stop)
    assert fine.status.tolist() == early.status.tolist() == [Status.CONVERGED] * 6
    assert bool((fine.steps >= early.steps + 5)[1:].all())
    least = vmap(line)(answers(toy), toy.data).square().sum(1)
    above = [vmap(line)(found.params["x"], toy.data).square().sum(1) - least for found in (fine, early)]
    assert bool((above[0] <= above[1]).all())
    assert float(above[0].max()) < 0.2 * float(above[1].max())


def test_small_steps_are_convergence() -> None:
    toy = bowls()
    solved = run(
        toy, toy.start(), Descent(sgd(0.05, decay=1.0)), steps=500, stop=Stop(relative=0, patience=500, step=1e-3)
    )
    assert solved.status.tolist() == [Status.CONVERGED] * 6
    torch.testing.assert_close(solved.terms["toy"], solved.history / 2, equal_nan=True, rtol=0, atol=0)
    gradient, *_ = toy.gradient(solved.params)
    assert bool((0.05 * gradient["x"].abs().amax(1) <= 2e-3).all())
    endless = run(toy, toy.start(), Descent(sgd(0.05)), steps=50, stop=Stop(relative=0, patience=60, step=0))
    assert endless.steps.tolist()[1:] == [50] * 5


def test_patience_counts_steps_without_a_fall() -> None:
    """A value that stands still: a third of `patience` after the first, then a solver without a length is done."""

    @dataclasses.dataclass(frozen=True)
    class Still:
        scales = False

        def init(self, problem: Any, params: Any) -> Any:
            return ()

        def step(self, problem: Any, params: Any, carry: Any, progress: float, length: Tensor | None) -> Any:
            from fnreg.solvers.base import Taken

            assert length is None
            one = torch.ones(problem.size, dtype=torch.float64)
            return Taken(params, carry, one, params, one, torch.zeros_like(one, dtype=torch.bool))

    toy = bowls()
    solved = run(toy, toy.start(), Still(), steps=50, stop=Stop(patience=7, every=50))
    assert solved.steps.tolist() == [4] * 6
    assert solved.status.tolist() == [Status.CONVERGED] * 6
    assert solved.terms == {}  # a solver need not tell them
    consistent(solved, 50)


@pytest.mark.parametrize(
    "options",
    [
        {"relative": -1e-3},
        {"step": -1.0},
        {"patience": 0},
        {"every": 0},
        {"width": 0},
        {"width": 2, "compact": False},
        {"shrink": 0.0},
        {"shrink": 1.0},
        {"shortest": 0.0},
        {"shortest": 2.0},
    ],
)
def test_absurd_stopping_is_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}=.*expected .*{name}"):
        Stop(**options)


# -- batches -------------------------------------------------------------------------------------------------------

RATES = torch.linspace(0.1, 0.4, 6, dtype=torch.float64)
SOLVERS = {
    "adam": Descent(adam(0.3)),
    "pure": Descent(adam(0.3, pure=True)),
    "momentum": Descent(sgd(0.02, momentum=0.8)),
    "clipped": Descent(chain(clip(0.5), adam(0.3))),
    "limited": Descent(sgd(0.05), limit=0.05),
    "rate per pair": Descent(adam(RATES)),
    "gauss-newton": GaussNewton(),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


@every_solver
def test_compaction_changes_nothing(name: str) -> None:
    toy, solver = bowls(), SOLVERS[name]
    frozen = torch.arange(6) == 4
    found = [
        run(toy, toy.start(), solver, steps=200, stop=Stop(every=every, compact=compact), frozen=frozen)
        for every, compact in ((200, False), (1, True), (3, True), (10, True), (7, False))
    ]
    sizes = set(found[0].steps.tolist())
    assert len(sizes) > 2  # so that there was something to drop
    for other in found[1:]:
        assert torch.equal(other.status, found[0].status)
        assert torch.equal(other.steps, found[0].steps)
        assert_close(other.params["x"], found[0].params["x"], atol=1e-9, rtol=0)
        assert_close(other.history, found[0].history, atol=1e-9, rtol=0, equal_nan=True)


@every_solver
@pytest.mark.parametrize("steps", [200, 25])
def test_waiting_pairs_change_nothing(name: str, steps: int) -> None:
    """However many run side by side, and whether they take all steps or stop."""
    toy, solver = bowls(), SOLVERS[name]
    frozen = torch.arange(6) == 4
    whole = run(toy, toy.start(), solver, steps=steps, stop=Stop(), frozen=frozen)
    for every, width in ((1, 1), (1, 2), (3, 2), (10, 2), (10, 3), (7, 5), (4, 6), (200, 2), (10, 9)):
        told: list[tuple[int, int, int, float]] = []
        stop = Stop(every=every, width=width)
        found = run(toy, toy.start(), solver, steps=steps, stop=stop, frozen=frozen, progress=lambda *e: told.append(e))  # noqa: B023
        assert torch.equal(found.status, whole.status)
        assert torch.equal(found.steps, whole.steps)
        assert_close(found.params["x"], whole.params["x"], atol=1e-9, rtol=0)
        assert_close(found.history, whole.history, atol=1e-9, rtol=0, equal_nan=True)
        assert_close(found.terms["toy"], whole.terms["toy"], atol=1e-9, rtol=0, equal_nan=True)
        reached = [event[0] for event in told]
        assert reached == sorted(reached)
        assert 0 < reached[0] <= reached[-1] <= steps


@pytest.mark.parametrize("name", ["pure", "gauss-newton"])
def test_places_of_pairs_that_are_done_are_taken_by_others(name: str) -> None:
    """While pairs wait no place is idle for longer than until the next look."""
    widths: list[int] = []

    class Watched(Toy):
        def retract(self, params: Params, step: Params) -> Params:
            widths.append(self.size)
            return super().retract(params, step)

    data = bowls(30).data
    toy = Watched(line, data, 3)
    solved = run(toy, toy.start(), SOLVERS[name], steps=200, stop=Stop(every=1, width=4))
    looked = 0 if name == "gauss-newton" else int((solved.status == Status.STEPS).sum())
    total = int(solved.steps.sum()) + looked
    assert sum(widths) <= total + 4 * 4 * 10  # what is left when nobody waits any more runs in ever fewer places
    first = next(place for place, width in enumerate(widths) if width < 4)
    assert sum(widths[:first]) >= 0.7 * total
    assert set(widths[:first]) == {4}


def test_frozen_pairs_take_no_places() -> None:
    toy = bowls()
    all_but_one = torch.arange(6) != 2
    solved = run(toy, toy.start(), SOLVERS["pure"], steps=30, stop=Stop(width=1), frozen=all_but_one)
    alone = run(toy, toy.start(), SOLVERS["pure"], steps=30, stop=Stop(), frozen=all_but_one)
    assert_close(solved.params["x"], alone.params["x"], atol=1e-9, rtol=0)
    nobody = run(toy, toy.start(0.5), SOLVERS["pure"], steps=30, stop=Stop(width=2), frozen=torch.ones(6) > 0)
    assert equal_bits(nobody.params, toy.start(0.5))
    assert nobody.history.shape == (6, 30)


def test_a_solver_that_cannot_be_joined_takes_turns() -> None:
    """Waiting pairs begin together when all before them are done."""

    class Bare:
        scales = True

        def __init__(self) -> None:
            self.solver = Descent(adam(0.3, pure=True))

        def init(self, problem: Any, params: Any) -> Any:
            begun.append(problem.size)
            return self.solver.init(problem, params)

        def step(self, *given: Any) -> Any:
            return self.solver.step(*given)

    begun: list[int] = []
    toy = bowls(12)
    found = run(toy, toy.start(), Bare(), steps=100, stop=Stop(every=1, width=4))
    whole = run(toy, toy.start(), SOLVERS["pure"], steps=100, stop=Stop())
    assert torch.equal(found.steps, whole.steps)
    assert_close(found.params["x"], whole.params["x"], atol=1e-9, rtol=0)
    assert len(set(whole.steps.tolist())) > 3  # so places were dropped, and yet
    assert begun == [4, 4, 4]


@every_solver
def test_dropped_pairs_cost_nothing(name: str) -> None:
    """After a look with half of the pairs done, the others run alone."""
    widths: list[int] = []

    class Watched(Toy):
        def gradient(self, params: Params) -> tuple[Params, Tensor, dict[str, Tensor]]:
            widths.append(self.size)
            return super().gradient(params)

        def normal_equations(self, params: Params) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
            widths.append(self.size)
            return super().normal_equations(params)

    toy = Watched(line, torch.cat([0 * bowls().data[:3], bowls().data[3:]]), 3)
    run(toy, toy.start(), SOLVERS[name], steps=100, stop=Stop(every=1))
    assert widths[0] == 6
    assert min(widths) <= 3
    assert widths == sorted(widths, reverse=True)


@every_solver
def test_a_pair_alone_equals_the_pair_in_a_batch(name: str) -> None:
    toy, solver = bowls(), SOLVERS[name]
    for stop in (None, Stop()):
        whole = run(toy, toy.start(), solver, steps=60, stop=stop)
        for number in range(6):
            one = toy.take(torch.tensor([number]))
            if name == "rate per pair":
                solver = Descent(adam(float(RATES[number])))
            alone = run(one, one.start(), solver, steps=60, stop=stop)
            assert int(alone.steps) == int(whole.steps[number])
            assert int(alone.status) == int(whole.status[number])
            assert_close(alone.params["x"][0], whole.params["x"][number], atol=1e-9, rtol=0)
        solver = SOLVERS[name]


@every_solver
def test_frozen_pairs_stay_as_they_are(name: str) -> None:
    toy = bowls()
    frozen = torch.tensor([False, True, False, False, True, False])
    start = {"x": uniform(6, 3, seed=9)}
    for stop in (None, Stop(every=2), Stop(compact=False)):
        solved = run(toy, start, SOLVERS[name], steps=30, stop=stop, frozen=frozen)
        assert torch.equal(solved.params["x"][frozen], start["x"][frozen])
        assert bool((solved.params["x"] != start["x"])[~frozen].any(1).all())
        assert solved.steps[frozen].tolist() == [0, 0]
        assert bool(torch.isnan(solved.history[frozen]).all())
        assert solved.status[frozen].tolist() == [Status.DIVERGED] * 2
        assert Status.DIVERGED not in solved.status[~frozen].tolist()


def test_a_batch_that_is_frozen_as_a_whole_stays() -> None:
    toy = bowls()
    solved = run(toy, toy.start(0.5), Descent(), steps=30, stop=Stop(every=1), frozen=torch.ones(6, dtype=torch.bool))
    assert equal_bits(solved.params, toy.start(0.5))
    assert bool(torch.isnan(solved.history).all())


@every_solver
def test_neighbours_change_no_bit(name: str) -> None:
    """At one batch size without compaction, what the other pairs hold does not matter, NaN included."""
    toy, solver = bowls(), SOLVERS[name]
    for spoil in (torch.nan, torch.inf, 1e200):
        spoiled = toy.data.clone()
        spoiled[1::2] = spoil
        for stop in (None, Stop(compact=False)):
            clean = run(toy, toy.start(), solver, steps=40, stop=stop)
            dirty = run(dataclasses.replace(toy, data=spoiled), toy.start(), solver, steps=40, stop=stop)
            for a, b in (
                (clean.params["x"], dirty.params["x"]),
                (clean.history, dirty.history[:, : clean.history.shape[1]]),
            ):
                assert equal_bits(a[::2], b[::2])
            assert torch.equal(clean.status[::2], dirty.status[::2])
            assert bool((dirty.status[1::2] == Status.DIVERGED).all())


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_tells_steps_active_pairs_and_the_mean_value() -> None:
    toy, told = bowls(), []
    solved = run(
        toy, toy.start(), Descent(adam(0.3)), steps=300, stop=Stop(every=7), progress=lambda *e: told.append(e)
    )
    steps = [event[0] for event in told]
    active = [event[2] for event in told]
    assert steps == list(range(7, steps[-1] + 1, 7))
    assert {event[1] for event in told} == {300}
    assert active == sorted(active, reverse=True)
    assert active[-1] == 0
    for step, _, left, value in told:
        running = int((solved.steps > step).sum())
        assert left == running
        row = solved.history[:, step - 1]
        if not bool(row.isnan().all()):  # else what was told last is told again
            assert value == pytest.approx(float(row[~torch.isnan(row)].mean()))
        assert math.isfinite(value)


def test_progress_without_stopping_is_told_every_step() -> None:
    toy, told = bowls(), []
    run(toy, toy.start(), Descent(adam(0.3)), steps=5, progress=lambda *e: told.append(e))
    assert [event[:3] for event in told] == [(n, 5, 6) for n in range(1, 6)]
    told.clear()
    run(toy, toy.start(), Descent(adam(0.3)), steps=25, stop=Stop(), progress=lambda *e: told.append(e))
    assert [event[0] for event in told] == [10, 20, 25]


# -- inside transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [Descent(adam(0.3, pure=True)), Descent(sgd(0.05, pure=True)), GaussNewton()], ids=str
)
def test_the_loop_runs_under_vmap_and_grad(solver: Any) -> None:
    def reached(data: Tensor) -> Tensor:
        toy = Toy(line, data, 3)
        return run(toy, toy.start(), solver, steps=8).params["x"]

    several = uniform(4, 2, 4, seed=3)
    loop = torch.stack([reached(data) for data in several])
    assert_close(vmap(reached)(several), loop, atol=1e-12, rtol=0)
    size = lambda data: reached(data).square().sum()  # noqa: E731
    slope, direction = grad(size)(several[0]), uniform(2, 4, seed=8)
    numeric = (size(several[0] + 1e-6 * direction) - size(several[0] - 1e-6 * direction)) / 2e-6
    assert_close((slope * direction).sum(), numeric, atol=1e-6, rtol=1e-5)


# -- descent -------------------------------------------------------------------------------------------------------


def test_no_entry_of_a_step_exceeds_the_limit() -> None:
    toy = bowls(reach=50.0)
    free = run(toy, toy.start(), Descent(sgd(0.1)), steps=1).params["x"]
    limited = run(toy, toy.start(), Descent(sgd(0.1), limit=0.5), steps=1).params["x"]
    assert_close(limited, free.clamp(-0.5, 0.5), atol=1e-14, rtol=0)
    assert bool((free.abs() > 0.5).any() & (free.abs() < 0.5).any())
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"limit is .*: it must be positive"):
            Descent(limit=limit)


def test_an_optimizer_whose_state_does_not_fit_is_refused() -> None:
    """One that broadcasts would move every entry alike, without a word."""

    class Wrong:
        def init(self, step: Any) -> Any:
            return ()

        def update(self, gradient: Any, state: Any, progress: float) -> tuple[Any, Any]:
            return {"x": torch.zeros(6, 1).double()}, state

    toy = bowls()
    with pytest.raises(ValueError, match="Wrong gave an update that does not fit the step"):
        run(toy, toy.start(), Descent(Wrong()), steps=1)


# -- Gauss-Newton --------------------------------------------------------------------------------------------------


@few
@given(st.integers(0, 2**16))
def test_a_linear_problem_is_solved_at_once(seed: int) -> None:
    toy = Toy(line, uniform(3, 4, seed=seed), 3)
    expected = answers(toy)
    once = run(toy, toy.start(), GaussNewton(damping=1e-9), steps=1)
    assert_close(once.params["x"], expected, atol=1e-7, rtol=0)
    solved = run(toy, toy.start(), GaussNewton(), steps=20, stop=Stop())
    assert solved.status.tolist() == [Status.CONVERGED] * 3
    assert_close(solved.params["x"], expected, atol=1e-6, rtol=0)
    values = vmap(line)(expected, toy.data).square().sum(1)
    last = solved.history.gather(1, solved.steps.unsqueeze(1) - 1).squeeze(1)
    assert_close(last, values, atol=1e-10, rtol=0)


def test_damping_is_that_of_marquardt() -> None:
    toy = bowls()
    once = run(toy, toy.start(), GaussNewton(damping=0.7), steps=1)
    normal = MATRIX.mT @ MATRIX
    expected = torch.linalg.solve(normal + 0.7 * torch.diag(torch.diagonal(normal)), MATRIX.mT @ toy.data.mT).mT
    assert_close(once.params["x"], expected, atol=1e-9, rtol=0)


def test_bad_steps_are_undone_and_damped() -> None:
    """From far away the first steps overshoot: they leave every bit as it was, and then smaller ones help."""
    toy = Toy(kink, tensor([[5.0], [0.3], [-7.0]]), 1)
    solver = GaussNewton(damping=1e-6, factor=10.0, limit=1e6)
    once = run(toy, toy.start(), solver, steps=1)
    assert torch.equal(once.params["x"][[0, 2]], torch.zeros(2, 1).double())
    assert float(once.params["x"][1]) > 0.2
    before = vmap(kink)(toy.start()["x"], toy.data).square().sum(1)
    assert torch.equal(once.history[[0, 2], 0], before[[0, 2]])
    solved = run(toy, toy.start(), solver, steps=60, stop=Stop())
    consistent(solved, 60)
    assert solved.status.tolist() == [Status.CONVERGED] * 3
    assert_close(solved.params["x"], toy.data, atol=1e-4, rtol=0)
    for trace, steps in zip(solved.history, solved.steps, strict=True):
        assert bool((trace[1:steps] <= trace[: steps - 1]).all())


def test_a_problem_without_a_way_down_is_left_where_it_is() -> None:
    """A wrong derivative: every trial is worse, until the damping says that there is no way."""

    class Wrong(Toy):
        def normal_equations(self, params: Params) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
            value, slope, *rest = super().normal_equations(params)
            return value, -slope, *rest  # type: ignore[return-value]

    toy = Wrong(line, bowls().data[1:], 3)
    solved = run(toy, toy.start(), GaussNewton(), steps=60, stop=Stop(patience=100))
    assert solved.status.tolist() == [Status.CONVERGED] * 5
    assert equal_bits(solved.params, toy.start())
    assert int(solved.steps.max()) < 15


def test_a_parameter_without_influence_stays() -> None:
    toy = Toy(lambda x, d: MATRIX[:, :2] @ x[:2] - d, bowls().data, 3)
    start = toy.start(0.5)
    solved = run(toy, start, GaussNewton(), steps=10, stop=Stop())
    assert torch.equal(solved.params["x"][:, 2], start["x"][:, 2])
    assert_close(
        solved.params["x"][:, :2], torch.linalg.lstsq(MATRIX[:, :2], toy.data.mT).solution.mT, atol=1e-5, rtol=0
    )
    nothing = Toy(lambda x, d: d, bowls().data, 3)
    assert equal_bits(run(nothing, nothing.start(0.5), GaussNewton(), steps=5).params, nothing.start(0.5))


def test_long_steps_are_shortened() -> None:
    toy = bowls(reach=100.0)
    far = run(toy, toy.start(), GaussNewton(damping=1e-9, limit=2.0), steps=1).params["x"]
    assert_close(far[1:].abs().amax(1), torch.full((5,), 2.0).double())
    along = torch.nn.functional.cosine_similarity(far[1:], answers(toy)[1:])
    assert_close(along, torch.ones(5).double(), atol=1e-6, rtol=0)


def test_a_problem_that_starts_as_no_number_diverges() -> None:
    toy = Toy(broken, tensor([[1.0, 9.0], [1.0, -1.0]]), 1)
    solved = run(toy, toy.start(), GaussNewton(), steps=20, stop=Stop())
    assert solved.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    assert_close(solved.params["x"], tensor([[1.0], [0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"factor": 1.0}, {"limit": 0.0}, {"damping": math.nan}])
def test_absurd_options_are_refused(options: dict[str, float]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}=.*expected .*{name}"):
        GaussNewton(**options)
