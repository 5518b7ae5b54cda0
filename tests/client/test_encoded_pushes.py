"""Encoded pushes to a run: it gets what the residual lacks, whatever becomes of a push."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from every_encoder import MAKERS, MANIFEST, SHAPES, filled, said
from freestep import Client, Flat, IdempotencyConflict, NonFiniteGradient, Run, ServiceUnreachable
from harness import ThreadService
from plain_calls import SGD
from proxies import Cutter


@pytest.fixture
def client(service: ThreadService) -> Iterator[Client]:
    with Client(service.url, retry_for=10) as made:
        yield made


@pytest.fixture(params=[1, 3])
def run(client: Client, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A run of one shard, or several, whose parameters are 0 and which takes every gradient off them."""
    made = client.run(f"run-{uuid.uuid4().hex[:8]}")
    parameters = [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()]
    spec = {"optimizer": SGD, "aggregation": {"policy": "ringmaster", "max_staleness": 2}, "parameters": parameters}
    made.create({**spec, "shards": request.param})
    made.initialize({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    yield made
    made.delete()


def at_y(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    run.pull_into(flat, "y")
    return flat.vector


@pytest.mark.parametrize("name", MAKERS)
def test_the_run_gets_what_the_residual_lacks(run: Run, name: str) -> None:
    encoder, arriving, total = MAKERS[name](Flat(MANIFEST)), Flat(MANIFEST), torch.zeros(MANIFEST.numel)
    with run.lease() as lease:
        for seed in range(6):
            encoder.gradient.vector.copy_(filled(seed).vector)
            encoder.begin()
            total += encoder.gradient.vector
            claim = lease.claim(seed)
            if seed % 2:
                receipt = run.push(encoder, claim)
                assert run.push(encoder, claim).replayed
            else:
                receipt, _ = run.exchange(encoder, claim, arriving)
            assert (receipt.decision, receipt.step) == ("applied", seed + 1)
            torch.testing.assert_close(encoder.residual - at_y(run), total, rtol=0, atol=1e-5)
        # A key is of one body.
        encoder.gradient.vector.add_(1.0)
        encoder.begin()
        with pytest.raises(IdempotencyConflict):
            run.push(encoder, claim)


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_a_dropped_or_refused_push_takes_nothing_but_its_gradient(run: Run, name: str) -> None:
    encoder, total = MAKERS[name](filled()), filled().vector
    with run.lease() as lease:
        for step in range(4):
            encoder.begin()
            assert run.push(encoder, lease.claim(step)).decision == "applied"
        kept = encoder.residual.clone()
        encoder.gradient.vector.copy_(filled(1).vector)
        encoder.begin()
        assert run.push(encoder, lease.claim(0)).decision == "dropped"
        assert torch.equal(encoder.residual, kept)
        encoder.gradient.vector[5] = float("nan")
        encoder.begin()
        with pytest.raises(NonFiniteGradient):
            run.push(encoder, lease.claim(4))
        assert torch.equal(encoder.residual, kept)
        encoder.gradient.vector.zero_()
        encoder.begin()
        assert run.push(encoder, lease.claim(4)).decision == "applied"
    torch.testing.assert_close(encoder.residual - at_y(run), 4 * total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_a_push_whose_answer_is_cut_counts_once(service: ThreadService, run: Run, name: str) -> None:
    encoder = MAKERS[name](filled())
    encoder.begin()
    with (
        Cutter(service.url, [200, 3000, 200]) as cutter,
        Client(cutter.url, retry_for=10) as through,
        run.lease() as lease,
    ):
        through.run(run.name).push(encoder, lease.claim(0))
    torch.testing.assert_close(encoder.residual - at_y(run), encoder.gradient.vector)


def test_a_push_of_which_nothing_is_heard_is_not_pushed_twice(run: Run) -> None:
    encoder = MAKERS["topk"](filled())
    encoder.begin()
    with run.lease() as lease, Client("http://127.0.0.1:9", retry_for=0) as nowhere:
        with pytest.raises(ServiceUnreachable):
            nowhere.run(run.name).push(encoder, lease.claim(0))
    torch.testing.assert_close(said(encoder) + encoder.residual, encoder.gradient.vector)
