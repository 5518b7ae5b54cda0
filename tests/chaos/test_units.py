"""Every unit of a data set counts once in each pass, whatever is killed.

The run is plain SGD with learning rate 1, and the gradient of a push is -1 at the numbers of its units: so each
parameter counts how often its unit has moved the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_calls import create, show
from forked import Script
from harness import ProcessService
from plain_calls import SGD, Api, persistently

TESTS = str(Path(__file__).parents[1])
UNITS = 150
"""Of two passes."""

WORKER = """
import os, sys, time, uuid
sys.path.insert(0, {tests!r})
import httpx, torch
from data_calls import ask, push
from plain_calls import Api

api, name = Api({url!r}, {run!r}), sys.argv[1]
# That of the harness is another one in each process.
api.http.headers["Authorization"] = "Bearer " + os.environ["FREESTEP_TOKEN"]
lease = None

def until_answered(call):
    # A service that was killed is back on the same port soon.
    while True:
        try:
            answer = call()
        except httpx.TransportError:
            time.sleep(0.05)
            continue
        if answer.status_code not in (429, 503):
            return answer
        time.sleep(0.05)

while True:
    if lease is None:
        wish = {{"worker": name, "ttl_ms": 1500}}
        answer = until_answered(lambda: api.http.post(api.path("/leases"), json=wish))
        assert answer.status_code == 201, answer.text
        lease = answer.json()
    key = uuid.uuid4().hex
    answer = until_answered(lambda: ask(api, lease, 3, Idempotency_Key=key, Prefer="wait=1"))
    if answer.status_code in (409, 410):
        lease = None
        continue
    units = [each["unit"] for each in answer.json()["units"]]
    if answer.json()["exhausted"]:
        break
    if not units:
        continue
    gradient = torch.zeros({units})
    gradient[units] = -1
    marks = "train=" + ",".join(map(str, units))
    step = until_answered(lambda: api.http.get(api.path())).json()["step"]
    key = uuid.uuid4().hex
    answer = until_answered(lambda: push(api, lease, step, marks, key, tensors={{"count": gradient}}))
    print(answer.status_code, flush=True)
    if answer.status_code != 200:
        # Whatever was refused, its units are others' to push.
        lease = None
print("end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_every_unit_counts_once_though_workers_and_the_service_are_killed(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str, seed: int
) -> None:
    chance = random.Random(seed)
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    spec = {"optimizer": SGD, "parameters": [{"name": "count", "shape": [UNITS]}], "aggregation": {"policy": "async"}}
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize({"count": torch.zeros(UNITS)}).status_code == 201
    assert create(api, length=UNITS // 2 * 4 - 1, unit=4, passes=2).status_code == 201
    source = WORKER.format(tests=TESTS, url=service.url, run=api.run, units=UNITS)
    workers = [Script(source, f"worker-{number}") for number in range(3)]
    kills = 0
    try:
        for round_ in range(12):
            for worker in workers:
                for _ in range(chance.randrange(4)):
                    worker.read_line()
            victim = chance.randrange(len(workers) + 1)
            if victim < len(workers):
                workers[victim].kill()
                workers[victim] = Script(source, f"worker-{victim}")
            else:
                service.kill()
                service.start()
                kills += 1
            if round_ % 3 == 0:
                assert persistently(lambda: api.http.post(api.path("/checkpoints"))).is_success
        # Those may have ended before the last kill, which the run went back to a checkpoint after.
        workers.append(Script(source, "worker-last"))
        for worker in workers:
            assert worker.wait() == 0
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    assert kills
    y, _ = api.pull("y")
    assert torch.equal(y["count"], torch.ones(UNITS))
    status = show(api)
    assert status["exhausted"] and (status["done"], status["examples_done"]) == (UNITS, 2 * (UNITS // 2 * 4 - 1))
