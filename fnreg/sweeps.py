"""Sweeps: every pair with every setting in one call of `register`, and the best setting of each pair.

What says which is best is what the registration has not seen: labels or landmarks, never the objective unless asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fnreg.image import Image, Subject, subject
from fnreg.judges import (
    HIGHER,
    JUDGES,
    Judge,
    check_judge,
    check_place,
    check_unseen,
    first_best,
    roughness,
    scores_of,
)
from fnreg.pytree import (
    batch_axes,
    batch_size,
    is_concrete,
    pytree_dataclass,
    static,
    tree_leaves,
    tree_map,
    tree_take,
)
from fnreg.registration import Registration, register
from fnreg.repeats import option_sizes, repeat, repeat_options, repeat_stages, stage_sizes
from fnreg.stages import Stage, first_transform
from fnreg.transforms.base import Transform


@pytree_dataclass
class Sweep:
    """What a sweep of B pairs over values of names found; without the axis B for one pair that is given without.

    The axes of tables are those of the names in order, (n_1, n_2, ...), behind that of the pairs.

    scores : (B, n_1, ...) how good each registration is by `judge`, NaN where it failed, or has nothing to judge it
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
        return self.judge in HIGHER

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each name has."""
        return tuple(len(tree_leaves(tree)[0]) for tree in self.values.values())

    @property
    def counted(self) -> Tensor:
        """The pairs (B,) that have a score by any setting: all others tell nothing of settings."""
        return ~self.scores.reshape(*self.chosen.shape, -1).isnan().all(-1)

    @property
    def means(self) -> Tensor:
        """Mean scores (n_1, ...) of the pairs that count, see `counted`; NaN for a setting that failed for one of
        them: its mean would be that of other pairs."""
        table = self.scores.reshape(-1, *self.shape)
        return table[self.counted.reshape(-1)].mean(0)

    @property
    def common(self) -> Tensor:
        """The setting with the best of `means`, (), counted as `chosen`.

        Raises ValueError where no setting serves all pairs that count, or no pair does.
        """
        means = self.means.reshape(-1)
        if not bool((~means.isnan()).any()):
            cause = (
                "every setting failed for one pair or another" if bool(self.counted.any()) else "no pair has a score"
            )
            raise ValueError(
                f"no setting is best in the mean, as {cause}: see every.status and scores, and leave such pairs out"
            )
        return first_best(means, self.judge)

    def picked(self, setting: Tensor | None = None) -> dict[str, Any]:
        """The values of a setting, default those of the chosen ones, (B, ...)."""
        places = torch.unravel_index(self.chosen if setting is None else setting, self.shape)

        def at(tree: Any, place: Tensor) -> Any:  # values may be on another device than images
            return tree_map(lambda leaf: leaf[place.to(leaf.device)], tree)

        return {n: at(tree, place) for (n, tree), place in zip(self.values.items(), places, strict=True)}

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {name}" for name, n in zip(self.values, self.shape, strict=True))
        return f"Sweep({self.best.mapping.transform}, {told}, {JUDGES[self.judge]} {self.best_scores.nanmean():.4g})"

    @property
    def best_scores(self) -> Tensor:
        """The scores of the chosen settings, (B,)."""
        table = self.scores.reshape(*self.chosen.shape, -1)
        return table.gather(-1, self.chosen.unsqueeze(-1)).squeeze(-1)


def sweep(
    fixed: Image | Subject,
    moving: Image | Subject,
    transform: Transform | Stage | Sequence[Stage | Transform] | None,
    using: Callable[..., Mapping[str, Any]],
    *,
    over: Mapping[str, Any],
    judge: Judge = "labels",
    held: tuple[Subject, Subject] | None = None,
    **options: Any,
) -> Sweep:
    """Register every pair with every combination of values, in one call, and choose the best one of each pair.

    fixed, moving : one pair, or a batch of B by leading axes; what pairs share is not copied
    transform : as of `register`; None where `using` gives it
    using : a function of the values by name that gives options of `register`, among them "transform", for values that
        belong into a `Stage`: {"transform": [Rigid(), Stage(FFD(7), objective=mse + weight * bending)]}.  It is called
        once, with a leading axis of all registrations, so it may use a value as a weight of a term, a learning rate or
        start parameters
    over : the values of each name, a tensor (n,) or a tree of tensors (n, ...)
    judge : "labels" for the mean Dice over the classes that a pair has, labels warped by nearest neighbours;
        "points" for the mean distance of landmarks, by their weights; "value" for the objective itself, which compares
        starts and rates, but never weights of its own terms
    held : fixed and moving subjects whose labels or points judge, in the place of those that are registered, which do
        so by default; labels of the fixed one lie on the fixed grid
    options : of `register`, the same for all settings; weights, rates, `initial`, `starts` and `then` may have the axis
        of the pairs, and so may weights and rates of stages

    All B n_1 n_2 ... registrations are in memory at once, and so are as many copies of images that differ from pair to
    pair; where that is too much, sweep some of the pairs at a time.  A registration that fails is never chosen, unless
    all of a pair do.  Raises ValueError where labels or points are missing or the objective sees what is to judge it,
    where batch axes do not agree, where an option is given twice, and where `using` uses a name for nothing.

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
    shape, grid = _shape(over), one.image.grid
    sizes = batch_axes("fixed", one, one.ranks())[1] | batch_axes("moving", other, other.ranks())[1]
    judges = (one, other) if held is None else (subject(held[0]), subject(held[1]))
    for name, known in zip(("held[0]", "held[1]"), judges if held is not None else (), strict=False):
        sizes |= batch_axes(name, known, known.ranks())[1]
    numbers = check_judge(judge, judges, told=("fixed", "moving") if held is None else ("held[0]", "held[1]"))
    first = None if transform is None else first_transform(transform)
    sizes |= option_sizes(options, first, grid) | (stage_sizes(transform) if transform is not None else {})
    pairs, count = batch_size(sizes), math.prod(shape)
    if pairs == 0:
        raise ValueError("the batch is empty: give at least one pair")
    if held is not None:
        check_place(judge, judges, one)
    size = pairs or 1
    chosen = _chosen(using, over, shape, size, one.image.data.device)
    given = options.keys() | ({"transform"} if transform is not None else set())
    if twice := sorted(chosen.keys() & given):
        raise ValueError(f"{', '.join(twice)} is an option of the call and of using: give it once")
    if transform is not None:
        swept = repeat_stages(transform, pairs=size, count=count)
    elif "transform" in chosen:
        swept = chosen.pop("transform")
        first = first_transform(swept)
        if batch_size(sizes | option_sizes(options, first, grid)) != pairs:
            raise ValueError("initial alone says how many pairs there are: give it in using, or a batch of images")
    else:
        raise ValueError("no transform: give one in the call, or by using")
    if held is None:
        check_unseen(judge, swept, {**options, **chosen})
    assert first is not None
    options = repeat_options(options, first, grid, pairs=size, count=count)
    sides = repeat("fixed", one, one.ranks(), count), repeat("moving", other, other.ranks(), count)
    every = register(sides[0], sides[1], swept, **options, **chosen)
    if every.status.shape != (count * size,):
        raise ValueError(_unused(chosen))
    told = sides if held is None else tuple(repeat("held", s, s.ranks(), count) for s in judges)
    scores = torch.where(every.ok, scores_of(judge, every, told, numbers), torch.nan)
    best = first_best(scores.reshape(size, count), judge)
    index = best + count * torch.arange(size, device=best.device)
    lead = () if pairs is None else (pairs,)
    rough = roughness(every, sides[0])
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


