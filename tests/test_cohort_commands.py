"""fnreg run, status and validate: what they tell, refuse and leave, and with which code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cohort_scenes import leftovers, pairs, whole

from fnreg import Image, cli, cohort, io
from fnreg.cohort.ledger import Ledger
from fnreg.cohort.manifest import Row, write_manifest

SHORT = ["--start", "header", "--levels", "2", "-n", "4"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Three pairs, and a table of them in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    made = pairs(tmp_path, 3)
    (tmp_path / "pairs.tsv").write_bytes(write_manifest(made))
    return made


def refused(capsys: Captured, arguments: list[str], code: int, told: str) -> None:
    """The command ends with this code and one line, and no folder appears."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fnreg: error: ")
    assert all(line.startswith("  ") for line in err.splitlines()[1:])  # a list of what is wrong
    assert told in err
    assert not Path("out").exists()


def test_run_goes_through_a_table_and_then_has_nothing_to_do(rows: list[Row], capsys: Captured) -> None:
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("3 pairs: 3 ok\n") and "a second" in out and "pairs.tsv" in out and err == ""
    whole(Path("out"), rows)
    assert sorted(path.name for path in Path("out").iterdir() if path.name != "pairs.parquet") == [
        "dataset_description.json", "ledger", "manifest.tsv", "pairs", "pairs.json", "pairs.tsv", "report.html",
        "run.json", "settings.toml",
    ]  # fmt: skip
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert cli.main(["status", "out"]) == 0
    assert capsys.readouterr().out.split() == ["study", "out", "pairs", "3", "ok", "3"]
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT, "--set", "similarity=ncc"]) == 3
    assert "similarity was 'mse' and is 'ncc'" in capsys.readouterr().err


def test_what_failed_is_told_and_tried_again_when_asked(rows: list[Row], capsys: Captured) -> None:
    good = rows[1].files["moving"].read_bytes()
    rows[1].files["moving"].write_bytes(good[:-3])
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 1
    out, err = capsys.readouterr()
    assert "2 ok, 1 invalid_input" in out and "errors" in out
    assert err.startswith("fnreg: p001: invalid_input: ") and err.count("\n") == 1
    assert cli.main(["status", "out", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"study": "out", "pairs": 3, "ok": 2, "invalid_input": 1}
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 1
    assert "nothing was left to do" in capsys.readouterr().out
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT, "--retry-failed"]) == 1
    assert "this run     1 pairs" in capsys.readouterr().out
    # The command that errors/ names does what the study did.
    words = Path("out/errors/p001.txt").read_text().splitlines()[-1].split()
    assert words[:2] == ["fnreg", "register"] and cli.main(words[1:]) == 3
    told = capsys.readouterr().err
    rows[1].files["moving"].write_bytes(good)
    assert "damaged or incomplete" in told and cli.main(words[1:]) == 0
    capsys.readouterr()
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    record = cohort.read_ledger("out")["p001"]
    alone = io.read_transform("p001/transform.safetensors")
    there = io.read_transform(Path("out") / record["transform"])
    points = io.read_image(rows[1].files["fixed"]).grid.points()
    assert torch.allclose(alone.map_points(points), there.map_points(points), atol=1e-4)


