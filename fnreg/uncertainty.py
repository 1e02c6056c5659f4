"""How sure a registration is: the Gaussian approximation of its error, carried to points as ellipses.

With residuals r(s) whose squares are the similarity and half the Hessian K of the penalties, by the step s at the
solution, a small noise n of the residuals moves the solution by -A^-1 J^T n, A = J^T J + K.  So its covariance is

    Sigma = A^-1 (J^T C J + t K) A^-1        C the covariance of the noise, see `fnreg.noise`

the sandwich of Huber 1967 and White 1982, doi 10.2307/1912526; inverting the Hessian alone, t A^-1, takes residuals for
independent, which interpolation and smoothing make them not.  t K is the pull of the penalties on a truth that is as
probable as they say, exp(-penalty / 2 t), t the variance of one residual: then Sigma is the covariance of the posterior
where noise is white, and of the error of its maximum for any noise.  Simpson et al. 2012,
doi 10.1016/j.neuroimage.2011.08.052, weigh residuals by their correlation to the same end.

The derivative of a noisy image is noisy too, which adds to J^T J what is no information.  So the J^T J of A is the
product of the derivatives of both images, whose noises are independent; a direction in which it is no more than noise
would make it, such as the rotation of a disc, has infinite variance.  Linear interpolation averages noise away between
voxels, which draws the solution there, Rohde et al. 2009, doi 10.1109/TIP.2008.2008081: how far is known from the
noise, and counts as part of the error.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from fnreg import noise as noises
from fnreg.gather import Interpolation, Padding
from fnreg.image import Image, Subject, subject
from fnreg.inputs import prepare
from fnreg.linearised import Solves
from fnreg.losses import functional
from fnreg.losses.objective import OF_LABELS, OF_POINTS, Objective
from fnreg.losses.objective import objective as as_objective
from fnreg.losses.terms import mse
from fnreg.notes import warn
from fnreg.pair import Pair
from fnreg.pytree import (
    batch_axes,
    batch_size,
    is_concrete,
    over_batch,
    pytree_dataclass,
    static,
    tree_flatten,
    tree_known,
    tree_leaves,
    tree_map,
    tree_take,
    tree_unflatten,
    tree_vmap,
)
from fnreg.registration import Registration
from fnreg.sandwich import Found, Options, pair_covariance
from fnreg.solved import SolvedLaplace, Told, first_map, linearised, mapped_by_step, tell
from fnreg.solvers.base import Status, parted
from fnreg.starts import expand
from fnreg.transforms.base import Mapping, Transform, apart
from fnreg.transforms.domain import first_domain, single

FAR = 3.0  # standard deviations
UNSEEN = 0.05  # of what moves a point
LARGEST = 2048  # parameters: the covariance has as many rows and columns


@pytree_dataclass
class Laplace:
    """The Gaussian approximation of a registration's error; of a batch all but static fields have a leading axis.

    mapping : the solution, the mean
    covariance : (P, P) of the step, in voxels along the fixed grid's axes; entries in the order of the step's leaves.
        It is the mean square about the mapping, bias included
    free : (P, P) projection on the directions of which neither images nor penalties tell, with a standard deviation
        longer than the image: there the variance is infinite, and `covariance` leaves them out
    bias : (P,) of the step, as far as interpolation draws the solution to where it averages most noise away: between
        voxels.  Zero where noise is smooth
    deviation : of the residuals' noise, in the unit in which the similarity compares; of one image alone it is about
        0.7 of this, where both are as noisy
    freedom : the number of parameters that images rather than penalties tell, tr A^-1 J^T J
    left : Newton's step that is left to the minimum, in standard deviations sqrt(d^T Sigma^-1 d / P): 0 at the minimum
    transform : whose step it is; maps that act after the transform stay as they are
    """

    mapping: Mapping
    covariance: Tensor
    free: Tensor
    bias: Tensor
    deviation: Tensor
    freedom: Tensor
    left: Tensor
    transform: Transform = static()

    def ranks(self) -> Laplace:
        """The rank that each leaf has for one pair."""
        return tree_unflatten([*tree_flatten(self.mapping.ranks())[0], 2, 2, 1, 0, 0, 0], tree_flatten(self)[1])

    def point_covariance(self, points: Tensor) -> Tensor:
        """Covariance (N, D, D) of `mapping.map_points(points)` in squared world units, (B, N, D, D) of a batch.

        points : (N, D) fixed world points

        G Sigma G^T with the derivative G of the mapped point by the step.  An axis along which directions of infinite
        variance do more than a twentieth of what moves a point has infinite variance.
        """
        dimension = first_domain(self.mapping.domain).ndim
        if points.shape[-1:] != (dimension,):
            raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {dimension}) world points")
        return over_batch(_points, laplace=(self, self.ranks()), points=(points, 2))

    def samples(self, count: int, *, generator: torch.Generator | None = None) -> Mapping:
        """`count` mappings drawn from the approximation: one with a leading axis, of one pair.

        Raises ValueError for a batch, and where a direction has infinite variance.
        """
        if self.covariance.ndim > 2:
            raise ValueError("samples are of one pair: take one of the batch, laplace.pair(0)")
        if count < 1:
            raise ValueError(f"count is {count}: draw at least one")
        if not bool(torch.isfinite(self.covariance).all()):
            raise ValueError("this pair failed to register, so there is nothing to draw from")
        if bool(self.free.any()):
            raise ValueError(
                "neither images nor penalties tell about some directions, whose variance is infinite: there is nothing "
                "to draw from; add a penalty, or choose a transform without them"
            )
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()
        noise = noises.drawn((count, len(root)), root, generator)
        transform, domain, params = first_map(self.mapping)
        zero = transform.zero_step(domain)
        found = vmap(lambda flat: transform.retract(params, parted(flat, zero), domain))(noise @ root.mT)
        if apart(self.mapping)[1] is not None:
            rest = tree_map(lambda leaf: leaf.expand(count, *leaf.shape), self.mapping.params[1:])
            found = (found, *rest)
        return Mapping(found, self.mapping.domain, self.mapping.transform)

    def pair(self, number: int) -> Laplace:
        """One pair of a batch."""
        return tree_take(self, number, batch_axes("laplace", self, self.ranks())[0])


class _Given(TypedDict, total=False):
    """Options of `laplace` that do not decide what it gives."""

    objective: Any
    noise: noises.Kind
    reach: int
    prior: bool
    padding: Padding | None
    interpolation: Interpolation
    solves: Solves


@overload
def laplace(
    fixed: Image | Subject,
    moving: Image | Subject,
    registration: Registration,
    *,
    dense: Literal[True],
    **options: Unpack[_Given],
) -> Laplace: ...
@overload
def laplace(
    fixed: Image | Subject,
    moving: Image | Subject,
    registration: Registration,
    *,
    dense: Literal[False],
    **options: Unpack[_Given],
) -> SolvedLaplace: ...
@overload
def laplace(
    fixed: Image | Subject,
    moving: Image | Subject,
    registration: Registration,
    *,
    dense: None = None,
    **options: Unpack[_Given],
) -> Any: ...
def laplace(
    fixed: Image | Subject,
    moving: Image | Subject,
    registration: Registration,
    *,
    objective: Any = mse,
    noise: noises.Kind = "correlated",
    reach: int = 3,
    prior: bool = True,
    padding: Padding | None = None,
    interpolation: Interpolation = "linear",
    dense: bool | None = None,
    solves: Solves = Solves(),
) -> Laplace | SolvedLaplace:
    """The Gaussian approximation of a registration's error from its Gauss-Newton Hessian, see `fnreg.uncertainty`.

    fixed, moving, objective, padding : what was registered, on its finest level, not `symmetric`.  The objective is one
        of `mse` and `ncc`, with penalties or without
    registration : at its minimum; warns where Newton's step to it is longer than three standard deviations
    noise : "correlated" is stationary and reads the correlation of the residuals off them, which serves smoothed and
        resampled images; "independent" is of equal variance in every voxel and channel of both images as given, for
        `mse`.  The variance is estimated from the residuals in both cases
    reach : voxels along an axis beyond which correlated noise is taken to be independent
    prior : whether the error counts by how far penalties pull from a truth that is as probable as they say; without,
        it is the spread by noise alone, as other scans of the same would show it
    interpolation : "linear", as it was registered: of no other it is known what it does to noise
    dense : whether the covariance of all parameters is formed, which gives a `Laplace`; else it is solved for point by
        point, which gives a `SolvedLaplace` and asks for a penalty.  None forms it of up to 2048 parameters
    solves : how it is solved for

    The approximation knows of noise, not of local minima, of a transform that cannot hold the truth, nor of images
    that differ by more than it: what misalignment leaves of the residuals counts as noise, so that a registration that
    ended far from its minimum is told as unsure rather than warned of.  In a batch a pair that failed has NaN; alone it
    raises ValueError, as does what has no residuals (`lncc`, `mi`), no single objective (`Diffeomorphism`), or many
    parameters and no penalty.

    >>> import torch, fnreg
    >>> blob = (-(fnreg.Grid((24, 24)).points() - 11.5).square().sum(1) / 40).exp().reshape(1, 24, 24)
    >>> noisy = [fnreg.Image(blob + 0.02 * torch.randn(1, 24, 24, dtype=torch.float64)) for _ in range(2)]
    >>> result = fnreg.register(*noisy, fnreg.Translation(), levels=1, solver=fnreg.GaussNewton())
    >>> sure = fnreg.laplace(*noisy, result)
    >>> sure.point_covariance(torch.tensor([[11.5, 11.5]], dtype=torch.float64)).shape
    torch.Size([1, 2, 2])
    """
    total = as_objective(objective)
    mapping = registration.mapping
    transform, domain, params = first_map(mapping)
    size = _check(transform, total, noise, reach, registration, fixed, interpolation, dense)
    then = apart(mapping)[1]
    exact = [tree_map(lambda leaf: leaf.to(torch.float64), subject(image).image) for image in (fixed, moving)]
    whole = prepare(
        _with_image(fixed, exact[0]), _with_image(moving, exact[1]), then, levels=1, min_size=1, objectives=(total,)
    )
    ranks = Mapping(params, domain, transform).ranks()
    sizes = batch_axes("registration.mapping", mapping, mapping.ranks())[1]
    sizes |= batch_axes("objective", total, total.ranks())[1]
    batch = batch_size(whole.sizes | sizes)
    failed = (registration.status > int(Status.CONVERGED)).reshape(-1).expand(batch or 1)
    whole = whole if batch is None else whole.without(failed)
    level = whole.level(0, transform, total, batch or 1, padding, then)
    params = expand(transform.cast(params, torch.float64), ranks.params, batch or 1)
    options = Options(transform, noise, reach, prior, padding)
    if batch is None and is_concrete(failed) and bool(failed):
        raise ValueError(
            f"the registration failed: {Status(int(registration.status)).remedy}; there is no solution to be unsure of"
        )
    if not (size <= LARGEST if dense is None else dense):
        return _solved(options, solves, mapping, level.pairs, failed, batch)
    found = Found(*tree_vmap(functools.partial(pair_covariance, options), (None, level.axes), params, level.pairs))
    found = tree_known(~failed, found)
    _warn_far(found.left, batch or 1)
    found = found if batch is not None else Found(*(x[0] for x in found))
    return Laplace(mapping, *found, transform)


def _solved(
    options: Options, solves: Solves, mapping: Mapping, pairs: Pair, failed: Tensor, batch: int | None
) -> SolvedLaplace:
    told = tree_known(~failed, tell(linearised(options, mapping, pairs, batch or 1), solves, batch is None))
    _warn_far(told.left, batch or 1)
    told = told if batch is not None else Told(*(x[0] for x in told))
    return SolvedLaplace(mapping, **told._asdict(), pairs=pairs, options=options, solves=solves)


def _warn_far(left: Tensor, count: int) -> None:
    if is_concrete(left) and bool((left > FAR).any()):
        warn(
            f"{int((left > FAR).sum())} of {count} registrations ended more than {FAR:g} standard "
            "deviations from their minimum, so their error is larger than told: use GaussNewton() or more steps; where "
            "that is no help a kink of linear interpolation holds them, of which smoother images have less",
            stacklevel=3,
        )


# -- what was registered ---------------------------------------------------------------------------------------------


def _with_image(given: Image | Subject, image: Image) -> Image | Subject:
    if not isinstance(given, Subject):
        return image
    mask = None if given.mask is None else given.mask.to(torch.float64)
    return Subject(image, mask, sharp=given.sharp)


def _check(
    transform: Transform,
    total: Objective,
    noise: str,
    reach: int,
    registration: Registration,
    fixed: Image | Subject,
    interpolation: str,
    dense: bool | None,
) -> int:
    """The number of parameters; ValueError where there is no answer."""
    if not transform.descends:
        raise ValueError(
            f"{transform} descends no single objective, so there is no Hessian at its end: use SVFFD, or `ensemble`"
        )
    if noise not in noises.KINDS:
        raise ValueError(f"unknown noise {noise!r}: choose {' or '.join(noises.KINDS)}")
    grid = subject(fixed).image.grid
    if grid.size != registration.fixed_grid.size:
        raise ValueError(
            f"fixed has size {grid.size} but {registration.fixed_grid.size} was registered: give the same images"
        )
    if reach < 1:
        raise ValueError(f"reach is {reach}: expected at least 1 voxel")
    similar = total.similarities
    for term in similar.terms:
        if term.residuals is None or not set(term.needs).isdisjoint((*OF_LABELS, *OF_POINTS)):
            raise ValueError(
                f"{term.name} has no residuals of voxels, of which the noise could be read off: laplace takes mse and "
                "ncc; for any other similarity use `ensemble`"
            )
    if len(similar.terms) != 1:
        raise ValueError(
            f"the objective has {len(similar.terms)} similarities: laplace takes one, as two see the same noise"
        )
    if noise == "independent" and similar.terms[0].function is not functional.mse:
        raise ValueError(f"noise='independent' goes with mse alone, not {similar.terms[0].name}: choose 'correlated'")
    if interpolation != "linear":
        raise ValueError(
            f"interpolation is {interpolation!r}: laplace knows what linear interpolation does to noise; register with "
            "it, which a few steps from this solution do, or use `ensemble`"
        )
    count = sum(leaf.numel() for leaf in tree_leaves(transform.zero_step(single(registration.fixed_grid))))
    if dense and count > LARGEST:
        raise ValueError(
            f"{transform} has {count} parameters: a covariance of more than {LARGEST} is not formed; leave dense out"
        )
    if (count > LARGEST or dense is False) and len(similar.terms) == len(total.terms):
        raise ValueError(
            f"the objective {total} has no penalty, without which {count} parameters are not determined: register with "
            "one, such as mse + 1e-3 * bending, choose a longer stride, or use `ensemble`"
        )
    return count


# -- points ------------------------------------------------------------------------------------------------------------


def _points(laplace: Laplace, points: Tensor) -> Tensor:
    mapped, start = mapped_by_step(laplace.mapping, points)
    slope = jacfwd(mapped)(start).to(torch.float64)  # (N, D, P)
    covariance = slope @ laplace.covariance @ slope.mT
    unknown = slope @ laplace.free
    beyond = unknown @ unknown.mT  # (N, D, D)
    unseen = torch.diagonal(beyond, dim1=-2, dim2=-1) > UNSEEN**2 * slope.square().sum(-1)  # (N, D)
    both = unseen.unsqueeze(-1) & unseen.unsqueeze(-2)
    return torch.where(both, torch.copysign(beyond.new_tensor(torch.inf), beyond), covariance)
