"""Terms: an equation with its weight and options, and sums of terms.

A term asks for what it needs by the names of its function's arguments (`NAMES`) and is given just that.  Terms
scale and add: `mse + 0.1 * ncc`.  A plain callable on the same names is a term too.  Weights are leaves of the
tree, so they can be batched and differentiated; all else is static.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fnreg.losses import consistency, functional, penalties
from fnreg.pytree import is_concrete, pytree_dataclass, static, tree_flatten, tree_unflatten

# `weights` is (1, [Z,] Y, X), or None where every voxel counts; `field` is the `DenseField` or `SplineField` of a
# displacement or a velocity on which penalties act.
NAMES = ("warped", "fixed", "weights", "displacement", "field", "params", "transform", "domain")


@pytree_dataclass
class Term:
    """weight * function(needs..., **options).

    weight : scalar; one rank more is one weight per pair
    function : the equation; the names of its arguments say what it needs, see `NAMES`
    options : its keyword options, as sorted pairs
    residuals : for least-squares terms, the function whose squares sum to the equation
    """

    weight: Tensor
    function: Callable[..., Tensor] = static()
    options: tuple[tuple[str, Any], ...] = static(default=())
    residuals: Callable[..., Tensor] | None = static(default=None)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def needs(self) -> tuple[str, ...]:
        """The names it asks for."""
        return _needs(self.function)

    def __call__(self, **options: Any) -> Term:
        """The same term with other options."""
        known = [name for name in inspect.signature(self.function).parameters if name not in NAMES]
        for name in options:
            if name not in known:
                told = ", ".join(known) if known else "none"
                raise TypeError(f"{self.name} has no option {name!r}: its options are {told}")
        merged = dict(self.options) | options
        return Term(self.weight, self.function, tuple(sorted(merged.items())), self.residuals)

    def value(self, found: Mapping[str, Any]) -> Tensor:
        """The unweighted value from what was found under the names."""
        return self.function(**{name: found[name] for name in self.needs}, **dict(self.options))

    def ranks(self) -> Term:
        """The rank that each leaf has for one pair."""
        return tree_unflatten([0], tree_flatten(self)[1])

    def __mul__(self, factor: float | Tensor) -> Term:
        return Term(self.weight * _scalar(factor), self.function, self.options, self.residuals)

    __rmul__ = __mul__

    def __truediv__(self, factor: float | Tensor) -> Term:
        return self * (1 / factor)

    def __neg__(self) -> Term:
        return self * -1.0

    def __add__(self, other: Any) -> Objective:
        return Objective((self,)) + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Objective:
        return self + objective(other) * -1.0

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.options)
        known = isinstance(self.weight, Tensor) and self.weight.ndim == 0 and is_concrete(self.weight)
        scale = f"{float(self.weight):g} * " if known else ""
        return f"{'' if scale == '1 * ' else scale}{self.name}" + (f"({told})" if told else "")


@pytree_dataclass
class Objective:
    """A sum of terms."""

    terms: tuple[Term, ...]

    def __add__(self, other: Any) -> Objective:
        if isinstance(other, (int, float)) and other == 0:  # so that sum(...) works
            return self
        return Objective(self.terms + objective(other).terms)

    __radd__ = __add__

    def __mul__(self, factor: float | Tensor) -> Objective:
        return Objective(tuple(term * factor for term in self.terms))

    __rmul__ = __mul__

    @property
    def needs(self) -> frozenset[str]:
        """All names that its terms ask for."""
        return frozenset(name for term in self.terms for name in term.needs)

    def value(self, found: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own unweighted value by name."""
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        for term in self.terms:
            value = term.value(found)
            if not isinstance(value, Tensor) or value.ndim != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{term.name} returned {shape}: an objective returns a scalar tensor")
            name, number = term.name, 1
            while name in values:
                number += 1
                name = f"{term.name}_{number}"
            values[name] = value
            weighted = term.weight.to(value.dtype) * value
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, values

    def mean_squares(self) -> tuple[Tensor | None, Objective]:
        """The factor of `mse`, None where it is no term, and all other terms."""
        squared = [term.function is functional.mse and not term.options for term in self.terms]
        weights = [term.weight for term, yes in zip(self.terms, squared, strict=True) if yes]
        rest = Objective(tuple(term for term, yes in zip(self.terms, squared, strict=True) if not yes))
        return torch.as_tensor(sum(weights)) if weights else None, rest

    def check_squares(self) -> None:
        """ValueError where a term is no sum of squares, or a weight is negative and can be looked at."""
        for term in self.terms:
            if term.residuals is None:
                raise ValueError(
                    f"{term.name} is no least-squares term, so Gauss-Newton cannot use it: "
                    "choose mse or ncc, or solver=Descent()"
                )
            if is_concrete(term.weight) and bool((term.weight < 0).any()):
                raise ValueError(
                    f"{term.name} has a negative weight: Gauss-Newton needs sums of squares, choose Descent()"
                )

    def residuals(self, found: Mapping[str, Any]) -> Tensor:
        """Residuals (R,) whose squares sum to the weighted sum; see `check_squares`."""
        self.check_squares()
        parts: list[Tensor] = []
        for term in self.terms:
            assert term.residuals is not None
            part = term.residuals(**{name: found[name] for name in term.needs}, **dict(term.options))
            parts.append(part.reshape(-1) * term.weight.to(part.dtype).sqrt())
        return torch.cat(parts)

    def ranks(self) -> Objective:
        """The rank that each leaf has for one pair."""
        return tree_unflatten([0] * len(self.terms), tree_flatten(self)[1])

    def __repr__(self) -> str:
        return " + ".join(repr(term) for term in self.terms)


