"""Run: one run of a service, its calls as Python."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from freestep.answers import Pulled, Snapshot, parse, require_checkpoint
from freestep.api.data import DataList, DataStatus
from freestep.api.events import RunEvent
from freestep.api.history import CurveName, History
from freestep.api.models import (
    Checkpoint,
    CheckpointList,
    Lease,
    LeaseList,
    MetricReceipt,
    MetricReport,
    Point,
    Receipt,
    RunSpec,
    RunStatus,
    Topology,
    WorkerEnd,
    WorkerStatus,
)
from freestep.bulk_exchange import Body
from freestep.data_set import DataSet
from freestep.errors import FreestepError, InvalidSpec, MalformedRequest, RunNotFound
from freestep.event_source import EventSource
from freestep.lease import Claim, HeldLease, worker_name
from freestep.responses import Answer
from freestep.service_url import in_path
from freestep.sharding import ShardClient
from freestep.transport import Transport
from freestep.watch import watch
from freestep.wire.manifest import Manifest
from freestep.worker_group import SINGLE_PROCESS, WorkerGroup

if TYPE_CHECKING:
    from torch import Tensor

    from freestep.best_weights import BestWeights
    from freestep.encoders import Encoder
    from freestep.flat import Flat
    from freestep.in_place_gradient import InPlaceGradient
    from freestep.run_state import RunState
    from freestep.tensor_transfer import Exchange, TensorTransfer

__all__ = ["Run"]

_OPENING_S = 60.0
"""Seconds for which the service may hold an answer while shards copy a state, or the run is opened with one."""


class Run:
    """One run of a service, from `Client.run`; it need not exist yet.

    A run of several shards is asked at all owners in parallel, once a call has shown that there are several (`status`,
    `lease`, and others); before that, the service relays requests for the whole model.

    Every call may raise a ProblemError (RunNotFound, Overloaded, ...), ServiceUnreachable or UnexpectedResponse. Safe
    to use from several threads, except that a gradient or a receiving `Flat` belongs to one call at a time.

    Example:
        >>> with freestep.Client("http://127.0.0.1:8000") as client:
        ...     run = client.run("mnist")
        ...     x, step = run.pull("x")

    Args:
        transport: Sends the requests.
        name: The run's name.
        ranks: The processes that are one worker together.

    Raises:
        MalformedRequest: The name is empty, or has a '/'.
    """

    def __init__(self, transport: Transport, name: str, ranks: WorkerGroup = SINGLE_PROCESS) -> None:
        if not name or "/" in name:
            raise MalformedRequest(f"{name!r} is no name of a run, which has a character at least, and no '/'")
        self.name = name
        self._transport = transport
        self._path = f"/v1/runs/{in_path(name)}"
        self._manifest: Manifest | None = None
        self._worker_group = ranks
        self._shards = ShardClient(transport, self._read_status, self._read_topology, ranks)

    @cached_property
    def _tensors(self) -> TensorTransfer:
        # Imported when tensors are needed: torch takes seconds to import.
        from freestep.tensor_transfer import TensorTransfer

        return TensorTransfer(self._path, self._shards, self._worker_group, lambda: self.manifest)

    # Control plane

    @property
    def shares_memory(self) -> bool:
        """Whether large bodies of pushes, and of pulls beside them, go through memory that is shared with the service.

        It is False before the first large push, where the service is on another machine or of another user, and where
        either side has that turned off (`FREESTEP_SHARED_MEMORY`).
        """
        return self._transport.memories.has(self._path)

    @property
    def manifest(self) -> Manifest:
        """The run's tensors in order, with names, shapes and groups; read from the service once."""
        if self._manifest is None:
            self._manifest = Manifest.of(self.status().spec)
        return self._manifest

    def create(self, spec: RunSpec | Mapping[str, Any]) -> RunStatus:
        """Creates the run, or finds it if it exists with the same spec.

        Args:
            spec: The run's optimizer, aggregation and parameters, as a model or as its JSON document.

        Raises:
            RunExists: The run exists with another spec.
            InvalidSpec: The spec is not valid; `extensions["field"]` names the field.
        """
        document = spec.model_dump(mode="json") if isinstance(spec, RunSpec) else dict(spec)
        return self._noted(self._transport.request("PUT", self._path, json=document))

    def status(self) -> RunStatus:
        """The run's step, epoch, spec, workers and moving averages at this moment."""
        return self._noted(self._transport.request("GET", self._path))

    def topology(self) -> Topology:
        """The shards, their owners' URLs, and the shards that have no owner."""
        return self._read_topology(retry=True)

    def reshard(self, shards: int) -> RunStatus:
        """Divides the run into another number of shards, in a new epoch; nothing that was applied is lost.

        Args:
            shards: The new number of shards, 1 to 256.
        """
        document = {"shards": shards}
        return self._noted(self._transport.request("POST", f"{self._path}/reshard", json=document, retry=False))

    def delete(self) -> None:
        """Deletes the run and its checkpoints, and no other that is created under its name meanwhile.

        Raises:
            RunNotFound: There is none.
            CoordinatorUnavailable: The run is as it was, unless only the answer of Redis was lost.
            StorageUnavailable: Files cannot be written or removed: the run is as it was, or it is deleted, and they are
                removed when they can be.
        """
        params = {}
        # One whose status cannot be read may be deleted, too; and one of an older version has no id.
        with suppress(FreestepError):
            if (run_id := self._read_status(retry=False).id) is not None:
                params["id"] = run_id
        self._transport.request("DELETE", self._path, params=params, done_if=RunNotFound)
        self._manifest = None

    def workers(self, lease: str | None = None) -> list[WorkerStatus]:
        """The workers that hold a lease.

        Args:
            lease: The ID of a lease of one's own, which is shown with its worker; those of others are not.
        """
        headers = {"Freestep-Lease": lease} if lease else {}
        return parse(LeaseList, self._transport.request("GET", f"{self._path}/leases", headers=headers)).leases

    def lease(self, worker: str | None = None, ttl_ms: int | None = None) -> HeldLease:
        """Takes a lease, which a background thread renews until it is released.

        Args:
            worker: The worker's name, 1 to 200 characters; None makes a unique one. An older lease of the same worker
                is no longer accepted.
            ttl_ms: Milliseconds after which the lease ends if it is not renewed; None takes the run's `lease_ttl_ms`.
        """
        document: dict[str, Any] = {"worker": worker_name(worker)}
        if ttl_ms is not None:
            document["ttl_ms"] = ttl_ms
        granted = parse(Lease, self._transport.request("POST", f"{self._path}/leases", json=document))
        self._shards.note_epoch(granted.epoch)
        return HeldLease(self._transport, f"{self._path}/leases", granted)

    def report(self, name: str, value: float, step: int, *, epoch: int | None = None) -> MetricReceipt:
        """Reports a metric that was measured at x of a step; the same report counts once.

        The run's status shows it, and `plateau` schedules follow it.

        Args:
            name: The metric's name, 1 to 128 characters.
            value: Its value, finite.
            step: The step of the x at which it was measured.
            epoch: The epoch of that x; None takes the run's current epoch.

        Raises:
            IdempotencyConflict: Another value was reported for this name and step.
            MalformedRequest: The run has not reached the step.
            EpochChanged: `epoch` is not the run's epoch.
        """
        report = MetricReport(name=name, value=float(value), step=step, epoch=epoch)
        document = report.model_dump(exclude_none=True)
        return parse(MetricReceipt, self._transport.request("POST", f"{self._path}/metrics", json=document))

    def set(
        self,
        /,
        *,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        aggregation: Mapping[str, Any] | None = None,
        paused: bool | None = None,
        **optimizer: Any,
    ) -> RunStatus:
        """Changes the run while it trains, from the next entry of its log on; what is not named stays as it is.

        Needs a token of scope admin. Returns when the change is on disk, as far as the run's durability goes.

        Example:
            >>> run.set(lr=1e-3, weight_decay=0.01)
            >>> run.set(groups={"bias": {"lr": 1e-2}})
            >>> run.set(aggregation={"policy": "buffered", "batch": 4})

        Args:
            groups: Hyperparameters of param groups, by the group's name.
            aggregation: Fields of the aggregation; another policy begins with its own values.
            paused: Whether pushes are refused until the run is resumed, see `pause`.
            **optimizer: Hyperparameters of the run's algorithm. Of documents such as `schedule` or `base` the members
                that are named change.

        Raises:
            InvalidSpec: A field is unknown, out of range or cannot be changed; nothing was changed.
            RunNotInitialized: The run has no weights yet.
            StorageUnavailable: The change has counted, and could not be written.
        """
        document: dict[str, Any] = {"optimizer": optimizer, "groups": groups, "aggregation": aggregation}
        document = {name: value for name, value in document.items() if value}
        _require_finite(document)
        if paused is not None:
            document["paused"] = paused
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return self._noted(
            self._transport.request("PATCH", self._path, json=document, headers=headers, wait=_OPENING_S)
        )

    def pause(self) -> RunStatus:
        """Has the run refuse pushes until `resume`; their workers wait. Points can be pulled, and leases go on."""
        return self.set(paused=True)

    def resume(self) -> RunStatus:
        """Has a paused run take pushes again."""
        return self.set(paused=False)

    def end_worker(self, worker: str, *, ban: int | None = None) -> WorkerEnd:
        """Ends a worker's lease: pushes under it are refused, and the units of data that it holds are handed out again.

        Needs a token of scope admin.

        Args:
            worker: The worker's name.
            ban: Whole seconds for which the worker gets no other lease; 0 lifts that. None: it may take another at
                once, as a worker does that finds its lease ended.

        Raises:
            MalformedRequest: `ban` is no whole number, or is out of range; nothing was changed.
            RunNotInitialized: The run has no weights yet, and cannot keep a ban.
        """
        params = {} if ban is None else {"ban": ban}
        path, headers = f"{self._path}/workers/{in_path(worker)}", {"Idempotency-Key": uuid.uuid4().hex}
        answer = self._transport.request("DELETE", path, params=params, headers=headers, wait=_OPENING_S)
        return parse(WorkerEnd, answer)

    def data(self, name: str = "train") -> DataSet:
        """A data set of the run, whose units are handed out to workers; it need not exist yet.

        Args:
            name: Its name: 1 to 64 letters, digits and any of `_.-`.
        """
        return DataSet(self._transport, f"{self._path}/data", name)

    def data_sets(self) -> list[DataStatus]:
        """The data sets of the run, by name."""
        return parse(DataList, self._transport.request("GET", f"{self._path}/data")).data

    def events(
        self, after: str | None = None, *, from_step: int | None = None, follow: bool = True
    ) -> Iterator[RunEvent]:
        """Yields what happens to the run: pushes, reports, leases, epochs, checkpoints, owners of shards.

        Where a stream ends it is asked for again, behind the last event, so none comes twice. What the service does not
        know any more is told of by a `GapEvent`: it keeps the newest 4096 events at least, and after a restart those
        of what it replays. A reader that is behind gets pushes that follow each other as one, with `coalesced`.

        Args:
            after: The `id` of an event, behind which to begin; None begins with the oldest that is kept.
            from_step: Without `after`, begins with this step of the newest epoch.
            follow: Whether to go on with what is yet to happen; else the iterator ends with what has.

        Yields:
            Events by their `kind`: see `freestep.api.events`.

        Raises:
            RunNotFound: The run was deleted, or there is none.
            MalformedRequest: The run has not reached the place `after`.
            ServiceUnreachable: The service was away for longer than the client's `retry_for`.
        """
        return EventSource(self._transport, f"{self._path}/events").events(after, from_step, follow=follow)

    def history(
        self, curves: Sequence[CurveName | Literal["metrics", "milestones"]] | None = None, *, points: int | None = None
    ) -> History:
        """The run's curves from its creation on, over restarts and new owners.

        A curve has at most 512 points. When there would be more, each two neighbours become one, with their mean, the
        least and the largest. Points of later steps in earlier epochs are of weights that the run has given up.

        Args:
            curves: Names of those that are wanted; "metrics" are all reported metrics, "milestones" what else has
                happened (leases, changes, checkpoints, shards, data sets). None takes all.
            points: The most points of a curve, 1 to 512; None takes all.

        Raises:
            MalformedRequest: There is no such curve, or `points` is out of range.
            StorageUnavailable: The service could not read what it has stored of them, and tries again.
        """
        params: dict[str, str | int] = {} if points is None else {"points": points}
        if curves is not None:
            params["curves"] = ",".join(curves)
        return parse(History, self._transport.request("GET", f"{self._path}/history", params=params))

    def keep_best(
        self, metric: str, path: str | os.PathLike[str], *, mode: Literal["max", "min"] | None = None
    ) -> BestWeights:
        """Keeps x of the best value of a metric in a safetensors file: call what it returns with x and the value, which
        is then reported too.

        Args:
            metric: The metric's name, as for `report`.
            path: The file. If it is there, from an earlier `keep_best`, only better values replace it.
            mode: "max": larger values are better; "min": smaller ones. None is "max", and is refused for a metric whose
                name says that it is minimized, such as `val_loss`.

        Raises:
            FreestepError: The file is not of this run, metric and mode, or it is not clear which mode is meant.
            OSError: The file cannot be read.
        """
        # Imported when tensors are needed: torch takes seconds to import.
        from freestep.best_weights import BestWeights

        return BestWeights(self.report, lambda: self.status().id, self.name, metric, Path(path), mode)

    def checkpoint(self) -> Checkpoint:
        """Writes a checkpoint now. Raises StorageUnavailable if it cannot be written."""
        return parse(Checkpoint, self._transport.request("POST", f"{self._path}/checkpoints"))

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are kept, oldest first."""
        return parse(CheckpointList, self._transport.request("GET", f"{self._path}/checkpoints")).checkpoints

    def restore(self, step: int) -> RunStatus:
        """Returns to a checkpoint, in a new epoch: pushes under older leases are refused with EpochChanged.

        Args:
            step: The step of one of `checkpoints`.

        Raises:
            CheckpointNotFound: There is no checkpoint of this step.
        """
        return self._noted(self._transport.request("POST", f"{self._path}/checkpoints/{step}/restore", retry=False))

    # Data plane

    def initialize(self, tensors: Mapping[str, Tensor] | Flat) -> None:
        """Uploads the initial weights.

        Args:
            tensors: One tensor for each of the run's parameters, of its shape and any float dtype, on any device; or a
                flat vector.

        Raises:
            AlreadyInitialized: Another worker was first; pull y instead.
            ManifestMismatch: Names or shapes are not the run's.
        """
        self._tensors.initialize(tensors)

    def push(self, tensors: Mapping[str, Tensor] | Flat | Encoder, claim: Claim, *, wait: float = 0.0) -> Receipt:
        """Pushes a gradient.

        Args:
            tensors: One tensor for each of the run's parameters, of its shape and any float dtype, on any device; or a
                flat vector, or an encoder whose `begin` was called.
            claim: From `HeldLease.claim`. A push that is repeated with the same claim counts once.
            wait: Seconds to wait until the update that an accumulated push is part of has been applied.

        Raises:
            LeaseExpired: The lease has ended; nothing was applied.
            EpochChanged: The run was restored since the lease was granted; nothing was applied.
            NonFiniteGradient: The gradient contains NaN or infinity; nothing was applied.
            IdempotencyConflict: The claim was used for another gradient.
            ManifestMismatch: Names or shapes are not the run's; nothing was sent.
        """
        return self._tensors.push(tensors, claim, wait)

    def exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> tuple[Receipt, Pulled]:
        """Pushes a gradient and receives y of a step not before the receipt's, in one round trip.

        If the service has no memory free for y, it answers with the receipt alone, and y is pulled in a second request.

        Args:
            gradient: A flat vector, an encoder whose `begin` was called, or an in-place gradient.
            claim: From `HeldLease.claim`. An exchange that is repeated with the same claim counts once.
            into: Receives y, in the dtype that it was made for. Undefined after an error.
            wait: Seconds to wait until the update that an accumulated push is part of has been applied.

        Returns:
            The push's receipt, and the epoch and step of y.

        Raises:
            StepNotReached: The push was decided on, but its update was not applied within 30 s. Repeat the exchange
                with the same claim.
            ProblemError: As for `push`.
        """
        return self._tensors.exchange(gradient, claim, into, wait)

    def begin_exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> Exchange:
        """Starts an exchange in the background, on a thread of its own.

        Args:
            gradient: As for `exchange`; must not change until the exchange has its result.
            claim: As for `exchange`.
            into: As for `exchange`; must not be used until the exchange has its result.
            wait: As for `exchange`.

        Returns:
            An exchange whose `result()` waits for it, and returns or raises what `exchange` does.
        """
        return self._tensors.begin_exchange(gradient, claim, into, wait)

    def pull(
        self,
        point: Point = "x",
        *,
        dtype: str = "F32",
        min_step: int = 0,
        wait: float = 0.0,
        checkpoint: int | None = None,
    ) -> tuple[Snapshot, int]:
        """Pulls a point, all of it at one step.

        Args:
            point: "x", the average, for evaluation; "y", where gradients are taken; "z", the base iterate.
            dtype: "F32", "BF16" or "F16", the dtype of the tensors; or "I8": they are sent as int8 and arrive as fp32,
                each element off by at most 1/254 of the largest magnitude in its block of 256.
            min_step: The least step that the point may be of.
            wait: Seconds to wait until the run reaches `min_step`.
            checkpoint: The step of one of `checkpoints`, whose point it is; the run stays where it is. None takes the
                run's newest step.

        Returns:
            The tensors by name, views of one flat vector in host memory, and their step.

        Raises:
            StepNotReached: The run did not reach `min_step` within `wait` seconds.
            RunNotInitialized: The run has no weights yet.
            CheckpointNotFound: There is no checkpoint of this step, or it is damaged.
        """
        flat = self._tensors.new_flat(dtype)
        pulled = self.pull_into(flat, point, min_step=min_step, wait=wait, checkpoint=checkpoint)
        return Snapshot(flat.views, self.name, pulled), pulled.step

    def pull_into(
        self,
        into: Flat,
        point: Point = "x",
        *,
        min_step: int = 0,
        wait: float = 0.0,
        checkpoint: int | None = None,
    ) -> Pulled:
        """Pulls a point into an existing flat vector; as `pull` otherwise.

        Args:
            into: Receives the point, in the dtype that it was made for. Undefined after an error.
            point: As for `pull`.
            min_step: As for `pull`.
            wait: As for `pull`.
            checkpoint: As for `pull`.

        Returns:
            The epoch and step of the point.
        """
        return self._tensors.pull_into(into, point, min_step, wait, checkpoint)

    def watch(
        self, point: Point = "x", *, every: int = 1, dtype: str = "F32", min_step: int = 0
    ) -> Iterator[tuple[int, Snapshot]]:
        """Yields a point whenever it is a new one: at first the newest, then, as soon as there is one, the newest that
        is at least `every` steps after the last. Leave the loop with `break`.

        Takes no lease, so workers do not wait for the reader, and points that come while the loop's body runs are
        passed over. When the run goes back to an earlier step, or is resharded, its newest point is yielded at once,
        with another `epoch`. A run that has no weights yet is waited for.

        Args:
            point: As for `pull`.
            every: The fewest steps between two points, at least 1.
            dtype: As for `pull`.
            min_step: The least step of the first point.

        Yields:
            The step, and the point's tensors in memory of their own.

        Raises:
            RunNotFound: The run was deleted, even if another has its name since, or there is none.
            ServiceUnreachable: The service was away for longer than the client's `retry_for`.
            ValueError: `every` is below 1.
        """
        if every < 1:
            raise ValueError(f"every is a number of steps from 1, not {every}")

        def pull_into(flat: Flat, min_step: int, wait: float) -> Snapshot:
            return Snapshot(flat.views, self.name, self.pull_into(flat, point, min_step=min_step, wait=wait))

        return watch(lambda: self._tensors.new_flat(dtype), pull_into, lambda: self.status().id, every, min_step)

    def export_state(self, *, checkpoint: int | None = None) -> RunState:
        """The run's whole state at its newest step: every vector of its optimizer, and all scalars.

        Pushes that are accumulated for an update to come are not in it, nor are receipts and leases.

        Args:
            checkpoint: The step of one of `checkpoints`, whose state it is; the run stays where it is. None takes the
                run's newest step.

        Raises:
            RunNotInitialized: The run has no weights yet.
            CheckpointNotFound: There is no checkpoint of this step, or it is damaged.
        """
        from freestep.run_state import IncomingState

        incoming = IncomingState()
        self._transport.request(
            "GET",
            f"{self._path}/state",
            params=None if checkpoint is None else {"checkpoint": checkpoint},
            # A StateReceiver is no Receiver, but does for an answer what one does.
            into=cast(Any, incoming),
            wait=_OPENING_S,
        )
        state = incoming.state()
        require_checkpoint(state.step, checkpoint)
        return state

    def import_state(self, state: RunState, *, replace: bool = False, at: Pulled | None = None) -> RunStatus:
        """Gives the run a whole state, and creates the run with the state's spec if there is none.

        Returns when the state is durable, as far as the run's durability goes. The run may have another number of
        shards than the state's spec.

        Args:
            state: From `export_state`, `RunState.load`, or `freestep.import_state` of a local optimizer.
            replace: Whether a run that has weights gets this state in their place, in a new epoch; its workers join
                again.
            at: Replaces them only while the run is at this epoch and step.

        Raises:
            AlreadyInitialized: The run has weights, and `replace` is False.
            EpochChanged: The run has moved on from `at`. Nothing was changed.
            RunExists: The run has another spec.
            InvalidSpec: The service has no memory for the run.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        if at is not None:
            headers["If-Match"] = f'"e{at.epoch}-s{at.step}"'
        answer = self._transport.request(
            "PUT",
            f"{self._path}/state",
            headers=headers,
            params={"replace": "true"} if replace else None,
            body=Body(state.body()),
            wait=_OPENING_S,
        )
        return self._noted(answer)

    def overwrite(self, weights: Mapping[str, Tensor] | Flat) -> RunStatus:
        """Makes weights the run's: x, y and z are then these, in a new epoch; the rest of its state stays.

        Moves the whole state twice.

        Args:
            weights: As for `initialize`.

        Raises:
            EpochChanged: The run has moved on meanwhile; nothing was changed.
            ManifestMismatch: Names or shapes are not the run's; nothing was changed.
        """
        state = self.export_state()
        state.set_weights(weights)
        return self.import_state(state, replace=True, at=Pulled(state.epoch, state.step))

    def _noted(self, answer: Answer) -> RunStatus:
        status = parse(RunStatus, answer)
        self._manifest = Manifest.of(status.spec)
        self._shards.note_epoch(status.epoch, status.shards)
        return status

    def _read_status(self, retry: bool) -> RunStatus:
        status = parse(RunStatus, self._transport.request("GET", self._path, retry=retry))
        self._manifest = Manifest.of(status.spec)
        return status

    def _read_topology(self, retry: bool) -> Topology:
        return parse(Topology, self._transport.request("GET", f"{self._path}/topology", retry=retry))


def _require_finite(document: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InvalidSpec for what JSON has no number for."""
    for section, changes in document.items():
        for name, value in changes.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                field = f"{section}.{name}"
                raise InvalidSpec(f"{field}: must be finite", field=field) from None
