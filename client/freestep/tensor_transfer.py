"""Tensors between flat vectors and a run's shards: initial weights, pushes, pulls, and both in one round trip."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from freestep.answers import Pulled, header, receipt, require_checkpoint
from freestep.api.models import Point, Receipt
from freestep.encoders import Encoder
from freestep.errors import ProblemError, UnexpectedResponse
from freestep.flat import Flat
from freestep.in_place_gradient import InPlaceGradient
from freestep.lease import Claim
from freestep.leaving import hold_s
from freestep.responses import Answer
from freestep.sharding import TRANSIENT, PendingCall, ShardClient, ShardedCall
from freestep.wire.manifest import Manifest
from freestep.worker_group import WorkerGroup

__all__ = ["Exchange", "TensorTransfer"]

_MOST_PULLS = 100
"""Attempts at one consistent read; it takes another one only if a shard's request had to be repeated."""
_READ_S = 60.0
"""Seconds for which the service may hold an answer while shards read a checkpoint."""
_APPLY_S = 30.0
"""Seconds to wait for a step that the service has decided on, but may not have applied on every shard yet."""


@dataclass(frozen=True)
class Exchange:
    """An exchange in the background.

    result: waits for it; returns or raises what `Run.exchange` does, again at every call. abandon: stops its retries.
    """

    result: Callable[[], tuple[Receipt, Pulled]]
    abandon: Callable[[], None]


class TensorTransfer:
    """Sends and receives a run's tensors; its methods are those of `Run`.

    path: the run's path. manifest: reads the run's manifest, which only tensors given by name need.
    """

    def __init__(
        self, path: str, shards: ShardClient, worker_group: WorkerGroup, manifest: Callable[[], Manifest]
    ) -> None:
        self._path = path
        self._shards = shards
        self._worker_group = worker_group
        self._manifest = manifest

    def initialize(self, tensors: Mapping[str, Tensor] | Flat) -> None:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        call = ShardedCall("PUT", f"{self._path}/parameters", headers, body=self._as_flat(tensors))
        self._shards.request_all(call, by_this_rank=True)

    def push(self, tensors: Mapping[str, Tensor] | Flat | Encoder, claim: Claim, wait: float) -> Receipt:
        body = tensors if isinstance(tensors, Encoder) else self._as_flat(tensors)
        call = ShardedCall(
            "POST", f"{self._path}/gradients", {**claim.headers(), **_prefer(wait)}, body=body, wait=wait
        )
        merged, _ = self._push(call, by_this_rank=True)
        return merged

    def exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, wait: float
    ) -> tuple[Receipt, Pulled]:
        return self._finish_exchange(self._exchange_call(gradient, claim, into, wait), into)

    def begin_exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, wait: float
    ) -> Exchange:
        call = self._exchange_call(gradient, claim, into, wait)
        pending = self._shards.start(call)
        return Exchange(lambda: self._finish_exchange(call, into, pending), pending.abandon)

    def new_flat(self, dtype: str) -> Flat:
        return Flat(self._manifest(), dtype)

    def pull_into(self, into: Flat, point: Point, min_step: int, wait: float, checkpoint: int | None = None) -> Pulled:
        params: dict[str, str | int] = {"point": point, "dtype": into.arrives, "min_step": min_step}
        patience = wait
        if checkpoint is not None:
            params["checkpoint"] = checkpoint
            patience = max(wait, _READ_S)
        call = ShardedCall("GET", f"{self._path}/parameters", _prefer(wait), params, into=into, wait=patience)
        for _ in range(_MOST_PULLS):
            pulled = self._received(self._shards.request_all(call), into, point, is_newest=checkpoint is None)
            if pulled is not None:
                require_checkpoint(pulled.step, checkpoint)
                return pulled
        raise UnexpectedResponse(f"the shards answered {_MOST_PULLS} times with parts of different steps")

    def _exchange_call(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, wait: float
    ) -> ShardedCall:
        headers = {**claim.headers(), **_prefer(wait, representation=True)}
        return ShardedCall("POST", f"{self._path}/gradients", headers, {"dtype": into.arrives}, gradient, into, wait)

    def _finish_exchange(
        self, call: ShardedCall, into: Flat, pending: PendingCall | None = None
    ) -> tuple[Receipt, Pulled]:
        merged, answers = self._push(call, pending=pending)
        # A service that has no memory free for y answers with the receipt alone, on one shard or on all. Then, and
        # after parts of different steps, the whole of y is pulled: parts of two steps must not be mixed.
        has_y = all(answer.document is None for answer in answers)
        pulled = self._received(answers, into) if has_y else None
        return merged, pulled or self.pull_into(into, "y", merged.step, _APPLY_S)

    def _push(
        self, call: ShardedCall, *, by_this_rank: bool = False, pending: PendingCall | None = None
    ) -> tuple[Receipt, list[Answer]]:
        """Sends a push; an encoder then keeps or drops the residual, as far as the outcome is known."""
        encoder = call.body if isinstance(call.body, Encoder) else None
        try:
            answers = self._shards.request_all(call, by_this_rank=by_this_rank, pending=pending)
        except ProblemError as error:
            # After transient errors the push may have counted all the same: an earlier attempt may have arrived.
            if encoder is not None and not isinstance(error, TRANSIENT):
                encoder.settle(False)
            raise
        merged = Receipt.merged([receipt(answer) for answer in answers])
        if encoder is not None:
            encoder.settle(merged.decision != "dropped")
        return merged, answers

    def _received(
        self, answers: list[Answer], into: Flat, point: Point = "y", *, is_newest: bool = True
    ) -> Pulled | None:
        """The step that all parts are of, after every rank has all of them; None if they are of different steps.

        is_newest: whether it is the run's own, so that its epoch is the run's.
        """
        points = {Pulled.of(answer, point) for answer in answers}
        if len(answers) > 1:
            places = {header(answer, "freestep-cut") for answer in answers}
            if len(points) > 1 or len(places) > 1:
                return None
        (pulled,) = points
        if is_newest:
            self._shards.note_epoch(pulled.epoch)
        self._worker_group.broadcast_shards(into, len(answers))
        return pulled

    def _as_flat(self, tensors: Mapping[str, Tensor] | Flat) -> Flat:
        if isinstance(tensors, Flat):
            return tensors
        flat = Flat(self._manifest())
        flat.fill(tensors)
        return flat


def _prefer(wait: float, *, representation: bool = False) -> dict[str, str]:
    preferences = ["return=representation"] if representation else []
    if wait:
        preferences.append(f"wait={hold_s(wait):g}")
    return {"Prefer": ", ".join(preferences)} if preferences else {}
