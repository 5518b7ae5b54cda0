"""Units: weights count which examples moved them, and how often."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from counting import LENGTH, Counts, Make, Numbers, Stream, counted, train
from freestep import Closed, DataExists, FreestepError, RemoteOptimizer, Run, Units
from meanwhile import under_way, wait_until


@pytest.mark.parametrize("overlap", [False, True])
def test_every_example_counts_once_a_pass(remotely: Make, run: Run, overlap: bool) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=4, passes=3)
    train(model, optimizer, units, overlap=overlap)
    assert units.exhausted and counted(run) == {3.0}
    assert run.status().step == 39 and units.status().examples_done == 150
    assert list(units) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "unit", "steps"), [(4, 4, 26), (8, 4, 14), (3, 8, 38)])
def test_batches_of_a_loader_carry_their_units(
    remotely: Make, run: Run, workers: int, batch_size: int, unit: int, steps: int
) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=unit, passes=2)
    train(model, optimizer, units.loader(Numbers(), batch_size=batch_size, num_workers=workers))
    assert units.exhausted and counted(run) == {2.0}
    # Batches of several units may be shorter where units have not arrived yet.
    assert run.status().step == steps if batch_size <= unit else run.status().step >= steps - 1


def test_workers_share_units(remotely: Make, run: Run) -> None:
    models = [Counts(), Counts()]
    optimizers = [remotely(model, worker=f"worker-{number}") for number, model in enumerate(models)]
    calls = []
    for model, optimizer in zip(models, optimizers, strict=True):
        units = Units(optimizer, LENGTH, unit=2, passes=4)
        calls.append(under_way(lambda model=model, optimizer=optimizer, units=units: train(model, optimizer, units)))  # type: ignore[misc]
    for call in calls:
        call.result()
    assert counted(run) == {4.0} and run.data().status().exhausted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_is_left_gives_back_what_it_has_not_begun(remotely: Make, run: Run, workers: int) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=2)
    loader = units.loader(Numbers(), batch_size=2, num_workers=workers)
    for taken, examples in enumerate(loader):
        if taken == 5:
            break
        optimizer.zero_grad()
        model.backward(examples)
        optimizer.step()
    # The batch that was delivered last has no step yet.
    assert units.status().out == 1 and units.status().done == 5
    train(model, optimizer, loader)
    assert counted(run) == {1.0} and units.exhausted


def test_a_loop_that_begins_before_one_is_over_takes_its_place(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    loader = Units(optimizer, LENGTH, unit=5).loader(Numbers(), batch_size=5, num_workers=2)
    left, batches = iter(loader), iter(loader)
    next(left)
    model.backward(next(batches))
    optimizer.step()
    # As when the traceback is dropped that has kept it.
    left.close()  # type: ignore[attr-defined]
    train(model, optimizer, batches)
    assert counted(run) == {1.0}


def test_loops_that_end_before_they_begin_are_warned_of_once(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=25)
    with caplog.at_level(logging.WARNING, "freestep"):
        for examples in units:
            model.backward(examples)
        assert not caplog.text
        assert [list(units), list(units)] == [[], []]
    assert caplog.text.count("before it has begun") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_who_wait_for_each_others_pushes_share_units(remotely: Make, run: Run, workers: int) -> None:
    models = [Counts(), Counts()]
    optimizers = [remotely(model, aggregation="sync", worker=f"worker-{n}") for n, model in enumerate(models)]
    seen: list[int] = []

    def work(model: Counts, optimizer: RemoteOptimizer) -> None:
        units = Units(optimizer, LENGTH, unit=2)
        for examples in units.loader(Numbers(), batch_size=2, num_workers=workers):
            seen.extend(examples.tolist())
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
        optimizer.close()

    calls = [under_way(lambda pair=pair: work(*pair)) for pair in zip(models, optimizers, strict=True)]  # type: ignore[misc]
    for call in calls:
        call.result()
    status = run.data().status()
    assert status.exhausted and sorted(set(seen)) == list(range(LENGTH))


def test_who_has_nothing_left_waits_for_what_others_give_back(remotely: Make, run: Run) -> None:
    first, second = Counts(), Counts()
    holder, waiting = remotely(first, worker="holder"), remotely(second, worker="waiting")
    units = Units(waiting, LENGTH, unit=5)
    lease = run.data()
    held = lease.claim(holder._membership.granted, 3).units
    call = under_way(lambda: train(second, waiting, units))
    wait_until(lambda: lease.status().done == 7)
    assert not call.done()
    lease.give_back(holder._membership.granted, [each.unit for each in held])
    call.result()
    assert counted(run) == {1.0}


def test_what_a_slow_worker_has_read_too_late_is_redone_by_others(remotely: Make, run: Run) -> None:
    models = Counts(), Counts()
    policy = {"policy": "ringmaster", "max_staleness": 1}
    slow, fast = (remotely(model, aggregation=policy, worker=name) for model, name in zip(models, "sf", strict=True))
    late = iter(Units(slow, LENGTH, unit=5))
    slow_range = next(late)
    models[0].backward(slow_range)
    ranges, seen = iter(Units(fast, LENGTH, unit=5)), []
    for examples in ranges:
        seen.append(examples)
        fast.zero_grad()
        models[1].backward(examples)
        fast.step()
        if len(seen) == 3:
            slow.step()
            assert slow.receipt is not None and (slow.receipt.decision, slow.receipt.reason) == ("dropped", "stale")
            late.close()  # type: ignore[attr-defined]
    assert slow_range in seen and counted(run) == {1.0}


def test_a_loop_may_outlive_its_optimizer(remotely: Make, run: Run) -> None:
    optimizer = remotely(Counts())
    units = Units(optimizer, LENGTH, unit=5)
    ranges, batches = iter(units), iter(units.loader(Numbers(), batch_size=5))
    next(ranges)
    optimizer.close()
    wait_until(lambda: run.data().status().out == 0)
    # Nothing is sent, which would fail.
    ranges.close()  # type: ignore[attr-defined]
    with pytest.raises(Closed):
        next(batches)
    with pytest.raises(Closed):
        list(units)


def test_a_step_without_a_unit_is_warned_of_once(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = Counts()
    optimizer = remotely(model)
    with caplog.at_level(logging.WARNING, "freestep"):
        for examples in Units(optimizer, 10, unit=5):
            for _ in range(2):
                optimizer.zero_grad()
                model.backward(examples)
                optimizer.step()
    assert caplog.text.count("on no new unit") == 1


def test_what_cannot_be_is_refused(remotely: Make, home_free: RemoteOptimizer, run: Run) -> None:
    optimizer = remotely(Counts())
    units = Units(optimizer, LENGTH, unit=4)
    with pytest.raises(DataExists):
        Units(optimizer, LENGTH, unit=5)
    for options, message in [
        ({"batch_size": 6}, "whole units"),
        ({"batch_size": 0}, "from 1"),
        ({"batch_size": 4, "in_order": False}, "in_order"),
        ({"batch_size": 4, "ahead": -1}, "ahead"),
    ]:
        with pytest.raises(FreestepError, match=message):
            units.loader(Numbers(), **options)
    with pytest.raises(FreestepError, match="by index"):
        units.loader(Stream(), batch_size=4)
    with pytest.raises(FreestepError, match="50 examples"):
        Units(optimizer, 10, unit=4, name="short").loader(Numbers(), batch_size=4)
    with pytest.raises(FreestepError, match="local"):
        Units(home_free, LENGTH, unit=4)
    with pytest.raises(FreestepError, match="SGD"):
        Units(torch.optim.SGD(Counts().parameters()), LENGTH, unit=4)  # type: ignore[arg-type]


@pytest.fixture
def home_free() -> Iterator[RemoteOptimizer]:
    """An optimizer without a service."""
    with RemoteOptimizer(Counts(), url="local", algorithm="sgd", lr=1.0, aggregation="async") as optimizer:
        yield optimizer


def test_loops_that_take_a_batch_ahead_push_the_units_of_the_one_before(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=5)
    batches = iter(units.loader(Numbers(), batch_size=5, ahead=1))
    batch = next(batches)
    while batch is not None:
        following = next(batches, None)
        optimizer.zero_grad()
        model.backward(batch)
        optimizer.step()
        assert units.status().done == run.status().step
        batch = following
    assert list(units) == [] and counted(run) == {1.0}
