"""The cluster's DNS: names of Services, and of pods behind headless ones, lead to the addresses of pods.

It answers from what the cluster is at that moment, on UDP, with a time to live of 0; every other name does not exist.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence

__all__ = ["NameServer"]

_IP_FREEBIND = 15
_LOOK_S = 0.2
"""How soon the thread sees that it is to end."""
_A, _IN = 1, 1
_NO_NAME = 3
_ANSWER = 0x8580
"""A response, authoritative, recursion available."""
_QUESTION_AT = 12

Resolve = Callable[[str], Sequence[str] | None]
"""The addresses behind a name; None if there is no such name."""


class NameServer:
    """A thread that answers at port 53 of an address, which may appear later; ends with `close`."""

    def __init__(self, address: str, resolve: Resolve) -> None:
        self._resolve = resolve
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        self._socket.bind((address, 53))
        self._socket.settimeout(_LOOK_S)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="dns", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closing:
            try:
                query, peer = self._socket.recvfrom(512)
                if len(query) > _QUESTION_AT:
                    self._socket.sendto(self._answer(query), peer)
            except (OSError, IndexError):
                # Nobody has asked for a while, or what came is no question.
                continue

    def _answer(self, query: bytes) -> bytes:
        end = _QUESTION_AT
        labels = []
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode("ascii", "replace").lower())
            end += 1 + length
        question = query[_QUESTION_AT : end + 5]
        kind, _ = struct.unpack("!HH", question[-4:])
        addresses = self._resolve(".".join(labels))
        found = list(addresses or []) if kind == _A else []
        flags = _ANSWER | (_NO_NAME if addresses is None else 0)
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(found), 0, 0)
        records = [struct.pack("!HHHIH", 0xC000 | _QUESTION_AT, _A, _IN, 0, 4) + socket.inet_aton(a) for a in found]
        return head + question + b"".join(records)
