"""One level of a registration: what a pair is, its energy, and the derivatives that solvers ask for.

The functions named `_pair_...` are written for one pair; `Level` maps them over the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, jacfwd, jvp, vjp, vmap

from fnreg.annotations import Annotations
from fnreg.grid import Grid, apply_matrix, index_points
from fnreg.image import Image
from fnreg.losses.terms import OF_IMAGES, OF_LABELS, OF_POINTS, OF_THE_MAP, Objective
from fnreg.optim import scale
from fnreg.pytree import (
    Axes,
    batch_axes,
    is_tracked,
    pytree_dataclass,
    tree_detach,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_take,
    tree_unflatten,
    tree_vmap,
)
from fnreg.sampling import Padding, Sampled, sample
from fnreg.squares import Squares, serves, squares
from fnreg.transforms.base import (
    Domain,
    Mapping,
    Transform,
    domain_ranks,
    first_domain,
    single,
    split_coords,
    split_points,
)


@pytree_dataclass
class Pair:
    """What belongs to one pair at one level."""

    fixed: Image
    moving: Image
    objective: Objective
    from_fixed: Tensor  # (D + 1, D + 1) voxel index of the fixed grid to world
    fixed_mask: Tensor | None = None  # (1, [Z,] Y, X)
    moving_mask: Tensor | None = None
    then: Mapping | None = None  # acts after the optimised map
    to_moving: Tensor | None = None  # (D + 1, D + 1) world, before `then` where that is linear, to moving index
    given_domain: Domain | None = None  # of the transform, where it is not the fixed grid
    annotations: Annotations | None = None  # labels and points, where the objective asks for them

    @property
    def domain(self) -> Domain:
        """The transform's domain."""
        return self.fixed.grid if self.given_domain is None else self.given_domain

    def ranks(self) -> Pair:
        """The rank that each leaf has for one pair."""
        rank = self.fixed.grid.ndim + 1
        parts: list[Any] = [self.fixed.ranks(), self.moving.ranks(), self.objective.ranks(), 2]
        parts += [rank] * ((self.fixed_mask is not None) + (self.moving_mask is not None))
        parts += [] if self.then is None else [self.then.ranks()]
        parts += [] if self.to_moving is None else [2]
        parts += [] if self.given_domain is None else [domain_ranks(self.given_domain)]
        parts += [] if self.annotations is None else [self.annotations.ranks(rank - 1)]
        return tree_unflatten(tree_flatten(parts)[0], tree_flatten(self)[1])


def _pair_matrix(transform: Transform, params: Any, pair: Pair) -> Tensor:
    """(D, D + 1) float64 from voxel index of the fixed grid to that of the moving grid, for linear maps."""
    assert pair.to_moving is not None
    return (pair.to_moving @ transform.matrix(params, pair.domain) @ pair.from_fixed)[:-1]


def _pair_coords(transform: Transform, params: Any, pair: Pair) -> Tensor:
    """Voxel indices (D, N) in the moving image of what the fixed voxels map to."""
    dtype, grid = pair.fixed.data.dtype, pair.fixed.grid
    if pair.to_moving is not None and _splits(transform, pair):
        found = transform.split(params, pair.domain)
        return split_coords(found, pair.to_moving, pair.from_fixed, grid.size, dtype)
    if _splits(transform, pair):
        points = split_points(transform.split(params, pair.domain), grid)
    else:
        points = transform.points(params, pair.domain, grid.points())
    if pair.to_moving is not None:
        return apply_matrix(pair.to_moving, points).mT.to(dtype)
    assert pair.then is not None
    points = pair.then.transform.points(pair.then.params, pair.then.domain, points)
    return apply_matrix(pair.moving.grid.matrix("world", "index"), points).mT.to(dtype)


def _pair_weights(inside: Tensor, coords: Tensor, pair: Pair, padding: Padding | None) -> Tensor | None:
    """Weights (1, N); None where every voxel counts."""
    weights = None if padding is not None else inside.unsqueeze(0)
    if pair.fixed_mask is not None:
        mask = pair.fixed_mask.flatten(1)
        weights = mask if weights is None else weights * mask
    if pair.moving_mask is not None:
        mask = sample(pair.moving_mask, coords, padding="zeros").value
        weights = mask if weights is None else weights * mask
    return weights


def pair_seen(pair: Pair, coords: Tensor, padding: Padding | None) -> tuple[Sampled, Tensor | None]:
    """The moving image at coordinates, and the weights."""
    seen = sample(pair.moving.data, coords, padding="border" if padding is None else padding)
    return seen, _pair_weights(seen.inside, coords, pair, padding)


