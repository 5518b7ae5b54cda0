"""Links that sign a browser in: what stands in one is good once, for some minutes, for the token of whoever asked.

They are kept in the memory of the process that was asked, so a link is for that process, and a restart ends it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

__all__ = ["SignInLinks"]

_GOOD_S = 300
_MOST = 256
"""Links that are kept; the oldest goes when there are more."""
_MOST_OF_TOKEN = 16
"""Of these, links of one token: who may read a single run ends no link of an admin's."""
_CODE_BYTES = 24


class SignInLinks:
    """The links that were made and not used. clock: seconds that only rise.

    good_s: for how many seconds a link is good.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, good_s: int = _GOOD_S) -> None:
        self._clock = clock
        self.good_s = good_s
        self._made: dict[str, tuple[float, str, str]] = {}
        """When a link ends, the token that it stands for, and the ID of that, by its code's digest; oldest first."""

    def make(self, token: str, token_id: str) -> str:
        """The code of a new link, which stands for the text of a token."""
        code = secrets.token_urlsafe(_CODE_BYTES)
        self._forget_old()
        own = [digest for digest, (_, _, its) in self._made.items() if its == token_id]
        if len(own) >= _MOST_OF_TOKEN:
            del self._made[own[0]]
        elif len(self._made) >= _MOST:
            del self._made[next(iter(self._made))]
        self._made[_digest(code)] = self._clock() + self.good_s, token, token_id
        return code

    def use(self, code: str) -> str | None:
        """The token that a code stands for, this once; None if the code is none, was used, or has ended."""
        self._forget_old()
        # Looked up by digest: no time that this takes says anything of codes that would be found.
        _, token, _ = self._made.pop(_digest(code), (0.0, None, ""))
        return token

    def _forget_old(self) -> None:
        now = self._clock()
        for digest in [each for each, (ends, *_) in self._made.items() if ends <= now]:
            del self._made[digest]


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()
