"""Tokens in files of this machine: those that a service makes for its own user, and those that it is given as secrets.

Here alone stands the text of a token, in files that only their user can read.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from freestep.api.token_form import Scope, make_token, scope_of
from freestep.api.token_places import token_place
from freestep_service.access.tokens import Tokens
from freestep_service.settings import CannotStart, Settings
from freestep_service.storage.durable import flush

__all__ = ["LeftTokens", "register_kept"]

logger = logging.getLogger("freestep")

_PORTS = {"http": 80, "https": 443}
_ROOT = 0
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


async def register_kept(tokens: Tokens, settings: Settings) -> str:
    """Registers the tokens in the files that the settings name, and makes those that are missing; the admin token.

    Raises CannotStart, CoordinatorUnavailable.
    """
    if settings.push_token_file is not None:
        await _register(tokens, settings.push_token_file, "push")
    if settings.admin_token_file is not None:
        return await _register(tokens, settings.admin_token_file, "admin")
    return await _register(tokens, settings.data_dir / "admin-token", "admin", is_named=False)


async def _register(tokens: Tokens, file: Path, scope: Scope, *, is_named: bool = True) -> str:
    """is_named: whether somebody has named the file, as one for a secret, and so chosen its owner."""
    text = _read_or_make(file, scope, is_named)
    if not await tokens.register(text, f"{scope}-token"):
        # It was revoked, to be replaced.
        text = make_token(scope)
        try:
            _write(file, text, is_new=False)
        except OSError as error:
            raise CannotStart(f"the token in {file} was revoked, put another in its place: {error.strerror}") from None
        await tokens.register(text, f"{scope}-token")
    return text


def _read_or_make(file: Path, scope: Scope, is_named: bool) -> str:
    """The token in a file, a new one if there is no file. Raises CannotStart, which does not show it."""
    try:
        return _read(file, scope, is_named)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CannotStart(f"the token in {file} cannot be read: {error.strerror}") from None
    text = make_token(scope)
    try:
        _write(file, text, is_new=True)
    except FileExistsError:
        # Another process was faster.
        return _read(file, scope, is_named)
    except OSError as error:
        logger.warning("the %s token cannot be kept in %s, and ends with this process: %s", scope, file, error.strerror)
    return text


def _read(file: Path, scope: Scope, is_named: bool) -> str:
    with file.open(errors="replace") as opened:
        # Of what is opened, which a link may name: so secrets are mounted.
        _require_own(file, os.fstat(opened.fileno()), is_named)
        text = opened.read().strip()
    try:
        found = scope_of(text)
    except ValueError as error:
        raise CannotStart(f"{file} holds no token, remove it to have one made: {error}") from None
    if found != scope:
        raise CannotStart(f"{file} holds a token of scope {found}, not {scope}")
    return text


def _require_own(file: Path, found: os.stat_result, is_named: bool) -> None:
    """Raises CannotStart if another user, other than root, may have written the file, and so knows the token."""
    if not is_named and found.st_uid not in (os.geteuid(), _ROOT):
        raise CannotStart(
            f"{file} belongs to the user with ID {found.st_uid}, who knows the token in it: "
            "remove it to have one made, or give the file to this user or to root"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise CannotStart(
            f"{file} can be written by other users, who may know the token in it: "
            "remove it to have one made, or chmod go-w it"
        )


def _write(file: Path, text: str, *, is_new: bool) -> None:
    """Writes a file that only its user can read, as a whole. Raises FileExistsError if it is new and there is one."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as opened:
            opened.write(text + "\n")
            opened.flush()
            # Else a power cut may leave an empty file of that name, with which no service starts.
            os.fsync(descriptor)
        if is_new:
            # Unlike a renaming, it leaves a file that is there as it is.
            os.link(temporary, file)
        else:
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    flush(file.parent)


class LeftTokens:
    """The admin token where clients of the same user on this machine find it by the service's URL, while it runs."""

    def __init__(self, text: str, urls: Iterable[str]) -> None:
        self._text = text
        self._left: list[Path] = []
        # RuntimeError: this user has no home.
        with suppress(RuntimeError):
            for place in {_place(url) for url in urls}:
                self._leave(place)

    def _leave(self, place: Path) -> None:
        try:
            _write(place, self._text, is_new=False)
        except OSError as error:
            logger.info("clients of this user will not find the admin token by themselves: %s", error)
        else:
            self._left.append(place)

    def remove(self) -> None:
        """Removes it, so that no later listener on this port is sent it."""
        for place in self._left:
            with suppress(OSError):
                # Unless another service has taken the place.
                if place.read_text().strip() == self._text:
                    place.unlink()


def _place(url: str) -> Path:
    parts = urlsplit(url)
    return token_place(parts.hostname or "", parts.port or _PORTS[parts.scheme])
