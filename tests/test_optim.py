"""Optimizers against torch.optim step by step, in a batch and alone, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from scenes import close, equal_bits, few, tensor, uniform, without_kernels
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

from fnreg import Diffeomorphism, adam, chain, clip, fields, normalized, optim, register, sgd
from fnreg.data import c_shape, circle
from fnreg.optim import Chain, Torchopt, as_optimizer
from fnreg.pytree import tree_map
from fnreg.solvers.base import check_step

Step = dict[str, Tensor]
seeds = st.integers(0, 2**16)

SPECS: dict[str, Any] = {
    "adam": adam(0.3),
    "adam pure": adam(0.3, pure=True),
    "adam relative": adam(0.3, relative=2.0),
    "sgd": sgd(0.3),
    "sgd momentum": sgd(0.3, momentum=0.9, decay=0.2),
    "sgd pure": sgd(0.3, momentum=0.9, pure=True),
    "normalized": normalized(0.3),
    "normalized momentum": normalized(0.3, momentum=0.9, decay=0.2),
    "chain": chain(clip(0.5), adam(0.3)),
    "chain pure": chain(clip(0.5), sgd(0.3, momentum=0.5, pure=True), clip(0.1)),
    "torchopt": Torchopt("rmsprop", (("lr", 0.1),)),
    "given": as_optimizer(torchopt.adagrad(0.1)),
    "rate per pair": adam(tensor([0.1, 0.2, 0.4])),
    "rate per pair pure": sgd(tensor([0.1, 0.2, 0.4]), pure=True),
    "rate per pair normalized": normalized(tensor([0.1, 0.2, 0.4]), momentum=0.5),
}


every_spec = pytest.mark.parametrize("name", SPECS)


def gradients(count: int, seed: int = 0, pairs: int = 3, dtype: torch.dtype = torch.float64) -> list[Step]:
    """Gradients of some steps for some pairs, of very different size."""
    sizes = tensor([1.0, 1e-3, 1e3])[:pairs]
    return [
        {
            "a": (sizes[:, None] * uniform(pairs, 2, seed=seed + 2 * n)).to(dtype),
            "b": (sizes[:, None, None] * uniform(pairs, 3, 2, seed=seed + 2 * n + 1)).to(dtype),
        }
        for n in range(count)
    ]


def run(spec: Any, several: list[Step]) -> list[Step]:
    """The updates, step by step."""
    state = spec.init(tree_map(torch.zeros_like, several[0]))
    updates = []
    for number, gradient in enumerate(several):
        update, state = spec.update(gradient, state, number / len(several))
        updates.append(update)
    return updates


def pair(step: Step, number: int) -> Step:
    """One pair of a batch, as a batch of one."""
    return tree_map(lambda leaf: leaf[number : number + 1], step)


def by_torch(make: Any, several: list[Step], number: int, norm: float | None = None) -> list[Step]:
    """The updates that torch.optim makes for one pair, clipped by torch where `norm` is given."""
    params = {name: torch.zeros_like(leaf).requires_grad_() for name, leaf in pair(several[0], number).items()}
    optimizer = make(list(params.values()))
    updates = []
    for gradient in several:
        before = {name: leaf.detach().clone() for name, leaf in params.items()}
        for name, leaf in params.items():
            leaf.grad = pair(gradient, number)[name].clone()
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), norm)
        optimizer.step()
        updates.append({name: leaf.detach() - before[name] for name, leaf in params.items()})
    return updates


# -- against torch.optim -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kernel", "torchopt", "pure"])
@few
@given(seed=seeds, betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)))
def test_adam_is_that_of_torch(way: str, seed: int, betas: tuple[float, float]) -> None:
    several = gradients(12, seed)
    spec = adam(0.3, b1=betas[0], b2=betas[1], eps=1e-10, decay=1.0, pure=way == "pure")
    with nullcontext() if way == "kernel" else without_kernels():
        found = run(spec, several)
    for number in range(3):
        expected = by_torch(lambda p: torch.optim.Adam(p, lr=0.3, betas=betas, eps=1e-10), several, number)
        for ours, theirs in zip(found, expected, strict=True):
            # torchopt divides by 1 - b^k in float32, in which the first has the error 2^-24 / (1 - b)
            single = 0.3 * len(several) * 2**-24 * (1 / (1 - betas[0]) + 0.5 / (1 - betas[1]))
            close(pair(ours, number), theirs, atol=single if way == "torchopt" else 1e-12)


@pytest.mark.parametrize("pure", [False, True], ids=["torchopt", "pure"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(pure: bool, momentum: float) -> None:
    several = gradients(8)
    found = run(sgd(0.3, momentum=momentum, pure=pure), several)
    for number in range(3):
        expected = by_torch(lambda p: torch.optim.SGD(p, lr=0.3, momentum=momentum), several, number)
        for ours, theirs in zip(found, expected, strict=True):
            close(pair(ours, number), theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("norm", "atol"), [(0.02, 1e-6), (0.7, 1e-5), (1e5, 1e-9)])
def test_clipping_is_that_of_torch_for_each_pair(norm: float, atol: float) -> None:
    """Small, large and huge gradients beside each other: each is measured alone, over all its leaves."""
    several = gradients(8)
    found = run(chain(clip(norm), sgd(0.3, momentum=0.9)), several)
    for number in range(3):
        expected = by_torch(lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), several, number, norm)
        for ours, theirs in zip(found, expected, strict=True):
            close(pair(ours, number), theirs, atol=atol, rtol=1e-12)  # torch adds 1e-6 to the norm


@few
@given(seeds)
def test_pure_equals_torchopt(seed: int) -> None:
    several = gradients(12, seed)
    for momentum in (0.0, 0.9):
        options: dict[str, Any] = {"momentum": momentum, "decay": 0.3}
        close(run(sgd(0.3, **options), several), run(sgd(0.3, **options, pure=True), several), atol=1e-12)


@pytest.mark.parametrize("b2", [0.5, 0.75])
def test_pure_adam_equals_torchopt_where_float32_is_exact(b2: float) -> None:
    """torchopt computes 1 - b^k in float32, which is exact for such b and k: there nothing else may differ."""
    several = gradients(8)
    options: dict[str, Any] = {"b1": 0.5, "b2": b2, "decay": 0.3}
    with without_kernels():
        expected = run(adam(0.3, **options), several)
        close(expected, run(adam(0.3, **options, pure=True), several), atol=1e-12)
    close(expected, run(adam(0.3, **options), several), atol=1e-12)  # by the kernel, where there is a compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 200), (5, 7, 3, 11)])
def test_the_kernel_of_adam_equals_its_lines(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    several = [{"a": torch.randn(*shape, generator=generator, dtype=dtype).mT} for _ in range(4)]  # of any layout
    for relative in (0.0, 2.0):
        spec = adam(torch.linspace(0.1, 0.5, shape[0]), relative=relative, pure=True)
        found = run(spec, several)
        with without_kernels():
            expected = run(spec, several)
        close(found, expected, atol=1e-5 if dtype == torch.float32 else 1e-13)


@few
@given(seed=seeds, relative=st.floats(0, 10), betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)))
def test_a_relative_share_of_the_root(seed: int, relative: float, betas: tuple[float, float]) -> None:
    """The equation, written down again; with much of it the step is the gradient's mean over its size."""
    several = gradients(6, seed)
    found = run(adam(0.3, b1=betas[0], b2=betas[1], decay=1.0, relative=relative), several)
    m = v = torch.zeros_like(several[0]["a"])
    for k, (gradient, update) in enumerate(zip(several, found, strict=True), 1):
        m, v = betas[0] * m + (1 - betas[0]) * gradient["a"], betas[1] * v + (1 - betas[1]) * gradient["a"] ** 2
        root = (v / (1 - betas[1] ** k)).sqrt()
        size = root.square().mean(1, keepdim=True).sqrt()
        close(update["a"], -0.3 * m / (1 - betas[0] ** k) / (root + 1e-12 + relative * size), atol=1e-10)
    alone = run(adam(0.3, b1=betas[0], b2=betas[1], decay=1.0, relative=relative), [pair(g, 1) for g in several])
    close(alone, [pair(update, 1) for update in found], atol=1e-12)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_without_eps_no_gradient_is_no_step(kernel: bool) -> None:
    step = {"a": torch.tensor([[0.0, 1.0]])}
    with nullcontext() if kernel else without_kernels():
        spec = adam(0.3, eps=0.0, pure=True)
        update = spec.update(step, spec.init(step), 0.0)[0]["a"]
    close(update, torch.tensor([[0.0, -0.3]]), atol=1e-6)


