"""The joint histogram of two images, with cubic B-splines as windows, and its derivatives.

    h[a, b] = sum over voxels of w beta(x - a) beta(y - b)

with the intensities x and y in bins.  Thevenaz and Unser 2000, doi 10.1109/83.887976.

The range of an image is that of the voxels that count, and its least and greatest window lie within the bins, so no
weight is lost and the windows of a voxel sum to its weight.  The range moves continuously with values and weights, and
so does the histogram; in differentiation it counts as a constant.  Where the range is given the derivative is exact.

In C a row, which is one channel of one pair, is cut into parts by its length alone, and their sums are joined in one
order: neither the number of threads nor the batch changes a bit.  `parzen` computes the same in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnreg import native, parzen
from fnreg.parzen import Weights
from fnreg.pytree import fold, forward_asked, forward_levels, is_stored, leading

PART = 2**14  # voxels from which on a row is cut, and into how many parts at most: each has a histogram of its own
PARTS = 32
LEAST = 4  # bins: one window covers as many
MOST = 4096  # a histogram has their square, for each channel and pair


Ranges = tuple[tuple[float, float], tuple[float, float]]  # of warped and of fixed


def joint_histogram(
    warped: Tensor, fixed: Tensor, weights: Tensor | None = None, *, bins: int = 32, ranges: Ranges | None = None
) -> Tensor:
    """h (C, bins, bins) in float64 of images (C, N), the bins of `warped` first.

    weights : (1, N), not negative; None counts every voxel once
    bins : at least 4, the width of a window; the range of an image covers bins - 3 of them
    ranges : the least and the greatest value of either image, beyond which values are held there; None looks

    Can be differentiated by all three to any order, in reverse and in forward mode.  Raises ValueError and TypeError
    as `check` does.

    >>> import torch
    >>> from fnreg.histogram import joint_histogram
    >>> ramp = torch.tensor([[0.0, 1.0, 2.0]])
    >>> joint_histogram(ramp, ramp, bins=5).sum(1)
    tensor([[0.1667, 0.8333, 1.0000, 0.8333, 0.1667]], dtype=torch.float64)
    """
    check(warped, fixed, weights, bins)
    warped, fixed, bins = warped.flatten(1), fixed.flatten(1), int(bins)
    share = None if weights is None else weights.reshape(1, 1, -1)
    images = warped.unsqueeze(0), fixed.unsqueeze(0), share
    if forward_asked():
        share = None if share is None else share.detach()
        scaled = _scaled(parzen.ends, warped.detach().unsqueeze(0), fixed.detach().unsqueeze(0), share, bins, ranges)
        return parzen.counted(*images, scaled, bins).squeeze(0)
    return _Histogram.apply(*images, bins, ranges)[0].squeeze(0)  # type: ignore[no-untyped-call]


def check(warped: Tensor, fixed: Tensor, weights: Tensor | None, bins: int) -> None:
    """ValueError where images (C, ...), weights (1, ...) or (...) and bins do not fit; TypeError for integers."""
    if isinstance(bins, bool) or not isinstance(bins, (int, float)) or not (LEAST <= bins <= MOST and bins % 1 == 0):
        raise ValueError(
            f"bins is {bins}: expected a whole number of at least {LEAST}, for a window covers {LEAST}, "
            f"and at most {MOST}"
        )
    if warped.shape != fixed.shape or warped.ndim < 2 or not warped.numel():
        raise ValueError(
            f"warped has shape {tuple(warped.shape)} and fixed {tuple(fixed.shape)}: "
            "expected one shape (C, ...) with a voxel at least"
        )
    if not (warped.is_floating_point() and fixed.is_floating_point()):
        raise TypeError(f"warped is {warped.dtype} and fixed {fixed.dtype}: expected floating point, convert to float")
    if weights is not None and weights.shape not in (fixed.shape[1:], (1, *fixed.shape[1:])):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} beside images {tuple(fixed.shape)}: "
            f"expected {(1, *fixed.shape[1:])}, one weight for each voxel"
        )


def _scaled(
    ends: Callable[[Tensor, Weights], tuple[Tensor, Tensor]],
    warped: Tensor,
    fixed: Tensor,
    weights: Weights,
    bins: int,
    ranges: Ranges | None,
) -> Tensor:
    """(B, C, 4): the least value and the bins per unit of intensity, of warped and of fixed."""
    found: list[Tensor] = []
    for image, known in zip((warped, fixed), ranges or (None, None), strict=True):
        low, high = ends(image, weights) if known is None else (image.new_full(image.shape[:2], end) for end in known)
        found += parzen.scale(low, high, bins)
    return torch.stack([part.expand(warped.shape[:2]) for part in found], -1)


# -- in C -------------------------------------------------------------------------------------------------------


def _serves(*images: Weights) -> bool:
    """Whether the kernels can take these images (B, C, N)."""
    given = [image for image in images if image is not None]
    return native.serves(*given, voxels=given[0].shape[2]) and is_stored(*given)


def _parts(length: int, bins: int) -> int:
    """Into how many parts a row is cut; their histograms take no more than a quarter of a number for each voxel."""
    return max(1, min(PARTS, length // max(PART, 4 * bins**2)))


def _call(kernel: str, dtype: torch.dtype, arguments: tuple[Any, ...], rows: int, parts: int, length: int) -> None:
    native.call(f"_histogram{kernel}", dtype, None, arguments, rows * parts, each=max(1, length // parts))


def _joined(parts: Tensor) -> Tensor:
    """The sum over parts (B, C, P, ...), always in the same order."""
    return functools.reduce(torch.add, parts.unbind(2))


def _ends(image: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """`parzen.ends`, in two passes where there are weights."""
    if weights is None:
        return parzen.ends(image, None)
    image, weights, enough = image.contiguous(), weights.contiguous(), parzen.enough(weights)
    _, channels, length = image.shape
    pairs, parts = max(len(image), len(weights)), _parts(length, LEAST)
    counts = (length, channels, len(image) * channels, len(weights), parts)
    sums = image.new_empty(pairs, channels, parts, 2, dtype=torch.float64)
    _call("_sums", image.dtype, (image, weights, sums, *counts), pairs * channels, parts, length)
    mean = parzen.mean(*_joined(sums).unbind(-1)).to(image.dtype)
    found = image.new_empty(pairs, channels, parts, 2)
    _call("_range", image.dtype, (image, weights, mean, enough, found, *counts), pairs * channels, parts, length)
    return found[..., 0].amin(2), found[..., 1].amax(2)


def _stored(*tensors: Weights) -> tuple[Weights, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _counts(warped: Tensor, fixed: Tensor, weights: Weights, parts: int, bins: int) -> tuple[Any, ...]:
    """Sizes as the kernels take them."""
    channels, length = warped.shape[1:]
    weight_rows = 1 if weights is None else len(weights)
    return length, channels, len(fixed) * channels, weight_rows, parts, bins, parzen.slack(bins, warped.dtype)


def _counted(warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, bins: int) -> Tensor:
    """`parzen.counted` by the kernel."""
    batch, channels, length = warped.shape
    parts = _parts(length, bins)
    out = warped.new_empty(batch, channels, parts, bins, bins, dtype=torch.float64)
    arguments = (*_stored(warped, fixed, weights, scaled), out, *_counts(warped, fixed, weights, parts, bins))
    _call("", warped.dtype, arguments, batch * channels, parts, length)
    return _joined(out)


def _pulled(
    by_out: Tensor, warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Those of `parzen.pulled` that are wanted, by the kernel."""
    batch, channels, length = warped.shape
    bins = by_out.shape[-1]
    parts = _parts(length, bins)
    found = [warped.new_empty(warped.shape) if yes else None for yes in wanted]
    images = _stored(warped, fixed, weights, scaled, by_out.to(warped.dtype))
    arguments = (*images, *found, *_counts(warped, fixed, weights, parts, bins))
    _call("_back", warped.dtype, arguments, batch * channels, parts, length)
    return tuple(one for one in found if one is not None)


