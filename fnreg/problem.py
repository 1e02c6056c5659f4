"""One level of a registration: a batch of pairs, its energy, and the derivatives that solvers ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fnreg.gather import Padding
from fnreg.hessian import Product, gauss_newton, hessian
from fnreg.pair import Pair, pair_energy, pair_gradient, pair_normal_equations, pair_overlap
from fnreg.passes import Passes
from fnreg.pytree import Axes, is_tracked, tree_map, tree_take, tree_vmap
from fnreg.stiffness import Stiffness, serves, share, stiffness
from fnreg.transforms.base import Transform
from fnreg.transforms.domain import Domain, domain_axes, first_domain, single


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

    @property
    def data(self) -> Pair:
        """All its tensors."""
        return self.pairs

    def with_data(self, data: Pair) -> Level:
        """The same problem on other tensors."""
        return dataclasses.replace(self, pairs=data)

    def with_axes(self, axes: Axes, size: int) -> Level:
        """The same problem for data of other batch axes."""
        return dataclasses.replace(self, axes=axes, size=size)

    @functools.cached_property
    def _domain_axes(self) -> Axes:
        return domain_axes(self.pairs.domain)

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

    @functools.cached_property
    def _passes(self) -> Passes | None:
        return Passes.of(self.transform, self.pairs, self.padding)

    def value(self, params: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Value (B,) and each term's."""
        fast = None if self._passes is None or is_tracked(params) else self._passes.value(params)
        return self._over(pair_energy, params) if fast is None else fast

    def gradient(self, params: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """Gradient by the step, the value (B,) and each term's."""
        if self._passes is None or is_tracked(params):
            return self._over(pair_gradient, params)
        return self._passes.gradient(params, self.zero_step())

    def normal_equations(self, params: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Value (B,), J^T r (B, P), J^T J (B, P, P) and the value of each term."""
        return self._over(pair_normal_equations, params)

    def curvature(self, params: Any, *, exact: bool = False) -> Product:
        """The Hessian of the energy by the step, as its product with steps (B, ...); without `exact` that of
        Gauss-Newton."""
        recorded = is_tracked(params, self.pairs)
        if exact:
            return hessian(self._over, params, self.zero_step(), recorded=recorded)
        return gauss_newton(self._over, self.pairs.objective, params, self.zero_step(), recorded=recorded)

    def stiffness(self) -> Stiffness | None:
        """What is known of the Hessian's diagonal before any image is seen; None where the step is not one field."""
        return self._stiffness

    @functools.cached_property
    def _stiffness(self) -> Stiffness | None:
        if not serves(self.transform):
            return None
        domain = single(self.pairs.domain)
        found = self._over(stiffness, self.zero_step()).to(self.pairs.fixed.data.dtype)
        return Stiffness(found, first_domain(domain).ndim, share(self.transform, domain))

    def overlap(self, params: Any) -> Tensor:
        """Share of the fixed voxels that count (B,)."""
        if self._passes is None or is_tracked(params):
            return self._over(pair_overlap, params)
        return self._passes.overlap(params)

    def retract(self, params: Any, step: Any) -> Any:
        """Parameters after a step."""

        def one(before: Any, change: Any, domain: Domain) -> Any:
            return self.transform.project(self.transform.retract(before, change, domain), domain)

        return tree_vmap(one, (None, None, self._domain_axes), params, step, self.pairs.domain)


def refine(transform: Transform, params: Any, domain: Domain, finer: Domain) -> Any:
    """Parameters (B, ...) of the same maps over another domain; the domains' leaves may have a batch axis."""
    axes = None, domain_axes(domain), domain_axes(finer)
    return tree_vmap(transform.refine, axes, params, domain, finer)
