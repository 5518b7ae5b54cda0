"""What Redis and storage together know of a run that is to be opened.

The law of this file: it changes nothing, and what a newer version has left is found first. Storage has the spec of a
run whose data Redis has lost, and Redis that of one whose file is lost or damaged; the later origin tells which run of
its name it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from freestep.api.models import RunSpec
from freestep.api.validation import first_fault
from freestep.errors import StorageUnavailable
from freestep_service.domain.records import Origin
from freestep_service.domain.run_view import RunView
from freestep_service.runs.resources import Resources
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.medium import Storage
from freestep_service.storage.newer_files import require_known_beginnings
from freestep_service.storage.run_files import RunFile

__all__ = ["KnownRun", "look_for_newer", "read_known"]


class KnownRun(NamedTuple):
    """What a run is, into how many shards it is divided, and where it began, as far as that is known."""

    spec: RunSpec
    shards: int
    origin: Origin


async def read_known(resources: Resources, name: str, view: RunView | None) -> KnownRun | None:
    """A run, by what Redis and storage have of it; None where neither has. view: what Redis has.

    Raises NewerFormat, also where this version does not know what the spec names, and StorageUnavailable or Damaged
    where it is in storage alone and cannot be read.
    """
    try:
        await look_for_newer(resources, require_known_beginnings, name)
    except NewerFormat:
        raise
    except StorageUnavailable:
        # Whoever needs what cannot be read says so.
        pass
    try:
        file = await resources.disk.run(RunFile.read, resources.storage, name)
    except NewerFormat:
        raise
    except FileNotFoundError:
        if view is None:
            return None
        file = None
    except (Damaged, StorageUnavailable):
        if view is None:
            raise
        file = None
    origin = max(file.origin if file else Origin(), view.origin if view else Origin())
    if file and view and file.epoch < origin.first_epoch:
        # It was left by the deletion of an earlier run of this name.
        file = None
    try:
        text = file.spec if file else view.run["spec"] if view else ""
        spec = await asyncio.to_thread(RunSpec.model_validate_json, text)
    except ValidationError as error:
        place, why = first_fault(error)
        field = ".".join(map(str, place))
        raise NewerFormat("its spec", f"is not valid in this version of freestep: {field}: {why}") from None
    return KnownRun(spec, view.count if view else file.shards if file else spec.shards, origin)


async def look_for_newer(resources: Resources, look: Callable[[Storage, str, Path], None], name: str) -> None:
    """Looks at a run's files with one of newer_files.py, and raises what that raises."""
    await resources.disk.run(look, resources.storage, name, resources.settings.journals() / name)
