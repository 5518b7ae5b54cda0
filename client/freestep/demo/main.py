"""`freestep demo`: a service, four workers and an evaluator; one worker is killed, and another one joins.

Then the pushes that were acknowledged are counted and compared with those in the weights, and the same budget is spent
in one process, with a constant rate and with a cosine schedule.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from shlex import quote

from rich.console import Console

from freestep.client import Client
from freestep.demo.baselines import LEARNING_RATES, Baseline
from freestep.demo.data import load
from freestep.demo.evaluator import Evaluation
from freestep.demo.exactly_once import Count, counted
from freestep.demo.plot import LABELS, draw
from freestep.demo.processes import Processes
from freestep.demo.show import Show
from freestep.errors import FreestepError
from freestep.terminal import print_line

__all__ = ["progress", "run_demo", "to_try"]

WORKERS = tuple(f"worker-{number}" for number in range(1, 5))
KILLED, JOINING = "worker-2", "worker-5"
STEPS = 4000
SHORTEST_S, LONGEST_S = 20.0, 120.0
"""Seconds: fast machines train for at least the shortest time, slow ones end after the longest with fewer steps."""
KILL_AT, JOIN_AT = 1 / 3, 1 / 2
"""The progress at which a worker is killed, and at which another one joins."""
TARGET = 0.95
"""The test accuracy of x at the end for which the demo succeeds."""
DIGITS, TOLD = "digits.pt", "acknowledged"
"""Beside the plot: the data, and a folder with a file for each worker."""
_SILENCE_S = 60.0
"""Seconds without a line of output after which the demo is given up."""


def progress(step: int, seconds: float) -> float:
    """The demo's progress, from 0 to 1."""
    return min(1.0, max(min(step / STEPS, seconds / SHORTEST_S), seconds / LONGEST_S))


def run_demo(output: Path, *, plain: bool) -> int:
    """Runs the demo; its files go to `output`.

    Returns 0 if x ended with the target accuracy, and if the weights have each acknowledged push once; else 1.
    """
    console = Console()
    plot, figures, log = output / "plot.png", output / "history.jsonl", output / "processes.log"
    data_dir = _fresh(output)
    for earlier in (plot, figures):
        earlier.unlink(missing_ok=True)
    load(output / DIGITS)
    history: list[Evaluation] = []
    events: list[tuple[float, str]] = []
    baselines: list[Baseline] = []
    count = None
    with Processes(log) as processes:
        try:
            url = _start_service(processes, data_dir)
            if url is not None and _train(console, processes, url, output, history, events, plain=plain):
                count = _count(processes, url, output)
                baselines = _spend_again(processes, output, history[-1].step)
        except FreestepError as error:
            # What was measured until then is written all the same.
            print_line(f"the service fails: {error}")
        except KeyboardInterrupt:
            console.print("\ninterrupted")
            return 130
    lines = [*(json.dumps(asdict(each)) for each in history), *(json.dumps(asdict(each)) for each in baselines)]
    if lines:
        figures.write_text("\n".join(lines) + "\n")
    if count is None or len({each.kind for each in baselines if each.step == history[-1].step}) < len(LEARNING_RATES):
        print_line(f"the demo ended early: see {log}")
        return 1
    draw(history, events, baselines, plot)
    return _conclude(console, history[-1], baselines, count, output, data_dir)


def _train(
    console: Console,
    processes: Processes,
    url: str,
    output: Path,
    history: list[Evaluation],
    events: list[tuple[float, str]],
    *,
    plain: bool,
) -> bool:
    """Trains, and appends to history and events; False if the demo ended early."""
    print_line(f"the service is at {url}, and its dashboard at {url}/")
    told = output / TOLD
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir()
    place = ("--url", url, "--data", str(output / DIGITS))

    def start(worker: str) -> None:
        processes.start(worker, "freestep.demo.worker", *place, "--worker", worker, "--told", str(told / worker))

    for worker in WORKERS:
        start(worker)
    processes.start("evaluator", "freestep.demo.evaluator", *place, "--json", is_read=True)
    with Show(console, url, plain=plain or not console.is_terminal) as show:
        for evaluation in _evaluations(processes):
            history.append(evaluation)
            done = progress(evaluation.step, evaluation.time - history[0].time)
            show.update(evaluation, done)
            if not events and done >= KILL_AT:
                processes.kill(KILLED)
                events.append((time.time(), f"{KILLED} killed"))
                show.show_event(f"{KILLED} killed")
            elif len(events) == 1 and done >= JOIN_AT:
                start(JOINING)
                events.append((time.time(), f"{JOINING} started"))
                show.show_event(f"{JOINING} started")
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


