"""Where a service leaves its admin token for clients of the same user on the same machine, which find it by its URL."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from pathlib import Path

__all__ = ["is_loopback", "token_place"]

_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


def token_place(host: str, port: int) -> Path:
    """The file for a service, in the user's configuration folder ($XDG_CONFIG_HOME, or ~/.config).

    The usual loopback addresses, and that of a service that listens on all of them, are called by the machine's name,
    since home directories may be shared by machines. At another one, such as 127.0.0.2, there may be another service.

    Args:
        host: The host of the service's URL, or the address that it listens on.
        port: Its port.

    Raises:
        RuntimeError: The user has no home.
    """
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    is_machine = host in _MACHINE or host.endswith(".localhost")
    name = socket.gethostname() if is_machine else host
    return Path(folder, "freestep", "tokens", f"{re.sub(r'[^a-z0-9.-]', '_', name.lower())}_{port}")


def is_loopback(host: str) -> bool:
    """Whether a host is the machine itself, whoever asks.

    Args:
        host: An address, without brackets, or a name.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
