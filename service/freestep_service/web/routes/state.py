"""The whole state of a run: out of one service, into another."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from freestep.api.models import RunStatus
from freestep.api.run_state import StateDocument
from freestep.errors import (
    AlreadyInitialized,
    CheckpointNotFound,
    EpochChanged,
    IdempotencyConflict,
    InvalidSpec,
    MalformedRequest,
    MalformedTensors,
    Overloaded,
    RunExists,
    RunNotFound,
    RunNotInitialized,
    ShardUnavailable,
    StorageUnavailable,
)
from freestep_service.runs.run import Run
from freestep_service.runs.state_imports import ImportTerms
from freestep_service.web.answer_headers import STATE_HEADERS
from freestep_service.web.body import Body, GuardedBody
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import caller, needs, require_let_in
from freestep_service.web.headers import IMPORT_HEADERS, body_length, place, upload
from freestep_service.web.json_answers import status_response
from freestep_service.web.metering import admit_bytes, spend_answer
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.data_request import CHECKPOINT, CUT, OF, REPLACE, RUN, SHARD, DataRequest, DataRoute
from freestep_service.web.routes.documents import STATE, answer, documented, link
from freestep_service.web.waiting import while_connected
from freestep_service.web.whole_states import export_part, export_whole, send_parts

router = APIRouter(tags=["state"], route_class=DataRoute)


@router.get(
    "/v1/runs/{run}/state",
    response_class=Response,
    responses={
        200: answer(STATE_HEADERS, {"replace": link("import_state", {"If-Match": "$response.header.ETag"})}, STATE)
    },
    openapi_extra=documented(RUN, SHARD, OF, CHECKPOINT, CUT),
)
@needs("read")
@refuses(DataRequest.of, RunNotInitialized, Overloaded, CheckpointNotFound, StorageUnavailable)
async def export_state(request: Request) -> Response:
    """The run's whole state at its newest step: every vector of the optimizer, and all scalars.

    Pushes that are accumulated for an update to come are not in it, nor are receipts and leases. With `checkpoint`, it
    is that of a checkpoint, to which the run need not go back. With `shard`, it is that shard's part; all shards that
    are asked with the same `cut`, any fresh word, answer with parts of one place.
    """
    parsed = await DataRequest.of(request)
    run, relay, cut, checkpoint = parsed.run, parsed.relay, parsed.cut, parsed.checkpoint
    await admit_bytes(request)
    if parsed.shard is None:
        exported = await export_whole(relay, request, run, checkpoint)
    elif not run.owns(parsed.shard):
        exported = await relay.forward(request, run, parsed.shard)
    else:
        shard, stall_s = run.shard(parsed.shard), await relay.stall_seconds(request)
        kept = None if checkpoint is None else await shard.find_checkpoint(checkpoint)
        async with while_connected(request.scope, is_waiting=kept is not None):
            exported = await export_part(run, shard, cut, stall_s, kept)
    return spend_answer(request, exported)


@router.put(
    "/v1/runs/{run}/state",
    status_code=201,
    response_model=RunStatus,
    responses={200: {"model": RunStatus, "description": "The run had weights, and has this state in their place."}},
    openapi_extra=documented(RUN, REPLACE, *IMPORT_HEADERS, body=STATE),
)
@needs("admin")
@refuses(DataRequest.of, body_length, RunExists, RunNotInitialized, EpochChanged, AlreadyInitialized)
@refuses(IdempotencyConflict, InvalidSpec, MalformedTensors, Overloaded, StorageUnavailable)
async def import_state(request: Request) -> Response:
    """Gives a run a whole state, and creates the run with the state's spec if there is none.

    A run that has weights is refused with already-initialized, unless `replace` is true: then the state takes their
    place in a new epoch, as in a restore. The answer comes when the state is durable, as far as the run's durability
    goes. The number of shards may differ from that of the state's spec.
    """
    context, name = ServiceContext.of(request), RUN.read(request)
    length = body_length(request, context.settings.max_body_bytes)
    await admit_bytes(request, length)
    body = GuardedBody(Body(request, length, context.settings.stall_seconds), partial(require_let_in, request))
    terms = ImportTerms(upload(request, required=False) or secrets.token_hex(16), REPLACE.read(request), place(request))
    if (shard := SHARD.find(request)) is not None:
        return await _import_part(request, shard, body, terms.upload)
    try:
        run = await context.registry.find(name)
    except RunNotFound:
        if terms.place is not None:
            raise
        return await _import_whole(request, None, body, terms)
    if not run.owns_any:
        return await context.relay.forward(request, run)
    if await run.imports.is_wanted(terms):
        return await _import_whole(request, run, body, terms)
    # An earlier attempt of the same request has made it.
    await run.imports.require_same(terms, await body.receive_digest())
    await run.imports.require_durable()
    return await _status(run, terms)


async def _import_part(request: Request, shard: int, body: GuardedBody, attempt: str) -> Response:
    """A shard's part of a state that another process of the service has received."""
    if not await ServiceContext.of(request).relay.is_relayed(request):
        raise MalformedRequest("shard: a state is put as a whole", field="shard")
    run = (await DataRequest.of(request)).run
    return JSONResponse({"token": await run.imports.receive_part(run.shard(shard).index, body, attempt)})


async def _import_whole(request: Request, run: Run | None, body: GuardedBody, terms: ImportTerms) -> Response:
    context = ServiceContext.of(request)

    def accept(document: StateDocument) -> None:
        if run is not None:
            run.imports.require_spec(document.spec)

    async with AsyncExitStack() as stack:
        received = await context.registry.receive_state(body, accept)
        stack.callback(received.release)
        document = received.document
        if run is None:
            run, _ = await context.registry.create(RUN.read(request), document.spec, caller(request))
        if not run.owns_any:
            raise ShardUnavailable("another process has created the run and has its shards")
        stack.push_async_callback(run.imports.forget, terms.attempt)
        if run.is_sharded:
            tokens = await send_parts(context.relay, request, run, received, terms.attempt)
        else:
            tokens = [run.imports.hold(0, received, terms.attempt)]
        await run.imports.adopt(terms, document.step, received.digest, tokens)
    return await _status(run, terms)


async def _status(run: Run, terms: ImportTerms) -> Response:
    return await status_response(run, 200 if terms.replaces else 201)
