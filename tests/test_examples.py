"""The examples run, from anywhere, on small inputs, and leave their figures where they are told to."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL: dict[str, list[str]] = {
    "one_pair": ["--steps", "10"],
    "grid_search": ["--starts", "6"],
    "thousand_pairs": ["--count", "20"],
    "free_form": ["--steps", "5"],
    "diffeomorphic": ["--steps", "5"],
    "landmarks_and_labels": ["--steps", "10"],
    "multi_modal": ["--steps", "2"],
    "masks": ["--steps", "10"],
    "circle_to_c": [],
    "learn_penalty": ["--rounds", "1", "--steps", "10"],
    "learn_features": ["--rounds", "2"],
    "amortised": ["--count", "20", "--rounds", "2"],
    "atlas": ["--count", "8", "--rounds", "2", "--steps", "4"],
}
LEARNING = {"learn_penalty", "learn_features", "atlas", "amortised"}  # longer stories
LONG = {"circle_to_c"}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SMALL])
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FNREG_DATA", raising=False)  # on what comes with the package
    monkeypatch.setattr("sys.argv", [str(path), "shown", *SMALL[name]])
    runpy.run_path(str(path), run_name="__main__")
    figures = list((tmp_path / "shown").glob("*.png"))
    assert len(figures) >= 2 and all(figure.stem.startswith(name) for figure in figures)
    assert "shown" in capsys.readouterr().out
    assert len(path.read_text(encoding="utf-8").splitlines()) < (120 if name in LEARNING else 60)
