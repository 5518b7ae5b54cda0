"""Paths whose segments mean something elsewhere, at a process that owns the run and at one that relays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

from edge.answers import Answer
from harness import AUTHORIZED, ThreadService
from plain_calls import Api

SEGMENTS = [
    "..",
    ".",
    "%2e%2e",
    "%2E.",
    "%2e",
    "%2e%2e%2f%2e%2e",
    "..%2f",
    "%2e%2e%00",
    "%252e%252e",
    "..;x",
    "..%5c",
    "%c0%ae%c0%ae",
    "%ff",
    "..%3Fx=",
    "a%23b",
    "@evil",
    "",
]
OPERATIONS = [
    ("DELETE", "/leases/{}"),
    ("PUT", "/leases/{}"),
    ("POST", "/checkpoints/{}/restore"),
    ("DELETE", "/{}"),
    ("GET", "/parameters/{}"),
]


@pytest.fixture(scope="module", params=["owner", "other"])
def api(request: pytest.FixtureRequest, shared_nodes: Callable[..., list[ThreadService]]) -> Iterator[Api]:
    """Calls to a run of one shard, at the process that owns it or at another one."""
    nodes = shared_nodes(2)
    made = Api(nodes[0].url)
    made.create()
    owner = made.http.get(made.path("/topology")).json()["shards"][0]["url"]
    url = next(node.url for node in nodes if (node.url == owner) is (request.param == "owner"))
    calls = Api(url, made.run)
    yield calls
    calls.http.close()
    made.http.delete(made.path())
    made.http.close()


def asked(api: Api, method: str, target: str, **headers: str) -> Answer:
    """The answer to a request whose target is sent as it is."""
    address = urlsplit(api.url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        connection.request(method, target, headers={"Content-Length": "0", **AUTHORIZED, **headers})
        return Answer.read(connection.getresponse())
    finally:
        connection.close()


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=" ".join)
@pytest.mark.parametrize("segment", SEGMENTS)
def test_no_segment_leads_elsewhere(api: Api, method: str, path: str, segment: str) -> None:
    before = api.status()
    answer = asked(api, method, api.path(path.format(segment)))
    assert answer.status in (400, 404, 405), answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert api.status() == before


@pytest.mark.parametrize("hidden", ["", "%2e%2e/"])
@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
def test_no_detour_leads_to_a_run(api: Api, method: str, hidden: str) -> None:
    before = api.status()
    for target in (
        f"/v1/runs/{hidden}./{api.run}",
        f"/v1//runs/{hidden}{api.run}/",
        f"/v1/runs/x/../{hidden}{api.run}",
    ):
        assert asked(api, method, target).status in (400, 404, 405)
    assert api.status() == before


def test_a_query_is_no_path(api: Api) -> None:
    lease = api.lease()
    target = api.path(f"/leases/{lease['lease']}?/../../..")
    assert asked(api, "DELETE", target).status == 204
    assert api.status()["workers"] == []


@pytest.mark.parametrize("step", ["1_0", "+1", "%201", "1.0", "1e0", "0x1", "%D9%A3", "9" * 19])
def test_a_step_in_a_path_is_written_in_digits(api: Api, step: str) -> None:
    answer = asked(api, "POST", api.path(f"/checkpoints/{step}/restore"))
    assert (answer.status, answer.slug) == (400, "malformed-request")
