"""The engine "ray": the same work by many processes on many machines, on actors of Ray.

Ray starts processes, carries calls, and tells who died; it repeats nothing.  What is done, and what is tried again, is
decided by `Work` in the process that calls, so a run is as safe as its ledger.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from fnreg import __version__, notes
from fnreg.cohort.ledger import Record
from fnreg.cohort.local import LOADERS
from fnreg.cohort.save import sweep
from fnreg.cohort.work import Work
from fnreg.cohort.worker import Answer, Order, Worker
from fnreg.extras import require

POLL = 0.2  # seconds in which an interrupt is noticed
FALSE_STARTS = 3  # of a worker, one after the other, before its place is given up
FAREWELL = 5.0  # seconds for a process to be gone
ANSWER = 10.0  # seconds in which a cluster is to be reached
PATIENCE = 30.0  # seconds in which a worker is to begin, before the user is told that it has not


class ClusterError(RuntimeError):
    """No cluster of Ray answers, or it has no place for a worker, or all workers are lost."""


class _Place:
    """Where one worker is, and what it has to do.

    options : of the actor; threads, share : what it takes of its machine
    since : when its worker was asked to begin, until it has
    """

    def __init__(self, options: dict[str, Any], threads: int, share: float) -> None:
        self.options, self.threads, self.share = options, threads, share
        self.actor: Any = None
        self.held: set[str] = set()
        self.busy, self.false_starts = 0.0, 0
        self.since: float | None = None

    def start(self, ray: Any, order: Order, calls: dict[Any, _Place]) -> None:
        """Begin a worker, which counts once it has answered."""
        never = {"max_restarts": 0, "max_task_retries": 0}
        self.actor = ray.remote(Worker).options(**self.options, **never, max_concurrency=2).remote()
        self.false_starts, self.since = self.false_starts + 1, time.monotonic()
        calls[self.actor.start.remote(order, threads=self.threads, share=self.share)] = self

    def lost(self) -> int:
        """The worker is no more; how many in a row were so before they answered."""
        self.actor, self.since, self.held, self.busy = None, None, set(), 0.0
        return self.false_starts

    def begun(self) -> None:
        """The worker has answered."""
        self.false_starts, self.since = 0, None


def cluster(work: Work, order: Order, *, address: str = "ray", workers: int | None = None) -> Iterator[Record]:
    """All the work, by the workers of a cluster.

    address : "ray", the cluster that runs on this machine, else one that is started and ended here; or an address
    workers : how many; by default one on each machine, or with the device "cuda" one for each GPU

    Raises ClusterError, and what ends a worker in order, such as WriteError where the disk is full.
    """
    work.progress(work.now)
    if not work.left:
        return
    with _connected(address) as ray:
        places = _places(ray, order.settings.device == "cuda", workers)
        calls: dict[Any, _Place] = {}
        try:
            yield from _rounds(ray, work, order, places, calls)
        finally:
            _end(ray, work, places, calls)
    work.progress(work.now)


def _rounds(ray: Any, work: Work, order: Order, places: list[_Place], calls: dict[Any, _Place]) -> Iterator[Record]:
    """Hand out rows and take records; `calls` are those that are not answered."""
    last, told_to_end, warned = "", False, False
    while work.left or any(place.held for place in places):
        if work.stop.is_set() and not told_to_end:
            told_to_end = True
            for place in places:
                if place.held:
                    place.actor.end.remote()
        for place in places:
            if work.left and place not in calls.values():
                if place.actor is None:
                    place.start(ray, order, calls)
                else:  # it had nothing to do, and others died
                    _hand_out(work, place, calls, len(places))
        warned = warned or _warn_of_late_ones(places)
        found, _ = ray.wait(list(calls), timeout=POLL)
        for call in found:
            place = calls.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayTaskError as problem:  # the worker is well, and says what is wrong
                raise _cause(problem) from problem
            except ray.exceptions.RayError as problem:
                last = " ".join(str(problem).split())[:500]
                work.died(place.held)
                yield from work.hopeless()
                if place.lost() >= FALSE_STARTS:
                    places.remove(place)
                continue
            if isinstance(answer, Answer):
                yield from _taken(work, place, answer)
                if not answer.ended:
                    _hand_out(work, place, calls, len(places), answer.wanted)
            elif answer != __version__:
                raise ClusterError(f"a worker has fnreg {answer} and this is {__version__}: install the same")
            else:
                place.begun()
                _hand_out(work, place, calls, len(places))
        if not places and work.left:
            raise ClusterError(f"no worker is left, what was done is kept: {last}")


def _warn_of_late_ones(places: list[_Place]) -> bool:
    """Ray waits for cores and GPUs without end and without a word: whether the user had to be told."""
    late = sum(place.since is not None and time.monotonic() - place.since > PATIENCE for place in places)
    if late:
        notes.warn(
            f"{late} of {len(places)} workers have not begun within {PATIENCE:g} s: others may be using the cores or "
            "GPUs of the cluster, which ray status tells; they begin once there is room, interrupt to end the run",
            stacklevel=2,
        )
    return late > 0


def _hand_out(work: Work, place: _Place, calls: dict[Any, _Place], workers: int, wanted: int = 2 * LOADERS) -> None:
    """Call a worker with the rows that it wants, as far as they are its share of all; not where it has none to do."""
    share = -(-(work.left + work.handed) // workers) - len(place.held)
    rows = work.take(min(wanted, share), len(place.held)) if wanted > 0 and share > 0 else []
    place.held |= {row.pair_id for row in rows}
    if place.held:
        more = work.company > 0 and share > len(rows)
        calls[place.actor.step.remote(rows, more)] = place


def _taken(work: Work, place: _Place, answer: Answer) -> Iterator[Record]:
    """Keep the records of a worker."""
    records = work.keep(answer.records)
    work.busy += answer.busy - place.busy
    place.busy = answer.busy
    place.held -= {record["pair_id"] for record in records}
    if answer.ended:  # the turn of the others has not come
        place.held = set()
    work.progress(work.now)
    yield from records


def _cause(problem: Any) -> Exception:
    """The error of a worker as it was raised there."""
    return problem.cause if isinstance(problem.cause, Exception) else problem


def _end(ray: Any, work: Work, places: list[_Place], calls: dict[Any, _Place]) -> None:
    """End all workers, whatever they are doing, and remove what they were writing."""
    for place in places:
        if place.actor is not None:
            ray.kill(place.actor)
    if calls:
        ray.wait(list(calls), num_returns=len(calls), timeout=FAREWELL)
    held = {name for place in places for name in place.held}
    if held:
        sweep(work.asked.folder, held, alone=False)


# -- where workers are -------------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str) -> Generator[Any]:
    """Ray, connected to a cluster; to that of the caller where there is one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = require("ray", "ray", "a cluster")
    if ray.is_initialized() and address == "ray":
        yield ray
        return
    try:
        if address != "ray":
            _answers(address)
        ray.init(
            None if address == "ray" else address, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    except (ConnectionError, TimeoutError) as problem:
        raise ClusterError(
            f"no Ray cluster answers at {address}: begin it with ray start --head, and give this process Ray's token "
            "where the cluster asks for one"
        ) from problem
    except (RuntimeError, ValueError, ImportError, OSError) as problem:
        told = " ".join(str(problem).split())[:500]
        raise ClusterError(f"the Ray cluster at {address} cannot be used: {told}") from problem
    try:
        yield ray
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError at once, where Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=ANSWER):
        pass


