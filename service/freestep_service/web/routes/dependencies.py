"""What handlers are given: the run that the path names, and the service's parts."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Request

from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.web.relay import Relay

__all__ = ["LONGEST_LEASE", "RUN_NAME", "AnyRegistry", "AnyRelay", "AnyRun", "LeaseId", "RunName"]

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
LONGEST_LEASE = 200

# They are coroutines though they wait for nothing, since FastAPI calls plain functions in a thread.

RunName = Annotated[str, Path(pattern=RUN_NAME)]
LeaseId = Annotated[str, Path(min_length=1, max_length=LONGEST_LEASE)]


async def _registry(request: Request) -> Registry:
    return cast(Registry, request.app.state.registry)


AnyRegistry = Annotated[Registry, Depends(_registry)]


async def _relay(request: Request) -> Relay:
    return cast(Relay, request.app.state.relay)


AnyRelay = Annotated[Relay, Depends(_relay)]


async def _run(run: RunName, registry: AnyRegistry) -> Run:
    return await registry.find(run)


AnyRun = Annotated[Run, Depends(_run)]
