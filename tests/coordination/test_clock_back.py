"""Redis's clock goes back by an hour: what was to end soon does not live for an hour longer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from coordination.driven import HOUR, DrivenRun, Driver
from freestep.errors import WorkerSuspended
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.quotas import Full, SharedQuotas
from freestep_service.domain.records import RunState

Make = Callable[..., DrivenRun]
TTL = 10_000


def now_ms(driver: Driver) -> int:
    seconds, microseconds = driver.do(driver.store.client.time())
    return int(seconds) * 1000 + int(microseconds) // 1000


def test_leases_end_after_their_time_to_live(run: DrivenRun) -> None:
    run.grant("w", TTL)
    run.redis.zadd(run.key("leases"), {"w": now_ms(run.driver) + HOUR})
    expired = run.expire()
    assert expired.live == 1
    assert 0 < expired.left_ms <= TTL
    # It is shortened once, and not prolonged.
    run.pass_time(TTL + 1)
    assert run.expire().live == 0
    assert run.redis.zcard(run.key("leases")) == 0


def test_owners_end_after_their_time_to_live(make_run: Make) -> None:
    run = make_run(2).open()
    dead, taker = Node("http://127.0.0.1:2", TTL), Node("http://127.0.0.1:3", HOUR)
    run.do(run.opening.give_up([run.owner(0), run.owner(1)]))
    run.heartbeat(dead, 0, 1)
    ends = now_ms(run.driver) + HOUR
    run.redis.hset(run.key("shards"), mapping={"0:ends": ends, "1:ends": ends})
    assert run.heartbeat(taker, 0, 1) is not None
    assert (run.shard_field(0, "node"), run.shard_field(1, "node")) == (dead.id, dead.id)
    assert int(run.shard_field(0, "ends") or 0) <= now_ms(run.driver) + TTL
    run.pass_time(TTL + 1)
    run.heartbeat(taker, 0, 1)
    assert (run.shard_field(0, "node"), run.shard_field(1, "node")) == (taker.id, taker.id)


def test_a_worker_that_was_ended_waits_no_longer_than_it_was_to(run: DrivenRun) -> None:
    run.do(run.leases.end_worker(run.owner(), "w", "", TTL // 1000, "{}", "me"))
    run.redis.hset(run.key("run"), "suspended", json.dumps({"w": now_ms(run.driver) + HOUR}))
    with pytest.raises(WorkerSuspended) as refused:
        run.grant("w")
    assert 0 < (refused.value.retry_after or 0) <= TTL / 1000
    # It is shortened once, and not prolonged.
    until = json.loads(run.field("suspended") or "")["w"]
    assert until <= now_ms(run.driver) + TTL
    run.redis.hset(run.key("run"), "suspended", json.dumps({"w": until - TTL}))
    run.grant("w")


def test_who_was_ended_for_longer_before_waits_for_that_time(run: DrivenRun) -> None:
    """It came here with the run's state, or by an older version."""
    run.redis.hset(run.key("run"), "suspended", json.dumps({"w": now_ms(run.driver) + HOUR}))
    run.do(run.leases.end_worker(run.owner(), "other", "", TTL // 1000, "{}", "me"))
    with pytest.raises(WorkerSuspended) as refused:
        run.grant("w")
    assert (refused.value.retry_after or 0) > HOUR / 2000


def test_cuts_end_after_their_time(make_run: Make) -> None:
    run = make_run(3).open()
    for number in range(2):
        run.do(run.log.request_read(run.owner(), f"ticket-{number}", "y F32", 3))
    key = run.key("cuts")
    kept: dict[str, Any] = {ticket: json.loads(cut) for ticket, cut in run.redis.hgetall(key).items()}
    for ticket, cut in kept.items():
        run.redis.hset(key, ticket, json.dumps(cut | {"ends": now_ms(run.driver) + HOUR}))
    run.do(run.log.request_read(run.owner(), "another", "x F32", 3))
    ends = [json.loads(cut)["ends"] for ticket, cut in run.redis.hgetall(key).items() if ticket in kept]
    assert len(ends) == 2
    assert max(ends) <= now_ms(run.driver) + 30_000


def test_what_a_token_has_no_more_is_looked_for_after_its_time(driver: Driver) -> None:
    token = uuid.uuid4().hex
    shared, key = SharedQuotas(driver.store, leases_after_ms=TTL), f"freestep:quota:{token}:leases"
    assert driver.do(shared.take_lease(token, "run", "dead", 1)) is None
    entry = json.loads(str(driver.redis.hget(key, "run dead")))
    driver.redis.hset(key, "run dead", json.dumps(entry | {"at": now_ms(driver) + HOUR}))
    assert driver.do(shared.take_lease(token, "run", "another", 1)) == Full("names", 1)
    entry = json.loads(str(driver.redis.hget(key, "run dead")))
    assert entry["at"] <= now_ms(driver) + TTL
    driver.redis.hset(key, "run dead", json.dumps(entry | {"at": entry["at"] - TTL - 1}))
    assert driver.do(shared.take_lease(token, "run", "another", 1)) is None


def test_pushes_that_do_not_arrive_give_up_their_slots(make_run: Make) -> None:
    run = make_run(3).open()
    leases = [run.grant(f"w-{number}") for number in range(3)]
    claims = [run.claim(lease, f"{lease.worker}-{number}") for lease in leases for number in range(2)]
    for claim in claims:
        run.admit(claim)
    for key, text in run.redis.hgetall(run.key("staged")).items():
        later = json.loads(text) | {"at": now_ms(run.driver) + HOUR}
        run.redis.hset(run.key("staged"), key, json.dumps(later))
    run.expire(TTL)
    run.pass_time(TTL + 1)
    run.expire(TTL)
    assert run.redis.lrange(run.key("queue"), 0, -1) == []
    assert not run.redis.hexists(run.key("pending"), "w-0-0")


def test_an_upload_of_weights_that_stands_still_loses_its_turn(make_run: Make) -> None:
    run = make_run(2)
    run.do(run.opening.create(1, 2))
    run.take_all()
    run.reopen(RunState(1, initialized=False))
    assert run.do(run.opening.initial_weights(run.owner(), "a", "coming", TTL, "0-10")) == "coming"
    turn = json.loads(run.field("initializing") or "")
    run.redis.hset(run.key("run"), "initializing", json.dumps(turn | {"at": now_ms(run.driver) + HOUR}))
    assert run.do(run.opening.initial_weights(run.owner(), "b", "coming", TTL, "0-10")) == "waiting"
    turn = json.loads(run.field("initializing") or "")
    assert turn["at"] <= now_ms(run.driver)
    run.redis.hset(run.key("run"), "initializing", json.dumps(turn | {"at": turn["at"] - TTL}))
    assert run.do(run.opening.initial_weights(run.owner(), "b", "coming", TTL, "0-10")) == "coming"


def test_processes_count_as_live_for_their_time_to_live(driver: Driver) -> None:
    dead, alive = Node("http://127.0.0.1:4", TTL), Node("http://127.0.0.1:5", TTL)
    driver.do(dead.heartbeat(driver.store))
    driver.redis.zadd("freestep:nodes", {dead.id: now_ms(driver) + HOUR})
    driver.do(alive.heartbeat(driver.store))
    ends: Any = driver.redis.zscore("freestep:nodes", dead.id)
    assert now_ms(driver) < ends <= now_ms(driver) + TTL
    driver.redis.zrem("freestep:nodes", dead.id, alive.id)
    driver.redis.hdel("{freestep:nodes}:hosts", dead.id, alive.id)
