"""An optimizer's steps: how a gradient becomes a push, and what follows of each answer.

The law of this file: each gradient is one push, which is sent under one claim until its outcome is known, so that it
counts at most once; and units of data share the outcome of the gradient that was taken on them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Receipt
from freestep.errors import (
    EpochChanged,
    LeaseExpired,
    MalformedTensors,
    NoGradients,
    NonFiniteGradient,
    RunNotInitialized,
    StepNotReached,
    UnitNotHeld,
)
from freestep.inflight_push import InflightPush, require_stale_gradients_accepted
from freestep.joined_optimizer import JoinedOptimizer
from freestep.leaving import is_leaving, raise_if_leaving
from freestep.taken_units import TakenUnit, by_name
from freestep.uncompiled import uncompiled
from freestep.update_wait import FIRST_WAIT_S, log_update_wait
from freestep.worker_group import Batch, finite

__all__ = ["PushingOptimizer"]

logger = logging.getLogger("freestep")


class PushingOptimizer(JoinedOptimizer):
    """A worker that pushes the gradients of its model, one push a step, and loads the y that answers it."""

    @property
    def receipt(self) -> Receipt | None:
        """The receipt of the last push that was answered."""
        return self._progress.receipt

    @property
    def loss(self) -> float | Tensor | None:
        """The mean training loss that the next push reports if `step` is given none; None once it was pushed.

        Set it on this optimizer: on what Accelerate, for example, has wrapped around it, it has no effect.
        """
        return self._progress.loss

    @loss.setter
    def loss(self, loss: float | Tensor | None) -> None:
        self._progress.loss = loss

    @uncompiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
        overlap: bool = False,
        allow_empty: bool = False,
    ) -> float | None:
        """Pushes the gradients and loads fresh y; the push's receipt is then in `receipt`.

        Parameters without a gradient push zeros. Under the policies `sync` and `quorum`, and under robust rules that
        compare pushes, it returns when the update that the push is part of has been applied. A push that the run no
        longer accepts, since it was restored to an earlier step for example, is dropped: the run is joined again at its
        newest y, and the receipt's reason says why.

        Args:
            closure: Computes the loss and the gradients, and returns the loss. Nothing is pushed if it returns None and
                leaves no gradients, as Lightning's does for a batch that is skipped.
            loss: The batch's mean training loss, which the run's status shows; None takes the attribute `loss`, else
                the closure's. One that is NaN or infinite is not reported: whether the push counts is its gradient's.
            samples: The batch's size, the weight of this gradient in the mean of a group; None weighs 1.
            overlap: Returns at once, while the push is sent in the background; the gradients are copied before. The
                next `step` first waits for the answer and loads the y that came with it, so gradients are one step
                staler, and `receipt` is that of the push before. `flush`, `eval`, `state_dict`, `load_state_dict` and
                `close` wait for it too. The call that waits raises the push's error, and `step` does so before it
                pushes anything. A push that was refused is over then; one whose outcome is unknown stays in flight and
                is sent again by the next of these calls, under the same key, so that it counts once. If the run went
                back to an earlier step, gradients that were to follow that push are dropped too.
            allow_empty: Pushes zeros where no parameter has a gradient: weight decay and averaging go a step on.

        Returns:
            The closure's loss, or None.

        Raises:
            EvalMode: The model contains x, or kept weights; call `train` first.
            ManifestMismatch: A parameter of the run was frozen, or a frozen one has a gradient.
            NoGradients: No parameter has a gradient.
            Closed: The optimizer was closed.
            NonFiniteGradient: The gradients contain NaN or infinity, or the loss is, which the algorithm needs; nothing
                was applied.
            ValueError: `overlap` is set, and the run's policy drops gradients that are one step stale; or the loss is a
                tensor of several elements.
            StorageUnavailable: The disk of the run's journal is full; nothing was applied.
            ServiceUnreachable: The service did not answer in time; it is unknown whether the push counted.
        """
        raise_if_leaving()
        self._require_open()
        self._require_mean(loss)
        self._cautions.before_step(self.param_groups)
        self._warn_of_changed_weights()
        self._discard_cut()
        if overlap:
            require_stale_gradients_accepted(self._aggregation)
        taken_at, result, had_closure = self.loaded, None, closure is not None

        def evaluate() -> None:
            nonlocal closure, result
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
                closure = None

        def prepare() -> Batch:
            evaluate()
            self._require_y("step")
            self._gradients.gather(copy=overlap)
            if not allow_empty:
                self._gradients.require_any()
            reported = self._take_loss(loss, result)
            known = finite(reported)
            if known is None and reported is not None and self.spec.optimizer.needs_loss:
                raise NonFiniteGradient(
                    f"the loss is {float(reported)}, and {self.spec.optimizer.algorithm} takes its steps by it"
                )
            return Batch(None if samples is None else float(samples), known)

        if self._progress.inflight is not None:
            # The closure is evaluated while the push is being sent.
            self._worker_group.run_on_all(evaluate)
            self.flush()
        try:
            batches = self._worker_group.run_on_all(prepare)
        except NoGradients:
            if had_closure and result is None and self._worker_group.size == 1:
                return None
            raise
        if self._progress.has_discarded and not self._gradients.are_left():
            self._drop_with_units(self._progress.units.take(self._run.name))
        else:
            self._push(self._progress.taken_at or taken_at, self._gradients.average(batches), overlap)
        self._progress.taken_at, self._progress.has_discarded = None, False
        self._gradients.note_done()
        return result

    def _note_where_taken(self) -> None:
        """Notes where the gradients that no push has were taken: the model leaves that y."""
        if self.loaded.point == "y" and self._progress.taken_at is None:
            are_left = self._worker_group.run_on_first(self._gradients.are_left)
            self._progress.taken_at = self.loaded if are_left else None

    def _require_mean(self, loss: float | Tensor | None) -> None:
        """Raises ValueError where the loss that a step is given, or that was set, has not one element."""
        for each in (loss, self.loss):
            if isinstance(each, Tensor) and each.numel() != 1:
                raise ValueError(f"the loss is a tensor of shape {list(each.shape)}: give the batch's mean")

    def _take_loss(self, loss: float | Tensor | None, result: float | None) -> float | Tensor | None:
        """The loss that a step reports: its argument, else the one that was set, else its closure's."""
        reported = next((each for each in (loss, self.loss, result) if each is not None), None)
        self.loss = None
        return reported

    def _push(self, taken_at: Pulled, batch: Batch, overlap: bool) -> None:
        units = self._progress.units.take(self._run.name)
        if taken_at.epoch < self._membership.granted.epoch:
            # The push before this one, which was in flight, found the run in a new epoch.
            self._rejoin("epoch-changed")
            return
        if any(unit.lease.lease != self._membership.granted.lease for unit in units):
            self._drop_with_units(units)
            return
        push = InflightPush(taken_at, batch, self._membership.claim(taken_at, batch, by_name(units)), units)
        if overlap:
            # Where it cannot be started, as while nobody says where the shards are, it is sent by who waits for it.
            self._progress.inflight = push
            push.start(
                self._run.begin_exchange(self._gradients.body, push.claim, self._receive_buffer, wait=self._waits)
            )
            return
        try:
            self._finish_push(push)
        except BaseException as error:
            if push.is_unresolved(error):
                self._progress.units.restore(units)
            else:
                self._open_units(push, error)
            raise

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for the answer to a push in flight and loads its y; does nothing if there is none.

        Collective over the ranks of a process group.

        Raises:
            FreestepError: What the push failed with, as `step` describes.
            Closed: A push is in flight, and this is a fork of the process that made the optimizer.
        """
        if self._progress.inflight is not None:
            self._require_open()
        if (push := self._progress.inflight) is not None:
            try:
                self._finish_push(push)
            except Exception as error:
                if push.is_unresolved(error):
                    push.resend()
                else:
                    self._progress.inflight = None
                    self._open_units(push, error)
                raise
            self._progress.inflight = None

    def _finish_push(self, push: InflightPush) -> None:
        """Waits for a push's answer, sends it again if that may help, and loads its y."""
        self._guard.suspend()
        while True:
            exchange = partial(
                self._run.exchange, self._gradients.body, push.claim, self._receive_buffer, wait=self._waits
            )
            try:
                receipt, pulled = push.answer(exchange)
            except StepNotReached:
                # Its receipt came without y, and its update is late. The same claim gets the receipt again, or a
                # refusal if the run was restored meanwhile.
                push.resend()
                continue
            except LeaseExpired:
                # It was not applied and will not be under that lease; in the same epoch the gradient is still good.
                self._membership.replace_lost_lease()
                if self._membership.granted.epoch == push.taken_at.epoch:
                    if push.units:
                        self._drop_with_units(push.units)
                        return
                    push.renew(self._membership.claim(push.taken_at, push.batch))
                    continue
                self._rejoin("epoch-changed")
            except (EpochChanged, RunNotInitialized) as error:
                self._rejoin(error.slug)
            except UnitNotHeld:
                self._drop_with_units(push.units)
            else:
                self._progress.receipt = receipt
                self._load_received(pulled, came_with_push=True)
                if receipt.reason == "duplicate-worker" and not self._waits:
                    # The policy was changed meanwhile.
                    self._read_policy()
                if self._waits and (receipt.decision == "accumulated" or receipt.reason == "duplicate-worker"):
                    self._await_update(receipt.step + 1, has_waited=receipt.decision == "accumulated")
            return

    @property
    def _waits(self) -> float:
        """Seconds for which a push waits for its update; 0 where none does, or the process leaves."""
        return FIRST_WAIT_S if self._aggregation.takes_one_each and not is_leaving() else 0.0

    @property
    def _aggregation(self) -> AggregationSpec:
        """The policy in force."""
        return self._progress.aggregation or self.spec.aggregation

    def _read_policy(self) -> None:
        self._progress.aggregation = self._worker_group.run_on_first(lambda: self._run.status().in_force.aggregation)

    def _await_update(self, step: int, *, has_waited: bool) -> None:
        """Loads y of an update that others' pushes are missing for. has_waited: whether the push has waited for it."""
        wait = None if has_waited else FIRST_WAIT_S
        while True:
            if wait is None and self._worker_group.rank == 0:
                log_update_wait(self._run.name, step, self._aggregation, self._run.workers)
            try:
                self._load("y", min_step=step, wait=wait)
                return
            except StepNotReached:
                wait = None
                if self._membership.is_lost():
                    self._rejoin("lease-expired")
                    return
                # It may have been changed to one that has nobody wait.
                self._read_policy()
                if not self._waits:
                    self._load("y")
                    return

    def _rejoin(self, reason: str) -> None:
        self._membership.replace_lost_lease()
        logger.warning("the run %s dropped a push (%s) and is joined again", self._run.name, reason)
        self._load_first()
        self._note_dropped(reason)

    def _note_dropped(self, reason: str) -> None:
        self._progress.receipt = Receipt(decision="dropped", reason=reason, step=self.loaded.step, staleness=0)

    def _regain_lease(self) -> None:
        """Takes a lease in place of one that has ended, and y where the run has gone back meanwhile.

        Discards what no push has: others are handed the units that it was taken on, those of which it has a part too.
        """
        self.flush()
        self._membership.replace_lost_lease()
        self._discard_unpushed()
        if self._membership.granted.epoch != self.loaded.epoch:
            self._load_first()

    def _discard_unpushed(self) -> None:
        """Discards what no push has, since the lease of this worker has ended."""
        self._discard_gradients("the lease of this worker has lost its units of data")

    def _discard_cut(self) -> None:
        """Discards gradients that are in part of a unit of data which was given back."""
        if self._progress.has_part:
            self._progress.has_part = False
            self._discard_gradients("the loop over the data was left in the middle of a unit")

    def _discard_gradients(self, why: str) -> None:
        """Sets gradients to zero that no push has."""
        if self._gradients.are_left():
            logger.warning(
                "gradients that the run %s has not had are discarded, since %s: what they were taken on is handed "
                "out again",
                self._run.name,
                why,
            )
            # A GradScaler does not take a step without any gradient.
            self.zero_grad(set_to_none=False)
            self._progress.has_discarded = True

    # Units of data

    @property
    def _has_units(self) -> bool:
        """Whether there are units of data that no push has named."""
        return self._progress.units.has_any()

    def _note_units(self, units: Sequence[TakenUnit]) -> None:
        """Notes that the next gradient is taken on units; none where a unit that goes on is in it."""
        self._progress.units.add(units, self._gradients.versions())

    def _drop_with_units(self, units: Sequence[TakenUnit]) -> None:
        """Drops a gradient some of whose units others have by now, and have perhaps counted."""
        logger.warning(
            "a push to the run %s is dropped, since this worker no longer has units of data that its gradient was "
            "taken on: they are handed out again",
            self._run.name,
        )
        self._progress.units.give_back(unit for unit in units if unit.lease.lease == self._membership.granted.lease)
        self._load("y")
        self._note_dropped("unit-not-held")

    def _open_units(self, push: InflightPush, error: BaseException) -> None:
        """Gives back the units of a push that was refused, unless the service has opened them itself."""
        if not isinstance(error, (NonFiniteGradient, MalformedTensors)):
            self._progress.units.give_back(push.units)

    def _give_back_used(self, gradients: Iterable[tuple[int, int]]) -> None:
        """Gives back the units whose gradients are discarded; `gradients` are their versions before."""
        if used := self._progress.units.drop_used(gradients):
            self._progress.units.give_back(used)

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; units of data whose gradients no `step` has pushed are given back.

        Args:
            set_to_none: As for any torch optimizer.
        """
        if self._has_units:
            self._give_back_used(self._gradients.versions())
        super().zero_grad(set_to_none)
        self._progress.taken_at, self._progress.has_discarded, self._progress.has_part = None, False, False
        self._gradients.note_done()
        if self._has_units:
            self._progress.units.note_cleared(self._gradients.versions())

    # Until when it is open

    def close(self) -> None:
        """Waits for a push in flight, as `flush` does, and releases the lease; the model is not changed.

        After SIGTERM, where `leave_on_sigterm` says so, it does not wait.
        """
        if is_leaving():
            self._abandon_push()
        try:
            if self._process == os.getpid():
                self.flush()
        finally:
            self._progress.inflight = None
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the optimizer; after an error in the block, without waiting for a push in flight."""
        if error is not None:
            self._abandon_push()
        super().__exit__(kind, error, trace)

    def _abandon_push(self) -> None:
        if self._progress.inflight is not None:
            self._progress.inflight.abandon()
            self._progress.inflight = None
