"""Functions that look at values, called where these cannot be looked at: inside vmap, grad and other transforms.

A registration that stops when it has converged depends on values.  Written by the rank rule it takes a batch as it is,
so a batch axis of vmap can become its own, and the transform is left before the function is called.  Derivatives end
here: what comes out is constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnreg.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:  # no tuple, which torch.func would take apart and build anew
    """A function of tensors of these ranks; size : of its batch axis, 1 without; found : its result's structure."""

    function: Callable[[tuple[Tensor, ...]], Any]
    ranks: tuple[int, ...]
    size: int
    found: list[Any]


def concretely(function: Callable[[Any], Any], tree: Any, ranks: Any) -> Any:
    """function(tree), called with plain tensors whatever transforms are around, as a constant.

    function : by the rank rule; its result is a tree of tensors all of which have a leading batch axis, of 1 for one
        pair.  Under vmap it sees a batch
    ranks : the same structure with the rank that each leaf has for one pair
    """
    leaves, structure = tree_flatten(tree_map(Tensor.detach, tree))
    known = tuple(tree_flatten(ranks)[0])
    sizes = [len(leaf) for leaf, rank in zip(leaves, known, strict=True) if leaf is not None and leaf.ndim > rank]
    places = [n for n, leaf in enumerate(leaves) if leaf is not None]

    def of_tensors(tensors: tuple[Tensor, ...]) -> Any:
        filled: list[Any] = [None] * len(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(tree_unflatten(filled, structure))

    call = _Call(of_tensors, tuple(known[n] for n in places), sizes[0] if sizes else 1, [])
    found = _Concrete.apply(call, *(leaves[n] for n in places))  # type: ignore[no-untyped-call]
    return tree_unflatten(list(found), call.found[0])


class _Concrete(torch.autograd.Function):
    """The call, with batch axes of vmap folded into the function's own."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = call.function(tuple(tensor.detach() for tensor in tensors))
        call.found[:] = [tree_flatten(made)[1]]
        return tuple(leaf.clone() for leaf in tree_leaves(made))  # none of them is an input

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        return (None,) * (1 + len(cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError  # the inputs are detached

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call, *tensors = args
        width, size = info.batch_size, call.size
        folded: list[Tensor] = []
        alone = all(
            tensor.ndim - (dim is not None) == rank
            for tensor, dim, rank in zip(tensors, in_dims[1:], call.ranks, strict=True)
        )
        for tensor, dim, rank in zip(tensors, in_dims[1:], call.ranks, strict=True):
            shared = tensor.ndim - (dim is not None) == rank
            if dim is None and shared:
                folded.append(tensor)
                continue
            wide = tensor.expand(width, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            if not alone:
                wide = wide.unsqueeze(1).expand(width, size, *wide.shape[1:]) if shared else wide
                wide = wide.flatten(0, 1)
            folded.append(wide)
        found = _Concrete.apply(dataclasses.replace(call, size=width * size), *folded)  # type: ignore[no-untyped-call]
        return tuple(leaf.unflatten(0, (width, size)) for leaf in found), (0,) * len(found)
