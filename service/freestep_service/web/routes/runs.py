"""Runs: create, list, status, topology, reshard, delete."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator, WithJsonSchema

from freestep.api.models import ReshardRequest, RunList, RunSpec, RunStatus, Topology
from freestep.errors import InvalidSpec, Overloaded, RunExists, RunNotFound, StorageUnavailable
from freestep_service.domain.run_names import RUN_NAME
from freestep_service.web.answer_headers import NEXT_PAGE
from freestep_service.web.fields import Query as QueryField
from freestep_service.web.fields import integer
from freestep_service.web.guard import caller, needs
from freestep_service.web.json_answers import json_response, status_json, status_response, topology_response
from freestep_service.web.limits import LONGEST_SPEC, JsonRoute, takes_large
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRegistry, AnyRelay, AnyRun, RunName
from freestep_service.web.routes.documents import answer, link

router = APIRouter(tags=["runs"], route_class=JsonRoute)


_MOST_LISTED = 1000

_LIMIT = QueryField("limit", integer(1, _MOST_LISTED), "The most runs of a page.")
# Pydantic alone would take "1_0" for ten.
Limit = Annotated[
    int, BeforeValidator(_LIMIT.parse), WithJsonSchema(dict(_LIMIT.kind.schema)), Query(description=_LIMIT.description)
]
After = Annotated[str, Query(pattern=f"^({RUN_NAME})?$", description="The run before the page's first, by name.")]
RunId = Annotated[
    str, Query(max_length=100, description="The `id` in the run's status: no other run is deleted. Empty: any.")
]

_LINKS = {
    "initialize": link("initialize_run"),
    "import": link("import_state"),
    "status": link("get_run"),
    "topology": link("get_topology"),
    "data": link("create_data"),
    "delete": link("delete_run"),
}


@router.put(
    "/v1/runs/{run}",
    status_code=201,
    response_model=RunStatus,
    responses={
        200: answer(links=_LINKS, model=RunStatus, description="The run was there, with this spec."),
        201: answer(links=_LINKS),
    },
)
@needs("push")
@takes_large(RunSpec)
@refuses(RunExists, InvalidSpec, Overloaded, StorageUnavailable)
async def create_run(run: RunName, spec: RunSpec, registry: AnyRegistry, request: Request) -> Response:
    """Creates a run: 201, or 200 when it exists with the same spec."""
    made, is_new = await registry.create(run, spec, caller(request))
    return await status_response(made, 201 if is_new else 200)


@router.get(
    "/v1/runs",
    response_model=RunList,
    responses={
        200: answer(
            [NEXT_PAGE],
            links={
                "create": link("create_run", of_run=False),
                "status": link("get_run", {"run": "$response.body#/runs/0/run"}, of_run=False),
            },
        )
    },
)
@needs("read", runs="any")
async def list_runs(
    registry: AnyRegistry, request: Request, limit: Limit = _MOST_LISTED, after: After = ""
) -> Response:
    """The status of every run that the token is for, by name, in pages.

    A page has at most `limit` runs, and fewer where their specs are large. `next` is the last of them where there are
    more: those `after` it are the next page, whatever is created or deleted meanwhile.
    """
    is_for_run = caller(request).is_for_run
    listed = [run for run in registry.all() if run.name > after and is_for_run(run.name)]
    page: list[str] = []
    size = 0
    for run in listed[:limit]:
        size += len(run.canonical_spec)
        if page and size > LONGEST_SPEC:
            break
        page.append(status_json(await run.status(), run))
    following = listed[len(page) - 1].name if len(page) < len(listed) else None
    links = {}
    if following is not None:
        links["Link"] = f'<{request.url.path}?limit={limit}&after={following}>; rel="next"'
    return json_response(f'{{"runs":[{",".join(page)}],"next":{json.dumps(following)}}}', headers=links)


@router.get("/v1/runs/{run}", response_model=RunStatus)
@needs("read")
async def get_run(run: AnyRun) -> Response:
    """The run's status."""
    return await status_response(run)


@router.get("/v1/runs/{run}/topology", response_model=Topology)
@needs("read")
async def get_topology(run: AnyRun) -> Response:
    """The owner of each shard, and the part of the model that it holds."""
    found = await run.topology()
    return topology_response(found, await run.layout(len(found.shards)))


@router.post("/v1/runs/{run}/reshard", response_model=RunStatus)
@needs("admin")
@refuses(InvalidSpec, StorageUnavailable)
async def reshard_run(run: AnyRun, wish: ReshardRequest, request: Request, relay: AnyRelay) -> Any:
    """Splits the run into another number of shards, in a new epoch."""
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    await run.reshard(wish.shards)
    return await status_response(run)


@router.delete("/v1/runs/{run}", status_code=204, response_class=Response)
@needs("admin")
@refuses(RunNotFound, StorageUnavailable)
async def delete_run(run: RunName, registry: AnyRegistry, id: RunId = "") -> None:
    """Deletes a run, its checkpoints included; with `id`, no other run that has its name by now.

    Where Redis or the storage fails meanwhile, the run is as it was, or it is deleted and what is left of it is removed
    in the background.
    """
    await registry.delete(run, id)
