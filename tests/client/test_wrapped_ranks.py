"""Models that torch has wrapped for several ranks: DistributedDataParallel as one worker; divided ones are refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch

from freestep import Client, RunNotFound
from harness import ThreadService
from ranks import run_ranks
from trained import held, loss_of, network

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("wrapped_rank.py")


@pytest.fixture(scope="module")
def name() -> str:
    """What the names of the ranks' runs begin with."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def ranks(service: ThreadService, name: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks recorded."""
    file = tmp_path_factory.mktemp("wrapped") / "seen"
    run_ranks(RANK, service.url, name, str(file), WORLD_SIZE="2")
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2)]


def whole() -> torch.Tensor:
    """The parameters after the same steps with all batches, by the package."""
    model = network(0)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    for batches in ((0, 1), (2, 3), (4, 5, 6, 7)):
        optimizer.zero_grad()
        for number in batches:
            (loss_of(model, number) / len(batches)).backward()
        optimizer.step()
    return held(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_ranks_with_a_wrapped_model_train_as_one_worker(
    ranks: list[dict[str, Any]], service: ThreadService, name: str, order: str
) -> None:
    """The optimizer is made after the model was wrapped, or before."""
    one, other = (rank[order] for rank in ranks)
    assert one == other
    assert one["messages"] == []
    torch.testing.assert_close(torch.tensor(one["parameters"]), whole(), rtol=1e-4, atol=1e-5)
    with Client(service.url) as client:
        status = client.run(f"{name}-{order}").status()
    assert (status.step, status.pushes["applied"]) == (3, 3)
    assert [each.name for each in status.spec.parameters] == [each for each, _ in network().named_parameters()]


def test_ranks_that_are_workers_of_their_own_are_told_what_to_pass(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (message,) = rank["alone"]["messages"]
        assert "pass process_group=True" in message


@pytest.mark.parametrize("how", ["fully_shard", "FSDP", "FSDP, original parameters"])
def test_divided_parameters_are_refused_before_there_is_a_run(
    ranks: list[dict[str, Any]], service: ThreadService, name: str, how: str
) -> None:
    for rank in ranks:
        assert rank[how].startswith("ManifestMismatch: the parameter ")
        assert "is divided between ranks, as FSDP does" in rank[how]
        assert "use DistributedDataParallel with process_group=True" in rank[how]
    with Client(service.url) as client, pytest.raises(RunNotFound):
        client.run(f"{name}-sharded").status()
