"""A round: the steps that a worker takes by itself between two pushes, and how far they have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freestep.client import Pulled
from freestep.flat import Flat
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch

__all__ = ["Round"]


class Round:
    """One round after the other of the steps on some parameters.

    start: y where the round began, as the parameters held it, fp32 [manifest.numel]. taken_at: of which epoch and step
    it is. steps: those taken since. The round's progress is how far the parameters are from `start`.

    clock: gives seconds, from whenever.
    """

    taken_at: Pulled

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], clock: Callable[[], float]) -> None:
        self.start = Flat(manifest)
        self._tensors = tensors
        self._clock = clock
        self._since = clock()
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self._samples: float | None = 0.0
        self._losses: list[float | Tensor] = []
        self._seconds = 0.0
        self.go_on()

    def begin(self, taken_at: Pulled) -> None:
        """Begins a round at the parameters as they are."""
        self.start.gather(self._tensors)
        self.taken_at = taken_at
        self._clear()

    def add(self, samples: float | None, loss: float | Tensor | None) -> None:
        """Counts a step that was taken."""
        self.steps += 1
        self._samples = None if samples is None or self._samples is None else self._samples + float(samples)
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def pause(self) -> None:
        """What comes now is no part of the time that the steps take."""
        now = self._clock()
        self._seconds += now - self._since
        self._since = now

    def go_on(self) -> None:
        """Ends a pause."""
        self._since = self._clock()

    @property
    def batch(self) -> Batch:
        """What the round is of, as far as it is known.

        All its samples, if each step has said how many it took; the mean of the losses; in a pause, the steps a second.
        """
        losses = [float(each) for each in self._losses]
        return Batch(
            self._samples,
            sum(losses) / len(losses) if losses else None,
            self.steps / self._seconds if self._seconds > 0 else None,
        )

    def goes_on_at(self, pulled: Pulled) -> bool:
        """Whether steps have been taken that are of use at another y."""
        return self.steps > 0 and pulled.epoch == self.taken_at.epoch

    def move(self, y: Flat) -> None:
        """Has the round begin at another y: parameters <- y + (parameters - start).

        What is rounded off the parameters is taken off `start`, too, so that it is no progress.
        """
        for name, tensor in self._tensors.items():
            start = self.start.views[name]
            progress = tensor.to("cpu", torch.float32) - start
            tensor.copy_(y.views[name].float() + progress)
            torch.sub(tensor.to("cpu", torch.float32), progress, out=start)

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The place in the round, for parameters that are as in `tensors`."""
        now = Flat(self.start.manifest)
        now.gather(tensors)
        return {
            "steps": self.steps,
            "samples": self._samples,
            "losses": [float(each) for each in self._losses],
            "taken_at": (self.taken_at.epoch, self.taken_at.step),
            "progress": now.vector.sub_(self.start.vector),
        }

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Goes on from a place in a round, at the y where this round begins; False if that is in another epoch."""
        taken_at = Pulled(*state["taken_at"])
        if taken_at.epoch != self.taken_at.epoch:
            return False
        progress = Flat(self.start.manifest)
        progress.vector.copy_(state["progress"])
        for name, tensor in self._tensors.items():
            tensor.add_(progress.views[name].to(tensor.device))
        self.taken_at, self.steps = taken_at, state["steps"]
        self._samples, self._losses = state["samples"], list(state["losses"])
        return True
