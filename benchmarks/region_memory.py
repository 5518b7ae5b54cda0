"""The memory of `freestep region`, in bytes a parameter: the peak of its process over some rounds.

    python -m benchmarks.region_memory [OPTION]...

The run is one of AdamW Schedule-Free. What the process has besides vectors is left out: the figure is the difference
between a large and a small run. Options are given to `freestep region`, as `--push-dtype BF16`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.services import Service, running_service
from benchmarks.worker import Worker, new_run
from freestep import Client, Run

SMALL, LARGE = 10_000_000, 30_000_000
"""Parameters. Vectors of the small one are large enough for malloc to give them back to the system."""
RUNS, ROUNDS = 3, 3
PATIENCE_S = 120.0


@contextmanager
def region(service: Service, run: Run, parent: Run, options: list[str]) -> Iterator[Service]:
    """The process of a region whose rounds are of one update."""
    with tempfile.TemporaryDirectory(prefix="freestep-bench-") as folder:
        sides = ["--url", service.url, "--parent", service.url, "--parent-run", parent.name]
        given = [run.name, *sides, "--every", "1", "--file", f"{folder}/place", "--durability", "none", *options]
        process = subprocess.Popen([sys.executable, "-m", "freestep.cli", "region", *given], stdout=subprocess.DEVNULL)
        try:
            yield Service(service.url, process.pid)
        finally:
            process.terminate()
            process.wait()


def wait(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > ends:
            raise RuntimeError("the region does not go on")
        time.sleep(0.01)


def peak(parameters: int, options: list[str]) -> int:
    """Bytes."""
    with running_service() as service, Client(service.url) as client:
        run, parent = new_run(client, "here", parameters), client.run("far")

        def moved(times: int) -> bool:
            status = run.status()
            return status.epoch == 1 + times and not status.control.paused

        with region(service, run, parent, options) as process:
            for number in range(ROUNDS):
                # It was moved when it joined, and behind each round.
                wait(lambda number=number: moved(1 + number))  # type: ignore[misc]
                with Worker(run) as worker:
                    worker.push()
            wait(lambda: moved(1 + ROUNDS))
            assert parent.status().pushes["applied"] == ROUNDS
            return process.peak_memory()


def main() -> None:
    options = sys.argv[1:]
    small, large = ([peak(each, options) for _ in range(RUNS)] for each in (SMALL, LARGE))
    least, most = ((its(large) - min(small)) / (LARGE - SMALL) for its in (min, max))
    print(f"{least:.1f} bytes a parameter, {most:.1f} at most", flush=True)


if __name__ == "__main__":
    main()
