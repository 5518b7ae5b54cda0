"""Services that are killed or restarted: what is kept, what is lost and reported, what goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

import forked
from forked import Script
from harness import ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import SGD, TENSORS, Api, slug
from raw_pushes import half_of_a_push, is_pending


@pytest.mark.slow
def test_after_a_kill_a_run_goes_on_from_its_last_checkpoint(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "kept")
    assert api.http.post(api.path("/checkpoints")).json()["step"] == 1
    kept, _ = api.pull("x")
    api.push(lease, 1, "lost")
    service.kill()
    service.start()
    status = api.status()
    assert (status["epoch"], status["step"], status["initialized"]) == (2, 1, True)
    x, _ = api.pull("x")
    assert all(torch.equal(x[name], kept[name]) for name in TENSORS)
    assert api.push(lease, 0, "kept").json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": True}
    assert slug(api.push(lease, 1, "lost")) == "epoch-changed"
    fresh = api.lease()
    assert fresh["token"] > lease["token"]
    assert fresh["epoch"] == 2
    assert api.push(fresh, 1).json()["step"] == 2


@pytest.mark.slow
def test_after_a_kill_the_embedded_store_starts_anew(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "kept")
    api.http.post(api.path("/checkpoints"))
    service.kill()
    service.start()
    assert api.status()["epoch"] == 2
    assert api.push(lease, 0, "kept").json()["replayed"] is True
    assert slug(api.push(lease, 1)) == "lease-expired"
    fresh = api.lease()
    assert fresh["token"] > lease["token"]
    assert api.push(fresh, 1).json()["step"] == 2


def test_an_orderly_restart_loses_nothing(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    first = start_service(redis_url=redis_url)
    api = connect(first.url)
    api.create()
    lease = api.lease()
    for step in range(3):
        api.push(lease, step, f"key-{step}")
    points = api.state(first)["points"]
    first.stop()
    second = start_service(redis_url=redis_url)
    again = connect(second.url, api.run)
    status = again.status()
    assert (status["epoch"], status["step"]) == (1, 3)
    assert again.state(second)["points"] == points
    assert again.push(lease, 2, "key-2").json()["replayed"] is True
    assert again.push(lease, 3).json() == {"decision": "applied", "step": 4, "staleness": 0, "replayed": False}


@pytest.mark.slow
def test_an_orderly_restart_of_a_process_keeps_epoch_and_leases(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "key")
    service.stop()
    service.start()
    assert (api.status()["epoch"], api.status()["step"]) == (1, 1)
    assert api.push(lease, 0, "key").json()["replayed"] is True
    assert api.push(lease, 1).json()["step"] == 2


def test_a_live_lease_keeps_its_receipts_in_its_window(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    """A window keeps a lease's receipts, however many other leases have ended since."""
    first = start_service(redis_url=redis_url)
    api = connect(first.url)
    api.create()
    lives, leaves = api.lease("lives"), api.lease("leaves")
    api.push(lives, 0, "live")
    api.push(leaves, 1, "ended")
    api.http.delete(api.path(f"/leases/{leaves['lease']}"))
    first.stop()
    second = start_service(redis_url=redis_url)
    prefix = api.redis_key()
    kept = second.redis_dump(prefix)
    assert kept[f"{prefix}window:{lives['lease']}"] == ["live"]
    assert kept[f"{prefix}ended"] == ["ended"]


