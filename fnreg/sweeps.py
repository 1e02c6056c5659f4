"""Sweeps: every pair with every setting in one call of `register`, and the best setting of each pair.

What says which is best is what the registration has not seen: labels or landmarks, never the objective unless asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fnreg.fields import statistics
from fnreg.image import Image, Subject, subject
from fnreg.inputs import check_dimension
from fnreg.losses.terms import OF_LABELS, OF_POINTS, mse
from fnreg.metrics import classes, dice, target_registration_error
from fnreg.pytree import batch_axes, batch_size, over_batch, pytree_dataclass, static, tree_leaves, tree_map, tree_take
from fnreg.registration import Registration, register
from fnreg.stages import Stage, first_transform, objectives_of
from fnreg.starts import initial_ranks
from fnreg.transforms.base import Mapping as Map
from fnreg.transforms.base import Transform

Judge = Literal["labels", "points", "value"]
JUDGES: dict[str, str] = {"labels": "mean Dice", "points": "mean landmark error", "value": "value of the objective"}


@pytree_dataclass
class Sweep:
    """What a sweep of B pairs over values of names found; without the axis B for one pair that is given without.

    The axes of tables are those of the names in order, (n_1, n_2, ...), behind that of the pairs.

    scores : (B, n_1, ...) how good each registration is by `judge`, NaN where it failed
    roughness : (B, n_1, ...) standard deviation of log det J at the fixed voxels; None for linear maps
    chosen : (B,) the best setting of each pair, counted through the axes of the settings, the last one fastest
    values : the values of each name
    best : the registrations of the chosen settings
    every : all of them, (B n_1 ...), pair after pair
    judge : "labels", "points" or "value"
    """

    scores: Tensor
    roughness: Tensor | None
    chosen: Tensor
    values: dict[str, Any]
    best: Registration
    every: Registration
    judge: Judge = static(default="labels")

    @property
    def higher(self) -> bool:
        """Whether the best score is the highest."""
        return self.judge == "labels"

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each name has."""
        return tuple(len(tree_leaves(tree)[0]) for tree in self.values.values())

    @property
    def common(self) -> Tensor:
        """The setting that is best in the mean over the pairs, (), counted as `chosen`; one that failed for a pair is
        not the best."""
        table = self.scores.reshape(-1, math.prod(self.shape))
        return _first_best(table.mean(0), self.higher)

    def picked(self, setting: Tensor | None = None) -> dict[str, Any]:
        """The values of a setting, default those of the chosen ones, (B, ...)."""
        places = torch.unravel_index(self.chosen if setting is None else setting, self.shape)
        return {n: tree_take(tree, place) for (n, tree), place in zip(self.values.items(), places, strict=True)}

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {name}" for name, n in zip(self.values, self.shape, strict=True))
        return f"Sweep({self.best.mapping.transform}, {told}, {JUDGES[self.judge]} {self.best_scores.mean():.4g})"

    @property
    def best_scores(self) -> Tensor:
        """The scores of the chosen settings, (B,)."""
        table = self.scores.reshape(*self.chosen.shape, -1)
        return table.gather(-1, self.chosen.unsqueeze(-1)).squeeze(-1)


