"""Stale gradients: Schedule-Free with its correction and without, beside a linear decay and a flat learning rate.

Constant delay τ: τ + 1 workers in turn, so that each gradient is applied τ steps after it was taken. Each rule has at
each τ the learning rate of its best final training loss, mean over seeds, and again the one that was best at τ = 0.
These runs are of the service's own state machine in this process. The first seed of each rule, and every seed of the
corrected one, is then made again on a service, in a process of its own, over HTTP and with τ + 1 leases, and its x
compared to the bit.

Workers of different speeds: processes of their own (`delay_worker`), of which some pause longer after each gradient.
How stale gradients are is then up to chance, and no two runs are alike.
"""

from __future__ import annotations

import json
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.lab.figures import COLOURS, Table, percent, plot, plus_minus
from examples.lab.local import LocalRun
from examples.lab.problems import LogisticRegression, Network, Problem, mnist
from examples.lab.service import SILENCE_S, serving
from examples.lab.training import batches
from examples.lab.tuning import over_seeds, tune
from freestep.client import Client
from freestep.demo.processes import Processes
from freestep.flat import Flat

RULES = ("corrected", "Schedule-Free", "linear decay", "flat")
FORMS = ("SGD, logistic regression", "AdamW, MLP")
_TTL_MS = 3_600_000


@dataclass(frozen=True)
class Size:
    """How much is run. pauses_ms: of each worker, after each gradient."""

    taus: tuple[int, ...] = (0, 8, 32, 128)
    steps: int = 1500
    seeds: int = 3
    uneven_steps: int = 1000
    pauses_ms: tuple[int, ...] = (10, 10, 10, 10, 20, 80, 320)


QUICK = Size(taus=(0, 4), steps=20, seeds=1, uneven_steps=20, pauses_ms=(2, 2, 20))
BATCH = 16
NAMED = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
GRIDS = {FORMS[0]: (0.1, 10**-0.5, 1.0), FORMS[1]: (10**-3.5, 0.001, 10**-2.5, 0.01)}
"""Learning rates to begin with; `tune` adds to them."""


def problem(form: str) -> Problem:
    """MNIST-5k, at 28 × 28 and at 14 × 14 pixels."""
    if form == FORMS[0]:
        return LogisticRegression(form, mnist())
    return Network(form, mnist(14), hidden=32)


def optimizer(form: str, rule: str, lr: float, steps: int) -> dict[str, Any]:
    """What a run is created with."""
    name = "sgd" if form == FORMS[0] else "adamw"
    if rule in RULES[:2]:
        correction = {"name": "auto" if rule == "corrected" else "none"}
        return {"algorithm": f"{name}_schedule_free", "lr": lr, "delay_correction": correction}
    schedule = {"name": "linear", "total_steps": steps} if rule == "linear decay" else {"name": "constant"}
    made = {"algorithm": name, "lr": lr, "schedule": schedule}
    return made if name == "sgd" else {**made, "weight_decay": 0.0}


def measure(quick: bool) -> dict[str, Any]:
    size = QUICK if quick else Size()
    cases = [_constant(form, rule, tau, size) for form in FORMS for rule in RULES for tau in size.taus]
    for case in cases:
        first = next(each for each in cases if (each["form"], each["rule"]) == (case["form"], case["rule"]))
        lr = first["tuned"]["lr"]
        case["transferred"] = _figures(lr, _trial(case["form"], case["rule"], case["tau"], lr, size))
    with serving() as service, Client(service.url) as client:
        for number, case in enumerate(cases):
            case["same_on_service"] = _same_on_service(client, f"constant-{number}", case, size)
        uneven = _uneven(service.url, client, service.processes, size)
    return {"steps": size.steps, "uneven_steps": size.uneven_steps, "pauses_ms": size.pauses_ms} | {
        "constant": cases,
        "uneven": uneven,
    }


# Constant delay


def _constant(form: str, rule: str, tau: int, size: Size) -> dict[str, Any]:
    tuned = tune(lambda lr: _trial(form, rule, tau, lr, size), GRIDS[form], least=["train_loss"])
    lr = tuned.best["train_loss"]
    case = {"form": form, "rule": rule, "tau": tau, "at_edge": bool(tuned.at_edge), "tried": sorted(tuned.trials)}
    return case | {"tuned": _figures(lr, tuned.trials[lr])}


