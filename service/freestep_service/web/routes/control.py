"""Live control: changes of a run while it trains, and workers whose leases an operator ends."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.convertors import StringConvertor, register_url_convertor

from freestep.api.control import LONGEST_BAN_S, ControlRequest
from freestep.api.models import RunStatus, WorkerEnd
from freestep.errors import IdempotencyConflict, InvalidSpec, MalformedRequest, RunNotInitialized, StorageUnavailable
from freestep_service.web.fields import Query, integer
from freestep_service.web.guard import caller, needs
from freestep_service.web.headers import CONTROL_HEADERS, END_HEADERS, control_key, end_key
from freestep_service.web.json_answers import status_response
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun
from freestep_service.web.routes.documents import documented


class _TextConvertor(StringConvertor):
    """The rest of a path, whatever characters it has: workers choose their names."""

    regex = r"[\s\S]*"


register_url_convertor("text", _TextConvertor())

router = APIRouter(tags=["control"], route_class=JsonRoute)

WorkerName = Annotated[str, Path(min_length=1, max_length=200, description="The worker's name.", examples=["gpu-7"])]
_BAN = Query(
    "ban",
    integer(0, LONGEST_BAN_S),
    "Seconds for which the worker gets no other lease; 0 lifts that. Without it, it may have another at once.",
)


@router.patch("/v1/runs/{run}", response_model=RunStatus, openapi_extra=documented(*CONTROL_HEADERS))
@needs("admin")
@refuses(InvalidSpec, IdempotencyConflict, RunNotInitialized, StorageUnavailable)
async def change_run(run: AnyRun, wish: ControlRequest, request: Request, relay: AnyRelay) -> Response:
    """Changes hyperparameters and the policy, pauses and resumes: from the next entry of the run's log on.

    What the request does not name stays. A change is in the run's journal, or in a checkpoint, when it is answered. One
    that changes nothing is answered alike. A paused run takes no pushes, and no update is made; all else goes on.
    """
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    await run.controls.change(wish, control_key(request), caller(request).name)
    return await status_response(run)


@router.delete(
    "/v1/runs/{run}/workers/{worker:text}", response_model=WorkerEnd, openapi_extra=documented(_BAN, *END_HEADERS)
)
@needs("admin")
@refuses(RunNotInitialized, MalformedRequest, StorageUnavailable)
async def end_worker(run: AnyRun, worker: WorkerName, request: Request, relay: AnyRelay) -> Any:
    """Ends a worker's lease, and may refuse it another for some time; its units are handed out again.

    Pushes of that lease are refused from then on. An update that waits for this worker only is then applied.
    """
    ban_s, key = _BAN.find(request), end_key(request)
    if not run.owns_any:
        return await relay.forward(request, run)
    return await run.controls.end_worker(worker, ban_s, caller(request).name, key)
