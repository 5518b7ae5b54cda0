"""Every script that changes keys is called, its answer is lost, and it is called again with the same arguments.

The second call changes nothing, also where others have called meanwhile, and its answer has the caller go on as the
first would have. What is by design not so is named in `UNREPEATABLE` and `OTHER_ANSWERS`, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordination.driven import ASYNC, HOUR, DrivenRun, Driver
from freestep.api.data import DataSpec
from freestep.api.models import Lease
from freestep.errors import CoordinatorUnavailable, FreestepError
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.opening import note_deletion
from freestep_service.coordination.quotas import SharedQuotas
from freestep_service.coordination.store import scripts
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import Behind, CheckpointId, Fenced, Lost, Pending, RunState
from freestep_service.domain.reports import Measured

Call = Callable[[], Any]
SPEC = DataSpec(length=400, unit=2)
FASTER = Control({"lr": 0.5})
SYNC = Policy("live", "0", distinct=True)
TWO = Policy("2", "3", distinct=False, bounds='{"outlier": 10.0, "ban_after": 9}')
LARGEST = 10.0

READ_ONLY = {"count_units", "log_entries", "precheck_claim", "read_data"}
UNREPEATABLE = {
    "admit with tickets": "a ticket counts a shard off the reads that it has sent; `take_sent` hands each out once",
    "reads_sent": "likewise",
    "mark_checkpoint": "each call is a checkpoint of its own; a caller that had no answer fails, and tries again later",
    "grant": "each call grants a lease, which fences off the one before; a worker that had no answer takes the newest",
    "gather": "without the generation that is to end, each call begins an opening, of which the newest counts",
    "take_run": "each call counts one who makes the run; a claim that is not settled ends when it is looked for",
    "take_lease": "likewise of a lease",
    "settle_run": "each call ends one claim; where its answer is lost, the entry is left to be looked for",
    "settle_lease": "likewise of a lease",
}
"""Calls that nobody repeats, since a second one changes more."""
OTHER_ANSWERS = {
    "create": "`same`: the run is opened as one that is there",
    "open": "False: the opening goes on with what Redis has, and an import's key tells that it was made",
    "admit": "Pending where there is one shard: a caller without another request of the key goes on as admitted",
    "admit, stale": "replayed: the record is the same, and what it evicted is kept for longer",
    "commit, refused": "Lost: the worker takes a new lease, or sends the push again, and is refused again",
    "commit under another epoch": "likewise",
    "commit, paused": "likewise",
    "push": "replayed: `Pushes` takes it for its own where its entry has not come here",
    "release": "LeaseExpired: the lease is no more, and the caller reads the log for what its end has closed",
    "expire": "nobody: the caller reads the log for what their end has closed",
    "end_worker, banned": "no entry, which the log has",
    "give_up": "nothing was owned, which nobody asks for",
    "change_run": "None: the caller reads the run, and finds what it asked for in force",
    "report_metric": "no entry: it had counted",
    "create_data": "no entry: it is there",
}
"""Repetitions that are answered otherwise."""


class Scene(NamedTuple):
    """A call that has something to do. policy: of its run, which has its weights if it is `initialized`.

    lost: the script whose answer is lost, where the call has several.
    """

    prepare: Callable[[DrivenRun], Call]
    policy: Policy = ASYNC
    initialized: bool = True
    shards: tuple[int, ...] = (1, 3)
    lost: str = ""


SCENES: dict[str, Scene] = {}


def scene(name: str, **options: Any) -> Callable[[Callable[[DrivenRun], Call]], Callable[[DrivenRun], Call]]:
    def add(prepare: Callable[[DrivenRun], Call]) -> Callable[[DrivenRun], Call]:
        SCENES[name] = Scene(prepare, **options)
        return prepare

    return add


# Openings


def gathered(run: DrivenRun) -> int:
    """Has the open run gathered; its generation."""
    return run.do(run.opening.gather(run.shards))


def report_all_but_first(run: DrivenRun, generation: int) -> None:
    for shard in range(1, run.shards):
        run.do(run.opening.report_shard(run.owner(shard), generation, "{}"))


@scene("create")
def _(run: DrivenRun) -> Call:
    run.do(run.opening.delete(1))
    return lambda: run.do(run.opening.create(2, run.shards))


@scene("delete")
def _(run: DrivenRun) -> Call:
    run.push(run.claim(run.grant(), "key"))
    return lambda: run.do(run.opening.delete(1))


@scene("heartbeat")
def _(run: DrivenRun) -> Call:
    run.do(run.opening.give_up([run.owner(shard) for shard in range(run.shards)]))
    applied = {0: run.position}
    return lambda: run.do(run.opening.heartbeat(run.node, range(run.shards), {"0:applied": "1"}, applied)) is not None


@scene("gather")
def _(run: DrivenRun) -> Call:
    return lambda: gathered(run)


@scene("gather of a generation")
def _(run: DrivenRun) -> Call:
    generation = run.number("generation")
    return lambda: run.do(run.opening.gather(run.shards, generation, resharding=2))


@scene("gather of a lost run")
def _(run: DrivenRun) -> Call:
    run.redis.delete(run.key("run"))
    return lambda: run.do(run.opening.gather(run.shards, 1))


@scene("report_shard")
def _(run: DrivenRun) -> Call:
    generation = gathered(run)
    report_all_but_first(run, generation)
    owner = run.owner()
    return lambda: run.do(run.opening.report_shard(owner, generation, "{}"))


@scene("open")
def _(run: DrivenRun) -> Call:
    record = run.push(run.claim(run.grant(), "key"))
    generation = gathered(run)
    target = {"cut": [1, 0, 0], "live": True}
    state = RunState(1, 1, 1, initialized=True, receipts={"key": record})
    return lambda: run.do(run.opening.open(state, run.shards, generation, target))


@scene("loaded")
def _(run: DrivenRun) -> Call:
    generation, target = gathered(run), {"cut": [1, 0, 0], "live": True}
    assert run.do(run.opening.open(RunState(1, initialized=True), run.shards, generation, target))
    generation = run.number("generation")
    for shard in range(1, run.shards):
        run.do(run.opening.loaded(run.owner(shard), generation))
    owner = run.owner()
    return lambda: run.do(run.opening.loaded(owner, generation, "word"))


@scene("give_up")
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.opening.give_up([owner]))


@scene("reshard")
def _(run: DrivenRun) -> Call:
    generation = gathered(run)
    return lambda: run.do(run.opening.reshard(generation, 2))


@scene("initial_weights, coming", initialized=False)
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.opening.initial_weights(owner, "upload", "coming", HOUR, "0-10"))


@scene("initial_weights, staged", initialized=False)
def _(run: DrivenRun) -> Call:
    for shard in range(run.shards):
        run.do(run.opening.initial_weights(run.owner(shard), "upload", "coming", HOUR, f"{shard}0-10"))
    for shard in range(1, run.shards):
        run.do(run.opening.initial_weights(run.owner(shard), "upload", "staged", HOUR, f"{shard}0-10", "digest"))
    owner = run.owner()
    return lambda: run.do(run.opening.initial_weights(owner, "upload", "staged", HOUR, "00-10", "digest"))


@scene("initial_weights, withdrawn", initialized=False)
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    run.do(run.opening.initial_weights(owner, "upload", "coming", HOUR, "0-10"))
    return lambda: run.do(run.opening.initial_weights(owner, "upload", "withdrawn", HOUR, "0-10"))


# Leases


@scene("grant")
def _(run: DrivenRun) -> Call:
    older = run.grant()
    run.push(run.claim(older, "key"))
    return lambda: run.grant().worker


@scene("renew")
def _(run: DrivenRun) -> Call:
    lease = run.grant()
    run.redis.zadd(run.key("leases"), {"w": 2**42})
    return lambda: run.do(run.leases.renew(lease.lease))


@scene("release", policy=SYNC)
def _(run: DrivenRun) -> Call:
    stays, lease = run.grant("stays"), run.grant()
    run.push(run.claim(stays, "key"))
    return lambda: run.do(run.leases.release(lease.lease, run.position))[0]


@scene("expire", policy=SYNC, lost="leases_expire")
def _(run: DrivenRun) -> Call:
    stays, _ = run.grant("stays"), run.grant()
    run.push(run.claim(stays, "key"))
    run.redis.zadd(run.key("leases"), {"w": 1})
    return lambda: run.expire().ended


@scene("expire, asked for parts", shards=(3,))
def _(run: DrivenRun) -> Call:
    run.admit(run.claim(run.grant(), "key"))
    run.pass_time(HOUR // 2)
    return lambda: run.expire(HOUR // 4)[0]


@scene("end_worker")
def _(run: DrivenRun) -> Call:
    lease, owner = run.grant(), run.owner()
    return lambda: run.do(run.leases.end_worker(owner, "w", lease.lease, None, "{}", "me", "key"))


@scene("end_worker, banned")
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.leases.end_worker(owner, "w", "", 60, "{}", "me", "key"))


# Pushes


@scene("admit")
def _(run: DrivenRun) -> Call:
    claim, owner = run.claim(run.grant(), "key"), run.owner()
    return lambda: run.do(run.pushes.admit(claim, owner)).queued


@scene("admit, queued", shards=(3,))
def _(run: DrivenRun) -> Call:
    lease, owner = run.grant(), run.owner()
    for number in range(2):
        run.admit(run.claim(lease, f"{number}"))
    claim = run.claim(lease, "key")
    return lambda: run.do(run.pushes.admit(claim, owner))


@scene("admit, stale", policy=TWO)
def _(run: DrivenRun) -> Call:
    lease, owner = run.grant(), run.owner()
    claim = replace(run.claim(lease, "key"), units=units_out(run, lease))
    run.redis.hset(run.key("run"), "step", 9)
    return lambda: run.do(run.pushes.admit(claim, owner)).record


@scene("admit with tickets", shards=(3,))
def _(run: DrivenRun) -> Call:
    claim, owner = run.claim(run.grant(), "key"), run.owner()
    run.do(run.log.request_read(owner, "ticket", "y F32", 3))
    return lambda: run.do(run.pushes.admit(claim, owner, ["ticket"]))


def units_out(run: DrivenRun, lease: Lease) -> Mapping[str, tuple[int, ...]]:
    """Hands out units to a lease."""
    run.do(run.coordinator.data.create(run.owner(), NewDataSet("train", SPEC)))
    held = run.do(run.coordinator.data.claim(run.owner(), lease.lease, lease.token, "train", 3, ""))
    return {"train": tuple(held.numbers)}


def committing(run: DrivenRun, largest: float | None = None) -> Call:
    """A push of which only one shard's part is not committed."""
    lease = run.grant()
    claim = replace(run.claim(lease, "key"), units=units_out(run, lease))
    for shard in range(run.shards):
        run.admit(claim, shard)
    for shard in range(1, run.shards):
        run.commit(claim, shard)
    owner, attempt, part = run.owner(), run.attempt(claim), run.part(norm=2 * LARGEST)
    return lambda: run.do(run.pushes.commit(claim, owner, part, largest, attempt, "y F32"))


