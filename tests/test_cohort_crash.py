"""Data sets under blows: processes that are killed, disks that are full, users that lose their patience."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cohort_scenes import QUICK, leftovers, pairs, register, results, same_tables, whole

from fnreg import cohort
from fnreg.cohort import local
from fnreg.cohort.ledger import read_attempts, read_records
from fnreg.cohort.manifest import Row, write_manifest
from fnreg.cohort.save import sweep
from fnreg.cohort.work import Work

# What each process does: as `cohort_scenes.register`, on a table; a pair that is named kills who solves it.
PROGRAM = """
import os, signal, sys
from fnreg import cohort
from fnreg.cohort import solve
from cohort_scenes import QUICK

table, output, size, poison = sys.argv[1:5]
real = solve.solve

def solved(batch, asked, **options):
    if any(pair.row.pair_id == poison for pair in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(batch, asked, **options)

solve.solve = solved
print("ready", flush=True)
for record in cohort.run(table, QUICK, output=output, batch_size=int(size)):
    print(record["pair_id"], flush=True)
"""


def start(table: Path, output: Path, size: int, poison: str = "") -> subprocess.Popen[str]:
    """A process that is about to register."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", PROGRAM, str(table), str(output), str(size), poison]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.communicate()
    return child


def table_of(rows: list[Row], home: Path) -> Path:
    (home / "pairs.tsv").write_bytes(write_manifest(rows))
    return home / "pairs.tsv"


def test_killed_at_random_moments_a_study_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 24)
    table, study = table_of(rows, tmp_path), tmp_path / "study"
    chance, kept = random.Random(5), 0
    for _ in range(10):
        child = start(table, study, 4)
        time.sleep(chance.uniform(0, 0.35))
        child.kill()
        child.communicate()
        known = cohort.read_ledger(study)
        assert len(known) >= kept  # nothing is lost
        kept = len(known)
        for name in known:  # what is said to be there is there, and whole
            assert name in results(study)
    before = results(study)
    register(rows, study, batch_size=4)
    whole(study, rows)
    done = [record["pair_id"] for record in read_records(study) if record["status"] == "ok"]
    assert len(done) == len(set(done)) == 24  # nothing is done twice
    after = results(study)
    for name in cohort.read_ledger(study):
        assert name not in before or name not in done[: len(before)] or after[name] == before[name]
    register(rows, tmp_path / "calm", batch_size=4)
    same_tables(study, tmp_path / "calm")


def test_a_pair_that_kills_its_process_is_found_and_the_others_are_done(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 6)
    table, study = table_of(rows, tmp_path), tmp_path / "study"
    codes: list[int] = []
    for _ in range(5):
        child = start(table, study, 3, poison="p001")
        child.communicate()
        codes.append(child.returncode)
        if child.returncode == 0:
            break
    # In company, then alone twice; then it is not tried again.
    assert codes == [-signal.SIGKILL] * 3 + [0]
    whole(study, rows)
    known = cohort.read_ledger(study)
    assert [name for name, record in known.items() if record["status"] != "ok"] == ["p001"]
    assert known["p001"]["status"] == "crashed" and known["p001"]["attempts"] == 3
    assert "fnreg register" in (study / "errors" / "p001.txt").read_text()
    # Alone again when it is asked for, and well once nothing kills.
    found = register(rows, study, batch_size=3, retry_failed=True)
    assert {name: record["status"] for name, record in found.items()} == {"p001": "ok"}
    begun = [record for record in read_records(study) if record["status"] == "begun" and record["pair_id"] == "p001"]
    assert [record["among"] for record in begun] == [4, 1, 1, 1]
    register(rows, tmp_path / "calm", batch_size=3)
    same_tables(study, tmp_path / "calm")


def test_a_process_that_dies_while_it_reads_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(tmp_path, 3)

    def dead(*_: object) -> None:
        raise SystemExit  # as if the process had ended here: nobody puts anything in order

    monkeypatch.setattr(local, "load", dead)
    monkeypatch.setattr(Work, "__exit__", lambda *_: None)
    with pytest.raises(SystemExit):
        register(rows, tmp_path / "study", batch_size=2)
    assert {known.among for known in read_attempts(tmp_path / "study").values()} == {(3,)}
    monkeypatch.undo()
    found = register(rows, tmp_path / "study", batch_size=2)
    assert {record["attempts"] for record in found.values()} == {2}


