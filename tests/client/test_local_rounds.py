"""What may happen to a round of LocalSteps, and what is refused before one begins."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from freestep import (
    EvalMode,
    FreestepError,
    LocalSteps,
    ManifestMismatch,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
    RunNotFound,
    ServiceUnreachable,
)
from freestep.inflight_push import InflightPush
from harness import ThreadService
from lost_answers import LosingClient
from proxies import Cutter
from trained import ADAMW, TOLERANCE, WHOLE, Counting, held, network, pulled, step


def test_a_round_may_be_ended_early(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, **WHOLE)
    optimizer.push()
    model.step(optimizer, 2)
    optimizer.push()
    assert (run.status().step, model.counted, optimizer.steps) == (1, 2.0, 0)
    model.step(optimizer, 4)
    optimizer.close()
    assert run.status().step == 1


def test_after_a_restore_a_round_is_dropped_and_said_so(locally: Callable[..., LocalSteps], run: Run) -> None:
    for overlap in (False, True):
        model = Counting()
        optimizer = locally(model, model.sgd, every=2, overlap=overlap, worker="me", **WHOLE)
        model.step(optimizer, 2)
        optimizer.flush()
        before = model.counted
        step_before = run.checkpoint().step
        model.step(optimizer, 1)
        run.restore(step_before)
        model.step(optimizer, 1)
        model.step(optimizer, int(overlap))
        optimizer.flush()
        assert optimizer.receipt is not None
        assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
        assert (model.counted, optimizer.steps) == (before, 0)
        model.step(optimizer, 2)
        optimizer.flush()
        assert optimizer.receipt.decision == "applied"
        assert model.counted == before + 2


def test_a_round_that_is_too_stale_is_dropped_and_said_so(locally: Callable[..., LocalSteps], run: Run) -> None:
    model, other = Counting(), Counting()
    options = {"aggregation": {"policy": "async", "max_staleness": 0}, "every": 2, **WHOLE}
    optimizer, its = locally(model, model.sgd, **options), locally(other, other.sgd, **options)
    model.step(optimizer, 1)
    other.step(its, 2)
    model.step(optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "stale")
    assert (model.counted, optimizer.steps) == (2.0, 0)
    model.step(optimizer, 2)
    assert optimizer.receipt.decision == "applied"
    assert model.counted == 4.0


def test_a_fenced_off_worker_takes_a_new_lease_and_its_round_counts(
    locally: Callable[..., LocalSteps], run: Run
) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, every=2, worker="me", **WHOLE)
    model.step(optimizer, 1)
    run.lease("me").release()
    model.step(optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, model.counted) == ("applied", 2.0)


def test_a_round_that_is_not_finite_is_refused_and_training_goes_on(
    locally: Callable[..., LocalSteps], run: Run
) -> None:
    for overlap in (False, True):
        model = Counting()
        optimizer = locally(model, model.sgd, every=2, overlap=overlap, **WHOLE)
        before = model.counted
        model.step(optimizer, 1, value=float("nan"))
        with pytest.raises(NonFiniteGradient):
            model.step(optimizer, 1)
            optimizer.flush()
        assert (model.counted, optimizer.steps) == (before, 0)
        model.step(optimizer, 2)
        optimizer.flush()
        assert model.counted == before + 2
    assert run.status().step == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_push_of_which_nothing_is_known_is_sent_again_and_counts_once(
    service: ThreadService, locally: Callable[..., LocalSteps], run: Run, overlap: bool
) -> None:
    to_come: list[int] = []
    model = Counting()
    with Cutter(service.url, to_come) as cutter, cutter.client() as client:
        optimizer = locally(model, model.sgd, every=2, client=client, lease_ttl_ms=3_600_000, overlap=overlap, **WHOLE)
        model.step(optimizer, 2)
        optimizer.flush()
        # So many bytes come of the next answers.
        to_come += [0, 100]
        model.step(optimizer, 1)
        with pytest.raises(ServiceUnreachable):
            model.step(optimizer, 1)
            optimizer.flush()
        with pytest.raises(ServiceUnreachable):
            optimizer.flush()
        model.step(optimizer, 1)
        assert (model.counted, optimizer.steps) == (5.0, 1)
        model.step(optimizer, 1)
        optimizer.close()
    assert (model.counted, optimizer.steps, run.status().step) == (6.0, 0, 3)


def test_a_push_that_fails_is_no_time_of_local_steps(
    service: ThreadService, locally: Callable[..., LocalSteps], run: Run
) -> None:
    now = 0.0
    model = Counting()

    def lose() -> None:
        nonlocal now
        now += 1000.0

    with LosingClient(service.url, retry_for=0.0, lost=lose) as client:
        optimizer = locally(model, model.sgd, every=2, client=client, clock=lambda: now, **WHOLE)

        def step() -> None:
            nonlocal now
            now += 1.0
            model.step(optimizer, 1)

        client.loses.append(("POST", "/gradients"))
        step()
        with pytest.raises(ServiceUnreachable):
            step()
        step()
        step()
        assert [worker.speed for worker in run.workers()] == [1.0]
        optimizer.close()


def test_a_wait_for_an_answer_is_no_time_of_local_steps(
    locally: Callable[..., LocalSteps], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, answer, model = 0.0, InflightPush.answer, Counting()

    def answer_late(push: InflightPush, exchange: Any) -> Any:
        nonlocal now
        now += 1000.0
        return answer(push, exchange)

    monkeypatch.setattr(InflightPush, "answer", answer_late)
    optimizer = locally(model, model.sgd, every=2, overlap=True, clock=lambda: now, **WHOLE)
    for number in range(4):
        now += 1.0
        model.step(optimizer, 1)
        if number >= 2:
            optimizer.flush()
    assert [worker.speed for worker in run.workers()] == [1.0]


def test_a_run_that_was_deleted_is_said_to_be_gone(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, every=1, **WHOLE)
    run.delete()
    with pytest.raises(RunNotFound):
        model.step(optimizer)


@pytest.mark.parametrize("overlap", [False, True])
def test_evaluation_leaves_the_round_alone(locally: Callable[..., LocalSteps], run: Run, overlap: bool) -> None:
    models = [network(), network()]
    for seen, model in enumerate(models):
        optimizer = locally(model, every=3, overlap=overlap, run=f"{run.name}-{seen}", algorithm="sgd_schedule_free")
        for number in range(12):
            step(model, optimizer, number)
            optimizer.flush()
            if seen:
                before = held(model)
                optimizer.eval()
                optimizer.eval()
                assert torch.equal(held(model), pulled(optimizer._run, "x"))
                for what in (optimizer.step, optimizer.push):
                    with pytest.raises(EvalMode, match="train\\(\\)"):
                        what()
                optimizer.train()
                optimizer.train()
                assert torch.equal(held(model), before)
    assert torch.equal(held(models[0]), held(models[1]))


@pytest.mark.parametrize("at_x", [False, True])
def test_a_saved_worker_goes_on_in_its_round(locally: Callable[..., LocalSteps], at_x: bool) -> None:
    model, twin = network(), network()
    optimizer = locally(model, worker="saved")
    straight = locally(twin, run=f"straight-{uuid.uuid4().hex[:8]}")
    for number in range(8):
        step(model, optimizer, number)
        step(twin, straight, number)
    if at_x:
        optimizer.eval()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    again = network(1)
    resumed = locally(again, worker="other")
    step(again, resumed, 50)
    resumed.load_state_dict(state)
    assert (resumed.worker, resumed.steps) == ("saved", 3)
    torch.testing.assert_close(held(again), held(twin), **TOLERANCE)
    for number in range(8, 17):
        step(again, resumed, number)
        step(twin, straight, number)
    torch.testing.assert_close(held(again), held(twin), **TOLERANCE)
    assert resumed.loaded.step == 3


def test_a_saved_round_of_an_epoch_that_is_over_is_dropped(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, **WHOLE)
    model.step(optimizer, 2)
    state = optimizer.state_dict()
    run.restore(run.checkpoint().step)
    optimizer.load_state_dict(state)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
    assert (model.counted, optimizer.steps) == (0.0, 0)


def test_a_state_of_something_else_is_refused(
    service: ThreadService, locally: Callable[..., LocalSteps], name: str
) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, **WHOLE)
    model.step(optimizer, 2)
    with RemoteOptimizer(Counting(), url=service.url, run=name, **WHOLE) as other:
        strange = other.state_dict()
    with pytest.raises(ManifestMismatch, match="LocalSteps"):
        optimizer.load_state_dict(strange)
    assert (model.counted, optimizer.steps) == (2.0, 2)


def test_an_inner_optimizer_with_points_of_its_own_is_refused() -> None:
    model = network()
    inner = schedulefree.AdamWScheduleFree(model.parameters())
    with pytest.raises(FreestepError, match="AdamWScheduleFree keeps points"):
        LocalSteps(model, inner, every=2, run="any")


def test_other_parameters_than_the_inner_optimizers_are_refused(locally: Callable[..., LocalSteps]) -> None:
    model = network()
    for parameters, words in (
        (model[0].parameters(), r"does not have the parameter '2\.weight'"),
        ([*model.parameters(), nn.Parameter(torch.ones(7))], r"another parameter, of shape \[7\]"),
    ):
        with pytest.raises(ManifestMismatch, match=words):
            locally(model, torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize(
    ("options", "words"), [({"every": 0}, "a number of steps from 1"), ({"process_group": True}, "process_group")]
)
def test_what_cannot_be_is_said(locally: Callable[..., LocalSteps], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FreestepError, match=words):
        locally(network(), **options)


def test_the_runs_learning_rate_is_not_the_inner_ones(
    locally: Callable[..., LocalSteps], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="freestep"):
        optimizer = locally(network())
    assert (optimizer.spec.optimizer.algorithm, optimizer.spec.optimizer.lr) == ("diloco", 0.7)
    assert optimizer.inner.param_groups[0]["lr"] == ADAMW["lr"]
    assert not caplog.text