def test_no_number_stays_none() -> None:
    """A pair that failed keeps its NaN; its neighbours do not see it."""
    step = {"a": torch.tensor([[math.nan, 1.0], [2.0, 3.0]])}
    update = adam(0.3).update(step, adam(0.3).init(step), 0.0)[0]["a"]
    assert update.isnan().tolist() == [[True, False], [False, False]]


# -- laws ----------------------------------------------------------------------------------------------------------


@every_spec
def test_a_batch_equals_one_by_one(name: str) -> None:
    several = gradients(12)
    found = run(SPECS[name], several)
    for number in range(3):
        spec = SPECS[name]
        rate = getattr(spec, "lr", None)
        if isinstance(rate, Tensor):
            spec = dataclasses.replace(spec, lr=float(rate[number]))
        alone = run(spec, [pair(gradient, number) for gradient in several])
        for ours, single in zip(found, alone, strict=True):
            close(pair(ours, number), single, atol=0, rtol=1e-14)


@every_spec
def test_updates_leave_their_arguments_alone(name: str) -> None:
    """Values in, values out: the same call twice gives the same bits."""
    spec, several = SPECS[name], gradients(3)
    zero = tree_map(torch.zeros_like, several[0])
    _, state = spec.update(several[0], spec.init(zero), 0.0)
    kept = tree_map(torch.clone, several[1])
    first = spec.update(several[1], state, 0.5)
    second = spec.update(several[1], state, 0.5)
    assert equal_bits(first[0], second[0])
    assert equal_bits(several[1], kept)
    assert not any(bool(leaf.any()) for leaf in zero.values())
    assert equal_bits(run(spec, several), run(spec, several))


