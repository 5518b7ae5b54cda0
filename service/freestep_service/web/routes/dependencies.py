"""What handlers of the control plane are given: the run that the path names, and parts of the service."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.web.context import ServiceContext
from freestep_service.web.relay import Relay

__all__ = ["LONGEST_LEASE", "RUN_NAME", "AnyRegistry", "AnyRelay", "AnyRun", "LeaseId", "RunName"]

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
LONGEST_LEASE = 200

RunName = Annotated[str, Path(pattern=f"^{RUN_NAME}$")]
LeaseId = Annotated[str, Path(min_length=1, max_length=LONGEST_LEASE)]

# Coroutines, though they wait for nothing: FastAPI calls plain functions in a thread.


async def _registry(request: Request) -> Registry:
    return ServiceContext.of(request).registry


AnyRegistry = Annotated[Registry, Depends(_registry)]


async def _relay(request: Request) -> Relay:
    return ServiceContext.of(request).relay


AnyRelay = Annotated[Relay, Depends(_relay)]


async def _run(run: RunName, registry: AnyRegistry) -> Run:
    return await registry.find(run)


AnyRun = Annotated[Run, Depends(_run)]
