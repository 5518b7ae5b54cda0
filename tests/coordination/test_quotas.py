"""Lists of what tokens have: never more than a quota, and nothing that is no more keeps its place."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from freestep_service.coordination.quotas import Event, Full, SharedQuotas
from freestep_service.coordination.store import Store
from machines import run_machine


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Store]:
    store = await Store.connect(url)
    try:
        yield store
    finally:
        await store.close()


def key(run: str, name: str) -> str:
    return f"freestep:{{{run}}}:{name}"


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "delete", "vanish", "adopt"]), st.integers(0, 5), st.integers(0, 9)
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ACTS, st.none() | st.integers(0, 4), st.none() | st.integers(0, 20))
def test_runs_and_their_weights_stay_within_a_quota(
    valkey_url: str, acts: list[tuple[str, int, int]], most: int | None, heaviest: int | None
) -> None:
    """vanish: a run ends, and who had to take it off the list has died. adopt: then another token creates it."""

    async def scenario() -> None:
        word = uuid.uuid4().hex
        there: dict[str, int] = {}
        async with connected(valkey_url) as store:
            shared = SharedQuotas(store, runs_after_ms=0)
            for act, number, weight in acts:
                run = f"{word}-{number}"
                if act == "take":
                    weight = there.get(run, weight)
                    full = await shared.take_run(word, run, weight, most, heaviest)
                    others = {name: each for name, each in there.items() if name != run}
                    if full is None:
                        there[run] = weight
                        await shared.settle_run(word, run, "made", f"mark-{number}", weight)
                        await store.client.hset(key(run, "run"), mapping={"spec": "{}", "creator": word})
                        assert most is None or len(there) <= most
                        assert heaviest is None or sum(there.values()) <= heaviest
                    elif full.what == "names":
                        assert full.used == len(others) == most
                    else:
                        assert heaviest is not None
                        assert full == Full("weight", sum(others.values()))
                        assert sum(others.values()) + weight > heaviest
                elif run in there:
                    del there[run]
                    await store.client.delete(key(run, "run"))
                    if act == "delete":
                        await shared.settle_run(word, run, "ended", f"mark-{number}")
                    elif act == "adopt":
                        await store.client.hset(key(run, "run"), mapping={"spec": "{}", "creator": "another"})

    asyncio.run(scenario())


def test_a_lease_counts_until_it_has_ended(valkey_url: str) -> None:
    async def scenario() -> None:
        run, token = uuid.uuid4().hex, uuid.uuid4().hex
        async with connected(valkey_url) as store:
            shared = SharedQuotas(store, leases_after_ms=0)
            await store.client.zadd(key(run, "leases"), {"a worker": 1})
            assert await shared.take_lease(token, run, "a worker", 1) is None
            await shared.settle_lease(token, run, "a worker", "made", "one")
            assert await shared.take_lease(token, run, "another", 1) == Full("names", 1)
            # Its own worker may have a newer one.
            assert await shared.take_lease(token, run, "a worker", 1) is None
            await store.client.zrem(key(run, "leases"), "a worker")
            assert await shared.take_lease(token, run, "another", 1) is None
            await shared.settle_lease(token, run, "another", "made", "two")
            await shared.settle_lease(token, run, "another", "ended", "two")
            assert await store.client.exists(f"freestep:quota:{token}:leases") == 0

    asyncio.run(scenario())


def test_what_is_being_made_is_not_looked_for(valkey_url: str) -> None:
    async def scenario() -> None:
        run, token = uuid.uuid4().hex, uuid.uuid4().hex
        async with connected(valkey_url) as one, connected(valkey_url) as two:
            assert await SharedQuotas(one).take_run(token, run, 5, 1, None) is None
            assert await SharedQuotas(two).take_run(token, f"{run}-2", 5, 1, None) == Full("names", 1)

    asyncio.run(scenario())


def test_of_many_takers_at_once_no_more_get_it(valkey_url: str) -> None:
    async def scenario() -> None:
        token = uuid.uuid4().hex
        async with connected(valkey_url) as one, connected(valkey_url) as two:
            takers = [
                SharedQuotas(store).take_run(token, f"{token}-{n}", 1, 7, None)
                for n in range(20)
                for store in (one, two)
            ]
            refused = [full for full in await asyncio.gather(*takers) if full is not None]
            listed = await one.client.hlen(f"freestep:quota:{token}:runs")
            assert (listed, set(refused)) == (7, {Full("names", 7)})

    asyncio.run(scenario())


MOST = 2
WORKERS = st.integers(0, 3)


class Grants(RuleBasedStateMachine):
    """Grants and releases of leases under a quota, whose steps come in any order; beside a model of what is live.

    A grant is a claim on the list, the lease, and its settling; a release is the lease's end, and its settling.
    """

    url: ClassVar[str]

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.store = self.runner.run(Store.connect(self.url))
        # Nothing is looked for while the steps of the test are under way.
        self.shared = SharedQuotas(self.store, leases_after_ms=3_600_000)
        self.token, self.count = uuid.uuid4().hex, 0
        self.live: dict[str, str] = {}
        """The newest lease of each worker."""
        self.claimed: list[str] = []
        """Workers whose leases are about to be granted."""
        self.granted: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []

    def settle(self, worker: str, event: Event, lease: str = "") -> None:
        self.runner.run(self.shared.settle_lease(self.token, "run", worker, event, lease))

    @rule(number=WORKERS)
    def claim(self, number: int) -> None:
        worker = f"worker-{number}"
        if self.runner.run(self.shared.take_lease(self.token, "run", worker, MOST)) is None:
            self.claimed.append(worker)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        worker = self.claimed.pop(data.draw(st.integers(0, len(self.claimed) - 1)))
        self.count += 1
        self.live[worker] = f"lease-{self.count}"
        self.granted.append((worker, self.live[worker]))

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.settle(self.claimed.pop(data.draw(st.integers(0, len(self.claimed) - 1))), "failed")

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def settle_grant(self, data: st.DataObject) -> None:
        worker, lease = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        self.settle(worker, "made", lease)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.live)))
        self.ended.append((worker, self.live.pop(worker)))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def settle_release(self, data: st.DataObject) -> None:
        worker, lease = self.ended.pop(data.draw(st.integers(0, len(self.ended) - 1)))
        self.settle(worker, "ended", lease)

    @invariant()
    def what_is_live_is_counted_and_within_the_quota(self) -> None:
        listed: Any = self.runner.run(self.store.client.hkeys(f"freestep:quota:{self.token}:leases"))
        assert {f"run {worker}" for worker in self.live} <= set(listed)
        assert len(listed) <= MOST

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()


def test_grants_and_releases_in_any_order_leave_no_lease_uncounted(valkey_url: str) -> None:
    run_machine(Grants, 100, 30, url=valkey_url)


def test_a_lease_that_was_released_in_order_counts_no_more(valkey_url: str) -> None:
    async def scenario() -> None:
        token = uuid.uuid4().hex
        async with connected(valkey_url) as store:
            shared = SharedQuotas(store)
            for worker in ("a", "b"):
                assert await shared.take_lease(token, "run", worker, 1) is None
                await shared.settle_lease(token, "run", worker, "made", f"lease of {worker}")
                assert await shared.take_lease(token, "run", "c", 1) == Full("names", 1)
                await shared.settle_lease(token, "run", worker, "ended", f"lease of {worker}")

    asyncio.run(scenario())


def test_a_creation_that_fails_does_not_lower_what_a_run_weighs(valkey_url: str) -> None:
    async def scenario(small_first: bool, made: int) -> None:
        token = uuid.uuid4().hex
        async with connected(valkey_url) as store:
            shared = SharedQuotas(store)
            for weight in (1, 90) if small_first else (90, 1):
                assert await shared.take_run(token, "run", weight, None, 100) is None
            # Either may be made yet.
            assert await shared.take_run(token, "another", 11, None, 100) == Full("weight", 90)
            if small_first:
                await shared.settle_run(token, "run", "made", "mark", made)
                await shared.settle_run(token, "run", "failed")
            else:
                await shared.settle_run(token, "run", "failed")
                await shared.settle_run(token, "run", "made", "mark", made)
            await shared.settle_run(token, "run", "kept", "mark", made)
            full = await shared.take_run(token, "another", 11, None, 100)
            assert full == (Full("weight", 90) if made == 90 else None)

    for small_first in (True, False):
        for made in (1, 90):
            asyncio.run(scenario(small_first, made))


def test_who_deletes_a_run_does_not_take_the_next_of_its_name_off_the_list(valkey_url: str) -> None:
    async def scenario() -> None:
        token = uuid.uuid4().hex
        async with connected(valkey_url) as store:
            shared = SharedQuotas(store)
            for mark in ("first", "second"):
                assert await shared.take_run(token, "run", 5, 1, None) is None
                await shared.settle_run(token, "run", "made", mark, 5)
            await shared.settle_run(token, "run", "ended", "first")
            assert await shared.take_run(token, "another", 5, 1, None) == Full("names", 1)
            await shared.settle_run(token, "run", "ended", "second")
            assert await shared.take_run(token, "another", 5, 1, None) is None

    asyncio.run(scenario())
