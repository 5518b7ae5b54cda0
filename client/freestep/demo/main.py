"""`freestep demo`: a service, four workers, an evaluator, a kill and a join, in front of your eyes."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO

from rich.console import Console

from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.plot import draw
from freestep.demo.show import Show

__all__ = ["run_demo"]

WORKERS = 4
STEPS = 6000
"""Where the demo ends; the kill and the join come on the way there."""
KILL_AT, JOIN_AT = STEPS // 3, STEPS // 2
TARGET = 0.95
"""Test accuracy of x that it must end with."""
_SILENCE_S = 60.0
"""With no evaluation for so long, something is broken."""


class Processes:
    """The demo's processes, each in a session of its own so that Ctrl-C reaches this one alone, which ends them."""

    def __init__(self, output: Path, data: Path) -> None:
        self.url = ""
        self._data = data
        self._log = (output / "processes.log").open("wb")
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._running[name] = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if name in ("service", "evaluator") else self._log,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        return self._running[name]

    def start_service(self, data_dir: Path) -> None:
        process = self.start("service", "freestep.cli", "serve", "--port", "0", "--data-dir", str(data_dir))
        # The first line of its output names the port that it found.
        self.url = _output(process).readline().split()[-1]

    def start_worker(self, name: str) -> None:
        self.start(name, "freestep.demo.worker", "--url", self.url, "--data", str(self._data), "--worker", name)

    def start_evaluator(self) -> IO[str]:
        command = ("freestep.demo.evaluator", "--json", "--url", self.url, "--data", str(self._data))
        return _output(self.start("evaluator", *command))

    def kill(self, name: str) -> None:
        """SIGKILL: the worker says goodbye to nobody."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        """Ends them all, the service last, so that workers can release their leases."""
        for names in ([name for name in self._running if name != "service"], ["service"]):
            processes = [self._running[name] for name in names if name in self._running]
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._log.close()


def run_demo(output: Path, *, plain: bool) -> int:
    """Runs the demo; its files go to `output`. Returns 0 if x ended with the target accuracy, else 1."""
    console = Console()
    data, data_dir = output / "digits.pt", output / "service"
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(data_dir, ignore_errors=True)
    load(data)
    history: list[Evaluation] = []
    events: list[tuple[float, str]] = []
    processes = Processes(output, data)
    try:
        with _interruptible():
            processes.start_service(data_dir)
            for number in range(1, WORKERS + 1):
                processes.start_worker(f"worker-{number}")
            with Show(console, processes.url, STEPS, plain=plain or not console.is_terminal) as show:
                for evaluation in _evaluations(processes.start_evaluator()):
                    history.append(evaluation)
                    if evaluation.step >= KILL_AT and not events:
                        processes.kill("worker-2")
                        events.append((time.time(), "worker-2 killed"))
                    elif evaluation.step >= JOIN_AT and len(events) == 1:
                        processes.start_worker("worker-5")
                        events.append((time.time(), "worker-5 joined"))
                    show.update(evaluation, [what for _, what in events])
                    if evaluation.step >= STEPS and len(events) == 2:
                        break
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        return 130
    finally:
        processes.end()
    if len(history) < 2 or history[-1].step < STEPS:
        console.print(f"the demo broke off; {output / 'processes.log'} may say why")
        return 1
    (output / "history.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in history))
    draw(history, events, history[0].time, output / "plot.png")
    return _conclude(console, history[-1], output)


def _conclude(console: Console, last: Evaluation, output: Path) -> int:
    reached = last.x_accuracy >= TARGET
    console.print(
        f"\nx has {last.x_accuracy:.1%} test accuracy after {last.step:,} steps, y {last.y_accuracy:.1%}"
        f"{'' if reached else f': less than the {TARGET:.0%} that this demo should end with'}.\n\n"
        f"  the plot      {output / 'plot.png'}\n"
        f"  its figures   {output / 'history.jsonl'}\n"
        f"  the weights   {output / 'service'} (checkpoints)\n\n"
        "What to try next:\n"
        f"  freestep serve --data-dir {output / 'service'}            the same run, where it ended\n"
        "  python -m freestep.demo.worker                          a worker for it; start several, kill some\n"
        "  freestep runs show digits\n"
        "  freestep pull digits --point x -o digits.safetensors\n"
        "  docker compose up --build --scale worker=4              the same as containers",
        soft_wrap=True,
        highlight=False,
    )
    return 0 if reached else 1


def _evaluations(lines: IO[str]) -> Iterator[Evaluation]:
    """What the evaluator prints, until it ends or falls silent."""
    arrived: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in lines:
            arrived.put(line)
        arrived.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=_SILENCE_S)
        except queue.Empty:
            return
        if not line:
            return
        yield Evaluation(**json.loads(line))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _output(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout
