"""Data sets: added to a run, and their units handed out and given back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from freestep.api.data import DATA_NAME, Claimed, ClaimRequest, DataList, DataSpec, DataStatus, Returned
from freestep.api.validation import InPath
from freestep.errors import (
    DataExists,
    DataNotFound,
    EpochChanged,
    LeaseExpired,
    RunNotInitialized,
    StorageUnavailable,
)
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.marks import NUMBERS_PATTERN, parse_numbers
from freestep_service.web.fields import Kind, Query
from freestep_service.web.guard import needs
from freestep_service.web.headers import CLAIM_HEADERS, RETURN_HEADERS, claim_key, holder, preferences, return_key
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.dependencies import AnyRelay, AnyRun
from freestep_service.web.routes.documents import answer, documented, link
from freestep_service.web.waiting import while_connected

router = APIRouter(tags=["data"], route_class=JsonRoute)

DataName = Annotated[
    str, Path(pattern=f"^{DATA_NAME}$", description="The data set's name.", examples=["train"]), InPath
]
_UNITS = Query(
    "units",
    Kind(
        {"type": "string", "pattern": f"^{NUMBERS_PATTERN}$"},
        parse_numbers,
        "at most 1024 numbers with commas between them, none twice",
    ),
    "The numbers of the units; without it all that the lease has of the data set.",
    example="17,18",
)
_NAME = {"name": "$request.path.name"}
_LINKS = {
    "claim": link("claim_units", _NAME),
    "show": link("show_data", _NAME),
    "list": link("list_data"),
}
_HOLDER = {name: f"$request.header.{name}" for name in ("Freestep-Lease", "Freestep-Token")}
_RETURN = {"return": link("return_units", {**_NAME, **_HOLDER})}


@router.put(
    "/v1/runs/{run}/data/{name}",
    status_code=201,
    response_model=DataStatus,
    responses={
        201: answer(links=_LINKS),
        200: answer(links=_LINKS, description="The run has the data set already.", model=DataStatus),
    },
)
@needs("push")
@refuses(DataExists, RunNotInitialized, StorageUnavailable)
async def create_data(
    run: AnyRun, name: DataName, spec: DataSpec, request: Request, response: Response, relay: AnyRelay
) -> Any:
    """Gives a run a data set, of which every example counts once in each pass."""
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    if not await run.data.create(NewDataSet(name, spec)):
        response.status_code = 200
    return await run.data.status(name)


@router.get("/v1/runs/{run}/data")
@needs("read")
async def list_data(run: AnyRun) -> DataList:
    """The data sets of a run, by name."""
    return await run.data.all()


@router.get("/v1/runs/{run}/data/{name}")
@needs("read")
@refuses(DataNotFound)
async def show_data(run: AnyRun, name: DataName) -> DataStatus:
    """How much of a data set has counted, and who has which part of it."""
    return await run.data.status(name)


@router.post(
    "/v1/runs/{run}/data/{name}/units",
    response_model=Claimed,
    responses={200: answer(links=_LINKS | _RETURN)},
    openapi_extra=documented(*CLAIM_HEADERS),
)
@needs("push")
@refuses(DataNotFound, LeaseExpired, EpochChanged, RunNotInitialized)
async def claim_units(run: AnyRun, name: DataName, wish: ClaimRequest, request: Request, relay: AnyRelay) -> Any:
    """Hands out units to a lease, for pushes to name in `Freestep-Units`.

    There are none where all that is left is out with others; `Prefer: wait=S` then waits for one.
    """
    if not run.owns_any:
        return await relay.forward(request, run, content=await request.body())
    lease, token = holder(request)
    key, wait = claim_key(request), preferences(request).wait
    async with while_connected(request.scope, is_waiting=True):
        return await run.data.claim(lease, token, name, wish.count, key=key, wait=wait)


@router.delete(
    "/v1/runs/{run}/data/{name}/units",
    responses={200: answer(links=_LINKS)},
    openapi_extra=documented(_UNITS, *RETURN_HEADERS),
)
@needs("push")
@refuses(DataNotFound, LeaseExpired, EpochChanged, RunNotInitialized)
async def return_units(run: AnyRun, name: DataName, request: Request) -> Returned:
    """Gives units back, for others to have; those that the lease does not have are left as they are."""
    lease, token = holder(request)
    return await run.data.give_back(lease, token, name, _UNITS.find(request) or (), return_key(request))
