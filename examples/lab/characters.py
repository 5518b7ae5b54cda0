"""A character-level language model: its text, which Python itself ships, and a small transformer."""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Text", "Transformer"]

_AT_ONCE = 64
"""Windows that a loss is computed of at a time, when it is of many."""


class Text:
    """The language reference that `help()` shows, some 400,000 characters; its last tenth is for validation.

    A paragraph that stands in several topics is kept once, so that none is in both parts.
    """

    def __init__(self, length: int) -> None:
        """length: characters of a window, each of which is predicted from those before it."""
        topics = pydoc_data.topics.topics
        paragraphs = dict.fromkeys(each for topic in sorted(topics) for each in topics[topic].split("\n\n"))
        text = "\n\n".join(paragraphs)
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        characters = torch.tensor([alphabet[character] for character in text])
        split = len(characters) * 9 // 10
        self.alphabet, self.length = len(alphabet), length
        self.train, self.validation = characters[:split], characters[split:]

    def batch(self, size: int, number: int) -> Tensor:
        """Random windows to train on, [size, length + 1], always the same of one number."""
        generator = torch.Generator().manual_seed(number)
        return self._windows(self.train, torch.randint(len(self.train) - self.length, (size,), generator=generator))

    def validation_windows(self, most: int) -> Tensor:
        """Windows of the validation's text, side by side, at most so many; [n, length + 1]."""
        begins = torch.arange(0, len(self.validation) - self.length, self.length)
        return self._windows(self.validation, begins[:most])

    def _windows(self, characters: Tensor, begins: Tensor) -> Tensor:
        return characters[begins[:, None] + torch.arange(self.length + 1)]


class Transformer(nn.Module):
    """Characters [n, length] to logits [n, length, alphabet]."""

    def __init__(self, alphabet: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.logits = nn.Linear(width, alphabet)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        inputs = self.characters(characters) + self.places
        logits: Tensor = self.logits(self.layers(inputs, mask=self.mask, is_causal=True))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """The mean over characters, in nats."""
        return cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def mean_loss(self, windows: Tensor) -> float:
        """The same over many windows."""
        losses = [(float(self.loss(part)), len(part)) for part in torch.split(windows, _AT_ONCE)]
        return sum(loss * size for loss, size in losses) / len(windows)
