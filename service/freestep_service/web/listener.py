"""Accepts connections, as many as there are places for, and hands them to their protocols; over TLS after a handshake.

asyncio's own servers count no connection before its handshake is over, and stop accepting only when the process has
no descriptor left for anything.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from freestep.errors import Overloaded
from freestep_service.web.places import Place, Places
from freestep_service.web.problems import problem_response
from freestep_service.web.refusals import encoded

__all__ = ["Listener"]

logger = logging.getLogger("freestep")

_AT_ONCE = 64
"""Connections that are accepted before the event loop does something else."""
_PAUSE_S = 1.0
"""Seconds without accepting after the system had no descriptor or no memory for a connection."""
_SHUTDOWN_S = 86_400.0
"""Seconds that TLS gives a peer to take what was sent before its end. The protocol has a measure of its own."""


class Listener:
    """Accepts on a listening socket, on the running event loop, until it is closed.

    make: the protocol of a connection at a place. tls: speaks TLS with it. handshake_s: seconds for a handshake.
    """

    def __init__(
        self,
        listening: socket.socket,
        places: Places,
        make: Callable[[Place], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        self._socket = listening
        self._places = places
        self._make = make
        self._tls = tls
        self._handshake_s = handshake_s
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None
        listening.setblocking(False)
        self._loop.add_reader(listening.fileno(), self._accept)

    def close(self) -> None:
        """Accepts no more; handshakes under way end."""
        if self._resuming is not None:
            self._resuming.cancel()
        self._loop.remove_reader(self._socket.fileno())
        for task in self._beginning:
            task.cancel()

    async def wait_closed(self) -> None:
        """Returns when all handshakes have ended; connections go on."""
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                logger.warning("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._socket.fileno())
                self._resuming = self._loop.call_later(_PAUSE_S, self._resume)
                return
            place = self._places.take(address[0])
            if place is None:
                self._refuse(accepted)
                continue
            self._hand_over(accepted, place)

    def _hand_over(self, accepted: socket.socket, place: Place) -> None:
        is_begun = False

        async def begin() -> None:
            nonlocal is_begun
            is_begun = True
            # The transport closes the socket, whatever happens.
            await self._begin(accepted, place)

        def end(task: asyncio.Task[None]) -> None:
            self._beginning.discard(task)
            if not is_begun:
                accepted.close()
                place.leave()

        task = self._loop.create_task(begin())
        task.add_done_callback(end)
        self._beginning.add(task)
        place.end = task.cancel

    def _resume(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _refuse(self, accepted: socket.socket) -> None:
        with accepted:
            accepted.setblocking(False)
            if self._tls is None:
                detail = "the service has as many connections as it may, of this address or of all"
                with suppress(OSError):
                    accepted.send(encoded(problem_response(Overloaded(detail))))

    async def _begin(self, accepted: socket.socket, place: Place) -> None:
        accepted.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make(place),
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_s if self._tls else None,
                ssl_shutdown_timeout=_SHUTDOWN_S if self._tls else None,
            )
        except BaseException as error:
            place.leave()
            if not isinstance(error, OSError):
                raise
            logger.debug("a connection ended before it began: %s", error)
