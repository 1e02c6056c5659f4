"""How much memory there is, and how much a piece of work took."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

PAGE = resource.getpagesize()
GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LACKING = ("not enough memory", "can't allocate memory", "out of memory")  # of torch's errors on CPU and CUDA


def free(device: torch.device) -> int:
    """Bytes that a device, or the machine, has to give; within a container or a job what that may still take."""
    if device.type == "cuda":  # what torch keeps of earlier tensors is to be had too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    found = 2**33  # where nothing tells
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([found, *(left for group in _groups() if (left := _left(group)) is not None)])


def _groups() -> list[Path]:
    """The control groups of this process, its own and those around it; none where there are no such."""
    try:
        own = next(line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    inner = GROUPS / own.strip("/")
    return [inner, *(group for group in inner.parents if group.is_relative_to(GROUPS))]


def _left(group: Path) -> int | None:
    """Bytes that a control group may still take; None where it has no limit.

    What the system keeps of files counts as used, but is given back when it is needed: a run that has read many images
    would else be told that there is no memory.
    """
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        kept = sum(int(line[1]) for line in lines if line[:1] in (["active_file"], ["inactive_file"]))
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - max(0, used - kept))


def is_lack(problem: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in _LACKING)


class Peak:
    """What is done within `with` took `taken` bytes at most, beyond what was there before.

    On a CPU this is known, `risen`, only where the process became larger than it has ever been: else it is 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.taken, self._before = device, 0, 0

    @property
    def risen(self) -> bool:
        """Whether `taken` is known."""
        return self.taken > 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before, self._highest = int(torch.cuda.memory_allocated(self.device)), 0
        else:
            self._before, self._highest = _resident(), _highest()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cuda = self.device.type == "cuda"
        after = int(torch.cuda.max_memory_allocated(self.device)) if cuda else _highest()
        self.taken = max(0, after - self._before) if after > self._highest else 0


def _highest() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return _highest()
