"""What a study says of itself: run.json of the last run, and dataset_description.json, by which BIDS tools know it."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

from fnreg import __version__
from fnreg.cohort.columns import OF_RECORDS, tally
from fnreg.cohort.ledger import read_ledger
from fnreg.cohort.study import Study
from fnreg.io.files import write_bytes

BIDS, RUN = "1.10.0", "run.json"


def counts(study: Study) -> dict[str, int]:
    """How many pairs have each status, in the order of `STATUSES`; those without a record are pending."""
    known = read_ledger(study.folder, without=OF_RECORDS)
    return tally(known.get(row.pair_id, {}).get("status", "pending") for row in study.rows)


def write_description(study: Study) -> None:
    """dataset_description.json: the study is a derivative."""
    told = {
        "Name": "fnreg registrations",
        "BIDSVersion": BIDS,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fnreg", "Version": __version__}],
    }
    path = study.folder / "dataset_description.json"
    if not path.is_file():
        write_bytes(path, (json.dumps(told, indent=2) + "\n").encode())


def write_run(study: Study, told: dict[str, Any]) -> None:
    """run.json: versions, the command, what `told` says, and how many pairs have which status."""
    versions = {name: metadata.version(name) for name in ("torch", "torchopt", "numpy", "safetensors")}
    record = {
        "fnreg": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "argv": sys.argv,
        **told,
        **_how_far(study),
    }
    write_bytes(study.folder / RUN, (json.dumps(record, indent=2) + "\n").encode())


def update_run(study: Study, told: dict[str, Any]) -> None:
    """run.json where nothing was done: it is of the run that did the work, but the table may be another one since.

    One that is not there or cannot be read, as after a power failure, is written anew.
    """
    try:
        record = json.loads((study.folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        write_run(study, told)
    elif (now := record | _how_far(study)) != record:
        write_bytes(study.folder / RUN, (json.dumps(now, indent=2) + "\n").encode())


def _how_far(study: Study) -> dict[str, Any]:
    return {"pairs": len(study.rows), "counts": counts(study)}
