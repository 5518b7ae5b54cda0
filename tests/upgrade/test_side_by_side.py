"""Processes of the last released version and of this one, from wheels: services on one Redis, clients of services."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from freestep import Client, InvalidSpec
from harness import AUTHORIZED
from harness import store as started
from meanwhile import at_once, wait_until
from owners.counted import count, create, equal, owners, points, push
from upgrade.installed import Installed, Served, Started, end_all

HERE = Path(__file__).parent
OWNER_TTL_S = 2.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def fleet(stack: ExitStack, tmp_path: Path) -> list[Served]:
    """Three services, not started yet, with one Redis and one place of checkpoints."""
    url = stack.enter_context(started("valkey", tmp_path))
    common = {"redis_url": url, "checkpoint_url": tmp_path / "checkpoints", "owner_ttl_seconds": OWNER_TTL_S}
    made = [Served(tmp_path / f"data-{number}", **common) for number in range(3)]
    stack.callback(end_all, made, signal.SIGKILL)
    return made


def steps(worker: Started) -> list[int]:
    """The steps at which a worker's pushes were applied, so far."""
    assert worker.is_alive(), worker.stderr
    lines = worker.stdout.splitlines(keepends=True)
    receipts = [json.loads(line) for line in lines if line.endswith("\n")]
    assert {decision for decision, _ in receipts} <= {"applied"}
    return [step for _, step in receipts]


