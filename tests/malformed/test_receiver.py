"""Whatever a receiver is fed, it ends with the manifest's tensors or with MalformedTensors."""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from freestep.api.models import ParameterSpec
from freestep.errors import MalformedTensors
from freestep.wire.header import body_limit, header_limit
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from malformed.bodies import BODIES, NON_FINITE, PARAMETERS, header, numel, valid

MANIFEST = Manifest(ParameterSpec.model_validate(parameter) for parameter in PARAMETERS)

MALFORMED = sorted(BODIES.keys() - NON_FINITE)


def receive(body: bytes, chunk: int | None = None) -> tuple[Receiver, bytearray]:
    """Feeds a body, whole or in chunks of so many bytes."""
    target = bytearray(4 * MANIFEST.numel)
    receiver = Receiver(MANIFEST, memoryview(target), len(body))
    for begin in range(0, len(body), chunk or len(body)):
        lay(receiver, body[begin : begin + (chunk or len(body))])
    return receiver, target


def test_the_valid_body_is_accepted() -> None:
    receiver, target = receive(valid(metadata={"freestep.encoding": "dense", "note": "é"}))
    assert receiver.complete
    assert receiver.metadata == {"freestep.encoding": "dense", "note": "é"}
    assert struct.unpack(f"<{numel()}f", target) == tuple(index + 0.5 for index in range(numel()))


@pytest.mark.parametrize("chunk", [None, 1], ids=["whole", "bytewise"])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_refused(name: str, chunk: int | None) -> None:
    with pytest.raises(MalformedTensors) as refusal:
        receive(BODIES[name](), chunk)
    # The service puts the refusal into a document of UTF-8.
    json.dumps(refusal.value.to_document(422), ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("name", sorted(NON_FINITE))
def test_a_body_of_non_finite_values_is_well_formed(name: str) -> None:
    assert receive(BODIES[name]())[0].complete


def test_each_body_is_made_afresh() -> None:
    for make in BODIES.values():
        assert make() == make() != valid()


def test_a_refusal_comes_before_any_tensor_byte() -> None:
    """So a push is refused while its tensors are still on the way, and the target stays as it was."""
    for name in MALFORMED:
        body = BODIES[name]()
        target = bytearray(b"\xaa" * 4 * MANIFEST.numel)
        with pytest.raises(MalformedTensors):
            lay(Receiver(MANIFEST, memoryview(target), len(body)), body)
        assert target == b"\xaa" * len(target), name


def test_a_receiver_stays_refused() -> None:
    body = BODIES["not-json"]()
    receiver = Receiver(MANIFEST, memoryview(bytearray(4 * MANIFEST.numel)), len(body))
    for _ in range(2):
        with pytest.raises(MalformedTensors):
            lay(receiver, body)


@pytest.mark.parametrize("length", [0, 7, 2**40 + 8, 2**63 + 8])
def test_an_impossible_length_is_refused_before_a_byte_is_read(length: int) -> None:
    with pytest.raises(MalformedTensors):
        Receiver(MANIFEST, memoryview(bytearray(4 * MANIFEST.numel)), length)


def test_the_limit_is_the_last_length_accepted() -> None:
    limit = body_limit(MANIFEST)
    target = memoryview(bytearray(4 * MANIFEST.numel))
    assert Receiver(MANIFEST, target, limit).missing == limit
    with pytest.raises(MalformedTensors) as refusal:
        Receiver(MANIFEST, target, limit + 1)
    assert refusal.value.extensions == {"limit": limit}


def test_a_long_header_is_refused_without_allocating_it() -> None:
    """A run of 1 Gi elements allows a body in which a header of 2 GiB would have room."""
    manifest = Manifest([ParameterSpec(name="w", shape=(2**30,))])
    size = 2**31
    assert size + 8 < body_limit(manifest)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedTensors) as refusal:
            lay(Receiver(manifest, memoryview(b""), size + 8), size.to_bytes(8, "little"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refusal.value.extensions == {"limit": header_limit(manifest)}
    assert peak < 2**20


@pytest.mark.parametrize("name", ["nested-lists", "very-large-integer", "header-padded-past-the-limit"])
def test_a_bomb_costs_no_more_than_the_header_may(name: str) -> None:
    body = BODIES[name]()
    tracemalloc.start()
    try:
        with pytest.raises(MalformedTensors):
            receive(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * header_limit(MANIFEST)


BYTES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b"\\",
            b",",
            b":",
            b"-",
            b"0",
            b"1e9",
            b"1.0",
            b"null",
            b"true",
            b"NaN",
            b"F16",
            b"BF16",
            b"F64",
            b"__metadata__",
            b"weight",
            b"bias",
            b"\\ud800",
            b"\xff",
            b"\x00",
            b" ",
        ]
    ),
)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid body in which a few stretches were replaced, and whose header length may be set right again."""
    body = bytearray(valid(draw(st.sampled_from(["F32", "BF16", "F16"])), draw(st.sampled_from([None, {"a": "b"}]))))
    size = int.from_bytes(body[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(body)))
        old = draw(st.integers(0, 8))
        new = draw(BYTES)
        if 8 <= begin < 8 + size:
            size += len(new) - len(body[begin : begin + old])
        body[begin : begin + old] = new
    if draw(st.booleans()):
        body[:8] = max(size, 0).to_bytes(8, "little")
    return bytes(body)


@settings(derandomize=True, deadline=None, max_examples=1500)
@given(mutants(), st.sampled_from([None, 1, 7]))
def test_a_mutant_parses_or_is_refused(body: bytes, chunk: int | None) -> None:
    try:
        receiver, _ = receive(body, chunk)
    except MalformedTensors:
        return
    assert receiver.complete
    assert receiver.missing == 0
    assert receiver.dtypes.keys() == MANIFEST.by_name.keys()
    # What is accepted is a body to everyone else too.
    assert {name: entry["shape"] for name, entry in deserialize(body)} == {
        slot.name: list(slot.shape) for slot in MANIFEST.slots
    }


@st.composite
def headers(draw: st.DrawFn) -> dict[str, object]:
    """A valid header in which one place holds any JSON."""
    head = header()
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    name = draw(st.sampled_from([*head, "__metadata__", "other"]))
    if name in head and draw(st.booleans()):
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        head[name][key] = draw(json_values)
    else:
        head[name] = draw(json_values)
    return head


@settings(derandomize=True, deadline=None, max_examples=500)
@given(headers())
def test_a_header_of_other_values_parses_or_is_refused(head: dict[str, object]) -> None:
    text = json.dumps(head).encode()
    body = len(text).to_bytes(8, "little") + text + valid()[-4 * numel() :]
    try:
        receiver, target = receive(body)
    except MalformedTensors:
        return
    assert receiver.complete
    assert target == body[-4 * numel() :]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_refused(noise: bytes, framed: bool) -> None:
    body = len(noise).to_bytes(8, "little") + noise if framed else noise
    with pytest.raises(MalformedTensors):
        receive(body)
