"""A run's whole state through the client, files and the command: what goes in is what comes out."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import forked
from freestep import (
    AlreadyInitialized,
    CheckpointNotFound,
    Client,
    EpochChanged,
    InvalidSpec,
    MalformedTensors,
    ManifestMismatch,
    Pulled,
    RemoteOptimizer,
    Run,
    RunExists,
    RunNotInitialized,
    RunSpec,
    RunState,
)
from freestep.api.run_state import StateDocument
from harness import ThreadService
from plain_calls import TENSORS
from trained import network, step

SPEC = {
    "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.1, "weight_decay": 0.1},
    "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()],
}


@pytest.fixture
def other(service: ThreadService) -> Iterator[Run]:
    """A run that there is not yet."""
    with Client(service.url) as client:
        yield client.run(f"run-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def trained(run: Run) -> Run:
    run.create(SPEC)
    run.initialize(TENSORS)
    push(run, 0, 3)
    return run


def push(run: Run, first: int, last: int) -> None:
    with run.lease() as lease:
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            gradient = {name: torch.randn(each.shape, generator=generator) for name, each in TENSORS.items()}
            assert run.push(gradient, lease.claim(number)).step == number + 1


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def equal(state: RunState, other: RunState) -> bool:
    """Whether states are the same, but for their epochs."""
    scalars = StateDocument.model_fields.keys() - {"buffers", "epoch"}
    return (
        all(getattr(state, name) == getattr(other, name) for name in scalars)
        and state.buffers.keys() == other.buffers.keys()
        and all(same(state.buffers[name], other.buffers[name]) for name in state.buffers)
    )


def test_a_state_goes_from_run_to_run(trained: Run, other: Run) -> None:
    state = trained.export_state()
    assert (state.epoch, state.step, list(state.buffers)) == (1, 3, ["y", "z", "exp_avg_sq"])
    assert same(state.buffers["y"], trained.pull("y")[0])
    assert state.scalars["default"]["k"] == 3
    status = other.import_state(state)
    assert (status.step, status.epoch, status.initialized) == (3, 2, True)
    assert equal(other.export_state(), state)
    push(trained, 3, 6)
    push(other, 3, 6)
    assert equal(other.export_state(), trained.export_state())


def test_the_spec_may_be_another_as_far_as_the_state_fits(trained: Run, other: Run) -> None:
    state = trained.export_state()
    state.spec = state.spec.model_copy(update={"shards": 2, "durability": "none"})
    assert (other.import_state(state).shards, other.status().spec.durability) == (2, "none")
    assert same(other.pull("x")[0], trained.pull("x")[0])
    state.spec = RunSpec.model_validate({**SPEC, "parameters": [{"name": "w", "shape": [3]}]})
    with pytest.raises(ManifestMismatch, match="other parameters than its tensors"):
        other.import_state(state, replace=True)


def test_a_state_replaces_what_its_sender_has_seen(trained: Run, other: Run) -> None:
    state = trained.export_state()
    other.import_state(state)
    with pytest.raises(AlreadyInitialized):
        other.import_state(state)
    seen = other.export_state()
    push(other, 3, 4)
    with pytest.raises(EpochChanged) as refused:
        other.import_state(state, replace=True, at=Pulled(seen.epoch, seen.step))
    assert refused.value.extensions["step"] == 4
    assert other.status().step == 4
    assert other.import_state(state, replace=True, at=Pulled(2, 4)).epoch == 3
    assert other.import_state(state, replace=True).epoch == 4
    push(other, 3, 4)


def test_a_worker_goes_on_from_a_state_that_was_replaced(service: ThreadService, run: Run) -> None:
    model = network()
    with RemoteOptimizer(model, url=service.url, run=run.name, algorithm="sgd", lr=0.1) as worker:
        for number in range(3):
            step(model, worker, number)
        state = run.export_state()
        step(model, worker, 3)
        run.import_state(state, replace=True)
        step(model, worker, 4)
        assert worker.receipt is not None and worker.receipt.decision == "dropped"
        step(model, worker, 5)
        assert run.status().step == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        {"algorithm": "sgd_schedule_free", "lr": 0.1},
        {"algorithm": "adamw_schedule_free", "lr": 0.1},
        {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "adagrad", "lr": 0.1}},
        {"algorithm": "gpa_adamw", "lr": 0.1, "weight_decay": 0.0},
        {"algorithm": "adamw", "lr": 0.1, "weight_decay": 0.0, "averaging": {"name": "polyak"}},
    ],
    ids=lambda optimizer: optimizer["algorithm"],
)
def test_a_translated_state_trains_on_as_it_would_have_elsewhere(run: Run, other: Run, optimizer: Any) -> None:
    run.create({**SPEC, "optimizer": optimizer})
    run.initialize(TENSORS)
    push(run, 0, 3)
    state = run.export_state()
    away = {name: torch.full(tensor.shape, 0.75) for name, tensor in TENSORS.items()}
    state.translate(away)
    other.import_state(state)
    push(run, 3, 6)
    push(other, 3, 6)
    for point in ("x", "y"):
        (here, _), (there, _) = run.pull(point), other.pull(point)  # type: ignore[arg-type]
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor + 0.75, rtol=1e-5, atol=1e-5)
    moments = {name: buffer for name, buffer in run.export_state().buffers.items() if name not in "xyz"}
    for name, buffer in moments.items():
        assert same(buffer, other.export_state().buffers[name])
    del away[next(iter(away))]
    with pytest.raises(ManifestMismatch, match="missing"):
        state.translate(away)


def test_states_that_a_run_cannot_take_are_refused(trained: Run, other: Run) -> None:
    state = trained.export_state()
    other.create({**SPEC, "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.2}})
    with pytest.raises(RunNotInitialized):
        other.export_state()
    with pytest.raises(RunExists):
        other.import_state(state)
    assert other.status().initialized is False


def test_a_file_holds_the_state_to_the_bit(trained: Run, other: Run, tmp_path: Path) -> None:
    state = trained.export_state()
    file = tmp_path / "run.safetensors"
    file.write_text("something else")
    state.save(file)
    assert [each.name for each in tmp_path.iterdir()] == ["run.safetensors"]
    read = RunState.load(file)
    assert equal(read, state)
    assert read.epoch == state.epoch
    assert torch.equal(safetensors.torch.load_file(file)["w::z"], state.buffers["z"]["w"])
    other.import_state(read)
    assert equal(other.export_state(), state)
    assert equal(RunState.load(str(file)), state)


def test_a_state_may_come_through_a_pipe(trained: Run, tmp_path: Path) -> None:
    state, file, pipe = trained.export_state(), tmp_path / "file", tmp_path / "pipe"
    state.save(file)
    whole = file.read_bytes()
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as writers:
        writers.submit(pipe.write_bytes, whole)
        assert equal(RunState.load(pipe), state)
        writers.submit(pipe.write_bytes, whole[:-1])
        with pytest.raises(MalformedTensors):
            RunState.load(pipe)


def test_a_state_is_made_of_its_parts(trained: Run, other: Run) -> None:
    state = trained.export_state()
    made = RunState(state.spec, state.step, state.buffers, state.scalars, metrics={"loss": {2: 0.5}})
    # Copied: the parts may be changed afterwards.
    state.buffers["y"]["w"].zero_()
    other.import_state(made)
    assert same(other.pull("y")[0], trained.pull("y")[0])
    assert other.status().metrics["loss"].value == 0.5
    with pytest.raises(ManifestMismatch, match="'b' is missing"):
        RunState(state.spec, 3, {"y": {"w": TENSORS["w"]}}, state.scalars)


def test_files_that_are_no_states_are_refused(trained: Run, tmp_path: Path) -> None:
    state = trained.export_state()
    file = tmp_path / "file"
    state.save(file)
    whole = file.read_bytes()
    for content in (b"", whole[:50], whole[:-1], whole + b"\0", safetensors.torch.save(TENSORS), b"x" * 1000):
        file.write_bytes(content)
        with pytest.raises(MalformedTensors):
            RunState.load(file)
    file.write_bytes(whole.replace(b"adamw_schedule_free", b"adamx_schedule_free"))
    with pytest.raises(InvalidSpec, match=r"optimizer\.algorithm"):
        RunState.load(file)
    with pytest.raises(FileNotFoundError):
        RunState.load(tmp_path / "none")
    with pytest.raises(MalformedTensors, match="ends before"):
        RunState.read_from(io.BytesIO(whole[:-8]), len(whole))


def test_a_file_that_cannot_be_written_leaves_nothing(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        trained.export_state().save(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_state_of_several_shards_goes_into_one(
    shared_nodes: Callable[..., list[ThreadService]], other: Run, run: Run
) -> None:
    node = shared_nodes(2)[1]
    with Client(node.url) as client:
        spread = client.run(run.name)
        spread.create({**SPEC, "shards": 2})
        spread.initialize(TENSORS)
        push(spread, 0, 3)
        state = spread.export_state()
        state.spec = state.spec.model_copy(update={"shards": 1})
        other.import_state(state)
        again = client.run(f"{run.name}-again")
        assert again.import_state(other.export_state()).shards == 1
        push(spread, 3, 5)
        push(other, 3, 5)
        assert same(spread.pull("x")[0], other.pull("x")[0])
        again.delete()
        spread.delete()


def test_a_new_run_goes_on_from_a_checkpoint_of_another(trained: Run, other: Run) -> None:
    before = trained.export_state()
    assert trained.checkpoint().step == 3
    push(trained, 3, 5)
    state = trained.export_state(checkpoint=3)
    assert equal(state, before)
    other.import_state(state)
    push(other, 3, 5)
    assert same(other.pull("x")[0], trained.pull("x")[0])
    with pytest.raises(CheckpointNotFound):
        trained.export_state(checkpoint=4)


@pytest.mark.slow
def test_the_command_moves_a_run(service: ThreadService, trained: Run, other: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"

    def freestep(*arguments: str) -> tuple[int, str, str]:
        done = forked.freestep(*arguments, FREESTEP_URL=service.url, COLUMNS="200")
        return done.returncode, done.stdout, done.stderr

    code, said, _ = freestep("runs", "export", trained.name, str(file))
    assert (code, said) == (0, f"the state of {trained.name} at step 3 is in {file}\n")
    assert equal(RunState.load(file), trained.export_state())
    code, said, _ = freestep("runs", "import", other.name, str(file))
    assert code == 0 and "3" in said
    assert equal(other.export_state(), trained.export_state())
    code, _, error = freestep("runs", "import", other.name, str(file))
    assert (code, "already has its parameters: --replace" in error) == (1, True)
    assert freestep("runs", "import", other.name, str(file), "--replace", "--json")[0] == 0
    assert other.status().epoch == 3
    assert freestep("runs", "import", other.name, str(tmp_path / "none"))[0] == 2
    file.write_text("nothing")
    code, _, error = freestep("runs", "import", other.name, str(file), "--replace")
    assert (code, "holds no state" in error) == (2, True)
    assert freestep("runs", "export", trained.name, str(tmp_path / "no" / "folder"))[0] == 2
    assert freestep("runs", "export", "nowhere", str(file))[0] == 1
    before = trained.export_state()
    trained.checkpoint()
    push(trained, 3, 4)
    code, said, _ = freestep("runs", "export", trained.name, str(file), "--checkpoint", "3")
    assert (code, said) == (0, f"the state of {trained.name} at step 3 is in {file}\n")
    assert equal(RunState.load(file), before)
    code, _, error = freestep("runs", "export", trained.name, str(file), "--checkpoint", "2")
    assert (code, "there is no checkpoint of step 2" in error) == (1, True)


@pytest.mark.slow
def test_the_command_pipes_a_state(service: ThreadService, trained: Run, other: Run, tmp_path: Path) -> None:
    streams = [tmp_path / name for name in ("empty", "state", "errors")]
    for stream in streams:
        stream.touch()
    exporting = forked.start("runs", "export", trained.name, "-", streams=streams, FREESTEP_URL=service.url)
    assert forked.join(exporting) == 0
    said = [tmp_path / "state", tmp_path / "said", tmp_path / "errors"]
    said[1].touch()
    importing = forked.start("runs", "import", other.name, "-", streams=said, FREESTEP_URL=service.url)
    assert forked.join(importing) == 0
    assert equal(other.export_state(), trained.export_state())
