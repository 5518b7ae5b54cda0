"""Bounds on the bodies of the control plane's routes, which are read whole, whatever media type they are sent as."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from email.message import Message
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from freestep.errors import BodyTooLarge, MalformedRequest, ProblemError, RequestTimeout
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import GuardedRoute, caller, require_let_in
from freestep_service.web.json_bodies import SMALL, parsed, validated

__all__ = ["LONGEST_SPEC", "JsonRoute", "takes_large"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

LONGEST_SPEC = 16 * 1024**2
"""Bytes: room for the manifest of some hundred thousand tensors."""

_LARGE = "_freestep_large"


def takes_large(model: type[BaseModel]) -> Callable[[Endpoint], Endpoint]:
    """Has an endpoint take a body of up to LONGEST_SPEC bytes, as a model; others take SMALL ones."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _LARGE, model)
        return endpoint

    return mark


class JsonRoute(GuardedRoute):
    """A route that reads no more of a body than it takes, and refuses the rest with BodyTooLarge.

    A body that has not come within `json_seconds` is refused with RequestTimeout. What changes something waits for a
    body that it has no use for, too: a request that turns out to be broken, or never ends, has then changed nothing.
    """

    def refusals(self) -> set[type[ProblemError]]:
        return super().refusals() | ({BodyTooLarge} if self._reads_bodies else set())

    @property
    def _reads_bodies(self) -> bool:
        return self.body_field is not None or self.methods != {"GET"}

    def unguarded(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler, model = super().unguarded(), getattr(self.endpoint, _LARGE, None)
        if not self._reads_bodies:
            return handler

        async def handle(request: Request) -> Response:
            bodies = ServiceContext.of(request).json_bodies
            async with AsyncExitStack() as stack:

                async def make_room() -> None:
                    await stack.enter_async_context(bodies.large(caller(request).id))

                bounded = _BoundedRequest(request, LONGEST_SPEC if model else SMALL, make_room)
                # Read here, since FastAPI answers 400 for whatever is raised while it reads.
                body = await bounded.body()
                if body and self.body_field is not None and _is_json(request):

                    def read() -> Any:
                        document = parsed(body)
                        return document if model is None else validated(model, document)

                    is_large = len(body) > SMALL
                    bounded.document = await bodies.beside(read) if is_large else read()
                if self.scope is not None:
                    require_let_in(request)
                return await handler(bounded)

        return handle


class _BoundedRequest(Request):
    """A request whose body is `longest` bytes at most; `make_room` is awaited before more than SMALL of it is read.

    document: what FastAPI finds as its JSON. A model is taken as it is.
    """

    def __init__(self, request: Request, longest: int, make_room: Callable[[], Awaitable[None]]) -> None:
        super().__init__(request.scope, request.receive)
        self._longest = longest
        self._make_room = make_room
        self.document: Any = None

    async def json(self) -> Any:
        return self.document

    async def stream(self) -> AsyncGenerator[bytes, None]:
        seconds = ServiceContext.of(self).settings.json_seconds
        received = 0
        try:
            async with asyncio.timeout(seconds) as limit:
                async for chunk in super().stream():
                    before, received = received, received + len(chunk)
                    if received > self._longest:
                        raise BodyTooLarge(f"the JSON body may have {self._longest} bytes", limit=self._longest)
                    if before <= SMALL < received:
                        limit.reschedule(None)
                        await self._make_room()
                        limit.reschedule(asyncio.get_running_loop().time() + seconds)
                    yield chunk
        except ClientDisconnect:
            raise MalformedRequest("the connection was closed before the end of the body") from None
        except TimeoutError:
            raise RequestTimeout(f"a JSON body has to come within {seconds:g} s") from None


def _is_json(request: Request) -> bool:
    """Whether FastAPI may ask for the body as JSON: a page of another site may send one that does not say so."""
    message = Message()
    message["content-type"] = request.headers.get("content-type", "text/plain")
    return message.get_content_maintype() == "application" and message.get_content_subtype().split("+")[-1] == "json"
