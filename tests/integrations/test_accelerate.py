"""Accelerate, as its documentation has it used, with a RemoteOptimizer."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from counting import LENGTH, Counts, Numbers, counted
from freestep import Client, RemoteOptimizer, Run, Units
from freestep.bulk import BulkTransport
from harness import ThreadService
from trained import TOLERANCE, held, loss_of, network, pulled

SCRIPT = Path(__file__).with_name("schedule_free_script.py")
Make = Callable[..., RemoteOptimizer]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Make]:
    """Makes optimizers of one run; they are closed with the test."""
    made: list[RemoteOptimizer] = []

    def optimizer(model: nn.Module, **options: Any) -> RemoteOptimizer:
        given = {"run": name, "lr": 0.05, "warmup_steps": 3, **options}
        made.append(RemoteOptimizer(model, **(given if "client" in given else {"url": service.url, **given})))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: int, begin: int = 0) -> None:
    """Two batches a step, clipped."""
    for number in range(begin, begin + batches):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, number))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


def test_preparing_costs_no_request(service: ThreadService, name: str, make: Make) -> None:
    asked: list[httpx.Request] = []
    http = httpx.Client(base_url=service.url, transport=BulkTransport(), event_hooks={"request": [asked.append]})
    with Client(http=http) as client:
        # With a residual in its state.
        model = network()
        optimizer = make(model, client=client, push_dtype="BF16")
        assert len(asked) > 2
        asked.clear()
        accelerator = Accelerator(cpu=True)
        model, prepared = accelerator.prepare(model, optimizer)
        assert isinstance(prepared, AcceleratedOptimizer)
        assert asked == []
        train(accelerator, model, prepared, 1)
        assert [request.method for request in asked] == ["POST"]
        optimizer.close()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_trains_as_with_the_package(make: Make, run: Run, precision: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    twin = network()
    peer = schedulefree.AdamWScheduleFree(twin.parameters(), lr=0.05, warmup_steps=3)
    twin, peer = accelerator.prepare(twin, peer)
    peer.train()
    train(accelerator, twin, peer, 12)
    peer.eval()
    model = network()
    model, optimizer = accelerator.prepare(model, make(model))
    optimizer.train()
    train(accelerator, model, optimizer, 12)
    assert torch.equal(held(model), pulled(run))
    optimizer.eval()
    assert torch.equal(held(model), pulled(run, "x"))
    tolerance = TOLERANCE if precision == "no" else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(held(model), held(twin), **tolerance)
    assert run.status().step == 6


def test_a_loss_is_set_before_the_step(make: Make, run: Run) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    remote = make(model, algorithm="adamc_schedule_free_plus", lr=1.0)
    model, optimizer = accelerator.prepare(model, remote)
    for number in range(3):
        loss = loss_of(model, number)
        accelerator.backward(loss)
        remote.loss = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            assert run.status().loss == pytest.approx(loss.item())
    assert run.status().step == 3


def test_a_saved_state_is_loaded(make: Make, run: Run, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer = accelerator.prepare(model, make(model, worker="me"))
    train(accelerator, model, optimizer, 4)
    run.checkpoint()
    accelerator.save_state(str(tmp_path))
    # Of this very moment.
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, 4, begin=4)
    after = held(model)
    optimizer.optimizer.close()
    run.restore(2)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network(3)
    model, optimizer = accelerator.prepare(model, make(model))
    accelerator.load_state(str(tmp_path))
    assert optimizer.optimizer.worker == "me"
    assert torch.equal(held(model), pulled(run))
    train(accelerator, model, optimizer, 4, begin=4)
    assert torch.equal(held(model), after)
    assert run.status().step == 4


def test_a_step_whose_gradients_overflowed_is_not_pushed(make: Make, run: Run) -> None:
    Accelerator(cpu=True)
    model = network()
    remote = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    optimizer = AcceleratedOptimizer(remote, scaler=scaler)
    for number in range(4):
        scaler.scale(loss_of(model, number) * (float("inf") if number == 2 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (number == 2)
    assert run.status().step == 3
    assert scaler.get_scale() == 2.0


def test_the_schedule_free_example_works_with_one_import_changed(
    service: ThreadService, name: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_package = runpy.run_path(str(SCRIPT))
    changed = tmp_path / "script.py"
    text = SCRIPT.read_text()
    assert text.count("import schedulefree\n") == 1
    changed.write_text(text.replace("import schedulefree\n", "import freestep as schedulefree\n"))
    monkeypatch.setenv("FREESTEP_URL", service.url)
    monkeypatch.setenv("FREESTEP_RUN", name)
    with_service = runpy.run_path(str(changed))
    with_service["optimizer"].optimizer.close()
    assert with_service["losses"] == pytest.approx(with_package["losses"], rel=1e-4)
    assert with_package["losses"][-1] < 0.2
    torch.testing.assert_close(held(with_service["model"]), held(with_package["model"]), **TOLERANCE)
    assert run.status().step == 18


def test_units_are_those_of_the_optimizer_that_was_prepared(service: ThreadService, name: str, run: Run) -> None:
    counts, accelerator = Counts(), Accelerator(cpu=True, gradient_accumulation_steps=2)
    with RemoteOptimizer(counts, url=service.url, run=name, algorithm="sgd", lr=1.0, aggregation="async") as remote:
        model, optimizer = accelerator.prepare(counts, remote)
        units = Units(optimizer, LENGTH, unit=5)
        for examples in units.loader(Numbers(), batch_size=5):
            with accelerator.accumulate(model):
                # Accelerate divides it by two.
                accelerator.backward(-2 * counts.count[examples].sum())
                optimizer.step()
                optimizer.zero_grad()
        assert units.exhausted and counted(run) == {1.0} and run.status().step == 5
