"""Terms: an equation with its weight and options, and sums of terms.

A term asks for what it needs by the names of its function's arguments (`NAMES`) and is given just that.  Terms
scale and add: `mse + 0.1 * ncc`.  A plain callable on the same names is a term too.  Weights are leaves of the
tree, so they can be batched and differentiated; all else is static.

Every term that asks for images has the option `channel` beside those of its function: a channel from 0, or a tuple of
channels, of which alone it is given; `mse(channel=0)`.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnreg.losses import descriptors, functional, local
from fnreg.pytree import is_concrete, pytree_dataclass, static, tree_flatten, tree_unflatten

# `weights` is (1, [Z,] Y, X), or None where every voxel counts; `field` is the `DenseField` or `SplineField` of a
# displacement or a velocity on which penalties act; `domain` is that of the transform.
OF_THE_MAP = ("displacement", "field", "params", "transform", "domain")
OF_IMAGES = ("warped", "fixed", "weights")
# One channel (K, [Z,] Y, X) for each class but the background; points (N, D) and (M, D) in the world, fixed ones under
# the map are `mapped_points`; their weights (N,), (M,) and normals are None where a `Subject` has none.
OF_LABELS = ("warped_labels", "fixed_labels")
OF_POINTS = (
    "fixed_points",
    "mapped_points",
    "moving_points",
    "fixed_point_weights",
    "moving_point_weights",
    "fixed_normals",
    "moving_normals",
)
NAMES = (*OF_IMAGES, *OF_THE_MAP, "grid", *OF_LABELS, *OF_POINTS)  # `grid` is that of the fixed image


class Statistics(NamedTuple):
    """How a function of images is computed in two parts, of which the first is the same at every step of a level.

    of_fixed : a tree of tensors from the arguments of the function but `warped`
    value : the function's value from that and all its arguments
    """

    of_fixed: Callable[..., Any]
    value: Callable[..., Tensor]


# Where it pays, see docs/design.md.
STATISTICS: dict[Callable[..., Tensor], Statistics] = {
    descriptors.ngf: Statistics(descriptors.ngf_statistics, descriptors.ngf_from),
    descriptors.mind: Statistics(descriptors.mind_statistics, descriptors.mind_from),
}


def _statistics_of(function: Callable[..., Tensor]) -> Statistics | None:
    """By identity, for not every callable has a hash."""
    return next((of for known, of in STATISTICS.items() if known is function), None)


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

    @property
    def own_options(self) -> tuple[str, ...]:
        """The options of its function."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in NAMES)

    @property
    def known_options(self) -> tuple[str, ...]:
        """The options that it takes."""
        return (*self.own_options, *(("channel",) if self._has_channel else ()))

    def __call__(self, **options: Any) -> Term:
        """The same term with other options."""
        if self._has_channel and "channel" in options:
            _check_channel(self.name, options["channel"])
        known = self.known_options
        for name in options:
            if name not in known:
                told = ", ".join(known) if known else "none"
                raise TypeError(f"{self.name} has no option {name!r}: its options are {told}")
        merged = dict(self.options) | options
        return Term(self.weight, self.function, tuple(sorted(merged.items())), self.residuals)

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The channels it is given, None for all."""
        channel = dict(self.options).get("channel")
        if channel is None or not self._has_channel:
            return None
        return (channel,) if isinstance(channel, int) else channel

    @property
    def _has_channel(self) -> bool:
        """Whether the option `channel` is the term's, not one of its function's own."""
        images = not {"warped", "fixed"}.isdisjoint(self.needs)
        return images and "channel" not in inspect.signature(self.function).parameters

    def arguments(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What its function is called with, from what was found under the names."""
        given = {name: found[name] for name in self.needs} | dict(self.options)
        if (channels := self.channels) is not None:
            del given["channel"]
            for name in given.keys() & {"warped", "fixed"}:
                self.check_channels(given[name].shape[0])
                given[name] = torch.cat([given[name][c : c + 1] for c in channels])
        return given

    def check_channels(self, count: int) -> None:
        """ValueError where the option `channel` names a channel that images with so many do not have."""
        if any(c >= count for c in self.channels or ()):
            channel = dict(self.options)["channel"]
            raise ValueError(
                f"{self.name}(channel={channel!r}) but the images have {count} channels: choose from 0 to {count - 1}"
            )

    def check_size(self, size: tuple[int, ...]) -> None:
        """ValueError where a window is larger than images of this size, x first; on coarse levels it is cut off."""
        if self.function is local.lncc:
            local.check_window(size, **{k: v for k, v in self.options if k in ("radius", "window")})

    def statistics(self, fixed: Tensor, weights: Tensor | None, grid: Any) -> Any:
        """What its function makes of these alone, whatever is warped; () where it makes nothing of note."""
        of = _statistics_of(self.function)
        if of is None:
            return ()
        given = self.arguments({"warped": fixed, "fixed": fixed, "weights": weights, "grid": grid})
        del given["warped"]
        return of.of_fixed(**given)

    def value(self, found: Mapping[str, Any], statistics: Any = ()) -> Tensor:
        """The unweighted value from what was found under the names, and what `statistics` gave for them if it did."""
        of = _statistics_of(self.function)
        if of is None or (isinstance(statistics, tuple) and not statistics):
            return self.function(**self.arguments(found))
        return of.value(statistics, **self.arguments(found))

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

    def __truediv__(self, factor: float | Tensor) -> Objective:
        return self * (1 / factor)

    def __neg__(self) -> Objective:
        return self * -1.0

    def __sub__(self, other: Any) -> Objective:
        return self + -objective(other)

    @property
    def needs(self) -> frozenset[str]:
        """All names that its terms ask for."""
        return frozenset(name for term in self.terms for name in term.needs)

    @property
    def names(self) -> tuple[str, ...]:
        """What its terms are called, one name each."""
        found: list[str] = []
        for term in self.terms:
            name, number = term.name, 1
            while name in found:
                number += 1
                name = f"{term.name}_{number}"
            found.append(name)
        return tuple(found)

    def value(self, found: Mapping[str, Any], statistics: Sequence[Any] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own unweighted value by name.

        statistics : per term what `Term.statistics` gave for the same fixed image and weights; none where not known
        """
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        known_of = statistics or ((),) * len(self.terms)
        for name, term, known in zip(self.names, self.terms, known_of, strict=True):
            value = term.value(found, known)
            if not isinstance(value, Tensor) or value.ndim != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{term.name} returned {shape}: an objective returns a scalar tensor")
            values[name] = value
            weighted = term.weight.to(value.dtype) * value
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, values

    def divided(self, names: Collection[str]) -> tuple[Objective, Objective]:
        """The terms that ask for any of these names, and all others."""
        asks = [not set(names).isdisjoint(term.needs) for term in self.terms]
        some = tuple(term for term, yes in zip(self.terms, asks, strict=True) if yes)
        return Objective(some), Objective(tuple(term for term, yes in zip(self.terms, asks, strict=True) if not yes))

    @property
    def similarities(self) -> Objective:
        """The terms that compare fixed with moving: images, labels or points."""
        return self.divided((*OF_IMAGES, *OF_LABELS, *OF_POINTS))[0]

    @property
    def penalties(self) -> Objective:
        """All other terms: those of the map alone."""
        return self.divided((*OF_IMAGES, *OF_LABELS, *OF_POINTS))[1]

    @property
    def looks(self) -> bool:
        """Whether a term asks for voxels, of which some have to be in sight."""
        return not self.needs.isdisjoint((*OF_IMAGES, *OF_LABELS))

    def mean_squares(self) -> Tensor | None:
        """The factor of `mse`, where there is no other term."""
        if not self.terms or not all(term.function is functional.mse and not term.options for term in self.terms):
            return None
        return functools.reduce(torch.add, (term.weight for term in self.terms))

    def check_squares(self) -> None:
        """ValueError where a term is no sum of squares, or a weight is negative and can be looked at."""
        for term in self.terms:
            if term.residuals is None:
                raise ValueError(
                    f"{term.name} is no least-squares term, so Gauss-Newton cannot use it: "
                    "choose mse or ncc, or solver=Descent()"
                )
            if not set(term.needs).isdisjoint((*OF_LABELS, *OF_POINTS)):
                raise ValueError(
                    f"{term.name} asks for labels or points, but Gauss-Newton sees the warped image only: "
                    "choose solver=Descent()"
                )
            if is_concrete(term.weight) and bool((term.weight < 0).any()):
                raise ValueError(
                    f"{term.name} has a negative weight: Gauss-Newton needs sums of squares, choose Descent()"
                )

    def residuals(self, found: Mapping[str, Any]) -> Tensor:
        """Residuals (R,) whose squares sum to the weighted sum; see `check_squares`."""
        return self.squares(found)[0]

    def squares(self, found: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`residuals`, and each term's own unweighted value by name."""
        self.check_squares()
        parts: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for name, term in zip(self.names, self.terms, strict=True):
            assert term.residuals is not None
            part = term.residuals(**term.arguments(found)).reshape(-1)
            values[name] = part.detach() @ part.detach()
            parts.append(part * term.weight.to(part.dtype).sqrt())
        return torch.cat(parts), values

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


def term(function: Callable[..., Any], *, residuals: Callable[..., Any] | None = None) -> Term:
    """A term of weight one from an equation, with which it scales, adds and takes options.

    function : of some of `NAMES`, which it gets by name, and of options, which have defaults; gives a scalar
    residuals : of the same arguments; gives (R,), the sum of whose squares is the function's value.  With it the term
        serves `GaussNewton`

    Raises TypeError where the function asks for an unknown name.

    >>> import torch, fnreg
    >>> def above(warped, fixed, *, level=0.5):
    ...     return (warped - fixed).square()[fixed > level].mean()
    >>> 2 * fnreg.term(above)(level=0.3) + fnreg.bending
    2 * above(level=0.3) + bending
    """
    _needs(function)
    return Term(torch.ones((), dtype=torch.float64, device="cpu"), function, (), residuals)


def _check_channel(name: str, channel: Any) -> None:
    several = channel if isinstance(channel, tuple) else (channel,)
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in several)
    if not several or not whole:
        raise ValueError(
            f"{name}(channel={channel!r}): expected a channel from 0, such as 0, or a tuple, such as (0, 2)"
        )


def _scalar(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64, device="cpu")


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