@every_spec
def test_updates_have_the_dtype_and_structure_of_the_step(name: str) -> None:
    several = gradients(2, dtype=torch.float32)
    for update in run(SPECS[name], several):
        assert {key: (leaf.dtype, leaf.shape) for key, leaf in update.items()} == {
            key: (leaf.dtype, leaf.shape) for key, leaf in several[0].items()
        }


@every_spec
def test_a_step_goes_down(name: str) -> None:
    """On a bowl, from its rim towards its middle."""
    spec = SPECS[name]
    where = {"a": torch.ones(3, 2).double(), "b": -torch.ones(3, 3, 2).double()}
    state = spec.init(tree_map(torch.zeros_like, where))
    for number in range(40):
        update, state = spec.update(where, state, number / 40)
        where = tree_map(lambda x, u: x + u, where, update)
    assert all(float(leaf.abs().max()) < 0.9 for leaf in where.values())


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_adam_does_not_see_the_scale_of_the_gradient(factor: float) -> None:
    """So one learning rate, in voxels, serves images of any intensity."""
    several = gradients(10, pairs=1)
    scaled = [tree_map(lambda leaf: factor * leaf, gradient) for gradient in several]
    for pure in (False, True):
        close(run(adam(0.3, pure=pure), scaled), run(adam(0.3, pure=pure), several), atol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_longest_vector_of_each_pair_moves_by_the_rate(factor: float, dtype: torch.dtype) -> None:
    """Against NumPy; also where squares of the gradient are 0 or infinite in single precision."""
    (gradient,) = gradients(1, seed=3)
    gradient = {"a": gradient["a"], "b": torch.stack([gradient["b"]] * 2, 3) * tensor([1.0, 0.3])}  # (B, 3, 2, 2)
    given = tree_map(lambda leaf: (factor * leaf).to(dtype), gradient)
    (update,) = run(normalized(0.3), [given])
    for number in range(3):
        one = {name: leaf[number].numpy() for name, leaf in gradient.items()}
        longest = max(np.abs(one["a"]).max(), np.sqrt((one["b"] ** 2).sum(0)).max())
        for name, leaf in update.items():
            expected = tensor(-0.3 * one[name] / longest)
            assert_close(leaf[number].double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_momentum_turns_the_normalized_step() -> None:
    a, b = tensor([[[3.0], [0.0]]]), tensor([[[0.0], [4.0]]])  # (B, D, X)
    first, second = (update["u"] for update in run(normalized(0.5, momentum=0.5), [{"u": a}, {"u": b}]))
    assert_close(first, -0.5 * a / 3)
    mixed = 0.5 * a + b
    assert_close(second, -0.5 * mixed / mixed.norm())


def test_a_pair_without_gradient_stays_and_no_number_shows() -> None:
    gradient = {"u": torch.stack([torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), torch.nan)])}
    (update,) = run(normalized(0.5), [gradient])
    assert not update["u"][0].any()
    assert_close(update["u"][1].norm(dim=0), torch.full((3,), 0.5))
    assert update["u"][2].isnan().all()


