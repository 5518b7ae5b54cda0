"""The form of tokens: random, of a named scope, and told from what was mistyped."""

from __future__ import annotations

import re

import pytest

from freestep.api.token_form import SCOPES, Scope, begins_as_token, make_token, scope_of

KNOWN = "fst_p_" + 30 * "0" + "0eNSv1"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_token_names_its_scope(scope: Scope) -> None:
    token = make_token(scope)
    assert re.fullmatch(rf"fst_{scope[0]}_[0-9A-Za-z]{{36}}", token)
    assert scope_of(token) == scope
    assert begins_as_token(token)


def test_tokens_differ() -> None:
    assert len({make_token("push") for _ in range(1000)}) == 1000


def test_the_checksum_is_crc32_in_base62() -> None:
    # 596646151 = zlib.crc32(b"fst_p_" + 30 * b"0")
    assert scope_of(KNOWN) == "push"


@pytest.mark.parametrize("place", range(len(KNOWN)))
def test_every_mistyped_character_is_told(place: int) -> None:
    token = make_token("admin")
    for other in ("x", "y", "7", "é", " ", ""):
        mistyped = token[:place] + other + token[place + 1 :]
        if mistyped != token:
            with pytest.raises(ValueError, match=r"a token is fst_|the token is mistyped") as caught:
                scope_of(mistyped)
            assert token[6:] not in str(caught.value) and not (mistyped and mistyped in str(caught.value))


def test_swapped_characters_are_told() -> None:
    token = next(token for token in iter(lambda: make_token("read"), "") if token[10] != token[11])
    with pytest.raises(ValueError, match="the token is mistyped"):
        scope_of(token[:10] + token[11] + token[10] + token[12:])


@pytest.mark.parametrize("text", ["", "fst_", "fst_x_" + 36 * "0", KNOWN + "\n", KNOWN + "0", KNOWN.lower()])
def test_other_texts_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"a token is fst_|the token is mistyped"):
        scope_of(text)


def test_other_kinds_of_tokens_are_told_apart() -> None:
    assert not begins_as_token("eyJhbGciOiJSUzI1NiJ9.e30.c2ln")
