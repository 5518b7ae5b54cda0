"""A language model by four worker processes of a real service, beside one process with the package's optimizer.

All train the same transformer on the same samples by AdamW Schedule-Free. What four workers take for one step of the
policy `sync` is one batch of the package's; under `async` each of their batches is a step of its own, and so it is for
the package's second run, whose batches are as small and come one after the other: what that differs by from the first
is due to the size of batches, and what async differs by from that is due to stale gradients, which are corrected for or
not. The latter two are run at several learning rates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from examples.lab.characters import Text, Transformer
from examples.lab.figures import COLOURS, Table, digits, plot
from examples.lab.service import SILENCE_S, Service, serving
from freestep import Client

BATCH = 8
"""Windows in a batch of a worker's."""
RATES, WARMUP = (0.0025, 0.005, 0.01), 0.1
"""Learning rates, the package's default first; and the share of the steps that is warmup."""
LOOKS = 8


@dataclass(frozen=True)
class Size:
    """Of the model, and of its training: workers, batches of each, and windows of the validation."""

    workers: int
    width: int
    layers: int
    length: int
    batches: int
    validation: int
    rates: Sequence[float]

    def model(self, text: Text) -> Transformer:
        torch.manual_seed(0)
        return Transformer(text.alphabet, self.length, self.width, self.layers)


WHOLE, QUICK = Size(4, 144, 4, 64, 320, 256, RATES), Size(2, 32, 1, 32, 16, 64, RATES[:1])


def measure(quick: bool) -> dict[str, Any]:
    size = QUICK if quick else WHOLE
    text = Text(size.length)
    model = size.model(text)
    found: dict[str, Any] = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "characters": len(text.train),
        "steps": size.batches,
        "workers": size.workers,
        "samples": size.batches * size.workers * BATCH,
        "length": size.length,
        "runs": [
            _alone(size, text, size.workers, RATES[0]),
            _served(size, text, "sync", "none", RATES[0]),
            _alone(size, text, 1, RATES[0]),
            *(_served(size, text, "async", "none", lr) for lr in size.rates),
            *(_served(size, text, "async", "auto", lr) for lr in size.rates),
        ],
    }
    return found


def options(size: Size, step_batches: int, lr: float) -> dict[str, Any]:
    """Of AdamW Schedule-Free, for a run of which a step takes so many of the batches."""
    return {"lr": lr, "warmup_steps": int(WARMUP * size.batches * size.workers / step_batches)}


def _alone(size: Size, text: Text, step_batches: int, lr: float) -> dict[str, Any]:
    """One process with the package's optimizer, so many of the workers' batches to a step."""
    from schedulefree import AdamWScheduleFree

    began = time.perf_counter()
    model, validation = size.model(text), text.validation_windows(size.validation)
    optimizer = AdamWScheduleFree(model.parameters(), **options(size, step_batches, lr))
    optimizer.train()
    steps, curve = size.batches * size.workers // step_batches, []
    for step in range(steps):
        numbers = range(step * step_batches, (step + 1) * step_batches)
        optimizer.zero_grad()
        model.loss(torch.cat([text.batch(BATCH, number) for number in numbers])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % max(1, steps // LOOKS) == 0:
            optimizer.eval()
            curve.append({"samples": (step + 1) * step_batches * BATCH, "loss": model.mean_loss(validation)})
            optimizer.train()
    name = f"package, one process, batches of {step_batches * BATCH}"
    return {"name": name, "lr": lr, "steps": steps, "seconds": time.perf_counter() - began, "curve": curve}


def _served(size: Size, text: Text, policy: str, correction: str, lr: float) -> dict[str, Any]:
    """Four workers, and this process as the evaluator, which pulls x while they go on."""
    began = time.perf_counter()
    model, validation, curve = size.model(text), text.validation_windows(size.validation), []
    step_batches = size.workers if policy == "sync" else 1
    with serving() as service, Client(service.url) as client:
        for worker in range(size.workers):
            told = {"url": service.url, "policy": policy, "correction": correction, "worker": worker, "lr": lr}
            told["size"] = asdict(size)
            service.processes.start(f"worker-{worker}", "examples.lab.language_worker", json.dumps(told), is_read=True)
        staleness: list[float] = []
        for said in _said(service, size.workers):
            if "mean_staleness" in said:
                staleness.append(said["mean_staleness"])
            # The first worker's progress stands for all; and in the end, when all have said that they are done.
            if len(staleness) == size.workers or ("mean_staleness" not in said and said["worker"] == 0):
                tensors, step = client.run(policy).pull("x")
                model.load_state_dict(tensors)
                curve.append({"samples": step * step_batches * BATCH, "loss": model.mean_loss(validation)})
    corrected = ", corrected" if correction == "auto" else ""
    name = f"{policy}{corrected}, {size.workers} workers, batches of {BATCH}"
    seconds = time.perf_counter() - began
    return {"name": name, "lr": lr, "steps": step, "staleness": mean(staleness), "seconds": seconds, "curve": curve}


def _said(service: Service, workers: int) -> Iterator[dict[str, Any]]:
    """What workers say, until all are done. Raises RuntimeError where one, or the service, ended before its time."""
    done: set[str] = set()
    while len(done) < workers:
        name, line = service.processes.read_line(SILENCE_S)
        if line is None and name not in done:
            raise RuntimeError(f"{name} ended: {service.log.read_text()}")
        if line is None or name == "service":
            continue
        said = json.loads(line)
        if "mean_staleness" in said:
            done.add(name)
        yield said


def tables(found: dict[str, Any]) -> list[Table]:
    title = f"{found['parameters']:,} parameters, {found['samples']:,} samples of {found['length']} characters"
    rows = []
    first = [run for run in found["runs"] if run["lr"] == RATES[0]]
    for run in first:
        last = run["curve"][-1]["loss"]
        beside = [100 * (last / each["curve"][-1]["loss"] - 1) for each in first if "package" in each["name"]]
        stale = digits(run["staleness"]) if "staleness" in run else ""
        rows.append([run["name"], f"{run['steps']:,}", digits(last, 4), *(f"{each:+.2f}%" for each in beside), stale])
    whole, small = found["workers"] * BATCH, BATCH
    heads = ["", "steps", "validation loss", f"to batches of {whole}", f"to batches of {small}", "mean staleness"]
    made = [Table(f"{title}, learning rate {RATES[0]}", heads, rows)]
    rates = list(dict.fromkeys(run["lr"] for run in found["runs"]))
    rows = [
        [name, *(digits(run["curve"][-1]["loss"], 4) for run in found["runs"] if run["name"] == name)]
        for name in (run["name"] for run in first if "async" in run["name"])
    ]
    made.append(Table("Validation loss by learning rate", ["", *(f"{lr:g}" for lr in rates)], rows))
    return made


def draw(found: dict[str, Any], folder: Path) -> None:
    title = f"A character-level transformer of {found['parameters']:,} parameters"
    names = list(dict.fromkeys(run["name"] for run in found["runs"]))
    with plot(folder / "language.png", title, "samples", "validation loss, nats a character") as axes:
        for name, colour in zip(names, ("black", COLOURS[0], "#888888", *COLOURS[1:3]), strict=True):
            run = min((run for run in found["runs"] if run["name"] == name), key=lambda run: run["curve"][-1]["loss"])
            style = "--" if "package" in name else "-"
            samples, losses = zip(*((look["samples"], look["loss"]) for look in run["curve"]), strict=True)
            label = f"{name}, lr {run['lr']:g}"
            axes.plot(samples, losses, style, color=colour, marker="o", label=label)
        axes.legend()
