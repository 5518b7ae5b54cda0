"""Liveness, readiness, metrics."""

from __future__ import annotations

import asyncio
from typing import Literal

import torch
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from freestep.errors import CoordinatorUnavailable, ShardUnavailable, StorageUnavailable
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import needs, open_to_all, visitor
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.documents import answer

router = APIRouter(tags=["health"], route_class=JsonRoute)


class Health(BaseModel):
    """That a process serves requests."""

    status: Literal["ok"] = "ok"
    version: str


class Readiness(BaseModel):
    """That a service can be used, and what is wrong with runs, by name."""

    status: Literal["ready"] = "ready"
    device: str
    problems: dict[str, str]
    shared_memory: str | None = None
    """The Unix socket at which clients on this machine get shared memory; none where no memory is shared."""


@router.get("/healthz")
@open_to_all
async def healthz(request: Request) -> Health:
    """Answers while the process serves requests, with the version of freestep that it is."""
    return Health(version=request.app.version)


@router.get("/readyz")
@open_to_all
@refuses(CoordinatorUnavailable, ShardUnavailable, StorageUnavailable)
async def readyz(request: Request) -> Readiness:
    """Answers 200 if Redis takes writes, keeps what it has and the device computes, else coordinator-unavailable.

    `problems` names the runs that cannot be opened, and those whose checkpoints cannot be written, with the reason.
    Where the state of a run was in this service's storage and is there no more, the answer is shard-unavailable; where
    a service with another Redis uses the storage, storage-unavailable. Runs are named to those whose token is for them,
    and the storage to those who have one.
    """
    context, token = ServiceContext.of(request), await visitor(request)
    await context.store.require_writable()
    if (wrong := context.registry.watch.problem) is not None:
        raise CoordinatorUnavailable(wrong)
    if (taken := context.claims.problem) is not None:
        raise StorageUnavailable(taken if token is not None else "a service with another Redis uses the storage")
    found = context.registry.problems
    problems = {run: reason for run, reason in found.items() if token is not None and token.is_for_run(run)}
    if lost := context.registry.lost:
        named = "; ".join(f"run {run}: {problems[run]}" for run in lost if run in problems)
        raise ShardUnavailable(named or "the state of a run is lost", problems=problems)
    device = context.device
    # In a thread: a GPU finishes the work that is queued first.
    await asyncio.to_thread(lambda: torch.zeros(1, dtype=torch.float32, device=device).add_(1).item())
    return Readiness(device=str(device), problems=problems, shared_memory=context.memories.socket_name)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: answer(body={"content": {"text/plain": {"schema": {"type": "string"}}}})},
)
@needs("read")
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(await ServiceContext.of(request).metrics.expose(), media_type=CONTENT_TYPE_LATEST)
