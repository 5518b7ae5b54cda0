"""The bearer token of a client: given, of the environment, or left by a service of the same user on this machine."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from freestep.api.token_form import begins_as_token, scope_of
from freestep.api.token_places import token_place
from freestep.errors import InvalidSetting
from freestep.listeners import is_users_own

__all__ = ["NO_CREDENTIALS", "Credentials", "credentials", "own_credentials"]

logger = logging.getLogger("freestep")

_LOOK_S = 1.0
"""Seconds between two looks at a file, so that tokens can be replaced under way."""
_PORTS = {"http": 80, "https": 443}


class Credentials:
    """A token, or a file that holds one, which is read again when it changes.

    is_watched: whether to look at the file from time to time; else it is read only after a refusal. may_send: whether
    what is in the file may be sent now; asked whenever the file is looked at.
    """

    def __init__(
        self,
        token: str | None,
        file: Path | None = None,
        *,
        is_watched: bool = False,
        may_send: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take(token)
        self._file = file
        self._is_watched = is_watched
        self._may_send = may_send
        self._clock = clock
        self._read_as: tuple[int, int, int] | None = None
        self._next_look = 0.0

    def headers(self) -> dict[str, str]:
        """The header of a request that carries the token."""
        if self._is_watched and (now := self._clock()) >= self._next_look:
            self._next_look = now + _LOOK_S
            self.renew()
        return self._headers

    def renew(self) -> bool:
        """Reads the file if it has changed; whether the token is another one now."""
        if self._file is None:
            return False
        try:
            found = os.stat(self._file)
            if not self._may_send():
                self._take(None)
                self._read_as = None
                return False
            read_as = found.st_mtime_ns, found.st_size, found.st_ino
            if read_as == self._read_as:
                return False
            token = _checked(self._file.read_text().strip(), str(self._file))
        except (OSError, ValueError) as error:
            # The last token may be as good as ever.
            logger.debug("no token can be read in %s: %s", self._file, error)
            return False
        self._read_as = read_as
        if token == self.token:
            return False
        self._take(token)
        return True

    def _take(self, token: str | None) -> None:
        # First: another thread that sees the new token must not send the old one with it.
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.token = token


NO_CREDENTIALS = Credentials(None)


def credentials(token: str | None, url: httpx.URL) -> Credentials:
    """The token for a service: given, else of FREESTEP_TOKEN, FREESTEP_TOKEN_FILE, or where the service left its own.

    Args:
        token: A token that was given, if one was.
        url: The service's URL.

    Raises:
        InvalidSetting: The token cannot be one, or FREESTEP_TOKEN_FILE cannot be read; the message does not show it.
    """
    if token:
        return Credentials(_checked(token, "the argument token"))
    if given := os.environ.get("FREESTEP_TOKEN"):
        return Credentials(_checked(given, "FREESTEP_TOKEN"))
    if name := os.environ.get("FREESTEP_TOKEN_FILE"):
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"FREESTEP_TOKEN_FILE: {name} cannot be read: {error}") from error
        return Credentials(_checked(text.strip(), f"FREESTEP_TOKEN_FILE, {name},"), Path(name), is_watched=True)
    # RuntimeError: there is no home to look in. KeyError: it is no URL of a service.
    with suppress(RuntimeError, KeyError):
        host, port = url.host, url.port or _PORTS[url.scheme]
        # The file is there after a service that was killed too, and beside listeners of other users.
        left = Credentials(None, token_place(host, port), may_send=lambda: is_users_own(host, port))
        left.renew()
        return left
    return NO_CREDENTIALS


def own_credentials(http: httpx.Client, token: str | None) -> Credentials:
    """The token for a client of the user's own: none if that has a header of its own.

    Args:
        http: The client.
        token: A token that was given, if one was.

    Raises:
        InvalidSetting: As `credentials` does.
    """
    return NO_CREDENTIALS if "authorization" in http.headers else credentials(token, http.base_url)


def _checked(token: str, source: str) -> str:
    """A token that can be sent. Raises InvalidSetting, which names the source and does not show the token."""
    if not re.fullmatch("[!-~]+", token):
        raise InvalidSetting(f"a token consists of visible ASCII characters: that of {source} does not")
    if begins_as_token(token):
        try:
            scope_of(token)
        except ValueError as error:
            raise InvalidSetting(f"{source} holds no token: {error}") from None
    return token
