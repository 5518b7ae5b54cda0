"""What a token allows: which calls, of which runs, under which workers' names, and until when.

The text of a token is known to its bearer alone. What is kept is its SHA-256: of 178 random bits, so that neither salt
nor a slow hash would add anything.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from pydantic import TypeAdapter

from freestep.api.token_form import SCOPES, Scope
from freestep_service.domain.quotas import NO_QUOTA, Quota
from freestep_service.domain.run_names import LONGEST_NAME

__all__ = ["ANYBODY", "Token", "digest_of", "id_of"]

_RANK = {scope: rank for rank, scope in enumerate(SCOPES)}
_ID_LENGTH = 12
_matches = lru_cache(maxsize=4096)(fnmatchcase)


def digest_of(text: str) -> str:
    """What is kept of a token: its SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(digest: str) -> str:
    """What a token is called: the beginning of its digest, so that one that is registered twice is one."""
    return digest[:_ID_LENGTH]


@dataclass(frozen=True)
class Token:
    """A token without its text.

    Times are seconds since 1970. runs, workers: patterns as in shells; workers None is any. A revoked token is kept
    until it would have expired, so that no older copy of it can bring it back.
    """

    name: str
    scope: Scope
    digest: str
    created_at: int
    runs: str = "*"
    workers: str | None = None
    expires_at: int | None = None
    is_revoked: bool = False
    quota: Quota = NO_QUOTA

    @property
    def id(self) -> str:
        return id_of(self.digest)

    def is_of(self, digest: str) -> bool:
        """Whether it is the token of a digest; takes as long whatever they have in common."""
        return hmac.compare_digest(self.digest, digest)

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def is_good(self, now: float) -> bool:
        """Whether it lets anybody in."""
        return not self.is_revoked and not self.has_expired(now)

    def has_scope(self, scope: Scope) -> bool:
        return _RANK[self.scope] >= _RANK[scope]

    def is_for_run(self, run: str) -> bool:
        # Of texts in the place of a name, which are not validated yet, none that is longer than names is kept.
        return _matches(run, self.runs) if len(run) <= LONGEST_NAME else self.is_for_all_runs

    @property
    def is_for_all_runs(self) -> bool:
        return self.runs == "*"

    def is_for_worker(self, worker: str) -> bool:
        return self.workers is None or _matches(worker, self.workers)

    def revoked(self) -> Token:
        return replace(self, is_revoked=True)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Token:
        """Raises ValueError."""
        return _TOKEN.validate_json(text, strict=True)


_TOKEN = TypeAdapter(Token)

ANYBODY = Token("anybody", "admin", "", 0)
"""Whoever asks a service whose tokens are turned off."""