def test_json(rows: list[Row], capsys: Captured) -> None:
    assert cli.main(["run", "pairs.tsv", "-o", "out", "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("out/run.json").read_text())
    assert cli.main(["validate", "pairs.tsv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs": 3, "fixed": 3, "moving": 3}


def test_pairs_of_images(rows: list[Row], capsys: Captured) -> None:
    Path("more.csv").write_text("fixed,moving,age,fixed_maks\nf0.nii,m0.nii,7,f1.nii\n")
    assert cli.main(["validate", "more.csv"]) == 0
    assert "carried through  age, fixed_maks" in capsys.readouterr().out  # a name that is misspelt is seen
    assert cli.main(["validate", "--all-pairs", "--glob", "f*.nii"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["pairs", "6"]
    assert cli.main(["run", "--all-to", "f0.nii", "--glob", "?[01].nii", "-o", "out", *SHORT]) == 0
    assert set(cohort.read_ledger("out")) == {"f1-to-f0", "m0-to-f0", "m1-to-f0"}
    for number in (1, 2):
        place = Path(f"bids/sub-{number}/anat/sub-{number}_T2w.nii")
        place.parent.mkdir(parents=True)
        io.write_image(place, Image(torch.rand(1, 8, 8)))
    Path("bids/dataset_description.json").write_text("{}")
    assert cli.main(["validate", "--all-pairs", "--bids", "bids", "--suffix", "T2w"]) == 0


def test_what_a_study_has_written_is_none_of_its_images(rows: list[Row], capsys: Captured) -> None:
    images = ["--all-to", "f0.nii", "--glob", "**/[fmw][01a]*.nii", "-o", "fresh", "--save", "params+warped"]
    for _ in range(2):
        assert cli.main(["run", *images, *SHORT]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert len(list(Path("fresh").glob("pairs/*/warped.nii"))) == len(cohort.read_ledger("fresh")) == 3


def test_a_report_that_fails_does_not_touch_the_results(
    rows: list[Row], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, code, told in (
        (OSError("no room"), 0, "fnreg: warning: no report was written: no room"),
        (KeyboardInterrupt(), 130, "interrupted, all pairs are done: fnreg report writes the page"),
    ):

        def failing(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("fnreg.cohort.report.write_report", failing)
        assert cli.main(["run", "pairs.tsv", "-o", f"out{code}", *SHORT]) == code
        assert told in capsys.readouterr().err
        whole(Path(f"out{code}"), rows)


def test_parts(rows: list[Row], capsys: Captured) -> None:
    for part in ("1/2", "2/2"):
        assert cli.main(["run", "pairs.tsv", "-o", "out", "--shard", part, *SHORT]) == 0
    whole(Path("out"), rows)
    assert len(list(Path("out/ledger").iterdir())) == 2


def test_what_is_refused(rows: list[Row], capsys: Captured) -> None:
    Path("empty.csv").write_text("")
    Path("columns.csv").write_text("fix,moving\nf0.nii,m0.nii\n")
    Path("lost.csv").write_text("fixed,moving\nf0.nii,m0.nii\nf0.nii,x.nii\nf0.nii,y.nii\n")
    Path("settings.toml").write_text("level = 3\n")
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    run = ["run", "-o", "out", *SHORT]
    refused(capsys, ["run", "empty.csv", *run[1:]], 3, "has no rows")
    refused(capsys, ["run", "columns.csv", *run[1:]], 3, "no column fixed")
    refused(capsys, ["run", "lost.csv", *run[1:]], 3, "x.nii does not exist")
    refused(capsys, ["validate", "lost.csv"], 3, "y.nii does not exist")
    refused(capsys, ["validate", "lost.csv"], 3, "\n  row 3: moving")
    refused(capsys, ["run", "none.csv", *run[1:]], 3, "none.csv does not exist")
    refused(capsys, run, 2, "no pairs are given")
    refused(capsys, [*run, "pairs.tsv", "--glob", "*.nii"], 2, "give one of the two")
    refused(capsys, [*run, "pairs.tsv", "--shard", "0/4"], 2, "shard '0/4'")
    refused(capsys, [*run, "pairs.tsv", "--save", "figures"], 2, "figures")
    refused(capsys, [*run, "pairs.tsv", "--transform", "rigit"], 2, "did you mean rigid")
    refused(capsys, [*run, "pairs.tsv", "--space", "LPI"], 2, "unknown space")
    refused(capsys, [*run, "pairs.tsv", "--batch-size", "0"], 2, "batch size is 0")
    refused(capsys, ["run", "pairs.tsv", "-o", "out", "--start", "no.tfm"], 3, "no.tfm does not exist")
    refused(capsys, [*run, "pairs.tsv", "--device", "cuda:77"], 4, "cuda:77")
    refused(capsys, ["run", "pairs.tsv", "-o", "out", "--settings", "settings.toml"], 2, "did you mean levels")
    refused(capsys, ["run", "pairs.tsv", "-o", "other", *SHORT], 3, "holds 'thesis.txt' and no study")
    refused(capsys, ["status", "other"], 3, "holds no study")
    assert [path.name for path in Path("other").iterdir()] == ["thesis.txt"]


def test_a_second_run_is_refused(rows: list[Row], capsys: Captured) -> None:
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    capsys.readouterr()
    with Ledger("out"):
        assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 3
    assert "another run is writing" in capsys.readouterr().err
    assert leftovers(Path("out")) == []


def test_a_settings_file_says_what_is_saved(rows: list[Row]) -> None:
    Path("settings.toml").write_text('save = "xfm"\nlevels = 1\nsteps = 3\nstart = "header"\n')
    assert cli.main(["run", "pairs.tsv", "-o", "out", "--settings", "settings.toml", "--figures", "none"]) == 0
    assert [path.name for path in Path("out/pairs/p000").iterdir()] == ["transform.tfm"]
    assert 'transform = "rigid"\n' in Path("out/settings.toml").read_text()


def test_looking_is_quick(rows: list[Row]) -> None:
    """Neither command needs torch, which takes seconds to load."""
    assert cli.main(["run", "pairs.tsv", "-o", "out", "--figures", "none", *SHORT]) == 0
    for command, told in (
        (["validate", "pairs.tsv"], "3"),
        (["status", "out"], "ok"),
        (["status", "out", "--json"], "ok"),
    ):
        code = (
            f"import sys\nfrom fnreg import cli\nassert cli.main({command}) == 0\n"
            "print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert told in found and found.endswith("set()\n")


def test_a_bar_on_a_terminal(rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    assert "3/3" in capsys.readouterr().err


def test_where_nothing_is_left_the_counts_are_those_of_the_table(rows: list[Row], capsys: Captured) -> None:
    rows[1].files["moving"].write_bytes(b"no image")
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 1
    Path("pairs.tsv").write_bytes(write_manifest([rows[0], rows[2]]))
    capsys.readouterr()
    assert cli.main(["run", "pairs.tsv", "-o", "out", *SHORT]) == 0
    assert capsys.readouterr().out.startswith("2 pairs: 2 ok; nothing was left to do")
    told = json.loads(Path("out/run.json").read_text())
    assert (told["pairs"], told["counts"]) == (2, {"ok": 2}) and told["done"] == 3  # of the run that did the work


def test_a_suffix_without_bids(rows: list[Row], capsys: Captured) -> None:
    for command in (["run", "-o", "out"], ["validate"]):
        refused(capsys, [*command, "pairs.tsv", "--suffix", "T2w"], 2, "--suffix T2w is that of BIDS images")
        refused(capsys, [*command, "--glob", "*.nii", "--all-pairs", "--suffix", "T1w"], 2, "give --bids as well")


@pytest.mark.parametrize("command", [["validate", "none.tsv"], ["status", "none"], ["run", "none.tsv", "-o", "out"]])
def test_refusing_is_quick(rows: list[Row], command: list[str]) -> None:
    code = f"import sys\nfrom fnreg import cli\nassert cli.main({command}) == 3\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
