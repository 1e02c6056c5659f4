"""A transform some of whose parameters stay as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fnreg.grid import Grid
from fnreg.transforms.base import Mapping, Params, Step, Transform
from fnreg.transforms.domain import Domain
from fnreg.transforms.split import Split


@dataclasses.dataclass(frozen=True)
class Held(Transform):
    """A transform some of whose parameters stay as they are: they take no step.

    transform : whose parameters are a dict, such as `Rigid()`
    names : the parameters to hold, such as ("rotation",)
    """

    transform: Transform
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)

    def init(self, domain: Domain) -> Params:
        return self.transform.init(domain)

    def zero_step(self, domain: Domain) -> Step:
        zero = self.transform.zero_step(domain)
        if not isinstance(zero, dict):
            raise ValueError(f"{self.transform} has no parameters of its own: hold those of its parts")
        unknown = [name for name in self.names if name not in zero]
        if unknown:
            raise ValueError(f"{self.transform} has no parameter {unknown}: hold some of {sorted(zero)}")
        free = {name: leaf for name, leaf in zero.items() if name not in self.names}
        if not free:
            raise ValueError(f"all parameters of {self.transform} are held: nothing is left to optimise")
        return free

    def _whole(self, step: Step, domain: Domain) -> Step:
        return self.transform.zero_step(domain) | step

    def retract(self, params: Params, step: Step, domain: Domain) -> Params:
        return self.transform.retract(params, self._whole(step, domain), domain)

    def perturb(self, params: Params, step: Step, domain: Domain) -> Params:
        return self.transform.perturb(params, self._whole(step, domain), domain)

    def precondition(self, gradient: Step, domain: Domain) -> Step:
        whole = self.transform.precondition(self._whole(gradient, domain), domain)
        return {name: leaf for name, leaf in whole.items() if name not in self.names}

    def project(self, params: Params, domain: Domain) -> Params:
        return self.transform.project(params, domain)

    @property
    def descends(self) -> bool:
        return self.transform.descends

    @property
    def splits(self) -> bool:
        return self.transform.splits

    def split(self, params: Params, domain: Domain) -> Split:
        return self.transform.split(params, domain)

    def split_after(self, params: Params, step: Step, domain: Domain) -> Split:
        return self.transform.split_after(params, self._whole(step, domain), domain)

    @property
    def flow(self) -> Transform | None:
        return self.transform.flow

    def first_step(self, params: Params, domain: Domain) -> Tensor | None:
        return self.transform.first_step(params, domain)

    def field(self, params: Params, domain: Domain) -> Any:
        return self.transform.field(params, domain)

    def there_and_back(self, params: Params, domain: Domain) -> Tensor:
        return self.transform.there_and_back(params, domain)

    def cast(self, params: Any, dtype: torch.dtype) -> Any:
        return self.transform.cast(params, dtype)

    def points(self, params: Params, domain: Domain, points: Tensor) -> Tensor:
        return self.transform.points(params, domain, points)

    def displacement(self, params: Params, domain: Domain, grid: Grid | None = None) -> Tensor:
        return self.transform.displacement(params, domain, grid)

    def refine(self, params: Params, domain: Domain, finer: Domain) -> Params:
        return self.transform.refine(params, domain, finer)

    @property
    def linear(self) -> bool:
        return self.transform.linear

    def matrix(self, params: Params, domain: Domain) -> Tensor:
        return self.transform.matrix(params, domain)

    def inverse(self, params: Params, domain: Domain) -> Mapping:
        return self.transform.inverse(params, domain)
