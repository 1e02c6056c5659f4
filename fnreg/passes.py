"""Values and gradients of a batch of pairs in a few passes over the images, by the kernels of `mapped`.

For maps that are a shift of the fixed voxels with a matrix after it, and objectives whose terms ask either for the
images or for the map.  The step goes into the shift and the matrix on torch's own tape, the warped image into the
terms likewise; between the two lies one pass.  What this does not serve takes the compositions of `pair`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from fnreg.gather import Padding
from fnreg.grid import Grid
from fnreg.lengths import scale_
from fnreg.losses.objective import OF_IMAGES, OF_THE_MAP, Objective
from fnreg.mapped import ByMap, Maps, Squares, pull, serves, squares, warp
from fnreg.pair import Pair, cut, in_sight, pair_map, splits
from fnreg.pytree import (
    Axes,
    batch_axes,
    is_tracked,
    over_batch,
    tree_detach,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_scale,
    tree_unflatten,
    tree_vmap,
)
from fnreg.transforms.base import Transform
from fnreg.transforms.domain import Domain, domain_axes, first_domain
from fnreg.transforms.split import Split


def _named(split: Split) -> dict[str, Tensor]:
    """What a split has, by name."""
    return {name: part for name, part in split._asdict().items() if part is not None}


def parts_after(
    transform: Transform, step: Any, params: Any, penalties: Objective, domain: Domain
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the energy is made of after a step, by name: what the map's `split_after` has, and the `penalty` of terms
    that ask for the map alone; and these terms' values."""
    terms: dict[str, Tensor] = {}
    parts = _named(transform.split_after(params, step, domain))
    if penalties.terms:
        after = transform.perturb(params, step, domain)
        found = pair_map(transform, after, domain, first_domain(domain), penalties.needs)
        parts["penalty"], terms = penalties.value(found)
    return parts, terms


