"""The refusal of a spec for a run that has another one."""

from __future__ import annotations

from freestep.api.differences import SpecDifferences
from freestep.api.models import RunSpec
from freestep.errors import RunExists

__all__ = ["require_same_spec"]


def require_same_spec(run: str, wanted: RunSpec, existing: RunSpec) -> None:
    """Raises RunExists, which names what differs."""
    if wanted != existing:
        found = SpecDifferences.of(wanted, existing)
        raise RunExists(f"the run {run!r} exists with another spec: {found}", run=run, differences=found.listed())
