"""What Redis remembers of deleted runs: those of late by name, and one epoch for all others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freestep_service.coordination.opening import note_deletion, read_deletion
from freestep_service.coordination.run_scripts import DELETED_KEY, DELETION_TIMES_KEY
from freestep_service.coordination.store import Store
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
            epoch = last[run] = last.get(run, 0) + epoch
            await note_deletion(store, run, epoch, kept=3)
            # This one cannot be taken for one that Redis has lost.
            assert (await read_deletion(store, run))[0] == epoch
            assert await store.client.hlen(DELETED_KEY) <= 4
        for run, epoch in last.items():
            assert max(await read_deletion(store, run)) >= epoch
        await store.close()

    asyncio.run(scenario())
