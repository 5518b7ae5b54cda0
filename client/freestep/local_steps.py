"""LocalSteps: a worker takes many local steps between two pushes, as in DiLoCo (arXiv 2311.08105)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec
from freestep.errors import DtypeOverflow, FreestepError, ManifestMismatch, NonFiniteGradient
from freestep.inflight_push import require_stale_gradients_accepted
from freestep.leaving import raise_if_leaving
from freestep.optimizer import RemoteOptimizer
from freestep.rounds import LocalRound
from freestep.taken_units import by_name
from freestep.uncompiled import uncompiled
from freestep.worker_group import Batch

__all__ = ["LocalSteps"]

logger = logging.getLogger("freestep")

_SYNC = {"policy": "sync"}
_SYNC_WITH_OVERLAP = {"policy": "sync", "max_staleness": 1}
"""With overlap, pushes are one step stale."""


class LocalSteps(RemoteOptimizer):
    """Trains a model by local steps of an inner optimizer, and pushes the progress of each round of them.

    A round begins with the model at the run's y. Each `step` is one step of the inner optimizer; the last of a round
    pushes the pseudo-gradient, y at the round's beginning minus the parameters, along which the run's algorithm takes
    its step, and loads fresh y, where the next round begins. The inner optimizer's state stays with the worker;
    gradient accumulation, clipping, learning-rate schedules and a GradScaler work as with the inner optimizer alone.

    A push that is dropped (too stale, or the run went back to an earlier step) loses its round's progress, and
    `receipt` says so; the next round begins at fresh y. If the run went back, progress made since is dropped too. A
    push whose outcome is unknown stays in flight and is sent again by the next push or `flush`, under the same key, so
    that it counts once; steps can be taken meanwhile. `close` does not push: call `push` before it if an unfinished
    round shall count.

    Attributes beside those of RemoteOptimizer: `inner`; `every`; `length`, how many steps the current round has;
    `steps`, how many of them have been taken. Memory in addition to RemoteOptimizer's and the inner optimizer's: 4
    bytes a parameter for the round's beginning, and a copy of the parameters while the model contains x in the middle
    of a round. Not safe to use from several threads.

    Example:
        >>> inner = torch.optim.AdamW(model.parameters(), lr=3e-4)
        >>> with freestep.LocalSteps(model, inner, every=100, url="http://127.0.0.1:8000", run="local") as opt:
        ...     for inputs, targets in loader:
        ...         opt.zero_grad()
        ...         loss_fn(model(inputs), targets).backward()
        ...         opt.step(samples=len(inputs))
        ...     opt.push()

    Args:
        params: As for RemoteOptimizer.
        inner: Any torch optimizer of the same parameters, except those with `train` and `eval` methods, as the
            schedulefree package has: their state contains points beside the parameters, which loading y would not move.
        every: How many steps make a round, at least 1.
        run: As for RemoteOptimizer.
        algorithm: The algorithm that the run is created with.
        overlap: Sends a push while the next round's steps are taken, from where the last one ended. Its answer is
            received by the push after it, or by `flush`; the new y then replaces the round's beginning and the progress
            made since is kept: parameters <- y + (parameters - start). A push is as stale as the oldest y that its
            steps were taken from.
        dynamic: Takes fewer steps a round while other workers are faster, so that rounds take about the same time on
            all (arXiv 2401.09135): max(1, floor(every · v / v_max)), with v this worker's steps a second in its last
            round, pushes excluded, and v_max the largest v that a live worker has reported.
        clock: Returns the seconds by which `dynamic` measures.
        **options: As for RemoteOptimizer, except `process_group`: each process is a worker of its own. `aggregation`
            defaults to `sync` for `diloco` and `gpa_sgd`, whose momentum amplifies stale rounds, with a max_staleness
            of 1 if `overlap` is set. Hyperparameters, `lr` among them, are the run's and not the inner optimizer's.

    Raises:
        ManifestMismatch: The inner optimizer has other parameters; and as for RemoteOptimizer.
        ValueError: `overlap` is set, and the run's policy drops gradients that are one step stale.
        FreestepError: `every`, `inner` or an option is not valid.
        TypeError: `params` are none, or `inner` is no optimizer.
    """

    _owns_weights = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        inner: torch.optim.Optimizer,
        *,
        every: int,
        run: str | None = None,
        algorithm: str = "diloco",
        overlap: bool = False,
        dynamic: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise FreestepError(f"every must be a number of steps from 1, not {every!r}")
        if options.pop("process_group", None):
            raise FreestepError("LocalSteps takes no process_group: each process is a worker of its own")
        if not hasattr(inner, "param_groups"):
            raise TypeError(
                "inner must be an optimizer that was made of the same parameters, such as "
                f"torch.optim.AdamW(model.parameters()), not {inner!r}"
            )
        if hasattr(inner, "train") or hasattr(inner, "eval"):
            raise FreestepError(
                f"{type(inner).__name__} keeps points beside the parameters, which loading y would not move: use "
                "another inner optimizer, and a Schedule-Free algorithm for the run"
            )
        if algorithm in ("diloco", "gpa_sgd"):
            self._new_aggregation = _SYNC_WITH_OVERLAP if overlap else _SYNC
        self.inner = inner
        self.every = every
        self._overlaps = overlap
        self._is_dynamic = dynamic
        self._clock = clock
        super().__init__(params, run=run, algorithm=algorithm, process_group=False, **options)

    def _require_policy(self, aggregation: AggregationSpec) -> None:
        if self._overlaps:
            require_stale_gradients_accepted(aggregation)

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        remaining = {id(tensor): tensor for group in self.inner.param_groups for tensor in group["params"]}
        for name, tensor in self._tensors.items():
            if remaining.pop(id(tensor), None) is None:
                raise ManifestMismatch(f"the inner optimizer does not have the parameter {name!r}")
        for _, tensor in frozen:
            remaining.pop(id(tensor), None)
        for tensor in remaining.values():
            raise ManifestMismatch(f"the inner optimizer has another parameter, of shape {list(tensor.shape)}")
        self._round = LocalRound(self._receive_buffer.manifest, self._tensors, self.every, self._clock)

    @property
    def length(self) -> int:
        """How many steps the current round has."""
        return self._round.length

    @property
    def steps(self) -> int:
        """How many steps of the current round have been taken."""
        return self._round.steps

    # Training

    @uncompiled
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
    ) -> float | None:
        """Takes a step of the inner optimizer; the last of a round pushes the round's progress and loads fresh y.

        Args:
            closure: As for the inner optimizer.
            loss: The batch's mean training loss; the mean over the round is reported. None takes the attribute `loss`,
                else the closure's.
            samples: The batch's size; the sum over the round, if all steps give it, is the push's weight in the mean of
                a group.

        Returns:
            What the inner optimizer's step returns.

        Raises:
            EvalMode: The model contains x, or kept weights; call `train` first.
            Closed: The optimizer was closed.
            ManifestMismatch: A parameter of the run was frozen, or a frozen one has a gradient; no step was taken.
            ValueError: The loss is a tensor of several elements; no step was taken.
            FreestepError: As for `push`, after the step was taken.
        """
        raise_if_leaving()
        self._require_open()
        self._require_mean(loss)
        self._cautions.before_step(self.param_groups)
        self._require_y("step")
        self._gradients.check()
        result: float | None = self.inner.step(closure)
        self._gradients.note_done()
        self._round.add(samples, self._take_loss(loss, result))
        self._progress.units.keep_for_round()
        if self._round.steps >= self._round.length:
            self.push()
        return result

    @uncompiled
    @torch.no_grad()
    def push(self) -> None:
        """Ends the round now, as the last of its steps does; does nothing if no step was taken.

        If the progress contains NaN or infinity, the round is lost: NonFiniteGradient is raised and the model is at
        fresh y. So it is, with DtypeOverflow, if it is pushed as F16 and has a value beyond 65504. The inner
        optimizer's state is not changed, and may contain NaN too.

        Raises:
            FreestepError: As for RemoteOptimizer's `step`.
        """
        self._require_y("push")
        self._round.pause_clock()
        try:
            self.flush()
            if self._round.steps:
                self._end_round(self._round.taken_at, self._round.batch)
        finally:
            self._round.resume_clock()

    def _end_round(self, taken_at: Pulled, batch: Batch) -> None:
        try:
            self._worker_group.run_on_all(lambda: self._gradients.gather_difference(self._round.start))
        except DtypeOverflow:
            self._restart()
            raise
        batch = self._gradients.average([batch])
        self._round.begin(self.loaded)
        self._push(taken_at, batch, overlap=True)
        if not self._overlaps:
            self.flush()
        if self._is_dynamic and batch.speed is not None:
            fastest = max(batch.speed, *(worker.speed or 0.0 for worker in self._run.workers()))
            self._round.length = max(1, int(self.every * (batch.speed / fastest)))

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for a push in flight; its y replaces the round's beginning, and progress made since is kept.

        Raises:
            FreestepError: What the push failed with.
        """
        if self._progress.inflight is None:
            return
        self._round.pause_clock()
        try:
            super().flush()
        except (DtypeOverflow, NonFiniteGradient):
            # The progress cannot be pushed, and no further step would change that.
            self._restart()
            raise
        finally:
            self._round.resume_clock()

    def _restart(self) -> None:
        self._round.steps = 0
        self._load("y")

    def _set_parameters(self, pulled: Pulled) -> None:
        if pulled.point == "y" and self._round.can_move_to(pulled):
            self._round.move(self._receive_buffer)
            return
        super()._set_parameters(pulled)
        if pulled.point == "y":
            self._round.begin(pulled)
            self._give_back_round()

    def _discard_unpushed(self) -> None:
        super()._discard_unpushed()
        if self._round.steps:
            logger.warning(
                "%d local steps on the run %s are discarded, since the lease of this worker has lost the units of data "
                "that they were taken on: they are handed out again",
                self._round.steps,
                self._run.name,
            )
            self._round.interrupted = None
            self._restart()

    def _give_back_round(self) -> None:
        """Gives back the units of a round whose progress is lost."""
        if lost := self._progress.units.drop_round():
            self._progress.units.give_back(lost)

    # Points

    @uncompiled
    @torch.no_grad()
    def eval(self) -> None:
        """Loads the newest x, the average, into the model; the parameters of an unfinished round are kept for `train`.

        Does nothing after `keep_weights`.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        self.flush()
        if self._progress.keeps_weights:
            return
        if self.loaded.point == "y" and self._round.steps:
            self._round.pause_clock()
            self._round.interrupted = self.loaded, {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._load("x")

    @uncompiled
    @torch.no_grad()
    def train(self) -> None:
        """Restores the parameters of the unfinished round; else loads the newest y, unless a step was taken from it.

        Raises:
            Closed: The optimizer was closed.
        """
        if self._round.interrupted is not None:
            pulled, held = self._round.interrupted
            self._round.interrupted = None
            self._note_loaded(pulled)
            for name, tensor in self._tensors.items():
                tensor.copy_(held[name])
            self._round.resume_clock()
        elif self._round.steps == 0:
            super().train()

    def keep_weights(self) -> None:
        """As RemoteOptimizer's; a round that `eval` has not interrupted is lost with the parameters it had.

        Raises:
            FreestepError: A push is in flight.
            Closed: The optimizer was closed.
        """
        super().keep_weights()
        if self._round.interrupted is None:
            self._round.steps = 0
            self._give_back_round()

    # torch.optim.Optimizer

    def _require_same_kind(self, state_dict: Mapping[str, Any]) -> None:
        """Raises nothing: `load_state_dict` has looked for its own entries."""

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As RemoteOptimizer's, with the inner optimizer's state and the unfinished round's progress."""
        state = super().state_dict()
        held = self._tensors if self._round.interrupted is None else self._round.interrupted[1]
        units = by_name(self._progress.units.of_round)
        return {**state, "inner": self.inner.state_dict(), "round": {**self._round.state(held), "units": units}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the inner optimizer's state and the unfinished round, at the run's newest y.

        If the run has gone back to an earlier step since, the round's progress is dropped, and `receipt` says so. So is
        progress on units of data, since others may have these by now; they are handed out again. Any other progress is
        part of the next push, even if the worker that saved it has pushed it since: then it counts twice.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ManifestMismatch: The state is of another run, or not of LocalSteps.
        """
        if "inner" not in state_dict:
            raise ManifestMismatch("the state has no entry 'inner': it is not from LocalSteps.state_dict()")
        super().load_state_dict(state_dict)
        self._round.interrupted = None
        self.inner.load_state_dict(state_dict["inner"])
        self._round.steps = 0
        self._load("y")
        saved = state_dict["round"]
        if units := saved.get("units"):
            logger.warning(
                "the unfinished round of %d steps in the state is dropped: its units of the data sets %s may be "
                "others' by now, and are handed out again unless they have counted",
                saved["steps"],
                ", ".join(sorted(units)),
            )
            self._note_dropped("unit-not-held")
        elif saved["steps"] and not self._round.restore(saved):
            self._note_dropped("epoch-changed")
