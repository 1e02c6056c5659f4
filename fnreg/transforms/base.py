"""Transforms and mappings.

A transform is a frozen value of hyper-parameters with pure methods of (params, domain, ...); it maps world
points of the fixed image to world points of the moving image.  A `Mapping` is a transform closed over its
parameters and domain.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.pytree import (
    over_batch,
    pytree_dataclass,
    static,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from fnreg.transforms.domain import Domain, domain_ranks, first_domain, same_place, single
from fnreg.transforms.split import Split, split_points

Params = Any
Step = Any


class Transform:
    """What every transform offers.  Subclasses are frozen dataclasses without tensors.

    A step is a pytree that is zero at no change; one unit moves points by about one voxel along the domain's own
    axes, so one learning rate serves all parameters.
    """

    types: ClassVar[dict[str, type[Transform]]] = {}

    def __init_subclass__(cls, *, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not abstract:
            Transform.types[cls.__name__] = cls

    def init(self, domain: Domain) -> Params:
        """Parameters of the identity."""
        raise NotImplementedError

    def zero_step(self, domain: Domain) -> Step:
        """The step of no change."""
        return tree_map(torch.zeros_like, self.init(domain))

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        """Parameters after a step; `retract(p, 0) = p`."""
        raise NotImplementedError

    def perturb(self, params: Params, step: Step, domain: Domain) -> Params:
        """What the gradient goes through: `retract` unless there is something cheaper with the same derivative."""
        return self.retract(params, step, domain)

    def precondition(self, gradient: Step, domain: Domain) -> Step:
        """The gradient as the optimizer sees it."""
        return gradient

    def project(self, params: Params, domain: Domain) -> Params:
        """Parameters made admissible after a step."""
        return params

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        """World points (N, D) to world points (N, D)."""
        raise NotImplementedError

    @property
    def negates(self) -> bool:
        """Whether the negative parameters are those of the inverse map."""
        return False

    @property
    def descends(self) -> bool:
        """Whether its steps are those of the objective as it is stated: then it has minima, with a gradient of zero.

        A transform that changes its gradients or its parameters itself, see `precondition` and `project`, has none.
        """
        kind = type(self)
        return kind.project is Transform.project and kind.precondition is Transform.precondition

    @property
    def splits(self) -> bool:
        """Whether the map at the domain's voxels is a shift with a matrix after it: what registers and warps fast."""
        return self.linear

    def split(self, params: Params, domain: Domain) -> Split:
        """The map at the domain's voxels as a shift and a matrix."""
        return Split(None, self.matrix(params, domain))

    def split_after(self, params: Params, step: Step, domain: Domain) -> Split:
        """`split` after `perturb`, the shift in voxels: a step is often cheaper to add there than to the parameters."""
        found = self.split(self.perturb(params, step, domain), domain)
        if found.shift is None or found.frame is None:
            return found
        flat = found.frame.to(found.shift.dtype) @ found.shift.flatten(1)
        return Split(flat.reshape(found.shift.shape), found.matrix)

    def step_of_shift(self, by_shift: Tensor) -> Step | None:
        """The gradient by the step from that by the shift in voxels, where a step adds to this as it is."""
        return None

    def field(self, params: Params, domain: Domain) -> Any:
        """What penalties act on, a `DenseField` or `SplineField` of displacements or velocities."""
        raise ValueError(
            f"{self} yields no field: penalties such as bending go with FFD, SVFFD, SVF, Displacement and "
            "Diffeomorphism; a linear stage gets an objective of its own, Stage(Affine(), objective=mse)"
        )

    @property
    def flow(self) -> Transform | None:
        """The transform, or the part of it, whose map is the flow of a velocity by squaring."""
        return None

    def first_step(self, params: Params, domain: Domain) -> Tensor | None:
        """Where the map is the flow of a velocity: the length in voxels of the longest step that is then squared."""
        return None

    def cast(self, params: Any, dtype: torch.dtype) -> Any:
        """Parameters, or a step, in the precision of the images where they are fields; matrices stay float64."""
        return params

    def displacement(self, params: Params, domain: Domain, grid: Grid | None = None) -> Tensor:
        """T(p) - p at the voxels of a grid (default: the domain), world vectors (D, [Z,] Y, X)."""
        where = first_domain(domain) if grid is None else grid
        before = where.points()
        if grid is None and self.splits:
            after = split_points(self.split(params, domain), where)
        else:
            after = self.points(params, domain, before)
        return (after - before).mT.reshape(where.ndim, *where.shape)

    def refine(self, params: Params, domain: Domain, finer: Domain) -> Params:
        """The parameters of the same map over a finer domain."""
        return params

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        """The inverse map."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def there_and_back(self, params: Params, domain: Domain) -> Tensor:
        """T^-1(T(p)) - p at the domain's voxels, world vectors (D, [Z,] Y, X), where the inverse takes no search."""
        if self.linear:  # exact
            return torch.zeros_like(self.displacement(params, domain))
        raise ValueError(
            f"the inverse of {self} is a search, through which inverse_consistency cannot be optimised: use SVFFD or "
            "SVF, alone or first in a Sequential with linear transforms after it"
        )

    @property
    def linear(self) -> bool:
        """Whether every map of this transform is linear, and so has a `matrix`."""
        return False

    def matrix(self, params: Params, domain: Domain) -> Tensor:
        """The homogeneous world matrix (D + 1, D + 1) of a linear transform."""
        raise ValueError(f"{self} is not linear: it has no matrix")

    def ranks(self, domain: Domain) -> Params:
        """The rank of each parameter for one pair."""
        return tree_map(lambda leaf: leaf.ndim, self.init(single(domain)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `{"type": name, options...}`."""
        options = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"type": type(self).__name__, **options}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Transform:
        """The transform that `to_dict` wrote.  ValueError names unknown types, and options unknown or missing."""
        name = data.get("type")
        if (
            isinstance(name, str) and name not in Transform.types
        ):  # a module makes its transforms known when it is loaded
            for module in pkgutil.iter_modules([str(Path(__file__).parent)], "fnreg.transforms."):
                importlib.import_module(module.name)
        if not isinstance(name, str) or name not in Transform.types:
            raise ValueError(f"unknown transform {name!r}: choose from {', '.join(sorted(Transform.types))}")
        cls = Transform.types[name]
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        known = {f.name for f in fields}
        unknown = set(data) - known - {"type"}
        if unknown:
            raise ValueError(f"{name} has no option {sorted(unknown)}: its options are {sorted(known)}")
        missing = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING} - set(data)
        if missing:
            raise ValueError(f"{name} lacks the option {sorted(missing)}: its options are {sorted(known)}")
        return cls(**{key: _lively(value) for key, value in data.items() if key != "type"})


def _plain(value: Any) -> Any:
    if isinstance(value, Transform):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _lively(value: Any) -> Any:
    if isinstance(value, dict) and "type" in value:
        return Transform.from_dict(value)
    return tuple(_lively(item) for item in value) if isinstance(value, list) else value


@pytree_dataclass
class Mapping:
    """A transform with its parameters and domain: fixed world points to moving world points.

    Leaves may carry a leading batch axis; then points are (B, N, D) and displacements (B, D, [Z,] Y, X).
    """

    params: Params
    domain: Domain
    transform: Transform = static()

    def ranks(self) -> Mapping:
        """The rank that each leaf has for one pair."""
        ranks = (self.transform.ranks(self.domain), domain_ranks(self.domain))
        return tree_unflatten(tree_flatten(ranks)[0], tree_flatten(self)[1])

    def _each(self, function: Any, **more: tuple[Any, Any]) -> Any:
        return over_batch(function, mapping=(self, self.ranks()), **more)

    def map_points(self, points: Tensor) -> Tensor:
        """Moving world points of fixed world points (N, D), or (B, N, D) for a batch.

        This is the direction that resamples the moving image onto the fixed grid; to carry landmarks of the moving
        image to the fixed one, map them by the inverse.
        """
        grid = first_domain(self.domain)
        if points.shape[-1:] != (grid.ndim,):
            raise ValueError(f"points have shape {tuple(points.shape)}: expected (N, {grid.ndim}) world points")

        def one(mapping: Mapping, where: Tensor) -> Tensor:
            return mapping.transform.points(mapping.params, mapping.domain, where)

        return self._each(one, points=(points, 2))

    def displacement(self, grid: Grid | None = None) -> Tensor:
        """T(p) - p at the voxels of a grid (default: the domain), world vectors (D, [Z,] Y, X)."""

        def one(mapping: Mapping, *where: Grid) -> Tensor:
            return mapping.transform.displacement(mapping.params, mapping.domain, *where)

        if grid is None or same_place(grid, first_domain(self.domain)):
            return self._each(one)
        return self._each(one, grid=(grid, grid.ranks()))

    def matrix(self) -> Tensor:
        """The homogeneous world matrix (D + 1, D + 1) float64; ValueError for a transform that is not linear."""

        return self._each(lambda mapping: mapping.transform.matrix(mapping.params, mapping.domain))

    def first_step(self) -> Tensor | None:
        """Of the flow of a velocity the length in voxels of the longest step that is then squared, () or (B,).

        Where it is longer than a voxel squaring is inaccurate.  None for any other map.
        """
        return self._each(lambda mapping: mapping.transform.first_step(mapping.params, mapping.domain))

    def inverse(self) -> Mapping:
        """The map from moving to fixed world points."""
        return self._each(lambda mapping: mapping.transform.inverse(mapping.params, mapping.domain))

    def parts(self) -> list[Mapping]:
        """The mappings of which a composition consists, the one that acts first at the front; else itself alone."""
        if not isinstance(self.transform, Sequential):
            return [self]
        transforms = self.transform.transforms
        domains = (self.domain,) * len(transforms) if isinstance(self.domain, Grid) else self.domain
        each = zip(self.params, domains, transforms, strict=True)
        return [part for params, domain, one in each for part in Mapping(params, domain, one).parts()]

    def __matmul__(self, first: Mapping) -> Mapping:
        """Composition as of functions: `(a @ b)(p) = a(b(p))`."""
        return Mapping(
            (first.params, self.params),
            (first.domain, self.domain),
            Sequential((first.transform, self.transform)),
        )


@dataclasses.dataclass(frozen=True)
class Sequential(Transform):
    """Transforms one after another; the first acts first on fixed points.

    Parameters are a tuple, one entry per part; the domain is one grid for all or a tuple with one for each.
    """

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        if not self.transforms or not all(isinstance(t, Transform) for t in self.transforms):
            raise TypeError(f"Sequential takes a tuple of transforms, got {self.transforms!r}")

    def _parts(self, domain: Domain, *trees: Any) -> list[tuple[Any, ...]]:
        count = len(self.transforms)
        domains = (domain,) * count if isinstance(domain, Grid) else tuple(domain)
        for tree in (domains, *trees):
            if len(tree) != count:
                raise ValueError(f"Sequential has {count} parts but was given {len(tree)} entries")
        return list(zip(self.transforms, domains, *trees, strict=True))

    def init(self, domain: Domain) -> Params:
        return tuple(t.init(d) for t, d in self._parts(domain))

    def zero_step(self, domain: Domain) -> Step:
        return tuple(t.zero_step(d) for t, d in self._parts(domain))

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        return tuple(t.retract(p, s, d) for t, d, p, s in self._parts(domain, params, step))

    def perturb(self, params: Params, step: Step, domain: Domain) -> Params:
        return tuple(t.perturb(p, s, d) for t, d, p, s in self._parts(domain, params, step))

    def precondition(self, gradient: Step, domain: Domain) -> Step:
        return tuple(t.precondition(g, d) for t, d, g in self._parts(domain, gradient))

    def project(self, params: Params, domain: Domain) -> Params:
        return tuple(t.project(p, d) for t, d, p in self._parts(domain, params))

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        for t, d, p in self._parts(domain, params):
            points = t.points(p, d, points)
        return points

    @property
    def descends(self) -> bool:
        return all(t.descends for t in self.transforms)

    @property
    def splits(self) -> bool:
        return self.transforms[0].splits and all(t.linear for t in self.transforms[1:])

    def split(self, params: Params, domain: Domain) -> Split:
        (first, of_first, begin), *rest = self._parts(domain, params)
        return self._after(first.split(begin, of_first), [t.matrix(p, d) for t, d, p in rest])

    def split_after(self, params: Params, step: Step, domain: Domain) -> Split:
        (first, of_first, begin, change), *rest = self._parts(domain, params, step)
        begun = first.split_after(begin, change, of_first)
        return self._after(begun, [t.matrix(t.perturb(p, s, d), d) for t, d, p, s in rest])

    @staticmethod
    def _after(begun: Split, matrices: list[Tensor]) -> Split:
        matrices = matrices if begun.matrix is None else [begun.matrix, *matrices]
        whole = functools.reduce(lambda total, matrix: matrix @ total, matrices) if matrices else None
        return begun._replace(matrix=whole)

    @property
    def flow(self) -> Transform | None:
        return next((t.flow for t in self.transforms if t.flow is not None), None)

    def first_step(self, params: Params, domain: Domain) -> Tensor | None:
        found = (t.first_step(p, d) for t, d, p in self._parts(domain, params))
        return next((step for step in found if step is not None), None)

    def there_and_back(self, params: Params, domain: Domain) -> Tensor:
        if self.linear or not self.splits:
            return super().there_and_back(params, domain)
        first, of_first, begin = self._parts(domain, params)[0]
        return first.there_and_back(begin, of_first)  # what acts after it has an exact inverse

    def field(self, params: Params, domain: Domain) -> Any:
        bent = [(t, d, p) for t, d, p in self._parts(domain, params) if not t.linear]
        # Of maps that `@` has composed, each with a domain of its own, the first is the one that was sought last.
        if len(bent) > 1 and isinstance(domain, Grid):
            raise ValueError(
                f"{self} has {len(bent)} fields, of which a penalty would see one: register them as stages, each with "
                "an objective of its own, or leave the penalty out"
            )
        return bent[0][0].field(bent[0][2], bent[0][1]) if bent else super().field(params, domain)

    def cast(self, params: Any, dtype: torch.dtype) -> Any:
        return tuple(t.cast(p, dtype) for t, p in zip(self.transforms, params, strict=True))

    def refine(self, params: Params, domain: Domain, finer: Domain) -> Params:
        parts = zip(self._parts(domain, params), self._parts(finer), strict=True)
        return tuple(t.refine(p, d, f) for (t, d, p), (_, f) in parts)

    @property
    def linear(self) -> bool:
        return all(t.linear for t in self.transforms)

    def matrix(self, params: Params, domain: Domain) -> Tensor:
        matrices = [t.matrix(p, d) for t, d, p in self._parts(domain, params)]
        return functools.reduce(lambda total, matrix: matrix @ total, matrices)

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        parts = [t.inverse(p, d) for t, d, p in reversed(self._parts(domain, params))]
        return Mapping(
            tuple(part.params for part in parts),
            tuple(part.domain for part in parts),
            Sequential(tuple(part.transform for part in parts)),
        )


def apart(mapping: Mapping) -> tuple[Mapping, Mapping | None]:
    """Of maps that `@` has composed, so with domains of their own, the one that acts first and what acts after it."""
    transform, params, domain = mapping.transform, mapping.params, mapping.domain
    if not isinstance(transform, Sequential) or isinstance(domain, Grid):
        return mapping, None
    first, then = apart(Mapping(params[0], domain[0], transform.transforms[0]))
    for one in zip(params[1:], domain[1:], transform.transforms[1:], strict=True):
        then = Mapping(*one) if then is None else Mapping(*one) @ then
    return first, then
