"""The Gaussian approximation of large models: the covariance of a point by systems of equations, no matrix formed.

With G the derivative of a mapped point by the step, D rows, G Sigma G^T = X^T (J^T C J + t K) X of the D solutions of
A X = G^T.  The equations and names are those of `fnreg.uncertainty`, products are those of `fnreg.linearised`.

The strength of the noise needs traces of products with A^-1, which random vectors of signs e tell, E e e^T = 1:
of H = J A^-1 J^T, with u = A^-1 J^T e, tr H C = E (C e)^T J u, tr H C H = E (J u)^T C J u and
tr A^-1 K A^-1 J^T J = E u^T K u; one system of equations for each e.  Hutchinson 1990, doi 10.1080/03610919008812866.

Of the product of the derivatives of both images the directions that are no more than noise are dropped voxel by voxel
here, as told by windows of a few voxels: see `fnreg.linearised.clear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fnreg.linearised import Linearised, Roots, Solves
from fnreg.modes import Diagonal, Scaling
from fnreg.pair import Pair
from fnreg.problem import Level
from fnreg.pytree import (
    batch_axes,
    batch_size,
    beside_transforms,
    in_parts,
    is_concrete,
    pytree_dataclass,
    static,
    tree_flatten,
    tree_known,
    tree_leaves,
    tree_take,
    tree_unflatten,
    tree_vmap,
)
from fnreg.sandwich import Options, noise_deviation, pair_drawn, typical_variance
from fnreg.solvers.base import parted
from fnreg.solvers.conjugate import dot
from fnreg.starts import expand
from fnreg.transforms.base import Mapping, Transform, apart
from fnreg.transforms.domain import Domain, first_domain


def first_map(mapping: Mapping) -> tuple[Transform, Domain, Any]:
    """What was optimised: transform, domain and parameters."""
    first, after = apart(mapping)
    if after is not None and len(mapping.params) > 2:
        raise ValueError(
            f"the mapping is made of {len(mapping.params)} maps: of one that was optimised and one that acts after it "
            "it is known how sure it is; compose the later ones to one first"
        )
    return first.transform, first.domain, first.params


def mapped_by_step(mapping: Mapping, points: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The mapped points (N, D) of one pair as a function of the step's entries (P,), and those of no step."""
    transform, domain, params = first_map(mapping)
    zero = transform.zero_step(domain)

    def mapped(flat: Tensor) -> Tensor:
        found = transform.perturb(params, parted(flat, zero), domain)
        if apart(mapping)[1] is not None:
            found = (found, *mapping.params[1:])
        return mapping.transform.points(found, mapping.domain, points.to(torch.float64))

    return mapped, torch.cat([leaf.flatten() for leaf in tree_leaves(zero)]).to(torch.float64)


class Told(NamedTuple):
    """Numbers of each pair (B, ...)."""

    factor: Tensor  # of the noise
    typical: Tensor  # variance of one residual, up to the factor
    pull: Tensor  # (B, P) of half of E |r|^2, by the step
    bias: Tensor  # (B, P)
    deviation: Tensor
    deviation_error: Tensor
    freedom: Tensor
    freedom_error: Tensor
    left: Tensor
    positive: Tensor  # whether the information had to be made so


