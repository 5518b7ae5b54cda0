"""RemoteOptimizer through what may happen: leases end, and runs go back, are deleted, or are others by now."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable

import pytest
import schedulefree

from freestep import ManifestMismatch, RemoteOptimizer, Run, ServiceUnreachable, StateMismatch, WorkerNameTaken
from harness import ThreadService
from lost_answers import LosingClient
from meanwhile import under_way, wait_until
from trained import assert_same, network, train


def test_a_fenced_off_worker_takes_a_new_lease_and_its_gradient_counts(
    make: Callable[..., RemoteOptimizer], run: Run
) -> None:
    model = network()
    optimizer = make(model, worker="me")
    train(model, optimizer, 2)
    run.lease("me").release()
    train(model, optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.step) == ("applied", 3)


def test_a_worker_whose_lease_expired_takes_a_new_one_and_its_gradient_counts(
    service: ThreadService, make: Callable[..., RemoteOptimizer], run: Run
) -> None:
    model, twin = network(), network()
    peer = schedulefree.AdamWScheduleFree(twin.parameters(), lr=0.0025)
    peer.train()
    optimizer = make(model, worker="sleeper")
    with service.redis() as client:
        client.zadd(f"freestep:{{{run.name}}}:leases", {"sleeper": 1})
        wait_until(lambda: not client.hexists(f"freestep:{{{run.name}}}:workers", "sleeper"))
    train(model, optimizer, 3)
    train(twin, peer, 3)
    assert_same(model, twin)
    assert run.status().step == 3


def test_a_lease_of_ones_own_whose_answer_was_lost_is_not_another_workers(
    service: ThreadService, make: Callable[..., RemoteOptimizer], run: Run
) -> None:
    with LosingClient(service.url, retry_for=0.0) as client:
        model = network()
        optimizer = make(model, worker="me", client=client)
        run.end_worker("me")
        client.loses.append(("POST", "/leases"))
        with pytest.raises(ServiceUnreachable):
            train(model, optimizer, 1)
        train(model, optimizer, 1)
        assert optimizer.receipt is not None
        assert optimizer.receipt.decision == "applied"
        run.lease("me")
        with pytest.raises(WorkerNameTaken):
            train(model, optimizer, 1)


def test_a_worker_that_waits_for_others_takes_no_lease_from_a_newer_one_of_its_name(
    make: Callable[..., RemoteOptimizer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.joined_optimizer._WAIT_S", 0.1)
    monkeypatch.setattr("freestep.pushing_optimizer.FIRST_WAIT_S", 0.1)
    model = network()
    optimizer = make(model, worker="me", aggregation="sync", lease_ttl_ms=3000)
    with run.lease("other", ttl_ms=600_000):
        working = under_way(lambda: train(model, optimizer, 1))
        wait_until(lambda: any(each.gathered for each in run.workers()))
        with run.lease("me", ttl_ms=600_000) as newer:
            with pytest.raises(WorkerNameTaken):
                working.result()
            own = newer.granted.lease
            assert own in [each.lease for each in run.workers(own)]


def test_after_a_restore_a_worker_joins_again(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    run.checkpoint()
    kept = copy.deepcopy(model)
    train(model, optimizer, 2)
    run.restore(2)
    train(model, optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
    assert_same(model, kept)
    train(model, optimizer, 1)
    assert optimizer.receipt.decision == "applied"
    assert (optimizer.loaded.epoch, optimizer.loaded.step) == (2, 3)


def test_a_worker_of_a_deleted_run_joins_the_new_one_of_that_name(
    make: Callable[..., RemoteOptimizer], run: Run
) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    run.delete()
    run.create(optimizer.spec)
    run.initialize(dict(network(1).named_parameters()))
    assert run.status().epoch == 2
    train(model, optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
    assert run.status().step == 0
    assert_same(model, network(1))


def test_a_worker_of_a_deleted_run_is_told_of_the_new_one(
    make: Callable[..., RemoteOptimizer],
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    optimizer = make(model, on_missing="raise")
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for lr in (optimizer.spec.optimizer.model_dump()["lr"], 0.5):
        run.delete()
        changed = optimizer.spec.optimizer.model_copy(update={"lr": lr})
        run.create(optimizer.spec.model_copy(update={"optimizer": changed}))
        run.initialize(dict(network(1).named_parameters()))
        with caplog.at_level(logging.WARNING, "freestep"):
            if lr == 0.5:
                with pytest.raises(ManifestMismatch, match="another spec"):
                    train(model, optimizer, 1)
            else:
                train(model, optimizer, 1)
                assert "another of its name" in caplog.text
                # It is of the new run.
                optimizer.load_state_dict(optimizer.state_dict())
                with pytest.raises(StateMismatch):
                    optimizer.load_state_dict(saved)


def test_a_saved_worker_joins_its_run_again(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    optimizer = make(model, worker="saved")
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    again = network(1)
    resumed = make(again, worker="other")
    resumed.load_state_dict(state)
    assert resumed.worker == "saved"
    assert_same(again, model)
    train(again, resumed, 1)
    assert resumed.receipt is not None
    assert resumed.receipt.step == 4
    stranger = make(network(), run=f"other-{uuid.uuid4().hex[:6]}")
    with pytest.raises(ManifestMismatch):
        stranger.load_state_dict(state)


def test_closing_ends_the_lease(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    optimizer = make(network(), worker="leaving")
    assert [worker.worker for worker in run.workers()] == ["leaving"]
    with optimizer:
        pass
    assert run.workers() == []


@pytest.mark.parametrize("call", ["eval", "train"])
def test_a_run_that_went_back_is_told_at_every_load(
    make: Callable[..., RemoteOptimizer],
    run: Run,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    model = network()
    optimizer = make(model)
    run.checkpoint()
    train(model, optimizer, 3)
    if call == "train":
        optimizer.eval()
    run.restore(0)
    with caplog.at_level(logging.WARNING, "freestep"):
        getattr(optimizer, call)()
    assert "which had step 3, goes on from step 0 of epoch 2" in caplog.text


def test_x_of_another_run_of_the_name_is_not_loaded(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, 1)
    before = copy.deepcopy(model)
    run.delete()
    make(network(1), worker="stranger", algorithm="sgd", lr=0.5)
    with pytest.raises(ManifestMismatch, match="another spec"):
        optimizer.eval()
    assert_same(model, before)