# -- as one function --------------------------------------------------------------------------------------------


class _Histogram(torch.autograd.Function):
    """warped (B, C, N), fixed (B or 1, C, N), weights (B or 1, 1, N) to h (B, C, bins, bins) and `_scaled`."""

    @staticmethod
    def forward(
        warped: Tensor, fixed: Tensor, weights: Weights, bins: int, ranges: Ranges | None
    ) -> tuple[Tensor, Tensor]:
        fast = _serves(warped, fixed, weights)
        scaled = _scaled(_ends if fast else parzen.ends, warped, fixed, weights, bins, ranges)
        return (_counted if fast else parzen.counted)(warped, fixed, weights, scaled, bins), scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:3], output[1])

    @staticmethod
    def backward(ctx: Any, by_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = tuple(ctx.needs_input_grad[:3])
        pull: Any = _chosen if forward_levels() else _Pull.apply
        found = iter(pull(by_out, *ctx.saved_tensors, wanted))
        images = zip(ctx.saved_tensors[:3], wanted, strict=True)
        return (*(_summed(next(found), image) if yes else None for image, yes in images), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, lead = info.batch_size, leading(args[0], in_dims[0])
        folded = [
            fold(size, dim, image, lead, shared=number > 0)
            for number, (image, dim) in enumerate(zip(args[:3], in_dims[:3], strict=True))
        ]
        found = _Histogram.apply(*folded, *args[3:])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (size, lead)) for part in found), (0, 0)


def _summed(found: Tensor, image: Tensor) -> Tensor:
    """The derivative (B, C, N) by an image that several pairs or channels share."""
    shared = [axis for axis in (0, 1) if image.shape[axis] < found.shape[axis]]
    return found.sum(shared, keepdim=True) if shared else found


def _chosen(
    by_out: Tensor, warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Those of `parzen.pulled` that are wanted."""
    every = parzen.pulled(by_out, warped, fixed, weights, scaled)
    return tuple(one for one, yes in zip(every, wanted, strict=True) if yes)


class _Pull(torch.autograd.Function):
    """`_chosen`, linear in its first argument; its own derivatives are those of plain torch."""

    @staticmethod
    def forward(
        by_out: Tensor, warped: Tensor, fixed: Tensor, weights: Weights, scaled: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        fast = _serves(warped, fixed, weights) and is_stored(by_out)
        return (_pulled if fast else _chosen)(by_out, warped, fixed, weights, scaled, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted = inputs[5]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *by_found: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, scaled = ctx.saved_tensors

        def plain(by_out: Tensor, warped: Tensor, fixed: Tensor, weights: Weights = None) -> tuple[Tensor, ...]:
            return _chosen(by_out, warped, fixed, weights, scaled, ctx.wanted)

        made: Any = torch.func.vjp(plain, *(tensor for tensor in given if tensor is not None))
        found = made[1](by_found)
        return (*found, *[None] * (6 - len(found)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, lead = info.batch_size, leading(args[1], in_dims[1])
        folded = [
            fold(size, dim, tensor, lead, shared=number in (2, 3))
            for number, (tensor, dim) in enumerate(zip(args[:5], in_dims[:5], strict=True))
        ]
        found = _Pull.apply(*folded, args[5])  # type: ignore[no-untyped-call]
        return tuple(part.unflatten(0, (size, lead)) for part in found), (0,) * len(found)
