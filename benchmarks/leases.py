"""Pushes beside a thousand leases that are being renewed.

One worker pushes in windows that alternate between a run that has no other leases, with no renewals going on, and a
run with all of them, each renewed every few seconds by a process of their own over one connection.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import cpu_seconds, running_service
from benchmarks.worker import Worker, new_run
from freestep import Client
from freestep.credentials import credentials

PARAMETERS = 1_000_000
LEASES, RENEWED_EVERY_S = 1000, 5.0
WINDOWS, SECONDS = 9, 3.0
QUICK_WINDOWS, QUICK_SECONDS = 3, 1.0
MOST = 1.10

_TTL_MS = 600_000
"""Longer than a window without renewals."""


class _Renewals:
    """A process that holds leases of a run and renews them, one after the other, while it is told to."""

    def __init__(self, url: str, run: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_hold, args=(theirs, url, run), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def __enter__(self) -> Self:
        self._connection.send("go")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.send("stop")
        self.count: int = self._connection.recv()

    def cpu_seconds(self) -> float:
        assert self._process.pid is not None
        return cpu_seconds(self._process.pid)

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _hold(connection: Connection, url: str, run: str) -> None:
    path, token = f"/v1/runs/{run}/leases", credentials(None, httpx.URL(url)).headers()
    with httpx.Client(base_url=url, headers=token) as client:
        wishes = [{"worker": f"worker-{number}", "ttl_ms": _TTL_MS} for number in range(LEASES)]
        granted = [client.post(path, json=wish).raise_for_status().json()["lease"] for wish in wishes]
    server = urlsplit(url)
    # Requests as bytes, since the renewals' own work is not what is measured, and takes the cores too.
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": server.netloc, **token}.items())
    requests = cycle([f"PUT {path}/{lease} HTTP/1.1\r\n{lines}\r\n".encode() for lease in granted])
    with socket.create_connection((server.hostname, server.port)) as service:
        service.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.send("held")
        with suppress(EOFError):
            while connection.recv():
                renewed, due = 0, time.monotonic()
                while not connection.poll(max(0.0, due - time.monotonic())):
                    _renew(service, next(requests))
                    renewed, due = renewed + 1, due + RENEWED_EVERY_S / LEASES
                connection.recv()
                connection.send(renewed)


def _renew(service: socket.socket, request: bytes) -> None:
    service.sendall(request)
    answer = b""
    # The body is one JSON object.
    while not answer.endswith(b"}"):
        received = service.recv(4096)
        if not received:
            raise ConnectionError("the service closed the connection")
        answer += received
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"a lease was not renewed: {answer.decode()}")


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    alone_ms, ratios, rates, shares = [], [], [], []
    with running_service() as service, Client(service.url) as client:
        quiet, crowded = (new_run(client, name, PARAMETERS) for name in ("quiet", "crowded"))
        renewals = _Renewals(service.url, crowded.name)
        with Worker(quiet) as alone, Worker(crowded) as beside:
            for worker in (alone, beside):
                worker.window(1.0)
            for _ in range(windows):
                without = alone.window(seconds)
                used = renewals.cpu_seconds()
                with renewals:
                    ratios.append(beside.window(seconds) / without)
                shares.append((renewals.cpu_seconds() - used) / seconds)
                alone_ms.append(1e3 * without)
                rates.append(renewals.count / seconds)
        renewals.close()
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, p50 without other leases", alone_ms, "ms"),
            Figure.of(f"{name}, p50 beside {LEASES:,} leases, of that", ratios, "×", most=MOST),
        ],
        [
            f"{median(rates):.0f} renewals a second were made of the {LEASES / RENEWED_EVERY_S:.0f} that are due, by a "
            f"process that used {median(shares):.0%} of a core for them"
        ],
    )
