"""Checkpoints: write one now, list them, restore one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from freestep.api.models import Checkpoint, CheckpointList, RunStatus
from freestep.errors import CheckpointNotFound, RunNotInitialized, StorageUnavailable
from freestep_service.web.guard import needs
from freestep_service.web.json_answers import status_response
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun, Step
from freestep_service.web.routes.documents import answer, link

router = APIRouter(tags=["checkpoints"], route_class=JsonRoute)

_STEP = "$response.body#/step"


@router.post(
    "/v1/runs/{run}/checkpoints",
    status_code=201,
    response_model=Checkpoint,
    responses={
        201: answer(
            links={
                "restore": link("restore_checkpoint", {"step": _STEP}),
                "pull": link("pull", {"checkpoint": _STEP}),
                "export": link("export_state", {"checkpoint": _STEP}),
            }
        )
    },
)
@needs("admin")
@refuses(RunNotInitialized, StorageUnavailable)
async def write_checkpoint(run: AnyRun, request: Request, relay: AnyRelay) -> Any:
    """Writes a checkpoint of the newest step."""
    if not run.owns_any:
        return await relay.forward(request, run)
    return await run.checkpoint()


@router.get("/v1/runs/{run}/checkpoints")
@needs("read")
@refuses(StorageUnavailable)
async def list_checkpoints(run: AnyRun) -> CheckpointList:
    """The checkpoints that are kept, oldest first."""
    return CheckpointList(checkpoints=await run.list_checkpoints())


@router.post(
    "/v1/runs/{run}/checkpoints/{step}/restore",
    response_model=RunStatus,
    responses={200: answer(links={"lease": link("grant_lease"), "pull": link("pull")})},
)
@needs("admin")
@refuses(CheckpointNotFound, StorageUnavailable)
async def restore_checkpoint(run: AnyRun, request: Request, relay: AnyRelay, step: Step) -> Any:
    """Returns the run to a checkpoint, in a new epoch; leases of the old epoch can no longer push."""
    if not run.owns_any:
        return await relay.forward(request, run)
    await run.restore(step)
    return await status_response(run)
