"""A batch of pairs at their solutions, as products of rows: J x, J^T y, C y and K x of `fnreg.uncertainty`.

No matrix of the step is formed.  J x is the push of a step to the coordinates at which the moving image is seen, times
the image's derivative there; J^T is its transpose; K x is the penalties' second derivative along x.  Rows are many
vectors of all pairs, (S, B, P), values are (S, B, C, N); as many go side by side as `VOXELS` lets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from fnreg import noise as noises
from fnreg.filters import gaussian
from fnreg.hessian import transposed
from fnreg.losses import functional
from fnreg.modes import Diagonal, Modes, Scaling, modes
from fnreg.pair import Pair, pair_coords
from fnreg.problem import Level
from fnreg.pytree import in_parts, tree_vmap
from fnreg.sandwich import Options, Seen, eigen, pair_at, pair_noise, pair_penalty, pair_residuals
from fnreg.solvers.base import joined, parted
from fnreg.solvers.conjugate import conjugate_gradients, dot
from fnreg.solvers.scaled import Scaled
from fnreg.stiffness import Stiffness

VOXELS = 2**21  # of all pairs and vectors that go side by side
WINDOW = 3.0  # voxels, standard deviation of the Gaussian in which the slopes of both images are compared
EIGEN = 2**18  # small matrices that are decomposed at once


@dataclasses.dataclass(frozen=True)
class Solves:
    """How `laplace` answers without forming a covariance: by systems of equations and by traces of random vectors.

    probes : random vectors of signs for the traces, which fix the strength of the noise; their number is the same for
        all pairs, and so are they
    tolerance : of conjugate gradients, the relative residual |A x - b| / |b|; 1e-3 leaves about 0.3 % of a variance
    iterations : at most, of each system; inside vmap exactly
    """

    probes: int = 8
    tolerance: float = 1e-3
    iterations: int = 1000

    def __post_init__(self) -> None:
        whole = isinstance(self.probes, Integral) and isinstance(self.iterations, Integral)
        if not whole or self.probes < 2 or not 0 < self.tolerance < 1 or self.iterations < 1:
            raise ValueError(
                f"{self!r}: expected probes >= 2 and iterations >= 1, whole numbers, and tolerance in (0, 1)"
            )


class Spread(NamedTuple):
    """The noise of a pair's difference, as tensors: see `fnreg.noise.Noise`."""

    variance: Tensor
    slope: Tensor
    density: Tensor


