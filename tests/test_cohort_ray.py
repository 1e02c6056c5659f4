"""Data sets on a cluster of Ray: the same study as in one process, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cohort_poison import poison
from cohort_scenes import QUICK, leftovers, pairs, register, same_tables, whole

from fnreg import cli, cohort
from fnreg.cohort import ClusterError, engine
from fnreg.cohort.ledger import read_attempts, read_records
from fnreg.cohort.manifest import Row, write_manifest
from fnreg.extras import MissingExtraError
from fnreg.specs import SettingsError

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
OWN = ("--engine", "ray")
SMALL = {"num_cpus": 1, "object_store_memory": 2**27}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines of one core each, both on this one, to which this process is connected."""
    pytest.importorskip("ray", reason="needs Ray: pip install fnreg[ray]")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}).items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=SMALL)
        try:
            made.add_node(**SMALL)
            hook = {"worker_process_setup_hook": "cohort_poison.begin"}
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR", runtime_env=hook)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def begun(study: Path, name: str) -> list[int]:
    """Among how many each attempt at a pair was."""
    each = read_records(study)
    return [record["among"] for record in each if record["status"] == "begun" and record["pair_id"] == name]


def test_two_machines_make_the_study_that_one_process_makes(cluster: Any, tmp_path: Path) -> None:
    rows = pairs(tmp_path, 40)
    register(rows, tmp_path / "local")
    found = register(rows, tmp_path / "ray", engine="ray")
    whole(tmp_path / "ray", rows)
    same_tables(tmp_path / "ray", tmp_path / "local")
    assert {record["attempts"] for record in found.values()} == {1}
    assert register(rows, tmp_path / "ray", engine="ray") == {}
    assert register(rows, tmp_path / "ray") == {}  # an engine is not a setting of the study
    assert register(rows, tmp_path / "local", engine="ray", workers=3) == {}


def test_pairs_that_kill_or_fail_harm_no_other(cluster: Any, tmp_path: Path) -> None:
    rows = pairs(tmp_path, 24)
    poison(tmp_path, "p005", "kill")
    poison(tmp_path, "p011", "error")
    (tmp_path / "f7.nii").write_text("a note")
    found = register(rows, tmp_path / "study", engine="ray", batch_size=6)
    whole(tmp_path / "study", rows)
    bad = {name: record["status"] for name, record in found.items() if record["status"] != "ok"}
    assert bad == {"p005": "crashed", "p007": "invalid_input", "p011": "failed"}
    assert "what a pity" in found["p011"]["reason"] and "in solved" in (tmp_path / "study/errors/p011.txt").read_text()
    among = begun(tmp_path / "study", "p005")
    assert among[0] > 1 and among[-2:] == [1, 1] and found["p005"]["attempts"] == len(among) <= 4
    # A later run leaves it alone, here and on a cluster, until it is asked to.
    assert register(rows, tmp_path / "study", engine="ray") == {}
    (tmp_path / "kill" / "p005").unlink()
    again = register(rows, tmp_path / "study", engine="ray", retry_failed=True)
    assert {name: record["status"] for name, record in again.items()} == {
        "p005": "ok", "p007": "invalid_input", "p011": "failed",
    }  # fmt: skip
    assert begun(tmp_path / "study", "p005")[-1] == 1


