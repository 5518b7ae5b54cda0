"""BatchNorm at x: running statistics estimated anew."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchNormCaution", "reestimate_batchnorm"]

logger = logging.getLogger("freestep")

_estimated: WeakSet[_BatchNorm] = WeakSet()
"""Layers whose statistics were estimated anew."""


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, batches: int | None = None, device: torch.device | str | None = None
) -> int:
    """Estimates the running statistics of a model's BatchNorm layers anew, at the weights that it contains.

    A worker's BatchNorm gathers its statistics while the model contains y. x is another point: call `opt.eval()`, or
    load x, and then this, before the model is evaluated or saved. The statistics become the plain averages over the
    batches, as the README of the schedulefree package advises. Only BatchNorm layers are in training mode meanwhile:
    dropout, say, is off, as it will be when the statistics are used. Weights, momenta and training flags are as before
    afterwards; after an error, the statistics too. So are those of a layer that no batch has come to, which is warned
    about.

    Args:
        model: The model. Layers without running statistics are left alone.
        loader: Batches of training data: inputs; or a tuple or list whose first element are the inputs; or a dict of
            the model's arguments. Batches of some size: every batch weighs the same.
        batches: The most batches that are read; None reads all.
        device: Where inputs are moved to; None is the device of the model's parameters, if all are on one.

    Returns:
        The number of layers whose statistics are new; where there are no layers, the loader is not read.

    Raises:
        ValueError: The loader has no batches.
    """
    layers = _layers(model)
    if not layers:
        logger.info("the model has no BatchNorm layers with running statistics: nothing was estimated")
        return 0
    device = device or _device(model)
    count, averages = 0, [_Average(layer) for layer in layers]
    with _estimating(model, averages):
        for batch in islice(loader, batches):
            for each in averages:
                each.begin()
            _forward(model, batch, device)
            for each in averages:
                each.add()
            count += 1
        if not count:
            raise ValueError("the loader has no batches: BatchNorm's statistics are as they were")
        for each in averages:
            each.finish()
    _estimated.update(each.layer for each in averages if each.count)
    left = [each.layer for each in averages if not each.count]
    if left:
        logger.warning(
            "no batch has come to %d of the model's %d BatchNorm layers, such as %r, whose statistics are as they "
            "were: give batches that come to all layers",
            len(left),
            len(layers),
            next(name for name, module in model.named_modules() if module is left[0]),
        )
    return len(layers) - len(left)


class BatchNormCaution:
    """Warns, once a training, of BatchNorm layers that are used at x with their statistics of y."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A training begins."""
        self._layers: list[_BatchNorm] | None = None

    def note_training(self, model: nn.Module) -> None:
        """Notes the layers that gather statistics: called where the model is in training mode."""
        if self._layers is None:
            self._layers = [layer for layer in _layers(model) if layer.training]

    def before_use(self) -> None:
        """Warns if nobody has ever estimated the statistics anew: the model was evaluated at x, or stays there."""
        if self._layers and not any(layer in _estimated for layer in self._layers):
            logger.warning(
                "the model has %d BatchNorm layers, whose statistics were gathered at y, and it is evaluated and saved "
                "at x: call freestep.reestimate_batchnorm(model, batches) at x; docs/guides/batchnorm.md says where",
                len(self._layers),
            )
            self._layers = []


def _layers(model: nn.Module) -> list[_BatchNorm]:
    """Those with running statistics."""
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]


class _Average:
    """A layer's statistics, averaged over the batches that have come to it.

    In fp32 at least: in BF16, an average of many is beside them by rounding. count: of batches, or of calls where a
    batch leads to several.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.count = 0
        self._before = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
        self._means = [torch.zeros_like(each, dtype=_exact(each)) for each in self._statistics]

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        assert self.layer.running_mean is not None and self.layer.running_var is not None
        return self.layer.running_mean, self.layer.running_var

    def begin(self) -> None:
        """Called before a batch."""
        self.layer.reset_running_stats()

    def add(self) -> None:
        """Called after a batch, over whose calls torch has averaged."""
        if new := int(self.layer.num_batches_tracked or 0):
            self.count += new
            for mean, now in zip(self._means, self._statistics, strict=True):
                mean.lerp_(now.to(mean.dtype), new / self.count)

    def finish(self) -> None:
        """Gives the layer its new statistics; those from before, if no batch has come to it."""
        if not self.count:
            self.restore()
            return
        for mean, now in zip(self._means, self._statistics, strict=True):
            now.copy_(mean)
        self.layer.num_batches_tracked.fill_(self.count)  # type: ignore[union-attr]

    def restore(self) -> None:
        """Gives the layer the statistics from before."""
        for name, buffer in self.layer.named_buffers(recurse=False):
            buffer.copy_(self._before[name])


def _exact(statistic: Tensor) -> torch.dtype:
    return torch.promote_types(statistic.dtype, torch.float32)


@contextmanager
def _estimating(model: nn.Module, averages: list[_Average]) -> Iterator[None]:
    """Has the layers, and nothing else, in training; restores their statistics after an error."""
    flags = {module: module.training for module in model.modules()}
    momenta = [each.layer.momentum for each in averages]
    try:
        model.eval()
        for each in averages:
            # torch's cumulative average.
            each.layer.momentum = None
            each.layer.training = True
        yield
    except BaseException:
        for each in averages:
            each.restore()
        raise
    finally:
        for each, momentum in zip(averages, momenta, strict=True):
            each.layer.momentum = momentum
        for module, flag in flags.items():
            module.training = flag


def _device(model: nn.Module) -> torch.device | None:
    devices = {each.device for each in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _forward(model: nn.Module, batch: Any, device: torch.device | str | None) -> None:
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(inputs, Mapping):
        model(**{name: _moved(each, device) for name, each in inputs.items()})
    else:
        model(_moved(inputs, device))


def _moved(inputs: Any, device: torch.device | str | None) -> Any:
    return inputs.to(device) if device is not None and isinstance(inputs, Tensor) else inputs