@pytree_dataclass
class SolvedLaplace:
    """The Gaussian approximation of a large model's error, as `Laplace`; what is asked of it is computed then.

    mapping : the solution, the mean
    bias, deviation, freedom : as of `Laplace`
    deviation_error, freedom_error : their standard errors, as they are estimated by random vectors
    left : Newton's step d that is left to the minimum, sqrt(d^T A d) over the root mean square of that of errors: 0 at
        the minimum, 1 as far as errors go
    positive : whether the information of both images had to be made positive, which takes some noise for it and makes
        ellipses somewhat smaller: see `fnreg.linearised.clear`
    pairs : the images and the objective
    """

    mapping: Mapping
    bias: Tensor
    deviation: Tensor
    deviation_error: Tensor
    freedom: Tensor
    freedom_error: Tensor
    left: Tensor
    factor: Tensor
    typical: Tensor
    pull: Tensor
    positive: Tensor
    pairs: Pair
    options: Options = static()
    solves: Solves = static()

    @property
    def transform(self) -> Transform:
        """Whose step it is; maps that act after the transform stay as they are."""
        return self.options.transform

    def ranks(self) -> SolvedLaplace:
        """The rank that each leaf has for one pair."""
        ranks = [self.mapping.ranks(), 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, self.pairs.ranks()]
        return tree_unflatten(tree_flatten(ranks)[0], tree_flatten(self)[1])

    def point_covariance(self, points: Tensor) -> Tensor:
        """Covariance (N, D, D) of `mapping.map_points(points)` in squared world units, (B, N, D, D) of a batch.

        points : (N, D) fixed world points

        D systems of equations for each point.  An axis along which a point could be anywhere in the image has infinite
        variance.  Raises ValueError where conjugate gradients do not converge; in a batch that is NaN.
        """
        grid = first_domain(self.mapping.domain)
        if points.shape[-1:] != (grid.ndim,):
            raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {grid.ndim}) world points")
        axes, sizes = batch_axes("laplace", self, self.ranks())
        of_points, more = batch_axes("points", points, 2)
        batch = batch_size(sizes | more)
        lin = self._linearised(batch or 1)
        roots = lin.roots(self.factor.expand(batch or 1), self.positive.expand(batch or 1))
        scaling = lin.scaling(roots)

        def some(part: slice) -> Tensor:
            rows = tree_vmap(_rows, (axes, of_points, (0,)), self, points[..., part, :], lin.seen.scale)  # (B, nD, P)
            found, good = solved(lin, rows.movedim(1, 0).to(torch.float64), roots, scaling, self.solves, batch is None)
            covariance = tree_vmap(_covariance, (axes, (0,), (0,)), self, *_middle(lin, found))
            return torch.where(good.all(0)[:, None, None, None], covariance, torch.nan).movedim(1, 0)

        width = max(1, lin.width // grid.ndim)
        found = in_parts(some, points.shape[-2], width).movedim(1, 0)  # (B, N, D, D)
        extent = grid.extent.amax(-1).square().expand(len(found)).reshape(-1, 1, 1)
        far = torch.diagonal(found, dim1=-2, dim2=-1) > extent  # (B, N, D)
        both = far.unsqueeze(-1) & far.unsqueeze(-2)
        found = torch.where(both, torch.copysign(found.new_tensor(torch.inf), found), found)
        return found if batch is not None else found[0]

    def _linearised(self, size: int) -> Linearised:
        return linearised(self.options, self.mapping, self.pairs, size)

    def samples(self, count: int, *, generator: torch.Generator | None = None) -> Mapping:
        """None can be drawn, as the root of no covariance is formed: ValueError."""
        raise ValueError(
            f"{count} samples of {self.transform} are not drawn: no covariance of its {self.bias.shape[-1]} parameters "
            "is formed: use point_covariance, a longer stride with dense=True, or `ensemble`"
        )

    def pair(self, number: int) -> SolvedLaplace:
        """One pair of a batch."""
        return tree_take(self, number, batch_axes("laplace", self, self.ranks())[0])


def linearised(options: Options, mapping: Mapping, pairs: Pair, size: int) -> Linearised:
    """The products at the solution of `size` pairs."""
    transform, domain, params = first_map(mapping)
    ranks = Mapping(params, domain, transform).ranks().params
    level = Level(transform, pairs, batch_axes("pair", pairs, pairs.ranks())[0], size, options.padding)
    return Linearised(options, level, expand(transform.cast(params, torch.float64), ranks, size))


def _rows(laplace: SolvedLaplace, points: Tensor, _: Tensor) -> Tensor:
    """G (N D, P), the derivative of mapped points by the step."""
    mapped, start = mapped_by_step(laplace.mapping, points)
    made: Any = vjp(mapped, start)
    value, pull = made
    each = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)
    return vmap(pull)(each)[0]


