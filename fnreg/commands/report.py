"""The command report: the page of a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fnreg.commands.base import OK, Json, Verbose, app, option
from fnreg.settings import DRAWN
from fnreg.specs import choose

Figures = Annotated[
    str,
    option(
        "Whose pictures the report draws where they are not there yet: of the worst hundred pairs, of all, or none. "
        "[default: worst]"
    ),
]


@app.command
def report(
    study: Path,
    /,
    *,
    figures: Figures = "worst",
    as_json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Write report.html into the folder of a study: what happened to each pair, worst first, for any browser.

    The run may still be going on. Keep the page in its folder: it shows pictures that lie there.

    Parameters
    ----------
    study
        The folder that a run has written.
    """
    choose("figures", figures, DRAWN)
    from fnreg.cohort.report import write_report

    found = write_report(study, figures=figures, progress=drawn())
    for note in found["notes"]:
        print(f"fnreg: warning: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=2))
        return OK
    statuses = ", ".join(f"{count} {name}" for name, count in found["statuses"].items())
    print(f"{found['report']}: {found['pairs']} pairs, {statuses}")
    if found["not_drawn"]:
        pair, reason = next(iter(found["not_drawn"].items()))
        print(f"no pictures of {len(found['not_drawn'])} pairs or more, such as {pair}: {reason}")
    return OK


def drawn() -> Callable[[int, int], None] | None:
    """What tells how many pictures are drawn, on a terminal."""
    return _told if sys.stderr.isatty() else None


def _told(done: int, count: int) -> None:
    print(f"\rpictures of {done} of {count} pairs", end="\n" if done == count else "", file=sys.stderr, flush=True)
