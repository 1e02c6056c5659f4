"""What a run leaves behind: its record as plain data, and its files."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnreg import io
from fnreg.image import Image
from fnreg.registration import Registration
from fnreg.solvers.base import Status
from fnreg.transforms.linear import decompose
from fnreg.transforms.rotation import matrix_to_angle

KNOWN = (
    "warped.png",
    "warped.tif",
    "transform.safetensors",
    "transform.tfm",
    "inverse.safetensors",
    "inverse.tfm",
    "figures/overview.png",
    "figures/checkerboard.png",
    "figures/losses.png",
)


def outcome(result: Registration, before: float, before_terms: dict[str, Tensor]) -> dict[str, Any]:
    """How a registration of one pair by a linear transform went, as plain data."""
    matrix = result.mapping.matrix().cpu()
    shift, factors = decompose(matrix)
    center = result.fixed_grid.center
    found: dict[str, Any] = {
        "ended": Status(int(result.status)).name.lower(),
        "value_before": _number(before),
        "value_after": _number(float(result.value)),
        "terms_before": {name: _number(float(value)) for name, value in before_terms.items()},
        "terms_after": {name: _number(float(value)) for name, value in result.terms.items()},
        "steps": result.steps.tolist(),
        "matrix": matrix.tolist(),
        "translation_of_center": (result.map_points(center[None])[0] - center).tolist(),
        "scale": factors.scale.tolist(),
        "history": [
            {"stage": trace.stage, "level": trace.level, "value": [v for v in trace.value.tolist() if math.isfinite(v)]}
            for trace in result.history
        ],
    }
    if len(shift) == 2:
        found["rotation_degrees"] = math.degrees(float(matrix_to_angle(factors.rotation)))
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def peak_megabytes(device: torch.device) -> float:
    """Megabytes: of the device where there is one of its own, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(size / (2**20 if sys.platform == "darwin" else 2**10), 1)


def write(
    folder: Path, result: Registration, fixed: Image, moving: Image, saves: Sequence[str], objective: str, title: str
) -> None:
    """Write into a folder what `saves` names; see `fnreg.settings.SAVES`.

    objective : what the course of it is labelled with; title : of the overview
    """
    fixed, moving = fixed.to("cpu"), moving.to("cpu")
    warped = result.warp(moving.to(result.value.device)).to("cpu")
    if "warped" in saves:
        io.write_image(folder / "warped.tif", warped)
        io.write_image(folder / "warped.png", warped, window=_window(moving))
    if "params" in saves:
        io.write_transform(folder / "transform.safetensors", result.mapping)
    if "xfm" in saves:
        io.write_itk(folder / "transform.tfm", result.mapping)
    if "inverse" in saves:
        inverse = result.inverse().mapping
        io.write_transform(folder / "inverse.safetensors", inverse)
        io.write_itk(folder / "inverse.tfm", inverse)
    if "figures" in saves:
        from fnreg import plot

        (folder / "figures").mkdir()
        figures = {
            "overview": plot.overview(fixed, moving, warped, unit="pixels", title=title),
            "checkerboard": plot.checkerboard(fixed, warped, unit="pixels"),
            "losses": plot.losses(result, objective=objective),
        }
        for name, figure in figures.items():
            figure.savefig(folder / "figures" / f"{name}.png")


def _window(moving: Image) -> tuple[float, float]:
    """The window of the moving image, so that the warped picture looks like it: bytes stay bytes."""
    low, high = float(moving.data.min()), float(moving.data.max())
    if low >= 0 and 1 < high <= 255:
        return 0.0, 255.0
    return (low, high) if low < high else (low, low + 1)
