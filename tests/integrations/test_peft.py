"""Adapters of the PEFT library: the run has them alone, in loops and under Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from freestep import ManifestMismatch, RemoteOptimizer, Run
from freestep.integrations.transformers import FreestepCallback, remote_optimizer
from harness import ThreadService
from tiny_models import texts, tiny_gpt

# PEFT's own, of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(bias: str = "none") -> Any:
    model = tiny_gpt()
    torch.manual_seed(0)
    return get_peft_model(
        model,
        LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, bias=bias, task_type="CAUSAL_LM"),
    )


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_" in name}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_has_the_adapters_alone(service: ThreadService, name: str, run: Run) -> None:
    model = adapted()
    base = frozen(model)
    batch = {key: torch.stack([each[key] for each in texts(8)]) for key in ("input_ids", "labels")}
    with RemoteOptimizer(model, url=service.url, run=name, lr=0.05) as optimizer:
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step(loss=loss.detach())
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert {each.name for each in run.status().spec.parameters} == adapters(model).keys()
        assert_equal(frozen(model), base)
        optimizer.eval()
        # Merged for evaluation, and taken apart again.
        model.merge_adapter()
        model.unmerge_adapter()
        optimizer.train()
        model.get_base_model().transformer.wte.weight.requires_grad_(True)
        model(**batch).loss.backward()
        with pytest.raises(ManifestMismatch, match="was frozen when the optimizer was created"):
            optimizer.step()


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_trainer_saves_adapters_at_x_and_resumes(
    service: ThreadService, name: str, run: Run, tmp_path: Path, bias: str
) -> None:
    def trainer(**options: Any) -> Trainer:
        often = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        # The first evaluation is the best.
        best = {"metric_for_best_model": "loss", "greater_is_better": True}
        quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "label_names": ["labels"]}
        args = TrainingArguments(str(tmp_path), learning_rate=0.05, **often, **best, **quiet, **options)
        return Trainer(
            adapted(bias),
            args,
            train_dataset=texts(),
            eval_dataset=texts(8, seed=1),
            optimizer_cls_and_kwargs=remote_optimizer(args, url=service.url, run=name, worker="trainer"),
            callbacks=[FreestepCallback()],
        )

    first = trainer(max_steps=4)
    first.train()
    x, _ = run.pull("x")
    assert_equal(adapters(PeftModel.from_pretrained(tiny_gpt(), tmp_path / "checkpoint-4")), adapters_of(x))
    assert_equal(adapters(first.model), adapters_of(x))  # type: ignore[arg-type]
    first.optimizer.optimizer.close()  # type: ignore[union-attr]

    resumed = trainer(max_steps=8, load_best_model_at_end=True)
    resumed.train(resume_from_checkpoint=True)
    assert run.status().step == 8
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    expected = adapters(PeftModel.from_pretrained(tiny_gpt(), tmp_path / "checkpoint-2"))
    assert_equal(adapters(resumed.model), expected)  # type: ignore[arg-type]
    assert resumed.evaluate()["eval_loss"] == pytest.approx(resumed.state.best_metric)
    assert_equal(adapters(resumed.model), expected)  # type: ignore[arg-type]
    resumed.optimizer.optimizer.close()  # type: ignore[union-attr]


def adapters_of(point: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in point.items() if "lora_" in name}