def test_flat_areas_do_not_move() -> None:
    """Where the gradient is a millionth, the normalized step is too; that of Adam is as long as any other."""
    gradient = {"u": tensor([[[1.0, 1e-6], [0.0, 0.0]]])}
    (plain,), (adams,) = run(normalized(0.5), [gradient]), run(adam(0.5), [gradient])
    assert_close(plain["u"][0, 0], tensor([-0.5, -0.5e-6]))
    assert_close(adams["u"][0, 0], tensor([-0.5, -0.5]), rtol=1e-3, atol=0)


def test_the_rate_decays_over_a_level() -> None:
    steps = [{"a": torch.ones(1, 1).double()}] * 10
    for spec in (sgd(0.5, decay=0.1), sgd(0.5, decay=0.1, pure=True), normalized(0.5, decay=0.1)):
        sizes = [-float(update["a"]) for update in run(spec, steps)]
        assert sizes == pytest.approx([0.5 * 0.1 ** (n / 10) for n in range(10)])
    for spec in (adam(0.5, decay=0.1), adam(0.5, decay=0.1, pure=True)):
        sizes = [-float(update["a"]) for update in run(spec, steps)]
        assert sizes == pytest.approx([0.5 * 0.1 ** (n / 10) for n in range(10)], rel=1e-4)


def test_a_chain_passes_the_gradient_on() -> None:
    several = gradients(4)
    halved = chain(sgd(1.0), sgd(0.5))  # g -> -g -> g / 2
    close(run(halved, several), [tree_map(lambda leaf: 0.5 * leaf, g) for g in several], atol=1e-15)
    limited = run(chain(sgd(1.0), clip(0.1)), several)
    for update in limited:
        norms = torch.cat([leaf.flatten(1) for leaf in update.values()], 1).norm(dim=1)
        assert bool((norms <= 0.1 + 1e-12).all())
    assert chain(clip(1.0), adam(0.3)) == Chain((clip(1.0), adam(0.3)))


def test_a_gradient_that_is_short_enough_is_not_touched() -> None:
    several = [tree_map(lambda leaf: 1e-3 * leaf, gradient) for gradient in gradients(1, pairs=2)]
    update, _ = clip(0.3).update(several[0], (), 0.0)
    assert equal_bits(update, several[0])


# -- batches that shrink, transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [make(tensor([0.1, 0.2, 0.4])) for make in (adam, normalized)] + [sgd(tensor([0.1, 0.2, 0.4]), pure=True)],
    ids=str,
)
def test_a_rate_travels_with_its_pair(spec: Any) -> None:
    """The solvers drop finished pairs from the state; the rates that are left are those of the pairs that are left."""
    several = gradients(2)
    whole = run(spec, several)
    state = spec.init(tree_map(torch.zeros_like, several[0]))
    _, state = spec.update(several[0], state, 0.0)
    keep = torch.tensor([2, 0])

    def kept(leaf: Any) -> Any:
        return leaf[keep] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 3 else leaf

    update, _ = spec.update(tree_map(kept, several[1]), tree_map(kept, state), 0.5)
    close(update, tree_map(kept, whole[1]), atol=0, rtol=1e-14)


