"""The demo's count: pushes that workers were told to be applied, beside those that the weights have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from freestep.client import Client

__all__ = ["Count", "Told", "counted"]


class Told:
    """A file with a byte for each push that a worker was told to be applied; a SIGKILL loses none of them.

    A context manager.
    """

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self) -> None:
        """Another push was acknowledged as applied."""
        os.write(self._descriptor, b".")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Count:
    """acknowledged: pushes that workers were told to be applied. weights: updates that the weights have, by the counter
    that the optimizer's state has, each of one push. killed: workers that were killed, each of which may have had one
    push under way, of which nobody was told.
    """

    acknowledged: int
    weights: int
    killed: int

    @property
    def agrees(self) -> bool:
        """Whether each acknowledged push is in the weights once, and nothing else is."""
        return 0 <= self.weights - self.acknowledged <= self.killed

    def __str__(self) -> str:
        under_way = self.weights - self.acknowledged
        lines = [f"pushes acknowledged     {self.acknowledged:,}"]
        if self.agrees and under_way:
            lines.append(f"under way at the kill   {under_way:,}")
        verdict = "equal" if self.agrees else "NOT EQUAL"
        return "\n".join([*lines, f"pushes in the weights   {self.weights:,}: {verdict}"])


def counted(client: Client, run: str, told: Path, killed: int) -> Count:
    """The count of a run whose workers have ended: their files are in the folder `told`.

    Raises FreestepError if the run's state cannot be read.
    """
    state = client.run(run).export_state()
    weights = {round(scalars["k"]) for scalars in state.scalars.values()}
    return Count(sum(file.stat().st_size for file in told.iterdir()), max(weights), killed)
