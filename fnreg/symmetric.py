"""Registration both ways: the loss of moving onto fixed and of fixed onto moving, by one velocity and its negative.

For transforms whose inverse has the negative parameters.  Both losses live on the fixed grid, where the moving image
is seen through whatever acts after; so neither image is privileged, and the inverse is consistent by construction.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from fnreg.annotations import Annotations
from fnreg.hessian import Product
from fnreg.image import Image
from fnreg.pair import Pair, pair_seen
from fnreg.problem import Level
from fnreg.pytree import Axes, batch_axes, over_batch, tree_map
from fnreg.stiffness import Stiffness
from fnreg.transforms.split import Split, split_coords

T = TypeVar("T")


def _negative(params: Any) -> Any:
    return tree_map(torch.neg, params)


def _mean(there: T, back: T) -> T:
    return tree_map(lambda a, b: (a + b) / 2, there, back)


def mirrored(level: Level) -> Level:
    """The problem of the fixed image onto the moving one, on the fixed grid."""
    pairs = level.pairs
    if pairs.to_moving is None:
        raise ValueError("symmetric registration needs a linear map to act after, or none: resample the moving image")

    def seen(pair: Pair) -> tuple[Tensor, Tensor | None, Annotations | None]:
        grid, dtype = pair.fixed.grid, pair.fixed.data.dtype
        assert pair.to_moving is not None
        coords = split_coords(Split(None, None), pair.to_moving, pair.from_fixed, grid.size, dtype)
        found, weights = pair_seen(dataclasses.replace(pair, fixed_mask=None), coords, level.padding)
        mask = None if weights is None else weights.reshape(1, *grid.shape)
        return found.value.reshape(-1, *grid.shape), mask, _annotations(pair, coords, level)

    grid = pairs.fixed.grid
    data, mask, annotations = over_batch(seen, pair=(pairs, pairs.ranks()))
    to_fixed = over_batch(lambda g: g.inverse_affine, grid=(grid, grid.ranks()))
    back = Pair(
        Image(data, grid),
        pairs.fixed,
        pairs.objective,
        pairs.from_fixed,
        mask,
        pairs.fixed_mask,
        to_moving=to_fixed,
        annotations=annotations,
        sharp=(pairs.sharp[1], pairs.sharp[0]),
        interpolation=pairs.interpolation,
        given_domain=pairs.given_domain,
    )
    return dataclasses.replace(level, pairs=back, axes=batch_axes("pair", back, back.ranks())[0])


def _annotations(pair: Pair, coords: Tensor, level: Level) -> Annotations | None:
    """Labels and points that have changed places, those of the moving image seen through what acts after."""
    known = pair.annotations
    if known is None:
        return None
    labels, points = known.of_labels(coords, level.padding), known.moving_points
    if points is not None and pair.then is not None:
        points = points.through(torch.linalg.inv_ex(pair.then.matrix()).inverse)
    return Annotations(labels.get("warped_labels"), known.fixed_labels, points, known.fixed_points)


@dataclasses.dataclass(frozen=True, eq=False)
class BothWays:
    """The mean of a problem and its mirror image: `solvers.base.Problem`."""

    forward: Level
    backward: Level

    @staticmethod
    def of(level: Level) -> BothWays:
        """A problem with its mirror image."""
        return BothWays(level, mirrored(level))

    @property
    def size(self) -> int:
        """Number of pairs."""
        return self.forward.size

    @property
    def pairs(self) -> Pair:
        """The pairs as they were given."""
        return self.forward.pairs

    @property
    def data(self) -> tuple[Pair, Pair]:
        """All its tensors."""
        return self.forward.pairs, self.backward.pairs

    def with_data(self, data: tuple[Pair, Pair]) -> BothWays:
        """The same problem on other tensors."""
        return BothWays(self.forward.with_data(data[0]), self.backward.with_data(data[1]))

    @property
    def axes(self) -> Axes:
        """Of all leaves of `data`."""
        return (*self.forward.axes, *self.backward.axes)

    def with_axes(self, axes: Axes, size: int) -> BothWays:
        """The same problem for data of other batch axes."""
        first = len(self.forward.axes)
        return BothWays(self.forward.with_axes(axes[:first], size), self.backward.with_axes(axes[first:], size))

    def take(self, index: Tensor) -> BothWays:
        """The same for some of the pairs."""
        return BothWays(self.forward.take(index), self.backward.take(index))

    def zero_step(self) -> Any:
        """The step of no change, (B, ...)."""
        return self.forward.zero_step()

    def value(self, params: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Value (B,) and each term's, means of both ways."""
        return _mean(self.forward.value(params), self.backward.value(_negative(params)))

    def gradient(self, params: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Gradient by the step, the value (B,) and each term's: what a step adds to the velocity, it takes from its
        negative."""
        there, value, terms = self.forward.gradient(params)
        back, other, others = self.backward.gradient(_negative(params))
        return tree_map(lambda a, b: (a - b) / 2, there, back), (value + other) / 2, _mean(terms, others)

    def normal_equations(self, params: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Value (B,), J^T r (B, P) and J^T J (B, P, P) of half of both ways' residuals each, and each term's value."""
        value, slope, normal, terms = self.forward.normal_equations(params)
        other, back, more, others = self.backward.normal_equations(_negative(params))
        return (value + other) / 2, (slope - back) / 2, (normal + more) / 2, _mean(terms, others)

    def curvature(self, params: Any, *, exact: bool = False) -> Product:
        """The Hessian by the step as its product with steps: the mean of both ways'."""
        there = self.forward.curvature(params, exact=exact)
        back = self.backward.curvature(_negative(params), exact=exact)
        return lambda step: _mean(there(step), back(step))

    def stiffness(self) -> Stiffness | None:
        """What is known of the Hessian's diagonal: that of one way, for both have the same."""
        return self.forward.stiffness()

    def overlap(self, params: Any) -> Tensor:
        """Share of the fixed voxels that count (B,)."""
        return self.forward.overlap(params)

    def retract(self, params: Any, step: Any) -> Any:
        """Parameters after a step."""
        return self.forward.retract(params, step)
