"""Points that travel as int8: fp32 is made of them where they arrive, of one shard or several."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import encoded
from freestep import Client, Flat, FreestepError, MalformedTensors, RemoteOptimizer, Run, flat
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import lay
from harness import ThreadService
from proxies import Cutter

SHAPES: dict[str, tuple[int, ...]] = {"w": (40, 33), "s": (), "e": (0, 4), "m": (3, 256), "n": (512,), "b": (7,)}
MANIFEST = Manifest([ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items()])
GENERATOR = torch.Generator().manual_seed(11)
WEIGHTS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}


def said(tensors: Mapping[str, Tensor], block: int | None = None) -> Tensor:
    """What is said of tensors in int8, as one vector."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    told = encoded.decoded(*encoded.int8(tensors, block), shapes)
    return torch.cat([tensor.reshape(-1) for tensor in told.values()])


def receive(into: Flat, body: bytes, piece: int) -> None:
    receiver = into.receiver(len(body))
    for begin in range(0, len(body), piece):
        lay(receiver, body[begin : begin + piece])
    assert receiver.complete
    into.decode(receiver)


# A vector


@pytest.mark.parametrize("chunk", [1, 300, flat._CHUNK])
@pytest.mark.parametrize("block", [None, 1, 7, 256, 300, 2**31])
def test_fp32_is_made_where_int8_arrives(monkeypatch: pytest.MonkeyPatch, block: int | None, chunk: int) -> None:
    monkeypatch.setattr(flat, "_CHUNK", chunk)
    into = Flat(MANIFEST, "I8")
    memory = into.vector.data_ptr()
    receive(into, encoded.assemble(*encoded.int8(WEIGHTS, block)), 1000)
    assert into.vector.data_ptr() == memory
    assert torch.equal(into.vector, said(WEIGHTS, block))
    # And again, over what is there by now.
    receive(into, encoded.assemble(*encoded.int8({name: -each for name, each in WEIGHTS.items()}, block)), 10**6)
    assert torch.equal(into.vector, -said(WEIGHTS, block))


def test_a_vector_takes_what_it_asks_for() -> None:
    """And nothing else, though fp32 would fit."""
    into = Flat(MANIFEST, "I8")
    into.fill(WEIGHTS)
    fp32 = b"".join(Flat(MANIFEST).body())
    with pytest.raises(MalformedTensors, match="not one of int8"):
        receive(into, fp32, len(fp32))
    int8 = encoded.assemble(*encoded.int8(WEIGHTS))
    for dtype in ("F32", "BF16"):
        with pytest.raises(MalformedTensors, match="not one of dense"):
            receive(Flat(MANIFEST, dtype), int8, len(int8))


def test_other_dtypes_are_refused(service: ThreadService) -> None:
    with pytest.raises(FreestepError, match="one of F32, BF16, F16, I8, not 'F64'"):
        Flat(MANIFEST, "F64")
    name = f"run-{uuid.uuid4().hex[:8]}"
    options: dict[str, Any] = {"url": service.url, "run": name}
    with pytest.raises(FreestepError, match="one of F32, BF16, F16, I8, not 'I4'"):
        RemoteOptimizer(nn.Linear(2, 2), **options, pull_dtype="I4")  # type: ignore[arg-type]
    for encoding in ("dense", "topk"):
        with pytest.raises(FreestepError, match="one of F32, BF16, F16, not 'I8'; for int8 set push_encoding='int8'"):
            RemoteOptimizer(nn.Linear(2, 2), **options, push_dtype="I8", push_encoding=encoding)  # type: ignore[arg-type]
    with Client(service.url) as client:
        assert name not in [status.run for status in client.runs()]


# A run


@pytest.fixture
def client(service: ThreadService) -> Iterator[Client]:
    with Client(service.url) as made:
        yield made


def started(client: Client, shards: int) -> Run:
    """A run of WEIGHTS."""
    run = client.run(f"run-{uuid.uuid4().hex[:8]}")
    parameters = [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()]
    run.create({"optimizer": {"algorithm": "sgd_schedule_free"}, "parameters": parameters, "shards": shards})
    run.initialize(WEIGHTS)
    return run


