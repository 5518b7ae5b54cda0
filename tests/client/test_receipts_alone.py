"""Pushes that a service without memory for y answers with the receipt alone: y is then pulled, at one step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from every_encoder import MAKERS
from fake_service import FakeService
from freestep import (
    Client,
    CoordinatorUnavailable,
    Flat,
    LocalSteps,
    RemoteOptimizer,
    Run,
    StepNotReached,
    UnexpectedResponse,
)
from freestep.worker_group import Batch, WorkerGroup
from meanwhile import at_once

SIZES: dict[str, tuple[int, ...]] = {"w": (9, 7), "b": (11,), "s": (), "v": (300,)}
SPEC: dict[str, Any] = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": name, "shape": list(size)} for name, size in SIZES.items()],
}


def assert_at(flat: Flat, step: int) -> None:
    """Every element is of this step, within the rounding of int8."""
    torch.testing.assert_close(flat.vector.float(), torch.full([flat.manifest.numel], float(step)), rtol=0.01, atol=0)


def exchanging(client: Client, service: FakeService) -> tuple[Run, Flat]:
    """A run whose shards the client knows, and a gradient."""
    run = client.run("run")
    run.status()
    gradient = Flat(service.manifest)
    gradient.vector.fill_(1.0)
    return run, gradient


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "I8"])
@pytest.mark.parametrize("shards", [1, 3])
def test_y_is_pulled_as_a_whole(shards: int, dtype: str, overlap: bool) -> None:
    for lacking in product([False, True], repeat=shards):
        service = FakeService(SPEC, shards)
        service.without_y = lambda push, lacking=lacking: lacking[push.shard]
        with service.client() as client:
            run, gradient = exchanging(client, service)
            into = Flat(service.manifest, dtype)
            with run.lease("me") as lease:
                if overlap:
                    exchange = run.begin_exchange(gradient, lease.claim(0), into)
                    receipt, pulled = exchange.result()
                else:
                    receipt, pulled = run.exchange(gradient, lease.claim(0), into)
        assert (receipt.decision, receipt.step, receipt.replayed) == ("applied", 1, False)
        # If the pull was needed, another push has been applied before it.
        assert (pulled.epoch, pulled.step) == (1, 1 + any(lacking))
        assert_at(into, pulled.step)
        assert service.counted == 1
        reads = service.reads()
        assert len(reads) == shards * any(lacking)
        assert all((each["point"], each["dtype"], each["min_step"]) == ("y", dtype, "1") for each in reads)
        assert len({each.get("cut") for each in reads}) <= 1


def test_the_pull_waits_for_the_step() -> None:
    service = FakeService(SPEC, 3)
    service.without_y = lambda push: True
    with service.client() as client:
        run, gradient = exchanging(client, service)
        with run.lease("me") as lease:
            run.exchange(gradient, lease.claim(0), Flat(service.manifest), wait=5)
    pushes = [each for each in service.asked if each.method == "POST" and "shard" in each.url.params]
    assert [each.headers["prefer"] for each in pushes] == ["return=representation, wait=5"] * 3
    pulls = [each for each in service.asked if "point" in each.url.params]
    assert [each.headers["prefer"] for each in pulls] == ["wait=30"] * 3
    assert {each.extensions["timeout"]["read"] for each in pulls} == {35.0}


def test_a_run_of_unknown_shards_is_pulled_through_the_service() -> None:
    service = FakeService(SPEC, 3)
    service.without_y = lambda push: True
    with service.client() as client:
        run, into = client.run("run"), Flat(service.manifest)
        with run.lease("me") as lease:
            receipt, pulled = run.exchange(Flat(service.manifest), lease.claim(0), into)
    assert (receipt.step, pulled.step) == (1, 2)
    assert_at(into, 2)
    assert [each.url.host for each in service.asked if "dtype" in each.url.params] == ["fake.test"] * 2


@pytest.mark.parametrize("name", MAKERS)
def test_an_encoder_hears_that_its_push_counted(name: str) -> None:
    service = FakeService(SPEC, 3)
    service.without_y = lambda push: push.shard == 1
    with service.client() as client:
        run, into = client.run("run"), Flat(service.manifest)
        run.status()
        encoder = MAKERS[name](Flat(service.manifest))
        generator = torch.Generator().manual_seed(0)
        encoder.gradient.vector.copy_(torch.randn(service.manifest.numel, generator=generator))
        encoder.begin()
        outcomes: list[bool] = []
        encoder.settle = outcomes.append  # type: ignore[method-assign]
        with run.lease("me") as lease:
            run.exchange(encoder, lease.claim(0), into)
    assert_at(into, 2)
    assert outcomes == [True]


@pytest.mark.parametrize(
    "document",
    [{}, [], {"decision": "applied"}, {"decision": "eaten", "step": 1, "staleness": 0}, "applied"],
    ids=str,
)
def test_json_that_is_no_receipt_is_unexpected(document: Any) -> None:
    service = FakeService(SPEC)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.path.endswith("gradients"):
            return httpx.Response(200, json=document)
        return service._handle(request)

    with Client(http=httpx.Client(base_url="http://fake.test", transport=httpx.MockTransport(handle))) as client:
        run, gradient = exchanging(client, service)
        with run.lease("me") as lease, pytest.raises(UnexpectedResponse, match="not freestep's"):
            run.exchange(gradient, lease.claim(0), Flat(service.manifest))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Freestep-Decision", "eaten"),
        ("Freestep-Receipt-Step", "one"),
        ("Freestep-Staleness", ""),
        ("Freestep-Step", "1.5"),
        ("Freestep-Epoch", "last"),
        ("Freestep-Scheduled-Lr", "0.1,"),
    ],
)
def test_headers_that_are_no_receipt_are_unexpected(name: str, value: str) -> None:
    service = FakeService(SPEC)

    def handle(request: httpx.Request) -> httpx.Response:
        response = service._handle(request)
        if name in response.headers:
            response.headers[name] = value
        return response

    with Client(http=httpx.Client(base_url="http://fake.test", transport=httpx.MockTransport(handle))) as client:
        run, gradient = exchanging(client, service)
        with run.lease("me") as lease, pytest.raises(UnexpectedResponse, match="not freestep's"):
            run.exchange(gradient, lease.claim(0), Flat(service.manifest))


# Pushes that cannot be started


@pytest.mark.parametrize("in_rounds", [False, True])
def test_a_push_is_in_flight_while_nobody_says_where_the_shards_are(
    monkeypatch: pytest.MonkeyPatch, in_rounds: bool
) -> None:
    service = FakeService({**SPEC, "parameters": [{"name": "w", "shape": [40]}]}, 2)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(40))

    def away(request: httpx.Request) -> httpx.Response:
        raise CoordinatorUnavailable("Redis is loading")

    def step() -> None:
        model.w.grad = torch.ones(40)
        optimizer.step(**{} if in_rounds else {"overlap": True})

    with service.client() as client:
        given: dict[str, Any] = {"client": client, "run": "run", "algorithm": "sgd", "aggregation": "async"}
        optimizer = (
            LocalSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), every=1, **given)
            if in_rounds
            else RemoteOptimizer(model, **given)
        )
        with optimizer, monkeypatch.context() as patched:
            optimizer._run._shards._outdated = True
            patched.setattr(service, "_get_topology", away)
            with pytest.raises(CoordinatorUnavailable):
                step()
            assert (service.counted, optimizer.receipt) == (0, None)
            patched.undo()
            optimizer.flush()
            assert service.counted == 1
            assert optimizer.receipt is not None and optimizer.receipt.decision == "applied"


# Steps that are late


def test_a_step_that_is_not_reached_is_raised_and_the_claim_stays_good() -> None:
    service = FakeService(SPEC, 2)
    service.without_y = lambda push: push.attempt == 1
    service.unreached = [lambda: None] * 2
    with service.client() as client:
        run, gradient = exchanging(client, service)
        into = Flat(service.manifest)
        with run.lease("me") as lease:
            claim = lease.claim(0)
            with pytest.raises(StepNotReached):
                run.exchange(gradient, claim, into)
            receipt, pulled = run.exchange(gradient, claim, into)
    assert (receipt.step, receipt.replayed, pulled.step, service.counted) == (1, True, 1, 1)
    assert_at(into, 1)


# Optimizers


class Model(nn.Module):
    """Parameters that are the step of the y that they were loaded from."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def fill_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)

    @property
    def step(self) -> float:
        held = nn.utils.parameters_to_vector(self.parameters())
        assert (held == held[0]).all()
        return float(held[0].item())


