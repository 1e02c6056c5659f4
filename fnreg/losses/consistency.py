"""How far a map is from being undone by its inverse, as a penalty."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def inverse_consistency(transform: Any, params: Any, domain: Any) -> Tensor:
    """mean |T^-1(T(p)) - p|^2 over the voxels p of the domain, in world length^2.

    For transforms whose inverse takes no search: `SVF` and `SVFFD`, also first in a `Sequential` with linear parts
    after them, and in `symmetric` registrations.  There T and its inverse are the flows forward and backward, each
    composed of samplings on voxels, and the penalty is what these miss: it keeps the velocity from being too rough, or
    too fast for its squarings, to be followed back.  0 for linear maps.  `fnreg.fields.inverse_consistency` measures
    two given fields.  Christensen and Johnson 2001, doi 10.1109/42.932742.

    Raises ValueError for transforms whose inverse is a search, such as `FFD`.

    >>> import torch
    >>> from fnreg import Grid, SVF
    >>> from fnreg.losses.consistency import inverse_consistency
    >>> grid = Grid((8, 8))
    >>> inverse_consistency(SVF(), {"velocity": torch.full((2, 8, 8), 0.5)}, grid)
    tensor(0.)
    """
    away: Tensor = transform.there_and_back(params, domain)
    return away.square().sum(0).mean()
