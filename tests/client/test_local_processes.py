"""LocalSteps in several processes, some of which are killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import Script
from freestep import Client, Run
from harness import ProcessService
from meanwhile import wait_until

WORKER = Path(__file__).with_name("local_worker.py")
WHOLE = {"algorithm": "diloco", "lr": 1.0, "momentum": 0.0}


class Worker:
    """A worker process that takes as many steps as it is asked for."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._script = Script(WORKER, name, json.dumps(options))
        assert self.end() == {"joined": name}

    def begin(self, steps: int) -> None:
        self._script.write_line(steps)

    def end(self) -> dict[str, Any]:
        """The worker's report after the steps that were begun."""
        return dict(json.loads(self._script.read_line()))

    def take(self, steps: int) -> dict[str, Any]:
        self.begin(steps)
        return self.end()

    def kill(self) -> None:
        """SIGKILL."""
        self._script.kill()

    def stop(self) -> None:
        """In order, if it was not killed."""
        self._script.close_stdin()
        self._script.wait()


@pytest.fixture
def url(start_process: Callable[..., ProcessService]) -> str:
    return start_process().url


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., Worker]]:
    """Starts workers of one run; they end with the test."""
    started: list[Worker] = []

    def worker(name: str, **options: Any) -> Worker:
        started.append(Worker(name, {"url": url, "run": "local", "every": 3, **WHOLE, **options}))
        return started[-1]

    yield worker
    for each in started:
        each.stop()


@pytest.fixture
def run(url: str) -> Iterator[Run]:
    """The run, through a client that does not train."""
    with Client(url) as client:
        yield client.run("local")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_rounds_of_two_processes_count_once_and_those_of_a_killed_one_not_at_all(
    start: Callable[..., Worker], run: Run, shards: int, overlap: bool
) -> None:
    options = {"aggregation": "async", "shards": shards, "overlap": overlap}
    one, other = start("one", **options), start("other", **options)
    one.begin(6)
    other.begin(6)
    one.end()
    other.end()
    wait_until(lambda: run.status().step == 4)
    other.take(2)
    other.kill()
    again = start("other", **options)
    assert again.take(3)["steps"] == 0
    wait_until(lambda: run.status().step == 5)
    y, _ = run.pull("y")
    assert set(y["count"].tolist()) == {15.0}
    one.stop()
    again.stop()
    assert run.status().pushes == {"applied": 5, "accumulated": 0, "dropped": 0}


@pytest.mark.slow
def test_sync_rounds_go_on_without_a_killed_worker(start: Callable[..., Worker], run: Run) -> None:
    options = {"aggregation": "sync", "lease_ttl_ms": 2000}
    one, other = start("one", **options), start("other", **options)
    for number in range(1, 3):
        one.begin(3)
        other.begin(3)
        for each in (one, other):
            said = each.end()
            assert (said["counted"], said["decision"], said["step"]) == ([3.0 * number], "applied", number)
    other.take(2)
    one.begin(3)
    wait_until(lambda: run.status().pushes["accumulated"] == 3)
    other.kill()
    assert one.end()["counted"] == [9.0]
    again = start("other", **options)
    one.begin(3)
    again.begin(3)
    assert one.end()["counted"] == again.end()["counted"] == [12.0]
    assert run.status().step == 4


@pytest.mark.slow
def test_a_slow_process_takes_shorter_rounds(start: Callable[..., Worker], run: Run) -> None:
    options = {"aggregation": "async", "dynamic": True, "every": 8}
    fast, slow = start("fast", seconds=0.25, **options), start("slow", seconds=1.0, **options)
    assert fast.take(8)["length"] == 8
    assert slow.take(8)["length"] == 2
    said = slow.take(3)
    assert (said["steps"], said["length"]) == (1, 2)
    assert {each.worker: each.speed for each in run.workers()} == {"fast": 4.0, "slow": 1.0}
    fast.kill()
