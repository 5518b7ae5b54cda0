"""Encoders: their bodies are those of the plain ones, and what they lose is pushed later."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import encoded
from freestep import (
    Client,
    Flat,
    FreestepError,
    IdempotencyConflict,
    Int8,
    MalformedTensors,
    ManifestMismatch,
    NonFiniteGradient,
    RemoteOptimizer,
    Rounded,
    Run,
    ServiceUnreachable,
    TopK,
    encoders,
)
from freestep.encoders import Encoder
from freestep.encoding import ENCODINGS
from freestep.flat import DTYPES
from freestep.manifest import Manifest
from freestep.models import ParameterSpec
from freestep.wire import Receiver, lay
from harness import SGD, ThreadService
from proxies import Cutter

SHAPES: dict[str, tuple[int, ...]] = {"w": (40, 33), "s": (), "e": (0, 4), "m": (3, 256), "n": (512,), "b": (7,)}
MANIFEST = Manifest([ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items()])
MAKERS: dict[str, Callable[[Flat], Encoder]] = {
    "bf16": partial(Rounded, dtype="BF16"),
    "f16": partial(Rounded, dtype="F16"),
    "int8": Int8,
    "int8-of-seven": partial(Int8, block=7),
    "int8-of-all": partial(Int8, block=2**31),
    "topk": partial(TopK, fraction=0.05),
    "topk-bf16": partial(TopK, fraction=0.05, dtype="BF16"),
    "topk-f16": partial(TopK, fraction=0.3, dtype="F16"),
    "topk-of-all": partial(TopK, fraction=1.0),
}


def filled(seed: int = 0, manifest: Manifest = MANIFEST) -> Flat:
    flat = Flat(manifest)
    flat.vector.copy_(torch.randn(manifest.numel, generator=torch.Generator().manual_seed(seed)))
    return flat


def whole(encoder: Encoder, count: int = 1) -> list[bytes]:
    return [b"".join(part.body()) for part in encoder.parts(count)]


def read(body: bytes, manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A body's items as the safetensors package reads them, and its metadata as the service does."""
    receiver = Receiver(manifest, memoryview(bytearray(4 * manifest.numel)), len(body), encodings=ENCODINGS)
    lay(receiver, body)
    assert receiver.complete
    return safetensors.torch.load(body), dict(receiver.metadata)


def said(encoder: Encoder, count: int = 1) -> Tensor:
    """What the bodies say, one after the other."""
    vectors = []
    for part in encoder.parts(count):
        items, metadata = read(b"".join(part.body()), part.manifest)
        shapes = {slot.name: slot.shape for slot in part.manifest.slots}
        if not metadata:
            vectors += [items[name].reshape(-1).float() for name in shapes]
            continue
        vectors += [tensor.reshape(-1) for tensor in encoded.decoded(items, metadata, shapes).values()]
    return torch.cat(vectors)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("count", [1, 3])
def test_rounded_is_the_plain_one(dtype: str, count: int) -> None:
    """The body is what the same gradient and residual, added up by hand, make as a flat vector of that dtype."""
    encoder, residual = Rounded(Flat(MANIFEST), dtype), torch.zeros(MANIFEST.numel)
    for seed in range(5):
        encoder.gradient.vector.copy_(filled(seed).vector)
        encoder.begin()
        exact = encoder.gradient.vector + residual
        plain = Flat(MANIFEST, dtype)
        plain.vector.copy_(exact)
        residual = exact - plain.vector.float()
        assert whole(encoder, count) == [b"".join(part.body()) for part in plain.parts(count)]
        encoder.settle(True)
        assert torch.equal(encoder.residual, residual)


def test_what_f16_cannot_say_is_said_once_it_has_added_up() -> None:
    encoder, total = Rounded(Flat(MANIFEST), "F16"), torch.zeros(MANIFEST.numel)
    encoder.gradient.vector.fill_(1e-8)
    for _ in range(100):
        encoder.begin()
        total += said(encoder)
        encoder.settle(True)
    torch.testing.assert_close(total, torch.full_like(total, 1e-6), rtol=0.05, atol=0)


@pytest.mark.parametrize("block", [1, 7, 256, 300, 2**31])
def test_int8_is_the_plain_one(block: int) -> None:
    flat = filled()
    items, metadata = read(*whole(Int8(flat, block)), MANIFEST)
    expected, said_of_it = encoded.int8(flat.views, block)
    assert metadata == said_of_it
    assert items.keys() == expected.keys()
    for name, item in items.items():
        torch.testing.assert_close(item, expected[name].reshape(item.shape), rtol=0, atol=0)


