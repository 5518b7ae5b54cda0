"""Malformed bodies are refused, in bounded memory; `fuzz.tensors` makes others."""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest

from freestep.api.models import ParameterSpec
from freestep.errors import MalformedTensors
from freestep.wire.header import body_limit, header_limit
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from malformed.bodies import BODIES, NON_FINITE, PARAMETERS, numel, valid

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
