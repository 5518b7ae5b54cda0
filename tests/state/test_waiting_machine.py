"""A shard's writer whose updates wait for distances, under entries, distances and openings in any order.

The log is pairs of pushes, of which the second makes an update. Of two pushes krum takes the first, and a push is minus
its place in the log. Entries are taken in their order, an update with its distances only; memory is held by what may
still be taken, and by nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from freestep_service.domain.records import Lost
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.log import Entry
from freestep_service.state.writer import Writer
from machines import run_machine
from state.writers import FIRST, comparing_shard, free, held, value

T = TypeVar("T")

MOST = 6
"""Entries that are held at once."""


class Waiting(RuleBasedStateMachine):
    inline: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.writer = Writer(comparing_shard(), "test", DeviceLocks(self.inline))
        self.pool = VectorPool(1, capacity=MOST)
        self.measured: list[tuple[int, int]] = []
        self.writer.on_measured = self.on_measured
        self.epoch, self.taken, self.is_paused = 1, 0, False
        self.came: dict[int, asyncio.Future[None]] = {}
        """The outcomes of entries that have come and are not taken, by seq."""
        self.told: set[int] = set()
        """Those of them that have their distances."""
        self.asked: set[tuple[int, int]] = set()
        """The updates that have waited, by epoch and seq, since they last came."""
        self.do(self.resume())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        async def settled() -> T:
            async with asyncio.timeout(30):
                result = await work
                # The writer's thread and the loop have then done what there was to do.
                while self.writer._under_way:
                    await asyncio.wait(set(self.writer._under_way))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                return result

        return self.runner.run(settled())

    def on_measured(self, entry: Entry, part: Tensor, applied: asyncio.Future[None]) -> None:
        assert part.tolist() == [1.0]
        assert not applied.done()
        self.measured.append((entry.epoch, entry.seq))

    async def resume(self) -> None:
        self.writer.resume(self.epoch, self.taken, self.taken // 2)

    def is_waiting(self) -> bool:
        following = self.taken + 1
        return not self.is_paused and following in self.came and following % 2 == 0 and following not in self.told

    def go_on(self) -> None:
        """What the model takes now."""
        while not self.is_paused and self.taken + 1 in self.came and not self.is_waiting():
            self.taken += 1
            future = self.came.pop(self.taken)
            assert future.done()
            assert future.exception() is None
            self.told.discard(self.taken)
        if self.is_waiting() and (self.epoch, self.taken + 1) not in self.asked:
            self.asked.add((self.epoch, self.taken + 1))
            assert self.measured.pop() == (self.epoch, self.taken + 1)
        assert not self.measured

    def lose(self) -> None:
        for future in self.came.values():
            assert isinstance(future.exception(), Lost)
        self.came, self.told, self.asked = {}, set(), set()

    @rule(ahead=st.integers(1, MOST))
    def submit(self, ahead: int) -> None:
        seq = self.taken + ahead
        if seq not in self.came:
            entry = replace(held(self.pool, seq, self.epoch), advance=seq % 2 == 0)

            async def work() -> asyncio.Future[None]:
                return self.writer.submit(entry)

            self.came[seq] = self.do(work())
            self.go_on()

    @rule(ahead=st.integers(0, MOST), other_epoch=st.booleans())
    def tell(self, ahead: int, other_epoch: bool) -> None:
        async def work() -> None:
            self.writer.add_distances(self.epoch + other_epoch, self.taken + ahead, FIRST)

        seq = self.taken + ahead
        self.do(work())
        if not other_epoch and seq in self.came:
            self.told.add(seq)
        self.go_on()

    @rule()
    def pause(self) -> None:
        self.writer.pause()
        self.is_paused = True

    @precondition(lambda self: self.is_paused)
    @rule()
    def go_on_as_before(self) -> None:
        self.is_paused = False
        self.do(self.resume())
        self.go_on()

    @rule()
    def forget(self) -> None:
        self.writer.pause(forget=True)
        self.lose()
        self.is_paused = False
        self.do(self.resume())

    @rule()
    def open_in_a_new_epoch(self) -> None:
        async def work() -> None:
            copy = await self.writer.run(self.writer.shard.copy_state)
            self.writer.pause()
            await self.writer.load(self.writer.shard.load, copy, self.epoch)
            await self.resume()

        self.epoch += 1
        self.do(work())
        self.is_paused = False
        self.lose()

    @invariant()
    def the_shard_is_where_it_should_be(self) -> None:
        assert (self.writer.epoch, self.writer.taken_seq, self.writer.shard.seq) == (self.epoch, self.taken, self.taken)
        assert self.writer.applied_step == self.writer.shard.step == self.taken // 2
        assert value(self.writer.shard) == sum(range(1, self.taken // 2 * 2, 2))
        assert self.writer.is_waiting == self.is_waiting()
        assert self.writer.has_gap == (bool(self.came) and not self.is_paused and self.taken + 1 not in self.came)
        assert free(self.pool) == MOST - len(self.came)

    def teardown(self) -> None:
        self.do(self.writer.close())
        self.lose()
        assert free(self.pool) == MOST
        self.runner.close()


@pytest.mark.parametrize("inline", [0, 8], ids=["thread", "inline"])
def test_updates_that_wait_are_taken_in_order_or_lost(inline: int) -> None:
    run_machine(Waiting, examples=60, steps=25, inline=inline)
