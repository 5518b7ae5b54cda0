"""Small problems to try rules for stale gradients on: many runs' weights at once, each problem in seconds.

Half of them were there to choose constants by, and half to judge by, as `CHOSEN` and `JUDGED` say. A problem is a
function of flat weights [numel]; runs that differ in learning rate and seed are mapped over (`torch.func.vmap`), so
that what a step costs beside its arithmetic is paid once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, pad, relu

from examples.lab.characters import Text, Transformer
from examples.lab.problems import CLASSES, mnist, small_digits

__all__ = ["CHOSEN", "JUDGED", "PROBLEMS", "Network", "SmallProblem"]


class SmallProblem(ABC):
    """A loss over flat weights, and batches for it.

    rate: a learning rate of SGD that is about right without delay. steps: of a run.
    """

    rate: float
    steps = 1000
    batch_size = 16

    @property
    @abstractmethod
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of the tensors that the weights are."""

    @abstractmethod
    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        """So many random examples, along the first dimension of each tensor."""

    @abstractmethod
    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        """The mean over a batch, [], at weights [numel]."""

    @abstractmethod
    def excess(self, weights: Tensor) -> Tensor:
        """What a run is judged by, [], at weights [numel]: the loss on all data or, where it is known, what a minimum
        has less."""

    def bounds(self) -> Sequence[float]:
        """Weights begin uniformly within these, one for each tensor: as `torch.nn.Linear` has it."""
        return [shape[0] ** -0.5 for shape in self.shapes]

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    def initial(self, seed: int) -> Tensor:
        """Weights to start from, fp32 [numel]."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            (2 * torch.rand(prod(shape), generator=generator) - 1) * bound
            for shape, bound in zip(self.shapes, self.bounds(), strict=True)
        ]
        return torch.cat(parts)

    @cached_property
    def gradients(self) -> Callable[..., Tensor]:
        """(weights [rates, seeds, numel], *batches, each [seeds, size, ...]) -> gradients, as the weights."""
        over_seeds = vmap(grad(self.loss), randomness="error")

        def over_rates(weights: Tensor, *batches: Tensor) -> Tensor:
            found: Tensor = vmap(over_seeds, in_dims=(0, *(None for _ in batches)))(weights, *batches)
            return found

        return over_rates

    @torch.no_grad()
    def judge(self, weights: Tensor) -> Tensor:
        """`excess` of each weights [..., numel]."""
        flat = weights.reshape(-1, self.numel)
        return torch.stack([self.excess(each) for each in flat]).view(weights.shape[:-1])

    def _parts(self, weights: Tensor) -> list[Tensor]:
        pieces = torch.split(weights, [prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


class Logistic(SmallProblem):
    """Multinomial logistic regression on scikit-learn's digits, with a bias for each class, from zeros."""

    rate = 4.0
    shapes = ((65, CLASSES),)

    def __init__(self) -> None:
        digits = small_digits()
        # The bias is the weight of a feature that is always 1.
        self._data = pad(digits.train_images, (0, 1), value=1.0), digits.train_labels

    def bounds(self) -> Sequence[float]:
        return (0.0,)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        return _chosen(self._data, size, generator)

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        inputs, labels = batch
        return cross_entropy(inputs @ self._parts(weights)[0], labels)

    def excess(self, weights: Tensor) -> Tensor:
        return self.loss(weights, *self._data)


class LeastSquares(SmallProblem):
    """Streaming least squares in 50 dimensions, of variances 1 to 0.01, with noise of 0.5 in the targets."""

    rate = 0.5
    shapes = ((50,),)
    batch_size = 8

    def __init__(self) -> None:
        self._variances = torch.logspace(0, -2, 50)
        self._minimum = torch.randn(50, generator=torch.Generator().manual_seed(1))

    def bounds(self) -> Sequence[float]:
        return (0.0,)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        inputs = torch.randn(size, 50, generator=generator) * self._variances.sqrt()
        return inputs, inputs @ self._minimum + 0.5 * torch.randn(size, generator=generator)

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        inputs, targets = batch
        return (inputs @ weights - targets).square().mean() / 2

    def excess(self, weights: Tensor) -> Tensor:
        return ((weights - self._minimum).square() * self._variances).sum() / 2


class Factorization(SmallProblem):
    """A 30 × 30 matrix of rank 4 from entries with noise of 0.1: not convex."""

    rate = 0.25
    shapes = ((30, 4), (30, 4))
    batch_size = 32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        left, right = (torch.randn(30, 4, generator=generator) for _ in range(2))
        self._matrix = left @ right.T / 2

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        rows, columns = (torch.randint(30, (size,), generator=generator) for _ in range(2))
        return rows, columns, self._matrix[rows, columns] + 0.1 * torch.randn(size, generator=generator)

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        left, right = self._parts(weights)
        rows, columns, entries = batch
        # In units in which learning rates of the other problems serve.
        return 3.75 * ((left[rows] * right[columns]).sum(1) - entries).square().mean()

    def excess(self, weights: Tensor) -> Tensor:
        left, right = self._parts(weights)
        return (left @ right.T - self._matrix).square().mean()

    def bounds(self) -> Sequence[float]:
        return (0.5, 0.5)


