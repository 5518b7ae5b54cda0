"""The client's bodies in memory that it shares with a service: the same run, and what becomes of either side."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

import freestep.shared_memory
from every_encoder import MAKERS
from forked import Script
from freestep import (
    Client,
    Flat,
    IdempotencyConflict,
    InvalidSetting,
    LeaseExpired,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
)
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from harness import AUTHORIZED, ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import SGD
from proxies import Cutter

pytestmark = pytest.mark.skipif(not freestep.shared_memory._IS_POSSIBLE, reason="there is no such memory here")

SHAPES = {"w": (300, 200), "b": (7,), "e": (0, 4), "m": (300_000,)}
MANIFEST = Manifest([ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items()])
PUSHER = Path(__file__).with_name("sharing_worker.py")


def spec(**others: Any) -> dict[str, Any]:
    parameters = [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()]
    return {"optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.01}, "parameters": parameters, **others}


def filled(seed: int = 0) -> Flat:
    flat = Flat(MANIFEST)
    flat.vector.normal_(generator=torch.Generator().manual_seed(seed))
    return flat


@pytest.fixture
def joined() -> Iterator[Callable[..., Run]]:
    """Runs as clients of their own see them, deleted with the test."""
    with ExitStack() as stack:

        def join(service: ThreadService | ProcessService, name: str, *, url: str = "", **options: Any) -> Run:
            client = stack.enter_context(Client(url or service.url, retry_for=60, **options))
            return client.run(name)

        yield join


@pytest.fixture
def new(joined: Callable[..., Run]) -> Iterator[Callable[..., Run]]:
    """... made anew, with weights."""
    made: list[Run] = []

    def make(
        service: ThreadService | ProcessService, name: str, given: dict[str, Any] | None = None, **options: Any
    ) -> Run:
        run = joined(service, name, **options)
        run.create(given or spec())
        run.initialize(filled(99))
        made.append(run)
        return run

    yield make


def budget_free(service: ThreadService) -> int:
    return service.registry._resources.memory.free


def exchanged(run: Run, dtype: str = "F32", *, steps: int = 3) -> list[Tensor]:
    """What a worker receives in some steps."""
    received = []
    with run.lease("w") as lease:
        for step in range(steps):
            into = Flat(run.manifest, dtype)
            receipt, pulled = run.exchange(filled(step), lease.claim(step), into)
            assert (receipt.decision, pulled.step) == ("applied", step + 1)
            received.append(into.vector)
    return received


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "I8"])
@pytest.mark.parametrize("durability", ["none", "journal"])
def test_what_is_exchanged_is_the_same_to_the_bit(
    service: ThreadService, new: Callable[..., Run], name: str, dtype: str, durability: str
) -> None:
    here = new(service, name, spec(durability=durability))
    there = new(service, f"{name}-there", spec(durability=durability), shared_memory=False)
    received = exchanged(here, dtype)
    for mine, its in zip(received, exchanged(there, dtype), strict=True):
        assert torch.equal(mine, its)
    assert not there.shares_memory
    for run in (here, there):
        run.delete()


@pytest.mark.parametrize("kind", MAKERS)
def test_encoded_pushes_are_the_same_to_the_bit(
    service: ThreadService, new: Callable[..., Run], name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.shared_memory._SMALLEST", 0)
    runs = [
        new(service, name, spec(optimizer=SGD)),
        new(service, f"{name}-t", spec(optimizer=SGD), shared_memory=False),
    ]
    received = []
    for run in runs:
        encoder, into = MAKERS[kind](Flat(MANIFEST)), Flat(MANIFEST)
        with run.lease("w") as lease:
            for step in range(3):
                encoder.gradient.vector.copy_(filled(step).vector)
                encoder.begin()
                run.exchange(encoder, lease.claim(step), into)
            assert run.shares_memory == (run is runs[0])
        received.append((into.vector, encoder.residual))
        run.delete()
    assert all(map(torch.equal, *received))


def test_an_optimizer_shares_memory_by_itself(service: ThreadService, name: str) -> None:
    model = torch.nn.Linear(600, 600)
    free = budget_free(service)
    with RemoteOptimizer(model, url=service.url, run=name) as optimizer:
        assert not optimizer.shares_memory
        for number in range(3):
            optimizer.zero_grad()
            model(torch.full((4, 600), float(number))).square().mean().backward()
            optimizer.step(overlap=number == 1)
        assert optimizer.shares_memory
        optimizer.eval()
        x, _ = optimizer._run.pull("x")
        assert torch.equal(x["weight"], model.weight)
        assert budget_free(service) < free
    # With the lease, without anybody having waited for it.
    with Client(service.url) as client:
        client.run(name).delete()
    wait_until(lambda: budget_free(service) == free)


def test_small_bodies_share_none(service: ThreadService, name: str) -> None:
    model = torch.nn.Linear(3, 3)
    with RemoteOptimizer(model, url=service.url, run=name) as optimizer:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert not optimizer.shares_memory


def test_the_environment_turns_it_off(
    service: ThreadService, new: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREESTEP_SHARED_MEMORY", "false")
    run = new(service, name)
    exchanged(run)
    assert not run.shares_memory
    run.delete()
    monkeypatch.setenv("FREESTEP_SHARED_MEMORY", "perhaps")
    with pytest.raises(InvalidSetting, match="FREESTEP_SHARED_MEMORY"):
        Client(service.url)
    Client(service.url, shared_memory=True).close()


@pytest.mark.parametrize("is_off", [True, False], ids=["off", "no room"])
def test_where_a_service_gives_none_bodies_go_over_connections(
    start_service: Callable[..., ThreadService], new: Callable[..., Run], name: str, is_off: bool
) -> None:
    service = start_service(shared_memory=not is_off)
    run = new(service, name)
    if not is_off:
        service.registry._resources.memory.reserve("others", budget_free(service))
    with run.lease() as lease:
        for step in range(2):
            assert run.push(filled(), lease.claim(step)).step == step + 1
        assert not run.shares_memory


class Hooked:
    """An HTTP client of the user's own, and whether its requests named a memory; it drops the headers that do so."""

    def __init__(self, url: str) -> None:
        self.named: list[tuple[str, bool]] = []
        self.drops = False
        self.http = httpx.Client(base_url=url, headers=AUTHORIZED, event_hooks={"request": [self._pass]})

    def _pass(self, request: httpx.Request) -> None:
        if request.url.path.endswith(("/gradients", "/parameters")):
            self.named.append((request.method, "Freestep-Memory" in request.headers))
        if self.drops:
            for header in ("Freestep-Memory", "Freestep-Span"):
                request.headers.pop(header, None)


