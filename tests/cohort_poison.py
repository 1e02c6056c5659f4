"""What the workers of a cluster begin with in tests: pairs that are named in a folder beside the study do them harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from fnreg.cohort import solve
from fnreg.cohort.load import Asked, Loaded


def poison(home: Path, pair_id: str, harm: str) -> None:
    """Whoever registers this pair of a study in `home` is killed, meets an error, or takes long."""
    (home / harm).mkdir(exist_ok=True)
    (home / harm / pair_id).touch()


def begin() -> None:
    """Called in each worker."""
    real = solve.solve

    def solved(batch: Sequence[Loaded], asked: Asked, *, width: int) -> list[solve.Outcome]:
        for pair in batch:
            home, name = asked.folder.parent, pair.row.pair_id
            if (home / "kill" / name).is_file():
                os.kill(os.getpid(), signal.SIGKILL)
            if (home / "error" / name).is_file():
                raise TypeError("what a pity")
            if (home / "slow" / name).is_file():
                (home / "pid").write_text(str(os.getpid()))
                time.sleep(30)
        return real(batch, asked, width=width)

    solve.solve = solved
