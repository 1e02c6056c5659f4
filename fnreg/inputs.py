"""What `register` is given, made ready: pyramids of both images and masks, the batch, and what is wrong with a pair."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fnreg.grid import Grid
from fnreg.image import Image, Subject, subject
from fnreg.losses.terms import Objective
from fnreg.problem import Level, Pair
from fnreg.pytree import batch_axes, batch_size, is_concrete, is_transformed, over_batch, tree_detach
from fnreg.sampling import Padding
from fnreg.transforms.base import Domain, Mapping, Transform

Input = Image | Subject | Sequence[Image]


class _Fault(enum.Enum):
    """Why a pair cannot be registered, with what to do about it."""

    NOT_FINITE = "{image} holds NaN or infinity: exclude these voxels by a mask, Subject(image, mask=isfinite)"
    CONSTANT = "{image} is constant where it counts: there is nothing to align; check the file, channel and mask"
    EMPTY_MASK = "the mask of {image} is zero everywhere: give a mask with some positive voxels, or none"


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Pyramids of both sides with their masks, finest first, and the map that acts after.

    sizes : length of the leading axis of every batched leaf, by name; wrapped : inside a torch.func transform
    """

    fixed: tuple[Image, ...]
    moving: tuple[Image, ...]
    fixed_masks: tuple[Tensor | None, ...]
    moving_masks: tuple[Tensor | None, ...]
    then: Mapping | None
    sizes: dict[str, int]
    wrapped: bool

    @property
    def batch(self) -> int | None:
        """Number of pairs; None for a single pair without a batch axis."""
        return batch_size(self.sizes)

    @property
    def domain(self) -> Grid:
        """The fixed grid."""
        return self.fixed[0].grid

    @property
    def visible(self) -> bool:
        """Whether values can be looked at."""
        return is_concrete(self.fixed[0].data) and is_concrete(self.moving[0].data)

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
        fixed, moving = self.fixed[number], self.moving[other]
        to_moving: Any = over_batch(_to_index, grid=(moving.grid, moving.grid.ranks()))
        if then is not None:
            to_moving = to_moving @ then.matrix() if then.transform.linear else None
        from_fixed = over_batch(_from_index, grid=(fixed.grid, fixed.grid.ranks()))
        masks = self.fixed_masks[number], self.moving_masks[other]
        pairs = Pair(fixed, moving, objective, from_fixed, *masks, then, to_moving, domain)
        return Level(transform, pairs, batch_axes("pair", pairs, pairs.ranks())[0], size, padding)

    def faults(self) -> list[tuple[Tensor, str]]:
        """For each fault the pairs (B,) that have it, and what to tell."""
        count = self.batch or 1
        found: list[tuple[Tensor, str]] = []
        sides = (
            ("fixed", self.fixed[0], self.fixed_masks[0]),
            ("moving", self.moving[0], self.moving_masks[0]),
        )
        for name, image, mask in sides:
            data = _batched(image.data, image.grid)
            high = low = data
            if mask is not None:
                counts = _batched(mask, image.grid) > 0
                found.append((~counts.any(2).any(1).expand(count), _Fault.EMPTY_MASK.value.format(image=name)))
                high, low = torch.where(counts, data, -torch.inf), torch.where(counts, data, torch.inf)
            finite = torch.isfinite(data).all(2).all(1)
            constant = (high.amax(2) <= low.amin(2)).all(1)
            found.append((~finite.expand(count), _Fault.NOT_FINITE.value.format(image=name)))
            found.append((constant.expand(count), _Fault.CONSTANT.value.format(image=name)))
        return found


def prepare(fixed: Input, moving: Input, then: Mapping | None, *, levels: int, min_size: int) -> Inputs:
    """Pyramids and masks of what `register` was given; ValueError where the two sides do not fit together."""
    if levels < 1:
        raise ValueError(f"levels is {levels}: give at least one")
    wrapped = is_transformed(fixed, moving, then)
    sizes: dict[str, int] = {}
    sides: list[tuple[tuple[Image, ...], tuple[Tensor | None, ...]]] = []
    for name, given in (("fixed", fixed), ("moving", moving)):
        if isinstance(given, Sequence):
            images = tuple(subject(item).image for item in given)
            if not images:
                raise ValueError(f"{name} is an empty pyramid: give at least one image")
            for image in images:
                sizes |= batch_axes(name, image, image.ranks())[1]
            sides.append((images if wrapped else tree_detach(images), (None,) * len(images)))
            continue
        known = subject(given)
        if max(known.image.grid.size) < 4:
            raise ValueError(f"{name} has size {known.image.grid.size}: expected at least 4 voxels along some axis")
        sizes |= batch_axes(name, known, known.ranks())[1]
        sides.append(_pyramid(_fill(known if wrapped else tree_detach(known)), levels, min_size))
        made = len(sides[-1][0])
        if name == "fixed" and made < levels:
            warnings.warn(
                f"{levels} levels were asked for but a fixed image of size {known.image.grid.size} gives {made}: "
                f"no axis may fall below {min_size} voxels",
                stacklevel=3,
            )
    if then is not None:
        sizes |= batch_axes("then", then, then.ranks())[1]
        then = then if wrapped else tree_detach(then)
    (fixed_images, fixed_masks), (moving_images, moving_masks) = sides
    _fit_together(fixed_images[0], moving_images[0])
    batch_size(sizes)
    return Inputs(fixed_images, moving_images, fixed_masks, moving_masks, then, sizes, wrapped)


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


def _to_index(grid: Grid) -> Tensor:
    return grid.matrix("world", "index")


def _from_index(grid: Grid) -> Tensor:
    return grid.matrix("index", "world")


def _batched(data: Tensor, grid: Grid) -> Tensor:
    """(B, C, N) of data with a batch axis or without."""
    return (data if data.ndim > grid.ndim + 1 else data.unsqueeze(0)).flatten(2)


def _fill(known: Subject) -> Subject:
    """Voxels without weight that are not finite become the mean of the others: they must not spread."""
    data, mask = known.image.data, known.mask
    if mask is None or not is_concrete(data) or bool(torch.isfinite(data).all()):
        return known
    counts, finite = mask > 0, torch.isfinite(data)
    good = finite & counts
    axes = tuple(range(-known.image.grid.ndim, 0))
    mean = torch.where(good, data, 0).sum(axes, keepdim=True) / good.sum(axes, keepdim=True).clamp(min=1)
    filled = Image(torch.where(finite | counts, data, mean), known.image.grid)
    return Subject(filled, mask, known.labels, known.points)


def _pyramid(known: Subject, levels: int, min_size: int) -> tuple[tuple[Image, ...], tuple[Tensor | None, ...]]:
    """Images and masks, finest first."""
    grid = known.image.grid

    def over(data: Tensor) -> list[Tensor]:
        def one(values: Tensor) -> list[Tensor]:
            return [image.data for image in Image(values).pyramid(levels, min_size=min_size)]

        return vmap(one)(data) if data.ndim > grid.ndim + 1 else one(data)

    data = over(known.image.data)
    masks: list[Tensor | None] = [None] * len(data) if known.mask is None else [*over(known.mask)]
    images = [known.image]
    for values in data[1:]:
        size = tuple(values.shape[: -grid.ndim - 1 : -1])
        coarse = over_batch(lambda g: g.resize(size), grid=(grid, grid.ranks()))  # noqa: B023
        images.append(Image(values, coarse))
    return tuple(images), tuple(masks)
