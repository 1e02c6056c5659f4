"""The report of a study: what it holds, what it refuses, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import BINARY, Browser, Page
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture
from study_scenes import HOSTILE, make_study, many_pairs

import fnreg.extras
from fnreg.cli import main
from fnreg.cohort.album import _key, figures_of
from fnreg.cohort.figures import NAMES
from fnreg.cohort.ledger import Ledger
from fnreg.cohort.report import COURSE, INSIDE, _course, _data, as_script, read_pairs, worst_first, write_report
from fnreg.cohort.study import StudyError

needs_browser = pytest.mark.skipif(BINARY is None, reason="needs Chromium: install Debian's package chromium")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six pairs with its report; nothing changes it."""
    study = make_study(tmp_path_factory.mktemp("made"), dimension=3)
    write_report(study.folder)
    return study.folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 5,000 pairs with its report."""
    study = many_pairs(tmp_path_factory.mktemp("many"), 5000)
    write_report(study.folder, figures="none")
    return study.folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests."""
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


class Elements(HTMLParser):
    """What a page is made of, as a browser reads it: elements, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def page(study: Path) -> str:
    return (study / "report.html").read_text(encoding="utf-8")


def data_of(study: Path, number: int = 0) -> Any:
    return json.loads(Elements(page(study)).scripts[number])


# -- content -------------------------------------------------------------------------------------------------------


def test_a_row_for_every_pair_worst_first(made: Path) -> None:
    data = data_of(made)
    columns = [column["name"] for column in data["columns"]]
    rows = [dict(zip(columns, row, strict=True)) for row in data["rows"]]
    assert [row["status"] for row in rows] == ["failed", "diverged", "warn", "ok", "ok", "pending"]
    values = [row["value_after"] for row in rows if row["status"] == "ok"]
    assert data["measure"] == "value_after"
    assert values == sorted(values, reverse=True)
    assert all(row["reader"] == HOSTILE and row["group"] == "site-1" for row in rows)
    meanings = {column["name"]: column["meaning"] for column in data["columns"]}
    assert all(meanings.values()) and meanings["reader"] == meanings["group"] == "of the table of pairs"
    assert "smallest determinant" in meanings["jac_min"]
    course = dict(zip([row["pair_id"] for row in rows], data["rest"], strict=True))
    assert [level[0] for level in course["pair-0"]["history"]] == [1, 0]
    assert course["pair-0"]["history"][0][1] == [0, 1, 2, 3, 4, 5]
    assert course["pair-1"]["warnings"] == [f"look at it, {HOSTILE}"]
    assert course["pair-0"]["pictures"] == list(NAMES)
    assert "is not a NIfTI file" in course["pair-2"]["why"]
    assert data["settings"]["transform"] == "ffd:stride=4"


def test_the_worst_have_their_pictures_inside(made: Path) -> None:
    inside = data_of(made, 1)
    assert sorted(inside) == ["pair-0", "pair-1", "pair-3", "pair-5"]
    for name, content in inside["pair-0"].items():
        file = made / "pairs" / "pair-0" / "figures" / name
        assert base64.b64decode(content) == file.read_bytes()


def test_only_the_worst_hundred_are_inside(tmp_path: Path) -> None:
    study = many_pairs(tmp_path, INSIDE + 20)
    for row, record in read_pairs(study.folder):  # pictures that are there already
        pair = study.folder / "pairs" / row["pair_id"]
        place, key = pair / "figures", _key(row, record, pair / "transform.safetensors")
        place.mkdir(parents=True)
        (place / "before.webp").write_bytes(b"picture")
        (place / "figures.json").write_text(json.dumps({"of": key, "names": ["before.webp"]}))
    told = write_report(study.folder, figures="none")
    inside, data = data_of(study.folder, 1), data_of(study.folder)
    assert told["drawn"] == 0
    assert list(inside) == [row[0] for row in data["rows"][:INSIDE]]
    assert all(one["pictures"] == ["before.webp"] for one in data["rest"])
    lengths = [sum(len(level[1]) for level in one["history"]) for one in data["rest"]]
    assert set(lengths[:INSIDE]) == {100}
    assert max(lengths[INSIDE:]) < 40


def test_figures_are_drawn_for_whom_they_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnreg.cohort import report

    study = make_study(tmp_path)
    monkeypatch.setattr(report, "INSIDE", 3)
    assert write_report(study.folder, figures="none")["drawn"] == 0
    assert data_of(study.folder, 1) == {}
    first = write_report(study.folder)
    assert (first["drawn"], list(first["not_drawn"])) == (2, ["pair-2"])
    assert write_report(study.folder)["drawn"] == 0
    assert write_report(study.folder, figures="all")["drawn"] == 2
    assert sorted(data_of(study.folder, 1)) == ["pair-1", "pair-3"]
    assert figures_of(study.folder, *read_pairs(study.folder)[4]) == []  # it is not done
    with pytest.raises(ValueError, match="choose from worst, all, none"):
        write_report(study.folder, figures="best")


def test_pictures_of_another_map_are_not_shown(tmp_path: Path) -> None:
    """As after a run with --retry-failed, or with an image that has changed since."""
    study = make_study(tmp_path, count=1)
    write_report(study.folder)
    (_, record) = read_pairs(study.folder)[0]
    assert data_of(study.folder)["rest"][0]["pictures"] == list(NAMES)
    moving = record["moving"]
    changed = {**record["inputs"], moving: [1, 2, "other content"]}
    with Ledger(study.folder) as ledger:
        ledger.append([{**record, "status": "invalid_input", "reason": "moving is damaged", "inputs": changed}])
    Path(moving).write_bytes(b"no image")
    told = write_report(study.folder)
    assert "pair-0" in told["not_drawn"]
    (rest,) = data_of(study.folder)["rest"]
    assert rest["pictures"] == [] and "moving-0" in rest["why"] and data_of(study.folder, 1) == {}


def test_without_pillow_there_is_a_report_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnreg.cohort import mosaic

    def missing(module: str) -> Any:
        raise fnreg.extras.MissingExtraError('run pip install "fnreg[plot]"', name="PIL")

    study = make_study(tmp_path, count=2, dimension=3)
    monkeypatch.setattr(mosaic, "pillow", missing)
    monkeypatch.setattr("fnreg.cohort.figures.pillow", missing)
    told = write_report(study.folder)
    assert told["notes"] == ['no pictures were drawn: run pip install "fnreg[plot]"']
    assert len(data_of(study.folder)["rows"]) == 2


def test_the_command_registers_the_pair(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = data_of(made)
    told = {row[0]: more["command"] for row, more in zip(data["rows"], data["rest"], strict=True)}["pair-0"]
    words = shlex.split(told)
    assert words[:2] == ["fnreg", "register"]
    assert main([*words[1:], "--json"]) == 0
    assert (tmp_path / "pair-0" / "transform.safetensors").is_file()


@pytest.mark.parametrize(("measure", "sign"), [("dice_mean", 1), ("tre_mean", -1), ("value_after", -1)])
def test_order_is_by_status_then_by_what_judges_best(measure: str, sign: int) -> None:
    told = [("ok", 0.9), ("ok", 0.2), ("pending", None), ("warn", 0.8), ("ok", None), ("crashed", None), ("odd", None)]
    pairs: list[Any] = []
    for number, (status, value) in enumerate(told):
        known = {} if value is None else {"value_after": 7.0} | {measure: sign * value}
        pairs.append(({"pair_id": str(number)}, {"status": status} | known))
    order, name = worst_first(pairs)
    assert name == measure
    assert [row["pair_id"] for row, _ in order] == ["5", "6", "3", "1", "0", "4", "2"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 100))
def test_a_course_keeps_the_ends_of_each_level(lengths: list[int], most: int) -> None:
    history = [[9 - k, step, 1 / (step + 1)] for k, length in enumerate(lengths) for step in range(length)]
    found = _course(history, most)
    assert [level[0] for level in found] == [9 - k for k in range(len(lengths))]
    for (_, steps, values), length in zip(found, lengths, strict=True):
        assert (steps[0], steps[-1]) == (0, length - 1)
        assert steps == sorted(set(steps))
        assert values == [float(f"{1 / (step + 1):.6g}") for step in steps]
    assert sum(len(level[1]) for level in found) <= most + 2 * len(lengths)
    if sum(lengths) <= min(most, COURSE):
        assert sum(len(level[1]) for level in found) == sum(lengths)


def test_odd_records_are_shown_as_they_are(tmp_path: Path) -> None:
    study = many_pairs(tmp_path, 3)
    odd = [
        {"history": [[0, 1], None, [0, 2, None]], "status": "new", "folds": None},
        {"warnings": None, "reason": True},
    ]
    with Ledger(study.folder) as ledger:
        ledger.append([{"pair_id": f"pair-0000{k}"} | one for k, one in enumerate(odd)])
    write_report(study.folder)
    data = data_of(study.folder)
    assert [row[0] for row in data["rows"]] == ["pair-00000", "pair-00002", "pair-00001"]
    assert data["rest"][0]["history"] == [[0, [2], [None]]]


# -- safety --------------------------------------------------------------------------------------------------------


def test_what_is_said_stays_text(made: Path) -> None:
    found = Elements(page(made))
    assert found.tags.count("script") == 3
    assert "img" not in found.tags
    assert not [one for one in found.attributes if one[1].startswith("on")]
    assert page(made).count("<script>document") == 0


@given(st.recursive(st.text() | st.sampled_from(["</script>", "<!--", "]]>", HOSTILE]), st.lists, max_leaves=5))
def test_data_cannot_end_its_script(value: Any) -> None:
    text = as_script(value)
    assert not set(text) & set("<>&")
    assert json.loads(text) == value


def test_nothing_is_fetched_and_only_its_own_script_runs(made: Path) -> None:
    text, found = page(made), Elements(page(made))
    policy = next(value for tag, name, value in found.attributes if tag == "meta" and "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(found.scripts[2].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not [one for one in found.attributes if one[1] in ("src", "href") or "url(" in one[2]]
    assert set(re.findall(r"https?://[\w./-]+", text)) <= {"http://www.w3.org/2000/svg"}


# -- refusals and the command --------------------------------------------------------------------------------------


def test_folders_that_are_no_studies_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(made / "settings.toml", tmp_path / "half")
    for name, told in (("none", "settings.toml"), ("empty", "settings.toml"), ("half", "manifest.tsv")):
        with pytest.raises(StudyError, match=told):
            write_report(tmp_path / name)
        assert main(["report", str(tmp_path / name)]) == 3
        assert told in capsys.readouterr().err
        assert not (tmp_path / name / "report.html").exists()
    for content, told in (("a\tb\n1\t2\n", "row 2 has no pair_id"), ("", "no rows"), ("\xff", "that can be read")):
        (tmp_path / "half" / "manifest.tsv").write_bytes(content.encode("latin-1"))
        with pytest.raises(StudyError, match=told):
            read_pairs(tmp_path / "half")


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path)
    assert main(["report", str(study.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(study.folder / "report.html")
    assert told["statuses"] == {"failed": 1, "diverged": 1, "warn": 1, "ok": 2, "pending": 1}
    assert (told["pairs"], told["drawn"], list(told["not_drawn"])) == (6, 4, ["pair-2"])
    assert told["bytes"] == (study.folder / "report.html").stat().st_size
    assert main(["report", str(study.folder), "--figures", "none"]) == 0
    assert "6 pairs, 1 failed, 1 diverged, 1 warn, 2 ok, 1 pending" in capsys.readouterr().out
    assert main(["report", str(study.folder), "--figures", "wrost"]) == 2
    assert "did you mean worst?" in capsys.readouterr().err
    assert not [path for path in study.folder.rglob("*") if path.name.endswith(".tmp")]


# -- in a browser --------------------------------------------------------------------------------------------------

IDS = "[...document.querySelectorAll('#body td button')].map(b => b.textContent)"
SORT = "[...document.querySelectorAll('th')].filter(h => h.getAttribute('aria-sort') !== 'none')" \
    ".map(h => h.dataset.column + ' ' + h.getAttribute('aria-sort'))"  # fmt: skip
FOCUS = "document.activeElement.textContent"
SEEN = "[...document.querySelectorAll('#stack img')].filter(i => getComputedStyle(i).visibility === 'visible')" \
    ".map(i => i.className)"  # fmt: skip


def opened(browser: Browser, study: Path, more: str = "") -> Page:
    return browser.open((study / "report.html").as_uri() + more)


def cells(shown: Page, column: str) -> list[str]:
    place = f"[...document.querySelectorAll('th')].findIndex(h => h.dataset.column === '{column}')"
    return shown.evaluate(f"[...document.querySelectorAll('#body tr')].map(r => r.children[{place}].textContent)")


@needs_browser
def test_problems_of_a_page_are_seen(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<img src='none.png'><script>throw new Error('oh')</script>")
    shown = browser.open((tmp_path / "bad.html").as_uri())
    assert len(shown.problems()) == 2
    assert len(shown.requests()) == 2


@needs_browser
def test_sort(browser: Browser, many: Path) -> None:
    shown = opened(browser, many)
    assert shown.evaluate(SORT) == []
    assert cells(shown, "status")[:50] == ["failed"] * 50
    assert cells(shown, "status")[50:] == ["warn"] * 50
    shown.click("th[data-column=dice_mean] button")
    assert shown.evaluate(SORT) == ["dice_mean ascending"]
    values = [float(value) for value in cells(shown, "dice_mean")]
    assert values == sorted(values)
    assert values[0] == 0
    shown.click("th[data-column=dice_mean] button")
    assert shown.evaluate(SORT) == ["dice_mean descending"]
    values = [float(value) for value in cells(shown, "dice_mean")]
    assert values == sorted(values, reverse=True)
    shown.click("th[data-column=pair_id] button")
    assert shown.evaluate(IDS) == [f"pair-{number:05d}" for number in range(100)]
    shown.click("th[data-column=status] button")
    shown.click("th[data-column=status] button")
    assert set(cells(shown, "status")) == {"ok"}
    shown.click("#reset")
    assert shown.evaluate(SORT) == []
    assert cells(shown, "status")[0] == "failed"
    assert shown.problems() == []


@needs_browser
def test_missing_values_come_last_in_both_directions(browser: Browser, made: Path) -> None:
    shown = opened(browser, made)
    for _ in range(2):
        shown.click("th[data-column=value_after] button")
        values = cells(shown, "value_after")
        assert values[3:] == ["–"] * 3
        assert "–" not in values[:3]


@needs_browser
def test_filter(browser: Browser, many: Path) -> None:
    shown = opened(browser, many)

    def count() -> int:
        return int(re.findall(r"of (\d+)", shown.evaluate("document.getElementById('count').textContent"))[0])

    assert count() == 5000
    shown.click("[data-status=warn]")
    assert count() == 100
    assert set(cells(shown, "status")) == {"warn"}
    assert shown.evaluate("document.querySelector('[data-status=warn]').getAttribute('aria-pressed')") == "true"
    shown.click("[data-status=failed]")
    assert count() == 150
    shown.click("#reset")
    shown.press("/")
    shown.write("pair-0123 SITE-3")
    expected = [f"pair-{n:05d}" for n in range(1230, 1240) if n % 7 == 3]
    assert sorted(shown.evaluate(IDS)) == expected
    shown.click("#reset")
    shown.click("figure[data-column=tre_mean] rect:first-child")
    assert shown.evaluate("document.getElementById('range').value") == "tre_mean"
    assert {float(value) for value in cells(shown, "tre_mean")} == {1.0}
    assert count() == sum(n % 17 == 0 and n % 100 != 7 for n in range(5000))
    shown.click("#low")
    shown.evaluate("document.getElementById('low').value = ''")
    shown.write("18")
    assert shown.evaluate("document.getElementById('count').textContent") == "No pair is like that."
    assert shown.problems() == []


@needs_browser
def test_pages(browser: Browser, many: Path) -> None:
    shown = opened(browser, many)
    assert shown.evaluate("document.getElementById('previous-page').disabled")
    seen = shown.evaluate(IDS)
    for _ in range(49):
        shown.evaluate("document.getElementById('next-page').click()")
        seen += shown.evaluate(IDS)
    assert shown.evaluate("document.getElementById('next-page').disabled")
    assert sorted(seen) == [f"pair-{number:05d}" for number in range(5000)]


@needs_browser
def test_flicker_shows_other_pixels(browser: Browser, made: Path) -> None:
    shown = opened(browser, made, "#pair=pair-0")
    shown.until("[...document.querySelectorAll('dialog img')].length === 6")
    shown.until("[...document.querySelectorAll('dialog img')].every(i => i.complete && i.naturalWidth > 0)")
    shown.point_away()
    assert shown.evaluate(SEEN) == ["after", "contours"]
    after = picture(shown)
    shown.hover("#stack")
    assert shown.evaluate(SEEN) == ["before", "contours"]
    before = picture(shown)
    shown.point_away()
    assert np.abs(after - before).mean() > 1
    assert np.array_equal(picture(shown), after)
    for key, seen in (("f", ["before", "contours"]), ("f", ["after", "contours"]), ("x", ["fixed", "contours"]),
                      ("c", ["fixed"]), ("f", ["before"]), ("c", ["before", "contours"])):  # fmt: skip
        shown.press(key)
        assert shown.evaluate(SEEN) == seen
    shown.press("g")
    assert shown.evaluate("getComputedStyle(document.getElementById('lines')).display") == "block"
    assert shown.evaluate("document.getElementById('grid').getAttribute('aria-pressed')") == "true"
    shown.click("button[data-view=after]")
    assert shown.evaluate("document.querySelector('button[data-view=after]').getAttribute('aria-pressed')") == "true"
    assert shown.problems() == []


def picture(shown: Page) -> Any:
    box = shown.evaluate("(() => { const r = document.getElementById('stack').getBoundingClientRect();"
                         " return [r.left, r.top + 30, r.right, r.bottom]; })()")  # fmt: skip
    whole = Picture.open(io.BytesIO(shown.screenshot())).convert("L")
    return np.asarray(whole.crop([round(value) for value in box])).astype(float)


@needs_browser
def test_by_keyboard_alone(browser: Browser, made: Path) -> None:
    shown = opened(browser, made)
    for _ in range(60):
        if shown.evaluate("document.activeElement.dataset.row") == "0":
            break
        shown.press("Tab")
    assert shown.evaluate(FOCUS) == "pair-2"
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, name in (("ArrowDown", "pair-3"), ("ArrowDown", "pair-1"), ("ArrowUp", "pair-3"), ("ArrowDown", "pair-1")):
        shown.press(key)
        assert shown.evaluate(FOCUS) == name
    shown.press("Enter")
    assert shown.evaluate("document.getElementById('pair').open")
    assert shown.evaluate("document.getElementById('pair-name').textContent") == "pair-1"
    shown.press("ArrowRight")
    shown.press("ArrowRight")
    name = shown.evaluate("document.getElementById('pair-name').textContent")
    assert name == shown.evaluate(IDS)[4]
    assert shown.evaluate("document.getElementById('place').textContent") == "5 of 6"
    shown.press("Escape")
    assert not shown.evaluate("document.getElementById('pair').open")
    shown.until(f"{FOCUS} === {json.dumps(name)}")  # a dialog tells that it closed a moment after
    assert shown.problems() == []


@needs_browser
def test_everything_that_can_be_pressed_has_a_name(browser: Browser, made: Path) -> None:
    shown = opened(browser, made, "#pair=pair-0")
    nameless = (
        "[...document.querySelectorAll('button, input, select')].filter(e => !(e.textContent.trim() || "
        "e.labels?.length || e.getAttribute('aria-label'))).map(e => e.outerHTML)"
    )
    assert shown.evaluate(nameless) == []
    assert shown.evaluate("[...document.querySelectorAll('dialog img:not(.contours)')].filter(i => !i.alt).length") == 0
    assert shown.evaluate("document.documentElement.lang") == "en"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(browser: Browser, made: Path, scheme: str) -> None:
    """At least 4.5, as WCAG 2.2 asks for."""
    shown = opened(browser, made)
    shown.scheme(scheme)
    names = ("ink", "muted", "accent", "bad", "warn", "good", "on-accent", "paper", "raised")
    found = shown.evaluate(f"{json.dumps(names)}.map(n => getComputedStyle(document.documentElement)"
                           ".getPropertyValue('--' + n).trim())")  # fmt: skip
    colours = dict(zip(names, found, strict=True))
    for name in ("ink", "muted", "accent", "bad", "warn", "good"):
        for behind in ("paper", "raised"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_hostile_names_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    study = many_pairs(tmp_path / "a", 3).folder
    table = (study / "manifest.tsv").read_text()
    (study / "manifest.tsv").write_text(table.replace("pair-00001", HOSTILE).replace("site-2", HOSTILE))
    with Ledger(study) as ledger:
        ledger.append(
            [{"pair_id": HOSTILE, "status": HOSTILE, "reason": HOSTILE, "warnings": [HOSTILE], HOSTILE: HOSTILE}]
        )
    folder = study.rename(tmp_path / "a & b <i>")
    write_report(folder)
    shown = opened(browser, folder)
    assert shown.evaluate("document.title") == "a & b <i>: report"
    assert shown.evaluate("document.querySelector('h1').textContent") == "a & b <i>"
    assert shown.evaluate(IDS)[0] == HOSTILE
    assert cells(shown, "status")[0] == cells(shown, "reason")[0] == HOSTILE
    shown.click("button[data-row='0']")
    for place in ("pair-name", "pair-status", "pair-reason"):
        assert shown.evaluate(f"document.getElementById('{place}').textContent") == HOSTILE
    assert shown.evaluate("document.querySelector('#warnings li').textContent") == HOSTILE
    assert shown.evaluate("document.querySelectorAll('body script').length") == 3
    assert shown.problems() == []


@needs_browser
def test_other_pairs_are_loaded_from_the_folder(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnreg.cohort import report

    study = make_study(tmp_path / "a b#c")
    monkeypatch.setattr(report, "INSIDE", 2)
    write_report(study.folder, figures="all")
    moved = study.folder.rename(tmp_path / "elsewhere %41")
    shown = opened(browser, moved, "#pair=pair-0")
    shown.until("document.querySelectorAll('dialog img').length === 6 && "
                "[...document.querySelectorAll('dialog img')].every(i => i.naturalWidth > 0)")  # fmt: skip
    assert shown.evaluate("document.querySelector('#stack .after').getAttribute('src')") == \
        "pairs/pair-0/figures/after.webp"  # fmt: skip
    assert all(address.startswith(("file:", "data:")) for address in shown.requests())
    assert shown.problems() == []
    shutil.rmtree(moved / "pairs")
    shown = opened(browser, moved, "#pair=pair-0")
    shown.until("document.getElementById('missing').textContent.startsWith('Some pictures are not where they were')")
    assert shown.evaluate("document.querySelectorAll('#course polyline').length") == 2
    shown = opened(browser, moved, "#pair=pair-3")  # inside the file
    shown.until("[...document.querySelectorAll('#stack img')].every(i => i.naturalWidth > 0)")
    assert shown.evaluate(SEEN) == ["before", "contours"]


@needs_browser
def test_the_course_is_drawn(browser: Browser, made: Path) -> None:
    shown = opened(browser, made, "#pair=pair-0")
    lines = shown.evaluate("[...document.querySelectorAll('#course polyline')].map(l => l.getAttribute('points'))")
    points = [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]
    assert [len(line) for line in points] == [6, 6]
    data = data_of(made)
    history = {row[0]: more["history"] for row, more in zip(data["rows"], data["rest"], strict=True)}["pair-0"]
    values = np.array([value for level in history for value in level[2]])
    heights = np.array([y for line in points for _, y in line])
    expected = 185 - 165 * (values - values.min()) / np.ptp(values)
    np.testing.assert_allclose(heights, expected, atol=0.06)
    assert [x for line in points for x, _ in line] == sorted(x for line in points for x, _ in line)


@needs_browser
def test_five_thousand_pairs_load_in_seconds(browser: Browser, many: Path) -> None:
    shown = opened(browser, many)
    assert shown.seconds < 10
    milliseconds = shown.evaluate(
        "(() => { const t = performance.now(); document.querySelector('th[data-column=folds] button').click();"
        " document.body.offsetHeight; return performance.now() - t; })()"
    )
    assert milliseconds < 2000
    assert shown.evaluate("document.querySelectorAll('#body tr').length") == 100
    assert (many / "report.html").stat().st_size < 6e6
    assert shown.problems() == []


def test_what_the_ledger_keeps_for_itself_is_no_column(made: Path) -> None:
    pairs = [({"pair_id": "a", "fixed": "f", "moving": "m"}, {"status": "ok", "beside": {}, "time": 1.7e9})]
    names = [column["name"] for column in _data(made, "made", pairs, "", {"a": []}, {})["columns"]]
    assert names == ["pair_id", "status", "fixed", "moving"]
