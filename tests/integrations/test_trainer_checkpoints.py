"""Where Trainer's model contains x and where y: in evaluations, in what is saved, and where training resumes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from freestep import Run, StateMismatch, reestimate_batchnorm
from freestep.integrations.transformers import FreestepCallback
from integrations.trainers import Each, Train, assert_equal, logged, optimizer_of, said, saved, stop_at, weights, x_of
from tiny_models import Regression, numbers, texts, tiny_gpt


def test_metrics_are_those_of_x(trainer: Train, run: Run) -> None:
    seen = []
    watch = Each("on_evaluate", lambda state, control, **_: seen.append(x_of(run)))
    made = trainer(callbacks=(FreestepCallback(), watch), eval_strategy="steps", eval_steps=2)
    made.train()
    for x, loss in zip(seen, logged(made, "eval_loss"), strict=True):
        model = tiny_gpt()
        model.load_state_dict(x, strict=False)
        batch = {name: torch.stack([each[name] for each in texts(8, seed=1)]) for name in ("input_ids", "labels")}
        assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-4)
    assert len(seen) == 3


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_checkpoints_contain_x_and_training_goes_on_at_y(trainer: Train, run: Run, strategy: str) -> None:
    seen = {}
    watch = Each("on_save", lambda state, control, **_: seen.update({state.global_step: x_of(run)}))
    options = {"max_steps": 16, "save_steps": 3, "save_strategy": strategy}
    made = trainer(callbacks=(FreestepCallback(), watch), **options)
    made.train()
    assert sorted(seen) == ([3, 6, 9, 12, 15, 16] if strategy == "steps" else [8, 16])
    for step, x in seen.items():
        assert_equal(saved(Path(made.args.output_dir or "", f"checkpoint-{step}")), x)
    last = x_of(run)
    run.delete()
    optimizer_of(made).close()
    # The same without checkpoints.
    trainer(**{**options, "save_strategy": "no"}).train()
    assert_equal(x_of(run), last)


def test_the_final_model_is_x_and_stays_what_it_is(
    trainer: Train, run: Run, other: Callable[[], None], tmp_path: Path
) -> None:
    made = trainer()
    made.train()
    x = x_of(run)
    other()
    loss = made.evaluate()["eval_loss"]
    other()
    assert made.evaluate()["eval_loss"] == loss
    made.save_model(str(tmp_path / "final"))
    assert_equal(saved(tmp_path / "final"), x)
    assert not torch.equal(x_of(run)["transformer.wte.weight"], x["transformer.wte.weight"])
    # Trained again, it goes on with the run.
    made.train()
    assert run.status().step == 14
    assert_equal(weights(made.model), x_of(run))  # type: ignore[arg-type]


def test_what_was_evaluated_is_what_is_saved_and_best(
    trainer: Train, run: Run, other: Callable[[], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others push between two evaluations and the checkpoint, and after the training."""
    scored = []

    def push(state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        scored.append(weights(model))
        other()

    made = trainer(
        callbacks=(FreestepCallback(), Each("on_evaluate", push)),
        given={"eval_dataset": {"one": texts(8, seed=1), "two": texts(8, seed=2)}},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="one_loss",
        # The first is the best.
        greater_is_better=True,
    )
    made.train()
    assert len(scored) == 6
    for number, step in enumerate((2, 4, 6)):
        assert_equal(scored[2 * number], scored[2 * number + 1])
        assert_equal(saved(Path(made.args.output_dir or "", f"checkpoint-{step}")), scored[2 * number])
    assert made.state.best_model_checkpoint == str(Path(made.args.output_dir or "", "checkpoint-2"))
    assert_equal(weights(made.model), scored[0])  # type: ignore[arg-type]
    other()
    assert made.evaluate()["eval_one_loss"] == pytest.approx(made.state.best_metric)
    made.save_model(str(tmp_path / "final"))
    assert_equal(saved(tmp_path / "final"), scored[0])
    # Trained again, the first gradient is taken at the run's y.
    made.train()
    assert said(caplog) == []


def test_a_checkpoint_that_a_later_callback_asks_for_is_said_to_contain_y(
    trainer: Train, caplog: pytest.LogCaptureFixture
) -> None:
    def save(state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 2

    trainer(callbacks=(Each("on_step_end", save), FreestepCallback())).train()
    assert said(caplog) == []
    trainer(callbacks=(FreestepCallback(), Each("on_step_end", save))).train()
    assert caplog.text.count("the model's weights were taken while they are y of step 8, not x") == 1


def test_a_model_that_trains_can_be_copied_and_sent_and_its_copies_are_nobodys(
    trainer: Train, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[Any] = []

    def copy_model(state: Any, control: Any, **kwargs: Any) -> None:
        copies.extend([copy.deepcopy(kwargs["model"]), pickle.loads(pickle.dumps(kwargs["model"]))])

    trainer(callbacks=(FreestepCallback(), Each("on_step_begin", copy_model))).train()
    assert len(copies) == 12
    for each in copies:
        each.state_dict()
    assert said(caplog) == []


def test_weights_that_are_saved_after_a_training_was_broken_off_are_said_to_be_y(
    trainer: Train, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def interrupt(state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    made = trainer(callbacks=(FreestepCallback(), Each("on_step_end", interrupt)))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert said(caplog) == []
    made.save_model(str(tmp_path / "y"))
    assert "taken while they are y of step 3, not x: after a training that was broken off" in caplog.text
    caplog.clear()
    made.optimizer.eval()  # type: ignore[union-attr]
    x = weights(made.model)  # type: ignore[arg-type]
    made.save_model(str(tmp_path / "x"))
    assert said(caplog) == []
    assert_equal(saved(tmp_path / "x"), x)


def test_jit_checkpoints_are_said_to_contain_y(trainer: Train, caplog: pytest.LogCaptureFixture) -> None:
    trainer(enable_jit_checkpoint=True).train()
    assert "JIT checkpoints contain y" in caplog.text


@pytest.mark.parametrize("estimates", [False, True])
def test_statistics_of_batchnorm_that_nobody_has_estimated_are_warned_about_once(
    trainer: Train, caplog: pytest.LogCaptureFixture, estimates: bool
) -> None:
    model = Regression()
    model.layers[1] = nn.BatchNorm1d(8)
    examples = numbers()
    made = trainer(
        model,
        given={"train_dataset": examples, "eval_dataset": examples},
        eval_strategy="steps",
        eval_steps=2,
    )
    if estimates:
        evaluate, batch = made.evaluate, torch.stack([each["inputs"] for each in examples])

        def at_x(*args: Any, **kwargs: Any) -> dict[str, float]:
            made.optimizer.eval()  # type: ignore[union-attr]
            reestimate_batchnorm(model, [batch])
            return evaluate(*args, **kwargs)

        made.evaluate = at_x  # type: ignore[method-assign]
    made.train()
    assert len([each for each in said(caplog) if "reestimate_batchnorm" in each]) == (0 if estimates else 1)


def interrupted(trainer: Train, **options: Any) -> Trainer:
    """Trained for 4 of 6 steps, with checkpoints, and closed."""
    made = trainer(callbacks=(FreestepCallback(), stop_at(4)), save_strategy="steps", save_steps=2, **options)
    made.train()
    optimizer_of(made).close()
    return made


def test_where_the_run_lives_training_resumes_as_if_it_had_not_stopped(trainer: Train, run: Run) -> None:
    made = trainer()
    made.train()
    whole, losses = x_of(run), logged(made, "loss")
    optimizer_of(made).close()
    run.delete()
    interrupted(trainer)
    resumed = trainer(tiny_gpt(3), save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert (run.status().step, resumed.state.global_step) == (6, 6)
    assert logged(resumed, "loss") == losses
    assert_equal(x_of(run), whole)
    assert optimizer_of(resumed).worker == "trainer"


def test_where_the_run_is_gone_resuming_says_what_can_be_done(trainer: Train, run: Run) -> None:
    interrupted(trainer)
    run.delete()
    with pytest.raises(StateMismatch, match='on_missing="seed"'):
        trainer(tiny_gpt(3)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("on_missing", ["seed", "join"])
def test_where_the_run_is_gone_it_begins_anew_at_the_checkpoints_x(trainer: Train, run: Run, on_missing: str) -> None:
    made = interrupted(trainer)
    run.delete()
    seen = []
    watch = Each("on_train_begin", lambda state, control, **_: seen.append(x_of(run)))
    resumed = trainer(
        tiny_gpt(3), callbacks=(FreestepCallback(), watch), options={"on_missing": on_missing}, save_strategy="no"
    )
    resumed.train(resume_from_checkpoint=True)
    assert_equal(seen[0], saved(Path(made.args.output_dir or "", "checkpoint-4")))
    assert (run.status().step, resumed.state.global_step) == (2, 6)