@scene("commit, staged", shards=(3,))
def _(run: DrivenRun) -> Call:
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    owner, attempt = run.owner(), run.attempt(claim)
    return lambda: run.do(run.pushes.commit(claim, owner, run.part(), None, attempt))


@scene("commit", policy=TWO)
def _(run: DrivenRun) -> Call:
    return committing(run)


@scene("commit, refused")
def _(run: DrivenRun) -> Call:
    return committing(run, LARGEST)


@scene("commit under another epoch")
def _(run: DrivenRun) -> Call:
    call = committing(run)
    lease = run.redis.hget(run.key("workers"), "w")
    run.redis.hset(run.key(f"lease:{lease}"), "epoch", 9)
    return call


@scene("commit, paused")
def _(run: DrivenRun) -> Call:
    call = committing(run)
    run.redis.hset(run.key("run"), "paused", 1)
    return call


@scene("push", policy=TWO, shards=(1,))
def _(run: DrivenRun) -> Call:
    lease = run.grant()
    claim, owner = replace(run.claim(lease, "key"), units=units_out(run, lease)), run.owner()
    generation = run.number("generation")
    return lambda: run.do(run.pushes.push(claim, owner, run.part(), LARGEST, generation))


def discarding(run: DrivenRun, slug: str) -> Call:
    lease = run.grant()
    claim = replace(run.claim(lease, "key"), units=units_out(run, lease))
    run.admit(claim)
    attempt = run.attempt(claim)
    return lambda: run.do(run.pushes.discard(claim, attempt, 0, slug, "why"))


