"""Which thread decodes a body."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from encoded import assemble, topk
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from freestep_service.state import staging
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import SLOWER, DeviceLocks
from freestep_service.state.staging import Staging
from in_process import Bytes

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
