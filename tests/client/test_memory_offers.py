"""What a client makes of offers of memory: it takes what is safe to use, asks no more than it has to, gives back."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest

import freestep.shared_memory
from freestep.errors import MalformedTensors, MemoryNotShared, Overloaded, ProblemError, UnexpectedResponse
from freestep.shared_memory import Bodies, SharedMemories
from freestep.wire.spans import Span
from meanwhile import under_way
from shared_bodies import memory_files

pytestmark = pytest.mark.skipif(not freestep.shared_memory._IS_POSSIBLE, reason="there is no such memory here")

URL = "http://127.0.0.1:1"
BODIES = Bodies("/v1/runs/r", 0, 0, "lease", 1)
SIZE = 4 * 1024 * 1024
TICKET = "0123456789abcdef" * 2


def grant(**changes: Any) -> bytes:
    return (
        json.dumps({"memory": "m", "size": SIZE, "body": SIZE // 2, "tensors": SIZE // 2, **changes}).encode() + b"\n"
    )


def memfd(*, sealed: bool = True, size: int = SIZE) -> int:
    made = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, size)
    if sealed:
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return made


def large_memory() -> tuple[bytes, list[int]]:
    """For bodies, and for answers, of SIZE bytes."""
    return grant(size=2 * SIZE, body=SIZE, tensors=SIZE), [memfd(size=2 * SIZE)]


class Offering:
    """A service's side: what it answers to who asks, and hands over at its socket."""

    def __init__(self, line: bytes, descriptors: list[int]) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.connections: list[socket.socket] = []
        self._hands_over = line, descriptors
        self._name = f"freestep-{uuid.uuid4().hex}"
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(f"\0{self._name}")
        self._listening.listen()
        self._serving = under_way(self._serve)

    def _serve(self) -> None:
        # Until the test closes it.
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections.append(connection)
                assert connection.recv(100) == TICKET.encode() + b"\n"
                line, descriptors = self._hands_over
                if line:
                    socket.send_fds(connection, [line], descriptors)
                else:
                    connection.close()

    def ask(self, url: str, path: str, wish: dict[str, Any]) -> dict[str, str]:
        self.asked.append((url, path, wish))
        return {"socket": self._name, "ticket": TICKET, "more": "of a newer service"}

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._serving.result()
        for each in self.connections:
            each.close()
        for descriptor in self._hands_over[1]:
            os.close(descriptor)


@pytest.fixture
def offer() -> Iterator[Callable[..., Offering]]:
    with ExitStack() as stack:

        def make(line: bytes | None = None, descriptors: list[int] | None = None) -> Offering:
            made = Offering(grant() if line is None else line, [memfd()] if descriptors is None else descriptors)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def memories() -> Iterator[SharedMemories]:
    made = SharedMemories()
    yield made
    made.close()


