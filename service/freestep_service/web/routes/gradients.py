"""Gradients: pushes in, receipts or fresh parameters out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from freestep.api.models import PointDtype, Receipt
from freestep.errors import (
    EpochChanged,
    IdempotencyConflict,
    InvalidSpec,
    LeaseExpired,
    MalformedTensors,
    MemoryNotShared,
    NonFiniteGradient,
    Overloaded,
    RunNotInitialized,
    RunPaused,
    StorageUnavailable,
    UnitNotHeld,
)
from freestep_service.domain.aggregation import accepted_encodings
from freestep_service.domain.records import Claim
from freestep_service.runs.phases import Phases
from freestep_service.runs.run import Run
from freestep_service.state.shared_memory import SharedBody
from freestep_service.state.staging import Body as AnyBody
from freestep_service.web.answer_headers import POINT_HEADERS, PREFERENCE_APPLIED, RECEIPT_HEADERS, optional
from freestep_service.web.body import Body, GuardedBody
from freestep_service.web.guard import needs, require_let_in
from freestep_service.web.headers import (
    PUSH_HEADERS,
    Preferences,
    body_length,
    claim,
    preferences,
    receipt_headers,
    span,
)
from freestep_service.web.json_bodies import SMALL
from freestep_service.web.metering import admit_bytes, spend_answer, spend_bytes
from freestep_service.web.problem_documents import refuses
from freestep_service.web.push_traces import trace_of
from freestep_service.web.relay import Relay
from freestep_service.web.responses import SnapshotResponse
from freestep_service.web.routes.data_request import DTYPE, OF, RUN, SHARD, DataRequest, DataRoute
from freestep_service.web.routes.documents import TENSORS, answer, documented, link
from freestep_service.web.waiting import while_connected
from freestep_service.web.whole_models import pull_whole, push_whole

router = APIRouter(tags=["gradients"], route_class=DataRoute)


@router.post(
    "/v1/runs/{run}/gradients",
    response_model=Receipt,
    responses={
        200: answer(
            (PREFERENCE_APPLIED, *optional(*RECEIPT_HEADERS, *POINT_HEADERS)),
            {
                "again": link("push", {field.name: f"$request.header.{field.name}" for field in PUSH_HEADERS[:4]}),
                "pull": link("pull", {"min_step": "$response.body#/step"}),
                "renew": link("renew_lease", {"lease": "$request.header.Freestep-Lease"}),
                "report": link("report_metric"),
                "checkpoint": link("write_checkpoint"),
            },
            body=TENSORS,
            description="A receipt; or with `Prefer: return=representation` y, and the receipt in headers.",
        )
    },
    openapi_extra=documented(RUN, SHARD, OF, DTYPE, *PUSH_HEADERS, body=TENSORS),
)
@needs("push")
@refuses(DataRequest.of, body_length, RunNotInitialized, EpochChanged, IdempotencyConflict, LeaseExpired)
@refuses(InvalidSpec, MalformedTensors, MemoryNotShared, NonFiniteGradient, Overloaded, RunPaused, StorageUnavailable)
@refuses(UnitNotHeld)
async def push(request: Request) -> Response:
    """Pushes a gradient.

    The answer is a receipt; with `Prefer: return=representation` it is y of a step not before the receipt's, with
    the receipt in its headers. `Prefer: wait=S` holds it until an accumulated push's update is applied.

    With `shard`, the body is that shard's part, and the push is decided when all shards have theirs, under one claim;
    the answers' parts of y are of one step.

    With `Freestep-Memory`, which needs `shard` where there are several, the body may lie in memory that the client
    shares, and y be written into it.
    """
    parsed = await DataRequest.of(request)
    run, dtype = parsed.run, parsed.dtype
    at = span(request)
    length = body_length(request, parsed.settings.max_body_bytes, at)
    wishes = preferences(request)
    claimed = claim(request)
    if (trace := trace_of(request)) is not None:
        trace.note(step=claimed.step, key=claimed.key, bytes=length)
    memory = parsed.memory(claimed.lease, at)
    await admit_bytes(request, length)
    body: AnyBody = Body(request, length, parsed.settings.stall_seconds)
    if memory is not None and at is not None:
        body = SharedBody(memory, at)
    body = GuardedBody(body, partial(require_let_in, request))
    if parsed.shard is None:
        return await _push_whole(run, request, parsed.relay, body, claimed, wishes, dtype)
    if not run.owns(parsed.shard):
        if length > SMALL:
            # The owner's refusal would be read behind the body.
            await run.coordinator.pushes.precheck(claimed)
        return spend_answer(request, await parsed.relay.forward(request, run, parsed.shard))
    shard, phases = run.shard(parsed.shard), Phases()
    if trace is not None:
        trace.phases = phases
        trace.note(shard=parsed.shard)
    try:
        outcome = await shard.push(claimed, body, dtype if wishes.representation else None, wishes.wait, phases)
    except MemoryNotShared:
        # The body was not had, and comes again over the connection.
        spend_bytes(request, -length)
        raise
    if trace is not None:
        record = outcome.record
        trace.note(worker=record.worker, decision=record.decision, staleness=record.staleness, receipt_step=record.step)
    if wishes.wait and outcome.is_open:
        async with while_connected(request.scope, is_waiting=True):
            outcome = await shard.settle(outcome, wishes.wait)
        require_let_in(request)
    if outcome.reading is None:
        return _receipt(outcome.receipt(), wishes)

    def lines(step: int) -> dict[str, str]:
        return wishes.applied() | receipt_headers(outcome.receipt(step))

    def receipt_only() -> Response:
        return _receipt(outcome.receipt(), replace(wishes, representation=False))

    # A push does not wait for those who read: if no memory is free for y, its sender pulls it.
    stall_s = await parsed.relay.stall_seconds(request)
    spend = partial(spend_bytes, request)
    return SnapshotResponse(
        shard,
        outcome.reading,
        stall_s,
        lines=lines,
        otherwise=receipt_only,
        spend=spend,
        answered=shard.answered,
        memory=memory,
    )


def _receipt(receipt: Receipt, wishes: Preferences) -> Response:
    return JSONResponse(receipt.model_dump(exclude_none=True), headers=wishes.applied())


async def _push_whole(
    run: Run, request: Request, relay: Relay, body: AnyBody, claimed: Claim, wishes: Preferences, dtype: PointDtype
) -> Response:
    """The slow path: this process receives the whole gradient and sends every shard its part."""
    wait = {"Prefer": f"wait={wishes.wait:g}"} if wishes.wait else {}
    await run.coordinator.pushes.precheck(claimed)
    encodings = accepted_encodings(run.spec.aggregation)
    async with run.whole_bodies.staged(body, encodings, claimed.lease) as whole:
        receipt = await push_whole(relay, request, run, whole, {"Idempotency-Key": claimed.key, **wait})
    if not wishes.representation:
        return _receipt(receipt, wishes)
    lines = wishes.applied() | receipt_headers(receipt)
    return spend_answer(request, await pull_whole(relay, request, run, "y", dtype, receipt.step, "wait=30", lines))
