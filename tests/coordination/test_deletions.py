"""What Redis remembers of deleted runs: those of late by name, and one epoch for all others."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordination.driven import ASYNC, DrivenRun, Driver
from freestep.errors import RunNotFound
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.opening import list_again, note_deletion, read_deletion
from freestep_service.coordination.run_scripts import DELETED_KEY, DELETION_TIMES_KEY, RUNS_KEY
from freestep_service.coordination.store import Store
from freestep_service.domain.records import Origin
from harness import store as started

NOTES = st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 50)), max_size=30)


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store without runs."""
    with started("valkey", tmp_path_factory.mktemp("store")) as url:
        yield url


@settings(max_examples=30, deadline=None)
@given(NOTES, st.booleans())
def test_a_new_run_begins_beyond_every_deleted_one_of_its_name(
    own_store: str, notes: list[tuple[str, int]], is_of_older_version: bool
) -> None:
    async def scenario() -> None:
        store = await Store.connect(own_store)
        await store.client.delete(DELETED_KEY, DELETION_TIMES_KEY)
        last: dict[str, int] = {}
        if is_of_older_version:
            last = {"a": 60, "x": 2, "y": 3, "z": 4}
            await store.client.hset(DELETED_KEY, mapping=last)
        for run, epoch in notes:
            await note_deletion(store, run, epoch, kept=3)
            # This one cannot be taken for one that Redis has lost.
            assert (await read_deletion(store, run))[0] >= epoch
            # One that was noted late may be an earlier one.
            last[run] = max(last.get(run, 0), epoch)
            assert await store.client.hlen(DELETED_KEY) <= 4
        for run, epoch in last.items():
            assert max(await read_deletion(store, run)) >= epoch
        await store.close()

    asyncio.run(scenario())


def test_nothing_is_left_of_a_lease_that_is_granted_while_its_run_is_deleted(
    run: DrivenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = run.opening._newest_leases

    async def before_the_grant() -> list[str]:
        monkeypatch.setattr(run.opening, "_newest_leases", read)
        return []

    monkeypatch.setattr(run.opening, "_newest_leases", before_the_grant)
    run.push(run.claim(run.grant(), "key"))
    run.do(run.opening.delete(1))
    assert set(run.dump()) == {run.key("deleted")}


def test_what_is_left_of_a_run_counts_until_it_is_noted(run: DrivenRun) -> None:
    """By any process: the one that has deleted the run may have ended."""
    run.do(run.opening.delete(5))
    store, left = run.driver.store, run.key("deleted")
    assert run.do(read_deletion(store, run.name))[0] == 5
    assert run.redis.ttl(left) == -1
    # Somebody has missed this deletion, and hears of the one before.
    run.do(note_deletion(store, run.name, 3))
    assert run.redis.hget(DELETED_KEY, run.name) == "5"
    assert 0 < float(str(run.redis.ttl(left))) <= 3600
    assert not run.redis.sismember(RUNS_KEY, run.name)
    run.redis.delete(left)
    assert run.do(read_deletion(store, run.name))[0] == 5


def test_only_the_run_that_is_named_is_deleted(driver: Driver) -> None:
    """Another may have its name by the time that Redis is asked."""
    origins = [Origin(1, "first"), Origin(1, "second")]
    name = uuid.uuid4().hex
    first, second = (Coordinator(driver.store, name, "{}", ASYNC, origin).opening for origin in origins)
    assert driver.do(first.create(1, 1)) == "created"
    assert driver.do(first.delete(1, "first")) == 1
    assert driver.do(second.create(2, 1)) == "created"
    with pytest.raises(RunNotFound):
        driver.do(first.delete(1, "first"))
    left = driver.do(second.read())
    assert left is not None and left.origin.id == "second"
    # As where a call comes late: nothing of its name is there.
    assert driver.do(second.delete(2, "second")) == driver.do(first.delete(1, "first")) == 2


def test_a_new_run_is_listed_again_where_one_of_its_name_is_noted_late(make_run: Callable[..., DrivenRun]) -> None:
    run, other = make_run().open(), make_run()
    store = run.driver.store
    run.do(note_deletion(store, run.name, 1))
    assert not run.redis.sismember(RUNS_KEY, run.name)
    run.do(list_again(store, [other.name, run.name]))
    assert run.redis.sismember(RUNS_KEY, run.name)
    assert not run.redis.sismember(RUNS_KEY, other.name)
