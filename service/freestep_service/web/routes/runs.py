"""Runs: create, list, status, topology, reshard, delete."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from freestep.api.models import ReshardRequest, RunList, RunSpec, RunStatus, Topology
from freestep.errors import InvalidSpec, RunExists, RunNotFound, StorageUnavailable
from freestep_service.web.guard import caller, needs
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRegistry, AnyRelay, AnyRun, RunName
from freestep_service.web.routes.documents import answer, link

router = APIRouter(tags=["runs"], route_class=JsonRoute)


_LINKS = {
    "initialize": link("initialize_run"),
    "import": link("import_state"),
    "status": link("get_run"),
    "topology": link("get_topology"),
    "delete": link("delete_run"),
}


@router.put(
    "/v1/runs/{run}",
    status_code=201,
    responses={
        200: answer(links=_LINKS, model=RunStatus, description="The run was there, with this spec."),
        201: answer(links=_LINKS),
    },
)
@needs("push")
@refuses(RunExists, InvalidSpec, StorageUnavailable)
async def create_run(run: RunName, spec: RunSpec, registry: AnyRegistry, response: Response) -> RunStatus:
    """Creates a run: 201, or 200 when it exists with the same spec."""
    made, is_new = await registry.create(run, spec)
    if not is_new:
        response.status_code = 200
    return await made.status()


@router.get(
    "/v1/runs",
    responses={
        200: answer(
            links={
                "create": link("create_run", of_run=False),
                "status": link("get_run", {"run": "$response.body#/runs/0/run"}, of_run=False),
            }
        )
    },
)
@needs("read", runs="any")
async def list_runs(registry: AnyRegistry, request: Request) -> RunList:
    """The status of every run that the token is for."""
    is_for_run = caller(request).is_for_run
    return RunList(runs=[await run.status() for run in registry.all() if is_for_run(run.name)])


@router.get("/v1/runs/{run}")
@needs("read")
async def get_run(run: AnyRun) -> RunStatus:
    """The run's status."""
    return await run.status()


@router.get("/v1/runs/{run}/topology")
@needs("read")
async def get_topology(run: AnyRun) -> Topology:
    """The owner of each shard, and the part of the model that it holds."""
    return await run.topology()


@router.post("/v1/runs/{run}/reshard", response_model=RunStatus)
@needs("admin")
@refuses(InvalidSpec, StorageUnavailable)
async def reshard_run(run: AnyRun, wish: ReshardRequest, request: Request, relay: AnyRelay) -> Any:
    """Splits the run into another number of shards, in a new epoch."""
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    await run.reshard(wish.shards)
    return await run.status()


@router.delete("/v1/runs/{run}", status_code=204, response_class=Response)
@needs("admin")
@refuses(RunNotFound, StorageUnavailable)
async def delete_run(run: RunName, registry: AnyRegistry) -> None:
    """Deletes a run, its checkpoints included."""
    await registry.delete(run)