def _count(processes: Processes, url: str, output: Path) -> Count:
    """Ends the workers and the evaluator, and counts their pushes."""
    processes.end(*(worker for worker in (*WORKERS, JOINING) if worker != KILLED), "evaluator")
    with Client(url) as client:
        return counted(client, "digits", output / TOLD, killed=1)


def _spend_again(processes: Processes, output: Path, steps: int) -> list[Baseline]:
    """What the same number of steps gives in one process, by each baseline; less if one of them fails."""
    print_line(f"the same {steps:,} steps in one process, with a constant rate and with a cosine schedule ...")
    for kind in LEARNING_RATES:
        given = (kind, "--steps", str(steps), "--data", str(output / DIGITS))
        processes.start(kind, "freestep.demo.baselines", *given, is_read=True)
    found: list[Baseline] = []
    under_way: set[str] = set(LEARNING_RATES)
    while under_way:
        try:
            name, line = processes.read_line(_SILENCE_S)
        except TimeoutError:
            return found
        if line is None:
            under_way.discard(name)
        elif name in LEARNING_RATES:
            found.append(Baseline(**json.loads(line)))
    return found


def _conclude(
    console: Console, last: Evaluation, baselines: Sequence[Baseline], count: Count, output: Path, data_dir: Path
) -> int:
    reached = last.x_accuracy >= TARGET
    missed = "" if reached else f": less than the {TARGET:.0%} that this demo should end with"
    ends = {each.kind: each for each in baselines}
    console.print(
        f"\nx has {last.x_accuracy:.1%} test accuracy after {last.step:,} steps, y {last.y_accuracy:.1%}{missed}.\n"
        "That was the last evaluation, with which the plot ends; the workers went on until they were ended.\n\n"
        "                                                  training loss   test loss   test accuracy\n"
        f"{_row('x', last.x_training_loss, last.x_loss, last.x_accuracy)}"
        f"{_row('y', last.y_training_loss, last.y_loss, last.y_accuracy)}"
        f"{''.join(_row(LABELS[kind], end.training_loss, end.loss, end.accuracy) for kind, end in ends.items())}\n"
        f"  the plot      {output / 'plot.png'}\n"
        f"  its figures   {output / 'history.jsonl'}\n"
        f"  the weights   {data_dir} (checkpoints)\n\n"
        f"What to try next:\n{to_try(data_dir)}\n"
        f"Exactly once, of {len(WORKERS) + 1} workers and a kill:\n{count}",
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    return 0 if reached and count.agrees else 1


def to_try(data_dir: Path) -> str:
    """Commands that work where the demo was started, also while no environment is active."""
    python = Path(sys.executable)
    script = python.with_name("freestep")
    freestep = _from_here(script) if script.exists() else f"{_from_here(python)} -m freestep.cli"
    return (
        "  # the same run, where it ended\n"
        f"  {freestep} serve --data-dir {quote(str(data_dir))}\n"
        "  # a worker for it; start several, kill some\n"
        f"  {_from_here(python)} -m freestep.demo.worker\n"
        "  # what x and y are worth, every second\n"
        f"  {_from_here(python)} -m freestep.demo.evaluator\n"
        f"  {freestep} runs show digits\n"
        f"  {freestep} pull digits --point x -o digits.safetensors\n"
        "  # the same as containers, over several shards, in a clone of the repository\n"
        "  docker compose up --build\n"
    )


def _from_here(program: Path) -> str:
    """A program's path as it is typed, from the working directory where it is below that."""
    here = Path.cwd()
    return quote(f"./{program.relative_to(here)}" if program.is_relative_to(here) else str(program))


def _row(name: str, training_loss: float, loss: float, accuracy: float) -> str:
    return f"  {name:<46}  {training_loss:13.4f}   {loss:9.4f}   {accuracy:13.1%}\n"
