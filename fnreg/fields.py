"""Dense vector fields: displacements u and velocities v of a grid's voxels.

A field is `(D, [Z,] Y, X)`: at each voxel a world vector in (x, y[, z]) order, in the dtype of the images.  As a map it
is p -> p + u(p), linear between voxels and constant beyond the border.

What runs in hot loops takes a *shift*: the same in voxels along the grid's own axes, so that voxel i moves to
i + shift(i).  `to_shift` and `from_shift` convert.

Functions are written for one field; for a batch use `torch.func.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg import filters, flow
from fnreg.grid import Grid, index_points
from fnreg.pytree import is_concrete
from fnreg.sampling import Padding, Sampled, interpolate, sample

BLOCK = 2**18  # voxels whose inverse is found at once
FIXED_POINT = 3  # iterations of it before those of Newton's method


class Inverse(NamedTuple):
    """An inverse w of a field u."""

    field: Tensor  # (D, [Z,] Y, X), of the kind that was given
    residual: Tensor  # largest |w(i) + u(i + w(i))| in voxels


class Logarithm(NamedTuple):
    """A velocity v whose flow is a displacement u."""

    velocity: Tensor  # (D, [Z,] Y, X) world vectors
    residual: Tensor  # largest |exp(v) - u| in voxels


class Statistics(NamedTuple):
    """How regular the map p -> p + u(p) is; J is the determinant of its derivative."""

    folds: Tensor  # share of voxels where J is not positive
    min_determinant: Tensor
    max_determinant: Tensor
    sd_log_determinant: Tensor  # standard deviation of log J where J > 0
    max_displacement: Tensor  # largest |u| in world units


# -- shifts: voxels along the grid's own axes -----------------------------------------------------------------------


def to_shift(field: Tensor, grid: Grid) -> Tensor:
    """World vectors as voxels along the grid's axes, diag(1 / s) R^T u."""
    _check(field, grid)
    return in_voxels(field, grid)


def from_shift(shift: Tensor, grid: Grid) -> Tensor:
    """Voxels along the grid's axes as world vectors, R diag(s) u."""
    _check(shift, grid)
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
    return first + _after(first, second).value.reshape(first.shape) if found is None else found


def compose_step(step: Tensor, vectors: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """World vectors of a map after a scaled step: W s d(i) + u(i + s d(i)), with W from voxels to world.

    step, vectors : d in voxels along the grid's axes and u in world units, both (D, [Z,] Y, X) at its voxels
    scale : s, a scalar
    """
    matrix = scale * grid.vectors_to_world
    found = flow.compose(step, vectors, matrix=matrix, scale=scale)
    if found is None:
        small = step * scale.to(step.dtype)
        return in_world(small, grid) + _after(small, vectors).value.reshape(step.shape)
    return found


def exp_shift(velocity: Tensor, steps: int, *, midpoint: bool = False) -> Tensor:
    """The flow of a stationary velocity over unit time, by scaling and squaring.

    u = v / 2^steps, then `steps` times u <- u(i) + u(i + u(i)).  The error falls as 2^-steps until that of the
    interpolation remains.  Arsigny et al., "A log-Euclidean framework for statistics on diffeomorphisms", 2006,
    doi 10.1007/11866565_113.

    midpoint : begin with a step of second order, u = h v(i + h v(i) / 2) with h = 2^-steps, for the cost of one more
        squaring; then the error falls as 4^-steps, and below half a voxel only that of the interpolation is left

    Raises ValueError for a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}: the number of squarings is 0 or more")

    def composed(velocity: Tensor) -> Tensor:
        shift = velocity / 2**steps
        if midpoint:
            shift = _after(shift / 2, shift).value.reshape(shift.shape)
        for _ in range(steps):
            shift = compose_shift(shift, shift)
        return shift

    found = flow.flow(velocity, steps, midpoint, composed)
    return composed(velocity) if found is None else found


def invert_shift(shift: Tensor, *, iterations: int = 10) -> Inverse:
    """The shift w with w(i) + u(i + w(i)) = 0, and what is left of that.

    First three steps of the fixed-point iteration w <- -u(i + w) of Chen et al., "A simple fixed-point approach to
    invert a deformation field", 2008, doi 10.1118/1.2816107, which folds do not stop; from the best of them Newton's
    method, w <- w - (I + Du(i + w))^-1 (w + u(i + w)), which converges where that does not, with the derivative that
    the sampler gives along with the value.  A step that brings a voxel no nearer is taken back and halved, so the
    residual never grows with the iterations; near folds it needs more of them, where a field folds it may stay large.

    Derivatives by the shift are those of the implicit function theorem, to any order and in forward mode.
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}: expected 0 or more")
    found: Any = _Inverted.apply(shift, iterations)  # type: ignore[no-untyped-call]
    return Inverse(*found)


