"""Many workers of one run, as threads of a few processes, which push as fast as they can while a window is open."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType
from typing import Self

import torch

from benchmarks.worker import Worker
from freestep import Client

__all__ = ["Crew", "Window"]


@dataclass(frozen=True)
class Window:
    """Until the last worker had its answer, and the seconds that each push took."""

    seconds: float
    pushes: list[float]

    @property
    def rate(self) -> float:
        """Pushes of all workers, by the second."""
        return len(self.pushes) / self.seconds


class Crew:
    """Worker processes of a run, over which workers are spread evenly."""

    def __init__(self, url: str, run: str, processes: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, url, run, number), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def join(self, workers: int) -> None:
        """Has so many workers hold leases, if there are not as many yet."""
        self._ask([("join", share, 0.0) for share in self._shares(workers)])

    def push(self, workers: int, seconds: float) -> Window:
        """Opens a window for so many workers: each pushes once at least, and no more when the window is over."""
        self.join(workers)
        began = time.perf_counter()
        pushes = self._ask([("push", share, seconds) for share in self._shares(workers)])
        return Window(time.perf_counter() - began, [each for some in pushes for each in some])

    def _shares(self, workers: int) -> list[int]:
        processes = len(self._connections)
        return [len(range(number, workers, processes)) for number in range(processes)]

    def _ask(self, commands: Sequence[tuple[str, int, float]]) -> list[list[float]]:
        for connection, command in zip(self._connections, commands, strict=True):
            connection.send(command)
        return [connection.recv() for connection in self._connections]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _work(connection: Connection, url: str, run: str, number: int) -> None:
    """A process of the crew: does as it is told until the connection ends."""
    torch.set_num_threads(1)
    workers: list[Worker] = []
    with ExitStack() as stack:
        while True:
            try:
                command, share, seconds = connection.recv()
            except EOFError:
                return
            while len(workers) < share:
                client = stack.enter_context(Client(url))
                worker = Worker(client.run(run), f"worker-{number}-{len(workers)}")
                workers.append(stack.enter_context(worker))
            connection.send(_push(workers[:share], seconds) if command == "push" else [])


def _push(workers: Sequence[Worker], seconds: float) -> list[float]:
    pushes: list[float] = []
    ends = time.perf_counter() + seconds

    def push(worker: Worker) -> None:
        while True:
            pushes.append(worker.push())
            if time.perf_counter() > ends:
                return

    threads = [Thread(target=push, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return pushes
