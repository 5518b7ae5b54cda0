"""A Trainer in a process of its own, alone or as a rank of several: test_trainer_processes.py starts them.

python trainer_process.py URL RUN FOLDER

It trains for 4 steps, resumes from its checkpoint with another Trainer for 2 more, and leaves in FOLDER the model and
what it has seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from freestep.integrations.transformers import FreestepCallback, remote_optimizer
from tiny_models import texts, tiny_gpt

url, run, folder = sys.argv[1:]
torch.set_num_threads(1)


def trained(max_steps: int, **options: Any) -> Trainer:
    args = TrainingArguments(
        folder,
        learning_rate=0.02,
        weight_decay=0.1,
        adam_epsilon=1e-3,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_grad_norm=0.3,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny_gpt(),
        args,
        train_dataset=texts(),
        eval_dataset=texts(8, seed=1),
        optimizer_cls_and_kwargs=remote_optimizer(args, url=url, run=run, aggregation="async"),
        callbacks=[FreestepCallback()],
    )
    trainer.train(**options)
    return trainer


first = trained(4)
first.optimizer.optimizer.close()
trainer = trained(6, resume_from_checkpoint=True)
trainer.save_model()
rank = trainer.args.process_index
torch.save(trainer.model.state_dict(), Path(folder, f"model.{rank}.pt"))
seen = {
    "receipt": trainer.optimizer.optimizer.receipt.model_dump(),
    "worker": trainer.optimizer.optimizer.worker,
    **{
        name: [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in ("loss", "eval_loss", "learning_rate")
    },
}
Path(folder, f"seen.{rank}.json").write_text(json.dumps(seen))
trainer.optimizer.optimizer.close()
if dist.is_initialized():
    dist.destroy_process_group()
