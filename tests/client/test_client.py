"""Client and Run against a real service."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from freestep import (
    AlreadyInitialized,
    CheckpointNotFound,
    Claim,
    Client,
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
    StepNotReached,
    UnexpectedResponse,
)
from freestep.api.models import Metric, MetricReceipt
from freestep.flat import DTYPES
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import SGD, TENSORS
from proxies import Cutter

SPEC: dict[str, Any] = {
    "optimizer": SGD,
    "aggregation": {"policy": "async"},
    "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()],
}


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
        first, step = run.pull("x", checkpoint=0)
        assert (first.epoch, first.step, step) == (1, 0, 0)
        assert all(torch.equal(first[name], tensor) for name, tensor in TENSORS.items())
        assert run.status().step == 1
        with pytest.raises(CheckpointNotFound):
            run.pull("x", checkpoint=7)
        with pytest.raises(MalformedRequest, match="min_step"):
            run.pull("x", checkpoint=0, min_step=1)
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


def test_a_name_is_not_a_path(run: Run, client: Client) -> None:
    for name in (f"{run.name}?force=1", f"{run.name}#top", f"{run.name}/"):
        with pytest.raises((MalformedRequest, UnexpectedResponse)):
            client.run(name).delete()
    assert run.status().initialized


@pytest.mark.parametrize("name", ["", "vision/mnist"])
def test_a_name_that_is_no_segment_of_a_path_is_refused(client: Client, name: str) -> None:
    with pytest.raises(MalformedRequest, match=f"'{name}' is no name of a run"):
        client.run(name)


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
