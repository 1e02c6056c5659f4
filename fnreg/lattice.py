"""A common lattice: images of different shapes are padded, without loss, to sizes that many pairs share.

An image keeps its voxels, spacing, origin and direction; voxels are added about its middle, and weights say that they
do not count.  So pairs of ragged shapes go through one batch, and each result is brought back to the images' own grids.

What is added beyond the moving image is what the padding of the registration sees there, so on the finest level that
sees the same as without a lattice; where voxels beyond count nothing (padding None) they get the weight 0 instead.
These repeat the outermost ones, for the voxels at the border are seen half a voxel far.  On coarser levels images with
weights are smoothed by these, so no pyramid lets in what was added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fnreg import fields
from fnreg.derivatives import Statistics
from fnreg.gather import Padding, inside_index
from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.pytree import stack
from fnreg.registration import Registration
from fnreg.settings import Settings
from fnreg.starts import center_of_mass, family
from fnreg.transforms.base import Mapping, Sequential, Transform
from fnreg.transforms.linear import linear_mapping

Size = tuple[int, ...]
STEPS = 8  # sizes per doubling of an axis: at most an eighth is added, and few sizes are left
ALIKE = 1.5  # the two images of a pair share the size of an axis that differs by less than this factor


@dataclasses.dataclass(frozen=True)
class Lattice:
    """How pairs are padded.

    size : of both images, x first; None chooses by the sizes of a pair alone, see `sizes`
    padding : of the registration, see `register`
    even : whether as many voxels are added on both ends of an axis, so that the middle stays where it is: maps that
        turn or stretch about the middle and cannot shift depend on it.  Sizes that are given may then be one less
    """

    size: Size | None = None
    padding: Padding | None = None
    even: bool = False

    @staticmethod
    def of(settings: Settings, transforms: Sequence[Transform], padding: Padding | None) -> Lattice | None:
        """That of settings; None where these ask for none.  Raises SettingsError."""
        size = settings.lattice_size()
        if size is None:
            return None
        linear = [known for known in map(family, transforms) if known is not None]
        return Lattice(size or None, padding, even=not all(known.translates for known in linear))

    def sizes(self, fixed: Size, moving: Size) -> tuple[Size, Size]:
        """The sizes of both images on the lattice.

        Those that are chosen are, for each axis, a multiple of 1/16 to 1/8 of itself: one of eight per doubling.  Where
        one image is longer, by less than half of the other, both get the size of the longer one.

        Raises ValueError where a given size has other axes, or is too small.

        >>> from fnreg.lattice import Lattice
        >>> Lattice().sizes((35, 51), (34, 60))
        ((36, 60), (36, 60))
        >>> Lattice().sizes((35, 51), (100, 60))
        ((36, 60), (104, 60))
        >>> Lattice((40, 64)).sizes((35, 51), (34, 60))
        ((40, 64), (40, 64))
        """
        found = tuple(
            tuple(self._length(axis, n, other) for axis, (n, other) in enumerate(zip(own, theirs, strict=True)))
            for own, theirs in ((fixed, moving), (moving, fixed))
        )
        for name, own in (("fixed", fixed), ("moving", moving)):
            if self.size is not None and len(self.size) != len(own):
                raise ValueError(
                    f"lattice {_told(self.size)} has {len(self.size)} axes but the {name} image has {len(own)}: "
                    "give a size for each of its axes, x first, or auto"
                )
            if self.size is not None and any(m < n for n, m in zip(own, self.size, strict=True)):
                need = _told(tuple(max(n, m) for n, m in zip(own, self.size, strict=True)))
                raise ValueError(
                    f"lattice {_told(self.size)} is smaller than the {name} image, {_told(own)}: give {need} at least, "
                    "or auto"
                )
        return found[0], found[1]

    def _length(self, axis: int, own: int, other: int) -> int:
        if self.size is not None:
            made = self.size[axis] if axis < len(self.size) else own
            return made - (made - own) % 2 if self.even else made
        longest = other if own < other < ALIKE * own else own
        step = max(1, 2 ** math.ceil(math.log2(longest)) // (2 * STEPS))
        made = -(-longest // step) * step
        return made + (made - own) % 2 if self.even else made

    @property
    def weighted(self) -> bool:
        """Whether moving images get a mask: where voxels beyond them count nothing."""
        return self.padding is None

    def grids(self, fixed: Grid, moving: Grid) -> tuple[Grid, Grid]:
        """Grids of these sizes with the voxels of the images' own, and others about them."""
        sizes = self.sizes(fixed.size, moving.size)
        return fixed.center_pad(sizes[0]), moving.center_pad(sizes[1])

    def place(self, fixed: Subject, moving: Subject) -> tuple[Subject, Subject]:
        """A pair on the lattice: images, masks and labels with voxels added; all else stays.

        The fixed image always gets a mask, the moving one where it is `weighted`.
        """
        grids = self.grids(fixed.image.grid, moving.image.grid)
        beyond: Padding = "border" if self.padding is None else self.padding
        return (
            _placed(fixed, grids[0], "border", weighted=True),
            _placed(moving, grids[1], beyond, weighted=self.weighted),
        )

    def begin(self, start: str, first: Transform, fixed: Subject, moving: Subject) -> Mapping | None:
        """The start "center" or "moments" of a pair, by its images as they are; None for any other.

        On the lattice the middle of a grid lies up to half a voxel beside that of the image, and what is added has
        mass.
        """
        if start not in ("center", "moments") or family(first) is None:
            return None
        if start == "center":
            shift = moving.image.grid.center - fixed.image.grid.center
        else:
            shift = center_of_mass(moving) - center_of_mass(fixed)
        matrix = torch.cat([torch.eye(len(shift), dtype=shift.dtype, device=shift.device), shift[:, None]], 1)
        return linear_mapping(matrix, self.grids(fixed.image.grid, moving.image.grid)[0])


