"""Parses path and query parameters of the hot endpoints directly.

FastAPI's dependency injection costs about as much as the rest of a small push.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, get_args

from fastapi import Request, Response

from freestep.api.models import MOST_SHARDS, Point, PointDtype
from freestep.errors import (
    CoordinatorUnavailable,
    MalformedRequest,
    RunNotFound,
    ShardUnavailable,
)
from freestep.wire.encoding import INT8
from freestep.wire.spans import Span
from freestep_service.domain.run_names import RUN_NAME
from freestep_service.runs.run import Run
from freestep_service.settings import Settings
from freestep_service.state.shared_memory import SharedMemory
from freestep_service.web.context import ServiceContext
from freestep_service.web.fields import PathField, Query, choice, flag, integer, pattern
from freestep_service.web.guard import GuardedRoute
from freestep_service.web.headers import LEASE_KIND, memory
from freestep_service.web.problem_documents import refuses
from freestep_service.web.relay import Relay

__all__ = [
    "CHECKPOINT",
    "CUT",
    "DTYPE",
    "LEASE",
    "MIN_STEP",
    "OF",
    "POINT",
    "REPLACE",
    "RUN",
    "SHARD",
    "DataRequest",
    "DataRoute",
    "run_of",
]

RUN = PathField(
    "run",
    pattern(RUN_NAME, "1 to 128 letters, digits, '.', '_' and '-', of which the first is a letter or digit"),
    "The run's name.",
    required=True,
    example="mnist",
)
LEASE = PathField("lease", LEASE_KIND, "The lease's ID.", required=True)
SHARD = Query(
    "shard", integer(0, MOST_SHARDS - 1), "The shard whose part the body is; without it the body is the whole model."
)
OF = Query("of", integer(1, MOST_SHARDS), "The number of shards that the sender takes the run to have.")
POINT: Query[Point] = Query("point", choice(get_args(Point)), "The point.", default="x")
DTYPE: Query[PointDtype] = Query(
    "dtype",
    choice(get_args(PointDtype)),
    "The tensors' dtype. I8: int8, and beside each NAME its NAME::scale, F32, one for each 256 elements; of a run of "
    "several shards only with `shard`.",
    default="F32",
)
MIN_STEP = Query("min_step", integer(0), "The point is of no step before this one.", default=0)
CUT = Query(
    "cut",
    pattern(r"[\x21-\x7e]{0,200}", "at most 200 printable characters without spaces"),
    "Shards that are asked with the same word answer of one step.",
    default="",
)
CHECKPOINT = Query(
    "checkpoint",
    integer(0),
    "The step of a checkpoint that is kept, which the answer is of, and not of the run's newest step.",
)
REPLACE: Query[bool] = Query(
    "replace", flag(), "Whether the state takes the place of one that is there.", default=False
)


class DataRoute(GuardedRoute):
    """A route whose handler takes the request as it came and returns a Response.

    Handlers bound the body that they read by `body_length`, or read none.
    """

    def unguarded(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


@refuses(CoordinatorUnavailable, RunNotFound, ShardUnavailable)
async def run_of(request: Request) -> Run:
    """The run that the path names. Raises MalformedRequest, RunNotFound and CoordinatorUnavailable."""
    return await ServiceContext.of(request).registry.find(RUN.read(request))


@dataclass(frozen=True)
class DataRequest:
    """A request of the data path: the run, and the shard that the query names; None if it is about the whole of a run
    of several shards. Besides, what its handler needs of the service."""

    run: Run
    shard: int | None
    settings: Settings
    relay: Relay
    _request: Request

    @classmethod
    @refuses(run_of, MalformedRequest, ShardUnavailable)
    async def of(cls, request: Request) -> Self:
        """Raises MalformedRequest, RunNotFound, CoordinatorUnavailable, and ShardUnavailable if the run has another
        number of shards than the request supposes."""
        context, run = ServiceContext.of(request), await run_of(request)
        shard, of = SHARD.find(request), OF.find(request)
        if of is not None and of != run.count:
            raise ShardUnavailable(f"the run has {run.count} shards, not {of}", shards=run.count)
        if shard is not None and shard >= run.count:
            raise MalformedRequest(f"shard: the run has {run.count} shards", field="shard")
        return cls(run, 0 if run.count == 1 else shard, context.settings, context.relay, request)

    def memory(self, lease: str | None = None, span: Span | None = None) -> SharedMemory | None:
        """The memory that the request names, if it names one. lease: that it has to be of, of a push. span: of a body.

        Raises MemoryNotShared, and MalformedRequest where no body can lie there.
        """
        name = memory(self._request)
        if name is None:
            return None
        found = ServiceContext.of(self._request).memories.find(name, self.run, self.shard, lease)
        if span is not None and span.end > (most := found.layout.body):
            raise MalformedRequest(f"bodies lie within the first {most} bytes of the memory", field="Freestep-Span")
        return found

    @property
    def point(self) -> Point:
        return POINT.read(self._request)

    @property
    def dtype(self) -> PointDtype:
        """Raises MalformedRequest, and MalformedTensors if the run's names leave none for I8's scales."""
        dtype = DTYPE.read(self._request)
        if dtype == "I8":
            # Blocks begin anew with a shard's part, and not there with the whole's.
            if self.shard is None:
                count = self.run.count
                detail = f"dtype: I8 is of one shard at a time, and the run has {count}: ask for shard=K&of={count}"
                raise MalformedRequest(detail, field="dtype", shards=count)
            self.run.manifest.derived(INT8.roles)
        return dtype

    @property
    def min_step(self) -> int:
        return MIN_STEP.read(self._request)

    @property
    def checkpoint(self) -> int | None:
        return CHECKPOINT.find(self._request)

    @property
    def cut(self) -> str:
        return CUT.read(self._request)
