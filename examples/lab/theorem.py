"""Theorem 1 of arXiv 2405.15682: for convex F whose sampled functions are G-Lipschitz, Schedule-Free SGD with
γ = D / (G √T) has E[F(x_T) - F*] ≤ D G / √T after T steps, whatever β is, where D is the distance of the start from
a minimizer.

Two problems of known D, G and F*:

largest: F(w) = the largest |w_i - w*_i|, in 2T dimensions, with all w*_i = 1/√(2T), from 0: D = G = 1, no noise. A
    step sees one coordinate, the first of the largest, so that T steps leave another where it was: no method that moves
    along subgradients gets below 1/√(2T), 0.71 of the bound.
deviations: F(w) = mean of |a_i·w - b_i|, a sample of which is one term; |a_i| = 1, so that G = 1. The terms come in
pairs with b = a_i·w* + s_i and a_i·w* - s_i, whose sum is least wherever |a_i·(w - w*)| ≤ |s_i|, and so at w*.

The service, like the package, has the first step's z as the first of the average, and the start not in it: it is the
theorem's method from that z on, whose mean squared distance from w* is at most D² + γ²G² = D² (1 + 1/T). By the
theorem's own proof that makes the bound larger by a factor of 1 + 1/(2T), which is included.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import torch
from torch import Tensor

from examples.lab.figures import COLOURS, Table, digits, plot
from examples.lab.local import LocalRun

BETAS = (0.1, 0.5, 0.9, 0.98)
LENGTHS = (4, 16, 64, 256, 1024, 4096)
SEEDS = 10
QUICK_LENGTHS, QUICK_SEEDS = (4, 16, 64), 5


class Lipschitz(Protocol):
    """A convex function, a mean of G-Lipschitz terms, with G = 1."""

    numel: int
    distance: float
    least: float
    random: bool
    """Whether runs with other seeds differ."""

    def value(self, w: Tensor) -> float: ...

    def subgradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """Of a term that is drawn at random."""


class Largest:
    distance, least, random = 1.0, 0.0, False

    def __init__(self, steps: int) -> None:
        self.numel = 2 * steps
        self._minimizer = torch.full((self.numel,), self.numel**-0.5)

    def value(self, w: Tensor) -> float:
        return float((w - self._minimizer).abs().max())

    def subgradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        off = w - self._minimizer
        first = int(off.abs().argmax())
        made = torch.zeros(self.numel)
        made[first] = torch.sign(off[first])
        return made


class Deviations:
    """500 pairs of terms in 20 dimensions."""

    numel, random = 20, True

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        a = torch.nn.functional.normalize(torch.randn(500, self.numel, generator=generator), dim=1)
        minimizer = torch.randn(self.numel, generator=generator)
        noise = torch.randn(500, generator=generator).abs()
        self._a = a.repeat(2, 1)
        self._b = self._a @ minimizer + torch.cat([noise, -noise])
        self.distance = float(minimizer.norm())
        self.least = float(noise.mean())

    def value(self, w: Tensor) -> float:
        return float((self._a @ w - self._b).abs().mean())

    def subgradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        row = int(torch.randint(len(self._b), (), generator=generator))
        return torch.sign(self._a[row] @ w - self._b[row]) * self._a[row]


PROBLEMS: dict[str, Callable[[int], Lipschitz]] = {"largest": Largest, "deviations": Deviations}
"""By name; made for a number of steps."""


def measure(quick: bool) -> list[dict[str, Any]]:
    lengths, seeds = (QUICK_LENGTHS, QUICK_SEEDS) if quick else (LENGTHS, SEEDS)
    return [
        _case(name, made(steps), beta, steps, seeds)
        for name, made in PROBLEMS.items()
        for beta in BETAS
        for steps in lengths
    ]


def _case(name: str, problem: Lipschitz, beta: float, steps: int, seeds: int) -> dict[str, Any]:
    gaps = [_gap(problem, beta, steps, seed) for seed in range(seeds if problem.random else 1)]
    bound = problem.distance / sqrt(steps) * (1 + 1 / (2 * steps))
    case = {"problem": name, "beta": beta, "steps": steps, "bound": bound}
    return {**case, "gap": mean(gaps), "spread": stdev(gaps) if problem.random else 0.0, "largest": max(gaps)}


def _gap(problem: Lipschitz, beta: float, steps: int, seed: int) -> float:
    """F(x_T) - F* of one run."""
    generator = torch.Generator().manual_seed(seed)
    lr = problem.distance / sqrt(steps)
    run = LocalRun({"algorithm": "sgd_schedule_free", "lr": lr, "momentum": beta}, torch.zeros(problem.numel))
    y = torch.empty(problem.numel)
    for _ in range(steps):
        run.push(problem.subgradient(run.point("y", y), generator))
    return problem.value(run.point("x")) - problem.least


def tables(found: list[dict[str, Any]]) -> list[Table]:
    """The mean gap as a share of the bound."""
    made = []
    for problem in PROBLEMS:
        cases = [case for case in found if case["problem"] == problem]
        lengths = sorted({case["steps"] for case in cases})
        rows = []
        for beta in BETAS:
            mine = {case["steps"]: case for case in cases if case["beta"] == beta}
            rows.append([f"β = {beta:g}", *(digits(mine[steps]["gap"] / mine[steps]["bound"]) for steps in lengths)])
        title = f"{problem}: mean of F(x_T) - F* as a share of the bound D G / √T"
        made.append(Table(title, ["", *(f"T = {steps:,}" for steps in lengths)], rows))
    return made


def draw(found: list[dict[str, Any]], folder: Path) -> None:
    options = {"nrows": 1, "ncols": len(PROBLEMS), "figsize": (9.5, 4.4), "sharex": True}
    title = "Theorem 1: the gap of x_T and its bound"
    with plot(folder / "theorem.png", title, "T, steps", "F(x_T) - F*", **options) as panels:
        for axes, problem in zip(panels, PROBLEMS, strict=True):
            cases = [case for case in found if case["problem"] == problem]
            for beta, colour in zip(BETAS, COLOURS, strict=False):
                mine = [case for case in cases if case["beta"] == beta]
                steps = [case["steps"] for case in mine]
                axes.plot(steps, [case["gap"] for case in mine], color=colour, marker="o", label=f"β = {beta:g}")
            axes.plot(steps, [case["bound"] for case in mine], color="black", linestyle="--", label="D G / √T")
            axes.set(title=problem, xscale="log", yscale="log")
        axes.legend()
