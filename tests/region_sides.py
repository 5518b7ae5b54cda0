"""A region's run and its parent's, in which parameters count what was pushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from freestep import Client, HeldLease, Region, Run

NUMEL = 30
WHOLE = {"algorithm": "diloco", "lr": 1.0, "momentum": 0.0}
"""A parent that takes a round's progress as it is."""
OF_REGION = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": "count", "shape": [NUMEL]}],
}


def begin(run: Run, spec: dict[str, Any] = OF_REGION, value: float = 0.0) -> None:
    run.create(spec)
    run.initialize({"count": torch.full((NUMEL,), value)})


def push(run: Run, times: int = 1, value: float = 1.0) -> None:
    """Makes each parameter of a run larger by `value`, as often as this is asked for."""
    with run.lease() as lease:
        count(run, lease, times, value)


def count(run: Run, lease: HeldLease, times: int, value: float = 1.0) -> None:
    """... under a lease."""
    for _ in range(times):
        receipt = run.push({"count": torch.full((NUMEL,), -value)}, lease.claim(run.status().step))
        assert receipt.decision == "applied"


def counted(run: Run, point: str = "y") -> float:
    """What all parameters of a run have counted."""
    tensors, _ = run.pull(point)  # type: ignore[arg-type]
    values: Tensor = tensors["count"]
    assert (values == values[0]).all(), values
    return float(values[0])


@contextmanager
def sides(url: str, name: str) -> Iterator[tuple[Run, Run]]:
    """A region's run and its parent's, of other names so that one service can have both."""
    with Client(url) as client:
        yield client.run(f"{name}-here"), client.run(f"{name}-far")


def joined(region: Region) -> Region:
    """Moved to where its round begins."""
    while region.place is None or region.place.stage != "training":
        region.advance()
    return region


def checkpointed_in_round(here: Run, region: Region) -> int:
    """Has two updates made in a region's round, with a checkpoint between them; its step."""
    joined(region)
    push(here, 1)
    kept = here.checkpoint().step
    push(here, 1)
    return kept
