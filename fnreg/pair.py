"""One pair at one level: what belongs to it, its energy, and the derivatives that solvers ask for, by composition.

Every function is for one pair and composes coordinates, sampling and terms; torch.func differentiates and batches it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, jacfwd, jvp, vjp, vmap

from fnreg.annotations import Annotations
from fnreg.gather import Interpolation, Padding, Sampled, within
from fnreg.grid import Grid, apply_matrix, index_points
from fnreg.image import Image
from fnreg.losses.objective import OF_LABELS, OF_POINTS, Objective
from fnreg.pytree import pytree_dataclass, static, tree_flatten, tree_leaves, tree_unflatten
from fnreg.sampling import interpolate, sample
from fnreg.transforms.base import Mapping, Transform
from fnreg.transforms.domain import Domain, domain_ranks
from fnreg.transforms.split import split_coords, split_points


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
    sharp: tuple[bool, bool] = static(default=(False, False))  # of the fixed and the moving mask, see `Subject`
    interpolation: Interpolation = static(default="linear")  # how the moving image is interpolated

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


def pair_matrix(transform: Transform, params: Any, pair: Pair) -> Tensor:
    """(D, D + 1) float64 from voxel index of the fixed grid to that of the moving grid, for linear maps."""
    assert pair.to_moving is not None
    return (pair.to_moving @ transform.matrix(params, pair.domain) @ pair.from_fixed)[:-1]


def pair_coords(transform: Transform, params: Any, pair: Pair) -> Tensor:
    """Voxel indices (D, N) in the moving image of what the fixed voxels map to."""
    dtype, grid = pair.fixed.data.dtype, pair.fixed.grid
    if pair.to_moving is not None and splits(transform, pair):
        found = transform.split(params, pair.domain)
        return split_coords(found, pair.to_moving, pair.from_fixed, grid.size, dtype)
    if splits(transform, pair):
        points = split_points(transform.split(params, pair.domain), grid)
    else:
        points = transform.points(params, pair.domain, grid.points())
    if pair.to_moving is not None:
        return apply_matrix(pair.to_moving, points).mT.to(dtype)
    assert pair.then is not None
    points = pair.then.transform.points(pair.then.params, pair.then.domain, points)
    return apply_matrix(pair.moving.grid.matrix("world", "index"), points).mT.to(dtype)


def pair_weights(inside: Tensor, coords: Tensor, pair: Pair, padding: Padding | None) -> Tensor | None:
    """Weights (1, N); None where every voxel counts."""
    weights = None if padding is not None else inside.unsqueeze(0)
    if pair.fixed_mask is not None:
        mask = pair.fixed_mask.flatten(1)
        weights = mask if weights is None else weights * mask
    if pair.moving_mask is not None:
        mask = sample(pair.moving_mask, coords, padding="zeros").value
        mask = cut(mask) if pair.sharp[1] else mask
        weights = mask if weights is None else weights * mask
    return weights


def cut(mask: Tensor) -> Tensor:
    """1 where half of a mask at least is there, else 0."""
    return (mask >= 0.5).to(mask.dtype)


def pair_seen(pair: Pair, coords: Tensor, padding: Padding | None) -> tuple[Sampled, Tensor | None]:
    """The moving image at coordinates, and the weights."""
    data, outside = pair.moving.data, "border" if padding is None else padding
    if pair.interpolation == "linear":
        seen = sample(data, coords, padding=outside)
    else:
        value = interpolate(data, coords, interpolation=pair.interpolation, padding=outside)
        seen = Sampled(value, value.new_empty(0), within(coords, data.shape[:0:-1]).to(value.dtype))
    return seen, pair_weights(seen.inside, coords, pair, padding)


def pair_slopes(pair: Pair, coords: Tensor, padding: Padding | None) -> Tensor:
    """The derivative (C, D, N) of the moving image by the coordinates, where sampling does not give it."""

    def seen(where: Tensor) -> Tensor:
        return pair_seen(pair, where, padding)[0].value

    made: Any = vjp(seen, coords)
    value, pull = made
    one = torch.eye(len(value), dtype=value.dtype, device=value.device)
    return vmap(pull)(one.unsqueeze(2).expand(-1, -1, value.shape[1]))[0]


def in_sight(value: Tensor, weights: Tensor | None) -> Tensor:
    """Infinity where no voxel counts: a map that moves the image out of sight is no good map."""
    return value if weights is None else torch.where((weights > 0).any(), value, torch.inf)


def splits(transform: Transform, pair: Pair) -> bool:
    """Whether the map splits over the voxels of the fixed image."""
    return transform.splits and (transform.linear or pair.given_domain is None)


def pair_map(transform: Transform, params: Any, domain: Domain, grid: Grid, needs: frozenset[str]) -> dict[str, Any]:
    """What terms may ask for that is of the map alone."""
    found: dict[str, Any] = {"params": params, "transform": transform, "domain": domain, "grid": grid}
    if "displacement" in needs:
        found["displacement"] = transform.displacement(params, domain, grid)
    if "field" in needs:
        found["field"] = transform.field(params, domain)
    return found


def pair_found(
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
    return images | pair_map(transform, params, pair.domain, grid, needs)


def pair_points(transform: Transform, params: Any, pair: Pair, needs: frozenset[str]) -> dict[str, Any]:
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


def pair_views(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[dict[str, Any], Tensor | None]:
    """All that the objective asks for, by name, and the weights by which voxels are in sight."""
    needs = pair.objective.needs
    points = pair_points(transform, params, pair, needs)
    if not pair.objective.looks:  # no voxel is asked for, so none has to be in sight
        return pair_map(transform, params, pair.domain, pair.fixed.grid, needs) | points, None
    coords = pair_coords(transform, params, pair)
    seen, weights = pair_seen(pair, coords, padding)
    found = pair_found(transform, params, pair, seen.value, weights, needs) | points
    if pair.annotations is not None and not needs.isdisjoint(OF_LABELS):
        found |= pair.annotations.of_labels(coords, padding)
    return found, weights


def pair_energy(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's value and each term's."""
    found, weights = pair_views(transform, padding, params, pair)
    total, terms = pair.objective.value(found)
    return in_sight(total.to(pair.fixed.data.dtype), weights), terms


