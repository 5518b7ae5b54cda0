"""Lists of what tokens have: never more than a quota, and nothing that is no more keeps its place."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from freestep_service.coordination.quotas import Full, SharedQuotas
from freestep_service.coordination.store import Store


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
                        await shared.release_run(word, run)
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
            assert await shared.take_lease(token, run, "another", 1) == Full("names", 1)
            # Its own worker may have a newer one.
            assert await shared.take_lease(token, run, "a worker", 1) is None
            await store.client.zrem(key(run, "leases"), "a worker")
            assert await shared.take_lease(token, run, "another", 1) is None
            await shared.release_lease(token, run, "another")
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
