"""The client on runs of several shards, against several services that share one store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import nn

import forked
from freestep import AlreadyInitialized, Client, Flat, NonFiniteGradient, Receipt, RemoteOptimizer, Run, StepNotReached
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import lay
from harness import ProcessService, ThreadService
from meanwhile import at_once, under_way
from plain_calls import TENSORS
from proxies import Cutter
from shards.runs import ONES, SHARDS, SIZES, ZEROS, counting
from trained import held


@pytest.fixture(scope="module", params=["valkey", "redis"])
def nodes(shared_nodes: Callable[..., list[ThreadService]], request: pytest.FixtureRequest) -> list[ThreadService]:
    """Services that share their runs, on either store."""
    return shared_nodes(SHARDS, request.param)


@pytest.fixture
def client(nodes: list[ThreadService]) -> Iterator[Client]:
    with Client(nodes[0].url) as made:
        yield made


@pytest.fixture
def run(client: Client, name: str) -> Run:
    """A run whose parameters are all 0."""
    made = client.run(name)
    made.create(counting())
    made.initialize(ZEROS)
    return made


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


class Watched:
    """A client that records which URLs it requests shards from, and cannot reach those in `walled`."""

    def __init__(self, url: str) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.walled: set[str] = set()
        hooks = {"request": [self._pass]}
        self.client = Client(http=httpx.Client(base_url=url, event_hooks=hooks))

    def _pass(self, request: httpx.Request) -> None:
        url = f"{request.url.scheme}://{request.url.netloc.decode()}"
        if url in self.walled:
            raise httpx.ConnectError("there is a wall", request=request)
        if "shard" in request.url.params:
            self.asked.append((request.method, url, int(request.url.params["shard"])))


@pytest.fixture
def watched(nodes: list[ThreadService]) -> Iterator[Watched]:
    """A client of another service than the one at which runs are created."""
    made = Watched(nodes[1].url)
    with made.client:
        yield made


# Parts of a vector


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 256])
def test_parts_are_stretches_of_the_vector_itself(dtype: str, count: int) -> None:
    manifest = Manifest([ParameterSpec(name=name, shape=size) for name, size in SIZES.items()])
    sent, received = Flat(manifest, dtype), Flat(manifest, dtype)
    sent.vector.copy_(torch.arange(manifest.numel))
    for mine, theirs in zip(sent.parts(count), received.parts(count), strict=True):
        body = mine.body()
        receiver = theirs.receiver(sum(map(len, body)))
        for piece in body:
            lay(receiver, piece)
        assert receiver.complete
    assert torch.equal(sent.vector, received.vector)
    assert sum(len(part.bytes) for part in sent.parts(count)) == len(sent.bytes)


def receipt(decision: str, step: int, **more: Any) -> Receipt:
    return Receipt.model_validate({"decision": decision, "step": step, "staleness": 0, **more})


def test_receipts_of_parts_are_one() -> None:
    parts = [receipt("accumulated", 4), receipt("applied", 5, replayed=True), receipt("accumulated", 6)]
    assert Receipt.merged(parts) == receipt("applied", 6)
    assert Receipt.merged([receipt("dropped", 7, reason="stale", replayed=True)] * 2).reason == "stale"
    assert Receipt.merged([receipt("applied", 1, replayed=True)] * 3).replayed is True


# Training


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("adamw_schedule_free", {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 5}),
        ("sgd_schedule_free", {"lr": 0.1}),
        ("radam_schedule_free", {"lr": 0.01}),
        ("sgd", {"lr": 0.1, "momentum": 0.9}),
        ("adamw", {"lr": 0.01}),
    ],
)
def test_many_shards_train_as_one_to_the_last_bit(
    nodes: list[ThreadService], name: str, algorithm: str, options: dict[str, Any]
) -> None:
    ended: list[tuple[torch.Tensor, torch.Tensor]] = []
    for shards in (1, SHARDS):
        model = network()
        with RemoteOptimizer(
            model, run=f"{name}-{shards}", url=nodes[0].url, algorithm=algorithm, shards=shards, **options
        ) as optimizer:
            train(model, optimizer, 20)
            y = held(model)
            optimizer.eval()
            ended.append((y, held(model)))
            optimizer.train()
            assert torch.equal(held(model), y)
    (one_y, one_x), (many_y, many_x) = ended
    assert torch.equal(one_y, many_y)
    assert torch.equal(one_x, many_x)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_gradients_and_parameters_travel_in_parts(nodes: list[ThreadService], name: str, dtype: Any) -> None:
    ended = []
    for shards in (1, SHARDS):
        model = network()
        with RemoteOptimizer(
            model, run=f"{name}-{shards}", url=nodes[1].url, shards=shards, push_dtype=dtype, pull_dtype=dtype
        ) as optimizer:
            train(model, optimizer, 5)
        ended.append(held(model))
    assert torch.equal(*ended)


def test_another_number_of_shards_is_no_other_spec(
    nodes: list[ThreadService], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RemoteOptimizer(network(), run=name, url=nodes[0].url, shards=SHARDS) as first:
        model = network(1)
        with RemoteOptimizer(model, run=name, url=nodes[1].url, shards=2) as second:
            train(model, second, 1)
            assert second.spec.shards == first.spec.shards == SHARDS
    assert "another spec" not in caplog.text


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_worker_goes_on_when_its_run_is_cut_anew(
    nodes: list[ThreadService], client: Client, name: str, shards: int
) -> None:
    model = network()
    with RemoteOptimizer(model, run=name, url=nodes[1].url, algorithm="sgd_schedule_free", shards=SHARDS) as optimizer:
        train(model, optimizer, 3)
        before = held(model)
        assert client.run(name).reshard(shards).shards == shards
        train(model, optimizer, 1)
        assert optimizer.receipt is not None
        assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
        assert torch.equal(held(model), before)
        train(model, optimizer, 1)
        assert (optimizer.receipt.decision, optimizer.receipt.step) == ("applied", 4)
        status = client.run(name).status()
        assert (status.shards, status.spec.shards) == (shards, SHARDS)


def test_a_worker_goes_on_after_a_restore(nodes: list[ThreadService], client: Client, name: str) -> None:
    model = network()
    with RemoteOptimizer(model, run=name, url=nodes[2].url, shards=SHARDS) as optimizer:
        train(model, optimizer, 2)
        at_2 = held(model)
        assert client.run(name).checkpoint().step == 2
        train(model, optimizer, 2)
        client.run(name).restore(2)
        train(model, optimizer, 1)
        assert optimizer.receipt is not None
        assert optimizer.receipt.reason == "epoch-changed"
        assert torch.equal(held(model), at_2)
        train(model, optimizer, 1)
        assert (optimizer.receipt.decision, optimizer.receipt.step) == ("applied", 3)


def test_an_earlier_epochs_checkpoint_is_read_and_where_the_shards_are_is_not_asked_anew(
    nodes: list[ThreadService], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.lease() as lease:
        run.push(ONES, lease.claim(0))
        run.checkpoint()
    run.restore(0)
    with run.lease() as lease:
        run.push(ONES, lease.claim(0))
        run.push(ONES, lease.claim(1))
    asked: list[str] = []
    monkeypatch.setattr(run._shards, "_topology", lambda retry: asked.append("topology"))
    flat = Flat(run.manifest)
    for dtype in ("F32", "I8"):
        tensors, step = run.pull("y", dtype=dtype, checkpoint=1)
        assert (tensors.epoch, step) == (1, 1)
        assert all(torch.equal(tensor, torch.full_like(tensor, -1.0)) for tensor in tensors.values())
        assert run.pull_into(flat, "y").step == 2
    assert run.export_state(checkpoint=1).step == 1
    assert asked == []


def test_sync_workers_of_many_shards_step_together(nodes: list[ThreadService], name: str) -> None:
    models = [network(), network()]
    optimizers = [
        RemoteOptimizer(model, run=name, url=nodes[number].url, aggregation="sync", shards=SHARDS, worker=f"w{number}")
        for number, model in enumerate(models)
    ]
    at_once(*(partial(train, *pair, 5) for pair in zip(models, optimizers, strict=True)))
    for optimizer in optimizers:
        optimizer.close()
    assert [optimizer.loaded.step for optimizer in optimizers] == [5, 5]
    assert torch.equal(held(models[0]), held(models[1]))


# Consistent reads


def test_pulls_are_of_one_cut_while_pushes_go_on(nodes: list[ThreadService], run: Run) -> None:
    def push() -> None:
        with Client(nodes[1].url) as other, other.run(run.name).lease() as lease:
            pusher = other.run(run.name)
            gradient, arriving = Flat(run.manifest), Flat(run.manifest)
            gradient.fill(ONES)
            pusher.status()
            for step in range(100):
                _, pulled = pusher.exchange(gradient, lease.claim(step), arriving)
                assert torch.equal(arriving.vector, torch.full_like(arriving.vector, -pulled.step))

    pushing = under_way(push)
    flat = Flat(run.manifest)
    seen = set()
    while not pushing.done():
        for point in ("x", "y"):
            step = run.pull_into(flat, point).step
            assert torch.equal(flat.vector, torch.full_like(flat.vector, -step))
            seen.add(step)
    pushing.result()
    assert len(seen) > 1


def test_initial_weights_are_those_of_one_worker(nodes: list[ThreadService], client: Client, name: str) -> None:
    run = client.run(name)
    run.create(counting())

    def give(number: int) -> bool:
        with Client(nodes[number].url) as own:
            giver = own.run(name)
            giver.status()
            try:
                giver.initialize({name: torch.full(size, float(number)) for name, size in SIZES.items()})
            except AlreadyInitialized:
                return False
            return True

    outcomes = at_once(*(partial(give, number) for number in range(SHARDS)))
    assert sorted(outcomes) == [False] * (SHARDS - 1) + [True]
    winner = float(outcomes.index(True))
    for name, tensor in run.pull("y")[0].items():
        assert torch.equal(tensor, torch.full(SIZES[name], winner))


def test_a_run_of_unknown_shards_is_asked_as_a_whole(nodes: list[ThreadService], run: Run) -> None:
    with Client(nodes[1].url) as other:
        stranger = other.run(run.name)
        gradient, arriving = Flat(run.manifest), Flat(run.manifest)
        gradient.fill(ONES)
        with stranger.lease() as lease:
            receipt, pulled = stranger.exchange(gradient, lease.claim(0), arriving)
        assert (receipt.decision, pulled.step) == ("applied", 1)
        assert torch.equal(arriving.vector, -gradient.vector)


def test_a_step_that_is_not_reached_is_said(run: Run) -> None:
    run.status()
    with pytest.raises(StepNotReached) as caught:
        run.pull("x", min_step=5, wait=0.01)
    assert caught.value.extensions == {"epoch": 1, "step": 0}


# Where requests go


def test_shards_are_asked_where_they_are(run: Run, watched: Watched) -> None:
    asking = watched.client.run(run.name)
    urls = {shard.index: shard.url for shard in asking.topology().shards}
    with asking.lease() as lease:
        asking.status()
        assert asking.push(ONES, lease.claim(0)).step == 1
        asking.pull("y")
    for method in ("POST", "GET"):
        assert sorted((url, shard) for verb, url, shard in watched.asked if verb == method) == sorted(
            (url, shard) for shard, url in urls.items()
        )


def test_shards_that_cannot_be_reached_are_asked_through_the_service(
    nodes: list[ThreadService], run: Run, watched: Watched
) -> None:
    watched.walled = {node.url for node in nodes} - {nodes[1].url}
    asking = watched.client.run(run.name)
    asking.status()
    with asking.lease() as lease:
        assert asking.push(ONES, lease.claim(0)).step == 1
        y, step = asking.pull("y")
    assert step == 1
    assert all(torch.equal(y[name], -tensor) for name, tensor in ONES.items())
    assert {url for _, url, _ in watched.asked} == {nodes[1].url}


@pytest.mark.slow
def test_a_url_where_another_server_listens_is_passed_over(
    start_process: Callable[..., ProcessService], service: ThreadService
) -> None:
    with Client(start_process(advertise_url=service.url).url) as client:
        run = client.run("misled")
        run.create(counting())
        run.initialize(ONES)
        assert all(torch.equal(tensor, ONES[name]) for name, tensor in run.pull("x")[0].items())


@pytest.mark.parametrize("cuts", [[0, 0], [20, 400], [400, 100, 250]])
def test_a_part_that_is_cut_is_sent_again_and_the_push_counts_once(
    nodes: list[ThreadService], run: Run, cuts: list[int]
) -> None:
    to_come: list[int] = []
    with Cutter(nodes[0].url, to_come) as cutter:
        watched = Watched(cutter.url)
        watched.walled = {node.url for node in nodes}
        with watched.client as through:
            asking = through.run(run.name)
            asking.status()
            gradient, arriving = Flat(run.manifest), Flat(run.manifest)
            gradient.fill(ONES)
            with asking.lease() as lease:
                # For the connections to come: one is open already, and there are more shards than that.
                to_come += cuts
                receipt, pulled = asking.exchange(gradient, lease.claim(0), arriving)
    assert len(to_come) <= len(cuts) - 2
    assert (receipt.decision, receipt.step, pulled.step, run.status().step) == ("applied", 1, 1, 1)
    assert torch.equal(arriving.vector, -gradient.vector)


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_one_shard_refuses_is_refused_by_all(run: Run, shard: int, value: float) -> None:
    bad = Flat(run.manifest)
    bad.vector.fill_(1.0)
    bad.vector[bad.parts(SHARDS)[shard].manifest.begin] = value
    arriving = Flat(run.manifest)
    with run.lease() as lease:
        before = run.status()
        claim = lease.claim(0)
        for _ in range(2):
            with pytest.raises(NonFiniteGradient):
                run.exchange(bad, claim, arriving)
        after = run.status()
        assert (after.step, after.pushes) == (before.step, before.pushes)
        for point in ("x", "y", "z"):
            run.pull_into(arriving, point)
            assert not arriving.vector.any()
        assert run.push(ONES, lease.claim(0)).step == 1
    run.pull_into(arriving, "y")
    assert torch.equal(arriving.vector, torch.full_like(arriving.vector, -1.0))


# The command


def freestep(service: ThreadService, *arguments: str) -> CompletedProcess[str]:
    return forked.freestep(*arguments, FREESTEP_URL=service.url, COLUMNS="160")


@pytest.mark.slow
def test_the_command_knows_of_shards(nodes: list[ThreadService], run: Run, tmp_path: Path) -> None:
    table = freestep(nodes[1], "runs", "topology", run.name)
    assert table.returncode == 0, table.stderr
    topology = json.loads(freestep(nodes[1], "runs", "topology", run.name, "--json").stdout)
    assert [shard["index"] for shard in topology["shards"]] == list(range(SHARDS))
    assert all(shard["url"] in table.stdout for shard in topology["shards"])
    shown = freestep(nodes[2], "runs", "show", run.name).stdout
    assert ["shards", str(SHARDS)] in [line.split() for line in shown.splitlines()]
    done = freestep(nodes[0], "runs", "reshard", run.name, "--shards", "2")
    assert done.returncode == 0, done.stderr
    assert ["shards", "2"] in [line.split() for line in done.stdout.splitlines()]
    assert run.status().shards == 2
    file = tmp_path / "model.safetensors"
    assert freestep(nodes[1], "pull", run.name, "-o", str(file)).returncode == 0
    loaded = safetensors.torch.load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == SIZES
    for wrong in ("0", "257", "many"):
        assert freestep(nodes[0], "runs", "reshard", run.name, "--shards", wrong).returncode == 2


def test_shards_of_more_than_there_are_elements(client: Client, name: str) -> None:
    run = client.run(name)
    run.create(
        counting(20, parameters=[{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()])
    )
    run.initialize(TENSORS)
    with run.lease() as lease:
        assert run.push(TENSORS, lease.claim(0)).step == 1
    y, _ = run.pull("y")
    assert not any(tensor.any() for tensor in y.values())
