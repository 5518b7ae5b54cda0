"""What the parts of a run need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.records import Origin, Receipts
from freestep_service.runs.background import Background
from freestep_service.runs.events import RunEvents
from freestep_service.runs.history import RunHistory
from freestep_service.runs.known_leases import KnownLeases
from freestep_service.runs.resources import Resources
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.settings import Settings

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """A run's name and spec, its part of Redis, and what this process keeps and has for it.

    canonical_spec: the spec as JSON, by which specs are compared. origin: where the run began. manifest: of the whole
    model. receipts: the decided pushes, as Redis has them. known_leases: whose claims are likely to be admitted.
    events: told by whoever sees them happen. history: hears of all events.
    """

    name: str
    spec: RunSpec
    canonical_spec: str
    origin: Origin
    manifest: Manifest
    coordinator: Coordinator
    receipts: Receipts
    known_leases: KnownLeases
    telemetry: RunMetrics
    events: RunEvents
    history: RunHistory
    background: Background
    resources: Resources

    @property
    def settings(self) -> Settings:
        return self.resources.settings

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether checkpoints of the run are written."""
        return self.spec.durability != "none"

    @property
    def keeps_journal(self) -> bool:
        """Whether what is acknowledged is on disk."""
        return self.spec.durability == "journal"
