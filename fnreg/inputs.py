"""What `register` is given, made ready: pyramids of both images and masks, the batch, and what is wrong with a pair."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnreg.annotations import Annotations, Classes, Points, bad_points, check, points_of
from fnreg.filters import FWHM, gaussian, resize
from fnreg.gather import INTERPOLATIONS, Interpolation, Padding, precise
from fnreg.grid import Grid
from fnreg.image import Image, Subject, subject
from fnreg.losses.objective import OF_LABELS, OF_POINTS, Objective
from fnreg.notes import warn
from fnreg.pair import Pair
from fnreg.problem import Level
from fnreg.pytree import (
    batch_axes,
    batch_size,
    is_concrete,
    is_transformed,
    over_batch,
    tree_detach,
    tree_flatten,
    tree_map,
    tree_paths,
)
from fnreg.solvers.base import Status
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.domain import Domain, first_domain

Input = Image | Subject | Sequence[Image]


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Pyramids of both sides with their masks, finest first, and the map that acts after.

    sizes : length of the leading axis of every batched leaf, by name; wrapped : inside a torch.func transform
    sharp : of the masks of both sides, see `Subject`
    needs : what objectives ask for; labels and points, (fixed, moving), are there where these ask for them
    interpolation : how the moving images are interpolated
    """

    fixed: tuple[Image, ...]
    moving: tuple[Image, ...]
    fixed_masks: tuple[Tensor | None, ...]
    moving_masks: tuple[Tensor | None, ...]
    then: Mapping | None
    sizes: dict[str, int]
    wrapped: bool
    sharp: tuple[bool, bool] = (False, False)
    needs: frozenset[str] = frozenset()
    labels: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
    labels_differ: Tensor | None = None
    points: tuple[Points | None, Points | None] = (None, None)
    interpolation: Interpolation = "linear"

    @property
    def domain(self) -> Grid:
        """The fixed grid."""
        return self.fixed[0].grid

    @property
    def visible(self) -> bool:
        """Whether values can be looked at."""
        return is_concrete(self.fixed[0].data) and is_concrete(self.moving[0].data)

    def without(self, faulty: Tensor) -> Inputs:
        """With zeros in the place of what faulty pairs have of their own, so that nothing of it spreads to others.

        faulty : (B,), or a scalar for one pair
        """

        def cleared(leaf: Tensor | None, rank: int, other: float = 0.0) -> Any:
            if leaf is None or leaf.ndim < rank + faulty.ndim:
                return leaf
            return torch.where(faulty.reshape(faulty.shape + (1,) * rank), torch.full_like(leaf, other), leaf)

        def image(known: Image) -> Image:
            return Image(cleared(known.data, known.grid.ndim + 1), known.grid)

        def mask(known: Tensor | None) -> Any:
            return cleared(known, self.domain.ndim + 1, 1.0)

        def points(known: Points | None) -> Any:
            ranks = None if known is None else known.ranks()
            return None if known is None else tree_map(lambda leaf, rank: cleared(leaf, rank), known, ranks)

        return dataclasses.replace(
            self,
            fixed=tuple(map(image, self.fixed)),
            moving=tuple(map(image, self.moving)),
            fixed_masks=tuple(map(mask, self.fixed_masks)),
            moving_masks=tuple(map(mask, self.moving_masks)),
            points=tuple(map(points, self.points)),
        )

    def level(
        self,
        number: int,
        transform: Transform,
        objective: Objective,
        size: int,
        padding: Padding | None,
        then: Mapping | None = None,
        domain: Domain | None = None,
    ) -> Level:
        """The problem at level `number`, 0 the finest; the moving pyramid may be shorter.

        then : acts after the optimised map; domain : of the transform where that is not the fixed grid of the level
        """
        other = min(number, len(self.moving) - 1)
        fixed = self.fixed[number]
        moving = self.moving[other]
        if number > 0:
            grids = (fixed.grid, fixed.grid.ranks())
            smooth = over_batch(_as_smooth, moving=(moving, moving.ranks()), grid=grids)
            moving = Image(smooth.data, moving.grid)
        annotations = self._annotations(number, other)
        to_moving: Any = over_batch(_to_index, grid=(moving.grid, moving.grid.ranks()))
        if then is not None:
            to_moving = to_moving @ then.matrix() if then.transform.linear else None
        from_fixed = over_batch(_from_index, grid=(fixed.grid, fixed.grid.ranks()))
        masks = self.fixed_masks[number], self.moving_masks[other]
        rest = then, to_moving, domain, annotations, self.sharp, self.interpolation
        pairs = Pair(fixed, moving, objective, from_fixed, *masks, *rest)
        return Level(transform, pairs, batch_axes("pair", pairs, pairs.ranks())[0], size, padding)

    def _annotations(self, number: int, other: int) -> Annotations | None:
        """Labels and points at a level of the fixed and one of the moving pyramid; labels as smooth as the images."""
        if self.labels is None and self.points == (None, None):
            return None
        if self.labels is None:
            return Annotations(None, None, *self.points)
        fixed, moving = self.labels[0][number], self.labels[1][other]
        if number > 0:
            image, grid = Image(moving, self.moving[other].grid), self.fixed[number].grid
            moving = over_batch(_as_smooth, moving=(image, image.ranks()), grid=(grid, grid.ranks())).data
        return Annotations(fixed, moving, *self.points)

    def faults(self) -> list[tuple[Tensor, Status]]:
        """For each fault that an image can have the pairs that have it, (B,) or (1,) for all; what tells more first."""
        found: list[tuple[Tensor, Status]] = []
        sides = (
            ("FIXED", self.fixed[0], self.fixed_masks[0]),
            ("MOVING", self.moving[0], self.moving_masks[0]),
        )
        for side, image, mask in sides:
            data = _batched(image.data, image.grid)
            high = low = data
            if mask is not None:
                weight = _batched(mask, image.grid)
                counts = weight > 0
                found.append((~(weight >= 0).all(2).all(1), Status[f"{side}_BAD_MASK"]))
                found.append((~counts.any(2).any(1), Status[f"{side}_EMPTY_MASK"]))
                high, low = torch.where(counts, data, -torch.inf), torch.where(counts, data, torch.inf)
            if self.needs and self.needs.isdisjoint(("warped", "fixed")):  # nobody looks at intensities
                continue
            found.append((~torch.isfinite(data).all(2).all(1), Status[f"{side}_NOT_FINITE"]))
            found.append(((high.amax(2) <= low.amin(2)).all(1), Status[f"{side}_CONSTANT"]))
        if self.labels_differ is not None:
            found.append((self.labels_differ, Status.BAD_LABELS))
        for side, points in zip(("FIXED", "MOVING"), self.points, strict=True):
            if points is not None:
                found.append((bad_points(points), Status[f"{side}_BAD_POINTS"]))
        return found


