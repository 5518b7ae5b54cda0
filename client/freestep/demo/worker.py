"""A worker: `python -m freestep.demo.worker`. Any number can run, and start and end at any time."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freestep.client import Client
from freestep.demo.data import Digits, load
from freestep.demo.model import SmallConvNet
from freestep.demo.options import end_between_steps, parser
from freestep.errors import RunNotFound
from freestep.lease import worker_name
from freestep.optimizer import RemoteOptimizer

__all__ = ["BATCH", "batches", "main", "shifted"]

logger = logging.getLogger("freestep.demo")

BATCH = 32
"""Images behind a gradient."""
LEASE_TTL_MS = 3000
"""Short, so that a killed worker is soon known to be gone."""
_PATIENCE_S = 600.0
"""Seconds for which a worker waits for a service that does not answer, such as on a host that restarts."""


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch shifted by up to two pixels each way, which augments the 4,000 images."""
    down, right = torch.randint(-2, 3, (2,), generator=generator, dtype=torch.int64, device="cpu").tolist()
    return images.roll((down, right), (2, 3))


def batches(digits: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shifted images and their digits, in one random order after another, without an end."""
    while True:
        order = torch.randperm(len(digits.train_labels), generator=generator, dtype=torch.int64, device="cpu")
        for indices in torch.split(order, size):
            yield shifted(digits.train_images[indices], generator), digits.train_labels[indices]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--worker", default=os.environ.get("FREESTEP_WORKER") or worker_name(), help="its name")
    options.add_argument("--batch", type=int, default=BATCH, help="images behind a gradient")
    options.add_argument("--shards", type=int, default=os.environ.get("FREESTEP_SHARDS"), help="of a run that is new")
    options.add_argument("--steps", type=int, help="stop after this many pushes; by default, at a signal")
    options.add_argument("--seed", type=int, help="of the order of its images; else each worker has its own")
    options.add_argument("--told", type=Path, help="a file that gets a byte for each push that was applied")
    chosen = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with end_between_steps() as ending:
        _train(chosen, ending)


def _train(chosen: argparse.Namespace, ending: threading.Event) -> None:
    # One thread: as many workers as cores share the machine, and more threads would spin against each other.
    torch.set_num_threads(1)
    digits = load(chosen.data)
    # Workers see the images in different orders, but have the same initial weights, whichever of them uploads its own.
    torch.manual_seed(0)
    model = SmallConvNet()
    generator = torch.Generator()
    if chosen.seed is None:
        generator.seed()
    else:
        generator.manual_seed(chosen.seed)
    with (
        chosen.told.open("ab", buffering=0) if chosen.told else nullcontext() as told,
        Client(chosen.url, retry_for=_PATIENCE_S) as client,
        RemoteOptimizer(
            model,
            client=client,
            run=chosen.run,
            algorithm="adamw_schedule_free",
            lr=2.5e-3,
            worker=chosen.worker,
            shards=chosen.shards,
            lease_ttl_ms=LEASE_TTL_MS,
        ) as optimizer,
    ):
        logger.info("%s joined %s", chosen.worker, chosen.run)
        for pushes, (images, labels) in enumerate(batches(digits, chosen.batch, generator)):
            if pushes == chosen.steps or ending.is_set():
                break
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            try:
                optimizer.step(loss=loss.detach(), samples=len(labels))
            except RunNotFound:
                logger.info("%s ends: the run %s is gone", chosen.worker, chosen.run)
                return
            if told is not None and optimizer.receipt is not None and optimizer.receipt.decision == "applied":
                told.write(b".")
            if (pushes + 1) % 100 == 0:
                logger.info(
                    "%s pushed %d, loss %.3f, %s", chosen.worker, pushes + 1, float(loss.detach()), optimizer.receipt
                )


if __name__ == "__main__":
    main()
