"""Correlation within windows: LNCC, its equation and its closed form in C.

With weights w and a window of weights g around each voxel i, the moments of a window are those of its voxels that
count, E_i[x] = sum_j g_ij w_j x_j / sum_j g_ij w_j.  The correlation needs five such sums; its derivative by the warped
image three more of the same kind, that by the weights another three.  In C all take a handful of passes over the
images, where a tape keeps and reads some thirty intermediate ones.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fnreg import native
from fnreg.filters import window_sums
from fnreg.losses.functional import check_images
from fnreg.native import CHUNK
from fnreg.pytree import constant, fold, forward_asked, is_differentiated, leading
from fnreg.windows import Taps, filtered, serves

Window = Literal["box", "gaussian"]


def lncc(
    warped: Tensor,
    fixed: Tensor,
    weights: Tensor | None = None,
    *,
    radius: int = 2,
    window: Window = "box",
    squared: bool = True,
    flat: float = 1e-3,
) -> Tensor:
    """One minus the mean over windows of cov^2 / (var var), in [0, 1]; not `squared` cov / sqrt(var var), in [0, 2].

    Windows where the fixed image does not vary have no weight; where only the warped one does not, the correlation is
    0.  The mean has the weights of the windows' centres, and is taken over channels; without any window it is 1.
    Cachier et al. 2003, doi 10.1016/S1077-3142(03)00002-X; Avants et al. 2008, doi 10.1016/j.media.2007.06.004.

    radius : a box reaches so many voxels to each side and is cut off at the image; a Gaussian has half of it as its
        standard deviation and reaches twice as far
    flat : an image does not vary in a window where its standard deviation is below this share of that of the image

    >>> import torch
    >>> from fnreg.losses.local import lncc
    >>> image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> bool(lncc(3 * image + 1, image) < 1e-12)
    True
    """
    taps = _taps(radius, window, tuple(fixed.shape[:0:-1]))
    check_images(warped, fixed)
    if not 0 <= flat < 1:
        raise ValueError(f"flat is {flat}: expected a share of the standard deviation, at least 0 and below 1")
    if weights is not None and not weights.is_floating_point():
        weights = weights.to(warped.dtype)
    alike = all(t.dtype == warped.dtype and t.device == warped.device for t in (fixed, weights) if t is not None)
    if not (alike and serves(warped)):
        return _composed(warped, fixed, weights, taps, squared, flat)
    options = _Options(taps, squared, flat, weights is not None and is_differentiated(weights))
    counted = None if weights is None else weights.reshape(1, 1, *fixed.shape[1:])
    found = _Lncc.apply(warped.unsqueeze(0), fixed.unsqueeze(0), counted, options)  # type: ignore[no-untyped-call]
    return found[0].squeeze(0)


def _taps(radius: int, window: Window, size: tuple[int, ...]) -> Taps:
    """Weights from the centre outwards, per axis; an axis of one voxel has but that."""
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 1:
        raise ValueError(f"radius is {radius!r}: expected a whole number of voxels, at least 1")
    if window == "box":
        taps = (1.0,) * (radius + 1)
    elif window == "gaussian":
        taps = tuple(math.exp(-0.5 * (2 * t / radius) ** 2) for t in range(2 * radius + 1))
    else:
        raise ValueError(f"unknown window {window!r}: choose box or gaussian")
    return tuple(taps[:n] for n in size)


def check_window(size: tuple[int, ...], *, radius: int = 2, window: Window = "box") -> None:
    """ValueError where a window reaches over all of an axis, x first: such a correlation is no local one."""
    reach = len(_taps(radius, window, (10**6,))[0]) - 1
    if any(1 < n <= 2 * reach for n in size):
        raise ValueError(
            f"lncc(radius={radius}, window={window!r}) has windows of {2 * reach + 1} voxels for an image of "
            f"size {size}: choose a smaller radius, or ncc for one window over the whole image"
        )


def _rounding(dtype: torch.dtype) -> float:
    """The share of a mean square below which its difference to the square of a mean is but rounding."""
    return 32 * torch.finfo(dtype).eps


def _composed(warped: Tensor, fixed: Tensor, weights: Tensor | None, taps: Taps, squared: bool, flat: float) -> Tensor:
    """The equation for one pair (C, [Z,] Y, X), which torch can differentiate to any order."""
    share = torch.ones_like(fixed[:1]) if weights is None else weights.reshape(1, *fixed.shape[1:])
    axes = tuple(range(1, fixed.ndim))
    known = share.sum()
    count = window_sums(share, taps)
    seen = count > 0
    unit = torch.where(seen, 1 / torch.where(seen, count, 1), 0)
    means: list[Tensor] = []
    variances: list[Tensor] = []
    away: list[Tensor] = []
    varies: list[Tensor] = []
    for image in (warped, fixed):
        plain, part = image.detach(), share.detach()
        total = torch.where(known > 0, known, 1).detach()
        center = (plain * part).sum(axes, keepdim=True) / total  # rounding apart nothing depends on it
        spread = ((plain - center).square() * part).sum(axes, keepdim=True) / total
        deviation = image - center
        mean = window_sums(share * deviation, taps) * unit
        square = window_sums(share * deviation.square(), taps) * unit
        least = (flat**2 * spread + _rounding(image.dtype) * square).detach()
        variance = square - mean.square()
        varies.append(variance > least)
        variances.append(torch.where(variance > least, variance, torch.where(least > 0, least, 1)))
        means.append(mean)
        away.append(deviation)
    covariance = window_sums(share * away[0] * away[1], taps) * unit - means[0] * means[1]
    tells = varies[1] & seen
    counts = torch.where(tells, share, 0)
    if squared:  # never a product of variances, which float32 might not hold
        correlation = (covariance / variances[0]) * (covariance / variances[1])
    else:
        correlation = covariance / variances[0].sqrt() / variances[1].sqrt()
    total = counts.sum(axes)
    correlation = (torch.where(tells, correlation, 0) * counts).sum(axes)
    return (1 - correlation / torch.where(total > 0, total, 1)).mean()


@constant
def _count(size: tuple[int, ...], taps: Taps, dtype: torch.dtype) -> Tensor:
    """Sums of a window's weights where every voxel counts, (1, 1, *shape)."""
    return filtered(torch.ones(1, 1, *size[::-1], dtype=dtype, device="cpu"), taps, False, False)


