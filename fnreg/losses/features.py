"""A similarity of features: of whatever a function makes of an image, such as a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fnreg.filters import resize
from fnreg.losses.functional import mse


@dataclasses.dataclass(frozen=True)
class Feature:
    """Mean squared difference of features, mean |f(warped) - f(fixed)|^2; see `fnreg.feature`."""

    function: Callable[[Tensor], Tensor]

    @property
    def __name__(self) -> str:
        return "feature"

    def __call__(self, warped: Tensor, fixed: Tensor, weights: Tensor | None = None) -> Tensor:
        """The value; weights are resized to the features where these have the images' axes, else they do not count."""
        seen, expected = self.function(warped), self.function(fixed)
        if seen.shape != expected.shape:
            raise ValueError(
                f"features have shapes {tuple(seen.shape)} and {tuple(expected.shape)}: "
                "expected one shape for images of one shape"
            )
        if weights is None or seen.ndim != fixed.ndim:
            return mse(seen, expected)
        return mse(seen, expected, resize(weights.reshape(1, *fixed.shape[1:]), tuple(seen.shape[:0:-1])))
