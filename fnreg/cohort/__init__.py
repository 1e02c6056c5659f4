"""Data sets: tables of pairs in, a ledger and a table of results out.

`run` registers the pairs of a table in batches and yields what becomes of each; a study that was interrupted goes on
where it was.  Names are loaded when they are first used: a table is checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fnreg.cohort.cluster import ClusterError as ClusterError
    from fnreg.cohort.engine import run as run
    from fnreg.cohort.ledger import read_ledger as read_ledger
    from fnreg.cohort.manifest import ManifestError as ManifestError
    from fnreg.cohort.manifest import Row as Row
    from fnreg.cohort.manifest import all_pairs as all_pairs
    from fnreg.cohort.manifest import all_to as all_to
    from fnreg.cohort.manifest import find_bids as find_bids
    from fnreg.cohort.manifest import find_images as find_images
    from fnreg.cohort.manifest import read_manifest as read_manifest
    from fnreg.cohort.study import Study as Study
    from fnreg.cohort.study import StudyError as StudyError
    from fnreg.cohort.work import Progress as Progress

_HOME = {
    "cluster": ("ClusterError",),
    "engine": ("run",),
    "ledger": ("read_ledger",),
    "manifest": ("ManifestError", "Row", "all_pairs", "all_to", "find_bids", "find_images", "read_manifest"),
    "study": ("Study", "StudyError"),
    "work": ("Progress",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"fnreg.cohort.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fnreg.cohort' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
