"""A round: the local steps that a worker takes between two pushes, and the progress that they have made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freestep.answers import Pulled
from freestep.flat import Flat
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch, finite

__all__ = ["LocalRound"]


class LocalRound:
    """One round after another of local steps on a model's parameters.

    start: the parameters at the round's beginning (y), fp32 [manifest.numel]. taken_at: the epoch and step of that y.
    steps: local steps since. length: how many the round has. interrupted: while the model contains x in the middle of a
    round, the y that the round began with, and the parameters. The round's progress is the parameters minus `start`.

    clock: returns seconds, from any origin.
    """

    taken_at: Pulled

    def __init__(
        self, manifest: Manifest, tensors: Mapping[str, Tensor], length: int, clock: Callable[[], float]
    ) -> None:
        self.start = Flat(manifest)
        self.length = length
        self.interrupted: tuple[Pulled, dict[str, Tensor]] | None = None
        self._tensors = tensors
        self._clock = clock
        self._since = clock()
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self._samples: float | None = 0.0
        self._losses: list[float | Tensor] = []
        self._seconds = 0.0
        self.resume_clock()

    def begin(self, taken_at: Pulled) -> None:
        """Begins a round at the current parameters, which are the y `taken_at`."""
        self.start.gather(self._tensors)
        self.taken_at = taken_at
        self._clear()

    def add(self, samples: float | None, loss: float | Tensor | None) -> None:
        """Counts a local step."""
        self.steps += 1
        self._samples = None if samples is None or self._samples is None else self._samples + float(samples)
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def pause_clock(self) -> None:
        """Ends the time that counts as local steps, before a push or a pull."""
        now = self._clock()
        self._seconds += now - self._since
        self._since = now

    def resume_clock(self) -> None:
        """Starts the time that counts as local steps."""
        self._since = self._clock()

    @property
    def batch(self) -> Batch:
        """The round's batch: the sum of samples, if all steps have given them, the mean loss, and steps a second.

        The clock must be paused.
        """
        losses = [loss for loss in map(finite, self._losses) if loss is not None]
        return Batch(
            self._samples,
            sum(losses) / len(losses) if losses else None,
            self.steps / self._seconds if self._seconds > 0 else None,
        )

    def can_move_to(self, pulled: Pulled) -> bool:
        """True if there is progress that can be kept at another y: it is of the same epoch."""
        return self.steps > 0 and pulled.epoch == self.taken_at.epoch

    def move(self, y: Flat) -> None:
        """Replaces the round's start by another y and keeps its progress: parameters <- y + (parameters - start).

        The rounding error of the parameters is taken off `start` too, so that it does not count as progress. May be
        repeated where it was interrupted.
        """
        for name, tensor in self._tensors.items():
            start = self.start.views[name]
            progress = tensor.to("cpu", torch.float32) - start
            moved = (y.views[name].float() + progress).to(tensor.dtype)
            # By one call, which no signal interrupts: so a move that was interrupted may be repeated.
            torch._foreach_copy_([tensor, start], [moved, moved.float() - progress])

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The round's state for `state_dict`, with these tensors as the current parameters."""
        now = Flat(self.start.manifest)
        now.gather(tensors)
        if self.interrupted is None:
            self.pause_clock()
            self.resume_clock()
        return {
            "steps": self.steps,
            "seconds": self._seconds,
            "samples": self._samples,
            "losses": [float(each) for each in self._losses],
            "taken_at": (self.taken_at.epoch, self.taken_at.step),
            "progress": now.vector.sub_(self.start.vector),
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Adds a saved round's progress to this round, which has just begun; False if it is of another epoch."""
        taken_at = Pulled(*state["taken_at"])
        if taken_at.epoch != self.taken_at.epoch:
            return False
        progress = Flat(self.start.manifest)
        progress.vector.copy_(state["progress"])
        for name, tensor in self._tensors.items():
            tensor.add_(progress.views[name].to(tensor.device))
        self.taken_at, self.steps = taken_at, state["steps"]
        self._samples, self._losses = state["samples"], list(state["losses"])
        # States of older versions do not say it: the round then has no speed.
        self._seconds = state.get("seconds", -math.inf)
        return True
