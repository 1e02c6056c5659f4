"""Where a registration from files begins: the start that a file gives, and how good it is before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import io
from fnreg.gather import Padding
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.io.files import TransformReadError
from fnreg.pytree import over_batch, tree_leaves, tree_map
from fnreg.registration import evaluate
from fnreg.settings import SEARCHED, STARTS
from fnreg.stages import Stage
from fnreg.starts import STARTS as OF_REGISTER
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.domain import first_domain
from fnreg.transforms.linear import linear_mapping


class Begin(NamedTuple):
    """Where a registration starts."""

    initial: Any = None  # parameters of the first stage, or for a linear one a linear mapping
    then: Mapping | None = None  # what acts after a first stage that is not linear

    def mapping(self, first: Transform, grid: Grid) -> Mapping:
        """The whole map, of one pair or of a batch."""
        if isinstance(self.initial, Mapping):
            return self.initial
        begun = _identity(first, grid) if self.initial is None else Mapping(self.initial, grid, first)
        return begun if self.then is None else self.then @ begun


def begin_from_file(start: str, first: Transform, grid: Grid) -> Begin | None:
    """The start that a file gives: a linear map, or what an earlier run of the same transform has written; None where
    `start` is none of a file.

    Raises TransformReadError, MissingExtraError.
    """
    if start in STARTS:
        return None
    read = io.read_transform(start)
    if first_domain(read.domain).ndim != grid.ndim:
        raise TransformReadError(f"{start} is a map of other axes: expected one map of {grid.ndim} axes")
    if any(leaf.ndim != rank for leaf, rank in zip(tree_leaves(read), tree_leaves(read.ranks()), strict=True)):
        raise TransformReadError(f"{start} holds a batch: expected one map of {grid.ndim} axes")
    found = tree_map(lambda leaf: leaf.to(grid.center.device), read)
    if found.transform.linear:
        matrix = linear_mapping(found.matrix(), grid)
        return Begin(initial=matrix) if first.linear else Begin(then=matrix)
    dense, *after = found.parts()
    fits = dense.transform == first and isinstance(dense.domain, Grid) and dense.domain.same_as(grid)
    if not fits or not all(part.transform.linear for part in after):
        raise TransformReadError(
            f"{start} cannot be a start: it holds {found.transform}, and {first} begins with a linear map, or "
            "with parameters of its own kind on the grid of the fixed image"
        )
    then: Mapping | None = None
    for part in after:
        then = part if then is None else part @ then
    return Begin(dense.params, None if then is None else linear_mapping(then.matrix(), grid))


def starting(begun: Begin, start: str, first: Any, grid: Grid) -> dict[str, Any]:
    """What `register` is told of the start, of one pair or of a batch; start : as of `Settings`."""
    starts = None
    if start == "search":
        starts = over_batch(lambda domain: first.spread(domain, SEARCHED), domain=(grid, grid.ranks()))
    known = start if start in OF_REGISTER else "header"
    return {"then": begun.then, "initial": begun.initial, "starts": starts, "start": known}


class Before(NamedTuple):
    """The start of one pair, or of a batch: its map, the objective there and each term of it, NaN where no voxel of
    one image meets one of the other."""

    start: Mapping
    value: Tensor
    terms: dict[str, Tensor]


def before(
    fixed: Subject,
    moving: Subject,
    begun: Begin,
    stages: Sequence[Stage],
    *,
    padding: Padding | None = None,
    symmetric: bool = False,
) -> Before:
    """How good the start is by what the last stage lowers: one that can be penalised does not move at the start.

    padding, symmetric : as of `register`
    """
    first, last, grid = stages[0].transform, stages[-1], fixed.image.grid
    start = begun.mapping(first, grid)
    if first.linear and not last.transform.linear:
        start = start @ _identity(last.transform, grid)
    both = symmetric and last.transform.negates
    value, terms = evaluate(fixed, moving, start, objective=last.objective, padding=padding, symmetric=both)
    meets = _meet(start, grid, moving.image)
    value, terms = tree_map(lambda found: torch.where(meets, found, torch.nan), (value, terms))
    return Before(start, value, terms)


def _identity(transform: Transform, grid: Grid) -> Mapping:
    return Mapping(over_batch(transform.init, domain=(grid, grid.ranks())), grid, transform)


def _meet(start: Mapping, fixed: Grid, moving: Image) -> Tensor:
    """Whether a map takes any of some 30 points along each fixed axis into the moving image, () or (B,)."""

    def one(mapping: Mapping, here: Grid, there: Grid) -> Tensor:
        points = here.resize([min(n, 32) for n in here.size]).points()
        moved = mapping.transform.points(mapping.params, mapping.domain, points)
        index = there.world_to_index(moved)
        last = torch.tensor(there.size, device=index.device) - 1
        return ((index >= 0) & (index <= last)).all(-1).any()

    return over_batch(
        one, mapping=(start, start.ranks()), fixed=(fixed, fixed.ranks()), moving=(moving.grid, moving.grid.ranks())
    )