def lacking(shards: Sequence[int]) -> Callable[[Any], bool]:
    return lambda push: push.shard in shards


@pytest.mark.parametrize("without_y", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"push_encoding": "int8"}, {"pull_dtype": "BF16"}], ids=str)
def test_an_optimizer_goes_on_as_usual(without_y: Sequence[int], overlap: bool, options: dict[str, Any]) -> None:
    service, model = FakeService(SPEC, 3), Model()
    service.without_y = lacking(without_y)
    with service.client() as client, RemoteOptimizer(model, client=client, run="run", worker="me", **options) as opt:
        for _ in range(4):
            model.fill_gradients()
            opt.step(overlap=overlap)
        opt.flush()
        assert opt.receipt is not None
        assert (opt.receipt.decision, service.counted) == ("applied", 4)
        assert opt.loaded.step == model.step == service.step


@pytest.mark.parametrize("overlap", [False, True])
def test_local_steps_go_on_as_usual(overlap: bool) -> None:
    service, model = FakeService(SPEC, 2), Model()
    service.without_y = lacking([1])
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    options: dict[str, Any] = {"every": 2, "run": "run", "worker": "me", "overlap": overlap, "algorithm": "sgd"}
    with service.client() as client, LocalSteps(model, inner, client=client, **options) as opt:
        for _ in range(4):
            model.fill_gradients()
            opt.step()
        opt.flush()
        assert opt.receipt is not None
        assert (opt.receipt.decision, service.counted, opt.steps) == ("applied", 2, 0)
        assert opt.loaded.step == model.step == service.step


