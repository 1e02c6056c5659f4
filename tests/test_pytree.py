"""Pytree dataclasses, maps over them, and the rank rule."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from scenes import equal_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from fnreg import pytree
from fnreg.pytree import (
    batch_axes,
    batch_size,
    constant,
    is_concrete,
    is_transformed,
    over_batch,
    pytree_dataclass,
    same_structure,
    stack,
    static,
    tree_choose,
    tree_detach,
    tree_flatten,
    tree_known,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_take,
    tree_unflatten,
    tree_vmap,
    tree_where,
)


@pytree_dataclass
class Inner:
    name: str = static()
    value: Tensor


@pytree_dataclass
class Outer:
    first: Inner
    weight: Tensor | None = None
    size: tuple[int, ...] = static(default=(2,))

    def ranks(self) -> Outer:
        return tree_unflatten([1] if self.weight is None else [1, 0], tree_flatten(self)[1])


def outer(value: Any = (1.0, 2.0), weight: Any = 3.0, name: str = "a") -> Outer:
    return Outer(Inner(name, torch.tensor(value)), None if weight is None else torch.tensor(weight))


# -- the dataclass ---------------------------------------------------------------------------------------------


def test_leaves_are_the_fields_that_are_not_static() -> None:
    leaves, spec = tree_flatten(outer())
    assert [leaf.tolist() for leaf in leaves] == [[1.0, 2.0], 3.0]
    back = tree_unflatten(leaves, spec)
    assert isinstance(back, Outer) and isinstance(back.first, Inner)
    assert (back.first.name, back.size) == ("a", (2,))
    assert back.first.value is leaves[0] and back.weight is leaves[1]
    assert tree_paths(outer()) == ["first.value", "weight"]


def test_an_absent_field_is_no_leaf_but_structure() -> None:
    without = outer(weight=None)
    assert tree_paths(without) == ["first.value"]
    assert tree_map(lambda leaf: leaf + 1, without).weight is None
    assert not same_structure(without, outer())


def test_static_fields_are_structure() -> None:
    assert tree_flatten(outer(name="a"))[1] != tree_flatten(outer(name="b"))[1]
    assert not same_structure(outer(name="a"), outer(name="b"))
    assert same_structure(outer((1.0, 2.0)), outer((5.0, 6.0)))
    assert not same_structure(outer((1.0, 2.0)), outer((1.0, 2.0, 3.0)))


def test_none_is_a_leaf_of_plain_containers() -> None:
    assert same_structure((None, torch.zeros(2)), (None, torch.ones(2)))
    assert not same_structure((None, torch.zeros(2)), (torch.zeros(()), torch.ones(2)))
    assert not same_structure((None,), (torch.zeros(3),))
    assert len(tree_leaves((None, torch.zeros(2)))) == 1


def test_values_are_frozen_copied_and_pickled() -> None:
    value = outer()
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.weight = None  # type: ignore[misc]
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert same_structure(value, other)
        assert torch.equal(other.first.value, value.first.value)
        assert other.first.value is not value.first.value


def test_equality_is_identity() -> None:
    """Comparing tensors has no truth value, so two values are never asked to be equal by their leaves."""
    assert outer() != outer()
    assert len({outer(), outer()}) == 2


def test_a_class_keeps_its_own_repr() -> None:
    @pytree_dataclass
    class Named:
        value: Tensor

        def __repr__(self) -> str:
            return "Named()"

    assert repr(Named(torch.zeros(1))) == "Named()"
    assert repr(Inner("a", torch.tensor(1.0))) == "Inner(name='a', value=tensor(1.))"


def energy(tree: Outer) -> Tensor:
    assert tree.weight is not None and tree.first.name == "a"
    return tree.weight * tree.first.value.square().sum()


def test_torch_func_transforms_pass_through() -> None:
    tree = outer()
    slope = grad(energy)(tree)
    assert isinstance(slope, Outer) and slope.weight is not None
    assert slope.first.value.tolist() == [6.0, 12.0] and float(slope.weight) == 5.0
    for jacobian in (jacrev(energy)(tree), jacfwd(energy)(tree)):
        assert_close(jacobian.first.value, slope.first.value)
    tangent = tree_map(torch.ones_like, tree)
    assert float(jvp(energy, (tree,), (tangent,))[1]) == 23.0
    batch = stack([tree, outer((3.0, 4.0), 1.0)])
    assert vmap(energy)(batch).tolist() == [15.0, 25.0]
    assert vmap(grad(energy))(batch).first.value.tolist() == [[6.0, 12.0], [6.0, 8.0]]


# -- maps ------------------------------------------------------------------------------------------------------


def test_map_keeps_none_and_takes_several_trees() -> None:
    tree = {"a": torch.tensor([1.0]), "b": None}
    found = tree_map(lambda x, y: x + y, tree, {"a": torch.tensor([2.0]), "b": None})
    assert found["a"].item() == 3.0 and found["b"] is None


def test_where_chooses_per_item() -> None:
    yes, no = (torch.ones(3), torch.ones(3, 2, 2)), (torch.zeros(3), torch.zeros(3, 2, 2))
    vector, field = tree_where(torch.tensor([True, False, True]), yes, no)
    assert vector.tolist() == [1.0, 0.0, 1.0]
    assert field.sum((1, 2)).tolist() == [4.0, 0.0, 4.0]


def test_choosing_gives_the_same_and_copies_nothing_where_all_agree() -> None:
    yes, no = (torch.ones(3), torch.ones(3, 2)), (torch.zeros(3), torch.zeros(3, 2))
    for mask in itertools.product((False, True), repeat=3):
        found, expected = (choose(torch.tensor(mask), yes, no) for choose in (tree_choose, tree_where))
        assert equal_bits(found, expected)
        assert (found[0] is yes[0]) == all(mask) and (found[0] is no[0]) == (not any(mask))
    masks = torch.tensor([[True, True, True], [False, True, False]])
    assert equal_bits(
        *(vmap(lambda m, choose=choose: choose(m, yes, no))(masks) for choose in (tree_choose, tree_where))
    )


def test_choosing_can_be_traced() -> None:
    def choose(mask: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return tree_choose(mask, a, -a)

    mask, a = torch.tensor([True, True]), torch.tensor([1.0, 2.0])
    graph = make_fx(choose)(mask, a)
    assert graph(~mask, a).tolist() == [-1.0, -2.0]  # no value of the mask was built in
    with FakeTensorMode() as mode:
        assert choose(mode.from_tensor(mask), mode.from_tensor(a)).shape == (2,)


def test_take_indexes_batched_leaves_only() -> None:
    tree = outer([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 7.0)
    taken = tree_take(tree, torch.tensor([2, 0]), (0, None))
    assert taken.first.value.tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert taken.weight is tree.weight
    assert tree_take(stack([outer(), outer((8.0, 9.0))]), 1).first.value.tolist() == [8.0, 9.0]
    with pytest.raises(ValueError):
        tree_take(tree, 0, (0,))


def test_detach_drops_history() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    found = tree_detach((weight * 3, "name"))
    assert not found[0].requires_grad and found[0].item() == 6.0 and found[1] == "name"


def test_stack_adds_a_leading_axis() -> None:
    batch = stack([outer(), outer((3.0, 4.0), 5.0)])
    assert batch.first.value.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert batch.weight is not None and batch.weight.tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    "other", [outer(name="b"), outer(weight=None), outer((1.0, 2.0, 3.0))], ids=["static", "optional", "shape"]
)
def test_stack_names_the_item_that_differs(other: Outer) -> None:
    with pytest.raises(ValueError, match="item 2 differs from item 0 in structure"):
        stack([outer(), outer(), other])


def test_stack_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to stack"):
        stack([])


# -- the rank rule ---------------------------------------------------------------------------------------------


def test_one_rank_more_is_a_batch_axis() -> None:
    alone = outer()
    assert batch_axes("pair", alone, alone.ranks()) == ((None, None), {})
    mixed = outer((1.0, 2.0), [1.0, 2.0, 3.0])
    assert batch_axes("pair", mixed, mixed.ranks()) == ((None, 0), {"pair.weight": 3})
    assert batch_axes("points", torch.zeros(5, 4, 2), 2) == ((0,), {"points": 5})


def test_a_plain_number_or_none_is_shared() -> None:
    assert batch_axes("options", (2.0, None), (0, 0)) == ((None, None), {})


@pytest.mark.parametrize(("shape", "name"), [((), "pair.first.value"), ((2, 3, 4), "pair.first.value")])
def test_another_rank_is_an_error_that_names_the_leaf(shape: tuple[int, ...], name: str) -> None:
    tree = Outer(Inner("a", torch.zeros(shape)))
    with pytest.raises(ValueError, match=name) as caught:
        batch_axes("pair", tree, tree.ranks())
    assert str(shape) in str(caught.value)
    assert "expected 1 axes for one pair, or 2 with a leading batch axis" in str(caught.value)


def test_a_bare_tensor_is_named_without_a_path() -> None:
    with pytest.raises(ValueError, match=r"^points has shape \(3,\)"):
        batch_axes("points", torch.zeros(3), 2)


def test_batch_sizes_agree() -> None:
    assert batch_size({}) is None
    assert batch_size({"fixed.data": 4, "moving.data": 4}) == 4
    with pytest.raises(ValueError, match=r"fixed\.data: 4, moving\.data: 5"):
        batch_size({"fixed.data": 4, "moving.data": 5})


def test_over_batch_calls_directly_or_under_vmap() -> None:
    seen: list[int] = []

    def function(tree: Outer, points: Tensor) -> Tensor:
        assert tree.weight is not None
        seen.append(tree.weight.ndim + points.ndim)
        return tree.weight * points.sum()

    points, ranks = torch.tensor([1.0, 2.0]), outer().ranks()
    assert float(over_batch(function, tree=(outer(), ranks), points=(points, 1))) == 9.0
    many = outer((1.0, 2.0), [1.0, 2.0])
    assert over_batch(function, tree=(many, ranks), points=(points, 1)).tolist() == [3.0, 6.0]
    assert over_batch(function, tree=(outer(), ranks), points=(torch.eye(2), 1)).tolist() == [3.0, 3.0]
    assert over_batch(function, tree=(many, ranks), points=(torch.eye(2), 1)).tolist() == [1.0, 2.0]
    assert seen == [1] * 4
    with pytest.raises(ValueError, match="leading batch axes differ"):
        over_batch(function, tree=(many, ranks), points=(torch.ones(3, 2), 1))


def test_vmap_takes_the_axes_of_each_tree() -> None:
    tree = outer([[1.0, 2.0], [3.0, 4.0]], 2.0)
    found = tree_vmap(lambda a, b: energy(a) + b, [(0, None), (None,)], tree, torch.tensor(1.0))
    assert found.tolist() == [11.0, 51.0]
    assert tree_vmap(energy, [None], stack([outer(), outer()])).tolist() == [15.0, 15.0]


# -- what can be looked at -------------------------------------------------------------------------------------


def test_concrete_is_everything_but_a_batch_and_meta() -> None:
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def function(x: Tensor) -> Tensor:
            seen[name] = is_concrete(x)
            return x.square().sum()

        return function

    x = torch.ones(2)
    assert is_concrete(x) and is_concrete(x.clone().requires_grad_())
    assert not is_concrete(torch.empty(2, device="meta"))
    grad(look("grad"))(x)
    jvp(look("jvp"), (x,), (x,))
    vmap(look("vmap"))(torch.ones(3, 2))
    vmap(grad(look("vmap of grad")))(torch.ones(3, 2))
    grad(lambda y: vmap(look("grad of vmap"))(y).sum())(torch.ones(3, 2))
    assert seen == {"grad": True, "jvp": True, "vmap": False, "vmap of grad": False, "grad of vmap": False}


def test_transformed_is_inside_any_transform() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_transformed({"a": torch.zeros(1), "b": (None, x)}))
        return x.sum()

    assert not is_transformed(torch.ones(2), None)
    grad(function)(torch.ones(2))
    vmap(function)(torch.ones(3, 2))
    assert seen == [True, True]


# -- constants -------------------------------------------------------------------------------------------------


def test_constants_are_built_once_and_plain_whoever_asks_first() -> None:
    built: list[int] = []

    @constant
    def count(n: int) -> Tensor:
        """How many."""
        built.append(n)
        return torch.arange(n, dtype=torch.float64)

    def total(n: int) -> Any:
        return lambda x: (x * count(n)).sum()

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float64)

    grad(total(3))(ones(3))
    vmap(grad(total(4)))(ones(2, 4))
    jvp(total(5), (ones(5),), (ones(5),))
    with torch.inference_mode():
        count(6)
    for n in (3, 4, 5, 6):
        value = count(n)
        assert is_concrete(value) and not is_transformed(value) and not value.is_inference()
        assert value.data_ptr() != 0  # a wrapper that outlives its transform has no storage
        assert value is count(n)
        assert_close(grad(total(n))(ones(n)), value)
    assert built == [3, 4, 5, 6]
    assert count.__doc__ == "How many."


def test_threads_share_constants_that_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytree, "CONSTANT_BYTES", 40)  # so that nearly every one drives another one out
    interval = sys.getswitchinterval()

    @constant
    def count(n: int) -> Tensor:
        return torch.full((1,), n)

    def ask(first: int) -> bool:
        return all(int(count((first + k) % 7)) == (first + k) % 7 for k in range(3000))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_constants_can_be_compiled() -> None:
    @constant
    def count(n: int) -> Tensor:
        return torch.arange(n)

    found = torch.compile(lambda x: x * count(3), backend="eager", fullgraph=True)(torch.ones(3))
    assert found.tolist() == [0.0, 1.0, 2.0]


def test_what_is_not_known_is_nan_or_zero() -> None:
    tree = {"a": torch.ones(3, 2), "b": torch.ones(3, dtype=torch.bool), "c": torch.full((3, 1), 7), "d": None}
    found = tree_known(torch.tensor([True, False, True]), tree)
    assert torch.equal(found["a"].isnan().any(1), torch.tensor([False, True, False]))
    assert float(found["a"].nansum()) == 4 and found["d"] is None
    assert found["b"].tolist() == [True, False, True] and found["c"].tolist() == [[7], [0], [7]]