def test_an_http_client_of_the_users_own_shares_memory_if_it_is_told_to(
    service: ThreadService, new: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREESTEP_SHARED_MEMORY", "true")
    for given in (None, True):
        hooked = Hooked(service.url)
        run = new(service, f"{name}-{given}", http=hooked.http, shared_memory=given)
        with run.lease() as lease:
            run.push(filled(), lease.claim(0))
            assert run.shares_memory == bool(given)
            assert hooked.named[-1] == ("POST", bool(given))
        run.delete()


def test_where_headers_are_dropped_bodies_go_over_the_connection(
    service: ThreadService, new: Callable[..., Run], name: str
) -> None:
    hooked = Hooked(service.url)
    run = new(service, name, http=hooked.http, shared_memory=True)
    with run.lease() as lease:
        hooked.drops = True
        hooked.named.clear()
        for step in range(2):
            assert run.push(filled(), lease.claim(step)).step == step + 1
        # In memory once, and over the connection.
        assert hooked.named == [("POST", True), ("POST", False), ("POST", False)]
        assert not run.shares_memory
    run.delete()


def test_who_waits_for_a_point_keeps_no_memory_from_pushes(
    service: ThreadService, new: Callable[..., Run], name: str
) -> None:
    hooked = Hooked(service.url)
    run = new(service, name, http=hooked.http, shared_memory=True)
    with run.lease() as lease:
        run.exchange(filled(), lease.claim(0), Flat(MANIFEST))
        hooked.named.clear()
        run.pull("y")
        run.pull("y", min_step=1, wait=1.0)
        assert hooked.named == [("GET", True), ("GET", False)]
    run.delete()


def test_another_users_socket_is_not_spoken_to(
    service: ThreadService, new: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tests/client/test_unix_peers.py has real users.
    monkeypatch.setattr("freestep.shared_memory.is_of_this_user", lambda connection: False)
    run = new(service, name)
    exchanged(run)
    assert not run.shares_memory
    run.delete()


def test_over_tls(tls_service: ThreadService, new: Callable[..., Run], name: str) -> None:
    run = new(tls_service, name, verify=str(tls_service.settings.ca_certs))
    with run.lease() as lease:
        assert run.push(filled(), lease.claim(0)).step == 1
        assert run.shares_memory
    run.delete()


def test_through_a_proxy_on_this_machine(service: ThreadService, new: Callable[..., Run], name: str) -> None:
    with Cutter(service.url, []) as cutter:
        run = new(service, name, url=cutter.url)
        with run.lease() as lease:
            assert run.push(filled(), lease.claim(0)).step == 1
            assert run.shares_memory
        run.delete()


def test_an_answer_that_is_lost_is_had_with_the_next_attempt(
    service: ThreadService, new: Callable[..., Run], name: str
) -> None:
    with Cutter(service.url, []) as cutter:
        run, into = new(service, name, url=cutter.url), Flat(MANIFEST)
        with run.lease() as lease:
            run.exchange(filled(), lease.claim(0), into)
            first = next(iter(run._transport.memories._held.values()))
            cutter._cuts[:] = [0]
            run._transport._http._transport.close()  # type: ignore[attr-defined]
            receipt, _ = run.exchange(filled(1), lease.claim(1), into)
            assert receipt.step == 2
            # The service might have been writing into the first one still.
            assert next(iter(run._transport.memories._held.values())) is not first
            assert torch.equal(into.views["m"], run.pull("y")[0]["m"])
        run.delete()


@pytest.mark.parametrize("seed", range(3))
def test_every_push_counts_once_whatever_becomes_of_its_answers(
    service: ThreadService, new: Callable[..., Run], name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.shared_memory._AGAIN_S", 0.0)
    chance = random.Random(seed)
    with Cutter(service.url, []) as cutter:
        run, into = new(service, name, spec(durability="journal"), url=cutter.url), Flat(MANIFEST)
        free = budget_free(service)
        with run.lease() as lease:
            # Also answers to who asks for memory are cut, and those in which y is said to lie in it.
            cutter._cuts[:] = [chance.randrange(2500) for _ in range(10)]
            run._transport._http._transport.close()  # type: ignore[attr-defined]
            steps = [run.exchange(filled(step), lease.claim(step), into)[0].step for step in range(15)]
            assert run.shares_memory
        assert steps == list(range(1, 16))
        assert not cutter._cuts and run.status().step == 15
        now = run.pull("y")[0]
        assert all(torch.equal(into.views[tensor], now[tensor]) for tensor in SHAPES)
        wait_until(lambda: budget_free(service) == free)
        run.delete()


def test_refusals_are_those_of_connections(service: ThreadService, new: Callable[..., Run], name: str) -> None:
    run = new(service, name)
    with run.lease("w") as lease:
        claim = lease.claim(0)
        run.push(filled(), claim)
        assert run.push(filled(), claim).replayed
        with pytest.raises(IdempotencyConflict):
            run.push(filled(1), claim)
        bad = filled()
        bad.vector[5] = float("inf")
        with pytest.raises(NonFiniteGradient):
            run.push(bad, lease.claim(1))
        assert run.shares_memory
        with run.lease("w") as newer:
            with pytest.raises(LeaseExpired):
                run.push(filled(), lease.claim(1))
            assert run.push(filled(), newer.claim(1)).step == 2
    run.delete()


def test_several_shards_share_a_memory_each(
    shared_nodes: Callable[..., list[ThreadService]],
    new: Callable[..., Run],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("freestep.shared_memory._SMALLEST", 0)
    nodes = shared_nodes(2)
    here = new(nodes[0], name, spec(shards=3))
    there = new(nodes[0], f"{name}-there", spec(shards=3), shared_memory=False)
    for run in (here, there):
        run.status()
    received = [exchanged(run) for run in (here, there)]
    assert all(map(torch.equal, *received))
    with here.lease() as lease:
        here.push(filled(), lease.claim(3))
        assert len({shard for _, _, shard, _ in here._transport.memories._held}) == 3
    for run in (here, there):
        run.delete()


def test_a_service_that_is_killed_leaves_nothing_and_is_found_again(
    start_process: Callable[..., ProcessService], new: Callable[..., Run], name: str
) -> None:
    service = start_process()
    run = new(service, name, spec(durability="journal"))
    with run.lease() as lease:
        run.push(filled(), lease.claim(0))
        name_of_socket = listening(run)
        assert name_of_socket in listened()
        service.kill()
        wait_until(lambda: not run.shares_memory)
        assert name_of_socket not in listened()
        service.start()
    with run.lease() as lease:
        assert run.push(filled(1), lease.claim(1)).step == 2
        assert run.shares_memory and listening(run) != name_of_socket
    assert not left_over()


def listening(run: Run) -> str:
    """The name of the Unix socket that a run's memory came from, as the kernel lists it."""
    (memory,) = run._transport.memories._held.values()
    return f"@{memory._connection.getpeername()[1:].decode()}"


def left_over() -> list[str]:
    """Names of memory that outlive processes."""
    return [each for each in os.listdir("/dev/shm") if "freestep" in each]


def listened() -> list[str]:
    """The names of all Unix sockets."""
    with open("/proc/net/unix") as table:
        return [line.split()[-1] for line in table]


def test_a_worker_that_is_killed_leaves_nothing(service: ThreadService, new: Callable[..., Run], name: str) -> None:
    run, free = new(service, name), budget_free(service)
    with Script(PUSHER, service.url, name) as script:
        assert script.read_line() == "shares memory"
        assert budget_free(service) < free
        script.kill()
    # Within its push, as a rule; whatever came of that, the memory is free.
    wait_until(lambda: budget_free(service) == free)
    assert not left_over()
    with run.lease() as lease:
        assert run.push(filled(), lease.claim(run.status().step)).decision == "applied"
    run.delete()


def test_a_forked_child_keeps_no_memory(service: ThreadService, new: Callable[..., Run], name: str) -> None:
    run, free = new(service, name), budget_free(service)
    ours, theirs = os.pipe()
    lease = run.lease()
    run.push(filled(), lease.claim(0))
    child = os.fork()
    if not child:
        os.close(theirs)
        assert not run._transport.memories._held
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    assert run.push(filled(), lease.claim(1)).step == 2
    assert run.shares_memory
    run._transport.memories.close()
    # The child lives, and has none of it open.
    wait_until(lambda: budget_free(service) == free)
    os.close(theirs)
    assert os.waitpid(child, 0)[1] == 0
    lease.release()
    run.delete()
