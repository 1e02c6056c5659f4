"""A batch of loaded pairs through `register`: an outcome for each, whatever happens to the others."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnreg import fields, lattice, notes
from fnreg.agreement import finite, regularity
from fnreg.beginning import Before, before, starting
from fnreg.cohort.batches import Sizes
from fnreg.cohort.load import Asked, Loaded, told
from fnreg.cohort.memory import Peak, is_lack
from fnreg.cohort.study import OK
from fnreg.pytree import in_parts, over_batch, stack, tree_map, tree_take
from fnreg.registration import Registration, SpeedWarning, register, slower
from fnreg.settings import STARTS
from fnreg.solvers.base import Status, Stop
from fnreg.transforms.base import Mapping

COURSE = 33  # points of the course of a pair that are kept, three numbers each
STATUS = {Status.DIVERGED: "diverged", Status.LOST_OVERLAP: "diverged"}  # all others are faults of inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a pair.

    status, reason : of `study.STATUSES`; values : by column; history : (level, step, value), thinned
    start, result : before and after, of one pair on the CPU, where there is a result
    trace : of an error that fnreg did not expect
    """

    pair: Loaded
    status: str
    reason: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: list[list[float]] = dataclasses.field(default_factory=list)
    start: Mapping | None = None
    result: Registration | None = None
    seconds: float = 0.0
    trace: str = ""


def attempt(batch: Sequence[Loaded], asked: Asked, sizes: Sizes) -> list[Outcome]:
    """Outcomes in the order of the batch.  Without memory for it its halves are tried; after an error its pairs alone,
    so that only the one whose fault it is fails."""
    key, voxels = batch[0].key, batch[0].voxels
    clock = time.perf_counter()
    try:
        with Peak(asked.device) as peak:
            found = solve(batch, asked, width=sizes.width(len(batch), voxels))
    except Exception as problem:
        lack = is_lack(problem)
        if len(batch) == 1:
            reason = "there is not enough memory for this pair" if lack else told(problem)
            trace = "".join(traceback.format_exception(problem))
            return [Outcome(batch[0], "failed", reason, trace=trace, seconds=time.perf_counter() - clock)]
    else:
        sizes.fitted(key, len(batch), voxels, peak)
        return found
    # Not within `except`: what the error holds of the batch is to be freed first.
    if lack:
        sizes.lacked(key, len(batch))
    part = len(batch) // 2 if lack else 1
    return [one for start in range(0, len(batch), part) for one in attempt(batch[start : start + part], asked, sizes)]


def solve(batch: Sequence[Loaded], asked: Asked, *, width: int) -> list[Outcome]:
    """Register a batch of pairs of one key, so many side by side; raises what `register` raises."""
    clock = time.perf_counter()
    fixed, moving, begun, initial = (
        tree_map(lambda leaf: leaf.to(asked.device), stack(items))
        for items in zip(*(pair.ready() for pair in batch), strict=True)
    )
    grid, stages = fixed.image.grid, asked.stages
    looks = {name: asked.options[name] for name in ("padding", "symmetric") if name in asked.options}
    known = batch[0].start if batch[0].start in STARTS else "header"
    torch.manual_seed(asked.settings.seed)

    def start_of(part: slice) -> Before:
        return before(*tree_take((fixed, moving, begun), part), stages, **looks)

    with notes.hearing() as heard:
        begin = in_parts(start_of, len(batch), width)
        how = starting(begun, known, stages[0].transform, grid)
        if initial is not None:
            how |= {"initial": initial, "start": "header"}
        how |= asked.options | ({"stop": Stop(width=width)} if width < len(batch) else {})
        result = register(fixed, moving, stages, **how)
    found = in_parts(lambda part: _numbers(tree_take(result, part), batch[part]), len(batch), width)
    numbers = found | {"value_before": begin.value, "value_after": result.value}
    speed = result.mapping.first_step()
    start, result, numbers = tree_map(lambda leaf: leaf.cpu(), (begin.start, result, numbers))
    columns = {name: values.tolist() for name, values in numbers.items()}
    history = _history(result)
    common = tuple(note.text for note in heard if note.kind is not SpeedWarning)
    seconds = (time.perf_counter() - clock) / len(batch)
    outcomes: list[Outcome] = []
    for place, pair in enumerate(batch):
        code = Status(int(result.status[place]))
        values = {name: finite(column[place]) for name, column in columns.items()}
        values |= {"steps": int(result.steps[place].sum()), "ended": code.name.lower()}
        if code > Status.CONVERGED:
            status = STATUS.get(code, "invalid_input")
            outcomes.append(Outcome(pair, status, code.remedy, values, history=history[place], seconds=seconds))
            continue
        more = common
        if speed is not None and bool(speed[place] > 1):
            remedy = slower(result.mapping.transform, speed[place : place + 1])
            more = *common, f"a velocity is too fast for its squarings, so the inverse is inaccurate: {remedy}"
        origin, one = pair.own(*tree_take((start, result), place))
        outcomes.append(Outcome(pair, OK, "", values, (*pair.notes, *more), history[place], origin, one, seconds))
    return outcomes


def _numbers(result: Registration, batch: Sequence[Loaded]) -> dict[str, Tensor]:
    """How regular the maps are at the fixed voxels, by column, (B,) each."""
    mapping, grid = result.mapping, result.fixed_grid
    if mapping.transform.linear:
        found = torch.linalg.det(mapping.matrix()[..., :-1, :-1])
        folds = (found <= 0).to(found.dtype)
        return {"jac_min": found, "jac_max": found, "folds": folds, "sdlogj": torch.zeros_like(found)}
    field = mapping.displacement(grid)
    if batch[0].lattice is None:
        known = over_batch(fields.statistics, displacement=(field, grid.ndim + 1), grid=(grid, grid.ranks()))
    else:
        known = lattice.statistics(field, [pair.grids[0] for pair in batch])
    return regularity(known)


def _history(result: Registration) -> list[list[list[float]]]:
    """The course of each pair: (level, step, value), level after level, thinned evenly with the first and the last."""
    values = np.concatenate([trace.value.numpy() for trace in result.history], 1)
    places = [(trace.level, step) for trace in result.history for step in range(trace.value.shape[1])]
    found: list[list[list[float]]] = []
    for row in values:
        known = np.flatnonzero(np.isfinite(row))
        if len(known) > COURSE:
            known = known[np.linspace(0, len(known) - 1, COURSE).round().astype(int)]
        found.append([[*places[place], float(f"{row[place]:.6g}")] for place in known.tolist()])
    return found
