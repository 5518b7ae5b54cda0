"""What is known of a run, as commands show it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from freestep.api.models import RunControl, RunStatus
from freestep.commands.shared import or_dash, steps_or_dash

__all__ = ["facts", "policy_of"]


def facts(status: RunStatus, missing: Sequence[int] = ()) -> list[tuple[str, str]]:
    """What is known of a run, as rows of a table. missing: the shards without an owner."""
    spec, control = status.in_force, status.control
    settings = spec.optimizer.model_dump(exclude={"algorithm"}, exclude_none=True)
    without_owner = f"; without an owner: {', '.join(map(str, missing))}" if missing else ""
    metrics = (f"{name} {metric.value:.4g} at step {metric.step}" for name, metric in status.metrics.items())
    return [
        ("run", status.run),
        ("step", str(status.step)),
        ("epoch", str(status.epoch)),
        ("initialized", "yes" if status.initialized else "no"),
        ("algorithm", status.spec.optimizer.algorithm),
        ("", " ".join(f"{name}={value}" for name, value in settings.items())),
        ("policy", policy_of(status)),
        *([("changed since", _changes(control))] if _changes(control) else []),
        ("parameters", f"{status.parameter_count:,} in {len(status.spec.parameters)} tensors"),
        ("durability", spec.durability),
        ("shards", f"{status.shards}{without_owner}"),
        ("workers", ", ".join(worker.worker for worker in status.workers) or "-"),
        ("pushes", ", ".join(f"{count} {decision}" for decision, count in status.pushes.items())),
        ("outliers", ", ".join(f"{count} of {worker}" for worker, count in status.outliers.items()) or "-"),
        ("banned for outliers", ", ".join(status.banned) or "-"),
        *([("banned by an operator", _suspended(control))] if control.suspended else []),
        ("loss", or_dash(status.loss)),
        ("staleness", steps_or_dash(status.staleness)),
        ("metrics", ", ".join(metrics) or "-"),
        ("checkpoint", or_dash(status.checkpoint_step)),
    ]


def policy_of(status: RunStatus) -> str:
    """The policy in force, and whether the run is paused."""
    return status.in_force.aggregation.policy + " (paused)" * status.control.paused


def _changes(control: RunControl) -> str:
    """What of the run is not as it was created."""
    changed = control.model_dump(include={"optimizer", "groups", "aggregation"})
    named = [(name, value) for name, value in changed.pop("optimizer").items()]
    named += [(f"aggregation.{name}", value) for name, value in changed["aggregation"].items()]
    named += [
        (f"groups.{group}.{name}", value) for group, own in changed["groups"].items() for name, value in own.items()
    ]
    return " ".join(f"{name}={json.dumps(value)}" for name, value in named)


def _suspended(control: RunControl) -> str:
    return ", ".join(f"{worker} for {left / 1000:.0f} s" for worker, left in control.suspended.items())
