"""What a token allows: scopes, runs, workers, and until when."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from freestep.api.token_form import SCOPES, Scope, make_token
from freestep_service.domain import tokens
from freestep_service.domain.tokens import ANYBODY, Token, digest_of, id_of

TEXT = make_token("push")
TOKEN = Token("spot-fleet", "push", digest_of(TEXT), 1000, runs="mnist-*", workers="site-a-*", expires_at=2000)


def test_nothing_of_the_text_is_kept() -> None:
    assert TOKEN.digest == hashlib.sha256(TEXT.encode()).hexdigest()
    assert TEXT not in repr(TOKEN)
    assert TOKEN.id == id_of(TOKEN.digest) and TOKEN.digest.startswith(TOKEN.id)


def test_it_is_known_by_its_digest() -> None:
    assert TOKEN.is_of(digest_of(TEXT))
    assert not TOKEN.is_of(digest_of(make_token("push")))
    assert not TOKEN.is_of(TOKEN.digest[:-1])
    assert not TOKEN.is_of("")


@pytest.mark.parametrize("own", SCOPES)
@pytest.mark.parametrize("asked", SCOPES)
def test_each_scope_has_those_before_it(own: Scope, asked: Scope) -> None:
    assert replace(TOKEN, scope=own).has_scope(asked) == (SCOPES.index(own) >= SCOPES.index(asked))


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("*", ["mnist", "a.b_c-d"], []),
        ("mnist", ["mnist"], ["mnist-1", "MNIST", "mnis"]),
        ("mnist-*", ["mnist-", "mnist-1", "mnist-a-b"], ["mnist", "xmnist-1", "Mnist-1"]),
        ("run-?", ["run-1"], ["run-", "run-12"]),
        ("run-[0-2]", ["run-1"], ["run-3", "run-[0-2]"]),
        ("run-[!0]", ["run-1"], ["run-0"]),
        ("run-[", ["run-["], ["run-1"]),
        ("a.c", ["a.c"], ["abc"]),
    ],
)
def test_runs_are_named_as_in_shells(pattern: str, inside: list[str], outside: list[str]) -> None:
    token = replace(TOKEN, runs=pattern)
    assert all(map(token.is_for_run, inside))
    assert not any(map(token.is_for_run, outside))
    assert token.is_for_all_runs == (pattern == "*")


def test_hostile_patterns_cost_no_time() -> None:
    # A matcher that tries all ways would not come to an end.
    assert not replace(TOKEN, runs="*a" * 64).is_for_run("a" * 127 + "b")
    assert not replace(TOKEN, workers="*a" * 100).is_for_worker("a" * 199 + "b")


def test_what_is_longer_than_names_is_not_kept() -> None:
    kept = tokens._matches.cache_info().currsize
    assert TOKEN.is_for_run("mnist-" + "x" * 122) and not TOKEN.is_for_run("mnist-" + "x" * 123)
    # The refusal of the name is another's.
    assert replace(TOKEN, runs="*").is_for_run("x" * 129)
    assert tokens._matches.cache_info().currsize <= kept + 1


def test_workers_are_any_unless_named() -> None:
    assert TOKEN.is_for_worker("site-a-1") and not TOKEN.is_for_worker("site-b-1")
    assert replace(TOKEN, workers=None).is_for_worker("site-b-1")


def test_it_ends() -> None:
    assert TOKEN.is_good(1999.9) and not TOKEN.is_good(2000)
    assert TOKEN.has_expired(2000) and not TOKEN.has_expired(1999)
    assert replace(TOKEN, expires_at=None).is_good(1e12)
    assert not TOKEN.revoked().is_good(1500)
    assert not TOKEN.revoked().has_expired(1500)


def test_without_tokens_anybody_may_do_everything() -> None:
    assert ANYBODY.is_good(1e12) and ANYBODY.has_scope("admin") and ANYBODY.is_for_all_runs
    assert ANYBODY.is_for_worker("any")
