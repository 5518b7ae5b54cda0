"""Requests with tokens of an issuer, and how they are refused."""

from __future__ import annotations

import httpx

from harness import ThreadService
from plain_calls import slug

ACCOUNT = "system:serviceaccount:train:worker"


def asked(service: ThreadService, token: str, path: str = "/v1/runs", method: str = "GET") -> httpx.Response:
    """The answer to a request with a token."""
    return httpx.request(method, service.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def names(answer: httpx.Response, *words: str) -> bool:
    """Whether a refusal is one of a token, and says why."""
    assert (answer.status_code, slug(answer)) == (401, "unauthenticated"), answer.text
    return all(word in answer.json()["detail"] for word in words)
