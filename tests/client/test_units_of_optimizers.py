"""Units with every kind of optimizer, policy and run: each example counts once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import freestep
from counting import LENGTH, Counts, Make, Numbers, counted, train
from freestep import Client, LocalSteps, RemoteOptimizer, Run, Units
from harness import ProcessService, ThreadService
from meanwhile import under_way

OVERFLOWING = 2.0**120
"""A scale whose first three halves overflow in `backward_scaled`, too."""


def backward_scaled(model: Counts, examples: Any, scaler: torch.amp.GradScaler) -> None:
    """As `Counts.backward`, with a scaler; the gradient overflows on its way where the scale is above 2^117."""
    scaler.scale((-model.count[torch.as_tensor(list(examples))] / 2.0**10).sum() * 2.0**10).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_steps_that_a_scaler_skips_give_their_units_back(remotely: Make, run: Run, together: int, workers: int) -> None:
    model = Counts()
    optimizer, scaler = remotely(model), torch.amp.GradScaler("cpu", init_scale=OVERFLOWING)
    units = Units(optimizer, LENGTH, unit=5)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    while not units.exhausted:
        taken = 0
        for examples in units.loader(Numbers(), batch_size=5, num_workers=workers):
            taken += 1
            backward_scaled(model, examples, scaler)
            if taken % together == 0:
                step()
        if taken % together:
            step()
    assert scaler.get_scale() == 2.0**117
    assert counted(run) == {1.0} and run.status().step == -(-10 // together)


def test_rounds_with_steps_that_a_scaler_skips_push_the_others_units(
    locally: Callable[..., LocalSteps], run: Run
) -> None:
    model = Counts()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = locally(model, inner, every=4, lr=1.0, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWING)
    units = Units(optimizer, LENGTH, unit=5)
    while not units.exhausted:
        for examples in units:
            optimizer.zero_grad()
            backward_scaled(model, examples, scaler)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        optimizer.push()
    assert scaler.get_scale() == 2.0**117 and counted(run) == {1.0}


def pushed(model: Counts, optimizer: RemoteOptimizer, units: Units, how: Callable[[], Any]) -> list[int]:
    """The examples of the pushes that have counted."""
    found: list[int] = []
    for examples in units.loader(Numbers(), batch_size=units.spec.unit):
        optimizer.zero_grad()
        model.backward(examples)
        how()
        assert optimizer.receipt is not None
        if optimizer.receipt.decision in ("applied", "accumulated"):
            found += examples.tolist()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (freestep.SGDScheduleFree, {}),
        (freestep.AdamWScheduleFree, {}),
        (freestep.RAdamScheduleFree, {}),
        (freestep.AdamCScheduleFreePlus, {"loss": 1.0}),
    ],
)
def test_drop_in_classes_push_their_units(
    service: ThreadService, name: str, run: Run, kind: Any, options: dict[str, Any]
) -> None:
    model = Counts()
    with kind(model, url=service.url, run=name) as optimizer:
        units = Units(optimizer, LENGTH, unit=5)
        found = pushed(model, optimizer, units, lambda: optimizer.step(**options))
        assert units.exhausted and sorted(found) == list(range(LENGTH))


@pytest.mark.parametrize(
    "kind",
    [freestep.SGDScheduleFreeClosure, freestep.AdamWScheduleFreeClosure, freestep.RAdamScheduleFreeClosure],
)
def test_closure_forms_push_their_units(service: ThreadService, name: str, run: Run, kind: Any) -> None:
    model = Counts()
    with kind(model, url=service.url, run=name) as optimizer:
        units = Units(optimizer, LENGTH, unit=5)
        for examples in units:

            def closure(examples: range = examples) -> torch.Tensor:
                optimizer.zero_grad()
                loss = -model.count[torch.as_tensor(list(examples))].sum()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)
            assert units.status().done == run.status().step
        assert units.exhausted and run.status().step == 10


def test_a_wrapped_optimizer_pushes_its_units(service: ThreadService, name: str, run: Run) -> None:
    model = Counts()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with freestep.ScheduleFreeWrapper(base, url=service.url, run=name) as optimizer:
        optimizer.train()
        units = Units(optimizer, LENGTH, unit=5)
        assert sorted(pushed(model, optimizer, units, optimizer.step)) == list(range(LENGTH))
        assert units.exhausted


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("encoding", ["dense", "topk"])
def test_runs_of_several_shards_count_units(remotely: Make, run: Run, overlap: bool, encoding: str) -> None:
    model = Counts()
    optimizer = remotely(model, shards=3, push_encoding=encoding, topk_fraction=1.0)
    units = Units(optimizer, LENGTH, unit=4, passes=2)
    train(model, optimizer, units.loader(Numbers(), batch_size=4, num_workers=1), overlap=overlap)
    assert units.exhausted and counted(run) == {2.0} and run.status().shards == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_that_is_resharded_counts_each_unit_once(remotely: Make, run: Run, overlap: bool) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=2)
    shards = {4: 3, 9: 2, 15: 1}
    for number, examples in enumerate(units.loader(Numbers(), batch_size=2, num_workers=1)):
        optimizer.zero_grad()
        model.backward(examples)
        if number in shards:
            run.reshard(shards[number])
        optimizer.step(overlap=overlap)
    optimizer.flush()
    assert units.exhausted and counted(run) == {1.0} and run.status().shards == 1


@pytest.mark.parametrize(
    ("workers", "policy"),
    [
        (2, {"policy": "quorum", "batch": 2}),
        (3, {"policy": "quorum", "batch": 3, "robust": "coordinate_median"}),
        (3, {"policy": "sync", "robust": "trimmed_mean", "beta": 0.2, "max_batch": 3}),
        (5, {"policy": "quorum", "batch": 5, "robust": "krum", "f": 1}),
        (2, {"policy": "buffered", "batch": 3}),
        (2, {"policy": "ssp", "slack": 2}),
        (2, {"policy": "ringmaster", "max_staleness": 0}),
        (2, {"policy": "async", "robust": "clip"}),
    ],
    ids=lambda value: f"{value['policy']} {value.get('robust', '')}" if isinstance(value, dict) else str(value),
)
def test_policies_take_each_unit_once(remotely: Make, run: Run, workers: int, policy: dict[str, Any]) -> None:
    models = [Counts() for _ in range(workers)]
    optimizers = [remotely(model, aggregation=policy, worker=f"worker-{n}") for n, model in enumerate(models)]
    # Thirty units: of each update, one for each worker.
    length, together = 30, threading.Barrier(workers)

    def work(model: Counts, optimizer: RemoteOptimizer) -> list[int]:
        found: list[int] = []
        units = Units(optimizer, length, unit=1)
        together.wait()
        for examples in units:
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
            assert optimizer.receipt is not None
            if optimizer.receipt.decision != "dropped":
                found += examples
        optimizer.close()
        return found

    calls = [under_way(lambda pair=pair: work(*pair)) for pair in zip(models, optimizers, strict=True)]  # type: ignore[misc]
    assert sorted(example for call in calls for example in call.result()) == list(range(length))
    assert run.data().status().exhausted


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_journaled_run_that_is_killed_counts_each_unit_once(
    start_process: Callable[..., ProcessService], overlap: bool, shards: int
) -> None:
    service = start_process()
    model = Counts()
    with RemoteOptimizer(
        model, url=service.url, run="journaled", algorithm="sgd", lr=1.0, durability="journal", shards=shards
    ) as optimizer:
        units = Units(optimizer, LENGTH, unit=2)
        for number, examples in enumerate(units):
            optimizer.zero_grad()
            model.backward(examples)
            if number in (4, 11):
                service.kill()
                service.start()
            optimizer.step(overlap=overlap)
            if number == 17:
                # With overlap, while a push is under way.
                service.kill()
                service.start()
        optimizer.flush()
        assert units.exhausted
    with Client(service.url) as client:
        run = client.run("journaled")
        assert counted(run) == {1.0} and run.data().status().done == 25
        assert run.status().epoch == 1 and run.status().step == 25
    service.kill()
    service.start()
    with Client(service.url) as client:
        assert client.run("journaled").data().status().exhausted
