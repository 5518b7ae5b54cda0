"""A number of a run over its whole life, in a bounded number of points.

The law of this file: a point stands for observations that followed each other, up to `per_point` of them, by their
number, their mean, the least and the largest, and the step, the epoch and the time of the last. When there would be
more than 512 points, each two neighbours become one, and from then on a point stands for twice as many. An epoch begins
a point of its own; points that were made of two may be of two epochs.
"""

from __future__ import annotations

from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from freestep.api.history import MOST_POINTS

__all__ = ["Curve", "Moment"]

_COLUMNS = ("step", "epoch", "time", "count", "mean", "min", "max")


class Moment(NamedTuple):
    """When something was observed: the run's step and epoch, and the time in seconds since 1970."""

    step: int
    epoch: int
    time: float


class Curve:
    """One curve. per_point: how many observations a point stands for, a power of two."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self.per_point = 1
        self._most = most
        self._steps, self._epochs, self._times = array("q"), array("q"), array("d")
        self._counts, self._means, self._lows, self._highs = array("q"), array("d"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> float:
        """The time of the last observation; 0 where there is none."""
        return self._times[-1] if self._times else 0.0

    def add(self, at: Moment, value: float) -> None:
        """Adds an observation."""
        steps = self._steps
        if steps and self._counts[-1] < self.per_point and self._epochs[-1] == at.epoch:
            self._extend(at, value)
            return
        if len(steps) >= self._most:
            self._halve()
            self.add(at, value)
            return
        for column, number in zip(self._all(), (*at, 1, value, value, value), strict=True):
            column.append(number)

    def copy(self) -> Curve:
        """A copy of it, at the cost of its bytes."""
        copy = Curve(self._most)
        copy.per_point = self.per_point
        copy._set([column[:] for column in self._all()])
        return copy

    def thin(self, most: int) -> None:
        """Leaves at most so many points."""
        while len(self) > most:
            self._halve()

    def columns(self) -> dict[str, list[float]]:
        """Its points by what they have, as `api/history.py` names that."""
        return {name: column.tolist() for name, column in zip(_COLUMNS, self._all(), strict=True)}

    def to_document(self) -> dict[str, Any]:
        """All of it as JSON, whose columns are bytes of 64-bit numbers in base 64: of these JSON is made in no time."""
        columns = zip(_COLUMNS, self._all(), strict=True)
        packed = {name: b64encode(column.tobytes()).decode() for name, column in columns}
        return {"per_point": self.per_point, **packed}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Curve:
        """Of what `to_document` has made. Raises ValueError, KeyError and TypeError for anything else."""
        curve = cls()
        curve.per_point = int(document["per_point"])
        columns = curve._all()
        for name, column in zip(_COLUMNS, columns, strict=True):
            column.frombytes(b64decode(document[name], validate=True))
        is_whole = len(set(map(len, columns))) == 1 and len(curve) <= MOST_POINTS and curve.per_point > 0
        if not is_whole or not all(isfinite(number) for column in columns for number in column):
            raise ValueError("its columns are no curve's")
        return curve

    def _all(self) -> tuple[array[Any], ...]:
        return self._steps, self._epochs, self._times, self._counts, self._means, self._lows, self._highs

    def _set(self, columns: list[array[Any]]) -> None:
        self._steps, self._epochs, self._times, self._counts, self._means, self._lows, self._highs = columns

    def _extend(self, at: Moment, value: float) -> None:
        self._steps[-1], _, self._times[-1] = at
        count = self._counts[-1] = self._counts[-1] + 1
        # Neither a sum nor a difference, which could overflow.
        self._means[-1] += value / count - self._means[-1] / count
        if value < self._lows[-1]:
            self._lows[-1] = value
        elif value > self._highs[-1]:
            self._highs[-1] = value

    def _halve(self) -> None:
        self.per_point *= 2
        whole = len(self) - len(self) % 2
        counts, means = self._counts, self._means
        merged = [
            _weighted(means[left], counts[left], means[left + 1], counts[left + 1]) for left in range(0, whole, 2)
        ]
        made: list[array[Any]] = [
            self._steps[1::2],
            self._epochs[1::2],
            self._times[1::2],
            array("q", map(sum, zip(counts[0:whole:2], counts[1::2], strict=True))),
            array("d", merged),
            array("d", map(min, self._lows[0:whole:2], self._lows[1::2])),
            array("d", map(max, self._highs[0:whole:2], self._highs[1::2])),
        ]
        if whole < len(self):
            for old, new in zip(self._all(), made, strict=True):
                new.append(old[-1])
        self._set(made)


def _weighted(one: float, ones: int, other: float, others: int) -> float:
    share = ones / (ones + others)
    return one * share + other * (1 - share)
