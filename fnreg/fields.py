"""Dense vector fields: displacements u and velocities v of a grid's voxels.

A field is `(D, [Z,] Y, X)`: at each voxel a world vector in (x, y[, z]) order, in the dtype of the images.  As a map it
is p -> p + u(p), linear between voxels and constant beyond the border.

What runs in hot loops takes a *shift*: the same in voxels along the grid's own axes, so that voxel i moves to
i + shift(i).  `to_shift` and `from_shift` convert.

Functions are written for one field; for a batch use `torch.func.vmap`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fnreg import filters, flow
from fnreg.derivatives import (
    Statistics,
    check,
    curl,
    determinant,
    divergence,
    folded_cells,
    folds,
    jacobian,
    slope,
    statistics,
)
from fnreg.gather import Padding
from fnreg.grid import Grid, index_points
from fnreg.inverse import Inverse, after, invert_shift
from fnreg.pytree import is_concrete
from fnreg.sampling import interpolate

__all__ = [
    "Consistency",
    "Inverse",
    "Logarithm",
    "Statistics",
    "affine_field",
    "bch",
    "compose",
    "compose_shift",
    "curl",
    "determinant",
    "divergence",
    "exp",
    "exp_shift",
    "folded_cells",
    "folds",
    "from_shift",
    "in_voxels",
    "in_world",
    "inverse_consistency",
    "invert",
    "invert_shift",
    "jacobian",
    "lie_bracket",
    "log",
    "needed_squarings",
    "random_field",
    "resample_field",
    "sample_field",
    "statistics",
    "to_shift",
]


class Consistency(NamedTuple):
    """How far two maps are from undoing each other: |S(T(p)) - p| at the voxels p of a grid."""

    mean: Tensor  # world units
    largest: Tensor
    mean_voxels: Tensor  # the same along the grid's axes, each by its spacing
    largest_voxels: Tensor


class Logarithm(NamedTuple):
    """A velocity v whose flow is a displacement u."""

    velocity: Tensor  # (D, [Z,] Y, X) world vectors
    residual: Tensor  # largest |exp(v) - u| in voxels


# -- shifts: voxels along the grid's own axes -----------------------------------------------------------------------


def to_shift(field: Tensor, grid: Grid) -> Tensor:
    """World vectors as voxels along the grid's axes, diag(1 / s) R^T u."""
    check(field, grid)
    return in_voxels(field, grid)


def from_shift(shift: Tensor, grid: Grid) -> Tensor:
    """Voxels along the grid's axes as world vectors, R diag(s) u."""
    check(shift, grid)
    return in_world(shift, grid)


def in_voxels(vectors: Tensor, grid: Grid) -> Tensor:
    """`to_shift` of vectors (D, ...) that need not be those of the grid's voxels."""
    return _linear(grid.vectors_to_index, vectors)


def in_world(vectors: Tensor, grid: Grid) -> Tensor:
    """`from_shift` of vectors (D, ...) that need not be those of the grid's voxels."""
    return _linear(grid.vectors_to_world, vectors)


def compose_shift(first: Tensor, second: Tensor) -> Tensor:
    """The shift of `second` after `first`: first(i) + second(i + first(i)).

    >>> import torch
    >>> from fnreg.fields import compose_shift
    >>> ramp = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    >>> compose_shift(torch.ones(1, 4), ramp)
    tensor([[1.1000, 1.2000, 1.3000, 1.3000]])
    """
    if first.shape != second.shape:
        raise ValueError(f"shifts have shapes {tuple(first.shape)} and {tuple(second.shape)}: sample both on one grid")
    found = flow.compose(first, second)
    return first + after(first, second).value.reshape(first.shape) if found is None else found


def compose_step(step: Tensor, vectors: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """World vectors of a map after a scaled step: W s d(i) + u(i + s d(i)), with W from voxels to world.

    step, vectors : d in voxels along the grid's axes and u in world units, both (D, [Z,] Y, X) at its voxels
    scale : s, a scalar
    """
    matrix = scale * grid.vectors_to_world
    found = flow.compose(step, vectors, matrix=matrix, scale=scale)
    if found is None:
        small = step * scale.to(step.dtype)
        return in_world(small, grid) + after(small, vectors).value.reshape(step.shape)
    return found


def exp_shift(velocity: Tensor, squarings: int, *, midpoint: bool = False) -> Tensor:
    """The flow of a stationary velocity over unit time, by scaling and squaring.

    u = v / 2^n, then n times u <- u(i) + u(i + u(i)).  The error falls as 2^-n until that of the
    interpolation remains.  Arsigny et al., "A log-Euclidean framework for statistics on diffeomorphisms", 2006,
    doi 10.1007/11866565_113.

    midpoint : begin with a step of second order, u = h v(i + h v(i) / 2) with h = 2^-n, for the cost of one more
        squaring; then the error falls as 4^-n, and below half a voxel only that of the interpolation is left

    Raises ValueError for a negative number n of squarings.
    """
    if squarings < 0:
        raise ValueError(f"squarings is {squarings}: expected 0 or more")

    def composed(velocity: Tensor) -> Tensor:
        shift = velocity / 2**squarings
        if midpoint:
            shift = after(shift / 2, shift).value.reshape(shift.shape)
        for _ in range(squarings):
            shift = compose_shift(shift, shift)
        return shift

    found = flow.flow(velocity, squarings, midpoint, composed)
    return composed(velocity) if found is None else found


def _linear(matrix: Tensor, field: Tensor) -> Tensor:
    """A matrix (D, D) applied to the vectors of a field."""
    return (matrix.to(field.dtype) @ field.flatten(1)).reshape(field.shape)


# -- maps -----------------------------------------------------------------------------------------------------------


def sample_field(field: Tensor, grid: Grid, points: Tensor, *, padding: Padding = "border") -> Tensor:
    """World vectors (N, D) of a field at world points (N, D), by linear interpolation."""
    check(field, grid)
    if points.ndim != 2 or points.shape[-1] != grid.ndim:
        raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {grid.ndim}) world points")
    coords = grid.world_to_index(points.to(torch.float64)).mT
    return interpolate(field, coords.to(field.dtype), padding=padding).mT


