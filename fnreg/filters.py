"""Separable filters, one small matrix product per axis.

Every filter is a row-stochastic matrix (n_out, n_in) per axis: rows sum to one, so a constant image stays
constant up to its borders, and weights may depend on batched values without a change of shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnreg import windows
from fnreg.pytree import constant, is_concrete

NARROW = 8.0  # voxels: the standard deviation up to which a Gaussian is cut off and not a matrix
FWHM = 2 * math.sqrt(2 * math.log(2))  # full width at half maximum of a Gaussian with unit standard deviation


def along(data: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Apply one matrix per axis, x first, to data (C, [Z,] Y, X); None leaves an axis as it is."""
    if len(matrices) != data.ndim - 1:
        raise ValueError(f"{len(matrices)} matrices for data with {data.ndim - 1} spatial axes: give one per axis")
    data = data.contiguous()
    for k in reversed(range(len(matrices))):  # from the slowest axis to the fastest nothing is copied on the way
        matrix = matrices[k]
        if matrix is None:
            continue
        shape = (*data.shape[: data.ndim - 1 - k], matrix.shape[0], *data.shape[data.ndim - k :])
        data = data @ matrix.mT if k == 0 else (matrix @ data.flatten(data.ndim - k)).reshape(shape)
    return data


def gaussian_matrix(n: int, sigma: Tensor) -> Tensor:
    """Row-normalised Gaussian weights (n, n) over voxel distances; sigma (a scalar, in voxels) 0 gives I.

    Weights below rounding are zero: they would leave denormal numbers in the images, with which processors are slow.
    """
    index = torch.arange(n, dtype=sigma.dtype, device=sigma.device)
    distance = index - index[:, None]
    tiny = torch.finfo(sigma.dtype).tiny ** 0.5
    weights = torch.exp(-0.5 * distance**2 / torch.clamp(sigma**2, min=tiny))
    weights = torch.where(weights < torch.finfo(torch.float64).eps, 0, weights)
    return weights / weights.sum(-1, keepdim=True)


def gaussian(data: Tensor, sigma: float | Sequence[float] | Tensor) -> Tensor:
    """Smooth data (C, [Z,] Y, X) with a Gaussian of `sigma` voxels per axis, x first.

    At the borders the kernel is normalised by the part of it that lies inside, so constants are preserved.  Raises
    ValueError for a sigma below 0 or NaN, and for as many as there are no axes.

    >>> import torch
    >>> from fnreg.filters import gaussian
    >>> gaussian(torch.ones(1, 4), 2.0)
    tensor([[1., 1., 1., 1.]])
    """
    dimension = data.ndim - 1
    if not isinstance(sigma, Tensor):
        given = [sigma] * dimension if isinstance(sigma, (int, float)) else sigma
        if any(not isinstance(s, Tensor) and not s >= 0 for s in given):
            raise ValueError(f"sigma is {sigma}: expected voxels, at least 0")
        narrow = len(given) == dimension and all(isinstance(s, (int, float)) and 0 <= s <= NARROW for s in given)
        if narrow and windows.serves(data):
            taps = tuple(windows.gaussian_taps(float(s), data.dtype) for s in given)
            return windows.windowed(data, taps, normalised=True)
    elif not torch.compiler.is_compiling() and is_concrete(sigma) and not bool((sigma >= 0).all()):
        raise ValueError(f"sigma is {sigma.tolist()}: expected voxels, at least 0")
    sigmas = torch.as_tensor(sigma, dtype=torch.float64, device=data.device)
    sigmas = sigmas.expand(dimension) if sigmas.ndim == 0 else sigmas
    if sigmas.shape[-1] != dimension:
        raise ValueError(f"sigma has {sigmas.shape[-1]} values for data with {dimension} spatial axes")
    return along(data, [gaussian_matrix(n, s).to(data.dtype) for n, s in zip(data.shape[:0:-1], sigmas, strict=True)])


def window_sums(data: Tensor, taps: windows.Taps) -> Tensor:
    """sum_t w(|t|) data(i + t) along each axis with zeros outside, data (C, [Z,] Y, X).

    taps : weights per axis, x first, from the centre outwards
    """
    if windows.serves(data):
        return windows.windowed(data, taps, normalised=False)
    return along(
        data, [windows.band(n, w, data.dtype, data.device) for n, w in zip(data.shape[:0:-1], taps, strict=True)]
    )


@constant
def resize_matrix(n: int, m: int, device: torch.device) -> Tensor:
    """From n samples to m over the same extent, (m, n) float64: smooth to the new voxel's width, then linear.

    The standard deviation is that which turns a point spread of one old voxel (full width at half maximum)
    into one of a new voxel, sqrt((n / m)^2 - 1) / 2.355 old voxels.  Cardoso et al. 2015, "Scale factor point
    spread function matching", doi 10.1007/978-3-319-24571-3_81.
    """
    position = ((torch.arange(m, dtype=torch.float64, device=device) + 0.5) * (n / m) - 0.5).clamp(0, n - 1)
    linear = (1 - (position[:, None] - torch.arange(n, dtype=torch.float64, device=device)).abs()).clamp(min=0)
    if m >= n:
        return linear
    sigma = torch.tensor(math.sqrt((n / m) ** 2 - 1) / FWHM, dtype=torch.float64, device=device)
    return linear @ gaussian_matrix(n, sigma)


def resize(data: Tensor, size: Sequence[int]) -> Tensor:
    """Data (C, [Z,] Y, X) with `size` voxels per axis, x first, over the same extent, without aliasing.

    Raises ValueError where that is no size for these axes.
    """
    if len(size) != data.ndim - 1 or min(size) < 1:
        raise ValueError(
            f"size is {tuple(size)} for data {tuple(data.shape)}: expected a voxel at least along each of its "
            f"{data.ndim - 1} axes"
        )
    matrices = [
        None if n == m else resize_matrix(n, m, data.device).to(data.dtype)
        for n, m in zip(data.shape[:0:-1], size, strict=True)
    ]
    return along(data, matrices)
