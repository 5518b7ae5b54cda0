"""Leases: grant, renew, release, list."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from freestep.api.memory import MemoryOffer, MemoryRequest
from freestep.api.models import Lease, LeaseList, LeaseRequest
from freestep.errors import EpochChanged, LeaseExpired, MemoryNotShared, Overloaded, WorkerBanned, WorkerSuspended
from freestep_service.web.guard import caller, needs, require_worker
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.data_request import LEASE, RUN, DataRoute, run_of
from freestep_service.web.routes.dependencies import AnyMemories, AnyRegistry, AnyRelay, AnyRun, LeaseId
from freestep_service.web.routes.documents import answer, documented, link

router = APIRouter(tags=["leases"], route_class=JsonRoute)
renewals = APIRouter(tags=["leases"], route_class=DataRoute)
"""Parsed directly, as the data path is: a thousand workers renew hundreds of leases a second."""

_LINKS = {
    "push": link(
        "push",
        {
            "Freestep-Lease": "$response.body#/lease",
            "Freestep-Token": "$response.body#/token",
            "Freestep-Step": "$response.body#/step",
        },
    ),
    "renew": link("renew_lease", {"lease": "$response.body#/lease"}),
    "release": link("release_lease", {"lease": "$response.body#/lease"}),
    "list": link("list_leases", {"Freestep-Lease": "$response.body#/lease"}),
}


@router.post("/v1/runs/{run}/leases", status_code=201, response_model=Lease, responses={201: answer(links=_LINKS)})
@needs("push")
@refuses(WorkerBanned, WorkerSuspended, Overloaded)
async def grant_lease(run: AnyRun, wish: LeaseRequest, request: Request, relay: AnyRelay, registry: AnyRegistry) -> Any:
    """Grants a lease with a new fencing token; the worker's older lease is fenced off."""
    require_worker(request, wish.worker)
    if run.leases_are_elsewhere:
        return await relay.forward(request, run, content=await request.body())
    granting = partial(run.leases.grant, wish.worker, wish.ttl_ms)
    return await registry.quotas.grant(caller(request), run.name, wish.worker, granting)


@renewals.put(
    "/v1/runs/{run}/leases/{lease}",
    response_model=Lease,
    responses={200: answer(links=_LINKS)},
    openapi_extra=documented(RUN, LEASE),
)
@needs("push")
@refuses(run_of, LeaseExpired, EpochChanged)
async def renew_lease(request: Request) -> Response:
    """Renews a lease for its time to live."""
    run, lease = await run_of(request), LEASE.read(request)
    renewed = await run.leases.renew(lease)
    return Response(renewed.model_dump_json(), media_type="application/json")


@router.delete("/v1/runs/{run}/leases/{lease}", status_code=204)
@needs("push")
@refuses(LeaseExpired)
async def release_lease(
    run: AnyRun, lease: LeaseId, request: Request, relay: AnyRelay, registry: AnyRegistry, memories: AnyMemories
) -> Response:
    """Ends a lease; an update that waits for its worker only is then applied."""
    if run.leases_are_elsewhere:
        return await relay.forward(request, run)
    worker = await run.leases.release(lease)
    memories.end_lease(run, lease)
    await registry.quotas.release_lease(caller(request), run.name, worker, lease)
    return Response(status_code=204)


@router.post("/v1/runs/{run}/leases/{lease}/memory", status_code=201, response_model=MemoryOffer)
@needs("push")
@refuses(LeaseExpired, EpochChanged, MemoryNotShared)
async def share_memory(run: AnyRun, lease: LeaseId, wish: MemoryRequest, memories: AnyMemories) -> MemoryOffer:
    """Offers a client on this machine memory for the bodies of a lease, in place of what that has for the shard.

    Renews the lease. The client fetches the memory from a Unix socket with the ticket, within five seconds, and has it
    for as long as it keeps that connection open and the lease is good.
    """
    held = await run.leases.renew(lease)
    if held.token != wish.token:
        raise LeaseExpired
    return memories.offer(run, lease, wish)


@router.get("/v1/runs/{run}/leases")
@needs("read")
async def list_leases(
    run: AnyRun,
    lease: Annotated[str | None, Header(alias="Freestep-Lease", description="The lease of who asks.")] = None,
) -> LeaseList:
    """The live workers, by name. The holder of a lease, who names it, is shown it; nobody else is."""
    return LeaseList(leases=await run.leases.workers(lease))
