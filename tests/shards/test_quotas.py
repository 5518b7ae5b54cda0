"""Bytes of runs of several shards are counted once, by the process that the caller talks to, whoever has the shards."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from freestep.client import Client
from harness import ThreadService
from plain_calls import ShardedApi
from shards.runs import ONES, SHARDS, ZEROS, counting, sharded


@pytest.fixture
def spend() -> Callable[[ShardedApi], None]:
    """Puts a run's calls under a new token, which may move one body of any size, and then none for minutes."""

    def renew(run: ShardedApi) -> None:
        with Client(run.url) as client:
            token = client.create_token("fleet", "push", max_bytes_per_minute=1).token
        run.http.headers["Authorization"] = f"Bearer {token}"

    return renew


def status(answer: httpx.Response) -> tuple[int, str | None]:
    """The status, and the quota that is used up."""
    return answer.status_code, answer.json()["quota"] if answer.is_error else None


SPENT = 429, "bytes_per_minute"


def test_a_whole_upload_counts_once(nodes: list[ThreadService], spend: Callable[[ShardedApi], None]) -> None:
    with sharded(nodes) as run:
        assert run.http.put(run.path(), json=run.spec(**counting())).status_code == 201
        run.learn()
        admin = run.http.headers["Authorization"]
        spend(run)
        assert status(run.initialize(ZEROS)) == (201, None)
        assert status(run.http.get(run.path("/parameters"))) == SPENT
        run.http.headers["Authorization"] = admin


def test_a_whole_push_counts_once(run: ShardedApi, spend: Callable[[ShardedApi], None]) -> None:
    admin, lease = run.http.headers["Authorization"], run.lease()
    for step, wish in enumerate(("minimal", "representation")):
        spend(run)
        assert status(run.push(lease, step, tensors=ONES, Prefer=f"return={wish}")) == (200, None)
        assert status(run.push(lease, step + 1, tensors=ONES)) == SPENT
    run.http.headers["Authorization"] = admin
    assert run.status()["step"] == 2


@pytest.mark.parametrize("path", ["/parameters", "/state"])
def test_whole_answers_and_those_of_other_processes_count_where_they_are_asked_for(
    run: ShardedApi, spend: Callable[[ShardedApi], None], path: str
) -> None:
    admin = run.http.headers["Authorization"]
    there = next(shard for shard in range(SHARDS) if run.shards[shard]["url"] != run.url)
    for query in ({}, run.query(there)):
        spend(run)
        assert status(run.http.get(run.path(path), params=query)) == (200, None)
        assert status(run.http.get(run.path(path), params=query)) == SPENT
        # The owner has counted nothing.
        assert status(run.http.get(run.url_of(there, path), params=run.query(there))) == (200, None)
        assert status(run.http.get(run.url_of(there, path), params=run.query(there))) == SPENT
    run.http.headers["Authorization"] = admin


def test_a_forged_signature_does_not_count_for_another_process(
    run: ShardedApi, spend: Callable[[ShardedApi], None]
) -> None:
    admin = run.http.headers["Authorization"]
    spend(run)
    forged = {"Freestep-Relayed": "0" * 64}
    assert status(run.http.get(run.path("/parameters"), headers=forged)) == (200, None)
    assert status(run.http.get(run.path("/parameters"), headers=forged)) == SPENT
    run.http.headers["Authorization"] = admin
