"""Renewals of leases. A thousand workers ask for hundreds a second, so they are read as the data path is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from freestep.errors import MalformedRequest
from freestep.models import Lease
from freestep_service.routes.asked import DataRoute, run_of
from freestep_service.routes.dependencies import LONGEST_LEASE
from freestep_service.routes.documents import LEASE, RUN

router = APIRouter(tags=["leases"], route_class=DataRoute)


@router.put("/v1/runs/{run}/leases/{lease}", response_model=Lease, openapi_extra={"parameters": [RUN, LEASE]})
async def renew_lease(request: Request) -> Response:
    """Renews a lease for its time to live."""
    run, lease = await run_of(request), request.path_params["lease"]
    if len(lease) > LONGEST_LEASE:
        raise MalformedRequest(f"lease: at most {LONGEST_LEASE} characters", field="lease")
    renewed = await run.leases.renew(lease)
    return Response(renewed.model_dump_json(), media_type="application/json")
