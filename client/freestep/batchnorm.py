"""BatchNorm at x: running statistics estimated anew."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["reestimate_batchnorm"]

logger = logging.getLogger("freestep")


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, batches: int | None = None, device: torch.device | str | None = None
) -> int:
    """Estimates the running statistics of a model's BatchNorm layers anew, at the weights that it contains.

    A worker's BatchNorm gathers its statistics while the model contains y. x is another point: call `opt.eval()`, or
    load x, and then this, before the model is evaluated or saved. The statistics become the plain averages over the
    batches, as the README of the schedulefree package advises. Only BatchNorm layers are in training mode meanwhile:
    dropout, say, is off, as it will be when the statistics are used. Weights, momenta and training flags are as before
    afterwards; after an error, the statistics too.

    Args:
        model: The model. Layers without running statistics are left alone.
        loader: Batches of training data: inputs; or a tuple or list whose first element are the inputs; or a dict of
            the model's arguments. Batches of some size: every batch weighs the same.
        batches: The most batches that are read; None reads all.
        device: Where inputs are moved to; None is the device of the model's parameters, if all are on one.

    Returns:
        The number of layers; if it is 0, the loader is not read.

    Raises:
        ValueError: The loader has no batches.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not layers:
        logger.info("the model has no BatchNorm layers with running statistics: nothing was estimated")
        return 0
    device = device or _device(model)
    with _estimating(model, layers):
        count = 0
        for batch in islice(loader, batches):
            _forward(model, batch, device)
            count += 1
        if not count:
            raise ValueError("the loader has no batches: BatchNorm's statistics are as they were")
    return len(layers)


@contextmanager
def _estimating(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Resets the layers' statistics, and has them average over the batches."""
    flags = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    statistics = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            # torch's cumulative average.
            layer.momentum = None
            layer.training = True
        yield
    except BaseException:
        for layer, buffers in zip(layers, statistics, strict=True):
            for name, buffer in layer.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
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
