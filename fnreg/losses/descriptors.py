"""Similarities that do not compare intensities: directions of edges, and how each voxel's surroundings look alike.

Both see an image through numbers that a change of contrast leaves as they are.  They look at neighbours, and a
neighbour without weight is not seen: what lies outside of a mask counts as little as what lies outside of the image.
So within a mask of whole voxels the value is that of the image cropped to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fnreg.filters import window_sums
from fnreg.grid import Grid
from fnreg.losses.functional import check_images, mean
from fnreg.pytree import constant

ROUNDING = 16  # units in the last place of the intensities below which a difference is none
LIMIT = 1e3  # how far a voxel's variance may be from the mean one, up or down

# -- normalised gradient fields -----------------------------------------------------------------------------------


def ngf(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    grid: Grid | None = None,
    noise: float = 1.0,
    edge: float | None = None,
) -> Tensor:
    """Normalised gradient fields, mean 1 - <n(warped), n(fixed)>^2 with n(I) = grad I / sqrt(|grad I|^2 + e^2).

    In [0, 1]: 0 where all edges are far stronger than e and parallel, 1 where nothing is parallel or nothing varies.
    The sign of an edge does not count, and with a relative e no affine change a I + b with a != 0 of either image does.
    Where an image is flat its derivative vanishes.  It is no distance: weak edges keep it above 0 at equality.
    The mean over channels.  Haber and Modersitzki 2006, doi 10.1007/11866763_89.

    grid : gives the spacing, for gradients are by world length along its axes: in voxels the angle between two edges
        would depend on how the image is stored.  Without one the spacing is 1
    noise : e is this times the mean of |grad I| of each image and channel: below that an edge counts as noise
    edge : e itself, in intensity per length, for both images; then the contrast counts

    Differences are central where both neighbours are seen, else one-sided.  Raises ValueError where neither noise nor
    edge is positive.

    >>> import torch
    >>> from fnreg.losses.descriptors import ngf
    >>> ramp = torch.arange(5.0).expand(1, 5, 5)
    >>> ngf(2 - 3 * ramp, ramp), ngf(ramp.mT, ramp)  # e is as long as the gradient, so <n, n> is 1/2
    (tensor(0.7500), tensor(1.))
    """
    normals = ngf_statistics(fixed, weights, grid=grid, noise=noise, edge=edge)
    return ngf_from(normals, warped, fixed, weights, grid=grid, noise=noise, edge=edge)


def ngf_statistics(
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    grid: Grid | None = None,
    noise: float = 1.0,
    edge: float | None = None,
) -> Tensor:
    """What `ngf` makes of the fixed image and the weights alone, n(fixed) (D, C, [Z,] Y, X), for `ngf_from`."""
    if not (noise if edge is None else edge) > 0:
        raise ValueError(f"noise is {noise} and edge {edge}: below it an edge is noise, so it must be positive")
    shape = (1, *fixed.shape[1:])
    seen = torch.ones(shape, dtype=fixed.dtype, device=fixed.device)
    if weights is not None:
        weights = weights.reshape(shape)
        seen = (weights > 0).to(fixed.dtype)
    spacing = fixed.new_ones(fixed.ndim - 1) if grid is None else grid.spacing.to(fixed.dtype)
    return _normals(fixed, seen, weights, spacing, noise, edge)


def ngf_from(
    normals: Tensor,
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    grid: Grid | None = None,
    noise: float = 1.0,
    edge: float | None = None,
) -> Tensor:
    """`ngf` with what `ngf_statistics` gave for the same fixed image, weights and options."""
    check_images(warped, fixed)
    other = ngf_statistics(warped, weights, grid=grid, noise=noise, edge=edge)
    share = None if weights is None else weights.reshape(1, *fixed.shape[1:])
    return mean(1 - (other * normals).sum(0).square(), share)


def _normals(
    image: Tensor, seen: Tensor, weights: Tensor | None, spacing: Tensor, noise: float, edge: float | None
) -> Tensor:
    """grad I / sqrt(|grad I|^2 + e^2), (D, C, [Z,] Y, X); 0 where the image does not vary."""
    slopes = _slopes(image, seen, spacing)
    square = slopes.square().sum(0)
    if edge is None:
        varies = square > 0
        length = torch.where(varies, torch.where(varies, square, 1).sqrt(), 0)
        least = (noise * _each_mean(length, weights)).square()
    else:
        least = square.new_full((1,), edge**2)
    # A constant that was interpolated varies by rounding, and its direction says nothing.
    unit = ROUNDING * torch.finfo(image.dtype).eps
    least = least + unit**2 * _each_mean(image.square(), weights) * (1 / spacing).square().sum()
    total = square + least.reshape(-1, *(1,) * (image.ndim - 1))
    enough = total > torch.finfo(image.dtype).tiny ** 0.6  # so that the derivative of the root is finite
    return torch.where(enough, slopes, 0) / torch.where(enough, total, 1).sqrt()


def _slopes(image: Tensor, seen: Tensor, spacing: Tensor) -> Tensor:
    """Derivatives by length along each axis, x first, (D, C, [Z,] Y, X): the mean of the differences that are seen."""
    found: list[Tensor] = []
    for k in range(image.ndim - 1):
        n = image.shape[-1 - k]
        if n == 1:
            found.append(torch.zeros_like(image))
            continue
        known = seen.narrow(-1 - k, 1, n - 1) * seen.narrow(-1 - k, 0, n - 1)
        step = (image.narrow(-1 - k, 1, n - 1) - image.narrow(-1 - k, 0, n - 1)) * known
        ends = [0, 0] * k
        total, count = (pad(part, [*ends, 0, 1]) + pad(part, [*ends, 1, 0]) for part in (step, known))
        found.append(total / (count.clamp(min=1) * spacing[k]))
    return torch.stack(found)


def _each_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted mean over voxels of each channel, (C,)."""
    if weights is None:
        return values.flatten(1).mean(1)
    total = weights.sum()
    return (values * weights).flatten(1).sum(1) / torch.where(total > 0, total, 1)


