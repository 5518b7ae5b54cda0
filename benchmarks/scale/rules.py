"""A run's decisions over simulated time, made by the code that makes them in a service.

Whether a push is admitted, what it becomes, which units it counts and what staleness is expected next is decided by
`freestep_service` alone: by the scripts of coordination/lua, in a real Redis, through the calls that a shard's owner
makes, and by `Expectation`, `damping` and `DataSets` of domain/. A simulation says only when a call is made.

The run in Redis has one shard, whatever is simulated: the decision on a push is the same, and what it costs Redis for
several is in the costs (`store_costs`). Redis's clock is no simulated one, so leases are made for long, and where one
would run out in simulated time, it is released.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from freestep.api.data import DataSpec
from freestep.api.models import Lease, RunSpec
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.embedded import embedded_store
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.pipeline import RedisPipeline
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy, damping
from freestep_service.domain.data_sets import DataSets, NewDataSet
from freestep_service.domain.delay import Expectation
from freestep_service.domain.opening import Report
from freestep_service.domain.records import CheckpointId, Claim, LogPosition, Owner, Record, RunState, StagedPart

__all__ = ["DATA", "Desk", "Rules", "opened_desk"]

T = TypeVar("T")

DATA = "simulated"
"""The data set of a run that has one."""

_TTL_MS = 24 * 3_600_000
_AT_ONCE = 32
"""Calls that are sent to Redis together."""
_NODE = Node("http://127.0.0.1:1", _TTL_MS)


class _OneConnection:
    """Sends a store's commands one by one and waits: turns of an event loop would be most of what a call takes."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url, decode_responses=True, single_connection_client=True)

    async def execute(self, *command: str | int) -> Any:
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        self._client.close()


