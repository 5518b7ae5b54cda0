"""Where the shards of a run are."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter

from freestep.api.models import ShardStatus, Slice, Topology
from freestep.wire.manifest import Manifest
from freestep_service.domain.run_view import RunView

__all__ = ["Layout", "topology"]

_SLICES = TypeAdapter(list[Slice])


class Layout:
    """The parts of a run's tensors in each of `count` shards: what of a topology stays, made once.

    slices: of each shard. documents: the same as JSON.
    """

    def __init__(self, manifest: Manifest, count: int) -> None:
        parts = [manifest.part(index, count) for index in range(count)]
        self.count = count
        self.spans = [(part.begin, part.end) for part in parts]
        self.slices = [
            [
                Slice(name=slot.name, shape=slot.shape, begin=slot.start, end=slot.start + slot.numel)
                for slot in part.slots
            ]
            for part in parts
        ]
        self.documents = [_SLICES.dump_json(slices).decode() for slices in self.slices]


def topology(
    run: str, layout: Layout, standing: RunView, now_ms: int, applied: Mapping[int, int], *, journaled: bool = False
) -> Topology:
    """The topology of a run, by what Redis holds of it.

    layout: for the number of shards that it has. now_ms: the time by Redis's clock, which ends ownerships. applied:
    shard -> newest applied step, of shards of which this process knows more than Redis. journaled: whether that is the
    run's durability.
    """
    shards = []
    for index, ((begin, end), slices) in enumerate(zip(layout.spans, layout.slices, strict=True)):
        ends, applied_step = standing.field(index, "ends"), standing.field(index, "applied")
        newest = applied.get(index, None if applied_step is None else int(applied_step))
        durable = standing.field(index, "durable") or standing.run.get("durable_step")
        if journaled and durable is not None and newest is not None:
            # Nothing is applied that is not on disk.
            durable = str(newest)
        shards.append(
            ShardStatus(
                index=index,
                url=standing.field(index, "url") if ends is not None and int(ends) > now_ms else None,
                begin=begin,
                end=end,
                slices=slices,
                applied_step=newest,
                durable_step=None if durable is None else int(durable),
                journal=(standing.field(index, "host") or "").partition(" ")[0] or None if journaled else None,
            )
        )
    missing = [shard.index for shard in shards if shard.url is None]
    return Topology(run=run, epoch=standing.number("epoch"), shards=shards, missing=missing)
