"""The shards of a run that this process owns."""

from __future__ import annotations

from collections.abc import Iterator

from freestep.errors import ShardUnavailable
from freestep_service.runs.local_shard import LocalShard

__all__ = ["OwnedShards"]


class OwnedShards:
    """Some of a run's `count` shards, all or none, by index. Their keeper alone adds and removes them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._shards: dict[int, LocalShard] = {}

    def __iter__(self) -> Iterator[LocalShard]:
        return iter(list(self._shards.values()))

    def __contains__(self, index: int) -> bool:
        return index in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> LocalShard:
        return self._shards[index]

    @property
    def indices(self) -> set[int]:
        """Which are owned."""
        return set(self._shards)

    @property
    def is_sharded(self) -> bool:
        """Whether the run has several shards."""
        return self.count > 1

    @property
    def has_first(self) -> bool:
        """Whether this process does what is done once for a run: its first shard is here."""
        return 0 in self._shards

    @property
    def lowest(self) -> LocalShard | None:
        """The one of the lowest index, which knows the log as well as any other."""
        return self._shards[min(self._shards)] if self._shards else None

    @property
    def epoch(self) -> int:
        """That of the shards here, 0 where there are none."""
        return self.lowest.core.writer.epoch if self.lowest else 0

    @property
    def initialized(self) -> bool:
        """Whether all that are here have their weights."""
        return all(shard.core.initialized for shard in self._shards.values())

    def require(self, index: int) -> LocalShard:
        """A shard that is here and has its state. Raises ShardUnavailable."""
        shard = self._shards.get(index)
        if shard is None or shard.core.loaded is None:
            raise ShardUnavailable(missing=[])
        return shard

    def require_any(self) -> LocalShard:
        """The lowest one that has its state. Raises ShardUnavailable."""
        return self.require(min(self._shards, default=0))

    def add(self, shard: LocalShard) -> None:
        """Begins with a shard."""
        self._shards[shard.index] = shard

    async def remove(self, index: int) -> None:
        """Closes a shard and forgets it."""
        await self._shards.pop(index).close()
