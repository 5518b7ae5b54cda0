"""Outer optimizers for regions: the validation loss of two regions beside one, in one process and without a network.

    python -m benchmarks.region_outer [--steps 320] [--every 16] [--late 5]

The lab's character model, four workers with batches of 8. One region takes steps of AdamW Schedule-Free with the
batches of all; two regions take as many with half of them each, and after every H steps the parent's DiLoCo merges what
they have made. A region is moved some steps after its round has ended, as while a push travels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from examples.lab.characters import Text, Transformer

REGIONS, WORKERS, BATCH, LENGTH, WIDTH, LAYERS = 2, 4, 8, 64, 64, 2
OUTER = ((1.0, 0.0), (1.0, 0.5), (1.0, 0.7), (0.7, 0.9))
"""lr and momentum."""


class Region:
    """A model and its optimizer, of which `workers` take part in each step."""

    def __init__(self, text: Text, steps: int, workers: range) -> None:
        from schedulefree import AdamWScheduleFree

        torch.manual_seed(0)
        self.model = Transformer(text.alphabet, LENGTH, WIDTH, LAYERS)
        self.text, self.workers = text, workers
        self.optimizer = AdamWScheduleFree(self.model.parameters(), lr=0.0025, warmup_steps=steps // 10)
        self.optimizer.train()

    def step(self, number: int) -> None:
        batches = [self.text.batch(BATCH, number * WORKERS + worker) for worker in self.workers]
        self.optimizer.zero_grad()
        self.model.loss(torch.cat(batches)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @property
    def y(self) -> Tensor:
        return torch.cat([each.detach().reshape(-1) for each in self.model.parameters()])

    @torch.no_grad()
    def translate(self, difference: Tensor) -> None:
        parameters = list(self.model.parameters())
        parts = torch.split(difference, [each.numel() for each in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter))
            self.optimizer.state[parameter]["z"].add_(part.view_as(parameter))

    def loss(self) -> float:
        """At x."""
        self.optimizer.eval()
        return self.model.mean_loss(self.text.validation_windows(256))


def alone(text: Text, steps: int) -> float:
    region = Region(text, steps, range(WORKERS))
    for number in range(steps):
        region.step(number)
    return region.loss()


def merged(text: Text, steps: int, every: int, late: int, lr: float, momentum: float) -> float:
    """The loss at the parent's y, which is its x."""
    share = WORKERS // REGIONS
    regions = [Region(text, steps, range(share * each, share * (each + 1))) for each in range(REGIONS)]
    y = regions[0].y
    base, moved, due = y.clone(), torch.zeros_like(y), -1
    sent: list[Tensor] = []
    for number in range(1, steps + 1):
        for region in regions:
            region.step(number - 1)
        if number % every == 0:
            sent = [region.y for region in regions]
            gradient = base - sum(sent) / REGIONS
            moved = momentum * moved + gradient
            base = y = y - lr * (gradient + momentum * moved)
            due = min(number + late, steps)
        if number == due:
            for region, its in zip(regions, sent, strict=True):
                region.translate(y - its)
    torch.nn.utils.vector_to_parameters(y, regions[0].model.parameters())
    return regions[0].model.mean_loss(text.validation_windows(256))


def lines(steps: int, every: int, late: int) -> Iterator[str]:
    text = Text(LENGTH)
    one = alone(text, steps)
    yield f"one region: {one:.4f}"
    for lr, momentum in OUTER:
        two = merged(text, steps, every, late, lr, momentum)
        yield f"two regions, lr {lr:g}, momentum {momentum:g}: {two:.4f} ({100 * (two / one - 1):+.2f}%)"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--steps", type=int, default=320)
    command.add_argument("--every", type=int, default=16, help="steps of a round")
    command.add_argument("--late", type=int, default=5, help="steps of the next round before a region is moved")
    given = command.parse_args()
    torch.set_num_threads(1)
    for line in lines(given.steps, given.every, given.late):
        print(line, flush=True)


if __name__ == "__main__":
    main()
