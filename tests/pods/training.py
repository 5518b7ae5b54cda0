"""Two runs that count, one of each durability, which the release's workers train in turns; what these were told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import safetensors.torch
from torch import Tensor

from plain_calls import Api, persistently
from pods.cluster import Cluster
from pods.pod import Pod
from pods.release import LENGTH, SHARDS, WORKERS, Release

__all__ = ["CHECKPOINT", "JOURNAL", "Told", "Training"]

JOURNAL, CHECKPOINT = "journal", "checkpoint"
_LEASE_TTL_MS = 60_000
"""So long that no lease ends by itself while a test looks for those that were released."""


@dataclass(frozen=True, order=True)
class Told:
    """What a worker was told of a push."""

    epoch: int
    step: int
    decision: str
    example: int


class Training:
    """Runs NAME-journal and NAME-checkpoint, of these durabilities, on all processes of the service.

    kind: of what the workers belong to.
    length: the examples of each.
    """

    def __init__(
        self, release: Release, name: str, workers: int, kind: str = "Deployment", length: int = LENGTH
    ) -> None:
        self.release = release
        self.name = name
        self._before = set(release.cluster.every())
        common = {"shards": 2, "aggregation": "async", "lease_ttl_ms": _LEASE_TTL_MS}
        self._runs = {each: {**common, "durability": each} for each in (JOURNAL, CHECKPOINT)}
        release.train(name, workers, kind, length, self._runs)
        self.cluster.wait_until(lambda: len(self.busy()) == workers)

    @property
    def cluster(self) -> Cluster:
        return self.release.cluster

    def workers(self) -> list[Pod]:
        """All workers' pods that there have been, and are."""
        every = [pod for pod in self.cluster.every() if pod not in self._before]
        return [pod for pod in every if pod.owner[1].startswith(WORKERS)]

    def busy(self) -> list[Pod]:
        """Those that stay and were told of a push."""
        return [pod for pod in self.workers() if not pod.leaving and pod.lines()]

    def told(self, end: str) -> list[Told]:
        """What all workers were told of their pushes to a run, in the order of steps."""
        lines = [line.split() for pod in self.workers() for line in pod.lines()]
        return sorted(
            Told(int(epoch), int(step), decision, int(example))
            for which, epoch, decision, step, example in lines
            if which == end
        )

    def newest(self, end: str) -> tuple[int, int]:
        """Epoch and step of the newest push that a worker was told of."""
        return max((each.epoch, each.step) for each in self.told(end))

    def go_on(self, pushes: int = 20) -> None:
        """Returns when each worker that stays has been told of so many more pushes to each run."""
        counts = {pod: len(pod.lines()) for pod in self.workers()}
        self.cluster.wait_until(
            lambda: all(len(pod.lines()) >= counts.get(pod, 0) + 2 * pushes for pod in self._staying())
        )

    def _staying(self) -> list[Pod]:
        return self.cluster.of("Deployment", WORKERS)

    def scale(self, workers: int) -> None:
        """Has so many workers train, all of which have been told of a push when it returns."""
        self.release.upgrade({"workers": {"replicas": workers}})
        self.cluster.wait_until(lambda: len(self.busy()) == workers == len(self._staying()))
        self.cluster.wait_ready()

    def api(self, end: str) -> Api:
        """Plain calls to a run, at a process that is ready; the caller closes it."""
        pod = next(pod for pod in self.cluster.of("StatefulSet", SHARDS) if pod.ready)
        return Api(f"http://{pod.address}:8000", f"{self.name}-{end}")

    def ask(self, end: str, call: Callable[[Api], httpx.Response]) -> httpx.Response:
        """The answer to a plain call, which is repeated while the run cannot be asked."""
        api = self.api(end)
        with api.http:
            answer = persistently(lambda: call(api))
        assert answer.is_success, answer.text
        return answer

    def status(self, end: str) -> dict[str, Any]:
        return dict(self.ask(end, lambda api: api.http.get(api.path())).json())

    def checkpoint(self, end: str) -> int:
        """Has a checkpoint written; its step."""
        return int(self.ask(end, lambda api: api.http.post(api.path("/checkpoints"))).json()["step"])

    def counts(self, end: str) -> tuple[Tensor, int]:
        """How often each example has counted, and the step at which; together they are one push for each step."""
        answer = self.ask(end, lambda api: api.http.get(api.path("/parameters"), params={"point": "y"}))
        counts, step = safetensors.torch.load(answer.content)["count"], int(answer.headers["Freestep-Step"])
        assert set(counts.unique().tolist()) <= {0.0, 1.0}, "an example counts twice"
        assert int(counts.sum()) == step
        return counts, step

    def finish(self, survives: Callable[[str, Told], bool] = lambda end, told: True) -> None:
        """Ends all workers in order, compares what counts with what they were told, and deletes the runs.

        survives: whether a push that a worker was told of still counts, by the end of its run.
        """
        self.scale(0)
        for end in self._runs:
            counts, step = self.counts(end)
            status = self.status(end)
            assert status["workers"] == [], "leases that have not ended with their workers"
            assert status["data"]["train"]["done"] == step
            applied = [each for each in self.told(end) if each.decision == "applied"]
            places = Counter((each.epoch, each.step) for each in applied)
            assert set(places.values()) == {1}, "two pushes are told of one step"
            counted = set(counts.nonzero().flatten().tolist())
            kept = {each.example for each in applied if survives(end, each)}
            assert kept and kept <= counted, f"lost: {sorted(kept - counted)}"
            # A worker that is ended may have sent one push whose answer it has not told.
            untold = counted - {each.example for each in applied}
            assert len(untold) <= len(self.workers()), f"nobody was told of {sorted(untold)}"
            self.ask(end, lambda api: api.http.delete(api.path()))