class _Passes:
    """The passes in C over plain images (B, C, *shape), fixed (F, C, *shape) and weights (W, 1, *shape)."""

    def __init__(self, warped: Tensor, weights: Tensor | None, taps: Taps, flat: float) -> None:
        self.n, self.taps, self.flat = math.prod(warped.shape[2:]), taps, flat
        self.channels, self.dtype = warped.shape[1], warped.dtype
        self.weights = None if weights is None else weights.contiguous()
        self.weight_items = 1 if weights is None else len(weights)
        self.chunks = -(-self.n // CHUNK)

    def call(self, kernel: str, arguments: tuple[Any, ...], tasks: int, each: int = 1) -> None:
        native.call(kernel, self.dtype, None, arguments, tasks, each=each)

    def levels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean, and the variance below which a window is flat, of each image (B, C) float64."""
        items = images.shape[0] * images.shape[1]
        sums = images.new_empty(items, self.chunks, 3, dtype=torch.float64)
        given = (images, self.weights, sums, self.n, self.channels, self.weight_items, CHUNK)
        self.call("_moments", given, items * self.chunks, CHUNK)
        total, first, second = sums.sum(1).unbind(1)
        total = torch.where(total > 0, total, 1)
        center = first / total
        floor = self.flat**2 * (second / total - center.square()).clamp(min=0)
        return center.reshape(images.shape[:2]), floor.reshape(images.shape[:2])

    def sums(self, images: Tensor, center: Tensor, fixed: Tensor | None = None, low: Tensor | None = None) -> Tensor:
        """Window sums of w b, w b^2 and, with a fixed image a, w a b of deviations, (B, C, 2 or 3, *shape)."""
        planes = images.new_empty(*images.shape[:2], 2 if fixed is None else 3, *images.shape[2:])
        fixed_items = 1 if fixed is None else fixed.shape[0] * fixed.shape[1]
        items = images.shape[0] * images.shape[1]
        given = (images, fixed, self.weights, center, low, planes, self.n, self.channels, fixed_items)
        self.call("_products", (*given, self.weight_items), items * self.n)
        return filtered(planes, self.taps, False, False)


class _Options(NamedTuple):
    """Of `_Lncc`."""

    taps: Taps
    squared: bool
    flat: float
    by_weights: bool  # whether the derivative by the weights is asked


class _Lncc(torch.autograd.Function):
    """(B,) values of images (B, C, *shape).  The rest is the derivatives by warped and weights, for `backward`."""

    @staticmethod
    def forward(
        warped: Tensor, fixed: Tensor, weights: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        taps, squared, flat, by_weights = options
        warped, fixed = warped.contiguous(), fixed.contiguous()
        passes = _Passes(warped, weights, taps, flat)
        n, channels, items = passes.n, passes.channels, warped.shape[0] * warped.shape[1]
        weights = passes.weights
        if fixed.shape[0] == 1 and passes.weight_items > 1:  # its sums depend on the weights of each pair
            fixed = fixed.expand_as(warped).contiguous()
        if weights is None:
            count = _count(tuple(warped.shape[:1:-1]), taps, warped.dtype)
        else:
            count = filtered(weights, taps, False, False)
        fixed_items = fixed.shape[0] * channels
        (low, floor), (center, least) = passes.levels(fixed), passes.levels(warped)
        of_fixed = passes.sums(fixed, low)
        of_both = passes.sums(warped, center, fixed, low)
        sums = warped.new_empty(items, passes.chunks, 2, dtype=torch.float64)
        more = torch.empty_like(of_both) if by_weights else None
        local = torch.empty_like(warped) if by_weights else None
        given = (of_both, of_fixed, count, weights, least, floor, sums, more, local, not squared, n, channels)
        sizes = (fixed_items, passes.weight_items, count.shape[0], CHUNK, _rounding(warped.dtype))
        passes.call("_correlation", (*given, *sizes), items * passes.chunks, CHUNK)
        value, total = sums.sum(1).unbind(1)
        total = torch.where(total > 0, total, 1)
        by_sums = filtered(of_both, taps, False, False)
        del of_both
        by_warped, factor = torch.empty_like(warped), -1 / (total * channels)
        given = (by_sums, warped, fixed, weights, center, low, factor, by_warped, n, channels)
        passes.call("_combine", (*given, fixed_items, passes.weight_items), items * n)
        found = warped.new_empty(warped.shape[0], 0)
        if more is not None:
            more, each = filtered(more, taps, False, False), torch.empty_like(warped)
            given = (by_sums, more, local, warped, fixed, center, low, value / total, factor, each, n, fixed_items)
            passes.call("_by_weights", given, items * n)
            found = each.sum(1, keepdim=True)
        return (1 - value / total).reshape(-1, channels).mean(1).to(warped.dtype), by_warped, found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.options = inputs[3]

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        warped, fixed, weights, by_warped, by_weights = ctx.saved_tensors
        _, of_fixed, of_weights = ctx.needs_input_grad[:3]
        if of_fixed or (of_weights and not ctx.options.by_weights) or forward_asked():
            return *_pull_back(by_value, warped, fixed, weights, ctx.options), None
        found = _Scaled.apply(by_value, by_warped, by_weights, warped, fixed, weights, ctx.options)  # type: ignore[no-untyped-call]
        more = None
        if of_weights:
            more = found[1] if len(weights) == len(found[1]) else found[1].sum(0, keepdim=True)
        return found[0], None, more, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        lead = max(leading(t, dim) for t, dim in zip(args[:3], in_dims[:3], strict=True) if t is not None)
        folded = [
            fold(info.batch_size, dim, t, lead, shared=number > 0)
            for number, (t, dim) in enumerate(zip(args[:3], in_dims[:3], strict=True))
        ]
        found = _Lncc.apply(*folded, args[3])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in found), (0, 0, 0)


class _Scaled(torch.autograd.Function):
    """The derivatives by warped and weights times the cotangent (B,); their own are those of the composition."""

    @staticmethod
    def forward(
        by_value: Tensor,
        by_warped: Tensor,
        by_weights: Tensor,
        warped: Tensor,
        fixed: Tensor,
        weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        factor = by_value.reshape(-1, *(1,) * (by_warped.ndim - 1))
        return by_warped * factor, by_weights * (factor if options.by_weights else 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        by_value, _, _, *images, ctx.options = inputs
        ctx.save_for_backward(by_value, *images)

    @staticmethod
    def backward(ctx: Any, *by_found: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_value, warped, fixed, weights = ctx.saved_tensors
        given = [t for t in (by_value, warped, fixed, weights) if t is not None]
        asked = 2 if ctx.options.by_weights else 1

        def first(by_value: Tensor, warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Any:
            return _pull_back(by_value, warped, fixed, weights, ctx.options)[::2][:asked]

        made: Any = torch.func.vjp(first, *given)
        by_value, *by_images = made[1](tuple(by_found[:asked]))
        return by_value, None, None, *by_images, *((None,) if weights is None else ()), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, lead = info.batch_size, leading(args[1], in_dims[1])
        folded = [
            fold(size, dim, t, lead, shared=number > 3)
            for number, (t, dim) in enumerate(zip(args[:6], in_dims[:6], strict=True))
        ]
        found = _Scaled.apply(*folded, args[6])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (size, lead)) for part in found), (0, 0)


def _pull_back(by_value: Tensor, warped: Tensor, fixed: Tensor, weights: Tensor | None, options: _Options) -> Any:
    """Derivatives by warped, fixed and weights times the cotangent, by the composition."""

    def one(warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
        return _composed(warped, fixed, weights, options.taps, options.squared, options.flat)

    images = [warped, fixed.expand_as(warped)]
    images += [] if weights is None else [weights.expand(len(warped), *weights.shape[1:])]
    made: Any = torch.func.vjp(torch.func.vmap(one), *images)
    return *made[1](by_value), *((None,) if weights is None else ())
