"""The dashboard: its files, and how a browser signs in and out.

These are between the page, `freestep dashboard` and the service of one version, and no part of the API.
"""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Self

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException
from pydantic import BaseModel, Field, model_validator

from freestep.api.token_form import Scope
from freestep.api.tokens import SignInLink
from freestep.api.validation import StrictModel
from freestep.errors import Forbidden, Unauthenticated
from freestep_service.access.audit import Deed, whose
from freestep_service.domain.tokens import Token
from freestep_service.web.browser_session import begin_session, end_session
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import caller, credentials, needs, open_to_all, visitor
from freestep_service.web.limits import JsonRoute
from freestep_service.web.pages import INDEX, Pages

router = APIRouter(include_in_schema=False, route_class=JsonRoute)

_pages = Pages()
_LONGEST_TOKEN = 8192


class SignIn(StrictModel):
    """What a browser signs in with: a token that somebody has pasted, or the code of a link."""

    token: Annotated[str, Field(min_length=1, max_length=_LONGEST_TOKEN)] | None = None
    code: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.token is None) == (self.code is None):
            raise ValueError("a token or a code, and not both")
        return self


class Session(BaseModel):
    """Who a browser is to the service.

    scope: None where it has to sign in. is_open: whether the service runs without tokens. half: of a session that has
    just begun, what the page keeps.
    """

    version: str
    scope: Scope | None = None
    name: str | None = None
    runs: str | None = None
    expires_at: str | None = None
    is_open: bool = False
    half: str | None = None


@router.get("/")
@open_to_all
async def index(request: Request) -> Response:
    """The page."""
    return _file(request, INDEX)


@router.get("/dashboard/files/{path:path}")
@open_to_all
async def dashboard_file(path: str, request: Request) -> Response:
    """A file of the page."""
    return _file(request, path)


@router.get("/dashboard/session")
@open_to_all
async def read_session(request: Request, response: Response) -> Session:
    """Who the browser is: known by its session, or by a certificate."""
    response.headers["Cache-Control"] = "no-store"
    return _session(request, await visitor(request))


@router.post("/dashboard/session", status_code=201)
@open_to_all
async def sign_in(given: SignIn, request: Request, response: Response) -> Session:
    """Begins a session of a token. Raises Unauthenticated."""
    context = ServiceContext.of(request)
    if context.settings.insecure:
        raise Forbidden("the service runs without tokens")
    try:
        text = given.token.strip() if given.token is not None else context.links.use(given.code or "")
        if text is None:
            raise Unauthenticated(
                "the link is unknown here, was used, or has ended: `freestep dashboard` prints another"
            )
        token = await context.tokens.find(b"Bearer " + text.encode("latin-1", "replace"))
    except (Unauthenticated, Forbidden) as error:
        context.audit.note_stranger(_deed(request, error.extensions.get("subject"), error.slug))
        raise
    half = begin_session(request, response, text)
    context.audit.note(_deed(request, whose(token), "signed-in"))
    response.headers["Cache-Control"] = "no-store"
    return _session(request, token, half)


@router.delete("/dashboard/session", status_code=204)
@open_to_all
async def sign_out(request: Request) -> Response:
    """Ends the browser's session: the token is as good as before."""
    response = Response(status_code=204)
    end_session(request, response)
    return response


@router.post("/dashboard/links", status_code=201)
@needs("read", runs="any")
async def create_link(request: Request, response: Response) -> SignInLink:
    """Makes a link that signs a browser in with the caller's token, once. Raises Forbidden."""
    response.headers["Cache-Control"] = "no-store"
    context = ServiceContext.of(request)
    if context.settings.insecure:
        return SignInLink(code=None, seconds=0)
    given = credentials(request)
    if given is None:
        raise Forbidden("a certificate has let the request in, of which no link can be made: make a token for it")
    token = given.decode("latin-1").partition(" ")[2].strip()
    return SignInLink(code=context.links.make(token, caller(request).id), seconds=context.links.good_s)


def _file(request: Request, path: str) -> Response:
    answer = _pages.answer(request, path)
    if answer is None:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return answer


def _session(request: Request, token: Token | None, half: str | None = None) -> Session:
    version = request.app.version
    if token is None:
        return Session(version=version)
    ends = None if token.expires_at is None else datetime.fromtimestamp(token.expires_at, UTC).isoformat()
    is_open = ServiceContext.of(request).settings.insecure
    return Session(
        version=version,
        scope=token.scope,
        name=token.name,
        runs=token.runs,
        expires_at=ends,
        is_open=is_open,
        half=half,
    )


def _deed(request: Request, who: str | None, result: str) -> Deed:
    return Deed(who, request.client and request.client.host, "sign_in", None, result)
