"""A worker: `python -m freestep.demo.worker`. Any number can run, and start and end at any time."""

from __future__ import annotations

import logging
import os
import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freestep.client import Client
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet
from freestep.demo.options import end_on_signals, parser
from freestep.errors import RunNotFound
from freestep.lease import worker_name
from freestep.optimizer import RemoteOptimizer

__all__ = ["main"]

logger = logging.getLogger("freestep.demo")

LEASE_TTL_MS = 3000
"""Short, so that a killed worker is soon known to be gone."""
_PATIENCE_S = 600.0
"""Seconds for which a worker waits for a service that does not answer, such as on a host that restarts."""


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch shifted by up to two pixels each way, which augments the 4,000 images."""
    down, right = torch.randint(-2, 3, (2,), generator=generator, dtype=torch.int64, device="cpu").tolist()
    return images.roll((down, right), (2, 3))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--worker", default=os.environ.get("FREESTEP_WORKER") or worker_name(), help="its name")
    options.add_argument("--batch", type=int, default=32, help="images behind a gradient")
    options.add_argument("--shards", type=int, default=os.environ.get("FREESTEP_SHARDS"), help="of a run that is new")
    options.add_argument("--steps", type=int, help="stop after this many pushes; by default, at a signal")
    options.add_argument("--seed", type=int, help="of the order of its images; else each worker has its own")
    chosen = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    end_on_signals()
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
        pushes = 0
        while chosen.steps is None or pushes < chosen.steps:
            count = len(digits.train_labels)
            order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
            for indices in torch.split(order, chosen.batch):
                optimizer.zero_grad()
                images = shifted(digits.train_images[indices], generator)
                loss = cross_entropy(model(images), digits.train_labels[indices])
                loss.backward()  # type: ignore[no-untyped-call]
                try:
                    optimizer.step(loss=loss.detach(), samples=len(indices))
                except RunNotFound:
                    logger.info("%s ends: the run %s is gone", chosen.worker, chosen.run)
                    return
                pushes += 1
                if pushes % 100 == 0:
                    logger.info(
                        "%s pushed %d, loss %.3f, %s", chosen.worker, pushes, float(loss.detach()), optimizer.receipt
                    )
                if pushes == chosen.steps:
                    break


if __name__ == "__main__":
    main()
