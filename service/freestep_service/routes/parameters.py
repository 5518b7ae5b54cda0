"""Parameters: initial weights in, points out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from freestep.models import RunStatus
from freestep_service.egress import SnapshotResponse, etag, is_known
from freestep_service.headers import body_length, preferences
from freestep_service.ingest import Body
from freestep_service.routes.dependencies import AnyRun, Dtype, Point, ServiceSettings
from freestep_service.routes.documents import RANGE_HEADERS, TENSORS, TENSORS_BODY

router = APIRouter(tags=["parameters"])


@router.put(
    "/v1/runs/{run}/parameters",
    status_code=201,
    openapi_extra={"requestBody": TENSORS_BODY},
)
async def initialize_run(run: AnyRun, request: Request, settings: ServiceSettings) -> RunStatus:
    """Gives the run its initial weights; the first who does wins, the others get already-initialized."""
    length = body_length(request, settings.max_body_bytes)
    await run.initialize(Body(request, length, settings.stall_seconds))
    return await run.status()


@router.get(
    "/v1/runs/{run}/parameters",
    response_class=Response,
    responses={200: TENSORS, 206: TENSORS, 304: {"description": "The point's ETag is one of those named."}},
    openapi_extra={"parameters": RANGE_HEADERS},
)
async def pull(
    run: AnyRun,
    request: Request,
    settings: ServiceSettings,
    point: Point = "x",
    dtype: Dtype = "F32",
    min_step: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """A point of the run's newest step, or of a step not before `min_step` (`Prefer: wait=S`)."""
    run.require_initialized()
    wishes = preferences(request)
    await run.wait_for(min_step, wishes.wait)
    tag = etag(run.epoch, run.step, point, dtype)
    if is_known(tag, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers={"ETag": tag})
    return SnapshotResponse(run, point, dtype, settings.stall_seconds, request.headers)
