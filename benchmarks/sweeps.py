"""Sixteen penalty weights x 32 pairs: one call of `sweep` beside loops over weights, and over weights and pairs.

Digits with what is brighter than one half as label, free-form deformations by mean squares and bending.  All take all
steps, so that all do the same work; the loops judge nothing.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.measure import Options, Table, seconds
from fnreg import FFD, Image, Registration, Subject, bending, mse, register, sweep
from fnreg.data import digit_pairs


def run(options: Options) -> list[Table]:
    """Two tables: time, and what is chosen."""
    weights = torch.logspace(-4, 1, 4 if options.quick else 16)
    count = 4 if options.quick else 32
    fixed, moving = (Subject(image, labels=(image.data > 0.5).long()) for image in digit_pairs(count))
    settings: dict[str, Any] = {"levels": 3, "steps": 5 if options.quick else 20, "stop": None}
    transform = FFD(stride=4)

    def whole() -> Any:
        return sweep(
            fixed, moving, transform, lambda w: {"objective": mse + w * bending}, over={"w": weights}, **settings
        )

    def one(pair: int, weight: torch.Tensor) -> Registration:
        images = (Image(known.image.data[pair], known.image.grid) for known in (fixed, moving))
        return register(*images, transform, objective=mse + weight * bending, **settings)

    def by_weight() -> list[torch.Tensor]:
        found = [register(fixed, moving, transform, objective=mse + w * bending, **settings) for w in weights]
        return [result.mapping.params["coefficients"] for result in found]

    def by_pair() -> list[torch.Tensor]:
        return [torch.stack([one(pair, w).mapping.params["coefficients"] for pair in range(count)]) for w in weights]

    kept: dict[str, Any] = {}
    times: dict[str, list[float]] = {}

    def clocked(name: str, call: Any) -> None:
        times.setdefault(name, []).append(seconds(lambda: kept.update({name: call()})))

    whole()  # a warm-up
    # The last loop takes longer than all else together: the others run before and after it.
    for _ in range(2):
        clocked("one call of sweep", whole)
        clocked("a loop over weights", by_weight)
    clocked("a loop over weights and pairs", by_pair)
    clocked("a loop over weights", by_weight)
    clocked("one call of sweep", whole)
    found = kept.pop("one call of sweep")
    params = found.every.mapping.params["coefficients"].unflatten(0, (count, len(weights)))
    apart = {name: float((torch.stack(made, 1) - params).abs().max()) for name, made in kept.items()}
    medians = {name: statistics.median(found) for name, found in times.items()}
    fast = medians["one call of sweep"]
    size = len(weights) * count
    speed = Table(
        f"{len(weights)} weights x {count} pairs of 28 x 28, {settings['steps']} steps on each of 3 levels",
        ("how", "seconds", "registrations per second", "times one call", "largest difference, pixels"),
        [(name, t, size / t, t / fast, apart.get(name)) for name, t in medians.items()],
        ("medians of 3, of the last loop one run; differences of spline coefficients, float32; one call judges, too",),
    )
    table, common = found.scores, int(found.common)
    rough = found.roughness
    assert rough is not None
    own = found.best_scores
    chosen = Table(
        "What is chosen by Dice",
        ("weight", "Dice, mean", "sd over pairs", "sd of log det J", "best of so many pairs"),
        [
            (
                float(w),
                *(float(t) for t in (table[:, k].mean(), table[:, k].std(), rough[:, k].mean())),
                int((found.chosen == k).sum()),
            )
            for k, w in enumerate(weights)
        ],
        (
            f"each pair's own weight {float(own.mean()):.4f}, the best common one ({float(weights[common]):.3g}) "
            f"{float(table[:, common].mean()):.4f}: a choice on the labels that it is told with, so an upper bound",
        ),
    )
    return [speed, chosen]
