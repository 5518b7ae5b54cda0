"""A push over several shards, in every order in which its calls can come: it counts once on all of them, or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import permutations
from typing import NamedTuple

import pytest

from coordination.driven import DrivenRun, Driver
from freestep.api.models import Lease
from freestep.errors import LeaseExpired, MalformedTensors
from freestep_service.domain.records import Claim, Lost, Record

SHARDS = 3


class Call(NamedTuple):
    name: str
    shard: int


def orders() -> Iterator[tuple[Call, ...]]:
    """Admissions and commits, each shard's in its order; shards are alike, so they are admitted in theirs."""
    calls = [Call(name, shard) for shard in range(SHARDS) for name in ("admit", "commit")]
    for order in permutations(calls):
        place = {call: number for number, call in enumerate(order)}
        admitted = [place[Call("admit", shard)] for shard in range(SHARDS)]
        if admitted == sorted(admitted) and all(place["commit", k] > place["admit", k] for k in range(SHARDS)):
            yield order


ORDERS = list(orders())


class Push:
    """One push to a run that is used for many, and what came of its calls."""

    def __init__(self, run: DrivenRun, lease: Lease, key: str) -> None:
        self.run = run
        self.claim: Claim = run.claim(lease, key)
        self.records: list[Record | None] = []
        self.seq = run.number("seq")

    def make(self, call: Call) -> None:
        if call.name == "admit":
            assert self.run.is_admitted(self.claim, call.shard)
        else:
            self.records.append(self.run.commit(self.claim, call.shard))

    def check_over(self, *, counted: bool) -> None:
        """Nothing is on its way any more, and the log has gone on by one entry or by none."""
        run = self.run
        assert run.number("seq") == self.seq + counted
        assert run.redis.xrevrange(run.key("log"), count=1)[0][0] == f"{run.number('seq')}-0"
        assert (run.redis.hlen(run.key("pending")), run.redis.hlen(run.key("staged"))) == (0, 0)
        assert run.number("in_flight") == 0


@pytest.fixture(scope="module")
def used(driver: Driver) -> DrivenRun:
    run = DrivenRun(driver, SHARDS).open()
    run.push(run.claim(run.grant("first"), "first"))
    return run


def test_all_orders_are_there() -> None:
    assert len(ORDERS) == 15


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(f"{call.name[0]}{call.shard}" for call in order))
def test_a_push_in_any_order_counts_once(used: DrivenRun, order: tuple[Call, ...]) -> None:
    lease = used.grant("w")

    # As it is.
    push = Push(used, lease, f"plain-{order}")
    for call in order:
        push.make(call)
    assert push.records[:-1] == [None] * (SHARDS - 1)
    assert push.records[-1] is not None
    push.check_over(counted=True)

    for lost in range(SHARDS):
        first, last = order.index(Call("admit", lost)), order.index(Call("commit", lost))
        for place in range(first + 1, last + 1):
            # A part does not come, and is sent again.
            push = Push(used, lease, f"withdrawn-{lost}-{place}-{order}")
            for number, call in enumerate(order):
                if number == place:
                    used.discard(push.claim, lost)
                if call != Call("commit", lost):
                    push.make(call)
            assert push.records == [None] * (SHARDS - 1)
            push.make(Call("admit", lost))
            push.make(Call("commit", lost))
            assert push.records[-1] is not None
            push.check_over(counted=True)

            # The body of a part is refused, and so is the push on all shards.
            push = Push(used, lease, f"refused-{lost}-{place}-{order}")
            for number, call in enumerate(order):
                if number == place:
                    used.discard(push.claim, lost, "malformed-tensors", "why")
                if number < place:
                    push.make(call)
                elif call.name == "admit":
                    with pytest.raises(MalformedTensors, match="why"):
                        push.make(call)
                elif call.shard != lost:
                    with pytest.raises(Lost):
                        push.make(call)
            assert not any(push.records)
            push.check_over(counted=False)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(f"{call.name[0]}{call.shard}" for call in order))
@pytest.mark.parametrize("noticed", [True, False])
def test_a_push_whose_lease_ends_on_the_way_does_not_count(
    used: DrivenRun, order: tuple[Call, ...], noticed: bool
) -> None:
    for place in range(len(order)):
        lease = used.grant("w")
        push = Push(used, lease, f"ended-{noticed}-{place}-{order}")
        for number, call in enumerate(order):
            if number == place:
                used.redis.zadd(used.key("leases"), {"w": 1})
                if noticed:
                    used.redis.delete(used.key(f"lease:{lease.lease}"))
                    used.expire()
            with suppress(*([LeaseExpired, Lost] if number >= place else [])):
                push.make(call)
        assert not any(push.records)
        used.expire()
        push.check_over(counted=False)

        # Nothing comes any more.
        push = Push(used, used.grant("w"), f"silent-{noticed}-{place}-{order}")
        for call in order[:place]:
            push.make(call)
        used.redis.zadd(used.key("leases"), {"w": 1})
        used.expire()
        push.check_over(counted=False)
