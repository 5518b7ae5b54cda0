"""Many workers in one thread: gradients are pushed over connections, and y comes back, as fast as the service can.

Each worker sends its gradient to all shards under one claim, and begins its next push when it has all answers. Bodies
are sent from one vector and received into one scratch buffer, so that a push costs this process little beside what the
kernel copies. Connections are made anew for each window, since a service closes those that are idle meanwhile.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from freestep import Flat, Run
from freestep.credentials import credentials
from freestep.lease import Claim

__all__ = ["Generator", "Taken"]

_SCRATCH = memoryview(bytearray(1 << 20))
_BUFFER_BYTES = 4 << 20
"""Of a socket, so that a body of a few megabytes is written in few calls."""
_TTL_MS = 3_600_000
"""Longer than a measurement, so that nobody has to renew a lease meanwhile."""
_LEAST_EACH = 2
"""Pushes of a worker that a window has, on average."""


@dataclass
class Taken:
    """What the workers have done in a window: the seconds that each push took, and the staleness of each that was
    answered with y, as all are for which the service has memory."""

    seconds: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)


class _Connection:
    """A connection of one worker to the owner of one shard."""

    def __init__(self, url: str, target: str, credit: Mapping[str, str], body: Sequence[memoryview]) -> None:
        address = urlsplit(url)
        self.socket = socket.create_connection((address.hostname or "", address.port or 80))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self.socket.setblocking(False)
        headers = {
            "Host": address.netloc,
            **credit,
            "Content-Type": "application/vnd.safetensors",
            "Content-Length": str(sum(map(len, body))),
            "Prefer": "return=representation",
        }
        self._head = f"POST {target} HTTP/1.1\r\n" + _lines(headers)
        self._body = body
        self._unsent: list[memoryview] = []
        self._read = bytearray()
        self._missing: int | None = None
        self.head = b""
        """Of the answer that came last."""

    def start(self, headers: Mapping[str, str]) -> None:
        self._unsent = [memoryview(f"{self._head}{_lines(headers)}\r\n".encode()), *self._body]
        self._missing = None
        self._read.clear()

    def send(self) -> bool:
        """Sends what the socket takes; whether all is sent."""
        while self._unsent:
            try:
                sent = self.socket.sendmsg(self._unsent)
            except BlockingIOError:
                return False
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if self._unsent:
                self._unsent[0] = self._unsent[0][sent:]
        return True

    def receive(self) -> bool:
        """Receives what there is; whether the answer is complete."""
        while self._missing != 0:
            try:
                count = self.socket.recv_into(_SCRATCH)
            except BlockingIOError:
                return False
            if not count:
                raise ConnectionError("the service has closed a connection")
            if self._missing is None:
                self._read += _SCRATCH[:count]
                head, end, body = self._read.partition(b"\r\n\r\n")
                if not end:
                    continue
                self.head = bytes(head).lower()
                count = len(body)
                self._missing = int(self.header("content-length"))
            self._missing -= count
        return True

    def header(self, name: str) -> str:
        """A header of the answer, empty if there is none."""
        _, found, rest = self.head.partition(f"\r\n{name}: ".encode())
        return rest.partition(b"\r\n")[0].decode() if found else ""


class _Worker:
    """A lease as (lease, token), and, while it pushes, a connection to the owner of each shard."""

    def __init__(self, lease: tuple[str, int]) -> None:
        self.lease = lease
        self.connections: list[_Connection] = []
        self.step = 0
        self.began = 0.0
        self.unanswered: set[_Connection] = set()


class Generator:
    """The workers of a run; a context manager, which closes what it has open."""

    def __init__(self, run: Run, service_url: str, shards: int) -> None:
        credit = credentials(None, httpx.URL(service_url)).headers()
        self._service = httpx.Client(base_url=service_url, headers=credit)
        self._run = run.name
        self._credit = credit
        self._bodies = [part.body() for part in Flat(run.manifest).parts(shards)]
        urls = [shard.url or service_url for shard in run.topology().shards]
        path = f"/v1/runs/{run.name}/gradients?dtype=F32"
        self._owners = [
            (url, path + (f"&shard={index}&of={shards}" if shards > 1 else "")) for index, url in enumerate(urls)
        ]
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def join(self, workers: int) -> None:
        """Has so many workers hold leases, if there are not as many yet."""
        while len(self._workers) < workers:
            wish = {"worker": f"worker-{len(self._workers)}", "ttl_ms": _TTL_MS}
            answer = self._service.post(f"/v1/runs/{self._run}/leases", json=wish).raise_for_status().json()
            self._workers.append(_Worker((answer["lease"], answer["token"])))

    def push(self, workers: int, warmup: float, seconds: float, at_border: Callable[[], None]) -> tuple[Taken, float]:
        """Has so many workers push; what those did whose pushes ended in the window, and how long it was, in seconds.

        warmup: seconds that do not count; it is longer where there are fewer answers than workers by then, so that the
            kernel's buffers of each connection have been in use. seconds: of the window; it is longer where each worker
            would not be answered twice in it. at_border: called as the window begins and as it ends.
        """
        self.join(workers)
        busy = self._workers[:workers]
        try:
            for worker in busy:
                for (url, target), body in zip(self._owners, self._bodies, strict=True):
                    worker.connections.append(_Connection(url, target, self._credit, body))
            return self._pushed(busy, warmup, seconds, at_border)
        finally:
            self._disconnect()

    def _pushed(
        self, busy: Sequence[_Worker], warmup: float, seconds: float, at_border: Callable[[], None]
    ) -> tuple[Taken, float]:
        taken, window_began, answers = Taken(), inf, 0
        began = time.perf_counter()
        # Who had nothing to do while others pushed would otherwise begin with a gradient of long ago.
        newest = max(worker.step for worker in self._workers)
        for worker in busy:
            worker.step = newest
            self._start(worker)
        length = 0.0
        left = len(busy)
        while left:
            for key, events in self._selector.select():
                worker, connection = key.data
                if events & selectors.EVENT_WRITE and connection.send():
                    self._selector.modify(connection.socket, selectors.EVENT_READ, key.data)
                if not events & selectors.EVENT_READ or not connection.receive():
                    continue
                self._selector.unregister(connection.socket)
                worker.unanswered.discard(connection)
                if worker.unanswered:
                    continue
                now, answers = time.perf_counter(), answers + 1
                self._take(worker, taken if window_began < now and not length else None, now)
                if window_began == inf:
                    if now - began >= warmup and answers >= len(busy):
                        window_began = now
                        at_border()
                elif not length and now - window_began >= seconds and len(taken.seconds) >= _LEAST_EACH * len(busy):
                    length = now - window_began
                    at_border()
                if length:
                    left -= 1
                else:
                    self._start(worker)
        return taken, length

    def _start(self, worker: _Worker) -> None:
        headers = Claim(*worker.lease, worker.step).headers()
        worker.began = time.perf_counter()
        worker.unanswered = set(worker.connections)
        for connection in worker.connections:
            connection.start(headers)
            events = selectors.EVENT_READ if connection.send() else selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.register(connection.socket, events, (worker, connection))

    @staticmethod
    def _take(worker: _Worker, taken: Taken | None, now: float) -> None:
        for connection in worker.connections:
            if b" 200 " not in connection.head.partition(b"\r\n")[0]:
                raise RuntimeError(f"a push was refused: {connection.head.decode(errors='replace')}")
        first = worker.connections[0]
        worker.step = int(first.header("freestep-step") or worker.step)
        if taken is not None:
            taken.seconds.append(now - worker.began)
            if staleness := first.header("freestep-staleness"):
                taken.staleness.append(int(staleness))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._service.close()

    def _disconnect(self) -> None:
        for worker in self._workers:
            for connection in worker.connections:
                connection.socket.close()
            worker.connections.clear()


def _lines(headers: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())
