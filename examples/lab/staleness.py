"""Rules for stale gradients on more problems, at delays of up to 64 steps.

Eight small problems, the SGD form and the AdamW form of each: on four of them the constants of the rule `ahead` were
chosen, the others judge it (`small_problems`). Each rule has at each delay the learning rate of its best loss, mean
over seeds, and again the one that was best for Schedule-Free without delay. Then 64 workers of different speeds, beside
synchronous training on as many samples; slow workers that hold classes of their own; and Schedule-Free over NorMuon.

Rules:

    Schedule-Free  as in the paper, uncorrected
    auto, ahead    Schedule-Free with the service's corrections
    linear decay   of the learning rate of SGD, or AdamW
    momentum       linear decay along a mean over about 1 + τ gradients, none of them damped or dropped. It is what the
                   abstract of arXiv 2605.02043 tells of a "momentum-based framework"; its equations were not at hand
    look-ahead     Schedule-Free, whose gradients are taken where the average x, and with it y, will be after τ steps
                   if x goes on as in its newest step

All runs are of the service's own state machine in this process. Those that differ in learning rate and seed only are
param groups of one run, so that they cost little more than one.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, product
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from examples.lab.figures import COLOURS, Table, percent, plot, plus_minus
from examples.lab.local import LocalRun
from examples.lab.small_problems import CHOSEN, JUDGED, PROBLEMS, Network, SmallProblem

FORMS = ("SGD", "AdamW")
PLAIN, LINEAR, AUTO, AHEAD = "Schedule-Free", "linear decay", "auto", "ahead"
MOMENTUM, LOOK_AHEAD = "momentum", "look-ahead"
RULES = (PLAIN, LINEAR, AUTO, AHEAD, MOMENTUM, LOOK_AHEAD)
COMPARED = (PLAIN, LINEAR, AUTO)
"""Whose best is what the others are measured by."""
WITHOUT_DELAY = {AUTO: PLAIN, AHEAD: PLAIN, LOOK_AHEAD: PLAIN, MOMENTUM: LINEAR}
"""Rules that are another one at τ = 0."""
MATRICES = "NorMuon"
_ADAM_RATE = 0.016
_MUON_RATE = 0.02


@dataclass(frozen=True)
class Size:
    """How much is run. rates: powers of 2 that a problem's learning rate is multiplied by."""

    taus: tuple[int, ...] = (0, 4, 16, 64)
    share: float = 1.0
    """Of a problem's steps."""
    seeds: int = 3
    rates: tuple[int, ...] = tuple(range(-7, 10))
    muon_rates: tuple[int, ...] = tuple(range(-4, 3))
    workers: int = 64
    rounds: int = 16
    """Gradients that each of the workers of different speeds takes, on average."""
    biased: int = 1500


QUICK = Size(taus=(0, 4), share=0.02, seeds=1, rates=(-1, 0, 1), muon_rates=(-1, 0, 1), workers=4, rounds=4, biased=40)


def measure(quick: bool) -> dict[str, Any]:
    size = QUICK if quick else Size()
    return {
        "seeds": size.seeds,
        "taus": size.taus,
        "constant": [case for name, form in product(PROBLEMS, FORMS) for case in _constant(name, form, RULES, size)],
        "matrices": _constant("network", MATRICES, (PLAIN, AUTO, AHEAD), size),
        "uneven": [
            case
            for name, form in (("logistic regression", "SGD"), ("network", "AdamW"), ("transformer", "AdamW"))
            for case in _uneven(name, form, size)
        ],
        "biased": _biased(size),
        "workers": size.workers,
        "rounds": size.rounds,
    }


@cache
def problem(name: str) -> SmallProblem:
    return PROBLEMS[name]()


def optimizer(form: str, rule: str, tau: float, steps: int) -> dict[str, Any]:
    """What a run is created with, without its learning rate."""
    if rule in (LINEAR, MOMENTUM):
        schedule = {"name": "linear", "total_steps": steps}
        share = tau / (1 + tau) if rule == MOMENTUM else 0.0
        if form == "SGD":
            return {"algorithm": "sgd", "momentum": share, "dampening": share, "schedule": schedule}
        return {"algorithm": "adamw", "betas": [max(0.9, share), 0.999], "weight_decay": 0.0, "schedule": schedule}
    correction = {"delay_correction": {"name": rule if rule in (AUTO, AHEAD) else "none"}}
    if form == MATRICES:
        return {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "normuon"}, **correction}
    return {"algorithm": f"{form.lower()}_schedule_free", **correction}


