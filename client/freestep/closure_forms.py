"""The package's closure forms: the model contains x between steps, and y only while the closure is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from freestep.answers import Pulled
from freestep.api.models import Point
from freestep.drop_in import AdamWScheduleFree, DropIn, RAdamScheduleFree, SGDScheduleFree
from freestep.errors import FreestepError
from freestep.flat import Flat
from freestep.uncompiled import uncompiled
from freestep.weights_guard import WeightsGuard

__all__ = ["AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"]


@dataclass
class _Points:
    """The points of the newest step; in one object, as Progress.

    vector: where x is received; y stays in the receive buffer. y: which y that contains. x: which x the vector
    contains, None if it could not be pulled. is_at_x: whether the model contains it.
    """

    vector: Flat
    y: Pulled | None = None
    x: Pulled | None = None
    is_at_x: bool = False


class _AtAverage(DropIn):
    """A drop-in class whose model contains x between steps, and y while the closure is evaluated."""

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        super()._prepare(frozen)
        like = self._receive_buffer
        self._points = _Points(Flat(like.manifest, like.arrives, pinned=like.vector.is_pinned()))
        self._guard = WeightsGuard(self._tensors, self._points.vector)

    def _set_parameters(self, pulled: Pulled) -> None:
        super()._set_parameters(pulled)
        self._points.y, self._points.is_at_x = pulled, False

    def _load(self, point: Point, *, min_step: int = 0, wait: float | None = None) -> None:
        super()._load("y", min_step=min_step, wait=wait)
        self._load_x()

    def _load_x(self) -> None:
        self._points.x = None
        self._points.x = self._run.pull_into(self._points.vector, "x")
        self._show_x()

    def _show_x(self) -> None:
        assert self._points.x is not None
        self._points.vector.scatter(self._tensors)
        self._points.is_at_x = True
        self._guard.note_loaded()
        self._note_loaded(self._points.x)

    def _show_y(self) -> None:
        assert self._points.y is not None
        self._receive_buffer.scatter(self._tensors)
        self._points.is_at_x = False
        self._note_loaded(self._points.y)

    def _warn_of_changed_weights(self) -> None:
        if self._points.is_at_x:
            super()._warn_of_changed_weights()

    @uncompiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float],
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
        allow_empty: bool = False,
    ) -> float | None:
        """Evaluates the closure at y, pushes the gradients, and loads x; the push's receipt is then in `receipt`.

        After an error the model contains the x from before; or y, if it was x that could not be pulled.

        Args:
            closure: Computes the loss and the gradients, and returns the loss.
            loss: As for RemoteOptimizer.
            samples: As for RemoteOptimizer.
            allow_empty: As for RemoteOptimizer.

        Returns:
            The closure's loss.

        Raises:
            FreestepError: There is no closure; and as for RemoteOptimizer.
        """
        if closure is None:
            raise FreestepError(f"{type(self).__name__}.step() needs a closure, which is evaluated at y")
        self._require_open()
        self._warn_of_changed_weights()
        self._show_y()
        take: Callable[..., float | None] = super().step
        if getattr(take, "hooked", False):
            # torch's hooks are those of this method.
            take = partial(take.__wrapped__, self)  # type: ignore[attr-defined]
        try:
            result = take(closure, loss=loss, samples=samples, allow_empty=allow_empty)
        except BaseException:
            if not self._points.is_at_x:
                # What is received by an exchange that fails is undefined.
                self._receive_buffer.fill(self._tensors)
            if self._points.x is not None:
                self._show_x()
            raise
        self._load_x()
        return result

    @uncompiled
    def eval(self) -> None:
        """Loads the newest x, to which other workers may have moved it since the last step.

        Does nothing after `keep_weights`.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        if not self._progress.keeps_weights:
            self._warn_of_changed_weights()
            self._load_x()

    @uncompiled
    def train(self) -> None:
        """Loads x after `keep_weights`, else does nothing: y is loaded for the closure.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        if self._progress.keeps_weights:
            self._load_x()


class SGDScheduleFreeClosure(_AtAverage, SGDScheduleFree):
    """`schedulefree.SGDScheduleFreeClosure` whose steps are taken by a run.

    A step makes two requests, the push, which is answered with y, and a pull of x: twice the bytes down. It keeps one
    more vector of pull_dtype in host memory. Where x is needed now and then only, `SGDScheduleFree` costs less.

    Args:
        params: As for SGDScheduleFree.
        lr: As for SGDScheduleFree.
        weight_decay: As for SGDScheduleFree.
        momentum: As for SGDScheduleFree.
        warmup_steps: As for SGDScheduleFree.
        r: As for SGDScheduleFree.
        weight_lr_power: As for SGDScheduleFree.
        foreach: Has no effect.
        run: As for SGDScheduleFree.
        url: As for SGDScheduleFree.
        **options: As for SGDScheduleFree.

    Raises:
        FreestepError: As for RemoteOptimizer.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, foreach, run=run, url=url, **options
        )


class AdamWScheduleFreeClosure(_AtAverage, AdamWScheduleFree):
    """`schedulefree.AdamWScheduleFreeClosure` whose steps are taken by a run; its arguments are AdamWScheduleFree's.

    A step costs what it costs with SGDScheduleFreeClosure.
    """


class RAdamScheduleFreeClosure(_AtAverage, RAdamScheduleFree):
    """`schedulefree.RAdamScheduleFreeClosure` whose steps are taken by a run; its arguments are RAdamScheduleFree's.

    A step costs what it costs with SGDScheduleFreeClosure.
    """
