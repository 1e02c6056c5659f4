"""The work of a run and a worker of a cluster, without the cluster: who is tried with whom, and what calls bring."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from cohort_scenes import QUICK as ALL
from cohort_scenes import leftovers, pairs, register, results, same_tables, table
from hypothesis import given
from hypothesis import strategies as st

from fnreg import cohort
from fnreg.cohort import solve
from fnreg.cohort.ledger import Ledger, read_attempts, read_records
from fnreg.cohort.load import Asked
from fnreg.cohort.manifest import Row
from fnreg.cohort.study import Study
from fnreg.cohort.work import PARTS, Work
from fnreg.cohort.worker import Order, Worker
from fnreg.settings import Settings

QUICK = dataclasses.replace(ALL, save="params")  # as `run` has them


def work_of(rows: list[Row], ledger: Ledger, asked: Asked) -> Work:
    return Work(
        rows, asked, ledger, attempts=read_attempts(asked.folder), before={}, pairs=len(rows),
        stop=threading.Event(), progress=lambda _: None,
    )  # fmt: skip


def done(rows: list[Row]) -> list[dict[str, object]]:
    return [{"pair_id": row.pair_id, "status": "ok"} for row in rows]


@given(
    count=st.integers(1, 700),
    poisons=st.sets(st.integers(0, 699), max_size=3),
    window=st.integers(1, 600),
    resumed=st.booleans(),
)
def test_those_that_kill_are_found_in_few_attempts(
    count: int, poisons: set[int], window: int, resumed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each killer costs a death per level of parts and two alone; nobody else is lost, whoever goes on."""
    home = tmp_path_factory.mktemp("study")
    image = home / "image.nii"
    image.write_bytes(b"")
    rows = [Row(f"p{n}", {"fixed": image, "moving": image}) for n in range(count)]
    poison = {f"p{n}" for n in poisons if n < count}
    asked, deaths, tried, ended = Asked.of(QUICK, home), 0, 0, dict[str, str]()
    with Ledger(home) as ledger:
        work = work_of(rows, ledger, asked)
        while work.left:
            part = work.take(window, 0)
            assert part and len({row.pair_id for row in part} - ended.keys()) == len(part)
            tried += 1
            if poison & {row.pair_id for row in part}:
                deaths += 1
                if resumed:  # the whole run has died
                    left = [row for row in rows if row.pair_id not in ended]
                    work = work_of(left, ledger, asked)
                else:
                    work.died([row.pair_id for row in part])
            else:
                ended |= {str(one["pair_id"]): str(one["status"]) for one in work.keep(done(part))}
            ended |= {str(one["pair_id"]): str(one["status"]) for one in work.hopeless()}
    assert ended == {row.pair_id: "crashed" if row.pair_id in poison else "ok" for row in rows}
    levels, size = 0, min(window, count)
    while size > 1:
        levels, size = levels + 1, max(1, size // PARTS)
    assert deaths <= len(poison) * (levels + 2)
    assert tried <= -(-count // window) + len(poison) * (2 * PARTS * levels + 3)


def test_suspects_are_never_with_others(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 20)
    study = Study(tmp_path / "study", rows, Asked.of(QUICK, tmp_path / "study").values)
    asked = Asked.of(QUICK, study.folder)
    with Ledger(study.folder) as ledger, work_of(rows, ledger, asked) as work:
        first, second = work.take(16, 0), work.take(16, 0)
        assert (len(first), len(second), work.left) == (16, 4, 0) and work.take(1, 0) == []
        work.died([row.pair_id for row in first])
        assert work.left == 16 and work.take(99, 1) == []  # not to one that holds another
        assert [row.pair_id for row in work.take(99, 0)] == ["p000", "p001"]
        assert work.left == 14 and work.handed == 6
        work.stop.set()
        assert work.left == work.company == 0 and work.take(99, 0) == []
    among = {record["pair_id"]: record["among"] for record in read_records(study.folder) if "among" in record}
    assert among["p000"] == 2 and among["p002"] == 16 and among["p016"] == 4
    known = read_attempts(study.folder)
    assert known["p000"].among == (16,) and known["p016"].among == ()  # released: nothing is wrong with them


# -- a worker ----------------------------------------------------------------------------------------------------------


def order(study: Path, rows: list[Row], settings: Settings = QUICK, size: int | None = None) -> Order:
    Study(study, rows, Asked.of(settings, study).values)
    return Order(settings, study, None, size, tuple(rows[0].files.values()))


def drive(worker: Worker, rows: list[Row]) -> dict[str, dict[str, object]]:
    """All rows through a worker, as many at a time as it wants."""
    found, left, held, wanted = dict[str, dict[str, object]](), list(rows), 0, 4
    while left or held:
        some, left = left[:wanted], left[wanted:]
        held += len(some)
        answer = worker.step(some, bool(left))
        found |= {str(one["pair_id"]): one for one in answer.records}
        held, wanted = held - len(answer.records), answer.wanted
    return found


@pytest.mark.parametrize("size", [1, 3, None])
def test_a_worker_does_what_the_local_engine_does(size: int | None, tmp_path: Path) -> None:
    rows, worker = pairs(tmp_path, 30), Worker()
    assert worker.start(order(tmp_path / "a", rows, size=size), threads=1, share=0.5) != ""
    found = drive(worker, rows)
    worker.end()
    assert set(found) == {row.pair_id for row in rows} and worker.step([], False).ended
    register(rows, tmp_path / "b", batch_size=size)
    known = cohort.read_ledger(tmp_path / "b")
    assert results(tmp_path / "a").keys() == results(tmp_path / "b").keys()
    for name, one in found.items():
        assert one["value_after"] == pytest.approx(known[name]["value_after"], rel=1e-4)
        assert one["settings_sha"] == known[name]["settings_sha"]
    assert not (tmp_path / "a" / "ledger").exists()  # it is not the worker's


def test_a_worker_that_is_to_end_finishes_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, worker, real = pairs(tmp_path, 4), Worker(), solve.solve
    computing, go_on = threading.Event(), threading.Event()

    def slow(batch: object, asked: Asked, *, width: int) -> object:
        computing.set()
        assert go_on.wait(30)
        return real(batch, asked, width=width)  # type: ignore[arg-type]

    monkeypatch.setattr(solve, "solve", slow)
    worker.start(order(tmp_path / "study", rows, size=2), threads=1, share=1.0)
    caller = threading.Thread(target=lambda: (computing.wait(30), worker.end(), go_on.set()))
    caller.start()
    answers = [worker.step(rows, False)]
    while not answers[-1].ended:
        answers.append(worker.step([], False))
    caller.join()
    assert [one["pair_id"] for answer in answers for one in answer.records] == ["p000", "p001"]
    assert set(results(tmp_path / "study")) == {"p000", "p001"} and leftovers(tmp_path / "study") == []


def test_what_ends_a_worker_comes_after_what_it_has_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnreg.cohort import local

    rows, worker, real = pairs(tmp_path, 3), Worker(), local.save

    def full(chunk: list[object], asked: Asked) -> object:
        if chunk[0].pair.row.pair_id == "p001":  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        return real(chunk, asked)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "save", full)
    worker.start(order(tmp_path / "study", rows, size=1), threads=1, share=1.0)
    names = list[str]()
    with pytest.raises(OSError, match="No space left"):
        while True:
            names += [one["pair_id"] for one in worker.step([] if names else rows, False).records]
    assert "p000" in names and "p001" not in names


def test_a_worker_has_to_see_the_files(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 1)
    given = order(tmp_path / "study", rows)
    with pytest.raises(FileNotFoundError, match=r"none.nii.*same path on all machines"):
        Worker().start(given._replace(needed=(tmp_path / "none.nii",)), threads=1, share=1.0)
    with pytest.raises(FileNotFoundError, match=r"settings.toml.*same path"):
        Worker().start(given._replace(folder=tmp_path / "other"), threads=1, share=1.0)


def test_local_goes_on_with_parts_of_what_died_together(tmp_path: Path) -> None:
    """Of 40 that died together five go at a time, and the results are those of an undisturbed run."""
    rows = pairs(tmp_path, 40)
    study = Study(tmp_path / "study", rows, Asked.of(QUICK, tmp_path / "study").values)
    with Ledger(study.folder) as ledger:
        ledger.append([{"pair_id": row.pair_id, "status": "begun", "among": 40} for row in rows])
    register(rows, study.folder)
    among = [record["among"] for record in read_records(study.folder) if record["status"] == "begun"]
    assert among[40:] == [5] * 40
    register(rows, tmp_path / "calm")
    same_tables(study.folder, tmp_path / "calm")
    assert {row["status"] for row in table(study.folder).values()} == {"ok"}