def test_a_block_of_zeros_has_the_scale_0() -> None:
    flat = Flat(MANIFEST)
    flat.views["n"][300] = -5.0
    flat.views["b"].fill_(1e-42)
    encoder = Int8(flat)
    items, _ = read(*whole(encoder), MANIFEST)
    assert items["n::scale"].tolist() == [0.0, pytest.approx(5 / 127)]
    assert items["n"][300] == -127
    assert all(not items[name].any() for name in ("w", "b", "m"))
    torch.testing.assert_close(said(encoder) + encoder._after, flat.vector)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("fraction", [1e-6, 0.05, 1.0])
def test_topk_is_the_plain_one(dtype: str, fraction: float) -> None:
    flat = filled()
    items, metadata = read(*whole(TopK(flat, fraction, dtype)), MANIFEST)
    assert metadata == {"freestep.encoding": "topk"}
    for name, view in flat.views.items():
        numel = view.numel()
        indices = view.reshape(-1).abs().topk(min(max(round(fraction * numel), 1), numel)).indices.sort().values
        assert items[f"{name}::indices"].dtype == torch.int32
        assert torch.equal(items[f"{name}::indices"].long(), indices)
        assert torch.equal(items[f"{name}::values"], view.reshape(-1)[indices].to(DTYPES[dtype]))


def test_indices_that_do_not_fit_are_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_LARGEST_I32", 40 * 33 - 2)
    encoder = TopK(filled(), 0.05, "BF16")
    items, _ = read(*whole(encoder), MANIFEST)
    assert {item.dtype for name, item in items.items() if name.endswith("::indices")} == {torch.int64}
    torch.testing.assert_close(said(encoder) + encoder._after, encoder.gradient.vector)


LONG = 1_000_003


@pytest.mark.parametrize("count", [1, 100, 10_000, 500_000, LONG])
@pytest.mark.parametrize(
    "kind", ["normal", "few", "equal", "all in one place", "where no sample is", "only where a sample is", "nan"]
)
def test_the_largest_of_a_long_vector_are_the_largest(kind: str, count: int) -> None:
    vector = torch.randn(LONG, generator=torch.Generator().manual_seed(3))
    stride = LONG // encoders._SAMPLE | 1
    if kind == "few":
        vector[torch.arange(LONG) % 1000 != 7] = 0
    elif kind == "equal":
        vector = vector.sign()
    elif kind == "all in one place":
        vector[: LONG // 2] *= 1e-6
    elif kind == "where no sample is":
        vector[::stride] = 0
    elif kind == "only where a sample is":
        vector[torch.arange(LONG) % stride != 0] = 0
    elif kind == "nan":
        vector[LONG // 2] = float("nan")
    found = encoders._largest(vector, count)
    assert (found.diff() > 0).all()
    expected = vector.abs().topk(count).values
    torch.testing.assert_close(vector[found].abs().sort(descending=True).values, expected, equal_nan=True)


# Error feedback


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 3])
def test_what_was_pushed_and_the_residual_are_the_gradients(name: str, count: int) -> None:
    encoder = MAKERS[name](Flat(MANIFEST))
    gradients, pushed = torch.zeros(2, MANIFEST.numel, dtype=torch.float64)
    for seed in range(30):
        encoder.gradient.vector.copy_(filled(seed).vector)
        encoder.begin()
        gradients += encoder.gradient.vector
        pushed += said(encoder, count)
        encoder.settle(True)
    torch.testing.assert_close(pushed + encoder.residual, gradients, rtol=0, atol=1e-5)
    assert encoder.residual.any() == (name != "topk-of-all")


@pytest.mark.parametrize("name", MAKERS)
def test_parts_are_the_stretches_that_the_service_cuts(name: str) -> None:
    one, two = (MAKERS[name](filled()) for _ in range(2))
    for count in (1, 2, 7, 64):
        manifests = [MANIFEST.part(index, count) for index in range(count)]
        assert [part.manifest.numel for part in one.parts(count)] == [each.numel for each in manifests]
        # Made anew, and what is lost with it.
        torch.testing.assert_close(said(one, count) + one.residual, one.gradient.vector)
    assert whole(one) == whole(two)
    assert torch.equal(one.residual, two.residual)


