"""Scripts that fail, or that find half of a run, leave nothing half done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from coordination.driven import ASYNC, HOUR, DrivenRun
from freestep.api.data import DataSpec
from freestep.errors import CoordinatorUnavailable, FreestepError
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control, Orders
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import (
    Behind,
    CheckpointId,
    Claim,
    Fenced,
    LogTruncated,
    Lost,
    Owner,
    Pending,
    RunState,
)
from freestep_service.domain.reports import Measured

Make = Callable[..., DrivenRun]
KEYS = (
    "run", "leases", "workers", "receipts", "pending", "group", "log", "ended", "shards", "staged", "queue", "cuts",
    "metrics", "distances", "out", "held", "back",
)  # fmt: skip
SPEC = DataSpec(length=10, unit=2)
PAUSED = Control(orders=Orders(paused=True))
REFUSALS = (FreestepError, Behind, Fenced, LogTruncated, Lost, Pending)


def calls(run: DrivenRun, owner: Owner, claim: Claim, lease: str) -> Mapping[str, Callable[[], Any]]:
    """Every call that changes a run, but for those that begin one."""
    opening, leases, pushes, log = run.opening, run.leases, run.pushes, run.log
    data = run.coordinator.data
    checkpoint, generation = CheckpointId(1, 0, 1), run.number("generation")
    return {
        "heartbeat": lambda: run.do(opening.heartbeat(run.node, [0], {"0:applied": "1"}, {0: run.position})),
        "report_shard": lambda: run.do(opening.report_shard(owner, generation, "{}")),
        "open": lambda: run.do(opening.open(RunState(1), run.shards, generation, {})),
        "loaded": lambda: run.do(opening.loaded(owner, generation)),
        "give_up": lambda: run.do(opening.give_up([owner])),
        "reshard": lambda: run.do(opening.reshard(generation, 2)),
        "initial_weights": lambda: run.do(opening.initial_weights(owner, "upload", "staged", HOUR, "0-10")),
        "grant": lambda: run.do(leases.grant("new", HOUR)),
        "grant again": lambda: run.do(leases.grant("w", HOUR)),
        "renew": lambda: run.do(leases.renew(lease)),
        "release": lambda: run.do(leases.release(lease, run.position)),
        "expire": lambda: run.do(leases.expire(run.position, 0)),
        "end_worker": lambda: run.do(leases.end_worker(owner, "w", lease, 60, "{}", "me")),
        "change_run": lambda: run.do(log.change_run(owner, Control(), PAUSED, ASYNC, "{}", "me")),
        "admit": lambda: run.do(pushes.admit(claim, owner, ["ticket"])),
        "precheck": lambda: run.do(pushes.precheck(claim)),
        "commit": lambda: run.do(pushes.commit(claim, owner, run.part(), None, run.attempt(claim), "y F32")),
        "push": lambda: run.do(pushes.push(claim, owner, run.part(), None, generation)),
        "discard": lambda: run.discard(claim),
        "refuse": lambda: run.discard(claim, 0, "malformed-tensors", "why"),
        "report_metric": lambda: run.do(log.report_metric(owner, Measured("accuracy", 0, 1.0), None)),
        "request_read": lambda: run.do(log.request_read(owner, "ticket", "y F32", 1)),
        "reads_sent": lambda: run.do(log.reads_sent(["ticket"])),
        "report_distances": lambda: run.do(log.report_distances(owner, 1, torch.ones(3, dtype=torch.float64))),
        "mark_checkpoint": lambda: run.do(log.mark_checkpoint(owner)),
        "part_written": lambda: run.do(log.part_written(owner, checkpoint, 100)),
        "entries": lambda: run.do(log.entries(run.position)),
        "create_data": lambda: run.do(data.create(owner, NewDataSet("other", SPEC))),
        "claim_units": lambda: run.do(data.claim(owner, claim.lease, claim.token, "train", 2, "key")),
        "give_back": lambda: run.do(data.give_back(claim.lease, claim.token, "train")),
        "read_data": lambda: run.do(data.read_all()),
        "count_units": lambda: run.do(data.count()),
    }


NAMES = (
    "heartbeat", "report_shard", "open", "loaded", "give_up", "reshard", "initial_weights", "grant", "grant again",
    "renew", "release", "expire", "end_worker", "change_run", "admit", "precheck", "commit", "push", "discard",
    "refuse", "report_metric", "request_read", "reads_sent", "report_distances", "mark_checkpoint", "part_written",
    "entries", "create_data", "claim_units", "give_back", "read_data", "count_units",
)  # fmt: skip


def busy(run: DrivenRun) -> Mapping[str, Callable[[], Any]]:
    """Opens a run and gives it some of everything; returns the calls that could be next."""
    run.open()
    lease = run.grant()
    run.push(run.claim(lease, "earlier"))
    run.do(run.log.report_metric(run.owner(), Measured("loss", 0, 1.0), None))
    data = run.coordinator.data
    run.do(data.create(run.owner(), NewDataSet("train", SPEC)))
    run.do(data.claim(run.owner(), lease.lease, lease.token, "train", 3, ""))
    run.do(data.give_back(lease.lease, lease.token, "train", [1]))
    pending = replace(run.claim(lease, "pending"), units={"train": (0, 2)})
    for shard in range(run.shards):
        run.admit(pending, shard)
    for shard in range(1, run.shards):
        run.commit(pending, shard)
    run.grant("runs out")
    run.redis.zadd(run.key("leases"), {"runs out": 1})
    made = calls(run, run.owner(), pending, lease.lease)
    assert set(made) == set(NAMES)
    return made


@pytest.mark.parametrize("call", NAMES)
@pytest.mark.parametrize("shards", [1, 3])
def test_no_call_makes_a_run_of_an_evicted_one(make_run: Make, call: str, shards: int) -> None:
    run = make_run(shards)
    made = busy(run)
    run.redis.delete(run.key("run"))
    with suppress(*REFUSALS):
        made[call]()
    assert not run.redis.exists(run.key("run"))
    assert run.do(run.opening.read()) is None


@contextmanager
def spoilt(run: DrivenRun, name: str) -> Iterator[None]:
    """Has a key hold another type for a while."""
    aside = run.key("aside")
    if run.redis.exists(name):
        run.redis.rename(name, aside)
    run.redis.set(name, "no hash, list, set or stream")
    yield
    # What opens a run again deletes the keys of its log.
    if run.redis.type(name) == "string":
        run.redis.delete(name)
        if run.redis.exists(aside):
            run.redis.rename(aside, name)


@pytest.mark.parametrize("call", NAMES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrong_type_for_a_moment_loses_no_entry(make_run: Make, shards: int, call: str) -> None:
    """The call fails or does without the key. Whatever it answers, log and counts agree when the key is back."""
    run = make_run(shards, policy=Policy("2", "none", distinct=False))
    made = busy(run)
    kept = {key: run.driver.raw.dump(key) for key in run.dump()}
    for key in KEYS:
        with spoilt(run, run.key(key)), suppress(*REFUSALS):
            made[call]()
        seq, seqs = run.number("seq"), [entry["seq"] for entry in run.entries()]
        assert seqs in ([], list(range(1, seq + 1))), key
        assert run.number("grouped") == sum(map(int, run.redis.hvals(run.key("group")))), key
        assert run.number("in_flight") >= 0, key
        assert {record.seq for record in run.receipts().values()} <= {0, *range(1, seq + 1)}, key
        run.redis.delete(*run.dump())
        for name, value in kept.items():
            run.driver.raw.restore(name, 0, value)


@pytest.mark.parametrize("key", ["log", "group", "receipts", "leases", "workers", "window", "out", "held", "back"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_commit_that_failed_succeeds_when_it_is_repeated(make_run: Make, key: str, shards: int) -> None:
    run = make_run(shards)
    made = busy(run)
    name = next(run.redis.scan_iter(run.key("window:*"))) if key == "window" else run.key(key)
    before = run.dump()
    with spoilt(run, name), pytest.raises(CoordinatorUnavailable):
        made["commit"]()
    assert run.dump() == before
    record, _ = made["commit"]()
    assert (record.seq, run.number("seq"), run.entries()[-1]["key"]) == (4, 4, "pending")


@pytest.mark.parametrize("call", ["claim_units", "give_back", "commit", "refuse"])
@pytest.mark.parametrize("key", ["out", "held", "back"])
@pytest.mark.parametrize("shards", [1, 3])
def test_no_unit_is_lost_to_a_call_that_failed(make_run: Make, shards: int, key: str, call: str) -> None:
    run = make_run(shards)
    made = busy(run)
    before = run.dump()
    with spoilt(run, run.key(key)), pytest.raises(CoordinatorUnavailable):
        made[call]()
    assert run.dump() == before
    made[call]()


@pytest.mark.parametrize("key", ["log", "cuts", "metrics"])
def test_a_report_that_failed_counts_when_it_is_repeated(make_run: Make, key: str) -> None:
    run = make_run(3)
    made = busy(run)
    with spoilt(run, run.key(key)), pytest.raises(CoordinatorUnavailable):
        made["report_metric"]()
    _, entry = made["report_metric"]()
    assert entry is not None
    assert entry["seq"] == run.entries()[-1]["seq"] == run.number("seq")


def test_an_entry_that_cannot_be_appended_is_not_counted(make_run: Make) -> None:
    """The stream's last entry is newer than the run, as after a run's hash came back from an older copy."""
    run = make_run()
    made = busy(run)
    run.redis.xadd(run.key("log"), {"entry": "{}"}, id="9-0")
    before = {key: value for key, value in run.dump().items() if "lease" not in key}
    with pytest.raises(CoordinatorUnavailable):
        made["mark_checkpoint"]()
    assert {key: value for key, value in run.dump().items() if "lease" not in key} == before


def test_the_message_of_a_failure_names_the_key(make_run: Make) -> None:
    run = make_run().open()
    run.redis.set(run.key("log"), "no stream")
    with pytest.raises(CoordinatorUnavailable, match=f"WRONGTYPE {run.key('log')} is a string and not a stream"):
        run.do(run.log.mark_checkpoint(run.owner()))
