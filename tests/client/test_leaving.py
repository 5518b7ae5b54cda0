"""Workers that are sent SIGTERM, each a process of its own: their leases and their units are free when they have ended.

Their leases last for an hour, and no request of theirs is given up while a test lasts, so nothing but the signal frees
them.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import torch

from freestep import InvalidSetting, LeaseExpired, Run, ShardUnavailable, StepNotReached, leave_on_sigterm
from freestep.api.models import Lease
from freestep.lease import HeldLease
from freestep.leaving import leave_if_asked
from freestep.transport import Transport
from harness import ProcessService, ThreadService
from meanwhile import DEADLINE_S, wait_until

WORKER = Path(__file__).with_name("leaving_worker.py")
LEFT = 128 + signal.SIGTERM
SPEC = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "sync"},
    "parameters": [{"name": "w", "shape": [4]}],
    "lease_ttl_ms": 3_600_000,
}


class Worker:
    """A worker's process, which has begun."""

    def __init__(self, orders: socket.socket, folder: Path, arguments: Sequence[str], program: Sequence[str]) -> None:
        self._errors = folder / "stderr"
        (stdin, self._stdin), (lines, stdout), (self._told, told) = os.pipe(), os.pipe(), os.pipe()
        self._lines = os.fdopen(lines)
        with self._errors.open("w") as errors:
            order = json.dumps([program, arguments]).encode()
            socket.send_fds(orders, [order], [stdin, stdout, errors.fileno(), told])
        for each in (stdin, stdout, told):
            os.close(each)
        self.pid = int.from_bytes(os.read(self._told, 4))
        self._code: int | None = None

    def line(self) -> str:
        return self._lines.readline().rstrip("\n")

    def write_line(self) -> None:
        os.write(self._stdin, b"\n")

    def send_signal(self) -> None:
        """SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def end(self) -> tuple[int, list[str], str]:
        """Sends SIGTERM and waits for the end: the exit code, the lines that were left, and what is on stderr."""
        self.send_signal()
        return self.ended()

    def ended(self) -> tuple[int, list[str], str]:
        if not select.select([self._told], [], [], DEADLINE_S)[0]:
            raise TimeoutError(f"the worker has not ended after {DEADLINE_S:g} s")
        self._code = int.from_bytes(os.read(self._told, 4), signed=True)
        return self._code, self._lines.read().splitlines(), self._errors.read_text()

    def close(self) -> None:
        if self._code is None:
            # What a worker has started is killed with it.
            os.killpg(self.pid, signal.SIGKILL)
            self.ended()
        self._lines.close()
        os.close(self._stdin)
        os.close(self._told)


Start = Callable[..., Worker]


@pytest.fixture(scope="module")
def orders() -> Iterator[socket.socket]:
    """The process that forks workers: the socket that it is told through."""
    # OpenBLAS would start threads when numpy is imported; a process with threads must not be forked.
    environment = {**os.environ, "FREESTEP_LEAVE_ON_SIGTERM": "1", "OPENBLAS_NUM_THREADS": "1"}
    ours, its = socket.socketpair()
    with ours, subprocess.Popen([sys.executable, WORKER], stdin=its, env=environment):
        its.close()
        yield ours
        # It ends when it is told no more.
        ours.shutdown(socket.SHUT_WR)


@pytest.fixture
def start(service: ThreadService, name: str, tmp_path: Path, orders: socket.socket) -> Iterator[Start]:
    """Starts a worker of a form, or a program with its script and arguments; it is killed with the test, if it has not
    ended."""
    made: list[Worker] = []

    def worker(form: str, *program: str, url: str = service.url, begins: bool = True) -> Worker:
        made.append(Worker(orders, tmp_path, [url, name, form], program))
        if begins:
            assert made[-1].line() == "begun", made[-1]._errors.read_text()
        return made[-1]

    yield worker
    for each in made:
        each.close()


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM has come to this process, and something has caught what it raised."""
    monkeypatch.setattr("freestep.leaving._is_leaving", True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["block", "client_block", "loose", "closed", "dropped_in"])
def test_the_lease_is_released_and_no_push_counts_twice(start: Start, run: Run, form: str) -> None:
    worker = start(form)
    assert len(run.workers()) == 1
    code, (told,), errors = worker.end()
    assert (code, errors) == (LEFT, "")
    assert run.workers() == []
    # One push may have been under way, and with overlap the one before it too.
    assert 0 <= run.status().step - int(told) <= (2 if form == "closed" else 1)


@pytest.mark.parametrize(
    ("failure", "is_leaving", "attempts"),
    [("refused", True, 2), ("away", True, 2), ("lost", True, 1), ("refused", False, 1)],
)
def test_a_lease_is_released_by_another_process_where_the_one_that_is_asked_leaves_too(
    monkeypatch: pytest.MonkeyPatch, failure: str, is_leaving: bool, attempts: int
) -> None:
    monkeypatch.setattr("freestep.leaving._is_leaving", is_leaving)
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) > 1:
            return httpx.Response(204)
        if failure == "refused":
            raise httpx.ConnectError("[Errno 111] Connection refused")
        problem = ShardUnavailable("the service is shutting down") if failure == "away" else LeaseExpired()
        return httpx.Response(503, json=problem.to_document(503))

    transport = Transport(httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer)), 60)
    lease = Lease(lease="l", token=1, worker="w", ttl_ms=3_600_000, epoch=1, step=0)
    HeldLease(transport, "/v1/runs/r/leases", lease).release()
    assert asked == ["DELETE"] * attempts


@pytest.mark.slow
@pytest.mark.parametrize("form", ["closure_form", "rounds", "pull", "lease"])
def test_the_lease_is_released_whatever_the_worker_does(start: Start, run: Run, form: str) -> None:
    worker = start(form)
    assert len(run.workers()) == 1
    code, _, errors = worker.end()
    assert (code, errors) == (LEFT, "")
    assert run.workers() == []