# -- self-similarity ----------------------------------------------------------------------------------------------


def mind(warped: Tensor, fixed: Tensor, weights: Tensor | None = None, *, radius: int = 1, dilation: int = 1) -> Tensor:
    """Mean squared difference of self-similarity contexts (MIND-SSC), mean |S(warped) - S(fixed)|^2, in [0, 1).

    0 for equal images and for those whose contrast differs by an affine change a I + b with a != 0, inverted or not.
    Entries whose patches see nothing do not count.  See `self_similarity`.
    """
    context = mind_statistics(fixed, weights, radius=radius, dilation=dilation)
    return mind_from(context, warped, fixed, weights, radius=radius, dilation=dilation)


def mind_statistics(
    fixed: Tensor, weights: Tensor | None = None, *, radius: int = 1, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """What `mind` makes of the fixed image and the weights alone, its `self_similarity`, for `mind_from`."""
    return self_similarity(fixed, weights, radius=radius, dilation=dilation)


def mind_from(
    context: tuple[Tensor, Tensor],
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    radius: int = 1,
    dilation: int = 1,
) -> Tensor:
    """`mind` with what `mind_statistics` gave for the same fixed image, weights and options."""
    check_images(warped, fixed)
    expected, known = context
    away = (self_similarity(warped, weights, radius=radius, dilation=dilation)[0] - expected).square()  # (C, E, ...)
    share = known if weights is None else known * weights.reshape(1, *fixed.shape[1:])
    total = share.sum() * len(fixed)
    return (away * share).sum() / torch.where(total > 0, total, 1)


def self_similarity(
    image: Tensor, weights: Tensor | None = None, *, radius: int = 1, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """What the surroundings of each voxel have in common, S_e = exp(-(D_e - min_e D_e) / V), in (0, 1].

    The neighbours of a voxel are those `dilation` voxels away along each axis; e runs over the pairs of neighbours
    that are no opposites, 4 in 2-D and 12 in 3-D.  D_e is the mean squared difference of the patches about both, V the
    mean of D_e over e, limited to a thousandth and a thousand times its own mean over the image.  On a line, where all
    neighbours are opposites, the voxel is compared with each of its two.  Heinrich et al. 2013,
    doi 10.1007/978-3-642-40811-3_24.

    image : (C, [Z,] Y, X); weights : (1, [Z,] Y, X) or ([Z,] Y, X), what has none is not seen
    radius : a patch has 2 radius + 1 voxels along each axis; dilation : voxels.  Voxels, for a patch has whole ones:
        resample images whose spacing differs much between axes

    Returns S (C, E, [Z,] Y, X) and where it is known (E, [Z,] Y, X), 1 or 0.  Needs the memory of some 4 E copies of
    the image with its derivative.  Raises ValueError for a radius below 0 or a dilation below 1.

    >>> import torch
    >>> from fnreg.losses.descriptors import self_similarity
    >>> context, known = self_similarity(torch.rand(1, 6, 5, 4))
    >>> tuple(context.shape), float(context.max())
    ((1, 12, 6, 5, 4), 1.0)
    """
    if radius < 0 or dilation < 1:
        raise ValueError(f"radius is {radius} and dilation {dilation}: expected at least 0 and 1")
    shape = tuple(image.shape[1:])
    squares = [step.square() for step in _differences(image, dilation)]
    if weights is None:
        counts = _counts(shape, radius, dilation, image.dtype, image.device)
    else:
        weights = weights.reshape(1, *shape)
        seen = _products((weights > 0).to(image.dtype), dilation)
        counts = _patch_sums(seen, shape, radius, dilation).squeeze(0)
        squares = [square * both for square, both in zip(squares, seen, strict=True)]
    known = counts > 0.5
    distance = _patch_sums(squares, shape, radius, dilation) / torch.where(known, counts, 1)  # (C, E, ...)
    some = known.sum(0).clamp(min=1)
    variance = distance.sum(1) / some  # (C, ...); of what is not known the distance is 0
    # A constant that was interpolated varies by rounding, in which there is nothing to see.
    rounding = (ROUNDING * torch.finfo(image.dtype).eps) ** 2 * _each_mean(image.square(), weights)
    usual = _each_mean(variance, weights)
    low, high = (
        bound.reshape(-1, *(1,) * len(shape)) for bound in (usual / LIMIT + rounding, usual * LIMIT + rounding)
    )
    variance = torch.minimum(torch.maximum(variance, low), high)
    enough = variance > torch.finfo(image.dtype).tiny ** 0.4  # so that the derivative of the quotient is finite
    least = torch.where(known, distance, torch.inf).amin(1)
    away = torch.where(known, distance - torch.where(known.any(0), least, 0).unsqueeze(1), 0)
    context = torch.exp(-away * torch.where(enough, 1 / torch.where(enough, variance, 1), 0).unsqueeze(1))
    return torch.where(known, context, 0), known.to(image.dtype)


class _Difference(NamedTuple):
    """I(y) - I(y + offset), and the places y = x + start at which the voxel x looks at it."""

    offset: tuple[int, ...]  # x first, in dilations
    starts: tuple[tuple[int, ...], ...]


def _pairs(dimension: int) -> list[_Difference]:
    """All pairs of neighbours that are no opposites; two of them share a difference."""
    if dimension == 1:
        return [_Difference((1,), ((0,), (-1,)))]

    def at(**steps: int) -> tuple[int, ...]:
        return tuple(steps.get(f"axis{k}", 0) for k in range(dimension))

    found: list[_Difference] = []
    for i, j in itertools.combinations(range(dimension), 2):
        a, b = f"axis{i}", f"axis{j}"
        found.append(_Difference(at(**{a: 1, b: 1}), (at(**{a: -1}), at(**{b: -1}))))
        found.append(_Difference(at(**{a: -1, b: 1}), (at(**{a: 1}), at(**{b: -1}))))
    return found


def _both(image: Tensor, offset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Views of the image at y and at y + offset, voxels x first, where both are within."""
    here = there = image
    for k, step in enumerate(offset):
        n = image.shape[-1 - k]
        left = max(n - abs(step), 0)
        here = here.narrow(-1 - k, min(max(-step, 0), n), left)
        there = there.narrow(-1 - k, min(max(step, 0), n), left)
    return here, there


def _differences(image: Tensor, dilation: int) -> list[Tensor]:
    parts = (_both(image, [dilation * n for n in pair.offset]) for pair in _pairs(image.ndim - 1))
    return [here - there for here, there in parts]


def _products(seen: Tensor, dilation: int) -> list[Tensor]:
    """Whether both voxels of a difference are seen."""
    parts = (_both(seen, [dilation * n for n in pair.offset]) for pair in _pairs(seen.ndim - 1))
    return [here * there for here, there in parts]


def _patch_sums(parts: list[Tensor], shape: tuple[int, ...], radius: int, dilation: int) -> Tensor:
    """Sums over the patches that each voxel compares, (C, E, [Z,] Y, X), of what each difference gave."""
    pairs = _pairs(len(shape))
    wide: list[Tensor] = []
    for pair, part in zip(pairs, parts, strict=True):
        ends: list[int] = []  # zeros around, so that a place beyond the border is one of the array
        for k, step in enumerate(pair.offset):
            before = dilation + min(max(-step * dilation, 0), shape[-1 - k])
            ends += [before, shape[-1 - k] + 2 * dilation - before - part.shape[-1 - k]]
        wide.append(pad(part, ends))
    found = torch.stack(wide, 1)  # (C, P, ...)
    sums = window_sums(found.flatten(0, 1), ((1.0,) * (radius + 1),) * len(shape)).reshape(found.shape)
    looks: list[Tensor] = []
    for number, pair in enumerate(pairs):
        for start in pair.starts:
            look = sums[:, number]
            for k, step in enumerate(start):
                look = look.narrow(-1 - k, dilation * (1 + step), shape[-1 - k])
            looks.append(look)
    return torch.stack(looks, 1)


@constant
def _counts(shape: tuple[int, ...], radius: int, dilation: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many differences each patch has where every voxel is seen, (E, [Z,] Y, X)."""
    seen = torch.ones((1, *shape), dtype=dtype, device=device)
    return _patch_sums(_products(seen, dilation), shape, radius, dilation).squeeze(0)
