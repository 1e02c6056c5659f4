"""Which pairs go through `register` together, and how many of them.

Pairs of equal shapes share a batch.  How many fit is measured: the first batch of a shape is one pair; what it takes
says how many fit in a share of the memory that is free.  A batch that does not fit all the same is halved, and larger
ones of that shape are not tried again.

Of a large batch a part runs side by side, and on each level those that wait take the places of those that are done.
How much of the memory is of those that run and how much of all is not known: the next batch is taken to need more by
whichever of the two grows more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import torch

from fnreg.cohort.load import Loaded
from fnreg.cohort.memory import Peak, free
from fnreg.specs import SettingsError

SHARE = 0.5  # of the free memory that a batch may take
LEAST = 100  # bytes per voxel that a registration takes at least, whatever was measured
GROWTH = 16  # the next batch of a shape has at most so many times the pairs of the largest so far
MOST = 512  # pairs in a batch: more save no time, and a process that dies loses a batch
WAITING = 2**28  # bytes of pairs that may wait for others of their shape
VOXELS = 2**22  # of both images of all pairs that run side by side, on a CPU: more fall out of its caches
HELD = 2**29  # likewise of a batch on any device, 2 GB: the host holds up to four, computed, complete and being read
BUSY = 2**20  # of those that run, fewer do not keep a device busy: each step takes its time whatever its size
WAVES = 4  # pairs in a batch for each that runs: so many are hardly done all at once


class _Measured(NamedTuple):
    """Bytes that the largest batch took, of so many voxels in all and so many of pairs that ran side by side."""

    taken: int = 0
    voxels: int = 1
    beside: int = 1


class Sizes:
    """How many pairs share a batch.

    fixed : the same number for all, where it is given
    refills : whether pairs may wait for others of their batch
    share : of the free memory that a batch may take

    >>> import torch
    >>> from fnreg.cohort.batches import Sizes
    >>> sizes = Sizes(torch.device("cpu"), fixed=8)
    >>> sizes.of("shape", voxels=2 * 28 * 28)
    8
    >>> sizes.lacked("shape", 8)  # it did not fit
    >>> sizes.of("shape", voxels=2 * 28 * 28)
    4
    """

    def __init__(
        self, device: torch.device, *, fixed: int | None = None, refills: bool = True, share: float = SHARE
    ) -> None:
        if fixed is not None and fixed < 1:
            raise SettingsError(f"batch size is {fixed}: expected at least 1, or none to choose it by the memory")
        self.device, self.fixed, self.share = device, fixed, share
        self.refills = refills and fixed is None
        self.window = 1  # pairs in the last batch that was asked for
        self._limit: dict[Hashable, int] = {}  # of shapes of which more did not fit
        self._fitted: dict[Hashable, int] = {}  # the largest batch so far
        self._measured = _Measured()

    def of(self, key: Hashable, voxels: int) -> int:
        """Pairs in the next batch of a shape with so many voxels in both images of a pair."""
        self.window = self._of(key, voxels)
        return self.window

    def _of(self, key: Hashable, voxels: int) -> int:
        limit = self._limit.get(key, MOST if self.fixed is None else self.fixed)
        if self.fixed is not None:
            return limit
        fitted = self._fitted.get(key, 0)
        if not fitted:
            return 1
        limit = min(limit, GROWTH * fitted, max(1, HELD // voxels))
        if self.device.type == "cpu":
            width = VOXELS // voxels
            limit = min(limit, WAVES * width if self.refills and width >= WAVES else width)
        room = self.share * free(self.device)
        return max(1, bisect_right(range(1, limit + 1), room, key=lambda pairs: self._need(pairs, voxels)))

    def _need(self, pairs: int, voxels: int) -> float:
        """Bytes of a batch, as far as it is known."""
        taken, of_all, beside = self._measured
        whole = pairs * voxels
        return max(LEAST * whole, taken * max(whole / of_all, self.width(pairs, voxels) * voxels / beside))

    def width(self, pairs: int, voxels: int) -> int:
        """How many of a batch run side by side: of a larger batch no fewer."""
        return max(-(-pairs // WAVES), min(pairs, max(WAVES, BUSY // voxels))) if self.refills else pairs

    def fitted(self, key: Hashable, pairs: int, voxels: int, peak: Peak) -> None:
        """A batch of pairs with so many voxels each has run."""
        self._fitted[key] = max(pairs, self._fitted.get(key, 0))
        # Of a small batch most is taken by what is there once; so the largest one that was measured counts.  It takes
        # no less than those before: what a process keeps of their memory is there already when it begins.
        if peak.risen and pairs * voxels >= self._measured.voxels:
            beside = self.width(pairs, voxels) * voxels
            self._measured = _Measured(max(peak.taken, self._measured.taken), pairs * voxels, beside)

    def lacked(self, key: Hashable, pairs: int) -> None:
        """A batch of so many pairs did not fit."""
        self._limit[key] = max(1, pairs // 2)


class Buckets:
    """Pairs that wait for others of their shape."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.held = sizes, 0
        self._bytes = 0
        self._waiting: OrderedDict[Hashable, list[Loaded]] = OrderedDict()
        self._wanted: dict[Hashable, int] = {}  # of each: to ask what is free takes longer than to read a small pair

    def add(self, pair: Loaded) -> list[Loaded] | None:
        """Let a pair wait; the batch that it completes, where it does."""
        waiting = self._waiting.setdefault(pair.key, [])
        waiting.append(pair)
        self.held += 1
        self._bytes += _bytes(pair)
        if len(waiting) >= self._wanted.get(pair.key, 1):
            self._wanted[pair.key] = self.sizes.of(pair.key, pair.voxels)
        return self._take(pair.key) if len(waiting) >= self._wanted[pair.key] else None

    @property
    def full(self) -> bool:
        """Whether more of other shapes is not to wait."""
        return self._bytes > WAITING and self.held > self.sizes.window

    def take(self) -> list[Loaded] | None:
        """The fullest of what waits, as a batch that is not full; None where nothing waits."""
        if not self._waiting:
            return None
        return self._take(max(self._waiting, key=lambda key: len(self._waiting[key])))

    def _take(self, key: Hashable) -> list[Loaded]:
        waiting = self._waiting[key]
        size = self.sizes.of(key, waiting[0].voxels)
        batch, self._waiting[key] = waiting[:size], waiting[size:]
        self._wanted.pop(key, None)
        if not self._waiting[key]:
            del self._waiting[key]
        self.held -= len(batch)
        self._bytes -= sum(map(_bytes, batch))
        return batch


def _bytes(pair: Loaded) -> int:
    return pair.voxels * pair.fixed.image.data.element_size() + 2**14  # and what goes with it
