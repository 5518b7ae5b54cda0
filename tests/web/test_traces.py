"""OpenTelemetry traces of pushes, as a collector receives them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from freestep_service.app import create_app
from freestep_service.runs.local_shard import LocalShard
from freestep_service.settings import BadSetting, Settings
from harness import ThreadService, store
from meanwhile import wait_until
from plain_calls import BODY, Api
from shards.runs import sharded

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="opentelemetry is not installed: freestep[otel]")

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT = CALLER.split("-")[1:3]
PHASES = ["admit", "queue", "receive", "commit", "update", "answer"]


@dataclass(frozen=True)
class Seen:
    """A span."""

    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]


@dataclass
class Collector:
    """What takes spans over HTTP."""

    url: str
    spans: list[Seen] = field(default_factory=list)

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name == name]

    def below(self, parent: Seen) -> list[Seen]:
        found = [span for span in self.spans if span.parent == parent.id]
        return sorted(found, key=lambda span: (span.begin, span.end))


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, to which services send that are started from here on."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    made = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                origin = {each.key: each.value.string_value for each in resource.resource.attributes}
                for each in [span for scope in resource.scope_spans for span in scope.spans]:
                    own = {one.key: one.value.string_value or one.value.int_value for one in each.attributes}
                    ids = [word.hex() for word in (each.trace_id, each.span_id, each.parent_span_id)]
                    times = each.start_time_unix_nano, each.end_time_unix_nano
                    made.spans.append(Seen(each.name, *ids, *times, origin | own))  # type: ignore[misc]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield made
        server.shutdown()
        thread.join()


def test_a_push_is_a_trace_below_its_callers(
    collector: Collector, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(start_service(traces=True).url)
    api.create()
    answer = api.push(api.lease("me"), 0, "a-key", traceparent=CALLER, Prefer="return=representation")
    assert answer.status_code == 200
    assert api.pull("x")[1] == 1
    wait_until(lambda: len(collector.spans) == 7)
    (push,) = collector.named("push")
    assert (push.trace, push.parent) == (TRACE, PARENT)
    told = {"run": api.run, "worker": "me", "key": "a-key", "decision": "applied", "step": 0, "receipt_step": 1}
    told["bytes"] = len(BODY)
    assert {f"freestep.{name}": value for name, value in told.items()}.items() <= push.attributes.items()
    path = {"http.route": "/v1/runs/{run}/gradients", "url.path": api.path("/gradients"), "url.scheme": "http"}
    assert {**path, "http.request.method": "POST"}.items() <= push.attributes.items()
    assert push.attributes["http.response.status_code"] == 200
    assert push.attributes["service.instance.id"] == api.url
    phases = collector.below(push)
    assert [span.name for span in phases] == PHASES
    for before, after in pairwise(phases):
        assert before.begin <= before.end == after.begin <= after.end


def test_a_push_over_shards_is_one_trace(collector: Collector, tmp_path: Path) -> None:
    with store("valkey", tmp_path) as redis_url:
        common = {"redis_url": redis_url, "checkpoint_url": str(tmp_path / "checkpoints"), "traces": True}
        nodes = [ThreadService(tmp_path / f"node-{number}", **common) for number in range(2)]
        try:
            with sharded(nodes) as api:
                api.create(shards=2)
                whole = Api(nodes[0].url, api.run)
                assert whole.push(api.lease(), 0, traceparent=CALLER).status_code == 200
                whole.http.close()
                wait_until(lambda: len(collector.named("push")) == 3 and len(collector.named("answer")) == 2)
        finally:
            ThreadService.stop_all(nodes)
    assert {span.trace for span in collector.spans} == {TRACE}
    (entered,) = [span for span in collector.named("push") if span.parent == PARENT]
    relays = collector.below(entered)
    assert [span.name for span in relays] == ["relay", "relay"]
    for relay in relays:
        asked = urlsplit(relay.attributes["url.full"])
        assert (asked.path, relay.attributes["http.request.method"]) == (api.path("/gradients"), "POST")
        assert relay.attributes["server.address"] == asked.hostname == "127.0.0.1"
        assert relay.attributes["server.port"] == asked.port
    assert {relay.attributes["server.port"] for relay in relays} == {urlsplit(node.url).port for node in nodes}
    parts = [part for relay in relays for part in collector.below(relay)]
    assert sorted(part.attributes["freestep.shard"] for part in parts) == [0, 1]
    assert {part.attributes["service.instance.id"] for part in parts} == {node.url for node in nodes}
    for part in parts:
        assert [span.name for span in collector.below(part)] == PHASES


def test_a_refused_push_shows_how_far_it_came(
    collector: Collector, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(start_service(traces=True).url)
    api.create()
    assert api.push(api.lease(), 0, body=b"nothing").status_code == 422
    wait_until(lambda: bool(collector.named("push")))
    (push,) = collector.named("push")
    assert push.parent == ""
    assert push.attributes["http.response.status_code"] == 422
    assert [span.name for span in collector.below(push)] == ["admit", "queue", "answer"]


def test_a_trace_repeats_nothing_that_can_be_no_push(
    collector: Collector, start_service: Callable[..., ThreadService]
) -> None:
    url = start_service(traces=True).url
    headers = {"Idempotency-Key": "k" * 10_000, "Freestep-Step": "9" * 10_000}
    assert httpx.post(f"{url}/v1/runs/{'r' * 10_000}/gradients", headers=headers).status_code == 401
    wait_until(lambda: bool(collector.named("push")))
    (push,) = collector.named("push")
    assert push.attributes["http.response.status_code"] == 401
    assert len(str(push.attributes)) < 1000


def test_a_push_that_fails_is_an_error(
    collector: Collector,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("planted")

    service = start_service(traces=True)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    monkeypatch.setattr(LocalShard, "push", broken)
    assert api.push(lease, 0).status_code == 500
    wait_until(lambda: bool(collector.named("push")))
    (push,) = collector.named("push")
    assert push.attributes["error.type"] == "500"


def test_a_collector_that_is_away_costs_no_push(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    api = connect(start_service(traces=True).url)
    api.create()
    assert api.push(api.lease(), 0).status_code == 200


def test_without_its_packages_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "freestep_service.web.tracing", raising=False)
    with pytest.raises(BadSetting, match=r"traces: a package is missing, pip install 'freestep\[otel\]'"):
        create_app(Settings(traces=True))
