"""Trainers in processes of their own: two workers of one run, and the ranks of torchrun as one worker."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from forked import Script
from freestep import Run
from harness import ThreadService
from ranks import run_ranks
from tiny_models import texts, tiny_gpt

pytestmark = pytest.mark.slow

PROCESS = Path(__file__).with_name("trainer_process.py")


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / f"seen.{rank}.json").read_text()))


def model(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / f"model.{rank}.pt"))


def test_two_trainers_train_one_run(service: ThreadService, name: str, run: Run, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    with ExitStack() as stack:
        scripts = [stack.enter_context(Script(PROCESS, service.url, name, str(folder))) for folder in folders]
        assert [script.wait() for script in scripts] == [0, 0]
    status = run.status()
    assert (status.step, status.pushes["applied"], status.pushes["dropped"]) == (12, 12, 0)
    assert len({seen(folder)["worker"] for folder in folders}) == 2
    steps = [seen(folder)["receipt"]["step"] for folder in folders]
    assert max(steps) == 12
    # Whoever pushed last has the run's x.
    last = folders[steps.index(12)]
    x, _ = run.pull("x")
    saved = GPT2LMHeadModel.from_pretrained(last).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in x.items())


def test_the_ranks_of_torchrun_are_one_worker(service: ThreadService, name: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run_ranks(PROCESS, service.url, name, str(folder), called=["RANK", "LOCAL_RANK"], **sizes)
    status = run.status()
    assert (status.step, status.pushes["applied"], status.pushes["dropped"]) == (6, 6, 0)
    one, other = seen(folder, 0), seen(folder, 1)
    assert (one["worker"], one["receipt"]) == (other["worker"], other["receipt"])
    x, _ = run.pull("x")
    saved = GPT2LMHeadModel.from_pretrained(folder / "checkpoint-6").state_dict()
    for held in (model(folder, 0), model(folder, 1), saved):
        assert all(torch.equal(held[name], tensor) for name, tensor in x.items())

    # One process with the whole batches, and the package's optimizer.
    args = TrainingArguments(
        str(tmp_path / "peer"),
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        learning_rate=0.02,
        weight_decay=0.1,
        adam_epsilon=1e-3,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        max_grad_norm=0.3,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    peer = Trainer(tiny_gpt(), args, train_dataset=texts(), eval_dataset=texts(8, seed=1))
    peer.train()
    for what in ("loss", "eval_loss"):
        logged = [entry[what] for entry in peer.state.log_history if what in entry]
        assert one[what] == pytest.approx(logged, rel=1e-3)
    assert status.loss is not None
    peer.optimizer.eval()  # type: ignore[union-attr]
    for key, tensor in peer.model.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(x[key], tensor.detach(), rtol=1e-3, atol=1e-5)
