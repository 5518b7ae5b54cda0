"""Leases: grant, release, list; `renewals` has what is asked of them most."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from freestep.models import Lease, LeaseList, LeaseRequest
from freestep_service.routes.dependencies import AnyPeers, AnyRun, LeaseId

router = APIRouter(tags=["leases"])


@router.post("/v1/runs/{run}/leases", status_code=201, response_model=Lease)
async def grant_lease(run: AnyRun, wish: LeaseRequest, request: Request, peers: AnyPeers) -> Any:
    """Grants a lease with a new fencing token; the worker's older lease is fenced off."""
    if run.is_looked_after_elsewhere:
        return await peers.relay(request, run, content=await request.body())
    return await run.leases.grant(wish.worker, wish.ttl_ms)


@router.delete("/v1/runs/{run}/leases/{lease}", status_code=204)
async def release_lease(run: AnyRun, lease: LeaseId, request: Request, peers: AnyPeers) -> Response:
    """Ends a lease; an update that waited for its worker alone goes on."""
    if run.is_looked_after_elsewhere:
        return await peers.relay(request, run)
    await run.leases.release(lease)
    return Response(status_code=204)


@router.get("/v1/runs/{run}/leases")
async def list_leases(run: AnyRun) -> LeaseList:
    """The live leases, by worker."""
    return LeaseList(leases=await run.leases.workers())
