"""Client and Run against a real service, and against servers that answer as proxies and failing services do."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch

from freestep import (
    AlreadyInitialized,
    Claim,
    Client,
    CoordinatorUnavailable,
    EpochChanged,
    Flat,
    IdempotencyConflict,
    InvalidSpec,
    LeaseExpired,
    MalformedRequest,
    ManifestMismatch,
    NonFiniteGradient,
    Run,
    RunExists,
    RunNotFound,
    RunNotInitialized,
    ServiceUnreachable,
    StepNotReached,
    StorageUnavailable,
    UnexpectedResponse,
)
from freestep.api.models import Metric, MetricReceipt, ParameterSpec
from freestep.flat import DTYPES
from freestep.wire.manifest import Manifest
from harness import ThreadService
from meanwhile import end, wait_until
from plain_calls import SGD, TENSORS
from proxies import Cutter

SPEC: dict[str, Any] = {
    "optimizer": SGD,
    "aggregation": {"policy": "async"},
    "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()],
}

MANIFEST = Manifest([ParameterSpec(name="w", shape=(1,))])


@pytest.fixture
def client(service: ThreadService) -> Iterator[Client]:
    with Client(service.url, retry_for=10) as made:
        yield made


@pytest.fixture
def run(client: Client) -> Iterator[Run]:
    """A run with TENSORS as its weights."""
    made = client.run(f"run-{uuid.uuid4().hex[:8]}")
    made.create(SPEC)
    made.initialize(TENSORS)
    yield made
    made.delete()


def test_a_run_from_beginning_to_end(client: Client) -> None:
    run = client.run("whole")
    assert run.create(SPEC).initialized is False
    with pytest.raises(RunNotInitialized):
        run.pull("x")
    run.initialize(TENSORS)
    with pytest.raises(AlreadyInitialized):
        run.initialize(TENSORS)
    with run.lease("me", ttl_ms=5000) as lease:
        assert [worker.worker for worker in run.workers()] == ["me"]
        receipt = run.push(TENSORS, lease.claim(0, samples=8, loss=0.5))
        assert (receipt.decision, receipt.step) == ("applied", 1)
        x, step = run.pull("x")
        assert step == 1
        assert not x["w"].any()
        assert run.checkpoint().step == 1
        assert [each.step for each in run.checkpoints()] == [0, 1]
        assert run.restore(0).epoch == 2
        with pytest.raises(EpochChanged):
            run.push(TENSORS, lease.claim(0))
    assert run.workers() == []
    assert "whole" in [status.run for status in client.runs()]
    run.delete()
    with pytest.raises(RunNotFound):
        run.status()


def test_refusals_have_their_class_and_what_they_say(run: Run, client: Client) -> None:
    lease = run.lease()
    claim = lease.claim(0)
    run.push(TENSORS, claim)
    with pytest.raises(IdempotencyConflict):
        run.push({**TENSORS, "b": torch.tensor(0.0)}, claim)
    with pytest.raises(NonFiniteGradient):
        run.push({**TENSORS, "b": torch.tensor(float("nan"))}, lease.claim(1))
    with pytest.raises(StepNotReached) as not_reached:
        run.pull(min_step=9, wait=0.01)
    assert not_reached.value.extensions == {"epoch": 1, "step": 1}
    with pytest.raises(RunExists):
        run.create({**SPEC, "lease_ttl_ms": 1000})
    with pytest.raises(InvalidSpec) as invalid:
        client.run("other").create({**SPEC, "optimizer": {"algorithm": "sgd", "lr": -1}})
    assert invalid.value.extensions["field"] == "optimizer.lr"
    lease.release()
    with pytest.raises(LeaseExpired):
        run.push(TENSORS, lease.claim(1))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_an_exchange_is_a_push_and_a_pull(run: Run, dtype: str) -> None:
    gradient, arriving = Flat(run.manifest, dtype), Flat(run.manifest, dtype)
    gradient.fill({name: 0.5 * tensor for name, tensor in TENSORS.items()})
    with run.lease() as lease:
        receipt, pulled = run.exchange(gradient, lease.claim(0), arriving)
    assert (receipt.decision, receipt.step, receipt.replayed) == ("applied", 1, False)
    assert (pulled.step, pulled.epoch) == (1, 1)
    for name, view in arriving.views.items():
        assert torch.equal(view.float(), 0.5 * TENSORS[name])


def test_a_metric_is_reported_once(run: Run) -> None:
    assert run.report("accuracy", 0.5, 0) == MetricReceipt(name="accuracy", value=0.5, step=0, epoch=1)
    assert run.report("accuracy", 0.5, 0, epoch=1).replayed
    assert run.status().metrics == {"accuracy": Metric(value=0.5, step=0)}
    with pytest.raises(IdempotencyConflict, match="accuracy at step 0"):
        run.report("accuracy", 0.25, 0)
    with pytest.raises(MalformedRequest):
        run.report("accuracy", 0.5, 1)
    with pytest.raises(EpochChanged):
        run.report("accuracy", 0.5, 0, epoch=2)
    with pytest.raises(ValueError):
        run.report("accuracy", float("nan"), 0)


def test_tensors_that_do_not_fit_are_not_sent(run: Run) -> None:
    with run.lease() as lease, pytest.raises(ManifestMismatch):
        run.push({"w": TENSORS["w"]}, lease.claim(0))
    assert run.status().step == 0


@pytest.mark.parametrize("cuts", [[0], [20], [400], [0, 100, 250]])
def test_a_push_whose_answer_is_cut_is_sent_again_and_counts_once(
    service: ThreadService, run: Run, cuts: list[int]
) -> None:
    lease = run.lease()
    with Cutter(service.url, cuts) as cutter, Client(cutter.url, retry_for=20) as through:
        gradient, arriving = Flat(run.manifest), Flat(run.manifest)
        gradient.fill(TENSORS)
        receipt, pulled = through.run(run.name).exchange(gradient, lease.claim(0), arriving)
    assert receipt.replayed is True
    assert (receipt.step, pulled.step, run.status().step) == (1, 1, 1)
    assert not arriving.vector.any()
    lease.release()


def test_nobody_there_is_said_after_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(url, retry_for=0.3) as client, pytest.raises(ServiceUnreachable, match="did not answer"):
        client.runs()


class Answering(http.server.BaseHTTPRequestHandler):
    """Returns the responses that its server lists, one after another."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Cookie"]))  # type: ignore[attr-defined]
        status, headers, body = self.server.answers.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def asked() -> list[tuple[str, str | None]]:
    """The target and the cookie of each request to the `answering` server."""
    return []


