"""Images that several pairs have in common, read once.

A template to which thousands of images are registered is one file: it is read for the first pair and kept, as long as
the file is as it was and there is room.  Images are values that nothing changes, so pairs can share them.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fnreg import io, notes
from fnreg.cohort.manifest import Row
from fnreg.image import Image
from fnreg.io.files import Print, add_fingerprints, fingerprints

ROOM = 2**28  # bytes of the images that are kept
SIDES = ("fixed", "moving", "fixed_mask", "moving_mask")


class _Kept(NamedTuple):
    """An image, the fingerprints of the files that it was read from, and what was warned of then."""

    image: Image
    prints: Mapping[str, Print]
    heard: list[notes.Note]

    @property
    def size(self) -> int:
        return self.image.data.numel() * self.image.data.element_size()


def shared_images(rows: Iterable[Row]) -> tuple[Path, ...]:
    """The images and masks that more than one row has."""
    counts = Counter(path for row in rows for path in {row.files[side] for side in SIDES if side in row.files})
    return tuple(path for path, count in counts.items() if count > 1)


class SharedImages:
    """Reads images, and keeps those of `paths`; from any thread.

    paths : of the images that are wanted more than once
    room : bytes of the images that are kept; those that were wanted last stay

    A file is taken to be as it was where its size and the time of its last change are.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import fnreg
    >>> with tempfile.TemporaryDirectory() as home:
    ...     place = Path(home, "a.nii")
    ...     fnreg.io.write_image(place, fnreg.data.digits(9, count=1)[0])
    ...     images = SharedImages([place])
    ...     images.read(place) is images.read(place)
    True
    """

    def __init__(self, paths: Iterable[Path] = (), *, room: int = ROOM) -> None:
        self._room = room
        self._turns = {path: threading.Lock() for path in paths}  # of two threads that want one image the second waits
        self._kept: OrderedDict[Path, _Kept] = OrderedDict()
        self._change = threading.Lock()

    def read(self, path: Path) -> Image:
        """The image as `io.read_image` gives it, with its warnings and its fingerprints; raises what that raises."""
        turn = self._turns.get(path)
        if turn is None or path.is_dir():  # a folder may have more slices than it had
            return io.read_image(path)
        with turn:
            kept = self._get(path)
            if kept is None:
                with fingerprints() as prints, notes.hearing() as heard:
                    image = io.read_image(path)
                kept = _Kept(image, prints, heard)
                self._put(path, kept)
        add_fingerprints(kept.prints)
        for note in kept.heard:
            notes.warn(note.text, note.kind, stacklevel=2)
        return kept.image

    def _get(self, path: Path) -> _Kept | None:
        with self._change:
            kept = self._kept.get(path)
            if kept is not None:
                self._kept.move_to_end(path)
        return kept if kept is not None and _as_it_was(kept.prints) else None

    def _put(self, path: Path, kept: _Kept) -> None:
        with self._change:
            self._kept[path] = kept
            self._kept.move_to_end(path)
            held = sum(one.size for one in self._kept.values())
            while held > self._room:
                held -= self._kept.popitem(last=False)[1].size


def _as_it_was(prints: Mapping[str, Print]) -> bool:
    """Whether files are those that were read, as far as the system tells without reading them."""
    try:
        told = {name: Path(name).stat() for name in prints}
    except OSError:
        return False
    return all((told[name].st_size, told[name].st_mtime_ns) == one[:2] for name, one in prints.items())
