"""Watches the condition of Redis while the service lives: what a start would be refused for may come later."""

from __future__ import annotations

import logging

from freestep_service.coordination.condition import faults
from freestep_service.coordination.store import Store

__all__ = ["StoreWatch"]

logger = logging.getLogger("freestep")


class StoreWatch:
    """What was wrong with Redis when it was looked at last. Each fault is logged once, and when it is over."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._faults: list[str] = []

    @property
    def problem(self) -> str | None:
        """All faults; None while there are none."""
        return "; ".join(self._faults) or None

    async def look(self) -> None:
        """Raises CoordinatorUnavailable."""
        found = await faults(self._store)
        for fault in found:
            if fault not in self._faults:
                logger.error("%s", fault)
        for fault in self._faults:
            if fault not in found:
                logger.info("no more: %s", fault)
        self._faults = found
