"""Where processes are: all on this host, or each on a host of its own with a slow link to the others."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Protocol

__all__ = ["OneHost", "Place", "SlowLink", "Unavailable", "opened_place"]

_SERVICE = "service"
_ONE_WAY_MS = 25
"""A way there and back takes 50 ms."""


class Unavailable(Exception):
    """This machine lacks or forbids what a world needs."""


class Place(Protocol):
    """worker: its number; None is the service, or whatever else workers meet at."""

    environment: Mapping[str, str]

    def address(self, worker: int | None) -> str: ...

    def before(self, worker: int | None) -> list[str]:
        """The command that starts a process's command there."""

    def port(self, worker: int | None) -> int:
        """A free port there."""

    def watching(self) -> AbstractContextManager[None]:
        """Puts this thread where it reaches the service over a link that is not slow."""


class OneHost:
    environment: Mapping[str, str] = MappingProxyType({})

    def address(self, worker: int | None) -> str:
        return "127.0.0.1"

    def before(self, worker: int | None) -> list[str]:
        return []

    def port(self, worker: int | None) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return int(listener.getsockname()[1])

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()


class SlowLink:
    """Each worker, and what they meet at, is a network namespace, from which 100 Mbit/s go out, 25 ms late.

    Raises Unavailable.
    """

    environment: Mapping[str, str] = MappingProxyType({"GLOO_SOCKET_IFNAME": "eth0"})

    def __init__(self, workers: int) -> None:
        # Of the tests, which are beside the benchmarks in every checkout.
        from tests.network import hosts

        names = [*(f"worker-{number}" for number in range(workers)), _SERVICE]
        try:
            self.network = hosts.Network(names, loss=0.0, delay_ms=_ONE_WAY_MS)
        except hosts.Unavailable as reason:
            raise Unavailable(str(reason)) from None

    def address(self, worker: int | None) -> str:
        return self.network.addresses[self._name(worker)]

    def before(self, worker: int | None) -> list[str]:
        return ["nsenter", f"--net={self.network.namespace(self._name(worker))}"]

    def port(self, worker: int | None) -> int:
        # Nobody else is there.
        return 29500

    def watching(self) -> AbstractContextManager[None]:
        return self.network.inside("watcher")

    def _name(self, worker: int | None) -> str:
        return _SERVICE if worker is None else f"worker-{worker}"


@contextmanager
def opened_place(is_linked: bool, workers: int) -> Iterator[Place]:
    """Raises Unavailable."""
    if not is_linked:
        yield OneHost()
        return
    place = SlowLink(workers)
    try:
        yield place
    finally:
        place.network.close()
