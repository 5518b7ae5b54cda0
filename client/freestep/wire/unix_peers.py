"""Who is at the other end of a Unix socket, as the kernel names it: unix(7)."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["is_of_this_user"]

_CREDENTIALS = struct.Struct("iII")
"""A process, its user and its group."""
_STRANGER = Path("/proc/sys/kernel/overflowuid")


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is of this process's user.

    Nobody is where this process is of the user (`nobody`, as a rule) by whose ID the kernel names those of other user
    namespaces: it might be any of them.
    """
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(found)[1]
    return user == os.geteuid() != _stranger()


@cache
def _stranger() -> int:
    """The ID by which the kernel names users that it cannot name: user_namespaces(7)."""
    with suppress(OSError):
        return int(_STRANGER.read_text())
    return 65534