def sweep(
    fixed: Image | Subject,
    moving: Image | Subject,
    transform: Transform | Stage | Sequence[Stage | Transform],
    using: Callable[..., Mapping[str, Any]],
    *,
    over: Mapping[str, Any],
    judge: Judge = "labels",
    held: tuple[Subject, Subject] | None = None,
    **options: Any,
) -> Sweep:
    """Register every pair with every combination of values, in one call, and choose the best one of each pair.

    fixed, moving : one pair, or a batch of B by leading axes; what pairs share is not copied
    using : a function of the values by name that gives options of `register`; it is called once, with a leading axis
        of all registrations, so it may use a value as a weight of a term, a learning rate or start parameters
    over : the values of each name, a tensor (n,) or a tree of tensors (n, ...)
    judge : "labels" for the mean Dice over the classes that a pair has, labels warped by nearest neighbours;
        "points" for the mean distance of landmarks, by their weights; "value" for the objective itself, which compares
        starts and rates, but never weights of its own terms
    held : fixed and moving subjects whose labels or points judge; default those that are registered
    options : of `register`, the same for all; `initial` and `then` may have the axis of the pairs

    All B n_1 n_2 ... registrations are in memory at once, and so are as many copies of images that differ from pair to
    pair; where that is too much, sweep some of the pairs at a time.  A registration that fails is never chosen, unless
    all of a pair do.  Raises ValueError where labels or points are missing or the objective sees what is to judge it,
    where batch axes do not agree, and where an option is given twice.

    >>> import torch, fnreg
    >>> fixed, moving = (fnreg.Subject(i, labels=(i.data > 0.5).long()) for i in fnreg.data.digit_pairs(3))
    >>> found = fnreg.sweep(
    ...     fixed,
    ...     moving,
    ...     fnreg.FFD(stride=4),
    ...     lambda weight: {"objective": fnreg.mse + weight * fnreg.bending},
    ...     over={"weight": torch.tensor([1e-4, 1e-2, 1.0])},
    ...     steps=5,
    ... )
    >>> found.scores.shape, found.picked()["weight"].shape, found.best
    (torch.Size([3, 3]), torch.Size([3]), Registration(FFD(stride=4), 3 pairs, ...))
    """
    one, other = subject(fixed), subject(moving)
    if judge not in JUDGES:
        raise ValueError(f"judge is {judge!r}: choose {', '.join(JUDGES)}")
    shape = _shape(over)
    sizes = batch_axes("fixed", one, one.ranks())[1] | batch_axes("moving", other, other.ranks())[1]
    judges = (one, other) if held is None else (subject(held[0]), subject(held[1]))
    for name, known in zip(("held[0]", "held[1]"), judges if held is not None else (), strict=False):
        sizes |= batch_axes(name, known, known.ranks())[1]
    numbers = _check_judge(judge, judges, told=("fixed", "moving") if held is None else ("held[0]", "held[1]"))
    more, ranks = {}, {}
    for name in ("initial", "then"):
        if options.get(name) is not None:
            more[name], ranks[name] = options[name], _ranks(name, options[name], transform, one)
            sizes |= batch_axes(name, more[name], ranks[name])[1]
    pairs, count = batch_size(sizes), math.prod(shape)
    if pairs == 0:
        raise ValueError("the batch is empty: give at least one pair")
    places = torch.unravel_index(torch.arange(count).repeat(pairs or 1), shape)
    chosen = using(**{n: tree_take(tree, place) for (n, tree), place in zip(over.items(), places, strict=True)})
    if not isinstance(chosen, Mapping):
        raise TypeError(f"using returned {type(chosen).__name__}: expected a dict of options of register")
    if twice := sorted(chosen.keys() & options.keys()):
        raise ValueError(f"{', '.join(twice)} is an option of the call and of using: give it once")
    if held is None:
        _check_unseen(judge, transform, {**options, **chosen})

    def each(name: str, tree: Any, ranks: Any) -> Any:
        return _each(tree, batch_axes(name, tree, ranks)[0], count)

    options = options | {name: each(name, tree, ranks[name]) for name, tree in more.items()}
    every = register(
        each("fixed", one, one.ranks()), each("moving", other, other.ranks()), transform, **options, **chosen
    )
    if every.status.shape != (count * (pairs or 1),):
        raise ValueError(
            f"using gave {sorted(chosen)} without the axis of the values: use them in a weight, a rate or start "
            "parameters"
        )
    judges = tuple(each(name, known, known.ranks()) for name, known in zip(("fixed", "moving"), judges, strict=True))
    scores = torch.where(every.ok, _scores(judge, every, judges, numbers), torch.nan)
    table = scores.reshape(pairs or 1, count)
    best = _first_best(table, judge == "labels")
    index = best if pairs is None else best + count * torch.arange(pairs)
    lead = () if pairs is None else (pairs,)
    rough = _roughness(every, judges[0])
    return Sweep(
        scores.reshape(*lead, *shape),
        None if rough is None else rough.reshape(*lead, *shape),
        best.reshape(lead),
        dict(over),
        _take(every, index.reshape(lead)),
        every,
        judge,
    )


def _shape(over: Mapping[str, Any]) -> tuple[int, ...]:
    """How many values each name has."""
    if not isinstance(over, Mapping) or not over:
        raise ValueError('over is empty: give the values of a name, such as {"weight": torch.logspace(-4, 0, 5)}')
    shape: list[int] = []
    for name, tree in over.items():
        leaves = tree_leaves(tree)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
            raise ValueError(f"over[{name!r}] is {tree!r}: expected a tensor of values (n,), or a tree of (n, ...)")
        lengths = {len(leaf) for leaf in leaves}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(f"over[{name!r}] has leading axes of {sorted(lengths)}: expected one length, at least 1")
        shape.append(lengths.pop())
    return tuple(shape)


