"""Region: a service as a worker of another, for sites whose workers are near each other and far from the rest.

A region is a run at a service of its own, with workers beside it. At the parent's run, far away, it is one worker that
takes local steps, as in DiLoCo (arXiv 2311.08105): a round is H updates of the region's run, and what goes across is a
push and a point a round, however many workers the region has.

The region's optimizer state stays in the region's run. With P the parent's y that the run was moved to last, and y the
region's own, a round is

    push        g = P - y0                      y0: y at the end of the round, while the run trains on
    parent      P' = its next y, by its algorithm and with the rounds of the other regions
    move        y <- y + d, z <- z + d, x <- x + d      d = P' - y0, of all that is a point; moments and scalars stay
    next round  begins at P', with the steps that were taken since y0:  y = P' + (y - y0)

Schedule-Free's update (arXiv 2405.15682) takes combinations with weights that sum to 1 of x, y and z, and adds steps to
them, so it commutes with a common translation d: the run goes on as one whose gradients are taken d further, with its
second moments, its averaging weights and z - y as they were. So does that of every other algorithm here, whose average
is linear in its points; what depends on the place itself is weight decay, which then decays the new place. A gradient
could not do this: it would be scaled by the moments and remain in them.

No call of the API adds a vector to a run, so a move is an export and an import of the run's state. Between the two the
run is paused, and the import begins an epoch: what a worker was computing meanwhile is dropped, its units of data are
handed out again, and it goes on at the new y. The run is paused where no push is gathered for an update, so nothing is
lost that was acknowledged; and no retry counts twice, since the new epoch refuses claims of the one before.

What makes each act count once, whenever the process is killed:

- A push is written to the file, with its vectors and its claim, before it is sent. It is sent again under that claim,
  which finds its receipt. Under a lease that has ended without one it was not applied, and has a new claim.
- The state that is imported has the number of its round, as the metric `region_round`. A run that shows the number has
  been moved. A run that went back to a checkpoint from before the move reports an older one: then what it has made
  is not of this round's P, so it is not pushed, and the run is moved to the parent's y as a whole.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from freestep.answers import Pulled, Snapshot
from freestep.api.models import Receipt, RunStatus
from freestep.errors import (
    EpochChanged,
    FreestepError,
    NonFiniteGradient,
    RunNotFound,
    ServiceUnreachable,
    StepNotReached,
    StorageUnavailable,
)
from freestep.flat import Flat
from freestep.gradients import PushFormat
from freestep.lease import worker_name
from freestep.leaving import raise_if_leaving
from freestep.region_move import move, round_of
from freestep.region_parent import Parent
from freestep.region_place import Place, PlaceFile
from freestep.run import Run
from freestep.sharding import TRANSIENT

__all__ = ["Region"]

logger = logging.getLogger("freestep")

_WAIT_S = 10.0
"""Seconds after which it is looked at whether anybody trains."""
_PAUSE_S = 1.0
"""Seconds between two attempts while a service is away."""


class Region:
    """Works for a region's run at its parent's: pushes its rounds there, and moves it to what comes back.

    Each `advance` is one act: to wait for the end of a round, to push it, or to move the region's run. The process may
    be killed at any moment; the next one that has the file goes on. Needs a token of scope admin at the region's
    service, and one of scope push at the parent's. Not safe to use from several threads.

    While the parent is away the region trains on, and its round becomes longer. When the last of the region's workers
    has left, a round ends with what there is. Where the region has had no worker for the time of a lease of its run,
    the parent's lease is released until one comes, so that others do not wait. A push that the parent drops as too
    stale loses that round's progress. If the parent goes back to an earlier step, all progress that it has not had is
    lost, as with LocalSteps. If the file is lost, so is the progress since the last push.

    Attributes: `place`, where the region stands, None before the first `advance`; `receipt`, that of the last push that
    was answered, None before it or where the parent had gone back.

    Example:
        >>> with freestep.Client("http://127.0.0.1:8000") as here, freestep.Client("https://far:8000") as far:
        ...     with freestep.Region(here.run("lm"), far.run("lm"), "lm.region", every=200) as region:
        ...         region.run_rounds()

    Args:
        run: The region's run. It is waited for until it has weights.
        parent: The parent's run. It is created if there is none, with the region's parameters and weights.
        file: Keeps the region's place; 4 to 12 bytes a parameter. One for each region.
        every: How many updates of the region's run make a round, at least 1.
        worker: The region's name at the parent. None makes one, and keeps it in the file.
        optimizer: Algorithm and hyperparameters of a parent that is created; what is not given is of `diloco` with lr 1
            and momentum 0.5, or the defaults of another algorithm.
        aggregation: Its aggregation. If it names no policy, that is `sync` with a max_staleness of 1, so that regions
            go round by round, or `async` for other algorithms.
        options: Other members of its spec, such as `durability` and `lease_ttl_ms`.
        push_dtype: As for RemoteOptimizer, as the next two are. What a push leaves out is part of later ones.
        push_encoding: "dense", "int8" or "topk".
        topk_fraction: For "topk", the share of each tensor that is pushed.
        pull_dtype: "F32", "BF16", "F16" or "I8": how the parent's y comes.

    Raises:
        FreestepError: `every` is not valid; the parent is the run itself; or another process has the file, or it is no
            region's.
        OSError: The file cannot be read or written.
    """

    def __init__(
        self,
        run: Run,
        parent: Run,
        file: str | os.PathLike[str],
        *,
        every: int,
        worker: str | None = None,
        optimizer: Mapping[str, Any] | None = None,
        aggregation: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        push_dtype: str | None = None,
        push_encoding: str = "dense",
        topk_fraction: float = 0.01,
        pull_dtype: str = "F32",
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise FreestepError(f"every must be a number of updates from 1, not {every!r}")
        if (run.name, run._transport.base_url) == (parent.name, parent._transport.base_url):
            raise FreestepError(f"the run {run.name!r} is no parent of itself: name another run, or another service")
        self.every = every
        self.receipt: Receipt | None = None
        self._run = run
        push_format = PushFormat(push_dtype, push_encoding, topk_fraction=topk_fraction)
        self._parent = Parent(parent, optimizer or {}, aggregation, options or {}, push_format, pull_dtype)
        self._worker = worker
        self._own: Flat
        self._trained_at = 0.0
        """When a worker of the region was seen last, or could have been: by the monotonic clock."""
        self._file = PlaceFile(Path(file))
        try:
            self.place = self._file.load()
            if self.place is not None and worker not in (None, self.place.worker):
                raise FreestepError(
                    f"{file} has the place of {self.place.worker!r}, not of {worker!r}: name another file"
                )
        except BaseException:
            self._file.close()
            raise

    # Rounds

    def run_rounds(self, count: int | None = None) -> None:
        """Works until `count` more rounds have been pushed and answered, and waits while a service is away, or cannot
        write.

        Args:
            count: How many rounds, of which each ends with the move to the parent's answer; None goes on for ever.

        Raises:
            FreestepError: As for `advance`, but for outages and StorageUnavailable.
        """
        moved = 0
        while count is None or moved < count:
            before = self.place
            try:
                place = self.advance()
            except (ServiceUnreachable, StorageUnavailable, *TRANSIENT) as error:
                logger.warning("the region %s waits: %s", self._run.name, error)
                time.sleep(_PAUSE_S)
                continue
            moved += before is not None and before.stage == "moving" and place.stage == "training" and not before.joins

    def finish(self) -> None:
        """Pushes what the region has made since its last push, and moves its run to the y that comes back.

        Without an update since then nothing is pushed, and the run is moved to the parent's newest y.

        Raises:
            FreestepError: As for `advance`.
        """
        while self.place is None or self.place.stage != "training":
            self.advance()
        place = self.advance(at_once=True)
        if place.stage == "training":
            place = self._follow(place)
        while place.stage != "training":
            place = self.advance()

    def advance(self, *, at_once: bool = False) -> Place:
        """The next act, and the place behind it.

        Args:
            at_once: Ends a round now, if it has an update, and does nothing if it has none; else it waits for `every`
                of them.

        Raises:
            ManifestMismatch: The parent's run has other parameters.
            DtypeOverflow: A round has a value that F16 cannot hold, and nothing was pushed; or the parent's y has one,
                and a region with another `pull_dtype` goes on.
            NonFiniteGradient: The region's y contains NaN or infinity; nothing was pushed.
            FreestepError: The file is of another run of the region's or the parent's name; and as for `Run`.
        """
        raise_if_leaving()
        place = self.place
        if place is None:
            return self._join()
        self._prepare(place)
        if place.stage == "training":
            return self._end_round(place, 1 if at_once else self.every, is_awaited=not at_once)
        if place.stage == "sending":
            return self._send(place)
        return self._move(place)

    def _save(self, place: Place) -> Place:
        self._file.save(place)
        self.place = place
        return place

    # Joining

    def _join(self) -> Place:
        """The run is to be moved to the parent's y as a whole."""
        y = self._first_point()
        status = self._run.status()
        its = self._parent.find(status.spec, creates=True)
        pulled = self._parent.pull_or_initialize(y)
        return self._save(
            Place(
                stage="moving",
                round=round_of(status) + 1,
                worker=worker_name(self._worker),
                run_id=status.id,
                parent_id=its.id,
                epoch=pulled.epoch,
                step=pulled.step,
                oldest=pulled.step,
                run_epoch=status.epoch,
                run_step=status.step,
                base=self._parent.y,
                whole=True,
                joins=True,
            )
        )

    def _first_point(self) -> Snapshot:
        """The region's y; a run that has no weights yet, or that there is not yet, is waited for."""
        is_told = False
        while True:
            raise_if_leaving()
            try:
                return next(self._run.watch("y"))[1]
            except RunNotFound:
                if not is_told:
                    logger.warning("the run %s is waited for, which there is not yet", self._run.name)
                is_told = True
                time.sleep(_PAUSE_S)

    def _prepare(self, place: Place) -> None:
        """Once in a process: takes a lease at the parent, of the runs that the place is of."""
        if self._parent.lease is not None:
            return
        status = self._run.status()
        place.require_runs(run=status, parent=self._parent.find(status.spec, creates=False))
        self._own = Flat(self._run.manifest)
        self._parent.join(place.worker)
        self._trained_at = time.monotonic()

    # The acts

    def _end_round(self, place: Place, every: int, *, is_awaited: bool) -> Place:
        while True:
            raise_if_leaving()
            pulled, wait = None, _WAIT_S if is_awaited else 0.0
            with suppress(StepNotReached):
                pulled = self._run.pull_into(self._own, "y", min_step=place.run_step + every, wait=wait)
            status = self._run.status()
            place.require_runs(run=status)
            if round_of(status) != place.round:
                return self._restart(place, status)
            # The point is of the round that the status tells, if they are of one epoch.
            if pulled is not None and pulled.epoch == status.epoch:
                return self._begin_to_send(place, pulled, status.loss)
            if pulled is None and not is_awaited:
                return place
            if status.workers:
                self._trained_at = time.monotonic()
                self._parent.wake()
            elif status.step > place.run_step:
                # Nobody trains on: the round ends with what there is.
                every = 1
            elif time.monotonic() - self._trained_at > status.in_force.lease_ttl_ms / 1000:
                # Sooner, workers may have yet to see that the run was moved.
                self._parent.rest()

    def _begin_to_send(self, place: Place, pulled: Pulled, loss: float | None) -> Place:
        lease = self._parent.held.granted
        if lease.epoch != place.epoch:
            return self._give_up(place)
        if not bool(self._own.vector.isfinite().all()):
            raise NonFiniteGradient(
                f"y of the region's run {self._run.name!r} contains NaN or infinity at step {pulled.step}, and is not "
                "pushed: return the run to an earlier checkpoint"
            )
        return self._save(
            place.after(
                stage="sending",
                run_epoch=pulled.epoch,
                run_step=pulled.step,
                sent=self._own.vector.clone(),
                lease=lease.lease,
                token=lease.token,
                key=uuid.uuid4().hex,
                loss=loss,
                push_format=self._parent.push_format.text,
            )
        )

    def _send(self, place: Place) -> Place:
        try:
            receipt, pulled, residual = self._parent.push(place, self._save)
        except EpochChanged:
            return self._give_up(place)
        self.receipt = receipt
        if receipt.decision == "dropped":
            logger.warning(
                "the parent's run %s dropped a round of the region %s (%s)",
                self._parent.run.name, place.worker, receipt.reason,
            )  # fmt: skip
        return self._save(place.to_move(pulled, self._parent.y).after(residual=residual))

    def _give_up(self, place: Place) -> Place:
        """The parent's run went back, and takes no progress from the state that it has given up."""
        logger.warning(
            "the parent's run %s is in another epoch: the region %s begins at its newest y",
            self._parent.run.name, place.worker,
        )  # fmt: skip
        self.receipt = None
        return self._leave(place)

    def _restart(self, place: Place, status: RunStatus) -> Place:
        """The region's run is not where the place has moved it: it is moved to the parent's y as a whole."""
        number = round_of(status)
        logger.warning(
            "the run %s has gone back from round %d to round %d: what it has made since then is not pushed, and it is "
            "moved to the parent's y",
            self._run.name, place.round, number,
        )  # fmt: skip
        return self._leave(place.after(round=max(place.round, number)))

    def _leave(self, place: Place) -> Place:
        """The region's run is to be moved to the parent's newest y, without what it is ahead of that."""
        pulled = self._parent.pull_newest()
        return self._save(place.to_move(pulled, self._parent.y).after(whole=True, joins=True))

    def _follow(self, place: Place) -> Place:
        """A run that has not trained since its move is to be moved to the parent's newest y, if that is another."""
        pulled = self._parent.pull_newest()
        if (pulled.epoch, pulled.step) == (place.epoch, place.step):
            return place
        return self._save(place.to_move(pulled, self._parent.y).after(sent=place.base, joins=True))

    def _move(self, place: Place) -> Place:
        place = move(self._run, place, self._own, self._save)
        self._trained_at = time.monotonic()
        return self._save(place)

    def close(self) -> None:
        """Releases the lease and the file; what is under way is gone on with by the next process."""
        self._parent.leave()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
