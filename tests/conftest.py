"""What every test shares: reproducible randomness, no silent slow loops, real data where it is present."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class _TorchRandom:
    """torch's global generator as Hypothesis seeds and restores it around every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)

# The time of one example says nothing here: the first one compiles, and the cores are shared.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("deep", max_examples=300, deadline=None)
# For .ci/mutants.py: a law that fails need not be told by its simplest example.
_phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("brief", max_examples=5, deadline=None, derandomize=True, phases=_phases)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already share the cores


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session", autouse=True)
def no_vmap_fallback() -> Iterator[None]:
    """An operation without a batching rule raises under vmap, instead of running as a slow loop."""
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(enabled)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same state of torch's global generator."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator of the test's own, seeded."""
    return torch.Generator().manual_seed(seed)


def find_data() -> Path | None:
    """The folder of real images: FNREG_DATA, else the data folder beside the repository, else None."""
    named = os.environ.get("FNREG_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if named and not folder.is_dir():
        raise FileNotFoundError(f"FNREG_DATA names no folder: {named!r}: correct it or unset it")
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images; a test that asks for it is skipped where there is none."""
    folder = find_data()
    if folder is None:
        pytest.skip("no real data: set FNREG_DATA to the folder that holds it")
    return folder