def _middle(lin: Linearised, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x^T J^T C J x' (B, n, D, D) of the rows x (nD, B, P) of a point, with x^T K x'; and the rows (B, n, D, P)."""
    seen = lin.forth(rows)
    dimension = lin.seen.coords.shape[1]
    mixed, held = lin.coloured(seen), lin.held(rows)
    grouped = [part.unflatten(0, (-1, dimension)).flatten(3) for part in (seen, mixed, rows, held)]  # (n, D, B, ...)
    seen, mixed, rows, held = (part.movedim(2, 0) for part in grouped)  # (B, n, D, ...)
    return torch.stack([seen @ mixed.mT, rows @ held.mT], 1), rows


def _covariance(laplace: SolvedLaplace, both: Tensor, rows: Tensor) -> Tensor:
    """(n, D, D) from both parts (2, n, D, D) of what moves a point."""
    of_noise, of_prior = both
    middle = of_noise + (laplace.typical * of_prior if laplace.options.prior else 0)
    drawn = rows @ laplace.pull
    return laplace.factor * (middle + middle.mT) / 2 + drawn.unsqueeze(-1) * drawn.unsqueeze(-2)


# -- systems and traces ------------------------------------------------------------------------------------------------


def solved(
    lin: Linearised, rows: Tensor, roots: Roots | None, scaling: Scaling | Diagonal, solves: Solves, alone: bool
) -> tuple[Tensor, Tensor]:
    """A^-1 of rows (S, B, P), and which of them (S, B) are solutions; of a pair that is alone all have to be."""
    found, left = lin.solve(rows, roots, scaling, solves)
    good = left <= solves.tolerance * (1 + 1e-9)
    if alone and is_concrete(good) and not bool(good.all()):
        worst = float(torch.where(torch.isnan(left), torch.inf, left).max())
        if worst == torch.inf:
            raise ValueError(
                "neither images nor penalties tell about some direction, along which the curvature is not positive: "
                "add a penalty that does, such as a little diffusion, or give it more weight"
            )
        raise ValueError(
            f"conjugate gradients left a relative residual of {worst:.3g} after {solves.iterations} iterations, where "
            f"tolerance is {solves.tolerance:g}: give more iterations, a larger tolerance, "
            "Solves(iterations=..., tolerance=...), or a penalty of more weight"
        )
    return found, good


def tell(lin: Linearised, solves: Solves, alone: bool) -> Told:
    """The numbers of every pair; where a system was not solved they are NaN."""
    seen, variance = lin.seen, lin.spread.variance
    ok = torch.ones(len(seen.scale), dtype=torch.bool, device=seen.scale.device)
    scaling = lin.scaling(None)
    typical = tree_vmap(typical_variance, (None, None), seen.scale, variance)
    expected: list[Tensor] = []
    for signs in _probes(solves.probes, lin, len(seen.residuals[0])):
        found, good = solved(lin, lin.back(signs), None, scaling, solves, alone)
        fitted = lin.forth(found)
        both = lin.coloured(torch.cat([signs, fitted])).split(len(signs))
        away = -2 * _inner(both[0], fitted) + _inner(both[1], fitted)
        expected.append(away + typical * _inner(found, lin.held(found)))
        ok = ok & good.all(0)
    whole = (variance * seen.scale.square()).sum((1, 2))
    mean, error = _mean(torch.cat(expected) + whole)
    factor = seen.residuals.square().sum((1, 2)) / mean.clamp(min=1e-30)
    deviation = tree_vmap(noise_deviation, (None, None, None), factor, variance, seen.weights)

    drawn = lin.over(_drawn, seen, lin.spread.slope)
    pull = factor.unsqueeze(1) / 2 * lin.pulled(drawn)
    slope = lin.slope()
    positive = _negative(lin, factor, torch.stack([pull, slope]), solves)
    roots = lin.roots(factor, positive)
    scaling = lin.scaling(roots)
    found, good = solved(lin, torch.stack([pull, slope]), roots, scaling, solves, alone)
    ok = ok & good.all(0)
    bias, newton = -found[0], found[1]
    freedom: list[Tensor] = []
    noisy: list[Tensor] = []
    for signs in _probes(solves.probes, lin, roots.signs.shape[1]):
        found, good = solved(lin, lin.back(signs, roots), roots, scaling, solves, alone)
        freedom.append(_inner(signs * roots.signs, lin.forth(found, roots)))
        ok = ok & good.all(0)
    for signs in _probes(solves.probes, lin, len(seen.residuals[0])):
        found, good = solved(lin, lin.back(signs), roots, scaling, solves, alone)
        noisy.append(_inner(lin.coloured(signs), lin.forth(found)))
        ok = ok & good.all(0)
    free, free_error = _mean(torch.cat(freedom))
    # E d^T A d of an error d, whose covariance is that of `fnreg.uncertainty`
    typical_error = factor * torch.cat(noisy).mean(0) - dot(pull, bias)
    if lin.options.prior:
        typical_error = typical_error + factor * typical * (slope.shape[1] - free)
    left = (dot(slope, newton) / typical_error).clamp(min=0).sqrt()
    told = (factor, typical, pull, bias, deviation, deviation * error / mean / 2, free, free_error, left)
    return Told(*tree_known(ok, told), positive)


def _negative(lin: Linearised, factor: Tensor, rows: Tensor, solves: Solves) -> Tensor:
    """Whether the information of both images, as it is, leaves A a direction of negative curvature (B,), as far as
    conjugate gradients from some rows and from white noise in the images meet one."""
    roots = lin.roots(factor, torch.zeros_like(factor, dtype=torch.bool))
    signs = next(_probes(1, lin, roots.signs.shape[1]))
    rows = torch.cat([rows, lin.back(signs, roots)])
    return torch.isinf(lin.solve(rows, roots, lin.scaling(roots), solves)[1]).any(0)


def _probes(count: int, lin: Linearised, channels: int) -> Iterator[Tensor]:
    """Signs (S, B, C, N), some at a time; alike for all pairs and calls."""
    like, done = lin.seen.residuals[:, :1].expand(-1, channels, -1), 0
    while done < count:
        some = min(lin.width, count - done)
        with beside_transforms():
            drawn = [torch.Generator().manual_seed(number) for number in range(done, done + some)]
            signs = [
                torch.randint(2, tuple(like.shape[1:]), generator=draw, dtype=torch.int8, device="cpu")
                for draw in drawn
            ]
            made = torch.stack(signs).unsqueeze(1).to(like.device)
        yield (2 * made.to(like.dtype) - 1).expand(-1, *like.shape)
        done += some


def _drawn(options: Options, seen: Any, slope: Tensor, pair: Pair) -> Tensor:
    return pair_drawn(pair, seen, slope)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (S, B)."""
    return (a * b).flatten(2).sum(2)


def _mean(found: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error (B,) of (S, B)."""
    return found.mean(0), found.std(0) / len(found) ** 0.5