def _check_judge(judge: Judge, known: tuple[Subject, Subject], *, told: tuple[str, str]) -> tuple[int, ...]:
    """That what judges is there, and the classes of labels."""
    if judge == "value":
        return ()
    for name, item in zip(told, known, strict=True):
        if getattr(item, judge) is None:
            raise ValueError(
                f"{name} has no {judge} to judge by: give Subject(image, {judge}=...) or held=(fixed, moving), or "
                'another judge; judge="value" takes the objective itself'
            )
    if judge == "points":
        counts = [item.points.shape[-2] for item in known if item.points is not None]
        if counts[0] != counts[1]:
            raise ValueError(f"{told[0]} has {counts[0]} points and {told[1]} {counts[1]}: give pairs, row by row")
        return ()
    found = classes(*(item.labels for item in known if item.labels is not None))
    if not found:
        raise ValueError(f"labels of {told[0]} and {told[1]} are 0 everywhere, which is the background: nothing judges")
    return found


def _check_unseen(judge: Judge, transform: Any, options: Mapping[str, Any]) -> None:
    """ValueError where an objective asks for what judges."""
    names = {"labels": OF_LABELS, "points": OF_POINTS, "value": ()}[judge]
    for several in objectives_of(transform, options.get("objective", mse)):
        for part in several:
            if not part.needs.isdisjoint(names):
                raise ValueError(
                    f"the objective {part!r} sees the {judge} that are to judge it: judge by others, "
                    f"held=(Subject(image, {judge}=...), ...), or by another judge"
                )


def _ranks(name: str, tree: Any, transform: Any, fixed: Subject) -> Any:
    """The rank of each leaf of `initial` or `then` for one pair."""
    if isinstance(tree, Map):
        check_dimension(name, tree, fixed.image.grid)
        return tree.ranks()
    return initial_ranks(tree, first_transform(transform), fixed.image.grid)


def _each(tree: Any, axes: Any, count: int) -> Any:
    """Leaves of pairs (B, ...) as (B count, ...), each pair `count` times; shared leaves as they are."""
    size = next((len(leaf) for leaf, axis in zip(tree_leaves(tree), axes, strict=True) if axis == 0), None)
    return tree if size is None else tree_take(tree, torch.arange(size).repeat_interleave(count), axes)


def _scores(judge: Judge, every: Registration, known: tuple[Any, ...], numbers: tuple[int, ...]) -> Tensor:
    """One number for each registration."""
    if judge == "value":
        return every.value
    fixed, moving = known
    if judge == "points":
        away = target_registration_error(every.mapping, *_alike(fixed.points, moving.points, len(every.status)))
        weights = [item.point_weights for item in known if item.point_weights is not None]
        weight = math.prod(weights, start=torch.ones_like(away))
        return (weight * away).sum(-1) / weight.sum(-1)
    rank = every.fixed_grid.ndim + 1
    warped = every.warp(Subject(moving.image, labels=moving.labels)).labels
    assert warped is not None

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return dice(a, b, numbers=numbers).nanmean()

    return over_batch(mean, warped=(warped, rank), fixed=(fixed.labels, rank))


def _alike(fixed: Tensor, moving: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Both with the axis of the batch."""
    return fixed.expand(size, *fixed.shape[-2:]), moving.expand(size, *moving.shape[-2:])


def _roughness(every: Registration, fixed: Subject) -> Tensor | None:
    if every.mapping.transform.linear:
        return None
    grid = every.fixed_grid
    field = every.mapping.displacement(grid)
    given: dict[str, Any] = {"field": (field, grid.ndim + 1), "grid": (grid, grid.ranks())}
    if fixed.mask is not None:
        given["mask"] = (fixed.mask, grid.ndim + 1)

    def spread(field: Tensor, grid: Any, mask: Tensor | None = None) -> Tensor:
        return statistics(field, grid, mask=mask).sd_log_determinant

    return over_batch(spread, **given)


def _first_best(table: Tensor, higher: bool) -> Tensor:
    """Where the last axis is at its best; what is NaN is never."""
    return torch.where(table.isnan(), -torch.inf, table if higher else -table).argmax(-1)


def _take(every: Registration, index: Tensor) -> Registration:
    """Some of a batch of registrations, or one; what they share stays."""

    def taken(tree: Any, ranks: Any) -> Any:
        return tree_take(tree, index, batch_axes("registration", tree, ranks)[0])

    choice = every.choice
    if choice is not None:
        mapping = taken(choice.mapping, choice.mapping.ranks())
        choice = dataclasses.replace(choice, mapping=mapping, candidate=choice.candidate[index])
    rest = ("value", "terms", "steps", "status", "history")
    return Registration(
        mapping=taken(every.mapping, every.mapping.ranks()),
        fixed_grid=taken(every.fixed_grid, every.fixed_grid.ranks()),
        moving_grid=taken(every.moving_grid, every.moving_grid.ranks()),
        choice=choice,
        **{name: tree_map(lambda leaf: leaf[index], getattr(every, name)) for name in rest},
    )