@scene("discard")
def _(run: DrivenRun) -> Call:
    return discarding(run, "")


@scene("discard, refused")
def _(run: DrivenRun) -> Call:
    return discarding(run, "malformed-tensors")


@scene("yield_slot", shards=(3,))
def _(run: DrivenRun) -> Call:
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    attempt = run.attempt(claim)
    return lambda: run.do(run.pushes.yield_slot(claim, attempt))


# The log


@scene("change_run")
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.log.change_run(owner, Control(), FASTER, ASYNC, "{}", "me"))


@scene("report_metric")
def _(run: DrivenRun) -> Call:
    owner, measured = run.owner(), Measured("accuracy", 0, 1.0)
    return lambda: run.do(run.log.report_metric(owner, measured, None))


@scene("request_read", shards=(3,))
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.log.request_read(owner, "ticket", "y F32", 3))


@scene("reads_sent", shards=(3,))
def _(run: DrivenRun) -> Call:
    run.do(run.log.request_read(run.owner(), "ticket", "y F32", 3))
    return lambda: run.do(run.log.reads_sent(["ticket"]))


@scene("report_distances")
def _(run: DrivenRun) -> Call:
    part = torch.ones(3, dtype=torch.float64)
    for shard in range(1, run.shards):
        run.do(run.log.report_distances(run.owner(shard), 1, part))
    owner = run.owner()

    def call() -> Any:
        found = run.do(run.log.report_distances(owner, 1, part))
        assert found is not None
        return found.tolist()

    return call


