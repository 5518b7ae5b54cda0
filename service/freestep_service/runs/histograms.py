"""Histograms for Prometheus that cost a push a fraction of a microsecond each.

The library's take a lock and search their buckets one by one. Here one thread counts (the event loop's), and the one
that exposes reads: a value that is being counted meanwhile may be missing from the sum and be in the count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

__all__ = ["SECONDS", "Histogram", "Series"]

SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Upper bounds for durations, from what Redis takes on the same machine to what a slow peer's body may take."""


class Series:
    """What was counted under one set of labels."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds, and how many values are at most so large."""
        counted = accumulate(self.counts)
        return [
            ("+Inf" if bound == inf else repr(float(bound)), count)
            for bound, count in zip((*self.bounds, inf), counted, strict=True)
        ]


class Histogram(Collector):
    """A histogram with series by labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._bounds = tuple(bounds)
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series under these values of the labels."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._bounds)
        return series

    def remove(self, *values: str) -> None:
        """Removes the series whose first labels have these values."""
        for found in [each for each in self._series if each[: len(values)] == values]:
            del self._series[found]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Its name, for the registry."""
        yield self._family()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Its series."""
        family = self._family()
        for values, series in list(self._series.items()):
            family.add_metric(values, series.buckets(), series.total)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
