"""A key that is admitted, refused or forgotten, and admitted again: what is late is of the attempt that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Claim, Lost

Make = Callable[..., DrivenRun]
PATIENCE = 10_000


@contextmanager
def told(run: DrivenRun) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Reads the messages that the run's owners have been sent since."""
    with run.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(run.key("messages"))
        assert pubsub.get_message(timeout=60) is None

        def messages() -> list[dict[str, Any]]:
            run.redis.publish(run.key("messages"), '{"kind": "last"}')
            found: list[dict[str, Any]] = []
            while not found or found[-1]["kind"] != "last":
                message: Any = pubsub.get_message(timeout=60)
                assert message is not None
                found.append(json.loads(message["data"]))
            return found[:-1]

        yield messages


def staged(run: DrivenRun, key: str) -> dict[str, Any]:
    text: Any = run.redis.hget(run.key("staged"), key)
    kept: dict[str, Any] = json.loads(text)
    return kept


def admitted_twice(run: DrivenRun) -> tuple[Claim, str]:
    """A push that was refused and sent again, to shards 1 and 2; the attempt that shard 0 takes it to be."""
    claim = run.claim(run.grant(), "key")
    for shard in range(3):
        run.admit(claim, shard)
    earlier = run.attempt(claim)
    assert {run.attempt(claim, shard) for shard in range(3)} == {earlier}
    run.discard(claim, 1, "malformed-tensors", "why")
    run.admit(claim, 1)
    run.admit(claim, 2)
    assert run.commit(claim, 1) is None
    assert run.attempt(claim, 1) == run.attempt(claim, 2) != earlier == run.attempt(claim)
    return claim, earlier


def test_a_commit_of_an_earlier_attempt_is_lost(make_run: Make) -> None:
    """Its shard may have heard by now that the push was refused, and have no part of it any more."""
    run = make_run(3).open()
    claim, _ = admitted_twice(run)
    before = run.dump()
    with pytest.raises(Lost):
        run.commit(claim, 0)
    assert run.dump() == before
    run.admit(claim, 0)
    assert [run.commit(claim, shard) for shard in (2, 0)][-1] is not None


@pytest.mark.parametrize("call", ["discard", "refuse", "yield_slot"])
def test_other_calls_of_an_earlier_attempt_change_nothing(make_run: Make, call: str) -> None:
    run = make_run(3).open()
    claim, earlier = admitted_twice(run)
    before = run.dump()
    match call:
        case "discard":
            run.discard(claim, 0)
        case "refuse":
            run.discard(claim, 0, "malformed-tensors", "why")
        case "yield_slot":
            run.do(run.pushes.yield_slot(claim, earlier))
    assert run.dump() == before
    run.do(run.pushes.yield_slot(claim, run.attempt(claim, 1)))
    assert staged(run, "key")["slow"]


def test_messages_name_the_attempt_that_they_are_of(make_run: Make) -> None:
    run = DrivenRun(make_run().driver, 2, Policy("2", "none", distinct=True)).open()
    leases = [run.grant(f"w-{number}") for number in range(3)]
    claims = [run.claim(lease, f"{lease.worker}-{number}") for lease in leases for number in range(2)]
    with told(run) as messages:
        for claim in claims:
            run.admit(claim)
        run.discard(claims[0], 0)
        (granted,) = messages()
        assert (granted["kind"], granted["key"]) == ("granted", "w-2-0")
        assert granted["attempt"] == run.attempt(claims[4])
        run.discard(claims[1], 0, "malformed-tensors", "why")
        _, refused = messages()
        assert (refused["kind"], refused["key"], refused["attempt"]) == ("refused", "w-0-1", run.attempt(claims[1]))
        for claim in claims[2:4]:
            run.admit(claim, 1)
            run.commit(claim, 0)
            run.commit(claim, 1)
        decided = messages()[-1]
        assert (decided["kind"], decided["key"], decided["attempt"]) == ("decided", "w-1-1", run.attempt(claims[3]))


def test_attempts_rise_where_the_clock_does_not(make_run: Make) -> None:
    run = make_run(2).open()
    claim, attempts = run.claim(run.grant(), "key"), []
    for _ in range(3):
        run.admit(claim)
        attempts.append(int(run.attempt(claim)))
        run.redis.hset(run.key("run"), "attempt", attempts[0] + HOUR + len(attempts))
        run.discard(claim)
    assert attempts[1:] == [attempts[0] + HOUR + 2, attempts[0] + HOUR + 3]