def versions(fleet: list[Served]) -> list[str]:
    return [httpx.get(f"{service.url}/healthz").json()["version"] for service in fleet]


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_a_rolling_update_and_the_way_back_lose_no_push_and_count_none_twice(
    released: Installed, present: Installed, fleet: list[Served], stack: ExitStack, durability: str
) -> None:
    at_once(*(lambda service=service: service.start(released) for service in fleet))
    run = stack.enter_context(Client(fleet[0].url, retry_for=60)).run("counted")
    create(run, 3, durability=durability)
    workers = [
        stack.enter_context(version.start(fleet[number].url, "counted", f"w{number}", script=HERE / "pusher.py"))
        for number, version in enumerate((released, present))
    ]

    def each_goes_on() -> Callable[[], bool]:
        before = [len(steps(worker)) for worker in workers]
        return lambda: all(len(steps(worker)) > old + 3 for worker, old in zip(workers, before, strict=True))

    def wait_for_steps() -> None:
        goes_on = each_goes_on()
        wait_until(lambda: None not in owners(run) and goes_on())

    wait_for_steps()
    seen = [versions(fleet)]
    for version in (present, released):
        for number, service in enumerate(fleet):
            # With journals one is killed, as a host is lost in the midst of an update.
            service.end(signal.SIGKILL if durability == "journal" and number == 1 else signal.SIGTERM)
            service.start(version)
            wait_for_steps()
            seen.append(versions(fleet))
    old, new = "0.1.0", seen[3][0]
    assert new != old
    assert seen == [
        [old] * 3, [new, old, old], [new, new, old], [new] * 3, [old, new, new], [old, old, new], [old] * 3
    ]  # fmt: skip
    for worker in workers:
        worker.write_line("end")
    assert [worker.wait() for worker in workers] == [0, 0], [worker.stderr for worker in workers]
    applied = [json.loads(line)[1] for worker in workers for line in worker.stdout.splitlines()]
    assert sorted(applied) == list(range(1, count(run) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("newer", ["client", "service"])
def test_a_client_works_with_the_version_before_and_after_its_own(
    released: Installed, present: Installed, tmp_path: Path, stack: ExitStack, newer: str
) -> None:
    client, server = (present, released) if newer == "client" else (released, present)
    service = Served(tmp_path / "data")
    stack.callback(service.end)
    service.start(server)
    done = client.run(service.url, script=HERE / "trainer.py")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    (other,) = versions([service])
    own = said.pop("version")
    assert ("0.1.0" in (own, other), own != other) == (True, True)
    assert said.pop("events")[:1] == ["checkpoint"]
    assert said == {
        "steps": [5, [5.0]],
        "resumed": 6,
        "rounds": 2,
        "units": [1.0],
        "pulled": [6, [6.0]],
        "set": {"lr": 0.5},
        "checkpoint": 6,
        "history": [6, said["history"][1], ["accuracy"]],
        "state": 6,
        "copy": 6,
        "push": 7,
    }
    commands = [
        ["runs", "show", "steps", "--json"],
        ["runs", "list"],
        ["workers", "steps"],
        ["events", "steps", "--json"],
        ["history", "steps"],
        ["data", "show", "units"],
        ["checkpoint", "steps", "--list"],
        ["pull", "steps", "--point", "x", "-o", str(tmp_path / "x.safetensors")],
    ]
    for command in commands:
        done = client.run(*command, FREESTEP_URL=service.url)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout, command
    examined = client.run("doctor", FREESTEP_URL=service.url)
    wrong = [line.split()[1] for line in examined.stdout.splitlines() if line.startswith("wrong")]
    # Version 0.1.0 wants its own version, and says so.
    assert (examined.returncode, wrong) == ((0, []) if newer == "client" else (1, ["version"])), examined.stdout


@pytest.mark.slow
def test_an_older_service_leaves_a_run_with_a_newer_rule_to_the_others(
    released: Installed, present: Installed, fleet: list[Served], stack: ExitStack
) -> None:
    old, new, _ = fleet
    optimizer = {"algorithm": "sgd_schedule_free", "lr": 1.0, "delay_correction": {"name": "ahead"}}

    def problems(service: Served) -> dict[str, str]:
        return dict(httpx.get(f"{service.url}/readyz", headers=AUTHORIZED).json()["problems"])

    old.start(released)
    with pytest.raises(InvalidSpec, match=r"delay_correction\.name: must be one of none, auto, constant"):
        create(stack.enter_context(Client(old.url)).run("refused"), 1, optimizer=optimizer)
    new.start(present)
    run = stack.enter_context(Client(new.url, retry_for=60)).run("corrected")
    create(run, 2, optimizer=optimizer)
    assert push(run, 3).step == 3
    wait_until(lambda: problems(old).get("corrected", "").startswith("its spec is not valid"))
    assert push(run, 3).step == 6
    before = points(run)
    # On the way back too: what it finds when it starts, it leaves as it is.
    new.end()
    old.end()
    old.start(released)
    assert problems(old)["corrected"].startswith("its spec is not valid")
    new.start(present)
    wait_until(lambda: None not in owners(run))
    assert equal(points(run), before)
    assert push(run).step == 7
    old.end()
    old.start(present)
    assert problems(old) == {}


@pytest.mark.slow
def test_a_version_with_another_layout_waits_until_the_others_have_gone(
    released: Installed, present: Installed, later: Installed, fleet: list[Served], stack: ExitStack
) -> None:
    oldest, old, new = fleet

    def refusal(version: Installed) -> str:
        with version.start("serve", **new.environment) as refused:
            assert refused.wait() == 1
            return refused.stderr.splitlines()[-1]

    oldest.start(released)
    old.start(present)
    run = stack.enter_context(Client(old.url)).run("counted")
    create(run, 1)
    assert "is a service of an older version of freestep, which cannot work beside this one" in refusal(later)
    old.end()
    assert refusal(later).startswith(f"freestep serve: {oldest.url} is a service of an older version of freestep")
    # Counted as live until its time is over.
    oldest.end(signal.SIGKILL)
    new.start(later)
    assert count(stack.enter_context(Client(new.url)).run("counted")) == 0
    new.end()
    assert refusal(present) == (
        "freestep serve: Redis has layout 2, of a newer version of freestep, and this version knows layout 1: "
        "start that version"
    )
