"""Benchmarks can be loaded as the package stands, and count what is infinite and what failed as they say."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_every_benchmark_loads() -> None:
    names = importlib.import_module("benchmarks.__main__").NAMES
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert set(names) <= files
    for name in names:
        assert callable(importlib.import_module(f"benchmarks.{name}").run)


def test_what_is_infinite_or_failed_is_counted_as_told() -> None:
    uncertainty: Any = importlib.import_module("benchmarks.uncertainty")
    inf, nan = math.inf, math.nan
    shapes = [[[1.0, 0.0], [0.0, 4.0]], [[inf, 0.0], [0.0, 1.0]], [[inf, -inf], [-inf, inf]], [[nan, nan], [nan, nan]]]
    covariance = torch.tensor(shapes).double().unsqueeze(1)  # (4, 1, 2, 2)
    errors = torch.tensor([[1.0, 2.0], [50.0, 0.0], [9.0, 9.0], [0.0, 0.0]]).double().unsqueeze(1)
    square = uncertainty.distances(errors, covariance)
    assert_close(square[:, 0], torch.tensor([2.0, 0.0, 0.0, nan]).double(), equal_nan=True)
    assert uncertainty.unbounded(covariance)[:, 0].tolist() == [False, True, True, False]
    assert uncertainty.covered(errors, covariance).tolist() == [0.75]  # what is NaN is not covered
    assert uncertainty.finite_mean(square, covariance) == 2
    assert uncertainty.finite_mean(errors.square().sum(-1), covariance) == 5
    far = torch.tensor([[[2.6, 0.0]]]).double()
    one = covariance[:1]
    assert uncertainty.covered(far, one).tolist() == [0] and uncertainty.covered(far, one, 8).tolist() == [1]


def test_registrations_that_failed_are_not_covered() -> None:
    uncertainty: Any = importlib.import_module("benchmarks.uncertainty")
    lost = torch.full((1, 1, 2), math.nan).double()
    assert uncertainty.covered(lost, torch.eye(2).double()[None, None]).tolist() == [0]
