"""Progress of registrations: a bar on a terminal, silence in a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fnreg.levels import Event


def fraction(event: Event) -> float:
    """How far a registration has come, 0..1: stages count alike, and so do the levels of each."""
    level = (event.levels - 1 - event.level + event.step / max(event.steps, 1)) / event.levels
    return min(1.0, (event.stage + level) / event.stages)


class Bars:
    """One progress bar per registration, below each other, on standard error.

    shown : None shows them on a terminal only

    >>> with Bars(shown=False) as bars:
    ...     report = bars.add("rigid")  # a callback for register(..., progress=report)
    """

    def __init__(self, shown: bool | None = None) -> None:
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description:<34}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._progress.start()
        return self

    def add(self, name: str) -> Callable[[Event], None] | None:
        """A callback that moves a new bar of this name; the bar before counts as full.  None where none is shown."""
        self.finish()
        if self._progress is None:
            return None
        progress = self._progress
        task = self._task = progress.add_task(name, total=1.0, told="")

        def report(event: Event) -> None:
            progress.update(task, completed=fraction(event))
            if math.isfinite(event.value):  # it is not where no pair is left
                pairs = f", {event.active} of {event.pairs} pairs left" if event.pairs > 1 else ""
                progress.update(task, told=f"level {event.level}, value {event.value:.4g}{pairs}")

        return report

    def finish(self) -> None:
        """Fill the last bar: a registration may end before all of its steps."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=1.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        if self._progress is not None:
            self._progress.stop()
