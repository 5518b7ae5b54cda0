"""Who may call what: each route names the scope that it needs, and lets in who has a token of that scope for its run.

That is decided from the head of a request alone, before its body is read and before its run is looked for, so that
nobody learns of a run that is not theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from freestep.api.token_form import Scope
from freestep.errors import (
    CoordinatorUnavailable,
    Forbidden,
    IssuerUnavailable,
    ProblemError,
    ShardUnavailable,
    Unauthenticated,
)
from freestep_service.access.audit import Deed, whose
from freestep_service.domain.run_names import LONGEST_NAME, is_run_name
from freestep_service.domain.tokens import ANYBODY, Token
from freestep_service.web.browser_session import session_credentials
from freestep_service.web.certified import is_let_in_by_certificate, let_in_by_certificate, presented
from freestep_service.web.connection import abort
from freestep_service.web.context import ServiceContext
from freestep_service.web.hosts import OPEN_PATH
from freestep_service.web.problem_documents import EVERYWHERE, declared, problem_responses
from freestep_service.web.problems import INTERNAL_ERROR, problem_of

__all__ = [
    "GuardedRoute",
    "caller",
    "credentials",
    "document_tokens",
    "is_let_in",
    "needs",
    "open_to_all",
    "require_let_in",
    "require_worker",
    "visitor",
]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_CALLER = "freestep.caller"
"""Where the scope of an ASGI request has the caller's token."""
_DISCONNECTED = "disconnected"
"""What the audit log has of a request whose client was gone before its answer."""
_NEEDED = "_freestep_needed"
_OPEN = None, ""


def needs(scope: Scope, *, runs: str = "") -> Callable[[Endpoint], Endpoint]:
    """Has an endpoint let in whose token has a scope, for the run that the path names.

    Where the path names none, the token has to be for all runs, unless `runs` is "any": then the endpoint shows what
    the token is for.
    """

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _NEEDED, (scope, runs))
        return endpoint

    return mark


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """Has an endpoint let in everybody."""
    setattr(endpoint, _NEEDED, _OPEN)
    return endpoint


class GuardedRoute(APIRoute):
    """A route that lets in whom its endpoint's scope admits, and has the OpenAPI document say so, and whom it refuses.

    An endpoint without a scope is an error at the start: it would be open by mistake.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not hasattr(endpoint, _NEEDED):
            raise TypeError(f"{path} names no scope: decorate {endpoint.__qualname__} with @needs or @open_to_all")
        self.scope, self._runs = getattr(endpoint, _NEEDED)
        extra = {**(options.get("openapi_extra") or {}), "security": [{"token": [self.scope]}] if self.scope else []}
        super().__init__(path, endpoint, **{**options, "openapi_extra": extra})
        # The id of the operation in the OpenAPI document.
        self.unique_id = self.name
        self.responses = {**problem_responses(self.refusals()), **self.responses}

    def refusals(self) -> set[type[ProblemError]]:
        """What requests may be refused with."""
        of_guard = {Unauthenticated, Forbidden, CoordinatorUnavailable, IssuerUnavailable} if self.scope else set()
        of_hosts = {Forbidden} if self.path != OPEN_PATH else set()
        return {*EVERYWHERE, *of_hosts, *of_guard, *declared(self.dependant)}

    def unguarded(self) -> Handler:
        """The handler of those who are let in."""
        return super().get_route_handler()

    def get_route_handler(self) -> Handler:
        handler, scope, runs = self.unguarded(), self.scope, self._runs
        if scope is None:
            return handler

        async def guarded(request: Request) -> Response:
            run = request.path_params.get("run")
            try:
                token = await _bearer(request)
            except (Unauthenticated, Forbidden) as error:
                _note(request, self.name, None, error)
                run = _shown(run)
                raise type(error)(f"{error}: {_wanted(scope, run)} is needed", scope=scope, run=run) from None
            if not token.has_scope(scope) or not _is_for(token, run, runs):
                run = _shown(run)
                detail = f"{_wanted(scope, run)} is needed, and this one is of scope {token.scope} for {token.runs!r}"
                refusal = Forbidden(detail, scope=scope, run=run)
                _note(request, self.name, token, refusal)
                raise refusal
            request.scope[_CALLER] = token
            return await handler(request)

        async def noted(request: Request) -> Response:
            """As `guarded`, of what only an admin may do."""
            try:
                answer = await guarded(request)
            except RequestValidationError:
                # It asked for nothing.
                raise
            except (Exception, asyncio.CancelledError) as error:
                if _CALLER in request.scope:
                    _note(request, self.name, caller(request), problem_of(error) or _failure(error))
                raise
            _note(request, self.name, caller(request), answer.status_code)
            return answer

        return noted if scope == "admin" else guarded


def _failure(error: BaseException) -> str:
    """What comes of a request that an error ends which is no refusal."""
    if isinstance(error, asyncio.CancelledError):
        # Who is cut short by a shutdown is told so.
        return ShardUnavailable.slug
    return _DISCONNECTED if isinstance(error, ClientDisconnect) else INTERNAL_ERROR


def _note(request: Request, what: str, token: Token | None, result: ProblemError | int | str) -> None:
    """Notes in the audit log what was done or refused; `token` is None where none let the caller in."""
    run = request.path_params.get("run")
    subject = result.extensions.get("subject") if isinstance(result, ProblemError) else None
    deed = Deed(
        who=subject if token is None else whose(token),
        peer=request.client and request.client.host,
        what=what,
        run=run if run is not None and is_run_name(run) else None,
        result=result.slug if isinstance(result, ProblemError) else result,
    )
    audit = ServiceContext.of(request).audit
    if token is None:
        audit.note_stranger(deed)
    else:
        audit.note(deed)


def _is_for(token: Token, run: str | None, runs: str) -> bool:
    return (runs == "any" or token.is_for_all_runs) if run is None else token.is_for_run(run)


def _shown(run: str | None) -> str | None:
    """As much of what stands in the place of a run's name as a name may have."""
    return run and run[:LONGEST_NAME]


