"""Requests of the data path go straight to their handlers.

The law of this file: no answer differs by it. A `DataRoute` takes a request and returns its response, so nothing of
what FastAPI does around a handler concerns it: found by its path, it is called. The route itself stays where it is,
behind, for the OpenAPI document, for other methods of its path, and for an application below a prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.datastructures import URLPath
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from freestep_service.web.routes.data_request import DataRoute

__all__ = ["DirectRoute", "direct_routes"]


class DirectRoute(BaseRoute):
    """The way to a route's handler, for requests of its path and methods."""

    def __init__(self, route: DataRoute) -> None:
        self.path_format = route.path_format
        self._route = route
        self._handler = route.get_route_handler()
        self._matching = route.path_regex.match
        self._methods = frozenset(route.methods or ())

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] not in self._methods or scope.get("root_path"):
            return Match.NONE, {}
        found = self._matching(scope["path"])
        if found is None:
            return Match.NONE, {}
        return Match.FULL, {"path_params": found.groupdict(), "route": self._route, "endpoint": self._route.endpoint}

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        """The path is the route's own to make."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


def direct_routes(routes: Iterable[BaseRoute]) -> list[BaseRoute]:
    """The direct ways to those of the routes that have one. Parts of their paths are texts, and not converted."""
    return [DirectRoute(route) for route in routes if isinstance(route, DataRoute)]