def _placed(known: Subject, grid: Grid, beyond: Padding, *, weighted: bool) -> Subject:
    size, mask = grid.size, known.mask
    sharp = mask is None and weighted
    if sharp:
        mask = torch.ones_like(known.image.data[:1])
    return dataclasses.replace(
        known,
        image=Image(padded(known.image.data, size, beyond), grid),
        mask=None if mask is None else padded(mask, size, "zeros"),
        labels=None if known.labels is None else padded(known.labels, size, "zeros"),
        sharp=sharp or known.sharp,  # the image ends there, as it does without a lattice
    )


def padded(data: Tensor, size: Size, beyond: Padding) -> Tensor:
    """Data (C, [Z,] Y, X) with voxels added about the middle, one more at the end where their number is odd.

    beyond : what these hold, as what `interpolate` sees beyond the image

    >>> import torch
    >>> from fnreg.lattice import padded
    >>> padded(torch.tensor([[[1.0, 2.0, 3.0]]]), (6, 1), "border")
    tensor([[[1., 1., 2., 3., 3., 3.]]])
    """
    lows = [(m - n) // 2 for n, m in zip(data.shape[:0:-1], size, strict=True)]
    if beyond == "zeros" or not isinstance(beyond, str):
        widths: list[int] = []
        for n, m, low in zip(data.shape[:0:-1], size, lows, strict=True):
            widths += [low, m - n - low]
        return pad(data, widths, value=0.0 if isinstance(beyond, str) else float(beyond))
    for axis, (m, low) in enumerate(zip(size, lows, strict=True)):
        dim = data.ndim - 1 - axis
        n = data.shape[dim]
        if m > n:
            index = torch.arange(-low, m - low, device=data.device)
            data = data.index_select(dim, inside_index(index, n, beyond)[0])
    return data


# -- back to the images' own grids -------------------------------------------------------------------------------------


def own(result: Registration, fixed: Grid, moving: Grid) -> Registration:
    """The registration of one pair on a lattice as that of its images: all that is asked of it is on their own grids.

    Linear maps get the own grid as their domain.  A field or spline keeps the domain that its parameters belong to,
    which reaches beyond the image.
    """
    return dataclasses.replace(result, mapping=own_mapping(result.mapping, fixed), fixed_grid=fixed, moving_grid=moving)


def own_mapping(mapping: Mapping, grid: Grid) -> Mapping:
    """The same map, its linear parts over another grid."""
    transform = mapping.transform
    if isinstance(transform, Sequential):
        domains: Any = mapping.domain
        domains = (domains,) * len(transform.transforms) if isinstance(domains, Grid) else domains
        each = zip(mapping.params, domains, transform.transforms, strict=True)
        parts = [own_mapping(Mapping(p, d, t), grid) for p, d, t in each]
        return Mapping(tuple(part.params for part in parts), tuple(part.domain for part in parts), transform)
    known = family(transform)
    return mapping if known is None else Mapping(known.fit(mapping.matrix(), grid), grid, transform)


def statistics(field: Tensor, grids: Sequence[Grid]) -> Statistics:
    """`fields.statistics` (B,) of displacements (B, D, [Z,] Y, X) on a lattice, each at the voxels of its own grid."""
    each: list[Statistics] = []
    for one, grid in zip(field, grids, strict=True):
        where = [(m - n) // 2 for m, n in zip(one.shape[1:], grid.shape, strict=True)]
        inside = tuple(slice(a, a + n) for a, n in zip(where, grid.shape, strict=True))
        each.append(fields.statistics(one[:, *inside], grid.to(field.device)))
    return stack(each)


def _told(size: Size) -> str:
    """As an option has it."""
    return "x".join(map(str, size))
