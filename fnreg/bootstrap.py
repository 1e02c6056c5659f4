"""How sure a registration is, by doing it again: with fresh noise, or from other starts, all copies in one call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.image import Image, Subject
from fnreg.inputs import Inputs, prepare
from fnreg.losses import functional
from fnreg.losses.objective import Objective
from fnreg.losses.terms import mse
from fnreg.noise import drawn, squared_weights
from fnreg.pair import Pair, pair_coords, pair_seen
from fnreg.pytree import pytree_dataclass, static, tree_map, tree_vmap
from fnreg.registration import Registration, register
from fnreg.repeats import repeat, repeat_options, repeat_stages, repeated
from fnreg.stages import Stage, first_transform, objectives_of
from fnreg.starts import expand
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.domain import domain_axes, single


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
        """Moving world points (count, N, D) of fixed ones (N, D), (B, count, N, D) of a batch; NaN where a copy failed,
        and in all copies of a pair whose reference did: copies of a constant image are no longer constant."""
        if points.ndim == 3:
            points = points.repeat_interleave(self.count, 0)
        moved = self.registration.map_points(points)
        ok = self.registration.ok & self.reference.ok.reshape(-1).repeat_interleave(self.count)
        moved = torch.where(ok[:, None, None], moved, torch.nan)
        moved = moved.unflatten(0, (-1, self.count))
        return moved[0] if self.alone else moved

    def mean(self, points: Tensor) -> Tensor:
        """The mean of the mapped points, (N, D) or (B, N, D)."""
        return torch.nanmean(self.map_points(points), -3)

    def point_covariance(self, points: Tensor) -> Tensor:
        """Mean square (N, D, D) of the mapped points about the reference, squared world units, (B, N, D, D) of a batch.

        sum (T_i(p) - T(p))(T_i(p) - T(p))^T / n over the n copies that did not fail: a shift that noise brings to all
        of them is one that the reference has too.

        It is an estimate from n copies, so an ellipse of it holds less than one of the covariance itself: those of 95 %
        would hold 93 % with 32 copies, 86 % with 8.  `plot.ellipses(..., count=n)` makes them as much larger as that
        takes, by Hotelling's distribution.
        """
        away = self.map_points(points) - self.reference.map_points(points).unsqueeze(-3)
        known = torch.isfinite(away)
        number = known.all(-1).sum(-2)  # of copies, (N,) or (B, N)
        away = torch.where(known, away, 0)
        return torch.einsum("...cni,...cnj->...nij", away, away) / number[..., None, None]

    def spread(self, points: Tensor) -> Tensor:
        """Root mean square distance of the mapped points from the reference, world units, (N,) or (B, N)."""
        return torch.diagonal(self.point_covariance(points), dim1=-2, dim2=-1).sum(-1).sqrt()

    def shift(self, points: Tensor) -> Tensor:
        """Mean less the reference, (N, D) or (B, N, D): how far the added noise moves the solution systematically."""
        return self.mean(points) - self.reference.map_points(points)


def ensemble(
    fixed: Image | Subject,
    moving: Image | Subject,
    transform: Transform | Stage | Sequence[Stage | Transform],
    *,
    count: int = 32,
    noise: float | Sequence[float] | None = None,
    scatter: float = 0.0,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Ensemble:
    """Register `count` copies of each pair with independent noise added to both images, in one call of `register`.

    noise : standard deviation of the added noise, of both images or of (fixed, moving); None is what the residuals of
        the registration without added noise tell, in the voxels that count for it inside of the moving image, taken as
        of equal variance in both; 0 adds none
    scatter : voxels; each copy starts from the identity, or from `initial`, after a step of this standard deviation
    generator : of the random numbers; it lives on the CPU also where the images are on a GPU
    options : of `register`; what has the axis of the pairs, as weights, rates and starts may, goes with all copies of
        its pair

    Noise as strong as there is already moves the copies from the reference as that was moved from the truth, to
    first order: the parametric bootstrap, Efron and Tibshirani 1993, "An Introduction to the Bootstrap".  Added noise
    is independent from voxel to voxel: of images that were smoothed or resampled give those before.

    Raises ValueError where the noise cannot be told from residuals, as no similarity is `mse`, TypeError for a pyramid
    of images, and RegistrationError where a single pair cannot be registered at all.

    >>> import torch, fnreg
    >>> blob = (-(fnreg.Grid((20, 20)).points() - 9.5).square().sum(1) / 20).exp().reshape(1, 20, 20)
    >>> generator = torch.Generator().manual_seed(0)
    >>> noisy = [fnreg.Image(blob + 0.02 * torch.randn(1, 20, 20, generator=generator)) for _ in range(2)]
    >>> options = {"levels": 1, "solver": fnreg.GaussNewton(), "generator": generator}
    >>> copies = fnreg.ensemble(*noisy, fnreg.Translation(), count=8, **options)
    >>> copies.map_points(torch.tensor([[9.5, 9.5]])).shape
    torch.Size([8, 1, 2])
    """
    _check_asked(fixed, moving, count, scatter, options)
    told = None if noise is None else _strengths(noise)
    reference = register(fixed, moving, transform, **options)
    given = objectives_of(transform, options.get("objective", mse))[-1][-1]
    whole = prepare(fixed, moving, None, levels=1, min_size=1, objectives=(given,))
    alone = reference.status.ndim == 0
    size = 1 if alone else len(reference.status)
    if told is None:
        if not any(term.function is functional.mse for term in given.terms):
            raise ValueError(f"{given} does not compare intensities as they are: tell the images' noise, noise=0.05")
        strength = _noise_of(reference, whole, given)
        both = strength, strength
    else:
        both = tuple(torch.full((1, 1), value, device="cpu") for value in told)
    sides = (("fixed", fixed, both[0]), ("moving", moving, both[1]))
    noisy_fixed, noisy_moving = (_copies(*side, size, count, generator) for side in sides)
    first, domain = first_transform(transform), whole.domain
    options = repeat_options(options, first, domain, pairs=size, count=count)
    if scatter > 0:
        options["initial"] = _scattered(first, options.get("initial"), domain, size, count, scatter, generator)
    stages = repeat_stages(transform, pairs=size, count=count)
    return Ensemble(register(noisy_fixed, noisy_moving, stages, **options), reference, count, alone)


def _check_asked(fixed: Any, moving: Any, count: int, scatter: float, options: dict[str, Any]) -> None:
    """What is wrong before any registration."""
    for name, given in (("fixed", fixed), ("moving", moving)):
        if not isinstance(given, (Image, Subject)):
            raise TypeError(
                f"{name} is {type(given).__name__}: expected an Image or a Subject, whose pyramid is made of its noisy "
                "copies; of a pyramid give the finest image"
            )
    if count < 2:
        raise ValueError(f"count is {count}: a spread takes at least 2 copies")
    if not scatter >= 0:
        raise ValueError(f"scatter is {scatter}: expected a number of voxels that is not negative")
    if scatter > 0:
        start = options.get("start", "header")
        others = ["starts"] if options.get("starts") is not None else []
        others += [f"start={start!r}"] if start != "header" else []
        if others:
            raise ValueError(
                f"scatter={scatter} and {' and '.join(others)} both say where copies begin: give one of them; scatter "
                "goes about the identity, or about initial"
            )
        if isinstance(options.get("initial"), Mapping):
            raise ValueError("initial is a Mapping: to scatter starts about it give parameters, as of Rigid().fit")


def _strengths(noise: Any) -> tuple[float, float]:
    """Standard deviations of the noise in both images."""
    several = list(noise) if isinstance(noise, (tuple, list)) else [noise, noise]
    try:
        found = [float(strength) for strength in several]
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers raises the last of them
        found = []
    if len(found) != 2 or not all(0 <= strength < math.inf for strength in found):
        raise ValueError(f"noise is {noise}: expected a standard deviation that is not negative, or two of them")
    return found[0], found[1]


def _noise_of(result: Registration, whole: Inputs, objective: Objective) -> Tensor:
    """Standard deviation (B, C) of each image's noise: of the difference, less what interpolation averages away.

    Voxels count as in the registration, by both masks, but those outside of the moving image never: what is seen there
    is none of its noise.
    """
    mapping, transform = result.mapping, result.mapping.transform
    size = 1 if result.status.ndim == 0 else len(result.status)
    level = whole.level(0, transform, objective, size, None, domain=mapping.domain)

    def one(params: Any, pair: Pair) -> Tensor:
        coords = pair_coords(transform, params, pair)
        seen, weights = pair_seen(pair, coords, None)
        assert weights is not None
        kept = 1 + squared_weights(coords).prod(0)
        square = (seen.value - pair.fixed.data.flatten(1)).square() * weights
        return (square.sum(1) / (kept * weights).sum().clamp(min=1e-30)).sqrt()

    params = expand(mapping.params, mapping.ranks().params, size)
    return tree_vmap(one, (None, level.axes), params, level.pairs)


def _copies(
    name: str, given: Any, strength: Tensor, pairs: int, count: int, generator: torch.Generator | None
) -> Image | Subject:
    """The image of each copy, with noise of its own."""
    taken = repeat(name, given, given.ranks(), count)
    image = taken.image if isinstance(taken, Subject) else taken
    size = pairs * count
    data = image.data if image.data.ndim > image.grid.ndim + 1 else image.data.expand(size, *image.data.shape)
    fresh = drawn(data.shape, data, generator)
    strength = (strength if len(strength) == 1 else strength.repeat_interleave(count, 0)).to(data)
    noisy = Image(data + fresh * strength.reshape(*strength.shape, *(1,) * image.grid.ndim), image.grid)
    return dataclasses.replace(taken, image=noisy) if isinstance(taken, Subject) else noisy


def _scattered(
    first: Transform,
    initial: Any,
    domain: Grid,
    pairs: int,
    count: int,
    scatter: float,
    generator: torch.Generator | None,
) -> Any:
    """Start parameters of the copies, away from `initial` by random steps."""
    size, axes = pairs * count, domain_axes(domain)
    begin = expand(first.init(single(domain)) if initial is None else initial, first.ranks(domain), size)
    zero = first.zero_step(single(domain))

    def away(leaf: Tensor) -> Tensor:
        return scatter * drawn((size, *leaf.shape), leaf, generator)

    over = (None, None, axes)
    return tree_vmap(first.retract, over, begin, tree_map(away, zero), repeated(domain, axes, count))
