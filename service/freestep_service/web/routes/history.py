"""The curves of a run over its whole life."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from freestep.api.history import CURVES, MOST_POINTS, History
from freestep.errors import MalformedRequest, StorageUnavailable
from freestep_service.web.fields import Kind, Query, integer
from freestep_service.web.guard import needs
from freestep_service.web.json_answers import history_response
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun
from freestep_service.web.routes.documents import documented

__all__ = ["POINTS", "SHOWN", "router"]

router = APIRouter(tags=["events"], route_class=JsonRoute)

_NAMES = (*CURVES, "metrics", "milestones")
_NAME = f"(?:{'|'.join(_NAMES)})"


def _names() -> Kind[tuple[str, ...]]:
    """Some of the curves, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if not set(names) <= set(_NAMES):
            raise ValueError
        return names

    schema = {"type": "string", "pattern": f"^{_NAME}(?:,{_NAME})*$"}
    return Kind(schema, parse, f"names of curves, separated by commas: any of {', '.join(_NAMES)}")


SHOWN = Query(
    "curves",
    _names(),
    "The curves that are wanted; `metrics` are all that were reported, `milestones` what else has happened. "
    "Without it, all.",
)
POINTS = Query("points", integer(1, MOST_POINTS), "The most points of a curve.", default=MOST_POINTS)


@router.get(
    "/v1/runs/{run}/history",
    response_model=History,
    openapi_extra=documented(SHOWN, POINTS),
)
@needs("read")
@refuses(MalformedRequest, StorageUnavailable)
async def read_history(run: AnyRun, request: Request, relay: AnyRelay) -> Response:
    """The run's curves from its creation on, over restarts and new owners.

    A curve has at most 512 points. When there would be more, each two neighbours become one: a point has the number of
    observations that it stands for, their mean, the least and the largest, and the step, epoch and time of the last.
    """
    shown, points = SHOWN.find(request) or _NAMES, POINTS.read(request)
    if not run.owns(0):
        return await relay.forward(request, run)
    return await history_response(run.name, run.history, shown, points)
