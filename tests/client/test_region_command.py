"""`freestep region`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import forked
from freestep import Run
from harness import TOKEN, ThreadService
from meanwhile import wait_until
from region_sides import begin, counted, push, sides

pytestmark = pytest.mark.slow


@pytest.fixture
def here_and_far(service: ThreadService, name: str) -> Iterator[tuple[Run, Run]]:
    with sides(service.url, name) as both:
        yield both


def command(here: Run, far: Run, service: ThreadService, file: Path, *options: str) -> list[str]:
    return ["region", here.name, "--url", service.url, "--parent", service.url, "--parent-run", far.name,
            "--every", "2", "--file", str(file), "--parent-token", TOKEN, *options]  # fmt: skip


def once(*arguments: str) -> CompletedProcess[str]:
    return forked.freestep(*arguments, COLUMNS="120")


def test_a_region_works_until_it_is_ended(
    service: ThreadService, here_and_far: tuple[Run, Run], tmp_path: Path
) -> None:
    here, far = here_and_far
    begin(here)
    place, streams = tmp_path / "place", [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    given = command(here, far, service, place, "momentum=0", "aggregation.policy=async", "--durability", "none")
    process = forked.start(*given, streams=streams)
    wait_until(lambda: here.status().epoch == 2 and not here.status().control.paused)
    push(here, 2)
    wait_until(lambda: "round 2 begins at step 1 of the parent: the last push was applied" in streams[1].read_text())
    assert counted(far) == counted(here) == 2.0
    assert far.status().spec.durability == "none"
    assert len(far.workers()) == 1
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert forked.join(process) == 128 + signal.SIGTERM
    assert far.workers() == []
    push(here, 1)
    done = once(*command(here, far, service, place, "--once"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("round 3 begins at step 2 of the parent")
    assert counted(far) == counted(here) == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lr"], "'lr' is not NAME=VALUE"),
        (["groups.a.lr=1"], "no param groups"),
        (["--push-encoding", "int8", "--push-dtype", "BF16"], "excludes push_dtype"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(
    service: ThreadService, here_and_far: tuple[Run, Run], tmp_path: Path, options: list[str], message: str
) -> None:
    done = once(*command(*here_and_far, service, tmp_path / "place", *options))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "place").exists()


def test_the_token_of_one_service_is_not_sent_to_the_other(
    service: ThreadService, here_and_far: tuple[Run, Run], tmp_path: Path
) -> None:
    given = command(*here_and_far, service, tmp_path / "place")
    at = given.index("--parent-token")
    done = once(*given[:at], *given[at + 2 :])
    assert done.returncode == 2
    assert "is not sent to the parent's: give --parent-token" in done.stderr
