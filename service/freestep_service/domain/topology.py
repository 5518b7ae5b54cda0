"""Where the shards of a run are."""

from __future__ import annotations

from collections.abc import Mapping

from freestep.api.models import ShardStatus, Slice, Topology
from freestep.wire.manifest import Manifest
from freestep_service.domain.run_view import RunView

__all__ = ["topology"]


def topology(run: str, manifest: Manifest, standing: RunView, now_ms: int, applied: Mapping[int, int]) -> Topology:
    """The topology of a run, by what Redis holds of it.

    now_ms: the time by Redis's clock, which ends ownerships. applied: shard -> newest applied step, of shards of which
    this process knows more than Redis.
    """
    shards = []
    for index in range(standing.count):
        part = manifest.part(index, standing.count)
        ends, applied_step = standing.field(index, "ends"), standing.field(index, "applied")
        durable = standing.field(index, "durable") or standing.run.get("durable_step")
        shards.append(
            ShardStatus(
                index=index,
                url=standing.field(index, "url") if ends is not None and int(ends) > now_ms else None,
                begin=part.begin,
                end=part.end,
                slices=[
                    Slice(name=slot.name, shape=slot.shape, begin=slot.start, end=slot.start + slot.numel)
                    for slot in part.slots
                ],
                applied_step=applied.get(index, None if applied_step is None else int(applied_step)),
                durable_step=None if durable is None else int(durable),
            )
        )
    missing = [shard.index for shard in shards if shard.url is None]
    return Topology(run=run, epoch=standing.number("epoch"), shards=shards, missing=missing)