class Roots(NamedTuple):
    """The information R^T S R that images have of the coordinates of their voxels.

    rows : (D, D, N) R of each voxel; signs : (D, N) the diagonal of S
    """

    rows: Tensor
    signs: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """The pairs of a level at parameters (B, ...), which with the level are in float64."""

    options: Options
    level: Level
    params: Any

    def over(self, function: Callable[..., Any], *batched: Any) -> Any:
        """A function of the options, of these and of one pair, on all pairs."""
        bound = functools.partial(function, self.options)
        return tree_vmap(bound, (*(None for _ in batched), self.level.axes), *batched, self.level.pairs)

    # -- what is seen ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _to_coords(self) -> tuple[Tensor, Callable[..., Any], Callable[..., Any]]:
        """Coordinates (B, D, N), their pull-back and their push."""
        made: Any = vjp(lambda step: self.over(_coords, step, self.params), self.level.zero_step())
        return made[0].detach(), made[1], transposed(made[1], made[0])

    @functools.cached_property
    def seen(self) -> Seen:
        """What the similarities are made of."""
        return self.over(_at, self.params, self._to_coords[0])

    @functools.cached_property
    def spread(self) -> Spread:
        """The noise."""
        return self.over(_spread, self.seen)

    @functools.cached_property
    def _to_residuals(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Pull-back and push of the residuals (B, R) by what the moving images show (B, C, N)."""
        (term,) = self.level.pairs.objective.similarities.terms
        if term.function is functional.mse and term.channels is None:  # the scale alone, which spares passes

            def scaled(values: Tensor) -> Tensor:
                return (values.reshape(self.seen.residuals.shape) * self.seen.scale).flatten(1)

            return (lambda by: (scaled(by).reshape(self.seen.warped.shape),)), scaled
        fixed = self.over(lambda options, like, pair: pair.fixed.data.flatten(1), self.seen.coords)

        def of(warped: Tensor) -> Tensor:
            return self.over(_residuals, self.params, self.seen, warped, fixed)

        made: Any = vjp(of, self.seen.warped)
        return made[1], transposed(made[1], made[0])

    def roots(self, factor: Tensor, positive: Tensor) -> Roots:
        """What both images tell of each voxel's coordinates, (B, ...): see `clear`.

        factor : (B,) of the noise; positive : (B,) bool
        """
        made: Any = tree_vmap(
            functools.partial(_roots, self.options),
            (None, None, None, None, None, self.level.axes),
            *(self.params, self.seen, self.spread.slope, factor, positive, self.level.pairs),
        )
        return made

    # -- products --------------------------------------------------------------------------------------------------

    def forth(self, rows: Tensor, roots: Roots | None = None) -> Tensor:
        """J x (S, B, C, N) of rows; with roots R x (S, B, D, N) of what both images tell."""
        push, on = self._to_coords[2], self._to_residuals[1]

        def one(row: Tensor) -> Tensor:
            moved = push(parted(row, self.level.zero_step())).unsqueeze(1)  # (B, 1, D, N)
            if roots is not None:
                return (roots.rows * moved).sum(2)
            return on((self.seen.slopes * moved).sum(2)).reshape(self.seen.residuals.shape)

        return self._several(one, rows)

    def back(self, values: Tensor, roots: Roots | None = None) -> Tensor:
        """The transpose of `forth`: (S, B, P) of values."""
        off = self._to_residuals[0]

        def one(value: Tensor) -> Tensor:
            if roots is not None:
                return self.pulled((roots.rows * value.unsqueeze(2)).sum(1))
            return self.pulled((self.seen.slopes * off(value.flatten(1))[0].unsqueeze(2)).sum(1))

        return self._several(one, values)

    def pulled(self, by_coords: Tensor) -> Tensor:
        """The pull-back (B, P) of a cotangent of the coordinates (B, D, N)."""
        return joined(self._to_coords[1](by_coords)[0])

    def coloured(self, values: Tensor) -> Tensor:
        """C y, with the noise as it is in the residuals: scale C scale."""
        return self._several(lambda value: self.over(_coloured, self.seen, self.spread.density, value), values)

    @functools.cached_property
    def _bent(self) -> Callable[..., Any]:
        """The derivative of the penalties' gradient."""
        return vjp(lambda step: self.over(_pull_of_penalty, step, self.params), self.level.zero_step())[1]

    def held(self, rows: Tensor) -> Tensor:
        """K x (S, B, P) of rows, half the penalties' second derivative."""
        return self._several(lambda row: joined(self._bent(parted(row, self.level.zero_step()))[0]) / 2, rows)

    def curved(self, rows: Tensor, roots: Roots | None) -> Tensor:
        """A x = (J^T J + K) x; with roots R^T S R in place of J^T J."""
        seen = self.forth(rows, roots)
        return self.back(seen if roots is None else seen * roots.signs, roots) + self.held(rows)

    def slope(self) -> Tensor:
        """J^T r and half the penalties' gradient (B, P): zero at the minimum."""
        of_penalty = joined(self.over(_pull_of_penalty, self.level.zero_step(), self.params)) / 2
        return self.back(self.seen.residuals.unsqueeze(0))[0] + of_penalty

    def _several(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """A linear function of one vector of each pair, of as many side by side as fit."""

        def some(part: slice) -> Tensor:
            found = rows[part]
            return function(found[0]).unsqueeze(0) if len(found) == 1 else vmap(function)(found)

        with torch.no_grad():
            return in_parts(some, len(rows), self.width)

    @property
    def width(self) -> int:
        """How many vectors of each pair go side by side."""
        return max(1, VOXELS // self.seen.coords[:, 0].numel())

    # -- systems ---------------------------------------------------------------------------------------------------

    def scaling(self, roots: Roots | None) -> Scaling | Diagonal:
        """S with S S^T close to the inverse of A."""
        if self._modes is not None:
            zero = joined(self.level.zero_step())
            shifts = Stiffness(zero, self.seen.coords.shape[1], 1.0).shifts(zero)
            told = self.forth(torch.stack(shifts), roots).square()
            told = (told if roots is None else told * roots.signs).flatten(2).sum(2)  # (D, B)
            return self._modes.scaled(told.mT.clamp(min=1e-300))

        def changed(row: Tensor) -> Tensor:
            return 2 * self.curved(row.unsqueeze(0), roots)[0]

        return Diagonal((Scaled(self.level).diagonal(changed, self.slope(), 1.0) / 2).rsqrt())

    @functools.cached_property
    def _modes(self) -> Modes | None:
        return modes(self.level)

    def solve(
        self, rows: Tensor, roots: Roots | None, scaling: Scaling | Diagonal, solves: Solves
    ) -> tuple[Tensor, Tensor]:
        """A^-1 of rows (S, B, P), and the relative residual (S, B), infinite where A is not positive definite."""
        size, width = rows.shape[:2]

        def product(flat: Tensor) -> Tensor:
            curved = self.curved(scaling.forth(flat).unflatten(0, (-1, width)), roots)
            return scaling.back(curved.flatten(0, 1))

        right = scaling.back(rows.flatten(0, 1))
        found = conjugate_gradients(product, right, tolerance=solves.tolerance, iterations=solves.iterations)
        left = (dot(found.residual, found.residual) / dot(right, right)).sqrt()
        left = torch.where((right == 0).all(1), 0, torch.where(found.curved, torch.inf, left))
        return scaling.forth(found.x).unflatten(0, (size, width)), left.unflatten(0, (size, width))


# -- of one pair -------------------------------------------------------------------------------------------------------


def _coords(options: Options, step: Any, params: Any, pair: Pair) -> Tensor:
    return pair_coords(options.transform, options.transform.perturb(params, step, pair.domain), pair)


def _at(options: Options, params: Any, coords: Tensor, pair: Pair) -> Seen:
    return pair_at(options, params, pair, coords)


def _spread(options: Options, seen: Seen, pair: Pair) -> Spread:
    noise = pair_noise(options, pair, seen)
    return Spread(noise.variance, noise.slope, noise.density)


def _coloured(options: Options, seen: Seen, density: Tensor, value: Tensor, pair: Pair) -> Tensor:
    value = value * seen.scale
    if options.noise == "independent":
        return pair_noise(options, pair, seen).apply(value) * seen.scale
    return noises.stationary(density, pair.fixed.grid.shape, options.reach, value) * seen.scale


def _residuals(options: Options, params: Any, seen: Seen, warped: Tensor, fixed: Tensor, pair: Pair) -> Tensor:
    return pair_residuals(options, params, pair, warped, fixed, seen.weights).flatten()


def _pull_of_penalty(options: Options, step: Any, params: Any, pair: Pair) -> Any:
    def value(step: Any) -> Tensor:
        return pair_penalty(options.transform, options.transform.perturb(params, step, pair.domain), pair)

    return grad(value)(step)


# -- information without noise -----------------------------------------------------------------------------------------


def _roots(
    options: Options, params: Any, seen: Seen, noise_slope: Tensor, factor: Tensor, positive: Tensor, pair: Pair
) -> Roots:
    """What both images tell."""
    fixed, shape = pair.fixed.data.flatten(1), pair.fixed.grid.shape
    signs = _signs(seen.scale.shape[1], seen.scale)

    def share(residuals: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        """What a change of one voxel changes of its own residual, over the scale, per channel (C, 1)."""
        made: Any = vjp(residuals, at)
        found = made[1](signs.expand(seen.residuals.shape).reshape(made[0].shape))[0]
        return (found * signs * seen.scale).sum(1, keepdim=True) / seen.scale.square().sum().clamp(min=1e-300)

    of_moving = share(lambda x: pair_residuals(options, params, pair, x, fixed, seen.weights), seen.warped)
    of_fixed = share(lambda x: pair_residuals(options, params, pair, seen.warped, x, seen.weights), fixed)
    slopes = of_moving.unsqueeze(1) * seen.slopes * seen.scale
    others = -of_fixed.unsqueeze(1) * seen.others * seen.scale
    idle = factor * noise_slope * seen.scale.square() * len(seen.residuals)
    return clear(slopes, others, idle, shape, positive)


def _signs(count: int, like: Tensor) -> Tensor:
    """Signs (1, N) without a pattern."""
    number = torch.arange(count, device=like.device)
    return (1 - 2 * ((number * 7919 + 13) * 48271 % 2147483647 % 2)).to(like.dtype).unsqueeze(0)


def clear(slopes: Tensor, others: Tensor, idle: Tensor, shape: tuple[int, ...], positive: Tensor) -> Roots:
    """The local information R^T S R of two images without their noise.

    slopes, others : derivatives (C, D, N) of both images by the same coordinates, g and g'
    idle : (D, N) variance that noise alone gives g, summed over channels
    positive : bool, whether it must not be negative of any voxel

    It is the symmetric part of g g'^T, to which noise adds nothing on average, as that of both images is independent.
    Of a voxel it may be negative, over what a step moves it adds up.  Directions in which its mean over a window, in
    units of idle, is no more than noise makes it have none: the eigenvalues of noise are within 2 sqrt(D / 2 n) in a
    window of n voxels, by Wigner's law as in `fnreg.sandwich`.  The mean itself would not serve: it tells of two
    directions where each voxel tells of one.  Where it must be positive it is that of g alone, with the share of the
    mean that is no noise, k / (k + 1) of an eigenvalue k: beside contours noise then stays, and ellipses are smaller.
    """
    dimension, count = slopes.shape[1:]
    rows, columns = torch.triu_indices(dimension, dimension, device="cpu").tolist()
    mixed = (slopes[:, rows] * others[:, columns] + slopes[:, columns] * others[:, rows]).sum(0) / 2
    own = (slopes[:, rows] * slopes[:, columns]).sum(0)
    place = torch.zeros(dimension, dimension, dtype=torch.int64, device=slopes.device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=slopes.device)
    means = gaussian(torch.cat([mixed, idle]).reshape(-1, *shape), WINDOW).flatten(1)
    least = (2 * dimension / (4 * math.pi * WINDOW**2) ** (dimension / 2)) ** 0.5
    root = torch.maximum(means[len(rows) :], 1e-12 * mixed.abs().amax().clamp(min=1e-300)).sqrt()  # (D, N)

    def some(part: slice) -> tuple[Tensor, Tensor]:
        unit = root[:, part].mT.unsqueeze(2)  # (n, D, 1)
        each = torch.where(positive, own[:, part], mixed[:, part])
        mean, each = (t[place.to(root.device)].movedim(2, 0) / (unit * unit.mT) for t in (means[:, part], each))
        values, vectors = eigen(mean)
        share = torch.where(positive, (values / (values + 1).clamp(min=1)).clamp(min=0).sqrt(), 1)
        kept = (vectors * torch.where(values > least, share, 0).unsqueeze(1)) @ vectors.mT
        values, vectors = eigen(kept @ each @ kept)
        return unit * vectors * values.abs().sqrt().unsqueeze(1), values.sign()

    rows_of, signs = in_parts(some, count, EIGEN)
    return Roots(rows_of.permute(2, 1, 0), signs.mT)
