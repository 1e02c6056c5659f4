"""Noise of a difference of images: how it is correlated from voxel to voxel, and what it does to a gradient.

The residual d = moving o T - fixed of two noisy images is noisy from both: of the fixed one as it is, of the moving one
as interpolation mixes it.  So its noise is not independent from voxel to voxel, and who counts its voxels as if it were
is too sure.  A `Noise` holds the covariance of the noise up to one factor, as a function that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import vjp

from fnreg.gather import Padding
from fnreg.sampling import sample

Kind = Literal["independent", "correlated"]
KINDS: tuple[str, ...] = get_args(Kind)


class Noise(NamedTuple):
    """The covariance C of a residual's noise up to a factor.

    apply : C v of a residual's shape (C, N)
    variance : the diagonal of C, (C, N)
    slope : variance of the derivative of the moving image's noise along each axis of its voxels, (D, N), like C
    density : of stationary noise its spectrum, for `stationary`; else empty
    """

    apply: Callable[[Tensor], Tensor]
    variance: Tensor
    slope: Tensor
    density: Tensor


def drawn(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the precision and on the device of a tensor, drawn where the generator is: on the CPU
    where there is none, so that they are the same on every device."""
    where = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=where).to(like.device)


def squared_weights(coords: Tensor) -> Tensor:
    """Of linear interpolation along each axis, (1 - t)^2 + t^2 (D, N): their product is what it leaves of a variance.

    >>> import torch
    >>> squared_weights(torch.tensor([[2.0, 2.5]]))
    tensor([[1.0000, 0.5000]])
    """
    part = coords - coords.floor()
    return (1 - part).square() + part.square()


def independent(moving: Tensor, coords: Tensor, padding: Padding | None) -> Noise:
    """Equal independent noise in every voxel of both images: C = I + W W^T, W the linear interpolation.

    moving : (C, [Z,] Y, X); coords : (D, N) voxel indices in it
    """
    given: Padding = "border" if padding is None else padding
    beyond: Padding = given if isinstance(given, str) else "zeros"  # a number is without noise

    def interpolated(data: Tensor) -> Tensor:
        return sample(data, coords, padding=beyond).value

    spread = vjp(interpolated, moving)[1]

    def apply(values: Tensor) -> Tensor:
        return values + interpolated(spread(values)[0])

    last = torch.tensor(moving.shape[:0:-1], dtype=coords.dtype, device=coords.device).unsqueeze(1) - 1
    held = coords.clamp(min=torch.zeros_like(last), max=last) if beyond == "border" else coords
    each, steep = squared_weights(held), torch.full_like(coords, 2.0)
    if beyond == "border":  # beyond the outer voxels nothing changes
        steep = torch.where(held == coords, steep, 0)
    elif beyond == "zeros":  # there is no noise beyond them
        part = coords - coords.floor()
        near, far = ((i >= 0) & (i <= last) for i in (coords.floor(), coords.floor() + 1))
        each, steep = (1 - part).square() * near + part.square() * far, near.to(coords.dtype) + far
    others = torch.stack([torch.cat([each[:k], each[k + 1 :]]).prod(0) for k in range(len(each))])
    return Noise(apply, (1 + each.prod(0)).expand(len(moving), -1), steep * others, moving.new_empty(0))


def correlated(residual: Tensor, scale: Tensor, shape: tuple[int, ...], reach: int, turn: Tensor) -> Noise:
    """Stationary noise whose correlation is read off the residual.

    residual : (C, N) scale * d
    scale : (1, N), 0 where a voxel does not count
    shape : of the fixed image, whose voxels these are
    reach : voxels along each axis beyond which there is no correlation
    turn : (D, D) from steps of the fixed voxels to steps of the moving ones

    The autocovariance at the shift h, sum_x r(x) r(x + h) / sum_x s(x) s(x + h), is multiplied by a window that is 1 up
    to half of the reach and falls linearly to 0 beyond it; where its spectrum is negative that is set to 0, so C is a
    covariance.  The window with a flat top leaves near voxels their correlation: Politis and Romano 1995,
    doi 10.1111/j.1467-9892.1995.tb00223.x.
    """
    padded = tuple(n + reach for n in shape)

    def spectrum(values: Tensor) -> Tensor:
        return torch.fft.rfftn(values.reshape(-1, *shape), s=padded, dim=_axes(shape))

    def back(values: Tensor) -> Tensor:
        return torch.fft.irfftn(values, s=padded, dim=_axes(shape))

    products = back(spectrum(residual).abs().square())
    counts = back(spectrum(scale).abs().square())
    enough = counts > 0.01 * counts.flatten(1)[:, :1].reshape(-1, *(1,) * len(shape))
    window = _window(padded, reach, residual)
    shifted = torch.where(enough, products / torch.where(enough, counts, 1), 0) * window  # (C, *padded)
    density = torch.fft.rfftn(shifted, dim=_axes(shape)).real.clamp(min=0)
    kernel = back(density)
    top = kernel.flatten(1)[:, 0].mean()  # of all channels, which differ in noise by their own
    top = torch.where(top > 0, top, 1)
    density, kernel = density / top, kernel / top
    own = kernel.flatten(1)[:, 0]  # (C,)

    # The variance of a difference of neighbours is 2 (C(0) - C(1)); half of it is the moving image's.
    near = [kernel.select(-1 - k, 1).flatten(1)[:, 0] for k in range(len(shape))]  # x first
    along = torch.diag((own - torch.minimum(torch.stack(near), own)).mean(1))
    inverse = torch.linalg.inv_ex(turn.to(residual.dtype)).inverse
    slope = torch.diagonal(inverse.mT @ along @ inverse)
    slope = slope.unsqueeze(1).expand(-1, residual.shape[1])

    def apply(values: Tensor) -> Tensor:
        return stationary(density, shape, reach, values)

    return Noise(apply, own.unsqueeze(1).expand_as(residual), slope, density)


def stationary(density: Tensor, shape: tuple[int, ...], reach: int, values: Tensor) -> Tensor:
    """Stationary noise's covariance times values (C, N) of a grid: `density` is its spectrum, over the grid padded by
    `reach`."""
    padded = tuple(n + reach for n in shape)
    seen = torch.fft.rfftn(values.reshape(-1, *shape), s=padded, dim=_axes(shape))
    mixed = torch.fft.irfftn(density * seen, s=padded, dim=_axes(shape))
    return mixed[(slice(None), *(slice(n) for n in shape))].flatten(1)


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(1, len(shape) + 1))


def _window(padded: tuple[int, ...], reach: int, like: Tensor) -> Tensor:
    """The window over all shifts of a padded grid, (*padded), in the order of Fourier transforms."""
    found = torch.ones((), dtype=like.dtype, device=like.device)
    for n in padded:
        away = torch.arange(n, dtype=like.dtype, device=like.device)
        away = torch.minimum(away, n - away)
        found = found.unsqueeze(-1) * (2 - 2 * away / (reach + 1)).clamp(0, 1)
    return found
