"""fnreg: image registration as pure functions on PyTorch.

A transform is a frozen value whose methods are pure functions of (parameters, domain, points); an image is data on
a `Grid`; a loss is a function; `register` finds parameters, for one pair or a thousand at once.
Names are loaded when they are first used, so `import fnreg` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__: str  # of the package as it was installed; versions are git's tags

if TYPE_CHECKING:
    from fnreg import cohort as cohort
    from fnreg import data as data
    from fnreg import fields as fields
    from fnreg import filters as filters
    from fnreg import io as io
    from fnreg import metrics as metrics
    from fnreg import optim as optim
    from fnreg import plot as plot
    from fnreg import presets as presets
    from fnreg import sampling as sampling
    from fnreg.adjoint import differentiable as differentiable
    from fnreg.bootstrap import Ensemble as Ensemble
    from fnreg.bootstrap import ensemble as ensemble
    from fnreg.grid import Grid as Grid
    from fnreg.image import Image as Image
    from fnreg.image import Subject as Subject
    from fnreg.implicit import NoOptimumError as NoOptimumError
    from fnreg.levels import Event as Event
    from fnreg.levels import RegistrationError as RegistrationError
    from fnreg.linearised import Solves as Solves
    from fnreg.losses import descriptors as descriptors
    from fnreg.losses import functional as functional
    from fnreg.losses import information as information
    from fnreg.losses import overlap as overlap
    from fnreg.losses import penalties as penalties
    from fnreg.losses import points as points
    from fnreg.losses.objective import Objective as Objective
    from fnreg.losses.objective import Term as Term
    from fnreg.losses.objective import term as term
    from fnreg.losses.terms import bending as bending
    from fnreg.losses.terms import chamfer as chamfer
    from fnreg.losses.terms import charbonnier as charbonnier
    from fnreg.losses.terms import closest_points as closest_points
    from fnreg.losses.terms import correlation_ratio as correlation_ratio
    from fnreg.losses.terms import cross_entropy as cross_entropy
    from fnreg.losses.terms import curvature as curvature
    from fnreg.losses.terms import dice as dice
    from fnreg.losses.terms import diffusion as diffusion
    from fnreg.losses.terms import divergence as divergence
    from fnreg.losses.terms import elasticity as elasticity
    from fnreg.losses.terms import feature as feature
    from fnreg.losses.terms import folding as folding
    from fnreg.losses.terms import huber as huber
    from fnreg.losses.terms import inverse_consistency as inverse_consistency
    from fnreg.losses.terms import landmarks as landmarks
    from fnreg.losses.terms import lncc as lncc
    from fnreg.losses.terms import log_jacobian as log_jacobian
    from fnreg.losses.terms import mae as mae
    from fnreg.losses.terms import mi as mi
    from fnreg.losses.terms import mind as mind
    from fnreg.losses.terms import mse as mse
    from fnreg.losses.terms import ncc as ncc
    from fnreg.losses.terms import ngf as ngf
    from fnreg.losses.terms import nmi as nmi
    from fnreg.losses.terms import total_variation as total_variation
    from fnreg.losses.terms import tversky as tversky
    from fnreg.optim import adam as adam
    from fnreg.optim import chain as chain
    from fnreg.optim import clip as clip
    from fnreg.optim import normalized as normalized
    from fnreg.optim import sgd as sgd
    from fnreg.optimum import Implicit as Implicit
    from fnreg.pytree import stack as stack
    from fnreg.registration import Registration as Registration
    from fnreg.registration import evaluate as evaluate
    from fnreg.registration import register as register
    from fnreg.search import Choice as Choice
    from fnreg.solved import SolvedLaplace as SolvedLaplace
    from fnreg.solvers.base import Status as Status
    from fnreg.solvers.base import Stop as Stop
    from fnreg.solvers.descent import Descent as Descent
    from fnreg.solvers.gauss_newton import GaussNewton as GaussNewton
    from fnreg.solvers.lbfgs import LBFGS as LBFGS
    from fnreg.solvers.newton_cg import NewtonCG as NewtonCG
    from fnreg.stages import Stage as Stage
    from fnreg.sweeps import Sweep as Sweep
    from fnreg.sweeps import sweep as sweep
    from fnreg.transforms.base import Mapping as Mapping
    from fnreg.transforms.base import Sequential as Sequential
    from fnreg.transforms.base import Transform as Transform
    from fnreg.transforms.dense import SVF as SVF
    from fnreg.transforms.dense import Diffeomorphism as Diffeomorphism
    from fnreg.transforms.dense import Displacement as Displacement
    from fnreg.transforms.factors import decompose as decompose
    from fnreg.transforms.held import Held as Held
    from fnreg.transforms.linear import Affine as Affine
    from fnreg.transforms.linear import Homogeneous as Homogeneous
    from fnreg.transforms.linear import IsotropicScaling as IsotropicScaling
    from fnreg.transforms.linear import Rigid as Rigid
    from fnreg.transforms.linear import Rotation as Rotation
    from fnreg.transforms.linear import Scaling as Scaling
    from fnreg.transforms.linear import Shearing as Shearing
    from fnreg.transforms.linear import Similarity as Similarity
    from fnreg.transforms.linear import Translation as Translation
    from fnreg.transforms.linear import linear_mapping as linear_mapping
    from fnreg.transforms.spline import FFD as FFD
    from fnreg.transforms.spline import SVFFD as SVFFD
    from fnreg.transforms.tps import TPS as TPS
    from fnreg.transforms.tps import tps_mapping as tps_mapping
    from fnreg.transforms.warping import warp as warp
    from fnreg.uncertainty import Laplace as Laplace
    from fnreg.uncertainty import laplace as laplace
    from fnreg.unrolled import Checkpointed as Checkpointed
    from fnreg.unrolled import Unrolled as Unrolled

_HOME = {
    "fnreg.adjoint": ("differentiable",),
    "fnreg.bootstrap": ("Ensemble", "ensemble"),
    "fnreg.uncertainty": ("Laplace", "laplace"),
    "fnreg.grid": ("Grid",),
    "fnreg.image": ("Image", "Subject"),
    "fnreg.implicit": ("NoOptimumError",),
    "fnreg.linearised": ("Solves",),
    "fnreg.losses.objective": ("Objective", "Term", "term"),
    "fnreg.losses.terms": (
        "bending",
        "chamfer",
        "charbonnier",
        "closest_points",
        "correlation_ratio",
        "cross_entropy",
        "curvature",
        "dice",
        "diffusion",
        "divergence",
        "elasticity",
        "feature",
        "folding",
        "huber",
        "inverse_consistency",
        "landmarks",
        "lncc",
        "log_jacobian",
        "mae",
        "mi",
        "mind",
        "mse",
        "ncc",
        "ngf",
        "nmi",
        "total_variation",
        "tversky",
    ),
    "fnreg.optimum": ("Implicit",),
    "fnreg.optim": ("adam", "chain", "clip", "normalized", "sgd"),
    "fnreg.pytree": ("stack",),
    "fnreg.search": ("Choice",),
    "fnreg.levels": ("Event", "RegistrationError"),
    "fnreg.registration": ("Registration", "evaluate", "register"),
    "fnreg.stages": ("Stage",),
    "fnreg.solved": ("SolvedLaplace",),
    "fnreg.solvers.base": ("Status", "Stop"),
    "fnreg.solvers.descent": ("Descent",),
    "fnreg.solvers.gauss_newton": ("GaussNewton",),
    "fnreg.solvers.lbfgs": ("LBFGS",),
    "fnreg.solvers.newton_cg": ("NewtonCG",),
    "fnreg.sweeps": ("Sweep", "sweep"),
    "fnreg.unrolled": ("Checkpointed", "Unrolled"),
    "fnreg.transforms.base": ("Mapping", "Sequential", "Transform"),
    "fnreg.transforms.held": ("Held",),
    "fnreg.transforms.warping": ("warp",),
    "fnreg.transforms.dense": ("Diffeomorphism", "Displacement", "SVF"),
    "fnreg.transforms.spline": ("FFD", "SVFFD"),
    "fnreg.transforms.tps": ("TPS", "tps_mapping"),
    "fnreg.transforms.factors": ("decompose",),
    "fnreg.transforms.linear": (
        "Affine",
        "Homogeneous",
        "IsotropicScaling",
        "Rigid",
        "Rotation",
        "Scaling",
        "Shearing",
        "Similarity",
        "Translation",
        "linear_mapping",
    ),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = {
    "cohort": "fnreg.cohort",
    "data": "fnreg.data",
    "descriptors": "fnreg.losses.descriptors",
    "fields": "fnreg.fields",
    "filters": "fnreg.filters",
    "functional": "fnreg.losses.functional",
    "information": "fnreg.losses.information",
    "io": "fnreg.io",
    "metrics": "fnreg.metrics",
    "optim": "fnreg.optim",
    "overlap": "fnreg.losses.overlap",
    "penalties": "fnreg.losses.penalties",
    "plot": "fnreg.plot",
    "points": "fnreg.losses.points",
    "presets": "fnreg.presets",
    "sampling": "fnreg.sampling",
}

__all__ = ["__version__", *sorted(_WHERE), *sorted(_MODULES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'fnreg' has no attribute {name!r}")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fnreg")
    except metadata.PackageNotFoundError:  # a folder of sources that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