class _Language(SmallProblem):
    """The next character of the text of `characters.Text`."""

    steps = 400
    batch_size = 8

    def __init__(self) -> None:
        self._text = Text(length=12)
        self._all = self._text.validation_windows(256)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        number = int(torch.randint(2**31, (), generator=generator))
        return (self._text.batch(size, number),)

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        (windows,) = batch
        return cross_entropy(self._logits(weights, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def excess(self, weights: Tensor) -> Tensor:
        return self.loss(weights, self._all)

    @abstractmethod
    def _logits(self, weights: Tensor, characters: Tensor) -> Tensor:
        """[n, length, alphabet] of characters [n, length]."""


class Recurrent(_Language):
    """A recurrent network of 32 units."""

    rate = 1.0

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return ((self._text.alphabet, 32), (32, 32), (32,), (32, self._text.alphabet))

    def bounds(self) -> Sequence[float]:
        return (0.5, 32**-0.5, 0.0, 32**-0.5)

    def _logits(self, weights: Tensor, characters: Tensor) -> Tensor:
        embedding, recurrence, bias, out = self._parts(weights)
        inputs, states = embedding[characters] + bias, []
        state = torch.zeros_like(inputs[:, 0])
        for place in range(characters.shape[1]):
            state = torch.tanh(inputs[:, place] + state @ recurrence)
            states.append(state)
        return torch.stack(states, 1) @ out


class Network(SmallProblem):
    """One hidden layer of 32 on MNIST-5k at 14 × 14 pixels, without biases, so that all of its weights are matrices.

    classes: those of the examples that batches are made of; None for all.
    """

    rate = 0.25
    shapes = ((196, 32), (32, CLASSES))

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        digits = mnist(14)
        self._data = digits.train_images, digits.train_labels
        self.test = digits.test_images, digits.test_labels
        is_drawn = torch.isin(digits.train_labels, torch.tensor(classes if classes is not None else range(CLASSES)))
        self._drawn = tuple(each[is_drawn] for each in self._data)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        return _chosen(self._drawn, size, generator)

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        first, second = self._parts(weights)
        return relu(images @ first) @ second

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        images, labels = batch
        return cross_entropy(self.logits(weights, images), labels)

    def excess(self, weights: Tensor) -> Tensor:
        return self.loss(weights, *self._data)


class Teacher(SmallProblem):
    """A network of 20 hidden units learns one of 5, from inputs in 20 dimensions and targets with noise of 0.1."""

    rate = 0.5
    shapes = ((20, 20), (20,))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._first = 1.5 * 20**-0.5 * torch.randn(20, 5, generator=generator)
        self._second = torch.randn(5, generator=generator)
        inputs = torch.randn(1000, 20, generator=generator)
        self._test = inputs, torch.tanh(inputs @ self._first) @ self._second

    def bounds(self) -> Sequence[float]:
        return (0.38, 0.38)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        inputs = torch.randn(size, 20, generator=generator)
        noise = 0.1 * torch.randn(size, generator=generator)
        return inputs, torch.tanh(inputs @ self._first) @ self._second + noise

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        first, second = self._parts(weights)
        inputs, targets = batch
        return (torch.tanh(inputs @ first) @ second - targets).square().mean() / 2

    def excess(self, weights: Tensor) -> Tensor:
        return self.loss(weights, *self._test)


class TinyTransformer(_Language):
    """`characters.Transformer` with one layer of width 16."""

    rate = 0.5

    def __init__(self) -> None:
        super().__init__()
        # Weights begin as the module's own do.
        self._modules: dict[int, nn.Module] = {}

    def _module(self, seed: int) -> nn.Module:
        if seed not in self._modules:
            torch.manual_seed(seed)
            self._modules[seed] = Transformer(self._text.alphabet, self._text.length, 16, 1)
        return self._modules[seed]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [tuple(each.shape) for each in self._module(0).parameters()]

    def initial(self, seed: int) -> Tensor:
        return torch.cat([each.detach().flatten() for each in self._module(seed).parameters()])

    def _logits(self, weights: Tensor, characters: Tensor) -> Tensor:
        names = [name for name, _ in self._module(0).named_parameters()]
        named = dict(zip(names, self._parts(weights), strict=True))
        # The only kernel of attention that can be mapped over weights.
        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = functional_call(self._module(0), named, (characters,))
        return found


class Quadratic(SmallProblem):
    """100 dimensions with curvatures from 1 to 0.001, and a gradient whose noise has 0.3 times their roots."""

    rate = 0.5
    shapes = ((100,),)
    batch_size = 1

    def __init__(self) -> None:
        self._curvatures = torch.logspace(0, -3, 100)
        self._minimum = torch.randn(100, generator=torch.Generator().manual_seed(4))

    def bounds(self) -> Sequence[float]:
        return (0.0,)

    def batch(self, generator: Generator, size: int) -> tuple[Tensor, ...]:
        return (torch.randn(size, 100, generator=generator),)

    def loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        (noise,) = batch
        return self.excess(weights) + 0.3 * (noise.mean(0) * self._curvatures.sqrt() * weights).sum()

    def excess(self, weights: Tensor) -> Tensor:
        return ((weights - self._minimum).square() * self._curvatures).sum() / 2


def _chosen(data: tuple[Tensor, ...], size: int, generator: Generator) -> tuple[Tensor, ...]:
    """Random examples."""
    indices = torch.randint(len(data[0]), (size,), generator=generator)
    return tuple(each[indices] for each in data)


CHOSEN: dict[str, Callable[[], SmallProblem]] = {
    "logistic regression": Logistic,
    "least squares": LeastSquares,
    "factorization": Factorization,
    "recurrent network": Recurrent,
}
"""The problems that the constants of the rule `ahead` were chosen on."""

JUDGED: dict[str, Callable[[], SmallProblem]] = {
    "network": Network,
    "teacher and student": Teacher,
    "transformer": TinyTransformer,
    "quadratic": Quadratic,
}
"""The problems that it is judged on. None of its constants was tried on them before."""

PROBLEMS = CHOSEN | JUDGED
