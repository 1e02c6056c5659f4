"""Values with tensor leaves: pytree dataclasses, maps over them, and the rank rule.

This is the only module that touches private names of torch.  A pytree dataclass is frozen; its fields are
tensors (or pytrees of tensors) unless marked `static()`.  Static fields must be hashable and comparable:
they are part of the tree's structure, so two values with different static fields never share a batch.
An optional field that is None is no leaf at all.

The rank rule: the rank of every leaf of one pair is known; a leaf with one rank more carries a leading
batch axis.  `batch_axes` reads this off and gives the `in_dims` of `torch.func.vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import optree
import torch
from torch import Tensor
from torch._functorch import vmap as _functorch_vmap
from torch.autograd.forward_ad import unpack_dual
from torch.utils import _python_dispatch
from torch.utils import _pytree as _torch_pytree

CONSTANT_BYTES = 2**27
T = TypeVar("T")
Axes = tuple[int | None, ...]  # per leaf: 0 for a leading batch axis, None for a shared leaf

NAMESPACE = "fnreg"
_torch_vmap: Any = _functorch_vmap

# A tree is taken apart dozens of times per step of a solver: optree, which torchopt brings along, does it in C++.
# The keys of a dict are in sorted order there.


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves in order, None among them, and the structure."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)  # type: ignore[return-value]


def tree_unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The tree of a structure with these leaves."""
    return optree.tree_unflatten(structure, leaves)


