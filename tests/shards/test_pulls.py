"""Pulls over several shards are of one cut of the model, part by part or as a whole through any node."""

from __future__ import annotations

import json
import uuid
from functools import partial

import httpx
import safetensors.torch
import torch
from redis import Redis

from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import ShardedApi, persistently, slug
from shards.runs import NONE_LEFT, ONES, SHARDS, SLOTS, leftovers


def test_pulls_of_one_ticket_are_of_one_step_while_pushes_go_on(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    bodies, rounds, pushers = run.bodies(ONES), 15, 3

    def push(number: int) -> None:
        lease = run.lease(f"worker-{number}")
        for turn in range(rounds):
            claim, more = (lease, 0, f"{number}-{turn}"), {"Prefer": "return=representation"}
            dtype = ("F32", "BF16", "F16")[turn % 3]
            parts = [
                partial(run.push_part, shard, *claim, body, None, dtype, **more) for shard, body in enumerate(bodies)
            ]
            answers = at_once(*(partial(persistently, part) for part in parts))
            assert [answer.status_code for answer in answers] == [200] * SHARDS, [each.text for each in answers]
            agreed(answers)

    def agreed(answers: list[httpx.Response]) -> int:
        """The step that the answers are of, all the parameters of which are alike."""
        (place,) = {
            tuple(answer.headers[name] for name in ("Freestep-Epoch", "Freestep-Step", "Freestep-Cut"))
            for answer in answers
        }
        rates = {answer.headers.get("Freestep-Scheduled-Lr") for answer in answers}
        assert rates == ({"1.0"} if place[1] != "0" else {None})
        step = int(place[1])
        for answer in answers:
            for tensor in safetensors.torch.load(answer.content).values():
                assert torch.equal(tensor, torch.full_like(tensor, -step))
        return step

    pushing = [under_way(partial(push, number)) for number in range(pushers)]
    seen = []
    pulled = 0
    while pulled < 100 or not all(each.done() for each in pushing):
        ticket = uuid.uuid4().hex
        url = nodes[pulled % len(nodes)].url if pulled % 2 else None
        answers = run.pull_parts(ticket, "xyz"[pulled % 3], url=url)
        assert [answer.status_code for answer in answers] == [200] * SHARDS, [answer.text for answer in answers]
        seen.append(agreed(answers))
        if pulled % 5 == 0:
            seen.append(agreed([run.http.get(f"{nodes[pulled % len(nodes)].url}{run.path('/parameters')}")]))
        pulled += 1
    for each in pushing:
        each.result()
    # Every pull is of a step that had been reached when it was asked for.
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert agreed(run.pull_parts("the-end", "y")) == rounds * pushers
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_pulls_that_share_a_ticket_are_of_one_cut(run: ShardedApi, redis: Redis) -> None:
    lease = run.lease()
    for number in range(20):
        assert {answer.status_code for answer in run.push_parts(lease, number, f"{number}", run.bodies(ONES))} == {200}
        for point in "xy":
            answers = run.pull_parts(f"ticket-{number}-{point}", point)
            assert {answer.headers["Freestep-Step"] for answer in answers} == {str(number + 1)}
            assert len({answer.headers["Freestep-Cut"] for answer in answers}) == 1
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_a_ticket_is_of_the_point_that_it_is_asked_for_with(run: ShardedApi, redis: Redis) -> None:
    """Who uses a ticket for two things gets both, but not of one cut."""
    answers = at_once(
        lambda: run.pull_part(0, "twice", "y"),
        lambda: run.pull_part(1, "twice", "y"),
        lambda: run.pull_part(2, "twice", "x", dtype="BF16"),
        lambda: run.pull_part(2, "twice", "y"),
        lambda: run.pull_part(1, "twice", "z", dtype="F16"),
    )
    assert [answer.status_code for answer in answers] == [200] * 5
    wanted = [(0, "y", torch.float32), (1, "y", torch.float32), (2, "x", torch.bfloat16), (2, "y", torch.float32)]
    wanted.append((1, "z", torch.float16))
    for answer, (shard, point, dtype) in zip(answers, wanted, strict=True):
        tensors = safetensors.torch.load(answer.content)
        assert tensors.keys() == {each["name"] for each in run.shards[shard]["slices"]}
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert f"-{point}-" in answer.headers["ETag"]
        header = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
        assert header["__metadata__"]["freestep.point"] == point


def test_parts_that_are_pulled_alone_cost_other_shards_nothing(run: ShardedApi, redis: Redis) -> None:
    for number in range(4 * SLOTS):
        for point in "xyz":
            assert run.pull_part(number % SHARDS, "", point).status_code == 200
    assert [answer.status_code for answer in run.pull_parts("ticket", "y")] == [200] * SHARDS
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_hundreds_of_pulls_leave_nothing_behind(nodes: list[ThreadService], run: ShardedApi, redis: Redis) -> None:
    def pull(number: int) -> list[int]:
        found = []
        for turn in range(40):
            answers = run.pull_parts(f"{number}-{turn}", "xyz"[turn % 3], dtype=["F32", "BF16"][turn % 2])
            found += [answer.status_code for answer in answers]
        return found

    found = at_once(*(partial(pull, number) for number in range(5)))
    assert {status for each in found for status in each} == {200}
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_the_whole_model_is_assembled_by_any_node(nodes: list[ThreadService], run: ShardedApi) -> None:
    lease = run.lease()
    answers = run.push_parts(lease, 0, "first", run.bodies(ONES))
    assert {answer.status_code for answer in answers} == {200}
    bodies = set()
    for node in nodes:
        url = f"{node.url}{run.path('/parameters')}"
        whole = run.http.get(url, params={"point": "y"})
        assert (whole.status_code, whole.headers["Freestep-Step"]) == (200, "1")
        assert int(whole.headers["Content-Length"]) == len(whole.content)
        for name, tensor in safetensors.torch.load(whole.content).items():
            assert torch.equal(tensor, -ONES[name])
        tag = whole.headers["ETag"]
        known = run.http.get(url, params={"point": "y"}, headers={"If-None-Match": f'"other", {tag}'})
        assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", tag)
        other = run.http.get(url, params={"point": "x"}, headers={"If-None-Match": tag})
        assert other.status_code == 200
        size = len(whole.content)
        for begin, end in ((0, 1), (0, size), (5, size - 3), (size - 40, size), (size // 2, size // 2 + 100)):
            wanted = {"Range": f"bytes={begin}-{end - 1}", "If-Range": tag}
            part = run.http.get(url, params={"point": "y"}, headers=wanted)
            assert (part.status_code, part.content) == (206, whole.content[begin:end])
            assert part.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{size}"
        outdated = run.http.get(url, params={"point": "y"}, headers={"Range": "bytes=0-1", "If-Range": '"old"'})
        assert (outdated.status_code, outdated.content) == (200, whole.content)
        beyond = run.http.get(url, params={"point": "y"}, headers={"Range": f"bytes={size}-"})
        assert (beyond.status_code, slug(beyond)) == (416, "range-not-satisfiable")
        bodies.add(whole.content)
    assert len(bodies) == 1


def test_a_part_has_a_validator_and_ranges_too(run: ShardedApi, redis: Redis) -> None:
    whole = run.pull_parts("whole", "y")
    for shard, answer in enumerate(whole):
        tag, size = answer.headers["ETag"], len(answer.content)
        known = run.pull_part(shard, "", "y", headers={"If-None-Match": tag})
        assert (known.status_code, known.content) == (304, b"")
        part = run.pull_part(shard, f"part-{shard}", "y", headers={"Range": f"bytes=8-{size - 2}"})
        assert (part.status_code, part.content) == (206, answer.content[8:-1])