@pytest.mark.parametrize(
    "pure_spec",
    [adam(0.3, pure=True), normalized(0.3, momentum=0.5), chain(clip(0.5), sgd(0.3, momentum=0.5, pure=True))],
    ids=str,
)
def test_pure_optimizers_run_under_vmap_and_grad(pure_spec: Any) -> None:
    several = gradients(3)
    batch = {name: torch.stack([g[name] for g in several]) for name in several[0]}  # 3 runs of one step

    def twice(gradient: Step) -> Step:
        return run(pure_spec, [gradient, tree_map(lambda leaf: -0.5 * leaf, gradient)])[1]

    loop = [twice(gradient) for gradient in several]
    found = vmap(twice)(batch)
    for number, expected in enumerate(loop):
        close(tree_map(lambda leaf: leaf[number], found), expected, atol=1e-14)  # noqa: B023

    def size(gradient: Step) -> Tensor:
        return sum((leaf.square().sum() for leaf in twice(gradient).values()), tensor(0.0))

    slope = grad(size)(tree_map(torch.zeros_like, several[0]))
    assert all(bool(torch.isfinite(leaf).all()) for leaf in slope.values())
    point, direction = several[0], tree_map(lambda leaf: leaf * uniform(*leaf.shape, seed=5), several[0])
    along = sum(float((s * d).sum()) for s, d in zip(grad(size)(point).values(), direction.values(), strict=True))

    def shifted(h: float) -> float:
        return float(size(tree_map(lambda p, d: p + h * d, point, direction)))

    assert along == pytest.approx((shifted(1e-6) - shifted(-1e-6)) / 2e-6, rel=1e-4, abs=1e-8)


def test_a_rate_can_be_batched_and_differentiated() -> None:
    several = gradients(3)

    def size(rate: Tensor) -> Tensor:
        return run(adam(rate, pure=True), several)[-1]["a"].square().sum()

    rates = tensor([0.1, 0.2, 0.7])
    assert_close(vmap(size)(rates), torch.stack([size(rate) for rate in rates]), atol=1e-14, rtol=0)
    assert_close(vmap(grad(size))(rates), 2 * vmap(size)(rates) / rates, atol=1e-12, rtol=0)  # quadratic in the rate


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -0.3, math.nan, math.inf, tensor([0.1, -0.1]), tensor(0.0)])
@pytest.mark.parametrize("make", [adam, sgd, normalized])
def test_absurd_rates_are_refused(make: Any, rate: Any) -> None:
    with pytest.raises(ValueError, match=r"lr is .*: it must be positive and finite"):
        make(rate)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (adam, {"b1": 1.0}),
        (adam, {"b2": -0.1}),
        (adam, {"decay": 0.0}),
        (adam, {"decay": 1.5}),
        (adam, {"eps": -1.0}),
        (sgd, {"momentum": 1.0}),
        (sgd, {"decay": 0.0}),
        (normalized, {"momentum": 1.0}),
        (normalized, {"momentum": -0.1}),
        (normalized, {"decay": 0.0}),
    ],
)
def test_absurd_options_are_refused(make: Any, options: dict[str, float]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}.*expected .*{name}"):
        make(0.3, **options)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_absurd_norms_are_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=r"norm is .*: it must be positive"):
        clip(norm)


@pytest.mark.parametrize("rates", [torch.ones(2), torch.ones(3, 1)])
@pytest.mark.parametrize("make", [adam, sgd, normalized])
def test_rates_for_other_pairs_are_refused(make: Any, rates: Tensor) -> None:
    with pytest.raises(ValueError, match=r"lr has shape .* for 3 pairs: give one rate, or one per pair"):
        make(rates).init(gradients(1)[0])


