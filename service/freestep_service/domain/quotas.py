"""Quotas of tokens: how much of a service one token may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["NO_QUOTA", "ByteRates", "Quota"]

_MOST_RATES = 4096
_MINUTE_S = 60.0


@dataclass(frozen=True)
class Quota:
    """The most that a token may have or use; None is no bound, or that of a default.

    runs: that it has created and that exist. parameters: elements of all of these. leases: that are live.
    bytes_per_minute: of tensors, received and sent, at each process.
    """

    runs: int | None = None
    parameters: int | None = None
    leases: int | None = None
    bytes_per_minute: int | None = None


NO_QUOTA = Quota()


@dataclass
class _Bucket:
    """A token bucket that may be overdrawn; `level` is what was left, in bytes, at the time `at`."""

    level: float
    at: float


class ByteRates:
    """How many bytes the tokens have moved lately: a bucket each, which a minute fills.

    Who has anything left may move a body of any size, and then waits until the overdraft is made up for: so the mean
    rate holds, and a body larger than a minute's quota is possible. clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def wait_s(self, token: str, per_minute: int) -> float:
        """Seconds until a token has something left; 0 if it has."""
        level = self._filled(token, per_minute).level
        return 0.0 if level > 0 else (1 - level) * _MINUTE_S / per_minute

    def spend(self, token: str, per_minute: int, size: int) -> None:
        """Counts bytes that a token moves."""
        self._filled(token, per_minute).level -= size

    def _filled(self, token: str, per_minute: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(token)
        if bucket is None:
            if len(self._buckets) >= _MOST_RATES:
                self._drop_full(now)
            bucket = self._buckets[token] = _Bucket(per_minute, now)
        bucket.level = min(bucket.level + (now - bucket.at) * per_minute / _MINUTE_S, per_minute)
        bucket.at = now
        return bucket

    def _drop_full(self, now: float) -> None:
        """Forgets the buckets that a minute without use has filled."""
        self._buckets = {
            token: bucket for token, bucket in self._buckets.items() if bucket.level < 0 or now < bucket.at + _MINUTE_S
        }
