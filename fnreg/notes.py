"""What fnreg warns of, so that a thread can hear its own: the filters of `warnings` are those of the whole process.

>>> from fnreg import notes
>>> with notes.hearing() as heard:
...     notes.warn("the image is small")
>>> [note.text for note in heard]
['the image is small']
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Note(NamedTuple):
    """text : what a warning says; kind : its class"""

    text: str
    kind: type[Warning]


_heard: ContextVar[list[Note] | None] = ContextVar("heard", default=None)


def warn(text: str, kind: type[Warning] = UserWarning, *, stacklevel: int = 1) -> None:
    """Warn, or tell who is hearing in this thread."""
    heard = _heard.get()
    if heard is None:
        warnings.warn(text, kind, stacklevel=stacklevel + 1)
    else:
        heard.append(Note(text, kind))


@contextmanager
def hearing() -> Generator[list[Note]]:
    """A list to which goes what this thread is warned of by fnreg, in place of a warning."""
    heard: list[Note] = []
    before = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(before)
