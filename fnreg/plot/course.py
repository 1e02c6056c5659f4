"""Figures of the course of a registration: the objective over steps, and over the angles of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.plot.canvas import need, new_figure
from fnreg.registration import Registration

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses(result: Registration, *, objective: str = "objective") -> Figure:
    """The course of the objective, one curve per level, coarse to fine, stage after stage.

    Where it has several terms, each is shown below, without its weight.  For a batch: the median of the pairs and the
    band that holds the middle 80 % of them; a pair that has ended keeps its last value.

    objective : what the vertical axis is called
    """
    names = list(dict.fromkeys(name for trace in result.history for name in trace.terms))
    names = names if len(names) > 1 else []
    figure = new_figure(7.5, 4.2 + 2.2 * len(names))
    heights = [4.2, *(2.2 for _ in names)]
    several = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    many = result.status.ndim > 0
    if _curves(several[0], result, None):
        several[0].legend()
    several[0].set(
        ylabel=objective,
        title=f"Course of {len(result.status)} pairs: median and middle 80 %" if many else "Course of the registration",
    )
    for axes, name in zip(several[1:], names, strict=True):
        _curves(axes, result, name)
        axes.set(ylabel=name)
    several[-1].set(xlabel="step")
    return figure


def _curves(axes: Any, result: Registration, term: str | None) -> bool:
    """The course of the objective, or of one of its terms; whether there was any."""
    stages = len({trace.stage for trace in result.history})
    begin, lowest = 0, float("inf")
    for number, trace in enumerate(result.history):
        found = trace.value.detach().cpu().to(torch.float64)
        whole = found if found.ndim == 2 else found.unsqueeze(0)  # (B, steps)
        ran = torch.isfinite(whole).any(0)
        if not bool(ran.any()):
            continue
        steps = torch.arange(begin, begin + int(ran.nonzero().max()) + 1)
        begin += len(steps)
        values = whole if term is None else trace.terms.get(term)
        if values is None:  # another stage or level has it
            continue
        values = _kept(values.detach().cpu().to(torch.float64).reshape(whole.shape)[:, : len(steps)])
        middle, low, high = (torch.nanquantile(values, q, dim=0) for q in (0.5, 0.1, 0.9))
        name = f"level {trace.level}" + {0: ", full resolution"}.get(trace.level, f", 1/{2**trace.level}")
        name = name if stages == 1 else f"stage {trace.stage + 1}, {name}"
        axes.plot(steps, middle, color=f"C{number}", label=name, linewidth=1.8)
        if len(values) > 1:
            axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        lowest = min(lowest, float(low.nan_to_num(torch.inf).min()))
    if 0 < lowest < float("inf"):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    return begin > 0


def _kept(values: Tensor) -> Tensor:
    """Values (B, steps) in which NaN is replaced by the last value before it."""
    last = torch.where(torch.isfinite(values), torch.arange(values.shape[1]), 0).cummax(1).values
    return values.gather(1, last)


def search(
    angles_degrees: Sequence[float] | Tensor,
    values: Sequence[float] | Tensor,
    best: float | None = None,
    *,
    objective: str = "objective",
    others: dict[str, tuple[float, float]] | None = None,
) -> Figure:
    """Values of an objective over angles, with the lowest one marked.

    best : the angle to mark, in degrees; default: that of the lowest value
    others : more points to mark, by name: (angle in degrees, value)
    """
    angles = torch.as_tensor(angles_degrees, dtype=torch.float64).detach().cpu()
    found = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if angles.ndim != 1 or angles.shape != found.shape or len(angles) == 0:
        raise ValueError(
            f"angles have shape {tuple(angles.shape)} and values {tuple(found.shape)}: expected one of each"
        )
    nearest = int(found.nan_to_num(torch.inf).argmin() if best is None else (angles - best).abs().argmin())
    at, lowest = float(angles[nearest]) if best is None else best, float(found[nearest])
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    axes.plot(angles, found, linewidth=1.8, label=f"{len(angles)} angles")
    axes.axvline(at, color="C3", linewidth=1, linestyle=":")
    axes.plot([at], [lowest], "o", color="C3", markersize=8, label=f"best: {at:.1f}°")
    for number, (name, (angle, value)) in enumerate((others or {}).items()):
        shape: dict[str, Any] = {
            "marker": "sD^v"[number % 4],
            "markersize": 10 + 4 * number,
            "markeredgewidth": 2,
            "fillstyle": "none",
        }
        axes.plot([angle], [value], color=f"C{number + 1}", linestyle="none", label=name, **shape)
    axes.set(xlabel="angle (degrees)", ylabel=objective, title="Search over the angle of rotation")
    if float(angles.max() - angles.min()) > 180:
        axes.xaxis.set_major_locator(need("ticker").MultipleLocator(45))
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
