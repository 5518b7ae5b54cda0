"""Every push counts once, whatever becomes of the connections that carry it.

The run is plain SGD with learning rate 1 and every gradient is -1, so the parameter counts the pushes applied.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import torch

from harness import Api, ThreadService

WORKERS = 6
PUSHES = 25
BODY = safetensors.torch.save({"count": -torch.ones(2000)})


def cut_push(api: Api, lease: dict[str, str], step: int, key: str, chance: random.Random) -> None:
    """Sends a push over a connection that is cut: in the head, in the body, or before the answer is read."""
    lines = {**api.headers(lease, step, key), "Host": "test", "Content-Length": str(len(BODY))}
    head = f"POST {api.path('/gradients')} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    message = head.encode() + BODY
    where = chance.choice([len(head) // 2, len(head), len(head) + len(BODY) // 2, len(message) - 1, len(message)])
    address = urlsplit(api.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        if chance.random() < 0.5:
            # A reset instead of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(message[:where])


def worker(api: Api, name: str, seed: int, steps: dict[str, int]) -> None:
    chance = random.Random(seed)
    lease = api.lease(name)
    for number in range(PUSHES):
        key = f"{name}-{number}"
        step = int(api.status()["step"])
        for _ in range(chance.randrange(3)):
            cut_push(api, lease, step, key, chance)
        twin = threading.Thread(target=api.push, args=(lease, step, key), kwargs={"body": BODY})
        twin.start()
        answer = api.push(lease, step, key, body=BODY)
        twin.join()
        assert answer.status_code == 200, answer.text
        steps[key] = answer.json()["step"]


@pytest.mark.parametrize("policy", [{"policy": "async"}, {"policy": "buffered", "batch": 5}])
def test_cut_connections_and_twins_apply_once(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], policy: dict[str, object]
) -> None:
    service = start_service(stall_seconds=2)
    api = connect(service.url)
    spec = {
        "optimizer": {"algorithm": "sgd", "lr": 1.0},
        "aggregation": policy,
        "parameters": [{"name": "count", "shape": [2000]}],
    }
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize({"count": torch.zeros(2000)}).status_code == 201
    steps: dict[str, int] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            worker(connect(service.url, api.run), f"worker-{number}", number, steps)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    updates = WORKERS * PUSHES // int(policy.get("batch", 1))
    status = api.status()
    assert status["step"] == updates
    assert status["pushes"]["dropped"] == 0
    y, step = api.pull("y")
    assert step == updates
    assert torch.equal(y["count"], torch.full((2000,), float(updates)))
    if policy["policy"] == "async":
        assert sorted(steps.values()) == list(range(1, updates + 1))
