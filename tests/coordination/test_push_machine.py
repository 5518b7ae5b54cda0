"""Pushes in any order of calls: each counts once at most, the log has no gap, and nothing is left behind."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from coordination.driven import DrivenRun, Driver, norms_of
from freestep.api.models import Lease
from freestep.errors import EpochChanged, LeaseExpired, NonFiniteGradient, ProblemError, WorkerBanned
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Claim, Lost, Pending, Record, RunState
from machines import run_machine

BAN_AFTER = 2
POLICIES = {
    "async": Policy("1", "none", distinct=False),
    "buffered": Policy("2", "none", distinct=False),
    "sync": Policy("live", "0", distinct=True),
    "clip": Policy("1", "none", distinct=False, bounds=f'{{"clip": 2.0, "outlier": 10.0, "ban_after": {BAN_AFTER}}}'),
}
SHARDS = st.integers(0, 2)
SLUGS = st.sampled_from(["", "malformed-tensors", "non-finite-gradient"])
WORKERS = st.sampled_from(["a", "b"])


class Pushes(RuleBasedStateMachine):
    """What the owners of shards call for pushes that they carry, and what happens to the run meanwhile."""

    driver: ClassVar[Driver]
    shards: ClassVar[int]
    policy: ClassVar[Policy]

    pushes = Bundle("pushes")

    @initialize()
    def open(self) -> None:
        self.run = DrivenRun(self.driver, self.shards, self.policy).open()
        self.leases: dict[str, Lease] = {}
        self.keys = 0
        self.carried: dict[tuple[Claim, int], str] = {}
        """Parts of pushes that owners have admitted and still hold, and the attempts that they know of."""
        self.norms: dict[str, float] = {}
        """By key, those of a push's parts."""
        self.records: dict[str, Record] = {}
        self.entries: dict[tuple[int, int], dict[str, Any]] = {}
        """Every entry of the log that was ever seen, by epoch and seq."""

    @rule(target=pushes, worker=WORKERS, norm=st.sampled_from([0.0, 1.0, 1.5, 100.0]))
    def push(self, worker: str, norm: float) -> Claim | MultipleResults[Claim]:
        if worker not in self.leases and not self.granted(worker):
            return multiple()
        self.keys += 1
        self.norms[f"key-{self.keys}"] = norm
        return self.run.claim(self.leases[worker], f"key-{self.keys}", self.run.number("step"))

    def granted(self, worker: str) -> bool:
        """Whether a worker gets a lease."""
        is_banned = worker in self.run.remembered_norms().banned
        try:
            self.leases[worker] = self.run.grant(worker)
        except WorkerBanned:
            assert is_banned
            return False
        assert not is_banned
        return True

    @rule(claim=pushes, shard=SHARDS)
    def admit(self, claim: Claim, shard: int) -> None:
        shard %= self.shards
        try:
            admission = self.run.admit(claim, shard)
        except Pending:
            assert self.shards == 1
        except ProblemError:
            assert claim.key not in self.records
        else:
            if admission.record is None:
                self.carried[claim, shard] = admission.attempt
            else:
                self.decided(claim, admission.record)

    @rule(claim=pushes, shard=SHARDS, too_large=st.booleans())
    def commit(self, claim: Claim, shard: int, too_large: bool) -> None:
        shard %= self.shards
        if (claim, shard) not in self.carried:
            return
        try:
            # As large as no other is allowed.
            bound = -1.0 if too_large else None
            record = self.run.commit(claim, shard, largest_norm=bound, norm=self.norms[claim.key])
        except (Lost, LeaseExpired, EpochChanged, NonFiniteGradient):
            assert claim.key not in self.records
            del self.carried[claim, shard]
        else:
            if record is not None:
                self.decided(claim, record)
                # An answer may be lost, and the call repeated.
                assert self.run.commit(claim, shard) == record
                del self.carried[claim, shard]

    @precondition(lambda self: self.shards == 1)
    @rule(claim=pushes, too_large=st.booleans())
    def push_at_once(self, claim: Claim, too_large: bool) -> None:
        """Both calls as one, which may find the push admitted already."""
        bound = -1.0 if too_large else None
        try:
            record = self.run.push_at_once(claim, bound, self.norms[claim.key])
        except (LeaseExpired, EpochChanged, NonFiniteGradient):
            assert claim.key not in self.records
        else:
            self.decided(claim, record)

    @rule(claim=pushes, order=st.permutations(range(3)), again=st.booleans())
    def deliver(self, claim: Claim, order: list[int], again: bool) -> None:
        """All that a push takes, and perhaps a second time."""
        for _ in range(1 + again):
            for shard in order[: self.shards]:
                self.admit(claim, shard)
            for shard in order[: self.shards]:
                self.commit(claim, shard, too_large=False)

    @rule(claim=pushes, order=st.permutations(range(3)), slug=SLUGS)
    def deliver_again(self, claim: Claim, order: list[int], slug: str) -> None:
        """A part is discarded, or refused, and sent again before the others have heard of that."""
        for shard in order[: self.shards]:
            self.admit(claim, shard)
        self.discard(claim, order[0], slug)
        self.admit(claim, order[0])
        self.discard(claim, order[1], slug)
        for shard in order[: self.shards]:
            self.commit(claim, shard, too_large=False)

    def decided(self, claim: Claim, record: Record) -> None:
        assert self.records.setdefault(claim.key, record) == record

    @rule(claim=pushes, shard=SHARDS, slug=SLUGS)
    def discard(self, claim: Claim, shard: int, slug: str) -> None:
        shard %= self.shards
        if (claim, shard) in self.carried:
            self.run.discard(claim, shard, slug)
            del self.carried[claim, shard]

    @precondition(lambda self: self.shards > 1)
    @rule(claim=pushes, shard=SHARDS)
    def lose_the_answer(self, claim: Claim, shard: int) -> None:
        """An admission is made whose owner does not hear of it, and nobody asks for it again."""
        if (claim, shard) not in self.carried:
            with suppress(ProblemError):
                self.run.admit(claim, shard)

    @rule()
    def answer(self) -> None:
        """Owners discard the parts that they are asked about and do not hold."""
        for key, kept in self.staged().items():
            held = {shard for claim, shard in self.carried if claim.key == key}
            for shard, part in kept["parts"].items() if "asked" in kept else ():
                if "digest" not in part and int(shard) not in held:
                    claim = Claim("", 0, 0, key)
                    self.run.do(self.run.pushes.discard(claim, kept["attempt"], int(shard)))

    @rule()
    def hear(self) -> None:
        """Owners hear, late, that pushes were refused, and let go what they hold of them."""
        staged = self.staged()
        for (claim, shard), attempt in list(self.carried.items()):
            if self.shards > 1 and staged.get(claim.key, {}).get("attempt") != attempt:
                del self.carried[claim, shard]

    def staged(self) -> dict[str, dict[str, Any]]:
        """The pushes on their way over several shards, by key."""
        found: Any = self.run.redis.hgetall(self.run.key("staged"))
        kept = {key: json.loads(text) for key, text in found.items()}
        return {key: push for key, push in kept.items() if "slug" not in push}

    @rule(worker=WORKERS)
    def join_again(self, worker: str) -> None:
        self.granted(worker)

    @rule(worker=WORKERS, noticed=st.booleans())
    def leave(self, worker: str, noticed: bool) -> None:
        if (lease := self.leases.pop(worker, None)) is not None:
            self.run.redis.zadd(self.run.key("leases"), {worker: 1})
            if noticed:
                self.run.redis.delete(self.run.key(f"lease:{lease.lease}"))
                self.run.expire()
                if self.shards > 1:
                    pending = self.run.redis.hvals(self.run.key("pending"))
                    assert not [claim for claim in pending if claim.startswith(lease.lease)]

    @rule(patience_ms=st.sampled_from([0, 3_600_000]))
    def expire(self, patience_ms: int) -> None:
        self.run.expire(patience_ms)

    @rule(epochs=st.integers(0, 1))
    def open_again(self, epochs: int) -> None:
        """The shards go on from what they hold, or go back to it in a new epoch."""
        run = self.run
        self.look()
        receipts = run.receipts()
        group = {worker: int(count) for worker, count in run.redis.hgetall(run.key("group")).items()}
        epoch, step, seq = (run.number(name) for name in ("epoch", "step", "seq"))
        run.do(run.opening.gather(self.shards))
        state = RunState(epoch + epochs, step, seq, True, group, receipts, norm_history=run.remembered_norms())
        run.reopen(state)
        if epochs:
            self.leases.clear()

    @invariant()
    def look(self) -> None:
        """The log ends with the count and has no gap; what was in it once stays, and no key is in it twice."""
        run, entries = self.run, self.run.entries()
        seq = run.number("seq")
        assert [entry["seq"] for entry in entries] == list(range(seq - len(entries) + 1, seq + 1))
        for entry in entries:
            assert self.entries.setdefault((entry["epoch"], entry["seq"]), entry) == entry
        keys = [entry["key"] for entry in self.entries.values() if "key" in entry]
        assert len(keys) == len(set(keys))
        decided = {key: record for key, record in self.records.items() if record.seq}
        assert decided.keys() <= set(keys)
        assert all(self.entries[record.epoch, record.seq]["key"] == key for key, record in decided.items())

    @invariant()
    def norms_are_those_of_the_log(self) -> None:
        if self.policy.bounds:
            self.look()
            entries = [self.entries[place] for place in sorted(self.entries)]
            assert self.run.remembered_norms() == norms_of(entries, BAN_AFTER)

    @invariant()
    def what_is_staged_is_there(self) -> None:
        """What Redis may commit, owners hold: one that does not could not apply it."""
        held = {(claim.key, shard): attempt for (claim, shard), attempt in self.carried.items()}
        for key, push in self.staged().items():
            for shard, part in push["parts"].items():
                assert "digest" not in part or held.get((key, int(shard))) == push["attempt"]

    @invariant()
    def counts_agree(self) -> None:
        run = self.run
        in_flight, pending = run.number("in_flight"), set(run.redis.hkeys(run.key("pending")))
        staged: Any = run.redis.hgetall(run.key("staged"))
        assert in_flight >= 0
        if not pending:
            assert in_flight == 0
            assert run.redis.llen(run.key("queue")) == 0
        assert all(key in pending or '"slug"' in kept for key, kept in staged.items())
        assert run.number("grouped") == sum(map(int, run.redis.hvals(run.key("group"))))

    def teardown(self) -> None:
        """Once every worker is gone and every part is let go, nothing is on its way."""
        for worker in list(self.leases):
            self.leave(worker, noticed=True)
        for claim, shard in self.carried:
            self.run.discard(claim, shard)
        self.run.expire(0)
        assert self.run.redis.hkeys(self.run.key("pending")) == []
        assert self.run.redis.hkeys(self.run.key("staged")) == []
        self.look()
        self.counts_agree()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_pushes_in_any_order(driver: Driver, shards: int, policy: str) -> None:
    run_machine(Pushes, 25, 40, driver=driver, shards=shards, policy=POLICIES[policy])
