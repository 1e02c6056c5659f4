"""Tables of pairs: every form reads as the same rows, and all that is wrong is told at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnreg.cohort.manifest import (
    LONGEST,
    ManifestError,
    Row,
    all_pairs,
    all_to,
    checked,
    find_bids,
    find_images,
    read_manifest,
    write_manifest,
)
from fnreg.extras import MissingExtraError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "mask.nii.gz"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def table(home: Path, text: str, name: str = "pairs.csv") -> Path:
    (home / name).write_text(text, encoding="utf-8")
    return home / name


def test_every_form_gives_the_same_rows(home: Path) -> None:
    records = [
        {"pair_id": "one", "fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_mask": "mask.nii.gz", "age": "71"},
        {"pair_id": "two", "fixed": "a.nii.gz", "moving": "c.nii.gz", "fixed_mask": "", "age": ""},
    ]
    names = list(records[0])
    texts = {
        end: "".join(mark.join(line) + "\n" for line in [names, *([r[n] for n in names] for r in records)])
        for end, mark in ((".csv", ","), (".tsv", "\t"))
    }
    texts[".jsonl"] = "".join(json.dumps(record) + "\n" for record in records)
    found = [read_manifest(table(home, text, f"pairs{end}")) for end, text in texts.items()]
    assert found[0] == found[1] == found[2]
    assert [row.pair_id for row in found[0]] == ["one", "two"]
    assert found[0][0].files == {name: home / records[0][name] for name in ("fixed", "moving", "fixed_mask")}
    assert found[0][0].extra == {"age": "71"}
    again = home / "again.tsv"
    again.write_bytes(write_manifest(found[0]))
    assert [row.record() for row in read_manifest(again)] == [row.record() for row in found[0]]


def test_spreadsheets_write_marks_of_byte_order_quotes_and_empty_lines(home: Path) -> None:
    rows = read_manifest(table(home, '\ufefffixed,moving,note\n\na.nii.gz,"b.nii.gz","a, ""b"""\r\n\n'))
    assert [(row.pair_id, row.extra) for row in rows] == [("b-to-a", {"note": 'a, "b"'})]


def test_paths_are_relative_to_the_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "sub").mkdir()
    monkeypatch.chdir(home)
    for given_as in (Path("sub/pairs.csv"), home / "sub/pairs.csv"):
        rows = read_manifest(table(home, "fixed,moving\n../a.nii.gz,../b.nii.gz\n", "sub/pairs.csv").relative_to(home))
        assert rows == read_manifest(given_as)
        assert all(path.is_absolute() and path.exists() for path in rows[0].files.values())


