"""`freestep demo`: a service, four workers and an evaluator; one worker is killed, and another one joins."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from shlex import quote

from rich.console import Console

from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.plot import draw
from freestep.demo.processes import Processes
from freestep.demo.show import Show
from freestep.terminal import print_line

__all__ = ["progress", "run_demo"]

WORKERS = 4
STEPS = 6000
SHORTEST_S, LONGEST_S = 20.0, 120.0
"""Seconds: fast machines train for at least the shortest time, slow ones end after the longest with fewer steps."""
KILL_AT, JOIN_AT = 1 / 3, 1 / 2
"""The progress at which worker-2 is killed, and at which worker-5 joins."""
TARGET = 0.95
"""The test accuracy of x at the end for which the demo succeeds."""
_SILENCE_S = 60.0
"""Seconds without a line of output after which the demo is given up."""


def progress(step: int, seconds: float) -> float:
    """The demo's progress, from 0 to 1."""
    return min(1.0, max(min(step / STEPS, seconds / SHORTEST_S), seconds / LONGEST_S))


def run_demo(output: Path, *, plain: bool) -> int:
    """Runs the demo; its files go to `output`. Returns 0 if x ended with the target accuracy, else 1."""
    console = Console()
    plot, figures, log = output / "plot.png", output / "history.jsonl", output / "processes.log"
    data_dir = _fresh(output)
    for earlier in (plot, figures):
        earlier.unlink(missing_ok=True)
    load(output / "digits.pt")
    history: list[Evaluation] = []
    events: list[tuple[float, str]] = []
    with Processes(log) as processes:
        try:
            finished = _train(console, processes, output / "digits.pt", data_dir, history, events, plain=plain)
        except KeyboardInterrupt:
            console.print("\ninterrupted")
            return 130
    if history:
        figures.write_text("".join(json.dumps(asdict(each)) + "\n" for each in history))
    if not finished:
        print_line(f"the demo ended early: see {log}")
        return 1
    draw(history, events, history[0].time, plot)
    return _conclude(console, history[-1], output, data_dir)


def _train(
    console: Console,
    processes: Processes,
    data: Path,
    data_dir: Path,
    history: list[Evaluation],
    events: list[tuple[float, str]],
    *,
    plain: bool,
) -> bool:
    """Trains, and appends to history and events; False if the demo ended early."""
    url = _start_service(processes, data_dir)
    if url is None:
        return False
    place = ("--url", url, "--data", str(data))
    for number in range(1, WORKERS + 1):
        processes.start(f"worker-{number}", "freestep.demo.worker", *place, "--worker", f"worker-{number}")
    processes.start("evaluator", "freestep.demo.evaluator", *place, "--json", is_read=True)
    with Show(console, url, plain=plain or not console.is_terminal) as show:
        for evaluation in _evaluations(processes):
            history.append(evaluation)
            done = progress(evaluation.step, evaluation.time - history[0].time)
            show.update(evaluation, done)
            if not events and done >= KILL_AT:
                processes.kill("worker-2")
                events.append((time.time(), "worker-2 killed"))
                show.show_event("worker-2 killed")
            elif len(events) == 1 and done >= JOIN_AT:
                processes.start("worker-5", "freestep.demo.worker", *place, "--worker", "worker-5")
                events.append((time.time(), "worker-5 joined"))
                show.show_event("worker-5 joined")
            elif done >= 1:
                return True
    return False


def _fresh(output: Path) -> Path:
    """A new data directory for the service; earlier ones are kept, since their runs can be continued."""
    for number in count(1):
        data_dir = output / f"service-{number}"
        try:
            data_dir.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            continue
        return data_dir
    raise AssertionError("unreachable")


def _start_service(processes: Processes, data_dir: Path) -> str | None:
    """The service's URL, or None if it does not start."""
    processes.start("service", "freestep.cli", "serve", "--port", "0", "--data-dir", str(data_dir), is_read=True)
    try:
        # The first line of its output ends with its URL, with the port that it has taken.
        _, line = processes.read_line(_SILENCE_S)
    except TimeoutError:
        return None
    return line.split()[-1] if line else None


def _evaluations(processes: Processes) -> Iterator[Evaluation]:
    """The evaluator's results, until it or the service ends or prints nothing for too long."""
    while True:
        try:
            name, line = processes.read_line(_SILENCE_S)
        except TimeoutError:
            return
        if line is None:
            return
        if name == "evaluator":
            yield Evaluation(**json.loads(line))


def _conclude(console: Console, last: Evaluation, output: Path, data_dir: Path) -> int:
    reached = last.x_accuracy >= TARGET
    console.print(
        f"\nx has {last.x_accuracy:.1%} test accuracy after {last.step:,} steps, y {last.y_accuracy:.1%}"
        f"{'' if reached else f': less than the {TARGET:.0%} that this demo should end with'}.\n\n"
        f"  the plot      {output / 'plot.png'}\n"
        f"  its figures   {output / 'history.jsonl'}\n"
        f"  the weights   {data_dir} (checkpoints)\n\n"
        "What to try next:\n"
        f"  freestep serve --data-dir {quote(str(data_dir))}\n"
        "                                              the same run, where it ended\n"
        "  python -m freestep.demo.worker              a worker for it; start several, kill some\n"
        "  python -m freestep.demo.evaluator           what x and y are worth, every second\n"
        "  freestep runs show digits\n"
        "  freestep pull digits --point x -o digits.safetensors\n"
        "  docker compose up --build                   the same as containers, over several shards",
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    return 0 if reached else 1
