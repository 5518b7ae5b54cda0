"""Gradients: pushes in, receipts or fresh parameters out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from freestep.models import Receipt
from freestep_service.egress import SnapshotResponse
from freestep_service.headers import body_length, claim, loss, preferences, receipt_headers
from freestep_service.ingest import Body
from freestep_service.routes.dependencies import AnyRun, Dtype, ServiceSettings
from freestep_service.routes.documents import PUSH_HEADERS, TENSORS, TENSORS_BODY

router = APIRouter(tags=["gradients"])


@router.post(
    "/v1/runs/{run}/gradients",
    response_model=Receipt,
    responses={200: TENSORS},
    openapi_extra={"requestBody": TENSORS_BODY, "parameters": PUSH_HEADERS},
)
async def push(run: AnyRun, request: Request, settings: ServiceSettings, dtype: Dtype = "F32") -> Response:
    """Pushes a gradient.

    The answer is a receipt; with `Prefer: return=representation` it is y of a step not before the receipt's, with
    the receipt in its headers. `Prefer: wait=S` holds it until an accumulated push's update is applied.
    """
    length = body_length(request, settings.max_body_bytes)
    wishes = preferences(request)
    body = Body(request, length, settings.stall_seconds)
    receipt = await run.push(claim(request, length), body, loss(request), wishes.wait)
    if wishes.representation:
        headers = wishes.applied() | receipt_headers(receipt)
        return SnapshotResponse(run, "y", dtype, settings.stall_seconds, headers=headers)
    return JSONResponse(receipt.model_dump(exclude_none=True), headers=wishes.applied())
