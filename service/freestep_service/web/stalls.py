"""Peers that take nothing of what is sent to them: their connections end, whatever is being answered."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Callable

__all__ = ["Stall"]

_ACKNOWLEDGED = struct.Struct("=120xQ")
"""Of Linux's tcp_info: tcpi_bytes_acked, the bytes that the peer's system has taken."""
_UNTAKEN = struct.calcsize("i")
"""Bytes of the number of bytes that a socket has sent and its peer's system has not taken."""


class Stall:
    """Calls `end` with the seconds that were allowed if a peer takes nothing for so long while writing is paused.

    seconds: how long a peer may take nothing. It is looked at that often, so a peer has less than twice as long.

    A transport's buffer does not tell by itself: below it are the system's, of megabytes, and that of TLS, of which a
    slow peer takes for minutes before the next write.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float, end: Callable[[float], None]) -> None:
        self.seconds = seconds
        self._transport = transport
        self._end = end
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Writing is paused, or the connection is closing with more to be sent; may be called again."""
        if self._timer is None:
            self._begin(loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self.seconds, self._look, loop, self.seconds, self._left())

    def forget(self) -> None:
        """Writing goes on, or the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop, seconds: float, left: tuple[int, int]) -> None:
        if self._left() == left:
            self._end(seconds)
        else:
            self._begin(loop)

    def is_owed(self) -> bool:
        """Whether the peer's system has not taken all that was written yet."""
        if self._transport.get_write_buffer_size():
            return True
        # TLS counts what it has not encrypted yet.
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        try:
            return connection is not None and any(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(_UNTAKEN)))
        except (OSError, ValueError):
            # The connection has just ended.
            return False

    def _left(self) -> tuple[int, int]:
        """What changes whenever the peer takes something: the bytes that are buffered, and those it has taken."""
        taken = 0
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        if connection is not None and sys.platform == "linux":
            try:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
                (taken,) = _ACKNOWLEDGED.unpack(info)
            except (OSError, struct.error):
                # The connection has just ended, or the system is older than the field.
                pass
        return self._transport.get_write_buffer_size(), taken
