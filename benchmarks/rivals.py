"""freestep beside its peers: what each takes for the same exchange.

Each peer that is installed runs alone with freestep, and their rounds alternate; a peer's ratio is the median of each
round's ratio of the peer's time to freestep's. Peers run in processes of their own, by benchmarks.peers.host.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from queue import Empty, SimpleQueue
from threading import Thread

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.peers import PEERS
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS, ROUNDS, WARMUP = 25_000_000, 9, 12
"""Ray's object store is slow until all of its memory has been in use once, which takes ten rounds or so."""
QUICK_PARAMETERS, QUICK_ROUNDS, QUICK_WARMUP = 1_000_000, 3, 2
LEAST = 1.5
"""How many times as long as freestep each peer is to take."""

_STARTED_S, _EXCHANGED_S = 120.0, 60.0
"""After which a peer is given up."""


class PeerFailed(Exception):
    """A peer that is installed does not run; the message is the last line that it printed."""


class _Host:
    """A peer's worker in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._read, daemon=True).start()

    def exchange(self) -> float:
        """Seconds that the peer's own exchange took."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return float(self.line(_EXCHANGED_S))

    def line(self, within: float) -> str:
        """What it prints next; empty at its end. Raises PeerFailed when it prints nothing for too long."""
        try:
            line = self._lines.get(timeout=within)
        except Empty:
            raise PeerFailed(f"no answer for {within:g} s") from None
        if not line:
            raise PeerFailed("it ended")
        return line

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def _hosted(name: str, python: str, parameters: int) -> Iterator[_Host]:
    """A peer, ready for exchanges; nothing of it is left afterwards. Raises PeerFailed."""
    with tempfile.TemporaryDirectory(prefix="freestep-peer-") as home, tempfile.TemporaryFile("w+") as log:
        # A home of its own, for what peers write there; and nothing is to be reported to anybody.
        quiet = {"HOME": home, "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
        process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.host", name, str(parameters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **quiet},
            start_new_session=True,
        )
        try:
            host = _Host(process)
            host.line(_STARTED_S)
            yield host
        except (PeerFailed, OSError) as error:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            raise PeerFailed(f"{error}: {lines[-1][:200]}" if lines else str(error)) from error
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Lets it end what it started, then ends all that is left of its session."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(timeout=20)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _python_with(needs: Sequence[str], pythons: Sequence[str]) -> str | None:
    """The first interpreter that has these packages."""
    program = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    for python in pythons:
        try:
            if not subprocess.run([python, "-c", program, *needs], capture_output=True).returncode:
                return python
        except OSError:
            continue
    return None


def measure(worker: Worker, name: str, python: str, options: Options) -> list[tuple[float, float]]:
    """Seconds of a peer's and of freestep's exchange, by round. Raises PeerFailed."""
    warmup, rounds = (QUICK_WARMUP, QUICK_ROUNDS) if options.quick else (WARMUP, ROUNDS)
    with _hosted(name, python, worker.gradient.manifest.numel) as host:
        taken = [(host.exchange(), worker.push()) for _ in range(warmup + rounds)]
    return taken[warmup:]


def report(options: Options) -> Report:
    parameters = QUICK_PARAMETERS if options.quick else PARAMETERS
    pythons = [sys.executable, *options.peers_python]
    made = Report(details={})
    with running_service() as service, Client(service.url) as client:
        with Worker(new_run(client, "rivals", parameters)) as worker:
            for name, entry in PEERS.items():
                python = _python_with(("torch", "schedulefree", *entry.needs), pythons)
                if python is None:
                    made.notes.append(f"without {entry.title}: not installed (benchmarks/peers.txt)")
                    continue
                try:
                    taken = measure(worker, name, python, options)
                except PeerFailed as error:
                    made.notes.append(f"without {entry.title}: {error}")
                    continue
                title = f"{parameters / 1e6:g}M, {entry.title}"
                least = None if options.quick else LEAST
                made.figures += [
                    Figure.of(title, (1e3 * theirs for theirs, _ in taken), "ms"),
                    Figure.of(
                        f"{title}, of freestep's time", (theirs / ours for theirs, ours in taken), "×", least=least
                    ),
                ]
                made.details[name] = taken
    made.notes.append(f"peers apply schedulefree {version('schedulefree')}'s AdamW, foreach, with one thread")
    return made
