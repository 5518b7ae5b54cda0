"""What a request of the data path is about, read by hand: FastAPI's way of finding that out costs as much as all else
that the service does for a small push."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, get_args

from fastapi import Request, Response
from fastapi.routing import APIRoute

from freestep.api.models import MOST_SHARDS, Point, PointDtype
from freestep.errors import MalformedRequest, ShardUnavailable
from freestep.wire.encoding import INT8
from freestep_service.runs.run import Run
from freestep_service.settings import Settings
from freestep_service.web.relay import Relay
from freestep_service.web.routes.dependencies import RUN_NAME

__all__ = ["DataRequest", "DataRoute", "run_of"]

_RUN_NAME = re.compile(RUN_NAME)
_INTEGER = re.compile(r"[0-9]{1,18}", re.ASCII)
_LARGEST = 10**18 - 1
_WORD = re.compile(r"[\x21-\x7e]{0,200}")


class DataRoute(APIRoute):
    """A route whose handler is given the request as it came, and answers with a Response."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


async def run_of(request: Request) -> Run:
    """The run that the path names. Raises MalformedRequest, RunNotFound and CoordinatorUnavailable."""
    name = request.path_params["run"]
    if not _RUN_NAME.fullmatch(name):
        raise MalformedRequest("run: a run's name is 1 to 128 letters, digits, '.', '_' and '-'", field="run")
    run: Run = await request.app.state.registry.find(name)
    return run


@dataclass(frozen=True)
class DataRequest:
    """The run that the path names; the shard that the query does, None where the request is about the whole of a run
    of several; and the parts of the service that answer."""

    run: Run
    shard: int | None
    settings: Settings
    relay: Relay
    _request: Request

    @classmethod
    async def of(cls, request: Request) -> Self:
        """Raises MalformedRequest, RunNotFound, CoordinatorUnavailable, and ShardUnavailable where the run has another
        number of shards than the request supposes."""
        state, run = request.app.state, await run_of(request)
        shard, of = _integer(request, "shard", 0, MOST_SHARDS - 1), _integer(request, "of", 1, MOST_SHARDS)
        if of is not None and of != run.count:
            raise ShardUnavailable(f"the run has {run.count} shards, not {of}", shards=run.count)
        if shard is not None and shard >= run.count:
            raise MalformedRequest(f"the run has {run.count} shards", field="shard")
        return cls(run, 0 if run.count == 1 else shard, state.settings, state.relay, request)

    @property
    def point(self) -> Point:
        point: Point = self._choice("point", get_args(Point), "x")
        return point

    @property
    def dtype(self) -> PointDtype:
        """Raises MalformedRequest, and MalformedTensors where the run's names leave none for I8's scales."""
        dtype: PointDtype = self._choice("dtype", get_args(PointDtype), "F32")
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
        return _integer(self._request, "min_step", 0, _LARGEST) or 0

    @property
    def cut(self) -> str:
        word: str = self._request.query_params.get("cut", "")
        if not _WORD.fullmatch(word):
            raise MalformedRequest("cut: a word of at most 200 printable characters", field="cut")
        return word

    def _choice(self, name: str, choices: tuple[str, ...], ordinary: str) -> Any:
        chosen = self._request.query_params.get(name, ordinary)
        if chosen not in choices:
            raise MalformedRequest(f"{name}: one of {', '.join(choices)}", field=name)
        return chosen


def _integer(request: Request, name: str, least: int, most: int) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not _INTEGER.fullmatch(text) or not least <= int(text) <= most:
        raise MalformedRequest(f"{name}: an integer from {least} to {most}", field=name)
    return int(text)