def _places(ray: Any, gpus: bool, workers: int | None) -> list[_Place]:
    """One on each GPU, else on each machine, or so many spread over them; those of a machine share its cores."""
    kind = "GPU" if gpus else "CPU"
    nodes = {one["NodeID"]: one["Resources"] for one in ray.nodes() if one["Alive"] and one["Resources"].get(kind)}
    if not nodes:
        raise ClusterError(f"the Ray cluster has no {kind}{': leave out --device cuda' if gpus else ''}")
    most = max(int(has["GPU"]) for has in nodes.values()) if gpus else -(-(workers or 1) // len(nodes))
    seats = [name for turn in range(most) for name, has in nodes.items() if not gpus or turn < has["GPU"]]
    if gpus and workers is not None and workers > len(seats):
        raise ClusterError(f"workers is {workers} and the Ray cluster has {len(seats)} GPUs: give no more than these")
    seats = seats[:workers]
    affinity: Any = require("ray.util.scheduling_strategies", "ray", "a cluster").NodeAffinitySchedulingStrategy
    places: list[_Place] = []
    for name in seats:
        each = nodes[name].get("CPU", 0) / Counter(seats)[name]
        cores = math.floor(each) if each >= 1 else math.floor(each * 1e4) / 1e4  # Ray counts in such parts
        options = {"num_cpus": cores, "num_gpus": int(gpus), "scheduling_strategy": affinity(name, soft=False)}
        places.append(_Place(options, max(1, int(cores)), 1.0 if gpus else 1 / Counter(seats)[name]))
    return places
