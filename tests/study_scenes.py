"""Studies for tests: a few small pairs that are registered one by one, and thousands of rows without images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from scenes import scene, smooth_mapping

import fnreg
from fnreg.cohort.ledger import Ledger
from fnreg.cohort.manifest import Row
from fnreg.cohort.study import Study, fingerprint
from fnreg.io import write_image, write_transform

SETTINGS: dict[str, Any] = {"transform": "ffd:stride=4", "levels": 2, "steps": "6", "start": "header", "save": "params"}
HOSTILE = "<script>document.title='hacked'</script>&\"'</script><img src=x onerror=alert(1)>"
OUTCOMES = ("ok", "warn", "failed", "diverged", "pending", "ok")


def write_pairs(folder: Path, count: int, dimension: int) -> list[Row]:
    """Images of the scene, seen straight and through smooth maps."""
    folder.mkdir(parents=True)
    suffix = "png" if dimension == 2 else "nii.gz"
    fixed = folder / f"fixed.{suffix}"
    whole = scene(dimension, spacing=0.5, grow=12 if dimension == 2 else 6, dtype=torch.float32)
    write_image(fixed, whole)
    rows: list[Row] = []
    for number in range(count):
        moving = folder / f"moving-{number}.{suffix}"
        mapping = smooth_mapping(fnreg.Displacement(), whole.grid, number, 1.5)
        write_image(moving, fnreg.warp(whole, mapping, padding="border"))
        rows.append(Row(f"pair-{number}", {"fixed": fixed, "moving": moving}, "site-1", {"reader": HOSTILE}))
    return rows


def make_study(folder: Path, *, count: int = len(OUTCOMES), dimension: int = 2) -> Study:
    """A study, as an engine leaves it, of pairs with each of `OUTCOMES` in turn; folder / "images" has its images.

    The pair that failed has a moving image that is damaged, the one that diverged has no transform.
    """
    rows = write_pairs(folder / "images", count, dimension)
    study = Study(folder / "study", rows, SETTINGS)
    with Ledger(study.folder) as ledger:
        for number, row in enumerate(rows):
            outcome = OUTCOMES[number % len(OUTCOMES)]
            if outcome != "pending":
                ledger.append([_record(study, row, outcome)])
    study.write_table()
    return study


def _record(study: Study, row: Row, outcome: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "pair_id": row.pair_id, "status": outcome, "settings_sha": study.sha, "attempts": 1, "seconds": 0.25,
        "inputs": {str(path): fingerprint(path) for path in row.files.values()}, "warnings": [], "history": [],
        "fixed": str(row.files["fixed"]), "moving": str(row.files["moving"]), "device": "cpu",
    }  # fmt: skip
    if outcome == "failed":
        row.files["moving"].write_bytes(b"no image")
        return found | {"reason": f"moving cannot be read, {HOSTILE}"}
    fixed, moving = (fnreg.io.read_image(row.files[side]).normalize() for side in ("fixed", "moving"))
    result = fnreg.register(fixed, moving, fnreg.FFD(stride=4), levels=2, steps=6, stop=None)
    history = [[t.level, k, float(v)] for t in result.history for k, v in enumerate(t.value)]
    found |= {"history": history, "steps": int(result.steps.sum()), "value_before": history[0][2]}
    if outcome == "diverged":
        return found | {"reason": "the registration diverged: give a smaller learning rate"}
    place = study.folder / "pairs" / row.pair_id
    place.mkdir(parents=True)
    write_transform(place / "transform.safetensors", result.mapping)
    told = fnreg.fields.statistics(result.mapping.displacement(fixed.grid), fixed.grid)
    found |= {
        "transform": f"pairs/{row.pair_id}/transform.safetensors", "value_after": float(result.value),
        "jac_min": float(told.min_determinant), "jac_max": float(told.max_determinant), "folds": float(told.folds),
        "sdlogj": float(told.sd_log_determinant),
    }  # fmt: skip
    return found | ({"warnings": [f"look at it, {HOSTILE}"], "reason": "look at it"} if outcome == "warn" else {})


def many_pairs(folder: Path, count: int) -> Study:
    """A study of so many rows that all name two files; each has a course of 100 steps, its Dice is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fixed.png", "moving.png"):
        (folder / name).write_bytes(b"an image")
    files = {"fixed": folder / "fixed.png", "moving": folder / "moving.png"}
    rows = [Row(f"pair-{number:05d}", files, f"site-{number % 7}") for number in range(count)]
    study = Study(folder / "study", rows, SETTINGS)
    with Ledger(study.folder) as ledger:
        ledger.append(_many(study, number, row, count) for number, row in enumerate(rows))
    return study


def _many(study: Study, number: int, row: Row, count: int) -> dict[str, Any]:
    history = [[2 - k // 34, k % 34, math.exp(-k / 30) + 1e-3 * (number % 13)] for k in range(100)]
    status = "failed" if number % 100 == 7 else "warn" if number % 50 == 3 else "ok"
    values = {
        "value_before": 1.0, "value_after": history[-1][2], "dice_mean": number / count, "tre_mean": 1 + number % 17,
        "folds": 1e-3 * (number % 11), "jac_min": 0.4, "jac_max": 1.9, "seconds": 0.1 + number % 23 / 50, "steps": 100,
    }  # fmt: skip
    return {
        "pair_id": row.pair_id, "status": status, "reason": "no overlap" if status == "failed" else "",
        "settings_sha": study.sha, "history": history, "warnings": ["folds"] if status == "warn" else [],
        **({} if status == "failed" else values),
    }  # fmt: skip
