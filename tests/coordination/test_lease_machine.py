"""Leases in any order of calls: at most one lives for each worker, tokens rise, and a fenced one commits nothing."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from coordination.driven import HOUR, DrivenRun, Driver
from freestep.api.models import Lease
from freestep.errors import LeaseExpired
from freestep_service.domain.records import Claim, Lost
from machines import run_machine

WORKERS = st.sampled_from(["a", "b"])


class Leases(RuleBasedStateMachine):
    """Calls to one run, beside a model of its leases. Time is the model's: quarters of a lease's time to live."""

    driver: ClassVar[Driver]
    shards: ClassVar[int]

    leases = Bundle("leases")
    admitted = Bundle("admitted")

    @initialize()
    def open(self) -> None:
        self.run = DrivenRun(self.driver, self.shards).open()
        self.quarter = 0
        self.newest: dict[str, Lease] = {}
        self.ends: dict[str, int] = {}
        """Lease -> the quarter in which it runs out."""
        self.tokens: list[int] = []
        self.committed = 0
        self.keys = 0

    def is_live(self, lease: Lease) -> bool:
        newest = self.newest.get(lease.worker)
        return newest is not None and newest.lease == lease.lease and self.ends[lease.lease] > self.quarter

    def live(self) -> list[str]:
        return sorted(lease.lease for lease in self.newest.values() if self.is_live(lease))

    def renewed(self, lease: Lease) -> None:
        self.ends[lease.lease] = self.quarter + 4

    def new_claim(self, lease: Lease) -> Claim:
        self.keys += 1
        return self.run.claim(lease, f"key-{self.keys}")

    @rule(target=leases, worker=WORKERS)
    def grant(self, worker: str) -> Lease:
        lease = self.run.grant(worker)
        self.newest[worker] = lease
        self.renewed(lease)
        self.tokens.append(lease.token)
        return lease

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if self.is_live(lease):
            assert self.run.do(self.run.leases.renew(lease.lease)).token == lease.token
            self.renewed(lease)
        else:
            with pytest.raises(LeaseExpired):
                self.run.do(self.run.leases.renew(lease.lease))

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        if self.is_live(lease):
            self.run.do(self.run.leases.release(lease.lease, self.run.position))
            del self.newest[lease.worker]
        else:
            with pytest.raises(LeaseExpired):
                self.run.do(self.run.leases.release(lease.lease, self.run.position))

    @rule(quarters=st.integers(1, 4))
    def pass_time(self, quarters: int) -> None:
        self.run.pass_time(quarters * HOUR // 4)
        # The shards' owner is not silent for so long.
        self.run.heartbeat()
        self.quarter += quarters

    @rule()
    def expire(self) -> None:
        live = len(self.live())
        seen, left_ms, _ = self.run.expire()
        assert seen == live
        assert (left_ms > 0) == (live > 0)
        assert left_ms <= HOUR
        self.newest = {worker: lease for worker, lease in self.newest.items() if self.is_live(lease)}

    @rule(target=admitted, lease=leases)
    def admit(self, lease: Lease) -> tuple[Lease, Claim] | None:
        claim = self.new_claim(lease)
        if not self.is_live(lease):
            with pytest.raises(LeaseExpired):
                self.run.admit(claim)
            return None
        for shard in range(self.shards):
            self.run.admit(claim, shard)
        self.renewed(lease)
        for shard in range(self.shards - 1):
            assert self.run.commit(claim, shard) is None
        return lease, claim

    @rule(push=admitted)
    def commit(self, push: tuple[Lease, Claim] | None) -> None:
        if push is None:
            return
        lease, claim = push
        known = self.run.redis.hexists(self.run.key("receipts"), claim.key)
        before = self.run.number("seq")
        try:
            record = self.run.commit(claim, self.shards - 1)
        except (LeaseExpired, Lost):
            assert not known
            assert not self.is_live(lease)
            assert self.run.number("seq") == before
            return
        assert record is not None
        assert known or self.is_live(lease)
        if not known:
            self.committed += 1
            self.renewed(lease)
        assert self.run.number("seq") == before + (not known)

    @invariant()
    def one_lease_of_each_worker_is_listed_if_it_lives(self) -> None:
        listed = self.run.do(self.run.leases.workers())
        assert sorted(status.lease for status in listed) == self.live()
        assert len({status.worker for status in listed}) == len(listed)

    @invariant()
    def tokens_rise(self) -> None:
        assert self.tokens == sorted(set(self.tokens))

    @invariant()
    def the_log_holds_what_was_committed(self) -> None:
        assert self.run.number("seq") == self.committed == len(self.run.entries())


@pytest.mark.parametrize("shards", [1, 3])
def test_leases_in_any_order(driver: Driver, shards: int) -> None:
    run_machine(Leases, 40, 25, driver=driver, shards=shards)
