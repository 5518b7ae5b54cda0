"""Settings of an issuer that cannot be meant: the service says so before it starts."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import Any

import pytest
from pydantic import ValidationError

import forked
from freestep_service.app import _issuer
from freestep_service.settings import BadSetting, Settings
from issuers import Issuer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"oidc_issuer": None}, "set oidc_issuer too"),
        ({"oidc_audience": None}, "needs oidc_audience and oidc_rules"),
        ({"oidc_rules": "[]"}, "needs oidc_audience and oidc_rules"),
        ({"oidc_rules": "[{"}, "oidc_rules"),
        ({"oidc_rules": '[{"claim": "sub", "matches": "*"}]'}, "scope"),
        ({"oidc_rules": '[{"claim": "sub", "matches": "*", "scope": "root"}]'}, "scope"),
        ({"oidc_rules": '[{"claim": "sub", "matches": "*", "scope": "push", "run": "x"}]'}, "run"),
        ({"oidc_rules": '[{"claim": [], "matches": "*", "scope": "push"}]'}, "claim"),
        ({"oidc_issuer": "http://issuer.test"}, "must be an https URL"),
        ({"oidc_issuer": "issuer.test"}, "must be an https URL"),
        ({"oidc_jwks_url": "http://issuer.test/keys"}, "must be an https URL"),
        ({"oidc_algorithms": "RS256,none"}, "RS256,none cannot be used"),
        ({"oidc_algorithms": "HS256"}, "HS256 cannot be used"),
        ({"oidc_algorithms": " , "}, " ,  cannot be used"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(issuer: Issuer, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**{**issuer.settings(), **changes})


def test_the_extra_is_named_where_it_is_missing(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "freestep_service.access.issuer", None)

    async def start() -> None:
        async with AsyncExitStack() as stack:
            await _issuer(Settings(**issuer.settings()), stack)

    with pytest.raises(BadSetting, match=r"pip install 'freestep\[oidc\]'"):
        asyncio.run(start())


@pytest.mark.slow
def test_rules_that_are_no_json_are_told_in_a_line() -> None:
    done = forked.freestep("serve", "--oidc-rules", "[{")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("freestep serve: ") and "oidc_rules" in done.stderr
