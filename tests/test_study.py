"""The folder of a study: what is left to do, whatever happened, and a row for every pair."""

from __future__ import annotations

import csv
import io
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fnreg.cohort.ledger import Ledger
from fnreg.cohort.manifest import Row, read_manifest
from fnreg.cohort.study import (
    COLUMNS,
    STATUSES,
    Study,
    StudyError,
    command,
    fingerprint,
    read_settings,
    toml,
    unchanged,
)
from fnreg.settings import Settings
from fnreg.specs import SettingsError

SETTINGS = {"transform": "rigid", "levels": 3, "symmetric": False, "note": 'a "b" ü\t\\'}


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    (tmp_path / "pairs.csv").write_text("fixed,moving,age\na.png,b.png,7\na.png,c.png,8\n")
    return read_manifest(tmp_path / "pairs.csv")


def record(study: Study, row: Row, **more: Any) -> dict[str, Any]:
    inputs = {str(path): fingerprint(path) for path in row.files.values()}
    return {"pair_id": row.pair_id, "status": "ok", "settings_sha": study.sha, "inputs": inputs} | more


def test_what_is_done_is_not_done_again(rows: list[Row], tmp_path: Path) -> None:
    study = Study(tmp_path / "study", rows, SETTINGS)
    assert study.todo() == rows
    with Ledger(study.folder) as ledger:
        ledger.append([record(study, rows[0])])
    again = Study(tmp_path / "study", rows, dict(reversed(SETTINGS.items())))
    assert again.todo() == rows[1:]
    with Ledger(study.folder) as ledger:
        ledger.append([record(study, rows[1], status="diverged", reason="too far")])
    assert again.todo() == []
    assert again.todo(retry_failed=True) == rows[1:]


def test_changed_inputs_are_noticed_by_their_content(rows: list[Row], tmp_path: Path) -> None:
    study = Study(tmp_path / "study", rows, SETTINGS)
    with Ledger(study.folder) as ledger:
        ledger.append([record(study, row) for row in rows])
    os.utime(tmp_path / "b.png", ns=(1, 1))  # touched, but the same
    assert study.todo() == []
    (tmp_path / "b.png").write_bytes(b"x")
    assert study.todo() == rows[:1]
    (tmp_path / "c.png").write_bytes(b"longer")
    assert study.todo() == rows
    (tmp_path / "a.png").unlink()
    assert study.todo() == rows


