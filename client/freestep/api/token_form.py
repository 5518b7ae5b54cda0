"""The form of bearer tokens: `fst_`, the scope's letter, `_`, 30 random characters, and 6 of a checksum of these.

Scanners for secrets know it by its beginning, and a typing error is told without asking anybody.
"""

from __future__ import annotations

import re
import secrets
import zlib
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal

__all__ = ["SCOPES", "Scope", "begins_as_token", "make_token", "scope_of"]

Scope = Literal["read", "push", "admin"]
"""read: look at runs, and report metrics. push: also create runs and train them. admin: everything."""
SCOPES: tuple[Scope, ...] = ("read", "push", "admin")
"""In their order: each allows what those before it allow."""

_BEGIN = "fst_"
_LETTERS: dict[str, Scope] = {scope[0]: scope for scope in SCOPES}
_BASE62 = digits + ascii_uppercase + ascii_lowercase
_RANDOM, _CHECK = 30, 6
"""Characters: 178 bits that nobody guesses, and room for the 32 bits of a CRC."""
_FORM = re.compile(rf"({_BEGIN}([{''.join(_LETTERS)}])_[0-9A-Za-z]{{{_RANDOM}}})([0-9A-Za-z]{{{_CHECK}}})", re.ASCII)


def make_token(scope: Scope) -> str:
    """A new token of a scope.

    Args:
        scope: The scope, which its letter names.
    """
    text = f"{_BEGIN}{scope[0]}_{''.join(secrets.choice(_BASE62) for _ in range(_RANDOM))}"
    return text + _checksum(text)


def scope_of(token: str) -> Scope:
    """The scope that the letter of a token names.

    Args:
        token: The text of a token.

    Raises:
        ValueError: It is none; the message says why, without the text.
    """
    match = _FORM.fullmatch(token)
    if match is None:
        *others, last = (f"{_BEGIN}{letter}_" for letter in _LETTERS)
        raise ValueError(
            f"a token is {', '.join(others)} or {last} and {_RANDOM + _CHECK} letters and digits, with nothing else"
        )
    if _checksum(match[1]) != match[3]:
        raise ValueError("the token is mistyped: its last characters do not fit the others")
    return _LETTERS[match[2]]


def begins_as_token(text: str) -> bool:
    """Whether a text is to be of this form.

    Args:
        text: What a request carries as its bearer token.
    """
    return text.startswith(_BEGIN)


def _checksum(text: str) -> str:
    number = zlib.crc32(text.encode())
    return "".join(_BASE62[number // 62**place % 62] for place in reversed(range(_CHECK)))
