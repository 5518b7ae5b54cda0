"""Which of a run's shards this process owns: what it takes, keeps, hands over and lets go.

The law of this file: Redis decides who owns a shard, and every heartbeat reads that. Shards of other owners are let
go; free ones are taken, up to this process's share, and more when others leave them. One task at a time does that,
under `lock`, which whatever has the run opened again holds too; where shards stand is then `standing`'s, and what they
load is `loading`'s.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from freestep.errors import CoordinatorUnavailable, FreestepError, RunNotFound, ShardUnavailable
from freestep_service.coordination.nodes import Stopwatch
from freestep_service.coordination.run_scripts import not_open
from freestep_service.domain.records import Fenced, LogPosition
from freestep_service.domain.run_view import RunView
from freestep_service.runs.context import RunContext
from freestep_service.runs.deletions import Deletions
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.loading import Loading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.placement import Placement
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.run_memory import RunMemory
from freestep_service.runs.standing import Standing
from freestep_service.runs.stored_states import StoredStates
from freestep_service.runs.watched_lock import WatchedLock

__all__ = ["Ownership"]

logger = logging.getLogger("freestep")

_OPENING_S = 20.0
"""Seconds for which a request waits for a run that is being opened."""
_POLL_S = 0.05
_LONGEST_GAP_S = 5.0
"""Seconds after which a gap in the log that reading it has not filled is one for good."""


class Ownership:
    """The shards of one run that this process owns: some, all or none.

    make_shard: makes one that is owned from now on, by its index and token, and has no state yet.
    """

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        memory: RunMemory,
        dispatch: Dispatch,
        stored: StoredStates,
        placement: Placement,
        standing: Standing,
        loading: Loading,
        make_shard: Callable[[int, str], LocalShard],
    ) -> None:
        self.view: RunView | None = None
        """How the run stood at the last heartbeat."""
        self._heard = 0.0
        """When the heartbeat that has read it began, by the node's clock."""
        self.lock = WatchedLock(f"run {context.name}")
        """Held by a heartbeat, and by whatever changes what there is to keep."""
        self.is_closed = False
        """Whether nothing is kept any more."""
        self.is_gone = False
        """Whether the run is deleted."""
        self.wrong: str | None = None
        """What is wrong with keys of the run in Redis that hold another type."""
        self.ended_in = 0
        """Its last epoch, where it is gone."""
        self._context = context
        self._opening = context.coordinator.opening
        self._channel = context.coordinator.channel
        self._node = context.resources.node
        self._channels = context.resources.channels
        self._deletions = Deletions(context.resources, context.name)
        self._recovery = recovery
        self._shards = shards
        self._memory = memory
        self._dispatch = dispatch
        self._stored = stored
        self._placement = placement
        self._standing = standing
        self._loading = loading
        self._make_shard = make_shard
        self._clock = context.resources.node.clock
        self._gap_since = Stopwatch(self._clock)
        self._expected_seq = 0
        """The newest entry of the log at the last heartbeat."""

    @property
    def epoch(self) -> int:
        """The run's newest that is known here."""
        return self._shards.epoch if len(self._shards) else self.view.number("epoch") if self.view else 0

    @property
    def missing(self) -> list[int]:
        """The shards that nobody owned at the last heartbeat."""
        return self.view.missing() if self.view else []

    @property
    def redis_ms(self) -> int:
        """The time by Redis's clock, in ms since 1970, or a little later; 0 before the first heartbeat."""
        return self.view.now_ms + int(1000 * (self._clock() - self._heard)) if self.view else 0

    def require_open(self) -> None:
        """Raises RunNotFound."""
        if self.is_closed or self.is_gone:
            raise RunNotFound(f"there is no run {self._context.name!r}", run=self._context.name)

    # The heartbeat

    async def keep(self) -> None:
        """A heartbeat: keeps what is owned, takes what is free, and helps the run to open.

        Answers the signals of `recovery`. Raises CoordinatorUnavailable where Redis cannot be reached.
        """
        async with self.lock("a heartbeat"):
            if self.is_closed or self.is_gone:
                return
            with suppress(Fenced, RunNotFound):
                # Where it is fenced, or the run was deleted meanwhile, the next heartbeat learns of that.
                await self._keep()
            # Unless that was an opening under way, whose new state answers those who found Redis behind the old one.
            if self._recovery.must_reopen:
                await self._reopen()

    async def prolong(self) -> None:
        """Prolongs what is owned, and no more, while a heartbeat takes its time."""
        if self.lock.locked() and len(self._shards) and not self.is_closed:
            with suppress(CoordinatorUnavailable):
                await self._opening.heartbeat(self._node, (), {})

    async def _keep(self) -> RunView | None:
        """As `keep`; how the run stands then, None where it is gone."""
        view = await self._heartbeat()
        while view is not None:
            await self._change_owned(view)
            if wanted := await self._placement.wanted(view):
                view = await self._heartbeat(wanted)
                continue
            mine = [self._shards[index] for index in sorted(view.owned_by(self._node.id))]
            if view.phase == "gather" and mine and await self._standing.report(view, mine):
                view = await self._heartbeat()
                continue
            if view.phase == "load" and await self._loading.load(view, mine):
                view = await self._heartbeat()
                continue
            if view.phase == "open":
                self._loading.note_durable(view)
                self._watch_gap()
                await self._even_out(view)
            break
        return view

    async def _heartbeat(self, wanted: Iterable[int] = ()) -> RunView | None:
        wanted = list(wanted)
        while True:
            position = max((shard.core.writer.position for shard in self._shards), default=LogPosition(0, 0))
            is_initialized = any(shard.core.initialized for shard in self._shards)
            began = self._clock()
            view = await self._opening.heartbeat(self._node, wanted, self._fields(), self._applied())
            if view is None:
                last = await self._deletions.last_epoch()
                if last >= max(self._shards.epoch, self._stored.newest_epoch, self._context.origin.first_epoch, 1):
                    self.end(last)
                    await self.drop_all()
                    return None
                await self._opening.gather(self._shards.count)
                continue
            if view.origin.first_epoch > self._context.origin.first_epoch:
                # It was deleted, and another run of its name was created.
                self.end(view.origin.first_epoch - 1)
                await self.drop_all()
                return None
            self.view, self._heard = view, began
            self._context.telemetry.note(view)
            self._note_wrong(view)
            if view.has_lost_key and len(self._shards):
                self._recovery.reopen("Redis has lost what its shards have seen")
            is_behind = view.position < position
            # Initial weights are no entry of the log.
            is_behind |= is_initialized and not view.number("initialized")
            mine = view.owned_by(self._node.id)
            has_failed = any(shard.has_failed for shard in self._shards if shard.index in mine)
            if view.phase == "open" and (is_behind or has_failed):
                await self._opening.gather(self._shards.count, view.generation)
                continue
            if len(self._shards) and self._expected_seq > position.seq:
                # Its message should have come by now.
                self._recovery.catch_up()
            self._expected_seq = view.number("seq")
            return view

    def _note_wrong(self, view: RunView) -> None:
        """Notes and logs which keys hold another type. Where none does any more, what they held is lost."""
        wrong = "; ".join(view.wrong) or None
        if wrong is not None and wrong != self.wrong:
            logger.error("run %s: %s", self._context.name, wrong)
        elif wrong is None and self.wrong is not None and len(self._shards):
            self._recovery.reopen("its keys hold what they should again")
        self.wrong = wrong

    def end(self, epoch: int) -> None:
        """The run is deleted, and this was its last epoch."""
        self.is_gone, self.ended_in = True, epoch

    def _fields(self) -> Mapping[str, str]:
        """What a heartbeat reports of the owned shards: fields of the shards' hash."""
        fields = {}
        for shard in self._shards:
            fields[f"{shard.index}:applied"] = str(shard.core.writer.applied_step)
        telemetry = self._context.telemetry
        if self._shards.has_first and telemetry.loss is not None:
            fields["0:loss"] = repr(telemetry.loss)
        if self._shards.has_first and telemetry.staleness is not None:
            fields["0:staleness"] = repr(telemetry.staleness)
        if self._shards.has_first:
            fields["0:scheduled_lr"] = json.dumps(self._shards[0].core.shard.scheduled_lr)
        return fields

    def _applied(self) -> Mapping[int, LogPosition]:
        """Up to where the owned shards have taken the log: what is behind that may be trimmed."""
        return {
            shard.index: LogPosition(shard.core.writer.epoch, shard.core.writer.taken_seq) for shard in self._shards
        }

    def _watch_gap(self) -> None:
        """Has the run opened again where an entry of the log is lost: a gap that reading the log does not fill."""
        has_gap = any(shard.core.writer.has_gap for shard in self._shards)
        self._gap_since.note({"gap"} if has_gap else set())
        if not has_gap:
            return
        if self._gap_since.age("gap") > _LONGEST_GAP_S:
            self._gap_since.note(set())
            self._recovery.reopen("an entry of the log is lost")
        else:
            self._recovery.catch_up()

    async def _change_owned(self, view: RunView) -> None:
        """Lets go the shards that are another's by now, and begins with those that are this process's."""
        is_resharded = view.count != self._shards.count
        owners = {index: view.field(index, "node") for index in range(view.count)}
        mine = view.owned_by(self._node.id)
        # A shard without an owner in Redis may be kept: no entry can have been committed without its owner.
        lost = [
            index
            for index in sorted(self._shards.indices)
            if is_resharded or owners.get(index) not in (self._node.id, None)
        ]
        if lost:
            if not is_resharded:
                for index in lost:
                    url = view.field(index, "url")
                    logger.warning("run %s: shard %d is taken over by %s", self._context.name, index, url)
            await self._drop(lost)
        self._shards.count = view.count
        for index, token in sorted(mine.items()):
            if index in self._shards:
                self._shards[index].core.token = token
            else:
                self._shards.add(self._make_shard(index, token))
        # Before they load what was decided.
        await self._memory.count()
        self._context.events.shards({index: view.field(index, "url") for index in range(view.count)})
        await self._subscribe()

    async def _subscribe(self) -> None:
        """Listens to the run's channel where what other processes do for it concerns its pushes here."""
        needs_messages = self._shards.is_sharded or (self.view is not None and self.view.run.get("slack", "") != "")
        if len(self._shards) and needs_messages:
            await self._channels.subscribe(self._channel, self._dispatch.on_message)
        else:
            await self._channels.unsubscribe(self._channel, self._dispatch.on_message)

    # Giving up

    async def _even_out(self, view: RunView) -> None:
        """Hands over what this process owns beyond its share, once others have long had room for it."""
        surplus = self._placement.surplus(view)
        if not surplus:
            return
        logger.info("run %s: shard %s is handed over", self._context.name, ", ".join(map(str, surplus)))
        await self._give_up([self._shards[index] for index in surplus])

    async def _give_up(self, given: Sequence[LocalShard]) -> None:
        """Leaves shards on disk, for others to take where they stand. The run takes no pushes meanwhile."""
        view = None
        with suppress(CoordinatorUnavailable, Fenced, RunNotFound):
            if given:
                await self._opening.gather(self._shards.count)
                view = await self._opening.read()
        for shard in given:
            try:
                await self._standing.leave(shard, view)
            except FreestepError as error:
                logger.error("run %s: shard %d could not be written: %s", self._context.name, shard.index, error)
            except Exception:
                logger.exception("run %s: shard %d could not be written", self._context.name, shard.index)
            if shard.index == 0:
                await self._context.history.save()
        with suppress(CoordinatorUnavailable):
            await self._opening.give_up([shard.core.owner() for shard in given])
        await self._drop([shard.index for shard in given])

    async def _drop(self, indices: Iterable[int]) -> None:
        for index in list(indices):
            await self._shards.remove(index)

    async def give_up_all(self) -> None:
        """Leaves what is owned on disk, for others to take. Under `lock`."""
        await self._give_up(list(self._shards))
        await self._channels.unsubscribe(self._channel, self._dispatch.on_message)

    async def drop_all(self) -> None:
        """Lets go of what is owned, as it is."""
        await self._drop(self._shards.indices)
        await self._channels.unsubscribe(self._channel, self._dispatch.on_message)

    # Opening again

    async def _reopen(self) -> None:
        """Answers those who wait for the run to be opened again."""
        error: Exception | None = None
        try:
            # A run that is gone would begin anew.
            self.require_open()
            await self._opening.gather(self._shards.count)
            try:
                view = await self._keep()
            except Fenced:
                view = await self._opening.read()
            if self.is_gone:
                self.require_open()
            if view is None or view.phase != "open":
                error = not_open(self._context.name, view.missing() if view else [])
        except Exception as failure:
            is_told = isinstance(failure, FreestepError)
            error = failure if is_told else ShardUnavailable(f"the run cannot be opened: {failure}")
            if not is_told:
                logger.error("run %s cannot be opened", self._context.name, exc_info=failure)
        self._recovery.reopened(error)

    @asynccontextmanager
    async def opening(self, what: str) -> AsyncIterator[None]:
        """A block that closes the run and says how it is to go on; when the block is left, the run is open again.

        what: for the log. Raises RunNotFound before, ShardUnavailable after it.
        """
        async with self.lock(what):
            self.require_open()
            yield
            with suppress(Fenced):
                await self._keep()
        await self._opened()

    async def _opened(self) -> None:
        """Returns when the run is open. Raises ShardUnavailable."""
        try:
            async with asyncio.timeout(_OPENING_S):
                while True:
                    await self.keep()
                    view = await self._opening.read()
                    if view is not None and view.phase == "open" and view.count == self._shards.count:
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise not_open(self._context.name, self.missing) from None
