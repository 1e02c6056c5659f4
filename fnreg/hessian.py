"""Second derivatives of the energy of a batch of pairs, as products with steps: no matrix of the step is ever made.

The energy is E(s) = L(z(s)), with z what the terms see of the map: the warped image, the field, mapped points.  The
Hessian by the step is z'^T L'' z' plus the curvature of z itself.  Gauss-Newton leaves that out:

    H = z'^T (sum_i 2 w_i r_i'^T r_i' + sum_j w_j f_j'') z'

over the terms i that are squares of residuals r_i, and the others f_j, such as penalties, whose own curvature counts
whole.  Weights of voxels count as constants.  Schraudolph 2002, doi 10.1162/08997660260028683.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from fnreg.gather import Padding
from fnreg.losses.objective import Objective, Term
from fnreg.pair import Pair, pair_energy, pair_views
from fnreg.pytree import is_concrete, tree_map
from fnreg.transforms.base import Transform

SEEN = ("warped", "warped_labels", "mapped_points", "displacement", "field", "params")  # what a step changes
Product = Callable[[Any], Any]  # from a step (B, ...) to the Hessian times it
Over = Callable[..., Any]  # calls a function of one pair, (transform, padding, *arguments, pair), on all pairs


def gauss_newton(over: Over, objective: Objective, params: Any, zero: Any, *, recorded: bool = False) -> Product:
    """The products with the Gauss-Newton matrix at `params`; what all of them share is computed here.

    zero : the step of no change (B, ...)
    recorded : whether the products themselves are differentiated, by parameters or images
    """

    kinds = [_kind(term) for term in objective.terms]
    which = tuple(squares for squares, _ in kinds)

    def residuals(transform: Transform, padding: Padding | None, seen: Any, rest: Any, pair: Pair) -> list[Tensor]:
        found = _together(transform, seen, rest, pair)
        terms = [term for term, yes in zip(pair.objective.terms, which, strict=True) if yes]
        return [term.residuals(**term.arguments(found)) for term in terms]  # type: ignore[misc]

    def weighed(transform: Transform, padding: Padding | None, pushed: list[Tensor], pair: Pair) -> list[Tensor]:
        weights = [
            _part(term.weight, negative=False) if whole else term.weight
            for term, (squares, whole) in zip(pair.objective.terms, kinds, strict=True)
            if squares
        ]
        return [2 * weight.to(leaf.dtype) * leaf for weight, leaf in zip(weights, pushed, strict=True)]

    def slope(transform: Transform, padding: Padding | None, seen: Any, rest: Any, pair: Pair) -> Any:
        others = [
            dataclasses.replace(term, weight=_part(term.weight, negative=True)) if squares else term
            for term, (squares, whole) in zip(pair.objective.terms, kinds, strict=True)
            if whole
        ]

        def value(seen: Any) -> Tensor:
            return Objective(tuple(others)).value(_together(transform, seen, rest, pair))[0]

        return grad(value)(seen)

    made: Any = vjp(lambda step: over(_apart, step, params), zero, has_aux=True)
    seen, pull, rest = made
    push = transposed(pull, seen)
    parts: list[Product] = []
    if any(which):
        of_residuals: Any = vjp(lambda z: over(residuals, z, rest), seen)
        found, back = of_residuals
        forth = transposed(back, found)
        parts.append(lambda along: back(over(weighed, forth(along)))[0])
    if any(whole for _, whole in kinds):
        curved = vjp(lambda z: over(slope, z, rest), seen)[1]  # a Hessian is its own transpose
        parts.append(lambda along: curved(along)[0])

    def product(step: Any) -> Any:
        along = push(step)
        several = [part(along) for part in parts]
        return pull(tree_map(lambda *leaves: sum(leaves[1:], leaves[0]), *several))[0]

    return product if recorded else _unrecorded(product)


def _kind(term: Term) -> tuple[bool, bool]:
    """Whether a term counts by its residuals for some of the pairs, and by its whole second derivative for some: so
    it does for pairs whose weight is negative, of which there is no root."""
    if term.residuals is None:
        return False, True
    if not is_concrete(term.weight):
        return True, False
    negative = term.weight < 0
    return not bool(negative.all()), bool(negative.any())


def _part(weight: Tensor, *, negative: bool) -> Tensor:
    """The weight where it is of this sign, else 0."""
    return torch.where((weight < 0) == negative, weight, 0)


def hessian(over: Over, params: Any, zero: Any, *, recorded: bool = False) -> Product:
    """The products with the whole Hessian at `params`, by the derivative of the gradient.

    zero, recorded : as for `gauss_newton`
    """

    def slope(transform: Transform, padding: Padding | None, step: Any, params: Any, pair: Pair) -> Any:
        def energy(step: Any) -> Tensor:
            return pair_energy(transform, padding, transform.perturb(params, step, pair.domain), pair)[0]

        return grad(energy)(step)

    pull = vjp(lambda step: over(slope, step, params), zero)[1]
    return (lambda step: pull(step)[0]) if recorded else _unrecorded(lambda step: pull(step)[0])


def _apart(transform: Transform, padding: Padding | None, step: Any, params: Any, pair: Pair) -> Any:
    """What the terms ask for: what a step changes, and the tensors that count as constant."""
    after = transform.perturb(params, step, pair.domain)
    found = {name: value for name, value in pair_views(transform, padding, after, pair)[0].items() if value is not None}
    needs = pair.objective.needs
    rest = {n: v for n, v in found.items() if n in needs and n not in SEEN and isinstance(v, Tensor)}
    return {name: found[name] for name in SEEN if name in needs and name in found}, rest


def _together(transform: Transform, seen: Any, rest: Any, pair: Pair) -> dict[str, Any]:
    """What the terms ask for, from its parts."""
    given = {"transform": transform, "domain": pair.domain, "grid": pair.fixed.grid, **seen, **rest}
    return dict.fromkeys(pair.objective.needs) | given


def transposed(pull: Callable[[Any], Any], at: Any) -> Product:
    """Of a pull-back u -> J^T u the push v -> J v: its own pull-back, for it is linear.  No forward mode is asked for,
    in which samplers would compute second derivatives that nobody needs."""
    push = vjp(lambda u: pull(u)[0], tree_map(torch.zeros_like, at))[1]
    return lambda v: push(v)[0]


def _unrecorded(product: Product) -> Product:
    """Without a record of the pull-backs, for where nobody differentiates around this call."""

    def quiet(step: Any) -> Any:
        with torch.no_grad():
            return product(step)

    return quiet
