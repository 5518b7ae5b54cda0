"""The life of a run in Redis: creation, ownership of its shards, the phases of its opening, deletion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from freestep.errors import RunNotFound
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.run_scripts import DELETED_KEY, DELETION_TIMES_KEY, RUNS_KEY, RunScripts
from freestep_service.coordination.store import Store, reachable
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import CheckpointId, Fenced, LogPosition, Origin, Owner, RunState
from freestep_service.domain.run_view import RunView

__all__ = ["RunOpening", "list_again", "note_deletion", "read_deletion", "read_run", "unlist"]


_LEFT_S = 3600
"""Seconds for which what is left of a deleted run is kept once it is noted, for calls that began before."""


class RunOpening:
    """Creates, opens and deletes one run, and keeps the owners of its shards.

    origin: where the run began, for a Redis that has lost it.
    """

    def __init__(self, scripts: RunScripts, spec: str, policy: Policy, origin: Origin) -> None:
        self._scripts = scripts
        self._origin = origin
        self._spec = spec
        self._rules = self._rules_of(policy)

    def _rules_of(self, policy: Policy | None) -> tuple[str | int, ...]:
        return self._rules if policy is None else (self._spec, *policy.values())

    async def create(self, epoch: int, shards: int) -> str:
        """Returns created, or same or different for a run that exists with this or with another spec."""
        await self._list_run()
        (status,) = await self._scripts.call("create", *self._rules, epoch, *self._origin[1:], shards)
        return str(status)

    async def delete(self, epoch: int, run_id: str = "") -> int:
        """Deletes the run; returns its last epoch, which may be later than `epoch`, the last one that is known here.

        run_id: the only run of the name that may be deleted; empty for any. Raises RunNotFound where another has the
        name. Where this raises CoordinatorUnavailable, Redis may have deleted it all the same: then `read_deletion`
        tells.
        """
        scripts = self._scripts
        status = "leases"
        while status == "leases":
            leases = await self._newest_leases()
            keys = [key for lease in leases for key in (scripts.lease_key(lease), scripts.window_key(lease))]
            keys = [_left_key(scripts), scripts.key("distances"), *keys]
            status, *rest = await scripts.call("delete", epoch, run_id, keys=keys)
        if status == "other":
            raise RunNotFound(f"the run {scripts.run!r} is another than that of the id {run_id!r}", run=scripts.run)
        return int(rest[0])

    async def read(self) -> RunView | None:
        """See `read_run`."""
        return await read_run(self._scripts.store, self._scripts.run)

    async def heartbeat(
        self,
        node: Node,
        wanted: Sequence[int],
        fields: Mapping[str, str],
        applied: Mapping[int, LogPosition] | None = None,
    ) -> RunView | None:
        """Prolongs the ownership of the process's shards and takes the wanted shards that are free.

        fields: what else to keep of its shards, as fields of the shards' hash ("K:applied").
        applied: up to where its shards have applied the log. Entries after that are not trimmed.
        Returns None when there is no such run. Raises DamagedRun.
        """
        positions = {} if applied is None else {str(shard): list(position) for shard, position in applied.items()}
        status, *rest = await self._scripts.call(
            "run_heartbeat", node.id, node.url, node.host, node.ttl_ms, json.dumps(list(wanted)),
            json.dumps(dict(fields)), json.dumps(positions),
        )  # fmt: skip
        if status == "missing":
            return None
        run, shards, now, has_lost_key, *wrong = rest
        return RunView(_pairs(run), _pairs(shards), int(now), bool(has_lost_key), wrong)

    async def gather(
        self,
        shards: int,
        generation: int | None = None,
        resharding: int | None = None,
        exchange: tuple[int, int] | None = None,
        above: int = 0,
    ) -> int:
        """Closes the run to pushes until its shards have reported; returns the generation of the opening.

        generation: the one that is to end; where another has begun since, nothing is changed.
        exchange: a round, and the entry behind which shards are to report what their journals have.
        above: a generation that a shard has loaded; the new one is newer, also where Redis has gone back behind it.
        Raises RunNotFound where the run was deleted.
        """
        arguments = (
            *self._rules,
            shards,
            _or_empty(generation),
            _or_empty(resharding),
            *self._origin,
            " ".join(map(str, exchange or ())),
            above,
        )
        (begun,) = await self._scripts.call("gather", *arguments, keys=[_left_key(self._scripts)])
        if begun == "deleted":
            raise RunNotFound(f"there is no run {self._scripts.run!r}", run=self._scripts.run)
        await self._list_run()
        return int(begun)

    async def report_shard(self, owner: Owner, generation: int, report: str) -> list[str] | None:
        """Reports where a shard stands. Returns all shards' reports, in order, once all are there. Raises Fenced."""
        arguments = (owner.shard, owner.token, generation, report)
        status, *reports = await self._scripts.call("report_shard", *arguments)
        if status == "fenced":
            raise Fenced
        return reports if status == "gathered" else None

    async def open(
        self,
        state: RunState,
        shards: int,
        generation: int,
        target: Mapping[str, Any],
        policy: Policy | None = None,
        durable: CheckpointId | None = None,
    ) -> bool:
        """Writes a state into Redis and has the shards load it; False where another generation has begun.

        target: what shards load, see `Decision.target`. policy: the one in force; None is that of the spec.
        durable: a checkpoint on disk, which is noted where Redis knows of none.
        """
        orders = state.control.orders
        receipts = [text for key, record in state.receipts.items() for text in (key, record.to_json())]
        group = json.dumps(dict(state.group))
        metrics = {
            name: json.dumps([[step, repr(value)] for step, value in steps.items()])
            for name, steps in state.reported.items()
        }
        data = {
            name: {
                "spec": each.spec.model_dump_json(),
                "total": "" if each.spec.total is None else str(each.spec.total),
                "reached": each.reached,
                "open": each.open,
            }
            for name, each in state.data.open_units().items()
        }
        await self._list_run()
        leases = await self._newest_leases()
        (status,) = await self._scripts.call(
            "open", *self._rules_of(policy), shards, state.epoch, state.step, state.seq, int(state.initialized), group,
            json.dumps(leases), generation, json.dumps(dict(target)), json.dumps(metrics),
            json.dumps(dict(state.pushes)), *state.norm_history.texts(), json.dumps(data),
            state.control.text, int(orders.paused), json.dumps(dict(orders.suspended)),
            "" if durable is None else str(durable), "" if durable is None else durable.step, *receipts,
            keys=[
                self._scripts.key("distances"),
                *map(self._scripts.window_key, leases),
            ],
        )  # fmt: skip
        return bool(status == "load")

    async def loaded(self, owner: Owner, generation: int, journal: str = "") -> str:
        """Notes that a shard has loaded its state; returns waiting (for other shards), open or late. Raises Fenced.

        journal: the word of its journal's owner.
        """
        (status,) = await self._scripts.call("loaded", owner.shard, owner.token, generation, journal)
        if status == "fenced":
            raise Fenced
        return str(status)

    async def give_up(self, owners: Iterable[Owner]) -> None:
        """Ends the ownership of shards, so that any process may take them."""
        arguments = [text for owner in owners for text in (owner.shard, owner.token)]
        if arguments:
            await self._scripts.call("give_up_shards", *arguments)

    async def reshard(self, generation: int, shards: int) -> None:
        """Divides the run into another number of shards, once the state of the present ones is on disk."""
        await self._scripts.call("reshard", generation, shards)

    async def initial_weights(
        self, owner: Owner, upload: str, progress: str, patience_ms: int, elements: str, digest: str = ""
    ) -> str:
        """Notes how far a shard is with its part of an upload: coming, staged or withdrawn.

        elements: of the part, as BEGIN-END. digest: of the part's body, once it was received.
        Returns coming, waiting, staged, initialized or already-initialized, see lua/initial_weights.lua.
        Raises Behind, Fenced and ShardUnavailable.
        """
        arguments = (owner.shard, owner.token, upload, *owner.position, progress, patience_ms, elements, digest)
        status, *rest = await self._scripts.call("initial_weights", *arguments)
        if status in ("coming", "waiting", "staged", "initialized", "already-initialized"):
            return str(status)
        self._scripts.refuse(status, rest)

    async def _list_run(self) -> None:
        with reachable():
            await self._scripts.store.client.sadd(RUNS_KEY, self._scripts.run)

    async def _newest_leases(self) -> list[str]:
        with reachable():
            return list(await self._scripts.store.client.hvals(self._scripts.key("workers")))


