"""A push as an entry of the log, and whether its gradient can be taken.

The law of this file: no IO, no clock, no lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freestep.api.models import RunSpec
from freestep.errors import NonFiniteGradient
from freestep_service.domain.records import Claim, Record
from freestep_service.optimizers import Pushed
from freestep_service.state.log import Entry
from freestep_service.state.staging import Staged
from freestep_service.state.weighing import LARGEST_NORM

__all__ = ["committed_push", "largest_norm", "push_entry", "require_usable"]


def largest_norm(spec: RunSpec) -> float | None:
    """The largest norm of a gradient that the run takes; None takes any, since longer ones are clipped."""
    return LARGEST_NORM if spec.optimizer.max_grad_norm is None else None


def require_usable(spec: RunSpec, norm: float | None) -> float:
    """A gradient's norm, which is None where it is not finite. Raises NonFiniteGradient."""
    if norm is None:
        raise NonFiniteGradient("the gradient holds NaN or infinity")
    largest = largest_norm(spec)
    if largest is not None and norm > largest:
        raise NonFiniteGradient(f"the gradient's norm is {norm:.3g}, and its square overflows fp32", norm=norm)
    return norm


def push_entry(
    gradient: Pushed | None,
    norm: float,
    *,
    bound: float | None = None,
    staleness: int,
    live: int,
    samples: float | None,
    loss: float | None,
    **others: Any,
) -> Entry:
    """The entry of a push that was committed.

    gradient: None where the push was dropped. norm: the whole gradient's, over all shards. bound: the norm that it is
    clipped to beside `max_grad_norm`, None where there is none. samples, loss: as the push gives them. others: as
    `Entry` has them.
    """
    return Entry(
        gradient=gradient,
        is_weighed=False,
        samples=samples,
        bound=bound,
        staleness=staleness,
        live=live,
        loss=loss or 0.0,
        norm=norm,
        **others,
    )


def committed_push(
    claim: Claim,
    staged: Staged | None,
    record: Record,
    reads: Mapping[str, str],
    members: Mapping[str, Any] | None = None,
    **others: Any,
) -> Entry:
    """The entry of a push, from its claim, its gradient and its record; it owns the gradient's memory.

    staged: None where the push was dropped. members: the entry as Redis has it. others: as `Entry` has them.
    """
    return push_entry(
        None if staged is None or record.decision == "dropped" else staged.tensors,
        float(record.norm),
        bound=None if record.bound is None else float(record.bound),
        staleness=record.staleness,
        live=record.live,
        samples=claim.samples,
        loss=claim.loss,
        seq=record.seq,
        epoch=record.epoch,
        advance=record.decision == "applied",
        hold=None if staged is None else staged.hold,
        worker=record.worker,
        is_outlier=record.is_outlier,
        units=record.counted,
        reads=reads,
        members=members,
        record=record,
        claim=claim,
        **others,
    )