class Lanes:
    """Runs of one problem that differ in learning rate and seed; their points are [rates, seeds, numel]."""

    def __init__(self, of: SmallProblem, made_with: dict[str, Any], rates: Sequence[float], seeds: int) -> None:
        self._shape = len(rates), seeds, of.numel
        initial = torch.stack([of.initial(seed) for seed in range(seeds)]).expand(self._shape).flatten()
        is_base = "base" in made_with
        # Only matrices need their shapes.
        shapes = list(of.shapes) * seeds if is_base else [(seeds * of.numel,)]
        groups = [{"base": {"lr": rate}} if is_base else {"lr": rate} for rate in rates for _ in shapes]
        self._run = LocalRun(made_with, initial, shapes=shapes * len(rates), groups=groups)

    @property
    def step(self) -> int:
        return self._run.step

    def point(self, name: Any) -> Tensor:
        return self._run.point(name).view(self._shape)

    def push(self, gradients: Tensor, **others: Any) -> None:
        self._run.push(gradients.flatten(), **others)


def _rates(of: SmallProblem, form: str, size: Size) -> list[float]:
    if form == MATRICES:
        return [_MUON_RATE * 2.0**power for power in size.muon_rates]
    middle = of.rate if form == "SGD" else _ADAM_RATE
    return [middle * 2.0**power for power in size.rates]


def _batches(of: Sequence[SmallProblem], seeds: int, batch: int) -> Callable[[int], list[Tensor]]:
    """A worker's number -> its next batch, of each seed [seeds, batch, ...]; of: each worker's problem."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]

    def take(worker: int) -> list[Tensor]:
        drawn = [of[worker].batch(generator, batch) for generator in generators]
        return [torch.stack(parts) for parts in zip(*drawn, strict=True)]

    return take


def train(
    of: Sequence[SmallProblem],
    lanes: Lanes,
    order: Iterator[int],
    seeds: int,
    batch: int,
    *,
    most_stale: float = inf,
    ahead_by: float = 0.0,
) -> tuple[list[int], list[int]]:
    """Has workers push in an order, each a gradient at the y that it got with its push before.

    of: each worker's problem. most_stale: pushes that are staler are dropped. ahead_by: steps of x that the points at
    which gradients are taken are ahead. Returns the staleness of the pushes that count, and their workers.
    """
    take = _batches(of, seeds, batch)

    def point() -> Tensor:
        y = lanes.point("y")
        if ahead_by and lanes.step:
            # x moves by c (z - x) in a step, with c = 1/(k + 1) at a constant learning rate.
            y += ahead_by / (lanes.step + 1) * (lanes.point("z") - lanes.point("x"))
        return y

    points, taken = [point()] * len(of), [0] * len(of)
    staleness, workers = [], []
    for worker in order:
        age = lanes.step - taken[worker]
        gradients = of[worker].gradients(points[worker], *take(worker))
        if age <= most_stale:
            lanes.push(gradients, staleness=age, live=len(of))
            staleness.append(age)
            workers.append(worker)
        points[worker], taken[worker] = point(), lanes.step
    return staleness, workers


def _figures(losses: Tensor, rates: Sequence[float]) -> dict[str, Any]:
    """The best learning rate, its loss over seeds and whether it is at the edge. losses: [rates, seeds]."""
    averages = [float(each.double().mean()) for each in losses]
    least = min(range(len(rates)), key=lambda at: averages[at] if isfinite(averages[at]) else inf)
    values = [float(each) for each in losses[least]]
    return {
        "lr": rates[least],
        "loss": [mean(values), stdev(values) if len(values) > 1 else 0.0],
        "at_edge": least in (0, len(rates) - 1),
    }


# Constant delay


def _constant(name: str, form: str, rules: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Each rule at each delay, with tuned learning rates and with that of Schedule-Free without delay."""
    of = problem(name)
    rates = _rates(of, form, size)
    first = float(torch.stack([of.judge(of.initial(seed)) for seed in range(size.seeds)]).mean())
    cases: dict[tuple[str, int], dict[str, Any]] = {}
    for tau, rule in product(size.taus, rules):
        if not tau and rule in WITHOUT_DELAY:
            cases[rule, tau] = cases[WITHOUT_DELAY[rule], tau] | {"rule": rule}
            continue
        losses = raced(name, form, rule, tau, rates, size)
        case = {"problem": name, "form": form, "rule": rule, "tau": tau, **_figures(losses, rates)}
        fresh = case if not cases else cases[PLAIN, 0]
        kept = float(losses[rates.index(fresh["lr"])].double().mean())
        # A run that ends above where it began has diverged.
        cases[rule, tau] = case | {"kept_rate": kept if kept <= first else None}
    return list(cases.values())


