"""What is learned through registrations, over seeds: weights of penalties, features of two contrasts, a start.

The three stories are those of `examples/`, with their settings; all judge by what was not learned from.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.images import folder
from benchmarks.measure import Options, Table
from examples import amortised, learn_features, learn_penalty


def run(options: Options) -> list[Table]:
    """Three tables."""
    for name in ("hippocampus", "multimodal3d_spm"):
        folder(name)
    return [penalties(options), features(options), starts(options)]


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
    """A network's answer with and without refining steps, beside the identity as a start."""
    rounds = 2 if options.quick else 400
    train, test = amortised.pairs(1000)
    begin = time.perf_counter()
    network, _ = amortised.learn(train, rounds=rounds)
    taken = time.perf_counter() - begin
    amortised.compare(network, test, (0, 3))  # a warm-up
    found = amortised.compare(network, test, (0, 3, 10, 30, 100))
    size = len(test[0].data)
    rows = [(name, n, value, 1e3 * t / size) for name, told in found.items() for n, value, t in told]
    return Table(
        f"A network's answer as a start, {size} pairs of digits that it has not seen",
        ("from", "steps", "objective", "ms a pair"),
        rows,
        (f"learned in {taken:.0f} s from 1000 pairs of other images; all pairs in one call",),
    )