@pytest.mark.parametrize("overlap", [False, True])
def test_an_optimizer_asks_for_a_late_step_again(overlap: bool) -> None:
    service, model = FakeService(SPEC, 2), Model()
    service.without_y = lacking([0])
    service.unreached = [lambda: None] * 3
    with service.client() as client, RemoteOptimizer(model, client=client, run="run", worker="me") as opt:
        model.fill_gradients()
        opt.step(overlap=overlap)
        opt.flush()
        assert opt.receipt is not None
        assert (opt.receipt.decision, opt.receipt.replayed, service.counted) == ("applied", True, 1)
        assert opt.loaded.step == model.step == service.step


@pytest.mark.parametrize("overlap", [False, True])
def test_an_optimizer_joins_again_if_the_run_was_restored_before_its_step(overlap: bool) -> None:
    service, model = FakeService(SPEC, 2), Model()
    service.without_y = lacking([0])
    with service.client() as client, RemoteOptimizer(model, client=client, run="run", worker="me") as opt:
        model.fill_gradients()
        opt.step()
        service.unreached = [service.restore, lambda: None]
        model.fill_gradients()
        opt.step(overlap=overlap)
        opt.flush()
        assert opt.receipt is not None
        assert (opt.receipt.decision, opt.receipt.reason) == ("dropped", "epoch-changed")
        assert (opt.loaded.epoch, opt.loaded.step) == (2, model.step)


# Workers of several processes


class ThreadRanks(WorkerGroup):
    """Ranks that are threads; each has one of these, and all have one `shared`."""

    def __init__(self, rank: int, size: int, shared: Shared) -> None:
        self.rank = rank
        self.size = size
        self._shared = shared

    def run_on_first(self, function: Callable[[], Any]) -> Any:
        return self._shared.gather(self.rank, function if self.rank == 0 else lambda: None)[0]

    def run_on_all(self, function: Callable[[], Any]) -> list[Any]:
        return self._shared.gather(self.rank, function)

    def average(self, gradient: Flat, batches: Sequence[Batch]) -> Batch:
        return batches[0]

    def requests_shard(self, shard: int) -> bool:
        return shard % self.size == self.rank

    def broadcast_shards(self, into: Flat, shards: int) -> None:
        parts = [bytes(part.bytes) for part in into.parts(shards)]
        received = self._shared.gather(self.rank, lambda: parts)
        for shard, part in enumerate(into.parts(shards)):
            part.bytes[:] = received[shard % self.size][shard]


class Shared:
    """What the ranks of a group give each other."""

    def __init__(self, size: int) -> None:
        self._results: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def gather(self, rank: int, function: Callable[[], Any]) -> list[Any]:
        self._results[rank] = function()
        self._barrier.wait()
        results = self._results.copy()
        self._barrier.wait()
        return results


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("without_y", [(), (0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_every_rank_gets_the_same_step(without_y: Sequence[int], overlap: bool) -> None:
    service, shared = FakeService(SPEC, 4), Shared(2)
    service.without_y = lacking(without_y)

    def rank(number: int) -> tuple[Any, Any, torch.Tensor]:
        group = ThreadRanks(number, 2, shared)
        with service.client() as client:
            run, into = client.run("run", ranks=group), Flat(service.manifest)
            group.run_on_all(run.status)
            gradient = Flat(service.manifest)
            claim = group.run_on_first(lambda: run.lease("me").claim(0))
            if overlap:
                receipt, pulled = run.begin_exchange(gradient, claim, into).result()
            else:
                receipt, pulled = run.exchange(gradient, claim, into)
            assert_at(into, pulled.step)
            return receipt, pulled, into.vector

    (first, second) = at_once(lambda: rank(0), lambda: rank(1))
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])
    assert (service.counted, first[1].step) == (1, 1 + bool(without_y))
