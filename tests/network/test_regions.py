"""Two regions with two workers each, 50 or 100 ms and 100 Mbit/s from their parent, beside the workers without regions.

All train the lab's character model on the same batches. Two regions that go round by round come within 2% of the
validation loss, or below it, with less than a tenth of the bytes on the cables. docs/guides/regions.md has the figures:

    python -m pytest -m evidence -s tests/network/test_regions.py [-k 100ms]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from examples.lab.characters import Text
from freestep import Client
from harness import TOKEN, wait_ready
from meanwhile import wait_until
from network.hosts import Network, Unavailable
from network.region_worker import LENGTH, model_of

ROOT = Path(__file__).parent.parent.parent
PARENT, REGIONS = "parent", ("region-0", "region-1")
WORKERS, BATCHES, EVERY = 4, 320, 8
WIDTH, LAYERS = 64, 2
PACE_MS = 100
PORT, WATCHED_WINDOWS = 8000, 256
DELAYS_MS = (50, 100)
"""Each way."""


class Site:
    """The network, and the processes on its hosts."""

    def __init__(self, network: Network, folder: Path, stack: ExitStack) -> None:
        self.network, self.folder, self._stack = network, folder, stack

    def start(self, host: str, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}:{ROOT / 'service'}:{ROOT / 'tests'}"}
        environment |= {"FREESTEP_PARENT_TOKEN": TOKEN, "FREESTEP_RETRY_SECONDS": "600", "OMP_NUM_THREADS": "1"}
        process = self.network.start(host, [sys.executable, *command], env=environment, **options)
        self._stack.callback(_end, process)
        return process

    def end(self) -> None:
        """Ends all processes."""
        self._stack.close()

    def serve(self, host: str) -> str:
        """A service on a host, at its address and, for its own workers, there too."""
        url = f"http://{self.network.addresses[host]}:{PORT}"
        flags = ["--host", self.network.addresses[host], "--advertise-url", url, "--port", str(PORT)]
        process = self.start(
            host, "-m", "freestep.cli", "serve", *flags, "--data-dir", str(self.folder / f"{host}-{time.time_ns()}")
        )
        with self.network.inside(host):
            wait_ready(url, lambda: process.poll() is None)
        return url

    def work(self, host: str, url: str, worker: int, group: int) -> subprocess.Popen[bytes]:
        numbers = (worker, WORKERS, group, BATCHES, WIDTH, LAYERS, PACE_MS)
        return self.start(
            host,
            str(Path(__file__).with_name("region_worker.py")),
            url,
            "lm",
            *map(str, numbers),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def region(self, host: str, url: str, parent: str, *options: str) -> subprocess.Popen[bytes]:
        file = ["--file", str(self.folder / f"{host}.region")]
        given = ["lm", "--url", url, "--parent", parent, "--every", str(EVERY), *file, *options]
        return self.start(host, "-m", "freestep.cli", "region", *given)

    def wait_joined(self, host: str, url: str) -> None:
        """Returns when a region's run was moved to its parent's weights, which begins an epoch."""
        with self.network.inside(host), Client(url) as client:
            run = client.run("lm")
            wait_until(lambda: run.status().epoch > 1 and not run.status().control.paused)

    def loss(self, url: str) -> float:
        """The validation loss at x of the run, as the watcher pulls it."""
        text = Text(LENGTH)
        model = model_of(text, WIDTH, LAYERS)
        with self.network.inside("watcher"), Client(url) as client:
            model.load_state_dict(client.run("lm").pull("x")[0])
        return model.mean_loss(text.validation_windows(WATCHED_WINDOWS))

    def sent(self) -> int:
        """Bytes on the cables of the regions' hosts, so far."""
        return sum(self.network.bytes_of(host) for host in REGIONS)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(params=DELAYS_MS, ids=lambda delay: f"{delay}ms")
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    try:
        network = Network([PARENT, *REGIONS], loss=0.0, delay_ms=request.param)
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        with ExitStack() as stack:
            yield Site(network, tmp_path, stack)
    finally:
        network.close()


def _wait_ready(workers: list[subprocess.Popen[bytes]]) -> None:
    """Returns when their runs have weights."""
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"


def _train(workers: list[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    """Has them train at the same time; what they say at the end."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    return [json.loads(worker.communicate()[0]) for worker in workers]


def _directly(site: Site) -> dict[str, float]:
    """All workers at the parent's service, two of them on each of the regions' hosts."""
    url, before = site.serve(PARENT), site.sent()
    workers = [site.work(REGIONS[number % 2], url, number, WORKERS) for number in range(WORKERS)]
    _wait_ready(workers)
    began = time.monotonic()
    _train(workers)
    return {"loss": site.loss(url), "bytes": site.sent() - before, "seconds": time.monotonic() - began}


def _by_regions(site: Site) -> dict[str, float]:
    """Two workers at each region's service."""
    parent, urls = site.serve(PARENT), [site.serve(host) for host in REGIONS]
    before, own = site.sent(), list(zip(REGIONS, urls, strict=True))
    workers = [site.work(*own[number % 2], number, WORKERS // 2) for number in range(WORKERS)]
    _wait_ready(workers)
    regions = [site.region(host, url, parent) for host, url in own]
    for host, url in own:
        site.wait_joined(host, url)
    began = time.monotonic()
    said = _train(workers)
    for process in regions:
        process.terminate()
        process.wait()
    last = [site.region(host, url, parent, "--once") for host, url in own]
    assert [process.wait() for process in last] == [0, 0]
    found = {"loss": site.loss(parent), "bytes": site.sent() - before, "seconds": time.monotonic() - began}
    with site.network.inside("watcher"), Client(parent) as client:
        found["rounds"] = client.run("lm").status().step
    return {**found, "dropped": sum(each["dropped"] for each in said)}


@pytest.mark.evidence
@pytest.mark.timeout(1800)
def test_two_regions_train_as_one_with_a_tenth_of_the_bytes(site: Site) -> None:
    regions = _by_regions(site)
    site.end()
    direct = _directly(site)
    network = site.network
    found = {"netem": network.netem, "ms": network.delay_ms, "batches": BATCHES, "regions": regions, "direct": direct}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    assert regions["loss"] < 1.02 * direct["loss"]
    assert regions["bytes"] < direct["bytes"] / 10
