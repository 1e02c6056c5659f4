"""A stereo pair with disparities of 7 to 60 pixels: error of a displacement, beside scikit-image's optical flow.

Middlebury 2014, motorcycle, left (fixed) and right, in grey.  Errors are over the pixels whose disparity is known,
those that the other image does not show included.  No method is told that the motion is horizontal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.images import folder
from benchmarks.measure import Absent, Options, Table, peer
from fnreg import Displacement, Image, Stage, Translation, charbonnier, ncc, register, total_variation

LEVELS = 6
WEIGHTS = (0.01, 0.03)  # of total variation
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right in [0, 1], and the disparity, NaN where unknown: left (y, x) is right (y, x - disparity)."""
    pillow, home = peer("PIL.Image"), folder("stereo_flow")
    grey = np.array([0.2125, 0.7154, 0.0721], dtype=np.float32)
    sides: list[np.ndarray] = []
    for name in ("left", "right"):
        with pillow.open(home / f"motorcycle_{name}.png") as picture:
            sides.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 @ grey)
    with np.load(home / "motorcycle_disp.npz") as archive:
        return sides[0], sides[1], archive["arr_0"]


def ours(weight: float, steps: tuple[int, ...]) -> Flow:
    """A shift, then a field with little total variation."""

    def flow(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        field = Stage(Displacement(), objective=charbonnier + weight * total_variation, stop=None)
        fixed, moving = Image.from_array(left), Image.from_array(right)
        shift = Stage(Translation(), objective=ncc)
        options: dict[str, Any] = {"levels": LEVELS, "steps": steps, "padding": "border"}
        return register(fixed, moving, [shift, field], **options).mapping.displacement(fixed.grid).numpy()

    return flow


def theirs(name: str, **options: Any) -> Flow:
    """Of scikit-image, as (x, y)."""
    function = getattr(peer("skimage.registration"), name)

    def flow(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.asarray(function(left, right, **options))[::-1]

    return flow


def run(options: Options) -> list[Table]:
    """One table."""
    left, right, disparity = pair()
    known = np.isfinite(disparity)
    steps = (10,) * (LEVELS - 1) + (0,) if options.quick else (60,) * (LEVELS - 1) + (20,)
    flows: dict[str, Flow] = {"none": lambda a, b: np.zeros((2, *a.shape))}
    flows |= {f"fnreg Displacement, charbonnier + {w} total_variation": ours(w, steps) for w in WEIGHTS}
    notes = [f"{int(known.sum())} pixels, one run; steps {steps}"]
    try:
        flows["scikit-image, optical_flow_tvl1"] = theirs("optical_flow_tvl1")
        flows["scikit-image, optical_flow_ilk"] = theirs("optical_flow_ilk")
    except Absent as reason:
        notes.append(f"without scikit-image: {reason}")
    columns = ("method", "mean error px", "median px", "above 3 px %", "seconds")
    table = Table("Motorcycle, 741 x 500", columns, [], tuple(notes))
    for name, flow in flows.items():
        begin = time.perf_counter()
        found = flow(left, right)
        taken = time.perf_counter() - begin
        error = np.hypot(found[0] + disparity, found[1])[known]
        row = float(error.mean()), float(np.median(error)), 100 * float((error > 3).mean())
        table.rows.append((name, *row, None if name == "none" else taken))
    return [table]
