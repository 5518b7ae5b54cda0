"""A worker that sends many bodies at once, slowly, holds up itself; of runs of one shard and of several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edge.answers import Peer, dialled
from freestep.errors import Overloaded
from freestep_service.runs.lanes import Lanes
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import BODY, TENSORS, Api, ShardedApi
from raw_pushes import head_of_a_push

MANY = 100
LONG: dict[str, Any] = {
    "queue_seconds": 60.0,
    "stall_seconds": 60.0,
    "slow_peer_bytes": 0,
    "slow_bytes_per_second": 1e-3,
}
"""Settings under which nobody is slow, nobody stalls, and nothing is excused: every body in flight costs a turn."""


@pytest.fixture
def crowd() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def crowded(stack: ExitStack, url: str, target: str, heads: list[dict[str, str]], body: bytes) -> list[Peer]:
    """Pushes of which all but the last byte of the body was sent."""
    peers = []
    for headers in heads:
        peer = stack.enter_context(dialled(url))
        peer.send(head_of_a_push(target, headers, len(body)) + body[:-1])
        peers.append(peer)
    return peers


def test_one_lease_does_not_take_all_turns(start_service: Callable[..., ThreadService], crowd: ExitStack) -> None:
    service = start_service(**LONG)
    api = Api(service.url)
    api.create()
    greedy, other = api.lease("greedy"), api.lease("other")
    peers = crowded(crowd, api.url, api.path("/gradients"), [api.headers(greedy, 0) for _ in range(MANY)], BODY)
    pending = api.redis_key("pending")
    wait_until(lambda: len(service.redis_dump(pending).get(pending, ())) == MANY)
    for step in range(5):
        assert api.push(other, step).json()["step"] == step + 1
    # They are no fewer pushes for that.
    for peer in peers:
        peer.send(BODY[-1:])
    steps = sorted(peer.answer("POST").document["step"] for peer in peers)
    assert steps == list(range(6, 6 + MANY))
    api.http.close()


def test_one_lease_does_not_take_all_turns_of_several_shards(
    shared_nodes: Callable[..., list[ThreadService]], crowd: ExitStack
) -> None:
    nodes = shared_nodes(2, **LONG)
    api = ShardedApi(nodes[0].url)
    api.create(shards=2)
    greedy, other = api.lease("greedy"), api.lease("other")
    bodies = api.bodies(TENSORS)
    keys = [f"greedy-{number}" for number in range(20)]
    peers = []
    for shard in (0, 1):
        # In another order at each shard.
        heads = [api.headers(greedy, 0, key) for key in (keys if shard else keys[::-1])]
        target = f"{api.path('/gradients')}?shard={shard}&of=2"
        peers += crowded(crowd, api.shards[shard]["url"], target, heads, bodies[shard])
    staged = api.redis_key("staged")
    wait_until(lambda: len(nodes[0].redis_dump(staged).get(staged, ())) == len(keys))
    for step in range(3):
        answers = api.push_parts(other, step, f"other-{step}", bodies)
        assert [answer.json()["step"] for answer in answers] == 2 * [step + 1]
    for peer in peers:
        peer.send(bodies[0][-1:])
    assert {peer.answer("POST").status for peer in peers} == {200}
    assert api.status()["pushes"]["applied"] == 3 + len(keys)
    wait_until(lambda: not nodes[0].redis_dump(staged))
    api.http.delete(api.path())
    api.http.close()


def test_one_lease_does_not_take_all_turns_of_whole_pushes(
    shared_nodes: Callable[..., list[ThreadService]], crowd: ExitStack
) -> None:
    nodes = shared_nodes(2, **LONG | {"slow_peer_bytes": 2**20, "slow_bytes_per_second": 1e9})
    api = ShardedApi(nodes[0].url)
    api.create(shards=2)
    greedy, other = api.lease("greedy"), api.lease("other")
    heads = [api.headers(greedy, 0) for _ in range(20)]
    peers = crowded(crowd, api.url, api.path("/gradients"), heads, BODY)
    # The bodies of all but one are not read.
    for step in range(3):
        assert api.push(other, step).json()["step"] == step + 1
    for peer in peers:
        peer.send(BODY[-1:])
    assert sorted(peer.answer("POST").document["step"] for peer in peers) == list(range(4, 24))
    api.http.delete(api.path())
    api.http.close()


def test_who_waits_behind_their_own_bodies_is_refused_in_time(
    start_service: Callable[..., ThreadService], crowd: ExitStack
) -> None:
    service = start_service(**{**LONG, "queue_seconds": 0.3})
    api = Api(service.url)
    api.create()
    lease = api.lease()
    before = api.state(service)
    crowded(crowd, api.url, api.path("/gradients"), [api.headers(lease, 0, "first")], BODY)
    pending = api.redis_key("pending")
    wait_until(lambda: bool(service.redis_dump(pending)))
    answer = api.push(lease, 0, "second")
    assert (answer.status_code, answer.json()["type"]) == (429, "urn:freestep:problem:overloaded")
    assert "of this sender" in answer.json()["detail"]
    crowd.close()
    wait_until(lambda: not service.redis_dump(pending))
    assert api.state(service) == before
    api.http.close()


def test_lanes_are_first_come_first_served() -> None:
    async def work() -> None:
        lanes, served = Lanes(2), []

        async def pass_through(name: str, lease: str) -> None:
            await lanes.enter(lease, 10.0)
            served.append(name)

        for name in ("a1", "a2", "b1"):
            await pass_through(name, name[0])
        waiting = [asyncio.create_task(pass_through(name, "a")) for name in ("a3", "a4", "a5")]
        await asyncio.sleep(0)
        assert served == ["a1", "a2", "b1"]
        waiting[0].cancel()
        await asyncio.sleep(0)
        lanes.leave("a")
        await waiting[1]
        lanes.leave("a")
        await waiting[2]
        assert served[3:] == ["a4", "a5"]
        with pytest.raises(Overloaded):
            await lanes.enter("a", 0.0)
        for lease in "aab":
            lanes.leave(lease)
        assert not lanes._lanes

    asyncio.run(work())


def test_lanes_become_wider_and_narrower() -> None:
    async def work() -> None:
        lanes, served = Lanes(2), list[int]()

        async def pass_through(number: int) -> None:
            await lanes.enter("a", 10.0)
            served.append(number)

        waiting = [asyncio.create_task(pass_through(number)) for number in range(6)]
        await asyncio.sleep(0)
        assert served == [0, 1]
        lanes.most = 1
        lanes.leave("a")
        await asyncio.sleep(0)
        assert served == [0, 1]
        lanes.leave("a")
        await waiting[2]
        assert served == [0, 1, 2]
        lanes.most = 3
        lanes.leave("a")
        await asyncio.gather(*waiting)
        assert served == list(range(6))
        for _ in range(3):
            lanes.leave("a")
        assert not lanes._lanes

    asyncio.run(work())


def test_a_turn_that_comes_with_a_cancellation_is_passed_on() -> None:
    async def work() -> None:
        lanes = Lanes(1)
        await lanes.enter("a", 10.0)
        first, second = (asyncio.create_task(lanes.enter("a", 10.0)) for _ in range(2))
        await asyncio.sleep(0)
        lanes.leave("a")
        first.cancel()
        await second
        assert first.cancelled()
        lanes.leave("a")
        assert not lanes._lanes

    asyncio.run(work())
