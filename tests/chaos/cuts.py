"""Connections that are cut while they carry a push."""

from __future__ import annotations

import random
import socket

from raw_pushes import connected


def send_and_cut(url: str, head: bytes, body: bytes, chance: random.Random) -> None:
    """Sends a push over a connection that is cut: in the head, in the body, or before the answer is read."""
    message = head + body
    where = chance.choice([len(head) // 2, len(head), len(head) + len(body) // 2, len(message) - 1, len(message)])
    with connected(url) as connection:
        if chance.random() < 0.5:
            # A reset instead of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(message[:where])
