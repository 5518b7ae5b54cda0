"""What a worker's process is told, and how all begin at one moment."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.race.device import Device
from benchmarks.race.tasks import TASKS, Task
from benchmarks.race.worlds import WORLDS

__all__ = ["Told", "begin_at", "is_ready", "say_ready"]

_PAUSE_S = 0.005


@dataclass(frozen=True)
class Told:
    """A worker's part in a race.

    number: the worker's. folder: the race's. data: the task's folder. seconds: how long it lasts. look_s: between two
    looks at x. address: the worker's own. meeting: where others are met, "HOST:PORT"; for freestep the service's.
    """

    method: str
    world: str
    task: str
    seed: int
    lr: float
    number: int
    workers: int
    folder: str
    data: str
    seconds: float
    look_s: float
    address: str
    meeting: str

    @classmethod
    def parse(cls, text: str) -> Told:
        """From a command line; torch's threads are limited to one, since workers share the cores."""
        torch.set_num_threads(1)
        return cls(**json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def place(self) -> Path:
        return Path(self.folder)

    def opened_task(self) -> Task:
        return TASKS[self.task](Path(self.data))

    def device(self, task: Task, began: float) -> Device:
        """The worker's, of a race that began at this moment."""
        world = WORLDS[self.world]
        return Device(
            world.device * task.device_s,
            lambda at: world.slowness(self.seed, self.number, self.workers, at - began),
        )

    def wait_for_begin(self) -> float:
        """Says that this worker is ready; returns the moment at which the race begins or began, when it has."""
        say_ready(self.place, self.number)
        while not (self.place / "begin").exists():
            time.sleep(_PAUSE_S)
        began = float((self.place / "begin").read_text())
        time.sleep(max(0.0, began - time.monotonic()))
        return began


def say_ready(folder: Path, number: int) -> None:
    (folder / f"ready-{number}").touch()


def is_ready(folder: Path, workers: int) -> bool:
    return all((folder / f"ready-{number}").exists() for number in range(workers))


def begin_at(folder: Path, moment: float) -> None:
    """Tells all, by the machine's monotonic clock; whole or not at all."""
    (folder / "begin.partial").write_text(repr(moment))
    (folder / "begin.partial").replace(folder / "begin")
