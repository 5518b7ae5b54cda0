"""Models of the transformers library that train in no time, and what they are trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["Regression", "numbers", "texts", "tiny_gpt"]


def tiny_gpt(seed: int = 0) -> GPT2LMHeadModel:
    """A language model with tied weights, biases and norms, and without dropout."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 24, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


def texts(count: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences that count up from a random token; some labels are left out, so that batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, 16, (count,), generator=generator)
    tokens = begin[:, None] + torch.arange(8)
    labels = tokens.where(torch.rand(count, 8, generator=generator) < 0.7, -100)
    # The first token is predicted by nothing, but Trainer would count it.
    labels[:, 0] = -100
    return [{"input_ids": each, "labels": label} for each, label in zip(tokens, labels, strict=True)]


class Regression(nn.Module):
    """A model of the user's own, which knows nothing of Trainer; its loss is the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.layers(inputs)
        return (
            {"logits": outputs} if labels is None else {"loss": (outputs - labels).square().mean(), "logits": outputs}
        )


def numbers(count: int = 32) -> list[dict[str, Tensor]]:
    """What Regression is trained on."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return [{"inputs": each, "labels": each[:2] - each[2:]} for each in inputs]
