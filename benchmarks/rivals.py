"""freestep beside its peers: what each takes for the same exchange, at several sizes, as their users have them.

A peer's rounds, or the floor's, alternate with freestep's; a round is of several exchanges, one after another as in
training, and counts as their median. A ratio is the median of each round's ratio to freestep's time. Each runs in a
process of its own (benchmarks.peers.host) with torch's default number of threads; freestep's worker is a
`RemoteOptimizer`, compared as it is over TCP, and as it is by default on one machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from queue import Empty, SimpleQueue
from statistics import median
from threading import Thread

import torch

from benchmarks.figures import Figure, Report
from benchmarks.floor import CopyPass, raw_echo
from benchmarks.options import Options
from benchmarks.peers import OURS, PEERS

SIZES = {100_000: (11, 50), 1_000_000: (11, 20), 5_000_000: (9, 5), 25_000_000: (9, 2)}
"""How many rounds are counted, and exchanges are in one, by the number of parameters."""
QUICK_SIZES = {100_000: (3, 10), 1_000_000: (3, 3)}
WARMUP = 12
"""Exchanges. Ray's object store is slow until all of its memory has been in use once, which takes ten or so."""

LEAST: dict[int, dict[str, float]] = {
    100_000: {"grpc": 1.0, "rpc-tcp": 1.0},
    1_000_000: {"grpc": 1.0, "rpc-tcp": 1.0, "torchft": 1.0},
    25_000_000: dict.fromkeys(PEERS, 1.5),
}
"""How many times as long as freestep a peer is to take."""
MOST_OF_FLOOR = {5_000_000: 1.35}

_STARTED_S, _EXCHANGED_S = 120.0, 60.0
"""After which a peer is given up."""
_Size = tuple[int, int]
_PAIR_S, _LEAST_ROUNDS = 15.0, 3
"""Seconds after which no more rounds are begun with a peer that is warm and has had so many."""


class PeerFailed(Exception):
    """A process that is measured does not run; the message has the last line that it printed."""


class _Host:
    """A peer's worker in a process of its own."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self._name = name
        self._process = process
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._read, daemon=True).start()

    def exchange(self) -> float:
        """Seconds that the peer's own exchange took."""
        assert self._process.stdin is not None
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerFailed(f"{self._name} has ended") from None
        return float(self.line(_EXCHANGED_S))

    def line(self, within: float) -> str:
        """What it prints next; empty at its end. Raises PeerFailed when it prints nothing for too long."""
        try:
            line = self._lines.get(timeout=within)
        except Empty:
            raise PeerFailed(f"{self._name} gives no answer for {within:g} s") from None
        if not line:
            raise PeerFailed(f"{self._name} has ended")
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
            env={**os.environ, **quiet},
            start_new_session=True,
        )
        try:
            host = _Host((OURS | PEERS)[name].title, process)
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


def _rounds(theirs: Callable[[], float], ours: Callable[[], float], size: _Size) -> list[tuple[float, float]]:
    """Seconds of an exchange of both, by round."""
    rounds, exchanges = size
    for subject in (theirs, ours):
        _round(subject, WARMUP)
    taken, end = list[tuple[float, float]](), time.perf_counter() + _PAIR_S
    while len(taken) < rounds and (len(taken) < _LEAST_ROUNDS or time.perf_counter() < end):
        taken.append((_round(theirs, exchanges), _round(ours, exchanges)))
    return taken


def _round(subject: Callable[[], float], exchanges: int) -> float:
    return median(subject() for _ in range(exchanges))


def _beside_floor(ours: _Host, parameters: int, size: _Size) -> list[tuple[float, float]]:
    """... of the floor and of freestep."""
    vector, memory = torch.zeros(parameters), CopyPass(parameters)
    outgoing, incoming = (each.numpy().data.cast("B") for each in (vector, vector.clone()))
    with raw_echo(len(outgoing)) as echo:
        return _rounds(lambda: (echo.once(outgoing, incoming) + memory.once()).seconds, ours.exchange, size)


def _beside(name: str, python: str, ours: _Host, parameters: int, size: _Size) -> list[tuple[float, float]]:
    """... of a peer and of freestep. Raises PeerFailed."""
    with _hosted(name, python, parameters) as theirs:
        return _rounds(theirs.exchange, ours.exchange, size)


def _measured(parameters: int, size: _Size, found: Mapping[str, str], options: Options) -> Report:
    """One size. found: the interpreters of the peers that are installed."""
    millions, made = f"{parameters / 1e6:g}M", Report(details={})
    floor_bound = None if options.quick else MOST_OF_FLOOR.get(parameters)
    bounds = {} if options.quick else LEAST.get(parameters, {})
    with _hosted("tcp", sys.executable, parameters) as ours:
        taken = made.details["floor"] = _beside_floor(ours, parameters, size)
        made.figures += [
            Figure.of(f"{millions}, the floor", (1e3 * floor for floor, _ in taken), "ms"),
            Figure.of(f"{millions}, freestep, TCP", (1e3 * own for _, own in taken), "ms"),
            Figure.of(
                f"{millions}, freestep, TCP, of the floor", (own / floor for floor, own in taken), "×", most=floor_bound
            ),
        ]
        for name, python in {"shm": sys.executable, **found}.items():
            title = f"{millions}, {(OURS | PEERS)[name].title}"
            try:
                taken = made.details[name] = _beside(name, python, ours, parameters, size)
            except PeerFailed as error:
                made.notes.append(f"{title} was not measured: {error}")
                continue
            ratios = (its / own for its, own in taken)
            made.figures += [
                Figure.of(title, (1e3 * its for its, _ in taken), "ms"),
                Figure.of(f"{title}, of freestep's time over TCP", ratios, "×", least=bounds.get(name)),
            ]
    return made


def report(options: Options) -> Report:
    pythons = [sys.executable, *options.peers_python]
    pairs = ((name, _python_with(("torch", "schedulefree", *entry.needs), pythons)) for name, entry in PEERS.items())
    found = {name: python for name, python in pairs if python is not None}
    made = Report(details={})
    for parameters, size in (QUICK_SIZES if options.quick else SIZES).items():
        each = _measured(parameters, size, found, options)
        made.figures += each.figures
        made.notes += each.notes
        made.details[parameters] = each.details
    for name in PEERS.keys() - found.keys():
        made.notes.append(f"without {PEERS[name].title}: not installed (benchmarks/peers.txt)")
    made.notes.append(f"peers apply schedulefree {version('schedulefree')}'s AdamW, foreach; all have torch's threads")
    return made