@pytest.mark.parametrize("name", ["int8", "topk-bf16", "bf16"])
def test_the_same_push_is_the_same_bytes_whatever_happens_to_it(name: str) -> None:
    encoder = MAKERS[name](filled())
    encoder.begin()
    whole(encoder)
    encoder.settle(True)
    encoder.gradient.vector.copy_(filled(1).vector)
    encoder.begin()
    first = whole(encoder)
    assert whole(encoder, 3) != first
    for counts in (False, True):
        encoder.settle(counts)
        assert whole(encoder, 2) != first
        assert whole(encoder) == first


@pytest.mark.parametrize("name", ["f16", "int8", "topk"])
def test_a_push_that_does_not_count_leaves_the_residual_as_it_was(name: str) -> None:
    encoder = MAKERS[name](filled())
    encoder.begin()
    whole(encoder)
    encoder.settle(True)
    kept = encoder.residual.clone()
    for value in (1.0, float("nan")):
        encoder.gradient.vector.fill_(value)
        encoder.begin()
        whole(encoder)
        encoder.settle(False)
        assert torch.equal(encoder.residual, kept)


def test_where_nobody_knows_what_became_of_a_push_it_counts_if_it_can() -> None:
    encoder = MAKERS["topk"](filled())
    lost = encoder.gradient.vector - said(encoder)
    encoder.gradient.vector.fill_(float("inf"))
    encoder.begin()
    assert torch.equal(encoder.residual, lost)
    whole(encoder)
    encoder.gradient.vector.zero_()
    encoder.begin()
    assert torch.equal(encoder.residual, lost)
    encoder.forget()
    assert not encoder.residual.any()


def test_what_cannot_be_is_refused() -> None:
    flat = Flat(MANIFEST)
    with pytest.raises(FreestepError, match="fp32, not from BF16"):
        Int8(Flat(MANIFEST, "BF16"))
    with pytest.raises(FreestepError, match="at least one element, not 0"):
        Int8(flat, 0)
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(FreestepError, match="above 0 and at most 1"):
            TopK(flat, fraction)
    with pytest.raises(FreestepError, match="rounded to BF16 or F16, not to F32"):
        Rounded(flat, "F32")
    with pytest.raises(FreestepError, match="not of I8"):
        TopK(flat, dtype="I8")
    with pytest.raises(ManifestMismatch, match="residual"):
        TopK(flat).residual = torch.zeros(3)
    twice = Manifest([ParameterSpec(name=name, shape=(2,)) for name in ("w", "w::scale")])
    with pytest.raises(MalformedTensors, match="names"):
        Int8(Flat(twice))
    nothing = Flat(Manifest([ParameterSpec(name="e", shape=(0,))]))
    for make in MAKERS.values():
        assert len(whole(make(nothing))) == 1


# With a service


@pytest.fixture
def client(service: ThreadService) -> Iterator[Client]:
    with Client(service.url, retry_for=10) as made:
        yield made


