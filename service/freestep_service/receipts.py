"""The receipts of a run's decided pushes, as each of its processes keeps them.

The law of this file: they are those that Redis holds. What it decides is remembered, and what it drops is forgotten;
where it has lost them, it gets them back from here.
"""

from __future__ import annotations

from collections.abc import Iterable

from freestep_service.records import Record

__all__ = ["Receipts"]


class Receipts(dict[str, Record]):
    """The decided pushes by idempotency key, oldest first: the same that Redis holds."""

    def remember(self, key: str, record: Record, evicted: Iterable[str]) -> None:
        self[key] = record
        self.forget(evicted)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.pop(key, None)

    def until(self, seq: int) -> dict[str, Record]:
        """Those of the log up to an entry, and the dropped, which have no place in it."""
        return {key: record for key, record in self.items() if record.seq <= seq}
