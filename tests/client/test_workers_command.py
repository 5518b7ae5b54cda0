"""`freestep workers --watch`: how fast each worker is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import forked
from freestep import Client
from freestep.api.models import WorkerStatus
from freestep.commands.workers import Speeds
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import TENSORS, Api


def worker(name: str, pushes: int, speed: float | None = None) -> WorkerStatus:
    return WorkerStatus(worker=name, ttl_ms=1, expires_in_ms=1, pushes=pushes, speed=speed)


def speeds(looks: list[tuple[float, list[WorkerStatus]]]) -> list[list[float | None]]:
    measured = Speeds()
    return [[each.speed for each in measured.complete(found, now)] for now, found in looks]


def test_a_speed_is_that_of_the_last_seconds() -> None:
    looks = [(float(now), [worker("a", 10 + 3 * now)]) for now in range(20)]
    assert speeds(looks) == [[None], *[[3.0]] * 19]
    # Of one that stops after a second, it is 0 when the window has passed.
    stopped = [(0.0, [worker("a", 0)]), *[(float(now), [worker("a", 20)]) for now in range(1, 13)]]
    assert [made for (made,) in speeds(stopped)][1:] == [20 / now for now in range(1, 11)] + [0.0, 0.0]
    # Of one that makes a push in ten looks, it does not jump between 0 and 1.
    slow = [(float(now), [worker("a", now // 10)]) for now in range(40)]
    assert {made for (made,) in speeds(slow)[20:]} == {0.1}


def test_a_speed_that_pushes_report_is_shown_as_it_is() -> None:
    assert speeds([(0.0, [worker("a", 1, 7.5)]), (1.0, [worker("a", 2, 8.5)])]) == [[7.5], [8.5]]


def test_each_worker_is_measured_by_itself() -> None:
    looks = [
        (0.0, [worker("a", 100)]),
        (2.0, [worker("b", 5), worker("a", 104)]),
        (4.0, [worker("b", 6)]),
        (6.0, [worker("a", 0), worker("b", 7)]),
    ]
    assert speeds(looks) == [[None], [None, 2.0], [0.5], [None, 0.5]]


def test_a_new_lease_counts_anew() -> None:
    looks = [(0.0, [worker("a", 10)]), (1.0, [worker("a", 12)]), (2.0, [worker("a", 1)]), (4.0, [worker("a", 5)])]
    assert speeds(looks) == [[None], [2.0], [None], [2.0]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_workers_are_watched_until_it_is_interrupted(
    service: ThreadService, api: Api, tmp_path: Path, options: tuple[str, ...]
) -> None:
    api.create()
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()

    def shown() -> list[str]:
        """What is said of the worker, look by look."""
        text = streams[1].read_text()
        if options:
            return [each["speed"] for line in text.splitlines() for each in json.loads(line)]
        return [line.split()[4] for line in text.splitlines() if line.startswith("gpu[/0]")]

    with Client(service.url) as client:
        run = client.run(api.run)
        with run.lease("gpu[/0]") as lease:
            arguments = ("workers", api.run, "--watch", *options)
            process = forked.start(*arguments, streams=streams, FREESTEP_URL=service.url, COLUMNS="120")
            wait_until(lambda: bool(shown()))
            run.push(TENSORS, lease.claim(0))
            wait_until(lambda: shown()[-1] not in ("-", "0", None, 0.0))
            assert shown()[0] in ("-", None)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert forked.join(process) == 130
    assert streams[2].read_text() == ""