@pytest.fixture(params=[1, 3])
def run(client: Client, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A run of one shard, or several, whose parameters are 0 and which takes every gradient off them."""
    made = client.run(f"run-{uuid.uuid4().hex[:8]}")
    parameters = [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()]
    spec = {"optimizer": SGD, "aggregation": {"policy": "ringmaster", "max_staleness": 2}, "parameters": parameters}
    made.create({**spec, "shards": request.param})
    made.initialize({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    yield made
    made.delete()


def at_y(run: Run) -> Tensor:
    flat = Flat(run.manifest)
    run.pull_into(flat, "y")
    return flat.vector


@pytest.mark.parametrize("name", MAKERS)
def test_the_run_gets_what_the_residual_lacks(run: Run, name: str) -> None:
    encoder, arriving, total = MAKERS[name](Flat(MANIFEST)), Flat(MANIFEST), torch.zeros(MANIFEST.numel)
    with run.lease() as lease:
        for seed in range(6):
            encoder.gradient.vector.copy_(filled(seed).vector)
            encoder.begin()
            total += encoder.gradient.vector
            claim = lease.claim(seed)
            if seed % 2:
                receipt = run.push(encoder, claim)
                assert run.push(encoder, claim).replayed
            else:
                receipt, _ = run.exchange(encoder, claim, arriving)
            assert (receipt.decision, receipt.step) == ("applied", seed + 1)
            torch.testing.assert_close(encoder.residual - at_y(run), total, rtol=0, atol=1e-5)
        # A key is of one body.
        encoder.gradient.vector.add_(1.0)
        encoder.begin()
        with pytest.raises(IdempotencyConflict):
            run.push(encoder, claim)


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_a_dropped_or_refused_push_takes_nothing_but_its_gradient(run: Run, name: str) -> None:
    encoder, total = MAKERS[name](filled()), filled().vector
    with run.lease() as lease:
        for step in range(4):
            encoder.begin()
            assert run.push(encoder, lease.claim(step)).decision == "applied"
        kept = encoder.residual.clone()
        encoder.gradient.vector.copy_(filled(1).vector)
        encoder.begin()
        assert run.push(encoder, lease.claim(0)).decision == "dropped"
        assert torch.equal(encoder.residual, kept)
        encoder.gradient.vector[5] = float("nan")
        encoder.begin()
        with pytest.raises(NonFiniteGradient):
            run.push(encoder, lease.claim(4))
        assert torch.equal(encoder.residual, kept)
        encoder.gradient.vector.zero_()
        encoder.begin()
        assert run.push(encoder, lease.claim(4)).decision == "applied"
    torch.testing.assert_close(encoder.residual - at_y(run), 4 * total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_a_push_whose_answer_is_cut_counts_once(service: ThreadService, run: Run, name: str) -> None:
    cutter = Cutter(service.url, [200, 3000, 200])
    encoder = MAKERS[name](filled())
    encoder.begin()
    try:
        with Client(cutter.url, retry_for=10) as through, run.lease() as lease:
            through.run(run.name).push(encoder, lease.claim(0))
    finally:
        cutter.close()
    torch.testing.assert_close(encoder.residual - at_y(run), encoder.gradient.vector)


def test_a_push_of_which_nothing_is_heard_is_not_pushed_twice(run: Run) -> None:
    encoder = MAKERS["topk"](filled())
    encoder.begin()
    with run.lease() as lease, Client("http://127.0.0.1:9", retry_for=0) as nowhere:
        with pytest.raises(ServiceUnreachable):
            nowhere.run(run.name).push(encoder, lease.claim(0))
    torch.testing.assert_close(said(encoder) + encoder.residual, encoder.gradient.vector)


# RemoteOptimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


ENCODED: list[dict[str, Any]] = [
    {"push_dtype": "BF16"},
    {"push_dtype": "F16"},
    {"push_encoding": "int8"},
    {"push_encoding": "int8", "int8_block": 7},
    {"push_encoding": "topk", "topk_fraction": 0.05},
]


@pytest.fixture(params=ENCODED, ids=str)
def make(service: ThreadService, request: pytest.FixtureRequest) -> Iterator[Callable[..., RemoteOptimizer]]:
    """Makes optimizers of one run that takes every gradient off its parameters; they are closed with the test."""
    made: list[RemoteOptimizer] = []
    name = f"run-{uuid.uuid4().hex[:8]}"

    def optimizer(model: nn.Module, **options: Any) -> RemoteOptimizer:
        given = {"url": service.url, "run": name, "algorithm": "sgd", "lr": 1.0, **request.param, **options}
        made.append(RemoteOptimizer(model, **given))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


def push(model: nn.Module, optimizer: RemoteOptimizer, seed: int) -> Tensor:
    """Makes a step with a random gradient, and returns that."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None])


def held(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def place(optimizer: RemoteOptimizer) -> Mapping[str, Any]:
    state: Mapping[str, Any] = optimizer.state_dict()["freestep"]
    return state


def assert_sums(model: nn.Module, optimizer: RemoteOptimizer, begun: Tensor, total: Tensor | float) -> None:
    lacking = place(optimizer)["residual"] + begun - held(model)
    torch.testing.assert_close(lacking, torch.as_tensor(total).expand_as(lacking), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_model_gets_what_the_residual_lacks(
    service: ThreadService, make: Callable[..., RemoteOptimizer], shards: int
) -> None:
    model = network()
    begun, total = held(model), 0.0
    optimizer = make(model, shards=shards, worker="me")
    for seed in range(5):
        total = total + push(model, optimizer, seed)
    assert_sums(model, optimizer, begun, total)
    # The gradient counts under the new lease.
    with Client(service.url) as client:
        client.run(place(optimizer)["run"]).lease("me").release()
    total = total + push(model, optimizer, 5)
    assert_sums(model, optimizer, begun, total)


def test_another_number_of_shards_keeps_the_residual(
    service: ThreadService, make: Callable[..., RemoteOptimizer]
) -> None:
    model = network()
    begun, total = held(model), 0.0
    optimizer = make(model, shards=1)
    with Client(service.url) as client:
        for seed, shards in enumerate((3, 2, 1)):
            client.run(place(optimizer)["run"]).reshard(shards)
            # It is of an older epoch.
            push(model, optimizer, 100 + seed)
            assert optimizer.receipt is not None
            assert_sums(model, optimizer, begun, total)
            total = total + push(model, optimizer, seed)
            assert optimizer.receipt.decision == "applied"
            assert_sums(model, optimizer, begun, total)


@pytest.mark.parametrize("noticed", ["by a push", "by a pull"])
def test_a_run_that_goes_back_takes_the_residual_away(
    service: ThreadService, make: Callable[..., RemoteOptimizer], noticed: str
) -> None:
    model = network()
    optimizer = make(model)
    with Client(service.url) as client:
        run = client.run(place(optimizer)["run"])
        push(model, optimizer, 0)
        run.checkpoint()
        kept = held(model)
        push(model, optimizer, 1)
        run.restore(1)
        if noticed == "by a pull":
            optimizer.eval()
            optimizer.train()
        push(model, optimizer, 2)
        assert optimizer.receipt is not None
        assert optimizer.receipt.decision == "dropped"
        assert not place(optimizer)["residual"].any()
        total = push(model, optimizer, 3)
    assert_sums(model, optimizer, kept, total)


def test_the_residual_is_saved_and_loaded(service: ThreadService, make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    begun = held(model)
    optimizer = make(model)
    total = push(model, optimizer, 0) + push(model, optimizer, 1)
    state = optimizer.state_dict()
    optimizer.close()
    again = network()
    resumed = make(again, worker="other")
    assert not place(resumed)["residual"].any()
    resumed.load_state_dict(state)
    assert_sums(again, resumed, begun, total)
    total += push(again, resumed, 2)
    assert_sums(again, resumed, begun, total)
    dense = make(network(), push_encoding="dense", push_dtype="F32")
    dense.load_state_dict(state)
    resumed.load_state_dict(dense.state_dict())
    assert not place(resumed)["residual"].any()
    with Client(service.url) as client:
        client.run(place(resumed)["run"]).restore(0)
    resumed.load_state_dict(state)
    assert not place(resumed)["residual"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_encoding": "int4"}, "one of dense, int8, topk, not 'int4'"),
        ({"push_encoding": "int8", "push_dtype": "BF16"}, "no choice of push_dtype"),
        ({"push_encoding": "topk", "topk_fraction": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"push_encoding": "int8", "int8_block": 0}, "at least one element, not 0"),
        ({"push_encoding": "int8", "error_feedback": False}, "'int8' needs error_feedback"),
        ({"push_encoding": "topk", "error_feedback": False}, "'topk' needs error_feedback"),
    ],
)
def test_a_wrong_encoding_is_named(service: ThreadService, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FreestepError, match=message):
        RemoteOptimizer(network(), url=service.url, run="none", **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (network(), {}),
        (network(), {"push_dtype": "F32"}),
        (network(), {"push_dtype": "BF16", "error_feedback": False}),
        (network().bfloat16(), {"push_dtype": "BF16"}),
    ],
)
def test_where_nothing_is_lost_or_wanted_nothing_is_kept(
    service: ThreadService, model: nn.Module, options: dict[str, Any]
) -> None:
    with RemoteOptimizer(model, url=service.url, run=f"run-{uuid.uuid4().hex[:8]}", **options) as optimizer:
        assert "residual" not in place(optimizer)


@pytest.mark.parametrize("block", [7, 256])
def test_a_block_is_as_long_as_wanted(service: ThreadService, block: int) -> None:
    """Elements of one block are multiples of one scale."""
    model = network()
    begun = held(model)
    options: dict[str, Any] = {"algorithm": "sgd", "lr": 1.0, "push_encoding": "int8", "int8_block": block}
    with RemoteOptimizer(model, url=service.url, run=f"run-{uuid.uuid4().hex[:8]}", **options) as optimizer:
        gradient = push(model, optimizer, 0)
    expected, metadata = encoded.int8(
        {"w": gradient[:300], "b": gradient[300:350], "v": gradient[350:500], "c": gradient[500:]}, block
    )
    said = encoded.decoded(expected, metadata, {"w": (300,), "b": (50,), "v": (150,), "c": (3,)})
    torch.testing.assert_close(begun - held(model), torch.cat([*said.values()]), rtol=0, atol=1e-6)