def prepare(
    fixed: Input,
    moving: Input,
    then: Mapping | None,
    *,
    levels: int,
    min_size: int,
    detach: bool = True,
    objectives: Sequence[Objective] = (),
    deeper: Callable[[tuple[int, ...]], int] | None = None,
    interpolation: Interpolation = "linear",
) -> Inputs:
    """Pyramids, masks, labels and points of what `register` was given.

    interpolation : how the moving images are interpolated
    deeper : of the fixed size, how many levels the pyramids have if the size allows, where that is more than `levels`

    ValueError where the two sides do not fit together, or have not what the objectives ask for.
    """
    if levels < 1:
        raise ValueError(f"levels is {levels}: give at least one")
    if interpolation == "nearest":
        raise ValueError("interpolation is 'nearest', which has no derivative: choose linear or cubic")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}: choose linear or cubic")
    wrapped = is_transformed(fixed, moving, then)
    detach = detach and not wrapped
    sizes: dict[str, int] = {}
    sides: list[tuple[tuple[Image, ...], tuple[Tensor | None, ...]]] = []
    subjects: list[list[Subject]] = []
    for name, given in (("fixed", fixed), ("moving", moving)):
        several = list(given) if isinstance(given, Sequence) else [given]
        known = [subject(item) for item in several]
        if not known:
            raise ValueError(f"{name} is an empty pyramid: give at least one image")
        if max(known[0].image.grid.size) < 4:
            raise ValueError(f"{name} has size {known[0].image.grid.size}: expected at least 4 voxels along some axis")
        for finer, coarser in itertools.pairwise(known):
            _check_order(name, finer.image, coarser.image)
        here = (subjects[0] if subjects else known)[0].image.grid
        for item in several:
            check_device(name, item, here)
        for item in known:
            sizes |= batch_axes(name, item, item.ranks())[1]
        known = [_fill(tree_map(_ready, tree_detach(item) if detach else item)) for item in known]
        subjects.append(known)
        if isinstance(given, Sequence):
            sides.append((tuple(item.image for item in known), tuple(item.mask for item in known)))
        else:
            count = levels if deeper is None else max(levels, deeper(subjects[0][0].image.grid.size))
            sides.append(_pyramid(known[0], count, min_size))
        made = len(sides[-1][0])
        if name == "fixed" and made < levels and not isinstance(given, Sequence):
            warn(
                f"{levels} levels were asked for but a fixed image of size {known[0].image.grid.size} gives {made}: "
                f"no axis may fall below {min_size} voxels",
                stacklevel=4,
            )
    if then is not None:
        sizes |= batch_axes("then", then, then.ranks())[1]
        then = tree_detach(then) if detach else then
    (fixed_images, fixed_masks), (moving_images, moving_masks) = sides
    _fit_together(fixed_images[0], moving_images[0])
    if then is not None:
        check_dimension("then", then, fixed_images[0].grid)
        check_device("then", then, fixed_images[0].grid)
    if batch_size(sizes) == 0:
        raise ValueError("the batch is empty: give at least one pair")
    for objective in objectives:
        check(objective, subjects[0][0], subjects[1][0])
    needs = frozenset(name for objective in objectives for name in objective.needs)
    sharp = subjects[0][0].sharp, subjects[1][0].sharp
    made = Inputs(
        fixed_images,
        moving_images,
        fixed_masks,
        moving_masks,
        then,
        sizes,
        wrapped,
        sharp,
        needs,
        interpolation=interpolation,
    )
    if not needs.isdisjoint(OF_LABELS):
        classes, labels = _labels(subjects, (len(fixed_images), len(moving_images)), min_size)
        made = dataclasses.replace(made, labels=labels, labels_differ=classes.differ)
    if not needs.isdisjoint(OF_POINTS):
        made = dataclasses.replace(made, points=(points_of(subjects[0][0]), points_of(subjects[1][0])))
    return made


