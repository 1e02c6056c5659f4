"""Data sets: a row for every pair whatever happens to it, and no pair changes another."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cohort_scenes import QUICK, SIZE, leftovers, pairs, picture, register, results, same_tables, table, whole

import fnreg
from fnreg import Grid, Image, cohort, io, native
from fnreg.cohort import batches, memory, solve
from fnreg.cohort.batches import Sizes
from fnreg.cohort.ledger import Ledger, LedgerError
from fnreg.cohort.load import Asked, Loaded, load
from fnreg.cohort.manifest import ManifestError, Row
from fnreg.cohort.memory import Peak, free, is_lack
from fnreg.cohort.study import COLUMNS, StudyError
from fnreg.settings import Settings
from fnreg.specs import SettingsError

# -- what comes out ------------------------------------------------------------------------------------------------


def test_a_study_is_what_register_gives_for_each_pair(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 5)
    found = register(rows, tmp_path / "study", batch_size=3)
    whole(tmp_path / "study", rows)
    for row in rows:
        record = found[row.pair_id]
        fixed, moving = (io.read_image(row.files[side]) for side in ("fixed", "moving"))
        alone = fnreg.register(fixed, moving, fnreg.Rigid(), levels=2, steps=6)
        mapping = io.read_transform(tmp_path / "study" / record["transform"])
        apart = mapping.map_points(fixed.grid.points()) - alone.map_points(fixed.grid.points())
        assert float(apart.norm(dim=-1).max()) < 1e-4  # of float32 images; the same steps otherwise
        assert record["value_after"] == pytest.approx(float(alone.value), rel=1e-4)
        before, _ = fnreg.evaluate(
            fixed, moving, fnreg.Mapping(fnreg.Rigid().init(fixed.grid), fixed.grid, fnreg.Rigid())
        )
        assert record["value_before"] == pytest.approx(float(before), rel=1e-5)
        assert record["steps"] == int(alone.steps.sum()) and record["status"] == "ok"
        assert record["jac_min"] == pytest.approx(1) and record["folds"] == 0
        assert record["attempts"] == 1 and record["device"] == "cpu"
        course = record["history"]
        assert len(course) == 12 and [point[:2] for point in course[::6]] == [[1, 0], [0, 0]]
        assert course[0][2] == pytest.approx(float(alone.history[0].value[0]), rel=1e-4)
    assert set(COLUMNS) <= set((tmp_path / "study" / "pairs.tsv").read_text().splitlines()[0].split("\t"))
    run = json.loads((tmp_path / "study" / "run.json").read_text())
    assert run["counts"] == {"ok": 5} and run["versions"]["torch"] == torch.__version__ and run["done"] == 5
    assert json.loads((tmp_path / "study" / "dataset_description.json").read_text())["DatasetType"] == "derivative"


@pytest.mark.parametrize("transform", ["rigid", "ffd:stride=4", "rigid+svffd:stride=4"])
def test_the_size_of_batches_changes_results_by_rounding_only(transform: str, tmp_path: Path) -> None:
    """The tolerance of the table is 1e-4 of a value: float32, through the steps of a descent."""
    rows = pairs(tmp_path, 7)
    settings = Settings(transform=transform, start="header", levels=2, steps="6")
    for size in (1, 2, 7, None):
        register(rows, tmp_path / f"{size}", settings, batch_size=size)
        whole(tmp_path / f"{size}", rows)
        same_tables(tmp_path / f"{size}", tmp_path / "1")
    again = register(rows, tmp_path / "again", settings, batch_size=2)
    assert len(again) == 7 and results(tmp_path / "again") == results(tmp_path / "2")  # the same bytes


def test_long_courses_are_thinned(tmp_path: Path) -> None:
    settings = Settings(transform="ffd:stride=4", start="header", levels=2, steps="60")
    record = register(pairs(tmp_path, 3)[2:], tmp_path / "study", settings)["p002"]
    course = record["history"]
    assert record["steps"] > 100 and len(course) == 33
    assert course[0][:2] == [1, 0] and course[-1][0] == 0
    assert course == sorted(course, key=lambda point: (-point[0], point[1]))


def test_labels_and_landmarks_judge(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    points = torch.tensor([[8.0, 7.0], [6.0, 9.0], [9.0, 9.0]])
    for row in rows[:2]:
        for side in ("fixed", "moving"):
            image = io.read_image(row.files[side])
            labels = (image.data > 0.5).to(torch.uint8)
            io.write_labels(tmp_path / f"{row.pair_id}_{side}_labels.nii", io.Labels(labels, image.grid))
            io.write_points(tmp_path / f"{row.pair_id}_{side}.csv", io.Landmarks(points))
    known = {f"{side}_labels": f"_{side}_labels.nii" for side in ("fixed", "moving")}
    known |= {f"{side}_points": f"_{side}.csv" for side in ("fixed", "moving")}
    rows = [
        Row(row.pair_id, dict(row.files) | {name: tmp_path / f"{row.pair_id}{end}" for name, end in known.items()})
        for row in rows[:2]
    ] + [rows[2]]
    found = register(rows, tmp_path / "study", batch_size=3)
    for row in rows[:2]:
        record = found[row.pair_id]
        fixed, moving = (io.read_image(row.files[side]) for side in ("fixed", "moving"))
        mapping = io.read_transform(tmp_path / "study" / record["transform"])
        away = (mapping.map_points(points.double()) - points).norm(dim=-1)
        assert record["tre_mean"] == pytest.approx(float(away.mean())) and record["tre_mean_before"] == 0
        labels = [(image.data > 0.5).to(torch.uint8) for image in (fixed, moving)]
        warped = fnreg.warp(fnreg.Subject(moving, labels=labels[1]), mapping, fixed.grid).labels
        assert warped is not None
        both = 2 * float((labels[0] * warped).sum()) / float(labels[0].sum() + warped.sum())
        assert record["dice_1"] == record["dice_mean"] == pytest.approx(both)
        assert "dice_mean_before" in record
        assert record["status"] == "warn" and "landmarks rose" in record["reason"] and record["warnings"]
    assert "dice_mean" not in found["p002"]
    meaning = json.loads((tmp_path / "study" / "pairs.json").read_text())
    assert "label 1" in meaning["dice_1"]["Description"] and "largest" in meaning["tre_max"]["Description"]
    assert meaning["fixed_points"]["Description"] == "of the table of pairs"
    assert table(tmp_path / "study")["p002"]["dice_1"] == "n/a"


def test_what_is_saved_is_what_was_asked_for(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 2)
    settings = Settings(transform="svffd:stride=4", start="header", levels=1, steps="4", penalty="bending=1")
    register(rows, tmp_path / "a", settings, save="params+warped+inverse+jacobian")
    assert {path.name for path in (tmp_path / "a" / "pairs" / "p001").iterdir()} >= {
        "transform.safetensors", "warped.nii", "inverse.safetensors", "jacobian.nii.gz",
    }  # fmt: skip
    record = cohort.read_ledger(tmp_path / "a")["p001"]
    assert 0 < record["inverse_mean"] < 0.05
    mapping = io.read_transform(tmp_path / "a" / record["transform"])
    warped = fnreg.warp(io.read_image(rows[1].files["moving"]), mapping)
    assert torch.allclose(io.read_image(tmp_path / "a" / "pairs" / "p001" / "warped.nii").data, warped.data, atol=1e-6)
    register(rows, tmp_path / "b", QUICK, save="xfm")
    assert cohort.read_ledger(tmp_path / "b")["p000"]["transform"] == "pairs/p000/transform.tfm"
    with pytest.raises(SettingsError, match="figures"):
        register(rows, tmp_path / "c", QUICK, save="params+figures")
    assert not (tmp_path / "c").exists()


# -- faults --------------------------------------------------------------------------------------------------------

FLAT = Image(torch.ones(1, *SIZE), Grid(SIZE))
NAN = picture(1).data.clone().index_fill(1, torch.tensor([3]), math.nan)
FAULTS: dict[str, tuple[Callable[[dict[str, Path]], Any], str, str]] = {
    "truncated": (lambda f: f["moving"].write_bytes(f["moving"].read_bytes()[:-9]), "invalid_input", "incomplete"),
    "no image": (lambda f: f["moving"].write_text("a note"), "invalid_input", "not a NIfTI file"),
    "nan": (lambda f: io.write_image(f["moving"], Image(NAN, Grid(SIZE))), "invalid_input", "NaN"),
    "constant": (lambda f: io.write_image(f["fixed"], FLAT), "invalid_input", "constant"),
    "three axes": (lambda f: io.write_image(f["fixed"], Image(torch.rand(1, 5, 5, 5))), "invalid_input", "axes"),
    "far": (
        lambda f: io.write_image(f["fixed"], Image(picture(1).data, Grid(SIZE, origin=(900.0, 0.0)))),
        "invalid_input",
        "do not overlap",
    ),
    "steep": (lambda f: io.write_image(f["fixed"], Image(1e30 * picture(1).data, Grid(SIZE))), "diverged", "diverged"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_pair_that_fails_changes_no_bit_of_its_neighbours(name: str, tmp_path: Path) -> None:
    rows = pairs(tmp_path, 6)
    good = [row for row in rows if row.pair_id != "p002"]
    spoil, status, reason = FAULTS[name]
    spoil(dict(rows[2].files))
    size = 5 if status == "invalid_input" else 6  # one that diverges has a place in its batch
    register(good, tmp_path / "good", batch_size=size)
    found = register(rows, tmp_path / "all", batch_size=size)
    whole(tmp_path / "all", rows)
    assert found["p002"]["status"] == status and reason in found["p002"]["reason"]
    assert results(tmp_path / "all") == results(tmp_path / "good")
    told = (tmp_path / "all" / "errors" / "p002.txt").read_text()
    assert status in told and f"fnreg register {rows[2].files['fixed']}" in told and "--steps 6" in told
    assert {path.name for path in (tmp_path / "all" / "errors").iterdir()} == {"p002.txt"}
    # It is not tried again, unless it is asked for or its file has changed.
    assert register(rows, tmp_path / "all", batch_size=size) == {}
    assert set(register(rows, tmp_path / "all", batch_size=size, retry_failed=True)) == {"p002"}
    for side, number in (("fixed", 4), ("moving", 5)):
        io.write_image(rows[2].files[side], picture(number))
    mended = register(rows, tmp_path / "all", batch_size=size)
    assert mended["p002"]["status"] == "ok" and mended["p002"]["attempts"] == 3
    assert leftovers(tmp_path / "all") == [] and not list((tmp_path / "all" / "errors").iterdir())


def test_masks_that_miss_each_other(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    for side, part in (("fixed", slice(0, 3)), ("moving", slice(13, 16))):
        image = io.read_image(rows[1].files["fixed"])
        mask = torch.zeros_like(image.data)
        mask[..., part] = 1
        io.write_image(tmp_path / f"{side}_mask.nii", Image(mask, image.grid))
    files = dict(rows[1].files) | {"moving": rows[1].files["fixed"]}
    rows[1] = Row("p001", files | {f"{side}_mask": tmp_path / f"{side}_mask.nii" for side in ("fixed", "moving")})
    found = register(rows, tmp_path / "all", batch_size=2)
    assert found["p001"]["status"] == "invalid_input" and "overlap" in found["p001"]["reason"]
    register([rows[0], rows[2]], tmp_path / "good", batch_size=2)
    assert results(tmp_path / "all") == results(tmp_path / "good")


def test_after_an_error_only_the_guilty_pair_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real = pairs(tmp_path, 5), solve.solve

    def broken(batch: list[Loaded], asked: Asked, *, width: int) -> list[solve.Outcome]:
        if any(pair.row.pair_id == "p003" for pair in batch):
            raise TypeError("what a pity")
        return real(batch, asked, width=width)

    monkeypatch.setattr(solve, "solve", broken)
    found = register(rows, tmp_path / "study", batch_size=5)
    whole(tmp_path / "study", rows)
    assert [name for name, record in found.items() if record["status"] != "ok"] == ["p003"]
    assert found["p003"]["status"] == "failed" and found["p003"]["reason"] == "TypeError: what a pity"
    assert "in broken" in (tmp_path / "study" / "errors" / "p003.txt").read_text()
    monkeypatch.undo()
    assert set(register(rows, tmp_path / "study", batch_size=5, retry_failed=True)) == {"p003"}
    register(rows, tmp_path / "good", batch_size=1)
    assert results(tmp_path / "study") == results(tmp_path / "good")


# -- memory --------------------------------------------------------------------------------------------------------

LACK = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real, sizes = pairs(tmp_path, 20), solve.solve, list[int]()

    def small(batch: list[Loaded], asked: Asked, *, width: int) -> list[solve.Outcome]:
        sizes.append(len(batch))
        if len(batch) > 3 or any(pair.row.pair_id == "p004" for pair in batch):
            raise RuntimeError(LACK)
        return real(batch, asked, width=width)

    monkeypatch.setattr(solve, "solve", small)
    found = register(rows, tmp_path / "study", batch_size=8)
    whole(tmp_path / "study", rows)
    assert [name for name, record in found.items() if record["status"] != "ok"] == ["p004"]
    assert "not enough memory" in found["p004"]["reason"] and found["p004"]["status"] == "failed"
    assert sizes[0] == 8 and max(sizes[sizes.index(1) + 8 :]) <= 2  # it is remembered


def test_few_pairs_that_all_run_at_once_are_not_taken_for_many_of_which_most_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch of 512, of which a quarter ran, says nothing good of one of 4 that all run."""
    gpu, room, each = torch.device("cuda"), 2**36, 2**31
    monkeypatch.setattr(batches, "free", lambda _: room)
    sizes, peak = Sizes(gpu), Peak(gpu)
    for name, count, voxels in (("small", 512, 2**17), ("large", 1, 2**23)):
        peak.taken = sizes.width(count, voxels) * voxels * (each // 2**23)  # all of it is of those that run
        sizes.fitted(name, count, voxels, peak)
    many = sizes.of("large", 2**23)
    assert many == 16 and sizes.width(many, 2**23) * each < room / 2
    room = 2**33
    few = sizes.of("large", 2**23)
    assert few == 2 == sizes.width(few, 2**23)  # of 4 GB two at 2 GB
    room = 2**50
    sizes.fitted("large", 64, 2**23, peak)
    assert sizes.of("large", 2**23) == 64  # the host has to hold them too
    sizes = Sizes(gpu)
    room = 2**33
    for taken, expected in ((2**30, 8), (2**20, 8), (2**31, 4)):  # a second time less seems to be taken
        peak.taken = taken
        sizes.fitted("a", 2, 2**20, peak)
        assert sizes.of("a", 2**20) == expected


def test_what_torch_keeps_of_a_device_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bytes_of in (("memory_reserved", 700), ("memory_allocated", 300), ("mem_get_info", (1000, 5000))):
        monkeypatch.setattr(torch.cuda, name, lambda _, found=bytes_of: found)
    assert free(torch.device("cuda")) == 1400


def test_errors_that_lack_memory() -> None:
    assert is_lack(MemoryError()) and is_lack(RuntimeError(LACK)) and is_lack(torch.OutOfMemoryError("CUDA"))
    assert not is_lack(RuntimeError("shape mismatch")) and not is_lack(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_lack(caught.value)


def test_the_size_of_a_batch_by_what_one_pair_took(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, room = torch.device("cpu"), 2**30
    monkeypatch.setattr(batches, "free", lambda _: room)
    sizes, peak = Sizes(cpu), Peak(cpu)
    assert sizes.of("a", 1000) == 1
    peak.taken = 2**20
    sizes.fitted("a", 1, 1000, peak)
    assert sizes.of("a", 1000) == batches.GROWTH
    peak.taken = 2**24
    sizes.fitted("a", 16, 1000, peak)
    assert sizes.of("a", 1000) == 256 and sizes.of("b", 1000) == 1
    room = 2**26
    assert sizes.of("a", 1000) == 32  # half of what is free, at a MB for each pair
    peak.taken = 0  # nothing is known of what is smaller than what was there before
    sizes.fitted("b", 1, 1000, peak)
    assert sizes.of("b", 2000) == 16
    sizes.lacked("a", 32)
    assert sizes.of("a", 1000) == 16
    sizes.lacked("a", 1)
    assert sizes.of("a", 1000) == 1
    assert sizes.width(512, 100_000) == 128 and sizes.width(512, 1000) == 512 and sizes.width(3, 10**6) == 3
    each = [sizes.width(pairs, 10**6) for pairs in range(1, 600)]
    assert each == sorted(each) and each[:4] == [1, 2, 3, 4]
    assert Sizes(cpu, fixed=100).width(100, 10**6) == Sizes(cpu, refills=False).width(100, 10**6) == 100
    room = 0
    assert sizes.of("b", 1000) == 1
    with pytest.raises(ValueError, match="at least 1"):
        Sizes(cpu, fixed=0)
    assert free(cpu) > 2**20


@pytest.mark.parametrize("transform", ["rigid", "rigid+ffd:stride=4", "diffeomorphism"])
def test_pairs_that_wait_for_others_of_their_batch(
    transform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BUSY", 0)
    widths: list[int] = []
    real = batches.Sizes.width

    def width(self: Sizes, pairs: int, voxels: int) -> int:
        widths.append(real(self, pairs, voxels))
        return widths[-1]

    monkeypatch.setattr(batches.Sizes, "width", width)
    rows, settings = pairs(tmp_path, 11), dataclasses.replace(QUICK, transform=transform, steps="40x15")
    together = register(rows, tmp_path / "waves", settings)
    assert 2 <= max(widths) <= 4
    alone = register(rows, tmp_path / "alone", settings, batch_size=1)
    for name, record in alone.items():
        for column in ("value_before", "value_after", "jac_min", "sdlogj", "folds", "steps", "status"):
            near = record[column] if column == "status" else pytest.approx(record[column], rel=1e-4, abs=1e-5)
            assert together[name][column] == near, (name, column)


def test_what_a_container_or_a_job_may_still_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nested groups the smallest rest; what the system keeps of files is to be had."""

    def group(place: str, limit: object, current: int, **stat: int) -> None:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{name} {value}\n" for name, value in stat.items())
        for name, value in (("max", limit), ("current", current), ("stat", lines)):
            (tmp_path / place / f"memory.{name}").write_text(f"{value}\n")

    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "own")
    assert free(torch.device("cpu")) > 2**20  # no groups, no limits
    (tmp_path / "own").write_text("1:cpu:/old\n0::/jobs/7\n")
    (tmp_path / "jobs" / "7").mkdir(parents=True)
    assert free(torch.device("cpu")) > 2**20
    group("jobs/7", 5000, 4500, anon=500, active_file=1000, inactive_file=2000)
    assert free(torch.device("cpu")) == 3500
    group("jobs", 9000, 8000, anon=8000)
    assert free(torch.device("cpu")) == 1000
    group("jobs/7", "max", 4500)
    assert free(torch.device("cpu")) == 1000
    group("jobs", 9000, 9500, anon=9500)
    assert free(torch.device("cpu")) == 0


def test_the_peak_is_of_what_was_done_within() -> None:
    with Peak(torch.device("cpu")) as peak:
        held = torch.ones(2**27)
    assert held.nbytes * 0.9 < peak.taken < held.nbytes * 2
    with Peak(torch.device("cpu")) as smaller:
        torch.ones(2**10)
    assert not smaller.risen


def test_shapes_wait_for_their_like(tmp_path: Path) -> None:
    wanted = Asked.of(QUICK, tmp_path / "study")
    rows = pairs(tmp_path, 6)
    for number in (1, 3, 5):
        io.write_image(rows[number].files["fixed"], picture(number, (17, 16)))
    made = [load(row, wanted) for row in rows]
    waiting = batches.Buckets(Sizes(torch.device("cpu"), fixed=2))
    done: list[list[str]] = []
    for pair in made:
        assert isinstance(pair, Loaded)
        if batch := waiting.add(pair):
            done.append([one.row.pair_id for one in batch])
    assert done == [["p000", "p002"], ["p001", "p003"]] and waiting.held == 2
    left = [waiting.take(), waiting.take(), waiting.take()]
    assert [[one.row.pair_id for one in batch or ()] for batch in left] == [["p004"], ["p005"], []]
    found = register(rows, tmp_path / "study", batch_size=4)
    assert all(record["status"] == "ok" for record in found.values())


# -- going on ------------------------------------------------------------------------------------------------------


def test_the_second_time_there_is_nothing_to_do(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    register(rows, tmp_path / "study")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()}
    assert register(rows, tmp_path / "study") == {}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*") if path.is_file()} == before
    more = pairs(tmp_path, 5)
    assert set(register(more, tmp_path / "study")) == {"p003", "p004"}
    with pytest.raises(StudyError, match="steps was '6' and is '7'"):
        register(rows, tmp_path / "study", Settings(start="header", levels=2, steps="7"))
    settings = Settings(transform="rigid", start="header", levels=2, steps="6", threads=1)
    assert register(more, tmp_path / "study", settings) == {}  # changes nothing but rounding


def test_a_second_try_that_is_killed_goes_on_too(tmp_path: Path) -> None:
    """Where it was killed, its files may be there already and the note of the first failure gone."""
    rows, study = pairs(tmp_path, 3), tmp_path / "study"
    content = rows[1].files["fixed"].read_bytes()
    rows[1].files["fixed"].write_text("a note")
    assert register(rows, study)["p001"]["status"] == "invalid_input"
    assert register(rows, study) == {}  # not without being asked
    with Ledger(study) as ledger:
        ledger.append([{"pair_id": "p001", "status": "begun", "among": 1}])
    assert set(register(rows, study)) == {"p001"}
    assert register(rows, study) == {}
    rows[1].files["fixed"].write_bytes(content)
    assert register(rows, study)["p001"]["status"] == "ok"


def test_parts_of_a_table_side_by_side(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 7)
    found = [register(rows, tmp_path / "study", shard=(part, 3), batch_size=2) for part in (1, 2, 3)]
    assert [len(part) for part in found] == [3, 2, 2] and len({name for part in found for name in part}) == 7
    whole(tmp_path / "study", rows)
    assert register(rows, tmp_path / "study") == {}
    register(rows, tmp_path / "one", batch_size=1)
    same_tables(tmp_path / "study", tmp_path / "one")
    with pytest.raises(SettingsError, match="4/3"):
        register(rows, tmp_path / "study", shard=(4, 3))


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    first = cohort.run(rows, QUICK, output=tmp_path / "study", batch_size=1)
    next(first)
    manifest = (tmp_path / "study" / "manifest.tsv").read_bytes()
    with pytest.raises(LedgerError, match="another run is writing"):
        register(rows[:1], tmp_path / "study")
    assert (tmp_path / "study" / "manifest.tsv").read_bytes() == manifest
    assert len(list(first)) == 2
    whole(tmp_path / "study", rows)


def test_a_run_that_is_asked_to_stop_keeps_what_is_done(tmp_path: Path) -> None:
    rows, stop = pairs(tmp_path, 9), threading.Event()
    seen: list[cohort.Progress] = []
    done = 0
    for _ in cohort.run(rows, QUICK, output=tmp_path / "study", batch_size=2, stop=stop, progress=seen.append):
        done += 1
        stop.set()
    assert 2 <= done <= 6 and seen[0].todo == 9 and seen[-1].done == done
    known = cohort.read_ledger(tmp_path / "study")
    assert len(known) == done == len(results(tmp_path / "study")) and leftovers(tmp_path / "study") == []
    rest = register(rows, tmp_path / "study", batch_size=2)
    assert len(rest) == 9 - done and all(record["attempts"] == 1 for record in rest.values())
    register(rows, tmp_path / "one", batch_size=2)
    same_tables(tmp_path / "study", tmp_path / "one")


def test_a_run_that_nobody_follows_to_its_end_goes_on_later(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 9)
    records = cohort.run(rows, QUICK, output=tmp_path / "study", batch_size=2)
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert leftovers(tmp_path / "study") == []
    register(rows, tmp_path / "study", batch_size=2)
    whole(tmp_path / "study", rows)


def test_a_row_that_the_table_lacks(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 2)
    for bad, told in (
        ([], "no rows"),
        ([rows[0], rows[0]], "is that of row 1 too"),
        ([Row("../a", rows[0].files)], "no file name"),
        ([Row("a", {"fixed": tmp_path / "f0.nii"})], "moving is empty"),
        ([Row("a", {**rows[0].files, "fixed_mask": tmp_path / "no.nii"})], "does not exist"),
    ):
        with pytest.raises(ManifestError, match=told):
            register(bad, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_start_for_all_and_a_start_of_its_own(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 3)
    grid = Grid(SIZE)
    for name, shift in (("all", 1.0), ("own", 2.0)):
        params = {"translation": torch.tensor([shift, 0.0], dtype=torch.float64)}
        io.write_transform(tmp_path / f"{name}.tfm", fnreg.Mapping(params, grid, fnreg.Translation()))
    rows[1] = Row("p001", {**rows[1].files, "initial": tmp_path / "own.tfm"})
    settings = Settings(transform="translation", start=str(tmp_path / "all.tfm"), levels=1, steps="0")
    register(rows, tmp_path / "study", settings)
    for row, shift in zip(rows, (1, 2, 1), strict=True):
        mapping = io.read_transform(tmp_path / "study" / "pairs" / row.pair_id / "transform.safetensors")
        assert mapping.params["translation"].tolist() == pytest.approx([shift, 0])
    assert register(rows, tmp_path / "study", settings) == {}
    params = {"translation": torch.tensor([3.0, 0.0], dtype=torch.float64)}
    io.write_transform(tmp_path / "all.tfm", fnreg.Mapping(params, grid, fnreg.Translation()))
    assert set(register(rows, tmp_path / "study", settings)) == {"p000", "p002"}


def test_a_ledger_that_is_held_is_let_go(tmp_path: Path) -> None:
    register(pairs(tmp_path, 1), tmp_path / "study")
    with Ledger(tmp_path / "study"):
        pass


def test_a_space_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown space 'ras': choose from LPS, RAS, voxel"):
        register(pairs(tmp_path, 1), tmp_path / "study", space="ras")
    assert not (tmp_path / "study").exists()


def test_an_unexpected_fault_of_saving_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("fnreg.cohort.save.agreement.agreement", broken)
    (record,) = register(pairs(tmp_path, 1), tmp_path / "study").values()
    assert record["status"] == "failed" and record["reason"] == "KeyError: 'oops'"
    assert "in broken" in (tmp_path / "study" / "errors" / "p000.txt").read_text()


def test_kernels_that_cannot_be_had_are_no_matter_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FNREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FNREG_NATIVE", raising=False)
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(native, "kernels", functools.cache(native.kernels.__wrapped__))
    with pytest.warns(native.KernelWarning, match="not in use"):
        found = register(pairs(tmp_path, 2), tmp_path / "study", batch_size=1)
    assert {(record["status"], *record["warnings"]) for record in found.values()} == {("ok",)}


@pytest.mark.parametrize("left", [b"", b'{"pairs": 1, "cou', b"[]", b"\xff", None])
def test_a_run_json_that_was_cut_is_written_anew(left: bytes | None, tmp_path: Path) -> None:
    rows, path = pairs(tmp_path, 1), tmp_path / "study/run.json"
    register(rows, tmp_path / "study")
    if left is None:
        path.unlink()
    else:
        path.write_bytes(left)
    assert register(rows, tmp_path / "study") == {}
    record = json.loads(path.read_text())
    assert record["pairs"] == 1 and record["counts"] == {"ok": 1} and record["done"] == 0
    before = path.read_bytes()
    assert register(rows, tmp_path / "study") == {} and path.read_bytes() == before
