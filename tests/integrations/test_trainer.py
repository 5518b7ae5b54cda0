"""Trainer of the transformers library, as its documentation has it used, with a RemoteOptimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from freestep import FreestepError, InvalidSpec, RemoteOptimizer, Run
from freestep.integrations.transformers import FreestepCallback, remote_optimizer
from harness import ThreadService
from integrations.trainers import (
    TOLERANCE,
    Arguments,
    Each,
    Train,
    assert_equal,
    logged,
    optimizer_of,
    said,
    saved,
    stop_at,
    weights,
    x_of,
)
from tiny_models import Regression, numbers, texts, tiny_gpt

OF_TORCH_COMPILE = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
"""What it warns of while it traces transformers."""


# What is trained


def test_groups_are_trainers_own_and_names_the_models(trainer: Train, arguments: Arguments, run: Run) -> None:
    model = tiny_gpt()
    own = Trainer(model, arguments()).create_optimizer()
    made = trainer(model)
    made.create_optimizer()
    groups = optimizer_of(made).param_groups
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    for mine, its in zip(groups, own.param_groups, strict=True):
        assert [id(each) for each in mine["params"]] == [id(each) for each in its["params"]]
        assert mine["weight_decay"] == its["weight_decay"]
    spec = run.status().spec
    assert {each.name for each in spec.parameters} == set(weights(model))
    decays = {group: spec.hyperparameters(group).weight_decay for group in spec.groups}  # type: ignore[union-attr]
    assert decays == {"decay": 0.1, "no_decay": 0.0}


def test_hyperparameters_that_are_not_given_are_trainers(trainer: Train, run: Run) -> None:
    made = trainer(adam_beta2=0.9, adam_epsilon=1e-6, warmup_steps=0.5, options={"lr": 0.3})
    made.create_optimizer()
    optimizer = run.status().spec.optimizer.model_dump()
    assert {name: optimizer[name] for name in ("algorithm", "lr", "betas", "eps", "weight_decay", "warmup_steps")} == {
        "algorithm": "adamw_schedule_free",
        "lr": 0.3,
        "betas": (0.9, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "warmup_steps": 3,
    }


def test_algorithms_take_what_they_have(trainer: Train, run: Run) -> None:
    made = trainer(options={"algorithm": "schedule_free_wrapper", "base": {"algorithm": "adamw", "lr": 0.1}})
    made.create_optimizer()
    spec = run.status().spec
    decays = [spec.hyperparameters(group).base.weight_decay for group in ("decay", "no_decay")]  # type: ignore[union-attr]
    assert decays == [0.01, 0.0]


def test_a_warmup_of_unknown_length_is_refused(arguments: Arguments) -> None:
    with pytest.raises(FreestepError, match="give the number of steps"):
        remote_optimizer(arguments(max_steps=-1, warmup_steps=0.1), run="any")
    assert (
        remote_optimizer(arguments(max_steps=-1, warmup_steps=0.1), run="any", warmup_steps=7)[1]["warmup_steps"] == 7
    )


def test_divided_parameters_are_refused(arguments: Arguments) -> None:
    with pytest.raises(FreestepError, match="divide parameters between ranks"):
        remote_optimizer(arguments(fsdp=True), run="any")


@pytest.mark.parametrize("wrong", [{"algorithm": "adamw_schedulefree"}, {"lrr": 0.1}])
def test_unknown_names_are_refused(trainer: Train, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="did you mean"):
        trainer(options=wrong).create_optimizer()


@OF_TORCH_COMPILE
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "warmup_steps": 4},
        {"max_grad_norm": 0.05, "per_device_train_batch_size": 3},
        {"bf16": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation and warmup", "clipping", "bf16", "torch.compile"],
)
def test_it_trains_as_trainers_own_schedule_free_optimizer(
    trainer: Train, arguments: Arguments, run: Run, options: dict[str, Any]
) -> None:
    # The gradient of the keys' bias is 0, but for rounding, which a small epsilon would make steps of.
    options = {"eval_strategy": "steps", "eval_steps": 2, "adam_epsilon": 1e-3, **options}
    args = arguments(optim="schedule_free_adamw", lr_scheduler_type="constant", **options)
    peer = Trainer(tiny_gpt(), args, train_dataset=texts(), eval_dataset=texts(8, seed=1))
    peer.train()
    made = trainer(**options)
    made.train()
    for what in ("loss", "eval_loss", "grad_norm"):
        assert len(logged(made, what)) >= 3
        assert logged(made, what) == pytest.approx(logged(peer, what), rel=1e-2 if "bf16" in options else 1e-4)
    peer.optimizer.eval()  # type: ignore[union-attr]
    x = x_of(run)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if "bf16" in options else TOLERANCE
    for name, tensor in weights(peer.model).items():  # type: ignore[arg-type]
        torch.testing.assert_close(x[name], tensor, **tolerance)
    assert run.status().step == 6


def test_a_model_in_bf16_trains(trainer: Train, run: Run) -> None:
    made = trainer(tiny_gpt().to(torch.bfloat16))
    made.train()
    assert run.status().step == 6
    for name, tensor in weights(made.model).items():  # type: ignore[arg-type]
        assert torch.equal(tensor, x_of(run)[name].to(torch.bfloat16))


# Learning rates and losses


def test_the_logged_rate_is_the_one_that_was_used(trainer: Train, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(warmup_steps=4)
    made.train()
    assert logged(made, "learning_rate") == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])
    assert said(caplog) == []


def test_another_schedule_is_said_to_have_no_effect(trainer: Train, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(lr_scheduler_type="cosine")
    made.train()
    (message,) = said(caplog)
    assert "lr_scheduler_type='cosine' has no effect" in message
    assert logged(made, "learning_rate") == [0.02] * 6


def squares(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    loss = (outputs["logits"] - labels).square().sum() / labels.shape[1]
    return loss / 8


@OF_TORCH_COMPILE
@pytest.mark.parametrize("kind", ["a language model", "a compiled model", "the user's own", "compute_loss_func"])
def test_the_loss_that_is_reported_is_the_one_that_trainer_logs(trainer: Train, run: Run, kind: str) -> None:
    reported: list[Any] = []
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"} if kind == "a compiled model" else {}
    watch = Each("on_pre_optimizer_step", lambda state, control, *, optimizer, **_: reported.append(loss_of(optimizer)))
    callback = FreestepCallback()
    is_text = kind in ("a language model", "a compiled model")
    given: dict[str, Any] = {} if is_text else {"train_dataset": numbers()}
    if kind == "compute_loss_func":
        given["compute_loss_func"] = callback.reporting(squares)
    made = trainer(
        tiny_gpt() if is_text else Regression(),
        callbacks=(callback, watch),
        given=given,
        gradient_accumulation_steps=2,
        **compiled,
    )
    made.train()
    assert len(reported) == 6
    assert reported == pytest.approx(logged(made, "loss"), rel=1e-5)
    assert len(set(reported)) == 6
    assert run.status().loss is not None


def loss_of(optimizer: Any) -> Any:
    return optimizer.optimizer.loss


def test_schedule_free_plus_is_given_its_loss(trainer: Train, run: Run) -> None:
    made = trainer(options={"algorithm": "adamc_schedule_free_plus", "lr": 1.0}, max_steps=12)
    made.train()
    losses = logged(made, "loss")
    assert losses[-1] < losses[0] - 0.1
    assert run.status().step == 12
    assert all(math.isfinite(rate) and rate > 0 for rate in logged(made, "learning_rate"))


def test_schedule_free_plus_without_a_loss_is_told_where_to_get_it(trainer: Train) -> None:
    made = trainer(
        Regression(),
        given={"train_dataset": numbers(), "compute_loss_func": squares},
        options={"algorithm": "adamc_schedule_free_plus"},
    )
    with pytest.raises(FreestepError, match=r"compute_loss_func=callback\.reporting"):
        made.train()


# Other optimizers and places


def test_an_optimizer_of_the_users_own_is_as_good(
    service: ThreadService, name: str, run: Run, arguments: Arguments, tmp_path: Path
) -> None:
    model = tiny_gpt()
    with RemoteOptimizer(model, url=service.url, run=name, lr=0.02) as optimizer:
        made = Trainer(
            model,
            arguments(save_strategy="steps", save_steps=2),
            train_dataset=texts(),
            optimizers=(optimizer, None),
            callbacks=[FreestepCallback()],
        )
        made.train()
        assert_equal(saved(tmp_path / "out" / "checkpoint-6"), x_of(run))
        assert_equal(weights(model), x_of(run))


def test_another_optimizer_is_refused(arguments: Arguments) -> None:
    made = Trainer(tiny_gpt(), arguments(), train_dataset=texts(), callbacks=[FreestepCallback()])
    with pytest.raises(FreestepError, match=r"is AcceleratedOptimizer, .* optimizer_cls_and_kwargs=remote_optimizer"):
        made.train()


def test_a_run_in_this_process_trains_and_resumes(arguments: Arguments) -> None:
    def train(**options: Any) -> Trainer:
        args = arguments(save_strategy="steps", save_steps=2)
        made = Trainer(
            tiny_gpt(),
            args,
            train_dataset=texts(),
            optimizer_cls_and_kwargs=remote_optimizer(args, url="local"),
            callbacks=[FreestepCallback(), stop_at(options.pop("stop", 0))],
        )
        made.train(**options)
        optimizer_of(made).close()
        return made

    whole = weights(train().model)  # type: ignore[arg-type]
    train(stop=4)
    assert_equal(
        weights(train(resume_from_checkpoint=str(Path(arguments().output_dir or "", "checkpoint-4"))).model), whole
    )  # type: ignore[arg-type]


def test_a_plain_worker_joins_the_run_of_a_trainer(trainer: Train, service: ThreadService, name: str, run: Run) -> None:
    trainer().train()
    model = tiny_gpt(3)
    with RemoteOptimizer(model, url=service.url, run=name) as optimizer:
        optimizer.eval()
        assert_equal(weights(model), x_of(run))
