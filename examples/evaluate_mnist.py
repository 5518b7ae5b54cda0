"""An evaluator: start `freestep serve`, examples/train_mnist.py, and this beside them.

    python examples/evaluate_mnist.py

It reports the accuracy of x, keeps the best x in best.safetensors, and ends when x is good enough. With the same
function, and without an end:

    freestep evaluate mnist examples/evaluate_mnist.py:accuracy --every 100 --keep-best accuracy best.safetensors
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

TARGET = 0.95

torch.set_num_threads(1)
digits = load()
model = SmallConvNet()


@torch.no_grad()
def accuracy(x: dict[str, Tensor]) -> float:
    logits = functional_call(model, x, (digits.test_images,))
    return float((logits.argmax(1) == digits.test_labels).float().mean())


if __name__ == "__main__":
    with freestep.Client() as client:
        run = client.run("mnist")
        best = run.keep_best("accuracy", "best.safetensors")
        for step, x in run.watch("x", every=100):
            value = accuracy(x)
            is_kept = best(x, value)
            print(f"step {step}: x has {value:.1%} test accuracy" + ", the best so far" * is_kept)
            if value >= TARGET:
                break
