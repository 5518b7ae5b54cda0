"""The log of a shard: entries come in any order, and are applied in the order of their sequence numbers.

Where an update needs the distances between its pushes over all shards (`Shard.needs_distances`), the entry that makes
it is held, and those behind it, until it has them.

The law of this file: no IO, no clock, no thread. An entry owns the memory that its gradient lies in, until it has been
applied or can never be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from freestep_service.domain.control import ControlChange
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.marks import Marks
from freestep_service.domain.records import Claim, LogPosition, Record
from freestep_service.domain.reports import Measured
from freestep_service.optimizers import Pushed
from freestep_service.state.buffers import Hold

__all__ = ["Entry", "Log"]


@dataclass(frozen=True)
class Entry:
    """One entry of the commit log, with the gradient that was staged for it.

    seq: its place in the log. epoch: the run's when it was committed.
    advance: whether the pushes gathered so far, this one included, become an update.
    gradient: flat [numel], on the host or on the shard's device, as it came; None where the entry is no push: the end
        of a lease closed the update, the entry only marks a place, or it tells of a push that was dropped.
    hold: the memory that the gradient lies in; the entry owns it, and the writer gives it back.
    weight: the push's share in the mean, in samples. scale: what clipping leaves of the gradient, in (0, 1].
    damping: what staleness leaves of the learning rate, in (0, 1].
    lateness: the staleness τ that bounds the learning rate, to 1/τ; 0 where none does.
    is_weighed: whether these four are known: they are the spec's that is in force where the entry is taken, so where
        they are not, the shard finds them (`weighing.weighed`), from `samples` and `bound` among others.
    samples: as the push gives them. bound: the norm that it is clipped to beside `max_grad_norm`; None where none is.
    staleness: the push's, in steps. live: the live workers when it was committed.
    loss: the push's training loss; 0 where it gives none.
    norm: the push's, over all shards, before clipping; None where the entry is no push. A push whose norm alone counts
        has no gradient. is_outlier: whether it is far beyond the run's usual.
    """

    seq: int
    epoch: int
    advance: bool
    gradient: Pushed | None = None
    hold: Hold | None = field(default=None, repr=False)
    worker: str = ""
    weight: float = 1.0
    scale: float = 1.0
    damping: float = 1.0
    lateness: int = 0
    is_weighed: bool = True
    samples: float | None = None
    bound: float | None = None
    staleness: int = 0
    live: int = 1
    loss: float = 0.0
    norm: float | None = None
    is_outlier: bool = False
    members: Mapping[str, Any] | None = field(default=None, repr=False)
    """The entry as Redis has it, for the journal; None where there is none, or it is there already."""
    record: Record | None = field(default=None, repr=False)
    """The decision on the push; None where the entry is no push."""
    claim: Claim | None = field(default=None, repr=False)
    """The claim of the push."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """Ticket -> "POINT DTYPE", and the shard where only one is asked: the points to copy after this entry."""
    checkpoint: bool = False
    """Whether to copy the whole state after this entry."""
    measured: Measured | None = None
    """A metric that was reported."""
    data: NewDataSet | None = None
    """A data set that was added."""
    control: ControlChange | None = None
    """A change of the run."""
    units: Marks = field(default_factory=dict)
    """The units of data sets that count with the push."""
    distances: Tensor | None = None
    """The squared distances between the update's pushes over all shards, fp64, in the order of `square_distances`; None
    where the update needs none, or they are not known yet."""


class Log:
    """Which entries a shard has heard of, holds and has taken, in one epoch.

    needs_distances: whether an entry that makes an update is taken with the distances between its pushes only.
    is_recorded: whether entries are taken only once they are in a journal.
    """

    def __init__(self, *, needs_distances: bool = False, is_recorded: bool = False) -> None:
        self.epoch = 0
        """The epoch whose entries are taken."""
        self.known_seq = 0
        """The newest entry heard of in this epoch."""
        self._next_seq = 1
        self._needs_distances = needs_distances
        self._is_recorded = is_recorded
        self._sent_seq = self._recorded_seq = 0
        """The newest entry that was handed to the journal, and the newest that is in it."""
        self._paused = True
        self._held: dict[tuple[int, int], Entry] = {}

    @property
    def position(self) -> LogPosition:
        """How much of the log is known to exist."""
        return LogPosition(self.epoch, self.known_seq)

    @property
    def taken_seq(self) -> int:
        """The newest entry that was taken."""
        return self._next_seq - 1

    @property
    def has_gap(self) -> bool:
        """Whether entries are held because one before them has not come."""
        return bool(self._held) and not self._paused and (self.epoch, self._next_seq) not in self._held

    @property
    def awaiting(self) -> Entry | None:
        """The next entry, where it is held until it has its distances."""
        entry = None if self._paused else self._held.get((self.epoch, self._next_seq))
        return entry if entry is not None and self._needs_distances and self._waits(entry) else None

    @staticmethod
    def _waits(entry: Entry) -> bool:
        return entry.advance and entry.distances is None

    def has(self, epoch: int, seq: int) -> bool:
        """Whether an entry has been added."""
        return (epoch == self.epoch and seq < self._next_seq) or (epoch, seq) in self._held

    def is_past(self, epoch: int, seq: int) -> bool:
        """Whether an entry can no longer be taken: the log has gone on without it, or in another epoch."""
        return not self._paused and (epoch != self.epoch or seq < self._next_seq)

    def note(self, epoch: int, seq: int) -> None:
        """Notes that an entry exists, which is still to be added."""
        if epoch == self.epoch:
            self.known_seq = max(self.known_seq, seq)

    def add(self, entry: Entry) -> None:
        """Holds an entry until those before it have come."""
        self._held[entry.epoch, entry.seq] = entry
        self.note(entry.epoch, entry.seq)

    def add_distances(self, epoch: int, seq: int, distances: Tensor) -> None:
        """Gives an entry its distances, if it is held."""
        if (entry := self._held.get((epoch, seq))) is not None:
            self._held[epoch, seq] = replace(entry, distances=distances)

    def take(self) -> Iterator[Entry]:
        """The held entries that are next in order, as far as none of them waits."""
        while not self._paused and (entry := self._held.get((self.epoch, self._next_seq))):
            if self._needs_distances and self._waits(entry):
                return
            if self._is_recorded and self._recorded_seq < self._next_seq:
                return
            del self._held[self.epoch, self._next_seq]
            self._next_seq += 1
            self.note(entry.epoch, entry.seq)
            yield entry

    def unrecorded(self) -> Iterator[Entry]:
        """The held entries that are next to be recorded, each once."""
        while not self._paused and (entry := self._held.get((self.epoch, self._sent_seq + 1))):
            if self._needs_distances and self._waits(entry):
                return
            self._sent_seq += 1
            yield entry

    def recorded(self, seq: int) -> None:
        """The entries up to one are in the journal."""
        self._recorded_seq = seq

    def pause(self) -> None:
        """Takes no entries until `resume`; those that come are held."""
        self._paused = True

    def resume(self, epoch: int, seq: int, recorded_seq: int = 0) -> list[Entry]:
        """Goes on after entry `seq` of an epoch; returns the held entries that can never be taken.

        recorded_seq: the newest entry that is in the journal already.
        """
        self._paused = False
        self._sent_seq = self._recorded_seq = max(seq, recorded_seq)
        self.epoch, self.known_seq, self._next_seq = epoch, seq, seq + 1
        for held_epoch, held_seq in self._held:
            self.note(held_epoch, held_seq)
        return self._drop(lambda held_epoch, held_seq: held_epoch != epoch or held_seq <= seq)

    def drop_held(self) -> list[Entry]:
        """Forgets all held entries, and returns them."""
        return self._drop(lambda _epoch, _seq: True)

    def _drop(self, is_dropped: Callable[[int, int], bool]) -> list[Entry]:
        keys = [key for key in self._held if is_dropped(*key)]
        return [self._held.pop(key) for key in keys]