def static(**options: Any) -> Any:
    """A dataclass field that belongs to the structure of the tree, not to its leaves."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and register it for torch's pytree functions and for optree.

    Unflattening does not run `__init__`: transformed leaves (batched, traced, plain numbers) pass unchecked.
    """
    made = dataclasses.dataclass(frozen=True, eq=False, repr="__repr__" not in cls.__dict__)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    statics = tuple(f.name for f in fields if f.metadata.get("static"))
    dynamics = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(value: Any) -> tuple[list[Any], Any]:
        present = tuple(name for name in dynamics if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], (
            present,
            tuple(getattr(value, n) for n in statics),
        )

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        leaves, context = flatten(value)
        keyed = [(_torch_pytree.GetAttrKey(n), leaf) for n, leaf in zip(context[0], leaves, strict=True)]
        return keyed, context

    def unflatten(leaves: Any, context: Any) -> Any:
        value = object.__new__(made)
        for name in dynamics:
            object.__setattr__(value, name, None)
        for name, item in (*zip(context[0], leaves, strict=True), *zip(statics, context[1], strict=True)):
            object.__setattr__(value, name, item)
        return value

    _torch_pytree.register_pytree_node(
        made,
        flatten,
        unflatten,
        serialized_type_name=f"{made.__module__}.{made.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )

    def flatten_with_names(value: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
        leaves, context = flatten(value)
        return leaves, context, context[0]

    optree.register_pytree_node(
        made,  # type: ignore[arg-type]
        flatten_with_names,
        lambda context, leaves: unflatten(leaves, context),
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )
    return made


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves that are not None, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if leaf is not None]


def tree_map(function: Callable[..., Any], tree: T, *others: Any) -> T:
    """Apply `function` to the leaves of trees of one structure; None stays None."""

    def apply(leaf: Any, *rest: Any) -> Any:
        return None if leaf is None else function(leaf, *rest)

    return optree.tree_map(apply, tree, *others, none_is_leaf=True, namespace=NAMESPACE)  # type: ignore[return-value]


def tree_where(mask: Tensor, yes: T, no: T) -> T:
    """Per item of the leading axis: the leaves of `yes` where `mask` (B,) holds, else those of `no`."""
    return tree_map(lambda a, b: torch.where(beside(mask, a), a, b), yes, no)


def tree_scale(tree: T, factor: float | Tensor) -> T:
    """The leaves times a number, or times one for each item of the leading axis, (B,)."""
    if isinstance(factor, Tensor) and factor.ndim:
        return tree_map(lambda leaf: leaf * beside(factor.to(leaf.dtype), leaf), tree)
    return tree_map(lambda leaf: leaf * factor, tree)


def beside(values: Tensor, leaf: Tensor) -> Tensor:
    """One value for each item (B,) in as many axes as the leaf (B, ...)."""
    return values.reshape(-1, *(1,) * (leaf.ndim - 1))


def tree_known(known: Tensor, tree: T) -> T:
    """Per item of the leading axis: the leaves where it is known (B,), else NaN, or 0 and False, which have none."""

    def lost(leaf: Tensor) -> Tensor:
        return torch.full_like(leaf, torch.nan) if leaf.is_floating_point() else torch.zeros_like(leaf)

    return tree_where(known, tree, tree_map(lost, tree))


def tree_choose(mask: Tensor, yes: T, no: T) -> T:
    """`tree_where` for loops: where all items agree, and to look costs nothing, one of the two as it stands.

    So the result may share its memory with an argument: nobody may write into it.
    """
    if not _is_traced() and mask.device.type == "cpu" and is_concrete(mask):
        if bool(mask.all()):
            return yes
        if not bool(mask.any()):
            return no
    return tree_where(mask, yes, no)


def _is_traced() -> bool:
    """Whether operations are recorded rather than done: then values must not be looked at."""
    return torch.compiler.is_compiling() or bool(_python_dispatch._get_current_dispatch_mode_stack())  # pyright: ignore[reportPrivateUsage]


def tree_take(tree: T, index: Any, axes: Axes | None = None) -> T:
    """Index the leading axis of all leaves, or of those whose entry in `axes` is 0; shared leaves are kept."""
    leaves, spec = tree_flatten(tree)
    which = (0,) * len(leaves) if axes is None else axes
    taken = [leaf if axis is None or leaf is None else leaf[index] for leaf, axis in zip(leaves, which, strict=True)]
    return tree_unflatten(taken, spec)


def in_parts(look: Callable[[slice], Any], size: int, width: int | None) -> Any:
    """`look(part)` of all pairs, of no more than `width` at a time, put together along the leading axis."""
    if width is None or size <= width:
        return look(slice(0, size))
    found = [look(slice(start, start + width)) for start in range(0, size, width)]
    return tree_map(lambda *leaves: torch.cat(leaves), found[0], *found[1:])


def first_pair(tree: T, ranks: T) -> T:
    """The first pair of a batch: leaves of one rank more than `ranks` lose their leading axis, shared ones stay."""
    leaves, spec = tree_flatten(tree)
    pairs = zip(leaves, tree_flatten(ranks)[0], strict=True)
    return tree_unflatten([leaf[0] if leaf.ndim > rank else leaf for leaf, rank in pairs], spec)


def tree_detach(tree: T) -> T:
    """The same values without their history."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def tree_paths(tree: Any) -> list[str]:
    """A readable name for each leaf, such as `grid.spacing`."""
    accessors = optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [accessor.codify("").lstrip(".") for accessor in accessors]


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and leaves of one shape."""
    leaves_a, spec_a = tree_flatten(a)
    leaves_b, spec_b = tree_flatten(b)
    return spec_a == spec_b and all(_shape(x) == _shape(y) for x, y in zip(leaves_a, leaves_b, strict=True))


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """None for a leaf that is None; a plain number counts as a tensor of rank 0."""
    return None if leaf is None else tuple(getattr(leaf, "shape", ()))


def batch_axes(name: str, tree: T, ranks: T) -> tuple[Axes, dict[str, int]]:
    """Read a batch off the ranks of the leaves.

    name : what the tree is called in errors
    tree : the leaves
    ranks : the same structure with the rank that each leaf has for one pair

    Returns, per leaf, 0 where it has a leading batch axis and None where it is shared, and the sizes of the batch
    axes by leaf name.  Raises ValueError where a rank is neither.
    """
    leaves = tree_flatten(tree)[0]
    axes: list[int | None] = []
    sizes: dict[str, int] = {}
    for path, leaf, rank in zip(tree_paths(tree), leaves, tree_flatten(ranks)[0], strict=True):
        told = f"{name}.{path}" if path else name
        batched = isinstance(leaf, Tensor) and leaf.ndim == rank + 1
        if isinstance(leaf, Tensor) and not batched and leaf.ndim != rank:
            raise ValueError(
                f"{told} has shape {tuple(leaf.shape)}: expected {rank} axes for one pair, "
                f"or {rank + 1} with a leading batch axis"
            )
        axes.append(0 if batched else None)
        if batched:
            sizes[told] = int(leaf.shape[0])
    return tuple(axes), sizes


def batch_size(sizes: dict[str, int]) -> int | None:
    """The one size of all batch axes; None without any.  Raises ValueError where they differ."""
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"leading batch axes differ ({told}): give every batched leaf the same length")
    return next(iter(sizes.values()), None)


