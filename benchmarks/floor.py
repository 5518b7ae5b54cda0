"""The floor: what moving the bytes costs with nothing else in the way.

A raw TCP connection over loopback to another process, with buffers made beforehand on both sides, carries the
gradient there and the parameters back; one pass over g, y, z and v at the memory's copy bandwidth is the update.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.services import cpu_seconds

__all__ = ["CopyPass", "Cost", "Echo", "copy_pass", "raw_echo"]

BYTES_PER_PARAMETER = 28
"""g, y, z and v read, y, z and v written, in fp32."""


@dataclass(frozen=True)
class Cost:
    """Seconds that something took, and of CPU that it took the side of the server."""

    seconds: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu + other.cpu)


def _serve(listener: socket.socket, size: int) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(size))
    while _receive(connection, buffer):
        connection.sendall(buffer)


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    while buffer:
        received = connection.recv_into(buffer)
        if not received:
            return False
        buffer = buffer[received:]
    return True


@dataclass(frozen=True)
class Echo:
    """A connection to a process that sends back all that it has received."""

    connection: socket.socket
    pid: int

    def once(self, outgoing: memoryview, incoming: memoryview) -> Cost:
        """One exchange."""
        cpu, began = cpu_seconds(self.pid), time.perf_counter()
        self.connection.sendall(outgoing)
        _receive(self.connection, incoming)
        return Cost(time.perf_counter() - began, cpu_seconds(self.pid) - cpu)


@contextmanager
def raw_echo(size: int) -> Iterator[Echo]:
    """A connection whose other end sends back every `size` bytes that it has received."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener, size), daemon=True)
        process.start()
        assert process.pid is not None
        with socket.create_connection(listener.getsockname()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Echo(connection, process.pid)
        process.join()


class CopyPass:
    """One 28-byte-per-parameter pass over memory at the bandwidth of a large copy, which is what is made."""

    def __init__(self, numel: int) -> None:
        self._source, self._target = torch.ones(numel), torch.zeros(numel)

    def once(self) -> Cost:
        cpu, began = time.thread_time(), time.perf_counter()
        self._target.copy_(self._source)
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
        scale = BYTES_PER_PARAMETER / (2 * self._source.itemsize)
        return Cost(seconds * scale, cpu * scale)


def copy_pass(numel: int, rounds: int = 7) -> float:
    """Seconds for such a pass: the median of several."""
    memory = CopyPass(numel)
    return median(memory.once().seconds for _ in range(rounds))
