"""What the bearer of a verified JSON Web Token may do, by rules on its claims (RFC 7519, OpenID Connect Core)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from freestep_service.domain.tokens import Token, digest_of
from freestep_service.settings import ClaimRule

__all__ = ["first_match", "named", "token_of"]


def named(claims: Mapping[str, Any]) -> str:
    """How the subject of some claims is called."""
    # JSON may have halves of characters, which nothing else can show.
    subject: str = claims["sub"]
    return "oidc " + subject.encode(errors="backslashreplace").decode()


def first_match(rules: Iterable[ClaimRule], claims: Mapping[str, Any]) -> ClaimRule | None:
    """The first rule that fits some claims."""
    return next((rule for rule in rules if _fits(rule, claims)), None)


def token_of(rule: ClaimRule, claims: Mapping[str, Any], expires_at: int) -> Token:
    """The token that a rule makes of claims that it fits.

    It is named by the subject, and its ID is the subject's: the next one of the same subject has it too.
    """
    name = named(claims)
    return Token(name, rule.scope, digest_of(f"{claims['iss']} {name}"), 0, rule.runs, rule.workers, expires_at)


def _fits(rule: ClaimRule, claims: Mapping[str, Any]) -> bool:
    found: Any = claims
    for name in (rule.claim,) if isinstance(rule.claim, str) else rule.claim:
        if not isinstance(found, Mapping) or name not in found:
            return False
        found = found[name]
    return any(fnmatchcase(_text(each), rule.matches) for each in (found if isinstance(found, list) else [found]))


def _text(value: Any) -> str:
    """A claim as patterns see it: true, 7."""
    return value if isinstance(value, str) else json.dumps(value)
