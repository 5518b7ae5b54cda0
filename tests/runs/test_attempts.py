"""A key that is sent again to a run of several shards: messages that are late, and answers of Redis that are lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from freestep.errors import CoordinatorUnavailable, IdempotencyConflict, LeaseExpired
from freestep_service.domain.records import Admission, Claim, Owner
from freestep_service.runs.flight import Flight
from freestep_service.runs.run import Run
from in_process import NUMEL, claim_of, in_order, lease_of, new_run, part_of, process, pull, push, run_async, until

SHARDS, SLOTS = 2, 4
PATIENCE_S = 0.2
MINUS_ONES = torch.full((NUMEL,), -1.0)


class Kept:
    """What Redis has of the run's pushes on their way."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def push(self, key: str) -> dict[str, Any]:
        """A push as it is staged, empty where it is not."""
        text: Any = self._client.hget("freestep:{run}:staged", key)
        return json.loads(text) if text else {}

    @property
    def keys(self) -> set[str]:
        return set(self._client.hkeys("freestep:{run}:staged"))  # type: ignore[arg-type]

    @property
    def in_flight(self) -> int:
        return int(self._client.hget("freestep:{run}:run", "in_flight") or 0)  # type: ignore[arg-type]

    def tell(self, **message: Any) -> None:
        """Sends a message to the run's owners."""
        self._client.publish("freestep:{run}:messages", json.dumps(message))


@pytest.fixture
def kept(store: str) -> Iterator[Kept]:
    with Redis.from_url(store, decode_responses=True) as client:
        yield Kept(client)


# Messages that are late