def pair_gradient(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Gradient by the step at zero, the value and each term's."""

    def energy(step: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return pair_energy(transform, padding, transform.perturb(params, step, pair.domain), pair)

    zero = transform.cast(transform.zero_step(pair.domain), pair.fixed.data.dtype)
    gradient, (value, terms) = grad_and_value(energy, has_aux=True)(zero)
    return transform.precondition(gradient, pair.domain), value, terms


def pair_normal_equations(
    transform: Transform, padding: Padding | None, params: Any, pair: Pair
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """|r|^2, J^T r (P,), J^T J (P, P) and each term, by the chain rule through coordinates, image and residuals.

    Weights count as constants: that is the Gauss-Newton approximation.
    """
    zero = transform.cast(transform.zero_step(pair.domain), pair.fixed.data.dtype)
    linear = transform.linear and pair.to_moving is not None

    def along(step: Any) -> tuple[Tensor, Tensor]:
        place = pair_matrix if linear else pair_coords
        found = place(transform, transform.perturb(params, step, pair.domain), pair)
        return found, found

    slopes, found = jacfwd(along, has_aux=True)(zero)
    dtype, grid = pair.fixed.data.dtype, pair.fixed.grid
    parts = [leaf.unsqueeze(-1).flatten(2) for leaf in tree_leaves(slopes)]
    by_step = torch.cat(parts, 2).to(dtype)  # (D, N or D + 1, P)
    index = index_points(grid.size, dtype, found.device)
    coords = found.to(dtype) @ index if linear else found
    seen, weights = pair_seen(pair, coords, padding)
    slope = seen.gradient if pair.interpolation == "linear" else pair_slopes(pair, coords, padding)
    needs = pair.objective.needs

    def residuals_of(warped: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return pair.objective.squares(pair_found(transform, params, pair, warped, weights, needs))

    count = by_step.shape[-1]
    if linear:  # every tangent is a sum of the products of a slope and an index
        products = slope.unsqueeze(2) * index  # (C, D, D + 1, N)
        tangents = (by_step.reshape(-1, count).mT @ products.flatten(1, 2)).movedim(1, 0)  # (P, C, N)
    else:
        tangents = torch.stack([(slope * by_step[..., p]).sum(1) for p in range(count)])
    residuals, terms = residuals_of(seen.value)
    jacobian = vmap(lambda tangent: jvp(lambda x: residuals_of(x)[0], (seen.value,), (tangent,))[1])(tangents)  # (P, R)
    value = (residuals * residuals).sum().to(torch.float64)
    return (
        in_sight(value, weights),
        (jacobian @ residuals).to(torch.float64),
        (jacobian @ jacobian.mT).to(torch.float64),
        terms,
    )


def pair_overlap(transform: Transform, padding: Padding | None, params: Any, pair: Pair) -> Tensor:
    """Sum of the weights over the number of voxels."""
    coords = pair_coords(transform, params, pair)
    weights = pair_seen(pair, coords, padding)[1]
    return torch.ones((), dtype=coords.dtype, device=coords.device) if weights is None else weights.mean()
