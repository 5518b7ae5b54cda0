"""What processes that wait for each other, as those of several shards do, get of the machine's cores.

A generator, a store and services hand on what a push is made of, and work for as long as one takes: each service claims
at the store; the store gives a few at once their turn when all services have claimed, and decides when all have
committed; each service answers; and the generator begins anew when all have. One that is ahead waits for the others,
and the kernel leaves some waiting for a core while another is free, so that together they get less than all cores even
where there is always more to do. None of the service's code is in it, and nothing is fitted. Run as a program it is one
of the processes: see `_work`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["working"]

_GENERATOR, _STORE, _FIRST_SERVICE = range(3)
_CLAIM, _TURN, _COMMIT, _DECISION, _ANSWER = range(5)
_WORK_S = (1.5e-4, 1e-4, 3e-4)
"""Of the generator for a push, and of store and services for each message: about as of the smallest model measured."""
_PUSHES, _TURNS = 16, 4
"""On their way; and of these, those that have their turn."""


@contextmanager
def working(services: int) -> Iterator[None]:
    """Has so many services, a store and a generator hand pushes on, from the moment that it has begun."""
    pipes = [os.pipe() for _ in range(_FIRST_SERVICE + services)]
    ends = [end for pipe in pipes for end in pipe]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, (incoming, _) in enumerate(pipes):
            command = [sys.executable, __file__, str(number), str(incoming), *(str(end) for _, end in pipes)]
            processes.append(subprocess.Popen(command, pass_fds=ends))
        for _, service in pipes[_FIRST_SERVICE:]:
            os.write(service, b"".join(bytes((push, _CLAIM)) for push in range(_PUSHES)))
        yield
    finally:
        for each in processes:
            each.kill()
            each.wait()
        for end in ends:
            os.close(end)


def _work(number: int, incoming: int, *outgoing: int) -> None:
    """One process, for ever. A message is two bytes: a push, and what of it."""
    services, parts = outgoing[_FIRST_SERVICE:], Counter[bytes]()
    queue, free = deque[int](), _TURNS

    def to_all(push: int, what: int) -> None:
        for service in services:
            os.write(service, bytes((push, what)))

    while message := os.read(incoming, 2):
        push, what = message
        if number >= _FIRST_SERVICE:
            _burn(_WORK_S[_FIRST_SERVICE])
            to, then = ((_STORE, _CLAIM), (_STORE, _COMMIT), (_GENERATOR, _ANSWER))[
                (_CLAIM, _TURN, _DECISION).index(what)
            ]
            os.write(outgoing[to], bytes((push, then)))
            continue
        if number == _STORE:
            _burn(_WORK_S[_STORE])
        parts[message] += 1
        if parts[message] < len(services):
            continue
        del parts[message]
        if what == _ANSWER:
            _burn(_WORK_S[_GENERATOR])
            to_all(push, _CLAIM)
        elif what == _CLAIM:
            queue.append(push)
        else:
            free += 1
            to_all(push, _DECISION)
        while number == _STORE and free and queue:
            free -= 1
            to_all(queue.popleft(), _TURN)


def _burn(seconds: float) -> None:
    done = time.thread_time() + seconds
    while time.thread_time() < done:
        pass


if __name__ == "__main__":
    _work(*map(int, sys.argv[1:]))
