"""What the process of the command line asks of the system before torch is imported; a library must not do so."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 2**30  # bytes


def prepare() -> None:
    """Ask for huge pages, for threads that sleep while they wait, and to keep memory that is freed.

    Fields are allocated and freed at each step.  From the system they come as pages of zeros, each a fault, which is a
    fifth of the time of a registration of brains; kept by the process they cost its peak a quarter more.  Threads of
    torch wait busily by default and take cores from those of the kernels.  What the environment says already stands;
    where the C library is not glibc its allocator is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, KEPT)
    mallopt(M_TRIM_THRESHOLD, KEPT)
