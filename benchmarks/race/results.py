"""What was found so far, in one file, written whole after each race: an interrupted command goes on from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.race.one_race import Race

__all__ = ["Results", "machine"]


class Results:
    """Learning rates and races by name; races are of the rate, length and workers that they say."""

    def __init__(self, file: Path) -> None:
        self._file = file
        found = json.loads(file.read_text()) if file.exists() else {}
        self.machine: dict[str, Any] = found.get("machine", {})
        self.rates: dict[str, dict[str, float]] = found.get("rates", {})
        self.races: dict[str, dict[str, Any]] = found.get("races", {})
        self.missing: dict[str, str] = found.get("missing", {})

    def losses(self, task: str, method: str) -> dict[float, float] | None:
        """The loss that each rate came to that was tried; None before that."""
        found = self.rates.get(f"{method}/{task}")
        return None if found is None else {float(rate): loss for rate, loss in found.items()}

    def put_losses(self, task: str, method: str, losses: Mapping[float, float]) -> None:
        self.rates[f"{method}/{task}"] = {f"{rate:g}": loss for rate, loss in losses.items()}
        self._write()

    def has(self, race: Race) -> bool:
        """Whether this very race was run: with the same rate, length and workers."""
        found = self.races.get(_name(race), {})
        return all(found.get(key) == value for key, value in asdict(race).items())

    def put(self, race: Race, found: Mapping[str, Any]) -> None:
        self.races[_name(race)] = {**asdict(race), **found}
        self.missing.pop(f"{race.world}/{race.method}/{race.task}", None)
        self._write()

    def put_missing(self, name: str, why: str) -> None:
        """Why there are no races of an entrant."""
        self.missing[name] = why
        self._write()

    def _write(self) -> None:
        self.machine = machine()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": self.machine, "rates": self.rates, "missing": self.missing, "races": self.races}
        partial = self._file.with_suffix(".partial")
        partial.write_text(_text(found))
        partial.replace(self._file)


def _name(race: Race) -> str:
    return f"{race.world}/{race.method}/{race.task}/{race.seed}"


def _text(found: Mapping[str, Any]) -> str:
    """JSON, with a line for each race."""
    parts = [f' "{name}": {json.dumps(found[name])}' for name in ("machine", "rates", "missing")]
    races = ",\n".join(f"  {json.dumps(name)}: {json.dumps(race)}" for name, race in found["races"].items())
    return "{\n" + ",\n".join([*parts, f' "races": {{\n{races}\n }}']) + "\n}\n"


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