def _chosen(
    using: Callable[..., Mapping[str, Any]],
    over: Mapping[str, Any],
    shape: tuple[int, ...],
    pairs: int,
    device: torch.device,
) -> dict[str, Any]:
    """The options that `using` makes of the values of all registrations, which are on the images' device.

    Raises ValueError for a name whose values make no difference: its registrations would be the same work again.
    """
    places = torch.unravel_index(torch.arange(math.prod(shape)).repeat(pairs), shape)
    values = {
        name: tree_map(lambda leaf, where=place: leaf[where.to(leaf.device)].to(device), tree)
        for (name, tree), place in zip(over.items(), places, strict=True)
    }
    chosen = using(**values)
    if not isinstance(chosen, Mapping):
        raise TypeError(f"using returned {type(chosen).__name__}: expected a dict of options of register")
    leading = len(places[0])
    found = [t for t in _tensors(chosen, set()) if t.ndim and len(t) == leading]
    if not all(is_concrete(leaf) for leaf in (*tree_leaves(over), *found)):  # values cannot be looked at
        return dict(chosen)
    if not found:
        raise ValueError(_unused(chosen))

    def varies(tensor: Tensor, axis: int) -> bool:
        table = tensor.reshape(pairs, *shape, -1)
        begin = table.narrow(axis + 1, 0, 1)
        return not bool(((table == begin) | (table.isnan() & begin.isnan())).all())

    for axis, (name, tree) in enumerate(values.items()):
        if any(varies(leaf, axis) for leaf in tree_leaves(tree)) and not any(varies(t, axis) for t in found):
            raise ValueError(
                f"using gave {sorted(chosen)} that are the same for all values of {name}: use them in a weight, a rate "
                "or start parameters, or leave the name out"
            )
    return dict(chosen)


def _unused(chosen: Mapping[str, Any]) -> str:
    return (
        f"using gave {sorted(chosen)} without the axis of the values: use them in a weight, a rate or start parameters"
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in options of `register`, wherever they lie: in terms, stages, solvers and optimizers."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, type)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:  # an optimizer or a solver of the user's own
        parts = [] if callable(value) else list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)


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