@scene("mark_checkpoint")
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.log.mark_checkpoint(owner))


@scene("part_written")
def _(run: DrivenRun) -> Call:
    checkpoint = CheckpointId(1, 0, 1)
    for shard in range(1, run.shards):
        run.do(run.log.part_written(run.owner(shard), checkpoint, 100))
    owner = run.owner()
    return lambda: run.do(run.log.part_written(owner, checkpoint, 100))


# Data


@scene("create_data")
def _(run: DrivenRun) -> Call:
    owner = run.owner()
    return lambda: run.do(run.coordinator.data.create(owner, NewDataSet("train", SPEC)))


@scene("claim_units")
def _(run: DrivenRun) -> Call:
    lease, owner = run.grant(), run.owner()
    units_out(run, lease)
    return lambda: run.do(run.coordinator.data.claim(owner, lease.lease, lease.token, "train", 2, "key"))


@scene("return_units")
def _(run: DrivenRun) -> Call:
    lease = run.grant()
    numbers = units_out(run, lease)["train"][:2]
    return lambda: run.do(run.coordinator.data.give_back(lease.lease, lease.token, "train", numbers, "key"))


# What belongs to no run


@scene("node_heartbeat")
def _(run: DrivenRun) -> Call:
    node = Node(f"http://{run.name}", HOUR)
    return lambda: run.do(node.heartbeat(run.driver.store))


