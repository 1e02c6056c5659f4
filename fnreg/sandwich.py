"""The covariance of one pair's step at the solution, from its linearised residuals, their noise and its penalties.

The equations are those of `fnreg.uncertainty`; every function is for one pair, and torch.func batches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

from fnreg import fields
from fnreg import noise as noises
from fnreg.gather import Padding
from fnreg.grid import Grid, index_points
from fnreg.pair import Pair, pair_coords, pair_found, pair_map, pair_seen
from fnreg.pytree import tree_leaves
from fnreg.sampling import sample
from fnreg.solvers.base import parted
from fnreg.transforms.base import Transform


class Options(NamedTuple):
    """How the covariance is computed, see `fnreg.uncertainty.laplace`."""

    transform: Transform
    noise: str
    reach: int
    prior: bool
    padding: Padding | None


class Found(NamedTuple):
    """What is known of a pair, see `fnreg.uncertainty.Laplace`."""

    covariance: Tensor
    free: Tensor
    bias: Tensor
    deviation: Tensor
    freedom: Tensor
    left: Tensor


class Seen(NamedTuple):
    """What a pair's similarity is made of at the solution.

    coords : (D, N) voxel indices in the moving image; warped : (C, N) of it; weights : (1, N)
    slopes : (C, D, N) derivative of the moving image by the coordinates; others : of the fixed one
    residuals : (C, N) scale times a difference; scale : (1, N); total : of voxels and channels, by weight
    """

    coords: Tensor
    warped: Tensor
    weights: Tensor
    slopes: Tensor
    others: Tensor
    residuals: Tensor
    scale: Tensor
    total: Tensor


def pair_at(options: Options, params: Any, pair: Pair, coords: Tensor) -> Seen:
    """The pair's images at coordinates."""
    seen, weights = pair_seen(pair, coords, options.padding)
    every = torch.ones_like(coords[:1]) if weights is None else weights
    residuals = pair_residuals(options, params, pair, seen.value, pair.fixed.data, every)
    term = pair.objective.similarities.terms[0]
    channels = len(_channels(pair))
    scale = (term.weight.to(every.dtype) * every / (channels * every.sum().clamp(min=1e-30))).sqrt()
    others = _slope_of_fixed(pair, coords)
    residuals = residuals.reshape(-1, coords.shape[1])
    return Seen(coords, seen.value, every, seen.gradient, others, residuals, scale, every.sum() * channels)


