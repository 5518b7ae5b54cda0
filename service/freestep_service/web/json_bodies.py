"""The JSON bodies of requests: how much of one is read, and what reading it takes of the process.

A large one, the spec of a run, takes many times its size in memory, and seconds of arithmetic. So few are on their way
at once, and few of these from one token; they are parsed and validated one after another, in a thread beside the event
loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from freestep.api.spec import MOST_GROUPS, MOST_PARAMETERS
from freestep.errors import MalformedRequest
from freestep_service.runs.lanes import Lanes

__all__ = ["SMALL", "JsonBodies", "parsed", "validated"]

T = TypeVar("T")

SMALL = 64 * 1024
"""Bytes up to which a body is read, parsed and validated at once."""
_LARGE_AT_ONCE, _LARGE_OF_TOKEN = 4, 2
_MOST_MEMBERS = MOST_GROUPS
"""Members of an object, of which each may be a fault."""
_MOST_VALUES = 16 * MOST_PARAMETERS
"""Values in all, which take up to some hundred bytes of memory each: about twice those of the largest spec."""


class JsonBodies:
    """The large JSON bodies that are on their way to one process.

    wait_s: seconds that one waits for its turn.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._tokens, self._all = Lanes(_LARGE_OF_TOKEN), Lanes(_LARGE_AT_ONCE)
        self._thread = ThreadPoolExecutor(1, "freestep-json")

    @asynccontextmanager
    async def large(self, token: str) -> AsyncIterator[None]:
        """A block in which a large body of a token is received. Raises Overloaded where others take too long."""
        await self._tokens.enter(token, self._wait_s)
        try:
            await self._all.enter("", self._wait_s)
            try:
                yield
            finally:
                self._all.leave("")
        finally:
            self._tokens.leave(token)

    async def beside(self, work: Callable[[], T]) -> T:
        """What a function returns, which is called in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Ends the thread once it is done."""
        self._thread.shutdown(wait=False)


def parsed(body: bytes) -> Any:
    """The document of a JSON body.

    Raises RequestValidationError where it is none, as FastAPI does, and MalformedRequest where it has more values, more
    members in an object or deeper nesting than any that the service takes.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise MalformedRequest(f"a JSON body may have {_MOST_VALUES} values", limit=_MOST_VALUES)
    try:
        # Python code for each object also lets the event loop's thread go on: the parser alone never would.
        return json.loads(body, object_pairs_hook=_members)
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error"}]
        ) from None
    except RecursionError:
        raise MalformedRequest("the JSON body is nested too deeply") from None
    except ValueError as error:
        # It is not UTF-8, or an integer has thousands of digits.
        raise MalformedRequest(f"the JSON body cannot be read: {str(error)[:100]}") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_MEMBERS:
        raise MalformedRequest(f"an object in a JSON body may have {_MOST_MEMBERS} members", limit=_MOST_MEMBERS)
    return dict(pairs)


def validated(model: type[BaseModel], document: Any) -> BaseModel:
    """A document as a model. Raises RequestValidationError, as FastAPI does for a body."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults: Iterable[Any] = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None
