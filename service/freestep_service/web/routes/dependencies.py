"""What handlers of the control plane are given: the run that the path names, and parts of the service."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request
from pydantic import BeforeValidator, WithJsonSchema

from freestep.errors import CoordinatorUnavailable, RunNotFound, ShardUnavailable
from freestep_service.domain.run_names import RUN_NAME
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.web.context import ServiceContext
from freestep_service.web.fields import PathField, integer
from freestep_service.web.headers import LEASE_ID
from freestep_service.web.memories import Memories
from freestep_service.web.problem_documents import refuses
from freestep_service.web.relay import Relay

__all__ = ["AnyMemories", "AnyRegistry", "AnyRelay", "AnyRun", "LeaseId", "RunName", "Step"]

RunName = Annotated[str, Path(pattern=f"^{RUN_NAME}$", description="The run's name.", examples=["mnist"])]
LeaseId = Annotated[str, Path(pattern=f"^{LEASE_ID}$", description="The lease's ID.")]
_STEP = PathField("step", integer(0), "The checkpoint's step.")
# Pydantic alone would take "1_0" for ten.
Step = Annotated[
    int, BeforeValidator(_STEP.parse), WithJsonSchema(dict(_STEP.kind.schema)), Path(description=_STEP.description)
]

# Coroutines, though they wait for nothing: FastAPI calls plain functions in a thread.


async def _registry(request: Request) -> Registry:
    return ServiceContext.of(request).registry


AnyRegistry = Annotated[Registry, Depends(_registry)]


async def _relay(request: Request) -> Relay:
    return ServiceContext.of(request).relay


AnyRelay = Annotated[Relay, Depends(_relay)]


async def _memories(request: Request) -> Memories:
    return ServiceContext.of(request).memories


AnyMemories = Annotated[Memories, Depends(_memories)]


@refuses(RunNotFound, CoordinatorUnavailable, ShardUnavailable)
async def _run(run: RunName, registry: AnyRegistry) -> Run:
    return await registry.find(run)


AnyRun = Annotated[Run, Depends(_run)]
