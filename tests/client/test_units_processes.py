"""Workers that share units and are killed: every example has moved the weights as often as it was to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Script
from freestep import Client
from harness import ProcessService

WORKER = Path(__file__).with_name("units_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_units_of_killed_workers_are_redone_by_others(
    start_process: Callable[..., ProcessService], workers: int
) -> None:
    url, options = start_process().url, json.dumps({"unit": 4, "passes": 2})

    def start(name: str) -> Script:
        return Script(WORKER, url, "units", name, 200, options, workers)

    killed = [start("first"), start("second")]
    for number, each in enumerate(killed):
        for _ in range(3 + number):
            assert each.read_line() == "taken"
            each.write_line("step")
        assert each.read_line() == "taken"
        each.kill()
    last = start("last")
    assert last.read_line() == "taken"
    last.write_line("go")
    assert last.read_line() == "done"
    last.wait()
    with Client(url) as client:
        run = client.run("units")
        status = run.data().status()
        assert status.exhausted and status.done == 100
        assert set(run.pull("y")[0]["count"].tolist()) == {2.0}
