"""Small pushes, whose bodies may come before their claims are looked at: whoever is refused by a claim sends none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from harness import ThreadService
from plain_calls import Api
from raw_pushes import answered, begun_push

INLINE = 1000


@pytest.fixture
def small(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> Api:
    """Calls to a run whose bodies are decoded on the event loop."""
    api = connect(start_service(inline_elements=INLINE).url)
    api.create()
    return api


@pytest.mark.parametrize(
    ("change", "slug"),
    [
        (lambda api, lease: api.http.delete(api.path(f"/leases/{lease['lease']}")), "lease-expired"),
        (lambda api, lease: api.http.post(api.path("/leases"), json={"worker": lease["worker"]}), "lease-expired"),
        (lambda api, lease: api.http.patch(api.path(), json={"paused": True}), "run-paused"),
    ],
    ids=["released", "fenced off", "paused"],
)
def test_a_claim_that_was_good_is_refused_without_its_body(
    small: Api, change: Callable[[Api, dict[str, object]], object], slug: str
) -> None:
    lease = small.lease()
    for step in range(2):
        assert small.push(lease, step, key=f"{step}").json()["decision"] == "applied"
    change(small, lease)
    connection = begun_push(small, lease, b"")
    assert json.loads(answered(connection))["type"].endswith(slug)
    connection.close()
