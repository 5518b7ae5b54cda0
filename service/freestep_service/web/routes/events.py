"""What happens to a run, as server-sent events."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from freestep.errors import MalformedRequest, Overloaded
from freestep_service.domain.events import PLACE_PATTERN, Place
from freestep_service.web.answer_headers import EVENT_STREAM
from freestep_service.web.event_stream import EventStream
from freestep_service.web.fields import Header, Kind, Query, flag, integer
from freestep_service.web.guard import caller, is_let_in, needs
from freestep_service.web.limits import JsonRoute
from freestep_service.web.openapi import EVENTS
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun
from freestep_service.web.routes.documents import answer, documented

__all__ = ["AFTER", "FOLLOW", "FROM", "router"]

router = APIRouter(tags=["events"], route_class=JsonRoute)

AFTER = Header(
    "Last-Event-ID",
    Kind({"type": "string", "pattern": f"^{PLACE_PATTERN}$"}, Place.parse, "the id of an event of this run"),
    "The id of the last event that the reader has had: the stream goes on behind it.",
)
FOLLOW = Query("follow", flag(), "Whether the stream goes on with what is yet to happen.", default=True)
FROM = Query("from", integer(0), "Without Last-Event-ID: begins with this step of the newest epoch.")


@router.get(
    "/v1/runs/{run}/events",
    # FastAPI would take an EventSourceResponse for the sign of a generator, which can refuse nothing any more.
    response_class=Response,
    responses={200: answer(EVENT_STREAM, body=EVENTS)},
    openapi_extra=documented(AFTER, FOLLOW, FROM),
)
@needs("read")
@refuses(MalformedRequest, Overloaded)
async def read_events(run: AnyRun, request: Request, relay: AnyRelay) -> Response:
    """What happens to the run, as server-sent events, each with its place in the log as its id.

    The stream begins behind `Last-Event-ID`, or with the oldest event that is kept. What is kept no more is told of by
    an event `gap`. A reader gets a few frames a second at the most; one who is behind gets pushes that follow each
    other as one, with `coalesced`. The stream ends after ten minutes, when the service shuts down, or where the token
    has more than its share of the run's 100 readers and others come: the reader comes again. It ends with the reader's
    token, too.
    """
    after, from_step, follows = AFTER.find(request), FROM.find(request), FOLLOW.read(request)
    if not run.owns(0):
        return await relay.forward(request, run, is_endless=True)
    # Where tokens are turned off, all have the same.
    who = caller(request).id or (request.client.host if request.client else "")
    return EventStream(run.events.reader(after, from_step, who), partial(is_let_in, request), follows=follows)