def pull_back(
    function: Callable[[Any], tuple[dict[str, Tensor], Any]], step: Any
) -> tuple[dict[str, Tensor], Any, Callable[[dict[str, Tensor]], Any]]:
    """Values of a function that no transform is around, what it tells beside them, and the pull-back of the values:
    `torch.func.vjp` with half its layers."""
    if torch.is_inference_mode_enabled():  # without a tape
        made: Any = vjp(function, step, has_aux=True)
        return made[0], made[2], lambda cotangents: made[1](cotangents)[0]
    leaves, structure = tree_flatten(step)
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        values, told = function(tree_unflatten(leaves, structure))

    def pull(cotangents: dict[str, Tensor]) -> Any:
        moved = [name for name, value in values.items() if value.requires_grad]
        ends, by_value = [values[name] for name in moved], [cotangents[name] for name in moved]
        found = torch.autograd.grad(ends, leaves, by_value, allow_unused=True, materialize_grads=True)
        return tree_unflatten(list(found), structure)

    return tree_detach(values), tree_detach(told), pull


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """A batch of pairs whose objective is of the images, and beside them of the map.

    images, penalties : terms of the images, and terms of the map alone
    squared : the factor of mean squares, where these are all there is of the images
    """

    transform: Transform
    pairs: Pair
    images: Objective
    penalties: Objective
    squared: Tensor | None
    padding: Padding | None

    @staticmethod
    def of(transform: Transform, pairs: Pair, padding: Padding | None) -> Passes | None:
        """None where the kernels do not serve."""
        if (
            pairs.to_moving is None
            or not splits(transform, pairs)
            or is_tracked(pairs)
            or pairs.interpolation != "linear"
        ):
            return None
        if not serves(pairs.moving.data, pairs.fixed.data, pairs.fixed_mask, pairs.moving_mask):
            return None
        images, penalties = pairs.objective.divided(OF_IMAGES)
        if not images.terms or not images.needs <= {*OF_IMAGES, "grid"} or not penalties.needs <= {*OF_THE_MAP}:
            return None
        squared = images.mean_squares() if pairs.moving_mask is None or pairs.sharp[1] else None
        return Passes(transform, pairs, images, penalties, squared, padding)

    def value(self, params: Any) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Value (B,) and each term's; None where there are penalties."""
        if self.penalties.terms:
            return None
        maps = self._maps(self._parts(params))
        if self.squared is None or len(self.images.terms) != 1:
            return self._of_images(*self._seen(maps)[:2])
        found = self._squares(maps)
        return self._mean(found)[1].to(self.pairs.fixed.data.dtype), self._terms_of(found)

    def gradient(self, params: Any, zero: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Gradient by the step at zero, (B, ...), the value (B,) and each term's."""
        axes, domain = self._domain_axes, self.pairs.domain
        if self._adds:
            by_map, value, terms = self._by_map(self._maps(self._parts(params)), by_matrix=False)
            assert by_map.shift is not None
            gradient = self.transform.step_of_shift(by_map.shift)
        else:
            gradient, value, terms = self._gradient_on_tape(params, zero)
        if type(self.transform).precondition is not Transform.precondition:
            gradient = tree_vmap(self.transform.precondition, (None, axes), gradient, domain)
        return gradient, value.to(self.pairs.fixed.data.dtype), terms

    @property
    def _adds(self) -> bool:
        """Whether a step adds to the shift, and to nothing else of the energy."""
        return type(self.transform).step_of_shift is not Transform.step_of_shift and not self.penalties.terms

    def _gradient_on_tape(self, params: Any, zero: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        pairs, of_terms = self.pairs, batch_axes("objective", self.penalties, self.penalties.ranks())[0]

        def after(step: Any) -> Any:
            parts = functools.partial(parts_after, self.transform)
            axes = (None, None, of_terms, self._domain_axes)
            return tree_vmap(parts, axes, step, params, self.penalties, pairs.domain)

        parts, of_map, back = pull_back(after, zero)
        by_map, value, of_images = self._by_map(self._maps(parts), by_matrix=True)
        assert pairs.to_moving is not None and by_map.matrix is not None
        left, right = pairs.to_moving[..., :-1, :], pairs.from_fixed
        by_parts: dict[str, Any] = {"matrix": ((by_map.matrix @ right.mT).mT @ left).mT, "shift": by_map.shift}
        if "penalty" in parts:
            value = value + parts["penalty"]
            by_parts["penalty"] = torch.ones_like(parts["penalty"])
        gradient = back({name: by_parts[name].to(part.dtype) for name, part in parts.items()})
        return gradient, value, self._in_order(of_images, of_map)

    def _in_order(self, of_images: dict[str, Tensor], of_map: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms' values by the names that they have in the whole objective."""
        whole, found = self.pairs.objective, dict[str, Tensor]()
        for part, values in ((self.images, of_images), (self.penalties, of_map)):
            theirs = [n for n, term in zip(whole.names, whole.terms, strict=True) if any(term is t for t in part.terms)]
            found |= {name: values[own] for name, own in zip(theirs, part.names, strict=True)}
        return {name: found[name] for name in whole.names}

    def overlap(self, params: Any) -> Tensor:
        """Share of the fixed voxels that count (B,)."""
        maps, pairs = self._maps(self._parts(params)), self.pairs
        if self.squared is not None:
            return (self._squares(maps).weight / maps.points).to(pairs.fixed.data.dtype)
        warped, weights, *_ = self._seen(maps)
        return warped.new_ones(len(warped)) if weights is None else weights.flatten(1).mean(1).expand(len(warped))

    # -- maps --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _domain_axes(self) -> Axes:
        return domain_axes(self.pairs.domain)

    def _parts(self, params: Any) -> dict[str, Tensor]:
        def parts(params: Any, domain: Domain) -> dict[str, Tensor]:
            return _named(self.transform.split(params, domain))

        return tree_vmap(parts, (None, self._domain_axes), params, self.pairs.domain)

    def _maps(self, parts: dict[str, Tensor]) -> Maps:
        # Index to index is to_moving @ matrix @ from_fixed; a batch times one matrix is the faster order.
        pairs = self.pairs
        assert pairs.to_moving is not None
        left, right = pairs.to_moving[..., :-1, :], pairs.from_fixed
        world = parts["matrix"] @ right if "matrix" in parts else right
        matrices = (world.mT @ left.mT).mT
        shift = parts["shift"].to(pairs.moving.data.dtype) if "shift" in parts else None
        return Maps(matrices.reshape(-1, *matrices.shape[-2:]), shift, pairs.fixed.grid.size, parts.get("frame"))

    def _batched(self, data: Tensor | None) -> Any:
        """An image or mask with a batch axis, of 1 where it is shared."""
        return None if data is None else data.reshape(-1, *data.shape[-self.pairs.fixed.grid.ndim - 1 :])

    # -- mean squares ------------------------------------------------------------------------------------------

    def _squares(self, maps: Maps, *, by_shift: bool = False, by_matrix: bool = False) -> Squares:
        pairs = self.pairs
        moving, fixed, mask = (self._batched(t) for t in (pairs.moving.data, pairs.fixed.data, pairs.fixed_mask))
        if pairs.moving_mask is not None:  # a sharp one, which is constant here
            seen = self._moving_mask(maps)
            mask = seen if mask is None else mask * seen
        return squares(moving, fixed, mask, maps, padding=self.padding, by_shift=by_shift, by_matrix=by_matrix)

    def _mean(self, found: Squares) -> tuple[Tensor, Tensor]:
        """What makes the weighted mean of the sums, and that mean (B,)."""
        known = found.weight > 0
        assert self.squared is not None
        factor = self.squared / (torch.where(known, found.weight, 1) * self.pairs.fixed.channels)
        return factor, torch.where(known, found.value * factor, torch.inf)

    def _terms_of(self, found: Squares) -> dict[str, Tensor]:
        """Each term's value (B,)."""
        plain = found.value / (torch.where(found.weight > 0, found.weight, 1) * self.pairs.fixed.channels)
        return dict.fromkeys(self.images.names, plain.to(self.pairs.fixed.data.dtype))

    def _by_map(self, maps: Maps, *, by_matrix: bool) -> tuple[ByMap, Tensor, dict[str, Tensor]]:
        """Derivatives of the value by the map, the value (B,) and each term's, of the terms of the images."""
        if self.squared is None:
            return self._by_images(maps, by_matrix)
        found = self._squares(maps, by_shift=True, by_matrix=by_matrix)
        factor, value = self._mean(found)
        matrix, shift = found.by_map
        if shift is not None:
            scale_(shift, factor)
        by_map = ByMap(None if matrix is None else tree_scale(matrix, factor), shift)
        return by_map, value, self._terms_of(found)

    # -- other terms -------------------------------------------------------------------------------------------

    def _seen(self, maps: Maps) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The moving image warped, the weights, and what these are made of: the moving mask warped, and all else."""
        pairs = self.pairs
        warped, inside = warp(self._batched(pairs.moving.data), maps, padding=self.padding)
        rest = inside if self.padding is None else None
        if pairs.fixed_mask is not None:
            rest = self._batched(pairs.fixed_mask) if rest is None else rest * pairs.fixed_mask
        if pairs.moving_mask is None:
            return warped, rest, None, rest
        mask = self._moving_mask(maps)
        if pairs.sharp[1]:  # constant but for jumps: no derivative goes through it
            rest = mask if rest is None else rest * mask
            return warped, rest, None, rest
        return warped, mask if rest is None else rest * mask, mask, rest

    def _moving_mask(self, maps: Maps) -> Tensor:
        """The moving mask warped (B, 1, [Z,] Y, X)."""
        mask = warp(self._batched(self.pairs.moving_mask), maps, padding="zeros")[0]
        return cut(mask) if self.pairs.sharp[1] else mask

    @functools.cached_property
    def _statistics(self) -> tuple[Any, Axes]:
        """What each term makes of the fixed image and the weights alone, where these do not depend on the map.

        With a batch axis only where something of it has one.  A level of some of the pairs is another one, and makes
        its own: each time at most half of them is left, so all together cost no more than the first.
        """
        terms, fixed, mask = self.images.terms, self.pairs.fixed, self.pairs.fixed_mask
        if self.padding is None or self.pairs.moving_mask is not None:
            return ((),) * len(terms), ()

        def of(grid: Grid, fixed: Tensor, weights: Tensor | None = None) -> Any:
            return tuple(term.statistics(fixed, weights, grid) for term in terms)

        rank = fixed.grid.ndim + 1
        given = {"grid": (fixed.grid, fixed.grid.ranks()), "fixed": (fixed.data, rank)}
        given |= {} if mask is None else {"mask": (mask, rank)}
        found = over_batch(of, **given)
        if all(axis is None for name, (leaf, r) in given.items() for axis in batch_axes(name, leaf, r)[0]):
            return found, (None,) * len(tree_leaves(found))
        axes = tuple(0 if leaf.stride(0) else None for leaf in tree_leaves(found))  # what is alike for all is one
        return tree_map(lambda leaf: leaf.contiguous() if leaf.stride(0) else leaf[0].contiguous(), found), axes

    def _of_images(self, warped: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Value (B,) of the terms of the images, and each term's."""
        fixed = self.pairs.fixed
        of_grid = batch_axes("grid", fixed.grid, fixed.grid.ranks())[0]
        given, axes = [warped, fixed.data], [0, 0 if fixed.data.ndim == warped.ndim else None]
        if weights is not None:
            shared = len(weights) < len(warped)
            given.append(weights[0] if shared else weights)
            axes.append(None if shared else 0)
        of_terms = batch_axes("objective", self.images, self.images.ranks())[0]
        known, of_known = self._statistics

        def one(
            images: Objective, grid: Grid, known: Any, warped: Tensor, fixed: Tensor, weights: Tensor | None = None
        ) -> Any:
            value, terms = images.value({"warped": warped, "fixed": fixed, "weights": weights, "grid": grid}, known)
            return in_sight(value.to(warped.dtype), weights), terms

        all_axes = (of_terms, of_grid, of_known, *((axis,) for axis in axes))
        return tree_vmap(one, all_axes, self.images, fixed.grid, known, *given)

    def _by_images(self, maps: Maps, by_matrix: bool) -> tuple[ByMap, Tensor, dict[str, Tensor]]:
        pairs = self.pairs
        warped, weights, mask, rest = self._seen(maps)

        def of(leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            counted = weights
            if "mask" in leaves:
                counted = leaves["mask"] if rest is None else rest * leaves["mask"]
            value, terms = self._of_images(leaves["warped"], counted)
            return {"value": value}, terms

        leaves = {"warped": warped} | ({} if mask is None else {"mask": mask})
        value, terms, back = pull_back(of, leaves)
        by = back({"value": torch.ones_like(value["value"])})
        moving, moving_mask = self._batched(pairs.moving.data), self._batched(pairs.moving_mask)
        by_map = pull(moving, by["warped"], maps, padding=self.padding, by_matrix=by_matrix)
        if mask is not None:
            more = pull(moving_mask, by["mask"], maps, padding="zeros", by_matrix=by_matrix)
            both = (None if a is None or b is None else a + b for a, b in zip(by_map, more, strict=True))
            by_map = ByMap(*both)
        return by_map, value["value"].to(torch.float64), terms