def test_rows_without_an_id_are_named_by_their_images_whatever_their_order(home: Path) -> None:
    for folder in ("x", "y"):
        (home / folder).mkdir()
        (home / folder / "b.nii.gz").write_bytes(b"x")
    lines = ["a.nii.gz,b.nii.gz", "a.nii.gz,x/b.nii.gz", "a.nii.gz,c.nii.gz"]

    def names(order: list[str]) -> dict[str, str]:
        rows = read_manifest(table(home, "fixed,moving\n" + "\n".join(order)))
        return {str(row.files["moving"]): row.pair_id for row in rows}

    found = names(lines)
    assert found == names(lines[::-1])
    assert found[str(home / "c.nii.gz")] == "c-to-a"
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no rows"),
        ("fixed,moving\n", "has no rows"),
        (
            "fixed,moved\na.nii.gz,b.nii.gz\n",
            "has no column moving: needed are fixed and moving, and it has fixed, moved",
        ),
        ("fixed,moving\na.nii.gz\n", "line 2: 1 fields for 2 columns"),
        ("fixed,fixed\na.nii.gz,b.nii.gz\n", "columns of the same name"),
        ("fixed,moving\na.nii.gz,\n", "row 2: moving is empty"),
        ("fixed,moving\na.nii.gz,lost.nii.gz\n", "row 2: moving .*lost.nii.gz does not exist"),
        ('fixed,moving\n"a.nii.gz,b.nii.gz\n', "is damaged"),
    ],
)
def test_bad_tables(home: Path, text: str, told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        read_manifest(table(home, text))


def test_other_bad_tables(home: Path) -> None:
    for name, text, told in (
        ("pairs.jsonl", '{"fixed": "a.nii.gz"', "line 1 is not JSON"),
        ("pairs.jsonl", "[1]", "line 1: expected an object"),
        ("pairs.jsonl", "\n\n" + "[" * 100_000, "line 3 is not JSON"),
        ("pairs.xlsx", "", "ends in '.xlsx': readable are .csv"),
    ):
        with pytest.raises(ManifestError, match=re.escape(told)):
            read_manifest(table(home, text, name))
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(home / "none.csv")
    (home / "folder.csv").mkdir()
    with pytest.raises(ManifestError, match="is a folder"):
        read_manifest(home / "folder.csv")
    (home / "latin.csv").write_bytes("fixed,moving\n\xe9,b\n".encode("latin-1"))
    with pytest.raises(ManifestError, match="not text in UTF-8"):
        read_manifest(home / "latin.csv")
    (home / "pairs.parquet").write_bytes(b"PAR1 no")
    with pytest.raises((ManifestError, MissingExtraError), match=r"damaged|fnreg\[cohort\]"):
        read_manifest(home / "pairs.parquet")


def test_rows_are_counted_as_editors_do(home: Path) -> None:
    """Lines that are empty, or of a spreadsheet's empty cells, are no rows, but they count."""
    text = 'fixed,moving,note\n\na.nii.gz,b.nii.gz,"two\nlines"\n,,\na.nii.gz,lost.nii.gz,\n'
    with pytest.raises(ManifestError, match=r"row 6: moving .*lost\.nii\.gz does not exist") as caught:
        read_manifest(table(home, text))
    assert len(caught.value.problems) == 1
    lines = ['{"fixed": "a.nii.gz", "moving": "b.nii.gz", "note": "\u2028"}', "", '{"fixed": "a.nii.gz"}']
    with pytest.raises(ManifestError, match="row 3: moving is empty"):
        read_manifest(table(home, "\n".join(lines), "pairs.jsonl"))


def test_what_is_not_there_is_written_in_several_ways(home: Path) -> None:
    """BIDS has n/a in TSV files, JSON null; pandas stores NaN."""
    for name, text in (
        ("pairs.tsv", "fixed\tmoving\tfixed_mask\tage\na.nii.gz\tb.nii.gz\tn/a\tn/a\n"),
        (
            "pairs.jsonl",
            '{"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_mask": null, "age": NaN, "moving_mask": NaN}',
        ),
    ):
        (row,) = read_manifest(table(home, text, name))
        assert set(row.files) == {"fixed", "moving"} and row.extra == {"age": ""}


def test_columns_of_results_cannot_be_given(home: Path) -> None:
    names = ["status", "folds", "dice_3", "history", "time", "age", "group", "dice_rater"]
    with pytest.raises(ManifestError) as caught:
        read_manifest(table(home, f"fixed,moving,{','.join(names)}\na.nii.gz,b.nii.gz{',1' * len(names)}\n"))
    assert [problem.split()[1] for problem in caught.value.problems] == names[:5]
    assert "give it another name" in str(caught.value)


def test_files_that_cannot_be_looked_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told as the others are; none ends the checks."""
    (home / "shut.nii.gz").write_bytes(b"x")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut.nii.gz" and real(path, mode))
    lines = [f"a.nii.gz,{name}" for name in ("x" * 300 + ".nii", "a.nii.gz/b.nii", "shut.nii.gz", "lost.nii")]
    with pytest.raises(ManifestError) as caught:
        read_manifest(table(home, "fixed,moving\n" + "\n".join(lines)))
    told = ["name too long", "does not exist", "Permission denied", "does not exist"]
    assert len(caught.value.problems) == 4
    assert all(text in problem for text, problem in zip(told, caught.value.problems, strict=True))
    strange = os.fsdecode(os.fsencode(home) + b"/\xff.png")
    Path(strange).write_bytes(b"x")
    with pytest.raises(ManifestError, match="not UTF-8"):
        all_to(home / "a.nii.gz", find_images(str(home / "*.png")))


def test_rows_of_python_are_made_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    row = Row("a", {"fixed": Path("a.nii.gz"), "moving": "sub/../b.nii.gz"})  # type: ignore[dict-item]
    assert checked([row])[0].files == {"fixed": home / "a.nii.gz", "moving": home / "b.nii.gz"}
    numbers = {"age": 7, "weight": float("nan"), "note": None}
    (made,) = checked([Row(7, row.files, extra=numbers)])  # type: ignore[arg-type]
    assert made.pair_id == "7" and made.extra == {"age": "7", "weight": "", "note": ""}
    with pytest.raises(
        ManifestError, match="row 1: fixed_maks is no column of files: those are fixed, moving, fixed_m"
    ):
        checked([Row("a", {**row.files, "fixed_maks": home / "mask.nii.gz"})])


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".hidden", "", "é", "a b", "x" * (LONGEST + 1), "..", "a\x00b", "CON:"]
)
def test_ids_that_are_no_file_names(home: Path, name: str) -> None:
    record = json.dumps({"pair_id": name, "fixed": "a.nii.gz", "moving": "b.nii.gz"})
    if not name:  # gets one
        assert read_manifest(table(home, record, "pairs.jsonl"))[0].pair_id == "b-to-a"
        return
    with pytest.raises(ManifestError, match="is no file name"):
        read_manifest(table(home, record, "pairs.jsonl"))


@given(name=st.text(min_size=1))
def test_an_id_that_is_read_stays_in_its_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("ids")
    (home / "a.png").write_bytes(b"x")
    try:
        rows = read_manifest(
            table(home, json.dumps({"pair_id": name, "fixed": "a.png", "moving": "a.png"}), "pairs.jsonl")
        )
    except ManifestError:
        return
    place = (home / "pairs" / rows[0].pair_id).resolve()
    assert place.parent == home / "pairs"
    place.mkdir(parents=True)


def test_all_problems_are_told_at_once(home: Path) -> None:
    lines = [f"../{n},lost{n}.png,b.nii.gz" for n in range(30)]
    with pytest.raises(ManifestError) as caught:
        read_manifest(table(home, "pair_id,fixed,moving\n" + "\n".join(lines)))
    assert len(caught.value.problems) == 60
    assert "and 40 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


def test_ids_that_differ_by_capitals_only(home: Path) -> None:
    lines = "pair_id,fixed,moving\nA,a.nii.gz,b.nii.gz\na,a.nii.gz,c.nii.gz\n"
    with pytest.raises(ManifestError, match="row 3: id 'a' is that of row 2 too"):
        read_manifest(table(home, lines))


def test_tables_of_images(home: Path) -> None:
    images = [home / name for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")]
    assert [row.pair_id for row in all_to(images[0], images)] == ["b-to-a", "c-to-a"]
    assert sorted(row.pair_id for row in all_pairs([*images, images[0]])) == [
        "a-to-b", "a-to-c", "b-to-a", "b-to-c", "c-to-a", "c-to-b",
    ]  # fmt: skip
    for made in (lambda: all_to(images[0], images[:1]), lambda: all_pairs(images[:1])):
        with pytest.raises(ManifestError, match="two images or more"):
            made()
    with pytest.raises(ManifestError, match="does not exist"):
        all_to(images[0], [home / "lost.nii.gz"])
    assert find_images(str(home / "*.nii.gz"))[:3] == images
    (home / "notes.txt").write_text("no image")
    with pytest.raises(ManifestError, match="no image matches"):
        find_images(str(home / "*.txt"))


def test_the_images_of_a_bids_data_set(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a BIDS data set"):
        find_bids(tmp_path)
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(ManifestError, match="no image that ends in _T1w"):
        find_bids(tmp_path)
    names = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz")
    for name in (
        *names,
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "derivatives/sub-01/anat/x_T1w.nii",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_bids(tmp_path) == [tmp_path / name for name in names]
    assert len(all_pairs(find_bids(tmp_path))) == 2
