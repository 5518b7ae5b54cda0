"""Parameters: initial weights in, points out."""

from __future__ import annotations

import secrets
from functools import partial

from fastapi import APIRouter, Request, Response

from freestep.api.models import RunStatus
from freestep.errors import (
    AlreadyInitialized,
    CheckpointNotFound,
    MalformedRequest,
    MalformedTensors,
    MemoryNotShared,
    Overloaded,
    RangeNotSatisfiable,
    RunNotInitialized,
    StepNotReached,
    StorageUnavailable,
)
from freestep_service.runs.consistent_reads import Reading
from freestep_service.web.answer_headers import CONTENT_RANGE, ETAG, POINT_HEADERS
from freestep_service.web.body import Body, GuardedBody
from freestep_service.web.guard import needs, require_let_in
from freestep_service.web.headers import PULL_HEADERS, UPLOAD_HEADERS, body_length, preferences, upload
from freestep_service.web.json_answers import status_response
from freestep_service.web.metering import admit_bytes, spend_answer, spend_bytes
from freestep_service.web.problem_documents import refuses
from freestep_service.web.responses import SnapshotResponse, etag, not_modified
from freestep_service.web.routes.data_request import (
    CHECKPOINT,
    CUT,
    DTYPE,
    MIN_STEP,
    OF,
    POINT,
    RUN,
    SHARD,
    DataRequest,
    DataRoute,
)
from freestep_service.web.routes.documents import TENSORS, answer, documented, link
from freestep_service.web.waiting import while_connected
from freestep_service.web.whole_models import initialize_whole, pull_whole

router = APIRouter(tags=["parameters"], route_class=DataRoute)


@router.put(
    "/v1/runs/{run}/parameters",
    status_code=201,
    response_model=RunStatus,
    responses={201: answer(links={"lease": link("grant_lease"), "pull": link("pull"), "export": link("export_state")})},
    openapi_extra=documented(RUN, SHARD, OF, *UPLOAD_HEADERS, body=TENSORS),
)
@needs("push")
@refuses(DataRequest.of, body_length, AlreadyInitialized, MalformedTensors, Overloaded, StorageUnavailable)
async def initialize_run(request: Request) -> Response:
    """Gives the run its initial weights; the first upload wins, others get already-initialized.

    The upload that has won may be sent again, with its Idempotency-Key, where its answer was lost.

    With `shard`, the body is that shard's part, and the answer comes when all shards have theirs. Parts with the same
    Idempotency-Key belong together.
    """
    parsed = await DataRequest.of(request)
    run, relay = parsed.run, parsed.relay
    length = body_length(request, parsed.settings.max_body_bytes)
    await admit_bytes(request, length)
    body = GuardedBody(Body(request, length, parsed.settings.stall_seconds), partial(require_let_in, request))
    key = upload(request, required=run.is_sharded and parsed.shard is not None) or secrets.token_hex(16)
    if parsed.shard is None:
        async with run.whole_bodies.staged(body) as whole:
            await initialize_whole(relay, request, run, whole, key)
    elif not run.owns(parsed.shard):
        return await relay.forward(request, run, parsed.shard)
    else:
        await run.initialize(run.shard(parsed.shard), body, key)
    return await status_response(run, 201)


@router.get(
    "/v1/runs/{run}/parameters",
    response_class=Response,
    responses={
        200: answer(POINT_HEADERS, {"again": link("pull", {"If-None-Match": "$response.header.ETag"})}, TENSORS),
        206: answer((*POINT_HEADERS, CONTENT_RANGE), body=TENSORS, description="The bytes that Range asks for."),
        304: answer((ETAG,), description="The point's ETag is one of those named."),
    },
    openapi_extra=documented(RUN, SHARD, OF, POINT, DTYPE, MIN_STEP, CHECKPOINT, CUT, *PULL_HEADERS),
)
@needs("read")
@refuses(DataRequest.of, RunNotInitialized, MalformedTensors, MemoryNotShared, RangeNotSatisfiable, Overloaded)
@refuses(StepNotReached, CheckpointNotFound, StorageUnavailable)
async def pull(request: Request) -> Response:
    """A point of the run's newest step, or of a step not before `min_step` (`Prefer: wait=S`).

    With `checkpoint`, it is of a checkpoint, to which the run need not go back: of the newest epoch that has one of
    that step. With `shard`, that shard's part of it. All shards that are asked with the same `cut`, any fresh word,
    answer with parts of one step.
    """
    parsed = await DataRequest.of(request)
    await admit_bytes(request)
    run, point, dtype, min_step, cut = parsed.run, parsed.point, parsed.dtype, parsed.min_step, parsed.cut
    checkpoint, memory = parsed.checkpoint, parsed.memory()
    if checkpoint is not None and checkpoint < min_step:
        raise MalformedRequest(f"min_step: the checkpoint is of step {checkpoint}", field="min_step")
    if parsed.shard is None:
        prefer = ", ".join(request.headers.getlist("prefer"))
        whole = await pull_whole(parsed.relay, request, run, point, dtype, min_step, prefer, checkpoint=checkpoint)
        return spend_answer(request, whole)
    if not run.owns(parsed.shard):
        return spend_answer(request, await parsed.relay.forward(request, run, parsed.shard))
    shard = run.shard(parsed.shard)
    kept = None if checkpoint is None else await shard.find_checkpoint(checkpoint)
    if kept is None:
        shard.core.require_initialized()
        wishes = preferences(request)
        async with while_connected(request.scope, is_waiting=True):
            await shard.reach(min_step, wishes.wait)
        if wishes.wait:
            require_let_in(request)
    epoch, step = (shard.core.writer.epoch, shard.core.writer.applied_step) if kept is None else kept[:2]
    tag = etag(epoch, step, point, dtype)
    # Of a cut all shards have to answer alike.
    if not cut and (known := not_modified(request, {"ETag": tag})) is not None:
        return known
    reading = Reading(point, dtype, cut, readers=run.count if cut else 1, checkpoint=kept)
    stall_s, spend = await parsed.relay.stall_seconds(request), partial(spend_bytes, request)
    return SnapshotResponse(shard, reading, stall_s, request.headers, spend=spend, memory=memory)