def _in_sight(value: Tensor, weights: Tensor | None) -> Tensor:
    """Infinity where no voxel counts: a map that moves the image out of sight is no good map."""
    return value if weights is None else torch.where((weights > 0).any(), value, torch.inf)


def _splits(transform: Transform, pair: Pair) -> bool:
    """Whether the map splits over the voxels of the fixed image."""
    return transform.splits and (transform.linear or pair.given_domain is None)


def _pair_map(transform: Transform, params: Any, domain: Domain, grid: Grid, needs: frozenset[str]) -> dict[str, Any]:
    """What terms may ask for that is of the map alone."""
    found: dict[str, Any] = {"params": params, "transform": transform, "domain": domain, "grid": grid}
    if "displacement" in needs:
        found["displacement"] = transform.displacement(params, domain, grid)
    if "field" in needs:
        found["field"] = transform.field(params, domain)
    return found


def _pair_found(
    transform: Transform,
    params: Any,
    pair: Pair,
    warped: Tensor,
    weights: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Any]:
    """What terms may ask for, by name."""
    grid = pair.fixed.grid
    images = {
        "warped": warped.reshape(pair.fixed.data.shape),
        "fixed": pair.fixed.data,
        "weights": None if weights is None else weights.reshape(1, *grid.shape),
    }
    return images | _pair_map(transform, params, pair.domain, grid, needs)


def _pair_points(transform: Transform, params: Any, pair: Pair, needs: frozenset[str]) -> dict[str, Any]:
    """What terms may ask for that is of points."""
    if pair.annotations is None or needs.isdisjoint(OF_POINTS):
        return {}
    found = pair.annotations.of_points()
    if "mapped_points" in needs:
        mapped = transform.points(params, pair.domain, found["fixed_points"])
        if pair.then is not None:
            mapped = pair.then.transform.points(pair.then.params, pair.then.domain, mapped)
        found["mapped_points"] = mapped
    return found


