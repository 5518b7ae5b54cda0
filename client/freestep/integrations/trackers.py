"""Where curves go: programs that keep them, opened by name.

A tracker has one method. Whoever has something else that keeps curves gives it that method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from freestep.errors import FreestepError, InvalidSetting

__all__ = ["KINDS", "Target", "Tracker", "TrackerFailed", "open_tracker"]

KINDS = {
    "tensorboard": "tensorboard:DIR",
    "wandb": "wandb:PROJECT",
    "mlflow": "mlflow:EXPERIMENT, mlflow:URI or mlflow:URI|EXPERIMENT",
    "trackio": "trackio:PROJECT",
}
"""How each kind of tracker is named."""
_PACKAGES = {"mlflow": "mlflow-skinny"}
"""What is installed for a kind, where that has another name."""


class Tracker(Protocol):
    """What keeps curves."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to each curve that is named, at a step, which need not be later than the last one's."""


class TrackerFailed(FreestepError):
    """A tracker could not be opened, or has not taken what it was given: the message says which, and why."""


@dataclass(frozen=True)
class Target:
    """A tracker by its kind, and where that keeps curves."""

    kind: str
    place: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that a text such as `tensorboard:DIR` names. Raises InvalidSetting."""
        kind, _, place = text.partition(":")
        if kind not in KINDS or not place:
            raise InvalidSetting(f"{text!r} names no tracker: {'; '.join(KINDS.values())}")
        return cls(kind, place)

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}"


def open_tracker(target: Target, run: str, key: str) -> AbstractContextManager[Tracker]:
    """A tracker that keeps a run's curves until the block ends.

    Args:
        target: Which, and where.
        run: The run's name, under which its curves are shown.
        key: A word by which the tracker finds the curves again that it has begun.

    Raises:
        InvalidSetting: The tracker's package is not installed.
    """
    try:
        module = import_module(f"freestep.integrations.{target.kind}")
    except ImportError as error:
        package = _PACKAGES.get(target.kind, target.kind)
        raise InvalidSetting(f"{target} needs a package ({error}): pip install {package}") from error
    opened: Callable[[str, str, str], AbstractContextManager[Tracker]] = module.opened
    return opened(target.place, run, key)
