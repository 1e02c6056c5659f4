"""How sure a registration is, by doing it again: with fresh noise, or from other starts, all copies in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Inputs, prepare
from fnreg.losses import functional
from fnreg.losses.terms import Objective, Term, mse
from fnreg.noise import squared_weights
from fnreg.pytree import (
    batch_axes,
    over_batch,
    pytree_dataclass,
    static,
    tree_map,
    tree_take,
    tree_vmap,
)
from fnreg.registration import Registration, register
from fnreg.sampling import sample
from fnreg.stages import Stage, first_transform, objectives_of
from fnreg.starts import expand
from fnreg.transforms.base import Mapping, Transform, domain_axes, moving_coords, single


@pytree_dataclass
class Ensemble:
    """Registrations of copies, pair after pair, and what they tell together; copies that failed do not count.

    registration : of all copies, leading axis (B * count)
    reference : without added noise
    count : copies of each pair
    alone : whether it was one pair, so that results have no axis for pairs
    """

    registration: Registration
    reference: Registration
    count: int = static()
    alone: bool = static()

    def map_points(self, points: Tensor) -> Tensor:
        """Moving world points (count, N, D) of fixed ones (N, D), (B, count, N, D) of a batch; NaN where one failed."""
        if points.ndim == 3:
            points = points.repeat_interleave(self.count, 0)
        moved = self.registration.map_points(points)
        moved = torch.where(self.registration.ok[:, None, None], moved, torch.nan)
        moved = moved.unflatten(0, (-1, self.count))
        return moved[0] if self.alone else moved

    def mean(self, points: Tensor) -> Tensor:
        """The mean of the mapped points, (N, D) or (B, N, D)."""
        return torch.nanmean(self.map_points(points), -3)

    def points(self, points: Tensor) -> Tensor:
        """Mean square (N, D, D) of the mapped points about the reference, squared world units, (B, N, D, D) of a batch.

        sum (T_i(p) - T(p))(T_i(p) - T(p))^T / n over the n copies that did not fail: a shift that noise brings to all
        of them is one that the reference has too.
        """
        away = self.map_points(points) - self.reference.map_points(points).unsqueeze(-3)
        known = torch.isfinite(away)
        number = known.all(-1).sum(-2)  # of copies, (N,) or (B, N)
        away = torch.where(known, away, 0)
        return torch.einsum("...cni,...cnj->...nij", away, away) / number[..., None, None]

    def spread(self, points: Tensor) -> Tensor:
        """Root mean square distance of the mapped points from the reference, world units, (N,) or (B, N)."""
        return torch.diagonal(self.points(points), dim1=-2, dim2=-1).sum(-1).sqrt()

    def shift(self, points: Tensor) -> Tensor:
        """Mean less the reference, (N, D) or (B, N, D): how far the added noise moves the solution systematically."""
        return self.mean(points) - self.reference.map_points(points)


def ensemble(
    fixed: Image | Subject,
    moving: Image | Subject,
    transform: Transform | Stage | Sequence[Stage | Transform],
    *,
    count: int = 32,
    noise: float | tuple[float, float] | None = None,
    scatter: float = 0.0,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Ensemble:
    """Register `count` copies of each pair with independent noise added to both images, in one call of `register`.

    noise : standard deviation of the added noise, of both images or of (fixed, moving); None is what the residuals of
        the registration without added noise tell, taken as of equal variance in both; 0 adds none
    scatter : voxels; each copy starts from the identity, or from `initial`, after a step of this standard deviation
    generator : of the random numbers
    options : of `register`

    Noise as strong as there is already moves the copies from the reference as that was moved from the truth, to
    first order: the parametric bootstrap, Efron and Tibshirani 1993, "An Introduction to the Bootstrap".  Added noise
    is independent from voxel to voxel: of images that were smoothed or resampled give those before.

    Raises ValueError where the noise cannot be told from residuals, as no similarity is `mse`, and RegistrationError
    where a single pair cannot be registered at all.

    >>> import torch, fnreg
    >>> blob = (-(fnreg.Grid((20, 20)).points() - 9.5).square().sum(1) / 20).exp().reshape(1, 20, 20)
    >>> generator = torch.Generator().manual_seed(0)
    >>> noisy = [fnreg.Image(blob + 0.02 * torch.randn(1, 20, 20, generator=generator)) for _ in range(2)]
    >>> options = {"levels": 1, "solver": fnreg.GaussNewton(), "generator": generator}
    >>> copies = fnreg.ensemble(*noisy, fnreg.Translation(), count=8, **options)
    >>> copies.map_points(torch.tensor([[9.5, 9.5]])).shape
    torch.Size([8, 1, 2])
    """
    if count < 2:
        raise ValueError(f"count is {count}: a spread takes at least 2 copies")
    if scatter < 0:
        raise ValueError(f"scatter is {scatter}: expected a number of voxels that is not negative")
    reference = register(fixed, moving, transform, **options)
    given = objectives_of(transform, options.get("objective", mse))[-1][-1]
    whole = prepare(fixed, moving, None, levels=1, min_size=1, objectives=(given,))
    alone = reference.status.ndim == 0
    size = 1 if alone else len(reference.status)
    if noise is None:
        if not any(term.function is functional.mse for term in given.terms):
            raise ValueError(f"{given} does not compare intensities as they are: tell the images' noise, noise=0.05")
        strength = _noise_of(reference, whole, options.get("padding"))
        both = strength, strength
    else:
        pair = noise if isinstance(noise, tuple) else (noise, noise)
        if len(pair) != 2 or not all(0 <= s < float("inf") for s in pair):
            raise ValueError(f"noise is {noise}: expected a standard deviation that is not negative, or two of them")
        both = torch.full((1, 1), float(pair[0])), torch.full((1, 1), float(pair[1]))
    place = torch.arange(size, device=whole.domain.center.device).repeat_interleave(count)
    copies = [_copies(image, strength, place, generator) for image, strength in zip((fixed, moving), both, strict=True)]
    first, domain = first_transform(transform), whole.domain
    options = _spread_options(options, place, first, domain)
    if scatter > 0:
        options["initial"] = _scattered(first, options.get("initial"), domain, place, scatter, generator)
    return Ensemble(register(copies[0], copies[1], transform, **options), reference, count, alone)


def _noise_of(result: Registration, whole: Inputs, padding: Any) -> Tensor:
    """Standard deviation (B, C) of each image's noise: of the difference, less what interpolation averages away."""
    fixed, moving, mask = whole.fixed[0], whole.moving[0], whole.fixed_masks[0]
    mask = fixed.data.new_ones(1, *fixed.grid.shape) if mask is None else mask

    def one(mapping: Mapping, fixed: Image, moving: Image, mask: Tensor) -> Tensor:
        coords = moving_coords(mapping, fixed.grid, moving.grid, fixed.data.dtype)
        seen = sample(moving.data, coords, padding="border" if padding is None else padding)
        kept = 1 + squared_weights(coords).prod(0)
        counts = seen.inside * mask.flatten()
        square = (seen.value - fixed.data.flatten(1)).square() * counts
        return (square.sum(1) / (kept * counts).sum().clamp(min=1e-30)).sqrt()

    found = over_batch(
        one,
        mapping=(result.mapping, result.mapping.ranks()),
        fixed=(fixed, fixed.ranks()),
        moving=(moving, moving.ranks()),
        mask=(mask, fixed.grid.ndim + 1),
    )
    return found.reshape(-1, found.shape[-1])


