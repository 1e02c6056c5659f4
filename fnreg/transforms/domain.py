"""The domain of a transform: a grid, or for one of several parts a tuple with a domain for each."""

from __future__ import annotations

from typing import Any

from fnreg.grid import Grid
from fnreg.pytree import Axes, batch_axes, first_pair, is_concrete, tree_leaves

Domain = Any


def first_domain(domain: Domain) -> Grid:
    """The grid itself, or the first of the parts' domains."""
    return domain if isinstance(domain, Grid) else first_domain(domain[0])


def domain_ranks(domain: Domain) -> Any:
    """The rank that each leaf of a domain has for one pair."""
    return domain.ranks() if isinstance(domain, Grid) else tuple(domain_ranks(part) for part in domain)


def domain_axes(domain: Domain) -> Axes:
    """Per leaf of a domain, 0 where it has a batch axis and None where it is shared."""
    return batch_axes("domain", domain, domain_ranks(domain))[0]


def single(domain: Domain) -> Domain:
    """One pair's domain of a batch: its structure and shapes matter here, not its values."""
    return first_pair(domain, domain_ranks(domain))


def same_extent(a: Grid, b: Grid) -> bool:
    """Whether two grids are levels over one place; taken for granted where values cannot be looked at."""
    return a is b or not (_known(a) and _known(b)) or a.resize(b.size).same_as(b)


def _known(grid: Grid) -> bool:
    """Whether it is one grid whose values can be looked at."""
    ranks = zip(tree_leaves(grid), tree_leaves(grid.ranks()), strict=True)
    return all(is_concrete(leaf) and leaf.ndim == rank for leaf, rank in ranks)


def same_place(a: Grid, b: Grid) -> bool:
    """Whether two grids are one: values are not compared, so that this can be asked under vmap."""
    return a is b or (a.size == b.size and all(x is y for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)))
