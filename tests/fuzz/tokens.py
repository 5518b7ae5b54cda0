"""A text is a token if it is what tokens are made as; else it is refused, and the refusal does not show it."""

from __future__ import annotations

from freestep.api.token_form import SCOPES, begins_as_token, scope_of
from fuzz.target import Target, mutants

__all__ = ["TARGET"]

_LENGTH = 42
_SECRET = 20
"""Characters of a text that no refusal has in it by chance."""


def _is_token(text: str) -> bool:
    try:
        scope = scope_of(text)
    except ValueError as refusal:
        assert len(text) < _SECRET or text not in str(refusal)
        return False
    assert scope in SCOPES and text[4] == scope[0] and begins_as_token(text)
    assert text.isascii() and len(text) == _LENGTH
    return True


def check(data: bytes) -> None:
    text = data.decode("latin-1")
    if _is_token(text):
        # No other text that a typing error makes of it is one.
        assert not any(map(_is_token, (text[:-1], text + "0", text[:10] + text[11] + text[10] + text[12:] + " ")))


_SEEDS = (b"fst_a_sOmuQ2GzWVPworJzUMbvwDW8I8m6dp0idSAq", b"fst_p_GwYjpcv9J6k4vshLUZ6MRKdewDzZUS27sytS", b"fst_r_")
_WORDS = (b"fst_", b"_", b"a_", b"p_", b"r_", b"0", b"z", b"\n", b" ", b"\xb2", b"\x00")

TARGET = Target(check, _SEEDS, _WORDS, mutants(_SEEDS, _WORDS))