@pytest.fixture
def answering(asked: list[tuple[str, str | None]]) -> Iterator[Callable[..., str]]:
    """Starts a server that returns listed responses; returns its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def listed(*answers: tuple[int, dict[str, str], bytes]) -> str:
        server.answers = list(answers)  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield listed
    server.shutdown()
    end(thread)
    server.server_close()


BUSY = (503, {"Retry-After": "0"}, b'{"type": "urn:freestep:problem:coordinator-unavailable", "detail": "away"}')


def test_a_busy_service_is_asked_again(answering: Callable[..., str]) -> None:
    with Client(answering(BUSY, BUSY, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_a_busy_service_is_not_asked_forever(answering: Callable[..., str]) -> None:
    asked_to_wait = (503, {"Retry-After": "60"}, BUSY[2])
    with Client(answering(asked_to_wait), retry_for=20) as client, pytest.raises(CoordinatorUnavailable) as caught:
        client.runs()
    assert caught.value.retry_after == 60


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.create(SPEC),
        lambda run: run.checkpoint(),
        lambda run: run.restore(1),
        lambda run: run.reshard(2),
        lambda run: run.delete(),
        lambda run: run.initialize(Flat(MANIFEST)),
        lambda run: run.push(Flat(MANIFEST), Claim("lease", 1, 0)),
        lambda run: run.exchange(Flat(MANIFEST), Claim("lease", 1, 0), Flat(MANIFEST)),
    ],
)
def test_full_storage_is_raised_as_such_and_at_once(call: Callable[[Run], object]) -> None:
    seen: list[str] = []

    def full(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(507, json=StorageUnavailable("no space left", free_bytes=7).to_document(507))

    http = httpx.Client(base_url="http://service.test", transport=httpx.MockTransport(full))
    with (
        Client(http=http, retry_for=3600) as client,
        pytest.raises(StorageUnavailable, match="no space left") as caught,
    ):
        call(client.run("run"))
    assert caught.value.extensions == {"free_bytes": 7}
    assert len(seen) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>a proxy's page</html>"),
        (404, {}, b'{"type": "about:blank", "title": "Not Found"}'),
        (500, {}, b"[]"),
        (307, {"Location": "/elsewhere"}, b""),
        (200, {}, b'{"items": []}'),
        (200, {}, b""),
    ],
)
def test_what_is_not_freestep_is_unexpected(
    answering: Callable[..., str], answer: tuple[int, dict[str, str], bytes]
) -> None:
    with Client(answering(answer)) as client, pytest.raises(UnexpectedResponse):
        client.runs()


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
@pytest.mark.parametrize("lines", [{}, {"Retry-After": "0"}])
def test_a_gateway_whose_service_is_away_is_asked_again(
    answering: Callable[..., str], status: int, lines: dict[str, str]
) -> None:
    away = (status, lines, b"<html>the service restarts</html>")
    with Client(answering(away, away, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_a_gateway_is_not_asked_forever(answering: Callable[..., str]) -> None:
    away = (502, {"Retry-After": "60"}, b"Bad Gateway")
    with Client(answering(away), retry_for=20) as client, pytest.raises(ServiceUnreachable, match="502: 'Bad Gateway'"):
        client.runs()


def test_a_pull_that_is_answered_by_another_server_is_unexpected(answering: Callable[..., str]) -> None:
    with Client(answering((200, {"Content-Type": "application/json"}, b"{}"))) as client:
        with pytest.raises(UnexpectedResponse, match="freestep-epoch"):
            client.run("run").pull_into(Flat(MANIFEST))


@pytest.mark.parametrize("seconds", ["-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_no_count_of_seconds_is_ignored(answering: Callable[..., str], seconds: str) -> None:
    busy = (503, {"Retry-After": seconds}, BUSY[2])
    with Client(answering(busy, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_what_the_caller_was_about_does_not_end_its_retries(answering: Callable[..., str]) -> None:
    try:
        raise ssl.SSLCertVerificationError("of another server")
    except ssl.SSLCertVerificationError:
        with Client(answering(BUSY, (200, {}, b'{"runs": []}')), retry_for=20) as client:
            assert client.runs() == []


def test_cookies_are_sent_back(answering: Callable[..., str], asked: list[tuple[str, str | None]]) -> None:
    none, lane = {}, {"Set-Cookie": "lane=7"}
    with Client(answering(*[(200, lines, b'{"runs": []}') for lines in (none, lane, none)])) as client:
        for _ in range(3):
            client.runs()
    assert [cookie for _, cookie in asked] == [None, None, "lane=7"]


def test_parameters_of_a_client_of_ones_own_are_sent_too(
    answering: Callable[..., str], asked: list[tuple[str, str | None]]
) -> None:
    with Client(http=httpx.Client(base_url=answering((200, {}, b"")), params={"lane": "7"})) as client:
        with pytest.raises(UnexpectedResponse):
            client.run("run").pull_into(Flat(MANIFEST))
    assert asked == [("/v1/runs/run/parameters?lane=7&point=x&dtype=F32&min_step=0", None)]


def test_a_name_is_not_a_path(run: Run, client: Client) -> None:
    for name in (f"{run.name}?force=1", f"{run.name}#top", f"{run.name}/"):
        with pytest.raises((MalformedRequest, UnexpectedResponse)):
            client.run(name).delete()
    assert run.status().initialized


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_points_are_pulled_in_a_dtype(run: Run, dtype: str) -> None:
    for point in ("x", "y", "z"):
        tensors, step = run.pull(point, dtype=dtype)  # type: ignore[arg-type]
        assert step == 0
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == DTYPES[dtype]
            assert torch.equal(tensors[name].float(), tensor)


@pytest.mark.parametrize("count", [0, 47_000, 300_000])
def test_a_header_may_be_longer_than_what_is_sent_in_one_piece(client: Client, count: int) -> None:
    run = client.run(f"run-{uuid.uuid4().hex[:8]}")
    scalars = [{"name": f"{number:0200}", "shape": []} for number in range(3000)]
    run.create({"optimizer": {"algorithm": "sgd"}, "parameters": [*scalars, {"name": "w", "shape": [count]}]})
    weights = Flat(run.manifest)
    torch.arange(weights.vector.numel(), out=weights.vector)
    run.initialize(weights)
    pulled = Flat(run.manifest)
    run.pull_into(pulled, "x")
    assert torch.equal(pulled.vector, weights.vector)
    run.delete()


def test_a_lease_is_renewed_while_it_is_held(run: Run, service: ThreadService) -> None:
    # On a busy machine a lease may be renewed a second late.
    with run.lease("me", ttl_ms=3000) as lease, service.redis() as client:
        leases = f"freestep:{{{run.name}}}:leases"
        granted = client.zscore(leases, "me")
        # Until the lease has outlived its first term.
        wait_until(lambda: client.zscore(leases, "me") > granted + 3000)
        assert [worker.lease for worker in run.workers(lease.granted.lease)] == [lease.granted.lease]
        assert lease.lost is None


def test_a_client_that_is_closed_releases_its_own_leases(run: Run, service: ThreadService) -> None:
    with run.lease("another"), Client(service.url) as closed:
        for name in ("one", "two"):
            closed.run(run.name).lease(name, ttl_ms=3_600_000)
        assert [worker.worker for worker in run.workers()] == ["another", "one", "two"]
        closed.close()
        assert [worker.worker for worker in run.workers()] == ["another"]


def test_a_lost_lease_says_why(run: Run) -> None:
    first = run.lease("me", ttl_ms=3000)
    second = run.lease("me", ttl_ms=3000)
    wait_until(lambda: first.lost is not None)
    assert isinstance(first.lost, LeaseExpired)
    run.restore(0)
    wait_until(lambda: second.lost is not None)
    assert isinstance(second.lost, EpochChanged)
    first.release()
    second.release()


def test_a_claim_is_one_push() -> None:
    one, two = Claim("lease", 7, 3), Claim("lease", 7, 3)
    assert one.key != two.key
    assert one.headers() == {
        "Freestep-Lease": "lease",
        "Freestep-Token": "7",
        "Freestep-Step": "3",
        "Idempotency-Key": one.key,
    }
    assert Claim("lease", 7, 3, samples=32, loss=0.25).headers()["Freestep-Samples"] == "32.0"


def test_the_environment_names_the_service(service: ThreadService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESTEP_URL", service.url)
    with Client() as client:
        client.runs()


def test_a_client_of_ones_own_is_used(service: ThreadService) -> None:
    seen: list[str] = []
    hooks = {"request": [lambda request: seen.append(request.url.path)]}
    with Client(http=httpx.Client(base_url=service.url, event_hooks=hooks)) as client:
        client.runs()
    assert seen == ["/v1/runs"]
