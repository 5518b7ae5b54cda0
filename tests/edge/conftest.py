"""Services in which the edge is looked at: one process, one that speaks TLS, and one that relays to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from edge.answers import Peer, dialled
from harness import TOKEN, ThreadService
from plain_calls import Api

_TOKEN = f"Authorization: Bearer {TOKEN}"


class Edge:
    """A run with weights, and connections to a service that has it, or relays to the one that has."""

    def __init__(self, service: ThreadService, run: str = "") -> None:
        self.service = service
        self.api = Api(service.url, *([run] if run else []), trusted=service.trusted)

    @contextmanager
    def peer(self) -> Iterator[Peer]:
        with dialled(self.service.url, self.service.trusted) as peer:
            yield peer

    def head(self, method: str, path: str = "", *lines: str, version: str = "HTTP/1.1") -> bytes:
        """The head of a request for what is below the run's path, without an end."""
        return "\r\n".join([f"{method} {self.api.path(path)} {version}", "Host: here", _TOKEN, *lines, ""]).encode(
            "latin-1"
        )


@contextmanager
def _edge(service: ThreadService) -> Iterator[Edge]:
    edge = Edge(service)
    edge.api.create()
    yield edge
    edge.api.http.delete(edge.api.path())
    edge.api.http.close()


@pytest.fixture(scope="module", params=["http", "https", "relayed"])
def edge(request: pytest.FixtureRequest, shared_nodes: Callable[..., list[ThreadService]]) -> Iterator[Edge]:
    """A run, at a service that speaks plain HTTP or TLS, or at one that relays to its owner."""
    if request.param == "relayed":
        nodes = shared_nodes(2)
        with _edge(nodes[0]) as owned:
            url = owned.api.http.get(owned.api.path("/topology")).json()["shards"][0]["url"]
            other = Edge(next(node for node in nodes if node.url != url), owned.api.run)
            yield other
            other.api.http.close()
        return
    name = "service" if request.param == "http" else "tls_service"
    with _edge(request.getfixturevalue(name)) as owned:
        yield owned
