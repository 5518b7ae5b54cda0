"""Proxies that cut connections, or delay responses."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from freestep import Client
from meanwhile import end, wait_for


class Cutter:
    """A TCP proxy that cuts the first connections after given numbers of response bytes."""

    def __init__(self, url: str, cuts: list[int]) -> None:
        self._target = httpx.URL(url)
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((self._target.host, self._target.port))
            self._sockets += [near, far]
            limit = self._cuts.pop(0) if self._cuts else None
            for source, sink, most in ((near, far, None), (far, near, limit)):
                thread = threading.Thread(target=self._pass_on, args=(source, sink, most))
                thread.start()
                self._threads.append(thread)

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, most: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                if most is not None and passed + len(data) > most:
                    sink.sendall(data[: most - passed])
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for connection in (source, sink):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def client(self) -> Client:
        """A client through the proxy, with a connection for each request and no retries."""
        return Client(http=httpx.Client(base_url=self.url, headers={"Connection": "close"}), retry_for=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._accepting, *self._threads):
            end(thread)
        for each in self._sockets:
            each.close()


class Delay:
    """A proxy in front of a store on a Unix socket that holds back or loses the responses to chosen commands."""

    def __init__(self, target: Path, path: Path) -> None:
        self._target = str(target)
        self._held: list[tuple[bytes, threading.Event, threading.Event | None]] = []
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def hold(self, word: bytes) -> tuple[threading.Event, threading.Event]:
        """Holds back the response to the next command that contains a word; no script's source may contain it.

        Returns two events: the store has responded, which the proxy sets; and release, which the test sets.
        """
        answered, released = threading.Event(), threading.Event()
        self._held.append((word, answered, released))
        return answered, released

    def lose(self, word: bytes) -> threading.Event:
        """Ends the connection on which the response to the next command that contains a word comes, instead of it.

        Returns an event: the store has responded.
        """
        answered = threading.Event()
        self._held.append((word, answered, None))
        return answered

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            self._pairs.append((near, far))
            waiting: list[tuple[bytes, threading.Event, threading.Event | None]] = []
            for work in (self._ask, self._answer):
                self._threads.append(threading.Thread(target=work, args=(near, far, waiting)))
                self._threads[-1].start()

    def _ask(self, near: socket.socket, far: socket.socket, waiting: list[Any]) -> None:
        while data := near.recv(1 << 20):
            for held in [held for held in self._held if held[0] in data]:
                self._held.remove(held)
                waiting.append(held)
            far.sendall(data)
        far.shutdown(socket.SHUT_WR)

    @staticmethod
    def _answer(near: socket.socket, far: socket.socket, waiting: list[Any]) -> None:
        while data := far.recv(1 << 20):
            while waiting:
                _, answered, released = waiting.pop()
                answered.set()
                if released is None:
                    near.shutdown(socket.SHUT_RDWR)
                    return
                wait_for(released, "the test lets the answer go on")
            near.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            end(thread)
        for near, far in self._pairs:
            near.close()
            far.close()
