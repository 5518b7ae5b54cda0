"""Owners of shards in any order of events: starts, deaths, silences, hand-overs, checkpoints, restores and divisions.

Several processes over one real store and one directory take their heartbeats only when a rule has them do so; time is
the test's. The run counts its pushes (SGD with learning rate 1, and gradients of -1), so each element of each shard is
the number of updates in it. In every order: a push counts once on all shards or on none; a process that is no owner by
Redis's word changes nothing; nothing that was applied is lost unless an owner may have died with it, and then the run
goes on from its newest checkpoint; and processes that live come to own all shards in equal shares.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from redis import Redis

from freestep.errors import ProblemError
from freestep.wire.manifest import Manifest
from freestep_service.coordination.opening import read_run
from freestep_service.coordination.store import Store
from freestep_service.domain.records import Origin
from freestep_service.domain.run_view import RunView
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.local import LocalStorage
from in_process import NUMEL, claim_of, part_of, resources_of, spec_of
from in_process import initialize as upload
from machines import run_machine
from rolled_back import copied, roll_back

T = TypeVar("T")

TTL = 8.0
"""Seconds for which an owner may be silent."""
URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
KEPT = 1000
"""Checkpoints: all."""
GRADIENT = torch.full((NUMEL,), -1.0)
WHICH = st.integers(0, 11)
"""Chooses one of several; what these are may depend on timing, which hypothesis must not see."""


def chosen(among: Sequence[T], which: int) -> T:
    return among[which % len(among)]


class Process:
    """A process with one run. Its heartbeats are the test's."""

    def __init__(self, resources: Resources, run: Run, life: AsyncExitStack) -> None:
        self.resources = resources
        self.run = run
        self.id = resources.node.id
        self.is_silent = False
        """Whether it takes part in nothing, as if it were stopped or cut off."""
        self._life = life

    async def beat(self) -> None:
        await self.resources.node.heartbeat(self.resources.store)
        await self.run._keeper.look()

    async def prolong(self) -> None:
        await self.run.coordinator.opening.heartbeat(self.resources.node, (), {})

    async def close(self) -> None:
        """Ends in order."""
        await self.run.ending.close()
        await self.resources.node.leave(self.resources.store)
        await self._end()

    async def kill(self) -> None:
        """Ends without a word to Redis or to storage."""
        await self.run.ending._let_go()
        await self._end()

    async def _end(self) -> None:
        await self.resources.channels.close()
        self.resources.disk.close()
        self.resources.locks.close()
        await self._life.aclose()


