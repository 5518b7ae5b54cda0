"""The messages of a run's channel and the entries of its log, given to the shards that they concern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from freestep_service.domain.distances import summed
from freestep_service.domain.records import CheckpointId, LogPosition, Record
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.held_states import HeldStates
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery

__all__ = ["Dispatch"]


class Dispatch:
    """The dispatcher of one run."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        checkpointing: Checkpointing,
        held: HeldStates,
    ) -> None:
        self._coordinator = context.coordinator
        self._receipts = context.receipts
        self._events = context.events
        self._background = context.background
        self._recovery = recovery
        self._shards = shards
        self._checkpointing = checkpointing
        self._held = held
        self.on_units: Callable[[], None] = lambda: None
        """Called when units of data sets were given back, or the last of one has counted."""

    def on_message(self, message: dict[str, Any] | None) -> None:
        """Takes a message from the run's channel; None where some may have been missed."""
        if message is None:
            self._recovery.catch_up()
            return
        match message["kind"]:
            case "entry":
                self.on_entry(message)
            case "decided":
                record = Record.from_json(message["record"])
                self._receipts.remember(message["key"], record, message["evicted"] or ())
                self._events.dropped(record)
                for shard in self._shards:
                    shard.on_dropped(message["key"], message.get("attempt"), record)
            case "refused":
                for shard in self._shards:
                    shard.on_refused(message["key"], message.get("attempt"), message["slug"], message["detail"])
            case "granted":
                for shard in self._shards:
                    shard.on_granted(message["key"], message.get("attempt"))
            case "arriving":
                for push in message["pushes"]:
                    for shard in self._shards:
                        if shard.index in push["shards"]:
                            shard.on_asked(push["key"], push["attempt"], push["claim"])
            case "moved":
                for shard in self._shards:
                    shard.on_moved()
            case "lease":
                self._events.lease(message["change"], message["worker"])
            case "units":
                self.on_units()
            case "initialized":
                for shard in self._shards:
                    shard.on_initialized(message["upload"])
            case "import-over":
                self._held.drop(message["attempt"])
            case "distances":
                distances = summed(message["parts"])
                for shard in self._shards:
                    shard.core.writer.add_distances(message["epoch"], message["seq"], distances)
            case "distances-lost":
                for shard in self._shards:
                    shard.on_distances_lost(message["epoch"], message["seq"])
            case "evicted":
                self._receipts.forget(message["keys"])
            case "durable":
                identity = CheckpointId(*map(int, message["cut"].split("-")))
                self._background.spawn(self._checkpointing.complete(identity), "a checkpoint was not completed")
            case "phase" | "deleted":
                self._recovery.look()

    def on_entry(self, entry: dict[str, Any]) -> None:
        """Takes an entry of the log, as Redis has it."""
        if len(self._shards) and entry["epoch"] == self._shards.epoch:
            self._receipts.take(entry)
        for shard in self._shards:
            if not shard.on_entry(entry) and shard.core.initialized:
                # A push was committed of which this shard has no part: it cannot go on from here.
                self._recovery.reopen(f"shard {shard.index} has no part of entry {entry['seq']} of the log")

    async def catch_up(self) -> None:
        """Reads the entries that may have been missed."""
        if len(self._shards):
            after = LogPosition(self._shards.epoch, min(shard.core.writer.taken_seq for shard in self._shards))
            for entry in await self._coordinator.log.entries(after):
                self.on_entry(entry)
