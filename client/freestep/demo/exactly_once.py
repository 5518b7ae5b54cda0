"""The demo's count: pushes that workers were told to be applied, beside those that the weights have.

Each worker writes a byte to a file of its own when it is told, unbuffered: a SIGKILL loses none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from freestep.client import Client

__all__ = ["Count", "counted"]


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
