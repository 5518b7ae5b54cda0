"""A worker whose pushes are outliers is told so, and gets no lease any more; the others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from freestep import InvalidSpec, MalformedTensors, RemoteOptimizer, Run, WorkerBanned
from trained import loss_of, network, step


def spoilt_step(model: Any, optimizer: RemoteOptimizer, number: int, **options: Any) -> None:
    optimizer.zero_grad()
    (1000 * loss_of(model, number)).backward()
    optimizer.step(**options)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_banned_worker_is_told_and_the_others_go_on(
    remotely: Callable[..., RemoteOptimizer], run: Run, shards: int, overlap: bool
) -> None:
    aggregation = {"policy": "async", "robust": "clip", "ban_after": 2}
    models = [network(), network()]
    honest, spoiler = (
        remotely(model, aggregation=aggregation, worker=worker, shards=shards)
        for model, worker in zip(models, ["honest", "spoiler"], strict=True)
    )
    for number, (model, optimizer) in enumerate(zip(models, (honest, spoiler), strict=True)):
        step(model, optimizer, number)
        assert optimizer.receipt is not None and optimizer.receipt.reason == "norms-unknown"
    for number in range(2):
        spoilt_step(models[1], spoiler, number)
        assert spoiler.receipt is not None
        assert (spoiler.receipt.decision, spoiler.receipt.reason) == ("applied", "outlier")
    for _ in range(2):
        with pytest.raises(WorkerBanned, match="2 pushes of the worker were outliers"):
            spoilt_step(models[1], spoiler, 2, overlap=overlap)
            spoiler.flush()
    step(models[0], honest, 3)
    assert honest.receipt is not None and honest.receipt.reason is None
    status = run.status()
    assert ([worker.worker for worker in status.workers], status.outliers) == (["honest"], {"spoiler": 2})
    with pytest.raises(WorkerBanned):
        remotely(network(), worker="spoiler")
    spoiler.close()


def test_a_run_in_the_process_has_nobody_to_compare() -> None:
    with pytest.raises(InvalidSpec, match="compares workers"):
        RemoteOptimizer(network(), url="local", aggregation={"policy": "async", "robust": "clip"})


@pytest.mark.parametrize("encoding", ["int8", "topk"])
def test_encodings_under_a_rule_by_coordinate(remotely: Callable[..., RemoteOptimizer], encoding: str) -> None:
    aggregation = {"policy": "sync", "robust": "coordinate_median", "max_batch": 3}
    model = network()
    optimizer = remotely(model, aggregation=aggregation, push_encoding=encoding)
    if encoding == "int8":
        step(model, optimizer, 0)
        assert optimizer.loaded.step == 1
    else:
        with pytest.raises(MalformedTensors, match="one of dense, int8"):
            step(model, optimizer, 0)
