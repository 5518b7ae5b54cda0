"""Units under local steps: they belong to the round that was taken on them, and are given back where it is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from counting import LENGTH, Counts, Numbers, counted
from freestep import LocalSteps, NonFiniteGradient, Run, Units


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


@pytest.mark.parametrize("goes_back", [False, True])
def test_a_round_on_a_part_of_a_lost_unit_is_discarded(
    locally: Callable[..., LocalSteps], run: Run, goes_back: bool
) -> None:
    model = Counts()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = locally(model, inner, every=4, aggregation="sync", lr=1.0, momentum=0.0)
    units = Units(optimizer, LENGTH, unit=10)
    # Under sync, units are claimed when they are drawn: here with the delivery of the second half of the first one.
    loader = units.loader(Numbers(), batch_size=5, num_workers=1, prefetch_factor=3)
    is_lost = False
    while not units.exhausted:
        for examples in loader:
            optimizer.zero_grad()
            model.backward(examples)
            optimizer.step()
            if not is_lost:
                is_lost = True
                if goes_back:
                    run.checkpoint()
                    run.restore(0)
                else:
                    optimizer._membership.leave()
        optimizer.push()
    assert counted(run) == {1.0}


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