def _pair_energy(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's value and each term's."""
    needs, kind = pair.objective.needs, pair.fixed.data.dtype
    points = _pair_points(transform, params, pair, needs)
    if needs.isdisjoint((*OF_IMAGES, *OF_LABELS)):  # no voxel is asked for, so none has to be in sight
        found = _pair_map(transform, params, pair.domain, pair.fixed.grid, needs)
        total, terms = pair.objective.value(found | points)
        return total.to(kind), terms
    coords = _pair_coords(transform, params, pair)
    seen, weights = pair_seen(pair, coords, padding)
    found = _pair_found(transform, params, pair, seen.value, weights, needs) | points
    if pair.annotations is not None and not needs.isdisjoint(OF_LABELS):
        found |= pair.annotations.of_labels(coords, padding)
    total, terms = pair.objective.value(found)
    return _in_sight(total.to(kind), weights), terms


def _pair_gradient(transform: Transform, padding: Padding | None, params: Any, pair: Pair) -> tuple[Any, Tensor]:
    """Gradient by the step at zero, and the value."""

    def energy(step: Any) -> Tensor:
        return _pair_energy(transform, padding, transform.perturb(params, step, pair.domain), pair)[0]

    zero = transform.cast(transform.zero_step(pair.domain), pair.fixed.data.dtype)
    gradient, value = grad_and_value(energy)(zero)
    return transform.precondition(gradient, pair.domain), value


def _pair_parts(
    transform: Transform, step: Any, params: Any, objective: Objective, domain: Domain
) -> dict[str, Tensor]:
    """What the energy is made of after a step, by name: `shift` and `matrix` of the map's `split` where it has them,
    and the `penalty` of terms that ask for the map alone."""
    split = transform.split_after(params, step, domain)._asdict()
    parts = {name: part for name, part in split.items() if part is not None}
    if objective.terms:
        after = transform.perturb(params, step, domain)
        found = _pair_map(transform, after, domain, first_domain(domain), objective.needs)
        parts["penalty"] = objective.value(found)[0]
    return parts


def _pull_back(
    function: Callable[[Any], dict[str, Tensor]], step: Any
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]:
    """Values of a function that no transform is around, and its pull-back: `torch.func.vjp` with half its layers."""
    if torch.is_inference_mode_enabled():  # without a tape
        made: Any = vjp(function, step)
        return made[0], lambda cotangents: made[1](cotangents)[0]
    leaves, structure = tree_flatten(step)
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        values = function(tree_unflatten(leaves, structure))

    def pull(cotangents: dict[str, Tensor]) -> Any:
        moved = [name for name, value in values.items() if value.requires_grad]
        ends, by_value = [values[name] for name in moved], [cotangents[name] for name in moved]
        found = torch.autograd.grad(ends, leaves, by_value, allow_unused=True, materialize_grads=True)
        return tree_unflatten(list(found), structure)

    return tree_detach(values), pull


def _pair_normal_equations(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """|r|^2, J^T r (P,) and J^T J (P, P), by the chain rule through coordinates, image and residuals.

    Weights count as constants: that is the Gauss-Newton approximation.
    """
    zero = transform.cast(transform.zero_step(pair.domain), pair.fixed.data.dtype)
    linear = transform.linear and pair.to_moving is not None

    def along(step: Any) -> tuple[Tensor, Tensor]:
        place = _pair_matrix if linear else _pair_coords
        found = place(transform, transform.perturb(params, step, pair.domain), pair)
        return found, found

    slopes, found = jacfwd(along, has_aux=True)(zero)
    dtype, grid = pair.fixed.data.dtype, pair.fixed.grid
    by_step = torch.cat([leaf.flatten(2) for leaf in tree_leaves(slopes)], 2).to(dtype)  # (D, N or D + 1, P)
    index = index_points(grid.size, dtype, found.device)
    coords = found.to(dtype) @ index if linear else found
    seen, weights = pair_seen(pair, coords, padding)
    needs = pair.objective.needs

    def residuals_of(warped: Tensor) -> Tensor:
        return pair.objective.residuals(_pair_found(transform, params, pair, warped, weights, needs))

    count = by_step.shape[-1]
    if linear:  # every tangent is a sum of the products of a slope and an index
        products = seen.gradient.unsqueeze(2) * index  # (C, D, D + 1, N)
        tangents = (by_step.reshape(-1, count).mT @ products.flatten(1, 2)).movedim(1, 0)  # (P, C, N)
    else:
        tangents = torch.stack([(seen.gradient * by_step[..., p]).sum(1) for p in range(count)])
    residuals = residuals_of(seen.value)
    jacobian = vmap(lambda tangent: jvp(residuals_of, (seen.value,), (tangent,))[1])(tangents)  # (P, R)
    value = (residuals * residuals).sum().to(torch.float64)
    return (
        _in_sight(value, weights),
        (jacobian @ residuals).to(torch.float64),
        (jacobian @ jacobian.mT).to(torch.float64),
    )


def _pair_overlap(transform: Transform, padding: Padding | None, params: Any, pair: Pair) -> Tensor:
    """Sum of the weights over the number of voxels."""
    coords = _pair_coords(transform, params, pair)
    weights = pair_seen(pair, coords, padding)[1]
    return torch.ones((), dtype=coords.dtype, device=coords.device) if weights is None else weights.mean()


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """A batch of pairs at one level: `solvers.base.Problem`.

    axes : per leaf of `pairs`, 0 where it has a batch axis and None where it is shared
    """

    transform: Transform
    pairs: Pair
    axes: Axes
    size: int
    padding: Padding | None = None

    def _over(self, function: Callable[..., Any], *batched: Any) -> Any:
        bound = functools.partial(function, self.transform, self.padding)
        return tree_vmap(bound, (*(None for _ in batched), self.axes), *batched, self.pairs)

    @functools.cached_property
    def _domain_axes(self) -> Axes:
        return batch_axes("domain", self.pairs.domain, domain_ranks(self.pairs.domain))[0]

    def take(self, index: Tensor) -> Level:
        """The same for some of the pairs, or for some of them several times."""
        pairs = tree_take(self.pairs, index, self.axes)
        return dataclasses.replace(self, pairs=pairs, size=int(index.shape[0]))

    def zero_step(self) -> Any:
        """The step of no change, (B, ...)."""
        return self._zero

    @functools.cached_property
    def _zero(self) -> Any:
        zero = self.transform.zero_step(single(self.pairs.domain))
        zero = self.transform.cast(zero, self.pairs.fixed.data.dtype)
        return tree_map(lambda leaf: leaf.expand(self.size, *leaf.shape), zero)

    def value(self, params: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Value (B,) and each term's."""
        if len(self.pairs.objective.terms) != 1 or self._squared is None or is_tracked(params):
            return self._over(_pair_energy, params)
        value, kind = self._sums(self._parts(params))[2], self.pairs.fixed.data.dtype
        term, weight = self.pairs.objective.terms[0], self._squared[0]
        plain = torch.where(weight == 0, 0, value / torch.where(weight == 0, 1, weight))
        return value.to(kind), {term.name: plain.to(kind)}

    def gradient(self, params: Any) -> tuple[Any, Tensor]:
        """Gradient by the step, and the value (B,)."""
        return self._gradient_of_squares(params) or self._over(_pair_gradient, params)

    @functools.cached_property
    def _squared(self) -> tuple[Tensor, Objective, Axes] | None:
        """The factor of mean squares that `squares` can compute, and what the objective has beside them; else None."""
        pairs = self.pairs
        if pairs.moving_mask is not None or pairs.to_moving is None or not _splits(self.transform, pairs):
            return None
        if not serves(pairs.moving.data, pairs.fixed.data, pairs.fixed_mask):
            return None
        weight, rest = pairs.objective.mean_squares()
        if weight is None or not rest.needs.issubset(OF_THE_MAP) or is_tracked(pairs):
            return None
        return weight, rest, batch_axes("objective", rest, rest.ranks())[0]

    def _gradient_of_squares(self, params: Any) -> tuple[Any, Tensor] | None:
        """The gradient by one pass over the images, which gives the derivative by the map."""
        if self._squared is None or is_tracked(params):
            return None
        (_, rest, of_rest), pairs = self._squared, self.pairs
        domain, axes = pairs.domain, self._domain_axes

        def parts_after(step: Any) -> dict[str, Tensor]:
            parts = functools.partial(_pair_parts, self.transform)
            return tree_vmap(parts, (None, None, of_rest, axes), step, params, rest, domain)

        parts, pull = _pull_back(parts_after, self.zero_step())
        found, factor, value = self._sums(parts)
        assert pairs.to_moving is not None
        left, right = pairs.to_moving[..., :-1, :], pairs.from_fixed
        by_parts: dict[str, Any] = {"matrix": ((scale(found.by_matrix, factor) @ right.mT).mT @ left).mT}
        if found.by_shift is not None:
            by_parts["shift"] = scale(found.by_shift, factor).to(parts["shift"].dtype)
        if "penalty" in parts:
            by_parts["penalty"] = torch.ones_like(parts["penalty"])
            value = value + parts["penalty"]
        gradient = pull({name: by_parts[name] for name in parts})
        if type(self.transform).precondition is not Transform.precondition:
            gradient = tree_vmap(self.transform.precondition, (None, axes), gradient, domain)
        return gradient, value.to(pairs.fixed.data.dtype)

    def _parts(self, params: Any) -> dict[str, Tensor]:
        """The maps of parameters as `_sums` takes them."""
        parts = functools.partial(_pair_parts, self.transform)
        given = self.zero_step(), params, Objective(()), self.pairs.domain
        return tree_vmap(parts, (None, None, (), self._domain_axes), *given)

    def _sums(self, parts: dict[str, Tensor]) -> tuple[Squares, Tensor, Tensor]:
        """The sums of `squares` under maps, what makes the weighted mean of their value, and that mean (B,)."""
        assert self._squared is not None
        pairs, rank = self.pairs, self.pairs.fixed.grid.ndim + 1
        # Index to index is to_moving @ matrix @ from_fixed; a batch times one matrix is the faster order.
        assert pairs.to_moving is not None
        left, right = pairs.to_moving[..., :-1, :], pairs.from_fixed
        world = parts["matrix"] @ right if "matrix" in parts else right
        moving, fixed, mask, matrices = (
            None if t is None else t.reshape(-1, *t.shape[-axes:])
            for t, axes in (
                (pairs.moving.data, rank),
                (pairs.fixed.data, rank),
                (pairs.fixed_mask, rank),
                ((world.mT @ left.mT).mT, 2),
            )
        )
        shift = parts["shift"].to(pairs.moving.data.dtype) if "shift" in parts else None
        found = squares(moving, fixed, mask, matrices, shift, padding=self.padding)  # type: ignore[arg-type]
        known = found.weight > 0
        factor = self._squared[0] / (torch.where(known, found.weight, 1) * pairs.fixed.channels)
        return found, factor, torch.where(known, found.value * factor, torch.inf)

    def normal_equations(self, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B,), J^T r (B, P) and J^T J (B, P, P)."""
        return self._over(_pair_normal_equations, params)

    def overlap(self, params: Any) -> Tensor:
        """Share of the fixed voxels that count (B,)."""
        if self._squared is None or is_tracked(params):
            return self._over(_pair_overlap, params)
        weight = self._sums(self._parts(params))[0].weight / self.pairs.fixed.grid.numel
        return weight.to(self.pairs.fixed.data.dtype)

    def retract(self, params: Any, step: Any) -> Any:
        """Parameters after a step."""

        def one(before: Any, change: Any, domain: Domain) -> Any:
            return self.transform.project(self.transform.retract(before, change, domain), domain)

        return tree_vmap(one, (None, None, self._domain_axes), params, step, self.pairs.domain)


def refine(transform: Transform, params: Any, domain: Domain, finer: Domain) -> Any:
    """Parameters (B, ...) of the same maps over another domain; the domains' leaves may have a batch axis."""
    axes = [batch_axes("domain", d, domain_ranks(d))[0] for d in (domain, finer)]
    return tree_vmap(transform.refine, (None, *axes), params, domain, finer)