def _index(shift: Tensor) -> Tensor:
    """Indices of the voxels, (D, N)."""
    return index_points(tuple(shift.shape[:0:-1]), shift.dtype, shift.device)[:-1]


def _after(first: Tensor, second: Tensor) -> Sampled:
    """`second` at i + first(i): value (D, N) and gradient (D, D, N)."""
    return sample(second, _index(first) + first.flatten(1))


def _newton(shift: Tensor, index: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The inverse (D, N) at the voxels `index`, and the largest residual."""

    def look(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, slope, _ = sample(shift, index + w)
        error = w + value
        step = _solve(slope, error)
        return error, torch.where(step.isfinite(), step, error), error.square().sum(0)

    best = tried = torch.zeros_like(index)
    error, step, size = look(best)
    length = torch.ones_like(size)
    for number in range(iterations):
        simple = number < FIXED_POINT
        tried = tried - error if simple else best - length * step
        error, tried_step, tried_size = look(tried)
        better = ~(tried_size >= size)  # NaN comes through
        best, step = torch.where(better, tried, best), torch.where(better, tried_step, step)
        size = torch.where(better, tried_size, size)
        length = length if simple else torch.where(better, 1, length / 2)
    return best, size.amax().sqrt()


class _Inverted(torch.autograd.Function):
    """w with w + u(i + w) = 0, so dw = -(I + Du(i + w))^-1 du(i + w)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(shift: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        # Voxels do not depend on each other: a block of them at once needs less memory.
        parts = [_newton(shift, index, iterations) for index in _index(shift).split(BLOCK, dim=1)]
        inverses, residuals = zip(*parts, strict=True)
        return torch.cat(inverses, 1).reshape(shift.shape), torch.stack(residuals).amax()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, by_inverse: Tensor, _: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        shift, inverse = ctx.saved_tensors
        slope = _after(inverse, shift).gradient
        pulled = -_solve(slope.transpose(0, 1), by_inverse.flatten(1))
        made: Any = torch.func.vjp(lambda u: _after(inverse, u).value, shift)
        return made[1](pulled)[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        shift, inverse = ctx.saved_tensors
        slope = _after(inverse, shift).gradient
        return -_solve(slope, _after(inverse, tangents[0]).value).reshape(shift.shape), None


def _solve(slope: Tensor, right: Tensor) -> Tensor:
    """(I + G)^-1 b for G (D, D, N) and b (D, N), by Cramer's rule."""
    matrix = [list(row.unbind(0)) for row in slope.unbind(0)]  # G[c][k] is the derivative of component c by x_k
    for k, row in enumerate(matrix):
        row[k] = row[k] + 1
    if len(matrix) == 1:
        return right / matrix[0][0]
    if len(matrix) == 2:
        (a, b), (c, d), (x, y) = *matrix, right.unbind(0)
        return torch.stack([d * x - b * y, a * y - c * x]) / (a * d - b * c)
    columns = [_cross(matrix[k - 2], matrix[k - 1]) for k in range(3)]
    det = _dot(matrix[0], columns[0])
    return torch.stack([_dot(row, right) for row in zip(*columns, strict=True)]) / det


def _dot(a: Sequence[Tensor], b: Sequence[Tensor] | Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """By components: `torch.linalg.cross` along the first axis is ten times slower."""
    return [a[k - 2] * b[k - 1] - a[k - 1] * b[k - 2] for k in range(3)]


def _eye(matrices: Tensor) -> Tensor:
    """The identity beside matrices (D, D, ...)."""
    dimension = len(matrices)
    eye = torch.eye(dimension, dtype=matrices.dtype, device=matrices.device)
    return eye.reshape(dimension, dimension, *(1,) * (matrices.ndim - 2))


def _linear(matrix: Tensor, field: Tensor) -> Tensor:
    """A matrix (D, D) applied to the vectors of a field."""
    return (matrix.to(field.dtype) @ field.flatten(1)).reshape(field.shape)


def _check(field: Tensor, grid: Grid) -> None:
    if tuple(field.shape) != (grid.ndim, *grid.shape):
        raise ValueError(
            f"field has shape {tuple(field.shape)} but the grid has shape {grid.shape}: expected "
            f"{(grid.ndim, *grid.shape)}, one world vector per voxel; use torch.func.vmap for a batch"
        )
    if not field.is_floating_point():
        raise TypeError(f"field is {field.dtype}: convert it to the dtype of the images first")


# -- maps -----------------------------------------------------------------------------------------------------------


def sample_field(field: Tensor, grid: Grid, points: Tensor, *, padding: Padding = "border") -> Tensor:
    """World vectors (N, D) of a field at world points (N, D), by linear interpolation."""
    _check(field, grid)
    if points.ndim != 2 or points.shape[-1] != grid.ndim:
        raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {grid.ndim}) world points")
    coords = grid.world_to_index(points.to(torch.float64)).mT
    return interpolate(field, coords.to(field.dtype), padding=padding).mT


def resample_field(field: Tensor, grid: Grid, onto: Grid, *, padding: Padding = "border") -> Tensor:
    """The field at the voxels of another grid of the same world, (D, *onto.shape); smooth it first where that is
    coarser."""
    _check(field, grid)
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
    _check(second, grid)
    return first + _after(to_shift(first, grid), second).value.reshape(first.shape)


def invert(field: Tensor, grid: Grid, *, iterations: int = 10) -> Inverse:
    """The displacement w with w(p) + u(p + w(p)) = 0; see `invert_shift`.

    A residual, in voxels, that is not small tells of folds or of points that come from beyond the grid; with more
    iterations it falls only where there is an inverse.
    """
    inverse, residual = invert_shift(to_shift(field, grid), iterations=iterations)
    return Inverse(from_shift(inverse, grid), residual)


# -- flows ----------------------------------------------------------------------------------------------------------


def squarings(velocity: Tensor, grid: Grid) -> int:
    """The least n for which the longest vector of v / 2^n is below half a voxel; vectors not finite do not count.

    Raises ValueError inside vmap: a number of steps cannot depend on batched values.
    """
    shift = to_shift(velocity, grid).detach()
    if not is_concrete(shift):
        raise ValueError("inside vmap the number of squarings cannot depend on the velocity: give steps")
    longest = float(torch.nan_to_num(shift.to(torch.float64).norm(dim=0), nan=0.0, posinf=0.0).amax())
    return max(0, math.frexp(2 * longest)[1])


def exp(velocity: Tensor, grid: Grid, *, steps: int | None = None, on: Grid | None = None) -> Tensor:
    """The displacement of the flow of a stationary velocity over unit time, exp(v) - id.

    `exp_shift` with a first step of second order.

    steps : number of squarings; by default as many as `squarings` finds, which is an error inside vmap
    on : a grid of the same world, often a coarser one, to compute on; by default that of the velocity

    The inverse is exp(-v), to the error of the interpolation.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> grid = Grid((5, 4), spacing=0.5)
    >>> fields.exp(torch.full((2, 4, 5), 0.25), grid)[:, 0, 0]
    tensor([0.2500, 0.2500])
    """
    if on is not None:
        return resample_field(exp(resample_field(velocity, grid, on), on, steps=steps), on, grid)
    count = squarings(velocity, grid) if steps is None else steps
    return from_shift(exp_shift(to_shift(velocity, grid), count, midpoint=True), grid)


def log(
    displacement: Tensor, grid: Grid, *, iterations: int = 5, terms: int = 2, steps: int | None = None
) -> Logarithm:
    """The stationary velocity whose flow over unit time is a displacement, and how far its flow is from that.

    v <- bch(v, w) with what is missing, w = exp(-v) o (id + u) - id, from v = u.  Bossa and Olmos, "A new algorithm for
    the computation of the group logarithm of diffeomorphisms", 2008, https://inria.hal.science/inria-00629873.
    The v whose w is the smallest is returned: once interpolation is all that is missing, the series begins to
    amplify it.

    iterations : how often
    terms : order of `bch`
    steps : squarings of each exponential; by default one more than `squarings` of the displacement

    Not every diffeomorphism has a logarithm, and one far from the identity may not be found: look at the residual.
    """
    count = squarings(displacement, grid) + 1 if steps is None else steps

    def missing(v: Tensor) -> tuple[Tensor, Tensor]:
        w = compose(displacement, exp(-v, grid, steps=count), grid)
        return w, to_shift(w.detach(), grid).square().sum(0).amax()

    best = velocity = displacement
    left, least = missing(velocity)
    for _ in range(iterations):
        velocity = bch(velocity, left, grid, terms=terms)
        left, size = missing(velocity)
        better = ~(size >= least)  # NaN comes through
        best, least = torch.where(better, velocity, best), torch.where(better, size, least)
    apart = to_shift((exp(best, grid, steps=count) - displacement).detach(), grid)
    return Logarithm(best, apart.norm(dim=0).amax())


def lie_bracket(v: Tensor, w: Tensor, grid: Grid) -> Tensor:
    """[v, w] = Dv w - Dw v, the sign with which exp(v) o exp(w) = exp(v + w + [v, w] / 2 + ...).

    For linear fields v = A p and w = B p it is (A B - B A) p.
    """
    return _times(_slope(v, grid), w) - _times(_slope(w, grid), v)


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


# -- derivatives in world axes --------------------------------------------------------------------------------------


def jacobian(field: Tensor, grid: Grid) -> Tensor:
    """The derivative of p -> p + u(p), I + du/dp, as (D, D, [Z,] Y, X): component of the map, world axis.

    Central differences, and one-sided ones of second order at the borders: exact where u is quadratic.  With two voxels
    along an axis the difference is of first order, with one it is 0.

    >>> import torch
    >>> from fnreg import Grid, fields
    >>> grid = Grid((3, 3), spacing=2.0)
    >>> fields.jacobian(0.1 * grid.points().mT.reshape(2, 3, 3), grid)[:, :, 1, 1]
    tensor([[1.1000, 0.0000],
            [0.0000, 1.1000]], dtype=torch.float64)
    """
    slope = _slope(field, grid)
    return slope + _eye(slope)


def determinant(field: Tensor, grid: Grid) -> Tensor:
    """The determinant of `jacobian`, ([Z,] Y, X): how volumes change, not positive where the map folds."""
    rows = jacobian(field, grid)
    if len(rows) == 1:
        return rows[0, 0]
    if len(rows) == 2:
        return rows[0, 0] * rows[1, 1] - rows[0, 1] * rows[1, 0]
    first, second, third = (row.unbind(0) for row in rows.unbind(0))
    return _dot(first, _cross(second, third))


def divergence(field: Tensor, grid: Grid) -> Tensor:
    """The sum of du_k/dp_k, ([Z,] Y, X)."""
    slope = _slope(field, grid)
    return torch.stack([slope[k, k] for k in range(grid.ndim)]).sum(0)


def curl(field: Tensor, grid: Grid) -> Tensor:
    """In 3-D the vectors (D, Z, Y, X) of rotation, in 2-D du_y/dx - du_x/dy (Y, X), about the world's axes.

    Raises ValueError in 1-D.
    """
    if grid.ndim == 1:
        raise ValueError("a field of one axis has no curl: give one of two or three")
    slope = _slope(field, grid)
    if grid.ndim == 2:
        return slope[1, 0] - slope[0, 1]
    return torch.stack([slope[k - 1, k - 2] - slope[k - 2, k - 1] for k in range(3)])


def folds(field: Tensor, grid: Grid) -> Tensor:
    """The number of voxels where the determinant is not positive; NaN is not."""
    return (~(determinant(field, grid) > 0)).sum()


def statistics(field: Tensor, grid: Grid, *, mask: Tensor | None = None) -> Statistics:
    """Folds, range and spread of the determinant, and the largest displacement.

    mask : (1, [Z,] Y, X); only where it is positive do voxels count

    With nothing in the mask all are NaN; so are those that depend on a NaN in the field.
    """
    det = determinant(field, grid)
    if mask is not None and tuple(mask.shape) != (1, *grid.shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}: expected {(1, *grid.shape)}")
    inside = torch.ones_like(det, dtype=torch.bool) if mask is None else mask[0] > 0
    positive = inside & ~(det <= 0)  # with those that are NaN
    length = field.norm(dim=0)
    logs = torch.where(positive, torch.where(positive, det, 1).log(), 0)
    count = positive.sum()
    spread = torch.where(positive, logs - logs.sum() / count, 0).square().sum() / count

    def known(value: Tensor) -> Tensor:
        return torch.where(inside.any(), value, torch.nan)

    return Statistics(
        (inside & ~(det > 0)).sum().to(det.dtype) / inside.sum(),
        known(torch.where(inside, det, torch.inf).amin()),
        known(torch.where(inside, det, -torch.inf).amax()),
        spread.sqrt(),
        known(torch.where(inside, length, 0).amax()),
    )


def _slope(field: Tensor, grid: Grid) -> Tensor:
    """du/dp (D, D, [Z,] Y, X): the derivative by the index, times that of the index by the world."""
    _check(field, grid)
    twice = torch.stack([_twice_the_difference(field, -1 - k) for k in range(grid.ndim)], 1)
    matrix = (grid.inverse_affine[..., :-1, :-1] / 2).to(field.dtype)
    return (matrix.mT @ twice.flatten(2)).reshape(twice.shape)


def _twice_the_difference(data: Tensor, axis: int) -> Tensor:
    """Twice the derivative along an axis per voxel, exact for parabolas."""
    n = data.shape[axis]
    if n == 1:
        return torch.zeros_like(data)
    if n == 2:
        step = 2 * (data.narrow(axis, 1, 1) - data.narrow(axis, 0, 1))
        return torch.cat([step, step], axis)
    inner = data.narrow(axis, 2, n - 2) - data.narrow(axis, 0, n - 2)
    a, b, c = data.narrow(axis, 0, 3).split(1, axis)
    z, y, x = data.narrow(axis, n - 3, 3).split(1, axis)
    return torch.cat([4 * b - 3 * a - c, inner, 3 * x - 4 * y + z], axis)


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