def objective(value: Any) -> Objective:
    """A term, a sum of terms or a plain callable as an objective."""
    if isinstance(value, Objective):
        return value
    if isinstance(value, Term):
        return Objective((value,))
    if callable(value):
        return Objective((term(value),))
    raise TypeError(f"an objective is a Term, a sum of terms or a callable, not {type(value).__name__}")


def term(function: Callable[..., Any], residuals: Callable[..., Any] | None = None) -> Term:
    """A term of weight one from an equation; raises TypeError where it asks for an unknown name."""
    _needs(function)
    return Term(torch.ones((), dtype=torch.float64), function, (), residuals)


def _scalar(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


_NEEDS: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _needs(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """The names that a function asks for, remembered as long as it lives."""
    try:
        if function not in _NEEDS:
            _NEEDS[function] = _read_needs(function)
        return _NEEDS[function]
    except TypeError:  # neither hashable nor weakly referenced
        return _read_needs(function)


def _read_needs(function: Callable[..., Tensor]) -> tuple[str, ...]:
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in NAMES:
            found.append(name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise TypeError(f"an objective asks for {name!r}: it may ask for {', '.join(NAMES)}")
    return tuple(found)


mse = term(functional.mse, functional.mse_residuals)
mae = term(functional.mae)
huber = term(functional.huber)
ncc = term(functional.ncc, functional.ncc_residuals)

SIMILARITIES: dict[str, Term] = {"mse": mse, "mae": mae, "huber": huber, "ncc": ncc}

bending = term(penalties.bending)
diffusion = term(penalties.diffusion)
curvature = term(penalties.curvature)
elasticity = term(penalties.elasticity)
divergence = term(penalties.divergence)
total_variation = term(penalties.total_variation)
folding = term(penalties.folding)
log_jacobian = term(penalties.log_jacobian)
inverse_consistency = term(consistency.inverse_consistency)  # of the map itself, not of a field

PENALTIES: dict[str, Term] = {
    "bending": bending,
    "diffusion": diffusion,
    "curvature": curvature,
    "elasticity": elasticity,
    "divergence": divergence,
    "total_variation": total_variation,
    "folding": folding,
    "log_jacobian": log_jacobian,
}
