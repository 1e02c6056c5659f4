"""Tables as Parquet: what is written is read again, and what is damaged is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnreg.cohort.ledger import Ledger
from fnreg.cohort.manifest import ManifestError, Row, read_manifest
from fnreg.cohort.parquet import parquet_bytes
from fnreg.cohort.study import COLUMNS, Study

pyarrow: Any = pytest.importorskip("pyarrow", reason="needs pyarrow: install the extra cohort")
parquet: Any = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("group=1")  # a name that pyarrow would take for a column and its value
    for name in ("a.nii.gz", "b.nii.gz", "mask.nii.gz"):
        (home / name).write_bytes(b"x")
    columns = {
        "pair_id": [7, 8],
        "fixed": ["a.nii.gz", "a.nii.gz"],
        "moving": ["b.nii.gz", "b.nii.gz"],
        "fixed_mask": ["mask.nii.gz", None],
        "age": [71.5, float("nan")],
    }
    parquet.write_table(pyarrow.table(columns), home / "pairs.parquet")
    return home


def test_a_table_reads_as_csv_does(home: Path) -> None:
    (home / "pairs.csv").write_text(
        "pair_id,fixed,moving,fixed_mask,age\n7,a.nii.gz,b.nii.gz,mask.nii.gz,71.5\n8,a.nii.gz,b.nii.gz,,\n"
    )
    rows = read_manifest(home / "pairs.parquet")
    assert rows == read_manifest(home / "pairs.csv")
    assert [row.pair_id for row in rows] == ["7", "8"] and rows[0].group == ""


def test_other_columns_are_told(home: Path) -> None:
    place = home / "wrong.parquet"
    parquet.write_table(pyarrow.table({"fix": ["a.nii.gz"], "moving": ["b.nii.gz"]}), place)
    with pytest.raises(ManifestError, match="has no column fixed: needed are fixed and moving, and it has fix, moving"):
        read_manifest(place)
    parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["fixed", "moving", "fixed"]), place)
    with pytest.raises(ManifestError, match="columns of the same name: 'fixed'"):
        read_manifest(place)
    parquet.write_table(
        pyarrow.table({"fixed": pyarrow.array([], "string"), "moving": pyarrow.array([], "string")}), place
    )
    with pytest.raises(ManifestError, match="has no rows"):
        read_manifest(place)


@given(data=st.data())
def test_a_damaged_table_is_told_or_reads_the_same(home: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with a byte turned over: never another error; a table with check sums never other rows."""
    rows = [{"fixed": "a.nii.gz", "moving": "b.nii.gz", "age": age} for age in range(5)]
    whole = parquet_bytes(["fixed", "moving", "age"], rows)
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    spoilt = whole[:place] if cut else whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
    (home / "spoilt.parquet").write_bytes(spoilt)
    try:
        found = read_manifest(home / "spoilt.parquet")
    except ManifestError as problem:
        assert str(home) in str(problem)
        return
    assert not cut and len(found) == 5


def test_the_table_of_a_study_is_written_with_types(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"fixed": home / "a.nii.gz", "moving": home / "b.nii.gz"}
    rows = [Row(name, files, extra={"age": "7"}) for name in "abc"]
    study = Study(home / "study", rows, {"transform": "rigid"})
    common = {"status": "ok", "reason": "", "settings_sha": study.sha}
    with Ledger(study.folder) as ledger:
        ledger.append(
            [common | {"pair_id": "a", "value_after": 0.1 + 0.2, "steps": 3, "folds": 0, "history": [[0, 1, 2]]}]
        )
        ledger.append([common | {"pair_id": "b", "value_after": None, "steps": 4, "folds": 0.5}])
    study.write_table()
    found = parquet.read_table(str(study.folder / "pairs.parquet")).to_pydict()
    assert list(found) == (study.folder / "pairs.tsv").read_text().splitlines()[0].split("\t")
    assert set(found) >= set(COLUMNS) and "history" not in found
    assert found["pair_id"] == ["a", "b", "c"] and found["age"] == ["7"] * 3
    assert found["value_after"] == [0.1 + 0.2, None, None]  # to the last bit
    assert found["steps"] == [3, 4, None] and found["folds"] == [0.0, 0.5, None]
    assert found["status"] == ["ok", "ok", "pending"] and found["reason"] == [None] * 3
    before = (study.folder / "pairs.parquet").stat().st_mtime_ns
    study.write_table()
    assert (study.folder / "pairs.parquet").stat().st_mtime_ns == before
    monkeypatch.setattr("fnreg.cohort.study.is_there", lambda: False)
    study.write_table()
    assert not (study.folder / "pairs.parquet").exists()
