"""What was found so far, in one file, written whole after each race: an interrupted command goes on from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.race.one_race import Race
from benchmarks.race.plan import Entrant, tuned

__all__ = ["Results", "machine"]


class Results:
    """Races by name, and those that were run to choose a learning rate, trials; each known by all of how it was run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        found = json.loads(file.read_text()) if file.exists() else {}
        self.machine: dict[str, Any] = found.get("machine", {})
        self.trials: dict[str, dict[str, Any]] = found.get("trials", {})
        self.races: dict[str, dict[str, Any]] = found.get("races", {})
        self.missing: dict[str, str] = found.get("missing", {})

    def losses(self, task: str, method: str) -> dict[float, float]:
        """The loss that each rate came to that was tried."""
        mine = [each for each in self.trials.values() if (each["task"], each["method"]) == (task, method)]
        return {each["lr"]: each["loss"] for each in sorted(mine, key=lambda each: float(each["lr"]))}

    def trial(self, race: Race) -> float | None:
        """The loss that this very trial came to; None before that."""
        found = self.trials.get(_trial_name(race), {})
        return found["loss"] if _is_of(found, race) else None

    def put_trial(self, race: Race, loss: float) -> None:
        self.trials[_trial_name(race)] = {**asdict(race), "loss": loss}
        self._write()

    def has(self, race: Race) -> bool:
        """Whether this very race was run: with the same rate, length and workers."""
        return _is_of(self.races.get(_name(race), {}), race)

    def put(self, race: Race, found: Mapping[str, Any]) -> None:
        self.races[_name(race)] = {**asdict(race), **found}
        self.missing.pop(f"{race.world}/{race.method}/{race.task}", None)
        self._write()

    def forget(self, entrants: Sequence[Entrant]) -> None:
        """What was found of entrants, and what their learning rates were chosen by."""
        names, rates = {each.name for each in entrants}, set(tuned(entrants))
        self.races = {
            name: each
            for name, each in self.races.items()
            if f"{each['world']}/{each['method']}/{each['task']}" not in names
        }
        self.trials = {name: each for name, each in self.trials.items() if (each["task"], each["method"]) not in rates}
        self.missing = {name: why for name, why in self.missing.items() if name not in names}
        self._write()

    def put_missing(self, name: str, why: str) -> None:
        """Why there are no races of an entrant."""
        self.missing[name] = why
        self._write()

    def _write(self) -> None:
        self.machine = machine()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": self.machine, "missing": self.missing, "trials": self.trials, "races": self.races}
        partial = self._file.with_suffix(".partial")
        partial.write_text(_text(found))
        partial.replace(self._file)


def _name(race: Race) -> str:
    return f"{race.world}/{race.method}/{race.task}/{race.seed}"


def _trial_name(race: Race) -> str:
    return f"{race.method}/{race.task}/{race.lr:g}"


def _is_of(found: Mapping[str, Any], race: Race) -> bool:
    return all(found.get(key) == value for key, value in asdict(race).items())


def _text(found: Mapping[str, Any]) -> str:
    """JSON, with a line for each trial and race."""
    parts = [f' "{name}": {json.dumps(found[name])}' for name in ("machine", "missing")]
    for name in ("trials", "races"):
        lines = ",\n".join(f"  {json.dumps(each)}: {json.dumps(race)}" for each, race in found[name].items())
        parts.append(f' "{name}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def machine() -> dict[str, Any]:
    import torch

    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": models[0] if models else platform.processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
