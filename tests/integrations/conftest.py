"""The libraries under test work offline; services and runs are those of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from freestep import FreestepError, RemoteOptimizer
from harness import ThreadService

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from integrations.trainers import Arguments, Train

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def make_module(service: ThreadService, name: str) -> Iterator[Callable[..., Any]]:
    """Makes LightningModules whose optimizers work on one run; these are closed with the test."""
    # Takes seconds to import.
    from lightning_module import Module

    made: list[RemoteOptimizer] = []

    def module(kind: type[Module] = Module, seed: int = 0, **options: Any) -> Module:
        def optimizer(model: torch.nn.Module) -> RemoteOptimizer:
            made.append(RemoteOptimizer(model, url=service.url, run=name, **{"aggregation": "async", **options}))
            return made[-1]

        return kind(optimizer, seed)

    yield module
    for each in made:
        each.close()


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    """Makes arguments for a few short steps."""
    # Takes seconds to import.
    from transformers import TrainingArguments

    def make(**given: Any) -> TrainingArguments:
        ordinary = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**ordinary, **given})

    return make


@pytest.fixture
def trainer(service: ThreadService, name: str, arguments: Arguments) -> Iterator[Train]:
    """Makes trainers of the run; their optimizers are closed with the test."""
    from transformers import Trainer

    from freestep.integrations.transformers import FreestepCallback, remote_optimizer
    from integrations.trainers import optimizer_of
    from tiny_models import texts, tiny_gpt

    made: list[Trainer] = []

    def make(
        model: nn.Module | None = None,
        *,
        callbacks: tuple[TrainerCallback, ...] | None = None,
        options: Mapping[str, Any] | None = None,
        given: Mapping[str, Any] | None = None,
        **changed: Any,
    ) -> Trainer:
        args = arguments(**changed)
        made.append(
            Trainer(
                model or tiny_gpt(),
                args,
                **{"train_dataset": texts(), "eval_dataset": texts(8, seed=1), **(given or {})},
                optimizer_cls_and_kwargs=remote_optimizer(
                    args, **{"url": service.url, "run": name, "worker": "trainer", **(options or {})}
                ),
                callbacks=[*((FreestepCallback(),) if callbacks is None else callbacks)],
            )
        )
        return made[-1]

    yield make
    for each in made:
        with suppress(FreestepError):
            optimizer_of(each).close()


@pytest.fixture
def other(service: ThreadService, name: str) -> Iterator[Callable[[], None]]:
    """Another worker of the run, which takes a step when it is called."""
    from tiny_models import tiny_gpt

    made: list[RemoteOptimizer] = []
    model = tiny_gpt(5)

    def step() -> None:
        if not made:
            made.append(RemoteOptimizer(model, url=service.url, run=name, worker="other"))
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        made[0].step()
        made[0].zero_grad()

    yield step
    for each in made:
        each.close()