@pytest.mark.parametrize("value", [clip(1.0), chain(clip(1.0)), chain(), chain(clip(1.0), chain())], ids=repr)
def test_what_would_climb_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"only passes the gradient on.*: chain\(clip\(1.0\), adam\(0.3\)\)"):
        as_optimizer(value)


@pytest.mark.parametrize("value", [0.3, "adam", None, torch.optim.Adam, adam, torchopt.adam])
def test_what_is_no_optimizer_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer is \w+: expected one of fnreg.optim, such as adam\(0.3\)"):
        as_optimizer(value)
    with pytest.raises(TypeError, match=r"expected one of fnreg\.optim"):
        chain(clip(1.0), value)


def test_an_unknown_torchopt_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="torchopt has no optimizer 'adm': try adam, sgd"):
        Torchopt("adm")


def test_a_state_that_does_not_fit_the_step_is_refused() -> None:
    """torchopt would broadcast without a word."""
    narrow = {"a": torch.zeros(3, 1).double()}
    wide = {"a": torch.ones(3, 2).double()}
    state = adam(0.3).init(wide)
    with pytest.raises(ValueError, match=r"the state of Adam does not fit a step of shape \(3, 1\): it was made for"):
        adam(0.3).update(narrow, state, 0.0)
    with pytest.raises(ValueError, match=r"the state of Normalized does not fit a step of shape \(3, 1\)"):
        normalized(0.3).update(narrow, normalized(0.3).init(wide), 0.0)
    check_step(wide, adam(0.3).update(wide, state, 0.0)[0], "Adam")
    rms = Torchopt("rmsprop", (("lr", 0.1),))
    update, _ = rms.update(narrow, rms.init(wide), 0.0)
    with pytest.raises(ValueError, match="Torchopt gave an update that does not fit the step: its state was made for"):
        check_step(narrow, update, "Torchopt")


def test_any_value_with_the_methods_of_an_optimizer_is_one() -> None:
    class Sign:
        def init(self, step: Any) -> Any:
            return ()

        def update(self, gradient: Any, state: Any, progress: float) -> tuple[Any, Any]:
            return tree_map(lambda leaf: -leaf.sign() * (1 - progress), gradient), state

    mine = Sign()
    assert as_optimizer(mine) is mine
    assert as_optimizer(chain(clip(1.0), mine)) == Chain((clip(1.0), mine))


def test_torchopt_by_name_and_as_given_are_one() -> None:
    several = gradients(6)
    named = Torchopt("rmsprop", (("lr", 0.1), ("momentum", 0.5)))
    given_one = as_optimizer(torchopt.rmsprop(0.1, momentum=0.5))
    assert equal_bits(run(named, several), run(given_one, several))
    both = as_optimizer(torchopt.chain(torchopt.clip.clip_grad_norm(1e9), torchopt.sgd(0.3)))
    close(run(both, several), run(sgd(0.3), several), atol=1e-12)


def test_specs_are_values() -> None:
    assert adam(0.3) == adam(0.3) != adam(0.2)
    assert hash(chain(clip(1.0), adam(0.3))) == hash(chain(clip(1.0), adam(0.3)))
    assert repr(adam(0.3)) == "Adam(lr=0.3, b1=0.9, b2=0.999, eps=1e-12, decay=0.1, relative=0.0, pure=False)"
    assert optim.adam is adam


# -- what it is for ------------------------------------------------------------------------------------------------


def test_normalized_steps_bend_shapes_further_than_adam() -> None:
    """Most of these images is flat: there Adam moves voxels by what is rounding, at the cost of all others."""
    c, disc, left = c_shape(64, blur=1.5), circle(64, blur=1.5), []
    for optimizer in (normalized(0.5), adam(0.5)):
        transform = Diffeomorphism(gradient=2.0, smooth=0.5)
        result = register(c, disc, transform, optimizer=optimizer, levels=3, steps=60, padding="border")
        left.append(float(result.value))
        if optimizer == normalized(0.5):
            assert fields.folded_cells(result.mapping.displacement(), c.grid) == 0
    assert left[0] < 0.8 * left[1]
