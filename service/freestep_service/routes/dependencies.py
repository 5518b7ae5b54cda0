"""What handlers are given: the run that the path names, and the service's parts."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from fastapi import Depends, Path, Query, Request

from freestep.errors import MalformedRequest, ShardUnavailable
from freestep.models import MOST_SHARDS, Point
from freestep_service.peers import Peers
from freestep_service.registry import Registry
from freestep_service.run import Run
from freestep_service.settings import Settings

__all__ = [
    "AnyPeers",
    "AnyRegistry",
    "AnyRun",
    "Dtype",
    "LeaseId",
    "Point",
    "RunName",
    "ServiceSettings",
    "ShardIndex",
]

# They are coroutines though they wait for nothing, since FastAPI calls plain functions in a thread.

RunName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
LeaseId = Annotated[str, Path(min_length=1, max_length=200)]
Dtype = Literal["F32", "BF16", "F16"]


async def _registry(request: Request) -> Registry:
    return cast(Registry, request.app.state.registry)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


AnyRegistry = Annotated[Registry, Depends(_registry)]
ServiceSettings = Annotated[Settings, Depends(_settings)]


async def _peers(request: Request) -> Peers:
    return cast(Peers, request.app.state.peers)


AnyPeers = Annotated[Peers, Depends(_peers)]


async def _run(run: RunName, registry: AnyRegistry) -> Run:
    return await registry.find(run)


AnyRun = Annotated[Run, Depends(_run)]


async def _index(
    run: AnyRun,
    shard: Annotated[int | None, Query(ge=0, lt=MOST_SHARDS)] = None,
    of: Annotated[int | None, Query(ge=1, le=MOST_SHARDS)] = None,
) -> int | None:
    """The shard that a request is about; None where it is about the whole of a run of several."""
    if of is not None and of != run.count:
        raise ShardUnavailable(f"the run has {run.count} shards, not {of}", shards=run.count)
    if shard is not None and shard >= run.count:
        raise MalformedRequest(f"the run has {run.count} shards", field="shard")
    return 0 if run.count == 1 else shard


ShardIndex = Annotated[int | None, Depends(_index)]