def _figures(lr: float, trial: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads, None for what diverged."""
    made: dict[str, Any] = {"lr": lr}
    for name in ("train_loss", "test_accuracy"):
        average, spread = over_seeds(trial, name)
        made[name] = [average, spread] if isfinite(average) else None
    return made


def _trial(form: str, rule: str, tau: int, lr: float, size: Size) -> list[dict[str, Any]]:
    return [_judged(problem(form), _alone(form, rule, tau, lr, size.steps, seed)) for seed in range(size.seeds)]


def _judged(made: Problem, x: Tensor) -> dict[str, Any]:
    """What x is worth; None where it is no number any more."""
    seen = made.evaluate(x)
    return seen if isfinite(seen["train_loss"]) else dict.fromkeys(seen)


@cache
def _alone(form: str, rule: str, tau: int, lr: float, steps: int, seed: int) -> Tensor:
    """x after a run in this process."""
    made = problem(form)
    run = LocalRun(optimizer(form, rule, lr, steps), made.initial(seed))
    order = batches(made.samples, BATCH, seed)
    points = deque([run.point("y")], maxlen=tau + 1)
    for step in range(steps):
        run.push(made.gradient(points[0], next(order)), staleness=min(step, tau), live=tau + 1)
        points.append(run.point("y"))
    return run.point("x")


def _create(client: Client, name: str, optimizer_: dict[str, Any], initial: Tensor) -> None:
    run = client.run(name)
    run.create(
        {
            "optimizer": optimizer_,
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [initial.numel()]}],
            "durability": "none",
        }
    )
    run.initialize({"w": initial})


def _same_on_service(client: Client, name: str, case: dict[str, Any], size: Size) -> list[bool]:
    """Makes runs of a case again on the service, at both its learning rates; which of their x are the same."""
    of = case["form"], case["rule"], case["tau"]
    seeds = range(size.seeds if case["rule"] == RULES[0] else 1)
    runs = [(lr, seed) for lr in sorted({case["tuned"]["lr"], case["transferred"]["lr"]}) for seed in seeds]
    return [
        torch.equal(_served(client, f"{name}-{number}", *of, lr, size.steps, seed), _alone(*of, lr, size.steps, seed))
        for number, (lr, seed) in enumerate(runs)
    ]


def _served(client: Client, name: str, form: str, rule: str, tau: int, lr: float, steps: int, seed: int) -> Tensor:
    """As `_alone`, on the service."""
    made = problem(form)
    _create(client, name, optimizer(form, rule, lr, steps), made.initial(seed))
    run, order = client.run(name), batches(made.samples, BATCH, seed)
    gradient, y = Flat(run.manifest), Flat(run.manifest)
    with ExitStack() as stack:
        leases = [stack.enter_context(run.lease(f"worker-{each}", ttl_ms=_TTL_MS)) for each in range(tau + 1)]
        run.pull_into(y, "y")
        points = deque([y.views["w"].clone()], maxlen=tau + 1)
        for step in range(steps):
            gradient.views["w"].copy_(made.gradient(points[0], next(order)))
            receipt, _ = run.exchange(gradient, leases[step % (tau + 1)].claim(max(0, step - tau)), y)
            assert (receipt.decision, receipt.staleness) == ("applied", min(step, tau))
            points.append(y.views["w"].clone())
    tensors, _ = run.pull("x")
    run.delete()
    return tensors["w"]


# Workers of different speeds


def _uneven(url: str, client: Client, processes: Processes, size: Size) -> list[dict[str, Any]]:
    for worker, pause_ms in enumerate(size.pauses_ms):
        told = {"url": url, "worker": worker, "pause_ms": pause_ms, "workers": len(size.pauses_ms)}
        told |= {"steps": size.uneven_steps, "form": FORMS[0]}
        processes.start(f"worker-{worker}", "examples.lab.delay_worker", json.dumps(told), is_read=True)
    numbers, made, cases = count(), problem(FORMS[0]), []
    for rule in RULES:

        def run(lr: float, rule: str = rule) -> list[dict[str, Any]]:
            trial = []
            for seed in range(size.seeds):
                name = f"uneven-{next(numbers)}"
                _create(client, name, optimizer(FORMS[0], rule, lr, size.uneven_steps), made.initial(seed))
                seen = [_heard(processes) for _ in size.pauses_ms]
                tensors, _ = client.run(name).pull("x")
                pushes = [each["staleness"] for each in seen]
                staleness = sorted(one for each in pushes for one in each)
                trial.append(
                    _judged(made, tensors["w"])
                    | {"mean_staleness": sum(staleness) / len(staleness), "most_staleness": staleness[-1]}
                )
            return trial

        tuned = tune(run, GRIDS[FORMS[0]], least=["train_loss"])
        lr = tuned.best["train_loss"]
        trials = [each for trial in tuned.trials.values() for each in trial]
        cases.append(
            {
                "rule": rule,
                "at_edge": bool(tuned.at_edge),
                "tuned": _figures(lr, tuned.trials[lr]),
                "tried": {
                    f"{each:g}": _figures(each, tuned.trials[each])["train_loss"] for each in sorted(tuned.trials)
                },
                "mean_staleness": sum(each["mean_staleness"] for each in trials) / len(trials),
                "most_staleness": max(each["most_staleness"] for each in trials),
            }
        )
    return cases


def _heard(processes: Processes) -> dict[str, Any]:
    """What the next worker to have done with a run says."""
    name, line = processes.read_line(SILENCE_S)
    if line is None:
        raise RuntimeError(f"{name} ended before its time")
    said: dict[str, Any] = json.loads(line)
    return said


# What was found


def tables(found: dict[str, Any]) -> list[Table]:
    made = []
    for form in FORMS:
        cases = [case for case in found["constant"] if case["form"] == form]
        taus = list(dict.fromkeys(case["tau"] for case in cases))
        for how, figure, shown in (
            ("tuned", "train_loss", plus_minus),
            ("tuned", "test_accuracy", percent),
            ("transferred", "train_loss", plus_minus),
            ("transferred", "test_accuracy", percent),
        ):
            rows = [
                [rule, *(_cell(case, how, figure, shown) for case in cases if case["rule"] == rule)] for rule in RULES
            ]
            what = "learning rate tuned at each τ" if how == "tuned" else "learning rate tuned at τ = 0"
            title = f"{form}: {NAMED[figure]}, {what}, {found['steps']:,} steps of {BATCH}"
            made.append(Table(title, ["", *(f"τ = {tau}" for tau in taus)], rows))
        rows = [[rule, *(f"{case['tuned']['lr']:.3g}" for case in cases if case["rule"] == rule)] for rule in RULES]
        made.append(Table(f"{form}: the tuned learning rates", ["", *(f"τ = {tau}" for tau in taus)], rows))
    same = [each for case in found["constant"] for each in case["same_on_service"]]
    made.append(
        Table(
            "On the service, over HTTP",
            ["", "runs"],
            [["same x to the bit", str(sum(same))], ["of", str(len(same))]],
        )
    )
    rows = [
        [
            case["rule"],
            f"{case['tuned']['lr']:.3g}" + "*" * case["at_edge"],
            _cell(case, "tuned", "train_loss", plus_minus),
            _cell(case, "tuned", "test_accuracy", percent),
            f"{case['mean_staleness']:.1f}, {case['most_staleness']}",
        ]
        for case in found["uneven"]
    ]
    pauses = ", ".join(str(pause) for pause in found["pauses_ms"])
    title = f"{FORMS[0]}: workers that pause {pauses} ms, {found['uneven_steps']:,} steps"
    made.append(Table(title, ["", "lr", "training loss", "test accuracy", "staleness: mean, most"], rows))
    return made


def _cell(case: dict[str, Any], how: str, figure: str, shown: Any) -> str:
    values = case[how][figure]
    return ("diverged" if values is None else shown(*values)) + "*" * (how == "tuned" and case["at_edge"])


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "Stale gradients: training loss by τ, learning rate tuned at each τ and at τ = 0 only"
    options = {"ncols": len(FORMS), "figsize": (10.5, 4.8)}
    with plot(
        folder / "delay.png", title, "τ, steps", "training loss, mean and spread over seeds", **options
    ) as panels:
        for axes, form in zip(panels, FORMS, strict=True):
            for rule, colour in zip(RULES, COLOURS, strict=False):
                cases = [case for case in found["constant"] if (case["form"], case["rule"]) == (form, rule)]
                for how, style in (("tuned", "-"), ("transferred", ":")):
                    seen = [(case["tau"], *case[how]["train_loss"]) for case in cases if case[how]["train_loss"]]
                    taus, losses, spreads = zip(*seen, strict=True)
                    label = rule if how == "tuned" else None
                    shown = spreads if how == "tuned" else None
                    axes.errorbar(taus, losses, shown, linestyle=style, color=colour, marker="o", label=label)
            axes.set(title=form, xscale="symlog", yscale="log")
            axes.set_ylim(top=5)
        panels[0].legend(title="dotted: the lr of τ = 0")
