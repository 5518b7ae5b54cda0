"""LocalSteps whose pushes travel while the next round is under way."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freestep import Client, Flat, LocalSteps, Run, RunNotFound
from harness import ThreadService
from meanwhile import at_once
from trained import ADAMW, WHOLE, Counting, held, hold, network, step


def test_progress_made_while_a_push_travels_is_kept(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, every=3, overlap=True, algorithm="diloco", lr=0.5, momentum=0.0)
    model.step(optimizer, 3)
    assert (model.counted, optimizer.receipt, optimizer.steps) == (3, None, 0)
    model.step(optimizer, 2)
    assert model.counted == 5
    optimizer.flush()
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.staleness) == ("applied", 0)
    # y is half of the 3, and the 2 are kept.
    assert (model.counted, optimizer.steps) == (3.5, 2)
    model.step(optimizer, 1)
    optimizer.flush()
    assert optimizer.receipt.staleness == 1
    assert model.counted == 3.0
    assert run.status().step == 2


def by_hand(url: str, spec: Any, model: nn.Module, rounds: int, every: int) -> Tensor:
    """The loop of rounds whose answers are received a round late."""
    inner = torch.optim.AdamW(model.parameters(), **ADAMW)
    with Client(url) as client:
        run = client.run(f"by-hand-{uuid.uuid4().hex[:8]}")
        run.create(spec.model_dump(mode="json"))
        run.initialize(dict(model.named_parameters()))
        start, arrived, taken_at = held(model), None, 0
        gradient, arriving = Flat(run.manifest), Flat(run.manifest)
        with run.lease() as lease:
            for number in range(rounds):
                for local in range(every):
                    step(model, inner, number * every + local)
                if arrived is not None:
                    progress = held(model) - start
                    hold(model, arrived + progress)
                    start = held(model) - progress
                gradient.vector.copy_(start - held(model))
                start = held(model)
                _, newest = run.exchange(gradient, lease.claim(taken_at), arriving)
                arrived, taken_at = arriving.vector.clone(), max(newest.step - 1, 0)
    assert arrived is not None
    return arrived


@pytest.mark.parametrize("shards", [1, 3])
def test_it_is_the_loop_with_one_round_of_delay(
    service: ThreadService, locally: Callable[..., LocalSteps], shards: int
) -> None:
    model = network()
    optimizer = locally(model, overlap=True, shards=shards)
    for number in range(30):
        step(model, optimizer, number)
    optimizer.flush()
    assert torch.equal(held(model), by_hand(service.url, optimizer.spec, network(), 6, 5))


@pytest.mark.parametrize(
    ("algorithm", "overlap", "policy", "max_staleness"),
    [
        ("diloco", False, "sync", None),
        ("gpa_sgd", True, "sync", 1),
        ("sgd_schedule_free", False, "ringmaster", None),
    ],
)
def test_momentum_waits_for_all_workers_by_default(
    locally: Callable[..., LocalSteps], algorithm: str, overlap: bool, policy: str, max_staleness: int | None
) -> None:
    made = locally(network(), algorithm=algorithm, overlap=overlap, aggregation=None).spec.aggregation
    assert (made.policy, made.max_staleness) == (policy, max_staleness)


def test_who_names_no_policy_takes_the_runs(
    locally: Callable[..., LocalSteps], caplog: pytest.LogCaptureFixture
) -> None:
    locally(network(), aggregation={"policy": "async", "max_staleness": 7})
    with caplog.at_level(logging.WARNING, "freestep"):
        assert locally(network(1), aggregation=None).spec.aggregation.max_staleness == 7
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "freestep"):
        locally(network(2), aggregation="sync")
    assert ["aggregation is" in each.getMessage() for each in caplog.records] == [True]


def test_overlap_needs_a_policy_that_takes_late_gradients(locally: Callable[..., LocalSteps], run: Run) -> None:
    with pytest.raises(ValueError, match="max_staleness"):
        locally(network(), aggregation="sync", overlap=True)
    with pytest.raises(RunNotFound):
        run.status()
    locally(network(), aggregation="sync").close()
    with pytest.raises(ValueError, match="max_staleness"):
        locally(network(), aggregation="sync", overlap=True)
    assert run.workers() == []


def test_sync_workers_may_overlap_where_one_step_of_staleness_is_allowed(
    locally: Callable[..., LocalSteps],
) -> None:
    models = [Counting(), Counting()]
    optimizers = [
        locally(
            model,
            model.sgd,
            every=2,
            overlap=True,
            aggregation={"policy": "sync", "max_staleness": 1},
            worker=f"w{number}",
            **WHOLE,
        )
        for number, model in enumerate(models)
    ]

    def work(worker: int) -> None:
        models[worker].step(optimizers[worker], 8, value=1.0 + worker)
        optimizers[worker].flush()

    at_once(*(partial(work, worker) for worker in range(2)))
    assert [model.counted for model in models] == [12.0, 12.0]
