"""The commit log of a run, and what takes a place in it beside pushes: reports, changes, reads, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from freestep.api.models import Metric
from freestep.errors import IdempotencyConflict, MalformedRequest
from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.coordination.store import reachable
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control
from freestep_service.domain.distances import part_of, summed
from freestep_service.domain.records import CheckpointId, Fenced, LogPosition, LogTruncated, Owner
from freestep_service.domain.reports import Measured

__all__ = ["RunLog"]


class RunLog:
    """The log of one run. Calls with an owner may raise Behind, Fenced and ShardUnavailable."""

    def __init__(self, scripts: RunScripts) -> None:
        self._scripts = scripts

    async def entries(self, after: LogPosition) -> list[dict[str, Any]]:
        """The entries after a position; none if the run is in another epoch by now.

        Raises LogTruncated where the log begins behind the position.
        """
        newest, *entries = await self._scripts.call("log_entries", after.epoch, after.seq)
        parsed: list[dict[str, Any]] = [json.loads(entry) for entry in entries]
        first = parsed[0]["seq"] if parsed else newest + 1
        if newest > after.seq and first != after.seq + 1:
            raise LogTruncated(after, first)
        return parsed

    async def report_metric(
        self, owner: Owner, measured: Measured, epoch: int | None
    ) -> tuple[int, dict[str, Any] | None]:
        """The run's epoch and the log entry that the report has become; no entry where it had counted before.

        epoch: of the x that was measured, None if the report does not name it.
        Raises the refusals of lua/report_metric.lua.
        """
        name, step, value = measured
        status, *rest = await self._scripts.call(
            "report_metric", *owner.position, owner.shard, owner.token, name, repr(value), step,
            "" if epoch is None else epoch,
        )  # fmt: skip
        match [status, *rest]:
            case ["noted", epoch_now, entry]:
                return epoch_now, json.loads(entry)
            case ["replay", epoch_now]:
                return epoch_now, None
            case ["conflict"]:
                raise IdempotencyConflict(f"{name} at step {step} was reported before, with another value")
            case ["forgotten", oldest]:
                raise MalformedRequest(f"reports of {name} from before step {oldest} are forgotten", field="step")
            case ["crowded", most]:
                raise MalformedRequest(f"the run has {most} metrics already, which is the most", field="name")
        self._scripts.refuse(status, rest)

    async def change_run(
        self, owner: Owner, before: Control, after: Control, policy: Policy, asked: str, by: str
    ) -> dict[str, Any] | None:
        """The log entry of a change of the run; None where something else was changed than `before` has.

        policy: the one in force after it. asked: the request, JSON. by: the name of who asks. Raises RunNotInitialized.
        """
        states = [text for each in (before, after) for text in (each.text, int(each.orders.paused))]
        status, *rest = await self._scripts.call(
            "change_run", *owner.position, owner.shard, owner.token, *states, *policy.values(), asked, by
        )
        if status == "changed":
            return None
        if status != "noted":
            self._scripts.refuse(status, rest)
        return dict(json.loads(rest[1]))

    async def metrics(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        with reachable():
            reported = await self._scripts.store.client.hgetall(self._scripts.key("metrics"))
        newest = {name: json.loads(steps)[-1] for name, steps in sorted(reported.items())}
        return {name: Metric(value=float(value), step=step) for name, (step, value) in newest.items()}

    async def request_read(
        self, owner: Owner, ticket: str, wanted: str, readers: int, kind: Literal["pull", "state"] = "pull"
    ) -> int:
        """The place in the log that a ticket's consistent read is of; 0 while there is no memory for it.

        Of a state it is 0 while another has the one place of states; it is to be asked for again then.
        """
        arguments = (*owner.position, owner.shard, owner.token, ticket, wanted, readers, kind)
        status, *rest = await self._scripts.call("request_cut", *arguments)
        if status != "cut":
            self._scripts.refuse(status, rest)
        return int(rest[0])

    async def reads_sent(self, tickets: Sequence[str]) -> None:
        """Notes that a shard has sent its parts of the reads with these tickets."""
        await self._scripts.call("cut_sent", *tickets)

    async def report_distances(self, owner: Owner, seq: int, part: Tensor) -> Tensor | None:
        """The distances between the pushes of the update that entry `seq` makes, fp64 [pairs], over all shards.

        part: those within the shard. None where other shards have not reported theirs, or the update needs them no
        more. Raises Behind and Fenced.
        """
        status, *rest = await self._scripts.call(
            "report_distances", *owner.position, owner.shard, owner.token, seq, part_of(part),
            keys=[self._scripts.key("distances")],
        )  # fmt: skip
        if status == "known":
            return summed(rest[0])
        if status not in ("waiting", "late"):
            self._scripts.refuse(status, rest)
        return None

    async def mark_checkpoint(self, owner: Owner) -> CheckpointId:
        """Takes a place in the log at which every shard copies its part of a checkpoint."""
        arguments = (*owner.position, owner.shard, owner.token)
        status, *rest = await self._scripts.call("mark_checkpoint", *arguments)
        if status != "marked":
            self._scripts.refuse(status, rest)
        return CheckpointId(*map(int, rest))

    async def part_written(self, owner: Owner, checkpoint: CheckpointId, size: int) -> bool:
        """Notes that a shard's part of a checkpoint is on disk; returns whether all parts are. Raises Fenced.

        size: of the part, in bytes.
        """
        arguments = (owner.shard, owner.token, str(checkpoint), checkpoint.step, size)
        (status,) = await self._scripts.call("checkpoint_part_written", *arguments)
        if status == "fenced":
            raise Fenced
        return bool(status == "durable")
