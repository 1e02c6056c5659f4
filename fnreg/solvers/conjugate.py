"""Conjugate gradients for a batch of systems, each with its own numbers and its own end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fnreg.pytree import is_concrete


class Solution(NamedTuple):
    """What conjugate gradients found, per system."""

    x: Tensor  # (B, P)
    residual: Tensor  # (B, P) b - A x
    iterations: Tensor  # (B,)
    curved: Tensor  # (B,) bool: a direction without positive curvature was met, and x is from before it


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (B,) of rows (B, P)."""
    return (a.unsqueeze(1) @ b.unsqueeze(2)).flatten()


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    diagonal: Tensor | None = None,
    tolerance: float | Tensor = 1e-10,
    iterations: int = 100,
) -> Solution:
    """A x = b for symmetric A, by conjugate gradients from 0 with a diagonal preconditioner.

    product : from (B, P) to A of each row
    right : b (B, P)
    diagonal : (B, P) positive, close to that of A; None for 1
    tolerance : ends where sqrt(r . r / diagonal) has fallen to this part of that of b; one number or (B,)
    iterations : at most so many

    Where p . A p is not positive a system ends with the x it has, the preconditioned right side where it has none: a
    direction of descent for A the Hessian and b the negative gradient.  Nothing depends on the values of other rows.
    Steihaug 1983, doi 10.1137/0720042; Nocedal and Wright 2006, "Numerical optimization", algorithm 7.1.

    >>> import torch
    >>> from fnreg.solvers.conjugate import conjugate_gradients
    >>> matrix = torch.tensor([[[4.0, 1.0], [1.0, 3.0]]])
    >>> found = conjugate_gradients(lambda x: (matrix @ x[..., None])[..., 0], torch.tensor([[1.0, 2.0]]), iterations=2)
    >>> found.x, found.iterations
    (tensor([[0.0909, 0.6364]]), tensor([2]))
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: expected at least 1")
    scale = torch.ones_like(right) if diagonal is None else diagonal
    x, residual = torch.zeros_like(right), right
    direction = right / scale
    size = dot(residual, direction)  # of the residual
    end = size * tolerance**2
    active = torch.isfinite(size) & (size > 0)
    count, curved = torch.zeros_like(size, dtype=torch.int64), torch.zeros_like(active)
    for number in range(iterations):
        if is_concrete(active) and not bool(active.any()):
            break
        image = product(direction)
        bend = dot(direction, image)
        # below rounding a curvature is none
        least = 8 * torch.finfo(bend.dtype).eps * dot(direction.abs(), image.abs())
        flat = active & (bend <= least)
        going = active & (bend > least)
        alpha = torch.where(going, size / torch.where(going, bend, 1), 0).unsqueeze(1)
        x = torch.where(going.unsqueeze(1), x + alpha * direction, x)
        if number == 0:
            x = torch.where(flat.unsqueeze(1), direction, x)
        residual = torch.where(going.unsqueeze(1), residual - alpha * image, residual)
        ahead = residual / scale
        after = dot(residual, ahead)
        beta = torch.where(going, after / torch.where(going, size, 1), 0).unsqueeze(1)
        direction = torch.where(going.unsqueeze(1), ahead + beta * direction, direction)
        count, curved = count + going, curved | flat
        active = going & (after > end)
        size = torch.where(going, after, size)
    return Solution(x, residual, count, curved)