@pytest.mark.parametrize("named", ["its own", "an earlier one", "none"])
def test_a_refusal_is_of_the_attempt_that_it_names(store: str, tmp_path: Path, kept: Kept, named: str) -> None:
    """A shard that let go what Redis has as staged could not apply the push, and the run would be opened again."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=SHARDS)
            claim, gate = claim_of(await lease_of(run), "key"), asyncio.Event()
            bodies = [part_of(run, 0, MINUS_ONES), part_of(run, 1, MINUS_ONES, gate)]
            pushing = [asyncio.create_task(run.shard(shard).push(claim, bodies[shard])) for shard in range(SHARDS)]
            await until(lambda: "digest" in kept.push("key").get("parts", {}).get("0", {}), "the first part")
            await until(lambda: "1" in kept.push("key")["parts"], "the second one's admission")
            attempt = kept.push("key")["attempt"]
            # Older versions name none.
            names = {"its own": {"attempt": attempt}, "an earlier one": {"attempt": str(int(attempt) - 1)}, "none": {}}
            kept.tell(kind="refused", key="key", slug="lease-expired", detail="", **names[named])
            if named != "an earlier one":
                flights = [run.shard(shard)._pushes._flights["key"] for shard in range(SHARDS)]
                await until(lambda: all(flight.decided.done() for flight in flights), "the refusal")
            gate.set()
            answers: list[Any] = await asyncio.gather(*pushing, return_exceptions=True)
            if named != "an earlier one":
                assert [type(answer) for answer in answers] == [LeaseExpired] * SHARDS
                return
            assert [answer.record.decision for answer in answers] == ["applied"] * SHARDS
            assert [await pull(run.shard(shard)) for shard in range(SHARDS)] == [(1, 1.0)] * SHARDS
            assert not run._recovery.must_reopen

    run_async(work)


def test_a_turn_is_of_the_attempt_that_it_names(store: str, tmp_path: Path, kept: Kept) -> None:
    """Pushes that took memory without a slot could wait for each other."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=SHARDS)
            for worker in range(SLOTS // 2):
                lease = await lease_of(run, f"worker-{worker}")
                for number in range(2):
                    before = claim_of(lease, f"before-{worker}-{number}")
                    admission = await run.coordinator.pushes.admit(before, run.shard(0).core.owner())
            seen = in_order(run)
            pushing = asyncio.create_task(push(run, claim_of(await lease_of(run), "key")))
            await until(lambda: len(kept.push("key").get("parts", ())) == SHARDS, "the push")
            assert kept.push("key")["queued"]
            kept.tell(kind="granted", key="key", attempt=admission.attempt)
            # They ask when nothing was heard for a while.
            await until(lambda: len(seen) == 2 * SHARDS, "the second admissions")
            assert seen == ["admit"] * 2 * SHARDS
            await run.coordinator.pushes.discard(before, admission.attempt, 0)
            assert [outcome.record.decision for outcome in await pushing] == ["applied"] * SHARDS

    run_async(work)


def test_what_is_told_before_an_admission_is_answered_is_heard_then() -> None:
    async def work() -> None:
        flight = Flight(Claim("lease", 1, 0, "key"))
        flight.hear("2", flight.granted.set)
        flight.hear("1", lambda: flight.refuse(LeaseExpired()))
        assert (flight.granted.is_set(), flight.decided.done()) == (False, False)
        flight.admitted("2")
        assert (flight.granted.is_set(), flight.decided.done()) == (True, False)
        flight.hear("2", lambda: flight.refuse(LeaseExpired()))
        assert flight.decided.done()

    run_async(work)


def test_what_was_told_of_a_push_is_not_true_of_the_next_attempt() -> None:
    async def work() -> None:
        flight = Flight(Claim("lease", 1, 0, "key"))
        flight.admitted("1")
        flight.hear("1", lambda: flight.refuse(LeaseExpired()))
        assert (flight.granted.is_set(), flight.decided.done()) == (True, True)
        flight.admitted("1")
        assert flight.decided.done()
        flight.admitted("2")
        flight.hear("1", flight.granted.set)
        assert (flight.granted.is_set(), flight.decided.done()) == (False, False)

    run_async(work)


# Answers that are lost


def lose_answers(run: Run) -> set[tuple[str, int]]:
    """Has the first answer to an admission of each key be lost, on each shard; of which they were."""
    admit, lost = run.coordinator.pushes.admit, set[tuple[str, int]]()

    async def losing(claim: Claim, owner: Owner, *more: Any) -> Admission:
        admission = await admit(claim, owner, *more)
        if claim.key.startswith("lost") and (claim.key, owner.shard) not in lost:
            lost.add((claim.key, owner.shard))
            raise CoordinatorUnavailable("the answer was lost")
        return admission

    run.coordinator.pushes.admit = losing  # type: ignore[method-assign]
    return lost


def test_pushes_whose_admissions_nobody_has_heard_of_give_their_slots_back(
    store: str, tmp_path: Path, kept: Kept
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", stall_seconds=PATIENCE_S) as registry:
            run = await new_run(registry, shards=SHARDS)
            lost = lose_answers(run)
            for worker in range(SLOTS // 2):
                lease = await lease_of(run, f"worker-{worker}")
                for number in range(2):
                    claim = claim_of(lease, f"lost-{worker}-{number}")
                    for shard in range(SHARDS):
                        with pytest.raises(CoordinatorUnavailable):
                            await run.shard(shard).push(claim, part_of(run, shard, MINUS_ONES))
            assert len(lost) == SLOTS * SHARDS
            (outcome, _) = await push(run, claim_of(await lease_of(run), "key"))
            assert (outcome.record.decision, outcome.record.step) == ("applied", 1)
            await until(lambda: not kept.keys, "the end of all")
            assert kept.in_flight == 0
            # Who sends one again after all is taken at his word.
            (outcome, _) = await push(run, claim)
            assert (outcome.record.decision, outcome.record.step) == ("applied", 2)

    run_async(work)


def test_a_push_that_waits_for_a_body_is_not_given_up(store: str, tmp_path: Path, kept: Kept) -> None:
    """However long it is on its way: shards are asked, and have it."""

    async def work() -> None:
        async with process(store, tmp_path / "data", stall_seconds=PATIENCE_S) as registry:
            run = await new_run(registry, shards=SHARDS)
            lease, other, gate = await lease_of(run), await lease_of(run, "other"), asyncio.Event()
            asked, ask = list[str](), run.shard(1).on_asked

            def noting(key: str, *more: str) -> None:
                asked.append(key)
                ask(key, *more)

            run.shard(1).on_asked = noting  # type: ignore[method-assign]
            slow = [asyncio.create_task(push(run, claim_of(lease, key), gate=gate)) for key in ("one", "two", "three")]
            await until(lambda: len(kept.keys) == 3, "the pushes")
            await until(lambda: len(asked) >= 4, "questions")
            assert all(len(kept.push(key)["parts"]) == SHARDS for key in ("one", "two", "three"))
            await push(run, claim_of(other, "other"))
            gate.set()
            outcomes = [outcome for outcomes in await asyncio.gather(*slow) for outcome in outcomes]
            assert [outcome.record.decision for outcome in outcomes] == ["applied"] * 6

    run_async(work)


def test_a_key_that_comes_while_its_part_is_discarded_waits(store: str, tmp_path: Path, kept: Kept) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=SHARDS)
            lose_answers(run)
            claim = claim_of(await lease_of(run), "lost")
            for shard in range(SHARDS):
                with pytest.raises(CoordinatorUnavailable):
                    await run.shard(shard).push(claim, part_of(run, shard, MINUS_ONES))
            attempt = kept.push("lost")["attempt"]
            for shard in range(SHARDS):
                run.shard(shard).on_asked("lost", attempt, claim.fingerprint())
            with pytest.raises(IdempotencyConflict):
                await run.shard(0).push(replace(claim, step=1), part_of(run, 0, MINUS_ONES))
            outcomes = await push(run, claim)
            assert [outcome.record.decision for outcome in outcomes] == ["applied"] * SHARDS

    run_async(work)