def soon(met: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    rows = pairs(tmp_path, 30)
    poison(tmp_path, "p020", "slow")

    def kill() -> None:
        soon((tmp_path / "pid").is_file)
        (tmp_path / "slow" / "p020").unlink()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = register(rows, tmp_path / "study", engine="ray", batch_size=4)
    killer.join()
    whole(tmp_path / "study", rows)
    assert {record["status"] for record in found.values()} == {"ok"}
    outcomes = [record["pair_id"] for record in read_records(tmp_path / "study") if record["status"] == "ok"]
    assert len(outcomes) == len(set(outcomes)) == 30
    assert found["p020"]["attempts"] == 2
    register(rows, tmp_path / "calm", batch_size=4)
    same_tables(tmp_path / "study", tmp_path / "calm")


def test_a_run_that_is_asked_to_stop_ends_after_its_batches(cluster: Any, tmp_path: Path) -> None:
    rows, stop = pairs(tmp_path, 30), threading.Event()
    done = 0
    for _ in cohort.run(rows, QUICK, output=tmp_path / "study", batch_size=2, engine="ray", stop=stop):
        done += 1
        stop.set()
    known = cohort.read_ledger(tmp_path / "study")
    assert 1 <= done == len(known) < 30 and leftovers(tmp_path / "study") == []
    assert all(not attempts.among for attempts in read_attempts(tmp_path / "study").values())  # nobody is a suspect
    assert len(register(rows, tmp_path / "study", engine="ray")) == 30 - done
    whole(tmp_path / "study", rows)


def test_workers_that_wait_for_cores_are_told_of(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from fnreg.cohort import cluster as engine_ray

    class Other:
        def ready(self) -> None:
            pass

    others = [ray.remote(num_cpus=1)(Other).remote() for _ in range(2)]
    ray.get([other.ready.remote() for other in others])
    monkeypatch.setattr(engine_ray, "PATIENCE", 1.0)
    real = engine_ray.notes.warn

    def warn(text: str, **options: Any) -> None:
        real(text, **options)
        for other in others:
            ray.kill(other)

    monkeypatch.setattr(engine_ray.notes, "warn", warn)
    with pytest.warns(UserWarning, match="2 of 2 workers have not begun within 1 s.*ray status") as told:
        assert len(register(pairs(tmp_path, 4), tmp_path / "study", engine="ray")) == 4
    assert len(told) == 1  # however long it takes


def test_what_ends_a_worker_ends_the_run(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real = pairs(tmp_path, 4), engine.Order
    monkeypatch.setattr(engine, "Order", lambda *given: real(*given[:4], (tmp_path / "none.nii",)))
    with pytest.raises(FileNotFoundError, match="same path on all machines"):
        register(rows, tmp_path / "study", engine="ray")
    monkeypatch.undo()
    assert len(register(rows, tmp_path / "study", engine="ray")) == 4


def test_a_cluster_without_gpus(cluster: Any, tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(ClusterError, match="no GPU"):
        register(pairs(tmp_path, 2), tmp_path / "study", dataclasses.replace(QUICK, device="cuda"), engine="ray")


# -- a cluster of a run's own ------------------------------------------------------------------------------------------


def command(home: Path, rows: list[Row], *more: str) -> subprocess.Popen[str]:
    """`fnreg run` on a cluster that begins and ends with it, in a group of processes as at a terminal."""
    pytest.importorskip("ray", reason="needs Ray: pip install fnreg[ray]")
    (home / "pairs.tsv").write_bytes(write_manifest(rows))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": "local"}
    arguments = ["run", str(home / "pairs.tsv"), "-o", str(home / "study"), "--start", "header", "-n", "6"]
    arguments += ["--levels", "2", "--figures", "none", "--workers", "2", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "fnreg", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip


def descendants(pid: int) -> set[int]:
    """A process and all that it and these have begun."""
    found, new = {pid}, {pid}
    while new:
        new = {int(one) for task in new for one in children(task)} - found
        found |= new
    return found


def children(pid: int) -> list[str]:
    try:
        return [one for path in Path(f"/proc/{pid}/task").iterdir() for one in (path / "children").read_text().split()]
    except OSError:
        return []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_when_the_run_is_killed_nobody_is_left_and_the_next_one_goes_on(tmp_path: Path) -> None:
    few = pairs(tmp_path, 8)
    rows = [Row(f"r{number:04d}", few[number % 8].files) for number in range(400)]
    study = tmp_path / "study"
    child = command(tmp_path, rows, *OWN, "--batch-size", "4")
    soon(lambda: len(cohort.read_ledger(study)) >= 20 or child.poll() is not None)
    assert child.poll() is None, child.communicate()
    there = descendants(child.pid)
    workers = [pid for pid in there if "ray::Worker" in name_of(pid)]
    assert len(workers) == 2
    child.kill()
    child.wait()
    known = set(cohort.read_ledger(study))
    soon(lambda: not any(alive(pid) for pid in workers), 30)
    for pid in filter(alive, there):  # agents of Ray's own outlive it for a while
        os.kill(pid, signal.SIGKILL)
    child.communicate()
    assert 20 <= len(known) < 400
    rest = register(rows, study, batch_size=64)
    assert set(rest) == {row.pair_id for row in rows} - known
    whole(study, rows)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts(times: int, tmp_path: Path) -> None:
    few = pairs(tmp_path, 8)
    rows = [Row(f"r{number:04d}", few[number % 8].files) for number in range(400)]
    study = tmp_path / "study"
    child = command(tmp_path, rows, *OWN, "--batch-size", "2")
    soon(lambda: len(cohort.read_ledger(study)) >= 4 or child.poll() is not None)
    assert child.poll() is None, child.communicate()
    there, clock = descendants(child.pid), time.monotonic()
    for _ in range(times):
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.1)
    _, told = child.communicate(timeout=60)
    assert time.monotonic() - clock < 20
    assert child.returncode == 130 and "what was done is kept" in told and "Traceback" not in told
    assert leftovers(study) == [] and not any(alive(pid) for pid in there)
    assert 4 <= len(cohort.read_ledger(study)) < 400
    assert all(not found.among for found in read_attempts(study).values())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_engines_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(tmp_path, 1)
    for more, told in (
        ({"engine": "dask"}, "unknown engine 'dask'.*local, ray, or the address"),
        ({"engine": "locale"}, "did you mean local"),
        ({"engine": ""}, "unknown engine ''"),
        ({"engine": "ray://head"}, "unknown engine 'ray://head'"),
        ({"engine": "head:x"}, "unknown engine 'head:x'"),
        ({"engine": "ray", "workers": 0}, "workers is 0: expected at least 1"),
        ({"workers": 2}, "the engine is local"),
        ({"engine": "ray", "batch_size": 0}, "batch size is 0"),
    ):
        with pytest.raises(SettingsError, match=told):
            register(rows, tmp_path / "study", **more)
    (tmp_path / "pairs.tsv").write_bytes(write_manifest(rows))
    run = ["run", str(tmp_path / "pairs.tsv"), "-o", str(tmp_path / "study")]
    assert cli.main([*run, "--engine", "ray", "--device", "cuda:1"]) == 2
    assert "one GPU each" in capsys.readouterr().err
    assert cli.main([*run, "--workers", "-1", "--engine", "ray"]) == 2
    assert not (tmp_path / "study").exists()


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(tmp_path, 1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r'pip install "fnreg\[ray\]"'):
        register(rows, tmp_path / "study", engine="ray")
    (tmp_path / "pairs.tsv").write_bytes(write_manifest(rows))
    assert cli.main(["run", str(tmp_path / "pairs.tsv"), "-o", str(tmp_path / "study"), "--engine", "h:6379"]) == 4
    assert "fnreg[ray]" in capsys.readouterr().err and not (tmp_path / "study").exists()


class _Missing:
    """As if Ray were not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_where_no_cluster_answers(tmp_path: Path) -> None:
    """In a process of its own: a process is connected to one cluster."""
    pytest.importorskip("ray", reason="needs Ray: pip install fnreg[ray]")
    child = command(tmp_path, pairs(tmp_path, 1), "--engine", "127.0.0.1:9")
    out, told = child.communicate(timeout=60)
    assert child.returncode == 4 and out == ""
    assert "127.0.0.1:9" in told and "ray start --head" in told and "Traceback" not in told