@scene("note_deletion")
def _(run: DrivenRun) -> Call:
    run.do(run.opening.delete(1))
    return lambda: run.do(note_deletion(run.driver.store, run.name, 5))


@scene("take_run")
def _(run: DrivenRun) -> Call:
    return lambda: run.do(SharedQuotas(run.driver.store).take_run(run.name, run.name, 10, 2, 100))


@scene("take_lease")
def _(run: DrivenRun) -> Call:
    return lambda: run.do(SharedQuotas(run.driver.store).take_lease(run.name, run.name, "w", 2))


def settling(run: DrivenRun) -> SharedQuotas:
    """Quotas of which two have taken the same."""
    quotas = SharedQuotas(run.driver.store)
    for _ in range(2):
        run.do(quotas.take_run(run.name, run.name, 10, 2, 100))
        run.do(quotas.take_lease(run.name, run.name, "w", 2))
    return quotas


@scene("settle_run")
def _(run: DrivenRun) -> Call:
    quotas = settling(run)
    return lambda: run.do(quotas.settle_run(run.name, run.name, "made", "mark", 10))


@scene("settle_lease")
def _(run: DrivenRun) -> Call:
    quotas = settling(run)
    return lambda: run.do(quotas.settle_lease(run.name, run.name, "w", "failed"))


# Others, meanwhile


class Others:
    """Another worker, another evaluator and another process. They undo nothing of what a scene's call does."""

    ACTS = (
        "grant",
        "renew",
        "push",
        "refuse",
        "end",
        "claim",
        "give_back",
        "measure",
        "read",
        "create",
        "expire",
        "beat",
    )

    def __init__(self, run: DrivenRun) -> None:
        self.run = run
        self.node = Node("http://127.0.0.1:2", HOUR)
        self.lease: Lease | None = None
        self.made = 0

    def act(self, name: str) -> None:
        """Does one thing, unless it is refused."""
        self.made += 1
        try:
            getattr(self, name)()
        except (FreestepError, Behind, Fenced, Lost, Pending):
            pass

    def grant(self) -> None:
        self.lease = self.run.grant("other")

    def _lease(self) -> Lease:
        if self.lease is None:
            self.grant()
        assert self.lease is not None
        return self.lease

    def renew(self) -> None:
        self.run.do(self.run.leases.renew(self._lease().lease))

    def push(self) -> None:
        self.run.push(self.run.claim(self._lease(), f"other-{self.made}", self.run.number("step")))

    def refuse(self) -> None:
        claim = self.run.claim(self._lease(), f"other-{self.made}", self.run.number("step"))
        self.run.admit(claim)
        self.run.discard(claim, 0, "malformed-tensors", "why")

    def end(self) -> None:
        lease, self.lease = self._lease(), None
        self.run.do(self.run.leases.release(lease.lease, self.run.position))

    def claim(self) -> None:
        lease = self._lease()
        self.run.do(self.run.coordinator.data.claim(self.run.owner(), lease.lease, lease.token, "train", 2, ""))

    def give_back(self) -> None:
        lease = self._lease()
        self.run.do(self.run.coordinator.data.give_back(lease.lease, lease.token, "train"))

    def measure(self) -> None:
        step = self.run.number("step")
        self.run.do(self.run.log.report_metric(self.run.owner(), Measured("loss", step, float(self.made)), None))

    def read(self) -> None:
        self.run.do(self.run.log.request_read(self.run.owner(), f"other-{self.made % 2}", "x F32", self.run.shards))

    def create(self) -> None:
        self.run.do(self.run.coordinator.data.create(self.run.owner(), NewDataSet(f"other-{self.made}", SPEC)))

    def expire(self) -> None:
        self.run.expire()

    def beat(self) -> None:
        self.run.heartbeat(self.node)


# The comparison


