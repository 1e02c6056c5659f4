"""Where a registration starts: parameters of the identity, of a given or earlier map, of aligned centres, or many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Inputs, check_device, check_dimension
from fnreg.pytree import over_batch, tree_detach, tree_flatten, tree_leaves, tree_map, tree_paths
from fnreg.transforms.base import Mapping, Params, Transform
from fnreg.transforms.domain import single
from fnreg.transforms.held import Held
from fnreg.transforms.linear import Linear, Translation

Start = Literal["header", "center", "moments", "auto"]
STARTS: tuple[Start, ...] = ("header", "center", "moments", "auto")


def expand(params: Params, ranks: Any, size: int) -> Params:
    return tree_map(lambda leaf, rank: leaf.expand(size, *leaf.shape) if leaf.ndim == rank else leaf, params, ranks)


def initial_ranks(initial: Any, transform: Transform, domain: Grid) -> Any:
    """The rank of each leaf of start parameters or of a start mapping; ValueError where they do not fit."""
    if isinstance(initial, Mapping):
        check_dimension("initial", initial, domain)
        if family(transform) is None:
            raise ValueError(f"initial is a Mapping but {transform} is not linear: pass it as then, or give parameters")
        check_device("initial", initial, domain)
        return initial.ranks()
    check_shapes("initial", initial, transform, domain)
    return transform.ranks(domain)


def check_shapes(name: str, params: Any, transform: Transform, domain: Grid) -> None:
    """Parameters of the structure and trailing shapes that `init` gives; leading axes may come before."""
    pattern = transform.init(single(domain))
    if tree_flatten(params)[1] != tree_flatten(pattern)[1]:
        verb = "does" if name == "initial" else "do"
        expected, given = (tree_map(lambda leaf: tuple(getattr(leaf, "shape", ())), tree) for tree in (pattern, params))
        raise ValueError(
            f"{name} {verb} not fit {transform}: expected the structure of {transform}.init(domain), shapes {expected} "
            f"at the end, not {given}"
        )
    for path, leaf, like in zip(tree_paths(pattern), tree_leaves(params), tree_leaves(pattern), strict=True):
        shape = tuple(getattr(leaf, "shape", ()))
        if not isinstance(leaf, Tensor) or shape[len(shape) - like.ndim :] != tuple(like.shape):
            raise ValueError(f"{name}: {path} has shape {shape}, expected {tuple(like.shape)} at its end")
    check_device(name, params, domain)


def starts_ranks(starts: Any, transform: Transform, domain: Grid) -> Any:
    """The rank of each leaf of several start parameters for one pair; ValueError where they do not fit."""
    check_shapes("starts", starts, transform, domain)
    ranks = transform.ranks(domain)
    for leaf, rank in zip(tree_leaves(starts), tree_leaves(ranks), strict=True):
        if leaf.ndim not in (rank + 1, rank + 2):
            raise ValueError(f"starts have shape {tuple(leaf.shape)}: expected an axis of starts before {rank} axes")
    return tree_map(lambda rank: rank + 1, ranks)


def start_trees(initial: Any, starts: Any, transform: Transform, domain: Grid) -> Iterator[tuple[str, Any, Any]]:
    """Of what says where to begin, as far as it is given, the name, the tree and the rank of each leaf for one pair."""
    if initial is not None:
        yield "initial", initial, initial_ranks(initial, transform, domain)
    if starts is not None:
        yield "starts", starts, starts_ranks(starts, transform, domain)


def begin(
    whole: Inputs,
    transform: Transform,
    size: int,
    previous: tuple[Mapping, Mapping | None] | None,
    initial: Any,
    start: Start,
) -> tuple[Params, Mapping | None]:
    """Start parameters (B, ...) and the map that acts after.

    previous : the map of the stage before and what acts after that; a transform that can hold the map goes on from
        it, for any other the map acts after the new one
    """
    domain = whole.domain
    ranks = transform.ranks(domain)
    if previous is not None:
        before, after = previous
        identity = over_batch(transform.init, domain=(domain, domain.ranks()))
        if holds(transform, before.transform):
            if "matrix" not in ranks:  # the parts that both have are the same parameters
                return expand(identity, ranks, size) | before.params, after
            return fit(transform, before, domain, size), after
        return expand(identity, ranks, size), before if after is None else after @ before
    then = whole.then
    if isinstance(initial, Mapping):
        return fit(transform, initial, domain, size), then
    if initial is not None:
        initial = tree_map(lambda leaf: leaf.to(torch.float64), initial if whole.wrapped else tree_detach(initial))
        return expand(initial, ranks, size), then
    if start == "header":
        identity = over_batch(transform.init, domain=(domain, domain.ranks()))
        return expand(identity, ranks, size), then
    able = family(transform)
    if able is None or not able.translates:
        raise ValueError(
            f"start={start!r} needs a transform that can shift; {transform} cannot: run Translation() first"
        )
    shift = over_batch(
        _center_shift if start == "center" else _moment_shift,
        fixed=masked(whole.fixed[0], whole.fixed_masks[0]),
        moving=masked(whole.moving[0], whole.moving_masks[0]),
    )
    shift = shift.expand(size, domain.ndim)
    moved = Mapping({"translation": shift}, domain, Translation())
    return fit(transform, moved, domain, size), then


def masked(image: Image, mask: Tensor | None) -> tuple[Subject, Subject]:
    found = Subject(image, mask)
    return found, found.ranks()


def _center_shift(fixed: Subject, moving: Subject) -> Tensor:
    return moving.image.grid.center - fixed.image.grid.center


def _moment_shift(fixed: Subject, moving: Subject) -> Tensor:
    return center_of_mass(moving) - center_of_mass(fixed)


def center_of_mass(known: Subject) -> Tensor:
    """World centre of the intensities above their minimum, by the mask; the grid's centre for a constant image."""
    grid, mass = known.image.grid, mass_of(known)
    total = mass.sum()
    found = (mass / torch.where(total > 0, total, 1)) @ grid.points()
    return torch.where(total > 0, found, grid.center)


