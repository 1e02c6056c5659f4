"""What a study tells of its pairs: the statuses, the columns of its table, and what its ledger knows beside them.

This module does not import torch: a table is checked, and a study asked how far it is, in no time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable

OK, WARN = "ok", "warn"
DONE = (OK, WARN)
STATUSES = {
    OK: "registered",
    WARN: "registered, but look at it: `reason` says why",
    "invalid_input": "an input could not be used",
    "failed": "the registration ended without a result",
    "diverged": "the registration diverged",
    "crashed": "the process ended while it worked on this pair, twice",
    "pending": "not done yet",
}
COLUMNS = {
    "pair_id": "the id of the pair",
    "status": f"one of {', '.join(STATUSES)}",
    "reason": "why it is not ok, in a sentence",
    "fixed": "the image that stays",
    "moving": "the image that is moved",
    "transform": "the file of the map, from fixed to moving points, in the folder of the study",
    "value_before": "the objective at the start",
    "value_after": "the objective at the end, on the finest level",
    "dice_mean": "mean Dice overlap of the labels, 1 is best",
    "tre_mean": "mean distance of the mapped fixed points from the moving ones, mm",
    "tre_p95": "95th percentile of these distances, mm",
    "jac_min": "smallest determinant of the map's Jacobian matrix at the fixed voxels",
    "jac_max": "largest determinant",
    "folds": "share of the fixed voxels at which the determinant is 0 or less",
    "sdlogj": "standard deviation of the logarithm of the determinant",
    "inverse_mean": "mean distance of the way there and back, mm",
    "steps": "steps taken on all levels",
    "seconds": "time of the batch over its pairs",
    "peak_mb": "highest memory of the process, MB",
    "device": "where it was computed",
    "settings_sha": "SHA-256 of settings.toml",
    "attempts": "how often the pair was begun",
}
OF_RECORDS = ("inputs", "beside", "history", "warnings", "time")  # what the ledger knows and the table does not tell
MORE = {
    "inverse_max": "largest distance of the way there and back, mm",
    "ended": "how the descent ended",
    "tre_max": "largest distance of the mapped fixed points from the moving ones, mm",
    "dice_mean_before": "mean Dice overlap of the labels at the start",
    "tre_mean_before": "mean distance of the points at the start, mm",
}
_OF_LABEL = re.compile(r"dice_\d+\Z")


def tally(statuses: Iterable[str], order: Iterable[str] = STATUSES) -> dict[str, int]:
    """How many there are of each status, in an order; what is unknown comes last.

    >>> tally(["warn", "odd", "ok", "warn"])
    {'ok': 1, 'warn': 2, 'odd': 1}
    """
    found = Counter(statuses)
    known = list(order)
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known))] if found[name]}


def is_result(name: str) -> bool:
    """Whether a column is of the results, or of the ledger, so that the table of pairs cannot have it.

    >>> is_result("folds"), is_result("dice_17"), is_result("age")
    (True, True, False)
    """
    of_pairs = ("pair_id", "fixed", "moving")
    return name not in of_pairs and (
        name in COLUMNS or name in MORE or name in OF_RECORDS or bool(_OF_LABEL.match(name))
    )


def meaning(name: str, given: Container[str]) -> str:
    """What a column holds; given : those of the table of pairs."""
    if name in COLUMNS or name in MORE:
        return COLUMNS.get(name) or MORE[name]
    if name.startswith("dice_") and name not in given:
        return f"Dice overlap of label {name.removeprefix('dice_')}"
    return "of the table of pairs"
