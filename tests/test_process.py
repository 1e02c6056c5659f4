"""The process of the command line: memory that is kept, threads that sleep, and what the environment says stands."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource
from fnreg.process import prepare
prepare()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**26)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), os.environ["THP_MEM_ALLOC_ENABLE"], os.environ["OMP_WAIT_POLICY"])
"""


def told(**environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "THP_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, check=True)
    return done.stdout.decode().split()


def test_the_environment_stands() -> None:
    assert told()[1:] == ["1", "PASSIVE"]
    assert told(THP_MEM_ALLOC_ENABLE="0", OMP_WAIT_POLICY="ACTIVE")[1:] == ["0", "ACTIVE"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept through glibc's mallopt")
def test_memory_that_is_freed_is_kept() -> None:
    kept, released = int(told()[0]), int(told(MALLOC_TRIM_THRESHOLD_="131072")[0])
    assert kept < 16 < 32 <= released  # pages of 2 MiB would be 32 faults, of 4 KiB 16,384