def mass_of(known: Subject) -> Tensor:
    """Intensities above their minimum times the mask (N,), float64; what is not finite counts as 0."""
    # Very large numbers in its place would add up to infinity, whose moments have no eigenvectors.
    mass = torch.nan_to_num(known.image.data.to(torch.float64).sum(0).reshape(-1), nan=0.0, posinf=0.0, neginf=0.0)
    mass = mass - mass.min()
    return mass if known.mask is None else mass * known.mask.reshape(-1)


def family(transform: Transform) -> Linear | None:
    """The linear family whose parameters a transform has; None for any other transform."""
    if isinstance(transform, Held):
        return family(transform.transform)
    return transform if isinstance(transform, Linear) else None


def holds(transform: Transform, other: Transform) -> bool:
    """Whether a linear family holds every map of another transform."""
    whole, part = family(transform), family(other)
    if whole is None:
        return False
    if "matrix" in whole.parts:
        return other.linear
    return part is not None and set(part.parts) <= set(whole.parts) and (whole.translates or not part.translates)


def fit(transform: Transform, mapping: Mapping, domain: Grid, size: int) -> Params:
    """Parameters (B, ...) of a linear family for a linear map."""
    whole = family(transform)
    assert whole is not None
    fitted = over_batch(
        lambda m, d: whole.fit(m.transform.matrix(m.params, m.domain), d),
        mapping=(mapping, mapping.ranks()),
        domain=(domain, domain.ranks()),
    )
    return expand(fitted, transform.ranks(domain), size)


def spread(starts: Params, transform: Transform, domain: Grid, size: int) -> tuple[Params, int]:
    """Starts (S, ...) or (B, S, ...) as a batch (B S, ...), pair after pair, and S."""
    ranks = transform.ranks(domain)
    each = zip(tree_leaves(starts), tree_leaves(ranks), strict=True)
    widths = {int(leaf.shape[-rank - 1]) for leaf, rank in each}
    if len(widths) != 1:
        raise ValueError(f"starts have different lengths {sorted(widths)}: give every parameter as many")
    width = widths.pop()
    flat = tree_map(
        lambda leaf, rank: leaf.expand(size, *leaf.shape[-rank - 1 :]).reshape(
            size * width, *leaf.shape[leaf.ndim - rank :]
        ),
        starts,
        ranks,
    )
    return flat, width