def is_lent(memories: SharedMemories, ask: Any, bodies: Bodies | None = BODIES, size: int = SIZE // 2) -> bool:
    with memories.lent(URL, bodies, size, ask) as memory:
        return memory is not None


def test_memory_is_asked_for_once_and_lent_again(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    offering = offer()
    for _ in range(3):
        assert is_lent(memories, offering.ask)
    ((url, path, wish),) = offering.asked
    assert (url, path) == (URL, "/v1/runs/r/leases/lease/memory")
    assert wish == {"token": 1, "shard": 0, "body_bytes": SIZE // 2, "answer_bytes": 0}
    assert memories.has("/v1/runs/r") and not memories.has("/v1/runs/other")
    memories.forget("another")
    assert memories.has("/v1/runs/r")
    memories.forget("lease")
    assert not memories.has("/v1/runs/r")
    assert offering.connections[0].recv(1) == b""


def test_one_request_has_it_at_a_time(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    offering = offer()
    with memories.lent(URL, BODIES, SIZE // 2, offering.ask) as memory:
        assert memory is not None
        assert not is_lent(memories, offering.ask)
    assert is_lent(memories, offering.ask)
    assert len(offering.asked) == 1


def test_a_pull_takes_what_there_is(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    offering, pull = offer(), Bodies("/v1/runs/r", 0, SIZE // 2)
    assert not is_lent(memories, offering.ask, pull, 0)
    assert not offering.asked
    assert is_lent(memories, offering.ask)
    assert is_lent(memories, offering.ask, pull, 0)
    assert not is_lent(memories, offering.ask, Bodies("/v1/runs/r", 1, SIZE // 2), 0)
    assert len(offering.asked) == 1


def test_a_larger_body_is_given_a_larger_memory(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    small, large = offer(), offer(*large_memory())
    assert is_lent(memories, small.ask)
    assert is_lent(memories, large.ask, size=SIZE)
    assert [wish["body_bytes"] for _, _, wish in small.asked + large.asked] == [SIZE // 2, SIZE]
    assert [wish["answer_bytes"] for _, _, wish in small.asked + large.asked] == [0, SIZE // 2]
    assert small.connections[0].recv(1) == b""


def test_a_memory_that_is_too_small_is_not_used(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    offering, answer = offer(), Bodies("/v1/runs/r", 1, SIZE, "lease", 1)
    for bodies, size in ((BODIES, SIZE), (answer, 0)):
        for _ in range(2):
            assert not is_lent(memories, offering.ask, bodies, size)
        assert offering.connections[-1].recv(1) == b""
    # Once, for the time being.
    assert len(offering.asked) == 2


def test_a_lease_that_ends_meanwhile_is_given_none(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    offering = offer()

    def ask(*question: Any) -> Any:
        memories.forget("lease")
        return offering.ask(*question)

    assert not is_lent(memories, ask)
    assert offering.connections[0].recv(1) == b""
    assert not memories.has("/v1/runs/r") and not memories._again_at

    def refused(*question: Any) -> Any:
        memories.forget("lease")
        raise UnexpectedResponse("no")

    assert not is_lent(memories, refused)
    assert not memories._again_at


def test_no_password_is_logged(memories: SharedMemories, caplog: pytest.LogCaptureFixture) -> None:
    def ask(*question: Any) -> Any:
        raise UnexpectedResponse("no")

    caplog.set_level("DEBUG", "freestep")
    with memories.lent("http://me:secret@127.0.0.1:1", BODIES, SIZE, ask) as memory:
        assert memory is None
    assert "127.0.0.1:1" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("is_answered", [True, False])
def test_after_a_request_without_an_answer_it_is_given_up(
    memories: SharedMemories, offer: Callable[..., Offering], is_answered: bool
) -> None:
    offering = offer()
    error = Overloaded() if is_answered else UnexpectedResponse("the connection was cut")
    with pytest.raises(type(error)), memories.lent(URL, BODIES, SIZE // 2, offering.ask) as memory:
        assert memory is not None
        raise error
    assert memories.has("/v1/runs/r") == is_answered
    assert is_lent(memories, offering.ask)
    assert len(offering.asked) == (1 if is_answered else 2)


def test_a_memory_that_the_service_does_not_know_is_given_up_for_a_while(
    memories: SharedMemories, offer: Callable[..., Offering], monkeypatch: pytest.MonkeyPatch
) -> None:
    offering, pull = offer(), Bodies("/v1/runs/r", 0, SIZE // 2)
    assert is_lent(memories, offering.ask)
    with pytest.raises(MemoryNotShared), memories.lent(URL, pull, 0, offering.ask) as memory:
        assert memory is not None
        raise MemoryNotShared
    assert offering.connections[0].recv(1) == b""
    # Behind a load balancer the next one might be of the wrong process as well.
    assert not is_lent(memories, offering.ask)
    assert len(offering.asked) == 1
    monkeypatch.setattr("freestep.shared_memory._AGAIN_S", 0.0)
    memories.forget("lease")
    assert is_lent(memories, offering.ask)


def test_who_meets_the_wrong_process_again_and_again_waits_longer(
    memories: SharedMemories, offer: Callable[..., Offering], monkeypatch: pytest.MonkeyPatch
) -> None:
    offering, now = offer(), [0.0]
    monkeypatch.setattr("freestep.shared_memory.time", SimpleNamespace(monotonic=lambda: now[0]))

    def paused(error: type[ProblemError]) -> float:
        """Seconds until memory is asked for after a refusal."""
        with pytest.raises(error), memories.lent(URL, BODIES, SIZE // 2, offering.ask) as memory:
            assert memory is not None
            raise error
        (then,) = memories._again_at.values()
        begun, now[0] = now[0], then - 1
        assert not is_lent(memories, offering.ask)
        now[0] = then
        return then - begun

    # An empty body is what a service finds that has not been told of the memory.
    found = [paused(error) for error in [MemoryNotShared, MalformedTensors] * 4]
    assert found == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert is_lent(memories, offering.ask)
    assert paused(MemoryNotShared) == 60


def test_a_memory_that_the_service_has_given_up_is_replaced(
    memories: SharedMemories, offer: Callable[..., Offering]
) -> None:
    offering = offer()
    assert is_lent(memories, offering.ask)
    offering.connections[0].close()
    assert not memories.has("/v1/runs/r")
    assert is_lent(memories, offering.ask)
    assert len(offering.asked) == 2


UNSAFE: dict[str, Callable[[], tuple[bytes, list[int]]]] = {
    "nothing": lambda: (b"", []),
    "no descriptor": lambda: (grant(), []),
    "pages that can be taken away": lambda: (grant(), [memfd(sealed=False)]),
    "fewer bytes than are said": lambda: (grant(), [memfd(size=SIZE // 2)]),
    "no bytes": lambda: (grant(size=0), [memfd()]),
    "fewer than none": lambda: (grant(size=-1), [memfd()]),
    "more than there can be": lambda: (grant(size=2**64), [memfd()]),
    "answers behind its end": lambda: (grant(tensors=SIZE + 1), [memfd()]),
    "answers among bodies": lambda: (grant(tensors=SIZE // 4), [memfd()]),
    "what is no memory": lambda: (grant(), [os.open("/dev/null", os.O_RDWR)]),
    "what is no JSON": lambda: (b"yes\n", [memfd()]),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_cannot_be_used_safely_is_not(memories: SharedMemories, offer: Callable[..., Offering], name: str) -> None:
    offering, before = offer(*UNSAFE[name]()), memory_files()
    for _ in range(2):
        assert not is_lent(memories, offering.ask)
    # Once, for the time being.
    assert len(offering.asked) == 1
    offering.connections[0].close()
    assert memory_files() <= before


@pytest.mark.parametrize(
    "change",
    [
        {"socket": "/tmp/.X11-unix/X0"},
        {"socket": f"freestep-{'0' * 31}g"},
        {"socket": f"freestep-{'0' * 32}\n"},
        {"ticket": "AUTH EXTERNAL\r\n"},
        {"ticket": f"{TICKET}\n"},
        {"ticket": ""},
    ],
)
def test_a_service_elsewhere_can_not_choose_who_is_sent_what(
    memories: SharedMemories, offer: Callable[..., Offering], change: dict[str, str]
) -> None:
    offering = offer()
    assert not is_lent(memories, lambda *question: {**offering.ask(*question), **change})
    assert offering.asked and not offering.connections


def test_no_process_that_is_started_meanwhile_gets_the_descriptor(
    memories: SharedMemories, offer: Callable[..., Offering], monkeypatch: pytest.MonkeyPatch
) -> None:
    inheritable, mapped = [], mmap.mmap

    def noted(descriptor: int, size: int) -> mmap.mmap:
        inheritable.append(os.get_inheritable(descriptor))
        return mapped(descriptor, size)

    monkeypatch.setattr("freestep.shared_memory.mmap.mmap", noted)
    assert is_lent(memories, offer().ask)
    assert inheritable == [False]


def test_a_large_memory_is_waited_for_as_long_as_its_pages_take(
    memories: SharedMemories, offer: Callable[..., Offering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.shared_memory._SLOWEST_PAGES", SIZE // 32)
    with memories.lent(URL, BODIES, SIZE, offer(*large_memory()).ask) as memory:
        assert memory is not None
        assert memory._connection.gettimeout() == 5 + 32


def test_a_refusal_is_believed_for_a_while(memories: SharedMemories, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(*question: Any) -> Any:
        asked.append(question)
        raise UnexpectedResponse("an older service knows no such path")

    for _ in range(3):
        assert not is_lent(memories, ask)
    assert len(asked) == 1
    monkeypatch.setattr("freestep.shared_memory._AGAIN_S", 0.0)
    assert not is_lent(memories, ask, Bodies("/v1/runs/r", 0, 0, "newer", 2))
    assert not is_lent(memories, ask, Bodies("/v1/runs/r", 0, 0, "newer", 2))
    assert len(asked) == 3


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "http://host.invalid:8000"])
def test_a_service_elsewhere_is_not_asked(memories: SharedMemories, url: str) -> None:
    def ask(*question: Any) -> Any:
        raise AssertionError(question)

    with memories.lent(url, BODIES, SIZE, ask) as memory:
        assert memory is None


@pytest.mark.parametrize("bodies", [None, BODIES], ids=["of no tensors", "small"])
def test_there_is_none_for_bodies(memories: SharedMemories, offer: Callable[..., Offering], bodies: Any) -> None:
    offering = offer()
    assert not is_lent(memories, offering.ask, bodies, 1024)
    off = SharedMemories(is_wanted=False)
    assert not is_lent(off, offering.ask)
    assert not offering.asked


def test_an_answer_has_to_lie_in_the_memory(memories: SharedMemories, offer: Callable[..., Offering]) -> None:
    class Sink:
        data = bytearray(10)
        at = 0

        def get_buffer(self) -> memoryview:
            return memoryview(self.data)[self.at :]

        def buffer_updated(self, size: int) -> None:
            self.at += size

    with memories.lent(URL, BODIES, SIZE // 2, offer().ask) as memory:
        assert memory is not None
        headers = memory.headers([memoryview(b"0123"), memoryview(bytearray(b"456789"))])
        assert headers == {"Freestep-Memory": "m", "Freestep-Span": "0-10"}
        memory.pour(Span(0, 10), sink := Sink())
        assert sink.data == b"0123456789"
        with pytest.raises(MalformedTensors):
            memory.pour(Span(0, 11), Sink())
        with pytest.raises(ValueError):
            memory.pour(Span(SIZE - 1, SIZE + 1), Sink())