def _ready(leaf: Tensor) -> Tensor:
    """In one piece, and in a precision in which steps can be taken."""
    return (leaf.to(precise(leaf.dtype)) if leaf.is_floating_point() else leaf).contiguous()


def _labels(
    subjects: list[list[Subject]], levels: tuple[int, int], min_size: int
) -> tuple[Classes, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Labels of both sides, one channel for each class, finest first."""
    dimension = subjects[0][0].image.grid.ndim
    first, second = (known[0].labels for known in subjects)
    assert first is not None
    assert second is not None
    classes = Classes.of(first, second, dimension)
    sides: list[tuple[Tensor, ...]] = []
    for name, known, count in zip(("fixed", "moving"), subjects, levels, strict=True):
        channels: list[Subject] = []
        for item in known:
            if item.labels is None:
                raise ValueError(
                    f"the {name} pyramid has labels for some of its levels only: give them for all or none"
                )
            one_hot = classes.channels(item.labels, item.image.data.dtype, dimension)
            channels.append(_fill(Subject(Image(one_hot, item.image.grid), item.mask)))
        if len(known) > 1 or count == 1:  # a pyramid was given, or one level is all there is
            sides.append(tuple(item.image.data for item in channels))
        else:
            sides.append(tuple(image.data for image in _pyramid(channels[0], count, min_size)[0]))
    return classes, (sides[0], sides[1])


def _check_order(name: str, finer: Image, coarser: Image) -> None:
    if finer.channels != coarser.channels or finer.grid.ndim != coarser.grid.ndim:
        raise ValueError(f"the images of the {name} pyramid differ in channels or dimension")
    if any(n < m for n, m in zip(finer.grid.size, coarser.grid.size, strict=True)):
        raise ValueError(
            f"the {name} pyramid grows from {finer.grid.size} to {coarser.grid.size}: give the finest first"
        )


def _fit_together(fixed: Image, moving: Image) -> None:
    if fixed.grid.ndim != moving.grid.ndim:
        raise ValueError(
            f"moving has {moving.grid.ndim} spatial axes but fixed has {fixed.grid.ndim}: "
            "register images of one dimension"
        )
    if fixed.channels != moving.channels:
        raise ValueError(
            f"moving has {moving.channels} channels but fixed has {fixed.channels}: select channels so that both agree"
        )
    if fixed.data.dtype != moving.data.dtype:
        raise ValueError(
            f"moving is {moving.data.dtype} but fixed is {fixed.data.dtype}: convert one, Image(data.to(dtype), grid)"
        )


def _as_smooth(moving: Image, grid: Grid) -> Image:
    """The moving image as smooth as voxels of the fixed grid are wide, where its own are narrower.

    So images of different spacing meet at one scale on coarse levels; the finest level has them as given.  The widths
    are geometric means over the axes.
    """
    width = grid.spacing.log().mean() - moving.grid.spacing.log().mean()
    ratio = width.exp()
    if is_concrete(ratio) and float(ratio.detach()) < 1 + 1e-3:
        return moving
    sigma = torch.where(ratio > 1 + 1e-3, ratio.square() - 1, 0).clamp(min=1e-12).sqrt() / FWHM
    return Image(gaussian(moving.data, sigma), moving.grid)


def _to_index(grid: Grid) -> Tensor:
    return grid.matrix("world", "index")


def _from_index(grid: Grid) -> Tensor:
    return grid.matrix("index", "world")


def _batched(data: Tensor, grid: Grid) -> Tensor:
    """(B, C, N) of data with a batch axis or without."""
    return (data if data.ndim > grid.ndim + 1 else data.unsqueeze(0)).flatten(2)


def check_dimension(name: str, mapping: Mapping, grid: Grid) -> None:
    """A mapping acts on points of the images' dimension."""
    found = first_domain(mapping.domain).ndim
    if found != grid.ndim:
        raise ValueError(f"{name} maps points of {found} dimensions but the images have {grid.ndim}")


def check_device(name: str, tree: Any, fixed: Grid) -> None:
    """ValueError where a leaf is not where the fixed grid is."""
    here, leaves = fixed.center.device, tree_flatten(tree)[0]
    away = [leaf.device != here if isinstance(leaf, Tensor) else False for leaf in leaves]
    if not any(away):
        return
    path, leaf = tree_paths(tree)[away.index(True)], leaves[away.index(True)]
    told = name if isinstance(tree, Image) and all(away) else f"{name}{'' if path.startswith('[') else '.'}{path}"
    other = "its grid" if name == "fixed" else "fixed"
    raise ValueError(f"{told} is on {leaf.device} but {other} is on {here}: give {told}.to({str(here)!r})")


def _fill(known: Subject) -> Subject:
    """Voxels without weight get values of their surroundings: what a mask hides must have no influence.

    But for a sharp mask: its image ends there, and has what is to be seen beyond.

    A Gaussian of one voxel over the voxels that count, normalised by how many these are; far from them their mean.
    """
    if known.mask is None or known.sharp:
        return known
    grid = known.image.grid

    def one(data: Tensor, mask: Tensor) -> Tensor:
        counts = mask > 0
        seen = torch.where(counts, data, 0)
        share = gaussian(counts.to(data.dtype), 1.0)
        near = gaussian(seen, 1.0) / torch.where(share > 1e-3, share, 1)
        axes = tuple(range(1, data.ndim))
        mean = seen.sum(axes, keepdim=True) / counts.sum(axes, keepdim=True).clamp(min=1)
        return torch.where(counts, data, torch.where(share > 1e-3, near, mean))

    rank = grid.ndim + 1
    filled = over_batch(one, image=(known.image.data, rank), mask=(known.mask, rank))
    return dataclasses.replace(known, image=Image(filled, grid))


def _pyramid(known: Subject, levels: int, min_size: int) -> tuple[tuple[Image, ...], tuple[Tensor | None, ...]]:
    """Images and masks, finest first; within a mask, smoothing is normalised by the smoothed mask."""
    grid = known.image.grid
    steps = [known]
    for level in Grid(grid.size).pyramid(levels, min_size=min_size)[1:]:
        steps.append(_coarser(steps[-1], grid, level.size))
    return tuple(step.image for step in steps), tuple(step.mask for step in steps)


def _coarser(known: Subject, finest: Grid, size: tuple[int, ...]) -> Subject:
    """The next level: image and mask resized, the grid made from the finest so that no rounding adds up."""
    rank, data, mask = finest.ndim + 1, known.image.data, known.mask
    grid = over_batch(lambda g: g.level(size), grid=(finest, finest.ranks()))
    if mask is None:
        return Subject(Image(over_batch(lambda d: resize(d, size), image=(data, rank)), grid))
    data, mask = over_batch(lambda d, m: _resize_within(d, m, size), image=(data, rank), mask=(mask, rank))
    return Subject(Image(data, grid), mask)


def _resize_within(data: Tensor, mask: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    weight = resize(mask, size)
    known = weight > 1e-6
    within = resize(data * mask, size) / torch.where(known, weight, 1)
    return torch.where(known, within, resize(data, size)), torch.where(known, weight, 0)
