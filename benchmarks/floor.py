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
from statistics import median

import torch

__all__ = ["copy_pass", "raw_echo"]

BYTES_PER_PARAMETER = 28
"""g, y, z and v read, y, z and v written, in fp32."""


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


@contextmanager
def raw_echo(size: int) -> Iterator[socket.socket]:
    """A connection whose other end sends back every `size` bytes that it has received."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener, size), daemon=True)
        process.start()
        with socket.create_connection(listener.getsockname()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection
        process.join()


def echo_once(connection: socket.socket, outgoing: memoryview, incoming: memoryview) -> float:
    """Seconds for one exchange."""
    began = time.perf_counter()
    connection.sendall(outgoing)
    _receive(connection, incoming)
    return time.perf_counter() - began


def copy_pass(numel: int, rounds: int = 7) -> float:
    """Seconds for one 28-byte-per-parameter pass over memory at the bandwidth of a large copy."""
    source, target = torch.ones(numel), torch.empty(numel)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return median(seconds) * BYTES_PER_PARAMETER / (2 * source.itemsize)