class Desk:
    """A Redis in which simulated runs are, and the loop on which it is asked."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        pipeline = cast("RedisPipeline", _OneConnection(url))
        self.store = Store(AsyncRedis.from_url(url, decode_responses=True), url, pipeline)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    @staticmethod
    def do_at_once(work: Coroutine[Any, Any, T]) -> T:
        """Does what awaits scripts alone, without the loop."""
        try:
            work.send(None)
        except StopIteration as end:
            value: T = end.value
            return value
        raise RuntimeError("it waits for something else than a script")

    def clear(self) -> None:
        """Forgets all runs."""
        self.do(self.store.client.flushall())

    def close(self) -> None:
        self.do(self.store.close())
        self._runner.close()


@contextmanager
def opened_desk() -> Iterator[Desk]:
    """A desk with a Redis of its own."""
    with tempfile.TemporaryDirectory(prefix="freestep-scale-") as folder, embedded_store(Path(folder)) as url:
        desk = Desk(url)
        try:
            yield desk
        finally:
            desk.close()


class _Saved(NamedTuple):
    """What a checkpoint has of a run."""

    step: int
    seq: int
    data: DataSets
    expected: float
    effective: float
    counted: int


class Rules:
    """The run of one simulation. Workers are called by their names."""

    def __init__(self, desk: Desk, spec: RunSpec, units: int = 0, shards: int = 1) -> None:
        """units: of a data set that the run gets, 0 for none. shards: of the run in Redis, see `store_costs`."""
        self.spec = spec
        self.shards = shards
        self.expected = 0.0
        """The staleness, in steps, that the next gradients are expected to have."""
        self.effective = 0.0
        """The sum of what damping has left of the gradients that counted: one for each that counted in full."""
        self.counted = 0
        """Pushes that were applied or accumulated, and not undone."""
        self.step = 0
        self.epoch = 1
        self.data = DataSets()
        self._desk = desk
        self._policy = Policy.of(spec.aggregation)
        self._expectation = Expectation.of(spec)
        self._coordinator = Coordinator(desk.store, uuid.uuid4().hex, "{}", self._policy)
        self._leases: dict[str, Lease] = {}
        self._claims: dict[str, Claim] = {}
        self._attempts: dict[str, str] = {}
        self._position = LogPosition(1, 0)
        self._generation = 0
        self._pushes = 0
        desk.do(self._coordinator.opening.create(1, shards))
        desk.do(self._coordinator.opening.heartbeat(_NODE, tuple(range(shards)), {}))
        self._reopen(RunState(1, initialized=True))
        if units:
            new = NewDataSet(DATA, DataSpec(length=units, unit=1))
            desk.do(self._coordinator.data.create(self._owners[0], new))
            self._position = self._position._replace(seq=self._position.seq + 1)
            self.data.add(new)
        self._saved = self._state()

    def _reopen(self, state: RunState) -> None:
        """Takes the run through the phases of its opening, to a state."""
        do, opening = self._desk.do, self._coordinator.opening
        view = do(opening.read())
        assert view is not None
        self._position = LogPosition(state.epoch, state.seq)
        self._owners = [Owner(shard, view.field(shard, "token") or "", self._position) for shard in range(self.shards)]
        generation = view.number("generation")
        report = Report(state.epoch, state.initialized, CheckpointId(state.epoch, state.step, state.seq)).to_json()
        for owner in self._owners:
            do(opening.report_shard(owner, generation, report))
        target = {"cut": [state.epoch, state.step, state.seq], "live": True}
        assert do(opening.open(state, self.shards, generation, target))
        view = do(opening.read())
        assert view is not None
        for owner in self._owners:
            do(opening.loaded(owner, view.number("generation")))
        self._generation = view.number("generation")

    def _owner(self, shard: int = 0) -> Owner:
        return self._owners[shard]._replace(position=self._position)

    # Leases

    def join(self, workers: Sequence[str]) -> None:
        """Grants leases; older ones of the same names are fenced off."""

        async def granted(some: Sequence[str]) -> list[tuple[Lease, list[str]]]:
            return await asyncio.gather(*(self._coordinator.leases.grant(name, _TTL_MS) for name in some))

        for begin in range(0, len(workers), _AT_ONCE):
            some = workers[begin : begin + _AT_ONCE]
            for name, (lease, _) in zip(some, self._desk.do(granted(some)), strict=True):
                self._leases[name] = lease

    def has(self, worker: str) -> bool:
        """Whether a worker has a lease."""
        return worker in self._leases

    def leave(self, worker: str) -> bool:
        """Ends a lease: its units are open again; whether that has completed an update."""
        lease = self._leases.pop(worker)
        _, ended = self._desk.do(self._coordinator.leases.release(lease.lease, self._position))
        if ended.seq:
            self._position = self._position._replace(seq=ended.seq)
            self.step = ended.step
            self.data.count({}, advance=True)
        return bool(ended.seq)

    # Pushes

    def take_units(self, worker: str, count: int) -> tuple[int, ...]:
        """Units of the data set for a worker's next push, none where none is open."""
        lease = self._leases[worker]
        claimed = self._coordinator.data.claim(self._owner(), lease.lease, lease.token, DATA, count, "")
        return tuple(self._desk.do_at_once(claimed).numbers)

    def admit(self, worker: str, taken_at: int, units: Sequence[int] = ()) -> Record | None:
        """The decision on a push, where its claim alone decides it. Raises Ahead and the refusals of lua/admit.lua."""
        claim = self._claim(worker, taken_at, units)

        async def admitted() -> Record | None:
            # As the owners of all shards do, one after the other.
            for shard in range(self.shards):
                admission = await self._coordinator.pushes.admit(claim, self._owner(shard))
            self._attempts[worker] = admission.attempt
            return admission.record

        return self._desk.do_at_once(admitted())

    def push(self, worker: str, taken_at: int) -> Record:
        """The decision on a push whose claim and body are one call, counted. Raises the refusals of lua/push.lua."""
        claim = self._claim(worker, taken_at)
        pushed = self._coordinator.pushes.push(claim, self._owner(), _part(0), None, self._generation)
        return self._counted(self._desk.do_at_once(pushed)[0])

    def _claim(self, worker: str, taken_at: int, units: Sequence[int] = ()) -> Claim:
        lease = self._leases[worker]
        self._pushes += 1
        marks = {DATA: tuple(units)} if units else {}
        claim = Claim(lease.lease, lease.token, taken_at, f"push-{self._pushes}", units=marks)
        self._claims[worker] = claim
        return claim

    def commit(self, worker: str) -> Record:
        """The decision on a push that was admitted, counted. Raises the refusals of lua/commit.lua."""
        claim, attempt = self._claims[worker], self._attempts[worker]

        async def committed() -> Record:
            for shard in range(self.shards):
                answer = await self._coordinator.pushes.commit(claim, self._owner(shard), _part(shard), None, attempt)
            assert answer is not None
            return answer[0]

        return self._counted(self._desk.do_at_once(committed()))

    def _counted(self, record: Record) -> Record:
        if record.seq:
            self._position = self._position._replace(seq=record.seq)
            self.step = record.step
            self.expected = self._expectation.after(self.expected, record.staleness, record.live)
        if record.decision != "dropped":
            self.counted += 1
            self.effective += damping(self.spec.aggregation, record.staleness, record.live)
            if self.data:
                self.data.count(record.counted, advance=record.decision == "applied")
        return record

    def forget(self, worker: str) -> None:
        """Gives up a push that was admitted and will not come."""
        self._desk.do_at_once(self._coordinator.pushes.discard(self._claims[worker], self._attempts[worker], 0))

    # Checkpoints

    def _state(self) -> _Saved:
        return _Saved(self.step, self._position.seq, self.data.copy(), self.expected, self.effective, self.counted)

    def checkpoint(self) -> None:
        self._saved = self._state()

    def roll_back(self) -> int:
        """Opens the run at its checkpoint, in a new epoch, which ends all leases; how many pushes that has undone."""
        saved = self._saved
        undone = self.counted - saved.counted
        self.epoch += 1
        self._desk.do(self._coordinator.opening.gather(self.shards))
        data = saved.data.without_gathered()
        self._reopen(RunState(self.epoch, saved.step, saved.seq, initialized=True, data=data))
        self.step, self.expected = saved.step, saved.expected
        self.effective, self.counted = saved.effective, saved.counted
        self.data = data.copy()
        self._leases.clear()
        return undone

    def units_done(self) -> int:
        """Units that have counted, as Redis has it."""
        return self._desk.do_at_once(self._coordinator.data.count())[0].done


def _part(shard: int) -> StagedPart:
    return StagedPart(10 * shard, 10 * shard + 10, "digest", 1.0, 40)
