"""The weights of the best value are in the file, over restarts of the evaluator and what the service refuses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from freestep import BestWeights, FreestepError, HeldLease, Run, Snapshot

SPEC = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": "w", "shape": [4]}, {"name": "b", "shape": []}, {"name": "e", "shape": [0, 2]}],
}
"""Of a run whose every weight is its step, negated."""


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value), "b": torch.tensor(value), "e": torch.zeros(0, 2)}


@pytest.fixture
def lease(run: Run) -> Iterator[HeldLease]:
    run.create(SPEC)
    run.initialize(weights(0.0))
    with run.lease() as held:
        yield held


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.safetensors"


def next_x(run: Run, lease: HeldLease) -> Snapshot:
    run.push(weights(1.0), lease.claim(run.status().step))
    return run.pull("x")[0]


def kept(path: Path) -> tuple[float, dict[str, str]]:
    """The first weight, and the metadata without the prefix."""
    tensors = safetensors.torch.load_file(path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"w": (4,), "b": (), "e": (0, 2)}
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    return float(tensors["w"][0]), {key.removeprefix("freestep."): value for key, value in metadata.items()}


def test_the_weights_of_the_best_value_are_kept(run: Run, lease: HeldLease, path: Path) -> None:
    best = run.keep_best("accuracy", path)
    assert (best.value, best.epoch, best.step, path.exists()) == (None, None, None, False)
    outcomes = [best(next_x(run, lease), value) for value in (0.5, 0.25, 0.75, 0.75)]
    assert outcomes == [True, False, True, False]
    assert (best.value, best.epoch, best.step) == (0.75, 1, 3)
    assert kept(path) == (
        -3.0,
        {"format": "pt", "run": run.name, "epoch": "1", "step": "3", "point": "x", "metric": "accuracy",
         "value": "0.75", "mode": "max", "run_id": run.status().id},
    )  # fmt: skip
    assert (run.status().metrics["accuracy"].value, run.status().metrics["accuracy"].step) == (0.75, 4)
    assert os.listdir(path.parent) == [path.name]


def test_smaller_may_be_better_and_a_tensor_may_be_the_value(run: Run, lease: HeldLease, path: Path) -> None:
    best = run.keep_best("val_loss", path, mode="min")
    assert [best(next_x(run, lease), torch.tensor(value)) for value in (0.5, 0.75, -0.25)] == [True, False, True]
    assert kept(path)[1]["value"] == "-0.25"


def test_an_evaluator_that_is_started_anew_goes_on(run: Run, lease: HeldLease, path: Path) -> None:
    run.keep_best("accuracy", path)(next_x(run, lease), 0.1)
    best = run.keep_best("accuracy", str(path))
    assert (best.value, best.epoch, best.step) == (0.1, 1, 1)
    assert not best(next_x(run, lease), 0.05)
    assert best(next_x(run, lease), 0.2)
    assert kept(path)[0] == -3.0


def test_a_value_that_the_service_does_not_take_is_not_kept(
    run: Run, lease: HeldLease, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = run.keep_best("accuracy", path)
    run.checkpoint()
    x = next_x(run, lease)
    run.report("accuracy", 0.5, 1)
    with caplog.at_level(logging.WARNING, "freestep"):
        assert not best(x, 0.75)
        run.restore(0)
        assert not best(x, 0.25)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "accuracy 0.75 at step 1 is not kept",
        "accuracy 0.25 at step 1 is not kept",
    ]
    assert (best.value, path.exists()) == (None, False)
    assert best(run.pull("x")[0], 0.125)
    assert kept(path)[1]["epoch"] == "2"


@pytest.mark.parametrize("metric", ["loss", "val_loss", "ppl[wikitext]", "eval/WER", "Cross-Entropy"])
def test_a_metric_that_is_minimized_needs_its_mode(run: Run, path: Path, metric: str) -> None:
    with pytest.raises(FreestepError, match="smaller or a larger"):
        run.keep_best(metric, path)
    assert run.keep_best(metric, path, mode="min").mode == "min"
    assert run.keep_best(metric, path, mode="max").mode == "max"
    assert run.keep_best("top1_terror", path).mode == "max"


def refused(run: Run, path: Path, reason: str, metric: str = "accuracy", **options: str) -> None:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(FreestepError, match=reason):
        run.keep_best(metric, path, **options)  # type: ignore[arg-type]
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_file_of_something_else_is_left_alone(run: Run, lease: HeldLease, path: Path, tmp_path: Path) -> None:
    x = next_x(run, lease)
    run.keep_best("accuracy", path)(x, 0.5)
    refused(run, path, "has the metric 'accuracy', not 'top5'", "top5")
    refused(run, path, "has the mode 'max', not 'min'", mode="min")
    other = BestWeights(lambda *_, **__: None, lambda: None, "other", "accuracy", path.with_name("other"), "max")
    x.run = "other"
    other(x, 0.5)
    refused(run, other.path, f"has the run 'other', not '{run.name}'")
    for content in (b"", b"text", (1 << 62).to_bytes(8, "little"), safetensors.torch.save(weights(0.0))):
        path.write_bytes(content)
        refused(run, path, "was not written by keep_best")
    os.mkfifo(tmp_path / "pipe")
    for nothing in (tmp_path, tmp_path / "pipe", Path("/dev/null"), Path("-")):
        refused(run, nothing, "is no regular file")
    refused(run, tmp_path / "new", "mode must be", mode="larger")


def test_what_is_no_x_of_the_run_is_refused(run: Run, lease: HeldLease, path: Path) -> None:
    best, x = run.keep_best("accuracy", path), next_x(run, lease)
    for wrong in (dict(x), run.pull("y")[0]):
        with pytest.raises(FreestepError, match="is of x of the run"):
            best(wrong, 0.5)  # type: ignore[arg-type]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            best(x, value)
    assert not path.exists() and not run.status().metrics


def test_a_file_that_cannot_be_written_stays(run: Run, lease: HeldLease, path: Path) -> None:
    best = run.keep_best("accuracy", path.parent / "none" / "best")
    with pytest.raises(FileNotFoundError):
        best(next_x(run, lease), 0.5)
    assert best.value is None
    best.path.parent.mkdir()
    # The report counts once, and the file is written after all.
    assert best(run.pull("x")[0], 0.5)


def test_a_file_of_an_earlier_run_of_this_name_is_refused(run: Run, lease: HeldLease, path: Path) -> None:
    run.keep_best("accuracy", path)(next_x(run, lease), 0.9)
    before = path.read_bytes()
    run.delete()
    run.create(SPEC)
    run.initialize(weights(0.0))
    best = run.keep_best("accuracy", path)
    with pytest.raises(FreestepError, match="an earlier run of this name"):
        best(run.pull("x")[0], 0.95)
    assert path.read_bytes() == before
    assert run.status().metrics == {}