@pytest.mark.slow
def test_a_round_can_be_pushed_on_the_way_out(start: Start, run: Run) -> None:
    # The line before is that of the run's step.
    assert start("pushed_round").end() == (LEFT, ["0", "applied"], "")
    assert run.workers() == []
    assert run.status().step == 1


@pytest.mark.slow
def test_a_round_that_is_pushed_on_the_way_out_waits_for_no_other_worker(start: Start, run: Run) -> None:
    worker = start("gathered_round")
    with run.lease():
        assert worker.end() == (LEFT, ["0", "accumulated"], "")
        assert len(run.workers()) == 1


def test_the_service_holds_no_answer_for_longer_than_it_is_waited_for(run: Run, leaving: None) -> None:
    run.create(SPEC)
    run.initialize({"w": torch.zeros(4)})
    run.data().create({"length": 1, "unit": 1})
    with run.lease() as lease, run.lease() as other:
        with pytest.raises(StepNotReached):
            run.pull("y", min_step=1, wait=600)
        assert run.push({"w": torch.ones(4)}, lease.claim(0), wait=600).decision == "accumulated"
        assert run.data().claim(other.granted, 1).units
        assert not run.data().claim(lease.granted, 1, wait=600).units


@pytest.mark.slow
@pytest.mark.parametrize("form", ["units", "loader"])
def test_units_are_free_at_once(start: Start, run: Run, form: str) -> None:
    worker = start(form)
    wait_until(lambda: bool(run.data().status().holders))
    code, _, errors = worker.end()
    assert (code, errors) == (LEFT, "")
    assert run.workers() == []
    status = run.data().status()
    assert (status.out, status.holders) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loose", "closed", "units"])
def test_a_service_that_does_not_answer_holds_nobody_up(
    start_process: Callable[..., ProcessService], start: Start, form: str
) -> None:
    service = start_process()
    worker = start(form, url=service.url)
    service.send_signal(signal.SIGSTOP)
    code, _, errors = worker.end()
    assert (code, errors) == (LEFT, "")


@pytest.mark.slow
def test_a_second_signal_changes_nothing(start: Start, run: Run) -> None:
    worker = start("slow_end")
    worker.send_signal()
    assert worker.line() == "leaving"
    worker.send_signal()
    worker.write_line()
    assert worker.ended() == (LEFT, ["finished"], "")
    assert run.workers() == []


@pytest.mark.slow
def test_a_signal_that_something_catches_is_raised_by_the_next_step(start: Start, run: Run) -> None:
    code, lines, errors = start("swallowed").end()
    assert (code, lines) == (LEFT, ["goes on"])
    assert "Exception ignored" in errors
    assert run.workers() == []


@pytest.mark.slow
def test_a_handler_of_the_users_own_stays(start: Start, run: Run) -> None:
    assert start("handled").end() == (0, ["True"], "")
    assert run.workers() == []


@pytest.mark.slow
def test_a_forked_child_ends_as_by_default_and_leaves_the_lease(start: Start, run: Run) -> None:
    worker = start("forked", begins=False)
    os.kill(int(worker.line()), signal.SIGTERM)
    assert worker.line() == str(-signal.SIGTERM)
    assert worker.line() == "begun"
    assert len(run.workers()) == 1
    assert worker.end()[0] == LEFT
    assert run.workers() == []


@pytest.mark.slow
def test_a_forked_child_ends_by_a_signal_that_comes_before_it_has_begun(start: Start) -> None:
    # Forked by the main thread, and by another.
    assert start("told_child", begins=False).ended() == (0, 2 * [str(-signal.SIGTERM)], "")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["told_parent", "lone_told_parent"])
def test_a_signal_that_comes_while_a_worker_forks_is_not_lost(start: Start, run: Run, form: str) -> None:
    assert start(form, begins=False).ended() == (LEFT, [], "")
    if form == "told_parent":
        assert run.workers() == []


@pytest.mark.slow
def test_a_fork_leaves_the_mask_of_signals_as_it_was(start: Start) -> None:
    assert start("masks", begins=False).ended() == (0, 6 * ["True"], "")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root makes PID namespaces")
def test_process_1_of_a_container_leaves_too(start: Start, run: Run) -> None:
    worker = start("loose", "unshare", "--pid", "--fork", "--kill-child", sys.executable)
    parent = worker.pid
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert worker.ended()[0] == LEFT
    assert run.workers() == []


@pytest.mark.slow
def test_of_a_group_of_torchruns_the_one_lease_is_released(start: Start, run: Run) -> None:
    # It sends SIGTERM on to both.
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    worker = start("ranks", *launcher)
    assert len(run.workers()) == 1
    worker.end()
    assert run.workers() == []


def test_the_variable_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for value in ("", "0"):
        monkeypatch.setenv("FREESTEP_LEAVE_ON_SIGTERM", value)
        leave_if_asked()
    monkeypatch.setenv("FREESTEP_LEAVE_ON_SIGTERM", "yes")
    with pytest.raises(InvalidSetting, match="FREESTEP_LEAVE_ON_SIGTERM must be 0 or 1, not 'yes'"):
        leave_if_asked()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_cannot_be_done_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("freestep.leaving._is_told", False)
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        thread = threading.Thread(target=leave_on_sigterm)
        thread.start()
        thread.join(DEADLINE_S)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "needs the main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_action_that_is_there_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("freestep.leaving._is_told", False)
    caplog.set_level(logging.INFO, "freestep")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        leave_on_sigterm()
        leave_on_sigterm()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    (record,) = caplog.records
    assert "is handled already" in record.getMessage()
