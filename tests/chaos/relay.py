"""A TCP relay whose connections can be cut, delayed, held and half closed, and that can lead elsewhere."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress

from meanwhile import end

__all__ = ["Relay"]


class Relay:
    """Passes on what comes to a port of its own to another port on this machine."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay_s = 0.0
        """Seconds for which every piece is held back."""
        self._open = threading.Event()
        self._open.set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket))
        self._loop.run_forever()
        server.close()
        self._cut()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            near.transport.abort()
            return
        pair = near, far
        self._pairs.add(pair)
        # A connection ends with the relay, too.
        with suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(near_reader, far), self._pump(far_reader, near))
        self._pairs.discard(pair)
        near.close()
        far.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Nothing can be written to what was half closed.
        with suppress(OSError, RuntimeError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                while not self._open.is_set():
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    def _cut(self) -> None:
        for pair in list(self._pairs):
            for writer in pair:
                writer.transport.abort()

    def cut(self) -> None:
        """Resets all connections."""
        self._loop.call_soon_threadsafe(self._cut)

    def half_close(self) -> None:
        """Ends what goes to the target, on all connections; what comes from it goes on."""

        def close() -> None:
            for _, far in list(self._pairs):
                with suppress(OSError, RuntimeError):
                    far.write_eof()

        self._loop.call_soon_threadsafe(close)

    def hold(self) -> None:
        """Passes on nothing until `free`."""
        self._open.clear()

    def free(self) -> None:
        self._open.set()
        self.delay_s = 0.0

    def close(self) -> None:
        self._open.set()
        self._loop.call_soon_threadsafe(self._loop.stop)
        end(self._thread)