def kept(run: DrivenRun) -> str:
    """Every key that the run's name is in, without instants and names of leases, and with its newest numbers."""
    held = [(key, sorted(value) if key == run.key("leases") else value) for key, value in run.dump().items()]
    for key in (f"freestep:quota:{run.name}:runs", f"freestep:quota:{run.name}:leases"):
        held.append((key, {name: json.loads(text) for name, text in hash_of(run, key).items()}))
    held.append(("deleted", run.redis.hget("freestep:deleted", run.name)))
    held += [(url, None) for url in hash_of(run, "{freestep:nodes}:hosts").values() if run.name in url]
    texts = sorted(without_chance(json.dumps(each, sort_keys=True).replace(run.name, "RUN")) for each in held)
    return "\n".join([*texts, *(f"{name} {run.field(name)}" for name in ("generation", "token", "attempt"))])


def without_chance(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{32}\b", "LEASE", re.sub(r"\d{13,}(\.0)?", "TIME", text))


def hash_of(run: DrivenRun, key: str) -> dict[str, str]:
    found: Any = run.redis.hgetall(key)
    return dict(found)


class Calls:
    """The calls of scripts. lost: whose answer is lost; that of any where it is empty, of none where it is None."""

    def __init__(self, driver: Driver, lost: str | None) -> None:
        self.names: list[str] = []
        self.lost = lost
        self._run = driver.store.run

    async def run(self, script: str, keys: Any, *arguments: str | int) -> Any:
        answer = await self._run(script, keys, *arguments)
        self.names.append(script)
        if self.lost in ("", script):
            raise CoordinatorUnavailable("Redis does not answer: ConnectionError")
        return answer


@contextmanager
def noted(driver: Driver, lost: str | None = None) -> Iterator[Calls]:
    calls = Calls(driver, lost)
    driver.store.run = calls.run  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del driver.store.run


def answer_of(call: Call) -> Any:
    """What a call answers, or the kind of its refusal."""
    try:
        return without_chance(repr(call()))
    except (FreestepError, Behind, Fenced, Lost, Pending) as refusal:
        return type(refusal)


def prepared(driver: Driver, name: str, shards: int) -> tuple[DrivenRun, Call]:
    each = SCENES[name]
    run = DrivenRun(driver, shards, each.policy).open(initialized=each.initialized)
    return run, each.prepare(run)


CASES = [(name, shards) for name, each in SCENES.items() for shards in each.shards]


@pytest.mark.parametrize(("name", "shards"), CASES)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(meanwhile=st.lists(st.sampled_from(Others.ACTS), max_size=6))
def test_a_call_that_is_made_again_changes_nothing_more(
    driver: Driver, name: str, shards: int, meanwhile: list[str]
) -> None:
    run, call = prepared(driver, name, shards)
    before = kept(run)
    lost = SCENES[name].lost
    with noted(driver, lost) as calls:
        assert answer_of(call) is CoordinatorUnavailable
    # Whoever calls Redis leaves it to its caller to repeat that.
    assert calls.names.count(lost or calls.names[0]) == 1
    assert calls.names[-1] == (lost or calls.names[0])
    others = Others(run)
    for act in meanwhile:
        others.act(act)
    once = kept(run)
    if not meanwhile:
        assert once != before or name == "renew"
    answer_of(call)
    assert (kept(run) != once) == (name in UNREPEATABLE)


@pytest.mark.parametrize(("name", "shards"), CASES)
def test_the_answer_to_a_call_that_is_made_again_says_the_same(driver: Driver, name: str, shards: int) -> None:
    _, call = prepared(driver, name, shards)
    first = answer_of(call)
    assert first is not CoordinatorUnavailable
    assert (answer_of(call) == first) or name in OTHER_ANSWERS or name in UNREPEATABLE


def test_every_script_that_changes_keys_is_called_again(driver: Driver) -> None:
    changing = set()
    for name, shards in CASES:
        _, call = prepared(driver, name, shards)
        with noted(driver) as calls:
            answer_of(call)
        changing |= set(calls.names)
    assert changing == set(scripts()) - READ_ONLY
