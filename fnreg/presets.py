"""Tuned settings by name: plain arguments of `register`, which print as the Python that makes them.

>>> import fnreg
>>> sorted(fnreg.presets.brain)
['padding', 'stop', 'transform']
>>> fnreg.presets.brain["transform"][1].transform
Diffeomorphism(gradient=0.75, smooth=0.55, limit=0.5)

`register(fixed, moving, **fnreg.presets.brain)` uses them; `presets.brain | {"padding": None}` changes one.
"""

from __future__ import annotations

from typing import Any

from fnreg.losses.terms import lncc, ncc
from fnreg.optim import adam
from fnreg.solvers.gauss_newton import GaussNewton
from fnreg.stages import Stage
from fnreg.transforms.dense import Diffeomorphism
from fnreg.transforms.linear import Affine


def _brain(*steps: int) -> dict[str, Any]:
    field = Stage(
        Diffeomorphism(gradient=0.75, smooth=0.55),
        objective=lncc(radius=3, flat=0.2),
        optimizer=adam(0.8, b2=0.99, decay=1.0, relative=3.0),
        levels=3,
        steps=steps,
    )
    affine = Stage(Affine(), objective=ncc, solver=GaussNewton(), levels=4, steps=(20, 10, 5, 0))
    return {"transform": [affine, field], "padding": "zeros", "stop": None}


# Brains without skull, of one or of similar contrasts: an affine map to half resolution, then correlation in windows.
# Tuned on two pairs of NIREP, see benchmarks/brain_race.py; the fast one takes six tenths of the time.
brain = _brain(100, 100, 20)
brain_fast = _brain(100, 50, 10)

PRESETS: dict[str, dict[str, Any]] = {"brain": brain, "brain_fast": brain_fast}
