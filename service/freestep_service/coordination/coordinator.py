"""A run's part of Redis, by resource.

Every change is one script of lua/. The head of a script states its keys, arguments and returns; the modules here name
the keys, call the scripts and raise their refusals.
"""

from __future__ import annotations

from freestep_service.coordination.data import RunData
from freestep_service.coordination.leases import RunLeases
from freestep_service.coordination.log import RunLog
from freestep_service.coordination.opening import RunOpening
from freestep_service.coordination.pushes import RunPushes
from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import UNKNOWN_ORIGIN, Origin

__all__ = ["Coordinator"]


class Coordinator:
    """One run in Redis: its opening, its workers' leases, its pushes, its log and its data sets."""

    def __init__(self, store: Store, run: str, spec: str, policy: Policy, origin: Origin = UNKNOWN_ORIGIN) -> None:
        """spec: the run's, as canonical JSON. origin: where it began."""
        scripts = RunScripts(store, run)
        self.channel = scripts.key("messages")
        """The channel on which scripts publish what they change, to the owners of shards."""
        self.opening = RunOpening(scripts, spec, policy, origin)
        self.leases = RunLeases(scripts)
        self.pushes = RunPushes(scripts)
        self.log = RunLog(scripts)
        self.data = RunData(scripts)
