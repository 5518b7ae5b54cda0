"""A worker that joins a run: what it says is compared with the run, and what it does not say is the run's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from freestep import InvalidSpec, LocalSteps, ManifestMismatch, RemoteOptimizer, Run, WorkerNameTaken
from harness import ThreadService
from trained import held, network, step

CREATED = {
    "algorithm": "adamw_schedule_free",
    "lr": 0.25,
    "weight_decay": 0.1,
    "aggregation": {"policy": "buffered", "batch": 2},
    "lease_ttl_ms": 20_000,
}


@pytest.fixture
def join(service: ThreadService, name: str) -> Any:
    """Makes optimizers of one run; they are closed with the test."""
    made: list[RemoteOptimizer] = []

    def optimizer(params: Any, **options: Any) -> RemoteOptimizer:
        made.append(RemoteOptimizer(params, url=service.url, run=name, **options))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


Make = Callable[..., RemoteOptimizer]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "another spec" in each.getMessage()]


def test_a_worker_that_says_nothing_takes_all_from_the_run(join: Make, caplog: pytest.LogCaptureFixture) -> None:
    join(network(), **CREATED)
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer = join(network())
    assert said(caplog) == []
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.25, 0.1, (0.9, 0.999))
    assert optimizer.spec.aggregation.policy == "buffered"


def test_the_algorithm_is_the_runs_too(join: Make, caplog: pytest.LogCaptureFixture) -> None:
    join(network(), algorithm="sgd_schedule_free", lr=0.5, momentum=0.8)
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer = join(network(), momentum=0.8)
        assert said(caplog) == []
        join(network(), momentum=0.7)
    (text,) = said(caplog)
    assert "momentum is 0.8, and 0.7 is wanted" in text
    assert (optimizer.param_groups[0]["momentum"], "betas" in optimizer.param_groups[0]) == (0.8, False)
    with pytest.raises(InvalidSpec, match="'betas' of sgd_schedule_free"):
        join(network(), betas=(0.9, 0.99))


def test_a_worker_that_pushes_gradients_to_a_run_of_local_steps_is_warned(
    service: ThreadService, name: str, join: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"url": service.url, "run": name, "aggregation": "async"}
    with caplog.at_level(logging.WARNING, "freestep"), LocalSteps(model, inner, every=2, **options):
        assert caplog.messages == []
        join(network())
    (text,) = caplog.messages
    assert "is of the algorithm diloco" in text and "use LocalSteps" in text


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ({"lr": 0.25, "weight_decay": 0.1}, []),
        ({"lr": 0.5}, ["lr is 0.25, and 0.5 is wanted"]),
        ({"algorithm": "sgd"}, ["algorithm is adamw_schedule_free, and sgd is wanted"]),
        (
            {"lease_ttl_ms": 1000, "durability": "none", "shards": 3},
            ["lease_ttl_ms is 20000,", "durability is checkpoint,"],
        ),
        (
            {"aggregation": "async"},
            ["aggregation is {'policy': 'buffered', 'batch': 2}, and {'policy': 'async'} is wanted"],
        ),
        ({"aggregation": {"policy": "buffered", "batch": 2}}, []),
    ],
)
def test_what_differs_is_said_field_by_field(
    join: Make, options: dict[str, Any], differences: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    join(network(), **CREATED)
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer = join(network(), **options)
    assert optimizer.param_groups[0]["lr"] == 0.25
    if not differences:
        assert said(caplog) == []
        return
    (text,) = said(caplog)
    assert all(each in text for each in differences)
    assert text.count(" is wanted") == len(differences)


def test_a_run_of_the_default_policy_is_said_to_have_it(join: Make, caplog: pytest.LogCaptureFixture) -> None:
    join(network(), lr=0.25)
    with caplog.at_level(logging.WARNING, "freestep"):
        join(network(), aggregation="async")
    (text,) = said(caplog)
    assert "aggregation is {'policy': 'ringmaster'}, and {'policy': 'async'} is wanted" in text


def groups(net: nn.Sequential, **own: Any) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [each for each in named if "weight" in each[0]], "name": "decay"},
        {"params": [each for each in named if "bias" in each[0]], "name": "no_decay", **own},
    ]


def test_param_groups_show_and_compare_the_runs(join: Make, caplog: pytest.LogCaptureFixture) -> None:
    join(groups(network(), weight_decay=0.0), weight_decay=0.1)
    with caplog.at_level(logging.WARNING, "freestep"):
        same = join(groups(network(), weight_decay=0.0), weight_decay=0.1)
        silent = join(groups(network()))
        alone = join(network())
        assert said(caplog) == []
        other = join(groups(network(), weight_decay=0.5))
    (text,) = said(caplog)
    assert "groups.no_decay.weight_decay is 0.0, and 0.5 is wanted" in text
    for optimizer in (same, silent, other):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["weight_decay"] for group in alone.param_groups] == [0.1]


def test_a_model_whose_parameters_come_in_another_order_is_the_runs(join: Make) -> None:
    first, second = network(0), network(1)
    one = join(first, algorithm="sgd", lr=1.0)
    two = join(list(reversed(list(second.named_parameters()))))
    for tensor in second.parameters():
        tensor.grad = torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor)
    two.step()
    one.train()
    assert torch.equal(held(first), held(second))


def test_a_new_run_that_does_not_fit_changes_nothing(join: Make, run: Run) -> None:
    join(network())
    workers = {each.worker for each in run.workers()}
    with pytest.raises(ManifestMismatch, match=r"missing: 0.weight \[5, 6\]"):
        join(network()[0])
    assert {each.worker for each in run.workers()} == workers


def test_the_one_that_is_fenced_off_is_told(join: Make, run: Run) -> None:
    models = [network(), network()]
    old = join(models[0], worker="same", aggregation="async")
    step(models[0], old, 0)
    new = join(models[1], worker="same")
    for number in range(2):
        with pytest.raises(WorkerNameTaken, match="'same'"):
            step(models[0], old, number)
    step(models[1], new, 1)
    assert run.status().step == 2
    new.close()
    # The name is free again.
    step(models[0], old, 2)
    assert (run.status().step, [each.worker for each in run.workers()]) == (3, ["same"])


def test_two_that_restored_one_state_have_names_of_their_own(join: Make, run: Run) -> None:
    saved = join(network(), worker="saved")
    state = saved.state_dict()
    saved.close()
    models = [network(), network()]
    first, second = (join(model) for model in models)
    for optimizer in (first, second):
        optimizer.load_state_dict(state)
    assert first.worker == "saved"
    assert second.worker != "saved"
    for number in range(3):
        for model, optimizer in zip(models, (first, second), strict=True):
            step(model, optimizer, number)
    assert run.status().step == 6


def test_workers_that_start_at_the_same_moment_make_one_run(join: Make, run: Run) -> None:
    models = [network(seed) for seed in range(6)]
    ready = threading.Barrier(len(models))

    def work(model: nn.Module) -> None:
        ready.wait()
        join(model)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.workers()) == len(models)
    assert all(torch.equal(held(models[0]), held(model)) for model in models)


def test_groups_show_the_rate_that_was_used(join: Make) -> None:
    first, second = network(), network()
    optimizer = join(groups(first, lr=0.5), lr=0.25, warmup_steps=4, delay_correction={"name": "none"})
    other = join(list(reversed(groups(second))))
    assert [group["scheduled_lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    for number in range(3):
        step(first, optimizer, number)
    assert [group["scheduled_lr"] for group in optimizer.param_groups] == [0.25 * 3 / 4, 0.5 * 3 / 4]
    other.eval()
    assert [group["scheduled_lr"] for group in other.param_groups] == [0.5 * 3 / 4, 0.25 * 3 / 4]
