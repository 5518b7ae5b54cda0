"""A region's process is killed at each of its calls and saves, before and after what they do, and the next one goes on;
and its parent's service is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Script
from freestep import Client, Region
from harness import ProcessService, ThreadService
from meanwhile import under_way, wait_until
from region_sides import WHOLE, begin, counted, push, sides

PROCESS = Path(__file__).with_name("region_process.py")


def finish(service: ThreadService, name: str, file: Path, number: int, when: str, encoding: str) -> bool:
    """Whether a process that would be killed at its `number`-th call has come to its end before."""
    script = Script(PROCESS, service.url, name, str(file), str(number), when, encoding)
    said = ""
    while line := script.read_line():
        said = line
    script.wait()
    return said == "done"


@pytest.mark.slow
@pytest.mark.parametrize(("when", "encoding"), [("before", "dense"), ("after", "dense"), ("after", "int8")])
def test_a_killed_process_pushes_no_round_twice_and_loses_none(
    service: ThreadService, name: str, tmp_path: Path, when: str, encoding: str
) -> None:
    file = tmp_path / "place"
    with sides(service.url, name) as (here, far):
        begin(here)
        assert finish(service, name, file, 0, when, encoding)
        total, ended, number = 0.0, False, 0
        while not ended:
            number += 1
            push(here, 1)
            # Others push to the parent, so that each round moves the run.
            push(far, 1, value=100.0)
            total += 101.0
            ended = finish(service, name, file, number, when, encoding)
            if not here.status().control.paused:
                # What the region makes while its process is dead is kept, too.
                push(here, 1)
                total += 1.0
            assert ended or finish(service, name, file, 0, when, encoding)
            if ended:
                assert finish(service, name, file, 0, when, encoding)
            assert counted(far) == pytest.approx(total, abs=1e-3)
            assert counted(here) == pytest.approx(total, abs=1e-3)
            assert not here.status().control.paused
        # A lease, a round's end, its push, a pause, an export, an import, a return, and four saves.
        assert number > 11


@pytest.mark.slow
def test_a_parent_that_is_away_makes_the_next_round_longer(
    service: ThreadService, start_process: Callable[..., ProcessService], name: str, tmp_path: Path
) -> None:
    parent = start_process()
    with sides(service.url, name) as (here, _), Client(parent.url, retry_for=0) as client:
        far = client.run(name)
        begin(here)
        with Region(
            here, far, tmp_path / "place", every=2, optimizer=WHOLE, options={"durability": "journal"}
        ) as works:
            works.finish()
            push(here, 2)
            works.run_rounds(1)
            parent.kill()
            push(here, 2)
            working = under_way(lambda: works.run_rounds(2))
            wait_until(lambda: works.place is not None and works.place.stage == "sending")
            push(here, 5)
            parent.start()
            working.result()
        assert counted(far) == counted(here) == 9.0
        assert far.status().step == 3
