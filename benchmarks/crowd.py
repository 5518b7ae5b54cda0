"""Pushes beside a crowd of connections that mean no good: idle ones, and ones that send garbage.

One worker pushes in windows that alternate between no other connections and the whole crowd, which is made anew for
each window by a process of its own: it connects again whenever the service has ended a connection.
"""

from __future__ import annotations

import multiprocessing
import random
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS = 1_000_000
IDLE, NOISY, SENT_EVERY_S = 200, 200, 0.5
WINDOWS, SECONDS = 7, 3.0
QUICK_WINDOWS, QUICK_SECONDS = 3, 1.0
MOST, MOST_MIB = 2.0, 64


class _Crowd:
    """A process that keeps up its connections to a service while it is told to."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_gather, args=(theirs, url), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        self._connection.send("go")
        self._connection.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.send("stop")
        self.made: int = self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _gather(connection: Connection, url: str) -> None:
    server = urlsplit(url)
    source = random.Random(0)
    with suppress(EOFError):
        while connection.recv():
            made = _stay((server.hostname or "", server.port or 0), source, connection)
            connection.recv()
            connection.send(made)


def _stay(address: tuple[str, int], source: random.Random, connection: Connection) -> int:
    """Keeps up the crowd until there is a message; the number of connections that were made."""
    made = 0
    with selectors.DefaultSelector() as selector:

        def join(is_noisy: bool) -> None:
            nonlocal made
            peer = socket.create_connection(address)
            peer.setblocking(False)
            if is_noisy:
                with suppress(OSError):
                    peer.send(garbage(source))
            selector.register(peer, selectors.EVENT_READ, is_noisy)
            made += 1

        for number in range(IDLE + NOISY):
            join(number >= IDLE)
        connection.send("there")
        while not connection.poll():
            for key, _ in selector.select(timeout=SENT_EVERY_S / 10):
                if _has_ended(key.fileobj.recv):  # type: ignore[union-attr]
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                    # Not at once: a loop of connections alone would measure how fast they are made.
                    connection.poll(SENT_EVERY_S / NOISY)
                    join(key.data)
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return made


def _has_ended(receive: Callable[[int], bytes]) -> bool:
    try:
        return not receive(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


def garbage(source: random.Random) -> bytes:
    """What may be sent by mistake, or for harm."""
    return source.choice(
        [
            source.randbytes(source.randrange(1, 5000)),
            b"\x16\x03\x01\x02\x00" + source.randbytes(500),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60_000,
            b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz",
            b"PUT /v1/runs/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n{",
            b"POST /v1/runs/x/gradients HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n\r\n",
        ]
    )


def _resident_mib(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line)
    return int(line.split()[1]) / 1024


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    alone_ms, ratios, grown, made = [], [], [], []
    with running_service() as service, Client(service.url) as client:
        crowd = _Crowd(service.url)
        with Worker(new_run(client, "crowded", PARAMETERS)) as worker:
            worker.window(1.0)
            with crowd:
                worker.window(1.0)
            before = _resident_mib(service.pid)
            for _ in range(windows):
                without = worker.window(seconds)
                with crowd:
                    ratios.append(worker.window(seconds) / without)
                    grown.append(_resident_mib(service.pid) - before)
                alone_ms.append(1e3 * without)
                made.append(crowd.made)
        crowd.close()
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, p50 without other connections", alone_ms, "ms"),
            Figure.of(f"{name}, p50 beside {IDLE} idle ones and {NOISY} with garbage, of that", ratios, "×", most=MOST),
            Figure.of("the service's memory meanwhile, more than after the first crowd", grown, "MiB", most=MOST_MIB),
        ],
        [f"{median(made):.0f} connections were made in a window of {seconds:g} s"],
    )
