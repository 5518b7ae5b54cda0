"""Pushes beside a thousand leases that are being renewed.

One worker pushes in windows that alternate between a run that has no other leases, with no renewals going on, and a
run with all of them, each renewed every few seconds by a process of their own over one connection.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from http.client import HTTPConnection
from itertools import cycle
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

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

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _hold(connection: Connection, url: str, run: str) -> None:
    http = HTTPConnection(urlsplit(url).netloc)
    path = f"/v1/runs/{run}/leases"
    granted = [_asked(http, "POST", path, {"worker": f"w-{number}", "ttl_ms": _TTL_MS}) for number in range(LEASES)]
    paths = cycle(f"{path}/{lease['lease']}" for lease in granted)
    connection.send("held")
    try:
        while connection.recv():
            renewed, due = 0, time.monotonic()
            while not connection.poll(max(0.0, due - time.monotonic())):
                _asked(http, "PUT", next(paths))
                renewed, due = renewed + 1, due + RENEWED_EVERY_S / LEASES
            connection.recv()
            connection.send(renewed)
    except EOFError:
        return


def _asked(http: HTTPConnection, method: str, path: str, document: object = None) -> Any:
    body = None if document is None else json.dumps(document)
    http.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
    answer = http.getresponse()
    content = answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()}")
    return json.loads(content)


def _window(worker: Worker, seconds: float) -> float:
    """The p50 of a worker's pushes in a window."""
    ends, pushes = time.perf_counter() + seconds, [worker.push()]
    while time.perf_counter() < ends:
        pushes.append(worker.push())
    return median(pushes)


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    alone_ms, ratios, rates = [], [], []
    with running_service() as service, Client(service.url) as client:
        quiet, crowded = (new_run(client, name, PARAMETERS) for name in ("quiet", "crowded"))
        renewals = _Renewals(service.url, crowded.name)
        with Worker(quiet) as alone, Worker(crowded) as beside:
            for worker in (alone, beside):
                _window(worker, 1.0)
            for _ in range(windows):
                without = _window(alone, seconds)
                with renewals:
                    ratios.append(_window(beside, seconds) / without)
                alone_ms.append(1e3 * without)
                rates.append(renewals.count / seconds)
        renewals.close()
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, p50 without other leases", alone_ms, "ms"),
            Figure.of(f"{name}, p50 beside {LEASES:,} leases, of that", ratios, "×", most=MOST),
        ],
        [f"{median(rates):.0f} renewals a second were made of the {LEASES / RENEWED_EVERY_S:.0f} that are due"],
    )