def test_a_group_survives_an_orderly_restart(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    first = start_service()
    api = connect(first.url)
    api.create(optimizer=SGD, aggregation={"policy": "quorum", "batch": 2})
    gradient = {name: 0.5 * tensor for name, tensor in TENSORS.items()}
    assert api.push(api.lease("one"), 0, "one", tensors=gradient, Freestep_Samples="3").json()["step"] == 0
    first.stop()
    again = connect(start_service().url, api.run)
    assert again.push(again.lease("one"), 0).json()["reason"] == "duplicate-worker"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    assert again.push(again.lease("two"), 0, tensors=zeros).json()["decision"] == "applied"
    torch.testing.assert_close(again.pull("y")[0]["w"], (1 - 0.5 * 3 / 4) * TENSORS["w"])


@pytest.mark.slow
def test_without_durability_a_run_starts_over(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create(durability="none")
    api.push(api.lease(), 0)
    service.kill()
    service.start()
    status = api.status()
    assert (status["epoch"], status["step"], status["initialized"]) == (2, 0, False)
    assert api.initialize().status_code == 201
    assert api.push(api.lease(), 0).json()["step"] == 1


UPLOADER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    connection.sendall(sys.stdin.buffer.read())
    print("half sent", flush=True)
    connection.recv(1)
"""


def test_a_worker_that_is_killed_in_mid_upload_leaves_nothing(service: ThreadService, api: Api) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0)
    before = api.state(service)
    command = [sys.executable, "-c", UPLOADER, str(httpx.URL(api.url).port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(half_of_a_push(api, lease, 1, "key"))
        worker.stdin.close()
        assert worker.stdout.readline() == b"half sent\n"
        wait_until(lambda: is_pending(service, api, "key"))
        worker.kill()
    wait_until(lambda: not is_pending(service, api, "key"))
    assert api.state(service) == before
    assert api.push(lease, 1, "key").json() == {"decision": "applied", "step": 2, "staleness": 0, "replayed": False}


WORKER = """
import sys, torch, freestep
torch.set_num_threads(1)
url, steps = sys.argv[1], int(sys.argv[2])
model = torch.nn.Linear(4, 2)
client = freestep.Client(url, retry_for=60)
with freestep.RemoteOptimizer(model, client=client, run="restarted", algorithm="sgd_schedule_free", lr=0.1) as opt:
    print("joined", flush=True)
    while opt.loaded.step < steps or opt.loaded.epoch == 1:
        opt.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        opt.step()
    print(opt.loaded.epoch, flush=True)
client.close()
"""


@pytest.mark.slow
def test_workers_go_on_by_themselves_after_the_service_was_killed(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process(checkpoint_steps=10, checkpoint_seconds=0.1)
    with Script(WORKER, service.url, "60") as one, Script(WORKER, service.url, "60") as other:
        for worker in (one, other):
            assert worker.read_line() == "joined"
        api = connect(service.url, "restarted")
        wait_until(lambda: api.http.get(api.path("/checkpoints")).json()["checkpoints"][-1]["step"] > 0)
        service.kill()
        service.start()
        for worker in (one, other):
            assert worker.read_line() == "2"
            assert worker.wait() == 0
    assert api.status()["epoch"] == 2


def test_two_services_do_not_share_a_data_directory(
    start_service: Callable[..., ThreadService], tmp_path: Path
) -> None:
    start_service(tmp_path / "data")
    second = forked.freestep("serve", "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert second.returncode == 1
    assert second.stderr == (
        f"freestep serve: another service uses the data directory {tmp_path / 'data'}: end it, or name another with "
        "data_dir\n"
    )


def test_readers_go_on_while_steps_are_taken(service: ThreadService, api: Api, connect: Callable[..., Api]) -> None:
    """Each pull is one step's cut: SGD with these gradients keeps all elements of y equal."""
    ones = {"w": torch.ones(50_000)}
    api.http.put(api.path(), json=api.spec(optimizer=SGD, parameters=[{"name": "w", "shape": [50_000]}]))
    api.initialize(ones)
    lease = api.lease()
    stop = threading.Event()

    def read(caller: Api) -> None:
        while not stop.is_set():
            y, step = caller.pull("y")
            assert torch.equal(y["w"], torch.full((50_000,), 1.0 - step)), step

    readers = [under_way(partial(read, connect(service.url, api.run))) for _ in range(4)]
    for step in range(60):
        api.push(lease, step, tensors=ones)
    stop.set()
    for reader in readers:
        reader.result()