def over_batch(function: Callable[..., Any], **arguments: tuple[Any, Any]) -> Any:
    """Call `function` on trees by the rank rule: directly for one pair, under vmap where a leaf has a batch axis.

    arguments : name = (tree, ranks); positional for `function` in this order, the names appear in errors
    """
    axes: list[Axes] = []
    sizes: dict[str, int] = {}
    for name, (tree, ranks) in arguments.items():
        found, more = batch_axes(name, tree, ranks)
        axes.append(found)
        sizes |= more
    trees = [tree for tree, _ in arguments.values()]
    return function(*trees) if batch_size(sizes) is None else tree_vmap(function, axes, *trees)


_ONE = threading.local()  # whether a batch of one is called directly


def is_alone(tensor: Tensor) -> bool:
    """Whether values can be looked at and are of no batch, not even of one: then a fault is an error, not a mark."""
    return is_concrete(tensor) and not getattr(_ONE, "batch", False)


def tree_vmap(function: Callable[..., Any], axes: Sequence[Axes | None], *trees: Any) -> Any:
    """`torch.func.vmap` over trees with the axes of each, as `batch_axes` gives them; None means all leaves batched.

    A batch of one is called directly, which spares the overhead of vmap.
    """
    flat = [tree_flatten(tree) for tree in trees]
    dims = [(0,) * len(leaves) if a is None else a for (leaves, _), a in zip(flat, axes, strict=True)]
    paired = [list(zip(leaves, d, strict=True)) for (leaves, _), d in zip(flat, dims, strict=True)]
    sizes = {leaf.shape[0] for pairs in paired for leaf, axis in pairs if axis == 0}
    if sizes == {1}:
        ones = [tree_take(tree, 0, d) for tree, d in zip(trees, dims, strict=True)]
        outside, _ONE.batch = getattr(_ONE, "batch", False), True
        try:
            found = function(*ones)
        finally:
            _ONE.batch = outside
        return tree_map(lambda leaf: leaf.unsqueeze(0), found)
    if len(sizes) != 1:
        raise ValueError(f"expected batch axes of one length, got {sorted(sizes) or 'none'}")
    # As `torch.func.vmap` without its care for nested in_dims and out_dims, which takes longer than a small function.
    (size,) = sizes
    _torch_vmap.lazy_load_decompositions()
    with _torch_vmap.vmap_increment_nesting(size, "error") as level:

        def enter(leaf: Any, axis: int | None) -> Any:
            return leaf if axis is None else _torch_vmap._add_batch_dim(leaf, axis, level)

        inside = [[enter(leaf, axis) for leaf, axis in pairs] for pairs in paired]
        found = function(*(tree_unflatten(leaves, spec) for leaves, (_, spec) in zip(inside, flat, strict=True)))
        return tree_map(lambda leaf: _torch_vmap._remove_batch_dim(leaf, level, size, 0), found)


