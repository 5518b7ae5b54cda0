"""Units: weights count which examples moved them, and how often."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from counting import LENGTH, Counts, Make, Numbers, Stream, counted, train
from freestep import (
    Closed,
    DataExists,
    FreestepError,
    LocalSteps,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
    ServiceUnreachable,
    Units,
)
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


def test_a_skipped_step_gives_its_units_back(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    skipped: list[range] = []
    for examples in Units(optimizer, LENGTH, unit=5):
        optimizer.zero_grad()
        model.backward(examples)
        if not skipped:
            # As a GradScaler does that found infinity.
            skipped.append(examples)
            continue
        optimizer.step()
    assert counted(run) == {1.0} and run.status().step == 10


def test_units_of_accumulated_gradients_go_with_their_step(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=5)
    ranges = iter(units)
    optimizer.zero_grad()
    for _ in range(3):
        model.backward(next(ranges))
    optimizer.step()
    assert units.status().done == 3
    # Seven are left, which are no multiple of three: the loop ends where it would have to wait for itself.
    for number, examples in enumerate(ranges):
        if number % 3 == 0:
            optimizer.zero_grad()
        model.backward(examples)
        if number % 3 == 2:
            optimizer.step()
    assert not units.exhausted and units.status().out == 1
    optimizer.step()
    assert list(units) == [] and units.exhausted and counted(run) == {1.0}


def test_units_of_a_refused_push_are_others(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    refused = 0
    for examples in Units(optimizer, LENGTH, unit=5):
        optimizer.zero_grad()
        model.backward(examples)
        if not refused:
            refused += 1
            assert model.count.grad is not None
            model.count.grad[0] = torch.nan
            with pytest.raises(NonFiniteGradient):
                optimizer.step()
            continue
        optimizer.step()
    assert refused and counted(run) == {1.0}


def test_a_push_whose_units_are_lost_is_dropped(remotely: Make, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=5)
    for number, examples in enumerate(units):
        optimizer.zero_grad()
        model.backward(examples)
        if number in (2, 5):
            optimizer._membership.leave()
        optimizer.step()
        if number in (2, 5):
            assert optimizer.receipt is not None and optimizer.receipt.reason == "unit-not-held"
    assert counted(run) == {1.0} and units.exhausted
    assert "others' now" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_back_takes_its_units_back(remotely: Make, run: Run, workers: int) -> None:
    model = Counts()
    optimizer = remotely(model, durability="checkpoint")
    units = Units(optimizer, LENGTH, unit=2)
    went_back = False
    for number, examples in enumerate(units.loader(Numbers(), batch_size=2, num_workers=workers)):
        if number == 3:
            run.checkpoint()
        if number == 7 and not went_back:
            went_back = True
            run.restore(3)
        optimizer.zero_grad()
        model.backward(examples)
        optimizer.step()
    assert went_back and counted(run) == {1.0} and units.exhausted


def test_a_round_of_local_steps_pushes_its_units(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counts()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = locally(model, inner, every=4, lr=1.0, momentum=0.0)
    units = Units(optimizer, LENGTH, unit=5)
    while not units.exhausted:
        for examples in units:
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
        optimizer.push()
    assert counted(run) == {1.0} and run.status().step == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_that_goes_on_in_another_loop_keeps_its_units(
    locally: Callable[..., LocalSteps], run: Run, overlap: bool
) -> None:
    model = Counts()
    optimizer = locally(
        model, torch.optim.SGD(model.parameters(), lr=1.0), every=4, lr=1.0, momentum=0.0, overlap=overlap
    )
    units = Units(optimizer, LENGTH, unit=5)
    while not units.exhausted:
        for taken, examples in enumerate(units):
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
            if taken == 1:
                break
        else:
            optimizer.push()
            optimizer.flush()
    assert counted(run) == {1.0} and run.status().step == 3


def test_a_round_whose_progress_is_lost_gives_its_units_back(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counts()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = locally(model, inner, every=4, lr=1.0, momentum=0.0, overlap=True)
    units = Units(optimizer, LENGTH, unit=5)
    seen = 0
    while not units.exhausted:
        for examples in units:
            seen += 1
            optimizer.zero_grad()
            model.backward(examples)
            if seen == 3:
                assert model.count.grad is not None
                model.count.grad[0] = torch.nan
            optimizer.step()
            if seen == 6:
                # Of two steps that begin where the refused round has ended.
                with pytest.raises(NonFiniteGradient):
                    optimizer.push()
                assert units.status().done == 0
            if seen == 12:
                optimizer.flush()
                optimizer.keep_weights()
                assert units.status().done == 4 and not optimizer._has_units
                optimizer.train()
        optimizer.push()
        optimizer.flush()
    assert counted(run) == {1.0}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_saved_round_on_units_is_dropped_and_its_units_are_redone(
    locally: Callable[..., LocalSteps], run: Run, caplog: pytest.LogCaptureFixture, elsewhere: bool
) -> None:
    def make(worker: str) -> tuple[Counts, LocalSteps]:
        model = Counts()
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        return model, locally(model, inner, every=4, lr=1.0, momentum=0.0, worker=worker)

    def go_on(model: Counts, optimizer: LocalSteps, most: int) -> None:
        for taken, examples in enumerate(Units(optimizer, LENGTH, unit=5)):
            if taken == most:
                return
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
        optimizer.push()

    model, optimizer = make("first")
    go_on(model, optimizer, 6)
    state = optimizer.state_dict()
    assert state["round"]["units"].keys() == {"train"} and optimizer.steps == 2
    if elsewhere:
        optimizer.close()
        # Another has them before it is back.
        model, optimizer = make("second")
        go_on(model, optimizer, 4)
        optimizer.close()
        model, optimizer = make("third")
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer.load_state_dict(state)
    assert caplog.text.count("the unfinished round of 2 steps in the state is dropped") == 1
    assert optimizer.receipt is not None and optimizer.receipt.reason == "unit-not-held"
    assert optimizer.steps == 0
    go_on(model, optimizer, 10)
    assert counted(run) == {1.0} and run.data().status().exhausted


def test_gradients_that_go_on_in_another_loop_keep_their_units(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=5)
    for taken, examples in enumerate(units):
        if taken == 2:
            # It was handed over, and has no gradient.
            break
        model.backward(examples)
    for taken, examples in enumerate(units):
        model.backward(examples)
        if taken % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert units.exhausted and counted(run) == {1.0} and run.status().step == 4


def test_gradients_that_are_discarded_give_their_units_back(remotely: Make, run: Run) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=5)
    for taken, examples in enumerate(units):
        optimizer.zero_grad()
        if taken == 1:
            optimizer.eval()
        model.backward(examples)
        if taken == 1:
            optimizer.train()
            assert units.status().done + units.status().out < 3
            continue
        optimizer.step()
    assert counted(run) == {1.0}


@pytest.mark.parametrize("error", [ServiceUnreachable("it is away"), KeyboardInterrupt()])
def test_a_step_of_unknown_outcome_leaves_its_units_with_its_gradients(
    remotely: Make, run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = Counts()
    optimizer = remotely(model)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for taken, examples in enumerate(Units(optimizer, LENGTH, unit=5)):
        optimizer.zero_grad()
        model.backward(examples)
        if taken < 2:
            with monkeypatch.context() as patched, pytest.raises(type(error)):
                patched.setattr(optimizer._run, "exchange", fail)
                optimizer.step()
            if taken == 0:
                # The gradients of this one are discarded, and those of the other are pushed.
                continue
        optimizer.step()
    assert counted(run) == {1.0}


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