async def read_run(store: Store, run: str) -> RunView | None:
    """Reads how a run stands; None when Redis does not know it. The time is not read: `now_ms` is 0.

    Raises DamagedRun.
    """
    scripts = RunScripts(store, run)
    with reachable():
        pipeline = store.client.pipeline(transaction=False)
        pipeline.hgetall(scripts.key("run"))
        pipeline.hgetall(scripts.key("shards"))
        fields, shards = await pipeline.execute()
    return RunView(fields, shards, 0) if "spec" in fields else None


async def list_again(store: Store, runs: Sequence[str]) -> None:
    """Lists these runs, as far as Redis has them, where its list lacks them. Raises CoordinatorUnavailable."""
    if not runs:
        return
    with reachable():
        listed = await store.client.smismember(RUNS_KEY, runs)
    for run, is_listed in zip(runs, listed, strict=True):
        # One that was just deleted is not listed again.
        if not is_listed and await read_run(store, run) is not None:
            with reachable():
                await store.client.sadd(RUNS_KEY, run)


async def unlist(store: Store, run: str) -> None:
    """Takes a name off the list that no run has; one that is created meanwhile, `list_again` lists.

    Raises CoordinatorUnavailable.
    """
    with reachable():
        await store.client.srem(RUNS_KEY, run)


async def read_deletion(store: Store, run: str) -> tuple[int, int]:
    """The last epoch of the run of this name that was deleted last, and the largest of those whose names are forgotten.

    0 where Redis knows of none.
    """
    with reachable():
        left = await store.client.get(_left_key(RunScripts(store, run)))
        own, others = await store.client.hmget(DELETED_KEY, run, "")
    return max(int(left or 0), int(own or 0)), int(others or 0)


async def note_deletion(store: Store, run: str, epoch: int, kept: int = 10_000) -> None:
    """Notes the last epoch of a run that was deleted, and takes the run off the list. May be called again.

    kept: how many deletions are known by name. Where another run of the name is there by now, `list_again` lists it.
    """
    key = _left_key(RunScripts(store, run))
    with reachable():
        left = await store.client.get(key)
    # Another deletion may have been since.
    await store.run("note_deletion", [DELETED_KEY, DELETION_TIMES_KEY], run, max(epoch, int(left or 0)), kept)
    with reachable():
        await store.client.expire(key, _LEFT_S)
        await store.client.srem(RUNS_KEY, run)


def _left_key(scripts: RunScripts) -> str:
    """What lua/delete.lua leaves of a run."""
    return scripts.key("deleted")


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _or_empty(number: int | None) -> str:
    return "" if number is None else str(number)
