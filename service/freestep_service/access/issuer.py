"""Tokens of an OpenID Connect issuer: JSON Web Tokens, signed with a key of the issuer's, for this service.

What a token allows is said by the service's rules on its claims. It is verified once by each process that meets it:
its claims cannot change before it expires, and if the issuer withdraws a key, all are verified anew.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt

from freestep.errors import Forbidden, Unauthenticated
from freestep_service.access.issuer_keys import IssuerKeys, Key
from freestep_service.domain.claims import first_match, named, token_of
from freestep_service.domain.tokens import Token
from freestep_service.settings import Settings

__all__ = ["Issuer"]

_LEEWAY_S = 30
"""Seconds by which the issuer's clock and this one may differ."""
_LAST_S = 253_402_300_799
"""The end of the year 9999, in seconds since 1970: no later time can be shown."""
_MOST_VERIFIED = 4096
_FAULTS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "the token has expired",
    jwt.ImmatureSignatureError: "the token is not good yet",
    jwt.InvalidSignatureError: "the token is not signed with the issuer's key",
    jwt.InvalidAudienceError: "the token is for another audience",
    jwt.InvalidIssuerError: "the token is of another issuer",
}


@dataclass(frozen=True)
class _Issued(Token):
    """A token of the issuer's. key: what it was verified with."""

    key: Key = field(default_factory=dict, repr=False, compare=False)


class Issuer:
    """Verifies the tokens of the issuer that the settings name.

    read_keys: reads the issuer's JSON Web Key Set; raises IssuerUnavailable. clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: Settings,
        read_keys: Callable[[], Awaitable[Mapping[str, Any]]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuer = settings.oidc_issuer
        self._audience = settings.oidc_audience
        self._rules = settings.oidc_rules or ()
        self._algorithms = settings.issuer_algorithms()
        self._clock = clock
        self._verified: dict[bytes, Token] = {}
        """By the digests of their credentials."""
        self.keys = IssuerKeys(read_keys, self._verified.clear)

    def known(self, digest: bytes) -> Token | None:
        """What a token was found to allow, by the digest of its credentials, if it is still good."""
        token = self._verified.get(digest)
        return token if token is not None and token.is_good(self._clock()) else None

    def is_good(self, token: Token) -> bool:
        """Whether a token that was found before, here or elsewhere, lets its bearer in as far as the issuer says."""
        return not isinstance(token, _Issued) or self.keys.have(token.key)

    async def verify(self, text: str, digest: bytes) -> Token:
        """What a token allows. `digest` is that of the credentials.

        Raises Unauthenticated if it is none of the issuer's for this service that is good, Forbidden if it allows
        nothing, and IssuerUnavailable if that cannot be told now.
        """
        try:
            header = jwt.get_unverified_header(text)
            unverified = jwt.decode(text, options={"verify_signature": False})
        except (jwt.PyJWTError, RecursionError):
            raise Unauthenticated("the token is neither one of this service nor a JSON Web Token") from None
        if unverified.get("iss") != self._issuer:
            raise Unauthenticated(_FAULTS[jwt.InvalidIssuerError])
        if header.get("alg") not in self._algorithms:
            raise Unauthenticated(f"tokens have to be signed with one of {', '.join(self._algorithms)}")
        key = await self.keys.find(header.get("kid"))
        claims = self._claims(text, key, header["alg"])
        rule = first_match(self._rules, claims)
        if rule is None:
            subject = named(claims)
            raise Forbidden(f"no rule of this service is for {subject!r}", subject=subject)
        ends = min(int(claims["exp"]) + _LEEWAY_S, _LAST_S)
        token = _Issued(**vars(token_of(rule, claims, ends)), key=key)
        if len(self._verified) >= _MOST_VERIFIED:
            self._verified.clear()
        self._verified[digest] = token
        return token

    def _claims(self, text: str, key: Key, algorithm: str) -> dict[str, Any]:
        """The claims of a token that is good. Raises Unauthenticated."""
        try:
            if key.get("alg", algorithm) != algorithm:
                raise jwt.InvalidAlgorithmError("the key is for another algorithm")
            return jwt.decode(
                text,
                jwt.PyJWK(dict(key), algorithm),
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_S,
                options={"require": ["iss", "aud", "exp", "sub"], "enforce_minimum_key_length": True},
            )
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks the claim {error.claim}") from None
        except (jwt.PyJWTError, RecursionError) as error:
            raise Unauthenticated(_FAULTS.get(type(error), "the token cannot be verified")) from None
