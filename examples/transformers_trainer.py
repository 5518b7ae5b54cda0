"""Hugging Face's Trainer as a worker: start `freestep serve`, and then this as often as you like.

    python examples/transformers_trainer.py

needs the `integrations` extra. A small language model, made here, learns to count in words of three letters.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from freestep.integrations.transformers import FreestepCallback, remote_optimizer

torch.set_num_threads(1)


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    begin = torch.randint(0, 26, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (begin + torch.arange(12).repeat_interleave(3)[:24]) % 26
    return [{"input_ids": each, "labels": each} for each in tokens]


model = GPT2LMHeadModel(
    GPT2Config(vocab_size=26, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
args = TrainingArguments(
    "demo-out/trainer",
    learning_rate=0.01,
    weight_decay=0.1,
    warmup_steps=20,
    max_steps=200,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    eval_strategy="steps",
    save_strategy="steps",
    eval_steps=50,
    save_steps=50,
    save_total_limit=2,
    load_best_model_at_end=True,
    logging_steps=50,
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    args,
    train_dataset=texts(512, seed=0),
    eval_dataset=texts(64, seed=1),
    optimizer_cls_and_kwargs=remote_optimizer(args, run="trainer"),
    callbacks=[FreestepCallback()],
)
trainer.train()
trainer.save_model("demo-out/trainer/best")  # x of the best evaluation

predicted = trainer.predict(texts(64, seed=2))
hits = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
print(f"the best x predicts {hits.mean():.1%} of the next letters")
