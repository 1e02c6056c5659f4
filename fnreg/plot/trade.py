"""Figures of sweeps: what a setting costs and what it brings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fnreg.judges import JUDGES
from fnreg.plot.canvas import new_figure
from fnreg.pytree import tree_leaves
from fnreg.sweeps import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 40  # thin lines beyond these hide each other


def trade_off(found: Sweep) -> Figure:
    """Scores of a sweep against the roughness of the maps: the mean over pairs of each setting, joined along the first
    name, one curve per combination of the others; the chosen settings of the pairs are circles.

    Where the maps are linear, the scores over the values of the first name.  Thin lines are single pairs, of a sweep of
    one name.  Means are `Sweep.means`: pairs that no setting serves are left out, and of the curve a setting that
    failed for one of the others, so `Sweep.common` is the best point that is shown.
    """
    count = len(found.chosen.reshape(-1))
    scores = _table(found.scores, count, found.shape)  # (B, n, rest)
    values, name = _values(found), next(iter(found.values))
    rough = None if found.roughness is None else _table(found.roughness, count, found.shape)
    across = values[None, :, None].expand(scores.shape) if rough is None else rough
    across = torch.where(scores.isnan(), torch.nan, across)
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    rest, counted = scores.shape[2], found.counted.reshape(-1).cpu()
    means = _table(found.means, 1, found.shape)[0]  # (n, rest)
    if rest == 1 and count > 1:
        for x, y in zip(across[:PAIRS, :, 0], scores[:PAIRS, :, 0], strict=True):
            axes.plot(x, y, color="C0", linewidth=0.6, alpha=0.3)
    for k in range(rest):
        x, y = across[counted, :, k].nanmean(0), means[:, k]
        told = "mean of the pairs" if count > 1 else "settings"
        axes.plot(x, y, "o-", color=f"C{k}", linewidth=1.8, markersize=4, label=_label(found, k) or told)
        if rough is not None and k == 0:
            for place in _apart(x, y):
                where = (float(x[place]), float(y[place]))
                axes.annotate(f"{float(values[place]):.2g}", where, xytext=(4, 4), textcoords="offset points", size=8)
    picked = found.chosen.reshape(-1, 1).cpu()
    best = [t.flatten(1).gather(1, picked)[:, 0] for t in (across, scores)]
    style: dict[str, Any] = {"color": "C3", "linestyle": "none", "fillstyle": "none"}
    axes.plot(*best, "o", markersize=8, label="chosen" if count == 1 else "chosen, each pair", **style)
    if rough is None and bool((values > 0).all()) and float(values.max()) > 20 * float(values.min()):
        axes.set_xscale("log")
    axes.set(
        xlabel=name if rough is None else "standard deviation of log det J",
        ylabel=JUDGES[found.judge] + (", higher is better" if found.higher else ", lower is better"),
        title=f"Sweep over {', '.join(found.values)}" + (f": {count} pairs" if count > 1 else ""),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _table(table: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """(B, n_1, rest) float64 in memory."""
    return table.detach().cpu().to(torch.float64).reshape(count, shape[0], math.prod(shape[1:]))


def _values(found: Sweep) -> Tensor:
    """The values of the first name (n,), or their numbers where they are more than numbers."""
    leaves = tree_leaves(next(iter(found.values.values())))
    if len(leaves) == 1 and leaves[0].ndim == 1:
        return leaves[0].detach().cpu().to(torch.float64)
    return torch.arange(found.shape[0], dtype=torch.float64)


def _label(found: Sweep, number: int) -> str:
    """The values of all names but the first."""
    told: list[str] = []
    if len(found.shape) > 1:
        places = torch.unravel_index(torch.tensor(number), found.shape[1:])
        for (name, tree), place in zip(list(found.values.items())[1:], places, strict=True):
            leaves = tree_leaves(tree)
            plain = len(leaves) == 1 and leaves[0].ndim == 1
            told.append(f"{name} {float(leaves[0][place]):.3g}" if plain else f"{name} {int(place)}")
    return ", ".join(told)


def _apart(x: Tensor, y: Tensor) -> list[int]:
    """Points of a curve, the first one of them that is shown, whose labels do not cover each other."""
    kept: list[int] = []
    where = torch.stack([x, y], 1)
    shown = where.isfinite().all(1)
    if not bool(shown.any()):
        return kept
    where = where / (where[shown].amax(0) - where[shown].amin(0)).clamp(min=1e-12)
    for place in torch.nonzero(shown)[:, 0].tolist():
        if not kept or float((where[kept] - where[place]).abs().amax(1).min()) > 0.1:
            kept.append(place)
    return kept
