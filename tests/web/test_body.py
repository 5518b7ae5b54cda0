"""Bodies as they come in ASGI messages, from a server whose connections are not ours."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import xxhash
from starlette.requests import Request

from asgi_calls import Sender, scope_of
from freestep.errors import MalformedRequest, MalformedTensors
from freestep_service.web import body as bodies
from freestep_service.web.body import Body

WHOLE = bytes(range(256)) * 4


class Memory:
    """A sink for at most `room` bytes, some at a time."""

    def __init__(self, room: int = len(WHOLE)) -> None:
        self.received = bytearray()
        self._room = room
        self._buffer = bytearray(100)

    def get_buffer(self) -> memoryview:
        return memoryview(self._buffer)[: self._room - len(self.received)]

    def buffer_updated(self, size: int) -> None:
        self.received += self._buffer[:size]


class Leaving(Sender):
    """A sender that is gone behind its chunks."""

    async def receive(self) -> dict[str, Any]:
        message = await super().receive()
        return message if message["more_body"] else {"type": "http.disconnect"}


def received(sender: Sender, sink: Memory, stall_s: float = 30.0) -> str:
    """The digest of a body that is received into a sink."""
    body = Body(Request(scope_of("POST", "/"), sender.receive), len(WHOLE), stall_s)
    return asyncio.run(asyncio.wait_for(body.receive_into(sink), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 100, 1000, len(WHOLE)])
def test_a_body_may_come_in_any_pieces(size: int) -> None:
    sink = Memory()
    digest = received(Sender([WHOLE[begin : begin + size] for begin in range(0, len(WHOLE), size)]), sink)
    assert sink.received == WHOLE
    assert digest == xxhash.xxh3_128(WHOLE).hexdigest()


def test_a_body_may_be_read_for_its_digest_alone() -> None:
    body = Body(Request(scope_of("POST", "/"), Sender([WHOLE[:500], WHOLE[500:]]).receive), len(WHOLE), 30.0)
    assert asyncio.run(asyncio.wait_for(body.receive_digest(), 30)) == xxhash.xxh3_128(WHOLE).hexdigest()


@pytest.mark.parametrize("chunks", [[], [WHOLE[:1]], [WHOLE[:500], WHOLE[500:-1]]])
@pytest.mark.parametrize("sender", [Sender, Leaving])
def test_a_body_that_ends_early_is_refused(chunks: Sequence[bytes], sender: type[Sender]) -> None:
    with pytest.raises(MalformedRequest, match="ended before"):
        received(sender(chunks), Memory())


def test_a_body_that_stalls_is_refused() -> None:
    class Stalling(Sender):
        async def receive(self) -> dict[str, Any]:
            return await super().receive() if not self.sent else await asyncio.Event().wait()  # type: ignore[func-returns-value]

    with pytest.raises(MalformedRequest, match="nothing of the body came"):
        received(Stalling([WHOLE[:500]]), Memory(), stall_s=0.01)


def test_a_body_that_drips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dripping(Sender):
        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.001)
            return await super().receive()

    monkeypatch.setattr(bodies, "SLOWEST", 10**9)
    with pytest.raises(MalformedRequest, match="too slowly"):
        received(Dripping([bytes([byte]) for byte in WHOLE]), Memory(), stall_s=0.05)


def test_what_a_sink_refuses_is_passed_on() -> None:
    with pytest.raises(MalformedTensors):
        received(Sender([WHOLE]), Memory(room=1000))