def _wanted(scope: Scope, run: str | None) -> str:
    return f"a token of scope {scope} for {'all runs' if run is None else f'the run {run!r}'}"


def credentials(request: Request) -> bytes | None:
    """A request's header Authorization, or what that would be of a browser's session; None where it has neither.

    Raises Unauthenticated where either is none.
    """
    values = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if len(values) > 1:
        raise Unauthenticated("the header Authorization stands more than once")
    return values[0] if values else session_credentials(request)


async def _bearer(request: Request) -> Token:
    """The token that a request carries, or that its certificate counts as. Raises what `Tokens.find` raises.

    A browser's page sends halves of one in a cookie and a header: see `browser_session`.
    """
    context = ServiceContext.of(request)
    if context.settings.insecure:
        return ANYBODY
    if (given := credentials(request)) is not None:
        return context.tokens.known(given) or await context.tokens.find(given)
    token = presented(request.scope, context.settings) or await context.relay.caller(request)
    if token is None:
        raise Unauthenticated("the request carries no token")
    if token.has_expired(time.time()):
        _have_connect_again(request)
        raise Unauthenticated("the certificate of the connection has expired")
    let_in_by_certificate(request.scope, token)
    return token


def _have_connect_again(request: Request) -> None:
    """Ends the connection of a certificate that has expired: a client that has another one by now shows that."""
    abort(request.scope)


def caller(request: Request) -> Token:
    """The token of a request that was let in."""
    token: Token = request.scope[_CALLER]
    return token


def is_let_in(request: Request) -> bool:
    """Whether the caller's token, with which the request was let in, is good still: an answer may take minutes."""
    return ServiceContext.of(request).tokens.is_good(caller(request))


def require_let_in(request: Request) -> None:
    """Raises Unauthenticated if the caller's token has ended since the request was let in."""
    if not is_let_in(request):
        route: GuardedRoute = request.scope["route"]
        assert route.scope is not None
        run = _shown(request.path_params.get("run"))
        detail = f"the token has ended while the request was under way: {_wanted(route.scope, run)} is needed"
        refusal = Unauthenticated(detail, scope=route.scope, run=run)
        if route.scope != "admin":
            # What only an admin may do is noted whatever comes of it.
            _note(request, route.name, caller(request), refusal)
        if is_let_in_by_certificate(request.scope):
            _have_connect_again(request)
        raise refusal


async def visitor(request: Request) -> Token | None:
    """The token that a request carries, for an endpoint that is open to all; None if it carries none that is good."""
    try:
        return await _bearer(request)
    except (Unauthenticated, Forbidden, IssuerUnavailable):
        return None


def require_worker(request: Request, worker: str) -> None:
    """Raises Forbidden if the caller's token is not for a worker of this name."""
    token = caller(request)
    if not token.is_for_worker(worker):
        run = request.path_params["run"]
        detail = f"the token is for workers {token.workers!r}, and not for {worker!r}"
        refusal = Forbidden(detail, scope="push", run=run, worker=worker)
        _note(request, request.scope["route"].name, token, refusal)
        raise refusal


def document_tokens(app: FastAPI) -> None:
    """Has an app's OpenAPI document say how tokens are sent."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document.setdefault("components", {})["securitySchemes"] = _SECURITY_SCHEMES
        return document

    app.openapi = openapi  # type: ignore[method-assign]


_SECURITY_SCHEMES = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token of the scope that the operation names, or of a later one of read, push, admin.",
    }
}
