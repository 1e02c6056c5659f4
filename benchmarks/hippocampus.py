"""Hippocampi of twelve people registered onto each other, 132 pairs in one call: overlap of the labels, folds, time.

The twelve crops of the Medical Segmentation Decathlon differ in size, and their place in the head is lost: they are
padded to one size with weights that are zero there, each keeps its own grid, and the first stage begins where the
centres of the crops meet.  Labels (1 anterior, 2 posterior) are warped by nearest neighbour and judged on the voxels of
each fixed subject.  One setting serves all pairs.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks import ants
from benchmarks.images import folder, volume
from benchmarks.measure import Absent, Options, Table, apart, peak
from fnreg import (
    Affine,
    Diffeomorphism,
    Image,
    Mapping,
    Registration,
    Stage,
    Subject,
    Transform,
    Translation,
    adam,
    lncc,
    mi,
    register,
    stack,
    warp,
)
from fnreg.fields import statistics
from fnreg.pytree import over_batch

LABELS = (1, 2)
TEN = 10  # pairs that ANTs registers too
LOCAL = lncc(radius=3, flat=0.1)
BOTH = mi + LOCAL
OF_AFFINE, OF_FIELD = (50, 30, 10), (100, 60, 20)
METHODS: dict[str, tuple[Transform, Any]] = {
    "Diffeomorphism(1, 0.7), MI + LNCC": (Diffeomorphism(gradient=1.0, smooth=0.7), BOTH),
    "Diffeomorphism(1, 1), LNCC": (Diffeomorphism(gradient=1.0, smooth=1.0), LOCAL),
}
OPTIMIZER = adam(0.5, b2=0.99, decay=1.0, relative=3.0)


def subjects(count: int | None = None) -> list[Subject]:
    """Image, mask and labels of the first `count` people, or all, padded about the middle to one size."""
    paths = sorted(folder("hippocampus").glob("*_img.nii.gz"))[:count]
    images = [volume(path) for path in paths]
    labels = [volume(_labels(path)) for path in paths]
    size = tuple(max(image.grid.size[axis] for image in images) for axis in range(3))
    return [_padded(image.normalize(), known, size) for image, known in zip(images, labels, strict=True)]


def _labels(image: Path) -> Path:
    return image.with_name(image.name.replace("_img", "_lab"))


def _padded(image: Image, labels: Image, size: tuple[int, ...]) -> Subject:
    """With voxels added that repeat the outermost ones and have no weight; the others stay where they are."""
    low = [(m - n) // 2 for n, m in zip(image.grid.size, size, strict=True)]
    high = [m - n - a for n, m, a in zip(image.grid.size, size, low, strict=True)]
    widths = list(itertools.chain.from_iterable(zip(low, high, strict=True)))
    mask, known = (pad(t, widths) for t in (torch.ones_like(image.data), labels.data))
    data = pad(image.data[None], widths, mode="replicate")[0]
    return Subject(Image(data, image.grid.pad(low, high)), mask, labels=known.round().to(torch.int64))


def pairs(known: list[Subject]) -> tuple[Subject, Subject]:
    """Fixed and moving of all ordered pairs of two people."""
    fixed, moving = zip(*itertools.permutations(known, 2), strict=True)
    return stack(fixed), stack(moving)


def dice(fixed: Subject, moving: Subject, mapping: Mapping) -> Tensor:
    """2 |A and B| / (|A| + |B|) of each pair and label, (B, 2), on the fixed voxels."""
    assert fixed.labels is not None and moving.labels is not None
    labels = Image(moving.labels.to(torch.float32), moving.image.grid)
    warped = warp(labels, mapping, fixed.image.grid, interpolation="nearest").data
    scores: list[Tensor] = []
    for label in LABELS:
        a, b = warped == label, fixed.labels == label
        scores.append(2 * (a & b).flatten(1).sum(1) / (a.flatten(1).sum(1) + b.flatten(1).sum(1)))
    return torch.stack(scores, 1)


def registered(
    fixed: Subject, moving: Subject, method: tuple[Transform, Any] | None, steps: tuple[tuple[int, ...], ...]
) -> Registration:
    """All pairs in one call: an affine map, then a field where a method asks for one."""
    stages = [Stage(Affine(), objective=BOTH, steps=steps[0])]
    if method is not None:
        transform, objective = method
        stages.append(Stage(transform, objective=objective, optimizer=OPTIMIZER, steps=steps[1]))
    # A moving mask would be differentiated, which takes long: what is repeated beyond the crop is let in instead.
    return register(fixed, moving.image, stages, start="center", stop=None)


def memory(count: int | None) -> float | None:
    """MiB at most beyond what is in use before; it does not depend on the number of steps."""
    fixed, moving = pairs(subjects(count))
    return peak(lambda: registered(fixed, moving, next(iter(METHODS.values())), ((1, 1, 1), (1, 1, 1))))


def judged(fixed: Subject, moving: Subject, mapping: Mapping) -> tuple[float | None, ...]:
    """Dice: mean, of each label, of the lowest 30 % of the pairs; the largest share of folds; mean sd of log det J."""
    scores = dice(fixed, moving, mapping)
    lowest = scores.mean(1).sort().values[: max(1, round(0.3 * len(scores)))]
    told = (float(scores.mean()), *scores.mean(0).tolist(), float(lowest.mean()))
    if mapping.transform.linear:
        return (*told, None, None)

    def one(mapping: Mapping, known: Subject) -> Any:
        field = mapping.displacement(known.image.grid).to(torch.float32)
        return statistics(field, known.image.grid, mask=known.mask)

    found = over_batch(one, mapping=(mapping, mapping.ranks()), known=(fixed, fixed.ranks()))
    return (*told, float(found.folds.max()), float(found.sd_log_determinant.mean()))


def run(options: Options) -> list[Table]:
    """One table."""
    count = 3 if options.quick else None
    steps = ((5, 3, 1), (5, 3, 1)) if options.quick else (OF_AFFINE, OF_FIELD)
    fixed, moving = pairs(subjects(count))
    size = len(fixed.image.data)
    columns = ("method", "seconds", "pairs per second", "Dice", "anterior", "posterior", "lowest 30 %")
    used = apart(memory, count)
    room = "" if used is None else f"; at most {used:.0f} MiB"
    notes = (
        f"{size} pairs of {' x '.join(map(str, fixed.image.grid.size))} voxels in one call, one run, affine stage "
        f"included{room}; folds are the largest share in a pair",
        "published for ANTs on other subjects of this set: no registration 0.57, affine 0.64, SyN 0.73, SyN with CC "
        "0.77 (34 s a pair)",
    )
    table = Table("All pairs of twelve hippocampi", (*columns, "folds", "sd of log det J"), [], notes)
    start = register(fixed, moving.image, Translation(), start="center", levels=1, steps=0)
    table.rows.append(("centres of the crops", None, None, *judged(fixed, moving, start.mapping)))
    for name, method in {"affine, MI + LNCC": None, **METHODS}.items():
        begin = time.perf_counter()
        result = registered(fixed, moving, method, steps)
        taken = time.perf_counter() - begin
        table.rows.append((name, taken, size / taken, *judged(fixed, moving, result.mapping)))
    return [table, *against_ants(1 if options.quick else TEN)]


def against_ants(count: int) -> list[Table]:
    """Every thirteenth pair by ANTs, each with its own files, beside the same pairs by the second method."""
    paths = sorted(folder("hippocampus").glob("*_img.nii.gz"))
    chosen = list(itertools.permutations(range(len(paths)), 2))[:: 132 // TEN][:count]
    known = subjects()
    fixed, moving = (stack([known[pair[k]] for pair in chosen]) for k in range(2))
    columns = ("method", "seconds per pair", "Dice", "folds", "sd of log det J")
    table = Table(f"{count} of the pairs, beside ANTs", columns)
    name, method = list(METHODS.items())[-1]
    begin = time.perf_counter()
    result = registered(fixed, moving, method, (OF_AFFINE, OF_FIELD))
    taken = (time.perf_counter() - begin) / count
    mean, *_, folds, rough = judged(fixed, moving, result.mapping)
    table.rows.append((f"fnreg, {name}, one call", taken, mean, folds, rough))
    for told, settings in {"ANTs SyN, its defaults": ants.SYN, "ANTs SyN with CC": ants.CORRELATION}.items():
        try:
            outcomes = [_by_ants(paths[a], paths[b], settings) for a, b in chosen]
        except Absent as missing:
            return [Table(table.title, columns, table.rows, (f"without ANTs: {missing}",))]
        seconds, scores, folds, rough = (sum(values) / count for values in zip(*outcomes, strict=True))
        table.rows.append((told, seconds, scores, folds, rough))
    return [table]


def _by_ants(fixed: Path, moving: Path, settings: dict[str, Any]) -> tuple[float, float, float, float]:
    """Seconds, Dice, folds and the standard deviation of log det J of a pair."""
    found = ants.register(fixed, moving, _labels(moving), torch.get_num_threads(), **settings)
    known, det = volume(_labels(fixed)).data[0], found.determinant
    scores = [
        2 * float(((found.labels == k) & (known == k)).sum()) / float((found.labels == k).sum() + (known == k).sum())
        for k in LABELS
    ]
    return found.seconds, sum(scores) / 2, float((det <= 0).double().mean()), float(det.clamp(min=1e-6).log().std())
