"""Hugging Face's Trainer on data that counts once: start `freestep serve`, and then this as often as you like.

    python examples/transformers_units.py

needs the `integrations` extra. All of them together train on each text three times, whichever you kill.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import freestep
from freestep.integrations.transformers import FreestepCallback, remote_optimizer

torch.set_num_threads(1)


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    begin = torch.randint(0, 26, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (begin + torch.arange(12).repeat_interleave(3)[:24]) % 26
    return [{"input_ids": each, "labels": each} for each in tokens]


class UnitsTrainer(Trainer):
    def get_train_dataloader(self) -> Any:
        # Trainer makes its optimizer later; it keeps the one that it has made.
        units = freestep.Units(self.create_optimizer(), len(self.train_dataset), unit=16, passes=3)
        return units.loader(self.train_dataset, batch_size=16, collate_fn=self.data_collator)


model = GPT2LMHeadModel(
    GPT2Config(vocab_size=26, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
args = TrainingArguments(
    "demo-out/trainer-units",
    learning_rate=0.01,
    warmup_steps=20,
    max_steps=1_000_000,  # Trainer wants a number: more than there are
    per_device_eval_batch_size=64,
    save_strategy="no",
    logging_steps=50,
    disable_tqdm=True,
)
trainer = UnitsTrainer(
    model,
    args,
    train_dataset=texts(1024, seed=0),
    optimizer_cls_and_kwargs=remote_optimizer(args, run="trainer-units"),
    callbacks=[FreestepCallback()],
)
trainer.train()

predicted = trainer.predict(texts(64, seed=2))  # by x
hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
print(f"x predicts {hits.mean():.1%} of the next letters after {trainer.state.global_step} steps of this worker")