@pytest.mark.parametrize("call", ["commit", "discard", "yield_slot"])
def test_a_push_that_an_older_version_admitted_names_no_attempt(make_run: Make, call: str) -> None:
    run = make_run(2).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim, 0)
    older = staged(run, "key")
    del older["attempt"]
    run.redis.hset(run.key("staged"), "key", json.dumps(older))
    run.admit(claim, 0)
    run.admit(claim, 1)
    assert (run.attempt(claim, 0), run.attempt(claim, 1)) == ("", "")
    match call:
        case "commit":
            assert [run.commit(claim, shard) for shard in range(2)][-1] is not None
        case "discard":
            run.discard(claim, 1)
            assert staged(run, "key")["parts"] == {"0": {}}
            run.discard(claim, 0)
            assert (run.redis.hlen(run.key("staged")), run.number("in_flight")) == (0, 0)
        case "yield_slot":
            run.do(run.pushes.yield_slot(claim, ""))
            assert (staged(run, "key")["slow"], run.number("in_flight")) == (True, 0)


# Parts that are said to arrive


def test_shards_are_asked_about_parts_that_have_been_arriving_for_long(make_run: Make) -> None:
    run = make_run(3).open()
    leases = [run.grant(f"w-{number}") for number in range(4)]
    claims = [run.claim(lease, f"{lease.worker}-{number}") for lease in leases for number in range(2)]
    with told(run) as messages:
        for number, claim in enumerate(claims):
            for shard in (0, 2) if number == 3 else range(3):
                run.admit(claim, shard)
        # Of one a part is staged; one is slow and one refused, whose slots two others have got; two are queued.
        plain, part_staged, slow, refused, *granted = claims[:6]
        run.commit(part_staged, 2)
        run.do(run.pushes.yield_slot(slow, run.attempt(slow)))
        run.discard(refused, 0, "malformed-tensors", "why")
        messages()
        run.expire(PATIENCE)
        assert messages() == []
        run.pass_time(PATIENCE - 1000)
        run.expire(PATIENCE)
        assert messages() == []
        run.pass_time(1000)
        run.expire(PATIENCE)
        (asked,) = messages()
        assert asked["kind"] == "arriving"
        expected = {
            claim.key: {"attempt": run.attempt(claim), "claim": claim.fingerprint(), "shards": shards}
            for claim, shards in ((part_staged, [0, 1]), *((each, [0, 1, 2]) for each in (plain, slow, *granted)))
        }
        assert {each.pop("key"): each | {"shards": sorted(each["shards"])} for each in asked["pushes"]} == expected
        # Once in so long.
        run.expire(PATIENCE)
        assert messages() == []
        run.pass_time(PATIENCE)
        run.expire(PATIENCE)
        (again,) = messages()
        assert {each["key"] for each in again["pushes"]} == set(expected)


def test_a_part_that_no_request_carries_gives_its_slot_to_those_who_wait(make_run: Make) -> None:
    run = make_run(3).open()
    dead, alive = [run.grant(f"dead-{number}") for number in range(2)], run.grant("alive")
    lost = [run.claim(lease, f"{lease.worker}-{number}") for lease in dead for number in range(2)]
    for claim in lost:
        for shard in range(3):
            run.admit(claim, shard)
    run.commit(lost[0], 2)
    waits = run.claim(alive, "waits")
    assert run.admit(waits).queued
    run.pass_time(PATIENCE)
    run.expire(PATIENCE)
    # Nothing was refused that may be arriving.
    assert run.redis.hlen(run.key("pending")) == 5
    run.discard(lost[0], 0)
    run.expire(PATIENCE)
    # Of one, a shard knows that nobody sends it.
    assert not run.redis.hexists(run.key("pending"), lost[0].key)
    assert run.is_admitted(waits)
    with pytest.raises(Lost):
        run.commit(lost[0], 1)
    for claim in lost[1:]:
        for shard in range(3):
            run.discard(claim, shard)
    assert (run.number("in_flight"), list(run.redis.hkeys(run.key("pending")))) == (1, ["waits"])


def test_shards_are_asked_again_where_the_clock_went_back(make_run: Make) -> None:
    run = make_run(3).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    run.pass_time(PATIENCE)
    with told(run) as messages:
        run.expire(PATIENCE)
        run.pass_time(-HOUR)
        run.expire(PATIENCE)
        assert [message["kind"] for message in messages()] == ["arriving", "arriving"]
        run.expire(PATIENCE)
        assert messages() == []