@pytest.mark.parametrize("saves", ["params", "params+xfm+warped"])
def test_a_disk_that_is_full_at_any_moment_loses_nothing(
    saves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write in turn fails, be it of a file or of the ledger; what was done before is kept, and the rest is done
    later."""
    rows, write = pairs(tmp_path, 2), 0
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir")}
    register(rows, tmp_path / "calm", batch_size=2, save=saves)
    while True:
        study, counted = tmp_path / f"{write}", 0

        def full(name: str, allowed: int = write) -> Callable[..., None]:
            def call(*given: object, **more: object) -> None:
                nonlocal counted
                counted += 1
                if counted > allowed:
                    raise OSError(28, "No space left on device")
                real[name](*given, **more)

            return call

        for name in real:
            monkeypatch.setattr(os, name, full(name))
        try:
            register(rows, study, batch_size=2, save=saves)
            ended = True
        except OSError as problem:
            assert "No space left" in str(problem)
            ended = False
        monkeypatch.undo()
        known = cohort.read_ledger(study)
        assert set(known) <= set(results(study))
        left = register(rows, study, batch_size=2, save=saves)
        assert not set(left) & {name for name, record in known.items() if record["status"] == "ok"}
        whole(study, rows)
        same_tables(study, tmp_path / "calm")
        if ended:
            break
        write += 1
    assert write > 10


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: Path) -> None:
    """Of 400 pairs the second half takes no more memory than the first: live objects, not what the system gives."""
    import gc
    import tracemalloc

    import torch

    few = pairs(tmp_path, 8)
    rows = [Row(f"r{number:04d}", few[number % 8].files) for number in range(400)]
    held: list[tuple[int, int]] = []
    tracemalloc.start()
    for done, _ in enumerate(cohort.run(rows, QUICK, output=tmp_path / "study", batch_size=20), 1):
        if done % 100 == 0:
            gc.collect()
            tensors = sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)
            held.append((tracemalloc.get_traced_memory()[0], tensors))
    tracemalloc.stop()
    assert held[-1][0] < held[1][0] * 1.1 + 2**18
    assert held[-1][1] <= held[1][1] * 1.1 + 200


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pairs" / "a").mkdir(parents=True)
    (tmp_path / "errors").mkdir()
    mine = [".a.0123abcd.partial", "a/.a.0123abcd.partial", "a/.x.tfm.0123abcd.tmp"]
    mine = [f"pairs/{name}" for name in mine] + ["errors/.a.txt.0123abcd.tmp"]
    others = ["pairs/.b.0123abcd.partial", "errors/.b.txt.0123abcd.tmp", "errors/b.txt", "pairs/a/mine.txt"]
    top = ".pairs.tsv.0123abcd.tmp"
    for name in (*mine, *others, top):
        if name.endswith(".partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").write_text("")
        else:
            (tmp_path / name).write_text("")
    sweep(tmp_path, {"a"}, alone=False)
    assert not any((tmp_path / name).exists() for name in mine)
    assert all((tmp_path / name).exists() for name in (*others, top))
    sweep(tmp_path, set(), alone=True)
    assert not (tmp_path / top).exists() and all((tmp_path / name).exists() for name in others)
    sweep(tmp_path / "none", {"a"}, alone=True)


# -- interrupts ----------------------------------------------------------------------------------------------------


def command(table: Path, study: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-m", "fnreg", "run", str(table), "-o", str(study), "--start", "header", *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(study: Path, count: int, child: subprocess.Popen[str]) -> None:
    """Until so many pairs are done."""
    until = time.monotonic() + 60
    while len(cohort.read_ledger(study)) < count:
        assert child.poll() is None and time.monotonic() < until, child.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_end_a_run_in_order(times: int, tmp_path: Path) -> None:
    rows = pairs(tmp_path, 8)
    many = [Row(f"r{number:04d}", rows[number % 8].files) for number in range(600)]
    table, study = table_of(many, tmp_path), tmp_path / "study"
    child = command(table, study, "--batch-size", "2", "-n", "6", "--levels", "2")
    wait_for(study, 4, child)
    begun = time.monotonic()
    for _ in range(times):
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, told = child.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert child.returncode == 130 and "what was done is kept" in told and "Traceback" not in told
    assert leftovers(study) == []
    known = cohort.read_ledger(study)
    assert 4 <= len(known) < 600 and set(known) == set(results(study))
    attempts = read_attempts(study)
    assert all(not found.among for found in attempts.values())  # nobody is a suspect
