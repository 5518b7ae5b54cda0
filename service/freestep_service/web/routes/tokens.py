"""Tokens: make, list, revoke."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from freestep.api.tokens import NewToken, TokenList, TokenRequest, TokenStatus
from freestep.errors import Forbidden, StorageUnavailable, TokenNotFound
from freestep_service.access.tokens import Tokens
from freestep_service.domain.tokens import Token
from freestep_service.web.answer_headers import NO_STORE
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import needs
from freestep_service.web.limits import JsonRoute
from freestep_service.web.problem_documents import refuses
from freestep_service.web.routes.documents import answer, link

router = APIRouter(tags=["tokens"], route_class=JsonRoute)


async def _tokens(request: Request) -> Tokens:
    context = ServiceContext.of(request)
    if context.settings.insecure:
        # One that anybody may make now would let them in when tokens are on again.
        raise Forbidden("the service runs without tokens")
    return context.tokens


AnyTokens = Annotated[Tokens, Depends(_tokens)]


@router.post(
    "/v1/tokens",
    status_code=201,
    responses={
        201: answer(
            (NO_STORE,),
            {
                "list": link("list_tokens", of_run=False),
                "revoke": link("revoke_token", {"id": "$response.body#/id"}, of_run=False),
            },
        )
    },
)
@needs("admin")
@refuses(StorageUnavailable)
async def create_token(wish: TokenRequest, tokens: AnyTokens, response: Response) -> NewToken:
    """Makes a token, whose text is in this answer and nowhere else."""
    token, text = await tokens.create(wish)
    response.headers["Cache-Control"] = "no-store"
    return NewToken(**_shown(token), token=text)


@router.get("/v1/tokens")
@needs("admin")
async def list_tokens(tokens: AnyTokens) -> TokenList:
    """The tokens that are good, without their texts."""
    return TokenList(tokens=[TokenStatus(**_shown(token, used_at)) for token, used_at in await tokens.all()])


@router.delete("/v1/tokens/{id}", status_code=204, response_class=Response)
@needs("admin")
@refuses(TokenNotFound, StorageUnavailable)
async def revoke_token(
    id: Annotated[str, Path(min_length=1, max_length=100, description="The token's ID.")], tokens: AnyTokens
) -> None:
    """Ends a token, at all processes of the service.

    Where the answer is coordinator-unavailable or storage-unavailable, it has ended at this process all the same:
    repeat the request to hear that it is kept.
    """
    await tokens.revoke(id)


def _shown(token: Token, used_at: int | None = None) -> dict[str, Any]:
    return {
        "id": token.id,
        **asdict(token),
        **{f"max_{name}": bound for name, bound in asdict(token.quota).items()},
        "created_at": _time(token.created_at),
        "expires_at": None if token.expires_at is None else _time(token.expires_at),
        "last_used_at": None if used_at is None else _time(used_at),
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
