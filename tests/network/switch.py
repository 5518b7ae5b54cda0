"""A switch whose cables are long, lossy and narrow, for kernels without netem: it passes on every frame, late or never.

switch.py DELAY LOSS RATE PLAIN NAME... joins the interfaces PLAIN and NAME... of its network namespace. What comes from
PLAIN is passed on at once; all else DELAY seconds later, at RATE bits per second, and a share LOSS of it not at all.
"""

from __future__ import annotations

import heapq
import itertools
import random
import selectors
import socket
import sys
import time

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 3
_OFFLOAD_SIZE = 10
"""A virtio_net_hdr before each frame says what is left to do to it: its checksum, and to cut it into segments."""
_LONGEST = 1 << 17
_BUFFER = 1 << 23


class Port:
    """The switch's end of a cable."""

    def __init__(self, name: str, delay: float, loss: float, rate: float) -> None:
        self._delay, self._loss, self._rate = delay, loss, rate
        self._free_at = 0.0
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.socket.setblocking(False)
        self.socket.bind((name, _ETH_P_ALL))

    def frame(self) -> bytes | None:
        """The next frame that has come, None if there is none."""
        while True:
            try:
                return self.socket.recv(_LONGEST)
            except BlockingIOError:
                return None
            except OSError:
                # The interface is down, which is said once.
                continue

    def due(self, size: int) -> float | None:
        """When a frame from here that comes now is to be passed on, None if it is lost."""
        if random.random() < self._loss:
            return None
        self._free_at = max(self._free_at, time.monotonic()) + 8 * size / self._rate
        return self._free_at + self._delay

    def send(self, frame: bytes) -> None:
        try:
            self.socket.send(frame)
        except OSError:
            # The interface is down, or its queue is full: then a frame is lost.
            pass


def main() -> None:
    delay, loss, rate = map(float, sys.argv[1:4])
    plain, *names = sys.argv[4:]
    ports = [Port(plain, 0.0, 0.0, float("inf")), *(Port(name, delay, loss, rate) for name in names)]
    homes: dict[bytes, Port] = {}
    late: list[tuple[float, int, Port, bytes]] = []
    numbers = itertools.count()
    selector = selectors.DefaultSelector()
    for port in ports:
        selector.register(port.socket, selectors.EVENT_READ, port)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    while True:
        for key, _ in selector.select(late[0][0] - time.monotonic() if late else None):
            source: Port = key.data
            while (frame := source.frame()) is not None:
                head = frame[_OFFLOAD_SIZE : _OFFLOAD_SIZE + 12]
                homes[head[6:]] = source
                due = source.due(len(frame) - _OFFLOAD_SIZE)
                home = homes.get(head[:6])
                if due is not None:
                    for sink in [home] if home is not None else ports:
                        if sink is not source:
                            heapq.heappush(late, (due, next(numbers), sink, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, sink, frame = heapq.heappop(late)
            sink.send(frame)


main()
