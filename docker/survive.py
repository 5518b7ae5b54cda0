"""Kills a container of each kind under a cluster that trains, and checks that the training survives it.

    python docker/survive.py --shard 3 --worker 4

It takes `docker compose` or else `docker-compose`, and no package beyond Python's own. The cluster is a project of its
own: another one of the same files on this machine, and its volumes, are left alone. Exits 0 if all of it was survived,
else 1 with the reason; 2 if it was used wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "freestep-survive"
RUN = "demo"
KINDS = ("shard", "worker", "evaluator", "redis")
SETTINGS = {"FREESTEP_CHECKPOINT_SECONDS": "10", "FREESTEP_PORT": ""}
"""Unless the environment says otherwise: checkpoints often enough to wait for, and any free ports."""
EVALUATION = re.compile(r"step +(\d+) .* test accuracy x ([\d.]+)%")
"""A line of the evaluator's: the step, and the accuracy of x in percent."""
_PAUSE_S = 1.0
_COMMAND_S = 60.0
"""How long a look at the cluster may take; it is no look then."""

T = TypeVar("T")


class Failed(Exception):
    """Something was not survived."""


@dataclass(frozen=True)
class Sight:
    """The run at one moment, while all its shards are served. `durable` is the newest checkpoint's step, `homes` are
    the shards' URLs, `workers` the names of those that are alive."""

    epoch: int
    step: int
    durable: int
    homes: tuple[str, ...]
    workers: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}  step {self.step:5}  checkpoint {self.durable:5}  shards {len(self.homes)} at "
            f"{len(set(self.homes))} containers  workers {len(self.workers)}"
        )


class Cluster:
    """The compose project. `scale` says how many containers there are of a kind."""

    def __init__(self, files: list[Path], scale: dict[str, int]) -> None:
        self._command = [*_compose(), "--project-name", PROJECT]
        for file in [ROOT / "docker-compose.yml", *files] if files else []:
            self._command += ["--file", str(file)]
        self._scales = [part for kind, count in scale.items() for part in ("--scale", f"{kind}={count}")]
        self._environment = {**SETTINGS, **os.environ}

    def up(self, *options: str) -> None:
        """Has every container run that is to run."""
        self._compose("up", "--detach", *options, *self._scales)

    def down(self) -> None:
        """Removes all of it, the volumes included."""
        self._compose("down", "--volumes", "--remove-orphans", "--timeout", "5")

    def logs(self) -> str:
        """The last of what all containers printed."""
        return self._compose("logs", "--no-color", "--tail", "100")

    def containers(self, kind: str) -> list[str]:
        """The ids of those that run, in full."""
        labels = {"com.docker.compose.project": PROJECT, "com.docker.compose.service": kind}
        filters = [part for key, value in labels.items() for part in ("--filter", f"label={key}={value}")]
        return self._run(["docker", "ps", "--quiet", "--no-trunc", *filters]).split()

    def kill(self, container: str) -> None:
        self._run(["docker", "kill", container])

    def evaluations(self) -> list[tuple[int, float]]:
        """The evaluator's lines so far: steps, and accuracies of x in 0..1."""
        lines = "".join(self._run(["docker", "logs", each]) for each in self.containers("evaluator"))
        return [(int(step), float(percent) / 100) for step, percent in EVALUATION.findall(lines)]

    def look(self) -> Sight | None:
        """The run, or None while a shard is missing or nobody answers."""
        for container in (*self.containers("evaluator"), *self.containers("worker")):
            try:
                topology = self._freestep(container, "topology")
                status = self._freestep(container, "show")
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                return None
            if topology["missing"] or not status["initialized"]:
                return None
            return Sight(
                epoch=status["epoch"],
                step=status["step"],
                durable=status["checkpoint_step"] or 0,
                homes=tuple(shard["url"] for shard in topology["shards"]),
                workers=tuple(worker["worker"] for worker in status["workers"]),
            )
        return None

    def _freestep(self, container: str, what: str) -> dict[str, Any]:
        command = ["docker", "exec", container, "freestep", "runs", what, RUN, "--json"]
        answer: dict[str, Any] = json.loads(self._run(command, timeout=_COMMAND_S))
        return answer

    def _compose(self, *arguments: str) -> str:
        return self._run([*self._command, *arguments])

    def _run(self, command: list[str], timeout: float | None = None) -> str:
        return subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout


class Watch:
    """Sees the training go on, and fails where it goes back behind a checkpoint."""

    def __init__(self, cluster: Cluster, patience: float) -> None:
        self._cluster = cluster
        self._patience = patience
        self._durable = 0

    def until(self, what: str, seen: Callable[[], T | None]) -> T:
        """What `seen` returns, once that is something. Raises Failed when it does not come in time."""
        deadline = time.monotonic() + self._patience
        while (found := seen()) is None:
            if time.monotonic() > deadline:
                raise Failed(f"in {self._patience:g} s it did not come to this: {what}")
            time.sleep(_PAUSE_S)
        return found

    def sight(self, what: str, fits: Callable[[Sight], bool]) -> Sight:
        """The first sight that fits. Raises Failed, and so it does where steps are lost that a checkpoint has."""

        def seen() -> Sight | None:
            sight = self._cluster.look()
            if sight is None:
                return None
            if sight.step < self._durable:
                raise Failed(f"the run is at step {sight.step}, and step {self._durable} was in a checkpoint")
            self._durable = max(self._durable, sight.durable)
            return sight if fits(sight) else None

        return self.until(what, seen)


def survive(cluster: Cluster, watch: Watch, kind: str, workers: int, away: float) -> None:
    """Kills a container of a kind and brings it back `away` seconds later. Raises Failed."""
    before = watch.sight(
        f"{workers} workers train a run that has a checkpoint of them",
        lambda sight: sight.durable > 0 and len(sight.workers) == workers,
    )
    # Of the shards' containers the one of the first shard, which does what is done once for a run.
    running = cluster.containers(kind)
    victim = next((each for each in running if each[:12] in before.homes[0]), running[0])
    lost = sum(victim[:12] in home for home in before.homes)
    said = len(cluster.evaluations())
    cluster.kill(victim)
    _say(f"killed {kind} {victim[:12]}" + (f", which has {lost} of the shards" if lost else ""))
    if kind == "evaluator" or (kind == "worker" and workers > 1):
        meanwhile = watch.sight("the others train on", lambda sight: sight.step > before.step)
        _say(f"without it   {meanwhile}")
    time.sleep(away)
    began = time.monotonic()
    cluster.up("--no-build", "--no-recreate")
    if victim not in cluster.containers(kind):
        raise Failed(f"`up` did not start {kind} {victim[:12]} again")
    opened = watch.sight("the run is open, with every shard", lambda sight: True)
    _say(f"it is back   {opened}")
    after = watch.sight(
        "the steps rise, of as many workers as before",
        lambda sight: sight.epoch == opened.epoch and sight.step > opened.step and len(sight.workers) == workers,
    )
    _say(f"it trains    {after}  {time.monotonic() - began:.0f} s after `up`")
    if not 0 <= after.epoch - before.epoch <= lost:
        raise Failed(f"the epoch was {before.epoch} and is {after.epoch}, after {lost} shards were lost")
    if len(after.homes) != len(before.homes):
        raise Failed(f"the run had {len(before.homes)} shards and has {len(after.homes)}")
    watch.until("the evaluator goes on", lambda: cluster.evaluations()[said:] or None)


def rehearse(cluster: Cluster, options: argparse.Namespace) -> None:
    """All of it, on a cluster that is not up yet. Raises Failed."""
    watch = Watch(cluster, options.patience)
    _say(f"builds and starts {options.shard} shard and {options.worker} worker containers")
    cluster.up("--build")
    first = watch.sight("the run is open", lambda sight: True)
    began = watch.sight("the steps rise", lambda sight: sight.step > first.step)
    _say(f"it trains    {began}")
    for kind in KINDS:
        survive(cluster, watch, kind, options.worker, options.away)
    said = len(cluster.evaluations())

    def reached() -> tuple[int, float] | None:
        return next((each for each in cluster.evaluations()[said:] if each[1] >= options.target), None)

    step, accuracy = watch.until(f"x has an accuracy of {options.target:.1%}", reached)
    _say(f"the evaluator says: at step {step} x has a test accuracy of {accuracy:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shard", type=_count, default=3, help="containers that own shards (%(default)s)")
    parser.add_argument("--worker", type=_count, default=4, help="containers that train (%(default)s)")
    parser.add_argument("--away", type=float, default=0, help="seconds until one is brought back (%(default)s)")
    parser.add_argument("--target", type=float, default=0.95, help="accuracy that x is to end with (%(default)s)")
    parser.add_argument("--patience", type=float, default=240, help="seconds for each thing to come (%(default)s)")
    parser.add_argument("-f", "--file", type=Path, action="append", default=[], help="a compose file on top of ours")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up")
    options = parser.parse_args()
    cluster = Cluster([file.resolve() for file in options.file], {"shard": options.shard, "worker": options.worker})
    try:
        cluster.down()
        rehearse(cluster, options)
    except (Failed, subprocess.CalledProcessError) as error:
        output = error.stderr if isinstance(error, subprocess.CalledProcessError) else cluster.logs()
        sys.stderr.write(f"{output}\nFAILED: {error}\n")
        return 1
    finally:
        if not options.keep:
            cluster.down()
    _say("survived")
    return 0


def _compose() -> list[str]:
    if not shutil.which("docker"):
        sys.exit("docker is not installed")
    if not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    sys.exit("neither `docker compose` nor `docker-compose` is installed")


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def _say(what: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