def stack(items: Sequence[T]) -> T:
    """Stack trees of one structure along a new leading axis, leaf by leaf."""
    if not items:
        raise ValueError("nothing to stack: give at least one item")
    for number, item in enumerate(items):
        if not same_structure(items[0], item):
            raise ValueError(f"item {number} differs from item 0 in structure (size, channels or optional fields)")
    return tree_map(lambda *leaves: torch.stack(leaves), items[0], *items[1:])


def beside_transforms() -> Any:
    """A context in which no transform of torch.func is around: what is made in it has memory of its own."""
    return torch._C._DisableFuncTorch()  # type: ignore[attr-defined]


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of hashable arguments that builds a tensor: the newest, up to `CONSTANT_BYTES` of each function.

    The last one made stays whatever its size.  Threads may ask at once; one tensor may then be made twice.  What is
    cached is a plain tensor, whichever transform or mode asks first: built inside `grad` it would be a wrapper without
    storage for ever, built in inference mode it could not be differentiated.  Such a function names the device of what
    it makes: the default one may be another when it is asked again.
    """

    kept: dict[Any, Tensor] = {}  # oldest first
    lock = threading.Lock()

    @functools.wraps(function)
    def cached(*arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return function(*arguments)
        found = kept.get(arguments)
        if found is not None:
            return found
        with torch.inference_mode(False), beside_transforms():
            made = function(*arguments)
        with lock:
            kept[arguments] = made
            while len(kept) > 1 and sum(value.nbytes for value in kept.values()) > CONSTANT_BYTES:
                del kept[next(iter(kept))]
        return made

    return cached


def is_concrete(tensor: Tensor) -> bool:
    """Whether the values can be looked at, which is not so inside vmap."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not tensor.is_meta


def forward_levels() -> int:
    """How many forward-mode transforms of torch.func are around this call."""
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters  # loads slowly

    return sum(level.key().name == "Jvp" for level in retrieve_all_functorch_interpreters())


def forward_asked() -> bool:
    """Whether a forward derivative is being taken, by torch.func or by torch's own dual numbers."""
    return torch.autograd.forward_ad._current_level >= 0 or forward_levels() > 0  # pyright: ignore[reportPrivateUsage]


def leading(tensor: Tensor, dim: int | None) -> int:
    """The length of the leading axis below that of vmap, which lies at `dim`."""
    return len(tensor) if dim is None else tensor.movedim(dim, 0).shape[1]


def fold(size: int, dim: int | None, tensor: Tensor | None, lead: int, *, shared: bool = False) -> Any:
    """A batch axis of vmap folded into the leading one of length `lead`, for the `vmap` of a Function.

    shared : what has no batch axis and a leading one of 1 stays so
    """
    if tensor is None or (shared and dim is None and len(tensor) == 1):
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.expand(size, lead, *tensor.shape[2:]).flatten(0, 1)


def is_stored(*tensors: Tensor) -> bool:
    """Whether the tensors have memory of their own."""
    try:
        return all(t.data_ptr() or not t.numel() for t in tensors)
    except RuntimeError:  # no storage: batched by autograd itself, which asks for no vmap rule
        return False


def is_transformed(*trees: Any) -> bool:
    """Whether a leaf is inside a torch.func transform."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return any(isinstance(leaf, Tensor) and functorch.is_functorch_wrapped_tensor(leaf) for leaf in tree_leaves(trees))


def is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd or a transform of torch.func takes derivatives by it, whatever else is around."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while not tensor.requires_grad and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_followed(tensor: Tensor) -> bool:
    """Whether it depends on what a derivative is taken by, in reverse or forward, or has a batch axis of vmap."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while True:
        batched = functorch.is_functorch_wrapped_tensor(tensor) and functorch.is_batchedtensor(tensor)
        if tensor.requires_grad or batched or (forward_asked() and unpack_dual(tensor).tangent is not None):
            return True
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)


def is_tracked(*trees: Any) -> bool:
    """Whether a torch.func transform is around this call, or autograd records a leaf: then only torch may compute."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    if functorch.peek_interpreter_stack() is not None:
        return True
    recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(trees))
    return recorded or is_transformed(*trees)