def of_shards(tensors: Mapping[str, Tensor], shards: int) -> Tensor:
    """What shards say of their parts, one after the other."""
    vector = torch.cat([tensors[name].reshape(-1) for name in SHAPES])
    told = []
    for index in range(shards):
        part = MANIFEST.part(index, shards)
        stretch = vector[part.begin : part.end]
        told.append(said({slot.name: stretch[slot.offset : slot.offset + slot.numel] for slot in part.slots}))
    return torch.cat(told)


@pytest.mark.parametrize("point", ["x", "y", "z"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_pull_is_of_fp32_tensors(client: Client, shards: int, point: Any) -> None:
    run = started(client, shards)
    with run.lease() as lease:
        run.push(WEIGHTS, lease.claim(0))
    pulled, step = run.pull(point, dtype="I8")
    assert step == 1
    assert {name: tuple(tensor.shape) for name, tensor in pulled.items()} == SHAPES
    exact, _ = run.pull(point)
    vector = torch.cat([pulled[name].reshape(-1) for name in SHAPES])
    assert vector.dtype == torch.float32
    assert torch.equal(vector, of_shards(exact, shards))


@pytest.mark.parametrize("shards", [1, 3])
def test_y_comes_with_an_exchange(client: Client, shards: int) -> None:
    run = started(client, shards)
    gradient, into = Flat(MANIFEST), Flat(MANIFEST, "I8")
    gradient.fill(WEIGHTS)
    with run.lease() as lease:
        receipt, pulled = run.exchange(gradient, lease.claim(0), into)
    assert (receipt.decision, pulled.step) == ("applied", 1)
    assert torch.equal(into.vector, of_shards(run.pull("y")[0], shards))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stranger_finds_out_how_many_shards_there_are(service: ThreadService, client: Client, shards: int) -> None:
    """Parts are never asked for as one whole, which several shards could not say."""
    run = started(client, shards)
    with Client(service.url) as other:
        into = Flat(MANIFEST, "I8")
        assert other.run(run.name).pull_into(into, "y").step == 0
    assert torch.equal(into.vector, of_shards(WEIGHTS, shards))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2)])
def test_an_onlooker_goes_on_when_the_run_is_cut_anew(
    service: ThreadService, client: Client, before: int, after: int
) -> None:
    run, into = started(client, before), Flat(MANIFEST, "I8")
    with Client(service.url) as other:
        onlooker = other.run(run.name)
        onlooker.status()
        onlooker.pull_into(into, "y")
        run.reshard(after)
        onlooker.pull_into(into, "y")
    assert torch.equal(into.vector, of_shards(WEIGHTS, after))


def test_a_pull_that_is_cut_is_made_again(service: ThreadService, client: Client) -> None:
    run, into = started(client, 1), Flat(MANIFEST, "I8")
    cuts = [1200, 2500]
    with Cutter(service.url, cuts) as cutter, Client(cutter.url) as other:
        other.run(run.name).pull_into(into, "y")
    assert not cuts
    assert torch.equal(into.vector, said(WEIGHTS))


# Training


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_trains_from_int8(service: ThreadService, client: Client, shards: int) -> None:
    torch.manual_seed(3)
    model, wanted = nn.Linear(40, 30), nn.Linear(40, 30)
    generator = torch.Generator().manual_seed(4)
    losses = []
    name = f"run-{uuid.uuid4().hex[:8]}"
    with RemoteOptimizer(model, url=service.url, run=name, shards=shards, lr=0.02, pull_dtype="I8") as optimizer:

        def held() -> Tensor:
            return nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        def served(point: Any, dtype: str) -> Tensor:
            return torch.cat([each.reshape(-1) for each in client.run(name).pull(point, dtype=dtype)[0].values()])

        for _ in range(100):
            inputs = torch.randn(32, 40, generator=generator)
            loss = (model(inputs) - wanted(inputs).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert torch.equal(held(), served("y", "I8"))
        assert not torch.equal(held(), served("y", "F32"))
        optimizer.eval()
        assert torch.equal(held(), served("x", "I8"))
        torch.testing.assert_close(held(), served("x", "F32"), rtol=0, atol=float(held().abs().max()) / 250)
    assert losses[-1] < losses[0] / 20