def pair_residuals(options: Options, params: Any, pair: Pair, warped: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
    """The residuals (R,) of the similarity of images (C, N) with weights (1, N)."""
    similar = pair.objective.similarities
    found = pair_found(options.transform, params, pair, warped, weights, similar.needs)
    return similar.residuals(found | {"fixed": fixed.reshape(pair.fixed.data.shape)})


def pair_noise(options: Options, pair: Pair, seen: Seen) -> noises.Noise:
    """The noise of the difference, up to a factor."""
    if options.noise == "independent":
        data = torch.cat([pair.moving.data[c : c + 1] for c in _channels(pair)])
        return noises.independent(data, seen.coords, options.padding)
    shape = pair.fixed.grid.shape
    return noises.correlated(seen.residuals, seen.scale, shape, options.reach, _turn(pair))


def pair_drawn(pair: Pair, seen: Seen, slope: Tensor) -> Tensor:
    """The derivative (D, N) of the expected |r|^2 by the coordinates, up to the factor: between voxels interpolation
    averages noise away, which draws the solution there, whatever the images show.

    slope : of the noise
    """
    part = seen.coords - seen.coords.floor()
    toward = torch.where(part == 0, 0, 2 * part - 1)  # at a voxel it is drawn to both sides alike
    return toward * slope * seen.scale.square() * len(_channels(pair))


def typical_variance(scale: Tensor, variance: Tensor) -> Tensor:
    """The variance of one residual up to the factor, by scale (1, N) and variance of the noise (C, N)."""
    return (variance * scale.square().square()).sum() / scale.square().sum() / len(variance)


def noise_deviation(factor: Tensor, variance: Tensor, weights: Tensor) -> Tensor:
    """The standard deviation of the noise in the unit of the images."""
    return (factor * (variance * weights).sum() / weights.sum() / len(variance)).sqrt()


def _channels(pair: Pair) -> Sequence[int]:
    return pair.objective.similarities.terms[0].channels or range(pair.moving.data.shape[0])


def pair_penalty(transform: Transform, params: Any, pair: Pair) -> Tensor:
    """The penalties, scalar."""
    penalties = pair.objective.penalties
    found = pair_map(transform, params, pair.domain, pair.fixed.grid, penalties.needs)
    return penalties.value(found)[0].to(torch.float64)


def pair_covariance(options: Options, params: Any, pair: Pair) -> Found:
    """Covariance, free directions, bias, noise, freedom and Newton's step left, of one pair in float64."""
    transform = options.transform
    zero = transform.cast(transform.zero_step(pair.domain), torch.float64)
    start = torch.cat([leaf.flatten() for leaf in tree_leaves(zero)])

    def moved(flat: Tensor) -> Any:
        return transform.perturb(params, parted(flat, zero), pair.domain)

    def along(flat: Tensor) -> tuple[Tensor, Tensor]:
        found = pair_coords(transform, moved(flat), pair)
        return found, found

    def penalty(flat: Tensor) -> Tensor:
        return pair_penalty(transform, moved(flat), pair)

    by_step, coords = jacfwd(along, has_aux=True)(start)  # (D, N, P), (D, N)
    seen = pair_at(options, params, pair, coords)
    scale, residuals = seen.scale, seen.residuals
    noise = pair_noise(options, pair, seen)

    def residuals_of(warped: Tensor, fixed: Tensor) -> Tensor:
        return pair_residuals(options, params, pair, warped, fixed, seen.weights)

    images = seen.warped, pair.fixed.data.flatten(1)
    tangents = torch.einsum("cdn,dnp->pcn", seen.slopes, by_step)
    jacobian = vmap(lambda t: jvp(lambda x: residuals_of(x, images[1]), images[:1], (t,))[1])(tangents)  # (P, R)
    tangents = torch.einsum("cdn,dnp->pcn", seen.others, by_step)
    other = -vmap(lambda t: jvp(lambda x: residuals_of(images[0], x), images[1:], (t,))[1])(tangents)
    jacobian, other = (j.reshape(len(start), -1, scale.shape[1]) for j in (jacobian, other))  # (P, C, N)

    spread = vmap(noise.apply)(jacobian * scale)
    middle = torch.einsum("pcn,qcn->pq", spread * scale, jacobian)  # J^T C J
    information = torch.einsum("pcn,qcn->pq", jacobian, jacobian)
    slope = torch.einsum("pcn,cn->p", jacobian, residuals)
    held = torch.zeros_like(information)
    if pair.objective.penalties.terms:
        held = jacfwd(grad(penalty))(start) / 2
        held = (held + held.mT) / 2
        slope = slope + grad(penalty)(start) / 2
    # Of the moving image's noise alone: sum over voxels and channels of s^2 (dx/ds)^T Cov(grad n) (dx/ds).
    idle = torch.einsum("dnp,dn,dnq->pq", by_step, noise.slope * scale.square() * len(_channels(pair)), by_step)
    variance = noise.variance * scale.square()  # of the residuals, up to the factor
    typical = typical_variance(scale, noise.variance)

    inverse = inverse_within(information + held)[0]
    taken = inverse @ information
    mixed = inverse @ middle
    # E |r|^2 over the factor: what the fit takes off the noise, and what penalties leave of the truth.
    expected = variance.sum() - 2 * torch.trace(mixed) + torch.trace(mixed @ taken)
    expected = expected + typical * torch.trace(inverse @ held @ taken)
    factor = residuals.square().sum() / expected.clamp(min=1e-30)

    pull = factor / 2 * torch.einsum("dnp,dn->p", by_step, pair_drawn(pair, seen, noise.slope))
    known = _known(torch.einsum("pcn,qcn->pq", jacobian, other), factor * idle, seen.total)
    inverse, free = inverse_within(known + held)
    middle = factor * (middle + (typical * held if options.prior else 0)) + torch.outer(pull, pull)
    covariance, lost = _within(inverse @ middle @ inverse, float(max(pair.fixed.grid.size)) ** 2 * len(start))
    free = free + lost
    newton = inverse @ slope
    apart = newton @ inverse_within(covariance)[0] @ newton
    deviation = noise_deviation(factor, noise.variance, seen.weights)
    freedom = torch.trace(inverse @ known)
    return Found(covariance, free, -inverse @ pull, deviation, freedom, (apart / len(start)).clamp(min=0).sqrt())


def _turn(pair: Pair) -> Tensor:
    """(D, D) from steps of fixed voxels to steps of moving ones, as the grids lie; the map itself turns little."""
    if pair.to_moving is not None:
        return (pair.to_moving @ pair.from_fixed)[:-1, :-1]
    return (pair.moving.grid.matrix("world", "index") @ pair.from_fixed)[:-1, :-1]


def _slope_of_fixed(pair: Pair, coords: Tensor) -> Tensor:
    """The fixed image's derivative by coordinates in the moving one (C, D, N), by the chain rule through the map."""
    grid = pair.fixed.grid
    index = index_points(grid.size, coords.dtype, coords.device)[:-1]
    shift = (coords - index).reshape(-1, *grid.shape)
    turn = fields.jacobian(shift, Grid(grid.size)).flatten(2).movedim(2, 0)  # (N, D, D) of coords by index
    back = torch.linalg.inv_ex(turn).inverse
    return torch.einsum("cin,nij->cjn", sample(pair.fixed.data, index).gradient, back)


def _known(cross: Tensor, idle: Tensor, count: Tensor) -> Tensor:
    """The information J^T J of the images without their noise, where there is clearly any; not negative.

    cross : J^T J' with the derivatives of both images: their noises are independent, so noise adds nothing on average
    idle : what noise adds to J^T J; count : N, of voxels

    Of noise alone the symmetric part of `cross`, in units of `idle`, has no eigenvalue beyond sqrt(2 P / N): Wigner's
    law, doi 10.2307/1970079.  Directions with less are not told from those without information.
    """
    values, vectors = eigen(idle)
    # Images without noise, such as equal ones, have none that could be a unit: then all is known.
    least = 1e-12 * torch.maximum(values.amax(), cross.abs().amax()).clamp(min=1e-200)
    values = values.clamp(min=least)
    root, back = vectors * values.sqrt(), vectors / values.sqrt()
    ratio, turned = eigen(back.mT @ cross @ back)
    kept = torch.where(ratio > (2 * len(cross) / count.clamp(min=1)).sqrt(), ratio, 0)
    basis = root @ turned
    return (basis * kept) @ basis.mT


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., P) and vectors (..., P, P) of the symmetric part; NaN of a matrix that is not finite, where
    LAPACK ends the whole batch."""
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, (matrix + matrix.mT) / 2, eye))
    return torch.where(finite[..., 0], values, torch.nan), torch.where(finite, vectors, torch.nan)


def inverse_within(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse within the directions of positive eigenvalues, and the projection on the others."""
    values, vectors = eigen(matrix)
    good = values > 1e-10 * values.amax().clamp(min=0)
    inverse = (vectors * torch.where(good, 1 / torch.where(good, values, 1), 0)) @ vectors.mT
    return inverse, (vectors * (~good).to(vectors.dtype)) @ vectors.mT


def _within(covariance: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The covariance without directions whose variance is beyond `most`, and the projection on these."""
    values, vectors = eigen(covariance)
    good = values <= most
    kept = (vectors * torch.where(good, values.clamp(min=0), 0)) @ vectors.mT
    return kept, (vectors * (~good).to(vectors.dtype)) @ vectors.mT
