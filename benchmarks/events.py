"""What readers of a run's events cost its pushes: two runs of one service, of which one is read by 20.

Windows of pushes to one and to the other take turns. The readers are one process, which reads and throws away: what
their own work takes of the machine is in the figures too.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import httpx

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client
from freestep.credentials import credentials

PARAMETERS = 100_000
READERS = 20
WINDOWS, SECONDS = 21, 2.0
QUICK_WINDOWS, QUICK_SECONDS = 5, 0.5
MOST = 1.05


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    alone_ms, ratios, cpu_ratios, sent = [], [], [], []
    with ExitStack() as stack:
        service = stack.enter_context(running_service())
        client = stack.enter_context(Client(service.url))
        names = ("unread", "read")
        workers = {name: stack.enter_context(Worker(new_run(client, name, PARAMETERS))) for name in names}
        readers = stack.enter_context(_readers(service.url, "read"))
        for name in names:
            _mean(workers[name], 1.0)
        for number in range(windows):
            # Turn about, so that neither is always first.
            took, cpu = {}, {}
            for name in names if number % 2 else reversed(names):
                before, bytes_before = service.cpu_seconds(), _bytes_read(readers)
                took[name], pushes = _mean(workers[name], seconds)
                cpu[name] = (service.cpu_seconds() - before) / pushes
                if name == "read":
                    sent.append((_bytes_read(readers) - bytes_before) / READERS / seconds / 1e3)
            alone_ms.append(1e3 * took["unread"])
            ratios.append(took["read"] / took["unread"])
            cpu_ratios.append(cpu["read"] / cpu["unread"])
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, mean, nobody reads", alone_ms, "ms"),
            Figure.of(f"{name}, mean, {READERS} read its run's events, of that", ratios, "×", most=MOST),
            Figure.of("CPU of the service for a push, likewise", cpu_ratios, "×"),
            Figure.of("what each reader is sent", sent, "kB/s"),
        ]
    )


def _mean(worker: Worker, seconds: float) -> tuple[float, int]:
    """The mean seconds of a push over a window, and how many there were."""
    begun, pushes = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds:
        worker.push()
        pushes += 1
    return took / pushes, pushes


@contextmanager
def _readers(url: str, run: str) -> Iterator[Connection]:
    """Readers of a run's events, in a process of their own, which has heard of some."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(theirs, url, run), daemon=True)
    process.start()
    try:
        while _bytes_read(ours) == 0:
            time.sleep(0.1)
        yield ours
    finally:
        ours.send("end")
        process.join()


def _bytes_read(readers: Connection) -> int:
    readers.send("count")
    return int(readers.recv())


def _read(asked: Connection, url: str, run: str) -> None:
    """Reads until it is told to end, and says when asked how many bytes came."""
    server = urlsplit(url)
    headers = {"Host": server.netloc, **credentials(None, httpx.URL(url)).headers()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET /v1/runs/{run}/events HTTP/1.1\r\n{lines}\r\n".encode()
    count = 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        selector.register(asked, selectors.EVENT_READ)
        for _ in range(READERS):
            reader = stack.enter_context(socket.create_connection((server.hostname or "", server.port or 80)))
            reader.sendall(request)
            selector.register(reader, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if isinstance(key.fileobj, socket.socket):
                    received = len(key.fileobj.recv(1 << 16))
                    if not received:
                        raise RuntimeError("the service has ended a stream")
                    count += received
                elif asked.recv() == "end":
                    return
                else:
                    asked.send(count)
