"""A worker that works until it is ended, in a process of its own; test_leaving.py sends it signals.

python tests/client/leaving_worker.py URL RUN FORM

FORM is a function below. It says a line when it has begun, and what is left of it says more as it ends. Its lease lasts
for an hour unless it is released.

Without arguments it forks workers, since importing torch takes each seconds of CPU: see `ordered`. They end as any
script does, with all that Python does then.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

told = ""
"""Which process is sent SIGTERM while it forks, or is forked: `parent` or `child`."""


def tell(process: str) -> None:
    if process == told:
        os.kill(os.getpid(), signal.SIGTERM)


# In a child, hooks run in the order in which they were registered: this one before freestep's.
os.register_at_fork(before=partial(tell, "parent"), after_in_child=partial(tell, "child"))

import freestep  # noqa: E402

torch.set_num_threads(1)
LENGTH = 4000


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def await_signal() -> None:
    """Returns only by what a handler raises. `signal.pause` would miss a signal that comes just before it."""
    while True:
        time.sleep(0.01)


def options(**others: Any) -> dict[str, Any]:
    # No attempt at a request ends by itself while a test lasts.
    client = freestep.Client(url, timeout=600, retry_for=600)
    return {"client": client, "run": name, "lease_ttl_ms": 3_600_000, "shards": 2, "aggregation": "async", **others}


def optimizer(**others: Any) -> freestep.RemoteOptimizer:
    return freestep.RemoteOptimizer(model, algorithm="sgd", lr=1.0, **options(**others))


def step(opt: Any, **how: Any) -> None:
    opt.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    opt.step(**how)


def work(opt: Any, **how: Any) -> None:
    """Takes steps without end; says one line after the second, and at the end of which step it has been told."""
    try:
        step(opt, **how)
        step(opt, **how)
        say("begun")
        while True:
            step(opt, **how)
    finally:
        say(opt.loaded.step)


def block() -> None:
    with optimizer() as opt:
        work(opt)


def client_block() -> None:
    chosen = options()
    with chosen["client"]:
        work(freestep.RemoteOptimizer(model, algorithm="sgd", lr=1.0, **chosen))


def loose() -> None:
    work(optimizer())


def closed() -> None:
    with closing(optimizer()) as opt:
        work(opt, overlap=True)


def dropped_in() -> None:
    work(freestep.AdamWScheduleFree(model, lr=0.01, **options()))


def closure_form() -> None:
    opt = freestep.AdamWScheduleFreeClosure(model, lr=0.01, **options())

    def closure() -> Any:
        opt.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    opt.step(closure)
    say("begun")
    while True:
        opt.step(closure)


def local_steps(**others: Any) -> freestep.LocalSteps:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return freestep.LocalSteps(model, inner, every=10**9, **options(**others))


def rounds() -> None:
    work(local_steps())


def pushed_round(**others: Any) -> None:
    opt = local_steps(**others)
    try:
        work(opt)
    finally:
        opt.push()
        say(opt.receipt.decision if opt.receipt else None)


def gathered_round() -> None:
    pushed_round(aggregation="sync")


def units() -> None:
    opt = optimizer()
    for number, _ in enumerate(freestep.Units(opt, LENGTH, unit=1, passes=None)):
        step(opt)
        if number == 20:
            say("begun")


def loader() -> None:
    opt = optimizer()
    batches = freestep.Units(opt, LENGTH, unit=4, passes=None).loader(range(LENGTH), batch_size=4, num_workers=2)
    for number, _ in enumerate(batches):
        step(opt)
        if number == 20:
            say("begun")


def pull() -> None:
    opt = optimizer()
    step(opt)
    say("begun")
    opt._run.pull("y", min_step=10**6, wait=600)


def lease() -> None:
    optimizer().close()
    freestep.leave_on_sigterm()
    freestep.Client(url).run(name).lease("by hand", ttl_ms=3_600_000)
    say("begun")
    await_signal()


def slow_end() -> None:
    with optimizer():
        try:
            say("begun")
            await_signal()
        finally:
            say("leaving")
            sys.stdin.readline()
            say("finished")


def swallowed() -> None:
    class Kept:
        def __del__(self) -> None:
            say("begun")
            await_signal()

    with optimizer() as opt:
        kept = Kept()
        del kept
        say("goes on")
        step(opt)
        say("has gone on")


def handled() -> None:
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    with optimizer() as opt:
        say("begun")
        while not ended.wait(0.01):
            step(opt)
        say(signal.getsignal(signal.SIGTERM) is end)


def forked() -> None:
    opt = optimizer()
    child = os.fork()
    if not child:
        signal.pause()
    say(child)
    say(outcome(child))
    work(opt)


def outcome(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def told_child() -> None:
    global told
    freestep.leave_on_sigterm()
    told = "child"

    def fork() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        say(outcome(child))

    fork()
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()


def told_parent() -> None:
    optimizer()
    lone_told_parent()


def lone_told_parent() -> None:
    global told
    client = freestep.Client(url)
    freestep.leave_on_sigterm()
    told = "parent"
    if not os.fork():
        os._exit(0)
    while True:
        client.runs()


def masks() -> None:
    """Says of each fork whether the parent's mask is as before, and whether the child's is, and its action."""

    def own(*_: object) -> None:
        raise AssertionError

    freestep.leave_on_sigterm()
    for action in (signal.SIG_DFL, own):
        for mask in (set(), {signal.SIGTERM}, {signal.SIGUSR1}):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            child = os.fork()
            is_kept = signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
            if not child:
                os._exit(is_kept and signal.getsignal(signal.SIGTERM) is action)
            say(is_kept and outcome(child) == 1)
        signal.signal(signal.SIGTERM, own)


def ranks() -> None:
    dist.init_process_group("gloo")
    with optimizer(process_group=True) as opt:
        step(opt)
        step(opt)
        if dist.get_rank() == 0:
            say("begun")
        while True:
            step(opt)


forms: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        block, client_block, loose, closed, dropped_in, closure_form, rounds, pushed_round, gathered_round, units,
        loader, pull, lease, slow_end, swallowed, handled, forked, told_child, told_parent, lone_told_parent, masks,
        ranks,
    )
}  # fmt: skip
model = nn.Linear(4, 3)


def ordered() -> list[str]:
    """Forks workers as they are ordered through the socket that is stdin, until that is closed. Returns in a worker:
    its arguments.

    An order is JSON, a program to be instead (a list; empty for none) and the arguments, with descriptors of the
    worker's stdin, stdout and stderr, and of a pipe that is told its pid and in the end its exit code, 4 bytes each.
    """
    # Public names are imported when they are used, and torch's compiler with the first optimizer.
    for public in freestep.__all__:
        getattr(freestep, public)
    torch.optim.SGD(model.parameters(), lr=1.0)
    # Of what all have in common, no worker looks for garbage as it ends.
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not forked"
    # The kernel reaps those who wait for workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    orders = socket.socket(fileno=os.dup(0))
    while True:
        order, descriptors, *_ = socket.recv_fds(orders, 1 << 16, 4)
        if not order:
            os._exit(0)
        if not os.fork():
            break
        for each in descriptors:
            os.close(each)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told_of = descriptors
    worker = os.fork()
    if worker:
        for each in streams:
            os.close(each)
        os.write(told_of, worker.to_bytes(4))
        os.write(told_of, outcome(worker).to_bytes(4, signed=True))
        os._exit(0)
    os.setsid()
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    os.close(told_of)
    orders.close()
    program, arguments = json.loads(order)
    if program:
        os.execvp(program[0], [*program, __file__, *arguments])
    return list(arguments)


if __name__ == "__main__":
    url, name, form = sys.argv[1:] or ordered()
    multiprocessing.set_start_method("fork")
    forms[form]()
