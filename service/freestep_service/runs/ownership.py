"""Which of a run's shards this process owns: what it takes, keeps, hands over and lets go.

The law of this file: Redis says who owns a shard, and every heartbeat asks it. What others own is let go; what nobody
owns is taken, up to this process's share, and more when others leave it. All of that is done by one heartbeat at a
time, under `lock`, which whatever has the run opened anew holds too; what state shards then load is `loading`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from freestep.api.models import RunSpec
from freestep.errors import CoordinatorUnavailable, RunNotFound
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.nodes import Node, Stopwatch
from freestep_service.coordination.run_scripts import not_open
from freestep_service.coordination.store import Store
from freestep_service.domain.records import Fenced, LogPosition
from freestep_service.domain.run_view import RunView
from freestep_service.runs.loading import Loading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.storage.run_files import LastEpochs

__all__ = ["Ownership"]

logger = logging.getLogger("freestep")

_OPENING_S = 20.0
"""How long a request waits for a run that is being opened."""
_POLL_S = 0.05


class _Host(Protocol):
    """What is asked of the run."""

    name: str
    spec: RunSpec
    coordinator: Coordinator

    @property
    def many(self) -> bool:
        """Whether it has several shards."""

    @property
    def listens(self) -> bool:
        """Whether what other processes do for the run concerns its pushes here."""

    @property
    def epoch(self) -> int:
        """The newest that is known here."""

    def make_owned(self, index: int, token: str) -> LocalShard:
        """Makes a shard that is owned from now on, and has no state yet."""

    def says(self) -> Mapping[str, str]:
        """What a heartbeat tells of the owned shards: fields of the shards' hash."""

    def hear(self, message: dict[str, Any] | None) -> None:
        """Takes a message from the run's channel."""

    def catch_up_soon(self) -> None:
        """Has read what of the log was not heard."""


