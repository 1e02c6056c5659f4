"""Where a registration starts by itself: candidates from headers, centres and moments, tried on coarse images.

A descent finds the motion that lies in the valley in which it starts.  So `start="auto"` tries many rigid maps at once,
on images of some thousand voxels where a step of all of them costs less than one on the images as given:

- the headers as they are, the aligned centres of the grids, the aligned centres of mass;
- the aligned principal axes of the mass, with each choice of their signs that gives a proper rotation;
- evenly spread rotations about the centres of mass.

All of them descend for some steps, the best few go on to the next finer level, and the one with the lowest value is
where the registration begins.  The headers are among those that go on, and of candidates that end about as low the one
that comes first above is taken: images that are aligned already stay so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fnreg.gather import Padding
from fnreg.grid import Grid, homogeneous
from fnreg.image import Subject
from fnreg.inputs import Inputs
from fnreg.losses.objective import OF_IMAGES, Objective
from fnreg.optim import adam
from fnreg.problem import Level
from fnreg.pytree import in_parts, over_batch, pytree_dataclass, static, tree_detach, tree_map, tree_take
from fnreg.solvers.descent import Descent
from fnreg.solvers.loop import run
from fnreg.starts import center_of_mass, masked, mass_of
from fnreg.transforms.base import Mapping, Params, Transform
from fnreg.transforms.linear import Linear, Rigid, Rotation, Translation

COARSEST, COARSE = 20, 40  # voxels along the longest axis at most, where all and where the best are tried
STEPS = 30  # on either level
KEEP = 6  # candidates that go on, beside the headers
SPREAD = {2: 24, 3: 48}  # rotations by dimension
LEAST = 0.5  # of the largest overlap that a candidate has
ALIKE = 0.02  # of what the best gains over the middle of all: who is nearer to the best than that is as good
_SOLVER: Any = Descent(adam(0.5, pure=True))


@pytree_dataclass
class Choice:
    """The start that was chosen: `initial=choice.mapping` begins there again, without a search.

    mapping : the map, refined on coarse images unless the headers were as good
    candidate : which of `names` it comes from, () or (B,)
    names : what each candidate is made of
    """

    mapping: Mapping
    candidate: Tensor
    names: tuple[str, ...] = static()

    def name(self, pair: int = 0) -> str:
        """What the start of a pair is made of: header, center, moments, axes or rotation."""
        return self.names[int(self.candidate.reshape(-1)[pair])]


def searched(transform: Transform, dimension: int) -> Linear | None:
    """The rigid family that is searched before a transform; None for one that is not itself linear and free."""
    if not isinstance(transform, Linear):
        return None
    turns = dimension > 1 and not {"rotation", "matrix"}.isdisjoint(transform.parts)
    if transform.translates:
        return Rigid() if turns else Translation()
    return Rotation() if turns and "rotation" in transform.parts else None


def search_levels(size: tuple[int, ...]) -> int:
    """Levels of a pyramid of which the coarsest serves the search."""
    return 1 + max(0, math.ceil(math.log2(max(size) / COARSEST)))


def search(
    whole: Inputs,
    transform: Transform,
    objective: Objective,
    size: int,
    padding: Padding | None,
    failed: Tensor,
    *,
    width: int | None = None,
) -> Choice | None:
    """The start of each of `size` pairs; None where there is nothing to choose.

    That is so for transforms that are not linear, for objectives that do not look at images, and where a map acts
    after the transform: then the headers are trusted.

    failed : (B,) pairs that keep the headers
    width : pairs that are searched at a time, each with all its candidates; None for all

    Candidates are compared with "border" where voxels outside would count nothing: else a map that leaves nothing but
    background in sight were the best.  The choice counts as a constant in differentiation.
    """
    grid = whole.domain
    kind = searched(transform, grid.ndim)
    if kind is None or whole.then is not None or objective.needs.isdisjoint(OF_IMAGES):
        return None
    padding = "border" if padding is None else padding
    coarsest, finer = _levels(whole)
    params = kind.cast(_expand(_candidates(kind, whole, coarsest), size), whole.fixed[0].data.dtype)
    names = _names(kind, grid.ndim)

    levels = [_level(whole, kind, objective, size, padding, number) for number in (coarsest, finer)]
    every, numbers = (torch.arange(count, device=grid.center.device) for count in (size, len(names)))

    def choose(part: slice) -> tuple[Params, Tensor]:
        coarse, fine = (level.take(every[part]) for level in levels)
        begun, lost = tree_take(params, part), failed[part]
        tried = _Tried.of(coarse, begun, numbers.expand(coarse.size, -1))
        middle = tried.value.median(1).values
        solved = tried.descend(lost)
        if finer != coarsest:
            kept = solved.best(KEEP + 1, always=0)
            solved = _Tried.of(fine, kept.params, kept.number).descend(lost)
        header = _Tried.of(fine, tree_map(lambda leaf: leaf[:, :1], begun), torch.zeros_like(tried.number[:, :1]))
        chosen = header.beside(solved).first_alike(middle, lost)
        return chosen.params, chosen.number

    found, number = in_parts(choose, size, width)
    return Choice(Mapping(found, grid, kind), number, names)


def _levels(whole: Inputs) -> tuple[int, int]:
    """The numbers of the levels where all candidates and where the best of them descend."""
    sizes = [max(image.grid.size) for image in whole.fixed]
    last = len(sizes) - 1
    coarsest, finer = (next((n for n, size in enumerate(sizes) if size <= most), last) for most in (COARSEST, COARSE))
    return coarsest, finer


def _level(whole: Inputs, kind: Linear, objective: Objective, size: int, padding: Padding, number: int) -> Level:
    found = whole.level(number, kind, objective, size, padding)
    return dataclasses.replace(found, pairs=tree_detach(found.pairs))


@dataclasses.dataclass(frozen=True, eq=False)
class _Tried:
    """Candidates of B pairs on a level, S of each.

    params : (B, S, ...); number : (B, S) of the candidate; value : (B, S), infinite where it is of no use
    """

    level: Level  # of each pair once
    params: Params
    number: Tensor
    value: Tensor

    @staticmethod
    def of(level: Level, params: Params, number: Tensor) -> _Tried:
        """With the objective of every candidate; one with little overlap beside that of others is of no use."""
        every = _every(level, number.shape[1])
        flat = tree_map(lambda leaf: leaf.flatten(0, 1), params)
        value, overlap = every.value(flat)[0].reshape(number.shape), every.overlap(flat).reshape(number.shape)
        some = (overlap > 0) & (overlap >= LEAST * overlap.amax(1, keepdim=True))
        return _Tried(level, params, number, torch.where(torch.isfinite(value) & some, value, torch.inf))

    def descend(self, failed: Tensor) -> _Tried:
        """After `STEPS` steps of each."""
        width = self.number.shape[1]
        flat = tree_map(lambda leaf: leaf.flatten(0, 1), self.params)
        found = run(
            _every(self.level, width), flat, _SOLVER, steps=STEPS, frozen=failed.repeat_interleave(width)
        ).params
        return _Tried.of(self.level, tree_map(lambda leaf: leaf.unflatten(0, (-1, width)), found), self.number)

    def best(self, count: int, *, always: int) -> _Tried:
        """The lowest `count`, and among them the candidate at the place `always`; in the order of candidates."""
        first = torch.arange(self.number.shape[1], device=self.number.device) == always
        order = torch.where(first, -torch.inf, self.value).sort(dim=1, stable=True).indices[:, :count]
        return self.take(order.sort(dim=1).values)

    def beside(self, other: _Tried) -> _Tried:
        """Both, these first."""
        params = tree_map(lambda a, b: torch.cat([a, b], 1), self.params, other.params)
        number, value = (torch.cat([a, b], 1) for a, b in ((self.number, other.number), (self.value, other.value)))
        return _Tried(self.level, params, number, value)

    def first_alike(self, middle: Tensor, failed: Tensor) -> _Tried:
        """Of each pair the first that is as good as the best, (B, ...); the first of all where none is of use."""
        best = self.value.amin(1)
        gain = torch.where(torch.isfinite(middle - best), (middle - best).clamp(min=0), 0)
        alike = (self.value <= (best + ALIKE * gain)[:, None]) | failed[:, None]
        place = alike.to(torch.int64).argmax(1, keepdim=True)
        found = self.take(place)
        return _Tried(
            self.level, tree_map(lambda leaf: leaf[:, 0], found.params), found.number[:, 0], found.value[:, 0]
        )

    def take(self, places: Tensor) -> _Tried:
        """Those at places (B, K)."""
        pairs = torch.arange(len(places), device=places.device)[:, None]
        params, number, value = tree_map(lambda leaf: leaf[pairs, places], (self.params, self.number, self.value))
        return _Tried(self.level, params, number, value)


def _every(level: Level, width: int) -> Level:
    """The level with each of its pairs `width` times."""
    return level.take(torch.arange(level.size, device=level.pairs.from_fixed.device).repeat_interleave(width))


# -- candidates --------------------------------------------------------------------------------------------------------


def _names(kind: Linear, dimension: int) -> tuple[str, ...]:
    """What the candidates are made of, in their order."""
    shifts = ("header", "center", "moments")
    if not kind.parts:
        return shifts
    turns = ("rotation",) * (SPREAD[dimension] - 1)
    return (*shifts, *("axes",) * 2 ** (dimension - 1), *turns) if kind.translates else ("header", *turns)


def _candidates(kind: Linear, whole: Inputs, number: int) -> Params:
    """Parameters (S, ...), or (B, S, ...) where pairs differ, from the images of a level."""
    other = min(number, len(whole.moving) - 1)

    def of_pair(fixed: Subject, moving: Subject, domain: Grid) -> Params:
        return torch.func.vmap(lambda matrix: kind.fit(matrix, domain))(_matrices(kind, fixed, moving, domain))

    return over_batch(
        of_pair,
        fixed=masked(tree_detach(whole.fixed[number]), tree_detach(whole.fixed_masks[number])),
        moving=masked(tree_detach(whole.moving[other]), tree_detach(whole.moving_masks[other])),
        domain=(whole.domain, whole.domain.ranks()),
    )


def _matrices(kind: Linear, fixed: Subject, moving: Subject, domain: Grid) -> Tensor:
    """World matrices (S, D + 1, D + 1) p -> b + R (p - a) in the order of `_names`."""
    dimension, a, b = domain.ndim, domain.center, moving.image.grid.center
    eye = torch.eye(dimension, dtype=torch.float64, device=a.device)
    turns = _turns(dimension, a.device) if kind.parts else eye[None]
    if not kind.translates:
        return homogeneous(turns, a - turns @ a)
    c, d = center_of_mass(fixed), center_of_mass(moving)
    axes = _axes(fixed, c, moving, d) if kind.parts else turns[:0]
    shifts = torch.stack([torch.zeros_like(a), b - a, d - c])
    about = torch.cat([axes, turns[1:]])
    linear = torch.cat([eye.expand(3, -1, -1), about])
    return homogeneous(linear, torch.cat([shifts, d - about @ c]))


def _turns(dimension: int, device: torch.device) -> Tensor:
    """Evenly spread rotations (S, D, D), the first of which is none."""
    grid = Grid((2,) * dimension, device=device)
    params = Rotation().spread(grid, SPREAD[dimension])
    return torch.func.vmap(lambda p: Rotation().matrix(p, grid)[:-1, :-1])(params)


def _axes(fixed: Subject, c: Tensor, moving: Subject, d: Tensor) -> Tensor:
    """Rotations (2^(D-1), D, D) that lay the principal axes of the fixed mass about c on those of the moving one."""
    first, second = _principal(fixed, c), _principal(moving, d)
    dimension = len(c)
    proper = torch.sign(torch.linalg.det(first) * torch.linalg.det(second))
    signs = torch.tensor([*itertools.product((1.0, -1.0), repeat=dimension - 1)], dtype=c.dtype, device=c.device)
    last = proper * signs.prod(1, keepdim=True)  # the last sign makes the determinant 1
    return (second * torch.cat([signs, last], 1).unsqueeze(1)) @ first.mT


def _principal(known: Subject, center: Tensor) -> Tensor:
    """Eigenvectors (D, D), in columns, of the second moments of the mass; ascending by the eigenvalues."""
    mass, away = mass_of(known), known.image.grid.points() - center
    return torch.linalg.eigh((mass[:, None] * away).mT @ away).eigenvectors


def _expand(params: Params, size: int) -> Params:
    """All leaves (B, S, ...); they are vectors, shared (S, ...) where pairs do not differ."""
    return tree_map(lambda leaf: leaf.expand(size, *leaf.shape[-2:]), params)