def _copies(given: Any, strength: Tensor, place: Tensor, generator: torch.Generator | None) -> Any:
    """The image of each place, with noise of its own."""
    axes = batch_axes("image", given, given.ranks())[0]
    taken = tree_take(given, place, axes)
    image = taken.image if isinstance(taken, Subject) else taken
    data = image.data if image.data.ndim > image.grid.ndim + 1 else image.data.expand(len(place), *image.data.shape)
    fresh = torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
    strength = (strength if len(strength) == 1 else strength[place]).to(data)
    noisy = Image(data + fresh * strength.reshape(*strength.shape, *(1,) * image.grid.ndim), image.grid)
    return dataclasses.replace(taken, image=noisy) if isinstance(taken, Subject) else noisy


def _spread_options(options: dict[str, Any], place: Tensor, first: Transform, domain: Grid) -> dict[str, Any]:
    """The options, over the copies where they have a batch axis."""
    found = dict(options)
    for name in ("then", "objective", "initial"):
        value = options.get(name)
        if isinstance(value, (Mapping, Term, Objective)):
            ranks: Any = value.ranks()
        elif name == "initial" and value is not None:
            ranks = first.ranks(domain)
        else:
            continue
        found[name] = tree_take(value, place, batch_axes(name, value, ranks)[0])
    return found


def _scattered(
    first: Transform, initial: Any, domain: Grid, place: Tensor, scatter: float, generator: torch.Generator | None
) -> Any:
    """Start parameters of the copies, away from `initial` by random steps."""
    if isinstance(initial, Mapping):
        raise ValueError("initial is a Mapping: to scatter starts about it give parameters, as of Rigid().fit")
    ranks, axes = first.ranks(domain), domain_axes(domain)
    begin = expand(first.init(single(domain)) if initial is None else initial, ranks, len(place))
    zero = first.zero_step(single(domain))

    def away(leaf: Tensor) -> Tensor:
        shape = (len(place), *leaf.shape)
        return scatter * torch.randn(shape, generator=generator, dtype=leaf.dtype).to(leaf.device)

    over = (None, None, axes)
    return tree_vmap(first.retract, over, begin, tree_map(away, zero), tree_take(domain, place, axes))
