"""Memory that was given to a call is free when it is left, and does not wait until garbage is collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from freestep import AlreadyInitialized, EpochChanged, Flat, Pulled, Run, StepNotReached
from region_sides import begin


@pytest.fixture
def begun(run: Run) -> Iterator[Run]:
    begin(run)
    gc.disable()
    yield run
    gc.enable()


def pulled(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    run.pull_into(flat, "y")
    return flat.vector


def pulled_too_early(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    with pytest.raises(StepNotReached):
        run.pull_into(flat, "y", min_step=1)
    return flat.vector


def pushed_to_another_epoch(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    with run.lease() as lease:
        run.import_state(run.export_state(), replace=True)
        with pytest.raises(EpochChanged):
            run.push(flat, lease.claim(0))
    return flat.vector


def uploaded_again(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    with pytest.raises(AlreadyInitialized):
        run.initialize(flat)
    return flat.vector


def imported(run: Run) -> Tensor:
    state = run.export_state()
    run.import_state(state, replace=True)
    return state._flats["y"].vector


def imported_too_late(run: Run) -> Tensor:
    state = run.export_state()
    with pytest.raises(EpochChanged):
        run.import_state(state, replace=True, at=Pulled(state.epoch, state.step + 1))
    return state._flats["y"].vector


@pytest.mark.parametrize(
    "call", [pulled, pulled_too_early, pushed_to_another_epoch, uploaded_again, imported, imported_too_late]
)
def test_a_vector_is_free_when_its_call_has_ended(begun: Run, call: Callable[[Run], Tensor]) -> None:
    vector = weakref.ref(call(begun))
    assert vector() is None