def resample_field(field: Tensor, grid: Grid, onto: Grid, *, padding: Padding = "border") -> Tensor:
    """The field at the voxels of another grid of the same world, (D, *onto.shape); smooth it first where that is
    coarser."""
    check(field, grid)
    index = index_points(onto.size, torch.float64, field.device)
    coords = onto.matrix("index", "index", grid)[..., :-1, :] @ index
    return interpolate(field, coords.to(field.dtype), padding=padding).reshape(grid.ndim, *onto.shape)


def compose(first: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """The displacement of `second` after `first`: first(p) + second(p + first(p)).

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> grid = Grid((8,), spacing=2.0)
    >>> move = torch.full((1, 8), 0.5)
    >>> fields.compose(move, move, grid)
    tensor([[1., 1., 1., 1., 1., 1., 1., 1.]])
    """
    check(second, grid)
    return first + after(to_shift(first, grid), second).value.reshape(first.shape)


def invert(field: Tensor, grid: Grid, *, iterations: int = 50) -> Inverse:
    """The displacement w with w(p) + u(p + w(p)) = 0; see `invert_shift`.

    A residual, in voxels, that is not small tells that some voxel's origin was not found; more iterations may find it.
    A small one tells nothing about folds, where points have several origins: see `folds` and `folded_cells`.
    """
    inverse, residual = invert_shift(to_shift(field, grid), iterations=iterations)
    return Inverse(from_shift(inverse, grid), residual)


def inverse_consistency(forward: Tensor, backward: Tensor, grid: Grid) -> Consistency:
    """How well the map of one displacement undoes that of another: |S(T(p)) - p| over the voxels p of their grid.

    forward, backward : displacements (D, [Z,] Y, X) of T and S, both on `grid`, linear between its voxels

    Voxels that T moves out of the grid do not count, for a field says nothing there; where none stays all are NaN.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> there, back = torch.full((1, 8), 3.0), torch.full((1, 8), -2.0)
    >>> fields.inverse_consistency(there, back, Grid((8,), spacing=2.0))
    Consistency(mean=tensor(1.), largest=tensor(1.), mean_voxels=tensor(0.5000), largest_voxels=tensor(0.5000))
    """
    shift, back = to_shift(forward, grid), to_shift(backward, grid)
    away = shift + after(shift, back).value.reshape(shift.shape)
    ends = index_points(grid.size, shift.dtype, shift.device)[:-1] + shift.flatten(1)
    stays = ((ends >= 0) & (ends <= 2 * grid.index_center.to(ends).unsqueeze(-1))).all(0)
    inside = stays | ends.isnan().any(0)  # what is not a number is to be seen
    count = inside.sum()

    def told(vectors: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.where(inside, vectors.flatten(1).norm(dim=0), 0)
        return length.sum() / count, torch.where(count > 0, length.amax(), torch.nan)

    return Consistency(*told(in_world(away, grid)), *told(away))


# -- flows ----------------------------------------------------------------------------------------------------------


def needed_squarings(velocity: Tensor, grid: Grid) -> int:
    """The least n for which the longest vector of v / 2^n is below half a voxel; vectors not finite do not count.

    Raises ValueError inside vmap: their number cannot depend on batched values.
    """
    shift = to_shift(velocity, grid).detach()
    if not is_concrete(shift):
        raise ValueError("inside vmap the number of squarings cannot depend on the velocity: give squarings")
    longest = float(torch.nan_to_num(shift.to(torch.float64).norm(dim=0), nan=0.0, posinf=0.0).amax())
    return max(0, math.frexp(2 * longest)[1])


def exp(velocity: Tensor, grid: Grid, *, squarings: int | None = None, on: Grid | None = None) -> Tensor:
    """The displacement of the flow of a stationary velocity over unit time, exp(v) - id.

    `exp_shift` with a first step of second order.

    squarings : by default as many as `needed_squarings` finds, which is an error inside vmap
    on : a grid of the same world, often a coarser one, to compute on; by default that of the velocity

    The inverse is exp(-v), to the error of the interpolation.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> grid = Grid((5, 4), spacing=0.5)
    >>> fields.exp(torch.full((2, 4, 5), 0.25), grid)[:, 0, 0]
    tensor([0.2500, 0.2500])
    """
    if on is not None:
        return resample_field(exp(resample_field(velocity, grid, on), on, squarings=squarings), on, grid)
    count = needed_squarings(velocity, grid) if squarings is None else squarings
    return from_shift(exp_shift(to_shift(velocity, grid), count, midpoint=True), grid)


def log(
    displacement: Tensor, grid: Grid, *, iterations: int = 5, terms: int = 2, squarings: int | None = None
) -> Logarithm:
    """The stationary velocity whose flow over unit time is a displacement, and how far its flow is from that.

    v <- bch(v, w) with what is missing, w = exp(-v) o (id + u) - id, from v = u.  Bossa and Olmos, "A new algorithm for
    the computation of the group logarithm of diffeomorphisms", 2008, https://inria.hal.science/inria-00629873.
    The v whose w is the smallest is returned: once interpolation is all that is missing, the series begins to
    amplify it.

    iterations : how often
    terms : order of `bch`
    squarings : of each exponential; by default one more than `needed_squarings` of the displacement

    Not every diffeomorphism has a logarithm, and one far from the identity may not be found: look at the residual.
    """
    count = needed_squarings(displacement, grid) + 1 if squarings is None else squarings

    def missing(v: Tensor) -> tuple[Tensor, Tensor]:
        w = compose(displacement, exp(-v, grid, squarings=count), grid)
        return w, to_shift(w.detach(), grid).square().sum(0).amax()

    best = velocity = displacement
    left, least = missing(velocity)
    for _ in range(iterations):
        velocity = bch(velocity, left, grid, terms=terms)
        left, size = missing(velocity)
        better = ~(size >= least)  # NaN comes through
        best, least = torch.where(better, velocity, best), torch.where(better, size, least)
    apart = to_shift((exp(best, grid, squarings=count) - displacement).detach(), grid)
    return Logarithm(best, apart.norm(dim=0).amax())


def lie_bracket(v: Tensor, w: Tensor, grid: Grid) -> Tensor:
    """[v, w] = Dv w - Dw v, the sign with which exp(v) o exp(w) = exp(v + w + [v, w] / 2 + ...).

    For linear fields v = A p and w = B p it is (A B - B A) p.
    """
    return _times(slope(v, grid), w) - _times(slope(w, grid), v)


def bch(v: Tensor, w: Tensor, grid: Grid, *, terms: int = 2) -> Tensor:
    """The velocity z with exp(z) = exp(v) o exp(w), where w acts first, by the Baker-Campbell-Hausdorff series:

        v + w + [v, w] / 2 + ([v, [v, w]] + [w, [w, v]]) / 12 - [w, [v, [v, w]]] / 24

    terms : the highest order that counts, 1 to 4

    Vercauteren et al., "Symmetric log-domain diffeomorphic registration", 2008, doi 10.1007/978-3-540-85988-8_90.
    """
    if not 1 <= terms <= 4:
        raise ValueError(f"terms is {terms}: the series is known here from order 1 to 4")
    total = v + w
    if terms == 1:
        return total
    bracket = lie_bracket(v, w, grid)
    total = total + bracket / 2
    if terms == 2:
        return total
    by_v = lie_bracket(v, bracket, grid)
    total = total + (by_v - lie_bracket(w, bracket, grid)) / 12
    return total if terms == 3 else total - lie_bracket(w, by_v, grid) / 24


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (D, D, ...) applied to vectors (D, ...)."""
    return (matrices * vectors).sum(1)


# -- fields with a formula ------------------------------------------------------------------------------------------


def affine_field(matrix: Tensor, grid: Grid, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The displacement A p + b - p of a homogeneous world matrix (D + 1, D + 1)."""
    dimension = grid.ndim
    if tuple(matrix.shape) != (dimension + 1, dimension + 1):
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}: expected {(dimension + 1, dimension + 1)}")
    matrix = matrix.to(torch.float64)
    eye = torch.eye(dimension + 1, dtype=torch.float64, device=matrix.device)
    index = index_points(grid.size, torch.float64, matrix.device)
    return ((matrix - eye) @ grid.affine @ index)[:-1].to(dtype).reshape(dimension, *grid.shape)


def random_field(
    grid: Grid,
    *,
    amplitude: float,
    smoothness: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A smooth random field: white noise under a Gaussian, with mean zero.

    amplitude : root of the mean squared length of its vectors, world units
    smoothness : standard deviation of the Gaussian, world units
    generator : where the numbers come from; one that is seeded gives the same field again

    On a grid of one voxel it is zero.
    """
    device = grid.center.device
    noise = torch.randn(grid.ndim, *grid.shape, generator=generator, dtype=torch.float64, device=device)
    smooth = filters.gaussian(noise, smoothness / grid.spacing)
    smooth = smooth - smooth.flatten(1).mean(1).reshape(-1, *(1,) * grid.ndim)
    length = smooth.square().sum(0).mean().sqrt()
    return (smooth * torch.where(length > 0, amplitude / length, 0)).to(dtype)