class Ownership:
    """The shards of one run that this process owns: some, all or none."""

    def __init__(
        self,
        host: _Host,
        shards: int,
        node: Node,
        store: Store,
        messages: Channels,
        last_epochs: LastEpochs,
        loading: Loading,
    ) -> None:
        self.count = shards
        """How many shards the run has."""
        self.owned: dict[int, LocalShard] = {}
        self.standing: RunView | None = None
        """How the run stood at the last heartbeat."""
        self.lock = asyncio.Lock()
        """Held by a heartbeat, and by whoever changes what there is to keep."""
        self.is_closed = False
        """Whether nothing is kept any more."""
        self.is_gone = False
        """Whether another process has deleted the run."""
        self.is_troubled = False
        """Whether a shard cannot go on: the next heartbeat has the run opened anew."""
        self._host = host
        self._node = node
        self._store = store
        self._messages = messages
        self._last_epochs = last_epochs
        self._loading = loading
        self._missing_since = Stopwatch()
        self._surplus_since = Stopwatch()
        self._expected_seq = 0
        """The newest entry of the log at the last heartbeat."""

    @property
    def missing(self) -> list[int]:
        """The shards that nobody owned at the last heartbeat."""
        return self.standing.missing() if self.standing else []

    def require_open(self) -> None:
        """Raises RunNotFound."""
        if self.is_closed or self.is_gone:
            raise RunNotFound(f"there is no run {self._host.name!r}", run=self._host.name)

    # The heartbeat

    async def keep(self) -> None:
        """A heartbeat: keeps what is owned, takes what nobody owns, and helps the run to open."""
        async with self.lock:
            if not self.is_closed:
                try:
                    await self._keep()
                except (CoordinatorUnavailable, Fenced):
                    # The next one may reach Redis, and learns who owns what.
                    pass

    async def prolong(self) -> None:
        """As `keep`, or if that takes its time already, no more than to say that this process lives."""
        if not self.lock.locked():
            await self.keep()
        elif self.owned:
            with suppress(CoordinatorUnavailable):
                await self._host.coordinator.opening.heartbeat(self._node, (), {})

    async def _keep(self) -> RunView | None:
        """As `keep`; how the run stands then, None where it is gone."""
        standing = await self._own()
        while standing is not None:
            await self._change_owned(standing)
            if wanted := await self._wanted(standing):
                standing = await self._own(wanted)
                continue
            mine = [self.owned[index] for index in self._mine(standing)]
            if standing.phase == "gather" and self.owned and await self._loading.report(standing, mine):
                standing = await self._own()
                continue
            if standing.phase == "load" and await self._loading.load(standing, mine):
                standing = await self._own()
                continue
            if standing.phase == "open":
                await self._even_out(standing)
            break
        return standing

    async def _own(self, wanted: Iterable[int] = ()) -> RunView | None:
        known = max((owned.known for owned in self.owned.values()), default=LogPosition(0, 0))
        node, coordinator = self._node, self._host.coordinator
        applied = {
            index: LogPosition(owned.writer.epoch, owned.writer.taken_seq) for index, owned in self.owned.items()
        }
        standing = await coordinator.opening.heartbeat(node, list(wanted), self._host.says(), applied)
        if standing is None:
            last = await asyncio.to_thread(self._last_epochs.read, self._host.name)
            if last >= max(self._host.epoch, self._loading.newest_epoch, 1):
                self.is_gone = True
                await self._drop(list(self.owned))
                return None
            await coordinator.opening.gather(self.count)
            return await self._own(wanted)
        self.standing = standing
        is_behind = (standing.number("epoch"), standing.number("seq")) < known
        if standing.phase == "open" and (is_behind or self.is_troubled):
            self.is_troubled = False
            await coordinator.opening.gather(self.count, standing.generation)
            return await self._own(wanted)
        if self.owned and self._host.many and self._expected_seq > known.seq:
            # Its message should have come by now.
            self._host.catch_up_soon()
        self._expected_seq = standing.number("seq")
        return standing

    async def _change_owned(self, standing: RunView) -> None:
        """Lets go the shards that are another's by now, and begins with those that are this process's."""
        is_recut, self.count = standing.count != self.count, standing.count
        owners = {index: standing.field(index, "node") for index in range(standing.count)}
        mine = self._mine(standing)
        # What nobody owns, since Redis has lost that too, or was silent for long, is as good as it was: the log cannot
        # have gone on without it.
        lost = [index for index in self.owned if is_recut or owners[index] not in (self._node.id, None)]
        if lost:
            if not is_recut:
                logger.warning("run %s: shard %s is another process's now", self._host.name, ", ".join(map(str, lost)))
            await self._drop(lost)
        for index in self.owned.keys() & mine.keys():
            self.owned[index].token = mine[index]
        for index in sorted(mine.keys() - self.owned.keys()):
            self.owned[index] = self._host.make_owned(index, mine[index])
        if self.owned and self._host.listens:
            await self._messages.subscribe(self._host.coordinator.channel, self._host.hear)
        else:
            await self._messages.unsubscribe(self._host.coordinator.channel)

    def _mine(self, standing: RunView) -> dict[int, str]:
        """The shards that this process owns, as Redis has it, and their tokens."""
        return {
            index: standing.shards[f"{index}:token"]
            for index in range(standing.count)
            if standing.field(index, "node") == self._node.id
        }

    async def _wanted(self, standing: RunView) -> list[int]:
        """The shards to take: those that nobody owns, up to this process's share, or more if others leave them.

        Not those whose checkpoint is where this process cannot read it.
        """
        free = {
            index
            for index in range(standing.count)
            if not standing.is_owned(index)
            or (
                standing.was_owned_by_predecessor(index, self._node.url, self._node.host)
                and standing.field(index, "node") != self._node.id
            )
        }
        self._missing_since.note(set(free))
        if free:
            await self._node.heartbeat(self._store)
        # Where Redis has lost its data, others hold the state of what seems free.
        waits = "lost" in standing.run and self._node.live_peers > 0
        left = self._node.share(standing.count) - len(self._mine(standing))
        wanted: list[int] = []
        # Those whose state is still here come first.
        for index in sorted(free, key=lambda index: (index not in self.owned, index)):
            was_mine = index in self.owned or standing.was_owned_by_predecessor(index, self._node.url, self._node.host)
            is_left = was_mine or self._missing_since.age(index) > self._node.ttl_ms / 1000
            can_load = index in self.owned or "durable" not in standing.run
            may_take = (left > 0 and not waits) or is_left
            if may_take and (can_load or await self._loading.offers(index, standing.count)):
                wanted.append(index)
                left -= 1
        return wanted

    # Giving up

    async def _even_out(self, standing: RunView) -> None:
        """Hands over what this process owns beyond its share, once others have long had room for it."""
        mine = sorted(self._mine(standing))
        surplus = mine[self._node.share(standing.count) :] if self._host.spec.durability == "checkpoint" else []
        self._surplus_since.note({"surplus"} if surplus else set())
        # Beyond the time for which a process that is gone is counted.
        if self._surplus_since.age("surplus") <= 3 * self._node.ttl_ms / 1000:
            return
        logger.info("run %s: shard %s is handed over", self._host.name, ", ".join(map(str, surplus)))
        await self._give_up([self.owned[index] for index in surplus])

    async def _give_up(self, given: Sequence[LocalShard]) -> None:
        """Leaves shards on disk, for others to take where they stand. Nobody pushes meanwhile."""
        standing, coordinator = None, self._host.coordinator
        with suppress(CoordinatorUnavailable, Fenced):
            if given:
                await coordinator.opening.gather(self.count)
                standing = await coordinator.opening.read()
        for owned in given:
            try:
                await self._loading.leave(owned, standing)
            except Exception:
                logger.exception("run %s: shard %d could not be written", self._host.name, owned.index)
        with suppress(CoordinatorUnavailable):
            await coordinator.opening.give_up([owned.owner() for owned in given])
        await self._drop([owned.index for owned in given])

    async def _drop(self, indices: Iterable[int]) -> None:
        for index in indices:
            await self.owned.pop(index).close()

    async def give_up_all(self) -> None:
        """Leaves what is owned on disk, for others to take. Under `lock`."""
        await self._give_up(list(self.owned.values()))
        await self._messages.unsubscribe(self._host.coordinator.channel)

    async def drop_all(self) -> None:
        """Lets go of what is owned, as it is."""
        await self._drop(list(self.owned))
        await self._messages.unsubscribe(self._host.coordinator.channel)

    # Opening anew

    async def reopen(self) -> None:
        """Has the run's part of Redis written anew, because Redis has lost what the shards have seen.

        Raises RunNotFound, ShardUnavailable while other processes have to say what they have.
        """
        openings = self._loading.openings
        async with self.lock:
            self.require_open()
            if self._loading.openings != openings:
                return
            try:
                await self._host.coordinator.opening.gather(self.count)
                standing = await self._keep()
            except Fenced:
                standing = await self._host.coordinator.opening.read()
            if standing is None or standing.phase != "open":
                raise not_open(self._host.name, standing.missing() if standing else [])

    @asynccontextmanager
    async def opening(self) -> AsyncIterator[None]:
        """A block that closes the run and says how it is to go on; when the block is left, the run is open again.

        Raises RunNotFound before, ShardUnavailable after it.
        """
        async with self.lock:
            self.require_open()
            yield
            await self._keep()
        await self._opened()

    async def _opened(self) -> None:
        """Returns when the run is open. Raises ShardUnavailable."""
        try:
            async with asyncio.timeout(_OPENING_S):
                while True:
                    await self.keep()
                    standing = await self._host.coordinator.opening.read()
                    if standing is not None and standing.phase == "open":
                        self.count = standing.count
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise not_open(self._host.name, self.missing) from None
