"""LocalSteps: many steps of a worker's own between two pushes, as DiLoCo has them (arXiv 2311.08105)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freestep.api.models import Point, Receipt
from freestep.client import Pulled
from freestep.errors import EvalMode, FreestepError, ManifestMismatch, NonFiniteGradient
from freestep.inflight_push import refuse_late_gradients
from freestep.optimizer import RemoteOptimizer
from freestep.rounds import Round
from freestep.worker_group import Batch

__all__ = ["LocalSteps"]

_WAITS_FOR_ALL = {"policy": "sync"}
_WAITS_FOR_ALL_BUT_ONE_STEP = {"policy": "sync", "max_staleness": 1}
"""For overlap, whose pushes are one step stale."""


class LocalSteps(RemoteOptimizer):
    """Trains a model by steps of an inner optimizer, and pushes how far each round of them has come.

    A round begins with the model at the run's y. Each `step` is one of the inner optimizer's; the `every`-th pushes y
    at the round's beginning - the parameters, the pseudo-gradient, along which the run's algorithm takes its step, and
    loads the fresh y, where the next round begins. The inner optimizer's state stays with the worker; gradient
    accumulation, clipping and learning-rate schedules are its own affair, and a GradScaler steps this optimizer.

    inner: any torch optimizer of the same parameters. Not one with a `train` and an `eval` of its own, as the
        schedulefree package's have: their state holds points beside the parameters, which would stay behind when y is
        loaded.
    every: how many steps make a round.
    overlap: lets a push travel while the next round's steps are taken, from where the last one ended. Its answer is
        received by the push after it, or by `flush`, and then the new y takes the place of the round's beginning, while
        the progress made since is kept: parameters <- y + (parameters - start). A push is as stale as the oldest y
        that its steps were taken from. Refused under policies that take no stale gradients: `sync` needs a
        `max_staleness` of 1.
    dynamic: takes fewer steps in a round where other workers are faster, so that rounds take about as long on all of
        them (arXiv 2401.09135): max(1, floor(every · v / v_max)), with v the steps a second of this worker's last
        round, without the time for pushes, and v_max the largest that a live worker has said.
    clock: what `dynamic` measures seconds by.
    aggregation: unless one is given, `diloco` and `gpa_sgd` have the rounds of all live workers make a step together:
        their momentum makes much of rounds that are stale.
    params, algorithm, the others: as for `RemoteOptimizer`, but for `process_group`: each process is a worker of its
        own. An `lr` among them is the run's, not the inner optimizer's.

    A push that is dropped (too stale, say, or because the run went back to an earlier step) takes its round's progress
    with it, and `receipt` says so; the next round begins at fresh y. Of a run that went back, progress made since is
    dropped as well. A push of which nothing is known, since the service was away for too long, stays in flight and is
    sent again by the next push or `flush`, under the key that makes it count once; steps can be taken meanwhile, as
    with `overlap`. `close` pushes nothing: call `push` before it where the steps of an unfinished round are to count.

    It keeps 4 bytes a parameter more than RemoteOptimizer, for the round's beginning: 12 with fp32 both ways, 22 with
    BF16 pushes; beside what the inner optimizer has. While the model holds x in mid-round, a copy of its parameters.

    Raises ManifestMismatch where the inner optimizer has other parameters, and what RemoteOptimizer does.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        inner: torch.optim.Optimizer,
        *,
        every: int,
        run: str,
        algorithm: str = "diloco",
        overlap: bool = False,
        dynamic: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        if every < 1:
            raise FreestepError(f"a round has at least one step, not {every}")
        if options.get("process_group") is not None:
            raise FreestepError("LocalSteps has no process_group: each process is a worker of its own")
        if hasattr(inner, "train") or hasattr(inner, "eval"):
            raise FreestepError(
                f"{type(inner).__name__} keeps points beside the parameters, which would stay behind when y is loaded: "
                "take another inner optimizer, and a Schedule-Free algorithm for the run"
            )
        if options.get("aggregation") is None and algorithm in ("diloco", "gpa_sgd"):
            options["aggregation"] = _WAITS_FOR_ALL_BUT_ONE_STEP if overlap else _WAITS_FOR_ALL
        self.inner = inner
        self.every = every
        self.length = every
        """How many steps make the round that is under way."""
        self._overlaps = overlap
        self._is_dynamic = dynamic
        self._clock = clock
        self._aside: tuple[Pulled, dict[str, Tensor]] | None = None
        super().__init__(params, run=run, algorithm=algorithm, **options)
        if overlap:
            try:
                refuse_late_gradients(self.spec.aggregation)
            except ValueError:
                self.close()
                raise

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        its = {id(tensor): tensor for group in self.inner.param_groups for tensor in group["params"]}
        for name, tensor in self._tensors.items():
            if its.pop(id(tensor), None) is None:
                raise ManifestMismatch(f"the inner optimizer does not have the parameter {name!r}")
        for _, tensor in frozen:
            its.pop(id(tensor), None)
        for tensor in its.values():
            raise ManifestMismatch(f"the inner optimizer has another parameter, of shape {list(tensor.shape)}")
        self._round = Round(self._arriving.manifest, self._tensors, self._clock)

    @property
    def steps(self) -> int:
        """Steps of the round that is under way."""
        return self._round.steps

    # Training

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
    ) -> float | None:
        """Takes a step of the inner optimizer; the last of a round pushes the round's progress and loads fresh y.

        loss: the batch's training loss; the mean over the round is reported. samples: the batch's size; their sum over
        the round, if all steps say it, is the push's weight in a group's mean. Returns what the inner optimizer's step
        returns. Raises EvalMode while the model holds x, ManifestMismatch as RemoteOptimizer does, before the step is
        taken, and what `push` raises.
        """
        if self.pulled is None:
            raise EvalMode("the model holds x; call train() before step()")
        self._gradients.check()
        result: float | None = self.inner.step(closure)
        self._round.add(samples, result if loss is None else loss)
        if self._round.steps >= self.length:
            self.push()
        return result

    @torch.no_grad()
    def push(self) -> None:
        """Ends the round now, as `step` does with the last of its steps; does nothing where no step was taken.

        Raises what RemoteOptimizer's `step` does. A round whose progress is not finite is lost: the model is at fresh y
        again, and the inner optimizer's state is for its owner to look at.
        """
        if self.pulled is None:
            raise EvalMode("the model holds x; call train() before push()")
        self._round.pause()
        self.flush()
        if self._round.steps:
            self._end_round(self._round.taken_at, self._round.batch)
        self._round.go_on()

    def _end_round(self, taken_at: Pulled, batch: Batch) -> None:
        self._gradients.gather_since(self._round.start)
        batch = self._gradients.mean([batch])
        assert self.pulled is not None
        self._round.begin(self.pulled)
        self._push(taken_at, batch, overlap=True)
        if not self._overlaps:
            self.flush()
        if self._is_dynamic and batch.speed is not None:
            fastest = max(batch.speed, *(worker.speed or 0.0 for worker in self._run.workers()))
            self.length = max(1, int(self.every * (batch.speed / fastest)))

    @torch.no_grad()
    def flush(self) -> None:
        """As RemoteOptimizer's. The new y takes the place of the round's beginning; progress made since is kept."""
        try:
            super().flush()
        except NonFiniteGradient:
            # From what is not finite no step leads back.
            self._restart()
            raise

    def _restart(self) -> None:
        self._round.steps = 0
        self._load("y")

    def _place(self, pulled: Pulled, point: Point) -> None:
        if point == "y" and self._round.goes_on_at(pulled):
            self._round.move(self._arriving)
            return
        super()._place(pulled, point)
        if point == "y":
            self._round.begin(pulled)

    # Points

    @torch.no_grad()
    def eval(self) -> None:
        """Loads x into the model, and keeps the parameters of a round that is under way for `train`."""
        self.flush()
        if self.pulled is not None:
            aside = None
            if self._round.steps:
                self._round.pause()
                aside = self.pulled, {name: tensor.clone() for name, tensor in self._tensors.items()}
            super().eval()
            self._aside = aside

    @torch.no_grad()
    def train(self) -> None:
        """Goes on with the round that was under way, or loads y for a new one."""
        if self._aside is not None:
            self.pulled, held = self._aside
            self._aside = None
            for name, tensor in self._tensors.items():
                tensor.copy_(held[name])
            self._round.go_on()
        else:
            super().train()

    # torch.optim.Optimizer

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As RemoteOptimizer's, with the inner optimizer's state and the place in the round, its progress included."""
        state = super().state_dict()
        held = self._tensors if self._aside is None else self._aside[1]
        state["freestep"]["round"] = self._round.state(held)
        return {**state, "inner": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As RemoteOptimizer's; then goes on with the inner optimizer's state, and with the round, at the newest y.

        If the run has gone back to an earlier step since, the round's progress is dropped, and `receipt` says so. Else
        it is part of the next push, also where the worker that saved it has pushed it since: then it counts twice.
        """
        if "inner" not in state_dict:
            raise ManifestMismatch("the state has no inner optimizer's: it is not one of LocalSteps")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})
        self._aside = None
        self.inner.load_state_dict(state_dict["inner"])
        self._round.steps = 0
        assert self.pulled is not None
        self._place(self.pulled, "y")
        place = state_dict["freestep"]["round"]
        if place["steps"] and not self._round.resume(place):
            self.receipt = Receipt(decision="dropped", reason="epoch-changed", step=self.pulled.step, staleness=0)
