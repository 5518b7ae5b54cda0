"""Gradients: pushes in, receipts or fresh parameters out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from freestep.api.models import PointDtype, Receipt
from freestep.wire.encoding import ENCODINGS
from freestep_service.domain.records import Claim
from freestep_service.runs.pushes import PushOptions
from freestep_service.runs.run import Run
from freestep_service.state.snapshots import Reading
from freestep_service.web.body import Body
from freestep_service.web.headers import PUSH_HEADERS, Preferences, body_length, claim, preferences, receipt_headers
from freestep_service.web.relay import Relay
from freestep_service.web.responses import SnapshotResponse
from freestep_service.web.routes.data_request import DTYPE, OF, RUN, SHARD, DataRequest, DataRoute
from freestep_service.web.routes.documents import TENSORS, TENSORS_BODY, documented
from freestep_service.web.waiting import while_connected
from freestep_service.web.whole_models import pull_whole, push_whole

router = APIRouter(tags=["gradients"], route_class=DataRoute)


@router.post(
    "/v1/runs/{run}/gradients",
    response_model=Receipt,
    responses={200: TENSORS},
    openapi_extra=documented(RUN, SHARD, OF, DTYPE, *PUSH_HEADERS, body=TENSORS_BODY),
)
async def push(request: Request) -> Response:
    """Pushes a gradient.

    The answer is a receipt; with `Prefer: return=representation` it is y of a step not before the receipt's, with
    the receipt in its headers. `Prefer: wait=S` holds it until an accumulated push's update is applied.

    With `shard`, the body is that shard's part, and the push is decided when all shards have theirs, under one claim;
    the answers' parts of y are of one step.
    """
    parsed = await DataRequest.of(request)
    run, dtype = parsed.run, parsed.dtype
    length = body_length(request, parsed.settings.max_body_bytes)
    wishes = preferences(request)
    body = Body(request, length, parsed.settings.stall_seconds)
    claimed = claim(request)
    run.require_loss(claimed)
    if parsed.shard is None:
        return await _push_whole(run, request, parsed.relay, body, claimed, wishes, dtype)
    if not run.owns(parsed.shard):
        return await parsed.relay.forward(request, run, parsed.shard)
    owned = run.shard(parsed.shard)
    wanted = f"y {dtype}" if wishes.representation and run.many else ""
    wish = PushOptions(wanted, after_update=wishes.wait > 0)
    record, replayed = await run.push(owned, claimed, body, wish)
    if wishes.wait and not (wishes.representation and run.many):
        async with while_connected(request.scope, is_waiting=True):
            record = await owned.pushes.settle(record, wishes.wait)
    if not wishes.representation:
        receipt = record.receipt(replayed=replayed)
        return JSONResponse(receipt.model_dump(exclude_none=True), headers=wishes.applied())
    waits = wishes.wait > 0 and (record.decision == "accumulated" or record.reason == "duplicate-worker")
    reading = Reading(
        "y",
        dtype,
        ticket=claimed.key,
        readers=run.count,
        asked=bool(record.digests) and not replayed,
        patience=wishes.wait if waits else None,
    )

    def lines(step: int) -> dict[str, str]:
        settled = record.settled(step) if waits else record
        return wishes.applied() | receipt_headers(settled.receipt(replayed=replayed))

    return SnapshotResponse(run, owned, reading, await parsed.relay.stall_seconds(request), lines=lines)


async def _push_whole(
    run: Run, request: Request, relay: Relay, body: Body, claimed: Claim, wishes: Preferences, dtype: PointDtype
) -> Response:
    """The slow path: this process receives the whole gradient and sends every shard its part."""
    wait = {"Prefer": f"wait={wishes.wait:g}"} if wishes.wait else {}
    await run.coordinator.check(claimed)
    async with run.staged(body, ENCODINGS) as whole:
        receipt = await push_whole(relay, request, run, whole, {"Idempotency-Key": claimed.key, **wait})
    if not wishes.representation:
        return JSONResponse(receipt.model_dump(exclude_none=True), headers=wishes.applied())
    lines = wishes.applied() | receipt_headers(receipt)
    return await pull_whole(relay, request, run, "y", dtype, receipt.step, "wait=30", lines)
