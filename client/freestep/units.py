"""Units: the part of a run's data that a worker is handed, so that each example counts once, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from freestep.api.data import DataStatus
from freestep.optimizer import RemoteOptimizer
from freestep.unit_loader import UnitLoader
from freestep.unit_source import UnitSource

__all__ = ["Units"]


class Units:
    """A data set of an optimizer's run, cut into units, which workers are handed one by one.

    Iterating yields a `range` of examples for each unit. A unit goes with the first `step` after it was handed over: it
    counts once that push has counted, in the very same moment. A push that is dropped or refused gives its units back,
    and so does a worker that dies, and `zero_grad` where no step was taken, as when a GradScaler skips one; others are
    handed them then. So every example moves the weights once in a pass. `loader` makes batches of a data set.

    The loop ends when all units of all passes have counted. Where all that is left is out with other workers, it waits
    for them, unless this one has units itself that no push has named, because it accumulates gradients or takes local
    steps: then it ends before, with `exhausted` False. Take the step, or `push`, and iterate again.

    Several units at a time are claimed in the background, for about a second's work, except where workers wait for each
    other's pushes (`sync`, `quorum`, robust rules). There a worker that has to wait for units gives up its lease
    meanwhile. A loop that is left gives back what it has not begun, and a unit that `loader` has cut into batches of
    which the last is yet to come: gradients of the others that no step has pushed are discarded, which is said. If the
    worker loses its lease, the push of what it had is dropped, with the reason `unit-not-held`, and it goes on with
    other units. If it takes these before it pushes, the gradients that it had, and the local steps of its round, are
    discarded, which is said.

    Attribute: `spec`, the data set's DataSpec. Belongs to the thread of its optimizer.

    Example:
        >>> units = freestep.Units(opt, len(inputs), unit=256, passes=3)
        >>> while not units.exhausted:
        ...     for examples in units:
        ...         opt.zero_grad()
        ...         loss_fn(model(inputs[examples.start : examples.stop]), ...).backward()
        ...         opt.step(samples=len(examples))

    Args:
        optimizer: The worker's optimizer, or what Accelerate or Lightning has wrapped around it. One with a process
            group, and one with url="local", are refused.
        length: The number of examples.
        unit: Examples of a unit, the last of which may be shorter.
        passes: How often each example is to count; None for no end.
        name: The data set's name in the run: 1 to 64 letters, digits and any of `_.-`.
        shuffle: "blocks": a pass's units in an order that is computed of seed and pass; "none": as they lie.
        seed: Of the orders.

    Raises:
        DataExists: The run has a data set of this name that is another one.
        MalformedRequest: A number is out of bounds, or the run has too many data sets.
        FreestepError: The optimizer cannot be handed units.
    """

    def __init__(
        self,
        optimizer: RemoteOptimizer,
        length: int,
        *,
        unit: int,
        passes: int | None = 1,
        name: str = "train",
        shuffle: Literal["blocks", "none"] = "blocks",
        seed: int = 0,
    ) -> None:
        asked = {"length": length, "unit": unit, "passes": passes, "shuffle": shuffle, "seed": seed}
        self._source = UnitSource(optimizer, name, asked)
        self.spec = self._source.spec

    @property
    def name(self) -> str:
        """The data set's name."""
        return self._source.name

    @property
    def exhausted(self) -> bool:
        """Whether all units of all passes had counted when this worker last asked for one."""
        return self._source.exhausted

    def status(self) -> DataStatus:
        """How much of the data set is open, out and done, and which workers have units.

        Raises:
            ServiceUnreachable: The service did not answer in time.
        """
        return self._source.data.status()

    def loader(self, dataset: Any, *, batch_size: int, ahead: int = 0, **options: Any) -> UnitLoader:
        """An iterable of batches of a data set, as of a DataLoader; it ends as iterating over the units does.

        Units go with the batches through prefetching worker processes: a unit counts with the step that follows the
        last of its batches. The examples of a unit are shuffled, by the seed, if units are.

        Args:
            dataset: Has `len` and items by index, as torch's map-style datasets and those of Hugging Face do; `length`
                must be its length.
            batch_size: Examples of a batch. If it is not smaller than a unit, it must be a multiple of it: a batch is
                then of whole units. If it is smaller, a unit is cut into batches, the last of which may be shorter.
            ahead: How many batches the loop takes before it trains on them; 1 for loops that look for the last batch.
                Lightning's FreestepCallback says when a batch is begun instead.
            **options: As for torch.utils.data.DataLoader: `num_workers`, `collate_fn`, `pin_memory` and others.

        Raises:
            FreestepError: The batches cannot be of whole units, or the dataset does not fit.
        """
        return UnitLoader(self._source, dataset, batch_size, ahead, options)

    def __iter__(self) -> Iterator[range]:
        source = self._source
        source.begin()
        try:
            while True:
                while (stocked := source.take()) is not None:
                    source.note([stocked])
                    yield range(stocked.unit.begin, stocked.unit.end)
                if not source.await_more():
                    return
        finally:
            source.give_back()
