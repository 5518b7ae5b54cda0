"""Which thread decodes a body, and who holds its memory until then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from encoded import assemble, topk
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from freestep_service.state import staging
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import SLOWER, DeviceLocks
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.state.staging import Staging
from in_process import Bytes, run_async, until

NUMEL = 64


@pytest.mark.parametrize(
    ("encoding", "inline", "is_inline"),
    [
        ("dense", NUMEL - 1, False),
        ("dense", NUMEL, True),
        ("topk", SLOWER * NUMEL - 1, False),
        ("topk", SLOWER * NUMEL, True),
    ],
)
def test_small_bodies_are_decoded_by_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, encoding: str, inline: int, is_inline: bool
) -> None:
    threads, decode = [], staging.decode_and_measure

    def noting(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return decode(*arguments)

    monkeypatch.setattr(staging, "decode_and_measure", noting)
    tensors = {"w": torch.arange(1.0, NUMEL + 1)}
    items, metadata = topk(tensors, 1.0) if encoding == "topk" else (tensors, {})

    async def main() -> float | None:
        manifest = Manifest((ParameterSpec(name="w", shape=(NUMEL,)),))
        made = Staging(manifest, VectorPool(NUMEL, 1), DeviceLocks(inline), 0.0)
        staged = await made.receive(Bytes(assemble(items, metadata)), await made.pool.acquire(1.0), (encoding,))
        staged.hold.release()
        return staged.norm

    assert asyncio.run(main()) == pytest.approx(float(tensors["w"].norm()))
    assert [thread is threading.main_thread() for thread in threads] == [is_inline]


class Held:
    """A copy of a body, whose memory is needed until the test says that it is written."""

    def __init__(self) -> None:
        self.tell: Callable[[Exception | None], None] | None = None

    def write(self, piece: memoryview) -> None:
        pass

    def written(self, done: Callable[[Exception | None], None]) -> bool:
        self.tell = done
        return False

    def finish(self, digest: str) -> None:
        pass

    def abandon(self) -> None:
        raise AssertionError("all of it has come")


def test_a_slow_body_that_has_come_is_not_ended_while_its_copy_is_written() -> None:
    async def work() -> None:
        failed: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        manifest, copy = Manifest((ParameterSpec(name="w", shape=(NUMEL,)),)), Held()
        # No peer is as fast as that, and there is no memory for what slow ones hold.
        made = Staging(manifest, VectorPool(NUMEL, 1, reserve=MemoryBudget(0)), DeviceLocks(NUMEL), 1e12)
        body = Bytes(assemble({"w": torch.ones(NUMEL)}, {}))
        receiving = asyncio.create_task(made.receive(body, await made.pool.acquire(30), copy=copy))
        waiting = asyncio.create_task(made.pool.acquire(30))
        await until(lambda: made.pool.is_held_by_slow_peers, "a look at who is slow")
        assert copy.tell is not None
        copy.tell(None)
        staged = await receiving
        assert staged.norm == NUMEL**0.5
        staged.hold.release()
        await waiting
        assert failed == []

    run_async(work)
