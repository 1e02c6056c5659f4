"""What is learned through registrations, over seeds: weights of penalties, features of two contrasts, starts, atlases.

The four stories are those of `examples/`, with their settings; all judge by what was not learned from.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.images import folder
from benchmarks.measure import Options, Table
from examples import amortised, atlas, learn_features, learn_penalty
from fnreg import Image


def run(options: Options) -> list[Table]:
    """Four tables."""
    for name in ("hippocampus", "multimodal3d_spm"):
        folder(name)
    return [penalties(options), features(options), starts(options), atlases(options)]


def penalties(options: Options) -> Table:
    """Five pairs of five people to learn from, seven pairs of the other seven; a seed is a division of the twelve."""
    seeds, rounds, steps = (1, 1, 10) if options.quick else (3, 8, 150)
    known, rows, gains = learn_penalty.people(), list[tuple[Any, ...]](), list[torch.Tensor]()
    for seed in range(seeds):
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
        train, test = (learn_penalty.pairs([known[n] for n in part]) for part in (order[:5], order[5:]))
        begin = time.perf_counter()
        logs, _ = learn_penalty.learn(train, rounds=rounds, steps=steps)
        taken = time.perf_counter() - begin
        both = [[learn_penalty.dice(pairs, x, steps) for x in (logs[0], logs[-1])] for pairs in (train, test)]
        gain = both[1][1] - both[1][0]
        gains.append(gain)
        told = [float(value.mean()) for pair in both for value in pair]
        rows.append((seed, *logs[-1].exp().tolist(), *told, float(gain.std()), int((gain > 0).sum()), taken))
    means = torch.stack([gain.mean() for gain in gains])
    spread = float(means.std()) if seeds > 1 else 0.0
    return Table(
        "Weights of bending and diffusion learned on five pairs of hippocampi, judged on seven pairs of other people",
        (
            "seed",
            "bending",
            "diffusion",
            "training: 0.1",
            "learned",
            "others: 0.1",
            "learned",
            "sd of gain",
            "better of 7",
            "s",
        ),
        rows,
        (f"gain in Dice on the others {float(means.mean()):.4f} in the mean, sd over seeds {spread:.4f}; 2 mm voxels",),
    )


def features(options: Options) -> Table:
    """Features learned on every other slice, beside mutual information on the others with other motions."""
    seeds, rounds = (1, 2) if options.quick else (2, 100)
    a, b, c, d, grid = learn_features.slices()
    rows: list[tuple[Any, ...]] = []
    for seed in range(seeds):
        begin = time.perf_counter()
        network, _ = learn_features.learn(a, b, grid, rounds=rounds, steps=20, seed=seed)
        taken = time.perf_counter() - begin
        found = learn_features.compare(network, *learn_features.pairs(c, d, grid, 40, seed + 1))
        for name, each in found.items():
            far = float(each.quantile(0.9))
            rows.append(
                (seed, name, float(each.mean()), float(each.median()), far, taken if name == "features" else None)
            )
    return Table(
        "T1 onto T2, 4 mm slices, motions up to 20 degrees and 20 mm: error over the head, mm",
        ("seed", "by", "mean", "median", "90 % below", "learning, s"),
        rows,
        ("40 motions of slices that were not learned from; the averages are not exactly aligned themselves",),
    )


def starts(options: Options) -> Table:
    """A network's answer with and without refining steps, beside the identity as a start; a seed draws pairs and
    weights anew."""
    seeds, rounds = (1, 2) if options.quick else (3, 400)
    size = 0
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    taken: list[float] = []
    for seed in range(seeds):
        train, test = amortised.pairs(1000, seed=seed)
        size, begin = len(test[0].data), time.perf_counter()
        network, _ = amortised.learn(train, rounds=rounds, seed=seed)
        taken.append(time.perf_counter() - begin)
        amortised.compare(network, test, (0, 3))  # a warm-up
        for name, told in amortised.compare(network, test, (0, 3, 10, 30, 100)).items():
            for n, value, t in told:
                found.setdefault((name, int(n)), []).append((value, 1e3 * t / size))
    rows = [(name, n, *_spread([v for v, _ in each]), min(t for _, t in each)) for (name, n), each in found.items()]
    return Table(
        f"A network's answer as a start, {size} pairs of digits that it has not seen",
        ("from", "steps", "objective, mean", "sd over seeds", "ms a pair, least"),
        rows,
        (
            f"{seeds} seeds; learned in {min(taken):.0f} to {max(taken):.0f} s from 1000 pairs of other images; all "
            "pairs in one call",
        ),
    )


def atlases(options: Options) -> Table:
    """The atlas of twenty threes beside their mean, as what ten others are registered with; a seed divides the
    thirty."""
    seeds, rounds, steps = (1, 2, 4) if options.quick else (3, 15, 20)
    known, rows = atlas.members(3, 30), list[tuple[Any, ...]]()
    for seed in range(seeds):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        images, others = (Image(known.data[part], known.grid) for part in (order[:20], order[20:]))
        begin = time.perf_counter()
        template, _ = atlas.learn(images, rounds=rounds, steps=steps)
        taken = time.perf_counter() - begin
        mean = images.data.mean(0)
        with torch.no_grad():
            both = [atlas.registered(one, others, steps).value for one in (mean, template)]
        sharp = [atlas.sharpness(one) for one in (mean, template, others.data)]
        better = int((both[1] < both[0]).sum())
        rows.append((seed, *(float(value.mean()) for value in both), better, *sharp, taken))
    gains = [1 - row[2] / row[1] for row in rows]
    gain, spread = _spread(gains)
    return Table(
        "An atlas of twenty digits, judged by registering it onto ten others",
        (
            "seed",
            "objective: mean image",
            "atlas",
            "better of 10",
            "sharpness: mean image",
            "atlas",
            "images",
            "learning, s",
        ),
        rows,
        (
            f"objective on the others lower by {100 * gain:.1f} % in the mean, "
            f"sd over seeds {100 * (spread or 0.0):.1f} %",
        ),
    )


def _spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation, which one value has none of."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