class Owners(RuleBasedStateMachine):
    url: ClassVar[str]
    shards: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.redis = Redis.from_url(self.url, decode_responses=True)
        self.redis.flushall()
        self.store = self.do(Store.connect(self.url))
        self.checkpoints = Checkpoints(LocalStorage(Path(self.folder.name)), "run", KEPT)
        self.now = 1000.0
        self.live: dict[int, Process] = {}
        """By their places in URLS."""
        self.count = 0
        """The updates that the run has."""
        self.may_go_back = False
        """Whether an owner may have taken updates with it."""
        self.keys = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await work

        return self.runner.run(bounded())

    def teardown(self) -> None:
        async def end() -> None:
            for process in self.live.values():
                await process.kill()
            await self.store.close()

        self.do(end())
        self.runner.close()
        self.redis.close()
        self.folder.cleanup()

    # What there is

    async def new_process(self, place: int, shards: int) -> Process:
        life = AsyncExitStack()
        resources = await life.enter_async_context(
            resources_of(
                self.url,
                Path(self.folder.name),
                lambda: self.now,
                node_url=URLS[place],
                owner_ttl_seconds=TTL,
                checkpoints_kept=KEPT,
            )
        )
        await resources.channels.start(lambda message: None)
        await resources.node.heartbeat(resources.store)
        spec = spec_of(self.shards)
        return Process(resources, Run("run", spec, Manifest.of(spec), shards, resources, Origin(1)), life)

    async def view(self) -> RunView | None:
        return await read_run(self.store, "run")

    def heard(self) -> list[Process]:
        return [process for process in self.live.values() if not process.is_silent]

    async def owners(self) -> list[Process]:
        """The owner of each shard, where the run is open and each takes part and knows that; else none."""
        view = await self.view()
        if view is None or view.phase != "open":
            return []
        by_id = {process.id: process for process in self.heard()}
        owners = [by_id.get(view.field(shard, "node") or "") for shard in range(view.count)]
        known = [owner for owner in owners if owner is not None]
        if len(known) < view.count or not all(
            owner.run.count == view.count
            and owner.run.owns(shard)
            and owner.run.shard(shard).core.loaded == view.generation
            for shard, owner in enumerate(known)
        ):
            return []
        return known

    def newest_checkpoint(self) -> int:
        return max((each.epoch, each.step) for each in self.checkpoints.all())[1]

    async def beats(self, processes: Sequence[Process]) -> None:
        await asyncio.gather(*(process.beat() for process in processes))

    async def with_beats(self, work: Coroutine[Any, Any, T]) -> T:
        """Does what needs the other processes too; time passes, so that those that are no more are given up."""
        task = asyncio.ensure_future(work)

        async def go_on_beating(process: Process) -> None:
            while not task.done():
                await process.beat()
                await asyncio.wait([task], timeout=0.01)

        async def pass_time() -> None:
            while (await asyncio.wait([task], timeout=0.1)) and not task.done():
                # However slow this machine is, they keep what is theirs.
                await asyncio.gather(*(process.prolong() for process in self.heard()))
                self._pass_time(1)

        await asyncio.gather(pass_time(), *map(go_on_beating, self.heard()))
        return await task

    # Events

    @initialize()
    def create(self) -> None:
        async def work() -> None:
            process = self.live[0] = await self.new_process(0, self.shards)
            await process.run.create()
            await process.beat()
            await upload(process.run)
            await process.run.checkpoint()

        self.do(work())

    @precondition(lambda self: len(self.live) < len(URLS))
    @rule(most=st.integers(1, len(URLS)))
    def start(self, most: int) -> None:
        for place in [place for place in range(len(URLS)) if place not in self.live][:most]:
            self.do(self._start(place))

    async def _start(self, place: int) -> Process:
        view = await self.view()
        process = self.live[place] = await self.new_process(place, view.count if view else self.shards)
        await process.beat()
        return process

    def place(self, which: int) -> int:
        return chosen(sorted(self.live), which)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, in_order=st.booleans())
    def end(self, which: int, in_order: bool) -> None:
        """What a process owned is on disk if it ends in order, unless others own it by now."""
        process = self.live.pop(self.place(which))
        self.may_go_back |= process.is_silent or (process.run.owns_any and not in_order)
        self.do(process.close() if in_order else process.kill())

    @precondition(lambda self: self.live)
    @rule(which=WHICH)
    def restart(self, which: int) -> None:
        """A process dies, and its successor has its shards at once: nobody else would for a while."""
        place = self.place(which)
        process = self.live.pop(place)

        async def work() -> None:
            before = await self.view()
            await process.kill()
            successor = await self._start(place)
            after = await self.view()
            if before is None or after is None or "lost" in before.run:
                return
            for shard in range(before.count):
                if before.field(shard, "node") == process.id:
                    assert after.field(shard, "node") == successor.id

        self.may_go_back |= process.run.owns_any
        self.do(work())

    @precondition(lambda self: self.heard())
    @rule(which=WHICH, rounds=st.integers(0, 8))
    def fall_silent(self, which: int, rounds: int) -> None:
        """Others may take over from it, and it does not know."""
        process = self.live[self.place(which)]
        process.is_silent = True
        for _ in range(rounds):
            self.pass_time(2)
            self.beat_at_once()

    @precondition(lambda self: len(self.heard()) < len(self.live))
    @rule()
    def come_back(self) -> None:
        for process in self.live.values():
            process.is_silent = False

    @precondition(lambda self: self.heard())
    @rule(which=WHICH)
    def beat(self, which: int) -> None:
        process = chosen(self.heard(), which)
        self.do(process.beat())

    @rule()
    def beat_at_once(self) -> None:
        self.do(self.beats(self.heard()))

    @rule(quarters=st.integers(1, 5))
    def pass_time(self, quarters: int) -> None:
        """Others may take what a process owns that has not had its heartbeat for a time to live."""
        self._pass_time(quarters)
        self.may_go_back = True

    def _pass_time(self, quarters: int) -> None:
        seconds = quarters * TTL / 4
        self.now += seconds
        ms = int(1000 * seconds)
        for node, ends in self.redis.zrange("freestep:nodes", 0, -1, withscores=True):
            self.redis.zadd("freestep:nodes", {node: ends - ms})
        fields: Any = self.redis.hgetall("freestep:{run}:shards")
        for field, value in fields.items():
            if field.endswith(":ends"):
                self.redis.hset("freestep:{run}:shards", field, int(value) - ms)

    @rule()
    def lose_the_store(self) -> None:
        self.redis.flushall()
        # What silent ones hold others may have to do without.
        self.may_go_back |= len(self.heard()) < len(self.live) or not self.live

    # What is asked of the run

    async def push(self, owners: Sequence[Process]) -> None:
        self.keys += 1
        lease = await owners[0].run.leases.grant("worker", None)
        claim = claim_of(lease, f"key-{self.keys}", lease.step)
        outcomes = await asyncio.gather(
            *(
                owner.run.shard(shard).push(claim, part_of(owner.run, shard, GRADIENT))
                for shard, owner in enumerate(owners)
            )
        )
        assert {(outcome.record.decision, outcome.replayed) for outcome in outcomes} == {("applied", False)}

    @rule(times=st.integers(1, 3))
    def push_where_it_is_open(self, times: int) -> None:
        async def work() -> None:
            owners = await self.owners()
            for _ in range(times if owners else 0):
                await self.push(owners)
                self.count += 1

        self.do(work())

    @precondition(lambda self: len(self.heard()) > 1)
    @rule(which=WHICH)
    def take_over(self, which: int) -> None:
        """Others take what a silent process owns. It is asked for pushes before it hears of that."""
        # Who takes part must not depend on who owns what: that may depend on timing.
        process = chosen(self.heard(), which)
        process.is_silent = True
        self.may_go_back = True
        if not process.run.owns_any or self.redis.hget("freestep:{run}:run", "phase") != "open":
            return
        for _ in range(8):
            self._pass_time(2)
            self.beat_at_once()
        self.do(self.push_to(process))

    async def push_to(self, process: Process) -> None:
        """Pushes to each shard that a process takes for its own: it counts for nothing."""
        before = await self.view()
        assert before is not None
        for shard in process.run._shards.indices:
            assert before.field(shard, "node") != process.id
            self.keys += 1
            with pytest.raises(ProblemError):
                lease = await process.run.leases.grant("worker", None)
                claim = claim_of(lease, f"key-{self.keys}", lease.step)
                await process.run.shard(shard).push(claim, part_of(process.run, shard, GRADIENT))
            after = await self.view()
            assert after is not None
            assert (after.number("seq"), after.number("step")) == (before.number("seq"), before.number("step"))

    @rule()
    def checkpoint(self) -> None:
        async def work() -> None:
            if owners := await self.owners():
                assert (await self.with_beats(owners[0].run.checkpoint())).step == self.count

        self.do(work())

    @rule(which=WHICH)
    def restore(self, which: int) -> None:
        if owners := self.do(self.owners()):
            steps = sorted({each.step for each in self.checkpoints.all()})
            self.count = chosen(steps, which)
            self.do(self.with_beats(owners[0].run.restore(self.count)))

    @rule(shards=st.integers(1, 4))
    def reshard(self, shards: int) -> None:
        if owners := self.do(self.owners()):
            self.do(self.with_beats(owners[0].run.reshard(shards)))

    @precondition(lambda self: self.live)
    @rule()
    def settle(self) -> None:
        """All who live take part for long enough."""
        for process in self.live.values():
            process.is_silent = False
        for _ in range(16):
            self.do(self.beats(self.heard()))
            self._pass_time(2)
        for _ in range(2):
            self.do(self.beats(self.heard()))
        owners = self.do(self.owners())
        assert owners, "the run does not open"
        assert max(owners.count(process) for process in owners) <= -(-len(owners) // len(self.live))

    @rule(first=WHICH, before=st.integers(0, 4), since=st.integers(1, 4))
    def take_the_store_back(self, first: int, before: int, since: int) -> None:
        """It fails over to a replica that lags by some heartbeats, within which an opening may have ended."""
        self.start(len(URLS))
        self.settle()
        self.do(self.heard()[0].run.coordinator.opening.gather(self.shards))
        with Redis.from_url(self.url) as client:
            for which in range(first, first + before):
                self.beat(which)
            older = copied(client)
            for which in range(first + before, first + before + since):
                self.beat(which)
            roll_back(client, older)

    # What holds

    @invariant()
    def an_open_run_has_its_updates(self) -> None:
        async def work() -> None:
            owners, view = await self.owners(), await self.view()
            if not owners or view is None:
                return
            step = view.number("step")
            if self.may_go_back and step != self.count:
                assert step == self.newest_checkpoint() <= self.count
                self.count = step
            # Owners whose time is over may lose their shards yet.
            now_ms = 1000 * time.time()
            self.may_go_back = any(int(view.field(shard, "ends") or 0) <= now_ms for shard in range(view.count))
            assert step == self.count
            for shard, owner in enumerate(owners):
                local = owner.run.shard(shard)
                async with asyncio.timeout(10):
                    while local.core.writer.applied_step < step:
                        await owner.beat()
                copy = await local.core.writer.run(local.core.shard.copy_state)
                assert copy.step == step
                assert torch.equal(copy.tensors["y"], torch.full_like(copy.tensors["y"], step))

        self.do(work())


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_owners_in_any_order(store: str, shards: int) -> None:
    run_machine(Owners, 25, 40, shrinks=False, url=store, shards=shards)
