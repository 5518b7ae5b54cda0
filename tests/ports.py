"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

__all__ = ["free_port"]

_PORTS = range(10_240, 32_768)
"""Below those that Linux gives to connections, one of which could take a port before the test's server does."""


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
