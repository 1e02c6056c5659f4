"""How often the truth lies in the 95 % ellipses of `laplace` and `ensemble`, on simulated pairs.

A scene of random waves is seen through a random known map, with noise added to both images; the error of the
registration at three points is compared with the ellipses there.  The registration is refined until it has converged:
an error that the optimiser leaves is not noise.  Of free-form deformations the truth is drawn from what the penalty
takes for probable, as it is for the posterior that the ellipses are of.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import hessian, jacfwd, vmap

import fnreg
from benchmarks.measure import Options, Table, seconds
from fnreg.filters import gaussian
from fnreg.plot.ellipses import limit
from fnreg.pytree import tree_leaves
from fnreg.solvers.base import parted

WAVES = 40
EDGE = 10  # voxels that filtering noise needs beyond the image


class Simulated(NamedTuple):
    """Pairs, and the maps between them."""

    fixed: fnreg.Image
    moving: fnreg.Image
    truth: fnreg.Mapping

    def errors(self, mapping: fnreg.Mapping, points: Tensor) -> Tensor:
        """(B, N, D) of mapped points (N, D)."""
        many = points.expand(len(self.fixed.data), *points.shape)
        return mapping.map_points(many) - self.truth.map_points(many)


def simulate(
    transform: fnreg.Transform,
    steps: Tensor,
    *,
    size: int = 32,
    noise: float = 0.05,
    wave: float = 5.0,
    blur: float = 0.0,
    generator: torch.Generator,
) -> Simulated:
    """Pairs whose truth is a step (B, P) from the identity.

    wave : typical inverse wave number of the scene, voxels; its standard deviation is 1
    noise : standard deviation in each image; blur : of a Gaussian that correlates it, voxels
    """
    count, grid = len(steps), fnreg.Grid((size, size))
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    waves = torch.randn(count, WAVES, 2, **kind) / wave
    phase = 2 * math.pi * torch.rand(count, WAVES, 1, **kind)

    def scene(points: Tensor) -> Tensor:
        values = torch.cos(waves @ points.mT + phase).sum(1) * (2 / WAVES) ** 0.5
        return values.reshape(count, 1, size, size)

    def noisy(clean: Tensor) -> fnreg.Image:
        fresh = torch.randn(count, 1, size + 2 * EDGE, size + 2 * EDGE, **kind)
        if blur > 0:
            fresh = vmap(lambda one: gaussian(one, blur))(fresh)
            fresh = fresh / fresh.std()
        return fnreg.Image(clean + noise * fresh[..., EDGE:-EDGE, EDGE:-EDGE], grid)

    start, zero = transform.init(grid), transform.zero_step(grid)
    params = vmap(lambda flat: transform.retract(start, parted(flat, zero), grid))(steps)
    truth = fnreg.Mapping(params, grid, transform)
    points = grid.points().expand(count, -1, -1)
    return Simulated(noisy(scene(truth.map_points(points))), noisy(scene(points)), truth)


class Prior(NamedTuple):
    """Steps that bending takes for probable: N(0, root root^T), and the weight of bending that does so."""

    root: Tensor  # (P, P)
    weight: float


def bending_prior(transform: fnreg.FFD, size: int, noise: float, amplitude: float) -> Prior:
    """The prior under which points move by `amplitude` voxels, with images of this noise.

    exp(-weight bending / 2 t), t the variance of a residual: noise of both images, of which interpolation leaves 4/9 of
    the moving one's on average.  What bending does not see, affine maps, stays zero.
    """
    grid = fnreg.Grid((size, size))
    start, zero = transform.init(grid), transform.zero_step(grid)
    flat = torch.cat([leaf.flatten() for leaf in tree_leaves(zero)])

    def bent(flat: Tensor) -> Tensor:
        params = transform.perturb(start, parted(flat, zero), grid)
        return fnreg.penalties.bending(transform.field(params, grid))

    def moved(flat: Tensor) -> Tensor:
        return transform.points(transform.perturb(start, parted(flat, zero), grid), grid, grid.points())

    values, vectors = torch.linalg.eigh(hessian(bent)(flat) / 2)
    seen = values > 1e-9 * values.max()
    root = vectors * torch.where(seen, 1 / values.clamp(min=1e-30), 0).sqrt()
    size_of = (jacfwd(moved)(flat) @ root).square().sum(-1).mean().sqrt()
    root = root * (amplitude / size_of)
    return Prior(root, float(noise**2 * (1 + 4 / 9) / size**2 * (size_of / amplitude) ** 2))


def probe(size: int) -> Tensor:
    """Three points: inside, in the middle, near a border."""
    return size * torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.9, 0.3]], dtype=torch.float64)


def unbounded(covariance: Tensor) -> Tensor:
    """Where a variance is infinite, so that the ellipse holds everything; what is NaN is no variance at all."""
    variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
    return variance.isinf().any(-1) & ~variance.isnan().any(-1)


def distances(errors: Tensor, covariance: Tensor) -> Tensor:
    """Squared errors in units of the covariance, e^T S^-1 e: 0 where the variance is infinite, NaN where it is NaN."""
    known = torch.isfinite(covariance).all(-1).all(-1)
    finite = torch.where(known[..., None, None], covariance, torch.eye(2, dtype=covariance.dtype))
    found = torch.einsum("...i,...ij,...j->...", errors, torch.linalg.inv(finite), errors)
    return torch.where(known, found, torch.where(unbounded(covariance), 0, torch.nan))


def covered(errors: Tensor, covariance: Tensor, count: int | None = None) -> Tensor:
    """Share of the pairs whose truth is in the 95 % ellipse, (N,): an infinite one holds it, one that is NaN does not.

    count : copies that the covariance was estimated from
    """
    return (distances(errors, covariance) <= limit(0.95, count)).double().mean(0)


def finite_mean(values: Tensor, covariance: Tensor) -> float:
    """The mean of what is finite, where the covariance is."""
    known = torch.isfinite(values) & torch.isfinite(covariance).all(-1).all(-1)
    return float(values[known].mean())


def rigid(count: int, generator: torch.Generator, **options: Any) -> tuple[Simulated, fnreg.Registration]:
    """Rigid motions of about one voxel, registered."""
    steps = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    pairs = simulate(fnreg.Rigid(), steps, generator=generator, **options)
    solver = fnreg.GaussNewton()
    return pairs, fnreg.register(pairs.fixed, pairs.moving, fnreg.Rigid(), levels=2, solver=solver)


def bent(
    count: int, generator: torch.Generator, *, noise: float = 0.05, size: int = 32, stride: int = 8
) -> tuple[Simulated, fnreg.Registration, fnreg.Objective]:
    """Free-form deformations of about a voxel from the prior that the objective has, registered."""
    transform = fnreg.FFD(stride)
    prior = bending_prior(transform, size, noise, 1.0)
    steps = torch.randn(count, len(prior.root), generator=generator, dtype=torch.float64) @ prior.root.mT
    pairs = simulate(transform, steps, size=size, noise=noise, wave=4.0, generator=generator)
    objective = fnreg.mse + prior.weight * fnreg.bending
    options: dict[str, Any] = {"levels": 2, "steps": (100, 400), "optimizer": fnreg.adam(0.1, decay=0.01)}
    return pairs, fnreg.register(pairs.fixed, pairs.moving, transform, objective=objective, **options), objective


def run(options: Options) -> list[Table]:
    """One table: coverage and mean squared error in units of the variance, which is 2 where the variance is right."""
    count = 60 if options.quick else 500
    columns = (
        "pairs",
        "covariance",
        "inside",
        "middle",
        "border",
        "infinite",
        "mean of e² / variance",
        "rms error",
        "seconds",
    )
    table = Table(f"Share of {count} pairs whose truth is in the 95 % ellipse, at three points", columns)
    points = probe(32)

    def told(
        name: str, kind: str, pairs: Simulated, result: fnreg.Registration, covariance: Any, count: int | None = None
    ) -> None:
        taken = seconds(lambda: found.append(covariance()))
        errors = pairs.errors(result.mapping, points)
        shares = covered(errors, found[-1], count).tolist()
        endless = float(unbounded(found[-1]).double().mean())
        mean = finite_mean(distances(errors, found[-1]), found[-1])
        square = finite_mean(errors.square().sum(-1), found[-1])
        table.rows.append((name, kind, *shares, endless, mean, math.sqrt(square), taken))

    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[str, dict[str, float]]] = [
        ("Rigid", {}),
        ("Rigid, coarser scene and noise of 0.1", {"wave": 6.0, "noise": 0.1}),
        ("Rigid, finer scene: linear interpolation misfits", {"wave": 3.0}),
        ("Rigid, noise with a correlation of 0.8 voxels", {"blur": 0.8}),
    ]
    for name, scene in cases:
        pairs, result = rigid(count, generator, **scene)
        for kind in ("independent", "correlated"):

            def of(kind: Any = kind, pairs: Simulated = pairs, result: fnreg.Registration = result) -> Tensor:
                return fnreg.laplace(pairs.fixed, pairs.moving, result, noise=kind).point_covariance(points)

            told(name, kind, pairs, result, of)
    few = 20 if options.quick else 100
    pairs, _ = rigid(few, generator)
    copies: list[fnreg.Ensemble] = []

    def resampled() -> None:
        kind: dict[str, Any] = {"count": 24, "generator": generator, "levels": 2, "solver": fnreg.GaussNewton()}
        copies.append(fnreg.ensemble(pairs.fixed, pairs.moving, fnreg.Rigid(), **kind))

    taken = seconds(resampled)
    for kind, used in (("ensemble of 24", 24), ("the same, as if of many", None)):
        told(f"Rigid, {few} others", kind, pairs, copies[0].reference, lambda: copies[0].point_covariance(points), used)
        table.rows[-1] = (*table.rows[-1][:-1], taken)
    pairs, result, objective = bent(count, generator)
    for kind in ("independent", "correlated"):

        def bayes(kind: Any = kind) -> Tensor:
            return fnreg.laplace(pairs.fixed, pairs.moving, result, objective=objective, noise=kind).point_covariance(
                points
            )

        told("FFD(8), truth from the prior", kind, pairs, result, bayes)

    def by_systems() -> Tensor:
        return fnreg.laplace(pairs.fixed, pairs.moving, result, objective=objective, dense=False).point_covariance(
            points
        )

    told("FFD(8), truth from the prior", "correlated, solved for", pairs, result, by_systems)
    table.notes = (
        "seconds are of all covariances, without the registration; with 500 pairs a share of 0.95 varies by 0.01; an "
        "infinite ellipse holds the truth, means are of the finite ones, and the ellipses of copies are Hotelling's "
        "but in the row that says otherwise",
    )
    return [table]
