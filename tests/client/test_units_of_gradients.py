"""Units and the gradients that were taken on them: pushed together, and given back where they are discarded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counting import LENGTH, Counts, Make, Numbers, counted, train
from freestep import NonFiniteGradient, Run, ServiceUnreachable, Units
from freestep.taken_units import TakenUnit, TakenUnits


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
    assert "handed out again" in caplog.text


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


@pytest.mark.parametrize("steps", [False, True])
def test_a_loop_that_is_left_in_the_middle_of_a_unit_leaves_no_gradients_of_it(
    remotely: Make, run: Run, caplog: pytest.LogCaptureFixture, steps: bool
) -> None:
    model = Counts()
    optimizer = remotely(model)
    units = Units(optimizer, LENGTH, unit=10)
    loader = units.loader(Numbers(), batch_size=5)
    for taken, examples in enumerate(loader):
        model.backward(examples)
        if taken == 2:
            # The second unit's first half: others may be handed the whole of it.
            break
    if steps:
        optimizer.step()
        assert optimizer.receipt is not None and optimizer.receipt.reason == "unit-not-held"
    assert steps or model.count.grad is not None
    for taken, examples in enumerate(loader):
        model.backward(examples)
        if taken % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert units.exhausted and counted(run) == {1.0} and run.status().step == 5
    assert caplog.text.count("gradients that the run") == 1


@pytest.mark.parametrize("steps", [False, True])
def test_a_loop_that_is_left_in_the_middle_of_a_unit_leaves_what_was_pushed(
    remotely: Make, run: Run, caplog: pytest.LogCaptureFixture, steps: bool
) -> None:
    model = Counts()
    optimizer = remotely(model)
    loader = Units(optimizer, LENGTH, unit=10).loader(Numbers(), batch_size=5)
    for examples in loader:
        model.backward(examples)
        if steps:
            optimizer.step()
        else:
            optimizer.zero_grad()
        break
    optimizer.zero_grad()
    model.backward(range(LENGTH))
    optimizer.step()
    assert optimizer.receipt is not None and optimizer.receipt.decision == "applied"
    assert "discarded" not in caplog.text


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


@pytest.mark.parametrize("goes_back", [False, True])
def test_gradients_of_a_part_of_a_lost_unit_are_not_pushed_with_others(
    remotely: Make, run: Run, caplog: pytest.LogCaptureFixture, goes_back: bool
) -> None:
    model = Counts()
    # Under sync, units are claimed when they are drawn: here with the delivery of the second half of the first one.
    optimizer = remotely(model, aggregation="sync", durability="checkpoint")
    units = Units(optimizer, LENGTH, unit=10)
    for taken, examples in enumerate(units.loader(Numbers(), batch_size=5, num_workers=1, prefetch_factor=3), start=1):
        model.backward(examples)
        if taken == 1 and goes_back:
            run.checkpoint()
            run.restore(0)
        elif taken == 1:
            optimizer._membership.leave()
        elif taken % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert units.exhausted and counted(run) == {1.0}
    assert caplog.text.count("gradients that the run") == 1


def test_a_step_on_nothing_but_lost_units_is_dropped(remotely: Make, run: Run) -> None:
    model, others = Counts(), Counts()
    optimizer = remotely(model, aggregation="sync")
    units = iter(Units(optimizer, LENGTH, unit=25))
    model.backward(next(units))
    optimizer._membership.leave()
    with remotely(others) as another:
        train(others, another, Units(another, LENGTH, unit=25))
    assert list(units) == []
    optimizer.step()
    assert optimizer.receipt is not None and optimizer.receipt.reason == "unit-not-held"
    assert counted(run) == {1.0} and run.status().step == 2
    optimizer.zero_grad()
    model.backward(range(LENGTH))
    optimizer.step()
    assert counted(run) == {2.0}


def test_any_number_of_units_is_given_back(remotely: Make, run: Run) -> None:
    lease = remotely(Counts())._membership.granted
    data = run.data("many")
    data.create({"length": 1500, "unit": 1, "passes": 1})
    units = [unit.unit for count in (1024, 476) for unit in data.claim(lease, count).units]
    taken = TakenUnits()
    taken.give_back(TakenUnit(data, lease, number) for number in units)
    assert (len(units), data.status().out) == (1500, 0)