def raced(name: str, form: str, rule: str, tau: int, rates: Sequence[float], size: Size) -> Tensor:
    """The losses [rates, seeds] of runs with τ + 1 workers in turn."""
    of = problem(name)
    steps = max(round(of.steps * size.share), 2)
    lanes = Lanes(of, optimizer(form, rule, tau, steps), rates, size.seeds)
    order = islice(cycle(range(tau + 1)), steps)
    train([of] * (tau + 1), lanes, order, size.seeds, of.batch_size, ahead_by=tau if rule == LOOK_AHEAD else 0.0)
    return of.judge(lanes.point("x"))


# Workers of different speeds


def arrivals(seconds: Sequence[float], count: int) -> Iterator[int]:
    """The workers whose gradients come, in order; seconds: what each takes for one on average, give or take a fifth."""
    chance = random.Random(0)
    coming = [(each * chance.random(), worker) for worker, each in enumerate(seconds)]
    heapq.heapify(coming)
    for _ in range(count):
        now, worker = coming[0]
        yield worker
        heapq.heapreplace(coming, (now + seconds[worker] * chance.uniform(0.8, 1.2), worker))


def _uneven(name: str, form: str, size: Size) -> list[dict[str, Any]]:
    """As many samples for all: one process, synchronous workers, and asynchronous ones under each rule."""
    cases = []
    for how in ("one worker", "synchronous", *(f"asynchronous, {rule}" for rule in (PLAIN, LINEAR, AUTO, AHEAD))):
        losses, rates, staleness = uneven(name, form, how, size)
        case = {"problem": name, "form": form, "how": how, **_figures(losses, rates)}
        cases.append(case | {"mean_staleness": mean(staleness), "most_staleness": max(staleness)})
    return cases


