"""A parent's run as one of its regions sees it: created or found, pushed to under one claim a round, and pulled from.

The law of this file: a claim is in the region's file before it is sent, and is sent until its outcome is known, so that
a round counts at most once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freestep.answers import Pulled
from freestep.api.models import Receipt, RunSpec, RunStatus
from freestep.encoders import Encoder
from freestep.errors import (
    AlreadyInitialized,
    DtypeOverflow,
    EpochChanged,
    FreestepError,
    LeaseExpired,
    ManifestMismatch,
    RunExists,
    RunNotFound,
    RunNotInitialized,
    StepNotReached,
)
from freestep.flat import Flat
from freestep.gradients import PushFormat, push_body
from freestep.groups import validated
from freestep.lease import Claim, HeldLease
from freestep.leaving import raise_if_leaving
from freestep.own_name import OwnName
from freestep.region_place import Place
from freestep.run import Run
from freestep.update_wait import FIRST_WAIT_S, log_update_wait

__all__ = ["Parent"]

logger = logging.getLogger("freestep")

_DEFAULTS: dict[str, Any] = {"algorithm": "diloco", "lr": 1.0, "momentum": 0.5}
"""Of a run that a region creates; docs/guides/regions.md has why."""
_AGGREGATION = {"policy": "sync", "max_staleness": 1}
"""Regions train on while a push travels, so a round is one step stale."""
_WAIT_S = 30.0


class Parent:
    """A parent's run.

    optimizer, aggregation, options: of the spec that it is created with, as for Region. pull_dtype: that in which its y
    comes.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Mapping[str, Any],
        aggregation: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        push_format: PushFormat,
        pull_dtype: str,
    ) -> None:
        self.run = run
        self.push_format = push_format
        self.lease: HeldLease | None = None
        self._is_resting = False
        self._name = OwnName[HeldLease](run, "give each region a name of its own")
        is_default = optimizer.get("algorithm", _DEFAULTS["algorithm"]) == _DEFAULTS["algorithm"]
        given, policy = dict(aggregation or {}), _AGGREGATION if is_default else {"policy": "async"}
        self._wanted = {
            "optimizer": {**_DEFAULTS, **optimizer} if is_default else dict(optimizer),
            "aggregation": given if "policy" in given else {**policy, **given},
            **options,
        }
        self._pull_dtype = pull_dtype
        self._into: Flat | None = None

    def find(self, spec: RunSpec, *, creates: bool) -> RunStatus:
        """The run, perhaps created for a region of this spec. Raises ManifestMismatch, and RunNotFound otherwise."""
        status = self._find_or_create(spec) if creates else self.run.status()
        here, there = ([(each.name, each.shape) for each in one.parameters] for one in (spec, status.spec))
        if here != there:
            raise ManifestMismatch(
                f"the parent's run {self.run.name!r} has other parameters than the region's, or in another order"
            )
        return status

    def _find_or_create(self, spec: RunSpec) -> RunStatus:
        try:
            return self.run.status()
        except RunNotFound:
            parameters = [{"name": each.name, "shape": each.shape} for each in spec.parameters]
            try:
                return self.run.create(validated(RunSpec, {**self._wanted, "parameters": parameters}))
            except RunExists:
                return self.run.status()

    def pull_or_initialize(self, weights: Mapping[str, Tensor]) -> Pulled:
        """Pulls y; a run that has no weights yet gets these."""
        try:
            return self.pull()
        except RunNotInitialized:
            try:
                self.run.initialize(weights)
            except AlreadyInitialized:
                logger.debug("another region uploaded the weights of the run %s first", self.run.name)
            return self.pull()

    def pull(self) -> Pulled:
        """Pulls y, which `y` then is."""
        return self.run.pull_into(self._received, "y")

    @property
    def _received(self) -> Flat:
        if self._into is None:
            self._into = Flat(self.run.manifest, self._pull_dtype)
        return self._into

    @property
    def y(self) -> Tensor:
        """The y that was received last, as fp32 [numel], a copy."""
        return self._received.vector.float().clone()

    # Leases

    def join(self, worker: str) -> None:
        """Takes a region's lease, and memory for its pushes."""
        self._gradient, self._body = push_body(self.run.manifest, self.push_format)
        self.lease = self._name.take_lease(worker)

    @property
    def held(self) -> HeldLease:
        """The lease, once `join` was called; another one after a rest."""
        self.wake()
        assert self.lease is not None
        return self.lease

    def rest(self) -> None:
        """Releases the lease until `wake`."""
        if self.lease is not None and not self._is_resting:
            self._is_resting = True
            self.lease.release()

    def wake(self) -> None:
        """Takes a lease again after a rest."""
        if self.lease is not None and self._is_resting:
            self.lease = self._name.take_lease(self.lease.granted.worker)
            self._is_resting = False

    def pull_newest(self) -> Pulled:
        """Pulls y as `pull` does, and has a lease of its epoch then."""
        pulled = self.pull()
        while pulled.epoch != self.held.granted.epoch:
            self._join_again()
            pulled = self.pull()
        return pulled

    def _join_again(self) -> None:
        """Takes a lease in the run's epoch, in place of one that may be of an earlier.

        Raises WorkerNameTaken where another process has taken the region's name.
        """
        before = self.held
        self._name.require(before.granted.worker, before.granted.lease)
        self.lease = self._name.take_lease(before.granted.worker)
        before.release()

    def leave(self) -> None:
        """Releases the lease."""
        if self.lease is not None:
            self.lease.release()

    # Pushes

    def push(self, place: Place, save: Callable[[Place], Place]) -> tuple[Receipt, Pulled, Tensor | None]:
        """Pushes what a place has sent, under its claim or one that replaces it; `y` is then what came back.

        save: writes a place.

        Returns the receipt, the epoch and step of y, and what encodings have left out, None for none. Raises
        EpochChanged where the run went back to an earlier step; then the push does not count. Raises DtypeOverflow
        where the place has a value that F16 cannot hold, and is then one of before the push; and where y has one, which
        leaves the place as it is: the push may have counted.
        """
        self._fill(place)
        status = self.run.status()
        place.require_runs(parent=status)
        try:
            self._body.parts(status.shards)
        except DtypeOverflow:
            # Nothing was sent. The round goes on, with an update at least, for a process that pushes another dtype.
            save(place.after(stage="training", run_step=place.run_step - 1, sent=None))
            raise
        policy = status.in_force.aggregation
        while True:
            raise_if_leaving()
            claim = Claim(place.lease, place.token, place.oldest, loss=place.loss, key=place.key)
            try:
                wait = FIRST_WAIT_S if policy.takes_one_each else 0.0
                receipt, pulled = self.run.exchange(self._body, claim, self._received, wait=wait)
            except StepNotReached:
                # Its receipt came without y, and its update is late: the same claim gets the receipt again.
                continue
            except LeaseExpired:
                place = save(self._claimed_again(place))
                continue
            if policy.takes_one_each and receipt.decision == "accumulated" and pulled.step <= receipt.step:
                pulled = self._await_update(place.epoch, receipt.step + 1)
            if pulled.epoch != place.epoch:
                raise EpochChanged("the parent's run went back to an earlier step")
            residual = self._body.residual.clone() if isinstance(self._body, Encoder) else None
            return receipt, pulled, residual

    def _fill(self, place: Place) -> None:
        if place.push_format != self.push_format.text:
            raise FreestepError(
                f"a push is under way as {place.push_format}, and as {self.push_format.text} it would be another: end "
                "that round with the options that it was begun with"
            )
        assert place.sent is not None
        torch.sub(place.base, place.sent, out=self._gradient.vector)
        if isinstance(self._body, Encoder):
            self._body.residual = torch.zeros_like(place.base) if place.residual is None else place.residual
            self._body.begin()

    def _claimed_again(self, place: Place) -> Place:
        """A push was not applied and will not be under its lease; in the same epoch its round is still good."""
        if self.held.granted.lease == place.lease:
            self._join_again()
        granted = self.held.granted
        if granted.epoch != place.epoch:
            raise EpochChanged("the parent's run went back to an earlier step")
        return place.after(lease=granted.lease, token=granted.token)

    def _await_update(self, epoch: int, step: int) -> Pulled:
        """Pulls y of the update that a push is part of."""
        while True:
            raise_if_leaving()
            try:
                return self.run.pull_into(self._received, "y", min_step=step, wait=_WAIT_S)
            except StepNotReached:
                status = self.run.status()
                policy = status.in_force.aggregation
                if status.epoch != epoch or not policy.takes_one_each:
                    return self.pull()
                log_update_wait(self.run.name, step, policy, self.run.workers)
