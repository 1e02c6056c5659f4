"""Derivatives through a registration: `differentiable(register, adjoint=...)`.

    solve = differentiable(register, adjoint=Implicit())
    result = solve(fixed, moving, FFD(stride=4), objective=mse + weight * bending)

Parameters, value and terms of the result are functions of images, masks, weights of terms, points and grids, and so of
the parameters of any network that made these, for `torch.func` and for `loss.backward()`.  `Implicit` differentiates
the optimum, at the cost of a linear system and in the memory of a single step, however many were taken; `Unrolled` and
`Checkpointed` differentiate the steps themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from fnreg.optimum import Implicit
from fnreg.registration import Registration, register

_REGISTER = register


@runtime_checkable
class Adjoint(Protocol):
    """How derivatives go through a registration."""

    def solve(self, given: dict[str, Any]) -> Registration:
        """What `register` gives for these of its arguments, with a history: all of them, but `stop` only if given."""
        ...


def differentiable(
    register: Callable[..., Registration], *, adjoint: Adjoint | None = None
) -> Callable[..., Registration]:
    """`register` with derivatives: the same function of the same arguments, whose result has a history.

    register : `fnreg.register`, or a `functools.partial` of it
    adjoint : `Implicit()` (default), `Unrolled(...)` or `Checkpointed(...)`

    Works under `torch.func.grad`, `jacrev` and `vmap`, in any order, and with `loss.backward()`; a batch by leading
    axes is differentiated pair by pair.  Raises TypeError for another function or adjoint.

    >>> import torch, fnreg
    >>> from torch.func import grad
    >>> disc = (fnreg.Grid((16, 16)).points() - 7.5).norm(dim=1).reshape(1, 16, 16) < 5
    >>> fixed = fnreg.Image(disc.double()).gaussian(2.0)
    >>> solve = fnreg.differentiable(fnreg.register)
    >>> def found(place):
    ...     moving = fnreg.Image(fixed.data, center=place)
    ...     return solve(fixed, moving, fnreg.Translation(), solver=fnreg.GaussNewton()).mapping.params["translation"]
    >>> torch.func.jacrev(found)(torch.tensor([8.3, 7.2], dtype=torch.float64)).round(decimals=3).abs()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    chosen = Implicit() if adjoint is None else adjoint
    if isinstance(chosen, type) or not isinstance(chosen, Adjoint):
        raise TypeError(f"adjoint is {adjoint!r}: expected Implicit(), Unrolled() or Checkpointed()")
    inner = register
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inner is not _REGISTER:
        raise TypeError(f"differentiable takes fnreg.register, or a functools.partial of it, not {register!r}")
    partial: Any = register if isinstance(register, functools.partial) else functools.partial(register)
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def solve(*arguments: Any, **options: Any) -> Registration:
        bound = signature.bind(*partial.args, *arguments, **(partial.keywords | options))
        stopping = "stop" in bound.arguments
        bound.apply_defaults()
        return chosen.solve({name: value for name, value in bound.arguments.items() if stopping or name != "stop"})

    return solve
