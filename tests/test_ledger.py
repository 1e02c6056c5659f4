"""The ledger: what was appended is there whatever happens after, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnreg.cohort.ledger import FOLDER, Attempts, Ledger, LedgerError, read_attempts, read_ledger, read_records


def record(name: str, **more: object) -> dict[str, object]:
    return {"pair_id": name, **more}


def records_of(study: Path) -> list[dict[str, object]]:
    """All records without their time."""
    found = [dict(one) for one in read_records(study)]
    assert all(isinstance(one.pop("time", 0.0), float) for one in found)
    return found


def test_the_last_record_of_a_pair_holds_over_all_shards(tmp_path: Path) -> None:
    for shard, records in enumerate(([record("a", n=1), record("b", n=1), record("a", n=2)], [record("c", n=3)])):
        with Ledger(tmp_path, shard) as ledger:
            for one in records:
                ledger.append([one])
    assert {name: found["n"] for name, found in read_ledger(tmp_path).items()} == {"a": 2, "b": 1, "c": 3}
    assert read_ledger(tmp_path / "none") == {}


@given(cut=st.integers(0, 200), more=st.booleans())
def test_a_cut_ledger_keeps_what_was_whole(cut: int, more: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    study = tmp_path_factory.mktemp("study")
    records = [record(f"pair-{n}", value=n, note="ä\n") for n in range(5)]
    with Ledger(study) as ledger:
        ledger.append(records)
    path = study / FOLDER / "shard-0000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = sum(1 for end in range(len(whole)) if whole[end : end + 1] == b"\n" and end <= cut)
    expected = records[:kept]
    assert records_of(study) == expected
    if more:
        with Ledger(study) as ledger:
            ledger.append([record("new")])
        assert records_of(study) == [*expected, record("new")]


def test_a_writer_that_is_killed_leaves_whole_records_and_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom fnreg.cohort.ledger import Ledger\n"
        "with Ledger(sys.argv[1]) as ledger:\n"
        "    for n in range(10**9):\n"
        "        ledger.append([{'pair_id': str(n), 'filler': 'x' * 5000}])\n"
        "        print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(20)]
    with pytest.raises(LedgerError, match="another run is writing"), Ledger(tmp_path):
        pass
    os.kill(child.pid, signal.SIGKILL)
    told += [int(line) for line in child.stdout if line.endswith("\n")]
    child.wait()
    child.stdout.close()
    found = read_ledger(tmp_path)
    assert {str(n) for n in told} <= set(found)
    assert all(len(one["filler"]) == 5000 for one in found.values())
    with Ledger(tmp_path) as ledger:
        ledger.append([record("after")])
    assert "after" in read_ledger(tmp_path)


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(LedgerError, match="cannot be written"), Ledger(tmp_path):
        pass
    with Ledger(tmp_path / "study") as ledger:
        with pytest.raises(ValueError, match="JSON"):
            ledger.append([record("a", value=float("nan"))])

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.append([record("a")])
    monkeypatch.undo()
    assert read_ledger(tmp_path / "study") == {}


def test_a_line_that_found_no_room_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of a line, and then there is room again."""
    write = os.write

    def full(file: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(28, "No space left on device")
        return write(file, content[: len(content) // 2])

    with Ledger(tmp_path) as ledger:
        ledger.append([record("a")])
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.append([record("b"), record("c")])
        monkeypatch.undo()
        ledger.append([record("d")])
        ledger.append([record("e")])
    lines = (tmp_path / FOLDER / "shard-0000.jsonl").read_bytes().split(b"\n")
    assert {"a", "d", "e"} <= set(read_ledger(tmp_path)) and len(lines) == len(set(read_ledger(tmp_path))) + 2


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    lines = ['{"pair_id": "a"}', "[1]", '{"pair_id": 3}', '{"other": 1}', "nonsense", json.dumps(record("b"))]
    (tmp_path / FOLDER / "shard-0000.jsonl").write_text("\n".join(lines))
    assert list(read_ledger(tmp_path)) == ["a", "b"]


def test_attempts_are_counted_and_deaths_told_apart(tmp_path: Path) -> None:
    def begun(name: str, among: int = 4) -> dict[str, object]:
        return record(name, status="begun", among=among)

    with Ledger(tmp_path) as ledger:
        for name in "abcd":
            ledger.append([begun(name)])
        ledger.append([record("a", status="ok"), record("d", status="released")])
    with Ledger(tmp_path, 1) as ledger:
        ledger.append([begun("b", 1), begun("c", 1), begun("c", 1)])
        ledger.append([record("b", status="failed"), begun("b")])
    found = read_attempts(tmp_path)
    assert found == {"a": Attempts(1), "b": Attempts(3, (4,)), "c": Attempts(3, (4, 1, 1)), "d": Attempts(0)}
    assert [found[name].alone for name in "bc"] == [0, 2]
    assert {name: one["status"] for name, one in read_ledger(tmp_path).items()} == {"a": "ok", "b": "failed"}


def test_of_two_shards_the_later_record_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard, now in ((3, 1.0), (0, 2.0)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with Ledger(tmp_path, shard) as ledger:
            ledger.append([record("a", shard=shard)])
    assert read_ledger(tmp_path)["a"]["shard"] == 0
