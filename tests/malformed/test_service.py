"""The hostile bodies against the service: refused by name, in bounded memory, with everything left as it was."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from harness import Api, ProcessService, ThreadService, slug
from malformed.bodies import BODIES, NON_FINITE, PARAMETERS, valid

MIB = 1024**2


@pytest.fixture
def hostile(api: Api) -> Api:
    """A run with the parameters that the bodies are made for."""
    assert api.http.put(api.path(), json=api.spec(parameters=PARAMETERS)).status_code == 201
    return api


def initialize(api: Api, body: bytes) -> str:
    headers = {"Content-Type": "application/vnd.safetensors"}
    answer = api.http.put(api.path("/parameters"), content=body, headers=headers)
    return "" if answer.is_success else slug(answer)


@pytest.mark.parametrize("name", BODIES)
def test_as_a_gradient(hostile: Api, service: ThreadService, name: str) -> None:
    assert initialize(hostile, valid()) == ""
    lease = hostile.lease()
    before = hostile.state(service)
    answer = hostile.push(lease, 0, "key", body=BODIES[name]())
    assert slug(answer) == ("non-finite-gradient" if name in NON_FINITE else "malformed-tensors")
    assert answer.status_code == 422
    assert hostile.state(service) == before
    assert hostile.push(lease, 0, "key", body=valid()).json()["step"] == 1


@pytest.mark.parametrize("name", BODIES)
def test_as_initial_weights(hostile: Api, name: str) -> None:
    assert initialize(hostile, BODIES[name]()) == "malformed-tensors"
    assert hostile.status()["initialized"] is False
    assert initialize(hostile, valid()) == ""


def test_memory_is_bounded(start_process: Callable[..., ProcessService], connect: Callable[..., Api]) -> None:
    service = start_process()
    assert service.process is not None
    api = connect(service.url)
    api.http.put(api.path(), json=api.spec(parameters=PARAMETERS))
    assert initialize(api, valid()) == ""
    lease = api.lease()
    process = psutil.Process(service.process.pid)
    bodies = [make() for make in BODIES.values()]
    for body in bodies:
        api.push(lease, 0, body=body)
    before = process.memory_info().rss
    for _ in range(10):
        for body in bodies:
            assert api.push(lease, 0, body=body).status_code == 422
    assert process.memory_info().rss < before + 32 * MIB