def uneven(name: str, form: str, how: str, size: Size) -> tuple[Tensor, list[float], list[int]]:
    """Losses [rates, seeds], their learning rates, and the staleness of pushes."""
    of, workers = problem(name), size.workers
    rates, pushes = _rates(of, form, size), size.workers * size.rounds
    if not how.startswith("asynchronous"):
        together = workers if how == "synchronous" else 1
        lanes = Lanes(of, optimizer(form, PLAIN, 0, 0), rates, size.seeds)
        order = iter([0] * (pushes // together))
        staleness, _ = train([of], lanes, order, size.seeds, of.batch_size * together)
    else:
        lanes = Lanes(of, optimizer(form, how.removeprefix("asynchronous, "), workers - 1, pushes), rates, size.seeds)
        # The slowest take 8 times as long as the fastest.
        seconds = [8 ** (worker / (workers - 1)) for worker in range(workers)]
        staleness, _ = train([of] * workers, lanes, arrivals(seconds, pushes), size.seeds, of.batch_size)
    return of.judge(lanes.point("x")), rates, staleness


# Slow workers with classes of their own


def _biased(size: Size) -> list[dict[str, Any]]:
    cases = []
    for how, most_stale in (
        ("ringmaster, 6 steps", 6.0),
        *((f"async, {rule}", inf) for rule in (PLAIN, AUTO, AHEAD)),
    ):
        rule = AUTO if most_stale == 6 else how.removeprefix("async, ")
        cases.append({"how": how, **biased(rule, most_stale, size)})
    return cases


def biased(rule: str, most_stale: float, size: Size) -> dict[str, Any]:
    """Five workers with two classes each, of which the last takes 12 times as long as the others."""
    of = [Network(classes=(2 * worker, 2 * worker + 1)) for worker in range(5)]
    rates = _rates(of[0], "AdamW", size)
    lanes = Lanes(of[0], optimizer("AdamW", rule, 0, 0), rates, size.seeds)
    order = arrivals([1.0, 1.0, 1.0, 1.0, 12.0], size.biased)
    staleness, workers = train(of, lanes, order, size.seeds, 16, most_stale=most_stale)
    weights = lanes.point("x")
    case = _figures(of[0].judge(weights), rates)
    images, labels = of[0].test
    seen: dict[str, list[float]] = {"fast": [], "slow": []}
    for each in weights[rates.index(case["lr"])]:
        right = (of[0].logits(each, images).argmax(1) == labels).float()
        is_slow = labels >= 8
        seen["fast"].append(float(right[~is_slow].mean()))
        seen["slow"].append(float(right[is_slow].mean()))
    return case | {
        "pushes_of_slow": workers.count(4) / len(workers),
        "most_staleness": max(staleness),
        **{
            f"accuracy_{which}": [mean(values), stdev(values) if len(values) > 1 else 0.0]
            for which, values in seen.items()
        },
    }


# What was found


def _ratios(cases: Sequence[dict[str, Any]], rule: str, by: Sequence[str]) -> dict[tuple[str, str, int], float]:
    """By problem, form and τ: a rule's tuned loss by the least of those of other rules."""
    losses = {(case["problem"], case["form"], case["tau"], case["rule"]): case["loss"][0] for case in cases}
    places = dict.fromkeys((case["problem"], case["form"], case["tau"]) for case in cases)
    return {place: losses[*place, rule] / min(losses[*place, each] for each in by) for place in places}


def _geometric(values: Sequence[float]) -> float:
    return exp(mean(map(log, values)))


def _halves(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for title, names in (("the half to choose by", CHOSEN), ("the half to judge by", JUDGED)):
        yield title, [case for case in found["constant"] if case["problem"] in names]


def tables(found: dict[str, Any]) -> list[Table]:
    made = []
    delays = [tau for tau in found["taus"] if tau]
    for title, cases in _halves(found):
        rows = []
        for rule in RULES:
            ratios = {place: ratio for place, ratio in _ratios(cases, rule, COMPARED).items() if place[2]}
            late = [case for case in cases if case["rule"] == rule and case["tau"]]
            rows.append(
                [
                    rule,
                    *(
                        f"{_geometric([each for place, each in ratios.items() if place[2] == tau]):.2f}"
                        for tau in delays
                    ),
                    f"{_geometric(list(ratios.values())):.2f}",
                    f"{max(ratios.values()):.2f}",
                    f"{sum(each <= 1.1 for each in ratios.values())} of {len(ratios)}",
                    f"{sum(case['kept_rate'] is None for case in late)} of {len(late)}",
                ]
            )
        heads = ["", *(f"τ = {tau}" for tau in delays), "all", "worst", "within 1.1", "diverged at the rate of τ = 0"]
        made.append(Table(f"{title}: tuned loss by the least of {', '.join(COMPARED)}, geometric means", heads, rows))
    for title, cases in _halves(found):
        made.append(_losses(f"{title}: loss, learning rate tuned at each τ (* the edge of the grid)", cases, RULES))
    muon = found["matrices"]
    made.append(_losses("Schedule-Free over NorMuon: loss, learning rate tuned at each τ", muon, (PLAIN, AUTO, AHEAD)))
    title = f"{found['workers']} workers, the slowest 8 times slower: loss after {found['rounds']} batches of each"
    rows = [
        [
            f"{case['problem']}, {case['form']}",
            case["how"],
            plus_minus(*case["loss"]),
            f"{case['lr']:.3g}" + "*" * case["at_edge"],
            f"{case['mean_staleness']:.1f}, {case['most_staleness']}",
        ]
        for case in found["uneven"]
    ]
    made.append(Table(title, ["", "trained by", "loss", "lr", "staleness: mean, most"], rows))
    rows = [
        [
            case["how"],
            f"{case['pushes_of_slow']:.1%}",
            plus_minus(*case["loss"]),
            percent(*case["accuracy_fast"]),
            percent(*case["accuracy_slow"]),
            f"{case['lr']:.3g}" + "*" * case["at_edge"],
        ]
        for case in found["biased"]
    ]
    heads = ["", "counted pushes of the slow worker", "training loss", "accuracy on 0 to 7", "on 8 and 9", "lr"]
    made.append(Table("Five workers with two classes each; the one with 8 and 9 takes 12 times as long", heads, rows))
    return made


def _losses(title: str, cases: Sequence[dict[str, Any]], rules: Sequence[str]) -> Table:
    rows = []
    for place in dict.fromkeys((case["problem"], case["form"], case["tau"]) for case in cases):
        here = {case["rule"]: case for case in cases if (case["problem"], case["form"], case["tau"]) == place}
        shown = [plus_minus(*here[rule]["loss"]) + "*" * here[rule]["at_edge"] for rule in rules]
        rows.append([f"{place[0]}, {place[1]}, τ = {place[2]}", *shown])
    return Table(title, ["", *rules], rows)


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "Tuned loss by the least of " + ", ".join(COMPARED) + ": geometric means"
    options = {"ncols": 2, "figsize": (10.5, 4.6), "sharey": True}
    with plot(folder / "staleness.png", title, "τ, steps", "ratio", **options) as panels:
        for axes, (half, cases) in zip(panels, _halves(found), strict=True):
            for rule, colour in zip(RULES, COLOURS, strict=False):
                ratios = _ratios(cases, rule, COMPARED)
                means = [
                    _geometric([each for place, each in ratios.items() if place[2] == tau]) for tau in found["taus"]
                ]
                axes.plot(found["taus"], means, color=colour, marker="o", label=rule)
            axes.set(title=half, xscale="symlog", yscale="log")
        panels[0].legend()
