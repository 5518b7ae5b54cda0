"""A peer's server as a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Server", "free_port"]

_READY_S = 60.0


class Server:
    """A process that runs `serve(connection, *arguments)`, which says through the connection where it is reached."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, theirs, *arguments))
        self._process.start()
        theirs.close()

    def said(self) -> Any:
        """What it says next."""
        if not self.connection.poll(_READY_S):
            raise TimeoutError("the server says nothing")
        return self.connection.recv()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _run(serve: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    threading.Thread(target=_end_with_worker, args=(connection,), daemon=True).start()
    serve(connection, *arguments)


def _end_with_worker(connection: Connection) -> None:
    """Nothing is ever sent to a server, so what it reads is the end of the worker's process."""
    connection.poll(None)
    os._exit(1)


def free_port() -> int:
    """A port for those who do not say which one they took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