def test_a_file_that_was_touched_is_read_once_for_all_pairs(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, read = Study(tmp_path / "study", rows, SETTINGS), list[str]()
    with Ledger(study.folder) as ledger:
        ledger.append([record(study, row) for row in rows])
    os.utime(tmp_path / "a.png", ns=(5, 5))

    def counted(path: Path) -> Any:
        read.append(path.name)
        return fingerprint(path)

    monkeypatch.setattr("fnreg.cohort.study.fingerprint", counted)
    assert study.todo() == [] and read == ["a.png"]
    (tmp_path / "a.png").write_bytes(b"A")  # as long as it was
    assert study.todo() == rows and read == ["a.png"] * 2


def test_another_file_is_a_change(rows: list[Row], tmp_path: Path) -> None:
    inputs = record(Study(tmp_path / "study", rows, SETTINGS), rows[0])["inputs"]
    assert unchanged(rows[0], inputs)
    assert not unchanged(Row(rows[0].pair_id, dict(rows[0].files) | {"fixed_mask": tmp_path / "c.png"}), inputs)


def test_other_settings_and_other_folders_are_refused(rows: list[Row], tmp_path: Path) -> None:
    Study(tmp_path / "study", rows, SETTINGS)
    with pytest.raises(StudyError, match="levels was 3 and is 4"):
        Study(tmp_path / "study", rows, SETTINGS | {"levels": 4})
    with pytest.raises(StudyError, match="is a file"):
        Study(tmp_path / "a.png", rows, SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(StudyError, match=r"thesis\.tex"):
        Study(tmp_path / "other", rows, SETTINGS)
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["thesis.tex"]
    (tmp_path / "study" / "settings.toml").write_text("levels = ")
    with pytest.raises(StudyError, match="has no settings"):
        Study(tmp_path / "study", rows, SETTINGS)


def test_a_table_may_grow_and_shrink_but_not_become_another(rows: list[Row], tmp_path: Path) -> None:
    Study(tmp_path / "study", rows[:1], SETTINGS)
    Study(tmp_path / "study", rows, SETTINGS)
    Study(tmp_path / "study", rows[1:], SETTINGS)
    before = (tmp_path / "study" / "manifest.tsv").read_bytes()
    with pytest.raises(StudyError, match="is a study of 1 other pairs, such as c-to-a, and of none of these"):
        Study(tmp_path / "study", [Row("new", rows[0].files)], SETTINGS)
    assert (tmp_path / "study" / "manifest.tsv").read_bytes() == before
    (tmp_path / "study" / "manifest.tsv").unlink()
    Study(tmp_path / "study", [Row("new", rows[0].files)], SETTINGS)


def test_text_is_told_as_it_is(rows: list[Row], tmp_path: Path) -> None:
    """But for what would break a line of the table."""
    study = Study(
        tmp_path / "study", [Row("a", rows[0].files, extra={"note": "two  blanks,\t\r\nä 'quoted'"})], SETTINGS
    )
    study.write_table()
    assert "\ttwo  blanks, ä 'quoted'" in (study.folder / "pairs.tsv").read_text(encoding="utf-8")


def test_the_command_of_an_id_that_looks_like_an_option(rows: list[Row]) -> None:
    assert command({"pair_id": "-v", "fixed": "a.png", "moving": "b.png"}, {}).endswith(" a.png b.png --output=-v")


def test_the_command_gives_a_space_to_points_that_need_one() -> None:
    """Of other pairs `fnreg register` refuses it."""
    row, settings = {"pair_id": "a", "fixed": "a.nii", "moving": "b.nii"}, {"space": "RAS"}
    points = {"fixed_points": "a.csv", "moving_points": "b.fcsv"}
    assert "--space" not in command(row, settings)
    assert "--space" not in command(row | {"fixed_points": "a.mrk.json", "moving_points": "b.fcsv"}, settings)
    assert " --space RAS " in command(row | points, settings)
    assert "--space" not in command(row | points, {"space": ""})


def test_a_start_whose_name_no_settings_can_hold_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"start is 'a-\\udcff\.tfm', which is not UTF-8: give the file another name"
    ):
        Settings(start="a-\udcff.tfm").check()
    Settings(start="ä.tfm").check()


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(toml(SETTINGS), encoding="utf-8")
    assert read_settings(tmp_path) == SETTINGS


def test_a_row_for_every_pair_whatever_happened_to_it(rows: list[Row], tmp_path: Path) -> None:
    study = Study(tmp_path / "study", rows, SETTINGS)
    with Ledger(study.folder) as ledger:
        ledger.append([record(study, rows[0], value_after=0.12345678901, reason="two\nlines\there", dice_3=float("1"))])
    study.write_table()
    table = list(csv.DictReader(io.StringIO((study.folder / "pairs.tsv").read_text()), delimiter="\t"))
    assert [row["pair_id"] for row in table] == [row.pair_id for row in rows]
    assert [row["status"] for row in table] == ["ok", "pending"]
    assert table[0]["value_after"] == "0.12345679"
    assert table[0]["reason"] == "two lines here"
    assert table[0]["folds"] == table[1]["value_after"] == "n/a"
    assert [row["age"] for row in table] == ["7", "8"]
    assert set(COLUMNS) <= set(table[0]) == set(json.loads((study.folder / "pairs.json").read_text()))
    assert "inputs" not in table[0]
    assert set(row["status"] for row in table) <= set(STATUSES)


@given(st.text())
@example('\U0001f9e0\x7f\u2028\x00"\\\n')
def test_any_text_comes_back_from_settings(text: str) -> None:
    assert tomllib.loads(toml({"start": text})) == {"start": text}
